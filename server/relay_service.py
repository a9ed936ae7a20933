"""What agents that host apps call, and what an app's server side, an operator's process, calls."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

from fedcore.crypto.tls import Context, require
from fedcore.errors import Interrupted, ProtocolError, UpdateRefused
from fedcore.messages import Blob
from fedcore.server.admission import STREAM
from fedcore.server.coordinator import Coordinator
from fedcore.server.letters import Posted
from fedcore.server.operator import describe_app
from fedcore.server.queues import Host
from fedcore.server.relay import Book, deposit, other, unawaited
from fedcore.server.service import AgentService, first_of, received, refusing, stream_file
from fedcore.server.uploads import alone
from fedcore.wire import grpc, relay
from fedcore.wire.codec import to_wire
from fedcore.wire.relay import Answer, LetterRef
from fedcore.wire.v1 import relay_pb2 as pb
from fedcore.wire.v1.coordinator_pb2 import Blob as BlobName
from fedcore.wire.v1.coordinator_pb2 import RunInfo, RunName
from fedcore.wire.v1.relay_pb2_grpc import PostServicer, RelayServicer


class RelayService(RelayServicer):
    """The relay, as agents see it. A letter is for whom it is addressed to, as certificates name them."""

    def __init__(self, agents: AgentService) -> None:
        """Serve beside what agents call for runs of tasks; their calls here are counted there."""
        self.agents, self.coordinator = agents, agents.coordinator
        self.taken = dict[str, asyncio.Timeout]()  # a content that comes from a client

    async def Attend(
        self, requests: AsyncIterator[pb.FromHost], context: Context
    ) -> AsyncIterator[pb.ToHost]:
        """Hold the stream of an agent that hosts apps, and push its letters."""
        async with self.agents.admitted(context, STREAM) as client:
            host = Host(client, relay.from_host(await first_of(requests)))
            self.coordinator.admission.check(client)
            self.coordinator.relay.attend(host)
            try:
                while (message := await host.outbox.get()) is not None:
                    yield to_wire(message)
            finally:
                self.coordinator.relay.leave(host)

    async def Take(self, request: pb.Taking, context: Context) -> AsyncIterator[bytes]:
        """Stream the content of a letter to the caller."""
        async with self.agents.admitted(context) as client:
            ref, offset = relay.taking(request)
            book, letter = await self._addressed(context, client, ref)
            if letter.state == "answered":
                raise unawaited(ref)
            size = letter.content.size if letter.content else 0
            async for chunk in content_of(book, ref, letter.content, offset):
                self.coordinator.admission.transfer(client, letter, len(chunk), size)
                yield chunk

    async def Reply(self, parts: AsyncIterator[pb.ReplyPart], context: Context) -> pb.LetterName:
        """Take the answer to a letter to the caller: acknowledged once it is on disk, and then again."""
        async with self.agents.admitted(context) as client:
            first = await anext(parts, None)
            if first is None:  # whoever began it has gone
                raise Interrupted("a reply begins with its header")
            answer = relay.reply_head(first)
            book, letter = await self._addressed(context, client, answer.ref)
            if letter.state == "waiting":
                await self._take(client, book, letter, answer, parts)
            elif letter.answer != answer:
                raise other(answer.ref)
        return pb.LetterName(run=answer.ref.run, id=answer.ref.id)

    async def _addressed(self, context: Context, client: str, ref: LetterRef) -> tuple[Book, Posted]:
        """Return a letter to a client that is not settled; ends the call of anybody else."""
        self.coordinator.admission.check(client)
        book, letter = self.coordinator.relay.letter(ref)
        if letter.client != client:
            problem = f"{ref} is not for {client}"
            self.coordinator.refuse(client, problem, offence=False)
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, problem)
        return book, letter

    async def _take(
        self, client: str, book: Book, letter: Posted, answer: Answer, parts: AsyncIterator[Any]
    ) -> None:
        """Take in an answer that is waited for; raises where it is wrong, too late or cut."""
        ref, content, books = answer.ref, answer.content, self.coordinator.relay
        if (first := book.begun.get(ref.id, answer)) != answer:
            await asyncio.shield(books.answer(book, first, None))  # it may be committed, so it counts
            raise other(ref)
        path = await self._content(client, book, letter, content, parts) if content else None
        # Begun, it is finished, whatever becomes of the caller.
        await asyncio.shield(books.answer(book, answer, path))

    async def _content(
        self, client: str, book: Book, letter: Posted, content: Blob, parts: AsyncIterator[Any]
    ) -> Path:
        """Take in the content of an answer, one of a client at a time; raises as `_take`."""
        ref = letter.ref
        self.coordinator.relay.room(client, content)
        alone(self.taken, client, ref)
        self.taken[client] = scope = asyncio.timeout(letter.expires - time.time())
        try:
            async with scope, aclosing(self.agents.counted(client, ref, content, parts)) as counted:
                with book.there():
                    return await received(book.blobs, content, counted)
        except TimeoutError as error:
            if letter.expires > time.time():
                raise Interrupted(f"{client} has begun another upload for {ref}") from error
            raise unawaited(ref) from error
        finally:
            del self.taken[client]


class PostService(PostServicer):
    """The relay, as operators see it."""

    def __init__(self, coordinator: Coordinator) -> None:
        """Serve a coordinator."""
        self.coordinator, self.relay = coordinator, coordinator.relay

    async def Open(self, request: pb.AppHeader, context: Context) -> RunInfo:
        """Begin a run of an app."""
        operator = await require(context, "operator")
        async with refusing(context):
            app, digest, name = relay.app_head(request)
            await self.coordinator.note(operator, "open", f"{name}, of the app {app} {digest}")
            run = await asyncio.shield(self.relay.open(app, digest, name))
        return describe_app(self.relay, run)

    async def Hosts(self, request: RunName, context: Context) -> pb.HostList:
        """Return the connected agents that host a run's app, by name, and how many have other files."""
        await require(context, "operator")
        async with refusing(context):
            run = self.relay.book(request.run).run
            return pb.HostList(clients=self.relay.hosting(run), others=self.relay.others(run))

    async def Deposit(self, parts: AsyncIterator[pb.DepositPart], context: Context) -> BlobName:
        """Take a content for letters that are sent next; what a letter has already need not come again."""
        await require(context, "operator")
        async with refusing(context):
            first = await anext(parts, None)
            if first is None:
                raise ProtocolError("a deposit begins with its header")
            run, content = relay.deposit_head(first)
            book = self.relay.book(run)
            name = deposit(content.sha256)
            if not await asyncio.to_thread(book.blobs.hold, name, content.sha256):
                with book.there():
                    path = await received(book.blobs, content, parts)
                    await asyncio.to_thread(book.blobs.adopt, path, name)
        return BlobName(sha256=content.sha256, size=content.size)

    async def Send(self, request: pb.LetterList, context: Context) -> pb.Missing:
        """Take letters: acknowledged once they are committed."""
        await require(context, "operator")
        async with refusing(context):
            book, letters = self.relay.book(request.run), relay.letters(request)
            return pb.Missing(contents=sorted(await asyncio.shield(self.relay.send(book, letters))))

    async def Answers(self, request: RunName, context: Context) -> AsyncIterator[pb.Answer]:
        """Stream every answer that is not settled, then each that comes, until the run has ended."""
        await require(context, "operator")
        async with refusing(context):
            if (book := self.relay.find(request.run)) is None:
                return
            with book.listening() as answers:
                while (answer := await answers.get()) is not None:
                    if answer.ref.id in book.letters:
                        yield to_wire(answer)
            if book.run.state == "running":
                raise Interrupted("the coordinator stops; ask again")

    async def Collect(self, request: pb.Taking, context: Context) -> AsyncIterator[bytes]:
        """Stream the content of an answer."""
        await require(context, "operator")
        async with refusing(context):
            ref, offset = relay.taking(request)
            book = self.relay.book(ref.run)
            letter = book.letters.get(ref.id)
            if letter is None or letter.state != "answered":
                raise UpdateRefused(f"{ref} has no answer, or it is settled")
            async for chunk in content_of(book, ref, letter.content, offset):
                yield chunk

    async def Settle(self, request: pb.LetterNames, context: Context) -> pb.LetterNames:
        """Forget letters, whether answered or not."""
        await require(context, "operator")
        async with refusing(context):
            book, refs = self.relay.book(request.run), relay.names(request)
            await asyncio.shield(self.relay.settle(book, [ref.id for ref in refs]))
        return request

    async def Close(self, request: pb.AppEnd, context: Context) -> RunInfo:
        """End a run: nothing of it stays but how it ended."""
        operator = await require(context, "operator")
        async with refusing(context):
            run, state, detail = relay.app_end(request)
            if self.relay.find(run):  # otherwise its end is known
                await self.coordinator.note(operator, "close", f"{run}: {state}")
                await asyncio.shield(self.relay.end(run, state, detail))
        return describe_app(self.relay, self.relay.runs[run])


def content_of(book: Book, ref: LetterRef, content: Blob | None, offset: int) -> AsyncIterator[bytes]:
    """Yield the messages of a content's chunks, from a byte on; raises ProtocolError where there is none."""
    size = content.size if content else 0
    if content is None or offset > size:
        raise ProtocolError(f"the content of {ref} has {size} bytes; from byte {offset} on there is none")
    return stream_file(book.blobs, content.sha256, size, offset)
