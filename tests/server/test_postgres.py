"""What only PostgreSQL can do to a coordinator; collected with --postgres."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import make_url, text

from fedcore.errors import ConfigError
from fedcore.server.database import StoreUnavailable, connect
from fedcore.server.store import Store
from tests.server.conftest import LAYOUT, Running, reference, same, spec_of, until

CUT = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name"


def administered(url: str, *statements: str) -> None:
    """Run statements beside the coordinator, whose database is `:name` and {name}."""
    own = make_url(url)
    engine = connect(own.set(database="postgres"), alone=False).execution_options(
        isolation_level="AUTOCOMMIT"
    )
    with engine.connect() as db:
        for statement in statements:
            bound = {"name": own.database} if ":name" in statement else {}
            db.execute(text(statement.format(name=own.database)), bound)
    engine.dispose()


@contextmanager
def away(url: str) -> Iterator[None]:
    """Take the database away for a while."""
    administered(url, "ALTER DATABASE {name} ALLOW_CONNECTIONS false", CUT)
    yield
    administered(url, "ALTER DATABASE {name} ALLOW_CONNECTIONS true")


def test_a_second_coordinator_is_refused_until_the_first_is_gone(tmp_path: Path, postgres_url: str) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    first = Store(tmp_path / "one", postgres_url)
    with pytest.raises(ConfigError, match="in use by another coordinator"):
        Store(tmp_path / "two", postgres_url)
    first.note("operator alice", "submit", "run-1")  # and is none the worse for it
    first.close()
    with pytest.raises(
        ConfigError, match=r"audit.key is missing"
    ):  # the database belongs to the other folder
        Store(tmp_path / "two", postgres_url)
    Store(tmp_path / "one", postgres_url).close()


def test_a_connection_that_was_cut_is_made_anew_with_its_lock(tmp_path: Path, postgres_url: str) -> None:
    store = Store(tmp_path, postgres_url)
    administered(postgres_url, CUT)
    store.note("operator alice", "submit", "run-1")
    with pytest.raises(ConfigError, match="in use by another coordinator"):
        Store(tmp_path, postgres_url)
    store.close()


def test_a_transaction_that_is_cut_is_unavailable_and_nothing_of_it_stays(
    tmp_path: Path, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path, postgres_url)
    with monkeypatch.context() as patch:
        patch.setattr("fedcore.server.database.point", lambda _: administered(postgres_url, CUT))
        with pytest.raises(StoreUnavailable, match=r"^database unreachable$"):
            store.note("operator alice", "submit", "run-1")
    assert store.trail() == []
    store.close()


def test_a_database_that_is_away_is_unavailable_until_it_is_back(tmp_path: Path, postgres_url: str) -> None:
    store = Store(tmp_path, postgres_url)
    with away(postgres_url):
        for _ in range(2):
            with pytest.raises(StoreUnavailable, match=r"^database unreachable$"):
                store.note("operator alice", "submit", "run-1")
        with pytest.raises(
            ConfigError, match=r"cannot be opened: database unreachable .*not currently accepting"
        ):
            Store(tmp_path, postgres_url)
    store.note("operator alice", "submit", "run-1")
    assert len(store.trail()) == 1
    store.close()


def test_a_run_waits_for_its_database_and_ends_with_the_same_bits(
    running: Running, postgres_url: str
) -> None:
    spec = spec_of(rounds=3)

    async def run() -> None:
        async with running(database_url=postgres_url) as federation:
            name = await federation.submit(spec)
            driver = federation.coordinator.drivers[name]
            with away(postgres_url):
                await federation.agents(3)
                await until(lambda: driver.run.detail == "database unreachable")
            assert (await federation.ended(name)).state == "finished"
            state, _ = reference(spec, LAYOUT, [f"client-{i}" for i in range(3)])
            assert same(federation.parameters(name).shared, state.parameters.shared)
        async with running(database_url=postgres_url) as federation:
            assert (await federation.ended(name)).state == "finished"

    asyncio.run(run())
