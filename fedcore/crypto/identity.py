"""The identity of a participant: a folder with its private key, its certificate and the root that it trusts.

identity.pem  0600  the private key (PKCS8, ECDSA P-256, which never leaves the device; encrypted where there
                    is a passphrase), its certificate, the intermediate
ca.pem              the federation's root
authority           HOST:PORT of the authority, where the certificate is renewed
next.pem      0600  the key of a request to the authority that has no answer yet

Key and certificate share a file because renewal replaces both: a crash leaves the old pair or the new one.
"""

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from cryptography import x509

from fedcore.crypto.certificates import (
    Key,
    fingerprint,
    key_from_pem,
    key_to_pem,
    new_key,
    renewal_time,
    to_pem,
    verify_chain,
)
from fedcore.crypto.files import make_private_folder, read_private, write_atomically
from fedcore.crypto.names import Name
from fedcore.errors import AuthenticationError, ConfigError

IDENTITY, ROOT, AUTHORITY, NEXT = "identity.pem", "ca.pem", "authority", "next.pem"
ENROL = (
    "get a token from 'fedcore authority token' and enrol with it: fedcore client enroll TOKEN "
    "(a coordinator: fedcore server init; an operator: fedcore run enroll)"
)
UNLOCK = "give the passphrase in FEDCORE_PASSPHRASE, or its file in FEDCORE_PASSPHRASE_FILE, or at the prompt"

Clock = Callable[[], datetime]


def utc_now() -> datetime:
    """Return the time in UTC; whatever decides by time takes it as an argument, so that tests can turn it."""
    return datetime.now(UTC)


@dataclass(frozen=True)
class Certified:
    """What a participant's certificate says: whose it is, when to renew it, when it ends (UTC).

    root_fingerprint: SHA-256 of the root's certificate.
    """

    name: Name
    renewal: datetime
    not_after: datetime
    root_fingerprint: str

    @classmethod
    def load(cls, folder: Path, clock: Clock = utc_now) -> "Certified":
        """Return what the certificate in a folder says, without its key; raises as `Identity.load`."""
        _, chain, root = _read(folder)
        with _naming(folder):
            return Certified(*_certified(chain, root, clock()))


@dataclass(frozen=True)
class Identity(Certified):
    """A private key and the certificates that say whose it is, checked against each other.

    key, chain, root: PEM, as TLS wants them; chain holds the leaf, then the intermediate.
    authority: HOST:PORT, empty if unknown. passphrase: encrypts the key on disk, empty for none.
    """

    key: bytes = field(repr=False)
    chain: bytes = field(repr=False)
    root: bytes = field(repr=False)
    authority: str = ""
    passphrase: bytes = field(default=b"", repr=False)

    @classmethod
    def verified(
        cls,
        key: Key,
        chain: list[x509.Certificate],
        root: x509.Certificate,
        now: datetime,
        authority: str = "",
        passphrase: bytes = b"",
    ) -> Self:
        """Return the identity that key, chain and root make together; raises AuthenticationError."""
        if not chain or chain[0].public_key() != key.public_key():
            raise AuthenticationError("the certificate is for another key than this identity's")
        said, files = _certified(chain, root, now), (key_to_pem(key), to_pem(*chain), to_pem(root))
        return cls(*said, *files, authority, passphrase)

    @classmethod
    def load(cls, folder: Path, clock: Clock = utc_now, passphrase: bytes = b"") -> Self:
        """Return the identity in a folder.

        Raises ConfigError where a file is missing or malformed, or others can read the key, and
        AuthenticationError where the certificate has expired or does not belong to key and root, and where
        the passphrase does not open the key.
        """
        pem, chain, root = _read(folder)
        try:
            key = key_from_pem(pem, passphrase)
        except ValueError as error:
            raise ConfigError(f"the identity in {folder} is damaged: {error}; {ENROL}") from error
        except AuthenticationError as error:
            raise AuthenticationError(f"the identity in {folder}: {error}; {UNLOCK}") from error
        address = folder / AUTHORITY
        authority = address.read_text(encoding="utf-8").strip() if address.exists() else ""
        with _naming(folder):
            return cls.verified(key, chain, root, clock(), authority, passphrase)

    def save(self, folder: Path) -> None:
        """Write the files, key and certificate last: a folder that holds them holds a whole identity."""
        make_private_folder(folder)
        write_atomically(folder / ROOT, self.root, 0o644)
        write_atomically(folder / AUTHORITY, f"{self.authority}\n".encode(), 0o644)
        key = key_to_pem(key_from_pem(self.key), self.passphrase)
        write_atomically(folder / IDENTITY, key + self.chain, 0o600)
        (folder / NEXT).unlink(missing_ok=True)


def _read(folder: Path) -> tuple[bytes, list[x509.Certificate], x509.Certificate]:
    """Return what is in identity.pem (the text, and the certificates in it) and the root."""
    try:
        pem = read_private(folder / IDENTITY)
        root = x509.load_pem_x509_certificate((folder / ROOT).read_bytes())
        return pem, x509.load_pem_x509_certificates(pem), root
    except FileNotFoundError as error:
        raise ConfigError(f"no identity in {folder}: {error.filename} is missing; {ENROL}") from error
    except ValueError as error:
        raise ConfigError(f"the identity in {folder} is damaged: {error}; {ENROL}") from error


def _certified(
    chain: list[x509.Certificate], root: x509.Certificate, now: datetime
) -> tuple[Name, datetime, datetime, str]:
    leaf = chain[0]
    return verify_chain(chain, root, now), renewal_time(leaf), leaf.not_valid_after_utc, fingerprint(root)


@contextmanager
def _naming(folder: Path) -> Iterator[None]:
    try:
        yield
    except AuthenticationError as error:
        raise AuthenticationError(f"the identity in {folder}: {error}; {ENROL}") from error


def is_locked(folder: Path) -> bool:
    """Return whether the key in a folder is encrypted; False where there is none."""
    keys = (folder / IDENTITY, folder / NEXT)
    return any(b"BEGIN ENCRYPTED" in read_private(key) for key in keys if key.exists())


@contextmanager
def requesting(folder: Path, passphrase: bytes = b"", fresh: bool = False) -> Iterator[Key]:
    """Hold the folder for a request to the authority, and give the key to ask a certificate for.

    It is that of a request without an answer, so that one whose reply was lost is repeated with the same key;
    else the identity's, unless a `fresh` one is wanted; else a new one. `Identity.save` ends the request.
    Raises ConfigError where a key is malformed or others can read it, and AuthenticationError for a
    passphrase that does not open it.
    """
    make_private_folder(folder)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        known = [NEXT] if fresh else [NEXT, IDENTITY]
        path = next((folder / file for file in known if (folder / file).exists()), folder / NEXT)
        if not path.exists():
            write_atomically(path, key_to_pem(new_key(), passphrase), 0o600)
        try:
            key = key_from_pem(read_private(path), passphrase)
        except ValueError as error:
            raise ConfigError(
                f"{path} is no key of fedcore's: {error}; move it away and enrol again"
            ) from error
        except AuthenticationError as error:
            raise AuthenticationError(f"{path}: {error}; {UNLOCK}") from error
        yield key
