"""The sealed updates of one attempt: opened block by block to be judged, at rest until the round closes.

The attempt's private key is kept beside them, in the journal, wrapped by a key that follows from the
coordinator's identity. So a coordinator that was started again opens what it has acknowledged, and whoever
gets the attempt's files without that identity, or without its passphrase, opens nothing.
"""

import secrets
from pathlib import Path

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedcore.crypto import hpke
from fedcore.crypto.certificates import key_from_pem
from fedcore.crypto.identity import Identity
from fedcore.errors import FedcoreError
from fedcore.layout import Layout
from fedcore.messages import Plan, Ref, Update
from fedcore.wire import sealing

NONCE = 12


class KeyLost(FedcoreError):
    """The key of an attempt does not open: the coordinator's identity was renewed since."""


def wrapped_key(identity: Identity, ref: Ref) -> bytes:
    """Return the private key of a new attempt, wrapped for its journal."""
    nonce, private = secrets.token_bytes(NONCE), hpke.private_bytes(hpke.new_key())
    return nonce + _wrapping(identity).encrypt(nonce, private, str(ref).encode())


def _wrapping(identity: Identity) -> AESGCM:
    """Return what wraps under an identity: HKDF (RFC 5869) of its private key, for this purpose alone."""
    secret = key_from_pem(identity.key).private_numbers().private_value.to_bytes(32, "big")
    return AESGCM(HKDF(SHA256(), 32, None, b"fedcore attempt key 1").derive(secret))


class Vault:
    """What opens the updates of one attempt, and the files in which they lie."""

    def __init__(self, identity: Identity, plan: Plan, layout: Layout, wrapped: bytes) -> None:
        """Open a key of `wrapped_key`; `announced` is what clients are told of it. Raises KeyLost."""
        self.plan, self.layout, self.federation = plan, layout, identity.name.federation
        nonce, ref = wrapped[:NONCE], plan.ref
        try:
            private = _wrapping(identity).decrypt(nonce, wrapped[NONCE:], str(ref).encode())
        except (InvalidTag, ValueError):
            raise KeyLost(f"the key of {ref} does not open with this identity") from None
        self.key = hpke.private_key(private)
        self.announced = sealing.announce(identity, ref, hpke.public_bytes(self.key))
        self.size = sealing.sealed_size(plan)

    def opened(self, client: str, path: Path) -> Update:
        """Return the update in a sealed file; raises UpdateRefused where it does not open."""
        bound = sealing.binding(self.federation, self.plan.ref, client, self.layout.digest)
        return sealing.opened_update(self.plan, self.key, np.memmap(path, np.uint8, mode="r"), bound)
