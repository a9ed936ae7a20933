"""`fedcore bench load`: a coordinator with many agents that do nothing but answer, and its sudden end.

The agents share one process. Each has a certificate, a connection and a stream of its own, downloads the
model of every round and uploads an update, and after a lost connection comes back as a real agent does.
"""

import asyncio
import random
import re
import tempfile
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from sqlalchemy import create_engine

from fedcore.bench.deploy import SPEC, TASK, memory_of, periods
from fedcore.client.connection import backoff
from fedcore.client.session import ConnectionLost, Session, explain
from fedcore.crypto.identity import Identity
from fedcore.crypto.names import Name
from fedcore.errors import UpdateRefused
from fedcore.loopback import Loopback, federation
from fedcore.messages import Assignment, Blob, Decline, Hello, Outcome, Pause, Ref, UploadHead
from fedcore.server.authority import Authority
from fedcore.server.registry import Signal
from fedcore.server.serve import allow_files
from fedcore.server.tables import CLIENTS
from fedcore.task import client_name, digest, resolve
from fedcore.wire import grpc
from fedcore.wire.chunks import CHUNK
from fedcore.wire.codec import to_wire
from fedcore.wire.sending import sending
from fedcore.wire.v1 import coordinator_pb2 as pb

Step = Callable[[Session], Awaitable[None]]

ARRIVE = 100.0  # agents that start a second
AFTER = 2  # rounds after the coordinator was killed


@dataclass
class Tally:
    """What the agents have seen: seconds from an update's first byte to its receipt; who is connected."""

    seconds: dict[tuple[str, Ref], float] = field(default_factory=dict)
    connected: set[str] = field(default_factory=set)
    refused: Counter[str] = field(default_factory=Counter)
    changed: Signal = field(default_factory=Signal)

    async def complete(self, agents: int) -> None:
        """Wait until all agents are connected."""
        while len(self.connected) < agents:
            await self.changed.next.wait()


