"""Strategies of many parts on a coordinator: rows, broadcasts, a trusted update, and what is refused."""

import asyncio
import json
from typing import Any

import pytest

from fedcore.messages import Assignment, Ref, Verdict
from fedcore.server.driver import Driver
from fedcore.spec import RunSpec
from fedcore.strategies.optimizers import OPTIMIZERS, SGD
from fedcore.strategies.rounds import State
from fedcore.wire import grpc
from fedcore.wire.v1 import coordinator_pb2 as pb
from tests.server.conftest import (
    LAYOUT,
    Agent,
    Federation,
    Running,
    Work,
    honest,
    reference,
    same,
    silent,
    spec_of,
    until,
    upload_parts,
)

pytestmark = pytest.mark.slow  # together more than five seconds

NAMES = [f"client-{i}" for i in range(6)]
STRATEGIES: dict[str, dict[str, Any]] = {
    "rows": {"aggregator": {"name": "trimmed_mean", "f": 1}, "pre": [{"name": "nnm", "f": 1}]},
    "rows and momenta": {"name": "krum", "f": 1, "optimizer": "adam", "pre": ["finite_check"]},
    "the last aggregate": {"name": "centered_clipping", "optimizer": {"name": "sgd", "momentum": 0.9}},
    "a broadcast": {"name": "scaffold", "optimizer": "yogi"},
    "a broadcast and rows": {"name": "scaffold", "aggregator": "median"},
    "a server's own": {"name": "feddyn", "alpha": 0.1},
    "a trusted update": {"name": "fltrust"},
    "a memory": {"name": "fedavg", "sampler": {"name": "power_of_choice", "candidates": 6}},
}


def composed(strategy: dict[str, Any], size: int = 5) -> RunSpec:
    cohort = {"minimum": size}
    return spec_of(rounds=4, size=size, strategy=strategy, evaluation={"every": 2}, cohort=cohort)


async def finished(federation: Federation, name: str) -> list[dict[str, Any]]:
    """Wait for a run's good end, and return its rows."""
    info = await federation.ended(name)
    assert info.state == "finished", info.detail
    rows = [json.loads(row) for row in info.metrics]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def equal(federation: Federation, name: str, expected: State) -> bool:
    """Tell whether a run's model, and what is broadcast beside it, have the same bits."""
    found, wanted = federation.parameters(name), expected.parameters
    assert found.extra.keys() == wanted.extra.keys()
    pairs = [(found.extra[key], wanted.extra[key]) for key in wanted.extra]
    return all(
        same(*pair) for pair in [(found.shared, wanted.shared), (found.buffers, wanted.buffers), *pairs]
    )


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_a_deployed_strategy_has_the_bits_of_the_pure_state_machine_across_a_restart(
    running: Running, strategy: dict[str, Any]
) -> None:
    """Stopped within the third round: everything that the strategy keeps comes back from the disk."""
    spec = composed(strategy)

    async def stuck(agent: Agent, work: Assignment) -> None:
        await (silent if work.ref.round == 3 and work.ref.kind == "train" else honest)(agent, work)

    async def join(federation: Federation, work: Work) -> None:
        for client in NAMES:
            await federation.agent(client, work)
        await federation.agent("evaluator", evaluator=True)

    async def run() -> None:
        async with running() as federation:
            await join(federation, stuck)
            name = await federation.submit(spec)
            driver = federation.coordinator.drivers[name]
            await until(lambda: len(driver.committed) == 2 and federation.coordinator.live)
        async with running() as federation:
            await join(federation, honest)
            rows = await finished(federation, name)
            state, expected = reference(spec, LAYOUT, NAMES)
            assert rows == expected
            assert equal(federation, name, state)
            driver = federation.coordinator.drivers[name]
            vectors = federation.coordinator.blobs.load_state(driver.committed[-1].vectors)
            assert vectors.keys() == state.vectors.keys()
            assert all(same(vectors[key], state.vectors[key]) for key in vectors)
            assert {client for client, known in driver.clients.items() if known.memory} == set(state.memory)
            kept = {path.name for path in federation.coordinator.blobs.folder.iterdir()}
            assert len(kept) == 1 + bool(vectors)
            assert list(federation.coordinator.journals.folder.iterdir()) == []

    asyncio.run(run())


def test_an_operator_sees_the_model_alone(running: Running) -> None:
    async def run() -> None:
        async with running() as federation:
            await federation.agents(3)
            name = await federation.submit(composed({"name": "scaffold"}, 3))
            operator = await federation.operator()
            before = await operator.Show(pb.RunName(run=name))
            assert before.parameters.size == LAYOUT.nbytes
            info = await federation.ended(name)
            parameters = federation.parameters(name)
            assert info.parameters.sha256 == parameters.digest and info.parameters.size == LAYOUT.nbytes
            data = b"".join([chunk.data async for chunk in operator.Fetch(pb.RunName(run=name))])
            assert data == parameters.shared.tobytes() + parameters.buffers.tobytes()
            assert parameters.extra["control"].any()

    asyncio.run(run())


def test_the_population_is_everybody_who_has_ever_been_there(running: Running) -> None:
    """SCAFFOLD's N: an agent that is away for a while, or over a restart, still counts."""

    async def run() -> None:
        async with running() as federation:
            await federation.agents(2)
            async with federation.visitor("client-2", honest):
                name = await federation.submit(spec_of(rounds=1, size=3, strategy={"name": "scaffold"}))
                await finished(federation, name)
            driver = federation.coordinator.drivers[name]
            ready = ["client-0", "client-7"]
            plan = driver.plan(Ref(name, 2, 0, "train"), ("client-0",), ready, driver.restore())
            assert plan.population == 4
        async with running() as federation:
            driver = federation.coordinator.drivers[name]
            ready = ["client-0"]
            plan = driver.plan(Ref(name, 2, 0, "train"), ("client-0",), ready, driver.restore())
            assert plan.population == 3

    asyncio.run(run())


