"""Rounds of secure aggregation over the wire: the bits of open ones, whoever is lost, refused or lies."""

import asyncio
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import pairwise
from threading import Event
from typing import Any

import numpy as np
import pytest

from fedcore.crypto.identity import Identity
from fedcore.crypto.names import Role
from fedcore.crypto.secagg import Step
from fedcore.layout import Vector
from fedcore.messages import Assignment, Ref, Secure, Update, Work
from fedcore.server.secure import TRAINING, SecureRound
from fedcore.spec import RunSpec
from fedcore.strategies import from_table
from fedcore.strategies.rounds import Round, advance, initial_state, receive, train_plan
from fedcore.wire import grpc
from fedcore.wire.v1 import coordinator_pb2 as pb
from tests.server.conftest import (
    LAYOUT,
    Agent,
    Federation,
    Running,
    answer,
    initial,
    reference,
    same,
    sized,
    spec_of,
    until,
)
from tests.server.devices import Masking, hidden_parts

pytestmark = pytest.mark.slow  # rounds with deadlines, half a minute together

STEPS = tuple(step for step in Step if step not in (Step.CHOOSE, Step.ABORT, Step.DONE))  # complete graph
LATER = STEPS[-2:]  # than the sum is fixed
QUICK = (Step.SHARE, Step.MASK, Step.AGREE)
EACH = [step if step in QUICK else pytest.param(step, marks=pytest.mark.slow) for step in STEPS]
NAMES = [f"client-{i}" for i in range(5)]
SECAGG = {"updates": "secagg", "corrupt": 0.0, "lost": 0.2}


def secured(rounds: int = 2, deadline: float = 20.0, **cohort: Any) -> RunSpec:
    table = {"size": 5, "minimum": 4, "deadline": deadline, **cohort}
    return spec_of(rounds=rounds, cohort=table, encryption=SECAGG)


def after_one_round(spec: RunSpec, folded: list[str], number: int = 1) -> Vector:
    """Return the model after a round in which only some of the cohort are in the sum."""
    strategy = from_table(spec.strategy)
    state, ref = initial_state(strategy, initial(LAYOUT)), Ref("reference", number, 0, "train")
    round = Round(train_plan(strategy, spec, LAYOUT, ref, tuple(NAMES), len(NAMES)))
    for client in folded:
        receive(round, client, answer(ref, client, state.parameters))
    round.close()
    return advance(strategy, round, state, spec.run.seed).parameters.shared


def without_seconds(rows: Iterable[str]) -> list[dict[str, float]]:
    return [{k: v for k, v in json.loads(row).items() if k != "seconds"} for row in rows]


async def join(federation: Federation, name: str, device: Masking | None = None) -> tuple[Agent, Masking]:
    device = device or Masking(federation.identity("client", name))
    return await federation.agent(name, device.work, heed=device.heed), device


async def joined(federation: Federation) -> tuple[list[Agent], list[Masking]]:
    pairs = [await join(federation, name) for name in NAMES]
    return [agent for agent, _ in pairs], [device for _, device in pairs]


def test_masked_updates_give_the_same_bits(running: Running) -> None:
    async def run() -> None:
        async with running() as federation:
            spec = secured(rounds=3)
            agents, devices = await joined(federation)
            name = await federation.submit(spec)
            info = await federation.ended(name)
            assert (info.state, info.detail) == ("finished", "")
            state, rows = reference(spec, LAYOUT, NAMES)
            assert same(federation.parameters(name).shared, state.parameters.shared)
            assert same(federation.parameters(name).buffers, state.parameters.buffers)
            assert without_seconds(info.metrics) == rows
            await until(lambda: all(len(agent.outcomes) == 6 for agent in agents))
            assert {outcome.verdict.status for agent in agents for outcome in agent.outcomes} == {"folded"}
            assert all(len(device.clients) == 6 for device in devices)  # evaluations too
            assert list(federation.coordinator.journals.folder.iterdir()) == []

    asyncio.run(run())


