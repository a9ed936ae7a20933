"""What happens between two steps that nobody expects anything between."""

import asyncio
import errno
import os
import threading
from contextlib import suppress
from typing import Any

import pytest

from fedcore.faults import FAULTS, Fault
from fedcore.messages import Assignment, Blob, Ref, Submission
from fedcore.server import pausing
from fedcore.server.closing import close
from fedcore.server.database import StoreUnavailable
from fedcore.server.driver import Driver
from fedcore.server.journal import Journal
from fedcore.strategies.rounds import fold
from fedcore.wire import grpc
from fedcore.wire.codec import to_wire
from fedcore.wire.v1 import coordinator_pb2 as pb
from tests.server.conftest import (
    DIGEST,
    LAYOUT,
    METRICS,
    TASK,
    Agent,
    Federation,
    Running,
    chunk_parts,
    honest,
    initial,
    reference,
    same,
    silent,
    sized,
    spec_of,
    until,
    upload_parts,
)

NAMES = ["client-0", "client-1", "client-2"]
FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pausing, "SHORTEST", 0.02)
    monkeypatch.setattr(pausing, "LONGEST", 0.05)


# --- pauses


def test_a_pause_waits_for_what_is_being_noted(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    noting, goes_on, note = threading.Event(), threading.Event(), Journal.note

    def slowly(journal: Journal, record: bytes) -> None:
        if not goes_on.is_set():
            noting.wait(0.3 if b'"client-0"' in record else 0.6 if b'"client-1"' in record else 9.0)
            if b'"client-2"' not in record:
                raise FULL
            goes_on.wait(10)
        note(journal, record)

    async def tries(agent: Agent, work: Assignment) -> None:
        with suppress(grpc.aio.AioRpcError, TimeoutError):
            async with asyncio.timeout(0.2 if agent.name == "client-2" else None):
                await honest(agent, work)

    async def run() -> None:
        async with running() as federation:
            *_, agent = await federation.agents(3, tries)
            monkeypatch.setattr(Journal, "note", slowly)
            name = await federation.submit(spec_of(rounds=1))
            await until(lambda: federation.coordinator.drivers[name].paused)
            await asyncio.sleep(0.2)
            goes_on.set()
            noting.set()
            await federation.ended(name)
            assert [work.ref.kind for work in agent.assignments] == ["train", "evaluate"]

    asyncio.run(run())


def test_an_upload_that_a_pause_breaks_off_may_come_again(running: Running) -> None:
    async def run() -> None:
        layout = sized(1 << 20)
        async with running() as federation:
            agent, *_ = await federation.agents(3, silent, layout)
            name = await federation.submit(spec_of(), layout)
            await until(lambda: agent.assignments)
            parts = upload_parts(agent.assignments[0].ref, await agent.update(agent.assignments[0]))
            call = agent.stub.Upload(timeout=30)
            for part in parts[:2]:
                await call.write(part)
            live = federation.coordinator.live[Ref(name, 1, 0, "train")]
            await until(lambda: live.taken)
            live.fail(FULL)
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await call
            assert raised.value.code() is grpc.StatusCode.ABORTED

    asyncio.run(run())


# --- restarts, stops and submissions


def test_clients_of_a_committed_round_are_free_after_a_restart(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(*_: Any) -> None:
        await asyncio.sleep(100)

    async def run() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Driver, "tidy", never)
            async with running() as federation:
                await federation.agents(3)
                name = await federation.submit(spec_of(cohort={"minimum": 3}))
                await until(lambda: federation.coordinator.drivers[name].committed)
        async with running() as federation:
            await federation.agents(2)
            await asyncio.sleep(0.1)
            other = await federation.submit(spec_of(rounds=1, size=2))
            await until(lambda: federation.coordinator.drivers[other].run.state == "finished", 5)

    asyncio.run(run())


def test_a_stop_amid_the_close_of_a_round_leaves_no_blob(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    closing, goes_on = threading.Event(), threading.Event()

    def slowly(*what: Any) -> Any:
        closing.set()
        goes_on.wait(10)
        return close(*what)

    async def run() -> None:
        async with running() as federation:
            await federation.agents(3)
            monkeypatch.setattr("fedcore.server.driver.close", slowly)
            name = await federation.submit(spec_of())
            await until(closing.is_set)
            stopping = asyncio.ensure_future(federation.coordinator.drivers[name].stop())
            await asyncio.sleep(0.1)
            goes_on.set()
            await stopping
            left = [path.name for path in federation.coordinator.blobs.folder.iterdir()]
            assert left == [federation.coordinator.drivers[name].address]

    asyncio.run(run())


async def submission(federation: Federation) -> Any:
    """Return the call of a submission."""
    parameters = initial(LAYOUT)
    data = parameters.shared.tobytes() + parameters.buffers.tobytes()
    head = Submission(spec_of(), TASK, DIGEST, LAYOUT, METRICS, Blob(parameters.digest, len(data)))
    call = (await federation.operator()).Submit(timeout=30)
    await call.write(to_wire(head))
    for part in chunk_parts(data):
        await call.write(pb.SubmitPart(chunk=part.chunk))
    await call.done_writing()
    return call


def test_a_run_whose_operator_has_gone_is_driven_or_is_none(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        async with running() as federation:
            store = federation.coordinator.store
            adding, goes_on, add_run = threading.Event(), threading.Event(), store.add_run

            def slowly(*what: Any) -> Any:
                adding.set()
                goes_on.wait(10)
                return add_run(*what)

            monkeypatch.setattr(store, "add_run", slowly)
            call = await submission(federation)
            await until(adding.is_set)
            call.cancel()
            await asyncio.sleep(0.2)
            goes_on.set()
            await asyncio.sleep(0.2)
            assert {run.id for run in store.runs()} == federation.coordinator.drivers.keys()

    asyncio.run(run())


@pytest.mark.parametrize("call", ["note", "add_run"])
def test_a_submission_that_the_database_does_not_take_leaves_nothing(
    running: Running, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def locked(*_: Any) -> None:
        raise StoreUnavailable("database locked")

    async def run() -> None:
        async with running() as federation:
            monkeypatch.setattr(federation.coordinator.store, call, locked)
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await federation.submit(spec_of())
            assert raised.value.details() == "database locked"
            assert list(federation.coordinator.blobs.folder.iterdir()) == []

    asyncio.run(run())


def test_an_attempt_whose_root_was_not_opened_is_opened_anew(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(rounds=2, strategy={"name": "fltrust"})

    async def run() -> None:
        async with running() as federation:
            monkeypatch.setitem(FAULTS, "journal.keep.before", Fault("ENOSPC", left=1))
            await federation.agent("evaluator", evaluator=True)
            agents = await federation.agents(3)
            name = await federation.submit(spec)
            await until(lambda: federation.coordinator.drivers[name].paused)
            FAULTS.clear()
            info = await federation.ended(name)
            assert info.state == "finished"
            assert {work.ref.attempt for agent in agents for work in agent.assignments} == {0}
            state, _ = reference(spec, LAYOUT, NAMES)
            assert same(federation.parameters(name).shared, state.parameters.shared)

    asyncio.run(run())


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_what_was_acknowledged_is_not_refused_for_want_of_files_or_memory(
    running: Running, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    failing = [True]

    def short(*what: Any) -> Any:
        if failing:
            raise OSError(number, os.strerror(number))
        return fold(*what)

    async def run() -> None:
        async with running() as federation:
            agents = await federation.agents(3)
            monkeypatch.setattr("fedcore.server.live.fold", short)
            name = await federation.submit(spec_of(rounds=1))
            await until(lambda: federation.coordinator.drivers[name].paused)
            failing.clear()
            info = await federation.ended(name)
            assert (info.state, info.detail) == ("finished", "")
            assert all(o.verdict.status == "folded" for agent in agents for o in agent.outcomes)

    asyncio.run(run())


@pytest.mark.parametrize("strategy", [{"name": "fedavg"}, {"name": "fedbuff", "k": 2}])
def test_a_run_that_was_paused_takes_no_clients_from_another(
    running: Running, monkeypatch: pytest.MonkeyPatch, strategy: dict[str, Any]
) -> None:
    permits = asyncio.Event()

    async def waits(agent: Agent, work: Assignment) -> None:
        await permits.wait()
        with suppress(grpc.aio.AioRpcError):
            await honest(agent, work)

    async def run() -> None:
        spec = spec_of(rounds=1, size=2, strategy=strategy, evaluation={"where": "holdout"})
        async with running() as federation:
            agents, coordinator = await federation.agents(2, waits), federation.coordinator
            first = await federation.submit(spec)
            ref = Ref(first, 1, 0, "train")
            await until(lambda: all(agent.assignments for agent in agents))
            monkeypatch.setattr(pausing, "SHORTEST", 0.3)
            coordinator.live[ref].fail(FULL)
            await until(lambda: coordinator.drivers[first].paused)
            second = await federation.submit(spec_of(rounds=1, size=2, evaluation={"where": "holdout"}))
            await until(lambda: all(len(agent.assignments) == 2 for agent in agents))
            await asyncio.sleep(0.5)
            assert set(coordinator.registry.leases.values()) == {second}
            assert ref not in coordinator.live
            permits.set()
            for name in (second, first):
                assert (await federation.ended(name)).state == "finished"
            assert [len(agent.assignments) for agent in agents] == [3, 3]

    asyncio.run(run())
