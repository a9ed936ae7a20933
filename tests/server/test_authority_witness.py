"""The authority as the witness of ledgers: what it remembers, whom it believes, what a client makes of it."""

import asyncio
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.chain import Head
from fedcore.client.ledger import witnessed
from fedcore.crypto.certificates import issue_root, new_key
from fedcore.crypto.identity import Identity, utc_now
from fedcore.crypto.names import Name
from fedcore.errors import AuthenticationError, ConfigError, FedcoreError, ProtocolError, UpdateRefused
from fedcore.privacy.account import Claim
from fedcore.privacy.events import Gaussian
from fedcore.privacy.ledger import Ledger, LedgerDamaged, ledger_id
from fedcore.server.authority import LEDGERS, Authority
from fedcore.server.authority_service import start_service
from fedcore.wire import grpc
from fedcore.wire.signing import opened, sign
from fedcore.wire.v1 import authority_pb2 as pb
from fedcore.wire.v1.authority_pb2_grpc import AuthorityStub
from fedcore.wire.witness import Statement, ask, head_to_wire

CLIENT = Name("fed", "client", "hospital-1")
NONE = Head()
LEDGER = ledger_id("clinic-a")


def head(sequence: int, branch: int = 0) -> Head:
    return Head(sequence, bytes([branch]) * 31 + bytes([sequence]))


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.create(tmp_path / "authority", "fed", "127.0.0.1:8700")


def served(authority: Authority, action: Callable[[str], None]) -> None:
    """Run `action`, given the authority's address, in a thread while the authority is there."""

    async def run() -> None:
        server, port = await start_service(authority, "127.0.0.1:0")
        try:
            await asyncio.to_thread(action, f"127.0.0.1:{port}")
        finally:
            await server.stop(0)

    asyncio.run(run())


def ledger_in(folder: Path) -> Ledger:
    return Ledger.open(folder / "a.ledger", "clinic-a", "example", 8.0, 1e-5)


def reserve(ledger: Ledger, number: int) -> None:
    event = (Gaussian(1.0, 0.01, 10),)
    ref = f"run/{number}.0/train"
    ledger.reserve(Claim("fed/run", ref, str(CLIENT), "example", "enforced", event, event))


# --- what it remembers


def test_a_head_replaces_the_one_that_its_ledger_knows(authority: Authority) -> None:
    assert authority.witness(CLIENT, LEDGER, head(2), NONE) == head(2)
    assert authority.witness(CLIENT, LEDGER, head(5), head(2)) == head(5)
    again = Authority.load(authority.folder)  # over restarts
    for shown, previous in (
        (head(4), head(2)),  # a copy of before
        (head(4), head(5)),  # that says it is not
        (head(9, branch=1), head(4, branch=1)),  # a copy of before that has grown since
        (head(5, branch=1), head(5)),
        (head(7), head(2)),  # the ledger itself, whose last answer was lost
        (head(3, branch=1), NONE),  # made anew
    ):
        assert again.witness(CLIENT, LEDGER, shown, previous) == head(5)
    assert again.witness(CLIENT, LEDGER, head(7), head(5)) == head(7)


def test_ledgers_and_clients_are_apart(authority: Authority) -> None:
    other = replace(CLIENT, name="hospital-2")
    authority.witness(CLIENT, LEDGER, head(5), NONE)
    assert authority.witness(other, LEDGER, head(3, 1), NONE) == head(3, 1)
    assert authority.witness(CLIENT, ledger_id("clinic-b"), head(1, 2), NONE) == head(1, 2)


def test_a_client_has_so_many_ledgers(authority: Authority) -> None:
    for number in range(LEDGERS):
        authority.witness(CLIENT, ledger_id(str(number)), head(1), NONE)
    with pytest.raises(UpdateRefused, match="has shown 64 ledgers; expected at most 64"):
        authority.witness(CLIENT, ledger_id("more"), head(1), NONE)
    assert authority.witness(CLIENT, ledger_id("0"), head(2), head(1)) == head(2)


