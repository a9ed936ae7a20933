"""What must come out right: the sum, whoever is lost, in whatever order things come, and after a crash."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.crypto.secagg import Failed, Server, Step, edges
from fedcore.errors import ProtocolError
from fedcore.wire.v1 import secagg_pb2 as pb
from tests.crypto.secagg.conftest import (
    CONFIG,
    Attempt,
    Lost,
    client_names,
    content,
    identity,
    sparse,
    trust,
)

LOSSES = (Step.ADVERTISE, Step.SHARE, Step.RECEIVE, Step.CONFIRM, Step.MASK, Step.AGREE, Step.REVEAL)


@pytest.mark.parametrize("n", [3, 5, 9, 16])
@pytest.mark.parametrize("bits", [16, 32])
def test_masks_cancel_in_the_sum(n: int, bits: int) -> None:
    attempt = Attempt(n, replace(CONFIG, bits=bits)).run()
    assert attempt.unmasked() == attempt.expected()
    assert list(attempt.server.included) == client_names(n)


def test_masked_words_say_nothing() -> None:
    attempt = Attempt(5, replace(CONFIG, narrow=40_000, wide=4000)).run(until=Step.MASK)
    for name, (narrow, wide) in attempt.masked.items():
        for words in (narrow - attempt.words[name][0], wide - attempt.words[name][1]):
            counts = np.bincount(words.view(np.uint8), minlength=256)
            expected = words.nbytes / 256
            assert ((counts - expected) ** 2 / expected).sum() < 255 + 6 * np.sqrt(2 * 255)
    assert attempt.masked["client-00"][0].tolist() != attempt.masked["client-01"][0].tolist()


@st.composite
def losses(draw: st.DrawFn, n: int, most: int) -> dict[Step, list[str]]:
    """Return some of n clients, each lost at some step."""
    lost = draw(st.lists(st.sampled_from(client_names(n)), unique=True, max_size=most))
    steps = [draw(st.sampled_from(LOSSES)) for _ in lost]
    return {step: [name for name, at in zip(lost, steps, strict=True) if at is step] for step in LOSSES}


def included(n: int, lost: Lost) -> list[str]:
    """Return whose words must be in the sum: everybody's who was there until they had arrived."""
    before = [name for step in LOSSES[: LOSSES.index(Step.MASK) + 1] for name in lost[step]]
    return [name for name in client_names(n) if name not in before]


@given(lost=losses(7, 2), seed=st.integers(0, 2**32))
def test_the_sum_is_exact_whoever_is_lost(lost: Lost, seed: int) -> None:
    attempt = Attempt(7, seed=seed).run(lost=lost)
    assert list(attempt.server.included) == included(7, lost)
    assert attempt.unmasked() == attempt.expected()


