"""Hostile clients beside honest ones: whatever they send, the coordinator lives, refuses it, and goes on.

    python -m tests.tools.fuzz --minutes 5 --seed 0

An `Arena` is a live coordinator over mutual TLS. Honest clients have a run of their own; in each other run
one of the cohort is hostile, and what it sends begins as what the coordinator waits for. `attacks` draws what
hostile clients do: messages of any content in any order, updates that are altered here and there, bytes that
are no message, calls that break off.
"""

import argparse
import asyncio
import logging
import random
import resource
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import hypothesis
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck
from hypothesis import strategies as st

from fedcore.crypto.identity import Identity
from fedcore.crypto.names import Name, Role
from fedcore.messages import Assignment, Secure
from fedcore.server.authority import Authority
from fedcore.server.coordinator import Coordinator
from fedcore.server.serve import start_server
from fedcore.spec import RunSpec
from fedcore.wire import grpc
from fedcore.wire.chunks import CHUNK
from fedcore.wire.codec import to_wire
from fedcore.wire.sending import sending
from fedcore.wire.v1 import coordinator_pb2 as pb
from tests.server.conftest import (
    LAYOUT,
    Agent,
    Federation,
    each,
    honest,
    reference,
    same,
    silent,
    spec_of,
    until,
    upload_parts,
)
from tests.server.devices import Masking, Sealing, hidden_parts

CODE = grpc.StatusCode
REFUSED = {
    CODE.OK,
    CODE.CANCELLED,
    CODE.INVALID_ARGUMENT,
    CODE.FAILED_PRECONDITION,
    CODE.RESOURCE_EXHAUSTED,
    CODE.ABORTED,
    CODE.PERMISSION_DENIED,
    CODE.UNIMPLEMENTED,
}
METHODS: dict[str, type[Message]] = {
    "Coordinator/Connect": pb.FromAgent,
    "Coordinator/Upload": pb.UploadPart,
    "Coordinator/Standing": pb.UploadHeader,
    "Coordinator/Download": pb.Wanted,
    "Operator/Submit": pb.SubmitPart,
    "Operator/Lift": pb.ClientName,
}
STREAMS = ("Coordinator/Connect", "Coordinator/Upload", "Operator/Submit")
HERE = "@"  # in a Ref or a Blob: that of the work which the hostile client has
SECAGG = {"updates": "secagg", "corrupt": 0.0, "lost": 0.2}

# --- what is sent

Texts = st.sampled_from([HERE, HERE, HERE, "", "x", "delta", "weight", "\0", "ö" * 600, "0" * 64]) | st.text(
    max_size=8
)
Numbers = st.sampled_from([0, 1, 1, 2, 3, 44, 188, 2**31 - 1, 2**32 - 1])
Large = Numbers | st.sampled_from([2**53, 2**63, 2**64 - 1])
Doubles = st.floats() | st.sampled_from([0.0, 1.0, -1.0])
Contents = st.binary(max_size=40) | st.sampled_from([bytes(188), bytes(4096), bytes(CHUNK + 1)])
SCALARS: dict[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.CPPTYPE_STRING: Texts,
    FieldDescriptor.CPPTYPE_UINT32: Numbers,
    FieldDescriptor.CPPTYPE_UINT64: Large,
    FieldDescriptor.CPPTYPE_DOUBLE: Doubles,
    FieldDescriptor.CPPTYPE_BOOL: st.booleans(),
    FieldDescriptor.CPPTYPE_ENUM: st.sampled_from([0, 1, 1, 1, 2, 3, 4, 77]),
}
MANY = 300  # entries of a list or a map, more than any message may have


@st.composite
def messages(draw: st.DrawFn, kind: Any) -> Any:
    """Draw a message of a type, with any of its fields."""
    message = GetMessageClass(kind)()
    for each_field in kind.fields:
        if not draw(st.booleans()) and not each_field.containing_oneof:
            continue
        if each_field.containing_oneof and draw(st.integers(0, len(kind.fields) - 1)):
            continue
        put(draw, message, each_field)
    return message


