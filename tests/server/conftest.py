"""A federation in one process: a real coordinator over mutual TLS on loopback, and agents in NumPy."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest

from fedcore.crypto.identity import Identity
from fedcore.crypto.names import Name, Role
from fedcore.crypto.tls import open_channel
from fedcore.layout import Entry, Layout, Parameters, Vector
from fedcore.messages import (
    Assignment,
    Blob,
    Decline,
    Hello,
    Outcome,
    Receipt,
    Ref,
    Secure,
    Submission,
    Update,
    UploadHead,
)
from fedcore.metrics import names
from fedcore.seeds import generator
from fedcore.server.authority import Authority
from fedcore.server.coordinator import Coordinator
from fedcore.server.serve import start_server
from fedcore.spec import RunSpec
from fedcore.strategies import from_table
from fedcore.strategies.rounds import (
    Round,
    State,
    advance,
    cohort,
    evaluate_plan,
    initial_state,
    metrics,
    receive,
    train_plan,
)
from fedcore.wire import codec, grpc
from fedcore.wire.chunks import CHUNK
from fedcore.wire.codec import to_wire
from fedcore.wire.sending import sending
from fedcore.wire.v1 import coordinator_pb2 as pb
from fedcore.wire.v1.coordinator_pb2_grpc import CoordinatorStub, OperatorStub

TASK, DIGEST = "Sums", sha256(b"Sums").hexdigest()
METRICS = names(["accuracy"])
CODES = {code.value[0]: code for code in grpc.StatusCode}
LAYOUT = Layout(
    (
        Entry("weight", (10, 4), "float32", "shared"),
        Entry("bias", (4,), "float32", "shared"),
        Entry("running_mean", (3,), "float32", "buffer"),
    )
)
# Momentum, so that a restart without the optimiser's state would give another model.
STRATEGY = {"name": "fedavg", "optimizer": {"name": "sgd", "lr": 0.5, "momentum": 0.9}}

Work = Callable[["Agent", Assignment], Coroutine[Any, Any, None]]
Heed = Callable[["Agent", Secure], Coroutine[Any, Any, None]]
Rows = list[dict[str, Any]]


def spec_of(rounds: int = 3, size: int = 3, deadline: float = 20.0, **tables: Any) -> RunSpec:
    table = {"run": {"name": "test", "rounds": rounds, "seed": 7}, "strategy": STRATEGY, **tables}
    table["cohort"] = {"size": size, "deadline": deadline, **tables.get("cohort", {})}
    table["encryption"] = {"updates": "tls", "encoding": "exact", **tables.get("encryption", {})}
    return RunSpec.parse(table)


def sized(size: int) -> Layout:
    """Return a layout of so many parameters."""
    return Layout((Entry("weight", (size,), "float32", "shared"),))


def initial(layout: Layout) -> Parameters:
    rng = generator("initial")
    shared, buffers = (rng.standard_normal(n, layout.dtype) for n in (layout.shared_size, layout.buffer_size))
    return Parameters(shared, buffers)


def answer(ref: Ref, client: str, parameters: Parameters) -> Update:
    """Return a client's update, which depends on round, client and the received model."""
    rng = generator("answer", ref.kind, ref.round, client)
    count = float(rng.integers(1, 9))
    if ref.kind == "evaluate":
        loss = float(np.abs(parameters.shared).sum(dtype=np.float64))
        return Update({}, {"loss": loss, "accuracy": count / 2, "count": count})
    noise = rng.standard_normal(len(parameters.shared), np.float32)
    vectors: dict[str, Vector] = {"delta": np.float32(0.1) * (noise - parameters.shared)}
    if len(parameters.buffers):
        vectors["buffers"] = rng.standard_normal(len(parameters.buffers), np.float32)
    for name, received in parameters.extra.items():  # as SCAFFOLD's `control` is answered
        vectors[f"{name}_delta"] = rng.standard_normal(len(received), np.float32) - received
    return Update(vectors, {"weight": count, "loss": count * 0.5, "count": count})


