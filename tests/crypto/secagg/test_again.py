"""Another attempt of a round: entered with a certificate that the one before was given up, or not at all."""

from dataclasses import replace

import pytest

from fedcore.crypto.secagg import Aborted, Client, Config, Floors, Server, Step
from fedcore.errors import ProtocolError
from fedcore.messages import Ref
from fedcore.wire.v1 import secagg_pb2 as pb
from tests.crypto.secagg.conftest import (
    CONFIG,
    Attempt,
    another,
    client_names,
    identity,
    trust,
)

VICTIM = "client-00"


def given_up(attempt: Attempt, signers: list[str]) -> bytes:
    """Give an attempt up, and return the certificate that these clients sign."""
    told = attempt.server.abort()
    for name in signers:
        attempt.hear(name, told[name])
    return attempt.server.certificate


def enter(config: Config, sent: bytes, certificate: bytes) -> Client:
    return Client(config, identity(VICTIM), trust(), Floors(), sent=sent, certificate=certificate)


@pytest.fixture(scope="module")
def first() -> Attempt:
    """Return an attempt in which all seven sent masked words, and that six of them gave up."""
    attempt = Attempt(7).run(until=Step.MASK)
    given_up(attempt, attempt.names[1:])
    return attempt


def receipts(attempt: Attempt) -> dict[str, bytes]:
    return {name: attempt.clients[name].receipt for name in attempt.names}


def test_an_attempt_that_was_given_up_is_repeated(first: Attempt) -> None:
    attempt = Attempt(7, another(1), sent=receipts(first), certificate=first.server.certificate).run()
    assert attempt.unmasked() == attempt.expected()


def test_the_victim_is_not_left_out_of_a_second_sum(first: Attempt) -> None:
    """With the sum in hand the coordinator claims failure, and repeats the round without the victim."""
    attempt = Attempt(7).run()
    attempt.unmasked()
    for name in attempt.names[1:]:
        with pytest.raises(Aborted, match="nothing proves that it was given up: 5 of its 7 clients"):
            Client(another(1), identity(name), trust(), Floors(), sent=attempt.clients[name].receipt)


def test_no_certificate_of_an_attempt_that_has_a_quorum() -> None:
    attempt = Attempt(7).run(until=Step.AGREE)
    for name, message in attempt.server.abort().items():
        with pytest.raises(Aborted, match="says 'abort', expected quorum"):
            attempt.clients[name].receive(message)
    assert attempt.server.certificate == b""


def test_no_quorum_in_an_attempt_that_was_given_up(first: Attempt) -> None:
    for name in first.names[1:]:
        with pytest.raises(Aborted, match="the attempt is over"):
            first.clients[name].receive(first.lie("included", b"\x7f"))


def forged(first: Attempt, trick: str) -> bytes:
    """Return a certificate that proves nothing."""
    certificates = pb.Certificates.FromString(first.server.certificate)
    (certificate,) = certificates.attempts
    votes = certificate.aborted.votes
    match trick:
        case "too few":
            del votes[4:]
        case "one many times":
            for vote in votes:
                vote.CopyFrom(votes[0])
        case "one for all":
            for vote in votes:
                vote.signature = votes[0].signature
        case "another attempt":
            certificate.transcript = bytes(32)
        case "agreements":
            run = Attempt(7).run(until=Step.AGREE)
            for vote in votes:
                message = run.replies[Step.AGREE][run.names[vote.position]]
                vote.signature = pb.Said.FromString(message).signature
        case "other clients":
            other = Attempt(7, names=[f"sybil-{i}" for i in range(7)]).run(until=Step.MASK)
            stolen = pb.Certificates.FromString(given_up(other, other.names)).attempts[0]
            certificate.aborted.CopyFrom(stolen.aborted)
    return certificates.SerializeToString()


@pytest.mark.parametrize(
    "trick",
    ["too few", "one many times", "one for all", "another attempt", "agreements", "other clients"],
)
def test_a_forged_certificate(first: Attempt, trick: str) -> None:
    with pytest.raises(Aborted, match="nothing proves that it was given up"):
        enter(another(1), receipts(first)[VICTIM], forged(first, trick))


def test_a_malformed_certificate(first: Attempt) -> None:
    with pytest.raises(Aborted, match="certificate of the attempt before is malformed"):
        enter(another(1), receipts(first)[VICTIM], b"\xff")


def test_it_takes_a_quorum_to_give_up() -> None:
    attempt = Attempt(7).run(until=Step.MASK)
    assert given_up(attempt, attempt.names[:4]) == b""
    attempt.hear("client-04", attempt.server.message("client-04") or b"")
    assert attempt.server.certificate


def test_a_signature_of_nobody_is_refused() -> None:
    attempt = Attempt(7).run(until=Step.MASK)
    told = attempt.server.abort()
    reply = attempt.clients["client-01"].receive(told["client-01"])
    with pytest.raises(ProtocolError, match="is not signed by its client"):
        attempt.server.receive("client-00", reply or b"")


def test_certificates_of_several_attempts_go_together(first: Attempt) -> None:
    """Whoever sent in the first and missed the second is shown both."""
    second = Attempt(6, another(1), names=first.names[1:]).run(until=Step.MASK)
    both = first.server.certificate + given_up(second, second.names)
    assert enter(another(2), receipts(first)[VICTIM], both).step is Step.ADVERTISE
    sent = second.clients["client-01"].receipt
    Client(another(2), identity("client-01"), trust(), Floors(), sent=sent, certificate=both)
    with pytest.raises(Aborted):
        enter(another(2), receipts(first)[VICTIM], second.server.certificate)


def test_the_same_attempt_is_not_entered_twice(first: Attempt) -> None:
    with pytest.raises(Aborted, match="in attempt 0 of round 3, so it does not enter attempt 0"):
        enter(CONFIG, receipts(first)[VICTIM], first.server.certificate)


@pytest.mark.parametrize(
    "ref", [Ref("run", 4, 0, "train"), Ref("run", 3, 0, "evaluate"), Ref("other", 3, 0, "train")]
)
def test_other_rounds_are_no_matter(first: Attempt, ref: Ref) -> None:
    other = replace(CONFIG, ref=ref)
    assert enter(other, receipts(first)[VICTIM], b"").step is Step.ADVERTISE


def test_a_coordinator_that_crashed_still_has_the_certificate(first: Attempt) -> None:
    again = Server.restored(
        CONFIG, identity("main", "coordinator"), trust(), client_names(7), records=first.records
    )
    assert again.certificate == first.server.certificate