# --- a ledger and its witness


def test_a_ledger_grows_and_its_receipts_with_it(authority: Authority, tmp_path: Path) -> None:
    ledger, identity = ledger_in(tmp_path / "data"), authority.new_identity(CLIENT)

    def action(address: str) -> None:
        for number in range(3):
            reserve(ledger, number)
            at = replace(identity, authority=address)
            receipt = witnessed(ledger, at)
            assert receipt.head == ledger.account().head and ledger.receipts() == [receipt]
            assert witnessed(ledger, at).head == receipt.head  # nothing is new
        said_by, said = opened(pb.LedgerReceipt, pb.Signed.FromString(receipt.proof), authority.root)
        assert said_by.role == "authority" and said.head == head_to_wire(receipt.head)

    served(authority, action)
    assert b"clinic-a" not in (authority.folder / "authority.db").read_bytes()


@pytest.mark.parametrize("grown", [0, 1, 5])
def test_a_ledger_that_was_rolled_back_is_found(authority: Authority, tmp_path: Path, grown: int) -> None:
    """However much it has grown since; the copy brings its old receipt with it."""
    ledger, identity = ledger_in(tmp_path / "data"), authority.new_identity(CLIENT)
    copy = tmp_path / "copy"

    def action(address: str) -> None:
        at = replace(identity, authority=address)
        reserve(ledger, 0)
        witnessed(ledger, at)
        shutil.copy(ledger.path, copy)
        for number in (1, 2):
            reserve(ledger, number)
            witnessed(ledger, at)
        shutil.copy(copy, ledger.path)
        restored = ledger_in(tmp_path / "data")
        for number in range(grown):
            reserve(restored, 100 + number)
        for _ in range(2):
            with pytest.raises(LedgerDamaged, match=r"rolled back: the authority of .*hospital-1"):
                witnessed(restored, at)

    served(authority, action)
    with pytest.raises(LedgerDamaged, match="rolled back"):  # offline too, from now on
        ledger_in(tmp_path / "data")


def test_a_ledger_that_was_made_anew_is_found(authority: Authority, tmp_path: Path) -> None:
    identity = authority.new_identity(CLIENT)

    def action(address: str) -> None:
        witnessed(ledger_in(tmp_path / "data"), replace(identity, authority=address))
        shutil.rmtree(tmp_path / "data")
        with pytest.raises(LedgerDamaged, match="rolled back"):
            witnessed(ledger_in(tmp_path / "data"), replace(identity, authority=address))

    served(authority, action)


def test_a_lost_answer_and_a_restored_authority_are_no_rollback(authority: Authority, tmp_path: Path) -> None:
    ledger, identity = ledger_in(tmp_path / "data"), authority.new_identity(CLIENT)
    books, old = authority.folder / "authority.db", tmp_path / "old.db"

    def action(address: str) -> None:
        at, own = replace(identity, authority=address), ledger_id("clinic-a")
        first = witnessed(ledger, at)
        shutil.copy(books, old)
        reserve(ledger, 1)
        lost = ask(at, Statement(own, ledger.account().head, first.head))
        assert lost.head == ledger.account().head and ledger.receipts() == [first]
        reserve(ledger, 2)
        assert witnessed(ledger, at).head == ledger.account().head
        shutil.copy(old, books)
        assert witnessed(ledger, at).head == ledger.account().head

    served(authority, action)


def test_an_authority_that_does_not_answer_is_no_rollback(authority: Authority, tmp_path: Path) -> None:
    ledger, identity = ledger_in(tmp_path / "data"), authority.new_identity(CLIENT)
    with pytest.raises(FedcoreError, match=r"127\.0\.0\.1:1 cannot be reached"):
        witnessed(ledger, replace(identity, authority="127.0.0.1:1"))
    with pytest.raises(ConfigError, match="address is not known; write HOST:PORT"):
        witnessed(ledger, replace(identity, authority=""))
    reserve(ledger, 1)


