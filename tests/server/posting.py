"""Both ends of the relay, for tests: an agent that hosts an app, and the app's server side."""

import asyncio
from collections.abc import Sequence
from hashlib import sha256
from typing import Any, Self

from fedcore.messages import Blob
from fedcore.wire import grpc, relay
from fedcore.wire.codec import to_wire
from fedcore.wire.relay import Answer, AppLetter, HostHello, Letter, LetterRef
from fedcore.wire.sending import sending
from fedcore.wire.v1 import relay_pb2 as pb
from fedcore.wire.v1.coordinator_pb2 import RunInfo, RunName, TaskName
from fedcore.wire.v1.relay_pb2_grpc import PostStub, RelayStub
from tests.server.conftest import chunk_parts, each

APP, FILES = "fedcore/app", sha256(b"app").hexdigest()


def blob(content: bytes) -> Blob | None:
    return Blob(sha256(content).hexdigest(), len(content)) if content else None


class AppHost:
    """An agent that hosts an app and does what it is told to do."""

    def __init__(self, name: str, channel: grpc.aio.Channel, hello: HostHello | None = None) -> None:
        self.name, self.stub = name, RelayStub(channel)
        self.hello = hello or HostHello({APP: FILES})

    async def __aenter__(self) -> Self:
        self.call = self.stub.Attend()
        await self.call.write(to_wire(self.hello))
        return self

    async def __aexit__(self, *_: object) -> None:
        self.call.cancel()

    async def heard(self) -> Any:
        """Return what the coordinator says next, None when it has ended the stream."""
        message = await asyncio.wait_for(self.call.read(), 10)
        return relay.to_host(message) if isinstance(message, pb.ToHost) else None

    async def letter(self) -> Letter:
        letter = await self.heard()
        assert isinstance(letter, Letter), letter
        return letter

    async def take(self, ref: LetterRef, offset: int = 0) -> bytes:
        """Return the content of a letter."""
        parts = self.stub.Take(pb.Taking(letter=to_wire(ref), offset=offset), timeout=30)
        return b"".join([chunk.data async for chunk in parts])

    async def reply(self, ref: LetterRef, head: bytes = b"done", content: bytes = b"") -> None:
        """Answer a letter; raises grpc.aio.AioRpcError where that is refused."""
        await self.send(Answer(ref, head, blob(content)), content)

    async def send(self, answer: Answer, content: bytes) -> None:
        chunks = [pb.ReplyPart(chunk=part.chunk) for part in chunk_parts(content)]
        call = self.stub.Reply(timeout=30)
        async with sending(call, each([relay.reply_part(answer), *chunks])):
            assert relay.ref_from_wire(await call) == answer.ref


class Sender:
    """The server side of an app, with one run."""

    def __init__(self, channel: grpc.aio.Channel, run: str = "") -> None:
        self.stub, self.run = PostStub(channel), run

    async def open(self) -> Self:
        info: RunInfo = await self.stub.Open(pb.AppHeader(app=TaskName(name=APP, digest=FILES), name="job"))
        self.run = info.run
        return self

    async def hosts(self) -> list[str]:
        return list((await self.stub.Hosts(RunName(run=self.run), timeout=30)).clients)

    async def deposit(self, content: bytes, chunks: bytes | None = None) -> None:
        """Hand in a content; `chunks` are what is sent of it, all if left out."""
        found = blob(content)
        assert found
        header = pb.DepositPart(header=pb.DepositHeader(run=self.run, content=to_wire(found)))
        parts = chunk_parts(content if chunks is None else chunks)
        call = self.stub.Deposit(timeout=30)
        async with sending(call, each([header, *(pb.DepositPart(chunk=part.chunk) for part in parts)])):
            await call

    def letter(self, id: str, client: str, content: bytes = b"", ttl: float = 60.0) -> AppLetter:
        return AppLetter(LetterRef(self.run, id), client, f"head of {id}".encode(), blob(content), ttl)

    async def send(self, *letters: AppLetter) -> list[str]:
        """Send letters, unless contents are missing, which are returned."""
        parts = [to_wire(letter) for letter in letters]
        return list((await self.stub.Send(pb.LetterList(run=self.run, letters=parts), timeout=30)).contents)

    async def post(self, id: str, client: str, content: bytes = b"", ttl: float = 60.0) -> None:
        """Send one letter with its content."""
        if content:
            await self.deposit(content)
        await self.send(self.letter(id, client, content, ttl))

    def answers(self) -> Any:
        return self.stub.Answers(RunName(run=self.run))

    async def answered(self, count: int) -> list[Answer]:
        """Return the first answers of a new stream of them."""
        call = self.answers()
        found = [await asyncio.wait_for(call.read(), 10) for _ in range(count)]
        call.cancel()
        return [relay.answer_from_wire(message, self.run) for message in found]

    async def collect(self, ref: LetterRef, offset: int = 0) -> bytes:
        parts = self.stub.Collect(pb.Taking(letter=to_wire(ref), offset=offset), timeout=30)
        return b"".join([chunk.data async for chunk in parts])

    async def settle(self, ids: Sequence[str]) -> None:
        await self.stub.Settle(pb.LetterNames(run=self.run, ids=ids), timeout=30)

    async def close(self, state: str = "finished", detail: str = "") -> RunInfo:
        info: RunInfo = await self.stub.Close(pb.AppEnd(run=self.run, state=state, detail=detail))
        return info
