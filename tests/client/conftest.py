"""An agent's surroundings: a coordinator over mutual TLS that does as it is told, and a task in NumPy."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w

from fedcore.client.agent import Agent
from fedcore.client.config import Config
from fedcore.client.state import State
from fedcore.crypto.identity import Identity
from fedcore.crypto.names import Name
from fedcore.crypto.tls import Context, require, server_credentials
from fedcore.layout import Entry, Layout
from fedcore.messages import (
    Accept,
    Assignment,
    Blob,
    Decline,
    Hello,
    Outcome,
    Pause,
    Receipt,
    Ref,
    Secure,
    SmallUpdate,
    UploadHead,
    Verdict,
)
from fedcore.server.authority import Authority
from fedcore.spec import RunSpec
from fedcore.wire import codec, grpc
from fedcore.wire.codec import to_wire
from fedcore.wire.relay import HostHello, Letter, LetterRef, Over, Void, from_host, reply_head, taking
from fedcore.wire.v1 import coordinator_pb2 as pb
from fedcore.wire.v1 import relay_pb2
from fedcore.wire.v1.coordinator_pb2_grpc import CoordinatorServicer, add_CoordinatorServicer_to_server
from fedcore.wire.v1.relay_pb2_grpc import RelayServicer, add_RelayServicer_to_server

LAYOUT = Layout((Entry("w", (4,), "float32", "shared"),))

MOODY = '''
"""A task that does what the round's number says."""

import os
import sys
import time
from pathlib import Path

import numpy as np

from fedcore.data import ArrayDataset, Split
from fedcore.layout import Entry, Layout, Parameters
from fedcore.messages import Update
from fedcore.task import Task


def hold(megabytes):
    with Path("holders.txt").open("a") as log:
        log.write(f"{os.getpid()} ")
    hold.held = [b"1" * 2**20 for _ in range(megabytes)]


class Moody(Task):
    def trainer(self, spec):
        return Trainer()

    def data(self, client):
        with Path("loaded.txt").open("a") as log:
            log.write(client.name + " ")
        many = client.options.get("examples", 3)
        return Split(ArrayDataset(np.zeros((many, 1)), np.arange(many)), None)

    def holdout(self):
        return ArrayDataset(np.zeros((7, 1)), np.zeros(7, np.int64))

    def root(self):
        return ArrayDataset(np.zeros((2, 1)), np.zeros(2, np.int64))


class Trainer:
    layout = Layout((Entry("w", (4,), "float32", "shared"),))

    def parameters(self):
        return Parameters(np.zeros(4, np.float32), np.zeros(0, np.float32))

    def receive(self, parameters):
        self.received = parameters.shared

    def train(self, ref, client, examples, kept):
        total = kept.get("rounds", np.zeros(1)) + ref.round  # of the rounds that were folded, and this one
        with Path("trained.txt").open("a") as log:
            log.write(f"{ref.round}.{ref.attempt} ")
        with Path("kept.txt").open("a") as log:
            log.write(f"{ref}:{total[0]:.0f} ")
        print("a task may print", flush=True)
        os.write(1, b"and its libraries too\\n")
        if ref.round == 101:
            os._exit(3)
        if ref.round == 102:
            raise ValueError("patient 4711 is odd")
        if ref.round == 103:
            time.sleep(60)
        if ref.round == 104:
            os.kill(os.getpid(), 9)
        if ref.round == 105:
            raise ValueError("torch is here") if "torch" in sys.modules else ValueError("no torch here")
        if ref.round == 107:
            hold(2000)
        if ref.round == 108:
            for _ in range(4):
                if not os.fork():
                    hold(60)
                    time.sleep(60)
            time.sleep(60)
        count = float(len(examples))
        delta = self.received + ref.round if ref.round < 106 else self.received * np.nan
        scalars = {"weight": count, "loss": 2 * count, "count": count}
        return Update({"delta": delta}, scalars), {"rounds": total}

    def evaluate(self, examples, kept):
        with Path("kept.txt").open("a") as log:
            log.write(f"evaluate:{kept['rounds'][0] if kept else 0:.0f} ")
        count = float(len(examples))
        return Update({}, {"loss": 2 * count, "accuracy": count, "count": count})
