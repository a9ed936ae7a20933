"""`fedcore client`, as a person runs it."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from typer.testing import CliRunner

from fedcore.client.cli import app
from fedcore.client.state import State
from fedcore.crypto.identity import Identity
from fedcore.crypto.names import Name
from fedcore.errors import ConfigError
from fedcore.messages import Ref
from fedcore.server.authority import Authority
from fedcore.server.authority_service import start_service
from fedcore.wire import grpc

pytestmark = pytest.mark.slow  # together more than ten seconds

Federation = Any  # of conftest, which importlib mode cannot import
START = """
import sys
from fedcore.client.cli import app
app(["start", *sys.argv[1:]], standalone_mode=False)
assert "torch" not in sys.modules, "the agent's loop has imported torch"
print("torch-free")
"""


def run(*arguments: object) -> str:
    """Return what a command prints on standard output."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_init_says_what_comes_next_and_status_and_check_work_before_enrolment(tmp_path: Path) -> None:
    printed = run("init", tmp_path / "agent", "--coordinator", "example.org:8710")
    assert "fedcore client check" in printed and "fedcore client enroll" in printed
    status = json.loads(run("status", "--dir", tmp_path / "agent", "--json"))
    assert status["agent"] == "not running" and status["coordinator"] == "example.org:8710"
    assert "fedcore client enroll" in status["certificate"] and status["rounds"] == []
    assert not (tmp_path / "agent" / "state").exists()


def test_enrolment(tmp_path: Path) -> None:
    folder = tmp_path / "agent"
    run("init", folder)

    async def enrol() -> None:
        authority = Authority.create(tmp_path / "authority", "fed", "127.0.0.1:8700")
        server, port = await start_service(authority, "127.0.0.1:0")
        here = replace(authority, address=f"127.0.0.1:{port}")
        try:
            operator = str(here.new_token(Name("fed", "operator", "alice"), timedelta(hours=1)))
            with pytest.raises(
                ConfigError, match="for fedcore://fed/operator/alice; expected one of role client"
            ):
                await asyncio.to_thread(run, "enroll", operator, "--dir", folder)
            assert not (folder / "state" / "identity").exists()
            token = here.new_token(Name("fed", "client", "hospital-1"), timedelta(hours=1))
            (tmp_path / "token").write_text(f"{token}\n")
            printed = await asyncio.to_thread(run, "enroll", f"@{tmp_path / 'token'}", "--dir", folder)
        finally:
            await server.stop(0)
        assert re.search(r"name +hospital-1\n", printed) and re.search(r"federation +fed\n", printed)
        assert authority.fingerprint in printed and "certificate  until 2" in printed

    asyncio.run(enrol())
    identity = Identity.load(folder / "state" / "identity")
    assert identity.name == Name("fed", "client", "hospital-1")
    assert (folder / "state").stat().st_mode & 0o777 == 0o700
    assert json.loads(run("status", "--dir", folder, "--json"))["name"] == "hospital-1"


