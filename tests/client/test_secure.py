"""An agent in a round whose updates are masked, with the real protocol on the other side."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedcore.client.config import Config
from fedcore.client.secure import PENDING, Attempt
from fedcore.client.sent import Sent
from fedcore.client.state import State
from fedcore.client.status import status_of
from fedcore.crypto.secagg import Client, Floors, Server, Step
from fedcore.crypto.trust import Trust
from fedcore.messages import Assignment, Ref, Secure, Update, UploadHead
from fedcore.spec import RunSpec
from fedcore.strategies import from_table
from fedcore.strategies.rounds import train_plan
from fedcore.strategies.words import Accumulator, Words, encoded
from fedcore.wire import grpc
from fedcore.wire.secure import config_of

pytestmark = pytest.mark.slow  # waits for deadlines, twelve seconds together

Federation = Any  # of conftest, which importlib mode cannot import
Fake = Any

AGENT = "client-000000"
SPEC = RunSpec().with_(
    "cohort.size=5", "cohort.minimum=4", "encryption.updates=secagg", "encryption.encoding=exact"
)
Q32 = SPEC.with_("encryption.encoding=q32", "limits.norm=50.0")


async def soon(awaitable: Any) -> Any:
    return await asyncio.wait_for(awaitable, 20.0)


@dataclass
class Others:
    """A coordinator and four clients in this process, who play a round with the agent."""

    federation: Federation
    fake: Fake
    work: Assignment
    clients: dict[str, Client] = field(default_factory=dict)
    uploads: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        spec, ref, layout = self.work.spec, self.work.ref, self.federation.layout
        names = (AGENT, *(f"other-{i}" for i in range(4)))
        self.plan = train_plan(from_table(spec.strategy), spec, layout, ref, names, 5)
        config = config_of("fed", ref, spec, self.work.parameters, 5, self.plan.sizes)
        coordinator = self.federation.identity("coordinator", "main")
        self.trust = Trust(coordinator.root, "fed")
        self.server = Server(config, coordinator, self.trust, names)
        for name in names[1:]:
            identity = self.federation.identity("client", name)
            self.clients[name] = Client(config, identity, self.trust, Floors())

    def update(self, name: str) -> Update:
        """Return what another client sends; the agent's is that of Moody with three examples."""
        place = self.plan.cohort.index(name)
        delta = np.full(4, 2 * self.work.ref.round if name == AGENT else place, np.float32)
        count = 3.0 if name == AGENT else float(place)
        return Update({"delta": delta}, {"weight": count, "loss": 2 * count, "count": count})

    def sum(self, *names: str) -> bytes:
        """Return the words of a sum without masks."""
        total = Accumulator(self.plan)
        for name in names:
            total.add(self.update(name))
        return total.words.narrow.tobytes() + total.words.wide.tobytes()

    async def heard(self) -> Secure:
        message: Secure = await soon(self.fake.secures.get())
        assert message.ref == self.work.ref
        return message

    async def advertised(self) -> None:
        """Take everybody's advertisement and tell the cohort."""
        for name, client in self.clients.items():
            self.server.receive(name, client.advertise())
        self.server.receive(AGENT, (await self.heard()).message)
        await self.proceed()

    async def proceed(self) -> None:
        """End a step and tell what is next."""
        self.told = dict(self.server.proceed())
        if AGENT in self.told:
            self.fake.push(Secure(self.work.ref, self.told[AGENT]))

    async def answered(self) -> None:
        """Take everybody's answers to a step, and go on to the next."""
        await self.collected()
        await self.proceed()

    async def until(self, step: Step) -> None:
        """Play up to a step."""
        while self.server.step is not step:
            await self.answered()

    async def collected(self) -> None:
        """Take everybody's answers to a step."""
        for name in sorted(self.server.waiting - {AGENT}):
            reply = self.clients[name].receive(self.told[name])
            if reply is None:
                self.uploads[name] = self.masked(name)
                self.server.uploaded(name)
            else:
                self.server.receive(name, reply)
        if AGENT in self.server.waiting:
            if self.server.step is Step.MASK:
                head, self.uploads[AGENT] = await soon(self.fake.uploads.get())
                assert (head.scalars, head.vectors) == ({}, ())
                self.server.uploaded(AGENT)
            else:
                self.server.receive(AGENT, (await self.heard()).message)

    def masked(self, name: str) -> bytes:
        words = encoded(self.plan, self.update(name))
        self.clients[name].mask(words.narrow, words.wide)
        return words.narrow.tobytes() + words.wide.tobytes()

    def unmasked(self) -> bytes:
        """Return the sum of those who are in it, without its masks."""
        total = Accumulator(self.plan)
        for name in self.server.included:
            total.add_words(Words.read(self.plan, np.frombuffer(self.uploads[name], np.uint8)))
        self.server.unmask(total.words.narrow, total.words.wide)
        return total.words.narrow.tobytes() + total.words.wide.tobytes()


