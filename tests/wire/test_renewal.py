"""Renewal against a real authority: what replaces key and certificate, and who is turned down."""

import asyncio
import logging
import sqlite3
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from fedcore.crypto.certificates import certificate_request, new_key
from fedcore.crypto.files import write_atomically
from fedcore.crypto.identity import Identity, utc_now
from fedcore.crypto.names import Name
from fedcore.errors import AuthenticationError, ConfigError, SpecError
from fedcore.server.authority import Authority
from fedcore.server.authority_service import AuthorityService, start_service
from fedcore.wire.authority import authority_at, chain_of
from fedcore.wire.enrolment import enrol
from fedcore.wire.renewal import keep_renewed, renew, renewed_if_due
from fedcore.wire.signing import sign
from fedcore.wire.v1.authority_pb2 import RenewalRequest

CLIENT = Name("fed", "client", "hospital-1")
HOUR = timedelta(hours=1)


def ago(days: float) -> Callable[[], datetime]:
    return lambda: utc_now() - timedelta(days=days)


def founded(folder: Path, days: float) -> Authority:
    """Return an authority that was made so many days ago, as it is today."""
    return replace(Authority.create(folder, "fed", "127.0.0.1:8700", clock=ago(days)), clock=utc_now)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return founded(tmp_path / "authority", days=40)


def served(authority: Authority, action: Callable[[Authority], None]) -> None:
    """Run `action` in a thread while the authority serves."""

    async def run() -> None:
        server, port = await start_service(authority, "127.0.0.1:0")
        try:
            await asyncio.to_thread(action, replace(authority, address=f"127.0.0.1:{port}"))
        finally:
            await server.stop(0)

    asyncio.run(run())


def made(at: Authority, folder: Path, days: float = 25, passphrase: bytes = b"") -> Identity:
    """Return an identity that was issued so many days ago, saved in a folder."""
    identity = replace(replace(at, clock=ago(days)).new_identity(CLIENT), passphrase=passphrase)
    identity.save(folder)
    return identity


def test_key_and_certificate_are_replaced(authority: Authority, tmp_path: Path) -> None:
    def action(at: Authority) -> None:
        old = made(at, tmp_path / "id", passphrase=b"correct horse")
        new = renew(tmp_path / "id", old)
        assert new == Identity.load(tmp_path / "id", passphrase=b"correct horse")
        assert new.name == CLIENT and new.key != old.key and new.authority == at.address
        assert timedelta(days=24) < new.not_after - old.not_after <= timedelta(days=25)
        assert {path.name for path in (tmp_path / "id").iterdir()} == {
            "identity.pem", "ca.pem", "authority", ".lock"
        }  # fmt: skip
        assert renew(tmp_path / "id", old) == new  # by another process, meanwhile: only read

    served(authority, action)


def test_a_renewal_whose_reply_was_lost_is_repeated(authority: Authority, tmp_path: Path) -> None:
    """Whether the reply or the write of the files was lost: the same key gets the same certificate."""

    def action(at: Authority) -> None:
        old = made(at, tmp_path / "id")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fedcore.crypto.identity.write_atomically", fail_at("identity.pem"))
            with pytest.raises(OSError, match="power loss"):
                renew(tmp_path / "id", old)
        assert Identity.load(tmp_path / "id") == old
        new = renew(tmp_path / "id", old)
        with sqlite3.connect(authority.books) as books:
            (count,) = books.execute(
                "SELECT count(*) FROM certificates WHERE name = ?", (str(CLIENT),)
            ).fetchone()
        books.close()
        assert count == 2 and new.not_after > old.not_after

    served(authority, action)


def fail_at(file: str) -> Callable[[Path, bytes, int], None]:
    def fail(path: Path, content: bytes, mode: int) -> None:
        if path.name == file:
            raise OSError("power loss")
        write_atomically(path, content, mode)

    return fail


def test_of_two_holders_of_a_certificate_one_is_found_out(authority: Authority, tmp_path: Path) -> None:
    def action(at: Authority) -> None:
        stolen = made(at, tmp_path / "id")
        stolen.save(tmp_path / "thief")
        renew(tmp_path / "thief", stolen)
        with pytest.raises(AuthenticationError, match=r"already renewed with another key; get a token"):
            renew(tmp_path / "id", stolen)

    served(authority, action)


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda at, _: at.revoke(CLIENT), r"hospital-1 was revoked at"),
        (lambda at, folder: stranger(at, folder), "is not the authority under this root"),
    ],
)
def test_who_cannot_renew(
    authority: Authority, tmp_path: Path, spoil: Callable[[Authority, Path], object], problem: str
) -> None:
    def action(at: Authority) -> None:
        made(at, tmp_path / "id")
        spoil(at, tmp_path)
        identity = Identity.load(tmp_path / "id")
        with pytest.raises(AuthenticationError, match=problem):
            renew(tmp_path / "id", identity)
        assert Identity.load(tmp_path / "id") == identity

    served(authority, action)


