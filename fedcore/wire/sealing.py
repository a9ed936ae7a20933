"""A sealed update: its bytes under the key of one attempt, which the coordinator keeps in memory alone.

The coordinator makes a key pair for every attempt and hands out the public key with the work, signed. What
is sealed is the update as one string of bytes: its scalars as float64, then its vectors in the layout's
dtype, both in the plan's order and little-endian. Bound to it are federation, attempt, client and layout, so
that sealed bytes open nowhere but where they belong. HPKE is RFC 9180.
"""

import numpy as np
from cryptography import x509
from google.protobuf.message import DecodeError

from fedcore.crypto import hpke
from fedcore.crypto.identity import Clock, Identity, utc_now
from fedcore.errors import AuthenticationError, ProtocolError
from fedcore.messages import Plan, Ref, Update
from fedcore.wire.codec import to_wire
from fedcore.wire.signing import opened, sign
from fedcore.wire.v1 import coordinator_pb2 as pb
from fedcore.wire.v1.authority_pb2 import Signed

INFO = b"fedcore sealed update 1"


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


def seal(public_key: bytes, content: bytes, bound: bytes) -> bytes:
    """Return `content` sealed to a public key, `hpke.OVERHEAD` bytes longer; `bound` is `binding`'s."""
    return hpke.seal(public_key, content, INFO, bound)


def unseal(key: hpke.PrivateKey, sealed: bytes, bound: bytes) -> bytes:
    """Return what was sealed; raises UpdateRefused where it does not open."""
    return hpke.open_(key, sealed, INFO, bound)


def binding(federation: str, ref: Ref, client: str, layout: str) -> bytes:
    """Return what a sealed update is bound to; layout: its digest. No part can hold the NUL between them."""
    return "\0".join((federation, str(ref), client, layout)).encode()


def size(plan: Plan) -> int:
    """Return how many bytes an update of a plan is before it is sealed."""
    return 8 * len(plan.scalars) + sum(s.length * s.dtype.itemsize for s in plan.vectors.values())


def packed(plan: Plan, update: Update) -> bytes:
    """Return an update's scalars, then its vectors, little-endian and in the plan's order."""
    scalars = np.array([update.scalars[name] for name in plan.scalars], "<f8")
    ordered = ((update.vectors[name], spec.dtype.newbyteorder("<")) for name, spec in plan.vectors.items())
    return b"".join([scalars.tobytes(), *(np.asarray(vector, dtype).tobytes() for vector, dtype in ordered)])


def unpacked(plan: Plan, content: bytes) -> Update:
    """Return the update that `packed` wrote, of `size(plan)` bytes; its vectors are views of them."""
    start = 8 * len(plan.scalars)
    scalars = dict(zip(plan.scalars, np.frombuffer(content[:start], "<f8").tolist(), strict=True))
    vectors = {}
    for name, spec in plan.vectors.items():
        vectors[name] = np.frombuffer(content, spec.dtype, spec.length, start)
        start += vectors[name].nbytes
    return Update(vectors, scalars)
