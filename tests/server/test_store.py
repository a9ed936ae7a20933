"""What the database keeps, on SQLite and on PostgreSQL."""

import logging
import shutil
import sqlite3
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError

from fedcore.chain import ChainBroken
from fedcore.errors import ConfigError, MissingExtra
from fedcore.messages import Blob, Submission
from fedcore.server.database import MIGRATIONS, StoreUnavailable, migrate, reason_of, snapshot, transaction
from fedcore.server.store import Committed, Known, Participant, Store
from fedcore.server.tables import TABLES
from tests.server.conftest import DIGEST, LAYOUT, METRICS, TASK, spec_of

RUN = Submission(spec_of(), TASK, DIGEST, LAYOUT, METRICS, Blob("a" * 64, LAYOUT.nbytes))
ROUNDS = [
    Committed(n, f"{n}" * 64, "d" * 64, "" if n == 1 else "e" * 64, {"round": n, "train_loss": 0.5})
    for n in (1, 2, 3)
]


Reopened = Callable[[], Store]


@pytest.fixture
def reopened(tmp_path: Path, database_url: str) -> Iterator[Reopened]:
    """Return what opens the same database, again and again."""
    opened: list[Store] = []

    def again() -> Store:
        close()
        opened.append(Store(tmp_path, database_url))
        return opened[-1]

    def close() -> None:
        for store in opened:
            store.close()

    yield again
    close()


def test_runs_and_rounds_are_there_again(reopened: Reopened) -> None:
    store = reopened()
    run = store.add_run("run-1", RUN, "c" * 64)
    store.add_run("run-2", RUN, "b" * 64)
    for committed in ROUNDS:
        store.commit_round("run-1", committed, {})
    store.add_metrics("run-1", 3, {"loss": 0.25})
    store.set_state("run-2", "stopped", "by an operator")
    store = reopened()
    newest, oldest = store.runs()
    assert (newest.id, newest.state, newest.detail) == ("run-2", "stopped", "by an operator")
    assert oldest == run and run.spec == RUN.spec and run.layout == LAYOUT
    assert (run.initial, run.model) == ("c" * 64, "a" * 64)
    assert store.rounds("run-1") == [*ROUNDS[:2], replace(ROUNDS[2], row={**ROUNDS[2].row, "loss": 0.25})]
    assert store.held() == {"run-1": {"3" * 64, "e" * 64}, "run-2": {"b" * 64}}


def test_a_round_is_committed_once(reopened: Reopened) -> None:
    store = reopened()
    store.add_run("run-1", RUN, "c" * 64)
    took_part = [Participant("client-0", "folded", seconds=0.5, bytes=2**40)]
    for known in (Known(1), Known(9)):  # the second time as after an answer that was lost
        store.commit_round("run-1", ROUNDS[0], {"client-0": known}, took_part)
    with pytest.raises(IntegrityError):
        store.commit_round("run-1", replace(ROUNDS[0], model="f" * 64), {"client-0": Known(9)})
    assert store.clients("run-1") == {"client-0": Known(1)}  # all of a round or nothing of it
    with pytest.raises(IntegrityError):
        store.commit_round("run-9", ROUNDS[0], {})
    assert reopened().participants("run-1", 1) == took_part


def test_what_is_known_of_clients_is_there_again(reopened: Reopened) -> None:
    store = reopened()
    for run in ("run-1", "run-2"):
        store.add_run(run, RUN, "c" * 64)
    first = {"a": Known(1, 0, {"round": 1.0, "loss": 0.25}), "b": Known()}
    store.commit_round("run-1", ROUNDS[0], first)
    store.commit_round("run-2", ROUNDS[0], {"a": Known(1, 7)})
    store.commit_round("run-1", ROUNDS[1], {"b": Known(2, 3), "c": Known(2, 3, {"loss": -0.0})})
    store = reopened()
    assert store.clients("run-1") == {"a": first["a"], "b": Known(2, 3), "c": Known(2, 3, {"loss": -0.0})}
    assert store.clients("run-2") == {"a": Known(1, 7)}


def test_who_took_part_is_there_in_the_order_of_folding(reopened: Reopened) -> None:
    store = reopened()
    store.add_run("run-1", RUN, "c" * 64)
    took_part = [
        Participant("b", "folded", attempt=2, seconds=0.25, bytes=7, staleness=3),
        Participant("a", "refused", reason="its update has NaN\0"),
        Participant("b", "folded"),  # twice in one step, as in a buffered run
        Participant("evaluator", "late", kind="root"),
    ]
    store.commit_round("run-1", ROUNDS[0], {}, took_part)
    took_part[1] = replace(took_part[1], reason="its update has NaN\ufffd")  # PostgreSQL holds no U+0000
    assert reopened().participants("run-1", 1) == took_part
    assert reopened().participants("run-1", 2) == []


