"""A lying coordinator: real agents, over the real wire, say which lie they saw and give nothing away.

One run, and a lie in each of its rounds. What the coordinator says is changed on its way out and signed again
with its own key: it is the coordinator who lies, not somebody on the wire.
"""

import asyncio
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedcore.crypto.secagg import Step, edges
from fedcore.crypto.secagg.keys import Pair, commitment
from fedcore.crypto.secagg.signing import say, votes
from fedcore.crypto.shamir import combine
from fedcore.messages import Ref, Secure
from fedcore.server.driver import Driver
from fedcore.server.secure import SecureRound
from fedcore.task import client_name
from fedcore.wire.v1 import secagg_pb2 as pb
from tests.security.conftest import deployed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

CLIENTS = 5
NAMES = [client_name(i) for i in range(CLIENTS)]
VICTIM, OTHERS = NAMES[0], NAMES[1:]
Told = dict[str, bytes]
SETS = ("run.rounds=8", "cohort.minimum=4", "evaluation.every=0", 'evaluation.where="holdout"')
LIES = {
    "a swapped key": "the advertisement of client-000004 is not signed by its key",
    "a shrunken cohort": "the cohort has 3 clients, expected 4 to 5",
    "a message of an older round": "the cohort is not signed by the coordinator for this attempt",
    "edges made up": "client-000004 has not signed that it holds these shares",
    "a drop-out that was none": "fewer than 4 of 5 clients have signed what this one has",
}
SEEN = dict(enumerate(LIES.values(), 1))  # by round
DROPPED, SMALL_SUM, BOTH_SHARES, TWO_SUMS = 5, 6, 7, 8
TWO_SIGNED = (TWO_SUMS, "agree")


