"""Large payloads as chunks: numbered, counted and hashed, so that what arrives is what was sent."""

import asyncio
import ctypes
import os
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import suppress
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

from fedcore.errors import Interrupted, ProtocolError
from fedcore.faults import point
from fedcore.messages import Blob
from fedcore.wire.framing import Chunk, framed
from fedcore.wire.v1 import coordinator_pb2 as pb

CHUNK = 1 << 20
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of malloc.h


def chunks(file: BinaryIO, size: int | None = None) -> Iterator[pb.Chunk]:
    """Yield a file's bytes from its present position as numbered chunks of 1 MiB.

    size: how many bytes; to the end where None.
    """
    index, left = 0, sys.maxsize if size is None else size
    while data := file.read(min(CHUNK, left)):
        yield pb.Chunk(index=index, data=data)
        index, left = index + 1, left - len(data)


async def stream(
    opened: Callable[[], BinaryIO], size: int, offset: int = 0, part: bool = False
) -> AsyncGenerator[bytes, None]:
    """Yield a file of `size` bytes, less the first `offset`, as the messages of its chunks, or as parts.

    What is in the page cache is taken at once, since to wake another thread takes longer. All that may block
    is done off the event loop, even the end: with the last descriptor of a removed file, all its blocks are
    freed.
    """
    loop, outgoing = asyncio.get_running_loop(), Outgoing(opened, size)
    reading: asyncio.Future[memoryview] | None = None
    try:
        for index, start in enumerate(range(offset, size, CHUNK)):
            if not (data := outgoing.cached(start)):
                reading = loop.run_in_executor(None, outgoing.read, start)
                data = await asyncio.shield(reading)
                reading = None
            if not data:  # the file is shorter
                return
            yield framed(index, data, part)
    finally:
        if reading:  # a thread cannot be cancelled; when it has read, the file is closed

            def close(done: asyncio.Future[memoryview]) -> None:
                done.cancelled() or done.exception()  # heard, whatever it is
                loop.run_in_executor(None, outgoing.close)

            reading.add_done_callback(close)
        elif outgoing.file:
            loop.run_in_executor(None, outgoing.close)


class Outgoing:
    """A file of `size` bytes that leaves in chunks, each of which is valid until the next one is read."""

    def __init__(self, opened: Callable[[], BinaryIO], size: int) -> None:
        """Open nothing yet."""
        self.opened, self.size = opened, size
        self.file: BinaryIO | None = None
        self.buffer = bytearray(min(CHUNK, size))

    def _room(self, start: int) -> memoryview:
        return memoryview(self.buffer)[: min(CHUNK, self.size - start)]

    def cached(self, start: int) -> memoryview:
        """Return the chunk at a byte without waiting for a disk; an empty one where that cannot be."""
        room = self._room(start)
        with suppress(OSError, AttributeError):  # which few systems have
            if self.file and os.preadv(self.file.fileno(), [room], start, os.RWF_NOWAIT) == len(room):
                return room
        return room[:0]

    def read(self, start: int) -> memoryview:
        """Return the chunk at a byte, which is shorter where the file is; it blocks."""
        room = self._room(start)
        self.file = self.file or self.opened()
        self.file.seek(start)
        data = self.file.read(len(room))
        if start + len(data) == self.size:  # in the thread that has read the last one
            self.close()
        room[: len(data)] = data
        return room[: len(data)]

    def close(self) -> None:
        """Close the file; it blocks."""
        if self.file:
            self.file.close()
            self.file = None


def part_of(path: Path) -> Path:
    """Return where a file grows before it has its name."""
    return path.with_suffix(".part")


def arrived(path: Path) -> int:
    """Return how many bytes of a file that is to lie at `path` are here."""
    part = part_of(path)
    return part.stat().st_size if part.exists() else 0


