"""The ledger: what has been done to one data set, over all runs, identities and coordinators of a device.

A file (SQLite, 0600) and beside it the key that signs its rows (NAME.key, 0600). It lies outside any agent's
state, several agents may share it, and it belongs to a data set by a name that the owner has chosen: other
content under that name opens no new budget.

Guarantee: everything that is done after `reserve` has returned is, together, (epsilon, delta)-DP for one
unit of the data set: the sum of its Renyi divergences stays, at some order, below what (epsilon, delta)
allows there. Runs may be interleaved, and their data-dependent results may decide what is trained next.
Assumptions: whoever makes the noise makes it as the entry says (`trusted` ones rest on a coordinator's word);
and schedules, which are public, are not chosen by the results of earlier work. Against a coordinator that
chooses noise and rates by results, a filter of one order fixed in advance holds as it stands (Feldman and
Zrnic 2021, arXiv:2008.11193); here the order is open, and what holds is (epsilon, len(ORDERS) delta), by the
same theorem for each order and a union over them. An entry counts from the moment it is written, whatever
becomes of the work, so no crash gives anything back.
"""

import fcntl
import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedcore.chain import ChainBroken, Head, Row, follow, next_row
from fedcore.crypto.files import make_private_folder, read_private, write_atomically
from fedcore.crypto.identity import Clock, utc_now
from fedcore.errors import ConfigError, UpdateRefused
from fedcore.privacy.account import Account, Claim, Entry, event_to_json
from fedcore.privacy.events import Unit

SCHEMA = """
CREATE TABLE rows (
    sequence  INTEGER PRIMARY KEY,  -- from 1
    content   TEXT NOT NULL,        -- JSON, see fedcore.privacy.account
    hash      BLOB NOT NULL,
    signature BLOB NOT NULL,
    run       TEXT GENERATED ALWAYS AS (json_extract(content, '$.run'))
) STRICT;
CREATE INDEX runs ON rows (run);
CREATE TABLE receipts (
    name     TEXT PRIMARY KEY,      -- the client that showed this ledger to its authority
    sequence INTEGER NOT NULL,
    hash     BLOB NOT NULL,
    time     REAL NOT NULL,
    proof    BLOB NOT NULL
) STRICT;
"""
COLUMNS = "sequence, content, hash, signature"
PATIENCE = 10.0  # seconds to wait for another process that is writing


class LedgerRefused(UpdateRefused):
    """Work that the ledger does not grant; `public` is all that a coordinator is told of the reason."""

    public = "ledger"


class BudgetExceeded(LedgerRefused):
    """Work that the owner's limit has no room for; the message says what remains."""

    public = "budget"


class LedgerDamaged(LedgerRefused):
    """A ledger that was altered, truncated or rolled back; nothing is reserved in it any more."""


@dataclass(frozen=True)
class Receipt:
    """What an authority remembers of this ledger, since `time` (seconds since 1970).

    name: the client that showed it. proof: the authority's signed words (`fedcore.wire.witness`).
    """

    name: str
    head: Head
    time: float
    proof: bytes