def reference(spec: RunSpec, layout: Layout, clients: list[str]) -> tuple[State, Rows]:
    """Run the pure state machine on the same updates; return its last state and the rows of metrics."""
    strategy = from_table(spec.strategy)
    state, rows = initial_state(strategy, initial(layout)), []
    for number in range(1, spec.run.rounds + 1):
        ref = Ref("reference", number, 0, "train")
        asked = drawn(spec, ref, clients, state)
        round = filled(Round(train_plan(strategy, spec, layout, ref, asked, len(clients))), state)
        if strategy.aggregator.anchor == "root":
            root = replace(ref, kind="root")
            round.root = answer(root, "evaluator", state.parameters).vectors["delta"]
        state = advance(strategy, round, state, spec.run.seed)
        row = {f"train_{name}": value for name, value in metrics(round).items()}
        every = spec.evaluation.every
        if number == spec.run.rounds or (every and number % every == 0):
            ref = replace(ref, kind="evaluate")
            asked = drawn(spec, ref, clients, state)
            row |= metrics(filled(Round(evaluate_plan(spec, ref, asked, METRICS)), state))
        rows.append({"round": number, "folded": len(round.folded), "refused": 0, **row})
    return state, rows


def drawn(spec: RunSpec, ref: Ref, clients: list[str], state: State) -> tuple[str, ...]:
    strategy = from_table(spec.strategy)
    return cohort(strategy, spec, ref, sorted(clients), spec.cohort.asked, state.memory)


def filled(round: Round, state: State) -> Round:
    for client in round.plan.cohort:
        assert receive(round, client, answer(round.plan.ref, client, state.parameters)).status == "folded"
    round.close()
    return round


def upload_parts(ref: Ref, update: Update, **head: Any) -> list[pb.UploadPart]:
    """Return an update as it goes over the wire; `head` replaces fields of its head."""
    payload = b"".join(vector.tobytes() for vector in update.vectors.values())
    fields: dict[str, Any] = {
        "ref": ref,
        "scalars": update.scalars,
        "vectors": tuple((name, len(vector)) for name, vector in update.vectors.items()),
        "payload": Blob(sha256(payload).hexdigest(), len(payload)),
    }
    return [to_wire(UploadHead(**{**fields, **head})), *chunk_parts(payload)]


def chunk_parts(payload: bytes, size: int = CHUNK) -> list[pb.UploadPart]:
    starts = range(0, len(payload), size)
    return [pb.UploadPart(chunk=pb.Chunk(index=i, data=payload[s : s + size])) for i, s in enumerate(starts)]


async def each(parts: Iterable[Any]) -> AsyncGenerator[Any, None]:
    """Yield messages as a client's stream of requests."""
    for part in parts:
        yield part


async def heard(messages: AsyncIterator[pb.ToAgent]) -> AsyncIterator[pb.ToAgent]:
    """Yield what a coordinator says, one by one."""
    async for batch in messages:
        for message in codec.unbatched(batch):
            yield message


