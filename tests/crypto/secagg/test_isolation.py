"""A coordinator that tries to learn the sum of a few: nobody agrees to a set in which one stands alone.

With those that collude it could take the masks off such a sum: it would open the others' keys as if these
were lost. So each client looks out for everybody, also for those whom the coordinator does not ask.
"""

from collections.abc import Iterable

import pytest

from fedcore.crypto.certificates import key_from_pem
from fedcore.crypto.secagg import Aborted, Step, edges
from fedcore.crypto.secagg.signing import say
from fedcore.wire.v1 import secagg_pb2 as pb
from tests.crypto.secagg.conftest import VICTIM, Attempt, content, identity, sparse, stops, votes


def holders_of(attempt: Attempt) -> pb.Holders:
    """Return what the coordinator tells as edges, to be changed."""
    return pb.Holders.FromString(content(attempt.server.proceed()[VICTIM]))


def edges_told(attempt: Attempt, holders: Iterable[pb.Holder]) -> bytes:
    return attempt.lie("edges", pb.Holders(holders=holders).SerializeToString())


def resigned(attempt: Attempt, name: str, held: Iterable[int]) -> pb.Holder:
    """Return what a client that colludes says that it holds."""
    position, bits = attempt.names.index(name), edges.bitmap(held, len(attempt.names))
    said = pb.Said.FromString(say(key_from_pem(identity(name).key), "receive", attempt.transcript, bits))
    return pb.Holder(position=position, held=bits, signature=said.signature)


def test_edges_that_isolate() -> None:
    """Each client bears to lose as many as there are above the threshold, and nobody one more."""
    attempt = Attempt(7).run(until=Step.RECEIVE)
    told = holders_of(attempt).holders
    assert attempt.clients["client-01"].receive(edges_told(attempt, told[:5])) is not None
    stops(attempt, edges_told(attempt, told[:4]), "4 of 7 clients are left, expected at least 5")


def test_edges_that_isolate_somebody_else() -> None:
    """Every client looks at everybody's links: a client could not look out for itself once it is lost."""
    attempt = Attempt(7).run(until=Step.RECEIVE)
    told = list(holders_of(attempt).holders)
    for i in (4, 5, 6):
        told[i] = resigned(attempt, f"client-{i:02d}", set(range(7)) - {1, i})
    stops(
        attempt,
        edges_told(attempt, told),
        "client-01 would stand alone: it is linked to fewer than 4 of the 7",
    )


def test_edges_without_the_client() -> None:
    attempt = Attempt(7).run(until=Step.RECEIVE)
    stops(attempt, edges_told(attempt, holders_of(attempt).holders[1:]), "the edges leave this client out")


def test_edges_that_nobody_has_acknowledged() -> None:
    """Also not one who takes part in another cohort of the same attempt."""
    attempt = Attempt(7).run(until=Step.RECEIVE, lost={Step.SHARE: ["client-06"]})
    other = Attempt(7).run(until=Step.RECEIVE)
    told = [*holders_of(attempt).holders, holders_of(other).holders[6]]
    stops(attempt, edges_told(attempt, told), "client-06 has not signed that it holds these shares")


def test_edges_of_one_who_holds_what_it_was_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    sparse(monkeypatch, 4, 2)
    attempt = Attempt(9).run(until=Step.RECEIVE)
    drawn = pb.Members.FromString(content(attempt.replies[Step.CHOOSE][VICTIM])).positions
    told = list(holders_of(attempt).holders)
    stranger = min(set(range(1, 9)) - set(drawn))
    told[stranger] = resigned(attempt, f"client-{stranger:02d}", set(range(9)) - {stranger})
    stops(attempt, edges_told(attempt, told), "holds shares of this one, which gave it none")


@pytest.mark.parametrize(
    ("bits", "reason"),
    [(b"", "a bitmap of 5 has 0 bytes"), (b"\xff", "or bits beyond its end"), (b"\x1f", "shares of its own")],
)
def test_edges_that_are_no_bitmap(bits: bytes, reason: str) -> None:
    attempt = Attempt().run(until=Step.RECEIVE)
    told = list(holders_of(attempt).holders)
    said = pb.Said.FromString(
        say(key_from_pem(identity("client-01").key), "receive", attempt.transcript, bits)
    )
    told[1] = pb.Holder(position=1, held=bits, signature=said.signature)
    stops(attempt, edges_told(attempt, told), reason)


