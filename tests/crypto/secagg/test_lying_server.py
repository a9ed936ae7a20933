"""A coordinator that lies: the honest client stops with the reason, and what it holds stays with it."""

from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256

import pytest

from fedcore.crypto.certificates import key_from_pem
from fedcore.crypto.secagg import Aborted, Client, Floors, Step, edges
from fedcore.crypto.secagg.keys import Pair
from fedcore.crypto.secagg.signing import say
from fedcore.wire.v1 import secagg_pb2 as pb
from tests.crypto.secagg.conftest import (
    CONFIG,
    VICTIM,
    Attempt,
    another,
    certificates_of,
    content,
    identity,
    lie,
    sparse,
    stops,
    trust,
    votes,
)


def cohort_of(attempt: Attempt, change: Callable[[pb.Cohort], None]) -> bytes:
    """Return the cohort as a liar changed it, with its signature."""
    attempt.advertise()
    told = pb.Cohort.FromString(content(attempt.server.proceed()[VICTIM]))
    change(told)
    return lie("cohort", attempt.config.digest, told.SerializeToString())


def readvertised(cohort: pb.Cohort, position: int, name: str, **fields: bytes) -> None:
    """Let a member of the cohort say something else of itself, signed by who is named."""
    who, said = identity(name), cohort.advertisements[position]
    advertisement = pb.Advertisement.FromString(said.content)
    for field, value in fields.items():
        setattr(advertisement, field, value)
    said.CopyFrom(
        pb.Said.FromString(
            say(key_from_pem(who.key), "advertise", CONFIG.digest, advertisement.SerializeToString())
        )
    )


def swap_keys(cohort: pb.Cohort) -> None:
    """Put the coordinator's own keys in the place of another client's."""
    advertisement = pb.Advertisement.FromString(cohort.advertisements[1].content)
    advertisement.mask_key = Pair.of(b"m" * 32).public
    cohort.advertisements[1].content = advertisement.SerializeToString()


def swap_the_victims(cohort: pb.Cohort) -> None:
    readvertised(cohort, 0, VICTIM, mask_key=Pair.of(b"m" * 32).public)


def leave_out_the_victim(cohort: pb.Cohort) -> None:
    del cohort.advertisements[0]


def shrink(cohort: pb.Cohort) -> None:
    del cohort.advertisements[2:]


def repeat_a_client(cohort: pb.Cohort) -> None:
    cohort.advertisements.insert(1, cohort.advertisements[1])


def reorder(cohort: pb.Cohort) -> None:
    cohort.advertisements.insert(1, cohort.advertisements.pop())


def reflect(cohort: pb.Cohort) -> None:
    mine = pb.Advertisement.FromString(cohort.advertisements[0].content).mask_key
    readvertised(cohort, 1, "client-01", channel_key=mine)


def low_order(cohort: pb.Cohort) -> None:
    readvertised(cohort, 1, "client-01", channel_key=bytes(32))


def short_key(cohort: pb.Cohort) -> None:
    readvertised(cohort, 1, "client-01", channel_key=b"k")


def other_federation(cohort: pb.Cohort) -> None:
    """Put in a client whom another authority has certified."""
    sybil = identity("client-01", "client", "others")
    leaf, issuer = certificates_of(sybil)
    advertisement = pb.Advertisement.FromString(cohort.advertisements[1].content)
    advertisement.leaf = leaf
    said = say(key_from_pem(sybil.key), "advertise", CONFIG.digest, advertisement.SerializeToString())
    cohort.advertisements[1].CopyFrom(pb.Said.FromString(said))
    cohort.issuers.append(issuer)


def no_client(cohort: pb.Cohort) -> None:
    """Put in the coordinator itself."""
    me = identity("main", "coordinator")
    advertisement = pb.Advertisement.FromString(cohort.advertisements[1].content)
    advertisement.leaf = certificates_of(me)[0]
    said = say(key_from_pem(me.key), "advertise", CONFIG.digest, advertisement.SerializeToString())
    cohort.advertisements[1].CopyFrom(pb.Said.FromString(said))


def told_by_a_client(cohort: pb.Cohort) -> None:
    cohort.leaf = pb.Advertisement.FromString(cohort.advertisements[1].content).leaf


