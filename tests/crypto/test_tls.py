"""Real handshakes on loopback: who gets in, and who is let in."""

import asyncio
import os
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from fedcore.crypto.identity import Identity
from fedcore.crypto.names import Name, Role
from fedcore.crypto.tls import Context, open_channel, peer_name, require, server_credentials
from fedcore.errors import AuthenticationError
from fedcore.server.authority import Authority
from fedcore.wire import SUITES, VARIABLE, grpc

METHOD = "/test.Who/AmI"


async def who_am_i(request: bytes, context: Context) -> bytes:
    return str(await require(context, "client", "operator")).encode()


@asynccontextmanager
async def serving(identity: Identity) -> AsyncIterator[int]:
    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(who_am_i)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Who", {"AmI": handler}),))
    port = server.add_secure_port("127.0.0.1:0", server_credentials(lambda: identity))
    await server.start()
    try:
        yield port
    finally:
        await server.stop(0)


async def call(channel: grpc.aio.Channel) -> tuple[grpc.StatusCode, str]:
    async with channel:
        try:
            answer = await channel.unary_unary(METHOD, None, None)(b"", timeout=10)
        except grpc.aio.AioRpcError as error:
            return error.code(), error.details() or ""
        return grpc.StatusCode.OK, answer.decode()


def ask(server: Identity, caller: Identity) -> tuple[grpc.StatusCode, str]:
    async def run() -> tuple[grpc.StatusCode, str]:
        async with serving(server) as port:
            return await call(open_channel(f"127.0.0.1:{port}", caller))

    return asyncio.run(run())


def authority(folder: Path, age: timedelta = timedelta()) -> Authority:
    return Authority.create(folder, "fed", "127.0.0.1:8700", clock=lambda: datetime.now(UTC) - age)


def identity(authority: Authority, role: Role, name: str = "x") -> Identity:
    return authority.new_identity(Name(authority.federation, role, name))


def test_both_sides_know_each_other(tmp_path: Path) -> None:
    a = authority(tmp_path)
    assert ask(identity(a, "coordinator"), identity(a, "client", "hospital-1")) == (
        grpc.StatusCode.OK,
        "fedcore://fed/client/hospital-1",
    )


def test_a_role_that_a_method_does_not_allow_is_refused(tmp_path: Path) -> None:
    a = authority(tmp_path)
    code, details = ask(identity(a, "coordinator"), identity(a, "coordinator", "other"))
    assert code is grpc.StatusCode.PERMISSION_DENIED
    assert details == "fedcore://fed/coordinator/other is no client or operator"


def test_a_caller_without_a_certificate_is_refused(tmp_path: Path) -> None:
    a = authority(tmp_path)

    async def run() -> tuple[grpc.StatusCode, str]:
        async with serving(identity(a, "coordinator")) as port:
            credentials = grpc.ssl_channel_credentials(identity(a, "client").root)
            options = (("grpc.ssl_target_name_override", "coordinator.fed.fedcore"),)
            return await call(grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials, options))

    assert asyncio.run(run())[0] is grpc.StatusCode.UNAVAILABLE


def test_another_federation_is_refused_on_either_side(tmp_path: Path) -> None:
    ours, theirs = authority(tmp_path / "a"), authority(tmp_path / "b")
    client, coordinator = identity(theirs, "client"), identity(ours, "coordinator")
    assert ask(coordinator, client)[0] is grpc.StatusCode.UNAVAILABLE
    # The caller above already turned the server down, so let it trust ours and keep its own certificate.
    fooled = replace(client, root=coordinator.root)
    assert ask(coordinator, fooled)[0] is grpc.StatusCode.UNAVAILABLE


def test_an_expired_certificate_is_refused_on_either_side(tmp_path: Path) -> None:
    old = authority(tmp_path, age=timedelta(days=40))
    young = Authority.load(tmp_path)
    code, details = ask(identity(old, "coordinator"), identity(young, "client"))
    assert code is grpc.StatusCode.UNAVAILABLE and "expired" in details
    assert ask(identity(young, "coordinator"), identity(old, "client"))[0] is grpc.StatusCode.UNAVAILABLE
    assert ask(identity(young, "coordinator"), identity(young, "client"))[0] is grpc.StatusCode.OK


@pytest.mark.parametrize("role", ["client", "operator", "authority"])
def test_nobody_else_can_pose_as_the_coordinator(tmp_path: Path, role: Role) -> None:
    a = authority(tmp_path)
    assert ask(identity(a, role), identity(a, "client"))[0] is grpc.StatusCode.UNAVAILABLE


