"""An agent's side of the wire: the stream on which work comes, parameters down, updates up."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

from fedcore.crypto.identity import Identity
from fedcore.crypto.tls import open_channel
from fedcore.errors import AuthenticationError, FedcoreError, Interrupted, ProtocolError, UpdateRefused
from fedcore.faults import point
from fedcore.messages import (
    SMALL,
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
)
from fedcore.wire import codec, grpc
from fedcore.wire.chunks import Incoming, arrived, moved, receive, stream
from fedcore.wire.codec import to_wire
from fedcore.wire.framing import Chunk, Framing
from fedcore.wire.sending import sending
from fedcore.wire.v1 import coordinator_pb2 as pb
from fedcore.wire.v1.coordinator_pb2_grpc import CoordinatorStub

log = logging.getLogger("fedcore.client")

OPTIONS = (
    ("grpc.max_receive_message_length", 4 * 2**20),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # The agent has a back-off of its own; gRPC's may not make it wait longer.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
)
LINGER = 600.0  # seconds that a transfer may still take when its certificate has been renewed
CODES = {code.value[0]: code for code in grpc.StatusCode}
DENIED = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
STALE = (grpc.StatusCode.FAILED_PRECONDITION, *DENIED)  # of a round that has closed, or is another's now

Push = Assignment | Outcome | Pause | Secure
Stream = grpc.aio.StreamStreamCall[pb.FromAgent, pb.ToAgent]
Chunks = AsyncIterator[pb.Chunk | Chunk]


class ConnectionLost(FedcoreError):
    """The coordinator cannot be reached, or no longer; trying again is right."""


class Session:
    """A channel to the coordinator; its stream may break and be opened again."""

    def __init__(self, address: str, identity: Identity) -> None:
        """Prepare a channel to HOST:PORT; nothing connects before `messages`."""
        self.address = address
        self.channel = open_channel(address, identity, options=OPTIONS)
        self.stub = CoordinatorStub(Framing(self.channel))
        self.calls: list[Stream] = []  # the stream, and the next one while a certificate is renewed
        self.outbox: asyncio.Queue[Hello | Accept | Decline | Secure | SmallUpdate | None] = asyncio.Queue()
        self.receipts: dict[Ref, asyncio.Future[Receipt]] = {}  # of updates that are on the stream

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.channel.close(None)

    async def messages(self, hello: Hello) -> AsyncGenerator[Push | None, None]:
        """Connect, and yield what the coordinator says, its welcome as None.

        Raises ConnectionLost when the stream has ended, AuthenticationError or ProtocolError where the
        coordinator does not want this agent.
        """
        self.outbox = asyncio.Queue()  # what an older stream did not send is void: work is handed out anew
        self.outbox.put_nowait(hello)
        self.calls = [self.stub.Connect()]
        try:
            while self.calls:
                async with sending(call := self.calls[0], self._outgoing()):
                    async for batch in call:
                        for message in self._understood(batch):
                            if isinstance(message, Receipt):
                                await self._hand_over(message)
                            else:
                                yield message
                self.calls.pop(0)
                self._lose_receipts()
        except grpc.aio.AioRpcError as error:
            if error.code() in DENIED:
                raise AuthenticationError(
                    f"the coordinator turned this agent away: {error.details()}"
                ) from error
            if error.code() is grpc.StatusCode.INVALID_ARGUMENT:
                raise ProtocolError(f"the coordinator turned this agent away: {error.details()}") from error
            raise ConnectionLost(f"{error.code().name}: {error.details()}") from error
        finally:
            while self.calls:
                self.calls.pop().cancel()
            self._lose_receipts()
        raise ConnectionLost("the coordinator ended the stream")

    async def renew(self, identity: Identity, hello: Hello) -> None:
        """Go on with another certificate, without a moment in which the agent is away.

        A second stream is opened, for which the coordinator ends the first. Transfers in progress come to
        their end under the old certificate.
        """
        older, self.channel = self.channel, open_channel(self.address, identity, options=OPTIONS)
        self.stub = CoordinatorStub(Framing(self.channel))
        if self.calls:
            call = self.stub.Connect()
            try:
                await call.write(to_wire(hello))
            except grpc.aio.AioRpcError as error:  # the first stream has the same trouble, or will have it
                log.warning("no stream with the new certificate", extra={"reason": error.details()})
            else:
                self.outbox = asyncio.Queue()
                self.calls.append(call)
        await older.close(LINGER)

    async def _outgoing(self) -> AsyncGenerator[pb.FromAgent, None]:
        outbox = self.outbox
        while True:
            match await outbox.get():
                case None:
                    return
                case Secure() as secure:
                    yield pb.FromAgent(secure=to_wire(secure))
                case message:
                    yield to_wire(message)
                    if isinstance(message, SmallUpdate):
                        _left()

    def _understood(self, batch: pb.ToAgent) -> Iterator[Push | Receipt | None]:
        for message in codec.unbatched(batch):
            try:
                yield codec.to_agent(message)
            except ProtocolError as error:
                self._refuse(message, error)

    async def _hand_over(self, receipt: Receipt) -> None:
        """Let who waits for a receipt go on, before the next message is heard."""
        waiting = self.receipts.get(receipt.ref)
        if waiting and not waiting.done():
            waiting.set_result(receipt)
            await asyncio.sleep(0)

    def _refuse(self, message: pb.ToAgent, error: ProtocolError) -> None:
        """Pass over a message that makes no sense; an assignment is declined, so that nobody waits for it."""
        log.warning("message refused", extra={"reason": str(error)})
        if message.HasField("assignment"):
            self.tell(Decline(codec.ref_from_wire(message.assignment.ref), str(error)))

    def tell(self, answer: Accept | Decline | Secure) -> None:
        """Tell the coordinator that a run is accepted, work will not be done, or a step of a protocol."""
        self.outbox.put_nowait(answer)

    def leave(self) -> None:
        """End this side of the stream after all that was told; the coordinator then ends its own."""
        self.outbox.put_nowait(None)

    async def download(self, blob: Blob, path: Path, left: float) -> None:
        """Fetch parameters into a file, which has its name only once it is complete and verified.

        What came of them before a connection broke is not fetched again. left: seconds. Raises
        ConnectionLost, UpdateRefused where the round has closed, and ProtocolError for altered bytes.
        """
        started = time.perf_counter()

        def download(offset: int) -> Chunks:
            wanted = pb.Wanted(blob=to_wire(blob), offset=offset)
            call: Chunks = self.stub.Download(wanted, timeout=left)
            return call

        offset = await fetched(blob, path, download)
        log.info("parameters received", extra={"offset": offset, **moved(blob, started)})

    async def upload(self, head: UploadHead, path: Path, left: float, again: bool = False) -> None:
        """Send a finished update and wait for its receipt.

        One of at most SMALL bytes goes on the stream at first. left: seconds. again: it may have been sent
        before, if only in part, so the coordinator is asked what it lacks. Raises ConnectionLost,
        UpdateRefused where the round has closed, and ProtocolError where the coordinator finds the update
        itself malformed.
        """
        started = time.perf_counter()
        if head.payload.size <= SMALL and self.calls and not again:
            await self._send_whole(_whole(head, path), left)
        else:
            try:
                if again:
                    progress = await self.stub.Standing(to_wire(head).header, timeout=left)
                    if progress.received:
                        return
                    head = replace(head, offset=min(progress.bytes, head.payload.size))
                call = self.stub.Upload(timeout=left)
                async with sending(call, _parts(head, path)):
                    await call
            except grpc.aio.AioRpcError as error:
                explain(error)
        facts = {"ref": head.ref, "offset": head.offset, **moved(head.payload, started)}
        log.info("update sent", extra=facts)

    async def _send_whole(self, update: SmallUpdate, left: float) -> None:
        """Send an update on the stream, and wait for its receipt there."""
        ref = update.head.ref
        self.receipts[ref] = waiting = asyncio.get_running_loop().create_future()
        self.outbox.put_nowait(update)
        try:
            async with asyncio.timeout(left):
                receipt = await waiting
        except TimeoutError as error:
            raise ConnectionLost("DEADLINE_EXCEEDED: no receipt came in time") from error
        finally:
            self.receipts.pop(ref, None)
        if receipt.code:
            raise meaning(CODES.get(receipt.code, grpc.StatusCode.UNKNOWN), receipt.reason)

    def _lose_receipts(self) -> None:
        """Tell those who wait for one that the stream is gone on which their update went."""
        for waiting in self.receipts.values():
            if not waiting.done():
                waiting.set_exception(ConnectionLost("the stream ended before the receipt came"))


async def fetched(blob: Blob, path: Path, call: Callable[[int], Chunks]) -> int:
    """Fetch what a file lacks of a blob, and return how many bytes it had.

    call: asks for the chunks from a byte on. Raises as `Session.download` does.
    """
    offset = min(await asyncio.to_thread(arrived, path), blob.size)
    try:
        await receive(Incoming(path, blob, offset), call(offset))
    except grpc.aio.AioRpcError as error:
        explain(error)
    except Interrupted as error:
        raise ConnectionLost(str(error)) from error
    return offset


def explain(error: grpc.aio.AioRpcError) -> NoReturn:
    """Raise what a failed transfer means for the agent."""
    raise meaning(error.code(), error.details()) from error


def meaning(code: grpc.StatusCode, details: str | None) -> FedcoreError:
    """Return what it means for the agent that a transfer ended with a status."""
    what = f"{code.name}: {details}"
    if code in STALE:
        return UpdateRefused(what)
    return ProtocolError(what) if code is grpc.StatusCode.INVALID_ARGUMENT else ConnectionLost(what)


def _whole(head: UploadHead, path: Path) -> SmallUpdate:
    """Return a small update, read by whoever asks: to wake another thread takes longer."""
    return SmallUpdate(head, path.read_bytes())


def _left() -> None:
    """The last byte of an update has left, by whichever way."""
    point("agent.upload.sent")


async def _parts(head: UploadHead, path: Path) -> AsyncGenerator[pb.UploadPart | bytes, None]:
    """Yield an update's header and its payload from there on."""
    yield to_wire(head)
    size, offset = head.payload.size, head.offset
    async with aclosing(stream(lambda: path.open("rb"), size, offset, part=True)) as parts:
        async for part in parts:
            yield part
    _left()
