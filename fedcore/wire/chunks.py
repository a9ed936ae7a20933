"""Large payloads as chunks: numbered, counted and hashed, so that what arrives is what was sent."""

import asyncio
import os
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from fedcore.errors import ProtocolError
from fedcore.messages import Blob
from fedcore.wire.v1 import coordinator_pb2 as pb

CHUNK = 1 << 20


def chunks(file: BinaryIO, size: int | None = None) -> Iterator[pb.Chunk]:
    """Yield a file's bytes from its present position as numbered chunks of 1 MiB.

    size: how many bytes; to the end where None.
    """
    index, left = 0, sys.maxsize if size is None else size
    while data := file.read(min(CHUNK, left)):
        yield pb.Chunk(index=index, data=data)
        index, left = index + 1, left - len(data)


async def stream(opened: Callable[[], BinaryIO], size: int | None = None) -> AsyncGenerator[pb.Chunk, None]:
    """Yield the chunks of the buffered file that `opened` returns, all off the event loop; `size` as above.

    Even its end: with the last descriptor of a removed file, all its blocks are freed.
    """
    loop = asyncio.get_running_loop()
    opening = loop.run_in_executor(None, opened)
    try:
        file = await asyncio.shield(opening)
    except asyncio.CancelledError:  # a thread cannot be cancelled, and its file would stay open
        opening.add_done_callback(lambda done: done.exception() or done.result().close())
        raise
    try:
        parts = chunks(file, size)
        while chunk := await asyncio.to_thread(next, parts, None):
            yield chunk
    finally:
        # Not awaited, as the reader may have been cancelled; a read under way holds the buffer's lock.
        loop.run_in_executor(None, file.close)


class Incoming:
    """A file that arrives in chunks; all methods block.

    It grows beside `path` and gets that name only when it has the size and the hash that were announced.
    """

    def __init__(self, path: Path, blob: Blob) -> None:
        """Expect `blob` at `path`."""
        self.path, self.blob = path, blob
        self.part = path.with_name(f"{path.name}.{uuid4().hex}.part")
        self.hash, self.index, self.size = sha256(), 0, 0

    @cached_property
    def file(self) -> BinaryIO:
        """The growing file, opened by the thread that writes it first."""
        return self.part.open("wb")

    def add(self, chunk: pb.Chunk) -> None:
        """Write the next chunk; raises ProtocolError for a gap, a repetition, an empty or an excess one."""
        if chunk.index != self.index:
            raise ProtocolError(f"chunk {chunk.index} came where chunk {self.index} was expected")
        self.size += len(chunk.data)
        if not chunk.data or len(chunk.data) > CHUNK or self.size > self.blob.size:
            raise ProtocolError(
                f"chunk {chunk.index} has {len(chunk.data)} bytes, {self.size} of {self.blob.size}"
            )
        self.hash.update(chunk.data)
        self.file.write(chunk.data)
        self.index += 1

    def finish(self) -> None:
        """Give the file its name; raises ProtocolError where it is truncated or altered."""
        self.file.close()
        if self.size != self.blob.size or self.hash.hexdigest() != self.blob.sha256:
            raise ProtocolError(
                f"{self.size} bytes with SHA-256 {self.hash.hexdigest()} came, "
                f"expected {self.blob.size} bytes with {self.blob.sha256}"
            )
        os.replace(self.part, self.path)

    def abandon(self) -> None:
        """Remove what has arrived, even where it is complete."""
        if "file" in vars(self):  # otherwise nothing has
            self.file.close()
        self.part.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)


async def receive(incoming: Incoming, chunks: AsyncIterator[pb.Chunk]) -> None:
    """Write a stream of chunks, all off the event loop, each while the next one is on its way.

    Raises ProtocolError where they are not what was announced. Nothing is left of a stream that fails.
    """
    loop = asyncio.get_running_loop()
    step = asyncio.ensure_future(asyncio.sleep(0))
    try:
        async for chunk in chunks:
            await asyncio.shield(step)
            step = asyncio.ensure_future(asyncio.to_thread(incoming.add, chunk))
        await asyncio.shield(step)
        step = asyncio.ensure_future(asyncio.to_thread(incoming.finish))
        await asyncio.shield(step)
    except asyncio.CancelledError:  # nothing may be awaited any more

        def remove(done: "asyncio.Future[None]") -> None:
            done.cancelled() or done.exception()  # heard, whatever it is
            loop.run_in_executor(None, incoming.abandon)

        step.add_done_callback(remove)  # a thread cannot be cancelled, and must not write after the removal
        raise
    except BaseException:
        await asyncio.wait([step])
        await asyncio.to_thread(incoming.abandon)
        raise


def blob_of(file: BinaryIO) -> Blob:
    """Return the address of a file's bytes from its present position."""
    state, size = sha256(), 0
    while data := file.read(CHUNK):
        state.update(data)
        size += len(data)
    return Blob(state.hexdigest(), size)
