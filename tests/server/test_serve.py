"""The coordinator as a process: what it loads, how much it holds, how it ends."""

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import tomli_w

from fedcore.crypto.identity import Identity
from fedcore.crypto.names import Role
from fedcore.loopback import free_port
from fedcore.wire.v1 import coordinator_pb2 as pb
from tests.server.conftest import Federation, honest, silent, sized, spec_of, until

# What the `fedcore` command does, and a word at the end about what was imported.
CODE = """
import sys
from fedcore.server.cli import app
from fedcore.errors import FedcoreError
try:
    app(standalone_mode=False)
except FedcoreError as error:
    sys.exit(str(error))
assert "torch" not in sys.modules and "fedcore.client" not in sys.modules, "loaded"
"""


class Process:
    """`fedcore server start` on a folder of its own."""

    def __init__(self, folder: Path, identity: Callable[[Role, str], Identity]) -> None:
        self.folder, self.identity, self.port = folder, identity, free_port()
        folder.mkdir()
        identity("coordinator", "main").save(folder / "identity")
        (folder / "server.toml").write_text(tomli_w.dumps({"listen": f"127.0.0.1:{self.port}"}))

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-c", CODE, "start", "--dir", str(self.folder)]

    @asynccontextmanager
    async def running(self) -> AsyncIterator[tuple[asyncio.subprocess.Process, Federation]]:
        process = await asyncio.create_subprocess_exec(*self.command, stderr=subprocess.PIPE)
        assert process.stderr
        while b"listening" not in (line := await process.stderr.readline()):
            assert line, "the coordinator did not start"
        drain = asyncio.create_task(process.stderr.read())
        federation = Federation(self.identity, None, self.port)  # type: ignore[arg-type]
        try:
            async with federation.stack:
                yield process, federation
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()
            self.log = (await drain).decode()


@pytest.fixture
def process(tmp_path: Path, identity: Callable[[Role, str], Identity]) -> Process:
    return Process(tmp_path / "coordinator", identity)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_cleanly_while_agents_work_and_operators_watch(process: Process, number: int) -> None:
    async def run() -> None:
        async with process.running() as (coordinator, federation):
            agents = [*await federation.agents(2), await federation.agent("client-2", silent)]
            name = await federation.submit(spec_of(deadline=600.0))
            watch = (await federation.operator()).Watch(pb.RunName(run=name))
            await watch.read()
            await until(lambda: agents[2].assignments)
            os.kill(coordinator.pid, number)
            assert await coordinator.wait() == 0  # and nobody waits for the deadline

    asyncio.run(run())
    assert "stopped" in process.log and "Traceback" not in process.log
    (attempt,) = (process.folder / "attempts").iterdir()  # with which the next start goes on
    assert {path.name for path in attempt.iterdir()} <= {"records", "client-0.update", "client-1.update"}


def test_it_holds_little_memory_and_never_loads_torch(process: Process) -> None:
    layout = sized(1_000_000)

    async def run() -> int:
        async with process.running() as (coordinator, federation):
            await federation.agents(4, honest, layout)
            name = await federation.submit(spec_of(size=4, rounds=3), layout)
            assert (await federation.ended(name)).state == "finished"
            status = await asyncio.to_thread(Path(f"/proc/{coordinator.pid}/status").read_text)
            coordinator.terminate()
            assert await coordinator.wait() == 0, "torch was loaded"
            return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0])

    assert asyncio.run(run()) < 200 * 1000


def test_a_second_coordinator_is_refused(process: Process, tmp_path: Path) -> None:
    other = Process(tmp_path / "other", process.identity)
    (other.folder / "server.toml").write_text(tomli_w.dumps({"listen": f"127.0.0.1:{process.port}"}))

    async def run() -> None:
        async with process.running():
            for command, said in (
                (process.command, f"{process.folder} is in use by another coordinator; stop that one first"),
                (other.command, f"cannot listen on 127.0.0.1:{process.port}"),
            ):
                second = await asyncio.create_subprocess_exec(*command, stderr=subprocess.PIPE)
                _, error = await asyncio.wait_for(second.communicate(), 20)
                assert second.returncode and said in error.decode()
                assert "Traceback" not in error.decode()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("settings", "said"), [(None, "server init"), ("", "server init"), ("a", "server init")]
)
def test_a_folder_that_is_none_says_how_to_make_one(tmp_path: Path, settings: str | None, said: str) -> None:
    if settings is not None:
        (tmp_path / "server.toml").write_text(settings)
    command = [sys.executable, "-c", CODE, "start", "--dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode and said in done.stderr and "Traceback" not in done.stderr
