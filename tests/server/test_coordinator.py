"""Whole runs: what the coordinator's model is, whoever comes, goes, or fails."""

import asyncio
import json
import time
from hashlib import sha256

from fedcore.messages import Assignment, Hello, Verdict
from fedcore.wire.v1 import coordinator_pb2 as pb
from tests.server.conftest import (
    LAYOUT,
    TASK,
    Agent,
    Running,
    honest,
    reference,
    same,
    silent,
    sized,
    spec_of,
    until,
    upload_parts,
)


def test_a_run_ends_with_the_model_of_the_pure_state_machine(running: Running) -> None:
    async def run() -> None:
        async with running() as federation:
            agents = await federation.agents(3)
            spec = spec_of(rounds=3)
            name = await federation.submit(spec)
            info = await federation.ended(name)
            assert (info.state, info.round) == ("finished", 3), info.detail
            state, rows = reference(spec, LAYOUT, [agent.name for agent in agents])
            parameters = federation.parameters(name)
            assert same(parameters.shared, state.parameters.shared)
            assert same(parameters.buffers, state.parameters.buffers)
            shown = [json.loads(text) for text in info.metrics]
            assert [{k: v for k, v in row.items() if k != "seconds"} for row in shown] == rows

    asyncio.run(run())


def test_a_model_without_buffers_and_a_server_without_momentum(running: Running) -> None:
    async def run() -> None:
        async with running() as federation:
            layout = sized(1000)
            spec = spec_of(size=2, strategy={"name": "fedavg"}, evaluation={"every": 0})
            await federation.agents(2, layout=layout)
            name = await federation.submit(spec, layout)
            info = await federation.ended(name)
            assert ["loss" in json.loads(row) for row in info.metrics] == [False, False, True]
            state, _ = reference(spec, layout, ["client-0", "client-1"])
            assert same(federation.parameters(name, layout).shared, state.parameters.shared)
            blobs = federation.coordinator.blobs
            assert [path.name for path in blobs.folder.iterdir()] == [state.parameters.digest]

    asyncio.run(run())


def test_an_evaluator_tests_the_model_on_the_holdout(running: Running) -> None:
    async def run() -> None:
        async with running() as federation:
            agents = await federation.agents(2)
            evaluator = await federation.agent("evaluator", evaluator=True)
            name = await federation.submit(spec_of(size=2, evaluation={"where": "holdout"}))
            info = await federation.ended(name)
            assert all("loss" in json.loads(row) for row in info.metrics)
            assert [work.ref.kind for work in evaluator.assignments] == ["evaluate"] * 3
            assert {work.ref.kind for agent in agents for work in agent.assignments} == {"train"}

    asyncio.run(run())


def test_a_round_goes_on_without_an_agent_that_dies_when_the_minimum_is_met(running: Running) -> None:
    async def run() -> None:
        async with running() as federation:
            await federation.agents(2)
            async with federation.visitor("client-2", silent) as dying:
                name = await federation.submit(spec_of(rounds=2, deadline=10.0))
                await until(lambda: dying.assignments)
            started = time.monotonic()
            info = await federation.ended(name)
            assert info.state == "finished"
            assert [json.loads(row)["folded"] for row in info.metrics] == [2, 2]
            assert time.monotonic() - started > 0.5  # it was waited for, for a second
            # Given up, by the grace; at the deadline it would have been late.
            assert [json.loads(row)["refused"] for row in info.metrics] == [1, 0]

    asyncio.run(run())


def test_a_run_waits_and_says_so_when_too_few_are_left(running: Running) -> None:
    async def run() -> None:
        async with running() as federation:
            await federation.agents(1)
            async with (
                federation.visitor("client-1", silent) as dying,
                federation.visitor("client-2", silent) as too,
            ):
                spec = spec_of(rounds=2, deadline=5.0)
                name = await federation.submit(spec)
                await until(lambda: dying.assignments and too.assignments)
            driver = federation.coordinator.drivers[name]
            await until(lambda: driver.run.detail == "waiting for clients with task Sums: 1 of 3")
            back = [await federation.agent(f"client-{i}") for i in (1, 2)]
            info = await federation.ended(name)
            assert (info.state, info.detail) == ("finished", "")
            assert back[0].assignments[0].ref.attempt == 1
            assert [json.loads(row)["folded"] for row in info.metrics] == [3, 3]

    asyncio.run(run())