def test_an_expired_certificate_renews_nothing(authority: Authority, tmp_path: Path) -> None:
    """The device sees it first; one that lies to itself about the time is told by the authority."""

    def action(at: Authority) -> None:
        old = made(at, tmp_path / "id", days=31)
        with pytest.raises(AuthenticationError, match="does not lead to the federation's root"):
            renew(tmp_path / "id", old)
        with pytest.raises(AuthenticationError, match=r"does not lead .*; get a token"):
            renew(tmp_path / "id", old, ago(5))

    served(authority, action)


def stranger(at: Authority, folder: Path) -> None:
    made(Authority.create(folder / "other", "fed", at.address, clock=ago(30)), folder / "id")


def ask(at: Authority, signer: Identity, request: bytes) -> Name:
    """Return the name that a renewal request gets."""
    message = sign(signer, RenewalRequest(certificate_request=request))
    with authority_at(at.address, "fed", signer.root, "") as stub:
        chain = chain_of(stub.Renew(message, timeout=10), at.address)
    return Identity.verified(key, chain, at.root, utc_now()).name


key = new_key()


def test_a_request_for_another_name_gets_ones_own(authority: Authority, tmp_path: Path) -> None:
    wanted = [x509.UniformResourceIdentifier("fedcore://fed/coordinator/main")]
    builder = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([]))
        .add_extension(x509.SubjectAlternativeName(wanted), critical=False)
    )
    request = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)

    def action(at: Authority) -> None:
        assert ask(at, at.new_identity(CLIENT), request) == CLIENT

    served(authority, action)


def test_a_certificate_without_its_key_renews_nothing(authority: Authority, tmp_path: Path) -> None:
    def action(at: Authority) -> None:
        victim, thief = at.new_identity(CLIENT), at.new_identity(replace(CLIENT, name="thief"))
        with pytest.raises(AuthenticationError, match=r"the signature is not that of .*hospital-1"):
            ask(at, replace(victim, key=thief.key), certificate_request(key))

    served(authority, action)


def test_a_revoked_key_never_gets_a_certificate_again(authority: Authority, tmp_path: Path) -> None:
    """Nor does a token that was made before; another one, with a new key, brings the device back."""

    def action(at: Authority) -> None:
        unused = str(at.new_token(CLIENT, HOUR))
        used = str(at.new_token(CLIENT, HOUR))
        enrol(used, tmp_path / "id")
        assert at.revoke(CLIENT) == 1
        for text in (used, unused):
            with pytest.raises(AuthenticationError, match="unknown to this authority"):
                enrol(text, tmp_path / "id")
        fresh = str(at.new_token(CLIENT, HOUR))
        with pytest.raises(AuthenticationError, match=r"key of this request .* was revoked"):
            enrol(fresh, tmp_path / "id")
        assert enrol(fresh, tmp_path / "new").name == CLIENT

    served(authority, action)


def test_only_a_known_name_can_be_revoked(authority: Authority) -> None:
    authority.new_identity(CLIENT)
    with pytest.raises(SpecError, match="did you mean 'fedcore://fed/client/hospital-1'"):
        authority.revoke(Name("fed", "client", "hospital-2"))
    assert authority.revoke(CLIENT) == 1 and authority.revoke(CLIENT) == 0
    assert [(each.name, each.revoked is None) for each in authority.issued()] == [(str(CLIENT), False)]


@pytest.mark.parametrize("federation", ["fed", "authority", "client"])
def test_everybody_but_the_authority_is_listed(tmp_path: Path, federation: str) -> None:
    """Whatever the federation is called: who is not listed is not denied."""
    at = Authority.create(tmp_path / "authority", federation, "127.0.0.1:8700")
    at.new_identity(at.name)
    clients = [Name(federation, "client", name) for name in ("authority", "enrolment")]
    for client in clients:
        at.new_identity(client)
        at.revoke(client)
    assert [(each.name, each.revoked is None) for each in at.issued()] == [
        (str(client), False) for client in clients
    ]


# --- the intermediate


