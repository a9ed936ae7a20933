"""Revoked and expired certificates, over real connections: before a call, amid it, after a restart."""

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import pytest
from cryptography import x509

from fedcore.crypto.certificates import serial_of
from fedcore.crypto.identity import Identity
from fedcore.crypto.names import Name, Role
from fedcore.crypto.tls import Context, open_channel, require, server_credentials
from fedcore.errors import AuthenticationError, ConfigError
from fedcore.server.authority import Authority
from fedcore.server.authority_service import start_service
from fedcore.server.denied import Denied, deny_lists, follow
from fedcore.wire import grpc
from fedcore.wire.signing import sign
from fedcore.wire.v1 import authority_pb2 as pb
from fedcore.wire.v1.authority_pb2_grpc import AuthorityServicer, add_AuthorityServicer_to_server
from tests.server.conftest import Federation, Running, silent, spec_of
from tests.server.conftest import until as soon

CLIENT = Name("fed", "client", "hospital-1")
Call = Callable[[grpc.aio.Channel], Any]


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.create(tmp_path / "authority", "fed", "127.0.0.1:8700")


def named(authority: Authority, role: Role, name: str) -> Identity:
    return authority.new_identity(Name("fed", role, name))


def revoked(*identities: Identity) -> dict[str, tuple[str, float]]:
    """Return a deny-list as the coordinator understands it."""
    leaves = [(each, x509.load_pem_x509_certificate(each.chain)) for each in identities]
    return {serial_of(leaf): (str(each.name), each.not_after.timestamp()) for each, leaf in leaves}