@pytest.mark.parametrize("step", EACH)
def test_a_client_that_is_lost_at_a_step_does_not_lose_the_round(running: Running, step: Step) -> None:
    """Once all masked words are there, not even where a round asks all clients."""

    async def run() -> None:
        async with running() as federation:
            spec = secured(rounds=1, deadline=3.0, minimum=5 if step in LATER else 4)
            agents, devices = await joined(federation)
            devices[2].stop = (1, step)
            name = await federation.submit(spec)
            info = await federation.ended(name)
            assert (info.state, info.detail) == ("finished", "")
            folded = NAMES if step in LATER else [client for client in NAMES if client != "client-2"]
            row = json.loads(info.metrics[0])
            assert row["folded"] == len(folded)
            assert same(federation.parameters(name).shared, after_one_round(spec, folded))
            await until(lambda: agents[2].outcomes)
            assert agents[2].outcomes[0].verdict.status == ("folded" if step in LATER else "late")

    asyncio.run(run())


@pytest.mark.parametrize("step", [Step.SHARE, Step.MASK, Step.REVEAL])
def test_a_client_that_declines_or_disconnects_is_not_waited_for(running: Running, step: Step) -> None:
    """The deadline is far, so the run would not end in time if a step waited for either of them."""

    async def run() -> None:
        async with running() as federation:
            spec = secured(rounds=1, deadline=60.0, minimum=3, size=7)
            agents, devices = await joined(federation)

            async def declining(agent: Agent, said: Secure) -> None:
                ref = said.ref
                if (ref.kind, devices[0].clients[ref].step) == ("train", step):
                    await agent.decline(ref, "the coordinator lies")
                else:
                    await devices[0].heed(agent, said)

            agents[0].heed = declining
            await join(federation, "client-5")
            await join(federation, "client-6")
            name = await federation.submit(spec)
            info = await federation.ended(name)
            assert json.loads(info.metrics[0])["folded"] == (7 if step in LATER else 6)
            if step not in LATER:
                assert agents[0].outcomes[0].verdict.reason == "declined: the coordinator lies"

    asyncio.run(run())


def test_those_who_come_after_the_goal_are_late_and_cost_nothing(running: Running) -> None:
    async def run() -> None:
        async with running() as federation:
            spec = secured(rounds=1, deadline=60.0, size=4, over_select=1.25)
            agents, devices = await joined(federation)
            devices[4].stop = (1, Step.ADVERTISE)
            name = await federation.submit(spec)
            info = await federation.ended(name)
            assert json.loads(info.metrics[0])["folded"] == 4
            await until(lambda: agents[4].outcomes)
            assert agents[4].outcomes[0].verdict.status == "late"

    asyncio.run(run())


def test_an_upload_that_never_ends_and_a_decline_after_one_cost_nothing(running: Running) -> None:
    async def run() -> None:
        async with running() as federation:
            agents, devices = await joined(federation)
            devices[0].stop = (1, Step.MASK)
            name = await federation.submit(secured(rounds=1, deadline=2.0))
            await until(lambda: Step.MASK in devices[0].heard)
            live = await at_step(federation, Ref(name, 1, 0, "train"), Step.MASK)
            await until(lambda: live.awaited == {"client-0"})
            await agents[1].decline(live.plan.ref, "too late")
            head, *rest = hidden_parts(live.plan.ref, bytes(live.plan.payload))
            call, last = agents[0].stub.Upload(timeout=30), agents[0].stub.Upload(timeout=30)
            await call.write(head)
            await until(lambda: "client-0" in live.taken)
            with pytest.raises(grpc.aio.AioRpcError, match="another upload of client-0"):
                await agents[0].upload([head, *rest])
            await until(lambda: "client-0" not in live.taken)
            await last.write(head)
            info = await federation.ended(name)
            assert json.loads(info.metrics[0])["folded"] == 4
            await until(lambda: agents[1].outcomes)
            assert agents[1].outcomes[0].verdict.status == "folded"
            for ended, said in ((call, "begun another upload"), (last, "deadline has passed|is not open")):
                with pytest.raises(grpc.aio.AioRpcError, match=said):
                    await ended

    asyncio.run(run())


