"""The database of a coordinator: SQLite in its folder, or PostgreSQL by URL, behind the same transactions.

A coordinator has one connection, and on PostgreSQL that holds an advisory lock for as long as it lives. So
whatever is written is written by the one coordinator that has the database: a connection that is lost takes
its transaction and the lock with it, and without the lock no other is opened. (A pooler between the two must
give each client a session of its own.)
"""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import URL, create_engine, event, inspect, make_url
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError

from fedcore.errors import ConfigError, FedcoreError, MissingExtra
from fedcore.faults import point

FILE = "coordinator.db"
EXPECTED = "postgresql+psycopg://USER@HOST/DATABASE"
MIGRATIONS = Path(__file__).with_name("migrations")
LOCK = int.from_bytes(b"fedcore\0", "big")
PRAGMAS = (
    "PRAGMA journal_mode=WAL",  # survives a killed process
    "PRAGMA synchronous=FULL",  # survives a loss of power
    "PRAGMA foreign_keys=ON",
    "PRAGMA busy_timeout=10000",
)
# A peer that has gone without a word is noticed within half a minute, here and there.
NETWORK = {
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 4,
    "tcp_user_timeout": 30_000,
}
SESSION = (
    "SET tcp_keepalives_idle = 10",
    "SET tcp_keepalives_interval = 5",
    "SET tcp_keepalives_count = 4",
    "SET lock_timeout = '5s'",  # a coordinator that was killed a moment ago may still hold the lock
)
SQLITE = {
    sqlite3.SQLITE_BUSY: "database locked",
    sqlite3.SQLITE_LOCKED: "database locked",
    sqlite3.SQLITE_FULL: "disk full",
    sqlite3.SQLITE_READONLY: "read-only disk",
    sqlite3.SQLITE_IOERR: "disk error",
    sqlite3.SQLITE_CANTOPEN: "database unreachable",
    sqlite3.SQLITE_CORRUPT: "database corrupt",
    sqlite3.SQLITE_NOTADB: "database corrupt",
}
POSTGRES = {  # by the beginning of SQLSTATE (PostgreSQL's manual, appendix A), the longest first
    "53100": "disk full",
    "25006": "database read-only",
    "55P03": "database locked",
    "57": "database unreachable",
    "08": "database unreachable",
    "28": "database refuses the login",
    "3D": "database missing",
    "40": "database locked",
    "53": "database out of resources",
    "58": "disk error",
    "XX": "database corrupt",
}


class StoreUnavailable(FedcoreError):
    """The database cannot be used now, though nothing is wrong with what was asked; `str()` is the reason."""


def url_of(folder: Path, given: str) -> URL:
    """Return where the database of a coordinator's folder is: `given`, or its own SQLite file for "".

    Raises ConfigError for another kind of database, and for a password, which other users of the machine
    could read in the command line and in server.toml.
    """
    if not given:
        return URL.create("sqlite", database=str(folder / FILE))
    try:
        url = make_url(given)
    except (ArgumentError, ValueError):  # whose text may hold a password
        raise ConfigError(f"the database URL cannot be read; expected {EXPECTED}") from None
    if url.password is not None or any("password" in name for name in url.query):
        raise ConfigError(
            "the database URL holds a password, which others could read; leave it out, and set PGPASSWORD, "
            "or PGPASSFILE to a file of mode 0600"
        )
    if url.drivername != "postgresql+psycopg":
        raise ConfigError(
            f"the database URL begins with {url.drivername!r}; expected {EXPECTED}, or none at all for SQLite"
        )
    return url


def connect(url: URL, alone: bool = True) -> Engine:
    """Return a pool of one connection, to be opened when first used; `alone` refuses another coordinator.

    On PostgreSQL, by a StoreUnavailable at the first use; SQLite's file lies in a folder that is locked.
    Raises MissingExtra.
    """
    arguments = NETWORK if url.drivername.startswith("postgresql") else {}
    try:
        engine = create_engine(
            url, connect_args=arguments, pool_size=1, max_overflow=0, pool_pre_ping=True, hide_parameters=True
        )
    except ModuleNotFoundError as error:
        raise MissingExtra("psycopg", "postgres") from error
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _durable)
        event.listen(engine, "begin", lambda db: db.exec_driver_sql("BEGIN"))
    elif alone:
        event.listen(engine, "connect", _alone)
    return engine


def _durable(connection: Any, _: Any) -> None:
    """Set up a connection to SQLite."""
    connection.isolation_level = None  # so that the tables of a migration are made in its transaction too
    for pragma in PRAGMAS:
        connection.execute(pragma)


def _alone(connection: Any, _: Any) -> None:
    """Take PostgreSQL's lock for the connection's life."""
    try:
        for setting in SESSION:
            connection.execute(setting)
        connection.execute("SELECT pg_advisory_lock(%s)", (LOCK,))
        connection.commit()
    except Exception as error:
        connection.close()
        if getattr(error, "sqlstate", None) == "55P03":
            raise StoreUnavailable("the database is in use by another coordinator") from error
        raise


@contextmanager
def transaction(engine: Engine) -> Iterator[Connection]:
    """Run the block as one transaction, durable when it ends; raises StoreUnavailable."""
    with _available():
        with engine.begin() as db:
            yield db
            point("store.commit.before")
        point("store.commit.after")


@contextmanager
def snapshot(engine: Engine) -> Iterator[Connection]:
    """Run the block as one transaction that only reads; raises StoreUnavailable."""
    with _available(), engine.connect() as db:
        yield db


@contextmanager
def _available() -> Iterator[None]:
    try:
        yield
    except DBAPIError as error:
        if reason := reason_of(error):
            raise StoreUnavailable(reason) from error
        raise


def reason_of(error: DBAPIError) -> str:
    """Return why the database cannot be used now; "" where the error is of our own making."""
    code, state = getattr(error.orig, "sqlite_errorcode", None), getattr(error.orig, "sqlstate", None)
    if code is not None:
        return SQLITE.get(code & 0xFF, "")
    if state is None:  # libpq's own
        return "database unreachable" if isinstance(error, OperationalError | InterfaceError) else ""
    return next((reason for start, reason in POSTGRES.items() if state.startswith(start)), "")


def migrate(db: Connection, migrations: Path = MIGRATIONS) -> None:
    """Make the tables, or bring those of an older fedcore up to date, in one transaction.

    Raises ConfigError where a newer fedcore made them, or something else.
    """
    config = Config(attributes={"connection": db})
    config.set_main_option("script_location", str(migrations).replace("%", "%%"))
    scripts = ScriptDirectory.from_config(config)
    found = MigrationContext.configure(db).get_current_revision()
    if not found and inspect(db).get_table_names():
        raise ConfigError("it holds tables that no version of fedcore made; use an empty one")
    if found and found not in {script.revision for script in scripts.walk_revisions()}:
        raise ConfigError(
            f"it has version {found}, and this fedcore knows versions up to {scripts.get_current_head()}; "
            "a newer fedcore made it, so start that one"
        )
    command.upgrade(config, "head")
