"""The authority's rules, in process and over a real connection."""

import asyncio
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509.oid import NameOID

from fedcore.crypto.certificates import (
    Key,
    certificate_request,
    leaf_name,
    new_key,
    to_pem,
    verify_chain,
)
from fedcore.crypto.identity import Identity, requesting, utc_now
from fedcore.crypto.names import Name
from fedcore.errors import AuthenticationError, ConfigError, FedcoreError, ProtocolError, SpecError
from fedcore.server.authority import Authority
from fedcore.server.authority_service import start_service
from fedcore.wire import grpc
from fedcore.wire.authority import authority_at, chain_of
from fedcore.wire.enrolment import enrol
from fedcore.wire.token import Token
from fedcore.wire.v1 import authority_pb2, authority_pb2_grpc

HOUR = timedelta(hours=1)
CLIENT = Name("fed", "client", "hospital-1")


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.create(tmp_path / "authority", "fed", "127.0.0.1:8700")


def served(authority: Authority, action: Callable[[Authority], None]) -> None:
    """Run `action` in a thread while enrolment is served, with the authority at its real address."""

    async def run() -> None:
        server, port = await start_service(authority, "127.0.0.1:0")
        try:
            await asyncio.to_thread(action, replace(authority, address=f"127.0.0.1:{port}"))
        finally:
            await server.stop(0)

    asyncio.run(run())


def token(authority: Authority, name: Name = CLIENT, lifetime: timedelta = HOUR) -> str:
    return str(authority.new_token(name, lifetime))


# --- over the network


def test_a_participant_enrols(authority: Authority, tmp_path: Path) -> None:
    def action(at: Authority) -> None:
        made = enrol(token(at), tmp_path / "id")
        assert made == Identity.load(tmp_path / "id")
        assert made.name == CLIENT and made.root_fingerprint == authority.fingerprint
        assert timedelta(days=29) < made.not_after - utc_now() <= timedelta(days=30)
        assert (tmp_path / "id" / "identity.pem").stat().st_mode & 0o777 == 0o600

    served(authority, action)


def test_a_lost_reply_can_be_asked_for_again(authority: Authority, tmp_path: Path) -> None:
    def action(at: Authority) -> None:
        text = token(at)
        with requesting(tmp_path / "id") as key:
            lost = at.redeem(Token.parse(text).secret, certificate_request(key))
        assert x509.load_pem_x509_certificates(enrol(text, tmp_path / "id").chain) == lost

    served(authority, action)


def test_a_token_works_for_one_key_only(authority: Authority, tmp_path: Path) -> None:
    def action(at: Authority) -> None:
        text = token(at)
        enrol(text, tmp_path / "id")
        with pytest.raises(AuthenticationError, match="already used by another key; ask for another"):
            enrol(text, tmp_path / "thief")
        assert not (tmp_path / "thief" / "identity.pem").exists()

    served(authority, action)


def test_an_expired_token_is_refused(authority: Authority, tmp_path: Path) -> None:
    def action(at: Authority) -> None:
        with pytest.raises(AuthenticationError, match=r"hospital-1 expired at .* UTC; ask for another token"):
            enrol(token(at, lifetime=-HOUR), tmp_path / "id")

    served(authority, action)


def test_a_token_that_the_authority_never_made_is_refused(authority: Authority, tmp_path: Path) -> None:
    def action(at: Authority) -> None:
        with pytest.raises(AuthenticationError, match="unknown to this authority"):
            enrol(str(Token(at.address, at.root, CLIENT, bytes(20))), tmp_path / "id")

    served(authority, action)


def test_an_authority_under_another_root_is_found_out(authority: Authority, tmp_path: Path) -> None:
    other = Authority.create(tmp_path / "other", "fed", "127.0.0.1:8700")

    def action(at: Authority) -> None:
        theirs = replace(other, address=at.address)
        with pytest.raises(AuthenticationError, match=f"not the authority.*{other.fingerprint}; compare"):
            enrol(token(theirs), tmp_path / "id")

    served(authority, action)


def test_not_even_the_coordinator_can_pose_as_the_authority(authority: Authority, tmp_path: Path) -> None:
    async def run() -> None:
        server = grpc.aio.server()
        coordinator = authority.new_identity(Name("fed", "coordinator", "main"))
        plain = grpc.ssl_server_credentials([(coordinator.key, coordinator.chain)])
        port = server.add_secure_port("127.0.0.1:0", plain)
        await server.start()
        text = token(replace(authority, address=f"127.0.0.1:{port}"))
        with pytest.raises(AuthenticationError, match="is not the authority under this root"):
            await asyncio.to_thread(enrol, text, tmp_path / "id")
        await server.stop(0)

    asyncio.run(run())