@pytest.mark.parametrize("step", [Step.SHARE, Step.MASK, Step.REVEAL])
def test_a_run_that_is_stopped_amid_the_protocol_leaves_nothing_behind(running: Running, step: Step) -> None:
    async def run() -> None:
        async with running() as federation:
            agents, devices = await joined(federation)
            devices[0].stop = (1, step)
            name = await federation.submit(secured(rounds=1))
            await until(lambda: step in devices[0].heard)
            live = await at_step(federation, Ref(name, 1, 0, "train"), step)
            head = hidden_parts(live.plan.ref, bytes(live.plan.payload))[0]
            call = agents[0].stub.Upload(timeout=30)
            if step is Step.MASK:
                await call.write(head)
                await until(lambda: "client-0" in live.taken)
            operator = await federation.operator()
            assert (await operator.Stop(pb.RunName(run=name))).state == "stopped"
            with pytest.raises(grpc.aio.AioRpcError, match=r"has closed|is not open"):
                if step is not Step.MASK:
                    await call.write(head)
                await call
            await until(lambda: all(agent.outcomes for agent in agents))
            assert {agent.outcomes[0].verdict.status for agent in agents} == {"late"}
            assert not federation.coordinator.live and not federation.coordinator.registry.leases
            assert list(federation.coordinator.journals.folder.iterdir()) == []

    asyncio.run(run())


def test_two_runs_share_agents_and_both_have_their_bits(running: Running) -> None:
    async def run() -> None:
        async with running() as federation:
            await joined(federation)
            names = [await federation.submit(secured(rounds=3)) for _ in range(2)]
            assert [(await federation.ended(name)).state for name in names] == ["finished"] * 2
            state, _ = reference(secured(rounds=3), LAYOUT, NAMES)
            for name in names:
                assert same(federation.parameters(name).shared, state.parameters.shared)

    asyncio.run(run())


def test_too_few_before_the_masks_make_another_attempt(running: Running) -> None:
    async def run() -> None:
        async with running() as federation:
            agents, devices = await joined(federation)
            for device in devices[:2]:
                device.stop = (1, Step.SHARE)
            name = await federation.submit(secured(rounds=1, deadline=2.0))
            await until(lambda: any(work.ref.attempt == 1 for work in agents[0].assignments))
            for device in devices:
                device.stop = None
            info = await federation.ended(name)
            assert json.loads(info.metrics[0])["folded"] == 5
            assert all(not work.certificate for agent in agents for work in agent.assignments)

    asyncio.run(run())


def test_too_few_masked_words_make_another_attempt_with_a_certificate(running: Running) -> None:
    """Two do not send their words, but live to sign that the attempt was given up."""

    async def run() -> None:
        async with running() as federation:
            agents, devices = await joined(federation)

            async def idle(agent: Agent, said: Secure) -> None:
                device = devices[NAMES.index(agent.name)]
                if (
                    said.ref.attempt == 0
                    and device.clients[said.ref].step is Step.MASK
                    and device.stop is None
                ):
                    device.stop = (0, Step.MASK)  # the edges; the next message asks to give up
                    device.clients[said.ref].receive(said.message)
                else:
                    await device.heed(agent, said)

            for agent in agents[:2]:
                agent.heed = idle
            name = await federation.submit(secured(rounds=1, deadline=2.0))
            info = await federation.ended(name)
            assert json.loads(info.metrics[0])["folded"] == 5
            again = [work for agent in agents for work in agent.assignments if work.ref.attempt == 1]
            assert len(again) == 5 and all(work.certificate for work in again)

    asyncio.run(run())