def test_a_key_with_a_passphrase(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    """It opens with the passphrase alone, which no log, argument or child of the agent has."""
    secret = "correct horse battery"

    async def play() -> None:
        async with federation.coordinator() as fake:
            folder = federation.folder / "agent"
            run("init", folder, "--coordinator", federation.address)
            server, port = await start_service(federation.authority, "127.0.0.1:0")
            at = replace(federation.authority, address=f"127.0.0.1:{port}")
            token = at.new_token(Name("fed", "client", "client-000000"), timedelta(hours=1))
            monkeypatch.setenv("FEDCORE_PASSPHRASE", secret)
            await asyncio.to_thread(run, "enroll", token, "--passphrase", "--dir", folder)
            assert "FEDCORE_PASSPHRASE" not in os.environ  # it is taken out where it is read
            await server.stop(0)
            federation.agent_folder()
            assert json.loads(run("status", "--dir", folder, "--json"))["name"] == "client-000000"

            for wrong, told in (("another", "does not open the key"), ("", "no terminal to ask for it")):
                with started(folder, environment={"FEDCORE_PASSPHRASE": wrong}) as process:
                    _, err = await asyncio.to_thread(process.communicate, timeout=20)
                assert process.returncode and told in err and "Traceback" not in err.splitlines()[-1]

            with started(folder, environment={"FEDCORE_PASSPHRASE": secret}) as process:
                digest = (await asyncio.wait_for(fake.hellos.get(), 20)).tasks["Moody"]
                fake.push(fake.assignment(1, digest))
                await asyncio.wait_for(fake.uploads.get(), 20)
                group = processes_of(process.pid)
                children = [path for path in group if path.name != str(process.pid)]
                assert children and all(secret not in (path / "cmdline").read_text() for path in group)
                assert all(secret not in (path / "environ").read_text() for path in children)
                process.send_signal(signal.SIGTERM)
                output = await ended(process)
            assert secret not in "".join(output)

    asyncio.run(play())


def processes_of(session: int) -> list[Path]:
    """Return the processes of a session, in /proc."""
    return [path for path in Path("/proc").glob("[0-9]*") if session_of(path) == session]


def session_of(process: Path) -> int:
    """Return the session of a process in /proc; 0 where it has just ended."""
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[3])
    except OSError:
        return 0


def test_a_token_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    run("init", tmp_path)
    with pytest.raises(ConfigError, match=r"nothing\.token: No such file"):
        run("enroll", "@nothing.token", "--dir", tmp_path)


def test_starting_without_a_coordinator_names_the_line(tmp_path: Path) -> None:
    run("init", tmp_path)
    with pytest.raises(ConfigError, match=r"agent.toml:4: coordinator: '': expected HOST:PORT"):
        run("start", "--dir", tmp_path)


@contextmanager
def started(
    folder: Path, *options: str, environment: Mapping[str, str] = MappingProxyType({})
) -> Iterator["subprocess.Popen[str]"]:
    """Run an agent as a process that leads a session of its own."""
    command = [sys.executable, "-c", START, "--dir", str(folder), *options]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=pipe,
        stderr=pipe,
        text=True,
        start_new_session=True,
        env={**os.environ, **environment},
    ) as process:
        try:
            yield process
        finally:
            process.kill()


async def ended(process: "subprocess.Popen[str]") -> tuple[str, str]:
    """Wait for the end of an agent that was told to stop, and for that of its worker; return its output."""
    output = await asyncio.to_thread(process.communicate, timeout=10)
    assert process.returncode == 0, output
    assert not processes_of(process.pid)  # nothing is left of the session that it led
    return output


def test_a_round_without_torch_and_a_clean_end(federation: Federation) -> None:
    async def play() -> None:
        async with federation.coordinator() as fake:
            folder = federation.agent_folder()
            with started(folder, "--json-logs") as process:
                digest = (await asyncio.wait_for(fake.hellos.get(), 20)).tasks["Moody"]
                work = fake.assignment(1, digest)
                fake.push(work)
                await asyncio.wait_for(fake.uploads.get(), 20)
                await federation.until(lambda: ("run/1.0/train", "sent") in federation.journal())
                fake.outcome(work.ref)
                fake.push(fake.assignment(2, digest))
                await federation.until(lambda: ("run/2.0/train", "sent") in federation.journal())
                found = json.loads(await asyncio.to_thread(run, "status", "--dir", folder, "--json"))
                assert found["connection"].startswith("connected since 2") and found["limits"] == "none"
                with pytest.raises(ConfigError, match="in use by another agent"):
                    await asyncio.to_thread(run, "start", "--dir", folder)
                process.send_signal(signal.SIGTERM)
                out, err = await ended(process)
        assert out == "torch-free\n"
        lines = [json.loads(line) for line in err.splitlines() if line.startswith("{")]
        events = [line["event"] for line in lines]
        assert events[0] == "connected" and events[-1] == "stopped" and events.count("update sent") == 2
        assert found["agent"] == "running" and found["tasks"] == {"Moody": digest}
        assert found["rounds"][0]["ref"] == str(Ref("run", 1, 0, "train"))
        assert found["rounds"][0]["event"] == "folded"

    asyncio.run(play())
    printed = run("status", "--dir", federation.folder / "agent")
    assert re.search(r"agent +not running", printed) and "run/1.0/train  folded" in printed


