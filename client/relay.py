"""The relay of apps' letters, over an agent's own channel: letters come, their contents down, answers up."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path

from fedcore.client.session import Chunks, ConnectionLost, Session, explain, fetched
from fedcore.messages import Blob
from fedcore.wire import grpc, relay
from fedcore.wire.chunks import stream
from fedcore.wire.codec import to_wire
from fedcore.wire.framing import Framing
from fedcore.wire.relay import Answer, HostHello, LetterRef
from fedcore.wire.sending import sending
from fedcore.wire.v1 import relay_pb2 as pb
from fedcore.wire.v1.relay_pb2_grpc import RelayStub


async def attend(session: Session, hello: HostHello) -> AsyncGenerator[pb.ToHost, None]:
    """Connect, and yield what the coordinator says; raises ConnectionLost when the stream has ended."""
    call = RelayStub(session.channel).Attend()
    try:
        async with sending(call, _open(hello)):
            async for message in call:
                yield message
    except grpc.aio.AioRpcError as error:
        raise ConnectionLost(f"{error.code().name}: {error.details()}") from error
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task and task.cancelling():
            raise
        raise ConnectionLost("the channel was closed, for the certificate has been renewed") from None
    raise ConnectionLost("the coordinator ended the stream")


async def _open(hello: HostHello) -> AsyncGenerator[pb.FromHost, None]:
    """Yield the only words of this side, which stays open."""
    yield to_wire(hello)
    await asyncio.get_running_loop().create_future()


async def take(session: Session, ref: LetterRef, blob: Blob, path: Path, left: float) -> None:
    """Fetch a letter's content into a file, as `Session.download` does parameters; left: seconds."""

    def take_from(offset: int) -> Chunks:
        wanted = pb.Taking(letter=to_wire(ref), offset=offset)
        call: Chunks = RelayStub(Framing(session.channel)).Take(wanted, timeout=left)
        return call

    await fetched(blob, path, take_from)


async def reply(session: Session, answer: Answer, path: Path, left: float) -> None:
    """Send an answer, whose content begins a file, and wait for its receipt; left: seconds.

    Raises ConnectionLost, UpdateRefused where nobody waits for it, and ProtocolError where it is malformed.
    Where the file cannot be read now it is as if the connection were lost: no later letter may overtake it.
    """
    call = RelayStub(Framing(session.channel)).Reply(timeout=left)
    try:
        async with sending(call, _parts(answer, path)):
            await call
    except grpc.aio.AioRpcError as error:
        explain(error)
    except OSError as error:
        raise ConnectionLost(str(error)) from error


async def _parts(answer: Answer, path: Path) -> AsyncGenerator[pb.ReplyPart | bytes, None]:
    yield relay.reply_part(answer)
    if answer.content:
        size = answer.content.size
        async with aclosing(stream(lambda: path.open("rb"), size, part=True)) as parts:
            async for part in parts:
                yield part