def put(draw: st.DrawFn, message: Any, of: FieldDescriptor) -> None:
    """Draw a field's value."""
    inner, place = of.message_type, getattr(message, of.name)
    if inner and inner.GetOptions().map_entry:
        many = draw(st.sampled_from([0, 1, 2, 2, MANY]))
        value = draw(value_of(inner.fields_by_name["value"]))
        place.update({draw(Texts) if many < MANY else str(i): value for i in range(many)})
    elif of.is_repeated:
        many = draw(st.sampled_from([0, 1, 2, 2, MANY]))
        drawn = [draw(value_of(of)) for _ in range(min(many, 2))]
        place.extend(drawn * (many // 2) if many > 2 else drawn)
    elif inner:
        place.CopyFrom(draw(messages(inner)))
    else:
        setattr(message, of.name, draw(value_of(of)))


def value_of(of: FieldDescriptor) -> st.SearchStrategy[Any]:
    """Return what draws one value of a field."""
    if of.message_type:
        return messages(of.message_type)
    return Contents if of.type == FieldDescriptor.TYPE_BYTES else SCALARS[of.cpp_type]


@dataclass(frozen=True)
class Call:
    """A call of any method with any messages; each is cut after so many bytes, or one bit of it is turned.

    work: of which run's hostile client. breaks: it is given up while it is under way.
    """

    method: str
    work: str
    messages: tuple[Any, ...]
    cut: int | None
    flip: int | None
    breaks: bool


@dataclass(frozen=True)
class Altered:
    """The update that the coordinator waits for, after some changes: (what, where, by how much)."""

    work: str
    changes: tuple[tuple[str, int, float], ...]
    breaks: bool
    streams: bool  # it goes on the stream, if so much is left of it


@dataclass(frozen=True)
class Said:
    """Messages on the stream that a hostile client has open."""

    work: str
    messages: tuple[Any, ...]


Attack = Call | Altered | Said
RUNS = ("tls", "sealed", "secagg")
CHANGES = ("drop", "swap", "again", "flip", "short", "scalar", "size", "offset", "round", "length", "number")


@st.composite
def calls(draw: st.DrawFn) -> Call:
    """Draw a call; gRPC waits for ever for the one request of a call that takes one."""
    method = draw(st.sampled_from([*METHODS, *STREAMS]))
    sent = draw(st.lists(messages(METHODS[method].DESCRIPTOR), min_size=method not in STREAMS, max_size=4))
    cut, flip = draw(st.none() | st.integers(0, 60)), draw(st.none() | st.integers(0, 2000))
    return Call(method, draw(st.sampled_from(RUNS)), tuple(sent), cut, flip, draw(st.booleans()))


changes = st.tuples(st.sampled_from(CHANGES), st.integers(0, 400), Doubles)
altered = st.builds(
    Altered,
    st.sampled_from(RUNS),
    st.lists(changes, max_size=3).map(tuple),
    st.sampled_from([False] * 4 + [True]),
    st.booleans(),
)
said = st.builds(
    Said, st.sampled_from(RUNS), st.lists(messages(pb.FromAgent.DESCRIPTOR), max_size=4).map(tuple)
)
attacks = st.lists(calls() | altered | said, max_size=4)


def changed(parts: list[pb.UploadPart], what: str, where: int, much: float) -> list[pb.UploadPart]:
    """Return the parts of an upload after one change."""
    parts = [pb.UploadPart.FromString(part.SerializeToString()) for part in parts]
    if not parts:
        return parts
    place, head = where % len(parts), parts[0].header
    match what:
        case "drop":
            del parts[place]
        case "swap":
            parts.insert(0, parts.pop(place))
        case "again":
            parts.insert(place, parts[place])
        case "flip" | "short" | "number" if parts[-1].HasField("chunk"):
            content = bytearray(parts[-1].chunk.data)
            if what == "flip" and content:
                content[where % len(content)] ^= 1
            parts[-1].chunk.data = bytes(
                content[: where % (len(content) + 1)] if what == "short" else content
            )
            if what == "number":
                parts[-1].chunk.index = where
        case "scalar":
            head.scalars[sorted(head.scalars)[where % len(head.scalars)] if head.scalars else "x"] = much
        case "size":
            head.payload.size = where
        case "offset":
            head.offset = where
        case "round":
            head.ref.round = where % 5
        case "length" if head.vectors:
            head.vectors[where % len(head.vectors)].length = where
    return parts


def aimed(message: Any, work: Assignment | None, update: pb.UploadHeader) -> Any:
    """Return a message whose Refs and Blobs are those of the work, where they say so."""
    for kind, value in message.ListFields():
        inner = kind.message_type
        if inner is pb.Ref.DESCRIPTOR and not kind.is_repeated and value.run == HERE and work:
            value.CopyFrom(to_wire(work.ref))
        elif inner is pb.Blob.DESCRIPTOR and value.sha256 == HERE and work:
            up = message.DESCRIPTOR is pb.UploadHeader.DESCRIPTOR
            value.CopyFrom(update.payload if up else to_wire(work.parameters))
        elif inner and not kind.is_repeated:
            aimed(value, work, update)
    return message


# --- where it is sent


@dataclass
class Crooked(Masking):
    """A device whose messages of secure aggregation are wrong now and then."""

    chance: random.Random = field(default_factory=random.Random)

    async def crook(self, agent: Agent, said: Secure) -> None:
        """Answer, or answer with something else."""
        say, chance = agent.say, self.chance.random()

        async def other(ref: Any, message: bytes) -> None:
            content = bytearray(message)
            if chance < 0.2 and content:
                content[self.chance.randrange(len(content))] ^= 1 << self.chance.randrange(8)
            elif chance < 0.3:
                content = content[: self.chance.randrange(len(content) + 1)]
            elif chance < 0.35:
                await say(ref, message)
            await say(ref, bytes(content))

        agent.say = other  # type: ignore[method-assign]  # for this answer
        try:
            await self.heed(agent, said)
        finally:
            agent.say = say  # type: ignore[method-assign]


class Errors(logging.Handler):
    """What is logged as an error, by anybody in this process."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line, with its traceback."""
        self.lines.append(logging.Formatter("%(name)s %(message)s").format(record))


class Arena:
    """A coordinator, an honest run, and three runs in which one client of the cohort is hostile."""

    def __init__(self, folder: Path, rounds: int, seed: int = 0) -> None:
        self.folder, self.seed, self.stack = folder, seed, AsyncExitStack()
        self.spec = spec_of(rounds=rounds, deadline=60.0, evaluation={"every": 10})
        self.errors, self.codes = Errors(), Counter[str]()
        self.hostile: dict[str, Agent] = {}
        self.channels: dict[str, grpc.aio.Channel] = {}

    async def __aenter__(self) -> Self:
        logging.getLogger().addHandler(self.errors)
        authority = Authority.create(self.folder / "authority", "fed", "127.0.0.1:8700")
        made: dict[tuple[Role, str], Identity] = {}

        def identity(role: Role, name: str) -> Identity:
            key = (role, name)
            return made.get(key) or made.setdefault(key, authority.new_identity(Name("fed", role, name)))

        (self.folder / "coordinator").mkdir()
        self.coordinator = Coordinator(self.folder / "coordinator", identity("coordinator", "main"))
        self.server, port = await start_server(self.coordinator, "127.0.0.1:0")
        self.federation = Federation(identity, self.coordinator, port)
        await self.coordinator.start()
        await self.federation.agents(3)
        self.run = await self.federation.submit(self.spec)
        await self.begin("tls", 1, honest)
        await self.begin("sealed", 1, Sealing(identity("client", "sealed-0")).work)
        await self.begin("secagg", 4, None)
        return self

    async def begin(self, encryption: str, friends: int, work: Any) -> None:
        """Start a run of honest clients and a hostile one."""
        updates = SECAGG if encryption == "secagg" else {"updates": encryption}
        size = friends + 1
        spec: RunSpec = spec_of(
            rounds=10**6,
            deadline=5.0,
            cohort={"size": size, "minimum": friends},
            encryption=updates,
            evaluation={"every": 0},
        )
        for i in range(friends):
            name = f"{encryption}-{i}"
            device = Masking(self.federation.identity("client", name))
            await self.federation.agent(name, work or device.work, tasks=(encryption,), heed=device.heed)
        await self.connect(encryption)
        await self.federation.submit(spec, task=encryption)

    async def connect(self, encryption: str) -> Agent:
        """Return the hostile agent of a run, connected (again)."""
        agent = self.hostile.get(encryption)
        if agent is None or agent.reader.done():
            name = f"evil-{encryption}"
            device = Crooked(self.federation.identity("client", name), chance=random.Random(self.seed))
            masked = encryption == "secagg"
            agent = self.hostile[encryption] = await self.federation.agent(
                name, device.work if masked else silent, tasks=(encryption,), heed=device.crook
            )
        return agent

    async def attack(self, actions: list[Attack]) -> None:
        """Do what hostile clients do, and see that the coordinator is there for others."""
        for encryption in RUNS:  # or there would soon be nobody to be attacked by
            self.coordinator.admission.lift(f"evil-{encryption}")
            self.coordinator.admission.buckets.clear()
        for action in actions:
            agent = await self.connect(action.work)
            work = await self.work(agent)
            match action:
                case Said():
                    with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # it was ended
                        for message in action.messages:
                            await agent.call.write(aimed(message, work, pb.UploadHeader()))
                case Altered() if work:
                    parts = await self.update(agent, action.work, work)
                    for change in action.changes:
                        parts = changed(parts, *change)
                    if action.streams and parts:
                        content = b"".join(part.chunk.data for part in parts)
                        update = pb.SmallUpdate(header=parts[0].header, payload=content)
                        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                            await agent.call.write(pb.FromAgent(update=update))
                        continue
                    sent = [part.SerializeToString() for part in parts]
                    await self.call(action.work, "Coordinator/Upload", sent, action.breaks)
                case Call():
                    head = pb.UploadHeader()
                    if work and action.work != "secagg":
                        for part in (await self.update(agent, action.work, work))[:1]:
                            head = part.header
                    sent = [aimed(m, work, head).SerializeToString() for m in action.messages]
                    sent = [bent(content, action.cut, action.flip) for content in sent]
                    await self.call(action.work, action.method, sent, action.breaks)
        errors, self.errors.lines = self.errors.lines, []
        assert not errors, errors[0]
        driver = self.coordinator.drivers[self.run]
        assert driver.run.state in ("running", "finished"), driver.run.detail

    async def work(self, agent: Agent) -> Assignment | None:
        """Return what a hostile agent is waited for, if it has not spoilt that."""
        for _ in range(20):
            live = [work for work in agent.assignments[-1:] if work.ref in self.coordinator.live]
            if live:
                return live[0]
            await asyncio.sleep(0.001)
        return None

    async def update(self, agent: Agent, encryption: str, work: Assignment) -> list[pb.UploadPart]:
        """Return the update that would be right."""
        try:
            update = await agent.update(work)
            if encryption == "sealed":
                device = Sealing(self.federation.identity("client", agent.name))
                return hidden_parts(work.ref, device.sealed(agent, work, update))
        except grpc.aio.AioRpcError:  # it was quarantined meanwhile, or its round is over
            return []
        return upload_parts(work.ref, update)

    async def call(self, work: str, method: str, sent: list[bytes], breaks: bool) -> None:
        """Send bytes to a method; whatever it takes, it answers in time and with a status that says why."""
        channel: Any = await self.channel(work)  # whose stubs know no call of mere bytes
        call = channel.stream_stream(f"/fedcore.wire.v1.{method}")(timeout=20)
        try:
            async with sending(call, each(sent)):
                if breaks:
                    await asyncio.sleep(0.002)
                else:
                    async for _ in call:
                        pass
        except grpc.aio.AioRpcError:
            pass
        code = CODE.CANCELLED if breaks else await call.code()
        self.codes[f"{method} {code.name}"] += 1
        assert code in REFUSED, f"{method} {code}: {await call.details()}"

    async def channel(self, work: str) -> grpc.aio.Channel:
        """Return the one channel of a hostile client, besides its stream's."""
        if work not in self.channels:
            self.channels[work] = await self.federation.channel("client", f"evil-{work}")
        return self.channels[work]

    async def __aexit__(self, *_: object) -> None:
        await self.federation.stack.aclose()
        await self.server.stop(1.0)
        await self.coordinator.close()
        logging.getLogger().removeHandler(self.errors)

    async def end(self) -> None:
        """See that the honest run has the bits of one without hostile clients beside it."""
        info = await self.federation.ended(self.run)
        assert info.state == "finished", info.detail
        state, _ = reference(self.spec, LAYOUT, ["client-0", "client-1", "client-2"])
        assert same(self.federation.parameters(self.run).shared, state.parameters.shared)
        registry, admission = self.coordinator.registry, self.coordinator.admission
        honest = {client for client in registry.sessions if not client.startswith("evil")}
        assert not honest & admission.conduct.keys(), admission.conduct
        await until(lambda: all(admission.calls[client] <= 1 for client in registry.sessions))
        assert not self.errors.lines, self.errors.lines[0]


def bent(content: bytes, cut: int | None, flip: int | None) -> bytes:
    """Return bytes that are cut off, or have a bit turned."""
    changed = bytearray(content[:cut])
    if flip is not None and changed:
        changed[flip % len(changed)] ^= 1 << flip % 8
    return bytes(changed)


def fuzz(
    folder: Path, examples: int, seed: int, rounds: int, done: Callable[[], bool] = lambda: False
) -> Arena:
    """Attack a coordinator so many times; raises AssertionError with the smallest attack that harms it."""
    with asyncio.Runner() as runner:
        arena = Arena(folder, rounds, seed)
        runner.run(arena.__aenter__())

        @hypothesis.seed(seed)
        @hypothesis.settings(
            max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck)
        )
        @hypothesis.given(attacks)
        def play(actions: list[Attack]) -> None:
            if not done():
                runner.run(arena.attack(actions))

        try:
            play()
            runner.run(arena.end())
        finally:
            runner.run(arena.__aexit__())
    return arena


def main() -> None:
    """Attack coordinators, each with another seed, for some minutes; print what became of it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.getLogger("fedcore").setLevel(logging.ERROR)
    seed, codes, ends = arguments.seed, Counter[str](), time.monotonic() + 60 * arguments.minutes
    while time.monotonic() < ends:
        with tempfile.TemporaryDirectory() as folder:
            codes += fuzz(Path(folder), 500, seed, 100, lambda: time.monotonic() > ends).codes
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        print(f"seed {seed}: {codes.total()} calls, peak {peak} MB")  # noqa: T201 - a script
        seed += 1
    for code, count in sorted(codes.items()):
        print(f"{count:8}  {code}")  # noqa: T201 - a script


if __name__ == "__main__":
    main()
