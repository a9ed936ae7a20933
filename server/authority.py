"""The authority: who may enrol under which name, the certificates that say so, and the heads of ledgers.

A folder, 0700, private keys and database 0600:

    authority.toml    federation, public address, and the life of a certificate in seconds
    ca.pem            the root that every participant pins
    root/key.pem      signs intermediates only; take root/ offline once the authority runs
    intermediate.pem  key and certificate of the intermediate, which signs participants
    authority.db      tokens (only their hashes), what was issued and revoked, what ledgers it was shown
"""

import secrets
import sqlite3
import tomllib
from dataclasses import dataclass
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from typing import Self

import tomli_w
from cryptography import x509

from fedcore.chain import Head
from fedcore.crypto import certificates
from fedcore.crypto.certificates import (
    Key,
    PublicKey,
    key_from_pem,
    key_to_pem,
    new_key,
    serial_of,
    to_pem,
)
from fedcore.crypto.files import make_private_folder, read_private, write_atomically
from fedcore.crypto.identity import Clock, Identity, utc_now
from fedcore.crypto.names import Name
from fedcore.errors import AuthenticationError, ConfigError, SpecError, UpdateRefused, nearest
from fedcore.server.authority_books import Issued, chain_again, date_of, empty_books, holder, transaction
from fedcore.wire.address import parse_address
from fedcore.wire.token import SECRET_BYTES, Token

LEDGERS = 64  # of one client; strangers' rows cost disk for ever

Chain = list[x509.Certificate]


