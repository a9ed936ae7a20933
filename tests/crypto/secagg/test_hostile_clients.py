"""Clients that say what they should not: refused with the reason, at no cost to the others."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from fedcore.crypto.certificates import key_from_pem
from fedcore.crypto.secagg import Failed, Step
from fedcore.crypto.secagg.signing import say
from fedcore.errors import AuthenticationError, FedcoreError, ProtocolError
from fedcore.wire.v1 import secagg_pb2 as pb
from tests.crypto.secagg.conftest import CONFIG, Attempt, content, identity, sparse

LIAR = "client-00"


def refused(attempt: Attempt, message: bytes, reason: str, kind: type[FedcoreError] = ProtocolError) -> None:
    """Assert that the coordinator refuses it from the liar, and records nothing."""
    records = len(attempt.records)
    with pytest.raises(kind, match=reason):
        attempt.server.receive(LIAR, message)
    assert len(attempt.records) == records


def says(attempt: Attempt, step: Step, content: bytes, name: str = LIAR) -> bytes:
    return say(key_from_pem(identity(name).key), step, attempt.transcript, content)


def advertisement(change: Callable[[pb.Advertisement], None], name: str = LIAR) -> bytes:
    said = pb.Said.FromString(Attempt().clients[name].advertise())
    told = pb.Advertisement.FromString(said.content)
    change(told)
    key = key_from_pem(identity(name).key)
    return say(key, "advertise", CONFIG.digest, told.SerializeToString(), said.issuer)


def without_issuer() -> bytes:
    """Leave out what the coordinator knows, and others may not."""
    said = pb.Said.FromString(advertisement(nothing))
    said.issuer = b""
    return said.SerializeToString()


def low_order(told: pb.Advertisement) -> None:
    told.mask_key = bytes(32)


def no_commitment(told: pb.Advertisement) -> None:
    told.commitment = b""


def no_certificate(told: pb.Advertisement) -> None:
    told.leaf = b"x"


def nothing(told: pb.Advertisement) -> None:
    """Change nothing."""


@pytest.mark.parametrize(
    ("message", "reason", "kind"),
    [
        (advertisement(low_order), "of low order", ProtocolError),
        (advertisement(no_commitment), "have 32 bytes each", ProtocolError),
        (advertisement(no_certificate), "the certificate is malformed", AuthenticationError),
        (advertisement(nothing, "client-01"), "client-00 is client-01's", AuthenticationError),
        (without_issuer(), "the certificate is malformed", AuthenticationError),
        (b"\xff", "the message is no Said", ProtocolError),
    ],
)
def test_advertisements_that_do_not_hold(message: bytes, reason: str, kind: type[FedcoreError]) -> None:
    refused(Attempt(), message, reason, kind)


def test_keys_that_another_client_has_too() -> None:
    attempt = Attempt()
    attempt.advertise([LIAR])
    copied = pb.Advertisement.FromString(content(attempt.replies[Step.ADVERTISE]["client-01"]))

    def copy(told: pb.Advertisement) -> None:
        told.mask_key = copied.mask_key

    refused(attempt, advertisement(copy), "is another's too")
    attempt.names.remove(LIAR)
    assert attempt.run().unmasked() == attempt.expected()


def test_nobody_is_admitted_once_the_cohort_is_full() -> None:
    attempt = Attempt(5, config=replace(CONFIG, asked=4))
    attempt.advertise([LIAR])
    refused(attempt, attempt.clients[LIAR].advertise(), "the cohort is full: 4 clients have advertised")


def test_who_was_not_asked_and_who_is_late() -> None:
    attempt = Attempt(5)
    with pytest.raises(ProtocolError, match="'advertise' of client-09 is out of place"):
        attempt.server.receive("client-09", attempt.clients[LIAR].advertise())
    attempt.run(until=Step.SHARE, lost={Step.ADVERTISE: [LIAR]})
    refused(attempt, attempt.clients[LIAR].advertise(), "'advertise' of client-00 is out of place")


def test_another_answer_after_the_first() -> None:
    attempt = Attempt(5).run(until=Step.AGREE)
    refused(attempt, says(attempt, Step.AGREE, b""), "'agree' of client-00 is out of place")


@pytest.mark.parametrize(
    ("step", "answer", "reason"),
    [
        (Step.SHARE, pb.Ciphertexts(each=[b"x" * 82] * 5), "5 parts came, expected 4 of 82 bytes"),
        (Step.SHARE, pb.Ciphertexts(each=[b"x" * 82] * 3 + [b""]), "expected 4 of 82 bytes"),
        (Step.RECEIVE, b"\xff", "a bitmap of 5 has 1 bytes, or bits beyond its end"),
        (Step.RECEIVE, b"", "a bitmap of 5 has 0 bytes"),
        (Step.RECEIVE, b"\x03", "holds shares of one that has not drawn it"),
        (Step.CONFIRM, bytes(32), "'confirm' is about something else than the client was told"),
        (Step.AGREE, bytes(33), "'agree' is about something else than the client was told"),
        (Step.REVEAL, pb.Shares(each=[b"x" * 33] * 3), "3 parts came, expected 4 of 33 bytes"),
        (Step.REVEAL, pb.Shares(each=[b"x" * 66] * 4), "expected 4 of 33 bytes"),
    ],
)
def test_answers_of_another_shape(
    step: Step, answer: bytes | pb.Ciphertexts | pb.Shares, reason: str
) -> None:
    attempt = Attempt(5)
    attempt.run(until=step, lost={step: [LIAR]})
    given = answer if isinstance(answer, bytes) else answer.SerializeToString()
    refused(attempt, says(attempt, step, given), reason)
    refused(attempt, says(attempt, step, given, "client-01"), "is not signed by its client")
    attempt.run(lost={step: [LIAR]})
    assert attempt.unmasked() == attempt.expected()


@pytest.mark.parametrize("chosen", [[0, 1, 2, 3], [1, 2, 3], [1, 2, 3, 4, 5], [1, 2, 3, 9]])
def test_draws_that_are_none(chosen: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    sparse(monkeypatch, 4, 2)
    attempt = Attempt(9).run(until=Step.CHOOSE, lost={Step.CHOOSE: [LIAR]})
    told = pb.Members(positions=chosen).SerializeToString()
    refused(attempt, says(attempt, Step.CHOOSE, told), "clients were drawn, expected 4 others|not below 9")


@pytest.mark.parametrize("liars", [1, 2])
def test_wrong_shares(liars: int) -> None:
    """One of nine that lies about all its shares costs nothing; two of those in use cost the attempt."""
    attempt = Attempt(9).run(until=Step.REVEAL, lost={Step.REVEAL: ["client-00", "client-01"][:liars]})
    wrong = pb.Shares(each=[bytes(33)] * 8).SerializeToString()
    for name in ["client-00", "client-01"][:liars]:
        attempt.server.receive(name, says(attempt, Step.REVEAL, wrong, name))
    if liars == 1:
        assert attempt.run().unmasked() == attempt.expected()
    else:
        with pytest.raises(Failed, match=r"the 8 shares of a secret of client-0\d do not give it"):
            attempt.run()


def test_a_client_that_shares_what_it_has_not_advertised() -> None:
    """Its shares open and give another seed than it committed to: the attempt fails, and says by whom."""
    attempt = Attempt(5)
    attempt.clients[LIAR]._secrets.seed = b"another seed than it committed to"[:32]
    with pytest.raises(Failed, match="shares of a secret of client-00 do not give it"):
        attempt.run()


def test_a_client_that_claims_that_nothing_opened() -> None:
    """Others hold a share less, and nobody is left out."""
    attempt = Attempt(7).run(until=Step.RECEIVE, lost={Step.RECEIVE: [LIAR]})
    attempt.server.receive(LIAR, says(attempt, Step.RECEIVE, b"\0"))
    attempt.run(lost={Step.RECEIVE: [LIAR]})
    holders = pb.Holders.FromString(content(attempt.told[Step.CONFIRM]["client-01"])).holders
    assert [each.position for each in holders] == list(range(7))
    assert attempt.unmasked() == attempt.expected()
