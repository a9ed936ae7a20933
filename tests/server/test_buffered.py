"""Runs without cohorts on a coordinator: clients at their own speed, and a model that moves on arrivals."""

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from fedcore.crypto.identity import Identity
from fedcore.crypto.names import Role
from fedcore.faults import FAULTS, Fault
from fedcore.layout import Layout
from fedcore.messages import Assignment, Ref, VectorSpec, Verdict
from fedcore.server import buffered as server_buffered
from fedcore.server.store import Participant, Store
from fedcore.spec import RunSpec
from fedcore.strategies import LocalSGD, from_table
from fedcore.strategies.algorithms import ALGORITHMS
from fedcore.strategies.modes import Synchronous
from fedcore.strategies.rounds import State, advance, initial_state, metrics, train_plan
from fedcore.strategies.steps import Arrival, step
from fedcore.strategies.terms import Rows
from fedcore.wire.v1 import coordinator_pb2 as pb
from tests.server.conftest import (
    LAYOUT,
    Agent,
    Federation,
    Running,
    Work,
    answer,
    honest,
    initial,
    same,
    silent,
    spec_of,
    until,
    upload_parts,
)
from tests.server.devices import Sealing
from tests.server.killed import Killed

SERVER = {"optimizer": {"name": "sgd", "lr": 0.5, "momentum": 0.9}}


def buffered(rounds: int = 6, k: int = 2, size: int = 3, deadline: float = 5.0, **tables: Any) -> RunSpec:
    strategy = tables.pop("strategy", {"name": "fedbuff", "k": k} | SERVER)
    tables.setdefault("evaluation", {"every": 0})
    return spec_of(rounds, size, deadline, strategy=strategy, **tables)


def replayed(spec: RunSpec, log: list[list[Participant]]) -> tuple[State, list[dict[str, float]]]:
    """Make a run's model again by the pure functions alone, from what entered which step."""
    strategy = from_table(spec.strategy)
    assert not isinstance(strategy.mode, Synchronous)
    states, rows = [initial_state(strategy, initial(LAYOUT))], []
    for number, took_part in enumerate(log, 1):
        folded = [each for each in took_part if each.status == "folded"]
        clients = tuple(sorted(each.client for each in folded))
        plan = train_plan(strategy, spec, LAYOUT, Ref("r", number, 0, "train"), clients, len(clients))
        round = step(strategy.mode, plan, arrivals(folded, number, states), states[-1].parameters)
        states.append(advance(strategy, round, states[-1], spec.run.seed))
        stale = sum(each.staleness for each in folded) / len(folded)
        refused = sum(each.status in ("refused", "lost") for each in took_part)
        means = {f"train_{name}": value for name, value in metrics(round).items()}
        rows.append({"round": number, "folded": len(folded), "refused": refused, **means, "staleness": stale})
    return states[-1], rows


def arrivals(folded: list[Participant], number: int, states: list[State]) -> Iterator[Arrival]:
    for each in folded:
        version = number - 1 - each.staleness
        start = states[version].parameters
        update = answer(Ref("r", version + 1, each.attempt, "train"), each.client, start)
        yield Arrival(each.client, Rows.of([update]), each.staleness, start)


async def log_of(federation: Federation, run: str) -> list[list[Participant]]:
    """Return the participants of a run's steps, from its store."""
    coordinator = federation.coordinator
    numbers = range(1, len(coordinator.drivers[run].committed) + 1)
    return [await coordinator.write(coordinator.store.participants, run, number) for number in numbers]


async def holds_when_replayed(federation: Federation, run: str, spec: RunSpec) -> list[list[Participant]]:
    """Check that a finished run's model and rows are those of its log, and return the log."""
    info = await federation.ended(run)
    assert info.state == "finished", info.detail
    log = await log_of(federation, run)
    state, rows = replayed(spec, log)
    assert same(federation.parameters(run).shared, state.parameters.shared)
    assert same(federation.parameters(run).buffers, state.parameters.buffers)
    kept = ("seconds", "loss", "accuracy")  # is measured, or evaluated
    shown = [json.loads(row) for row in info.metrics]
    assert [{key: value for key, value in row.items() if key not in kept} for row in shown] == rows
    return log


