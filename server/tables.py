"""The tables of a coordinator's database, as the newest migration leaves them."""

from collections.abc import Iterator
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
)
from sqlalchemy.types import TypeDecorator


class Words(TypeDecorator[str]):
    """Text that others chose: U+0000, which PostgreSQL cannot hold, becomes U+FFFD."""

    impl, cache_ok = Text, True

    def process_bind_param(self, value: str | None, dialect: Any) -> str | None:
        """Return what is stored."""
        return value and value.replace("\0", "\ufffd")


def _each(kind: Any, *names: str, key: bool = False) -> Iterator[Column[Any]]:
    """Yield columns of one kind, none of them empty."""
    return (Column(name, kind, nullable=False, primary_key=key) for name in names)


def _run() -> Column[str]:
    return Column("run", Text, ForeignKey("runs.id"), primary_key=True)


TABLES = MetaData()
RUNS = Table(
    "runs",
    TABLES,
    *_each(Text, "id", key=True),
    *_each(Text, "spec", "task", "digest", "layout", "metrics"),
    *_each(Text, "initial", "model"),  # address of the first parameters; their digest as in `rounds`
    *_each(Text, "state"),
    *_each(Words, "detail"),
    *_each(Float, "created"),
)
ROUNDS = Table(
    "rounds",
    TABLES,
    _run(),
    *_each(Integer, "round", key=True),
    *_each(Text, "parameters", "model"),  # address; digest without what is broadcast beside the model
    *_each(Text, "vectors"),  # address of the strategy's, "" where it keeps none
    *_each(Text, "row"),
)
CLIENTS = Table(
    "clients",
    TABLES,
    _run(),
    *_each(Text, "client", key=True),
    *_each(Integer, "round", "attempt"),  # of its last update that was folded, 0 before the first
    *_each(Text, "memory"),
)
PARTICIPANTS = Table(
    "participants",
    TABLES,
    _run(),
    *_each(Integer, "round", "place", key=True),  # its place among them, from 0
    *_each(Text, "client", "status", "kind"),
    *_each(Integer, "attempt"),
    *_each(Words, "reason"),
    *_each(Float, "seconds"),
    *_each(BigInteger, "bytes"),
    *_each(Integer, "staleness"),
)
CONDUCT = Table(
    "conduct",
    TABLES,
    *_each(Text, "client", key=True),
    *_each(Integer, "offences"),
    *_each(Words, "reason"),  # of the last one
    *_each(Float, "time"),
    *_each(Boolean, "quarantined"),
)
AUDIT = Table(
    "audit",
    TABLES,
    Column("sequence", Integer, primary_key=True, autoincrement=False),
    *_each(Text, "content", "hash", "signature"),  # the last two in hexadecimal
)
APP_RUNS = Table(
    "app_runs",
    TABLES,
    *_each(Text, "id", key=True),
    *_each(Text, "name", "app", "digest", "state"),
    *_each(Words, "detail"),
    *_each(Float, "created"),
)
LETTERS = Table(
    "letters",
    TABLES,
    Column("run", Text, ForeignKey("app_runs.id"), primary_key=True),
    *_each(Text, "id", key=True),
    *_each(Text, "client", "state"),  # waiting, answered or settled
    *_each(BigInteger, "place"),  # orders the letters of all runs
    *_each(Float, "expires"),
    *_each(LargeBinary, "head"),  # of the letter, then of its answer, then empty; so is the content
    *_each(Text, "content"),
    *_each(BigInteger, "size"),
)