def many_issuers(cohort: pb.Cohort) -> None:
    cohort.issuers.extend([b"x"] * 8)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (swap_keys, "advertisement of client-01 is not signed by its key for this attempt"),
        (swap_the_victims, "has keys for this client that are not its own"),
        (leave_out_the_victim, "does not have this client in it"),
        (shrink, "cohort has 2 clients, expected 3 to 16"),
        (repeat_a_client, "not in the order of its names, or one is in it twice"),
        (reorder, "not in the order of its names"),
        (reflect, "two clients of the cohort have the same key"),
        (low_order, "a client's key is of low order"),
        (short_key, "have 32 bytes each"),
        (other_federation, "does not lead to the federation's root"),
        (no_client, "fedcore://fed/coordinator/main is no client"),
        (told_by_a_client, "who is no coordinator"),
        (many_issuers, "9 issuers, expected at most 16 and 8"),
    ],
)
def test_a_cohort_that_does_not_hold(change: Callable[[pb.Cohort], None], reason: str) -> None:
    attempt = Attempt()
    stops(attempt, cohort_of(attempt, change), reason)


def test_a_cohort_that_nobody_signed() -> None:
    attempt = Attempt()
    attempt.advertise()
    said = pb.Said.FromString(attempt.server.proceed()[VICTIM])
    said.signature = b""
    stops(attempt, said.SerializeToString(), "not signed by the coordinator for this attempt")


def test_an_advertisement_of_an_old_attempt() -> None:
    """A lost client's keys of the attempt before, which the coordinator has opened since."""
    old = Attempt().run(until=Step.SHARE)
    attempt = Attempt(config=another(1))

    def replay(cohort: pb.Cohort) -> None:
        cohort.advertisements[1].CopyFrom(pb.Said.FromString(old.replies[Step.ADVERTISE]["client-01"]))

    stops(attempt, cohort_of(attempt, replay), "client-01 is not signed by its key for this attempt")


@pytest.mark.parametrize("step", [Step.SHARE, Step.RECEIVE, Step.CONFIRM, Step.MASK, Step.AGREE, Step.REVEAL])
def test_a_message_of_an_old_attempt(step: Step) -> None:
    old, attempt = Attempt().run(), Attempt(config=another(1))
    attempt.advertise()
    while attempt.server.step not in (step, Step.DONE):
        told = attempt.server.proceed()
        if attempt.server.step is not step:
            for name in told:
                attempt.hear(name, told[name])
    stops(attempt, old.told[step][VICTIM], "not signed by")


@pytest.mark.parametrize("step", ["delivery", "edges", "confirmed", "included", "quorum"])
def test_a_message_that_another_client_signed(step: str) -> None:
    before = {"delivery": Step.SHARE, "edges": Step.RECEIVE, "confirmed": Step.CONFIRM}
    before |= {"included": Step.MASK, "quorum": Step.AGREE}
    attempt = Attempt().run(until=before[step])
    forged = say(key_from_pem(identity("client-01").key), step, attempt.transcript, b"")
    stops(attempt, forged, f"'{step}' is not signed by the coordinator")


def test_a_message_out_of_place() -> None:
    attempt = Attempt().run(until=Step.SHARE)
    stops(attempt, attempt.lie("included", b"\x1f"), "says 'included', expected delivery or abort")


def test_bytes_that_are_no_message() -> None:
    attempt = Attempt().run(until=Step.SHARE)
    stops(attempt, b"\xff", "the message is no Said")


@pytest.mark.parametrize("parts", [[], [b""] * 5, [b"x" * 82] * 3])
def test_ciphertexts_that_are_not_one_from_each(parts: list[bytes]) -> None:
    attempt = Attempt().run(until=Step.SHARE)
    told = attempt.lie("delivery", pb.Ciphertexts(each=parts).SerializeToString())
    stops(attempt, told, f"{len(parts)} ciphertexts came from 4 clients")


def test_shares_that_were_swapped_do_not_open() -> None:
    """Another's ciphertext, its own, one of another length: all are complained about, none is used."""
    attempt = Attempt(7).run(until=Step.SHARE)
    sent = pb.Ciphertexts.FromString(content(attempt.replies[Step.SHARE][VICTIM])).each
    told = pb.Ciphertexts.FromString(content(attempt.server.proceed()[VICTIM])).each
    lies = pb.Ciphertexts(each=[told[1], told[0], sent[2], told[3][1:], b"", told[5]])
    reply = attempt.clients[VICTIM].receive(attempt.lie("delivery", lies.SerializeToString()))
    assert reply and edges.members(content(reply), 7) == {6}


def test_a_lie_about_who_dropped_out() -> None:
    """The victim's words have arrived, and the coordinator says that it is lost, to get its mask key too.

    The others believe it. But then the victim's seed, under which its words lie too, is revealed by nobody.
    """
    attempt = Attempt(7).run(until=Step.MASK)
    held = {name: attempt.clients[name]._secrets.held for name in attempt.names}
    told = attempt.lie("included", edges.bitmap(range(1, 7), 7))
    quorum = attempt.lie("quorum", votes([attempt.clients[name].receive(told) for name in attempt.names]))
    for name in attempt.names[1:]:
        reply = attempt.clients[name].receive(quorum)
        assert reply is not None
        seed, key = held[name][0]
        assert key in content(reply) and seed not in content(reply)


