"""What became of a client's training is durable, and told to whoever asks for it later."""

import asyncio
from typing import Any

import pytest

from fedcore.messages import Assignment, Outcome, Ref, Verdict
from fedcore.server.live import LiveRound
from fedcore.wire.v1 import coordinator_pb2 as pb
from tests.server.conftest import (
    LAYOUT,
    Agent,
    Federation,
    Running,
    honest,
    reference,
    same,
    silent,
    spec_of,
    until,
)

NAMES = ["client-0", "client-1", "client-2"]
SPEC = spec_of(rounds=2)


async def told(federation: Federation, name: str, *refs: Ref) -> list[tuple[int, int, str]]:
    """Return what a client that comes with these refs hears at once: round, attempt and status."""
    agent = await federation.agent(name, silent, pending=refs)
    last = Outcome(Ref("none", 1, 0, "train"), Verdict("late"))
    await until(lambda: federation.coordinator.registry.send(name, last))
    await until(lambda: last in agent.outcomes)
    heard = agent.outcomes[: agent.outcomes.index(last)]
    return [(outcome.ref.round, outcome.ref.attempt, outcome.verdict.status) for outcome in heard]


def test_after_a_run_everybody_learns_what_was_folded_even_after_a_restart(running: Running) -> None:
    async def run() -> None:
        async with running() as federation:
            agents = [*await federation.agents(2), await federation.agent("client-2", unwilling)]
            name = await federation.submit(spec_of(rounds=2, cohort={"minimum": 2}))
            await federation.ended(name)
            assert [o.verdict.status for o in agents[0].outcomes if o.ref.kind == "train"] == ["folded"] * 2
        async with running() as federation:
            last, before = Ref(name, 2, 0, "train"), Ref(name, 1, 0, "train")
            assert await told(federation, "client-0", last) == [(2, 0, "folded")]
            assert await told(federation, "client-1", before) == [(1, 0, "late")]  # since it moved on
            assert await told(federation, "client-2", last) == [(2, 0, "late")]
            assert await told(federation, "client-9", last) == [(2, 0, "late")]
            another = Ref(name, 2, 1, "train"), Ref(name, 3, 0, "train"), Ref("other", 2, 0, "train")
            assert await told(federation, "client-0", *another) == [(2, 1, "late"), (3, 0, "late")]

    async def unwilling(agent: Agent, work: Assignment) -> None:
        if work.ref.kind == "train":
            await agent.decline(work.ref, "battery low")
        else:
            await honest(agent, work)

    asyncio.run(run())


def test_of_a_round_that_is_open_nothing_is_told(running: Running) -> None:
    async def run() -> None:
        async with running() as federation:
            agents = [*await federation.agents(2), await federation.agent("client-2", silent)]
            name = await federation.submit(SPEC)
            await until(lambda: agents[2].assignments)
            ref = agents[2].assignments[0].ref
            await until(lambda: len(federation.coordinator.live[ref].round.folded) == 2)
            assert await told(federation, "client-0", ref) == []
            await (await federation.operator()).Stop(pb.RunName(run=name))
            again = await federation.agent("client-1", silent, pending=(ref,))
            await until(lambda: again.outcomes)
            assert again.outcomes == [Outcome(ref, Verdict("late"))]

    asyncio.run(run())


def test_work_says_which_training_of_the_client_was_folded_last(running: Running) -> None:
    async def run() -> None:
        async with running() as federation:
            agents = await federation.agents(3)
            name = await federation.submit(SPEC)
            await federation.ended(name)
            train = [Ref(name, number, 0, "train") for number in (1, 2)]
            said = [(work.ref.round, work.ref.kind, work.folded) for work in agents[0].assignments]
            assert said == [
                (1, "train", None),
                (1, "evaluate", train[0]),
                (2, "train", train[0]),
                (2, "evaluate", train[1]),
            ]

    asyncio.run(run())


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_coordinator_that_dies_at_a_commit_makes_it_and_tells_everybody(
    running: Running, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """The process ends before or after the transaction, and nobody hears of the round."""

    async def run() -> None:
        async with running() as federation:
            agents = await federation.agents(3)
            driver = federation.coordinator.drivers[name := await federation.submit(SPEC)]
            commit, gone = driver.commit, asyncio.Event()

            async def dying(*arguments: Any) -> None:
                if moment == "after":
                    await commit(*arguments)
                gone.set()
                raise asyncio.CancelledError  # the driver ends where it is

            monkeypatch.setattr(driver, "commit", dying)
            monkeypatch.setattr(LiveRound, "announce", lambda *_: None)
            await gone.wait()
        ref = agents[0].assignments[0].ref
        assert not agents[0].outcomes
        monkeypatch.undo()
        async with running() as federation:
            await until(lambda: federation.coordinator.drivers[name].committed)  # nobody is asked again
            for client in NAMES:
                assert await told(federation, client, ref) == [(1, 0, "folded")]
        async with running() as federation:
            await federation.agents(3)
            assert (await federation.ended(name)).state == "finished"
            state, _ = reference(SPEC, LAYOUT, NAMES)
            assert same(federation.parameters(name).shared, state.parameters.shared)

    asyncio.run(run())


def test_a_run_that_is_stopped_while_it_commits_tells_what_was_committed(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        async with running() as federation:
            agents = await federation.agents(3)
            name = await federation.submit(SPEC)
            driver, store = federation.coordinator.drivers[name], federation.coordinator.store
            task = driver.task
            committing, stopping, commit = asyncio.Event(), asyncio.Event(), store.commit_round

            def slow(*arguments: Any) -> None:
                loop.call_soon_threadsafe(committing.set)
                asyncio.run_coroutine_threadsafe(stopping.wait(), loop).result(10)
                commit(*arguments)

            loop = asyncio.get_running_loop()
            monkeypatch.setattr(store, "commit_round", slow)
            await committing.wait()
            stop = asyncio.ensure_future(driver.stop())
            await until(lambda: task and task.done())
            stopping.set()
            await stop
            assert (driver.run.state, len(driver.committed)) == ("stopped", 1)
            await until(lambda: all(agent.outcomes for agent in agents))
            assert [agent.outcomes[0].verdict.status for agent in agents] == ["folded"] * 3
            assert federation.coordinator.drivers[name].clients.keys() == set(NAMES)

    asyncio.run(run())
