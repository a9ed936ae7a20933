"""A whole agent, its worker and a coordinator over mutual TLS."""

import asyncio
import time
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest

from fedcore.client.agent import Agent
from fedcore.client.config import Config
from fedcore.client.state import State
from fedcore.crypto.identity import Identity
from fedcore.errors import AuthenticationError, FedcoreError, ProtocolError
from fedcore.messages import Outcome, Pause, Receipt, Ref, Verdict
from fedcore.wire import grpc
from fedcore.wire.codec import to_wire
from fedcore.wire.v1 import coordinator_pb2 as pb

Federation = Any  # of conftest, which importlib mode cannot import

TIMEOUT = 20.0


async def soon(awaitable: Any) -> Any:
    return await asyncio.wait_for(awaitable, TIMEOUT)


def numbers(data: bytes) -> list[float]:
    return [float(x) for x in np.frombuffer(data, "<f4")]


def test_a_round_and_its_outcome(federation: Federation) -> None:
    async def run() -> None:
        settings: dict[str, Any] = {"data": {"examples": 5}, "labels": {"site": "eu"}}
        async with federation.coordinator() as fake, federation.agent(**settings):
            hello = await soon(fake.hellos.get())
            assert list(hello.tasks) == ["Moody"] and not hello.evaluator and hello.labels == {"site": "eu"}
            for number in (1, 2, 3):
                work = fake.assignment(number, hello.tasks["Moody"])
                fake.push(work)
                head, data = await soon(fake.uploads.get())
                assert head.ref == work.ref and head.scalars == {"weight": 5.0, "loss": 10.0, "count": 5.0}
                assert head.vectors == (("delta", 4),) and numbers(data) == [2.0 * number] * 4
                fake.outcome(work.ref)
            evaluation = fake.assignment(3, hello.tasks["Moody"], kind="evaluate")
            fake.push(evaluation)
            head, data = await soon(fake.uploads.get())
            assert head.vectors == () and data == b"" and head.scalars["count"] == 0.0
            assert fake.fetched == [fake.assignment(n, "").parameters.sha256 for n in (1, 2, 3)]
            fake.outcome(evaluation.ref, "late", "too late")
            await federation.until(lambda: ("run/3.0/evaluate", "late") in federation.journal())

    asyncio.run(run())
    assert federation.lines("loaded.txt") == ["client-000000"]
    state = federation.folder / "agent" / "state"
    assert not list((state / "spool").iterdir()) and len(list((state / "cache").iterdir())) == 2
    verdicts = [row for row in federation.journal() if row[1] != "sent"]
    assert verdicts == [*((f"run/{n}.0/train", "folded") for n in (1, 2, 3)), ("run/3.0/evaluate", "late")]


def test_an_update_that_is_finished_is_sent_again_and_not_trained_again(federation: Federation) -> None:
    async def run() -> None:
        async with federation.coordinator() as fake:
            async with federation.agent():
                hello = await soon(fake.hellos.get())
                fake.permits.clear()  # the receipt is withheld
                work = fake.assignment(1, hello.tasks["Moody"])
                fake.push(work)
                first = await soon(fake.uploads.get())
                fake.hang_up()
                await soon(fake.hellos.get())
                fake.push(work)  # while the first upload is still under way: nothing is begun
                fake.permits.set()
                await federation.until(lambda: federation.journal() == [("run/1.0/train", "sent")])
                fake.push(work)  # the coordinator says that it has it
                await federation.until(lambda: federation.journal() == 2 * [("run/1.0/train", "sent")])
                assert fake.uploads.empty() and fake.asked == 2 * [work.ref]  # the stream had broken, too
            async with federation.agent():  # another process of the same device, as far as the folder knows
                await soon(fake.hellos.get())
                fake.arrived.clear()  # and a coordinator that does not have it any more
                fake.push(work)
                assert await soon(fake.uploads.get()) == first

    asyncio.run(run())
    assert federation.lines("trained.txt") == ["1.0"]


def test_a_receipt_a_verdict_and_new_work_in_one_message_are_heard_in_their_order(
    federation: Federation,
) -> None:
    async def run() -> None:
        async with federation.coordinator() as fake, federation.agent():
            digest = (await soon(fake.hellos.get())).tasks["Moody"]
            fake.permits.clear()
            first, second = (fake.assignment(number, digest) for number in (1, 2))
            fake.push(first)
            await soon(fake.uploads.get())
            said = [Receipt(first.ref), Outcome(first.ref, Verdict("folded")), second]
            fake.outbox.put_nowait(pb.ToAgent(batch=pb.Batch(messages=map(to_wire, said))))
            assert (await soon(fake.uploads.get()))[0].ref == second.ref
            assert federation.journal() == [(str(first.ref), "sent"), (str(first.ref), "folded")]

    asyncio.run(run())


