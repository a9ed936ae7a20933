"""Runs that a device pays for before it can be drawn: offers, secret cohorts, and what others see of them."""

import asyncio
import json
from typing import Any

import numpy as np
import pytest

from fedcore.layout import Layout
from fedcore.messages import Accept, Assignment, Blob, Hello, Ref, Update
from fedcore.server.offers import Offers
from fedcore.server.registry import Registry, Session
from fedcore.spec import RunSpec
from fedcore.wire.codec import to_wire
from fedcore.wire.v1 import coordinator_pb2 as pb
from tests.server.conftest import (
    DIGEST,
    TASK,
    Agent,
    Federation,
    Running,
    silent,
    sized,
    spec_of,
    until,
    upload_parts,
)

LAYOUT: Layout = sized(40)
OFFER = Assignment(Ref("run", 1, 0, "offer"), TASK, DIGEST, RunSpec(), "", Blob("", 0), 2, 1.0)


def private(size: int = 2, population: int = 2, rounds: int = 2, deadline: float = 0.4) -> RunSpec:
    """Return a run at client level; with as many in the population as in a cohort, everybody is drawn."""
    level = {"level": "client", "noise_multiplier": 1.0, "population": population}
    tables: dict[str, Any] = {"privacy": level, "strategy": {"name": "fedavg"}}
    return spec_of(rounds, size, deadline, evaluation={"where": "holdout", "every": 0}, **tables)


async def accepting(agent: Agent, assignment: Assignment) -> None:
    """Take part in every run, and answer each round with an update of zeros."""
    if assignment.ref.kind == "offer":
        await agent.call.write(to_wire(Accept(assignment.ref)))
    else:
        zeros = Update({"delta": np.zeros(LAYOUT.shared_size, np.float32)}, {})
        await agent.upload(upload_parts(assignment.ref, zeros))


async def declining(agent: Agent, assignment: Assignment) -> None:
    await agent.decline(assignment.ref, "budget")


def kinds(agent: Agent) -> list[str]:
    return [work.ref.kind for work in agent.assignments]


def folded(agent: Agent) -> list[str]:
    return [outcome.verdict.status for outcome in agent.outcomes]


# --- the books


def registry_of(*names: str) -> tuple[Registry, Offers]:
    registry = Registry()
    for name in names:
        registry.join(Session(name, Hello({TASK: DIGEST})))
    return registry, Offers(registry)


def test_each_connection_is_asked_once() -> None:
    registry, offers = registry_of("a", "b")
    for _ in range(3):
        assert offers.willing(["a", "b"], OFFER) == []
    assert [session.outbox.qsize() for session in registry.sessions.values()] == [1, 1]
    registry.join(Session("a", Hello({TASK: DIGEST})))  # it is back
    assert offers.willing(["a", "b"], OFFER) == []
    assert [session.outbox.qsize() for session in registry.sessions.values()] == [1, 1]
    offers.accept("a")
    registry.join(Session("a", Hello({TASK: DIGEST})))
    assert offers.willing(["a", "b"], OFFER) == ["a"], "it need not accept again"
    assert registry.sessions["a"].outbox.empty()


def test_a_device_that_was_not_asked_cannot_accept() -> None:
    _, offers = registry_of("a", "b")
    offers.willing(["a"], OFFER)
    offers.accept("b")
    assert offers.willing(["a"], OFFER) == [] and offers.accepted == set()


def test_what_is_open_ends_with_an_answer_or_the_connection() -> None:
    registry, offers = registry_of("a", "b", "c")
    offers.willing(["a", "b", "c"], OFFER)
    offers.accept("a")
    offers.decline("b")
    assert offers.open == {"c"}
    registry.leave(registry.sessions["c"])
    assert offers.willing(["a", "b"], OFFER) == ["a"] and not offers.open


# --- over the wire


async def start(federation: Federation, *works: Any) -> list[Agent]:
    return [await federation.agent(f"client-{i}", work, LAYOUT) for i, work in enumerate(works)]


