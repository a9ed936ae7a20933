"""Chunks: what arrives is what was announced, or nothing is left."""

import asyncio
import io
import os
import threading
from collections.abc import AsyncIterator
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.errors import Interrupted, ProtocolError
from fedcore.messages import Blob
from fedcore.wire.chunks import CHUNK, Incoming, arrived, blob_of, chunks, receive, stream
from fedcore.wire.v1 import coordinator_pb2 as pb


def blob(data: bytes) -> Blob:
    return Blob(sha256(data).hexdigest(), len(data))


@given(st.integers(0, 3).flatmap(lambda n: st.sampled_from([n * CHUNK, n * CHUNK + 1, n * CHUNK + 4711])))
def test_a_file_arrives_as_it_was(tmp_path_factory: pytest.TempPathFactory, size: int) -> None:
    data = bytes(size % 251 + i % 7 for i in range(64)) * (size // 64 + 1)
    data = data[:size]
    parts = list(chunks(io.BytesIO(data)))
    assert [part.index for part in parts] == list(range(-(-size // CHUNK)))
    incoming = Incoming(tmp_path_factory.mktemp("in") / "file", blob(data))
    for part in parts:
        incoming.add(part)
    incoming.finish()
    assert incoming.path.read_bytes() == data
    assert list(incoming.path.parent.iterdir()) == [incoming.path]
    assert blob_of(io.BytesIO(data)) == blob(data)


def test_chunks_begin_where_the_file_stands() -> None:
    file = io.BytesIO(b"head and tail")
    file.seek(5)
    assert [part.data for part in chunks(file)] == [b"and tail"]


@given(st.integers(0, 3 * CHUNK), st.integers(0, 3 * CHUNK))
def test_chunks_end_where_they_should(length: int, size: int) -> None:
    parts = list(chunks(io.BytesIO(bytes(length)), size))
    assert sum(len(part.data) for part in parts) == min(length, size)
    assert [part.index for part in parts] == list(range(len(parts)))


def test_a_file_is_closed_even_where_its_reader_goes_while_it_is_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"data")
    opened: list[BinaryIO] = []
    going = threading.Event()

    def slow() -> BinaryIO:
        going.wait(10)
        opened.append((tmp_path / "file").open("rb"))
        return opened[0]

    async def run() -> None:
        reader = asyncio.ensure_future(anext(stream(slow, 4)))
        await asyncio.sleep(0.01)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        going.set()
        while not opened or not opened[0].closed:  # noqa: ASYNC110 - another thread's doing
            await asyncio.sleep(0.001)

    asyncio.run(asyncio.wait_for(run(), 10))


@pytest.mark.parametrize("asks_the_cache", [True, False])
@pytest.mark.parametrize(
    ("size", "offset"), [(0, 0), (10, 3), (CHUNK, 0), (2 * CHUNK + 5, 7), (CHUNK, CHUNK)]
)
def test_a_file_is_streamed_as_messages_and_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, offset: int, asks_the_cache: bool
) -> None:
    (tmp_path / "file").write_bytes(some(size))
    opened: list[BinaryIO] = []
    if not asks_the_cache:
        monkeypatch.delattr(os, "RWF_NOWAIT", raising=False)

    def open_it() -> BinaryIO:
        opened.append((tmp_path / "file").open("rb"))
        return opened[0]

    async def run(announced: int, part: bool) -> list[bytes]:
        return [message async for message in stream(open_it, announced, offset, part)]

    expected = list(chunks(io.BytesIO(some(size)[offset:])))
    for announced in (size, size + 1):  # which is more than there is
        found = asyncio.run(run(announced, part=False))
        assert [pb.Chunk.FromString(message) for message in found] == expected
        assert all(file.closed for file in opened)  # when the loop has ended, so have its threads
        opened.clear()
    assert [pb.UploadPart.FromString(each).chunk for each in asyncio.run(run(size, part=True))] == expected


def some(size: int) -> bytes:
    return bytes(i % 251 for i in range(size % CHUNK)) + bytes(size // CHUNK * CHUNK)


@settings(max_examples=20)
@given(st.integers(0, 3 * CHUNK), st.lists(st.integers(0, CHUNK), max_size=4))
def test_a_file_that_comes_in_parts_is_whole_and_nothing_comes_twice(
    tmp_path_factory: pytest.TempPathFactory, size: int, cuts: list[int]
) -> None:
    path, data, travelled = tmp_path_factory.mktemp("in") / "a.update", some(size), 0

    async def part(offset: int, length: int | None) -> None:
        async def some_of_it() -> AsyncIterator[pb.Chunk]:
            nonlocal travelled
            for chunk in chunks(io.BytesIO(data[offset:]), length):
                travelled += len(chunk.data)
                yield chunk
            if length is not None:
                raise ConnectionError

        await receive(Incoming(path, blob(data), offset), some_of_it())

    for length in cuts:
        with pytest.raises(ConnectionError):
            asyncio.run(part(arrived(path), length))
    asyncio.run(part(arrived(path), None))
    assert path.read_bytes() == data and (travelled == size or size <= CHUNK)  # too little to be spared
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("there", "said"), [(b"", "0 bytes are here, not 4"), (b"xx", "2 bytes are"), (b"yxxx", "came, expected")]
)
def test_a_first_part_that_is_not_what_was_sent_is_sent_again(
    tmp_path: Path, there: bytes, said: str
) -> None:
    """Whoever is at fault, it is not the sender's second part."""
    (tmp_path / "file.part").write_bytes(there)
    incoming = Incoming(tmp_path / "file", blob(DATA), offset=4)
    with pytest.raises(Interrupted, match=said):
        incoming.add(pb.Chunk(index=0, data=DATA[4:]))
        incoming.finish()
    incoming.close()
    incoming = Incoming(tmp_path / "file", blob(DATA))
    incoming.add(pb.Chunk(index=0, data=DATA))
    incoming.finish()
    assert (tmp_path / "file").read_bytes() == DATA


DATA = b"x" * 10
WRONG = {
    "gap": ([pb.Chunk(index=1, data=DATA)], "chunk 1 came where chunk 0 was expected"),
    "repeated": ([pb.Chunk(index=0, data=b"x"), pb.Chunk(index=0, data=b"x")], "chunk 0 came where chunk 1"),
    "empty": ([pb.Chunk(index=0)], "chunk 0 has 0 bytes"),
    "excess": ([pb.Chunk(index=0, data=DATA + b"x")], "11 of 10"),
    "oversize": ([pb.Chunk(index=0, data=b"x" * (CHUNK + 1))], f"{CHUNK + 1} bytes"),
    "truncated": ([pb.Chunk(index=0, data=DATA[1:])], "9 of 10 bytes came"),
    "altered": ([pb.Chunk(index=0, data=b"y" * 10)], "expected 10 bytes"),
    "missing": ([], "0 of 10 bytes came"),
}


@pytest.mark.parametrize(("parts", "said"), WRONG.values(), ids=WRONG)
def test_anything_else_is_refused_and_leaves_nothing(
    tmp_path: Path, parts: list[pb.Chunk], said: str
) -> None:
    announced = Blob(blob(DATA).sha256, 2 * CHUNK if said.startswith(str(CHUNK)) else len(DATA))
    incoming = Incoming(tmp_path / "file", announced)
    with pytest.raises((ProtocolError, Interrupted), match=said):
        for part in parts:
            incoming.add(part)
        incoming.finish()
    incoming.abandon()
    assert not list(tmp_path.iterdir())