def test_a_certificate_for_another_name_than_the_tokens_is_found_out(
    authority: Authority, tmp_path: Path
) -> None:
    def action(at: Authority) -> None:
        altered = replace(at.new_token(CLIENT, HOUR), name=Name("fed", "coordinator", "main"))
        with pytest.raises(
            AuthenticationError, match=r"for fedcore://fed/client/hospital-1, not .*coordinator/main"
        ):
            enrol(str(altered), tmp_path / "id", "coordinator")

    served(authority, action)


def test_a_request_for_another_name_gets_the_tokens(authority: Authority) -> None:
    """Over the network, by a client of its own: ours asks for no name."""

    def action(at: Authority) -> None:
        secret = at.new_token(CLIENT, HOUR).secret
        request = authority_pb2.EnrolRequest(secret=secret, certificate_request=wanting_more(new_key()))
        with authority_at(at.address, "fed", to_pem(at.root), "") as stub:
            chain = chain_of(stub.Enrol(request, timeout=10), at.address)
        assert verify_chain(chain, at.root, utc_now()) == CLIENT

    served(authority, action)


def test_a_token_for_another_role_is_not_used_up(authority: Authority, tmp_path: Path) -> None:
    def action(at: Authority) -> None:
        text = token(at, Name("fed", "operator", "alice"))
        with pytest.raises(ConfigError, match=r"is for .*operator/alice; expected one of role coordinator"):
            enrol(text, tmp_path / "wrong", "coordinator")
        assert enrol(text, tmp_path / "right", "operator").name.name == "alice"

    served(authority, action)


def test_a_folder_is_one_identity(authority: Authority, tmp_path: Path) -> None:
    def action(at: Authority) -> None:
        enrol(token(at), tmp_path / "id")
        with pytest.raises(
            ConfigError, match=r"holds the identity of .*hospital-1, but the token is for .*hospital-2"
        ):
            enrol(token(at, Name("fed", "client", "hospital-2")), tmp_path / "id")

    served(authority, action)


def test_an_authority_that_does_not_answer_names_the_next_step(authority: Authority, tmp_path: Path) -> None:
    async def closed_port() -> int:
        server, port = await start_service(authority, "127.0.0.1:0")
        await server.stop(0)
        return port

    text = token(replace(authority, address=f"127.0.0.1:{asyncio.run(closed_port())}"))
    with pytest.raises(
        FedcoreError, match=r"cannot be reached within 10 s .*is 'fedcore authority start' running"
    ):
        enrol(text, tmp_path / "id")


@pytest.mark.parametrize(
    ("request_der", "code"),
    [(b"nonsense", grpc.StatusCode.INVALID_ARGUMENT), (bytes(70_000), grpc.StatusCode.RESOURCE_EXHAUSTED)],
)
def test_a_malformed_or_large_request_is_refused_and_the_next_one_served(
    authority: Authority, tmp_path: Path, request_der: bytes, code: grpc.StatusCode
) -> None:
    def action(at: Authority) -> None:
        credentials = grpc.ssl_channel_credentials(authority.new_identity(CLIENT).root)
        options = (("grpc.ssl_target_name_override", "authority.fed.fedcore"),)
        with grpc.secure_channel(at.address, credentials, options) as channel:
            request = authority_pb2.EnrolRequest(secret=bytes(20), certificate_request=request_der)
            with pytest.raises(grpc.RpcError) as refused:
                authority_pb2_grpc.AuthorityStub(channel).Enrol(request, timeout=10)
        assert refused.value.code() is code
        assert enrol(token(at), tmp_path / "id").name == CLIENT

    served(authority, action)


def test_two_authorities_cannot_share_a_port(authority: Authority) -> None:
    async def run() -> None:
        server, port = await start_service(authority, "127.0.0.1:0")
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}.*--listen HOST:PORT"):
            await start_service(authority, f"127.0.0.1:{port}")
        await server.stop(0)

    asyncio.run(run())


# --- the rules