'''


@dataclass(eq=False)
class FakeCoordinator(CoordinatorServicer):
    """Hands out what a test pushes, and keeps what an agent sends."""

    blobs: dict[str, bytes] = field(default_factory=dict)
    fetched: list[str] = field(default_factory=list)
    hellos: "asyncio.Queue[Hello]" = field(default_factory=asyncio.Queue)
    declines: "asyncio.Queue[Decline]" = field(default_factory=asyncio.Queue)
    accepts: "asyncio.Queue[Accept]" = field(default_factory=asyncio.Queue)
    secures: "asyncio.Queue[Secure]" = field(default_factory=asyncio.Queue)
    uploads: "asyncio.Queue[tuple[UploadHead, bytes]]" = field(default_factory=asyncio.Queue)
    outbox: "asyncio.Queue[pb.ToAgent | None]" = field(default_factory=asyncio.Queue)
    refusal: tuple[grpc.StatusCode, str] | None = None  # of the next calls, until it is taken away
    permits: "asyncio.Event" = field(default_factory=asyncio.Event)  # uploads wait for it
    arrived: dict[Ref, bytes] = field(default_factory=dict)  # of updates, be they complete or not
    asked: list[Ref] = field(default_factory=list)  # for the standing of updates
    streamed: list[Ref] = field(default_factory=list)  # updates that came on the stream
    keeping: set[asyncio.Task[None]] = field(default_factory=set)  # they wait for their receipts
    cuts: list[int | None] = field(default_factory=list)  # bytes after which the next transfers break

    def __post_init__(self) -> None:
        self.permits.set()

    async def Connect(
        self, requests: AsyncIterator[pb.FromAgent], context: Context
    ) -> AsyncIterator[pb.ToAgent]:
        await require(context, "client")
        if self.refusal:
            await context.abort(*self.refusal)
        hello = codec.from_agent(await anext(requests))
        assert isinstance(hello, Hello)
        self.hang_up()  # as the registry ends the older of two streams
        outbox = self.outbox = asyncio.Queue[pb.ToAgent | None]()
        yield pb.ToAgent(welcome=pb.Welcome(coordinator="fake"))
        listener = asyncio.create_task(self.listen(requests))
        listener.add_done_callback(lambda _: outbox.put_nowait(None))
        self.hellos.put_nowait(hello)
        while (message := await outbox.get()) is not None:
            yield message
        listener.cancel()

    async def listen(self, requests: AsyncIterator[pb.FromAgent]) -> None:
        async for request in requests:
            match codec.from_agent(request):
                case Decline() as decline:
                    self.declines.put_nowait(decline)
                case Accept() as accept:
                    self.accepts.put_nowait(accept)
                case Secure() as secure:
                    self.secures.put_nowait(secure)
                case SmallUpdate(head, payload):
                    keeping = asyncio.create_task(self.keep(head, payload))
                    self.keeping.add(keeping)
                    keeping.add_done_callback(self.keeping.discard)

    async def keep(self, head: UploadHead, payload: bytes) -> None:
        """Take an update from the stream."""
        cut = self.cuts.pop(0) if self.cuts else None
        failure = self.refusal or (None if cut is None else (grpc.StatusCode.UNAVAILABLE, "cut"))
        self.streamed.append(head.ref)
        if not self.refusal:
            self.arrived[head.ref] = payload[:cut]
        if failure is None:
            self.uploads.put_nowait((head, payload))
            await self.permits.wait()
        code, reason = failure or (grpc.StatusCode.OK, "")
        self.push(Receipt(head.ref, code.value[0], reason))

    async def Download(self, request: pb.Wanted, context: Context) -> AsyncIterator[pb.Chunk]:
        self.fetched.append(request.blob.sha256)
        if self.refusal:
            await context.abort(*self.refusal)
        cut = self.cuts.pop(0) if self.cuts else None
        data = self.blobs[request.blob.sha256][request.offset : cut]
        for index, start in enumerate(range(0, len(data), 2**20)):
            yield pb.Chunk(index=index, data=data[start : start + 2**20])
        if cut is not None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "cut")

    async def Upload(self, parts: AsyncIterator[pb.UploadPart], context: Context) -> pb.Receipt:
        if self.refusal:
            await context.abort(*self.refusal)
        head = codec.upload_head(await anext(parts))
        cut = self.cuts.pop(0) if self.cuts else None
        data = self.arrived.get(head.ref, b"")[: head.offset]
        async for part in parts:
            data += part.chunk.data
            self.arrived[head.ref] = data[:cut]
            if cut is not None:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "cut")
        self.uploads.put_nowait((head, data))
        await self.permits.wait()
        return pb.Receipt(ref=to_wire(head.ref))

    async def Standing(self, request: pb.UploadHeader, context: Context) -> pb.Progress:
        if self.refusal:
            await context.abort(*self.refusal)
        head = codec.head_from_wire(request)
        self.asked.append(head.ref)
        data = self.arrived.get(head.ref, b"")
        return pb.Progress(bytes=len(data), received=sha256(data).hexdigest() == head.payload.sha256)

    def push(self, message: Assignment | Outcome | Pause | Receipt | Secure) -> None:
        wire = to_wire(message)
        self.outbox.put_nowait(pb.ToAgent(secure=wire) if isinstance(message, Secure) else wire)

    def hang_up(self) -> None:
        self.outbox.put_nowait(None)

    def blob(self, data: bytes) -> Blob:
        address = sha256(data).hexdigest()
        self.blobs[address] = data
        return Blob(address, len(data))

    def assignment(self, round: int, digest: str, **changes: Any) -> Assignment:
        """Return the work of a round of Moody, whose parameters are the round's number."""
        fields: dict[str, Any] = {
            "ref": Ref("run", round, changes.pop("attempt", 0), changes.pop("kind", "train")),
            "task": "Moody",
            "digest": digest,
            "spec": RunSpec(),
            "layout": LAYOUT.digest,
            "parameters": self.blob(np.full(4, round, "<f4").tobytes()),
            "cohort": 2,
            "deadline": 30.0,
        }
        work = Assignment(**{**fields, **changes})
        open_ = work.spec.encryption.updates == "auto"  # which an operator's command would have resolved
        return replace(work, spec=work.spec.with_("encryption.updates=tls")) if open_ else work

    def outcome(self, ref: Ref, status: Any = "folded", reason: str = "") -> None:
        self.push(Outcome(ref, Verdict(status, reason)))


@dataclass(eq=False)
class Relay(RelayServicer):
    """Keeps letters until they are answered, and pushes them all to whoever attends."""

    contents: dict[str, bytes] = field(default_factory=dict)
    waiting: dict[str, Letter] = field(default_factory=dict)
    over: set[str] = field(default_factory=set)
    hellos: "asyncio.Queue[HostHello]" = field(default_factory=asyncio.Queue)
    answers: "asyncio.Queue[tuple[str, bytes, bytes]]" = field(default_factory=asyncio.Queue)
    outbox: "asyncio.Queue[relay_pb2.ToHost | None]" = field(default_factory=asyncio.Queue)
    taken: list[tuple[str, int]] = field(default_factory=list)
    lose: int = 0  # so many receipts of answers get lost
    cut: int = 0  # so many contents break off after a byte

    async def Attend(
        self, requests: AsyncIterator[relay_pb2.FromHost], context: Context
    ) -> AsyncIterator[relay_pb2.ToHost]:
        name = await require(context, "client")
        assert name.name == "client-000000"
        hello = from_host(await anext(requests))
        outbox = self.outbox = asyncio.Queue[relay_pb2.ToHost | None]()
        self.hellos.put_nowait(hello)
        for run in set(hello.runs) & self.over:
            yield to_wire(Over(run))
        for letter in list(self.waiting.values()):  # which are answered meanwhile
            yield to_wire(letter)
        while (message := await outbox.get()) is not None:
            yield message

    async def Take(self, request: relay_pb2.Taking, context: Context) -> AsyncIterator[pb.Chunk]:
        ref, offset = taking(request)
        self.taken.append((ref.id, offset))
        if ref.id not in self.waiting:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "nobody waits for it")
        data = self.contents[ref.id][offset:]
        if self.cut:
            self.cut -= 1
            yield pb.Chunk(index=0, data=data[:1])
            await context.abort(grpc.StatusCode.UNAVAILABLE, "cut")
        yield pb.Chunk(index=0, data=data)

    async def Reply(
        self, parts: AsyncIterator[relay_pb2.ReplyPart], context: Context
    ) -> relay_pb2.LetterName:
        answer = reply_head(await anext(parts))
        content = b"".join([part.chunk.data async for part in parts])
        if answer.ref.id not in self.waiting:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "nobody waits for it")
        assert answer.content is None or sha256(content).hexdigest() == answer.content.sha256
        self.answers.put_nowait((answer.ref.id, answer.head, content))
        if self.lose:
            self.lose -= 1
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the receipt is lost")
        del self.waiting[answer.ref.id]
        return relay_pb2.LetterName(run=answer.ref.run, id=answer.ref.id)

    def send(self, id: str, content: bytes = b"", run: str = "run", **changes: Any) -> None:
        """Push a letter with this content, and whatever fields the changes say."""
        self.contents[id] = content
        blob = Blob(sha256(content).hexdigest(), len(content)) if content else None
        letter = Letter(LetterRef(run, id), "fedcore/echo", "d" * 64, f"head of {id}".encode(), blob, 60.0)
        self.waiting[id] = Letter(**{**vars(letter), **changes})
        self.outbox.put_nowait(to_wire(self.waiting[id]))

    def push(self, message: Over | Void) -> None:
        self.outbox.put_nowait(to_wire(message))


@dataclass
class Federation:
    """An authority, a coordinator's address, and folders of agents."""

    folder: Path
    authority: Authority
    address: str = ""
    layout: Layout = LAYOUT
    last: Agent | None = None  # that was started

    def identity(self, role: Any, name: str) -> Identity:
        return self.authority.new_identity(Name("fed", role, name))

    @asynccontextmanager
    async def coordinator(
        self, port: int = 0, role: str = "coordinator", relay: RelayServicer | None = None
    ) -> AsyncIterator[FakeCoordinator]:
        fake, server = FakeCoordinator(), grpc.aio.server()
        add_CoordinatorServicer_to_server(fake, server)
        if relay:
            add_RelayServicer_to_server(relay, server)
        identity = self.identity(role, "main")
        credentials = server_credentials(lambda: identity)
        port = server.add_secure_port(f"127.0.0.1:{port}", credentials)
        self.address = f"127.0.0.1:{port}"
        await server.start()
        try:
            yield fake
        finally:
            await server.stop(0)

    def agent_folder(self, **settings: Any) -> Path:
        """Make the folder of an enrolled agent that allows Moody."""
        folder = self.folder / "agent"
        folder.mkdir(exist_ok=True)
        table = {"coordinator": self.address, "tasks": {"Moody": "moody:Moody"}, **settings}
        (folder / "agent.toml").write_text(tomli_w.dumps(table))
        (folder / "moody.py").write_text(MOODY)
        identity = folder / "state" / "identity"
        if not identity.exists():
            self.identity("client", "client-000000").save(identity)
        return folder

    @asynccontextmanager
    async def agent(self, **settings: Any) -> AsyncIterator["asyncio.Task[None]"]:
        """Run an agent in this process, its worker beside it; a failure of the agent ends the test."""
        config = Config.load(self.agent_folder(**settings))
        state = State(config.state)
        with state.locked():
            self.last = Agent(config, Identity.load(state.identity))
            task = asyncio.create_task(self.last.run())
            try:
                yield task
            finally:
                task.cancel()
                await asyncio.wait([task])

    def lines(self, file: str) -> list[str]:
        """Return the words that Moody wrote into a file of the agent's folder."""
        path = self.folder / "agent" / file
        return path.read_text().split() if path.exists() else []

    def journal(self) -> list[tuple[str, str]]:
        path = self.folder / "agent" / "state" / "rounds.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(row["ref"], row["event"]) for row in map(json.loads, lines)]

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for what no message announces."""
        async with asyncio.timeout(60):
            while not condition():  # noqa: ASYNC110 - a file that another process writes
                await asyncio.sleep(0.01)


@pytest.fixture
def federation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Federation]:
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield Federation(tmp_path, Authority.create(tmp_path / "authority", "fed", "127.0.0.1:8700"))
    sys.modules.pop("moody", None)  # of this folder


@pytest.fixture
def relay() -> Relay:
    """Return the relay of a coordinator; it is there once `Federation.coordinator` is given it."""
    return Relay()