def test_both_shares_of_a_victim() -> None:
    """Once a set is signed no other is; and of each peer one share is revealed, once."""
    attempt = Attempt(7).run(until=Step.AGREE)
    other = attempt.lie("included", edges.bitmap(range(6), 7))
    stops(attempt, other, "says 'included', expected quorum")
    attempt.run(lost={Step.REVEAL: [VICTIM]})
    second = attempt.lie("quorum", content(attempt.told[Step.REVEAL]["client-01"]) + b"\n\x00")
    with pytest.raises(Aborted, match="expected nothing: the attempt is over"):
        attempt.clients["client-01"].receive(second)


@pytest.mark.parametrize("trick", ["too few", "one many times", "one for all", "another step", "no members"])
def test_a_quorum_that_is_none(trick: str) -> None:
    attempt = Attempt(7).run(until=Step.AGREE)
    agreed, received = (
        [pb.Said.FromString(attempt.replies[step][name]).signature for name in attempt.names]
        for step in (Step.AGREE, Step.RECEIVE)
    )
    tricks = {
        "too few": [pb.Vote(position=i, signature=agreed[i]) for i in range(4)],
        "one many times": [pb.Vote(position=1, signature=agreed[1])] * 7,
        "one for all": [pb.Vote(position=i, signature=agreed[1]) for i in range(7)],
        "another step": [pb.Vote(position=i, signature=received[i]) for i in range(7)],
        "no members": [pb.Vote(position=7 + i, signature=agreed[i]) for i in range(7)],
    }
    told = attempt.lie("quorum", pb.Votes(votes=tricks[trick]).SerializeToString())
    stops(attempt, told, "fewer than 5 of 7 clients")


@pytest.mark.parametrize(
    ("drawn_by", "reason"),
    [
        (range(9), "9 clients are said to have drawn this one, expected others and at most 6"),
        ([0, 1], "2 clients are said to have drawn this one, expected others"),
        ([2, 1], "do not ascend"),
        ([99], "or are not below 9"),
    ],
)
def test_who_drew_the_client(drawn_by: list[int], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sparse(monkeypatch, 4, 3)
    monkeypatch.setattr("fedcore.crypto.secagg.parameters.Graph.incoming", 6)
    attempt = Attempt(9).run(until=Step.CHOOSE)
    told = attempt.lie("neighbourhood", pb.Members(positions=drawn_by).SerializeToString())
    stops(attempt, told, reason)


@pytest.mark.parametrize(
    ("floors", "reason"),
    [
        (Floors(cohort=4), "may close with 3 clients; this device asks for 4"),
        (Floors(corrupt=0.3), "0.2 of the clients collude with the coordinator; this device asks for 0.3"),
    ],
)
def test_less_than_the_device_asks_for(floors: Floors, reason: str) -> None:
    with pytest.raises(Aborted, match=reason):
        Client(CONFIG, identity(VICTIM), trust(), floors)


def test_the_threshold_is_the_clients_own() -> None:
    """No message carries it: it follows from the cohort and from what is declared."""
    for n in range(3, 65):
        assert CONFIG.graph(n).threshold == 2 * n // 3
    attempt = Attempt(5, config=replace(CONFIG, corrupt=0.4))
    stops(attempt, unchecked_cohort(attempt), "cannot bear 2 that lie")


def unchecked_cohort(attempt: Attempt) -> bytes:
    """Return the cohort as a coordinator tells it that checks nothing."""
    said = [pb.Said.FromString(attempt.clients[name].advertise()) for name in attempt.names]
    leaf, issuer = certificates_of(identity("main", "coordinator"))
    told = pb.Cohort(advertisements=said, issuers=[issuer], leaf=leaf)
    return lie("cohort", attempt.config.digest, told.SerializeToString())


def test_what_a_device_sent_once_and_lost_its_keys_for() -> None:
    """A client that has restarted knows nothing of the attempt, and is lost to it."""
    attempt = Attempt().run(until=Step.SHARE)
    fresh = Client(CONFIG, identity(VICTIM), trust(), Floors())
    fresh.advertise()
    with pytest.raises(Aborted, match="has keys for this client that are not its own"):
        fresh.receive(attempt.told[Step.SHARE][VICTIM])


def test_another_model_for_another_client() -> None:
    """The configuration is in every signature, so whoever was given another model is not of this cohort."""
    other = replace(CONFIG, parameters=sha256(b"another").hexdigest())
    attempt = Attempt()
    attempt.clients["client-01"] = Client(other, identity("client-01"), trust(), Floors())
    stops(attempt, unchecked_cohort(attempt), "client-01 is not signed by its key for this attempt")
