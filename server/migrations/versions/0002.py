"""Runs of apps, and their letters."""

from alembic import op
from sqlalchemy import BigInteger, Column, Float, ForeignKey, LargeBinary, Text

revision, down_revision = "0002", "0001"


def upgrade() -> None:
    """Make their tables."""
    op.create_table(
        "app_runs",
        Column("id", Text, primary_key=True),
        *(Column(name, Text, nullable=False) for name in ("name", "app", "digest", "state", "detail")),
        Column("created", Float, nullable=False),
    )
    op.create_table(
        "letters",
        Column("run", Text, ForeignKey("app_runs.id"), primary_key=True),
        Column("id", Text, primary_key=True),
        *(Column(name, Text, nullable=False) for name in ("client", "state")),
        Column("place", BigInteger, nullable=False),
        Column("expires", Float, nullable=False),
        Column("head", LargeBinary, nullable=False),
        Column("content", Text, nullable=False),
        Column("size", BigInteger, nullable=False),
    )