@pytest.mark.slow
@settings(max_examples=25)
@given(lost=losses(12, 3), seed=st.integers(0, 2**32))
def test_the_sum_is_exact_on_a_sparse_graph(lost: Lost, seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        sparse(patch, 6, 3)
        attempt = Attempt(12, seed=seed).run(lost=lost)
        assert Step.CHOOSE in attempt.told
        assert set(attempt.server.included) <= set(included(12, lost))
        assert attempt.unmasked() == attempt.expected()


@settings(max_examples=25)
@given(lost=losses(9, 9), seed=st.integers(0, 2**32))
def test_the_sum_is_exact_or_nothing_is_revealed(lost: Lost, seed: int) -> None:
    attempt = Attempt(9, seed=seed)
    try:
        attempt.run(lost=lost)
    except Failed:
        assert not attempt.server.included or attempt.server.step in (Step.AGREE, Step.REVEAL)
        assert (attempt.server.step is Step.REVEAL) == (Step.REVEAL in attempt.told)
        with pytest.raises(AttributeError):
            attempt.unmasked()
    else:
        assert attempt.unmasked() == attempt.expected()


@pytest.mark.parametrize("step", LOSSES[1:])
def test_too_few_are_left_and_nothing_is_revealed(step: Step) -> None:
    lost = {step: client_names(7)[:3]}
    attempt = Attempt(7)
    with pytest.raises(Failed, match=r"\d of 7 clients are left after|shares of a secret of client-0"):
        attempt.run(lost=lost)
    assert step is Step.REVEAL or Step.REVEAL not in attempt.replies
    with pytest.raises(Failed):  # nor does asking again help
        attempt.server.proceed()


def test_a_cohort_that_is_too_small_never_begins() -> None:
    attempt = Attempt(5)
    attempt.advertise(client_names(5)[:3])
    with pytest.raises(Failed, match="the cohort has 2 clients, expected 3 to 16"):
        attempt.server.proceed()


def test_one_lost_before_its_shares_are_out_does_not_lose_the_round() -> None:
    attempt = Attempt(5).run(lost={Step.SHARE: ["client-02"]})
    assert attempt.unmasked() == attempt.expected()
    assert "client-02" not in attempt.server.included


def test_a_share_lost_in_one_direction() -> None:
    """Client 0 cannot open what client 1 sent it, though 1 can open what 0 sent: they mask all the same."""
    attempt = Attempt(7).run(until=Step.SHARE)
    garbled = edited(attempt, "client-01", lambda shares: [b"x" * 82, *shares[1:]])
    attempt.server._answers[1] = garbled  # as it is signed by its client, only the client could garble it
    attempt.run()
    assert attempt.unmasked() == attempt.expected()
    held = edges.members(content(attempt.replies[Step.RECEIVE]["client-00"]), 7)
    assert held == {2, 3, 4, 5, 6}


def edited(attempt: Attempt, name: str, change: Callable[[list[bytes]], list[bytes]]) -> bytes:
    said = pb.Ciphertexts.FromString(content(attempt.replies[Step.SHARE][name]))
    return pb.Ciphertexts(each=change(list(said.each))).SerializeToString()


def test_the_same_message_gets_the_same_answer() -> None:
    attempt = Attempt(5).run()
    client = attempt.clients["client-03"]
    for step in (Step.SHARE, Step.RECEIVE, Step.CONFIRM, Step.AGREE, Step.REVEAL):
        assert client.receive(attempt.told[step]["client-03"]) == attempt.replies[step]["client-03"]
    assert client.receive(attempt.told[Step.MASK]["client-03"]) is None
    assert client.advertise() == attempt.replies[Step.ADVERTISE]["client-03"]


def test_an_answer_that_comes_twice_counts_once() -> None:
    attempt = Attempt(5).run(until=Step.SHARE)
    attempt.server.receive("client-03", attempt.replies[Step.SHARE]["client-03"])
    attempt.run()
    assert attempt.unmasked() == attempt.expected()


def test_who_is_connected_again_hears_the_last_message() -> None:
    attempt = Attempt(5)
    assert attempt.server.message("client-03") is None
    attempt.run(until=Step.AGREE)
    assert attempt.server.message("client-03") == attempt.told[Step.AGREE]["client-03"]


def test_words_are_masked_once() -> None:
    attempt = Attempt(5).run(until=Step.MASK)
    with pytest.raises(ValueError, match="masked once"):
        attempt.clients["client-00"].mask(*attempt.masked["client-00"])


def test_words_of_another_size_are_not_masked() -> None:
    attempt = Attempt(5).run(until=Step.CONFIRM)
    told = attempt.server.proceed()
    assert attempt.clients["client-00"].receive(told["client-00"]) is None
    narrow, wide = attempt.words["client-00"]
    with pytest.raises(ValueError, match="expected"):
        attempt.clients["client-00"].mask(narrow[1:], wide)


def test_masked_words_that_come_after_the_sum_is_fixed_are_refused() -> None:
    attempt = Attempt(5).run(until=Step.AGREE, lost={Step.MASK: ["client-04"]})
    with pytest.raises(ProtocolError, match="masked words of client-04 are out of place"):
        attempt.server.uploaded("client-04")
    with pytest.raises(ProtocolError, match="masked words of client-00 are out of place"):
        attempt.server.uploaded("client-00")


@pytest.mark.parametrize("crash", LOSSES)
@pytest.mark.parametrize("draws", [False, True])
def test_a_coordinator_goes_on_after_a_crash(
    crash: Step, draws: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if draws:
        sparse(monkeypatch, 6, 3)
    attempt = Attempt(8).run(until=crash, lost={Step.RECEIVE: ["client-01"], Step.AGREE: ["client-02"]})
    before = attempt.server
    attempt.server = Server.restored(
        CONFIG,
        identity("main", "coordinator"),
        trust(),
        attempt.names,
        records=list(attempt.records),
        record=attempt.records.append,
    )
    assert (attempt.server.step, attempt.server.waiting) == (before.step, before.waiting)
    assert [attempt.server.message(name) for name in attempt.names] == [
        before.message(name) for name in attempt.names
    ]
    attempt.run(lost={Step.RECEIVE: ["client-01"], Step.AGREE: ["client-02"]})
    assert attempt.unmasked() == attempt.expected()
    again = Server.restored(
        CONFIG, identity("main", "coordinator"), trust(), attempt.names, records=attempt.records
    )
    assert attempt.unmasked(again) == attempt.expected()


def test_a_coordinator_with_another_certificate_cannot_go_on() -> None:
    attempt = Attempt(5).run(until=Step.RECEIVE)
    with pytest.raises(Failed, match="the certificate is another"):
        Server.restored(
            CONFIG, identity("other", "coordinator"), trust(), attempt.names, records=attempt.records
        )


@cache
def finished() -> Attempt:
    return Attempt(6).run(lost={Step.MASK: ["client-05"]})


@given(share=st.floats(0, 1))
def test_a_coordinator_may_crash_at_any_time(share: float) -> None:
    """What it had not recorded it hears again, in the same bytes, and tells the same."""
    attempt = finished()
    kept = attempt.records[: round(share * len(attempt.records))]
    server = Server.restored(CONFIG, identity("main", "coordinator"), trust(), attempt.names, records=kept)
    while server.step is not Step.DONE:
        for name in sorted(server.waiting):
            if server.step is Step.MASK and name in attempt.masked:
                server.uploaded(name)
            elif name in attempt.replies.get(server.step, {}):
                server.receive(name, attempt.replies[server.step][name])
        told = server.proceed()
        assert told == attempt.told[server.step]
    assert attempt.unmasked(server) == attempt.expected()
