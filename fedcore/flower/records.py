"""A Flower RecordDict as bytes, and back: what travels is read, never executed.

    u32        length of the header, little-endian
    header     JSON: {name: [kind, {key: value}]}
    the rest   what the header counts, in its order: the data of the arrays, and values that are bytes

An array is [dtype, shape, stype, length], a value of bytes {"bytes": length}, a list of such {"bytes":
[length, ...]}, and anything else is itself. Numbers, text and the order of keys come back exactly; so do nan
and the infinities, which this JSON spells as Python does.
"""

import json
from collections.abc import Callable
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedcore.errors import ProtocolError
from fedcore.flower.arrays import made

HEADER_BYTES = 2**26  # a million numbers in a list are 20 MB

Record = ArrayRecord | MetricRecord | ConfigRecord
Take = Callable[[int], bytes]  # the next so many bytes of what the header counts

KINDS: dict[str, type[Record]] = {"arrays": ArrayRecord, "metrics": MetricRecord, "config": ConfigRecord}


def pack(record: RecordDict) -> bytes:
    """Return the bytes of a record, which is left as it is."""
    header: dict[str, Any] = {}
    parts: list[bytes] = []
    for name, of in record.items():
        items: dict[str, Any]
        if isinstance(of, ArrayRecord):
            items = {key: [a.dtype, a.shape, a.stype, len(a.data)] for key, a in of.items()}
            parts += [array.data for array in of.values()]
            header[name] = ["arrays", items]
        else:
            items = {key: _spelled(value, parts) for key, value in of.items()}
            header[name] = ["metrics" if isinstance(of, MetricRecord) else "config", items]
    text = json.dumps(header, separators=(",", ":")).encode()
    return b"".join((len(text).to_bytes(4, "little"), text, *parts))


def unpack(data: bytes | memoryview) -> RecordDict:
    """Return a new record that shares nothing with any other; raises ProtocolError where it cannot."""
    view = memoryview(data)
    size = int.from_bytes(view[:4], "little")
    if len(view) < 4 or size > min(len(view) - 4, HEADER_BYTES):
        raise ProtocolError(f"a record of {len(view)} bytes says that its header has {size}")
    place = 4 + size

    def take(length: int) -> bytes:
        nonlocal place
        if type(length) is not int or not 0 <= length <= len(view) - place:
            raise ValueError(f"{length!r} bytes where {len(view) - place} are left")
        place += length
        return bytes(view[place - length : place])

    record = RecordDict()
    try:
        for name, (kind, items) in json.loads(str(view[4:place], "utf-8")).items():
            of: Any = KINDS[kind]()
            record[name] = of
            for key, value in items.items():
                of[key] = _array(value, take) if kind == "arrays" else _value(value, take)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ProtocolError(f"a record that cannot be read: {error}") from error
    if place != len(view):
        raise ProtocolError(f"a record has {len(view) - place} bytes that its header does not count")
    return record


def _spelled(value: Any, parts: list[bytes]) -> Any:
    """Return how a value is written in the header; bytes go to the parts."""
    if isinstance(value, bytes):
        parts.append(value)
        return {"bytes": len(value)}
    if isinstance(value, list) and value and isinstance(value[0], bytes):
        parts += value
        return {"bytes": [len(part) for part in value]}
    return value


def _array(fields: Any, take: Take) -> Array:
    dtype, shape, stype, length = fields
    if not (type(dtype) is type(stype) is str and all(type(size) is int for size in shape)):
        raise ValueError(f"an array of dtype {dtype!r}, shape {shape!r} and stype {stype!r}")
    return made(dtype, tuple(shape), stype, take(length))


def _value(value: Any, take: Take) -> Any:
    if type(value) is not dict:
        return value
    lengths = value["bytes"]
    return [take(length) for length in lengths] if isinstance(lengths, list) else take(lengths)