def test_a_round_that_may_not_be_repeated_is_skipped_and_said(running: Running) -> None:
    """Two clients are gone after their masked words were sent: too few sign anything."""

    async def run() -> None:
        spec = secured(rounds=2, deadline=2.0)
        async with running() as federation:
            agents, devices = await joined(federation)
            for device in devices[:2]:
                device.stop = (1, Step.AGREE)
            name = await federation.submit(spec)
            await until(lambda: len(agents[4].outcomes) == 1)
            assert agents[4].outcomes[0].verdict.status == "late"
            trained = [step for ref, step in devices[4].steps if (ref.round, ref.kind) == (1, "train")]
            assert trained[-1] is Step.AGREE  # who has signed the sum signs no end of the attempt
        async with running() as federation:
            for client, device in zip(NAMES, devices, strict=True):
                await join(federation, client, device)
            info = await federation.ended(name)
            first, second = (json.loads(row) for row in info.metrics)
            assert (first["round"], first["skipped"], first["folded"]) == (1, 1, 0)
            assert (second["round"], second["folded"]) == (2, 5)
            assert {ref.attempt for device in devices for ref in device.clients} == {0}
            assert same(federation.parameters(name).shared, after_one_round(spec, NAMES, 2))
            assert len(list(federation.coordinator.blobs.folder.iterdir())) == 2  # the model and its velocity

    asyncio.run(run())


async def at_step(federation: Federation, ref: Ref, step: Step) -> SecureRound:
    live = federation.coordinator.live[ref]
    assert isinstance(live, SecureRound)
    await until(lambda: live.step is step)
    return live


def test_what_is_out_of_place_is_refused_counted_and_changes_nothing(running: Running) -> None:
    async def run() -> None:
        async with running() as federation:
            spec = secured(rounds=1, deadline=8.0, size=4, over_select=1.25)
            agents, devices = await joined(federation)
            devices[0].stop = (1, Step.MASK)
            devices[4].stop = (1, Step.ADVERTISE)  # so it is not in the cohort of the protocol
            name = await federation.submit(spec)
            await until(lambda: agents[0].assignments)
            ref, size = agents[0].assignments[0].ref, 8 * 50
            await until(lambda: Step.MASK in devices[0].heard)
            live = await at_step(federation, ref, Step.MASK)
            await until(lambda: live.awaited == {"client-0"})
            for agent, payload, said in (
                (agents[0], bytes(size - 8), f"payload has {size - 8} bytes, expected {size}"),
                (agents[1], bytes(size), "no masked words of client-1 are awaited"),
                (agents[4], bytes(size), "no masked words of client-4 are awaited"),
            ):
                with pytest.raises(grpc.aio.AioRpcError, match=said):
                    await agent.upload(hidden_parts(ref, payload))
            await agents[1].say(ref, devices[1].clients[ref].advertise())  # a replay
            await agents[4].say(ref, devices[4].clients[ref].advertise())  # too late
            await until(lambda: live.refusals == 2)
            await agents[1].say(Ref(ref.run, 9, 0, "train"), b"of another round")
            devices[0].stop = None
            await devices[0].heed(agents[0], Secure(ref, live.told["client-0"]))
            info = await federation.ended(name)
            assert json.loads(info.metrics[0])["folded"] == 4
            assert same(federation.parameters(name).shared, after_one_round(spec, NAMES[:4]))
            with pytest.raises(grpc.aio.AioRpcError, match="is not open"):
                await agents[0].upload(hidden_parts(ref, bytes(size)))
            admission = federation.coordinator.admission
            assert admission.refused == {"client-0": 2, "client-1": 3, "client-4": 2}
            assert admission.conduct.keys() == {"client-0"}  # for the wrong length

    asyncio.run(run())


def test_who_answers_while_the_compute_thread_is_busy_is_in_time(running: Running) -> None:
    """With what another run aggregates, say; the step's time is over before its messages are read."""

    async def run() -> None:
        async with running() as federation:
            spec, busy = secured(rounds=1, deadline=2.0), Event()
            agents, devices = await joined(federation)
            devices[2].stop = (1, Step.SHARE)
            name = await federation.submit(spec)
            ref = Ref(name, 1, 0, "train")
            await until(lambda: Step.SHARE in devices[2].heard)
            live = await at_step(federation, ref, Step.SHARE)
            held = asyncio.create_task(federation.coordinator.calculate(busy.wait, 10.0))
            devices[2].stop = None
            await devices[2].heed(agents[2], Secure(ref, live.told["client-2"]))
            await asyncio.sleep(spec.cohort.deadline / len(STEPS) + 0.1)
            busy.set()
            await held
            info = await federation.ended(name)
            assert json.loads(info.metrics[0])["folded"] == 5

    asyncio.run(run())


