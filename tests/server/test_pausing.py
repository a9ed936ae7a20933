"""A run waits out trouble with disk and database, says so, loses nothing, and ends with the same bits."""

import asyncio
import errno
import gc
import re
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from fedcore.faults import FAULTS, Fault
from fedcore.messages import Assignment
from fedcore.server import live, pausing
from fedcore.server.blobs import CorruptBlob
from fedcore.server.database import FILE, StoreUnavailable
from fedcore.server.pausing import reason
from fedcore.strategies.rounds import fold
from fedcore.wire import grpc
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
    upload_parts,
)

SPEC = spec_of(rounds=3)
NAMES = ["client-0", "client-1", "client-2"]


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try again at once: what is waited for is mended by the tests."""
    monkeypatch.setattr(pausing, "SHORTEST", 0.02)
    monkeypatch.setattr(pausing, "LONGEST", 0.05)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left", "/secret/path"), "disk full"),
        (OSError(errno.EDQUOT, "Quota exceeded"), "disk full"),
        (OSError(errno.EROFS, "Read-only"), "read-only disk"),
        (OSError(errno.EIO, "Input/output error"), "disk error"),
        (StoreUnavailable("database locked"), "database locked"),
        (CorruptBlob("blob ab is corrupt"), "blob ab is corrupt"),
        (FileNotFoundError(errno.ENOENT, "No such file"), ""),
        (OSError("without a number"), ""),
        (ValueError("a bug"), ""),
    ],
)
def test_only_what_somebody_can_mend_is_waited_for(error: Exception, said: str) -> None:
    assert reason(error) == said


async def insistent(agent: Agent, assignment: Assignment) -> None:
    """Do what is asked, again and again while the coordinator has no room, as agents do."""
    agent.streams = agent.name != NAMES[0]  # one of them uploads
    parts = upload_parts(assignment.ref, await agent.update(assignment))
    while True:
        try:
            return await agent.upload(parts)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.FAILED_PRECONDITION:  # the attempt has its update, or is over
                return
            assert error.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.ABORTED), error
            await asyncio.sleep(0.02)


async def shown(federation: Federation, run: str) -> pb.RunInfo:
    info: pb.RunInfo = await (await federation.operator()).Show(pb.RunName(run=run))
    return info


async def is_paused(federation: Federation, run: str, detail: str) -> None:
    await until(lambda: federation.coordinator.drivers[run].paused)
    info = await shown(federation, run)
    assert (info.state, info.detail) == ("paused", detail)


async def ends_as_if_nothing_had_been(federation: Federation, run: str) -> None:
    info = await federation.ended(run)
    assert (info.state, info.detail) == ("finished", "")
    state, _ = reference(SPEC, LAYOUT, NAMES)
    assert same(federation.parameters(run).shared, state.parameters.shared)
    blobs = federation.coordinator.blobs.folder
    assert len(list(blobs.iterdir())) == 2  # the model and the velocity: no try has left anything


SLOWLY = pytest.mark.slow  # all of them together


@pytest.mark.parametrize(
    ("point", "action", "detail"),
    [
        ("blob.write", "ENOSPC", "disk full"),
        ("update.note.before", "ENOSPC", "disk full"),
        pytest.param("blob.rename.before", "EROFS", "read-only disk", marks=SLOWLY),
        pytest.param("blob.rename.after", "EIO", "disk error", marks=SLOWLY),
        pytest.param("transfer.rename.before", "ENOSPC", "disk full", marks=SLOWLY),
        pytest.param("journal.keep.before", "ENOSPC", "disk full", marks=SLOWLY),
        pytest.param("round.folded", "EIO", "disk error", marks=SLOWLY),
        pytest.param("round.commit.before", "EIO", "disk error", marks=SLOWLY),
        pytest.param("round.commit.after", "EIO", "disk error", marks=SLOWLY),
    ],
)
def test_a_run_waits_until_the_disk_is_mended(
    running: Running, monkeypatch: pytest.MonkeyPatch, point: str, action: str, detail: str
) -> None:
    async def run() -> None:
        async with running() as federation:
            name = await federation.submit(SPEC)
            monkeypatch.setitem(FAULTS, point, Fault(action))
            await federation.agents(3, insistent)
            await is_paused(federation, name, detail)
            await asyncio.sleep(0.1)  # several tries
            assert federation.coordinator.drivers[name].run.state == "running"
            FAULTS.clear()
            await ends_as_if_nothing_had_been(federation, name)

    asyncio.run(run())


@pytest.mark.parametrize("where", ["the fold", pytest.param("the commit", marks=SLOWLY)])
def test_tries_that_fail_hold_no_space(running: Running, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def full(*arguments: Any) -> None:
        fold(*arguments)
        raise OSError(errno.ENOSPC, "No space left on device")

    def unlinked() -> list[str]:
        return re.findall(r"/attempts/\S+ \(deleted\)", Path("/proc/self/maps").read_text())

    async def run() -> None:
        before = unlinked()  # by other tests of this process
        async with running() as federation:
            name = await federation.submit(SPEC)
            if where == "the fold":
                monkeypatch.setattr(live, "fold", full)
            else:
                monkeypatch.setitem(FAULTS, "round.commit.before", Fault("ENOSPC"))
            await federation.agents(3, insistent)
            await is_paused(federation, name, "disk full")
            gc.disable()
            try:
                await asyncio.sleep(0.8)  # a dozen tries
                held = [each for each in await asyncio.to_thread(unlinked) if each not in before]
            finally:
                gc.enable()
            assert len(held) <= 3

    asyncio.run(run())


def test_a_run_waits_for_the_database(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with running() as federation:
            name = await federation.submit(SPEC)
            store, locked = federation.coordinator.store, True
            commit = store.commit_round

            def commit_round(*arguments: object) -> None:
                if locked:
                    raise StoreUnavailable("database locked")
                commit(*arguments)

            monkeypatch.setattr(store, "commit_round", commit_round)
            await federation.agents(3, insistent)
            await is_paused(federation, name, "database locked")
            locked = False
            await ends_as_if_nothing_had_been(federation, name)

    asyncio.run(run())


def test_a_run_waits_while_another_process_has_locked_the_database(running: Running, tmp_path: Path) -> None:
    async def run() -> None:
        async with running() as federation:
            name = await federation.submit(SPEC)
            with closing(sqlite3.connect(tmp_path / "coordinator" / FILE)) as other:
                other.execute("BEGIN IMMEDIATE")
                await federation.agents(3, insistent)
                await is_paused(federation, name, "database locked")
            await ends_as_if_nothing_had_been(federation, name)

    asyncio.run(run())


def test_a_commit_whose_answer_was_lost_is_not_made_twice(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        async with running() as federation:
            name, lost = await federation.submit(SPEC), [1, 3]
            store = federation.coordinator.store
            commit = store.commit_round

            def commit_round(run_id: str, committed: object, *rest: object) -> None:
                commit(run_id, committed, *rest)
                if (number := getattr(committed, "round", 0)) in lost:
                    lost.remove(number)
                    raise StoreUnavailable("database unreachable")

            monkeypatch.setattr(store, "commit_round", commit_round)
            await federation.agents(3, insistent)
            await ends_as_if_nothing_had_been(federation, name)
            assert lost == []

    asyncio.run(run())


def test_a_corrupt_model_is_named_until_it_is_put_back(running: Running) -> None:
    async def run() -> None:
        async with running() as federation:
            agents = await federation.agents(3, silent)
            name = await federation.submit(SPEC)
            await until(lambda: all(agent.assignments for agent in agents))
            path: Path = federation.coordinator.blobs.path(federation.coordinator.drivers[name].address)
        sound = await asyncio.to_thread(path.read_bytes)
        await asyncio.to_thread(path.write_bytes, sound[:-1] + b"?")
        async with running() as federation:
            await is_paused(federation, name, f"blob {path.name} is corrupt: put it back from a backup")
            operator = await federation.operator()
            (listed,) = (await operator.List(pb.ListRequest())).runs
            assert listed.state == "paused"
            await asyncio.to_thread(path.write_bytes, sound)
            await federation.agents(3)
            await ends_as_if_nothing_had_been(federation, name)

    asyncio.run(run())


def test_what_was_acknowledged_before_a_pause_is_not_asked_for_again(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    async def counted(agent: Agent, assignment: Assignment) -> None:
        if assignment.ref.kind == "train" and assignment.ref.round == 1:
            asked.append(agent.name)
        await insistent(agent, assignment)

    async def run() -> None:
        async with running() as federation:
            name = await federation.submit(SPEC)
            agents = [await federation.agent(name, counted) for name in NAMES[:2]]
            await asyncio.sleep(0)
            monkeypatch.setitem(FAULTS, "update.note.before", Fault("ENOSPC", left=2))
            await federation.agent(NAMES[2], counted)
            await is_paused(federation, name, "disk full")
            FAULTS.clear()
            await ends_as_if_nothing_had_been(federation, name)
            twice = {client for client in asked if asked.count(client) > 1}
            assert len(twice) <= 1 and len(agents) == 2  # only the one whose update was not acknowledged

    asyncio.run(run())


def test_a_run_that_waits_can_be_stopped_and_goes_on_after_a_restart(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        async with running() as federation:
            await federation.agents(3, insistent)
            monkeypatch.setitem(FAULTS, "blob.write", Fault("ENOSPC", left=2))  # after the submissions
            names = [await federation.submit(SPEC), await federation.submit(SPEC)]
            for name in names:
                await is_paused(federation, name, "disk full")
            stopped = await (await federation.operator()).Stop(pb.RunName(run=names[0]))
            assert (stopped.state, stopped.detail) == ("stopped", "by an operator")
        FAULTS.clear()
        async with running() as federation:
            await federation.agents(3, honest)
            await federation.ended(names[1])
            assert (await shown(federation, names[1])).state == "finished"
            assert (await shown(federation, names[0])).state == "stopped"

    asyncio.run(run())


def test_a_submission_that_does_not_fit_is_refused_and_leaves_nothing(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        async with running() as federation:
            monkeypatch.setitem(FAULTS, "blob.write", Fault("ENOSPC"))
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await federation.submit(SPEC)
            assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert raised.value.details() == "disk full"
            assert list(federation.coordinator.blobs.folder.iterdir()) == []
            assert not federation.coordinator.drivers

    asyncio.run(run())