def test_conduct_is_counted_until_it_is_lifted(reopened: Reopened) -> None:
    store, before = reopened(), time.time()
    store.offend("a", "NaN")
    store.offend("b", "NaN")
    second = store.offend("a", "too long \0", quarantine=True)
    assert (second.offences, second.quarantined) == (2, True) and before <= second.time <= time.time()
    assert store.offend("a", "flood").quarantined  # which only an operator ends
    assert reopened().conduct()["a"].offences == 3
    store = reopened()
    store.lift("a")
    store.lift("nobody")
    assert list(store.conduct()) == ["b"] and not store.conduct()["b"].quarantined
    assert [(e.actor, e.action, e.detail) for e in store.trail()] == [
        ("coordinator", "quarantine", "a: too long \0")
    ]


# --- the audit trail


def test_the_audit_trail_goes_on_after_a_restart(
    reopened: Reopened, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fedcore.server")
    assert reopened().trail() == []
    for number in (1, 2, 3):
        reopened().note("operator alice", "submit", f"run-{number}")
    found = reopened().trail()
    assert [(e.sequence, e.actor, e.action, e.detail) for e in found] == [
        (n, "operator alice", "submit", f"run-{n}") for n in (1, 2, 3)
    ]
    assert [record.__dict__["hash"] for record in caplog.records] == [entry.hash for entry in found]
    assert (tmp_path / "audit.key").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE audit SET content = replace(content, 'run-2', 'run-9')",
        "UPDATE audit SET hash = 'no hash' WHERE sequence = 2",
        "DELETE FROM audit WHERE sequence = 2",
        "UPDATE audit SET sequence = sequence + 10 WHERE sequence >= 2",
        "UPDATE audit SET signature = (SELECT signature FROM audit WHERE sequence = 1) WHERE sequence = 2",
    ],
)
def test_an_audit_trail_that_was_altered_is_found(reopened: Reopened, statement: str) -> None:
    store = reopened()
    for number in (1, 2, 3):
        store.note("operator alice", "submit", f"run-{number}")
    with transaction(store.engine) as db:
        db.execute(text(statement))
    with pytest.raises(ChainBroken, match=r"row 2 (is missing|has been altered)"):
        store.trail()


def test_a_trail_without_its_key_is_not_begun_anew(reopened: Reopened, tmp_path: Path) -> None:
    reopened().note("operator alice", "submit", "run-1")
    (tmp_path / "audit.key").unlink()
    with pytest.raises(ConfigError, match=r"audit.key is missing; restore it from a backup"):
        reopened()
    (tmp_path / "audit.key").touch(0o600)
    with pytest.raises(ConfigError, match=r"audit.key is no key of an audit trail"):
        reopened()


# --- migrations


def test_the_tables_are_those_of_the_migrations(reopened: Reopened) -> None:
    with snapshot(reopened().engine) as db:
        assert compare_metadata(MigrationContext.configure(db), TABLES) == []


@pytest.fixture
def newer(tmp_path: Path) -> Path:
    """Return migrations with a made-up one more."""
    folder = shutil.copytree(MIGRATIONS, tmp_path / "100% newer")
    (folder / "versions" / "0003.py").write_text(
        """from alembic import op

revision, down_revision = "0003", "0002"


def upgrade() -> None:
    op.execute("ALTER TABLE runs ADD COLUMN note TEXT NOT NULL DEFAULT 'none'")
    op.execute("UPDATE runs SET detail = 'upgraded'")
"""
    )
    return folder