def test_what_broke_off_goes_on_where_it_was(federation: Federation) -> None:
    async def run() -> None:
        async with federation.coordinator() as fake, federation.agent():
            digest = (await soon(fake.hellos.get())).tasks["Moody"]
            fake.cuts = [5, None, 11]  # of two downloads and an upload
            fake.push(work := fake.assignment(1, digest))
            head, data = await soon(fake.uploads.get())
            assert (head.ref, head.offset, numbers(data)) == (work.ref, 11, [2.0] * 4)
            assert fake.asked == [work.ref] and len(fake.fetched) == 2

    asyncio.run(run())
    assert federation.lines("trained.txt") == ["1.0"]


def test_a_pause_that_the_coordinator_asks_for_is_kept(federation: Federation) -> None:
    async def run() -> None:
        async with federation.coordinator() as fake, federation.agent():
            digest = (await soon(fake.hellos.get())).tasks["Moody"]
            fake.push(fake.assignment(1, digest))
            fake.push(Pause(0.7))
            asked = time.monotonic()
            assert (await soon(fake.uploads.get()))[0].ref.round == 1  # the work goes on meanwhile
            await soon(fake.hellos.get())
            assert 0.65 < time.monotonic() - asked < 5
            await federation.until(lambda: federation.last.state.connection()["state"] == "connected")

    asyncio.run(run())


def test_what_is_kept_counts_once_its_update_is_folded(federation: Federation) -> None:
    async def run() -> None:
        async with federation.coordinator() as fake, federation.agent():
            hello = await soon(fake.hellos.get())
            assert hello.pending == ()
            digest, last = hello.tasks["Moody"], None
            for number, status in ((1, "folded"), (2, "late"), (3, "refused"), (4, "folded")):
                work = fake.assignment(number, digest, folded=last)
                fake.push(work)
                await soon(fake.uploads.get())
                fake.outcome(work.ref, status)
                last = work.ref if status == "folded" else last
            fake.push(fake.assignment(4, digest, kind="evaluate", folded=last))
            await soon(fake.uploads.get())
            other = fake.assignment(1, digest, ref=Ref("other", 1, 0, "train"))
            fake.push(other)  # a run of its own starts from nothing
            await soon(fake.uploads.get())

    asyncio.run(run())
    seen = [line.partition("/")[2] or line for line in federation.lines("kept.txt")]
    assert seen == ["1.0/train:1", "2.0/train:3", "3.0/train:4", "4.0/train:5", "evaluate:5", "1.0/train:1"]


@pytest.mark.parametrize("way", ["outcome", "work"])
@pytest.mark.parametrize("folded", [True, False])
def test_an_agent_that_was_away_learns_what_became_of_its_update(
    federation: Federation, way: str, folded: bool
) -> None:
    """Either at once, for what it names when it comes back, or at the latest with its next work."""
    kept = federation.folder / "agent" / "state" / "kept" / "run"

    async def run() -> None:
        async with federation.coordinator() as fake:
            async with federation.agent():
                digest = (await soon(fake.hellos.get())).tasks["Moody"]
                fake.push(first := fake.assignment(1, digest))
                await soon(fake.uploads.get())
                fake.outcome(first.ref)
                await federation.until(lambda: (kept / "current").exists())
                fake.push(second := fake.assignment(2, digest, attempt=3, folded=first.ref))
                await soon(fake.uploads.get())
            async with federation.agent():
                assert (await soon(fake.hellos.get())).pending == (second.ref,)
                if way == "outcome":
                    fake.outcome(second.ref, "folded" if folded else "late")
                    await federation.until(lambda: [path.name for path in kept.iterdir()] == ["current"])
                    fake.hang_up()
                    assert (await soon(fake.hellos.get())).pending == ()
                last = second.ref if folded else first.ref
                fake.push(fake.assignment(4, digest, folded=last))
                await soon(fake.uploads.get())

    asyncio.run(run())
    assert federation.lines("kept.txt")[-1] == f"run/4.0/train:{7 if folded else 5}"


