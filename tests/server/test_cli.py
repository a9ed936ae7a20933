"""`fedcore server`, as a person runs it: its settings, and the audit trail."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tomli_w
from click.testing import Result
from sqlalchemy import text
from typer.testing import CliRunner

from fedcore.chain import ChainBroken
from fedcore.crypto.identity import Identity
from fedcore.crypto.names import Role
from fedcore.errors import ConfigError
from fedcore.server.cli import app
from fedcore.server.database import transaction
from fedcore.server.store import Store


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture
def folder(tmp_path: Path, database_url: str) -> Path:
    """Return a coordinator's folder as `init` makes it."""
    settings = {"listen": "127.0.0.1:0", "database_url": database_url}
    (tmp_path / "server.toml").write_text(tomli_w.dumps(settings))
    return tmp_path


def test_audit_shows_who_did_what_beside_a_running_coordinator(folder: Path, database_url: str) -> None:
    store = Store(folder, database_url)
    store.note("alice", "submit", "digits, 3 rounds of Digits")
    store.offend("client-7", "its update has NaN\n\x1b[2J", quarantine=True)
    said = run("audit", "--dir", folder).stdout.splitlines()
    assert [line.partition(" UTC  ")[2] for line in said[:2]] == [
        "alice  submit  digits, 3 rounds of Digits",
        "coordinator  quarantine  client-7: its update has NaN??[2J",
    ]
    entries = json.loads(run("audit", "--dir", folder, "--json").stdout)
    assert [(entry["sequence"], entry["actor"]) for entry in entries] == [(1, "alice"), (2, "coordinator")]
    assert said[2] == f"2 entries, each as it was written, the last one {entries[1]['hash']}"
    with transaction(store.engine) as db:
        db.execute(text("UPDATE audit SET content = replace(content, 'alice', 'mallory')"))
    with pytest.raises(ChainBroken, match="row 1 has been altered"):
        run("audit", "--dir", folder)
    store.close()


def test_audit_of_a_coordinator_that_never_started_says_so(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"audit.key is missing"):
        run("audit", "--dir", folder)


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ([], {}),
        (
            ["--database-url", "postgresql+psycopg://fed@db/fed"],
            {"database_url": "postgresql+psycopg://fed@db/fed"},
        ),
    ],
)
def test_init_writes_the_database_into_the_settings(
    identity: Callable[[Role, str], Identity],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: list[str],
    written: dict[str, str],
) -> None:
    main = identity("coordinator", "main")
    monkeypatch.setattr("fedcore.wire.enrolment.enrol", lambda *_: main)
    monkeypatch.setattr("fedcore.wire.token.read_token", lambda token: token)
    run("init", tmp_path / "c", "--token", "once", "--listen", "127.0.0.1:8710", *given)
    text = (tmp_path / "c" / "server.toml").read_text()
    assert text == tomli_w.dumps({"listen": "127.0.0.1:8710"} | written)


def test_init_refuses_a_password_before_it_uses_the_token(tmp_path: Path) -> None:
    url = "postgresql+psycopg://fed:hunter2@db/fed"
    with pytest.raises(ConfigError, match="holds a password") as refused:
        run("init", tmp_path / "c", "--token", "once", "--database-url", url)
    assert "hunter2" not in str(refused.value) and not (tmp_path / "c").exists()