class Agent:
    """A device without training; `work` and `heed` say how it answers what it is assigned and told."""

    def __init__(
        self,
        name: str,
        channel: grpc.aio.Channel,
        layout: Layout,
        work: Work,
        hello: Hello,
        heed: Heed | None = None,
    ) -> None:
        self.name, self.layout, self.work, self.hello, self.heed = name, layout, work, hello, heed
        self.stub = CoordinatorStub(channel)
        self.assignments: list[Assignment] = []
        self.outcomes: list[Outcome] = []
        self.working: set[asyncio.Task[None]] = set()
        self.models: dict[str, Parameters] = {}
        self.receipts: list[Receipt] = []
        self.sending = asyncio.Lock()
        self.streams = False  # whether it sends its updates on its stream

    async def __aenter__(self) -> Self:
        self.call = self.stub.Connect()
        await self.call.write(to_wire(self.hello))
        messages = aiter(self.call)
        assert codec.to_agent(await anext(messages)) is None  # the welcome
        self.reader = asyncio.create_task(self._read(messages))
        return self

    async def __aexit__(self, *_: object) -> None:
        self.call.cancel()
        for task in [*self.working, self.reader]:
            task.cancel()
        await asyncio.gather(*self.working, self.reader, return_exceptions=True)

    async def _read(self, messages: AsyncIterator[pb.ToAgent]) -> None:
        async for message in heard(messages):
            match codec.to_agent(message):
                case Assignment() as assignment:
                    self.assignments.append(assignment)
                    self.working.add(asyncio.create_task(self.work(self, assignment)))
                case Secure() as secure if self.heed:
                    self.working.add(asyncio.create_task(self.heed(self, secure)))
                case Outcome() as outcome:
                    self.outcomes.append(outcome)
                case Receipt() as receipt:
                    self.receipts.append(receipt)

    async def model(self, assignment: Assignment) -> Parameters:
        address = assignment.parameters.sha256
        if address not in self.models:
            parts = self.stub.Download(pb.Wanted(blob=to_wire(assignment.parameters)))
            data = b"".join([chunk.data async for chunk in parts])
            assert sha256(data).hexdigest() == address
            beside = assignment.parameters.size > self.layout.nbytes
            extra = from_table(assignment.spec.strategy).algorithm.receives if beside else ()
            flat = np.frombuffer(data, self.layout.dtype)
            self.models = {address: Parameters.of_blob(flat, self.layout, extra)}
        return self.models[address]

    async def update(self, assignment: Assignment) -> Update:
        return answer(assignment.ref, self.name, await self.model(assignment))

    async def upload(self, parts: list[pb.UploadPart]) -> None:
        """Send the parts of one upload; raises grpc.aio.AioRpcError where it is refused."""
        if self.streams:
            receipt = await self.send(parts)
            if receipt.code:
                code, nothing = CODES[receipt.code], grpc.aio.Metadata()
                raise grpc.aio.AioRpcError(code, nothing, nothing, receipt.reason, None)
            return
        call = self.stub.Upload(timeout=30)
        async with sending(call, each(parts)):
            await call

    async def send(self, parts: list[pb.UploadPart]) -> Receipt:
        """Send an update on the stream, and return what the coordinator says to it."""
        header, payload = parts[0].header, b"".join(part.chunk.data for part in parts[1:])
        async with self.sending:  # one at a time, since receipts look alike
            before = len(self.receipts)
            await self.call.write(pb.FromAgent(update=pb.SmallUpdate(header=header, payload=payload)))
            await until(lambda: len(self.receipts) > before)
            return self.receipts[before]

    async def say(self, ref: Ref, message: bytes) -> None:
        """Send a message of secure aggregation."""
        await self.call.write(pb.FromAgent(secure=to_wire(Secure(ref, message))))

    async def decline(self, ref: Ref, reason: str) -> None:
        await self.call.write(to_wire(Decline(ref, reason)))


async def honest(agent: Agent, assignment: Assignment) -> None:
    """Do what is asked."""
    await agent.upload(upload_parts(assignment.ref, await agent.update(assignment)))


async def silent(agent: Agent, assignment: Assignment) -> None:
    """Take the assignment and never answer."""


