"""What never happens on the coordinator's event loop: NumPy calls of size, files and SQL."""

import asyncio
import gc
import os
import sqlite3
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread, current_thread
from types import FrameType, ModuleType
from typing import Any

import numpy as np
import pytest

from fedcore.messages import Blob, UploadHead
from fedcore.wire import grpc
from fedcore.wire.relay import Void
from fedcore.wire.v1 import coordinator_pb2 as pb
from tests.server.conftest import (
    Federation,
    Running,
    chunk_parts,
    silent,
    sized,
    spec_of,
    until,
    upload_parts,
)
from tests.server.devices import Masking, Sealing
from tests.server.posting import AppHost, Sender

BLOCKING = {"posix", "io", "_io", "mmap", "sqlite3", "_sqlite3"}
HARMLESS = {"fspath", "getpid", "urandom", "fileno", "preadv"}  # the last of what is in the page cache alone


def callers(frame: FrameType | None) -> Iterator[FrameType]:
    """Yield a frame and those that called it, innermost first."""
    while frame is not None:
        yield frame
        frame = frame.f_back


@contextmanager
def noting_blocking_calls() -> Iterator[set[str]]:
    """Collect the calls of this thread, other than the log's, that reach for a file or a database."""
    noted: set[str] = set()

    def note(frame: FrameType, event: str, function: Any) -> None:
        owner = getattr(function, "__self__", None)
        module = owner.__name__ if isinstance(owner, ModuleType) else type(owner).__module__
        if event == "c_call" and module in BLOCKING and function.__name__ not in HARMLESS:
            if not any(caller.f_globals.get("__name__") == "logging" for caller in callers(frame)):
                noted.add(f"{module}.{function.__name__} at {frame.f_code.co_filename}:{frame.f_lineno}")

    sys.setprofile(note)
    try:
        yield noted
    finally:
        sys.setprofile(None)


def test_what_reaches_for_a_file_or_a_database_is_noticed(tmp_path: Path) -> None:
    with noting_blocking_calls() as noted:
        with (tmp_path / "file").open("wb") as file:
            file.write(b"a")
            os.fsync(file.fileno())
        sqlite3.connect(":memory:").close()
    names = {call.partition(" ")[0].rpartition(".")[2] for call in noted}
    assert {"open", "write", "fsync", "connect", "close"} <= names


def test_no_file_and_no_sql_is_used_on_the_loop(running: Running) -> None:
    async def run() -> None:
        async with running() as federation:
            agents = await federation.agents(3)
            operator = await federation.operator()
            with noting_blocking_calls() as noted:
                ended = await federation.submit(spec_of())
                await federation.ended(ended)
                assert [chunk async for chunk in operator.Fetch(pb.RunName(run=ended))]
                await refused_and_stopped(federation, operator)
            assert sum(len(agent.outcomes) for agent in agents) >= 18
            assert not noted

    async def refused_and_stopped(federation: Federation, operator: Any) -> None:
        bad = await federation.agent("client-0", silent)
        name = await federation.submit(spec_of())
        await until(lambda: bad.assignments)
        work = bad.assignments[0]
        head = upload_parts(work.ref, await bad.update(work))[0]
        with pytest.raises(grpc.aio.AioRpcError):
            await bad.upload([head, *chunk_parts(b"altered")])
        assert (await operator.Stop(pb.RunName(run=name))).state == "stopped"

    asyncio.run(run())


def test_no_file_is_used_on_the_loop_by_encrypted_rounds(running: Running) -> None:
    async def run(updates: str) -> None:
        async with running() as federation:
            devices = {}
            for name in ("client-0", "client-1", "client-2"):
                identity = federation.identity("client", name)
                devices[name] = Masking(identity) if updates == "secagg" else Sealing(identity)
                await federation.agent(name, devices[name].work, heed=getattr(devices[name], "heed", None))
            with noting_blocking_calls() as noted:
                spec = spec_of(cohort={"minimum": 3}, encryption={"updates": updates})
                info = await federation.ended(await federation.submit(spec))
            assert info.state == "finished"
            assert not noted

    asyncio.run(run("sealed"))
    asyncio.run(run("secagg"))


