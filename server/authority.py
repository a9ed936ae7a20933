"""The authority: who may enrol under which name, the certificates that say so, and the heads of ledgers.

A folder, 0700, private keys and database 0600:

    authority.toml           federation and public address
    ca.pem                   the root that every participant pins
    root/key.pem             signs intermediates only; take root/ offline once the authority runs
    certificate.pem key.pem  the intermediate, which signs participants
    authority.db             tokens (only their hashes), what was issued, and what ledgers it was shown
"""

import secrets
import sqlite3
import tomllib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Self

import tomli_w
from cryptography import x509

from fedcore.chain import Head
from fedcore.crypto import certificates
from fedcore.crypto.certificates import Key, PublicKey, key_from_pem, key_to_pem, new_key, to_pem
from fedcore.crypto.files import make_private_folder, read_private, write_atomically
from fedcore.crypto.identity import Clock, Identity, utc_now
from fedcore.crypto.names import Name
from fedcore.errors import AuthenticationError, ConfigError, UpdateRefused
from fedcore.wire.address import parse_address
from fedcore.wire.token import SECRET_BYTES, Token

SCHEMA = """
CREATE TABLE certificates (
    serial    TEXT PRIMARY KEY,  -- hexadecimal: its 160 bits fit no INTEGER
    name      TEXT NOT NULL,     -- fedcore://FEDERATION/ROLE/NAME
    not_after INTEGER NOT NULL,  -- seconds since 1970
    chain     BLOB NOT NULL      -- PEM
) STRICT;
CREATE TABLE tokens (
    secret_sha256 BLOB PRIMARY KEY,
    name          TEXT NOT NULL,
    expires       INTEGER NOT NULL,
    used          INTEGER,
    serial        TEXT REFERENCES certificates (serial)
) STRICT;
CREATE TABLE heads (
    name     TEXT NOT NULL,     -- of the client
    ledger   TEXT NOT NULL,
    sequence INTEGER NOT NULL,  -- rows it had
    hash     BLOB NOT NULL,     -- of the last one
    PRIMARY KEY (name, ledger)
) STRICT;
"""
LEDGERS = 64  # of one client; strangers' rows cost disk for ever

Chain = list[x509.Certificate]