def test_ctrl_c_amid_training_leaves_no_process(federation: Federation) -> None:
    async def play() -> None:
        async with federation.coordinator() as fake:
            with started(federation.agent_folder()) as process:
                digest = (await asyncio.wait_for(fake.hellos.get(), 20)).tasks["Moody"]
                fake.push(fake.assignment(103, digest))
                await federation.until(lambda: federation.lines("trained.txt") == ["103.0"])
                os.killpg(process.pid, signal.SIGINT)  # as a terminal does
                _, err = await ended(process)
                decline = await asyncio.wait_for(fake.declines.get(), 20)
                assert decline.reason == "the device is shutting down"
        assert "declined" in err and "stopped" in err and "Traceback" not in err

    asyncio.run(play())


def test_a_second_signal_ends_the_agent_at_once(federation: Federation) -> None:
    async def play() -> None:
        async with federation.coordinator() as fake:
            with started(federation.agent_folder()) as process:
                digest = (await asyncio.wait_for(fake.hellos.get(), 20)).tasks["Moody"]
                fake.permits.clear()
                fake.push(fake.assignment(1, digest))
                await asyncio.wait_for(fake.uploads.get(), 20)
                began = time.monotonic()
                process.send_signal(signal.SIGTERM)
                await asyncio.sleep(0.5)
                assert process.poll() is None  # it waits for the receipt
                process.send_signal(signal.SIGTERM)
                _, err = await ended(process)
        assert time.monotonic() - began < 3 and "waiting for an upload" in err and "stopped" in err

    asyncio.run(play())


def test_an_agent_that_is_killed_takes_its_worker_along(federation: Federation) -> None:
    async def play() -> None:
        async with federation.coordinator() as fake:
            with started(federation.agent_folder()) as process:
                digest = (await asyncio.wait_for(fake.hellos.get(), 20)).tasks["Moody"]
                fake.push(fake.assignment(103, digest))
                await federation.until(lambda: federation.lines("trained.txt") == ["103.0"])
                assert len(processes_of(process.pid)) == 2
                process.kill()
                await asyncio.to_thread(process.wait)
                await federation.until(lambda: not processes_of(process.pid))

    asyncio.run(play())


def test_a_coordinator_that_is_down_for_a_while_costs_a_line_and_no_worker(federation: Federation) -> None:
    async def play() -> None:
        async with federation.coordinator() as fake:
            folder = federation.agent_folder()
            with started(folder) as process:
                await asyncio.wait_for(fake.hellos.get(), 20)
                workers = processes_of(process.pid)
                fake.refusal = (grpc.StatusCode.UNAVAILABLE, "being repaired")
                fake.hang_up()
                await asyncio.sleep(4)
                found = json.loads(await asyncio.to_thread(run, "status", "--dir", folder, "--json"))
                assert re.match("not connected since 2.*: UNAVAILABLE: being repaired", found["connection"])
                fake.refusal = None
                await asyncio.wait_for(fake.hellos.get(), 20)
                state = State(folder / "state")
                await federation.until(lambda: state.connection()["state"] == "connected")
                assert processes_of(process.pid) == workers
                process.send_signal(signal.SIGTERM)
                _, err = await ended(process)
        assert err.count("connection lost") == 1 and err.count(": connected") == 2

    asyncio.run(play())