class Ledger:
    """The ledger in a file; its methods may be called from any thread, and by many processes at once."""

    def __init__(self, path: Path, clock: Clock = utc_now) -> None:
        """Use a ledger that exists.

        Raises ConfigError where it or its key is missing or open to others.
        """
        self.path, self.clock = path, clock
        try:
            self._key = _parse_key(read_private(key_path(path)), key_path(path))
        except FileNotFoundError as error:
            raise ConfigError(
                f"{error.filename} is missing, so there is no ledger at {path}, or it has lost its key; "
                "an agent whose agent.toml has a [ledger] makes one when it starts"
            ) from error
        self._account = Account()

    @classmethod
    def open(
        cls, path: Path, dataset: str, unit: Unit, epsilon: float, delta: float, clock: Clock = utc_now
    ) -> "Ledger":
        """Return the ledger of a data set, made if need be; another limit than before becomes a row.

        Raises ConfigError where the file belongs to another data set or unit, or is gone while its key is
        there, and LedgerDamaged.
        """
        make_private_folder(path.parent)
        # The key's file is also what two agents that start at once contend for.
        with os.fdopen(os.open(key_path(path), os.O_RDWR | os.O_CREAT, 0o600), "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not file.read():
                _make(path, dataset, unit, file.fileno(), clock)
        if not path.exists():
            raise ConfigError(
                f"{path} is gone, but its key {key_path(path)} is there; restore the ledger from a backup: "
                f"what was spent of data set {dataset!r} cannot be forgotten"
            )
        ledger = cls(path, clock)
        ledger._agree(dataset, unit, epsilon, delta)
        return ledger

    def _agree(self, dataset: str, unit: Unit, epsilon: float, delta: float) -> None:
        """Check name and unit, and record a limit that has changed."""
        with self._transaction() as books:
            account = self._read(books)
            if (account.dataset, account.unit) != (dataset, unit):
                raise ConfigError(
                    f"{self.path} is the ledger of data set {account.dataset!r} with unit {account.unit!r}, "
                    f"not of {dataset!r} with {unit!r}; set another ledger.path, or the names it has"
                )
            if (account.epsilon, account.delta) != (epsilon, delta):
                self._append(books, {"kind": "budget", "epsilon": epsilon, "delta": delta})

    def account(self) -> Account:
        """Return what the rows add up to, all those that are new to this object checked.

        Raises LedgerDamaged at the first row whose hash, signature or sum does not hold, and where the rows
        are not those that an authority has been shown.
        """
        with self._transaction() as books:
            return self._read(books)

    def rows(self) -> list[Row]:
        """Return all rows, unchecked."""
        with self._transaction() as books:
            return list(_rows(books, f"SELECT {COLUMNS} FROM rows ORDER BY sequence"))

    def entries(self) -> list[Entry]:
        """Return what was reserved, the oldest first; raises LedgerDamaged."""
        self.account()
        contents = ((row.sequence, _content(row)) for row in self.rows())
        return [Entry.read(sequence, content) for sequence, content in contents if content["kind"] == "entry"]

    def judge(self, claim: Claim) -> None:
        """Raise what `reserve` would raise, and write nothing."""
        with self._transaction() as books:
            self._judge(books, claim)

    def reserve(self, claim: Claim) -> Entry:
        """Write an entry, on disk when this returns; one that is claimed once is not written again.

        The first entry of a run is granted only if the run's whole schedule has room, so that a device says
        no when it is first asked and by public numbers. Raises BudgetExceeded with what remains,
        UpdateRefused for another unit, LedgerRefused for a second identity in the same sum or a file that is
        locked for too long, and LedgerDamaged.
        """
        with self._transaction() as books:
            held = self._judge(books, claim)
            if held:
                return held
            spent = self._account.epsilon_with(claim.history)
            names = ("run", "ref", "by", "trust")
            row = {"kind": "entry", **{name: getattr(claim, name) for name in names}, "spent": spent}
            entry = self._append(books, row | {"history": [*map(event_to_json, claim.history)]})
        self.account()  # so that this object remembers its own row, and misses it if it goes
        return Entry.read(*entry)

    def _judge(self, books: sqlite3.Connection, claim: Claim) -> Entry | None:
        """Return the entry that covers a claim already, if there is one; raises as `reserve` does."""
        account = self._read(books)
        if claim.unit != account.unit:
            raise UpdateRefused(
                f"the run protects one {claim.unit}, the data set's ledger counts for one {account.unit}; "
                "neither guarantee implies the other"
            )
        query = f"SELECT {COLUMNS} FROM rows WHERE run = ? ORDER BY sequence"
        known = [Entry.read(row.sequence, _content(row)) for row in _rows(books, query, claim.run)]
        if claim.trust != "enforced" and (others := {entry.by for entry in known} - {claim.by}):
            raise LedgerRefused(
                f"{others.pop()} takes part in {claim.run} with this data set; noise that is shared by all "
                "clients covers one part of it, not two"
            )
        mine = [entry for entry in known if entry.by == claim.by]
        if claim.once and (held := [entry for entry in mine if entry.history == claim.history]):
            return held[0]
        needed = account.epsilon_with(claim.history)
        if not mine:
            needed = max(needed, account.epsilon_with(claim.whole))
        if not needed <= account.epsilon:  # NaN is no room either
            spent = account.epsilon_with()
            raise BudgetExceeded(
                f"data set {account.dataset!r} has spent epsilon {spent:.3f} of {account.epsilon:g} at delta "
                f"{account.delta:g}, {account.epsilon - spent:.3f} remains; "
                f"{'this piece of work' if mine else 'the whole run'} would bring it to {needed:.3f}"
            )
        return None

    def receipt(self, name: str) -> Receipt | None:
        """Return the newest receipt that a client has for this ledger."""
        return next((receipt for receipt in self.receipts() if receipt.name == name), None)

    def receipts(self) -> list[Receipt]:
        """Return the newest receipt of each client."""
        with self._transaction() as books:
            found = books.execute("SELECT name, sequence, hash, time, proof FROM receipts ORDER BY name")
            return [Receipt(name, Head(number, hashed), *rest) for name, number, hashed, *rest in found]

    def keep(self, receipt: Receipt) -> None:
        """Keep a receipt; raises LedgerDamaged, then and ever after, where it is for rows not in here."""
        head = receipt.head
        with self._transaction() as books:
            row = (receipt.name, head.sequence, head.hash, receipt.time, receipt.proof)
            books.execute("INSERT OR REPLACE INTO receipts VALUES (?, ?, ?, ?, ?)", row)
        self.account()

    def _read(self, books: sqlite3.Connection) -> Account:
        """Return the account, brought up to the newest row."""
        account = self._account
        if not account.head.sequence:
            (found,) = books.execute("PRAGMA integrity_check(1)").fetchone()
            if found != "ok":
                raise ChainBroken(f"the file is damaged: {found}")
        query = f"SELECT {COLUMNS} FROM rows WHERE sequence >= ? ORDER BY sequence"
        rows = _rows(books, query, account.head.sequence)
        if account.head.sequence and [row.head for row in islice(rows, 1)] != [account.head]:
            raise ChainBroken(f"row {account.head.sequence} is not the one that was there a moment ago")
        for row, content in follow(account.head, rows, self._key.public_key()):
            account = account.after(row, content)
        if account.key != _public(self._key):
            raise ChainBroken("the rows are signed by another key than the ledger's")
        self._refuse_rollback(books)
        self._account = account
        return account

    def _refuse_rollback(self, books: sqlite3.Connection) -> None:
        query = """SELECT name, sequence FROM receipts LEFT JOIN rows USING (sequence)
                   WHERE rows.hash IS NOT receipts.hash"""
        for name, sequence in books.execute(query):
            raise ChainBroken(
                f"rolled back: the authority of {name} has seen another row {sequence} than this file has"
            )

    def _append(self, books: sqlite3.Connection, content: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Write a row, with the time, and return its number and content."""
        content = {**content, "time": self.clock().timestamp()}
        row = next_row(self._account.head, content, self._key)
        _insert(books, row)
        return row.sequence, content

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Run the block as one transaction, alone among all processes, and durable when it ends."""
        try:
            # mode=rw: a ledger that is gone must not come back as an empty one.
            uri = f"{self.path.absolute().as_uri()}?mode=rw"
            with closing(sqlite3.connect(uri, uri=True, timeout=PATIENCE, isolation_level=None)) as books:
                books.execute("PRAGMA synchronous = FULL")
                # Deleting the journal, as is the default, commits only when the folder is on disk too, and
                # FULL does not wait for that; a journal that is cut short commits when it is itself on disk.
                books.execute("PRAGMA journal_mode = TRUNCATE")
                books.execute("BEGIN IMMEDIATE")
                with books:
                    yield books
        except ChainBroken as error:
            raise LedgerDamaged(f"{self.path}: {error}; restore the newest copy of the ledger") from error
        except sqlite3.DatabaseError as error:
            if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_BUSY:
                raise LedgerRefused(
                    f"{self.path} has been locked by another process for {PATIENCE:.0f} s; try again later"
                ) from error
            raise LedgerDamaged(f"{self.path}: {error}; restore the newest copy of the ledger") from error


def key_path(path: Path) -> Path:
    """Return where the key of a ledger lies."""
    return path.with_name(f"{path.name}.key")


def ledger_id(dataset: str) -> str:
    """Return under which name a witness knows the ledger of a data set: a hash, for the name is private.

    It does not depend on the file: a ledger that is made anew is, to the witness, the old one rolled back.
    """
    return sha256(b"fedcore ledger\0" + dataset.encode()).hexdigest()


def _make(path: Path, dataset: str, unit: Unit, key_file: int, clock: Clock) -> None:
    """Write a new ledger and its key; the key last, so that there is none without a ledger."""
    if path.exists():
        raise ConfigError(
            f"{path} is there, but its key {key_path(path)} is not; restore the key from a backup"
        )
    key = Ed25519PrivateKey.generate()
    content = {"kind": "ledger", "dataset": dataset, "unit": unit, "key": _public(key)}
    with closing(sqlite3.connect(":memory:")) as books:
        books.executescript(SCHEMA)
        _insert(books, next_row(Head(), {**content, "time": clock().timestamp()}, key))
        books.commit()
        empty = books.serialize()
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    write_atomically(path, empty, 0o600)
    os.pwrite(key_file, pem, 0)
    os.fsync(key_file)


def _insert(books: sqlite3.Connection, row: Row) -> None:
    values = (row.sequence, row.content, row.hash, row.signature)
    books.execute(f"INSERT INTO rows ({COLUMNS}) VALUES (?, ?, ?, ?)", values)


def _rows(books: sqlite3.Connection, query: str, *values: object) -> Iterator[Row]:
    return (Row(*row) for row in books.execute(query, values))


def _content(row: Row) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(row.content)
    return content


def _public(key: Ed25519PrivateKey) -> str:
    return key.public_key().public_bytes_raw().hex()


def _parse_key(pem: bytes, path: Path) -> Ed25519PrivateKey:
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except ValueError as error:
        raise ConfigError(f"{path} is no key of a ledger: {error}; restore it from a backup") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{path} holds {type(key).__name__}, expected Ed25519; restore it from a backup")
    return key