Play = Callable[[Fake, Callable[..., Others]], Any]


def play(federation: Federation, script: Play, **settings: Any) -> None:
    """Run a script against an agent; it gets the fake coordinator, and a way to hand out a round."""

    async def run() -> None:
        async with federation.coordinator() as fake, federation.agent(**settings):
            digest = (await soon(fake.hellos.get())).tasks["Moody"]

            def hand_out(round: int = 1, spec: RunSpec = SPEC, **changes: Any) -> Others:
                work = fake.assignment(round, digest, spec=spec, cohort=5, **changes)
                fake.push(work)
                return Others(federation, fake, work)

            await script(fake, hand_out)

    asyncio.run(run())


@pytest.mark.parametrize("spec", [SPEC, Q32])
def test_the_sum_is_that_of_the_plain_words(federation: Federation, spec: RunSpec) -> None:
    async def script(fake: Fake, hand_out: Callable[..., Others]) -> None:
        round = hand_out(spec=spec)
        await round.advertised()
        await round.until(Step.DONE)
        assert round.unmasked() == round.sum(*round.plan.cohort)
        assert round.uploads[AGENT] != round.sum(AGENT), "it has left this device masked"
        fake.outcome(round.work.ref)
        await federation.until(lambda: ("run/1.0/train", "folded") in federation.journal())
        await federation.until(lambda: not list((federation.folder / "agent/state/spool").iterdir()))
        again = hand_out(2, spec=spec)
        await again.advertised()

    play(federation, script)


def test_what_was_said_is_said_again_where_a_connection_was_lost(federation: Federation) -> None:
    async def script(fake: Fake, hand_out: Callable[..., Others]) -> None:
        round = hand_out()
        first = await round.heard()
        fake.hang_up()
        await soon(fake.hellos.get())
        fake.push(round.work)
        assert await round.heard() == first
        fake.secures.put_nowait(first)
        await round.advertised()
        first = await round.heard()
        fake.hang_up()
        await soon(fake.hellos.get())
        fake.push(Secure(round.work.ref, round.told[AGENT]))
        assert await round.heard() == first
        fake.secures.put_nowait(first)
        fake.refusal = (grpc.StatusCode.UNAVAILABLE, "going down")
        await round.until(Step.MASK)
        fake.push(Secure(round.work.ref, round.told[AGENT]))  # again: nothing is masked twice
        await asyncio.sleep(0.5)
        fake.refusal = None
        await round.until(Step.DONE)
        assert round.unmasked() == round.sum(*round.plan.cohort)
        assert fake.uploads.empty()

    play(federation, script)
    assert federation.lines("trained.txt") == ["1.0"]


def test_an_agent_that_was_started_again_has_lost_its_keys_and_says_so(federation: Federation) -> None:
    async def run() -> None:
        async with federation.coordinator() as fake:
            async with federation.agent():
                digest = (await soon(fake.hellos.get())).tasks["Moody"]
                fake.push(work := fake.assignment(1, digest, spec=SPEC, cohort=5))
                round = Others(federation, fake, work)
                await round.advertised()
                await round.heard()
            async with federation.agent():
                await soon(fake.hellos.get())
                fake.push(Secure(work.ref, round.told[AGENT]))
                assert "it was started again" in (await soon(fake.declines.get())).reason
                fake.push(work := fake.assignment(2, digest, spec=SPEC, cohort=5))
                await Others(federation, fake, work).advertised()

    asyncio.run(run())


