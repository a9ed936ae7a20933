"""The unit of a service: what systemd would run, as whom, and where it may write."""

import os
import pwd
import shlex
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from fedcore.client.cli import app as client
from fedcore.errors import ConfigError
from fedcore.server.cli import app as server
from fedcore.systemd import quoted, unit


def parsed(text: str) -> ConfigParser:
    parser = ConfigParser(interpolation=None, strict=True)
    parser.optionxform = str  # type: ignore[assignment,method-assign] # as its documentation asks
    parser.read_string(text)
    return parser


def read_back(word: str) -> str:
    """Return what systemd makes of one word of a command."""
    (text,) = shlex.split(word)
    return text.replace("%%", "%").replace("$$", "$")


@given(st.text(st.characters(categories=["L", "N", "P", "S", "Zs"]), min_size=1))
def test_any_folder_is_one_word_of_the_command(name: str) -> None:
    path = Path("/srv", name)
    if str(path).isprintable():
        assert read_back(quoted(path)) == str(path)
    else:
        with pytest.raises(ConfigError, match="choose another folder"):
            quoted(path)


def test_an_agent_writes_into_its_state_and_beside_its_ledger(tmp_path: Path) -> None:
    runner, folder, ledgers = CliRunner(), tmp_path / "an agent", tmp_path / "ledgers"
    assert runner.invoke(client, ["init", str(folder), "--coordinator", "host:1"]).exit_code == 0
    file = folder / "agent.toml"
    ledger = f'[ledger]\npath = "{ledgers}/a.ledger"\ndataset = "a"\nepsilon = 8.0\n'
    file.write_text(file.read_text().partition("[ledger]")[0] + ledger)
    service = parsed(runner.invoke(client, ["service", "--dir", str(folder)]).stdout)["Service"]
    assert shlex.split(service["ReadWritePaths"]) == [str(folder / "state"), str(ledgers)]
    words = [sys.executable, "-m", "fedcore", "client", "start", "--dir", str(folder)]
    assert shlex.split(service["ExecStart"]) == words
    assert service["User"] == pwd.getpwuid(os.getuid()).pw_name
    assert (service["ProtectSystem"], service["KillMode"], service["Restart"]) == (
        "strict",
        "mixed",
        "on-failure",
    )


def test_a_coordinator_writes_into_its_folder(tmp_path: Path) -> None:
    found = parsed(CliRunner().invoke(server, ["service", "--dir", str(tmp_path)]).stdout)
    assert shlex.split(found["Service"]["ReadWritePaths"]) == [str(tmp_path)]
    assert shlex.split(found["Service"]["ExecStart"])[3:] == ["server", "start", "--dir", str(tmp_path)]
    assert found["Install"]["WantedBy"] == "multi-user.target"


def test_a_folder_that_is_not_there_is_told_with_the_next_step(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not there; make it with 'fedcore server init'"):
        unit("server", "coordinator", tmp_path / "nowhere", [])
