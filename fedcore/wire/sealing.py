"""A sealed update: its bytes under the key of one attempt, which the coordinator alone can open.

The coordinator makes a key pair for every attempt and hands out the public key with the work, signed. What
is sealed is the update as one string of bytes: its scalars as float64, then its vectors in the layout's
dtype, both in the plan's order and little-endian.

    HPKE (RFC 9180) of a fresh content key      1,168 bytes
    AES-256-GCM of each MiB under that key      16 bytes longer each; the last one shorter

HPKE binds the content key to federation, attempt, client and layout, so that sealed bytes open nowhere but
where they belong. A block's nonce is its number, and whether it is the last: blocks that were reordered,
repeated, left out or cut off do not open (STREAM; Hoang, Reyhanitabar, Rogaway, Vizár 2015, "Online
authenticated-encryption and its nonce-reuse misuse-resistance", section 7). So neither side ever holds more
than a block in memory.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
from cryptography import x509
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.utils import Buffer
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from fedcore.crypto import hpke
from fedcore.crypto.identity import Clock, Identity, utc_now
from fedcore.encoding import blocks
from fedcore.errors import AuthenticationError, ProtocolError, UpdateRefused
from fedcore.layout import Vector
from fedcore.messages import Plan, Ref, Update
from fedcore.wire.codec import to_wire
from fedcore.wire.signing import opened, sign
from fedcore.wire.v1 import coordinator_pb2 as pb
from fedcore.wire.v1.authority_pb2 import Signed

INFO = b"fedcore sealed update 2"
BLOCK = 1 << 20  # bytes that are sealed together
KEY, TAG = 32, 16
HEAD = hpke.OVERHEAD + KEY

Read = Callable[[int, int], bytes]  # bytes from one place up to another


def announce(identity: Identity, ref: Ref, public_key: bytes) -> bytes:
    """Return the key of an attempt with the coordinator's signature, as `Assignment.key` has it."""
    return sign(identity, pb.AggregatorKey(ref=to_wire(ref), public_key=public_key)).SerializeToString()


def announced(key: bytes, ref: Ref, identity: Identity, clock: Clock = utc_now) -> bytes:
    """Return the public key in `Assignment.key`; `identity` is the client's.

    Raises ProtocolError where it is malformed, and AuthenticationError unless a coordinator of the same
    federation made it for this attempt.
    """
    root = x509.load_pem_x509_certificate(identity.root)
    try:
        signed = Signed.FromString(key)
    except DecodeError as error:
        raise ProtocolError(f"the key of {ref} is malformed: {error}") from error
    said_by, message = opened(pb.AggregatorKey, signed, root, clock)
    if (said_by.federation, said_by.role) != (identity.name.federation, "coordinator"):
        raise AuthenticationError(
            f"the key of {ref} is signed by {said_by}, expected a coordinator of {identity.name.federation}"
        )
    if message.ref != to_wire(ref):
        raise AuthenticationError(f"the coordinator's key is of another attempt than {ref}")
    return message.public_key


def seal(public_key: bytes, content: Iterable[Buffer], bound: bytes) -> Iterator[bytes]:
    """Yield `content`, in pieces of any size, sealed to a public key; `bound` is `binding`'s."""
    key = AESGCM.generate_key(8 * KEY)
    yield hpke.seal(public_key, key, INFO, bound)
    cipher, rest, index = AESGCM(key), bytearray(), 0
    for piece in content:
        rest += piece
        while len(rest) > BLOCK:
            yield cipher.encrypt(_nonce(index, False), rest[:BLOCK], None)
            del rest[:BLOCK]
            index += 1
    yield cipher.encrypt(_nonce(index, True), rest, None)


def _nonce(index: int, last: bool) -> bytes:
    return index.to_bytes(11, "big") + bytes([last])


