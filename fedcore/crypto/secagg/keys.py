"""What the keys of an attempt give: masks, encrypted shares, commitments.

All keys come from HKDF-SHA256 (RFC 5869) with the digest of the configuration as salt. Its info names what
the key is for, the members concerned by their positions, and the transcript, so no key serves two purposes.
"""

import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from numpy.typing import NDArray

from fedcore.crypto.prg import Masks, Words
from fedcore.crypto.secagg.config import LABEL
from fedcore.crypto.shamir import SHARE
from fedcore.errors import ProtocolError

SECRET = 32  # bytes of a private key, a public key, a seed and a mask's key
CIPHERTEXT = 2 * SHARE + 16  # bytes: two shares and the tag
_NONCE = bytes(12)  # each key encrypts one message


@dataclass(frozen=True)
class Pair:
    """An X25519 key pair from 32 random bytes, which are what is shared."""

    private: X25519PrivateKey
    public: bytes

    @classmethod
    def of(cls, secret: bytes) -> "Pair":
        """Return the pair of a private key's bytes."""
        private = X25519PrivateKey.from_private_bytes(secret)
        return cls(private, private.public_key().public_bytes_raw())

    def agreed(self, public: bytes) -> bytes:
        """Return what both ends know; raises ProtocolError for a key of low order, which agrees on zeros."""
        try:
            return self.private.exchange(X25519PublicKey.from_public_bytes(public))
        except ValueError as error:
            raise ProtocolError("a client's key is of low order") from error


@dataclass(frozen=True)
class Context:
    """What every key of an attempt is bound to: the digest of the configuration, and the transcript."""

    digest: bytes
    transcript: bytes

    def self_mask(self, seed: bytes, member: int) -> bytes:
        """Return the keys (32 bytes narrow, 32 wide) of a client's own mask."""
        return self._derived(seed, b"self", (member,), 2 * SECRET)

    def pair_mask(self, agreed: bytes, one: int, other: int) -> bytes:
        """Return the keys (32 bytes narrow, 32 wide) of the mask between two members, in either order."""
        return self._derived(agreed, b"pair", (min(one, other), max(one, other)), 2 * SECRET)

    def sealed(self, agreed: bytes, source: int, target: int, shares: bytes) -> bytes:
        """Return two shares, encrypted from one member to another."""
        key = self._derived(agreed, b"share", (source, target), SECRET)
        return AESGCM(key).encrypt(_NONCE, shares, self._info(b"share", (source, target)))

    def opened(self, agreed: bytes, source: int, target: int, ciphertext: bytes) -> bytes | None:
        """Return what `sealed` encrypted; None where the ciphertext is another's or was altered."""
        key = self._derived(agreed, b"share", (source, target), SECRET)
        try:
            return AESGCM(key).decrypt(_NONCE, ciphertext, self._info(b"share", (source, target)))
        except InvalidTag:
            return None

    def _info(self, purpose: bytes, members: tuple[int, ...]) -> bytes:
        positions = b"".join(member.to_bytes(4, "big") for member in members)
        return LABEL + purpose + b"\0" + positions + self.transcript

    def _derived(self, secret: bytes, purpose: bytes, members: tuple[int, ...], length: int) -> bytes:
        """Return HKDF-SHA256's output: at most two blocks are ever asked for."""
        info = self._info(purpose, members)
        extracted = hmac.digest(self.digest, secret, "sha256")
        first = hmac.digest(extracted, info + b"\1", "sha256")
        if length == SECRET:
            return first
        return first + hmac.digest(extracted, first + info + b"\2", "sha256")


def commitment(digest: bytes, seed: bytes) -> bytes:
    """Return what a client says of its seed before anyone knows it."""
    return sha256(LABEL + b"seed\0" + digest + seed).digest()


def add_masks(narrow: Words, wide: NDArray[np.uint64], plus: Sequence[bytes], minus: Sequence[bytes]) -> None:
    """Add and subtract masks, in place, each by its 64 bytes: the keys for narrow words and for wide ones."""
    for words, start in ((narrow, 0), (wide, SECRET)):
        keys = ([key[start : start + SECRET] for key in side] for side in (plus, minus))
        Masks(*keys).add_to(words)