def test_a_database_is_upgraded_and_an_older_fedcore_leaves_it_alone(
    reopened: Reopened, newer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reopened().add_run("run-1", RUN, "c" * 64)
    with monkeypatch.context() as patch:
        patch.setattr("fedcore.server.store.migrate", partial(migrate, migrations=newer))
        (run,) = reopened().runs()
        assert (run.id, run.detail) == ("run-1", "upgraded")
        assert len(reopened().runs()) == 1  # and is not upgraded again
    with pytest.raises(ConfigError, match=r"it has version 0003, and this .* up to 0002; a newer"):
        reopened()


def test_a_database_of_the_first_version_is_upgraded(
    reopened: Reopened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = shutil.copytree(MIGRATIONS, tmp_path / "first", ignore=shutil.ignore_patterns("0002.py"))
    with monkeypatch.context() as patch:
        patch.setattr("fedcore.server.store.migrate", partial(migrate, migrations=first))
        run = reopened().add_run("run-1", RUN, "c" * 64)
    store = reopened()
    assert store.runs() == [run]
    with snapshot(store.engine) as db:
        assert compare_metadata(MigrationContext.configure(db), TABLES) == []


def test_an_upgrade_that_fails_changes_nothing(reopened: Reopened, newer: Path) -> None:
    store = reopened()
    run = store.add_run("run-1", RUN, "c" * 64)
    with (newer / "versions" / "0003.py").open("a") as file:
        file.write('    op.execute("UPDATE nothing SET detail = 0")\n')
    with pytest.raises(DBAPIError, match="nothing"), transaction(store.engine) as db:
        migrate(db, newer)
    store = reopened()
    assert store.runs() == [run]
    with snapshot(store.engine) as db:
        assert compare_metadata(MigrationContext.configure(db), TABLES) == []


def test_tables_of_something_else_are_left_alone(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "coordinator.db") as db:
        db.execute("CREATE TABLE runs (id TEXT)")
    db.close()
    with pytest.raises(ConfigError, match=r"coordinator.db: .* tables that no version of fedcore made"):
        Store(tmp_path)


# --- what can be wrong with a database


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "coordinator.db").write_text("no database" * 100)
    with pytest.raises(ConfigError, match=r"coordinator.db: .* cannot be opened: database corrupt"):
        Store(tmp_path)


def test_a_database_that_another_process_has_locked_is_unavailable(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with transaction(store.engine) as db:
        db.execute(text("PRAGMA busy_timeout=1"))
    with sqlite3.connect(tmp_path / "coordinator.db", isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreUnavailable, match=r"^database locked$"):
            store.note("operator alice", "submit", "run-1")
    other.close()
    store.note("operator alice", "submit", "run-1")
    assert [entry.sequence for entry in store.trail()] == [1]
    store.close()


def test_a_disk_that_is_full_is_unavailable(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with transaction(store.engine) as db:
        db.execute(text("PRAGMA max_page_count=1"))  # as many as there are
    run = replace(RUN, metrics=("long" * 10_000,))
    with pytest.raises(StoreUnavailable, match=r"^disk full$"):
        store.add_run("run-1", run, "c" * 64)
    with transaction(store.engine) as db:
        db.execute(text("PRAGMA max_page_count=100000"))
    store.add_run("run-1", run, "c" * 64)
    store.close()


@pytest.mark.parametrize(
    ("sqlstate", "reason"),
    [
        ("53100", "disk full"),
        ("53200", "database out of resources"),
        ("57P01", "database unreachable"),  # an administrator has ended the connection
        ("57014", "database unreachable"),  # a statement that an administrator has cancelled
        ("40P01", "database locked"),
        ("23505", ""),  # a key that is there already: that would be our mistake
        (None, "database unreachable"),
    ],
)
def test_what_postgresql_says_is_told_in_a_few_words(sqlstate: str | None, reason: str) -> None:
    origin = Exception("secret detail")
    origin.sqlstate = sqlstate  # type: ignore[attr-defined] # as psycopg's have
    assert reason_of(OperationalError("SELECT", {}, origin)) == reason


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("postgresql+psycopg://fed:hunter2@host/db", "holds a password.*PGPASSFILE"),
        ("postgresql+psycopg://fed@host/db?password=hunter2", "holds a password"),
        ("postgresql+psycopg://fed@host/db?sslpassword=hunter2", "holds a password"),
        ("postgresql+psycopg://fed:hunter2@host:port/db", "cannot be read; expected postgresql"),
        ("mysql://fed@host/db", "begins with 'mysql'; expected postgresql"),
        ("sqlite:////elsewhere.db", "begins with 'sqlite'; expected postgresql"),
        ("hunter2", "cannot be read; expected postgresql"),
    ],
)
def test_a_url_that_does_not_fit_is_refused_and_no_password_is_shown(
    tmp_path: Path, url: str, said: str
) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        Store(tmp_path, url)
    shown = "".join(traceback.format_exception(refused.value))
    assert "hunter2" not in shown.replace(repr(url), "")


def test_a_server_that_is_not_there_is_named_without_the_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGPASSWORD", "hunter2")
    url = f"postgresql+psycopg://fed@/db?host={tmp_path}"
    with pytest.raises(ConfigError, match=r"fed@/db.* cannot be opened: database unreachable") as refused:
        Store(tmp_path, url)
    assert "hunter2" not in "".join(traceback.format_exception(refused.value))


def test_a_driver_that_is_not_installed_names_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(MissingExtra, match=r"pip install 'fedcore\[postgres\]'"):
        Store(tmp_path, "postgresql+psycopg://fed@host/db")
