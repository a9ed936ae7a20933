"""A coordinator that stops or is killed at any moment goes on where it was, with the same bits."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fedcore.crypto.identity import Identity
from fedcore.crypto.names import Role
from fedcore.crypto.secagg import Step
from fedcore.messages import Assignment, Ref
from fedcore.server.store import Store
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
from tests.server.devices import Masking
from tests.server.killed import Killed

NAMES = ["client-0", "client-1", "client-2"]
SPEC = spec_of(rounds=4)


def without_seconds(rows: list[str]) -> list[dict[str, float]]:
    return [{key: value for key, value in json.loads(row).items() if key != "seconds"} for row in rows]


@pytest.mark.parametrize(("number", "kind"), [(1, "train"), (2, "train"), (2, "evaluate"), (4, "evaluate")])
def test_a_coordinator_that_stops_within_a_round_goes_on_with_the_same_bits(
    running: Running, number: int, kind: str
) -> None:
    """With one agent silent at the given piece of work, the rest of the round is under way when it stops."""

    async def stuck(agent: Agent, work: Assignment) -> None:
        await (silent if (work.ref.round, work.ref.kind) == (number, kind) else honest)(agent, work)

    async def run() -> None:
        async with running() as federation:
            await federation.agents(2)
            agent = await federation.agent("client-2", stuck)
            name = await federation.submit(SPEC)
            await until(lambda: agent.assignments and agent.assignments[-1].ref.round == number)
            await until(lambda: agent.assignments[-1].ref.kind == kind)
            await until(lambda: len(federation.coordinator.live[agent.assignments[-1].ref].round.folded) == 2)
        async with running() as federation:
            await federation.agents(3)
            info = await federation.ended(name)
            assert (info.state, info.detail) == ("finished", "")
            state, rows = reference(SPEC, LAYOUT, NAMES)
            assert same(federation.parameters(name).shared, state.parameters.shared)
            assert same(federation.parameters(name).buffers, state.parameters.buffers)
            assert without_seconds(list(info.metrics)) == rows  # a lost evaluation is made up
            kept = {path.name for path in federation.coordinator.blobs.folder.iterdir()}
            assert len(kept) == 2 and state.parameters.digest in kept  # and the velocity
            assert list(federation.coordinator.journals.folder.iterdir()) == []

    asyncio.run(run())


def test_what_has_ended_stays_as_it_is(running: Running) -> None:
    async def run() -> None:
        async with running() as federation:
            await federation.agents(3)
            finished = await federation.submit(SPEC)
            before = await federation.ended(finished)
        async with running() as federation:
            assert await federation.ended(finished) == before

    asyncio.run(run())


def test_a_coordinator_that_is_killed_again_and_again_ends_with_the_same_bits(
    identity: Callable[[Role, str], Identity], tmp_path: Path, database_url: str
) -> None:
    """Between rounds, within a training round, and within an evaluation."""
    killed = Killed(tmp_path / "coordinator", identity, database_url)
    moments = [(1, "train"), (2, "evaluate"), (3, "train"), None]

    async def play(moment: tuple[int, str] | None, name: str) -> str:
        async def stuck(agent: Agent, work: Assignment) -> None:
            await (silent if (work.ref.round, work.ref.kind) == moment else honest)(agent, work)

        async with killed.process():
            federation = Federation(identity, None, killed.port)  # type: ignore[arg-type]
            async with federation.stack:
                agents = [await federation.agent(name, stuck) for name in NAMES]
                name = name or await federation.submit(SPEC)
                if moment:
                    await until(
                        lambda: agents[0].assignments and agents[0].assignments[-1].ref.round == moment[0]
                    )
                    await until(lambda: agents[0].assignments[-1].ref.kind == moment[1])
                else:
                    assert (await federation.ended(name)).state == "finished"
        return name

    async def run() -> str:
        name = ""
        for moment in moments:
            name = await play(moment, name)
        return name

    name = asyncio.run(run())
    store = Store(tmp_path / "coordinator", database_url)
    (ended,) = store.runs()
    rounds = store.rounds(name)
    store.close()
    state, rows = reference(SPEC, LAYOUT, NAMES)
    assert ended.state == "finished"
    assert rounds[-1].parameters == state.parameters.digest
    assert [{k: v for k, v in r.row.items() if k != "seconds"} for r in rounds] == rows


@pytest.mark.slow
def test_a_coordinator_that_is_killed_amid_secure_aggregation_resumes_the_same_attempts(
    identity: Callable[[Role, str], Identity], tmp_path: Path
) -> None:
    """While shares, masked words and signatures come in; one of five clients is always yet to answer."""
    names = [*NAMES, "client-3", "client-4"]
    cohort = {"size": 5, "minimum": 4}
    spec = spec_of(rounds=4, cohort=cohort, encryption={"updates": "secagg", "corrupt": 0.0, "lost": 0.2})
    killed = Killed(tmp_path / "coordinator", identity)
    devices = [Masking(identity("client", name)) for name in names]
    moments = [(1, Step.SHARE), (2, Step.MASK), (3, Step.AGREE), (4, Step.REVEAL), None]

    async def play(moment: tuple[int, Step] | None, run: str) -> str:
        devices[2].stop = moment
        async with killed.process():
            federation = Federation(identity, None, killed.port)  # type: ignore[arg-type]
            async with federation.stack:
                for name, device in zip(names, devices, strict=True):
                    await federation.agent(name, device.work, heed=device.heed)
                run = run or await federation.submit(spec)
                if moment:
                    ref = Ref(run, moment[0], 0, "train")
                    await until(lambda: ref in devices[2].clients and devices[2].heard[-1] is moment[1])
                    past = {step for step in Step if list(Step).index(step) > list(Step).index(moment[1])}
                    await until(lambda: any(d.clients[ref].step in past for d in devices))
                else:
                    assert (await federation.ended(run)).state == "finished"
        return run

    async def run() -> str:
        name = ""
        for moment in moments:
            name = await play(moment, name)
        return name

    name = asyncio.run(run())
    store = Store(tmp_path / "coordinator")
    rounds = store.rounds(name)
    store.close()
    state, rows = reference(spec, LAYOUT, names)
    assert rounds[-1].parameters == state.parameters.digest
    assert [{k: v for k, v in r.row.items() if k != "seconds"} for r in rounds] == rows
    assert {ref.attempt for device in devices for ref in device.clients} == {0}
