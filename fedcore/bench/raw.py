"""What the machine gives: gRPC over mutual TLS with nothing at either end of a stream, and plain writes."""

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import typer

from fedcore.crypto.identity import Identity
from fedcore.crypto.tls import open_channel, server_credentials
from fedcore.loopback import free_port
from fedcore.server.serve import OPTIONS
from fedcore.wire import grpc
from fedcore.wire.chunks import CHUNK


def streams(coordinator: Path, clients: list[Path], size: int) -> tuple[float, float]:
    """Return the rates at which clients send `size` bytes each, and get them, at once; bytes a second each.

    coordinator, clients: folders of identities. Every side is a process of its own, as in a federation.
    """
    command = [sys.executable, "-m", "fedcore.bench.raw", str(size), f"127.0.0.1:{free_port()}"]
    serving = subprocess.Popen([*command, "serve", coordinator], stdout=subprocess.PIPE)
    try:
        assert serving.stdout
        serving.stdout.readline()  # it listens
        pipe = subprocess.PIPE
        sending = [subprocess.Popen([*command, "send", each], stdin=pipe, stdout=pipe) for each in clients]
        up, down = (_together(sending) for _ in range(2))
        for process in sending:
            process.communicate()
    finally:
        serving.kill()
        serving.communicate()
    return size / up, size / down


def _together(sending: list[subprocess.Popen[bytes]]) -> float:
    """Have clients that are ready begin at the same moment; return the median of their seconds."""
    for process in sending:
        assert process.stdin and process.stdout
        process.stdout.readline()
    for process in sending:
        assert process.stdin
        process.stdin.write(b"now\n")
        process.stdin.flush()
    return median(float(process.stdout.readline()) for process in sending if process.stdout)


def write_rate(folder: Path, size: int) -> float:
    """Return the rate at which a file is written, without waiting for the disk; bytes a second."""
    path, chunk = folder / "raw", bytes(CHUNK)
    started = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in _chunks(size):
            file.write(chunk)
    seconds = time.perf_counter() - started
    path.unlink()
    return size / seconds


def _chunks(size: int) -> Iterator[bytes]:
    yield from [bytes(CHUNK)] * -(-size // CHUNK)


async def _drain(requests: AsyncIterator[bytes], context: Any) -> bytes:
    async for _ in requests:
        pass
    return b""


async def _pour(size: int, request: bytes, context: Any) -> AsyncIterator[bytes]:
    for chunk in _chunks(size):
        yield chunk


async def serve(size: int, address: str, identity: Identity) -> None:
    """Take and give streams until killed."""
    methods = {
        "Up": grpc.stream_unary_rpc_method_handler(_drain),
        "Down": grpc.unary_stream_rpc_method_handler(partial(_pour, size)),
    }
    server = grpc.aio.server(options=OPTIONS)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("raw", methods)])
    server.add_secure_port(address, server_credentials(lambda: identity))
    await server.start()
    typer.echo("listening")
    await server.wait_for_termination()


async def send(size: int, address: str, identity: Identity) -> None:
    """Send a stream, then get one, when told to on standard input; print the seconds of each."""
    async with open_channel(address, identity, options=OPTIONS) as channel:
        up = channel.stream_unary("/raw/Up", None, None)
        down = channel.unary_stream("/raw/Down", None, None)

        async def get() -> None:
            async for _ in down(b""):
                pass

        for move in (lambda: up(_chunks(size)), get):
            await move()  # warms up
            typer.echo("ready")
            await asyncio.to_thread(sys.stdin.readline)
            started = time.perf_counter()
            await move()
            typer.echo(time.perf_counter() - started)


if __name__ == "__main__":
    sides = {"serve": serve, "send": send}
    asyncio.run(sides[sys.argv[3]](int(sys.argv[1]), sys.argv[2], Identity.load(Path(sys.argv[4]))))