@dataclass(frozen=True)
class Authority:
    """The keys and the books of one federation; its methods may be called from any thread."""

    folder: Path
    federation: str
    address: str
    root: x509.Certificate
    intermediate: x509.Certificate
    key: Key = field(repr=False)
    clock: Clock = utc_now

    @classmethod
    def create(cls, folder: Path, federation: str, address: str, clock: Clock = utc_now) -> Self:
        """Make the keys, the books and the folder of a new federation.

        address: HOST:PORT where participants will find it. Raises SpecError for a name or an
        address that does not fit and ConfigError where the folder already holds an authority.
        """
        Name(federation, "authority", "enrolment")
        parse_address(address)
        if (folder / "authority.toml").exists():
            raise ConfigError(f"{folder} already holds an authority; choose another folder")
        root_key, key, now = new_key(), new_key(), clock()
        root = certificates.issue_root(federation, root_key, now)
        intermediate = certificates.issue_intermediate(federation, key.public_key(), root, root_key, now)
        make_private_folder(folder)
        make_private_folder(folder / "root")
        write_atomically(folder / "root" / "key.pem", key_to_pem(root_key), 0o600)
        write_atomically(folder / "ca.pem", to_pem(root), 0o644)
        write_atomically(folder / "key.pem", key_to_pem(key), 0o600)
        write_atomically(folder / "certificate.pem", to_pem(intermediate), 0o644)
        write_atomically(folder / "authority.db", _empty_books(), 0o600)
        # Last, because its presence says that the folder is complete.
        settings = tomli_w.dumps({"federation": federation, "address": address})
        write_atomically(folder / "authority.toml", settings.encode(), 0o644)
        return cls(folder, federation, address, root, intermediate, key, clock)

    @classmethod
    def load(cls, folder: Path, clock: Clock = utc_now) -> Self:
        """Return the authority in a folder, whose root/ may be absent.

        Raises ConfigError where a file is missing or malformed, or others can read the key.
        """
        try:
            settings = tomllib.loads((folder / "authority.toml").read_text())
            root = x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes())
            intermediate = x509.load_pem_x509_certificate((folder / "certificate.pem").read_bytes())
            key = key_from_pem(read_private(folder / "key.pem"))
            federation, address = settings["federation"], settings["address"]
            (folder / "authority.db").stat()
        except FileNotFoundError as error:
            raise ConfigError(
                f"no authority in {folder}: {error.filename} is missing; run: "
                f"fedcore authority init {folder} --federation NAME --address HOST:PORT"
            ) from error
        except (ValueError, KeyError) as error:
            raise ConfigError(f"the authority in {folder} is damaged: {error}; restore its files") from error
        return cls(folder, federation, address, root, intermediate, key, clock)

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the root's certificate, for people to compare."""
        return certificates.fingerprint(self.root)

    def new_token(self, name: Name, lifetime: timedelta) -> Token:
        """Return a new token by which one key can enrol once under `name`; only its hash is kept."""
        secret = secrets.token_bytes(SECRET_BYTES)
        expires = int((self.clock() + lifetime).timestamp())
        with self._transaction() as books:
            row = (sha256(secret).digest(), str(name), expires)
            books.execute("INSERT INTO tokens (secret_sha256, name, expires) VALUES (?, ?, ?)", row)
        return Token(self.address, self.root, name, secret)

    def redeem(self, secret: bytes, request: bytes) -> Chain:
        """Return the chain (leaf, intermediate) that a token's secret buys for the key of a request.

        request: PKCS10, DER. Whatever name it asks for is ignored: name and role are the token's. The
        same key may ask again while the token is valid and gets the same certificate.
        Raises ProtocolError for a malformed request, and AuthenticationError for a token that is unknown,
        expired, or used by another key.
        """
        public_key = certificates.requested_key(request)
        # Looking up a hash takes the same time whatever an attacker's guess has in common with a secret.
        digest = sha256(secret).digest()
        with self._transaction() as books:
            query = """SELECT tokens.name, expires, chain FROM tokens
                       LEFT JOIN certificates USING (serial) WHERE secret_sha256 = ?"""
            row = books.execute(query, (digest,)).fetchone()
            if row is None:
                raise AuthenticationError("the token is unknown to this authority")
            uri, expires, issued = row
            now = self.clock()
            if now.timestamp() >= expires:
                raise AuthenticationError(f"the token for {uri} expired at {_date(expires)}")
            if issued is not None:
                chain = x509.load_pem_x509_certificates(issued)
                if chain[0].public_key() != public_key:
                    raise AuthenticationError(f"the token for {uri} was already used by another key")
                return chain
            chain = self._issue(books, Name.parse(uri), public_key)
            used = (int(now.timestamp()), _serial(chain[0]), digest)
            books.execute("UPDATE tokens SET used = ?, serial = ? WHERE secret_sha256 = ?", used)
            return chain

    def issue(self, name: Name, public_key: PublicKey) -> Chain:
        """Return and record the chain (leaf, intermediate) of a participant, without a token."""
        with self._transaction() as books:
            return self._issue(books, name, public_key)

    def new_identity(self, name: Name) -> Identity:
        """Return an identity whose key is made here: the authority's own, and those of tests and demos."""
        key = new_key()
        chain = self.issue(name, key.public_key())
        return Identity.verified(key, chain, self.root, self.clock())

    def witness(self, name: Name, ledger: str, head: Head, previous: Head) -> Head:
        """Remember the head of a client's ledger, and return the one that is remembered now.

        previous: the one that the client believes is remembered. A ledger that has grown since contains it;
        where it is another, or the new head is shorter, nothing changes, and the client has to look for the
        returned head in its ledger: it has missed an answer, or the ledger was rolled back.
        Raises UpdateRefused for too many ledgers.
        """
        with self._transaction() as books:
            query = "SELECT ledger, sequence, hash FROM heads WHERE name = ?"
            heads = {known: Head(*values) for known, *values in books.execute(query, (str(name),))}
            known = heads.get(ledger)
            if known and (known != previous or head.sequence <= known.sequence):
                return known
            if not known and len(heads) >= LEDGERS:
                raise UpdateRefused(f"{name} has shown {len(heads)} ledgers; expected at most {LEDGERS}")
            row = (str(name), ledger, head.sequence, head.hash)
            books.execute("INSERT OR REPLACE INTO heads VALUES (?, ?, ?, ?)", row)
            return head

    def _issue(self, books: sqlite3.Connection, name: Name, public_key: PublicKey) -> Chain:
        leaf = certificates.issue_leaf(name, public_key, self.intermediate, self.key, self.clock())
        not_after = int(leaf.not_valid_after_utc.timestamp())
        row = (_serial(leaf), str(name), not_after, to_pem(leaf, self.intermediate))
        books.execute("INSERT INTO certificates VALUES (?, ?, ?, ?)", row)
        return [leaf, self.intermediate]

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Run the block as one transaction, durable when it ends.

        A connection each: calls are rare, and so neither threads nor the token command share any state.
        """
        path = (self.folder / "authority.db").absolute().as_uri()
        # mode=rw: books that are gone must not come back as empty ones.
        with closing(sqlite3.connect(f"{path}?mode=rw", uri=True, isolation_level=None)) as books:
            books.execute("PRAGMA synchronous = FULL")
            # Taking the write lock before the first read is what makes a token single use under concurrency.
            books.execute("BEGIN IMMEDIATE")
            with books:
                yield books


def _empty_books() -> bytes:
    with closing(sqlite3.connect(":memory:")) as books:
        books.executescript(SCHEMA)
        return books.serialize()


def _serial(certificate: x509.Certificate) -> str:
    return f"{certificate.serial_number:040x}"


def _date(seconds: int) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"