class Federation:
    """A running coordinator and the ways to talk to it."""

    def __init__(
        self, identity: Callable[[Role, str], Identity], coordinator: Coordinator, port: int
    ) -> None:
        self.identity, self.coordinator, self.port = identity, coordinator, port
        self.stack = AsyncExitStack()

    async def channel(self, role: Role, name: str) -> grpc.aio.Channel:
        """Return a channel with that identity's certificate."""
        channel = open_channel(f"127.0.0.1:{self.port}", self.identity(role, name))
        return await self.stack.enter_async_context(channel)

    async def operator(self) -> OperatorStub:
        return OperatorStub(await self.channel("operator", "alice"))

    async def agent(
        self,
        name: str,
        work: Work = honest,
        layout: Layout = LAYOUT,
        tasks: tuple[str, ...] = (TASK,),
        evaluator: bool = False,
        pending: tuple[Ref, ...] = (),
        heed: Heed | None = None,
    ) -> Agent:
        """Return an agent that is connected until the end."""
        hello = Hello(dict.fromkeys(tasks, DIGEST), evaluator, pending)
        agent = Agent(name, await self.channel("client", name), layout, work, hello, heed)
        return await self.stack.enter_async_context(agent)

    @asynccontextmanager
    async def visitor(self, name: str, work: Work, layout: Layout = LAYOUT) -> AsyncIterator[Agent]:
        """Connect an agent that leaves at the end of the block."""
        channel = await self.channel("client", name)
        async with Agent(name, channel, layout, work, Hello({TASK: DIGEST})) as agent:
            yield agent

    async def agents(self, count: int, work: Work = honest, layout: Layout = LAYOUT) -> list[Agent]:
        return [await self.agent(f"client-{i}", work, layout) for i in range(count)]

    async def submit(self, spec: RunSpec, layout: Layout = LAYOUT, task: str = TASK) -> str:
        """Hand in a run and return its id."""
        parameters = initial(layout)
        data = parameters.shared.tobytes() + parameters.buffers.tobytes()
        head = Submission(spec, task, DIGEST, layout, METRICS, Blob(parameters.digest, len(data)))
        chunks = [pb.SubmitPart(chunk=part.chunk) for part in chunk_parts(data)]
        call = (await self.operator()).Submit(timeout=30)
        async with sending(call, each([to_wire(head), *chunks])):
            info = await call
        return str(info.run)

    async def ended(self, run: str) -> pb.RunInfo:
        """Wait for a run's end and return what is shown of it."""
        operator = await self.operator()
        async for info in operator.Watch(pb.RunName(run=run), timeout=60):
            last = info
        assert last.state != "running"
        shown: pb.RunInfo = await operator.Show(pb.RunName(run=run))
        return shown

    def parameters(self, run: str, layout: Layout = LAYOUT) -> Parameters:
        driver = self.coordinator.drivers[run]
        return self.coordinator.blobs.parameters(driver.address, layout, driver.extra)


def same(left: Vector, right: Vector) -> bool:
    """Tell whether two vectors have the same bits."""
    return left.dtype == right.dtype and left.tobytes() == right.tobytes()


async def until(holds: Callable[[], object], seconds: float = 10.0) -> None:
    """Wait for something to hold."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "what was waited for did not happen"
        await asyncio.sleep(0.002)


Running = Callable[..., Any]


@pytest.fixture(scope="session")
def identity(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Role, str], Identity]:
    """Return the identities of one federation, each made once."""
    authority = Authority.create(tmp_path_factory.mktemp("fed") / "authority", "fed", "127.0.0.1:8700")

    @cache
    def of(role: Role, name: str) -> Identity:
        return authority.new_identity(Name("fed", role, name))

    return of


@pytest.fixture
def running(identity: Callable[[Role, str], Identity], tmp_path: Path) -> Running:
    """Return a context that runs a coordinator in the test's folder; entered again, it is a restart."""

    @asynccontextmanager
    async def run(
        folder: Path = tmp_path / "coordinator", known: Identity | None = None, database_url: str = ""
    ) -> AsyncIterator[Federation]:
        await asyncio.to_thread(folder.mkdir, exist_ok=True)
        coordinator = Coordinator(folder, known or identity("coordinator", "main"), database_url)
        server, port = await start_server(coordinator, "127.0.0.1:0")
        federation = Federation(identity, coordinator, port)
        try:
            await coordinator.start()
            yield federation
        finally:
            await federation.stack.aclose()
            await server.stop(1.0)
            await coordinator.close()

    return run