@dataclass(eq=False)
class LightAgent:
    """An agent without a worker, data or a disk: every update is the same constant."""

    address: str
    identity: Identity
    hello: Hello
    update: bytes
    tally: Tally
    work: Ref | None = None
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def name(self) -> str:
        """The client's."""
        return self.identity.name.name

    async def run(self) -> None:
        """Stay connected until cancelled."""
        attempt = 0
        async with Session(self.address, self.identity) as session:
            while True:
                pause, wait = None, backoff(attempt, random.random())
                attempt += 1
                with suppress(ConnectionLost):
                    async with aclosing(session.messages(self.hello)) as messages:
                        async for message in messages:
                            match message:
                                case Pause(seconds):
                                    pause = seconds
                                    break
                                case None:
                                    self.tally.connected.add(self.name)
                                    self.tally.changed.send()
                                    attempt = 0
                                case Assignment(ref) if ref.kind != "train":
                                    session.tell(Decline(ref, "no data"))
                                case Assignment(ref) if ref != self.work:
                                    self.work = ref
                                    self._begin(session, message)
                                case Outcome():
                                    self.work = None
                self.tally.connected.discard(self.name)
                await asyncio.sleep(wait if pause is None else pause)

    def _begin(self, session: Session, work: Assignment) -> None:
        task = asyncio.create_task(self._answer(session, work))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _answer(self, session: Session, work: Assignment) -> None:
        """Fetch the model and send an update, each until it works."""
        head = UploadHead(
            work.ref,
            {"weight": 1.0, "loss": 0.0, "count": 1.0},
            (("delta", len(self.update) // 4),),
            Blob(sha256(self.update).hexdigest(), len(self.update)),
        )
        steps: list[Step] = [] if work.content else [partial(self._download, work.parameters)]
        steps.append(partial(self._upload, head))
        for step in steps:
            started, attempt = time.perf_counter(), 0
            while self.work == work.ref:
                try:
                    await step(session)
                    break
                except ConnectionLost:
                    await asyncio.sleep(backoff(attempt, random.random()))
                    attempt += 1
                except UpdateRefused as error:
                    self.tally.refused[str(error)[:80]] += 1
                    return
        self.tally.seconds[self.name, work.ref] = time.perf_counter() - started

    async def _download(self, blob: Blob, session: Session) -> None:
        try:
            async for _ in session.stub.Download(pb.Wanted(blob=to_wire(blob)), timeout=60):
                pass
        except grpc.aio.AioRpcError as error:
            explain(error)

    async def _upload(self, head: UploadHead, session: Session) -> None:
        try:
            async with sending(call := session.stub.Upload(timeout=60), self._parts(head)):
                await call
        except grpc.aio.AioRpcError as error:
            explain(error)

    async def _parts(self, head: UploadHead) -> AsyncGenerator[pb.UploadPart, None]:
        yield to_wire(head)
        for index, start in enumerate(range(0, len(self.update), CHUNK)):
            yield pb.UploadPart(chunk=pb.Chunk(index=index, data=self.update[start : start + CHUNK]))


def measure(agents: int, rounds: int, parameters: int, registered: int) -> dict[str, Any]:
    """Run rounds, end the coordinator by SIGKILL, start it again, and run two more; return the line to print.

    registered: clients that the run knows after the restart, most of which are not there.
    """
    allow_files(2 * agents)
    with tempfile.TemporaryDirectory(prefix="fedcore-load-") as home:
        folder = Path(home)
        (folder / "echo_task.py").write_text(TASK.format(size=parameters), encoding="utf-8")
        spec = SPEC.format(rounds=rounds + AFTER, clients=agents, encryption="tls")
        (folder / "spec.toml").write_text(spec, encoding="utf-8")
        with federation(folder) as loopback:
            return asyncio.run(_loaded(loopback, agents, rounds, parameters, registered))


async def _loaded(
    loopback: Loopback, agents: int, rounds: int, parameters: int, registered: int
) -> dict[str, Any]:
    authority = Authority.load(loopback.folder / "authority")
    hello = Hello({"Echo": digest(resolve("echo_task:task", loopback.folder))})
    names, tally = [client_name(i) for i in range(agents)], Tally()
    lights = [
        LightAgent(
            loopback.address,
            authority.new_identity(Name(authority.name.federation, "client", name)),
            hello,
            bytes(4 * parameters),
            tally,
        )
        for name in names
    ]
    running = []
    for light in lights:
        running.append(asyncio.create_task(light.run()))
        await asyncio.sleep(1 / ARRIVE)
    await tally.complete(agents)
    await asyncio.to_thread(loopback.fedcore, "run", "submit", "spec.toml")
    before = await _committed(loopback, rounds)
    memory, killed = memory_of(loopback), time.monotonic()
    process = loopback.processes.pop("coordinator")
    process.kill()
    await asyncio.to_thread(process.wait)
    await asyncio.to_thread(_register, loopback.folder / "coordinator" / "coordinator.db", agents, registered)
    tally.connected.clear()
    await asyncio.to_thread(loopback.start, "coordinator")
    await tally.complete(agents)
    back = time.monotonic() - killed
    log = await _committed(loopback, rounds + AFTER)
    later = memory_of(loopback)
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    acknowledged = list(tally.seconds.values())
    seconds = periods(before)
    returned = re.findall(r"^(\S+?)[.]\S* info +server: agent connected", log[len(before) :], re.MULTILINE)
    return {
        "bench": "load",
        "agents": agents,
        "registered": registered,
        "parameters": parameters,
        "rounds": rounds + AFTER,
        "seconds_per_round": round(median(seconds), 3),
        "acknowledged": len(acknowledged),
        "lost": len(acknowledged) - sum(map(int, re.findall(r"round committed .*folded=(\d+)", log))),
        "refused": dict(tally.refused),
        "acknowledge_p50_s": round(median(acknowledged), 4),
        "acknowledge_p99_s": round(quantiles(acknowledged, n=100)[98], 4),
        "all_back_after_s": round(back, 1),
        "most_hellos_a_second": max(Counter(returned).values()),
        "coordinator_peak_rss_mb": max(memory["VmHWM"], later["VmHWM"]),
        "measured": time.strftime("%Y-%m-%d"),
    }


async def _committed(loopback: Loopback, rounds: int) -> str:
    """Return the coordinator's log once it tells of so many rounds."""
    while True:
        log = loopback.log("coordinator").read_text(encoding="utf-8")
        if log.count("server: round committed") >= rounds:
            return log
        if loopback.processes["coordinator"].poll() is not None or "server: run failed" in log:
            raise RuntimeError(f"the coordinator failed; its log ends:\n{log[-2000:]}")
        await asyncio.sleep(0.2)


def _register(database: Path, agents: int, registered: int) -> None:
    """Have the only run know of more clients."""
    engine = create_engine(f"sqlite:///{database}")
    with engine.begin() as db:
        (run,) = {row.run for row in db.execute(CLIENTS.select())}
        known = {"run": run, "round": 0, "attempt": 0, "memory": "{}"}
        if more := [{**known, "client": client_name(i)} for i in range(agents, registered)]:
            db.execute(CLIENTS.insert(), more)
    engine.dispose()
