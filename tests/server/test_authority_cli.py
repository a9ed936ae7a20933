"""`fedcore authority`, as a person runs it."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from typer.testing import CliRunner

from fedcore.errors import SpecError
from fedcore.server.authority import Authority
from fedcore.server.authority_cli import app, parse_lifetime
from fedcore.wire.address import parse_address
from fedcore.wire.enrolment import enrol
from fedcore.wire.token import Token

COMMAND = [sys.executable, "-c", "from fedcore.server.authority_cli import app; app()"]


def run(*arguments: object) -> str:
    """Return what a command prints on standard output."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    folder = tmp_path / "authority"
    printed = run("init", folder, "--federation", "fed", "--address", f"127.0.0.1:{port}")
    assert re.search(r"SHA-256 ([0-9A-F]{2}:){31}[0-9A-F]{2}\n", printed)
    return folder


@contextmanager
def started(*arguments: object) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """Run a command, and yield its process and the address it says it listens on."""
    command = [*COMMAND, *map(str, arguments)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stderr is not None
        try:
            line = process.stderr.readline()
            found = re.search(r"listening\s+address=(\S+)", line)
            assert found, line + process.stderr.read()
            yield process, found[1]
        finally:
            process.kill()


def test_one_token_a_line(folder: Path) -> None:
    lines = run("token", "--dir", folder, "--role", "client", "a", "b").splitlines()
    assert [str(Token.parse(line).name) for line in lines] == [
        "fedcore://fed/client/a",
        "fedcore://fed/client/b",
    ]


def test_tokens_as_json_and_as_private_files(folder: Path, tmp_path: Path) -> None:
    line = json.loads(run("token", "--dir", folder, "--role", "coordinator", "main", "--json"))
    assert line["name"] == str(Token.parse(line["token"]).name) == "fedcore://fed/coordinator/main"
    printed = run("token", "--dir", folder, "--role", "client", "a", "--out", tmp_path / "tokens")
    file = tmp_path / "tokens" / "a.token"
    assert printed == f"{file}\n" and file.stat().st_mode & 0o777 == 0o600
    assert Token.parse(file.read_text()).name.name == "a"


@pytest.mark.parametrize(
    ("role", "hint"), [("authority", "is no participant's"), ("cliant", "did you mean 'client'")]
)
def test_a_role_that_cannot_enrol_is_refused(folder: Path, role: str, hint: str) -> None:
    with pytest.raises(SpecError, match=hint):
        run("token", "--dir", folder, "--role", role, "a")


def test_a_name_that_does_not_fit_makes_no_token_at_all(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="name 'B' does not fit"):
        run("token", "--dir", folder, "--role", "client", "a", "B", "--out", tmp_path / "tokens")
    assert not (tmp_path / "tokens").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_until_it_is_told_to_stop(folder: Path, tmp_path: Path, number: signal.Signals) -> None:
    text = run("token", "--dir", folder, "--role", "client", "a").strip()
    with started("start", "--dir", folder) as (process, address):
        assert address == Token.parse(text).address
        assert enrol(text, tmp_path / "id").name.name == "a"
        process.send_signal(number)
        assert process.wait(timeout=5) == 0
        assert process.stderr is not None
        log = process.stderr.read()
    assert "enrolled" in log and "identity=fedcore://fed/client/a" in log and "stopped" in log
    with pytest.raises(ProcessLookupError):  # nothing is left of the session that it led
        os.killpg(process.pid, 0)


def test_port_zero_is_logged_as_the_port_it_became(folder: Path) -> None:
    with started("start", "--dir", folder, "--listen", "127.0.0.1:0") as (_, address):
        socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), timeout=5).close()


def test_a_second_one_survives_kill_of_the_first(folder: Path, tmp_path: Path) -> None:
    text = run("token", "--dir", folder, "--role", "client", "a").strip()
    with started("start", "--dir", folder) as (process, _):
        first = enrol(text, tmp_path / "id")
        process.kill()
        process.wait(timeout=5)
    with started("start", "--dir", folder):
        assert enrol(text, tmp_path / "id") == first


def test_what_was_issued_is_listed_and_revoked_by_name(folder: Path, tmp_path: Path) -> None:
    tokens = run("token", "--dir", folder, "--role", "client", "a", "b").splitlines()
    with started("start", "--dir", folder):
        for name, text in zip("ab", tokens, strict=True):
            enrol(text, tmp_path / name)
    shown = run("revoke", "--dir", folder, "a")
    assert shown == "revoked fedcore://fed/client/a: 1 certificate\n"
    lines = [line.split() for line in run("list", "--dir", folder).splitlines()]
    assert [(line[0], line[-1]) for line in lines] == [
        ("fedcore://fed/client/a", "revoked"),
        ("fedcore://fed/client/b", "valid"),
    ]
    rows = [json.loads(line) for line in run("list", "--dir", folder, "--json").splitlines()]
    assert [row["revoked"] is None for row in rows] == [False, True]
    with pytest.raises(SpecError, match="did you mean 'fedcore://fed/client/b'"):
        run("revoke", "--dir", folder, "c")
    with pytest.raises(SpecError, match="operator/b has neither certificate nor token"):
        run("revoke", "--dir", folder, "--role", "operator", "b")
    with pytest.raises(SpecError, match="role 'authority' is no participant's"):
        run("revoke", "--dir", folder, "--role", "authority", "enrolment")


def test_the_intermediate_is_renewed_while_the_authority_runs(folder: Path, tmp_path: Path) -> None:
    texts = run("token", "--dir", folder, "--role", "client", "a", "b").splitlines()
    with started("start", "--dir", folder):
        first = enrol(texts[0], tmp_path / "a")
        assert "move it back to its safe" in run("renew", "--dir", folder)
        second = enrol(texts[1], tmp_path / "b")
    one, other = (x509.load_pem_x509_certificates(each.chain)[1] for each in (first, second))
    assert one.serial_number != other.serial_number and one.issuer == other.issuer


def test_the_life_of_certificates_is_chosen_at_the_start(tmp_path: Path) -> None:
    run("init", tmp_path, "--federation", "fed", "--address", "localhost:1", "--lifetime", "36h")
    assert Authority.load(tmp_path).lifetime == timedelta(hours=36)
    with pytest.raises(SpecError, match=r"--lifetime '1\.5d' does not fit"):
        run("init", tmp_path / "x", "--federation", "fed", "--address", "localhost:1", "--lifetime", "1.5d")


@pytest.mark.parametrize(
    ("text", "time"), [("30m", timedelta(minutes=30)), ("24h", timedelta(1)), ("7d", timedelta(7))]
)
def test_a_lifetime_is_a_number_and_a_unit(text: str, time: timedelta) -> None:
    assert parse_lifetime(text) == time


@pytest.mark.parametrize("text", ["", "0h", "24", "h", "-1h", "1.5h", "1w", "24h "])
def test_another_lifetime_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match="expected minutes, hours or days"):
        parse_lifetime(text)


@pytest.mark.parametrize(
    "text", ["", "host", "host:", "host:0", "host:65536", ":80", "h/x:80", "unix:/a", "host:8\n"]
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match="expected HOST:PORT"):
        parse_address(text)


def test_an_address_may_be_ipv6() -> None:
    assert parse_address("[::1]:8700") == "[::1]:8700"