@dataclass
class Service:
    """One method of each kind; all but the first go on until they are ended."""

    ended: list[str] = field(default_factory=list)
    begun: asyncio.Event = field(default_factory=asyncio.Event)

    async def name(self, request: bytes, context: Context) -> bytes:
        return str(await require(context, "client")).encode()

    async def collect(self, requests: AsyncIterator[bytes], context: Context) -> bytes:
        async with self._noting("collect"):
            return b"".join([part async for part in requests])

    async def pour(self, request: bytes, context: Context) -> AsyncIterator[bytes]:
        async with self._noting("pour"):
            while True:
                yield bytes(2**20)

    async def talk(self, requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
        async with self._noting("talk"):
            async for request in requests:
                yield request

    @asynccontextmanager
    async def _noting(self, method: str) -> AsyncIterator[None]:
        self.begun.set()
        try:
            yield
        finally:
            self.ended.append(method)

    def handlers(self) -> Any:
        methods = {
            "name": grpc.unary_unary_rpc_method_handler(self.name),
            "collect": grpc.stream_unary_rpc_method_handler(self.collect),
            "pour": grpc.unary_stream_rpc_method_handler(self.pour),
            "talk": grpc.stream_stream_rpc_method_handler(self.talk),
        }
        return grpc.method_handlers_generic_handler("test", methods)


@asynccontextmanager
async def guarded(authority: Authority, denied: Denied) -> AsyncIterator[tuple[Service, str]]:
    """Serve under a guard; yield the service and its address."""
    service, server = Service(), grpc.aio.server(interceptors=[denied])
    server.add_generic_rpc_handlers((service.handlers(),))
    coordinator = named(authority, "coordinator", "main")
    port = server.add_secure_port("127.0.0.1:0", server_credentials(lambda: coordinator))
    await server.start()
    try:
        yield service, f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


async def outcome(call: Any) -> tuple[grpc.StatusCode, str]:
    """Return how a call ends, once all that was sent before is read."""
    async with asyncio.timeout(10):
        with suppress(grpc.aio.AioRpcError):
            while hasattr(call, "read") and await call.read():
                pass
        return await call.code(), await call.details()


def name(channel: grpc.aio.Channel) -> Any:
    return channel.unary_unary("/test/name", None, None)(b"")


def collect(channel: grpc.aio.Channel) -> Any:
    return cast(Any, channel.stream_unary("/test/collect", None, None))()


def pour(channel: grpc.aio.Channel) -> Any:
    return channel.unary_stream("/test/pour", None, None)(b"")


def talk(channel: grpc.aio.Channel) -> Any:
    return cast(Any, channel.stream_stream("/test/talk", None, None))()


def test_a_revoked_caller_is_refused_and_nobody_else(authority: Authority, tmp_path: Path) -> None:
    one, other = named(authority, "client", "hospital-1"), named(authority, "client", "hospital-2")

    async def run() -> None:
        denied = Denied(tmp_path / "denied.json")
        async with guarded(authority, denied) as (_, address):
            async with open_channel(address, one) as mine, open_channel(address, other) as theirs:
                assert await name(mine) == str(CLIENT).encode()
                assert denied.add(revoked(one)) == {CLIENT}
                code, details = await outcome(name(mine))  # on the connection that is there
                assert code is grpc.StatusCode.UNAUTHENTICATED
                assert details == "the certificate of fedcore://fed/client/hospital-1 was revoked"
                assert await name(theirs)
            async with open_channel(address, one) as again:
                assert (await outcome(name(again)))[0] is grpc.StatusCode.UNAUTHENTICATED
            # Whose device is taken in again shows another certificate.
            async with open_channel(address, named(authority, "client", "hospital-1")) as anew:
                assert await name(anew)

    asyncio.run(run())


@pytest.mark.parametrize("method", [collect, pour, talk])
def test_a_call_in_progress_ends_when_its_certificate_is_revoked(
    authority: Authority, tmp_path: Path, method: Call
) -> None:
    """An upload, a download that its reader holds up, and a stream of both."""
    caller = named(authority, "client", "hospital-1")

    async def run() -> None:
        denied = Denied(tmp_path / "denied.json")
        async with guarded(authority, denied) as (service, address), open_channel(address, caller) as channel:
            call = method(channel)
            await service.begun.wait()
            await asyncio.sleep(0.1)  # unread, the download fills the connection's windows, and waits
            assert not call.done() and service.ended == []
            denied.add(revoked(caller))
            await until(lambda: service.ended == [method.__name__] and not denied.calls, 2)
            code, details = await outcome(call)
            assert code is grpc.StatusCode.UNAUTHENTICATED and details.endswith("hospital-1 was revoked")

    asyncio.run(run())


@pytest.mark.parametrize("method", [collect, pour, talk])
def test_a_call_in_progress_ends_when_its_certificate_does(
    authority: Authority, tmp_path: Path, method: Call
) -> None:
    caller = named(replace(authority, lifetime=timedelta(seconds=2)), "client", "hospital-1")

    async def run() -> None:
        denied = Denied(tmp_path / "denied.json")
        async with guarded(authority, denied) as (_, address), open_channel(address, caller) as channel:
            call = method(channel)
            code, details = await outcome(call)
            assert code is grpc.StatusCode.UNAUTHENTICATED and details.endswith("hospital-1 has expired")
            assert (await outcome(name(channel)))[0] is grpc.StatusCode.UNAUTHENTICATED

    asyncio.run(run())


def test_a_call_that_fails_or_is_cancelled_leaves_nothing_behind(
    authority: Authority, tmp_path: Path
) -> None:
    operator = named(authority, "operator", "alice")

    async def run() -> None:
        denied = Denied(tmp_path / "denied.json")
        async with (
            guarded(authority, denied) as (service, address),
            open_channel(address, operator) as channel,
        ):
            assert (await outcome(name(channel)))[0] is grpc.StatusCode.PERMISSION_DENIED
            unknown = channel.unary_unary("/test/nothing", None, None)(b"")
            assert (await outcome(unknown))[0] is grpc.StatusCode.UNIMPLEMENTED
            call = talk(channel)
            await service.begun.wait()
            call.cancel()
            await until(lambda: not denied.calls, 5)

    asyncio.run(run())


def test_a_certificate_may_be_denied_while_a_call_ends_because_it_has_expired(
    authority: Authority, tmp_path: Path
) -> None:
    one = named(authority, "client", "hospital-1")

    async def run() -> None:
        denied = Denied(tmp_path / "denied.json")
        with suppress(TimeoutError):
            async with asyncio.timeout(0) as ending:
                await asyncio.sleep(10)
        denied.calls[next(iter(revoked(one)))] = {ending}
        assert denied.add(revoked(one)) == {CLIENT}

    asyncio.run(run())


# --- what is kept


def test_a_restart_without_the_authority_still_refuses(authority: Authority, tmp_path: Path) -> None:
    """And no later list can take a revocation back: a copy of older books would."""
    one, other = named(authority, "client", "hospital-1"), named(authority, "client", "hospital-2")
    file = tmp_path / "denied.json"

    async def run() -> None:
        first = Denied(file)
        first.add(revoked(one))
        first.save()
        denied = Denied(file)
        assert denied.add(revoked(one)) == set()
        assert denied.add(revoked(other)) == {other.name}
        assert denied.add({}) == set()
        denied.save()
        async with guarded(authority, Denied(file)) as (_, address):
            for caller in (one, other):
                async with open_channel(address, caller) as channel:
                    assert (await outcome(name(channel)))[0] is grpc.StatusCode.UNAUTHENTICATED

    asyncio.run(run())
    assert file.stat().st_mode & 0o777 == 0o600


def test_an_expired_entry_is_forgotten(authority: Authority, tmp_path: Path) -> None:
    one = named(authority, "client", "hospital-1")
    denied = Denied(tmp_path / "denied.json", lambda: one.not_after - timedelta(seconds=1))
    denied.add(revoked(one))
    assert denied.revoked == revoked(one)
    denied.clock = lambda: one.not_after
    denied.add({})
    assert denied.revoked == {}


@pytest.mark.parametrize("content", ["{", "[]", '{"00": 1}', '{"00": ["fedcore://fed/client/a", "never"]}'])
def test_a_damaged_file_is_said(tmp_path: Path, content: str) -> None:
    (tmp_path / "denied.json").write_text(content)
    with pytest.raises(ConfigError, match=r"denied.json is damaged: .*; remove it, and start the authority"):
        Denied(tmp_path / "denied.json")


# --- what the authority tells


@asynccontextmanager
async def following(authority: Authority, denied: Denied) -> AsyncIterator[list[Name]]:
    """Follow the authority's deny-list; yield whom it has expelled."""
    expelled: list[Name] = []
    coordinator = named(authority, "coordinator", "main")
    task = asyncio.create_task(follow(lambda: coordinator, denied, expelled.append))
    try:
        yield expelled
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def until(holds: Callable[[], object], seconds: float) -> None:
    async with asyncio.timeout(seconds):
        while not holds():  # noqa: ASYNC110 - a guard and a log have no event
            await asyncio.sleep(0.01)


def test_it_is_heard_within_a_moment_and_again_after_the_authority_was_away(
    authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one, other = named(authority, "client", "hospital-1"), named(authority, "client", "hospital-2")
    caplog.set_level(logging.INFO)

    async def run() -> None:
        denied = Denied(tmp_path / "denied.json")
        server, port = await start_service(authority, "127.0.0.1:0")
        at = replace(authority, address=f"127.0.0.1:{port}")
        async with following(at, denied) as expelled:
            await asyncio.sleep(0.3)
            at.revoke(one.name)  # as another process does
            await until(lambda: expelled == [one.name], 2)
            await server.stop(0)
            await until(lambda: "the last list holds" in caplog.text, 5)
            at.revoke(other.name)
            assert set(denied.revoked) == set(Denied(denied.file).revoked) == set(revoked(one))
            server, _ = await start_service(authority, f"127.0.0.1:{port}")
            await until(lambda: expelled == [one.name, other.name], 5)
            assert caplog.text.count("the last list holds") == 1 and "tells again who was" in caplog.text
            await server.stop(0)

    asyncio.run(run())


def test_a_list_that_the_authority_has_not_signed_is_not_believed(authority: Authority) -> None:
    """Even from a server that shows the authority's certificate."""
    mallory = named(authority, "client", "mallory")

    class Forger(AuthorityServicer):
        async def Denied(self, request: pb.Signed, context: Context) -> AsyncIterator[pb.Signed]:
            entry = pb.DeniedCertificate(serial="00" * 20, name=str(CLIENT), not_after=2**40)
            yield sign(mallory, pb.DenyList(certificates=[entry]))

    async def run() -> None:
        server, shown = grpc.aio.server(), named(authority, "authority", "enrolment")
        add_AuthorityServicer_to_server(Forger(), server)
        port = server.add_secure_port("127.0.0.1:0", server_credentials(lambda: shown, strangers=True))
        await server.start()
        at = replace(authority, address=f"127.0.0.1:{port}")
        with pytest.raises(AuthenticationError, match=r"signed by .*mallory, expected the authority"):
            async for _ in deny_lists(named(at, "coordinator", "main")):
                raise AssertionError("believed")
        await server.stop(0)

    asyncio.run(run())


def test_only_a_coordinator_that_is_not_revoked_is_told(authority: Authority) -> None:
    async def asked(identity: Identity) -> str:
        try:
            async with asyncio.timeout(10):
                async for _ in deny_lists(identity):
                    return "told"
        except grpc.aio.AioRpcError as error:
            assert error.code() is grpc.StatusCode.UNAUTHENTICATED
            return error.details() or ""
        return "nothing"

    async def run() -> None:
        server, port = await start_service(authority, "127.0.0.1:0")
        at = replace(authority, address=f"127.0.0.1:{port}")
        coordinator = named(at, "coordinator", "main")
        assert await asked(coordinator) == "told"
        assert await asked(named(at, "client", "hospital-1")) == f"{CLIENT} is no coordinator"
        at.revoke(coordinator.name)
        assert "coordinator/main was revoked at" in await asked(coordinator)
        await server.stop(0)

    asyncio.run(run())


# --- a coordinator


def test_a_revoked_clients_work_is_lost_at_once_and_the_round_goes_on(running: Running) -> None:
    """Long before the grace that a lost connection has: a tenth of the deadline."""

    async def run() -> None:
        async with running() as federation:
            thief_identity = federation.identity("client", "thief")
            honest = await federation.agents(2)
            thief = await federation.agent("thief", silent)
            spec = spec_of(rounds=1, size=3, deadline=300.0, cohort={"minimum": 2})
            await federation.submit(spec)
            await soon(lambda: thief.assignments)
            for who in federation.coordinator.denied.add(revoked(thief_identity)):
                federation.coordinator.expel(who)
            await soon(lambda: all(agent.outcomes for agent in honest))
            assert {agent.outcomes[0].verdict.status for agent in honest} == {"folded"}
            assert "thief" not in federation.coordinator.registry.sessions
            with pytest.raises(grpc.aio.AioRpcError, match="was revoked"):
                async with federation.visitor("thief", silent):
                    raise AssertionError("let in")

    asyncio.run(run())


def test_a_renewed_coordinator_shows_its_new_certificate_and_keeps_its_streams(
    running: Running, identity: Callable[[Role, str], Identity], tmp_path: Path
) -> None:
    async def shown(federation: Federation) -> int:
        """Return the serial number that a new connection is shown."""
        identity("client", "looker").save(tmp_path / "looker")
        context = ssl.create_default_context(cafile=str(tmp_path / "looker" / "ca.pem"))
        context.load_cert_chain(tmp_path / "looker" / "identity.pem")
        context.set_alpn_protocols(["h2"])
        _, writer = await asyncio.open_connection(
            "127.0.0.1", federation.port, ssl=context, server_hostname="coordinator.fed.fedcore"
        )
        der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        writer.close()
        return x509.load_der_x509_certificate(der).serial_number

    async def run() -> None:
        async with running() as federation:
            agent = await federation.agent("client-0")
            first = await shown(federation)
            renewed = federation.coordinator.identity = identity("coordinator", "renewed")
            assert await shown(federation) != first
            assert await shown(federation) == x509.load_pem_x509_certificate(renewed.chain).serial_number
            await federation.ended(await federation.submit(spec_of(rounds=1, size=1)))
            assert len(agent.assignments) == 1 + 1 and not agent.call.done()  # trained, then tested

    asyncio.run(run())
