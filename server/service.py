"""What agents call: the stream on which work is pushed, parameters down, updates up."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fedcore.crypto.tls import Context, require
from fedcore.errors import FedcoreError, ProtocolError, UpdateRefused
from fedcore.messages import Accept, Blob, Decline, Hello, Secure, UploadHead
from fedcore.server.blobs import Blobs
from fedcore.server.coordinator import Coordinator
from fedcore.server.opening import Live
from fedcore.server.registry import Push, Session
from fedcore.wire import codec, grpc
from fedcore.wire.chunks import Incoming, receive, stream
from fedcore.wire.codec import to_wire
from fedcore.wire.v1 import coordinator_pb2 as pb
from fedcore.wire.v1.coordinator_pb2_grpc import CoordinatorServicer

log = logging.getLogger("fedcore.server")

HELLO_TIMEOUT = 30.0  # seconds from the stream's opening to its first message


def status_of(error: FedcoreError) -> grpc.StatusCode:
    """Return the status with which an error is told to a peer."""
    if isinstance(error, UpdateRefused):
        return grpc.StatusCode.FAILED_PRECONDITION
    return grpc.StatusCode.INVALID_ARGUMENT


@asynccontextmanager
async def refusing(context: Context) -> AsyncIterator[None]:
    """End a call with a status that says why, where its body raises FedcoreError."""
    try:
        yield
    except FedcoreError as error:
        log.warning("refused", extra={"peer": context.peer(), "reason": str(error)})
        # A status travels in a header, which has to stay small.
        await context.abort(status_of(error), str(error)[: codec.MAX_TEXT])


class AgentService(CoordinatorServicer):
    """The coordinator, as agents see it. Who calls is who its certificate says."""

    def __init__(self, coordinator: Coordinator) -> None:
        """Serve a coordinator."""
        self.coordinator = coordinator

    async def Connect(
        self, requests: AsyncIterator[pb.FromAgent], context: Context
    ) -> AsyncIterator[pb.ToAgent]:
        """Hold an agent's stream: push its work and outcomes, hear its declines."""
        name = await require(context, "client")
        async with refusing(context):
            session = Session(name.name, await self._hello(requests))
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
        """Return the agent's first message; raises ProtocolError."""
        try:
            async with asyncio.timeout(HELLO_TIMEOUT):
                first = await anext(requests)
        except (TimeoutError, StopAsyncIteration) as error:
            raise ProtocolError(f"no hello within {HELLO_TIMEOUT:.0f} seconds") from error
        hello = codec.from_agent(first)
        if not isinstance(hello, Hello):
            raise ProtocolError("the stream begins with a hello")
        return hello

    async def _listen(self, session: Session, requests: AsyncIterator[pb.FromAgent]) -> None:
        """Hear an agent until its side of the stream ends, then end ours."""
        try:
            async for request in requests:
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

    async def Download(self, request: pb.Blob, context: Context) -> AsyncIterator[pb.Chunk]:
        """Stream the parameters of a round that the caller takes part in."""
        name = await require(context, "client")
        async with refusing(context):
            blob = codec.blob_from_wire(request)
            if not self._may_read(name.name, blob):
                problem = f"{name} has no work with blob {blob.sha256}"
                await context.abort(grpc.StatusCode.PERMISSION_DENIED, problem)
            started = time.perf_counter()
            async for chunk in stream_file(self.coordinator.blobs, blob.sha256, blob.size):
                yield chunk
            log.info("parameters sent", extra={"client": name.name, **_moved(blob, started)})

    def _may_read(self, client: str, blob: Blob) -> bool:
        return any(
            client in live.plan.cohort and live.assignment(client, live.left).parameters == blob
            for live in self.coordinator.live.values()
        )

    async def Upload(self, parts: AsyncIterator[pb.UploadPart], context: Context) -> pb.Receipt:
        """Take one update: acknowledged once it is on disk, folded or refused afterwards."""
        name = await require(context, "client")
        async with refusing(context):
            first = await anext(parts, None)
            if first is None:
                raise ProtocolError("an upload begins with its header")
            head = codec.upload_head(first)
            live = self.coordinator.round_of(head.ref)
            path = live.take(name.name, head)
            started = time.perf_counter()
            try:
                await self._receive(live, head, path, parts)
                await live.accept(name.name, head, path)
            except BaseException as error:
                live.drop(name.name)
                if isinstance(error, FileNotFoundError):  # the attempt's folder went while this came
                    raise UpdateRefused(f"{head.ref} is over") from error
                raise
            extra = {"client": name.name, "ref": head.ref, **_moved(head.payload, started)}
            log.info("update received", extra=extra)
        return pb.Receipt(ref=to_wire(head.ref))

    async def _receive(
        self, live: Live, head: UploadHead, path: Path, parts: AsyncIterator[pb.UploadPart]
    ) -> None:
        """Write the payload of an upload to a file; raises where it is wrong or too late."""
        try:
            async with asyncio.timeout(live.left):
                await receive_file(path, head.payload, parts)
        except TimeoutError as error:
            raise UpdateRefused(f"the deadline of {head.ref} has passed") from error
        if live.closed:
            await asyncio.to_thread(path.unlink)
            raise UpdateRefused(f"{head.ref} has closed")


def pushed(message: Push) -> pb.ToAgent:
    """Return what goes to an agent on its stream."""
    return pb.ToAgent(secure=to_wire(message)) if isinstance(message, Secure) else to_wire(message)


async def receive_file(path: Path, blob: Blob, parts: AsyncIterator[Any]) -> None:
    """Write what follows a stream's header to `path`, checked against `blob`."""

    async def chunks_of_parts() -> AsyncIterator[pb.Chunk]:
        async for part in parts:
            if not part.HasField("chunk"):
                raise ProtocolError("a stream has one header")
            yield part.chunk

    await receive(Incoming(path, blob), chunks_of_parts())


def stream_file(blobs: Blobs, address: str, size: int) -> AsyncIterator[pb.Chunk]:
    """Yield the first `size` bytes of a blob in numbered chunks; raises ProtocolError where it is gone."""
    return stream(partial(blobs.open, address), size)


def _moved(blob: Blob, started: float) -> dict[str, object]:
    return {"bytes": blob.size, "seconds": round(time.perf_counter() - started, 6)}
