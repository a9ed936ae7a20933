"""Rounds as production has them: deadlines, labels, early ends, several runs, and the pace of agents."""

import asyncio
import json
import time
from dataclasses import replace
from typing import Any

import pytest

from fedcore.messages import Assignment, Hello, Pause, Ref
from fedcore.server import steering
from fedcore.server.driver import back_off
from fedcore.wire import codec, grpc
from fedcore.wire.codec import to_wire
from fedcore.wire.v1.coordinator_pb2_grpc import CoordinatorStub
from tests.server.conftest import (
    DIGEST,
    LAYOUT,
    TASK,
    Agent,
    Federation,
    Running,
    answer,
    honest,
    reference,
    same,
    silent,
    spec_of,
    until,
    upload_parts,
)


async def trains_never(agent: Agent, work: Assignment) -> None:
    await (silent if work.ref.kind == "train" else honest)(agent, work)


# --- deadlines


def test_at_the_deadline_a_round_closes_with_its_minimum(running: Running) -> None:
    async def run() -> None:
        async with running() as federation:
            await federation.agents(2)
            slow = await federation.agent("client-2", trains_never)
            started = time.monotonic()
            name = await federation.submit(spec_of(rounds=1, deadline=0.6, cohort={"minimum": 2}))
            info = await federation.ended(name)
            row = json.loads(info.metrics[0])
            assert (info.state, row["folded"], row["refused"]) == ("finished", 2, 0)
            assert row["seconds"] >= 0.6 and time.monotonic() - started < 5
            assert slow.outcomes[0].verdict.status == "late"

    asyncio.run(run())


def test_another_attempt_waits_longer_each_time_but_never_for_long() -> None:
    waits = [back_off(attempt) for attempt in range(1, 5000)]
    assert waits[:3] == [0.2, 0.4, 0.8] and max(waits) == waits[-1] == 30.0


# --- labels


def test_a_run_asks_agents_with_its_labels_alone(running: Running) -> None:
    async def run() -> None:
        async with running() as federation:
            fitting = await labelled(federation, "client-0", site="eu", kind="phone")
            other = await labelled(federation, "client-1", site="us", kind="phone")
            name = await federation.submit(spec_of(size=2, rounds=1, cohort={"labels": {"site": "eu"}}))
            driver = federation.coordinator.drivers[name]
            await until(lambda: driver.run.detail.endswith(f"clients with task {TASK} and site=eu: 1 of 2"))
            late = await labelled(federation, "client-2", site="eu")
            assert (await federation.ended(name)).state == "finished"
            assert fitting.assignments and late.assignments and not other.assignments

    asyncio.run(run())


async def labelled(federation: Federation, name: str, **labels: str) -> Agent:
    hello = Hello({TASK: DIGEST}, labels=labels)
    agent = Agent(name, await federation.channel("client", name), LAYOUT, honest, hello)
    return await federation.stack.enter_async_context(agent)


# --- early stopping


async def worsening(agent: Agent, work: Assignment) -> None:
    """Answer as everybody, but for an accuracy that falls from round to round."""
    update = answer(work.ref, agent.name, await agent.model(work))
    if work.ref.kind == "evaluate":
        update = replace(update, scalars={"loss": 1.0, "accuracy": 9.0 / work.ref.round, "count": 10.0})
    await agent.upload(upload_parts(work.ref, update))


EARLY: dict[str, Any] = {"evaluation": {"patience": 2, "monitor": "accuracy"}}
SAID = "stopped early: accuracy has not improved for 2 evaluations (best 0.9 at round 1)"


def test_a_run_that_improves_no_more_ends_and_tells_of_its_best_round(running: Running) -> None:
    async def run() -> None:
        async with running() as federation:
            await federation.agents(3, worsening)
            info = await federation.ended(await federation.submit(spec_of(rounds=50, **EARLY)))
            assert (info.state, info.detail, info.round) == ("finished", SAID, 3)

    asyncio.run(run())