@pytest.mark.parametrize("sent", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_stop_is_told_unless_the_words_are_out(federation: Federation, sent: bool) -> None:
    """Those count without this device, whose masks the others take out of the sum."""

    async def script(fake: Fake, hand_out: Callable[..., Others]) -> None:
        round = hand_out()
        if sent:
            await until_sent(round)
            await federation.until(lambda: ("run/1.0/train", "sent") in federation.journal())
        else:
            await round.advertised()
        await soon(federation.last.leave())
        declined = () if sent else (await soon(fake.declines.get()),)
        assert [decline.reason for decline in declined] == ([] if sent else ["the device is shutting down"])
        assert fake.declines.empty()

    play(federation, script)


async def until_sent(round: Others) -> None:
    """Play until the masked words are here."""
    await round.advertised()
    await round.until(Step.MASK)
    await round.collected()


def test_a_round_again_needs_the_certificate_and_an_older_one_is_refused(federation: Federation) -> None:
    """Whoever had the sum could otherwise have it made again without one client."""

    async def script(fake: Fake, hand_out: Callable[..., Others]) -> None:
        first = hand_out(2)
        await until_sent(first)
        hand_out(2, attempt=1)
        assert "nothing proves that it was given up" in (await soon(fake.declines.get())).reason
        hand_out(2, attempt=0)
        assert "takes no part in run/2.0/train any more" in (await soon(fake.declines.get())).reason
        hand_out(1)
        assert "takes no part in run/1.0/train any more" in (await soon(fake.declines.get())).reason

    play(federation, script)
    assert federation.lines("trained.txt") == ["2.0"], "it refuses before it trains"
    assert ("run/2.1/train", "aborted") in federation.journal()


def test_a_round_that_was_given_up_is_entered_again(federation: Federation) -> None:
    async def script(fake: Fake, hand_out: Callable[..., Others]) -> None:
        first = hand_out()
        await until_sent(first)
        first.told = dict(first.server.abort())
        fake.push(Secure(first.work.ref, first.told[AGENT]))
        for name in ("other-0", "other-1", "other-2"):
            reply = first.clients[name].receive(first.told[name])
            assert reply
            first.server.receive(name, reply)
        first.server.receive(AGENT, (await first.heard()).message)
        second = hand_out(1, attempt=1, certificate=first.server.certificate)
        await second.advertised()
        await second.until(Step.DONE)
        assert second.unmasked() == second.sum(*second.plan.cohort)

    play(federation, script)


def test_a_coordinator_that_lies_is_left_with_the_reason(federation: Federation) -> None:
    async def script(fake: Fake, hand_out: Callable[..., Others]) -> None:
        round = hand_out()
        await until_sent(round)
        fake.push(Secure(round.work.ref, b"\x0a\x08included\x12\x01\x03"))
        assert "'included'" in (await soon(fake.declines.get())).reason
        fake.outcome(round.work.ref, "refused", "it declined")
        await federation.until(lambda: ("run/1.0/train", "refused") in federation.journal())

    play(federation, script)
    (row,) = status_of(Config.load(federation.folder / "agent"))["rounds"]
    assert row["event"] == "aborted" and "'included'" in row["reason"], "it outranks the verdict"


def test_the_deadline_ends_the_wait_for_others(federation: Federation) -> None:
    async def script(fake: Fake, hand_out: Callable[..., Others]) -> None:
        hand_out(deadline=3.0)
        reason = (await soon(fake.declines.get())).reason
        assert reason == "too few others were ready before the deadline"

    play(federation, script)


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        ({"smallest_cohort": 5}, "policy.smallest_cohort: a sum may be over 4 clients, expected at least 5"),
        ({"corrupt": 0.3}, "policy.corrupt: the run holds while 0.2"),
    ],
)
def test_the_owners_floors_hold(federation: Federation, policy: dict[str, Any], reason: str) -> None:
    async def script(fake: Fake, hand_out: Callable[..., Others]) -> None:
        hand_out()
        assert reason in (await soon(fake.declines.get())).reason

    play(federation, script, policy=policy)
    assert federation.lines("trained.txt") == []


class Scripted:
    """A client of the protocol that answers whatever it hears, and masks nothing."""

    receipt = b"receipt"

    def advertise(self) -> bytes:
        return b"keys"

    def receive(self, message: bytes) -> bytes | None:
        return None if message == b"edges" else b"re: " + message

    def mask(self, narrow: Any, wide: Any) -> None:
        pass


def test_one_whose_words_are_out_answers_a_while_after_the_deadline(tmp_path: Path) -> None:
    """The others may need its shares; one that has sent nothing has nothing to wait for."""
    state, ref, told = State(tmp_path), Ref("run", 1, 0, "train"), list[bytes]()
    (tmp_path / "spool").mkdir()
    state.payload(ref).write_bytes(bytes(8))

    async def upload(head: UploadHead) -> None:
        assert (tmp_path / "sent" / "run.train").exists(), "before the first byte leaves"
        told.append(b"words")

    def tell(secure: Secure) -> None:
        told.append(secure.message)

    async def run() -> None:
        client: Any = Scripted()
        attempt = Attempt(ref, client, (32, 0, 1), state, Sent(tmp_path / "sent"), tell, upload)
        task = asyncio.create_task(attempt.run(time.monotonic() + 1.0))
        attempt.hear(b"edges")
        await asyncio.sleep(1.1)
        attempt.hear(b"edges")
        attempt.hear(b"included")
        await asyncio.wait_for(task, 5.0)

    asyncio.run(run())
    assert told == [b"keys", b"words", b"re: included"]


def test_a_coordinator_cannot_fill_the_memory(tmp_path: Path) -> None:
    nobody: Any = None
    state, ref = State(tmp_path), Ref("run", 1, 0, "train")
    attempt = Attempt(ref, nobody, (32, 0, 1), state, Sent(tmp_path), nobody, nobody)
    for _ in range(10 * PENDING):
        attempt.hear(b"again")
    assert attempt.inbox.qsize() == PENDING
