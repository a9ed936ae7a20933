"""The first tables: runs, rounds and clients, who took part in a round, conduct, and the audit trail."""

from alembic import op

revision, down_revision = "0001", None

TABLES = (
    """CREATE TABLE runs (
        id TEXT NOT NULL PRIMARY KEY, spec TEXT NOT NULL, task TEXT NOT NULL, digest TEXT NOT NULL,
        layout TEXT NOT NULL, metrics TEXT NOT NULL, initial TEXT NOT NULL, model TEXT NOT NULL,
        state TEXT NOT NULL, detail TEXT NOT NULL, created FLOAT NOT NULL)""",
    """CREATE TABLE rounds (
        run TEXT NOT NULL REFERENCES runs (id), round INTEGER NOT NULL, parameters TEXT NOT NULL,
        model TEXT NOT NULL, vectors TEXT NOT NULL, row TEXT NOT NULL, PRIMARY KEY (run, round))""",
    """CREATE TABLE clients (
        run TEXT NOT NULL REFERENCES runs (id), client TEXT NOT NULL, round INTEGER NOT NULL,
        attempt INTEGER NOT NULL, memory TEXT NOT NULL, PRIMARY KEY (run, client))""",
    """CREATE TABLE participants (
        run TEXT NOT NULL REFERENCES runs (id), round INTEGER NOT NULL, place INTEGER NOT NULL,
        client TEXT NOT NULL, status TEXT NOT NULL, kind TEXT NOT NULL, attempt INTEGER NOT NULL,
        reason TEXT NOT NULL, seconds FLOAT NOT NULL, bytes BIGINT NOT NULL, staleness INTEGER NOT NULL,
        PRIMARY KEY (run, round, place))""",
    """CREATE TABLE conduct (
        client TEXT NOT NULL PRIMARY KEY, offences INTEGER NOT NULL, reason TEXT NOT NULL,
        time FLOAT NOT NULL, quarantined BOOLEAN NOT NULL)""",
    """CREATE TABLE audit (
        sequence INTEGER NOT NULL PRIMARY KEY, content TEXT NOT NULL, hash TEXT NOT NULL,
        signature TEXT NOT NULL)""",
)


def upgrade() -> None:
    """Make them."""
    for table in TABLES:
        op.execute(table)