def tls_context(caller: Identity, folder: Path, version: ssl.TLSVersion) -> ssl.SSLContext:
    caller.save(folder)
    context = ssl.create_default_context(cafile=str(folder / "ca.pem"))
    context.load_cert_chain(folder / "identity.pem")
    context.set_alpn_protocols(["h2"])
    context.minimum_version = context.maximum_version = version
    return context


def handshake(context: ssl.SSLContext, port: int) -> tuple[str | None, bytes]:
    """Return the protocol, and the first bytes after the handshake, which prove that we were let in."""
    with (
        socket.create_connection(("127.0.0.1", port), timeout=10) as raw,
        context.wrap_socket(raw, server_hostname="coordinator.fed.fedcore") as wrapped,
    ):
        return wrapped.version(), wrapped.recv(9)


def test_tls_1_3_is_spoken_and_tls_1_2_is_not(tmp_path: Path) -> None:
    a = authority(tmp_path / "authority")
    client = identity(a, "client")
    new, old = (
        tls_context(client, tmp_path / v.name, v) for v in (ssl.TLSVersion.TLSv1_3, ssl.TLSVersion.TLSv1_2)
    )

    async def run() -> None:
        async with serving(identity(a, "coordinator")) as port:
            version, settings_frame = await asyncio.to_thread(handshake, new, port)
            assert version == "TLSv1.3" and len(settings_frame) == 9
            with pytest.raises(ssl.SSLError, match=r"EOF|HANDSHAKE_FAILURE"):
                await asyncio.to_thread(handshake, old, port)

    asyncio.run(run())


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if key != VARIABLE}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=clean | environment, capture_output=True, text=True, timeout=60)


def test_a_handshake_does_not_replace_what_another_one_uses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gRPC frees the last configuration for a new one; at every handshake, that crashed the server."""
    fetchers: list[Callable[[], object]] = []
    made = grpc.dynamic_ssl_server_credentials

    def noted(first: Any, fetcher: Any, **options: bool) -> grpc.ServerCredentials:
        fetchers.append(fetcher)
        return made(first, fetcher, **options)

    monkeypatch.setattr(grpc, "dynamic_ssl_server_credentials", noted)
    fed = authority(tmp_path)
    shown = [identity(fed, "coordinator")]
    server_credentials(lambda: shown[0])
    assert fetchers[0]() is None
    shown[0] = identity(fed, "coordinator")
    assert fetchers[0]() is not None and fetchers[0]() is None


@pytest.mark.parametrize(
    "module", ["fedcore.crypto.tls", "fedcore.wire.enrolment", "fedcore.server.authority_service"]
)
def test_every_way_in_sets_the_suites_before_grpc(module: str) -> None:
    done = python(f"import {module}, os, sys; print('grpc' in sys.modules, os.environ['{VARIABLE}'])")
    assert done.stdout.split() == ["True", SUITES], done.stderr


def test_grpc_imported_too_early_is_said() -> None:
    late = "import grpc; from fedcore.wire import grpc"
    assert "import fedcore.wire first, or export" in python(late).stderr
    assert python(late, **{VARIABLE: SUITES}).returncode == 0
    assert python(late, **{VARIABLE: "HIGH"}).returncode == 1


def test_a_simulation_needs_no_grpc_and_bears_one_that_came_first() -> None:
    assert python("import sys, fedcore; fedcore.simulate; assert 'grpc' not in sys.modules").returncode == 0
    assert python("import grpc, fedcore; fedcore.simulate").returncode == 0


class Caller:
    """A context that TLS has verified some certificate for."""

    def __init__(self, **properties: list[bytes]) -> None:
        self.properties = properties

    def auth_context(self) -> Any:
        return self.properties

    peer = abort = None


@pytest.mark.parametrize("uris", [[], [b"spiffe://fed/client/a"], [b"fedcore://fed/client/a"] * 2, [b"\xff"]])
def test_a_caller_has_exactly_one_name(uris: list[bytes]) -> None:
    caller = Caller(
        peer_uri=uris, x509_common_name=[b"a"], x509_subject_alternative_name=[b"fedcore://fed/client/a"]
    )
    with pytest.raises(AuthenticationError, match="names nobody in a federation"):
        peer_name(caller)  # type: ignore[arg-type]