def test_the_same_work_again_is_sent_with_what_it_would_keep(federation: Federation) -> None:
    async def run() -> None:
        async with federation.coordinator() as fake:
            async with federation.agent():
                digest = (await soon(fake.hellos.get())).tasks["Moody"]
                fake.push(work := fake.assignment(1, digest))
                await soon(fake.uploads.get())
            async with federation.agent():
                await soon(fake.hellos.get())
                fake.arrived.clear()  # by a power failure, before the round was committed
                fake.push(work)
                await soon(fake.uploads.get())
                fake.outcome(work.ref)
                fake.push(fake.assignment(2, digest, folded=work.ref))
                await soon(fake.uploads.get())

    asyncio.run(run())
    assert federation.lines("kept.txt") == ["run/1.0/train:1", "run/2.0/train:3"]


def test_a_coordinator_that_was_away_is_found_again(federation: Federation) -> None:
    async def run() -> None:
        async with AsyncExitStack() as stack:
            async with federation.coordinator() as fake:
                await stack.enter_async_context(federation.agent())
                port, hello = int(federation.address.partition(":")[2]), await soon(fake.hellos.get())
                fake.refusal = (grpc.StatusCode.UNAVAILABLE, "going down")
                fake.push(fake.assignment(1, hello.tasks["Moody"]))
                await federation.until(lambda: fake.fetched != [])
            await asyncio.sleep(0.3)
            async with federation.coordinator(port) as fake:
                fake.assignment(1, "")  # the blob, which the agent still wants
                await soon(fake.hellos.get())
                head, _ = await soon(fake.uploads.get())
                assert head.ref == Ref("run", 1, 0, "train")

    asyncio.run(run())
    assert federation.lines("trained.txt") == ["1.0"]


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (grpc.StatusCode.UNAUTHENTICATED, AuthenticationError),
        (grpc.StatusCode.PERMISSION_DENIED, AuthenticationError),
        (grpc.StatusCode.INVALID_ARGUMENT, ProtocolError),
    ],
)
def test_an_agent_that_is_turned_away_ends(
    federation: Federation, code: grpc.StatusCode, error: type[FedcoreError]
) -> None:
    async def run() -> None:
        async with federation.coordinator() as fake:
            fake.refusal = (code, "not you")
            async with federation.agent() as agent:
                with pytest.raises(error, match="turned this agent away: not you"):
                    await soon(agent)

    asyncio.run(run())


def test_what_the_policy_forbids_is_declined_with_its_line(federation: Federation) -> None:
    async def run() -> None:
        settings = {"policy": {"smallest_cohort": 3}}
        async with federation.coordinator() as fake, federation.agent(**settings):
            digest = (await soon(fake.hellos.get())).tasks["Moody"]
            fake.push(fake.assignment(1, digest))
            decline = await soon(fake.declines.get())
            assert decline.ref.round == 1
            assert (
                decline.reason.startswith("agent.toml:")
                and "policy.smallest_cohort: 2 clients" in decline.reason
            )
            fake.push(fake.assignment(2, digest, cohort=3, layout="0" * 64))
            assert "layout" in (await soon(fake.declines.get())).reason
            fake.push(fake.assignment(3, digest, cohort=3))
            assert (await soon(fake.uploads.get()))[0].ref.round == 3

    asyncio.run(run())
    assert federation.lines("trained.txt") == ["3.0"]


def test_a_task_that_fails_in_any_way_leaves_the_agent_alive(federation: Federation) -> None:
    expected = {
        101: "ended with exit code 3",
        102: "the task raised ValueError",
        103: "longer than the 1.5 s to the deadline",
        104: "was killed by signal 9",
        105: "the task raised ValueError",
    }

    async def run() -> None:
        async with federation.coordinator() as fake, federation.agent():
            digest = (await soon(fake.hellos.get())).tasks["Moody"]
            for number, reason in expected.items():
                fake.push(fake.assignment(number, digest, deadline=1.5 if number == 103 else 30.0))
                decline = await soon(fake.declines.get())
                assert decline.ref.round == number and reason in decline.reason
                assert "4711" not in decline.reason  # what a task's error says stays on the device
            fake.push(fake.assignment(1, digest))
            assert (await soon(fake.uploads.get()))[0].ref.round == 1

    asyncio.run(run())
    text = (federation.folder / "agent" / "state" / "rounds.jsonl").read_text()
    assert "patient 4711 is odd" in text and "no torch here" in text