# --- whom it believes


def call(address: str, identity: Identity, signed: pb.Signed) -> grpc.StatusCode | None:
    credentials = grpc.ssl_channel_credentials(identity.root)
    options = (("grpc.ssl_target_name_override", "authority.fed.fedcore"),)
    with grpc.secure_channel(address, credentials, options) as channel:
        try:
            AuthorityStub(channel).Witness(signed, timeout=10)
        except grpc.RpcError as error:
            code: grpc.StatusCode = error.code()
            return code
    return None


def statement(ledger: str = LEDGER, digest: bytes = bytes(32)) -> pb.LedgerStatement:
    shown, none = pb.LedgerHead(sequence=3, hash=digest), pb.LedgerHead(hash=bytes(32))
    return pb.LedgerStatement(ledger=ledger, head=shown, previous=none)


def test_nobody_can_speak_for_another_clients_ledger(authority: Authority, tmp_path: Path) -> None:
    mine, other = authority.new_identity(CLIENT), authority.new_identity(replace(CLIENT, name="thief"))
    stranger = Authority.create(tmp_path / "other", "fed", "127.0.0.1:8700").new_identity(CLIENT)
    honest = sign(mine, statement())
    altered = pb.Signed(
        content=statement(ledger_id("x")).SerializeToString(), signature=honest.signature, chain=honest.chain
    )
    swapped = pb.Signed(
        content=honest.content, signature=sign(other, statement()).signature, chain=honest.chain
    )
    receipt = pb.LedgerReceipt(name=LEDGER, ledger="", head=statement().head)
    invalid, denied = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNAUTHENTICATED
    cases = [
        (altered, denied),
        (swapped, denied),
        (sign(stranger, statement()), denied),
        (pb.Signed(content=honest.content, signature=honest.signature), invalid),
        (pb.Signed(content=b"\xff", signature=honest.signature, chain=honest.chain), invalid),
        (pb.Signed(content=honest.content, signature=honest.signature, chain=[b"no"]), invalid),
        (sign(mine, receipt), denied),  # a signature for one purpose is none for another
        (sign(mine, statement("clinic-a")), invalid),
        (sign(mine, statement(digest=b"short")), invalid),
        (sign(authority.new_identity(Name("fed", "operator", "alice")), statement()), invalid),
        (honest, None),
    ]

    def action(address: str) -> None:
        for signed, expected in cases:
            assert call(address, mine, signed) is expected

    served(authority, action)


def test_a_revoked_client_is_witnessed_no_more(authority: Authority, tmp_path: Path) -> None:
    identity, ledger = authority.new_identity(CLIENT), ledger_in(tmp_path / "data")

    def action(address: str) -> None:
        authority.revoke(CLIENT)
        with pytest.raises(AuthenticationError, match=r"hospital-1 was revoked at .*; get a token"):
            witnessed(ledger, replace(identity, authority=address))

    served(authority, action)


ROOT = issue_root("fed", new_key(), utc_now())


@given(st.binary(max_size=200))
def test_no_bytes_break_the_reader(content: bytes) -> None:
    with pytest.raises((ProtocolError, AuthenticationError)):
        opened(pb.LedgerStatement, pb.Signed(content=content, signature=content, chain=[content]), ROOT)


def test_a_client_believes_its_authority_only(authority: Authority, tmp_path: Path) -> None:
    ledger = ledger_in(tmp_path / "data")
    other = Authority.create(tmp_path / "other", "fed", "127.0.0.1:8700").new_identity(CLIENT)

    def action(address: str) -> None:
        with pytest.raises(AuthenticationError, match="is not the authority under this root"):
            witnessed(ledger, replace(other, authority=address))

    served(authority, action)
    assert ledger.receipts() == []
