"""Sealing to a public key: HPKE (RFC 9180), single-shot, safe also against a quantum computer of later.

The suite is ML-KEM-768 with X25519 (draft-ietf-hpke-pq, KEM 0x647a), HKDF-SHA256 and AES-256-GCM. Nothing
shows who sealed. Whoever needs to know must learn it elsewhere: in fedcore from mutual TLS.
"""

from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import (
    AEAD,
    KDF,
    KEM,
    MLKEM768X25519PrivateKey,
    MLKEM768X25519PublicKey,
    Suite,
)
from cryptography.utils import Buffer

from fedcore.errors import ProtocolError, UpdateRefused

PUBLIC = 1216  # bytes of a public key: ML-KEM-768's 1184, then X25519's 32
OVERHEAD = 1136  # bytes that sealing adds: 1088 and 32 of the encapsulated key, 16 of the tag
_SUITE = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)


@dataclass(frozen=True)
class PrivateKey:
    """A recipient's key."""

    mlkem: MLKEM768PrivateKey = field(repr=False)
    x25519: X25519PrivateKey = field(repr=False)


def new_key() -> PrivateKey:
    """Return a new key from the operating system's entropy."""
    return PrivateKey(MLKEM768PrivateKey.generate(), X25519PrivateKey.generate())


def public_bytes(key: PrivateKey) -> bytes:
    """Return the public key in 1,216 bytes."""
    return key.mlkem.public_key().public_bytes_raw() + key.x25519.public_key().public_bytes_raw()


def private_bytes(key: PrivateKey) -> bytes:
    """Return the private key in 96 bytes: ML-KEM's seed of 64, then X25519's 32."""
    return key.mlkem.private_bytes_raw() + key.x25519.private_bytes_raw()


def private_key(raw: bytes) -> PrivateKey:
    """Return the key that `private_bytes` wrote."""
    return PrivateKey(
        MLKEM768PrivateKey.from_seed_bytes(raw[:64]), X25519PrivateKey.from_private_bytes(raw[64:])
    )


def seal(public: bytes, plaintext: Buffer, info: bytes, aad: bytes) -> bytes:
    """Return the plaintext sealed to a public key, 1,136 bytes longer.

    It opens only with the same info (what it is for) and aad (what it belongs to). Raises ProtocolError for
    a malformed public key.
    """
    if len(public) != PUBLIC:
        raise ProtocolError(f"the key to seal to has {len(public)} bytes, expected {PUBLIC}")
    try:
        key = MLKEM768X25519PublicKey(
            MLKEM768PublicKey.from_public_bytes(public[:-32]), X25519PublicKey.from_public_bytes(public[-32:])
        )
        return _SUITE.encrypt(plaintext, key, _bound(info, aad))
    except ValueError as error:  # a coefficient that is too large, or a point of low order
        raise ProtocolError("the key to seal to is no public key of ML-KEM-768 with X25519") from error


def open_(private: PrivateKey, sealed: Buffer, info: bytes, aad: bytes) -> bytes:
    """Return the plaintext; raises UpdateRefused for whatever was not sealed to this key, info and aad."""
    key = MLKEM768X25519PrivateKey(private.mlkem, private.x25519)
    try:
        return _SUITE.decrypt(sealed, key, _bound(info, aad))
    except (InvalidTag, ValueError):
        raise UpdateRefused(
            "what was sealed does not open: it was altered, or sealed to another key or for another round"
        ) from None


def _bound(info: bytes, aad: bytes) -> bytes:
    """Return HPKE's info: of a single-shot API it takes the place of the associated data (RFC 9180, 8.1)."""
    return len(info).to_bytes(4, "big") + info + aad
