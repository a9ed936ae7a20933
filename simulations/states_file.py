"""What virtual clients keep, on disk: a database whose open transaction is what came since the checkpoint."""

import sqlite3
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from safetensors.numpy import load, save

from fedcore.client.training import Kept
from fedcore.errors import ConfigError

PATIENCE = 1.0  # seconds to wait for another process that holds the database


class StatesFile:
    """The states of clients by name, and the number of the round after which they were committed.

    SQLite undoes the open transaction of a process that was killed, and nobody else can open the database
    meanwhile. Nothing is synced, so loss of power may damage it. A client's state has less than 1 GB.
    """

    def __init__(self, path: Path | None = None) -> None:
        """Open a file, new or not; None is a temporary one that goes with the process, however that ends.

        Raises ConfigError where another process has it, or it is no such database.
        """
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
        self.books = sqlite3.connect(path or "", timeout=PATIENCE, isolation_level=None)
        try:
            self.books.execute("PRAGMA synchronous = OFF")
            self.books.execute("BEGIN IMMEDIATE")
            self.books.execute("CREATE TABLE IF NOT EXISTS kept (client TEXT PRIMARY KEY, state BLOB)")
        except sqlite3.DatabaseError as error:
            self.books.close()
            if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_BUSY:
                raise ConfigError(f"{path}: another process goes on with this run; wait for it") from error
            raise ConfigError(f"{path}: expected states that fedcore wrote: {error}") from error

    @property
    def round(self) -> int:
        """The round of the last commit, 0 before the first."""
        number: int = self.books.execute("PRAGMA user_version").fetchone()[0]
        return number

    def get(self, client: str) -> Kept:
        """Return what a client keeps, nothing where it is not known."""
        row = self.books.execute("SELECT state FROM kept WHERE client = ?", (client,)).fetchone()
        return load(row[0]) if row else {}

    def put(self, kept: Iterable[tuple[str, Kept]]) -> None:
        """Take what clients keep; it is lost with the process unless `commit` follows."""
        packed = (
            (client, save({name: np.array(vector, order="C") for name, vector in state.items()}))
            for client, state in kept
        )
        self.books.executemany("INSERT OR REPLACE INTO kept VALUES (?, ?)", packed)

    def commit(self, round: int) -> None:
        """Let what was put count, and this be the round: both or, if the process dies, neither."""
        self.books.execute(f"PRAGMA user_version = {round:d}")
        self.books.execute("COMMIT")
        self.books.execute("BEGIN IMMEDIATE")

    def close(self) -> None:
        """Let go of the file, and of what was not committed."""
        self.books.close()