class Incoming:
    """A file that arrives in chunks; all methods block.

    It grows beside `path` and gets that name only when it has the size and the hash that were announced. What
    has come of it stays when the transfer breaks off, and another one goes on from there.
    """

    def __init__(self, path: Path, blob: Blob, offset: int = 0) -> None:
        """Expect `blob` at `path`, of which the first `offset` bytes are here."""
        self.path, self.blob, self.offset = path, blob, offset
        self.hash, self.index, self.size = sha256(), 0, offset
        self.finished = False

    @cached_property
    def file(self) -> BinaryIO:
        """The growing file, opened by the thread that writes it first; raises Interrupted if it is short."""
        file = part_of(self.path).open("r+b" if self.offset and arrived(self.path) else "w+b")
        left = self.offset
        while left and (data := file.read(min(CHUNK, left))):
            self.hash.update(data)
            left -= len(data)
        if left:
            file.close()
            raise Interrupted(f"{self.offset - left} bytes are here, not {self.offset}")
        file.truncate()
        return file

    def add(self, chunk: pb.Chunk | Chunk) -> None:
        """Write the next chunk; raises ProtocolError for a gap, a repetition, an empty or an excess one."""
        if chunk.index != self.index:
            raise ProtocolError(f"chunk {chunk.index} came where chunk {self.index} was expected")
        data = chunk.data  # of protobuf's a copy, each time
        self.size += len(data)
        if not data or len(data) > CHUNK or self.size > self.blob.size:
            raise ProtocolError(f"chunk {chunk.index} has {len(data)} bytes, {self.size} of {self.blob.size}")
        self.file.write(data)  # which, at first, hashes what is here already
        self.hash.update(data)
        self.index += 1
        if self.size == self.blob.size <= CHUNK:  # at once, since to wake another thread takes longer
            self.finish()

    def finish(self) -> None:
        """Give the file its name, once; raises ProtocolError if it is altered, Interrupted if truncated.

        Of a file that came in parts the first may be at fault: Interrupted, and all must come again.
        """
        if self.finished:
            return
        self.file.close()
        if self.size < self.blob.size:  # the stream of a caller that has gone ends like any other
            raise Interrupted(f"{self.size} of {self.blob.size} bytes came")
        if self.hash.hexdigest() != self.blob.sha256:
            problem = (
                f"{self.size} bytes with SHA-256 {self.hash.hexdigest()} came, "
                f"expected {self.blob.size} bytes with {self.blob.sha256}"
            )
            part_of(self.path).unlink()
            raise Interrupted(problem) if self.offset else ProtocolError(problem)
        _name(self.path)
        self.finished = True

    def close(self) -> None:
        """Leave what has arrived as it is."""
        if "file" in vars(self):
            self.file.close()

    def abandon(self) -> None:
        """Remove what has arrived."""
        self.close()
        part_of(self.path).unlink(missing_ok=True)


def put(path: Path, content: bytes) -> None:
    """Put a file that came as a whole in its place; it blocks."""
    part_of(path).write_bytes(content)
    _name(path)


def _name(path: Path) -> None:
    """Give a file that has arrived its name."""
    point("transfer.rename.before")
    os.replace(part_of(path), path)
    point("transfer.rename.after")


async def receive(incoming: Incoming, chunks: AsyncIterator[pb.Chunk | Chunk]) -> None:
    """Write a stream of chunks, all off the event loop, each while the next one is on its way.

    Raises ProtocolError where they are not what was announced, and nothing is left of them; Interrupted where
    what should have been here is not. Nothing is written any more when it returns, or is cancelled.
    """
    loop, step = asyncio.get_running_loop(), None
    try:
        async for chunk in chunks:
            if step:
                await asyncio.shield(step)
            step = loop.run_in_executor(None, incoming.add, chunk)
        if step:
            await asyncio.shield(step)
        if not incoming.finished:
            await asyncio.shield(step := loop.run_in_executor(None, incoming.finish))
    except BaseException as error:
        if step:
            await asyncio.gather(step, return_exceptions=True)  # a thread cannot be cancelled
        wrong = isinstance(error, ProtocolError)
        await asyncio.to_thread(incoming.abandon if wrong else incoming.close)
        raise


def blob_of(file: BinaryIO) -> Blob:
    """Return the address of a file's bytes from its present position."""
    state, size = sha256(), 0
    while data := file.read(CHUNK):
        state.update(data)
        size += len(data)
    return Blob(state.hexdigest(), size)


def moved(blob: Blob, started: float) -> dict[str, object]:
    """Return what the log says of a transfer that began at `started`, a time of `time.perf_counter`."""
    return {"bytes": blob.size, "seconds": round(time.perf_counter() - started, 6)}


def holds(path: Path, blob: Blob) -> bool:
    """Tell whether a file is there with these bytes."""
    if not path.exists():
        return False
    with path.open("rb") as file:
        return blob_of(file) == blob


def reuse_buffers() -> None:
    """Have glibc's malloc keep the memory of chunks for the next ones.

    What is larger than 128 KiB it gives back at once, and has zeroed anew. Of what it keeps, every thread
    may have a store of its own; two serve all here. Elsewhere nothing happens.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 4 * CHUNK)
        libc.mallopt(M_TRIM_THRESHOLD, 8 * CHUNK)
        libc.mallopt(M_ARENA_MAX, 2)