def test_an_agent_that_comes_back_within_the_grace_gets_its_work_again(running: Running) -> None:
    async def run() -> None:
        async with running() as federation:
            await federation.agents(2)
            async with federation.visitor("client-2", silent) as gone:
                spec = spec_of(rounds=2, deadline=50.0)  # five seconds to come back
                name = await federation.submit(spec)
                await until(lambda: gone.assignments)
            await until(lambda: "client-2" not in federation.coordinator.registry.sessions)
            back = await federation.agent("client-2")
            info = await federation.ended(name)
            first, again = gone.assignments[0], back.assignments[0]
            assert first.ref == again.ref and again.deadline < first.deadline
            await until(lambda: len(back.outcomes) == 4)
            assert {outcome.verdict.status for outcome in back.outcomes} == {"folded"}
            assert [json.loads(row)["folded"] for row in info.metrics] == [3, 3]
            state, _ = reference(spec, LAYOUT, ["client-0", "client-1", "client-2"])
            assert same(federation.parameters(name).shared, state.parameters.shared)

    asyncio.run(run())


def test_an_agent_that_joins_late_takes_part_in_the_next_round(running: Running) -> None:
    async def run() -> None:
        async with running() as federation:
            slow = await federation.agent("client-0", silent)
            await federation.agent("client-1")
            name = await federation.submit(spec_of(rounds=2, deadline=10.0, cohort={"minimum": 2}))
            await until(lambda: slow.assignments)
            late = await federation.agent("client-2")
            slow.work = honest
            await honest(slow, slow.assignments[0])
            info = await federation.ended(name)
            assert [json.loads(row)["folded"] for row in info.metrics] == [2, 3]
            assert [work.ref.round for work in late.assignments if work.ref.kind == "train"] == [2]

    asyncio.run(run())


def test_a_second_connection_of_a_client_replaces_the_first(running: Running) -> None:
    async def run() -> None:
        async with running() as federation:
            first = await federation.agent("client-0", silent)
            await federation.agent("client-1")
            name = await federation.submit(spec_of(size=2, rounds=1))
            await until(lambda: first.assignments)
            second = await federation.agent("client-0")
            await asyncio.wait_for(first.reader, 5)
            assert (await federation.ended(name)).state == "finished"
            assert [work.ref.kind for work in first.assignments] == ["train"]
            assert [work.ref.kind for work in second.assignments] == ["train", "evaluate"]

    asyncio.run(run())


def test_a_round_goes_on_at_once_without_an_agent_that_declines(running: Running) -> None:
    async def unwilling(agent: Agent, work: Assignment) -> None:
        await agent.decline(work.ref, "battery low")

    async def run() -> None:
        async with running() as federation:
            await federation.agents(2)
            agent = await federation.agent("client-2", unwilling)
            # The grace would be a minute, which nobody here waits for.
            name = await federation.submit(spec_of(rounds=1, deadline=600.0))
            info = await federation.ended(name)
            row = json.loads(info.metrics[0])
            assert (row["folded"], row["refused"]) == (2, 1)
            assert agent.outcomes[0].verdict == Verdict("refused", "declined: battery low")

    asyncio.run(run())


def test_at_the_deadline_whoever_is_at_work_is_late_and_too_few_try_again(running: Running) -> None:
    async def run() -> None:
        async with running() as federation:
            agents = [
                await federation.agent("client-0"),
                *[await federation.agent(f"client-{i}", silent) for i in (1, 2)],
            ]
            name = await federation.submit(spec_of(rounds=1, deadline=600.0))
            await until(lambda: agents[1].assignments)
            live = federation.coordinator.live[agents[1].assignments[0].ref]
            await until(lambda: live.round.folded == ["client-0"])
            live.started -= 600.0  # the deadline comes, and the round looks up
            live.progress.set()
            await until(lambda: len(agents[1].assignments) == 2 and all(agent.outcomes for agent in agents))
            refs = [work.ref for work in agents[1].assignments]
            assert [(ref.round, ref.attempt) for ref in refs] == [(1, 0), (1, 1)]
            # The first client's update was taken, but into a round that never was.
            given_up = Verdict("late", "the attempt was given up")
            assert [agent.outcomes[0].verdict for agent in agents] == [
                given_up,
                Verdict("late"),
                Verdict("late"),
            ]
            for agent in agents[1:]:
                agent.work = honest
                await honest(agent, agent.assignments[1])
            info = await federation.ended(name)
            assert info.state == "finished" and '"folded": 3' in info.metrics[0]

    asyncio.run(run())