def test_only_those_that_accept_are_drawn_and_a_refusal_is_logged(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        async with running() as federation:
            first, second, wary, mute = await start(federation, accepting, accepting, declining, silent)
            name = await federation.submit(private(), LAYOUT)
            info = await federation.ended(name)
            assert (info.state, info.round) == ("finished", 2), info.detail
            await until(lambda: len(folded(first)) == len(folded(second)) == 2)
            for agent in (first, second):
                assert kinds(agent) == ["offer", "train", "train"] and folded(agent) == ["folded"] * 2
            assert kinds(wary) == kinds(mute) == ["offer"]
            (declined,) = [record for record in caplog.records if record.message == "run declined"]
            assert vars(declined)["client"] == "client-2" and vars(declined)["reason"] == "budget"
            assert vars(declined)["run"] == name

    asyncio.run(run())


def test_an_acceptance_of_something_else_changes_nothing(running: Running) -> None:
    """Of another run, of a run without offers, and of work that is no offer."""
    other = ""

    async def confused(agent: Agent, assignment: Assignment) -> None:
        run = assignment.ref.run
        wrong = [Ref("other", 1, 0, "offer"), Ref(other, 1, 0, "offer"), Ref(run, 1, 0, "train")]
        for ref in wrong:
            await agent.call.write(to_wire(Accept(ref)))
        await agent.decline(assignment.ref, "done")

    async def play() -> None:
        nonlocal other
        async with running() as federation:
            other = await federation.submit(spec_of(size=9), LAYOUT)
            (agent,) = await start(federation, confused)
            name = await federation.submit(private(size=1, population=1), LAYOUT)
            offers = federation.coordinator.drivers[name].gathering.offers
            assert offers
            await until(lambda: offers.asked and not offers.open)
            assert offers.accepted == set() and kinds(agent) == ["offer"]
            assert federation.coordinator.drivers[other].gathering.offers is None

    asyncio.run(play())


def test_a_device_is_asked_again_after_a_restart_of_the_coordinator(running: Running) -> None:
    async def run() -> None:
        async with running() as federation:
            await start(federation, accepting, silent)
            name = await federation.submit(private(), LAYOUT)
            driver = federation.coordinator.drivers[name]
            await until(lambda: driver.gathering.offers and driver.gathering.offers.accepted == {"client-0"})
        async with running() as federation:  # it ended amid an offer, and now ends amid a round
            agents = await start(federation, accepting, accepting)
            await until(lambda: "train" in kinds(agents[0]))
        async with running() as federation:
            agents = await start(federation, accepting, accepting)
            info = await federation.ended(name)
            assert (info.state, info.round) == ("finished", 2), info.detail
            assert all("offer" in kinds(agent) for agent in agents)  # for the second round

    asyncio.run(run())


def test_a_round_in_which_nobody_is_drawn_is_a_round(running: Running) -> None:
    """Its noise is released, it takes its time, and no row tells that it was empty."""

    async def run() -> None:
        async with running() as federation:
            agents = await start(federation, accepting, accepting)
            name = await federation.submit(private(population=10**9), LAYOUT)
            before = federation.parameters(name, LAYOUT).shared
            info = await federation.ended(name)
            assert (info.state, info.round) == ("finished", 2), info.detail
            assert [kinds(agent) for agent in agents] == [["offer"]] * 2
            for row in map(json.loads, info.metrics):
                assert row.keys() == {"round", "expected", "seconds", "epsilon"}
                assert (row["expected"], row["seconds"]) == (2.0, 0.4)
            assert np.std(federation.parameters(name, LAYOUT).shared - before) > 0.1

    asyncio.run(run())


def test_a_stopped_run_leaves_its_devices_to_others(running: Running) -> None:
    async def run() -> None:
        async with running() as federation:
            agents = await start(federation, accepting, accepting)
            operator = await federation.operator()
            stopped = await federation.submit(private(deadline=60.0), LAYOUT)
            await until(lambda: all(len(federation.coordinator.live) and kinds(a)[1:] for a in agents))
            assert (await operator.Stop(pb.RunName(run=stopped))).state == "stopped"
            await until(lambda: all(folded(agent) == ["late"] for agent in agents))
            info = await federation.ended(await federation.submit(private(rounds=1), LAYOUT))
            assert (info.state, info.round) == ("finished", 1), info.detail

    asyncio.run(run())


def test_who_is_drawn_for_one_run_is_not_seen_by_whom_another_can_have(running: Running) -> None:
    """Nobody is drawn for the first run, and yet the second waits for everybody."""

    async def run() -> None:
        async with running() as federation:
            await start(federation, accepting, accepting)
            secret = await federation.submit(private(population=10**9, rounds=1, deadline=1.0), LAYOUT)
            coordinator = federation.coordinator
            round = Ref(secret, 1, 0, "train")
            await until(lambda: round in coordinator.live)
            name = await federation.submit(private(rounds=1), LAYOUT)
            other = coordinator.drivers[name]

            def over() -> bool:
                if round not in coordinator.live:
                    return True
                assert len(coordinator.live) == 1 and other.run.detail in ("", *accepted, waiting)
                return False

            accepted = [f"waiting for clients with task {TASK}: {n} of 2" for n in range(3)]
            waiting = "waiting for clients that work for another run: 0 of 2"
            await until(over)
            for run in (secret, name):
                assert (await federation.ended(run)).state == "finished"

    asyncio.run(run())


@pytest.mark.slow
def test_the_first_round_waits_for_all_that_are_asked(running: Running) -> None:
    async def slow(agent: Agent, assignment: Assignment) -> None:
        await asyncio.sleep(0.05 if assignment.ref.kind == "offer" else 0)
        await accepting(agent, assignment)

    async def run() -> None:
        async with running() as federation:
            agents = await start(federation, accepting, slow, slow)
            await federation.ended(await federation.submit(private(1, 1, 1, 4.0), LAYOUT))
            assert [kinds(agent) for agent in agents] == [["offer", "train"]] * 3

    asyncio.run(run())
