"""What agents call: the stream on which work is pushed, parameters down, updates up."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fedcore.crypto.tls import Context, require
from fedcore.errors import FedcoreError, Interrupted, Overloaded, ProtocolError, UpdateRefused
from fedcore.faults import point
from fedcore.messages import (
    Accept,
    Blob,
    Decline,
    Hello,
    Outcome,
    Pause,
    Receipt,
    Secure,
    SmallUpdate,
    UploadHead,
)
from fedcore.server import pausing
from fedcore.server.admission import SLOW, STREAM, TRIES, UPLOADS, Places, is_offence
from fedcore.server.blobs import Blobs
from fedcore.server.coordinator import Coordinator
from fedcore.server.opening import Live
from fedcore.server.registry import Push, Session
from fedcore.server.uploads import alone, check_content
from fedcore.wire import codec, grpc
from fedcore.wire.chunks import Incoming, arrived, moved, receive, stream
from fedcore.wire.codec import to_wire
from fedcore.wire.v1 import coordinator_pb2 as pb
from fedcore.wire.v1.coordinator_pb2_grpc import CoordinatorServicer

log = logging.getLogger("fedcore.server")
T = TypeVar("T")

HELLO_TIMEOUT = 30.0  # seconds from the stream's opening to its first message
LAG = 0.05  # seconds for which a receipt or a verdict waits for company
BATCH = 16  # messages that go as one at the most, of which one may be large

Source = bytes | AsyncGenerator[pb.UploadPart, None]  # an update as a whole, or what follows its header


def status_of(error: FedcoreError) -> grpc.StatusCode:
    """Return the status with which an error is told to a peer."""
    if isinstance(error, Overloaded):
        return grpc.StatusCode.RESOURCE_EXHAUSTED  # the agent tries again
    if isinstance(error, Interrupted):
        return grpc.StatusCode.ABORTED  # and asks how far it came
    if isinstance(error, UpdateRefused):
        return grpc.StatusCode.FAILED_PRECONDITION
    return grpc.StatusCode.INVALID_ARGUMENT


@asynccontextmanager
async def refusing(context: Context, **caller: str) -> AsyncIterator[None]:
    """End a call with a status that says why, where its body raises FedcoreError or the disk fails it."""
    try:
        with pausing.told():
            yield
    except FedcoreError as error:
        log.warning("refused", extra={**caller, "peer": context.peer(), "reason": str(error)})
        # A status travels in a header, which has to stay small.
        await context.abort(status_of(error), str(error)[: codec.MAX_TEXT])


class AgentService(CoordinatorServicer):
    """The coordinator, as agents see it. Who calls is who its certificate says."""

    def __init__(self, coordinator: Coordinator) -> None:
        """Serve a coordinator."""
        self.coordinator, self.places = coordinator, Places(UPLOADS)

    @asynccontextmanager
    async def admitted(self, context: Context, cost: float = 1.0) -> AsyncIterator[str]:
        """Run a client's call within its share, and count what of it is refused; yields its name."""
        client = (await require(context, "client")).name
        async with refusing(context, client=client):
            try:
                with self.coordinator.admission.call(client, cost):
                    yield client
            except FedcoreError as error:
                self.coordinator.refuse(client, str(error), is_offence(error))
                raise

    async def Connect(
        self, requests: AsyncIterator[pb.FromAgent], context: Context
    ) -> AsyncIterator[pb.ToAgent]:
        """Hold an agent's stream: push its work and outcomes, hear its declines and small updates."""
        async with self.admitted(context, STREAM) as client:
            session = Session(client, await self._hello(requests))
            registry = self.coordinator.registry
            registry.check(session)
            if client not in registry.sessions and (wait := registry.steering.wait(client)):
                yield to_wire(Pause(wait))
                return
            yield pb.ToAgent(welcome=pb.Welcome(coordinator="fedcore 1"))
            self.coordinator.connect(session)
            listener = asyncio.create_task(self._listen(session, requests))
            try:
                while messages := await leaving(session.outbox):
                    yield pushed(messages)
            finally:
                self.coordinator.disconnect(session)
                if not listener.done():
                    listener.cancel()
            if not listener.cancelled() and listener.done():
                listener.result()

    async def _hello(self, requests: AsyncIterator[pb.FromAgent]) -> Hello:
        """Return the agent's first message; raises ProtocolError, and UpdateRefused where none comes."""
        hello = codec.from_agent(await first_of(requests))
        if not isinstance(hello, Hello):
            raise ProtocolError("the stream begins with a hello")
        return hello

    async def _listen(self, session: Session, requests: AsyncIterator[pb.FromAgent]) -> None:
        """Hear an agent until its side of the stream ends, then end ours."""
        try:
            async for request in requests:
                self.coordinator.admission.charge(session.client)
                match codec.from_agent(request):
                    case Decline(ref, reason):
                        self.coordinator.decline(ref, session.client, reason)
                    case Accept(ref):
                        self.coordinator.accept(ref, session.client)
                    case Secure(ref, content):
                        self.coordinator.hear(ref, session.client, content)
                    case SmallUpdate() as update:
                        receipt = await self._keep(session.client, update)
                        # Not to this stream: the agent may have opened another one meanwhile.
                        self.coordinator.registry.send(session.client, receipt)
                    case Hello():
                        raise ProtocolError("the stream has one hello")
        finally:
            session.outbox.put_nowait(None)

    async def Download(self, request: pb.Wanted, context: Context) -> AsyncIterator[bytes]:
        """Stream the parameters of a round that the caller takes part in."""
        async with self.admitted(context) as client:
            admission = self.coordinator.admission
            admission.check(client)
            blob, offset = codec.wanted(request)
            if not self._may_read(client, blob):
                problem = f"{client} has no work with blob {blob.sha256}"
                await context.abort(grpc.StatusCode.PERMISSION_DENIED, problem)
            started = time.perf_counter()
            async for chunk in stream_file(self.coordinator.blobs, blob.sha256, blob.size, offset):
                admission.transfer(client, blob, len(chunk), blob.size)
                yield chunk
            log.info("parameters sent", extra={"client": client, "offset": offset, **moved(blob, started)})

    def _may_read(self, client: str, blob: Blob) -> bool:
        return any(
            client in live.plan.cohort and live.assignment(client, live.left).parameters == blob
            for live in self.coordinator.live.values()
        )

    async def Standing(self, request: pb.UploadHeader, context: Context) -> pb.Progress:
        """Tell how much of an update is here. Who asks has lost its upload, so one that goes on is ended."""
        async with self.admitted(context) as client:
            self.coordinator.admission.check(client)
            head = codec.head_from_wire(request)
            live = self.coordinator.round_of(head.ref)
            if live.received(client, head):
                return pb.Progress(bytes=head.payload.size, received=True)
            alone(live.taken, client, head.ref)
            return pb.Progress(bytes=await asyncio.to_thread(arrived, live.journal.update(client)))

    async def Upload(self, parts: AsyncIterator[pb.UploadPart], context: Context) -> pb.Receipt:
        """Take one update: acknowledged once it is on disk, folded or refused afterwards."""
        async with self.admitted(context) as client:
            self.coordinator.admission.check(client)
            first = await anext(parts, None)
            if first is None:  # whoever began it has gone
                raise Interrupted("an upload begins with its header")
            head = codec.upload_head(first)
            counted = self.counted(client, head.ref, head.payload, parts, head.offset)
            await self._receive(client, head, counted)
        return pb.Receipt(ref=to_wire(head.ref))

    async def _keep(self, client: str, update: SmallUpdate) -> Receipt:
        """Take an update that came on the stream, as `Upload` does; return what to tell the agent."""
        head, admission = update.head, self.coordinator.admission
        try:
            with pausing.told():
                admission.check(client)
                admission.transfer(client, head.ref, len(update.payload), head.payload.size)
                await self._receive(client, head, update.payload)
        except FedcoreError as error:
            self.coordinator.refuse(client, str(error), is_offence(error))
            log.warning("refused", extra={"client": client, "ref": head.ref, "reason": str(error)})
            return Receipt(head.ref, status_of(error).value[0], str(error))
        return Receipt(head.ref)

    async def _receive(self, client: str, head: UploadHead, source: Source) -> None:
        """Take in an update, unless it is here and its receipt was lost; raises where it is not wanted."""
        live = self.coordinator.round_of(head.ref)
        if not live.received(client, head):
            await self._take(live, client, head, source)

    async def _take(self, live: Live, client: str, head: UploadHead, source: Source) -> None:
        """Take in an update that is awaited; raises where it is wrong, too late or cut."""
        scope, started = asyncio.timeout(live.left), time.perf_counter()
        path = live.take(client, head, scope)
        try:
            if isinstance(source, bytes):
                check_content(head, source)
                await live.accept(client, head, source)
            else:
                async with scope, aclosing(source):
                    await receive_file(Incoming(path, head.payload, head.offset), source)
                await live.accept(client, head)
        except TimeoutError as error:
            if live.failure:  # its run waits
                raise Interrupted(f"{head.ref} is broken off and goes on later; try again") from error
            if live.closed or live.left <= 0:
                raise UpdateRefused(f"{head.ref} has closed, or its deadline has passed") from error
            raise Interrupted(f"{client} has begun another upload for {head.ref}") from error
        except FileNotFoundError as error:  # the attempt's folder went while this came
            raise UpdateRefused(f"{head.ref} is over") from error
        except OSError as error:
            if pausing.reason(error):
                live.fail(error)
            raise
        finally:
            live.drop(client)
        extra = {"client": client, "ref": head.ref, "offset": head.offset, **moved(head.payload, started)}
        log.info("update received", extra=extra)
        point("update.acknowledged")

    async def counted(
        self, client: str, what: object, payload: Blob, parts: AsyncIterator[Any], offset: int = 0
    ) -> AsyncGenerator[Any, None]:
        """Yield the parts of an upload that has a place; raises UpdateRefused where it never ends."""
        count = partial(self.coordinator.admission.transfer, client, what, size=payload.size)
        count(offset // TRIES)  # what is here is only read again
        async with self.places.place() as give_up:
            while True:
                slow = asyncio.get_running_loop().call_later(SLOW, give_up)
                part = await anext(parts, None)
                slow.cancel()
                if part is None:
                    break
                count(len(part.chunk.data))
                yield part


async def leaving(outbox: asyncio.Queue[Push | None]) -> list[Push]:
    """Return what an agent is told next, all at once; nothing where its stream is to end.

    What it need not act on waits for what it must, since every message costs half a millisecond.
    """
    found: list[Push] = []
    with suppress(TimeoutError):
        async with asyncio.timeout(None) as patience:
            while (message := await outbox.get()) is not None:
                found.append(message)
                if len(found) == BATCH or not isinstance(message, Receipt | Outcome):
                    return found
                if len(found) == 1:
                    patience.reschedule(asyncio.get_running_loop().time() + LAG)
            if found:
                outbox.put_nowait(None)  # for the next time
    return found


def pushed(messages: Sequence[Push]) -> pb.ToAgent:
    """Return what goes to an agent on its stream."""
    wire = [pb.ToAgent(secure=to_wire(m)) if isinstance(m, Secure) else to_wire(m) for m in messages]
    return wire[0] if len(wire) == 1 else pb.ToAgent(batch=pb.Batch(messages=wire))


async def first_of(requests: AsyncIterator[T]) -> T:
    """Return the first message of an agent's stream; raises UpdateRefused where none comes."""
    try:
        async with asyncio.timeout(HELLO_TIMEOUT):
            return await anext(requests)
    except (TimeoutError, StopAsyncIteration) as error:
        raise UpdateRefused(f"no hello within {HELLO_TIMEOUT:.0f} seconds") from error


async def received(blobs: Blobs, content: Blob, parts: AsyncIterator[Any]) -> Path:
    """Write what follows a stream's header to a new file of some blobs, or leave nothing."""
    incoming = Incoming(blobs.new(), content)
    try:
        await receive_file(incoming, parts)
    except BaseException:  # nobody will send the rest, or hear that all is here
        await asyncio.to_thread(incoming.abandon)
        await asyncio.to_thread(incoming.path.unlink, missing_ok=True)
        raise
    return incoming.path


async def receive_file(incoming: Incoming, parts: AsyncIterator[Any]) -> None:
    """Write what follows a stream's header to a file."""

    async def chunks_of_parts() -> AsyncIterator[pb.Chunk]:
        async for part in parts:
            if not part.HasField("chunk"):
                raise ProtocolError("a stream has one header")
            yield part.chunk

    await receive(incoming, chunks_of_parts())


def stream_file(blobs: Blobs, address: str, size: int, offset: int = 0) -> AsyncIterator[bytes]:
    """Yield the first `size` bytes of a blob, from `offset` on, as the messages of numbered chunks.

    Raises ProtocolError where it is gone.
    """
    return stream(partial(blobs.open, address), size, offset)