def test_newer_work_replaces_older(federation: Federation) -> None:
    async def run() -> None:
        async with federation.coordinator() as fake, federation.agent():
            digest = (await soon(fake.hellos.get())).tasks["Moody"]
            fake.push(fake.assignment(103, digest))
            await federation.until(lambda: federation.lines("trained.txt") == ["103.0"])
            fake.push(fake.assignment(1, digest, attempt=1))
            head, _ = await soon(fake.uploads.get())
            assert head.ref == Ref("run", 1, 1, "train")

    asyncio.run(run())
    assert federation.lines("trained.txt") == ["103.0", "1.1"]


def test_an_upload_that_comes_too_late_is_noted_and_the_next_one_goes_out(federation: Federation) -> None:
    async def run() -> None:
        async with federation.coordinator() as fake, federation.agent():
            digest = (await soon(fake.hellos.get())).tasks["Moody"]
            fake.push(work := fake.assignment(1, digest))
            await soon(fake.uploads.get())
            await federation.until(lambda: ("run/1.0/train", "sent") in federation.journal())
            fake.refusal = (grpc.StatusCode.FAILED_PRECONDITION, "the round has closed")
            fake.push(work)
            await federation.until(lambda: ("run/1.0/train", "refused") in federation.journal())
            fake.refusal = (grpc.StatusCode.INVALID_ARGUMENT, "altered")
            fake.push(work)
            assert "altered" in (await soon(fake.declines.get())).reason
            fake.refusal = None
            fake.push(work)  # its bytes were at fault, so they are made anew
            await soon(fake.uploads.get())

    asyncio.run(run())
    assert federation.lines("trained.txt") == ["1.0", "1.0"]


def test_parameters_that_arrive_altered_are_declined(federation: Federation) -> None:
    async def run() -> None:
        async with federation.coordinator() as fake, federation.agent():
            digest = (await soon(fake.hellos.get())).tasks["Moody"]
            work = fake.assignment(1, digest)
            fake.blobs[work.parameters.sha256] = bytes(16)
            fake.push(work)
            assert "16 bytes with SHA-256" in (await soon(fake.declines.get())).reason

    asyncio.run(run())
    assert not list((federation.folder / "agent" / "state" / "cache").iterdir())


def test_a_cache_that_was_altered_is_not_used(federation: Federation) -> None:
    async def run() -> None:
        async with federation.coordinator() as fake:
            work = fake.assignment(1, "0" * 64)
            cache = federation.agent_folder() / "state" / "cache"
            cache.mkdir()
            (cache / work.parameters.sha256).write_bytes(bytes(16))
            async with federation.agent():
                digest = (await soon(fake.hellos.get())).tasks["Moody"]
                fake.push(fake.assignment(1, digest))
                assert numbers((await soon(fake.uploads.get()))[1]) == [2.0] * 4

    asyncio.run(run())


def test_an_evaluator_tests_on_the_holdout(federation: Federation) -> None:
    async def run() -> None:
        async with federation.coordinator() as fake, federation.agent(evaluator=True):
            hello = await soon(fake.hellos.get())
            assert hello.evaluator
            fake.push(fake.assignment(1, hello.tasks["Moody"], kind="evaluate"))
            assert (await soon(fake.uploads.get()))[0].scalars["count"] == 7.0

    asyncio.run(run())
    assert federation.lines("loaded.txt") == []


def test_an_assignment_that_makes_no_sense_is_declined(federation: Federation) -> None:
    async def run() -> None:
        async with federation.coordinator() as fake, federation.agent():
            digest = (await soon(fake.hellos.get())).tasks["Moody"]
            message = fake.outbox
            fake.push(fake.assignment(1, digest))
            wire = message.get_nowait()
            wire.assignment.spec = '{"run": {"roundz": 3}}'
            message.put_nowait(wire)
            assert "roundz" in (await soon(fake.declines.get())).reason

    asyncio.run(run())


def test_an_agent_whose_certificate_has_expired_does_not_knock_for_ever(federation: Federation) -> None:
    async def run() -> None:
        async with federation.coordinator():
            pass  # nobody answers at its address any more
        config = Config.load(federation.agent_folder())
        identity = Identity.load(config.state / "identity")
        expired = replace(identity, not_after=datetime.now(UTC) - timedelta(seconds=1))
        with State(config.state).locked(), pytest.raises(AuthenticationError, match="enrol again"):
            await soon(Agent(config, expired).run())

    asyncio.run(run())