def at_their_pace(seed: int, longest: float = 0.03) -> Work:
    """Return work that takes a random time."""
    random = Random(seed)

    async def work(agent: Agent, assignment: Assignment) -> None:
        await asyncio.sleep(random.uniform(0, longest))
        await honest(agent, assignment)

    return work


@dataclass(frozen=True)
class Equal(LocalSGD):
    """FedAvg's client, where every client counts once."""

    def vectors(self, layout: Layout, spec: RunSpec) -> dict[str, VectorSpec]:
        return {n: replace(v, factor=None) for n, v in super().vectors(layout, spec).items()}


def test_it_is_a_synchronous_run_where_nobody_is_late(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """K = concurrency = everybody: each step has all of them, from the newest model."""
    monkeypatch.setitem(ALGORITHMS, "equal", Equal)
    spec = buffered(rounds=4, k=3)
    together = buffered(rounds=4, strategy={"algorithm": "equal"} | SERVER)

    async def run() -> None:
        async with running() as federation:
            agents = await federation.agents(3)
            other = await federation.submit(together)
            assert (await federation.ended(other)).state == "finished"
            wanted = federation.parameters(other)
            for agent in agents:
                agent.assignments.clear()
                agent.outcomes.clear()
            name = await federation.submit(spec)
            log = await holds_when_replayed(federation, name, spec)
            assert [[each.staleness for each in step] for step in log] == [[0, 0, 0]] * 4
            works = [work for work in agents[0].assignments if work.ref.kind == "train"]
            assert [work.ref.round for work in works] == [1, 2, 3, 4] and works[0].cohort == 3
            done = [outcome for outcome in agents[0].outcomes if outcome.ref.kind == "train"]
            assert [outcome.verdict for outcome in done] == [Verdict("folded")] * 4
            found = federation.parameters(name)
            assert same(found.shared, wanted.shared) and same(found.buffers, wanted.buffers)

    asyncio.run(run())


@pytest.mark.parametrize(
    "strategy",
    [
        pytest.param({"name": "fedbuff", "k": 3, "concurrency": 4} | SERVER, id="sums"),
        pytest.param({"name": "fedbuff", "k": 3, "aggregator": "median"}, marks=pytest.mark.slow, id="rows"),
        pytest.param({"name": "fedasync", "mixing": 0.5}, id="fedasync"),
    ],
)
def test_a_run_at_random_paces_replays_to_the_same_bits(running: Running, strategy: dict[str, Any]) -> None:
    spec = buffered(rounds=12, size=5, strategy=strategy)

    async def run() -> None:
        async with running() as federation:
            for i in range(6):
                await federation.agent(f"client-{i}", at_their_pace(i))
            name = await federation.submit(spec)
            log = await holds_when_replayed(federation, name, spec)
            assert any(each.staleness for step in log for each in step)
            assert all(len({each.client for each in step}) == len(step) for step in log)
            assert all(each.seconds > 0 and each.bytes > 0 for step in log for each in step)
            assert federation.coordinator.live == {} and federation.coordinator.registry.leases == {}
            assert list(federation.coordinator.journals.folder.iterdir()) == []
            driver = federation.coordinator.drivers[name]
            assert {path.name for path in federation.coordinator.blobs.folder.iterdir()} == driver.addresses

    asyncio.run(run())


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_stops_of_coordinator_and_agents_lose_nothing(running: Running, seed: int) -> None:
    """Again and again, at random moments; what was acknowledged is never asked for again."""
    spec = buffered(rounds=12, k=3, size=4)
    random = Random(seed)
    asked: list[tuple[str, Ref]] = []
    acknowledged: list[tuple[str, Ref]] = []

    async def work(agent: Agent, assignment: Assignment) -> None:
        key = (agent.name, assignment.ref)
        asked.extend([key] * (key in acknowledged))
        await asyncio.sleep(random.uniform(0, 0.05))
        await honest(agent, assignment)
        acknowledged.append(key)

    async def run() -> None:
        name = ""
        for _ in range(4):
            async with running() as federation:
                for i in range(5):
                    await federation.agent(f"client-{i}", work)
                name = name or await federation.submit(spec)
                async with federation.visitor("client-9", work):
                    await asyncio.sleep(random.uniform(0, 0.1))
                await asyncio.sleep(random.uniform(0, 0.2))
        async with running() as federation:
            for i in range(5):
                await federation.agent(f"client-{i}", work)
            log = await holds_when_replayed(federation, name, spec)
            blobs = {path.name for path in federation.coordinator.blobs.folder.iterdir()}
            assert blobs == federation.coordinator.drivers[name].addresses
        folded = {
            (each.client, Ref(name, number - each.staleness, each.attempt, "train"))
            for number, step in enumerate(log, 1)
            for each in step
            if each.status == "folded"
        }
        last = {client: ref for client, ref in acknowledged if ref.kind == "train"}
        lost = {key for key in acknowledged if key[1].kind == "train"} - folded
        assert not asked and lost <= last.items(), "but for those that were in when the run had ended"

    asyncio.run(run())


@pytest.mark.slow
def test_a_coordinator_that_is_killed_at_random_moments_replays_to_the_same_bits(
    identity: Callable[[Role, str], Identity], tmp_path: Path
) -> None:
    spec, random = buffered(rounds=40, k=3, size=4), Random(0)
    killed = Killed(tmp_path / "coordinator", identity)

    async def play(name: str, last: bool) -> str:
        async with killed.process():
            federation = Federation(identity, None, killed.port)  # type: ignore[arg-type]
            async with federation.stack:
                for i in range(5):
                    await federation.agent(f"client-{i}", at_their_pace(random.randrange(99), 0.1))
                name = name or await federation.submit(spec)
                if last:
                    assert (await federation.ended(name)).state == "finished"
                else:
                    await asyncio.sleep(random.uniform(0.1, 0.4))
                    info = await (await federation.operator()).Show(pb.RunName(run=name))
                    assert info.state == "running", info.detail
        return name

    async def run() -> str:
        name = ""
        for left in reversed(range(6)):
            name = await play(name, last=not left)
        return name

    name = asyncio.run(run())
    store = Store(tmp_path / "coordinator")
    rounds, log = store.rounds(name), [store.participants(name, number) for number in range(1, 41)]
    store.close()
    state, _ = replayed(spec, log)
    assert rounds[-1].parameters == state.parameters.digest
    assert any(each.staleness for step in log for each in step)


def test_a_restarted_coordinator_knows_who_is_at_work_and_who_has_arrived(running: Running) -> None:
    """Two steps are made of others while client-1 works on the first model; then client-2 has arrived."""
    spec = buffered(rounds=3, k=2)
    slow = {("client-1", 1), ("client-3", 3)}
    asked: dict[str, list[Assignment]] = {}

    async def work(agent: Agent, assignment: Assignment) -> None:
        asked.setdefault(agent.name, []).append(assignment)
        if (agent.name, assignment.ref.round) not in slow:
            await honest(agent, assignment)

    async def run() -> None:
        async with running() as federation:
            for i in (1, 2, 3):
                await federation.agent(f"client-{i}", work)
            name = await federation.submit(spec)
            driver = federation.coordinator.drivers[name]
            await until(lambda: driver.run.detail == "step 3: 1 of 2 in, 2 at work")
            first, address = asked.pop("client-1"), driver.run.initial
            asked.clear()
            assert federation.coordinator.registry.leases == {"client-1": name, "client-3": name}
        slow.remove(("client-1", 1))
        async with running() as federation:
            session = await federation.agent("client-2", work, pending=(Ref(name, 3, 0, "train"),))
            driver = federation.coordinator.drivers[name]
            await until(lambda: driver.run.detail == "step 3: 1 of 2 in, 2 at work")
            assert federation.coordinator.registry.leases == {"client-1": name, "client-3": name}
            assert session.outcomes == [], "it is open what becomes of it"
            await federation.agent("client-1", work)
            log = await holds_when_replayed(federation, name, spec)
            assert {each.client: each.staleness for each in log[2]} == {"client-2": 0, "client-1": 2}
            (again,) = [each for each in asked["client-1"] if each.ref.kind == "train"]
            assert [again.ref] == [each.ref for each in first] and again.parameters.sha256 == address
            assert {each.ref.kind for each in asked["client-2"]} == {"evaluate"}
            assert session.outcomes[0].verdict == Verdict("folded")

    asyncio.run(run())


def test_one_that_is_away_when_its_step_is_committed_hears_of_it_when_it_is_back(running: Running) -> None:
    async def run() -> None:
        async with running() as federation:
            async with federation.visitor("client-0", honest):
                name = await federation.submit(buffered(rounds=2, k=2))
                driver = federation.coordinator.drivers[name]
                await until(lambda: driver.workers and driver.workers.arrived)
            await federation.agent("client-1")
            await until(lambda: len(driver.committed) == 1)
            pending = (Ref(name, 1, 0, "train"), Ref(name, 1, 7, "train"))
            back = await federation.agent("client-0", pending=pending)
            await until(lambda: len(back.outcomes) > 1)
            assert [outcome.verdict for outcome in back.outcomes[:2]] == [Verdict("folded"), Verdict("late")]
            assert [outcome.ref for outcome in back.outcomes[:2]] == list(pending)

    asyncio.run(run())


@pytest.mark.slow
@pytest.mark.parametrize(
    "place", ["journal.keep.before", "update.note.before", "round.folded", "blob.write", "store.commit.after"]
)
def test_it_pauses_while_the_disk_is_full_and_loses_nothing(
    running: Running, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    spec = buffered(rounds=6, k=2, deadline=3.0)

    async def run() -> None:
        async with running() as federation:
            for i in range(4):
                await federation.agent(f"client-{i}", at_their_pace(i))
            name = await federation.submit(spec)
            driver = federation.coordinator.drivers[name]
            await until(lambda: len(driver.committed) == 2)
            with monkeypatch.context() as full:
                full.setitem(FAULTS, place, Fault("ENOSPC"))
                await until(lambda: driver.paused)
            await holds_when_replayed(federation, name, spec)

    asyncio.run(run())


# --- who is out, and what becomes of its place


@pytest.mark.slow
def test_one_that_is_late_or_declines_is_told_so_and_its_place_is_filled(running: Running) -> None:
    spec = buffered(rounds=4, k=2, size=2, deadline=0.5)

    async def refusing(agent: Agent, work: Assignment) -> None:
        await agent.decline(work.ref, "busy")

    async def run() -> None:
        async with running() as federation:
            late = await federation.agent("client-0", silent)
            declining = await federation.agent("client-1", refusing)
            name = await federation.submit(spec)
            await until(lambda: late.outcomes and len(declining.outcomes) > 2)
            assert late.outcomes[0].verdict == Verdict("late")
            assert declining.outcomes[0].verdict == Verdict("refused", "declined: busy")
            refs = [work.ref for work in declining.assignments]
            assert len(set(refs)) == len(refs) and len(refs) < 8, "it rests longer each time"
            for i in (2, 3):
                await federation.agent(f"client-{i}")
            log = await holds_when_replayed(federation, name, spec)
            said = {(each.client, each.status, each.reason) for step in log for each in step}
            assert {("client-0", "late", ""), ("client-1", "lost", "declined: busy")} <= said

    asyncio.run(run())


def test_an_update_that_does_not_pass_is_refused_and_the_step_waits_for_another(running: Running) -> None:
    spec = buffered(rounds=2, k=2, size=3)

    async def broken(agent: Agent, work: Assignment) -> None:
        update = await agent.update(work)
        if work.ref.kind == "train":
            update.vectors["delta"][0] = float("nan")
        await agent.upload(upload_parts(work.ref, update))

    async def run() -> None:
        async with running() as federation:
            await federation.agent("client-0", broken)
            name = await federation.submit(spec)
            driver = federation.coordinator.drivers[name]
            await until(lambda: driver.workers and driver.workers.gone)
            for i in (1, 2):
                await federation.agent(f"client-{i}")
            log = await holds_when_replayed(federation, name, spec)
            bad = [each for each in log[0] if each.status == "refused"]
            assert {each.client for each in bad} == {"client-0"} and "not finite" in bad[0].reason

    asyncio.run(run())


def test_a_mixed_model_beyond_the_bound_is_refused_in_its_step(running: Running) -> None:
    """FedAsync bounds a (y - x): what passes as it was sent may not pass against the newest model."""
    spec = buffered(
        rounds=3,
        size=2,
        strategy={"name": "fedasync", "mixing": 1.0, "exponent": 0.0},
        limits={"update": 8.0},
    )
    released = asyncio.Event()

    async def far(agent: Agent, work: Assignment) -> None:
        """From the first model 6 down, after the other has moved it 2 x 4 up."""
        await released.wait()
        update = await agent.update(work)
        update.vectors["delta"][:] = -6.0
        await agent.upload(upload_parts(work.ref, update))

    async def up(agent: Agent, work: Assignment) -> None:
        if work.ref.kind == "train" and work.ref.round > 2:
            released.set()
            return
        update = await agent.update(work)
        if work.ref.kind == "train":
            update.vectors["delta"][:] = 4.0
        await agent.upload(upload_parts(work.ref, update))

    async def run() -> None:
        async with running() as federation:
            await federation.agent("client-0", far)
            await federation.agent("client-1", up)
            name = await federation.submit(spec)
            driver = federation.coordinator.drivers[name]
            await until(lambda: driver.workers and driver.workers.gone)
            assert driver.workers
            ((version, lost),) = driver.workers.gone
            assert (lost.client, version, lost.status) == ("client-0", 0, "refused")
            assert "delta has a coordinate" in lost.reason and len(driver.committed) == 2

    asyncio.run(run())


@pytest.mark.slow
def test_an_agent_that_leaves_loses_its_place_after_the_grace(running: Running) -> None:
    spec = buffered(rounds=2, k=1, size=1, deadline=3.0)

    async def run() -> None:
        async with running() as federation:
            async with federation.visitor("client-0", silent) as agent:
                name = await federation.submit(spec)
                await until(lambda: agent.assignments)
            await federation.agent("client-1")
            log = await holds_when_replayed(federation, name, spec)
            gone = [each for step in log for each in step if each.client == "client-0"]
            assert [(each.status, each.reason) for each in gone] == [("lost", "the connection was lost")]

    asyncio.run(run())


def test_a_run_that_is_stopped_tells_everybody_who_is_at_work(running: Running) -> None:
    async def run() -> None:
        async with running() as federation:
            agents = await federation.agents(3, silent)
            name = await federation.submit(buffered())
            await until(lambda: all(agent.assignments for agent in agents))
            await federation.coordinator.drivers[name].stop()
            await until(lambda: all(agent.outcomes for agent in agents))
            assert {agent.outcomes[0].verdict for agent in agents} == {Verdict("late")}
            assert federation.coordinator.live == {} and federation.coordinator.registry.leases == {}
            assert list(federation.coordinator.journals.folder.iterdir()) == []

    asyncio.run(run())


# --- beside others


def test_updates_may_come_sealed_across_a_restart(running: Running, identity: Any) -> None:
    spec = buffered(rounds=4, k=2, encryption={"updates": "sealed"})
    stuck = True

    async def work(agent: Agent, assignment: Assignment) -> None:
        if not (stuck and agent.name != "client-0" and assignment.ref.round == 2):
            await Sealing(identity("client", agent.name)).work(agent, assignment)

    async def run() -> None:
        nonlocal stuck
        async with running() as federation:
            await federation.agents(3, work)
            name = await federation.submit(spec)
            driver = federation.coordinator.drivers[name]
            await until(lambda: len(driver.committed) == 1 and driver.workers and driver.workers.arrived)
            folder = federation.coordinator.journals.folder
        assert list(folder.glob("*/*.update")), "sealed, as they came"
        stuck = False
        async with running() as federation:
            await federation.agents(3, work)
            await holds_when_replayed(federation, name, spec)

    asyncio.run(run())


@pytest.mark.slow
def test_it_is_evaluated_by_those_who_are_not_at_work(running: Running) -> None:
    spec = buffered(rounds=4, evaluation={"every": 2}, cohort={"minimum": 1})

    async def slow(agent: Agent, work: Assignment) -> None:
        if work.ref.round != 1 or work.ref.kind == "evaluate":
            await honest(agent, work)

    async def run() -> None:
        async with running() as federation:
            busy = await federation.agent("client-0", slow)
            for i in (1, 2):
                await federation.agent(f"client-{i}")
            name = await federation.submit(spec)
            await holds_when_replayed(federation, name, spec)
            rows = federation.coordinator.drivers[name].rows
            assert ["accuracy" in row for row in rows] == [False, True, False, True]
            assert [work.ref.kind for work in busy.assignments] == ["train"]

    asyncio.run(run())


@pytest.mark.slow
def test_two_runs_share_the_clients(running: Running) -> None:
    """One without cohorts, one with: both end, and nobody is asked twice at once."""
    at_work: set[str] = set()
    twice: list[str] = []

    async def work(agent: Agent, assignment: Assignment) -> None:
        twice.extend([agent.name] * (agent.name in at_work))
        at_work.add(agent.name)
        await asyncio.sleep(0.005)
        update = await agent.update(assignment)
        at_work.discard(agent.name)
        await agent.upload(upload_parts(assignment.ref, update))

    async def run() -> None:
        async with running() as federation:
            await federation.agents(4, work)
            one = buffered(rounds=8, k=2, size=4)
            first = await federation.submit(one)
            second = await federation.submit(spec_of(rounds=4, size=3, evaluation={"every": 0}))
            assert (await federation.ended(second)).state == "finished"
            await holds_when_replayed(federation, first, one)
            assert not twice

    asyncio.run(run())


def test_a_run_that_waits_among_those_who_decline_does_not_grow(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_buffered, "LONGEST", 0.01)
    willing = asyncio.Event()

    async def declines(agent: Agent, work: Assignment) -> None:
        await (honest(agent, work) if willing.is_set() else agent.decline(work.ref, "not now"))

    async def run() -> None:
        async with running() as federation:
            await federation.agents(2)
            agent, coordinator = await federation.agent("client-2", declines), federation.coordinator
            name = await federation.submit(buffered(rounds=1, k=3))
            await until(lambda: len(agent.assignments) > 20)
            assert len(coordinator.live) <= 4
            assert len(list(coordinator.journals.folder.iterdir())) <= 4
            willing.set()
            assert (await federation.ended(name)).state == "finished"
            (took_part,) = await log_of(federation, name)
            asked = [(each.client, each.attempt) for each in took_part]
            trained = [work.ref.kind for work in agent.assignments].count("train")
            assert len(asked) == len(set(asked)) == trained + 2
            assert [each.status for each in took_part[3:]] == ["lost"] * (len(asked) - 3)

    asyncio.run(run())
