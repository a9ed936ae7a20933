"""Chunks as bytes, made and read without the copies of a megabyte that protobuf takes, two each way.

    message Chunk { uint32 index = 1; bytes data = 2; }
    message ...Part { oneof part { ...Header header = 1; Chunk chunk = 2; } }

What is made here is what protobuf makes, to the bit; what is not like that is left to protobuf to read.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fedcore.wire.v1 import coordinator_pb2 as pb
from fedcore.wire.v1 import relay_pb2

Parse = Callable[[bytes], Any]
Buffer = bytes | bytearray | memoryview

INDEX, DATA = b"\x08", b"\x12"  # keys of a chunk's fields, as protobuf writes them
PART = DATA  # of a chunk in a part
LONGEST = 4  # bytes of a number, which is below 2^28 then
PARTS = [
    each.FromString for each in (pb.UploadPart, pb.SubmitPart, relay_pb2.ReplyPart, relay_pb2.DepositPart)
]


@dataclass(frozen=True, slots=True)
class Chunk:
    """What `pb.Chunk` tells; the data lies in the message that came."""

    index: int
    data: memoryview


@dataclass(frozen=True, slots=True)
class Part:
    """What a message that has a chunk tells."""

    chunk: Chunk

    def HasField(self, name: str) -> bool:
        """Tell whether a field is set, as protobuf does."""
        return name == "chunk"


def framed(index: int, data: Buffer, part: bool = False) -> bytes:
    """Return a chunk's message, or where `part` is set that of a part with the chunk."""
    head = (INDEX + _varint(index) if index else b"") + DATA + _varint(len(data))
    around = PART + _varint(len(head) + len(data)) if part else b""
    return b"".join((around, head, data))


def quick(parse: Parse) -> Parse:
    """Return what reads as `parse`, a message's `FromString`, does: chunks without a copy."""
    if parse == pb.Chunk.FromString:
        return lambda message: _chunk(message, 0) or parse(message)
    if parse in PARTS:
        return lambda message: _part(message) or parse(message)
    return parse


def ready(serialize: Callable[[Any], bytes]) -> Callable[[Any], bytes]:
    """Return what serializes as `serialize` does, and lets bytes that are a message already pass."""
    return lambda message: message if isinstance(message, bytes) else serialize(message)


class Framing:
    """A gRPC channel, synchronous or not, for stubs whose calls take and give chunks this way."""

    def __init__(self, channel: Any) -> None:
        """Use a channel."""
        self.channel = channel

    def __getattr__(self, kind: str) -> Callable[..., Any]:
        """Return what makes calls of a kind, such as `stream_unary`."""
        make = getattr(self.channel, kind)

        def made(path: str, request_serializer: Any, response_deserializer: Parse, **options: Any) -> Any:
            return make(path, ready(request_serializer), quick(response_deserializer), **options)

        return made


def _part(message: bytes) -> Part | None:
    if message[:1] != PART:
        return None
    size, start = _number(message, 1)
    chunk = _chunk(message, start) if start + size == len(message) else None
    return Part(chunk) if chunk else None


def _chunk(message: bytes, start: int) -> Chunk | None:
    """Return the chunk of which a message consists from `start` on, None for what `framed` has not made."""
    index = 0
    if message[start : start + 1] == INDEX:
        index, start = _number(message, start + 1)
    if message[start : start + 1] != DATA:
        return None
    size, start = _number(message, start + 1)
    return Chunk(index, memoryview(message)[start:]) if start + size == len(message) else None


def _varint(number: int) -> bytes:
    """Return a number as protobuf writes it: seven bits a byte, the lowest first, all but the last marked."""
    low, high = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + _varint(high) if high else bytes([low])


def _number(message: bytes, start: int) -> tuple[int, int]:
    """Return the number at `start` and where it ends; where none ends in time, beyond the message's end."""
    number = 0
    for i, byte in enumerate(message[start : start + LONGEST]):
        number |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            return number, start + i + 1
    return 0, len(message) + 1