# --- the trusted update


def test_a_run_waits_for_an_evaluator_and_says_so(running: Running) -> None:
    async def run() -> None:
        async with running() as federation:
            agents = await federation.agents(3)
            name = await federation.submit(composed({"name": "fltrust"}, 3))
            driver = federation.coordinator.drivers[name]
            await until(lambda: driver.run.detail == "waiting for an evaluator with task Sums and its root()")
            evaluator = await federation.agent("evaluator", evaluator=True)
            await finished(federation, name)
            kinds = [work.ref.kind for work in evaluator.assignments]
            assert kinds == ["root"] * 4
            await until(lambda: [o.verdict.status for o in evaluator.outcomes] == ["folded"] * 4)
            assert "root" not in {work.ref.kind for agent in agents for work in agent.assignments}
            assert "evaluator" not in driver.clients

    asyncio.run(run())


def test_without_the_trusted_update_an_attempt_is_given_up(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The evaluator declines, then sends what no update may be, then does its work."""
    said: list[str] = []

    async def fickle(agent: Agent, work: Assignment) -> None:
        if work.ref.attempt == 0:
            await agent.decline(work.ref, "no root() here")
        else:
            update = await agent.update(work)
            if work.ref.attempt == 1:
                update.vectors["delta"][0] = float("nan")
            await agent.upload(upload_parts(work.ref, update))

    async def run() -> None:
        async with running() as federation:
            agents = await federation.agents(3)
            await federation.agent("evaluator", fickle, evaluator=True)
            name = await federation.submit(spec_of(rounds=1, strategy={"name": "fltrust"}))
            driver = federation.coordinator.drivers[name]
            watch(driver)
            await finished(federation, name)
            train = [o for o in agents[0].outcomes if o.ref.kind == "train"]
            given_up = Verdict("late", "the attempt was given up")
            assert [o.verdict for o in train] == [given_up, given_up, Verdict("folded")]
            assert driver.clients["client-0"].attempt == 2

    def watch(driver: Driver) -> None:
        say = driver.say

        def heard(detail: str) -> None:
            said.append(detail)
            say(detail)

        monkeypatch.setattr(driver, "say", heard)

    asyncio.run(run())
    assert "round 1: attempt 1 had no update from the evaluator: declined: no root() here" in said
    assert any("attempt 2 had no update from the evaluator: delta has a coordinate" in text for text in said)


def test_an_evaluator_that_leaves_gives_the_attempt_up_after_the_grace(running: Running) -> None:
    async def run() -> None:
        async with running() as federation:
            await federation.agents(3)
            leaving = await federation.agent("evaluator", silent, evaluator=True)
            name = await federation.submit(spec_of(rounds=1, deadline=30.0, strategy={"name": "fltrust"}))
            driver = federation.coordinator.drivers[name]
            await until(lambda: leaving.assignments)
            await leaving.__aexit__()
            await until(lambda: driver.run.detail.startswith("waiting for an evaluator"))
            other = await federation.agent("other", evaluator=True)
            assert (await federation.ended(name)).state == "finished"
            assert other.assignments[0].ref.attempt == 1

    asyncio.run(run())


# --- what is refused at the door

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown part": ({"strategy": {"aggregator": "medain"}}, "did you mean 'median'"),
    "code by name": ({"strategy": {"aggregator": "rules:Mine"}}, "only a simulation imports module:object"),
    "an attack": ({"attack": {"name": "sign_flip"}}, "attacks are for simulations"),
    "late updates and a sampler": (
        {"strategy": {"mode": "buffered", "sampler": {"name": "power_of_choice", "candidates": 6}}},
        "fills single places",
    ),
    "too small a cohort": ({"strategy": {"name": "krum", "f": 2}}, "a round may close with 2 updates"),
    "parts at odds": ({"strategy": {"name": "fednova", "aggregator": "median"}}, "cannot check"),
    "a local optimiser at odds": (
        {"strategy": {"name": "scaffold"}, "client": {"optimizer": {"name": "adam"}}},
        "Scaffold",
    ),
}


@pytest.mark.parametrize(("tables", "said"), REFUSED.values(), ids=REFUSED)
def test_a_run_that_cannot_work_is_refused_when_it_is_handed_in(
    running: Running, tables: dict[str, Any], said: str
) -> None:
    async def run() -> None:
        async with running() as federation:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await federation.submit(spec_of(**tables))
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert said in (refused.value.details() or "")
            assert federation.coordinator.drivers == {}

    asyncio.run(run())


def test_a_run_whose_plug_in_is_gone_at_a_restart_fails_and_the_others_go_on(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        async with running() as federation:
            await federation.agents(2)
            monkeypatch.setitem(OPTIMIZERS, "mine", SGD)
            lost = await federation.submit(spec_of(strategy={"optimizer": {"name": "mine"}}))
            other = await federation.submit(spec_of())
            monkeypatch.undo()
        async with running() as federation:
            await federation.agents(3)
            info = await federation.ended(lost)
            assert info.state == "failed" and "'mine' is not known" in info.detail
            assert (await federation.ended(other)).state == "finished"

    asyncio.run(run())
