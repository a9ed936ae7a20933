"""Bytes that are no message: a service sees the empty one in their place, and refuses that with a reason.

Left to itself, gRPC ends the call with its own words and writes a traceback for everybody who sends garbage.
Bytes that are a chunk, and those that a service says itself, pass as they are (`fedcore.wire.framing`).
"""

from collections.abc import Awaitable, Callable
from typing import Any

from google.protobuf.message import DecodeError

from fedcore.wire import grpc
from fedcore.wire.framing import quick, ready


class Lenient(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # which only the stubs take
    """Stands before the services of a server, none of which takes an empty request for anything."""

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        """Return the handler of a call, with a parser that does not fail."""
        handler = await continuation(handler_call_details)
        return handler and handler._replace(
            request_deserializer=parser(quick(handler.request_deserializer)),
            response_serializer=ready(handler.response_serializer),
        )


def parser(parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """Return what parses as `parse` does, and returns its empty message for what is none."""

    def parsed(content: bytes) -> Any:
        try:
            return parse(content)
        except DecodeError:
            return parse(b"")

    return parsed
