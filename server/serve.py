"""The coordinator as a process: one port for agents and operators, mutual TLS, a clean stop."""

import asyncio
import logging
import resource
import signal
from contextlib import suppress
from pathlib import Path

from fedcore.crypto.identity import Identity
from fedcore.crypto.tls import server_credentials
from fedcore.errors import ConfigError
from fedcore.server.admission import Sparing
from fedcore.server.coordinator import Coordinator
from fedcore.server.denied import follow
from fedcore.server.operator import OperatorService
from fedcore.server.relay_service import PostService, RelayService
from fedcore.server.service import AgentService
from fedcore.wire import grpc
from fedcore.wire.chunks import reuse_buffers
from fedcore.wire.lenient import Lenient
from fedcore.wire.renewal import keep_renewed
from fedcore.wire.v1.coordinator_pb2_grpc import (
    add_CoordinatorServicer_to_server,
    add_OperatorServicer_to_server,
)
from fedcore.wire.v1.relay_pb2_grpc import add_PostServicer_to_server, add_RelayServicer_to_server

log = logging.getLogger("fedcore.server")

FILES = 4096  # a connection each; uploads, sums and blobs that are mapped
STOP_GRACE = 1.0  # seconds that calls in progress get
OPTIONS = (
    ("grpc.max_receive_message_length", 4 * 2**20),
    ("grpc.max_metadata_size", 8 * 1024),
    ("grpc.max_concurrent_streams", 64),
    # A window that grows with the line's speed takes 10 MB a client, also of those that wait for a place.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 256 * 1024),
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Otherwise a second coordinator on the same port starts without an error and takes half of the calls.
    ("grpc.so_reuseport", 0),
)


async def start_server(coordinator: Coordinator, listen: str) -> tuple[grpc.aio.Server, int]:
    """Return a started server and its port; raises ConfigError where the address cannot be had."""
    server = grpc.aio.server(interceptors=[Lenient(), coordinator.denied], options=OPTIONS)
    agents = AgentService(coordinator)
    add_CoordinatorServicer_to_server(agents, server)
    add_RelayServicer_to_server(RelayService(agents), server)
    add_OperatorServicer_to_server(OperatorService(coordinator), server)
    add_PostServicer_to_server(PostService(coordinator), server)
    try:
        port = server.add_secure_port(listen, server_credentials(lambda: coordinator.identity))
    except RuntimeError as error:
        raise ConfigError(f"cannot listen on {listen}: {error}; choose a free port with --listen") from error
    await server.start()
    return server, port


def allow_files(needed: int = 0) -> None:
    """Let this process open as many files as the system lets it, a connection being one; say if too few."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # macOS allows less than it says
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    if 0 <= soft < needed:
        log.warning(
            "few open files are allowed", extra={"limit": soft, "needed": needed, "raise": "ulimit -n"}
        )


async def serve(folder: Path, identity: Identity, listen: str, database_url: str = "") -> None:
    """Run a coordinator until SIGTERM or Ctrl-C; its runs continue at the next start."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    log.addFilter(Sparing())
    allow_files(FILES)
    reuse_buffers()
    coordinator = Coordinator(folder, identity, database_url)

    async def use(renewed: Identity) -> None:
        coordinator.identity = renewed

    beside = [
        asyncio.create_task(keep_renewed(folder / "identity", identity, use)),
        asyncio.create_task(follow(lambda: coordinator.identity, coordinator.denied, coordinator.expel)),
    ]
    try:
        await coordinator.start()
        server, port = await start_server(coordinator, listen)
        host = listen.rpartition(":")[0]
        log.info("listening", extra={"address": f"{host}:{port}", "federation": identity.name.federation})
        await stop.wait()
        stopping = asyncio.create_task(server.stop(STOP_GRACE))
        coordinator.registry.dismiss()
        coordinator.relay.dismiss()
        await stopping
    finally:
        for task in beside:
            task.cancel()
        await asyncio.gather(*beside, return_exceptions=True)
        await coordinator.close()
    log.info("stopped")
