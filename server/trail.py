"""The audit trail: who has done what to runs and clients, as a chain of rows in the database.

The key that signs them is `audit.key` in the coordinator's folder (32 bytes, 0600), so whoever has the
database alone can neither add a row nor alter one. That rows are missing at the end is seen by whoever has
kept the last hash: each is in the coordinator's log, too.
"""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import event, select
from sqlalchemy.engine import Connection

from fedcore.chain import ChainBroken, Head, Row, follow, next_row
from fedcore.crypto.files import read_private, write_atomically
from fedcore.errors import ConfigError
from fedcore.server.database import connect, snapshot, url_of
from fedcore.server.tables import AUDIT

log = logging.getLogger("fedcore.server")

KEY = "audit.key"


@dataclass(frozen=True)
class Entry:
    """One row of the trail: its number (from 1), when (seconds since 1970), who did what; its hash (hex)."""

    sequence: int
    time: float
    actor: str
    action: str
    detail: str
    hash: str


def key_of(folder: Path) -> Ed25519PrivateKey:
    """Return the key of a folder's trail; raises ConfigError where it is missing or open to others."""
    try:
        return Ed25519PrivateKey.from_private_bytes(read_private(folder / KEY))
    except FileNotFoundError as error:
        raise ConfigError(f"{folder / KEY} is missing; restore it from a backup of the folder") from error
    except ValueError as error:
        raise ConfigError(f"{folder / KEY} is no key of an audit trail: {error}; restore it") from error


def begin(db: Connection, folder: Path) -> Ed25519PrivateKey:
    """Return the key of a folder's trail, made anew for a trail that is empty."""
    if not (folder / KEY).exists() and not _head(db).sequence:
        write_atomically(folder / KEY, Ed25519PrivateKey.generate().private_bytes_raw(), 0o600)
    return key_of(folder)


def append(db: Connection, key: Ed25519PrivateKey, actor: str, action: str, detail: str) -> None:
    """Add a row within the caller's transaction, and log it once that has committed."""
    content = {"actor": actor, "action": action, "detail": detail}
    row = next_row(_head(db), content | {"time": time.time()}, key)
    signed = {"hash": row.hash.hex(), "signature": row.signature.hex()}
    db.execute(AUDIT.insert().values(sequence=row.sequence, content=row.content, **signed))
    extra = content | {"sequence": row.sequence, "hash": signed["hash"]}
    event.listen(db, "commit", lambda _: log.info("audit", extra=extra), once=True)


def entries(db: Connection, key: Ed25519PrivateKey) -> Iterator[Entry]:
    """Yield all rows, the oldest first; raises ChainBroken at the first that was altered."""
    rows = map(_row, db.execute(select(AUDIT).order_by(AUDIT.c.sequence)))
    for row, content in follow(Head(), rows, key.public_key()):
        yield Entry(row.sequence, **content, hash=row.hash.hex())


def read(folder: Path, url: str) -> list[Entry]:
    """Return the trail of a coordinator, which may be running.

    Raises ConfigError, MissingExtra, StoreUnavailable, and ChainBroken.
    """
    key, engine = key_of(folder), connect(url_of(folder, url), alone=False)
    try:
        with snapshot(engine) as db:
            return list(entries(db, key))
    finally:
        engine.dispose()


def _head(db: Connection) -> Head:
    newest = db.execute(select(AUDIT).order_by(AUDIT.c.sequence.desc()).limit(1)).first()
    return _row(newest).head if newest else Head()


def _row(found: Any) -> Row:
    try:
        return Row(found.sequence, found.content, bytes.fromhex(found.hash), bytes.fromhex(found.signature))
    except ValueError as error:
        raise ChainBroken(f"row {found.sequence} has been altered: {error}") from error
