"""The books of an authority: a SQLite file that several processes read and write, a transaction at a time."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509

from fedcore.crypto.certificates import PublicKey, key_digest
from fedcore.errors import AuthenticationError

SCHEMA = """
CREATE TABLE certificates (
    serial    TEXT PRIMARY KEY,  -- hexadecimal
    name      TEXT NOT NULL,     -- fedcore://FEDERATION/ROLE/NAME
    not_after INTEGER NOT NULL,  -- seconds since 1970
    key       BLOB NOT NULL,     -- SHA-256 of the public key
    chain     BLOB NOT NULL,     -- PEM
    successor TEXT,              -- serial of the certificate that has renewed this one
    revoked   INTEGER            -- seconds since 1970
) STRICT;
CREATE INDEX holders ON certificates (name);
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


@dataclass(frozen=True)
class Issued:
    """A certificate in the books, times in seconds since 1970; `revoked` is None for one that holds."""

    serial: str
    name: str
    not_after: int
    revoked: int | None


def empty_books() -> bytes:
    """Return the file of a new authority's books."""
    with closing(sqlite3.connect(":memory:")) as books:
        books.executescript(SCHEMA)
        return books.serialize()


@contextmanager
def transaction(file: Path) -> Iterator[sqlite3.Connection]:
    """Run the block as one transaction, durable when it ends.

    A connection each: calls are rare, and so neither threads nor the commands share any state.
    """
    # mode=rw: books that are gone must not come back as empty ones.
    uri = f"{file.absolute().as_uri()}?mode=rw"
    with closing(sqlite3.connect(uri, uri=True, isolation_level=None)) as books:
        books.execute("PRAGMA synchronous = FULL")
        # Taking the write lock before the first read is what makes a token single use under concurrency.
        books.execute("BEGIN IMMEDIATE")
        with books:
            yield books


def holder(books: sqlite3.Connection, serial: str) -> tuple[str, str | None]:
    """Return name and successor of a certificate; raises AuthenticationError unless it holds."""
    query = "SELECT name, revoked, successor FROM certificates WHERE serial = ?"
    row = books.execute(query, (serial,)).fetchone()
    if row is None:
        raise AuthenticationError(f"the certificate {serial} is unknown to this authority")
    name, revoked, successor = row
    if revoked is not None:
        raise AuthenticationError(f"the certificate of {name} was revoked at {date_of(revoked)}")
    return name, successor


def chain_again(
    books: sqlite3.Connection, serial: str, public_key: PublicKey, problem: str
) -> list[x509.Certificate]:
    """Return the chain that was issued before; raises AuthenticationError where it was for another key."""
    query = "SELECT chain FROM certificates WHERE serial = ? AND key = ? AND revoked IS NULL"
    row = books.execute(query, (serial, key_digest(public_key))).fetchone()
    if row is None:
        raise AuthenticationError(problem)
    return x509.load_pem_x509_certificates(row[0])


def date_of(seconds: int) -> str:
    """Return a time of the books for a person."""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"