@pytest.mark.parametrize("kind", ["train", pytest.param("evaluate", marks=pytest.mark.slow)])
def test_a_restart_neither_forgets_nor_prolongs_the_patience(running: Running, kind: str) -> None:
    async def stuck(agent: Agent, work: Assignment) -> None:
        await (silent if (work.ref.round, work.ref.kind) == (3, kind) else worsening)(agent, work)

    async def run() -> None:
        async with running() as federation:
            agents = await federation.agents(3, stuck)
            name = await federation.submit(spec_of(rounds=50, **EARLY))
            await until(lambda: agents[0].assignments and agents[0].assignments[-1].ref.round == 3)
            await until(lambda: agents[0].assignments[-1].ref.kind == kind)
        async with running() as federation:
            await federation.agents(3, worsening)
            info = await federation.ended(name)
            assert (info.state, info.detail, info.round) == ("finished", SAID, 3)
        async with running() as federation:
            assert (await federation.ended(name)) == info, "it has ended for good"

    asyncio.run(run())


def test_a_metric_that_nobody_measures_is_refused(running: Running) -> None:
    async def run() -> None:
        async with running() as federation:
            with pytest.raises(grpc.aio.AioRpcError, match="did you mean 'accuracy'"):
                await federation.submit(spec_of(evaluation={"patience": 2, "monitor": "acuracy"}))

    asyncio.run(run())


# --- several runs


def test_after_a_restart_no_run_takes_clients_that_work_for_another(running: Running) -> None:
    """The first run's attempt goes on; the second, which had queued up, has nobody before it is over."""

    async def run() -> None:
        async with running() as federation:
            agents = await federation.agents(3, trains_never)
            spec = spec_of(rounds=1, evaluation={"every": 0})
            first = await federation.submit(spec)
            await until(lambda: all(agent.assignments for agent in agents))
            second = await federation.submit(spec)
            await until(lambda: federation.coordinator.drivers[second].run.detail)
        async with running() as federation:
            coordinator = federation.coordinator
            assert set(coordinator.registry.leases.values()) == {first}
            agents = await federation.agents(3, trains_never)
            await until(lambda: all(agent.assignments for agent in agents))
            waiting = "waiting for clients that work for another run: 0 of 3"
            await until(lambda: coordinator.drivers[second].run.detail == waiting)
            assert {work.ref for a in agents for work in a.assignments} == {Ref(first, 1, 0, "train")}
            for agent in agents:
                agent.work = honest
                await honest(agent, agent.assignments[0])
            for name in (first, second):
                assert (await federation.ended(name)).state == "finished"
            state, _ = reference(spec, LAYOUT, [agent.name for agent in agents])
            assert same(federation.parameters(second).shared, state.parameters.shared)
            assert not coordinator.registry.leases

    asyncio.run(run())


# --- the pace at which agents come back


def test_a_coordinator_that_stops_tells_each_agent_its_time(running: Running) -> None:
    async def run() -> None:
        async with running() as federation:
            calls = [await connected(federation, f"client-{i}") for i in range(3)]
            await until(lambda: len(federation.coordinator.registry.sessions) == 3)
            federation.coordinator.registry.dismiss()
            told = [[codec.to_agent(message) async for message in call] for call in calls]
            assert all(first is None and isinstance(last, Pause) for first, last in told)
            assert len({last for _, last in told}) == 3

    asyncio.run(run())


def test_agents_that_are_too_many_at_once_are_let_in_one_after_the_other(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steering, "BURST", 2)

    async def run() -> None:
        async with running() as federation:
            registry = federation.coordinator.registry
            for i in range(2):
                await connected(federation, f"client-{i}")
            await until(lambda: len(registry.sessions) == 2)
            monkeypatch.setattr(steering, "RATE", 2.0)
            call = await connected(federation, "client-2")
            (pause,) = [codec.to_agent(message) async for message in call]
            assert isinstance(pause, Pause) and 0 < pause.seconds <= 0.5
            assert "client-2" not in registry.sessions
            await asyncio.sleep(pause.seconds)
            await connected(federation, "client-2")
            await connected(federation, "client-0")  # it was there, and is let in whenever it comes
            await until(lambda: len(registry.sessions) == 3)

    asyncio.run(run())


async def connected(federation: Federation, name: str) -> Any:
    call = CoordinatorStub(await federation.channel("client", name)).Connect()
    await call.write(to_wire(Hello({TASK: DIGEST})))
    return call