def again(live: SecureRound, message: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """Return a message of the coordinator's with other content, and its true signature."""
    said, server = pb.Said.FromString(message), live.server
    context = live.config.digest if said.step == "cohort" else server._cohort.context.transcript
    return say(server._key, said.step, context, change(said.content))


def swap_a_key(content: bytes) -> bytes:
    """Put a mask key of the coordinator's own in the place of the last client's."""
    cohort = pb.Cohort.FromString(content)
    last = cohort.advertisements[-1]
    advertised = pb.Advertisement.FromString(last.content)
    advertised.mask_key = X25519PrivateKey.generate().public_key().public_bytes_raw()
    last.content = advertised.SerializeToString()
    return cohort.SerializeToString()


def shrink(content: bytes) -> bytes:
    """Keep the first three clients."""
    cohort = pb.Cohort.FromString(content)
    del cohort.advertisements[3:]
    return cohort.SerializeToString()


def make_up_a_link(content: bytes) -> bytes:
    """Say that the last client holds no shares of the victim's."""
    told = pb.Holders.FromString(content)
    last = told.holders[-1]
    last.held = edges.bitmap(edges.members(last.held, CLIENTS) - {0}, CLIENTS)
    return told.SerializeToString()


def without(*positions: int) -> Callable[[bytes], bytes]:
    """Say that some have dropped out."""
    return lambda content: edges.bitmap(edges.members(content, CLIENTS) - {*positions}, CLIENTS)


@dataclass
class Liar:
    """What the coordinator says in each round; kept: what it says later."""

    kept: Told = field(default_factory=dict)

    def tell(self, live: SecureRound, told: Mapping[str, bytes]) -> Told:
        """Return what is told instead."""
        changed, ref = dict(told), live.plan.ref
        if not told or ref.attempt:
            return changed
        step = pb.Said.FromString(next(iter(told.values()))).step
        match ref.round, step:
            case 1, "cohort":
                changed[VICTIM] = again(live, told[VICTIM], swap_a_key)
            case 2, "cohort":
                changed[VICTIM] = again(live, told[VICTIM], shrink)
                self.kept = dict(told)
            case 3, "cohort":
                changed[VICTIM] = self.kept[VICTIM]
            case 4, "edges":
                changed[VICTIM] = again(live, told[VICTIM], make_up_a_link)
            case 5, "included":
                changed[VICTIM] = again(live, told[VICTIM], without(CLIENTS - 1))
            case 5, "quorum":
                changed[VICTIM] = told[OTHERS[0]]
            case 6, "included":  # the victim is not asked
                changed |= {name: again(live, told[name], without(3, 4)) for name in OTHERS}
            case 7, "included":  # what comes of it: `second`
                self.kept = {name: again(live, told[name], without(0)) for name in OTHERS}
            case 8, "included":
                changed |= {name: again(live, told[name], without(0)) for name in OTHERS[1:]}
        return changed

    def second(self, live: SecureRound, told: Mapping[str, bytes]) -> Told:
        """Return what is told beside it: that the victim has dropped out after all."""
        asked = bool(told) and pb.Said.FromString(next(iter(told.values()))).step == "quorum"
        return self.kept if asked and live.plan.ref.round == BOTH_SHARES else {}


@dataclass(frozen=True)
class Played:
    """What came of a run: its rows and rounds, what was heard, and why agents left which round."""

    rows: list[dict[str, Any]]
    rounds: dict[int, SecureRound]
    heard: list[tuple[int, str, pb.Said]]
    aborted: dict[str, dict[int, str]]

    def revealed(self, round: int) -> dict[str, list[bytes]]:
        """Return the shares that clients have given in a round; nobody gives some twice."""
        said = [
            (client, said) for number, client, said in self.heard if (number, said.step) == (round, "reveal")
        ]
        assert len(said) == len({client for client, _ in said})
        return {client: list(pb.Shares.FromString(each.content).each) for client, each in said}


def lied_to(folder: Path, patch: pytest.MonkeyPatch) -> Played:
    """Play a run in which the coordinator lies."""
    liar, tell, hear, unmask = Liar(), SecureRound._tell, SecureRound.hear, SecureRound._unmask
    rounds, heard = dict[int, SecureRound](), list[tuple[int, str, pb.Said]]()

    def telling(live: SecureRound, told: Mapping[str, bytes]) -> None:
        rounds[live.plan.ref.round] = live
        tell(live, liar.tell(live, told))
        for client, message in liar.second(live, told).items():
            live.registry.send(client, Secure(live.plan.ref, message))

    def hearing(live: SecureRound, client: str, message: bytes) -> None:
        said = pb.Said.FromString(message)
        heard.append((live.plan.ref.round, client, said))
        signed = {name: said.signature for round, name, said in heard if (round, said.step) == TWO_SIGNED}
        if (live.plan.ref.round, said.step) != TWO_SIGNED or len(signed) < CLIENTS:
            hear(live, client, message)
            return
        # An honest coordinator would see that it has no quorum; this one says that it has.
        mixed = votes({NAMES.index(name): signature for name, signature in signed.items()})
        transcript = live.server._cohort.context.transcript
        quorum = say(live.server._key, "quorum", transcript, mixed.SerializeToString())
        for name in NAMES:
            live.registry.send(name, Secure(live.plan.ref, quorum))
        asyncio.get_running_loop().call_later(1.0, hear, live, client, message)

    def unmasking(live: SecureRound) -> None:
        if live.plan.ref.round == BOTH_SHARES:
            time.sleep(1.0)  # for what the second message may bring
        unmask(live)

    patch.setattr(SecureRound, "_tell", telling)
    patch.setattr(SecureRound, "hear", hearing)
    patch.setattr(SecureRound, "_unmask", unmasking)

    async def play() -> Played:
        async with deployed(folder) as deployment:
            deployment.start(NAMES)
            driver = await deployment.ended(await deployment.submit(CLIENTS, "secagg", *SETS))
            aborted = {name: by_round(deployment.aborted(name)) for name in NAMES}
            return Played(driver.rows, rounds, heard, aborted)

    return asyncio.run(play())


def by_round(reasons: Mapping[Ref, str]) -> dict[int, str]:
    return {ref.round: reason for ref, reason in reasons.items()}


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Played]:
    with pytest.MonkeyPatch.context() as patch:
        yield lied_to(tmp_path_factory.mktemp("lies"), patch)