def test_an_advertisement_of_someone_else_loses_its_sender_alone(running: Running) -> None:
    async def run() -> None:
        async with running() as federation:
            spec = secured(rounds=1, deadline=60.0)
            agents, devices = await joined(federation)

            async def stolen(agent: Agent, work: Assignment) -> None:
                if work.ref.kind == "evaluate":
                    return await devices[0].work(agent, work)
                await until(lambda: work.ref in devices[1].clients)
                await agent.say(work.ref, devices[1].clients[work.ref].advertise())

            agents[0].work = stolen
            name = await federation.submit(spec)
            info = await federation.ended(name)
            assert json.loads(info.metrics[0])["folded"] == 4
            assert same(federation.parameters(name).shared, after_one_round(spec, NAMES[1:]))
            verdict = agents[0].outcomes[0].verdict
            assert verdict.status == "refused" and "is client-1's" in verdict.reason
            conduct = federation.coordinator.admission.conduct
            assert {name: known.offences for name, known in conduct.items()} == {"client-0": 1}

    asyncio.run(run())


@pytest.mark.parametrize("step", EACH)
def test_a_client_that_comes_back_is_told_again_and_goes_on(running: Running, step: Step) -> None:
    """Its connection breaks when it hears what it would answer at that step."""

    async def run() -> None:
        async with running() as federation:
            spec = secured(rounds=1, deadline=60.0)
            pairs = [await join(federation, name) for name in NAMES[:4]]
            device = Masking(federation.identity("client", NAMES[4]), stop=(1, step))
            channel = await federation.channel("client", NAMES[4])
            hello = pairs[0][0].hello
            async with Agent(NAMES[4], channel, LAYOUT, device.work, hello, device.heed):
                name = await federation.submit(spec)
                await until(lambda: step in device.heard)
            device.stop = None
            await join(federation, NAMES[4], device)
            info = await federation.ended(name)
            assert json.loads(info.metrics[0])["folded"] == 5
            assert same(federation.parameters(name).shared, after_one_round(spec, NAMES))

    asyncio.run(run())


AFTER = dict(pairwise([*STEPS, Step.DONE]))


async def stop_at(federation: Federation, devices: list[Masking], spec: RunSpec, ref: Ref, step: Step) -> str:
    """Run until all but client-2 have answered a step of that piece of work, which names no run."""
    devices[2].stop, devices[2].kind = (ref.round, step), ref.kind
    ref = replace(ref, run=await federation.submit(spec))
    await until(lambda: ref in devices[2].clients and devices[2].heard[-1] is step)
    await until(lambda: any(ref in d.clients and d.clients[ref].step is AFTER[step] for d in devices))
    devices[2].stop = None
    return ref.run


@pytest.mark.parametrize("step", EACH)
@pytest.mark.parametrize("kind", ["train", pytest.param("evaluate", marks=pytest.mark.slow)])
def test_a_coordinator_that_is_started_again_resumes_the_attempt(
    running: Running, kind: Work, step: Step
) -> None:
    async def run() -> None:
        spec = secured(rounds=2)
        async with running() as federation:
            _, devices = await joined(federation)
            name = await stop_at(federation, devices, spec, Ref("", 1, 0, kind), step)
        async with running() as federation:
            for client, device in zip(NAMES, devices, strict=True):
                await join(federation, client, device)
            info = await federation.ended(name)
            assert (info.state, info.detail) == ("finished", "")
            state, rows = reference(spec, LAYOUT, NAMES)
            assert same(federation.parameters(name).shared, state.parameters.shared)
            assert without_seconds(info.metrics) == rows
            assert {ref.attempt for device in devices for ref in device.clients} == {0}
            assert all(len(device.clients) == 4 for device in devices)

    asyncio.run(run())