def test_no_file_and_no_sql_is_used_on_the_loop_by_letters(running: Running) -> None:
    content = bytes(3 * 2**20)

    async def run() -> None:
        async with running() as federation:
            post = Sender(await federation.channel("operator", "alice"))
            async with AppHost("a", await federation.channel("client", "a")) as host:
                with noting_blocking_calls() as noted:
                    await post.open()
                    await post.post("1", "a", content)
                    await post.post("2", "a", content, ttl=0.1)
                    ref, late = [(await host.letter()).ref for _ in range(2)]
                    assert await host.take(ref) == content
                    assert await host.heard() == Void(late)
                    await host.reply(ref, b"done", content[1:])
                    assert len(await post.answered(1)) == 1
                    assert await post.collect(ref) == content[1:]
                    await post.settle(["1"])
                    await post.close()
            assert not noted

    asyncio.run(run())


SCHEDSTAT = Path("/proc/thread-self/schedstat")  # Linux: ns on a CPU, ns ready to run but without one, ...


class Turns:
    """How long this process itself kept its event loop from its next turn, whatever the machine was doing.

    That is the CPU time of the loop's thread; and what it slept beyond its timer, as whoever waits for the
    GIL does, but for no longer than the compute thread was at work on a CPU. A wait for a CPU is nobody's
    fault; where there is no schedstat it cannot be told from one for the GIL, and neither is counted.
    """

    PAUSE = 0.001  # seconds

    def __init__(self, compute: Thread) -> None:
        assert compute.ident
        self.compute = time.pthread_getcpuclockid(compute.ident)
        self.lags: list[float] = []

    def clocks(self) -> tuple[float, ...]:
        """Return wall time, CPU time, time without a CPU, and the compute thread's CPU time; seconds."""
        starved = int(SCHEDSTAT.read_text().split()[1]) / 1e9 if SCHEDSTAT.exists() else time.perf_counter()
        return time.perf_counter(), time.thread_time(), starved, time.clock_gettime(self.compute)

    async def watch(self) -> None:
        before = self.clocks()
        while True:
            await asyncio.sleep(self.PAUSE)
            after = self.clocks()
            wall, own, starved, compute = (b - a for a, b in zip(before, after, strict=True))
            slept = max(0.0, wall - own - starved - self.PAUSE)
            self.lags.append(own + min(slept, compute))
            before = after


def test_the_loop_is_never_held_up_while_large_updates_are_folded(running: Running) -> None:
    """Eight updates of 20 MB. The machine may interfere once and again; the code would each time."""
    layout = sized(5_000_000)

    async def run() -> list[float]:
        async with running() as federation:
            agents = await federation.agents(8, silent, layout)
            spec = spec_of(size=8, rounds=1, evaluation={"every": 0})
            name = await federation.submit(spec, layout)
            await until(lambda: all(agent.assignments for agent in agents))
            ref = agents[0].assignments[0].ref
            coordinator = federation.coordinator
            live, driver = coordinator.live[ref], coordinator.drivers[name]
            payload = np.random.default_rng(0).standard_normal(layout.shared_size, np.float32).tobytes()
            scalars = {"weight": 1.0, "loss": 0.0, "count": 1.0}
            head = UploadHead(ref, scalars, (("delta", layout.shared_size),), Blob("", len(payload)))
            for agent in agents:
                await asyncio.to_thread(live.journal.update(agent.name).write_bytes, payload)
            turns = Turns(await coordinator.calculate(current_thread))
            watcher = asyncio.create_task(turns.watch())
            for agent in agents:
                await live.accept(agent.name, head)
            await until(lambda: driver.committed)
            watcher.cancel()
            await (await federation.operator()).Stop(pb.RunName(run=name))
            return turns.lags

    gc.collect()
    gc.freeze()  # a coordinator does not have the heap of a thousand tests
    try:
        worst = []
        for _ in range(3):
            lags = asyncio.run(run())
            worst.append(max(lags))
            if worst[-1] < 0.02:
                return
    finally:
        gc.unfreeze()
    pytest.fail(f"the event loop was held up for {worst} seconds")