class Sealed:
    """What `seal` has made, opened where it is read, one block at a time."""

    def __init__(self, key: hpke.PrivateKey, sealed: NDArray[np.uint8], bound: bytes) -> None:
        """Open the content key; raises UpdateRefused. sealed: shape (n,), in memory or mapped."""
        self.cipher = AESGCM(hpke.open_(key, sealed[:HEAD].tobytes(), INFO, bound))
        self.body = sealed[HEAD:]
        self.last = max(0, len(self.body) - 1) // (BLOCK + TAG)
        self.index, self.block = -1, b""

    def read(self, start: int, stop: int) -> bytes:
        """Return a range of the content, which has to reach so far; raises UpdateRefused."""
        parts = []
        while start < stop:
            index, skip = divmod(start, BLOCK)
            parts.append(self._opened(index)[skip : skip + stop - start])
            start += len(parts[-1])
        return b"".join(parts)

    def _opened(self, index: int) -> bytes:
        if index != self.index:
            block = self.body[index * (BLOCK + TAG) : (index + 1) * (BLOCK + TAG)].data
            try:
                self.block = self.cipher.decrypt(_nonce(index, index == self.last), block, None)
            except (InvalidTag, ValueError):
                raise UpdateRefused(f"the sealed update does not open: block {index} was altered") from None
            self.index = index
        return self.block


def binding(federation: str, ref: Ref, client: str, layout: str) -> bytes:
    """Return what a sealed update is bound to; layout: its digest. No part can hold the NUL between them."""
    return "\0".join((federation, str(ref), client, layout)).encode()


def size(plan: Plan) -> int:
    """Return how many bytes an update of a plan is before it is sealed."""
    return 8 * len(plan.scalars) + sum(s.length * s.dtype.itemsize for s in plan.vectors.values())


def sealed_size(plan: Plan) -> int:
    """Return how many bytes an update of a plan is when it is sealed."""
    return HEAD + size(plan) + TAG * max(1, -(-size(plan) // BLOCK))


def packed(plan: Plan, update: Update) -> Iterator[bytes]:
    """Yield, in pieces, an update's scalars, then its vectors, little-endian and in the plan's order."""
    yield np.array([update.scalars[name] for name in plan.scalars], "<f8").tobytes()
    for name, spec in plan.vectors.items():
        for block in blocks(spec.length):
            yield np.asarray(update.vectors[name][block], spec.dtype.newbyteorder("<")).tobytes()


def opened_update(plan: Plan, key: hpke.PrivateKey, sealed: NDArray[np.uint8], bound: bytes) -> Update:
    """Return the update of a plan that was sealed; its vectors are opened where they are read.

    Raises UpdateRefused where it does not open, now or when it is read.
    """
    if len(sealed) != sealed_size(plan):
        raise UpdateRefused(f"the sealed update has {len(sealed)} bytes, expected {sealed_size(plan)}")
    return unpacked(plan, Sealed(key, sealed, bound).read)


def unpacked(plan: Plan, read: Read) -> Update:
    """Return the update that `packed` wrote; its vectors are read where they are looked at."""
    start = 8 * len(plan.scalars)
    scalars = dict(zip(plan.scalars, np.frombuffer(read(0, start), "<f8").tolist(), strict=True))
    vectors = {}
    for name, spec in plan.vectors.items():
        vectors[name] = cast("Vector", Stored(read, start, spec.dtype, (spec.length,)))
        start += spec.length * spec.dtype.itemsize
    return Update(vectors, scalars)


@dataclass(frozen=True)
class Stored:
    """A vector that is read block by block; a round uses it as an array, of shape (d,) or as a row (1, d)."""

    read: Read
    start: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> Any:
        match key:
            case None:
                return replace(self, shape=(1, *self.shape))
            case int():
                return replace(self, shape=self.shape[1:])
            case slice():
                return self._at(key)
        return self._at(key[1])[None]  # all rows, which is one

    def _at(self, place: slice) -> Vector:
        first, last, _ = place.indices(self.shape[-1])
        size = self.dtype.itemsize
        return np.frombuffer(self.read(self.start + first * size, self.start + last * size), self.dtype)