def test_a_new_intermediate_interrupts_nobody(tmp_path: Path) -> None:
    """Certificates of the old one renew while the authority runs on; its own is replaced at the next call."""
    authority = founded(tmp_path / "authority", days=715)  # its intermediate ends in 15
    ends, service = authority.issuer()[0].not_valid_after_utc, AuthorityService(authority)
    assert service.identity().not_after == ends

    def action(at: Authority) -> None:
        client = made(at, tmp_path / "id")
        assert at.new_identity(CLIENT).not_after == ends  # nothing outlives who has signed it
        at.new_intermediate()
        assert renew(tmp_path / "id", client).not_after > ends

    served(authority, action)
    assert service.identity().not_after > ends


def test_the_intermediate_is_replaced_with_the_roots_key_only(authority: Authority, tmp_path: Path) -> None:
    before = (authority.folder / "intermediate.pem").read_bytes()
    (authority.folder / "root" / "key.pem").rename(authority.folder / "safe")
    with pytest.raises(ConfigError, match=r"root/key.pem is missing; bring the root's key back"):
        authority.new_intermediate()
    (Authority.create(tmp_path / "other", "fed", "127.0.0.1:8700").folder / "root").rename(tmp_path / "taken")
    (tmp_path / "taken" / "key.pem").rename(authority.folder / "root" / "key.pem")
    with pytest.raises(ConfigError, match=r"root/key.pem is not the key of .*ca.pem; bring this"):
        authority.new_intermediate()
    assert (authority.folder / "intermediate.pem").read_bytes() == before


# --- at the right time


def test_it_is_due_at_two_thirds_of_the_life(authority: Authority, tmp_path: Path) -> None:
    identity = made(authority, tmp_path / "id", days=0)
    assert abs(identity.renewal - utc_now() - timedelta(days=20)) < timedelta(seconds=5)
    assert renewed_if_due(tmp_path / "id", identity) is identity  # without asking anybody


def test_a_command_goes_on_with_the_old_one_and_says_why(
    authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its log is not configured, so that a person sees the text alone."""
    identity = made(replace(authority, address="127.0.0.1:1"), tmp_path / "id")
    assert renewed_if_due(tmp_path / "id", identity) is identity
    monkeypatch.setattr("fedcore.crypto.identity.write_atomically", fail_at("next.pem"))
    (tmp_path / "id" / "next.pem").unlink()
    assert renewed_if_due(tmp_path / "id", identity) is identity
    reachable, writable = (record.getMessage() for record in caplog.records)
    assert "not renewed: the authority at 127.0.0.1:1 cannot be reached" in reachable
    assert "not renewed: power loss" in writable


@pytest.mark.slow
def test_a_process_goes_on_with_new_certificates(
    authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """While the authority is away it goes on with the old one, and asks again."""
    brief = replace(authority, lifetime=timedelta(seconds=6))

    async def run() -> list[Identity]:
        server, port = await start_service(brief, "127.0.0.1:0")
        await server.stop(0)
        at = replace(brief, address=f"127.0.0.1:{port}")
        first, seen = made(at, tmp_path / "id", days=0), asyncio.Queue[Identity]()
        keeping = asyncio.create_task(keep_renewed(tmp_path / "id", first, seen.put))
        while "certificate not renewed" not in caplog.text:  # noqa: ASYNC110 - a log has no event
            await asyncio.sleep(0.05)
        server, _ = await start_service(brief, f"127.0.0.1:{port}")
        async with asyncio.timeout(20):
            found = [first, await seen.get()]
        keeping.cancel()
        await server.stop(0)
        return found

    caplog.set_level(logging.WARNING)
    first, second = asyncio.run(run())
    reasons = [vars(record)["reason"] for record in caplog.records if "not renewed" in record.message]
    assert second.name == CLIENT and second.not_after > first.not_after and second.key != first.key
    assert all("cannot be reached" in reason for reason in reasons)


def test_an_expired_certificate_is_not_asked_for_every_second(
    authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its process may go on for weeks, and somebody may enrol it anew."""
    expired = made(authority, tmp_path / "id", days=31)

    async def run() -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(0.5):
                await keep_renewed(tmp_path / "id", expired, lambda _: asyncio.sleep(0))

    asyncio.run(run())
    (record,) = caplog.records
    assert vars(record)["wait_s"] >= 30


def test_an_identity_that_knows_no_authority_says_so(authority: Authority, tmp_path: Path) -> None:
    identity = made(replace(authority, address=""), tmp_path / "id")
    with pytest.raises(ConfigError, match="address is not known; write HOST:PORT into the file authority"):
        renew(tmp_path / "id", identity)