def test_a_stopped_run_keeps_its_rounds_and_frees_its_agents(running: Running) -> None:
    async def run() -> None:
        async with running() as federation:
            agents = await federation.agents(3)
            operator = await federation.operator()
            name = await federation.submit(spec_of(rounds=50))
            driver = federation.coordinator.drivers[name]
            await until(lambda: len(driver.rows) >= 2)
            agents[0].work = silent
            await until(lambda: federation.coordinator.live and agents[0].assignments)
            info = await operator.Stop(pb.RunName(run=name))
            assert (info.state, info.detail, info.round >= 2) == ("stopped", "by an operator", True)
            assert (await operator.Stop(pb.RunName(run=name))).state == "stopped"  # again changes nothing
            count = len(agents[1].assignments)
            agents[0].work = honest
            other = await federation.submit(spec_of(rounds=1))
            assert (await federation.ended(other)).state == "finished"
            assert {work.ref.run for work in agents[1].assignments[count:]} == {other}
            state, _ = reference(spec_of(rounds=info.round), LAYOUT, [agent.name for agent in agents])
            assert same(federation.parameters(name).shared, state.parameters.shared)

    asyncio.run(run())


def test_two_runs_share_agents_and_none_works_for_both_at_a_time(running: Running) -> None:
    working: dict[str, str] = {}

    async def exclusive(agent: Agent, work: Assignment) -> None:
        assert agent.name not in working
        working[agent.name] = work.ref.run
        update = await agent.update(work)
        await asyncio.sleep(0.01)
        del working[agent.name]
        await agent.upload(upload_parts(work.ref, update))

    async def run() -> None:
        async with running() as federation:
            agents = await federation.agents(3, exclusive)
            # The same spec: both runs come to the same blobs, and neither may remove the other's.
            spec = spec_of(rounds=4)
            runs = [await federation.submit(spec) for _ in range(2)]
            for name in runs:
                assert (await federation.ended(name)).state == "finished"
            state, _ = reference(spec, LAYOUT, [agent.name for agent in agents])
            for name in runs:
                assert same(federation.parameters(name).shared, state.parameters.shared)
            assert not any(task.exception() for agent in agents for task in agent.working)
            order = [work.ref.run for work in agents[0].assignments]
            assert order.count(runs[0]) == order.count(runs[1]) == 8

    asyncio.run(run())


def test_agents_without_the_task_or_with_another_version_of_it_are_not_asked(running: Running) -> None:
    async def run() -> None:
        async with running() as federation:
            other = await federation.agent("client-0", tasks=("Others",))
            older = await federation.agent("client-1")
            session = federation.coordinator.registry.sessions["client-1"]
            session.hello = Hello({TASK: "0" * 64})
            fitting = await federation.agent("client-2")
            name = await federation.submit(spec_of(size=1, rounds=1))
            assert (await federation.ended(name)).state == "finished"
            assert fitting.assignments and not other.assignments and not older.assignments

    asyncio.run(run())


def test_over_selection_closes_at_the_goal_and_the_rest_is_late(running: Running) -> None:
    async def too_slow(agent: Agent, work: Assignment) -> None:
        await (silent if work.ref.kind == "train" else honest)(agent, work)

    async def run() -> None:
        async with running() as federation:
            await federation.agents(2)
            slow = await federation.agent("client-2", too_slow)
            spec = spec_of(size=2, rounds=1, cohort={"over_select": 1.5})
            name = await federation.submit(spec)
            info = await federation.ended(name)
            assert slow.outcomes[0].verdict.status == "late"
            assert json.loads(info.metrics[0])["folded"] == 2

    asyncio.run(run())


def test_a_run_stops_at_the_very_moment_of_an_answer(running: Running) -> None:
    async def run() -> None:
        async with running() as federation:
            agents = await federation.agents(3, silent)
            name = await federation.submit(spec_of(deadline=60.0))
            await until(lambda: all(agent.assignments for agent in agents))
            driver = federation.coordinator.drivers[name]
            live = federation.coordinator.live[agents[0].assignments[0].ref]
            live.progress.set()  # as a folded update does
            await asyncio.sleep(0)  # the round is about to wake
            async with asyncio.timeout(5.0):
                await driver.stop()
            assert driver.run.state == "stopped"

    asyncio.run(run())


def test_small_parameters_travel_with_the_assignment_and_large_ones_do_not(running: Running) -> None:
    async def run() -> None:
        async with running() as federation:
            for layout, travels in ((LAYOUT, True), (sized(20_000), False)):
                async with federation.visitor("client-0", honest, layout) as agent:
                    name = await federation.submit(spec_of(rounds=1, size=1), layout)
                    await federation.ended(name)
                    assert agent.assignments
                    for work in agent.assignments:
                        assert bool(work.content) == travels
                        assert not travels or sha256(work.content).hexdigest() == work.parameters.sha256

    asyncio.run(run())