@dataclass(frozen=True)
class Authority:
    """The keys and the books of one federation; its methods may be called from any thread."""

    folder: Path
    federation: str
    address: str
    root: x509.Certificate
    lifetime: timedelta = certificates.LEAF_LIFETIME
    clock: Clock = utc_now

    @classmethod
    def create(
        cls,
        folder: Path,
        federation: str,
        address: str,
        lifetime: timedelta = certificates.LEAF_LIFETIME,
        clock: Clock = utc_now,
    ) -> Self:
        """Make the keys, the books and the folder of a new federation.

        address: HOST:PORT where participants will find it. lifetime: of a participant's certificate, in
        whole seconds. Raises SpecError for a name or an address that does not fit and ConfigError where
        the folder already holds an authority.
        """
        Name(federation, "authority", "enrolment")
        parse_address(address)
        if (folder / "authority.toml").exists():
            raise ConfigError(f"{folder} already holds an authority; choose another folder")
        root_key = new_key()
        root = certificates.issue_root(federation, root_key, clock())
        authority = cls(folder, federation, address, root, lifetime, clock)
        make_private_folder(folder)
        make_private_folder(folder / "root")
        write_atomically(folder / "root" / "key.pem", key_to_pem(root_key), 0o600)
        write_atomically(folder / "ca.pem", to_pem(root), 0o644)
        authority.new_intermediate()
        write_atomically(authority.books, empty_books(), 0o600)
        # Last, because its presence says that the folder is complete.
        settings = {"federation": federation, "address": address, "lifetime": int(lifetime.total_seconds())}
        write_atomically(folder / "authority.toml", tomli_w.dumps(settings).encode(), 0o644)
        return authority

    @classmethod
    def load(cls, folder: Path, clock: Clock = utc_now) -> Self:
        """Return the authority in a folder, whose root/ may be absent.

        Raises ConfigError where a file is missing or malformed, or others can read the key.
        """
        try:
            settings = tomllib.loads((folder / "authority.toml").read_text())
            root = x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes())
            federation, address = settings["federation"], settings["address"]
            authority = cls(folder, federation, address, root, timedelta(seconds=settings["lifetime"]), clock)
            authority.issuer()
            authority.books.stat()
        except FileNotFoundError as error:
            raise ConfigError(
                f"no authority in {folder}: {error.filename} is missing; run: "
                f"fedcore authority init {folder} --federation NAME --address HOST:PORT"
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"the authority in {folder} is damaged: {error}; restore its files") from error
        return authority

    @property
    def name(self) -> Name:
        """Its own, of the certificate that it shows on the network."""
        return Name(self.federation, "authority", "enrolment")

    @property
    def books(self) -> Path:
        """The database."""
        return self.folder / "authority.db"

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the root's certificate, for people to compare."""
        return certificates.fingerprint(self.root)

    def issuer(self) -> tuple[x509.Certificate, Key]:
        """Return the intermediate and its key, as they are on disk now: `new_intermediate` replaces them."""
        pem = read_private(self.folder / "intermediate.pem")
        return x509.load_pem_x509_certificate(pem), key_from_pem(pem)

    def new_intermediate(self) -> x509.Certificate:
        """Make the intermediate, or another before the old one ends: what that one signed stays valid.

        Raises ConfigError where the root's key is not at hand, or is another federation's.
        """
        path, key = self.folder / "root" / "key.pem", new_key()
        try:
            root_key = key_from_pem(read_private(path))
        except FileNotFoundError as error:
            raise ConfigError(f"{path} is missing; bring the root's key back for this command") from error
        if root_key.public_key() != self.root.public_key():
            raise ConfigError(f"{path} is not the key of {self.folder / 'ca.pem'}; bring this federation's")
        made = certificates.issue_intermediate(
            self.federation, key.public_key(), self.root, root_key, self.clock()
        )
        # One file, so that a running authority finds a key and its own certificate at every moment.
        write_atomically(self.folder / "intermediate.pem", key_to_pem(key) + to_pem(made), 0o600)
        return made

    def new_token(self, name: Name, lifetime: timedelta) -> Token:
        """Return a new token by which one key can enrol once under `name`; only its hash is kept."""
        secret = secrets.token_bytes(SECRET_BYTES)
        expires = int((self.clock() + lifetime).timestamp())
        with transaction(self.books) as books:
            row = (sha256(secret).digest(), str(name), expires)
            books.execute("INSERT INTO tokens (secret_sha256, name, expires) VALUES (?, ?, ?)", row)
        return Token(self.address, self.root, name, secret)

    def redeem(self, secret: bytes, request: bytes) -> Chain:
        """Return the chain (leaf, intermediate) that a token's secret buys for the key of a request.

        request: PKCS10, DER. Whatever name it asks for is ignored: name and role are the token's. The
        same key may ask again while the token is valid and gets the same certificate.
        Raises ProtocolError for a malformed request, and AuthenticationError for a token that is unknown,
        expired, or used by another key, and for what was revoked.
        """
        public_key = certificates.requested_key(request)
        # Looking up a hash takes the same time whatever an attacker's guess has in common with a secret.
        digest = sha256(secret).digest()
        with transaction(self.books) as books:
            query = "SELECT name, expires, serial FROM tokens WHERE secret_sha256 = ?"
            row = books.execute(query, (digest,)).fetchone()
            if row is None:
                raise AuthenticationError("the token is unknown to this authority")
            uri, expires, serial = row
            now = self.clock()
            if now.timestamp() >= expires:
                raise AuthenticationError(f"the token for {uri} expired at {date_of(expires)}")
            if serial is not None:
                problem = f"the token for {uri} was already used by another key"
                return chain_again(books, serial, public_key, problem)
            chain = self._issue(books, Name.parse(uri), public_key)
            used = (int(now.timestamp()), serial_of(chain[0]), digest)
            books.execute("UPDATE tokens SET used = ?, serial = ? WHERE secret_sha256 = ?", used)
            return chain

    def renew(self, serial: str, request: bytes) -> Chain:
        """Return the chain that replaces a certificate whose holder has proven to have its key.

        request: PKCS10, DER, for the new key. The same request gets the same certificate again, for a reply
        may be lost; another one does not: of two holders of a certificate, one has stolen it.
        Raises ProtocolError for a malformed request, and AuthenticationError for a certificate that is
        unknown, revoked, or renewed with another key.
        """
        public_key = certificates.requested_key(request)
        with transaction(self.books) as books:
            uri, successor = holder(books, serial)
            if successor is not None:
                problem = f"the certificate of {uri} was already renewed with another key"
                return chain_again(books, successor, public_key, problem)
            chain = self._issue(books, Name.parse(uri), public_key)
            row = (serial_of(chain[0]), serial)
            books.execute("UPDATE certificates SET successor = ? WHERE serial = ?", row)
            return chain

    def revoke(self, name: Name) -> int:
        """Revoke all certificates of a name and withdraw its tokens; return how many certificates held.

        Its keys never get a certificate again; a token that is made afterwards lets a new key enrol.
        Raises SpecError with the nearest name where this one has nothing to revoke.
        """
        now = int(self.clock().timestamp())
        with transaction(self.books) as books:
            names = {
                row[0] for row in books.execute("SELECT name FROM certificates UNION SELECT name FROM tokens")
            }
            if str(name) not in names:
                raise SpecError(f"{name} has neither certificate nor token{nearest(str(name), names)}")
            query = "SELECT count(*) FROM certificates WHERE name = ? AND revoked IS NULL AND not_after > ?"
            (count,) = books.execute(query, (str(name), now)).fetchone()
            query = "UPDATE certificates SET revoked = ? WHERE name = ? AND revoked IS NULL"
            books.execute(query, (now, str(name)))
            books.execute("DELETE FROM tokens WHERE name = ?", (str(name),))
            return int(count)

    def check(self, serial: str) -> None:
        """Raise AuthenticationError for a certificate that is unknown or revoked."""
        with transaction(self.books) as books:
            holder(books, serial)

    def issued(self) -> list[Issued]:
        """Return the participants' certificates that have not expired, by name and end."""
        query = """SELECT serial, name, not_after, revoked FROM certificates
                   WHERE not_after > ? AND name != ? ORDER BY name, not_after"""
        with transaction(self.books) as books:
            values = int(self.clock().timestamp()), str(self.name)
            return [Issued(*row) for row in books.execute(query, values)]

    def new_identity(self, name: Name) -> Identity:
        """Return an identity whose key is made here: the authority's own, and those of tests and demos."""
        key = new_key()
        with transaction(self.books) as books:
            chain = self._issue(books, name, key.public_key())
        return Identity.verified(key, chain, self.root, self.clock(), self.address)

    def changed(self) -> int:
        """Return when a process last wrote the books (nanoseconds); what has not moved need not be read."""
        return self.books.stat().st_mtime_ns

    def witness(self, name: Name, ledger: str, head: Head, previous: Head) -> Head:
        """Remember the head of a client's ledger, and return the one that is remembered now.

        previous: the one that the client believes is remembered. A ledger that has grown since contains it;
        where it is another, or the new head is shorter, nothing changes, and the client has to look for the
        returned head in its ledger: it has missed an answer, or the ledger was rolled back.
        Raises UpdateRefused for too many ledgers.
        """
        with transaction(self.books) as books:
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
        (issuer, issuer_key), now = self.issuer(), self.clock()
        digest = certificates.key_digest(public_key)
        known = "SELECT 1 FROM certificates WHERE key = ? AND revoked IS NOT NULL"
        if books.execute(known, (digest,)).fetchone():
            raise AuthenticationError(
                f"the key of this request for {name} was revoked; move the folder of its identity away, so "
                f"that a new key is made"
            )
        leaf = certificates.issue_leaf(name, public_key, issuer, issuer_key, now, self.lifetime)
        expired = "DELETE FROM certificates WHERE name = ? AND not_after < ? AND revoked IS NULL"
        books.execute(expired, (str(name), int(now.timestamp())))
        not_after = int(leaf.not_valid_after_utc.timestamp())
        row = (serial_of(leaf), str(name), not_after, digest, to_pem(leaf, issuer))
        books.execute("INSERT INTO certificates VALUES (?, ?, ?, ?, ?, NULL, NULL)", row)
        return [leaf, issuer]
