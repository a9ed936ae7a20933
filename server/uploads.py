"""What a round takes as an upload: exactly the bytes that its plan asks for, once a client at a time."""

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from hashlib import sha256

from fedcore.errors import Interrupted, ProtocolError
from fedcore.messages import Blob, Plan, UploadHead


def alone(taken: dict[str, asyncio.Timeout], client: str, of: object) -> None:
    """Raise Interrupted where an upload of a client is under way, and end that one.

    Whoever begins another has lost the first, which this side may not have noticed yet.
    """
    if client in taken:
        end({client: taken[client]})
        raise Interrupted(f"another upload of {client} for {of} is under way; try again")


def end(taken: Mapping[str, asyncio.Timeout]) -> None:
    """End uploads that are under way."""
    for scope in taken.values():
        with suppress(RuntimeError):  # it has just come to its end
            scope.reschedule(0)


def check_head(plan: Plan, head: UploadHead) -> None:
    """Raise ProtocolError unless an upload has the plan's vectors and exactly their bytes."""
    expected = {name: spec.length for name, spec in plan.vectors.items()}
    if dict(head.vectors) != expected:
        raise ProtocolError(f"the update has vectors {dict(head.vectors)}, expected {expected}")
    check_size(head, sum(spec.length * spec.dtype.itemsize for spec in plan.vectors.values()))


def check_hidden(head: UploadHead, size: int) -> None:
    """Raise ProtocolError unless an upload has so many bytes, and its head tells of nothing in them."""
    if head.vectors or head.scalars:
        told = sorted([*dict(head.vectors), *head.scalars])
        raise ProtocolError(f"the head of an encrypted update tells of {told}, expected nothing")
    check_size(head, size)


def check_content(head: UploadHead, content: bytes) -> None:
    """Raise ProtocolError unless these are the bytes that an upload has announced."""
    came, said = Blob(sha256(content).hexdigest(), len(content)), head.payload
    if came != said:
        raise ProtocolError(
            f"{came.size} bytes with SHA-256 {came.sha256} came, "
            f"expected {said.size} bytes with {said.sha256}"
        )


def check_size(head: UploadHead, size: int) -> None:
    """Raise ProtocolError unless an upload has so many bytes."""
    if head.payload.size != size:
        raise ProtocolError(f"the payload has {head.payload.size} bytes, expected {size}")