def test_a_coordinator_with_another_certificate_than_before_skips_the_round(
    running: Running, identity: Callable[[Role, str], Identity]
) -> None:
    """It cannot sign again what it has signed, and whether masked words were sent it need not ask."""

    async def run() -> None:
        spec = secured(rounds=2)
        async with running() as federation:
            _, devices = await joined(federation)
            name = await stop_at(federation, devices, spec, Ref("", 1, 0, "train"), Step.MASK)
        async with running(known=identity("coordinator", "renewed")) as federation:
            for client, device in zip(NAMES, devices, strict=True):
                await join(federation, client, device)
            info = await federation.ended(name)
            first, second = (json.loads(row) for row in info.metrics)
            assert (first["skipped"], second["folded"]) == (1, 5)

    asyncio.run(run())


@pytest.mark.parametrize("step", [Step.SHARE, pytest.param(Step.REVEAL, marks=pytest.mark.slow)])
def test_an_evaluation_that_fails_leaves_the_round_and_the_run_goes_on(running: Running, step: Step) -> None:
    async def run() -> None:
        async with running() as federation:
            _, devices = await joined(federation)
            for device in devices[:3]:
                device.stop, device.kind = (1, step), "evaluate"
            info = await federation.ended(await federation.submit(secured(rounds=2, deadline=3.0)))
            first, second = (json.loads(row) for row in info.metrics)
            assert (info.state, first["folded"], second["folded"]) == ("finished", 5, 5)
            assert "accuracy" not in first and "accuracy" in second

    asyncio.run(run())


def test_an_evaluator_sends_its_numbers_unmasked(running: Running) -> None:
    """They are the operator's own, and a sum over one of them would hide nothing."""

    async def run() -> None:
        async with running() as federation:
            _, devices = await joined(federation)
            evaluator = await federation.agent("evaluator", evaluator=True)
            spec = secured(rounds=1)
            spec = spec.with_("evaluation.where=holdout")
            info = await federation.ended(await federation.submit(spec))
            assert json.loads(info.metrics[0])["folded"] == 5 and "accuracy" in info.metrics[0]
            assert [work.ref.kind for work in evaluator.assignments] == ["evaluate"]
            assert all(len(device.clients) == 1 for device in devices)

    asyncio.run(run())


def test_a_private_round_keeps_its_cohort_open_for_its_time(running: Running) -> None:
    """At client level a goal would tell how many came. Everybody is drawn, as masks would tell who was."""
    layout, level = sized(40), {"level": "client", "noise_multiplier": 1.0, "population": 5}

    async def zeros(agent: Agent, work: Assignment) -> Update:
        return Update({"delta": np.zeros(layout.shared_size, np.float32)}, {})

    async def run() -> None:
        tables: dict[str, Any] = {"privacy": level, "strategy": {"name": "fedavg"}, "encryption": SECAGG}
        spec = spec_of(1, 5, 4.0, evaluation={"where": "holdout", "every": 0}, **tables)
        async with running() as federation:
            devices = [Masking(federation.identity("client", name), layout, zeros) for name in NAMES]
            for name, device in zip(NAMES, devices, strict=True):
                await federation.agent(name, device.work, layout, heed=device.heed)
            started = time.monotonic()
            info = await federation.ended(await federation.submit(spec, layout))
            assert time.monotonic() - started > TRAINING * spec.cohort.deadline
            rows = [json.loads(row) for row in info.metrics]
            assert [(row["expected"], "skipped" in row) for row in rows] == [(5, False)]
            assert all(len(device.masked) == 1 for device in devices)

    asyncio.run(run())


@pytest.mark.slow
def test_a_cohort_beyond_the_complete_graph(running: Running) -> None:
    """There is a step more, in which clients choose their neighbours; two are lost on the way."""
    names = sorted(f"client-{i}" for i in range(68))

    async def run() -> None:
        encryption = {"updates": "secagg", "corrupt": 0.05, "lost": 0.1}
        spec = spec_of(1, 68, 12.0, evaluation={"every": 0}, encryption=encryption)
        async with running() as federation:
            pairs = [await join(federation, name) for name in names]
            pairs[5][1].stop, pairs[6][1].stop = (1, Step.CHOOSE), (1, Step.MASK)
            info = await federation.ended(await federation.submit(spec))
            assert json.loads(info.metrics[0])["folded"] == 66
            assert all(Step.CHOOSE in device.heard for _, device in pairs)

    asyncio.run(run())