def wanting_more(key: Key) -> bytes:
    """Return a request for the coordinator's names and the right to sign certificates."""
    wanted = [
        x509.UniformResourceIdentifier("fedcore://fed/coordinator/main"),
        x509.DNSName("coordinator.fed.fedcore"),
    ]
    builder = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "coordinator")]))
        .add_extension(x509.SubjectAlternativeName(wanted), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    )
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def test_what_the_request_asks_for_is_ignored(authority: Authority) -> None:
    leaf, _ = authority.redeem(authority.new_token(CLIENT, HOUR).secret, wanting_more(new_key()))
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert list(names) == [x509.UniformResourceIdentifier(str(CLIENT))]
    assert leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    assert leaf.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value == "hospital-1"


def test_a_clients_token_makes_no_coordinator(authority: Authority) -> None:
    made = authority.new_token(CLIENT, HOUR)
    claimed = replace(made, name=Name("fed", "coordinator", "main"))
    leaf, _ = authority.redeem(claimed.secret, certificate_request(new_key()))
    assert leaf_name(leaf) == CLIENT
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == []


def test_of_many_keys_at_once_exactly_one_wins(authority: Authority) -> None:
    secret = authority.new_token(CLIENT, HOUR).secret
    requests = [certificate_request(new_key()) for _ in range(8)]

    def attempt(request: bytes) -> bool:
        try:
            return bool(authority.redeem(secret, request))
        except AuthenticationError:
            return False

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(attempt, requests)) == 1
    with sqlite3.connect(authority.folder / "authority.db") as books:
        assert books.execute("SELECT count(*) FROM certificates").fetchone() == (1,)
    books.close()


def test_a_retry_ends_with_the_token(tmp_path: Path) -> None:
    now = datetime(2030, 1, 1, tzinfo=UTC)
    then = Authority.create(tmp_path / "a", "fed", "localhost:1", clock=lambda: now)
    secret, request = then.new_token(CLIENT, HOUR).secret, certificate_request(new_key())
    first = then.redeem(secret, request)
    assert replace(then, clock=lambda: now + HOUR / 2).redeem(secret, request) == first
    with pytest.raises(AuthenticationError, match="expired at 2030-01-01 01:00 UTC"):
        replace(then, clock=lambda: now + HOUR).redeem(secret, request)


def test_the_books_hold_no_secret(authority: Authority) -> None:
    secret = authority.new_token(CLIENT, HOUR).secret
    assert secret not in (authority.folder / "authority.db").read_bytes()


def test_a_request_that_is_refused_does_not_use_the_token_up(authority: Authority) -> None:
    secret = authority.new_token(CLIENT, HOUR).secret
    with pytest.raises(ProtocolError):
        authority.redeem(secret, b"nonsense")
    assert authority.redeem(secret, certificate_request(new_key()))


def test_the_authority_runs_without_its_root_key(authority: Authority) -> None:
    (authority.folder / "root" / "key.pem").unlink()
    (authority.folder / "root").rmdir()
    online = Authority.load(authority.folder)
    assert online.new_identity(CLIENT).name == CLIENT


def test_private_files_are_private(authority: Authority) -> None:
    modes = {p.name: p.stat().st_mode & 0o777 for p in (authority.folder, *authority.folder.rglob("*"))}
    private = {"authority": 0o700, "root": 0o700, "intermediate.pem": 0o600, "authority.db": 0o600}
    assert modes.items() >= private.items()
    assert (authority.folder / "root" / "key.pem").stat().st_mode & 0o777 == 0o600


def test_a_folder_becomes_an_authority_once(authority: Authority, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="already holds an authority"):
        Authority.create(authority.folder, "other", "localhost:1")
    with pytest.raises(ConfigError, match=r"no authority in .*fedcore authority init"):
        Authority.load(tmp_path / "nowhere")
    with pytest.raises(SpecError, match="federation 'Upper'"):
        Authority.create(tmp_path / "new", "Upper", "localhost:1")


# --- tokens


def test_a_token_is_its_text(authority: Authority) -> None:
    made = authority.new_token(CLIENT, HOUR)
    assert Token.parse(f"  {made}\n") == made
    assert str(made.secret) not in repr(made)


@pytest.mark.parametrize(
    "spoil", [lambda t: t[:-9], lambda t: t[20:], lambda t: "", lambda t: t + "é", lambda t: t[:16]]
)
def test_a_token_that_was_not_copied_whole_is_refused(
    authority: Authority, spoil: Callable[[str], str]
) -> None:
    text = spoil(token(authority))
    with pytest.raises(AuthenticationError, match=r"malformed: .*; copy the whole line") as error:
        Token.parse(text)
    assert len(text) < 30 or text not in str(error.value)
