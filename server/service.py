"""What agents call: the stream on which work is pushed, parameters down, updates up."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import Any

from fedcore.crypto.tls import Context, require
from fedcore.errors import FedcoreError, Interrupted, Overloaded, ProtocolError, UpdateRefused
from fedcore.faults import point
from fedcore.messages import Accept, Blob, Decline, Hello, Pause, Secure, UploadHead
from fedcore.server import pausing
from fedcore.server.admission import SLOW, STREAM, TRIES, UPLOADS, Places, is_offence
from fedcore.server.blobs import Blobs
from fedcore.server.coordinator import Coordinator
from fedcore.server.opening import Live
from fedcore.server.registry import Push, Session
from fedcore.server.uploads import alone
from fedcore.wire import codec, grpc
from fedcore.wire.chunks import Incoming, arrived, moved, receive, stream
from fedcore.wire.codec import to_wire
from fedcore.wire.v1 import coordinator_pb2 as pb
from fedcore.wire.v1.coordinator_pb2_grpc import CoordinatorServicer

log = logging.getLogger("fedcore.server")

HELLO_TIMEOUT = 30.0  # seconds from the stream's opening to its first message


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
        """Hold an agent's stream: push its work and outcomes, hear its declines."""
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
                while (message := await session.outbox.get()) is not None:
                    yield pushed(message)
            finally:
                self.coordinator.disconnect(session)
                if not listener.done():
                    listener.cancel()
            if not listener.cancelled() and listener.done():
                listener.result()

    async def _hello(self, requests: AsyncIterator[pb.FromAgent]) -> Hello:
        """Return the agent's first message; raises ProtocolError, and UpdateRefused where none comes."""
        try:
            async with asyncio.timeout(HELLO_TIMEOUT):
                first = await anext(requests)
        except (TimeoutError, StopAsyncIteration) as error:
            raise UpdateRefused(f"no hello within {HELLO_TIMEOUT:.0f} seconds") from error
        hello = codec.from_agent(first)
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
                    case Hello():
                        raise ProtocolError("the stream has one hello")
        finally:
            session.outbox.put_nowait(None)

    async def Download(self, request: pb.Wanted, context: Context) -> AsyncIterator[pb.Chunk]:
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
                admission.transfer(client, blob, len(chunk.data), blob.size)
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
            alone(live.taken, client, live.plan)
            return pb.Progress(bytes=await asyncio.to_thread(arrived, live.journal.update(client)))

    async def Upload(self, parts: AsyncIterator[pb.UploadPart], context: Context) -> pb.Receipt:
        """Take one update: acknowledged once it is on disk, folded or refused afterwards."""
        async with self.admitted(context) as client:
            self.coordinator.admission.check(client)
            first = await anext(parts, None)
            if first is None:  # whoever began it has gone
                raise Interrupted("an upload begins with its header")
            head = codec.upload_head(first)
            live = self.coordinator.round_of(head.ref)
            if not live.received(client, head):  # otherwise the receipt was lost
                await self._take(live, client, head, parts)
        return pb.Receipt(ref=to_wire(head.ref))

    async def _take(
        self, live: Live, client: str, head: UploadHead, parts: AsyncIterator[pb.UploadPart]
    ) -> None:
        """Take in an update that is awaited; raises where it is wrong, too late or cut."""
        scope, started = asyncio.timeout(live.left), time.perf_counter()
        path = live.take(client, head, scope)
        try:
            async with scope:
                async with aclosing(self._counted(client, head, parts)) as counted:
                    await receive_file(Incoming(path, head.payload, head.offset), counted)
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

    async def _counted(
        self, client: str, head: UploadHead, parts: AsyncIterator[pb.UploadPart]
    ) -> AsyncGenerator[pb.UploadPart, None]:
        """Yield the parts of an upload that has a place; raises UpdateRefused where it never ends."""
        count = partial(self.coordinator.admission.transfer, client, head.ref, size=head.payload.size)
        count(head.offset // TRIES)  # what is here is only read again
        async with self.places.place() as give_up:
            while True:
                slow = asyncio.get_running_loop().call_later(SLOW, give_up)
                part = await anext(parts, None)
                slow.cancel()
                if part is None:
                    break
                count(len(part.chunk.data))
                yield part


def pushed(message: Push) -> pb.ToAgent:
    """Return what goes to an agent on its stream."""
    return pb.ToAgent(secure=to_wire(message)) if isinstance(message, Secure) else to_wire(message)


async def receive_file(incoming: Incoming, parts: AsyncIterator[Any]) -> None:
    """Write what follows a stream's header to a file."""

    async def chunks_of_parts() -> AsyncIterator[pb.Chunk]:
        async for part in parts:
            if not part.HasField("chunk"):
                raise ProtocolError("a stream has one header")
            yield part.chunk

    await receive(incoming, chunks_of_parts())


def stream_file(blobs: Blobs, address: str, size: int, offset: int = 0) -> AsyncIterator[pb.Chunk]:
    """Yield the first `size` bytes of a blob, from `offset` on, in numbered chunks.

    Raises ProtocolError where it is gone.
    """
    return stream(partial(blobs.open, address), size, offset)
