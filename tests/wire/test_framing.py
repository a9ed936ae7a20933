"""Chunks as bytes: what protobuf would make and read, to the bit."""

from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given
from hypothesis import strategies as st

from fedcore.wire.framing import Framing, Part, framed, quick, ready
from fedcore.wire.v1 import coordinator_pb2 as pb
from fedcore.wire.v1.relay_pb2 import DepositPart, ReplyPart

INDICES = st.one_of(st.integers(0, 2**28 - 1), st.sampled_from([0, 1, 127, 128, 16383, 16384]))
SIZES = st.sampled_from([1, 100, 121, 122, 127, 128, 16_370, 16_384, 2_097_152])


@given(INDICES, SIZES)
def test_a_chunk_is_what_protobuf_makes_and_is_read_where_it_lies(index: int, size: int) -> None:
    data = bytes(i % 251 for i in range(100)) * (size // 100 + 1)
    chunk = pb.Chunk(index=index, data=data[:size])
    message = framed(index, bytearray(data[:size]))
    assert message == chunk.SerializeToString()
    read = quick(pb.Chunk.FromString)(message)
    assert (read.index, bytes(read.data), read.data.obj) == (index, data[:size], message)
    for kind in (pb.UploadPart, pb.SubmitPart, ReplyPart, DepositPart):
        message = framed(index, data[:size], part=True)
        assert message == kind(chunk=chunk).SerializeToString()
        part = quick(kind.FromString)(message)
        assert isinstance(part, Part) and part.HasField("chunk") and not part.HasField("header")
        assert (part.chunk.index, bytes(part.chunk.data)) == (index, data[:size])


PIECES = st.one_of(
    st.binary(max_size=12),
    st.sampled_from([b"\x08", b"\x12", b"\x80\x80\x01", b"\xff\xff\xff\xff\x7f", b"\x12\x02\x12\x00"]),
    st.builds(framed, INDICES, st.binary(max_size=4), st.booleans()),
)


@given(st.lists(PIECES, max_size=4).map(b"".join))
@example(b"\x80" * 1000)
@example(b"\x08" + b"\x80" * 9 + b"\x01\x12\x01a")
@example(framed(1, b"a") + framed(2, b"b"))
@example(framed(1, b"a", part=True) + framed(2, b"b", part=True))
@example(pb.UploadPart(header=pb.UploadHeader(scalars={"weight": 1.0})).SerializeToString())
def test_any_other_bytes_are_what_protobuf_takes_them_for(message: bytes) -> None:
    def told(read: Any) -> Any:
        try:
            found = read(message)
        except DecodeError:
            return "nothing"
        chunk = found if read in readers else found.chunk
        return (
            getattr(found, "chunk", None) is None or found.HasField("chunk"),
            chunk.index,
            bytes(chunk.data),
        )

    readers = (pb.Chunk.FromString, quick(pb.Chunk.FromString))
    assert told(readers[1]) == told(readers[0])
    assert told(quick(pb.UploadPart.FromString)) == told(pb.UploadPart.FromString)


def test_bytes_that_are_a_message_pass_and_other_messages_are_left_alone() -> None:
    serialize = ready(pb.Chunk.SerializeToString)
    assert serialize(b"as it is") == b"as it is"
    assert serialize(pb.Chunk(index=3)) == b"\x08\x03"
    assert quick(pb.RunName.FromString) == pb.RunName.FromString


@pytest.mark.parametrize("kind", ["unary_stream", "stream_unary"])
def test_calls_of_a_stub_take_and_give_them(kind: str) -> None:
    class Channel:
        def __getattr__(self, asked: str) -> Any:
            assert asked == kind
            return lambda path, *both, _registered_method: (path, *both)

    make = getattr(Framing(Channel()), kind)
    path, serialize, parse = make(
        "/a/b",
        request_serializer=pb.Wanted.SerializeToString,
        response_deserializer=pb.Chunk.FromString,
        _registered_method=True,
    )
    assert path == "/a/b" and serialize(b"bytes") == b"bytes"
    assert isinstance(parse(framed(0, b"data")).data, memoryview)
