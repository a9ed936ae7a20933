"""Sealing: what was sealed opens for whom and for what it was sealed, and nowhere else."""

import hashlib
import hmac
from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from fedcore.crypto.hpke import (
    OVERHEAD,
    PUBLIC,
    new_key,
    open_,
    private_bytes,
    private_key,
    public_bytes,
    seal,
)
from fedcore.errors import ProtocolError, UpdateRefused

KEY = new_key()
XWING = bytes.fromhex("5c2e2f2f5e5c")  # X-Wing's label, a picture of one


@given(st.binary(max_size=2000), st.binary(max_size=40), st.binary(max_size=40))
def test_opens_what_was_sealed(plaintext: bytes, info: bytes, aad: bytes) -> None:
    sealed = seal(public_bytes(KEY), plaintext, info, aad)
    assert len(sealed) == len(plaintext) + OVERHEAD
    assert open_(KEY, sealed, info, aad) == plaintext


def test_no_two_are_alike() -> None:
    assert seal(public_bytes(KEY), b"update", b"", b"") != seal(public_bytes(KEY), b"update", b"", b"")


def test_is_rfc_9180_with_the_hybrid_kem() -> None:
    """Opened again with hashes and the two key exchanges alone, so that others can write the other end."""
    plaintext, info, aad = b"an update", b"what for", b"of whom"
    sealed = seal(public_bytes(KEY), plaintext, info, aad)
    mlkem_sent, x25519_sent, content = sealed[:1088], sealed[1088:1120], sealed[1120:]
    exchanged = KEY.mlkem.decapsulate(mlkem_sent) + KEY.x25519.exchange(
        X25519PublicKey.from_public_bytes(x25519_sent)
    )
    ours = KEY.x25519.public_key().public_bytes_raw()
    shared = hashlib.sha3_256(exchanged + x25519_sent + ours + XWING).digest()
    suite = b"HPKE" + bytes.fromhex("647a 0001 0002")

    def extract(salt: bytes, label: bytes, key: bytes) -> bytes:
        return hmac.digest(salt, b"HPKE-v1" + suite + label + key, "sha256")

    def expand(secret: bytes, label: bytes, size: int) -> bytes:
        text = size.to_bytes(2, "big") + b"HPKE-v1" + suite + label + context
        return hmac.digest(secret, text + b"\x01", "sha256")[:size]

    bound = len(info).to_bytes(4, "big") + info + aad
    context = b"\x00" + extract(b"", b"psk_id_hash", b"") + extract(b"", b"info_hash", bound)
    secret = extract(shared, b"secret", b"")
    key, nonce = expand(secret, b"key", 32), expand(secret, b"base_nonce", 12)
    assert AESGCM(key).decrypt(nonce, content, None) == plaintext


@pytest.mark.parametrize(
    ("info", "aad"), [(b"info2", b"aad"), (b"info", b"aa"), (b"infoa", b"ad"), (b"", b"")]
)
def test_another_purpose_does_not_open(info: bytes, aad: bytes) -> None:
    sealed = seal(public_bytes(KEY), b"update", b"info", b"aad")
    with pytest.raises(UpdateRefused, match="does not open"):
        open_(KEY, sealed, info, aad)


def test_another_key_does_not_open() -> None:
    with pytest.raises(UpdateRefused, match="does not open"):
        open_(new_key(), seal(public_bytes(KEY), b"update", b"", b""), b"", b"")


@pytest.mark.parametrize(
    "change",
    [
        lambda sealed: sealed[:-1],
        lambda sealed: sealed[:OVERHEAD],
        lambda sealed: sealed[: OVERHEAD - 1],
        lambda sealed: b"",
        lambda sealed: sealed + b"\x00",
        lambda sealed: sealed[:1088] + bytes(32) + sealed[1120:],  # a point of low order
        *(
            lambda sealed, i=i: sealed[:i] + bytes([sealed[i] ^ 1]) + sealed[i + 1 :]
            for i in (0, 1100, 1121, 1150)
        ),
    ],
)
def test_what_was_altered_does_not_open(change: Callable[[bytes], bytes]) -> None:
    sealed = seal(public_bytes(KEY), b"an update of some length", b"info", b"aad")
    with pytest.raises(UpdateRefused, match="does not open"):
        open_(KEY, change(sealed), b"info", b"aad")


@pytest.mark.parametrize("size", [0, 32, PUBLIC - 1, PUBLIC + 1])
def test_a_key_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(ProtocolError, match=f"has {size} bytes, expected 1216"):
        seal(bytes(size), b"update", b"", b"")


@pytest.mark.parametrize("public", [b"\xff" * PUBLIC, public_bytes(KEY)[:-32] + bytes(32)])
def test_a_malformed_key_is_refused(public: bytes) -> None:
    """Coefficients of ML-KEM beyond its modulus; X25519's point of order 4, with which a secret is none."""
    with pytest.raises(ProtocolError, match="is no public key of ML-KEM-768 with X25519"):
        seal(public, b"update", b"", b"")


def test_a_key_that_was_written_opens_what_was_sealed_to_it() -> None:
    sealed = seal(public_bytes(KEY), b"update", b"info", b"aad")
    assert open_(private_key(private_bytes(KEY)), sealed, b"info", b"aad") == b"update"


def test_the_key_is_not_shown() -> None:
    assert repr(KEY) == "PrivateKey()"