def test_edges_with_one_client_twice() -> None:
    attempt = Attempt().run(until=Step.RECEIVE)
    told = holders_of(attempt).holders
    stops(attempt, edges_told(attempt, [*told[:2], *told[1:]]), "positions of members do not ascend")


@pytest.mark.parametrize(
    ("included", "reason"),
    [
        ([1, 2], "2 of 5 clients are left, expected at least 4"),
        ([0, 1, 2], "3 of 5 clients are left, expected at least 4"),
    ],
)
def test_a_sum_of_too_few(included: list[int], reason: str) -> None:
    attempt = Attempt().run(until=Step.MASK)
    stops(attempt, attempt.lie("included", edges.bitmap(included, 5)), reason)


def test_a_sum_of_one_who_would_stand_alone_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those whom client 1 drew are left out, and the others, who are many, are asked to agree."""
    sparse(monkeypatch, 3, 1)
    attempt = Attempt(12).run(until=Step.MASK)
    drawn = pb.Members.FromString(content(attempt.replies[Step.CHOOSE]["client-01"])).positions
    told = attempt.lie("included", edges.bitmap(set(range(12)) - set(drawn), 12))
    stops(attempt, told, "client-01 would stand alone|client-.. would stand alone")


def test_the_victims_words_are_not_laid_bare_by_those_who_are_not_asked() -> None:
    """U1 is the victim and two that collude: its masks would come off if the honest others agreed to it.

    The victim itself is not asked, so the others have to look out for it.
    """
    attempt = Attempt(8).run(until=Step.MASK)
    told = attempt.lie("included", edges.bitmap([0, 6, 7], 8))
    for name in attempt.names[1:6]:
        with pytest.raises(Aborted, match="3 of 8 clients are left, expected at least 6"):
            attempt.clients[name].receive(told)


def test_a_sum_with_one_who_has_no_edges() -> None:
    attempt = Attempt(7).run(until=Step.MASK, lost={Step.SHARE: ["client-06"]})
    stops(attempt, attempt.lie("included", edges.bitmap(range(7), 7)), "in the sum that has no edges")


def test_a_sum_that_counts_words_which_were_never_sent() -> None:
    attempt = Attempt().run(until=Step.CONFIRM)
    assert attempt.clients[VICTIM].receive(attempt.server.proceed()[VICTIM]) is None
    stops(attempt, attempt.lie("included", edges.bitmap(range(5), 5)), "and has masked nothing")


def test_another_sum_for_another_client() -> None:
    """Half of them are told of one set, half of another: neither gets a quorum."""
    attempt = Attempt(8).run(until=Step.MASK)
    sums = [edges.bitmap(range(8), 8), edges.bitmap(range(7), 8)]
    replies = [
        attempt.clients[name].receive(attempt.lie("included", sums[i % 2]))
        for i, name in enumerate(attempt.names)
    ]
    told = attempt.lie("quorum", votes(replies))
    for name in attempt.names:
        with pytest.raises(Aborted, match="fewer than 6 of 8 clients have signed what this one has"):
            attempt.clients[name].receive(told)


def test_other_edges_for_another_client() -> None:
    """The victim alone is told of fewer: it never masks, for nobody else has confirmed its edges."""
    attempt = Attempt(8).run(until=Step.RECEIVE)
    told = holders_of(attempt).holders
    replies = [
        attempt.clients[name].receive(edges_told(attempt, told if i else told[:6]))
        for i, name in enumerate(attempt.names)
    ]
    victim = attempt.clients[VICTIM]
    stops(attempt, attempt.lie("confirmed", votes(replies)), "told others of other edges or another sum")
    with pytest.raises(ValueError, match="masked once, after the edges are confirmed"):
        victim.mask(*attempt.words[VICTIM])