@pytest.mark.parametrize(("round", "seen"), SEEN.items(), ids=["-".join(lie.split()) for lie in LIES])
def test_a_lie_is_named_and_the_victim_gives_nothing_away(played: Played, round: int, seen: str) -> None:
    assert re.search(seen, played.aborted[VICTIM][round])
    assert VICTIM not in played.revealed(round)


def test_the_round_goes_on_without_the_one_that_was_lied_to(played: Played) -> None:
    assert all(set(played.aborted[name]) == {SMALL_SUM, BOTH_SHARES, TWO_SUMS} for name in OTHERS)
    # In round 5 its words were out, and it is the others who take off its mask.
    assert [row["folded"] for row in played.rows] == [4, 4, 4, 4, 5, 0, 5, 0]
    assert [row["round"] for row in played.rows if "skipped" in row] == [SMALL_SUM, TWO_SUMS]


def test_nobody_agrees_to_a_sum_over_the_victim_and_a_few(played: Played) -> None:
    """With clients of its own among the few, and the others' shares, the coordinator could lay it bare."""
    for name in OTHERS:
        assert "3 of 5 clients are left, expected at least 4" in played.aborted[name][SMALL_SUM]
    assert played.revealed(SMALL_SUM) == {}


def test_a_second_question_is_named(played: Played) -> None:
    for name in OTHERS:
        assert "says 'included', expected nothing: the attempt is over" in played.aborted[name][BOTH_SHARES]


@pytest.mark.parametrize("round", [DROPPED, BOTH_SHARES])
def test_what_is_revealed_of_a_client_opens_one_of_its_secrets(played: Played, round: int) -> None:
    cohort = played.rounds[round].server._cohort
    victim, threshold = cohort.members[0], cohort.graph.threshold
    shares = {NAMES.index(holder) + 1: played.revealed(round)[holder][0] for holder in OTHERS[:threshold]}
    secret = combine(shares, threshold)
    assert commitment(cohort.config.digest, secret) == victim.commitment
    assert Pair.of(secret).public != victim.mask_key


def test_where_two_sums_are_told_nobody_gives_anything(played: Played) -> None:
    assert played.revealed(TWO_SUMS) == {}
    unlike = "fewer than 4 of 5 clients have signed what this one has"
    assert all(unlike in played.aborted[name][TWO_SUMS] for name in NAMES)


def test_a_round_that_is_said_to_have_failed_is_not_repeated_without_the_victim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With both sums the coordinator could subtract one from the other."""
    aggregate, cohort = SecureRound._aggregate, Driver.cohort

    async def claiming(live: SecureRound) -> None:
        await aggregate(live)
        assert live.plan.ref.attempt or live.server.step is Step.DONE  # the sum is known
        live.lacks = "a claim"

    def leaving_out(driver: Driver, ref: Ref, *arguments: Any) -> tuple[str, ...]:
        return tuple(name for name in cohort(driver, ref, *arguments) if not ref.attempt or name != VICTIM)

    monkeypatch.setattr(SecureRound, "_aggregate", claiming)
    monkeypatch.setattr(Driver, "cohort", leaving_out)
    monkeypatch.setattr(SecureRound, "spent", False)

    async def play() -> None:
        async with deployed(tmp_path) as deployment:
            deployment.start(NAMES)
            driver = await deployment.submit(CLIENTS, "secagg", "cohort.minimum=3")
            async with asyncio.timeout(120):
                while not all(map(deployment.aborted, OTHERS)):  # noqa: ASYNC110 - files of other processes
                    await asyncio.sleep(0.05)
            await driver.stop()
            for name in OTHERS:
                (ref, reason), *_ = deployment.aborted(name).items()
                assert (ref.round, ref.attempt) == (1, 1)
                assert "has sent masked words in attempt 0 of round 1, and nothing proves" in reason

    asyncio.run(play())
