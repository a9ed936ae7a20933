"""What was acknowledged is never asked for again, and the model has the bits of a run that went through."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from fedcore.client.session import Session
from fedcore.messages import Assignment, Ref
from fedcore.server.journal import Accepted, Journal, Journals
from fedcore.server.live import LiveRound
from fedcore.spec import RunSpec
from fedcore.wire import grpc
from fedcore.wire.chunks import CHUNK
from fedcore.wire.codec import to_wire, upload_head
from fedcore.wire.v1 import coordinator_pb2 as pb
from tests.server.conftest import (
    LAYOUT,
    Agent,
    Federation,
    Running,
    Work,
    answer,
    chunk_parts,
    honest,
    reference,
    same,
    silent,
    sized,
    spec_of,
    until,
    upload_parts,
)
from tests.server.devices import Sealing

CODE = grpc.StatusCode
NAMES = ["client-0", "client-1", "client-2"]
RULES: dict[str, dict[str, Any]] = {
    "mean": {},
    "krum": {"strategy": {"name": "krum", "f": 0}, "cohort": {"minimum": 3}},
    "fltrust": {"strategy": {"name": "fltrust"}},
}


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def spec_with(rule: str, updates: str = "tls") -> RunSpec:
    return spec_of(rounds=2, encryption={"updates": updates}, **RULES[rule])


async def join(federation: Federation, spec: RunSpec, work: dict[str, Work] | None = None) -> list[Agent]:
    """Return the three clients; `work` is what some of them do instead of what they are asked."""

    def device(name: str) -> Work:
        sealed = spec.encryption.updates == "sealed"
        return Sealing(federation.identity("client", name)).work if sealed else honest

    if spec.strategy["name"] == "fltrust":
        await federation.agent(
            "evaluator", (work or {}).get("evaluator", device("evaluator")), evaluator=True
        )
    return [await federation.agent(name, (work or {}).get(name, device(name))) for name in NAMES]


def asked(agent: Agent, kind: str = "train", number: int = 1) -> int:
    return sum((work.ref.kind, work.ref.round) == (kind, number) for work in agent.assignments)


async def acknowledged(federation: Federation, name: str, kind: str, clients: set[str]) -> LiveRound:
    """Wait until the updates of these clients, and no others, are acknowledged in the first round."""
    ref = Ref(name, 1, 0, kind)  # type: ignore[arg-type]
    await until(lambda: ref in federation.coordinator.live)
    live = federation.coordinator.live[ref]
    assert isinstance(live, LiveRound)
    await until(lambda: live.accepted.keys() == clients)
    return live


async def ends_with_the_same_bits(federation: Federation, name: str, spec: RunSpec) -> None:
    info = await federation.ended(name)
    assert (info.state, info.detail) == ("finished", "")
    state, rows = reference(spec, LAYOUT, NAMES)
    assert same(federation.parameters(name).shared, state.parameters.shared)
    assert same(federation.parameters(name).buffers, state.parameters.buffers)
    found = [json.loads(row) for row in info.metrics]
    assert [{k: v for k, v in row.items() if k != "seconds"} for row in found] == rows
    assert list(federation.coordinator.journals.folder.iterdir()) == []


@pytest.mark.parametrize(
    ("rule", "updates", "kind"),
    [
        ("krum", "sealed", "train"),
        ("mean", "tls", "evaluate"),
        slow("mean", "tls", "train"),
        slow("krum", "tls", "train"),
        slow("mean", "sealed", "train"),
        slow("mean", "sealed", "evaluate"),
    ],
)
def test_after_a_restart_only_those_are_asked_who_have_not_answered(
    running: Running, rule: str, updates: str, kind: str
) -> None:
    spec = spec_with(rule, updates)

    async def run() -> None:
        async with running() as federation:
            device = (await join(federation, spec))[2]
            at_work = device.work

            async def stuck(agent: Agent, work: Assignment) -> None:
                await (silent if work.ref.kind == kind else at_work)(agent, work)

            device.work = stuck
            name = await federation.submit(spec)
            await acknowledged(federation, name, kind, {"client-0", "client-1"})
        async with running() as federation:
            agents = await join(federation, spec)
            await ends_with_the_same_bits(federation, name, spec)
            assert [asked(agent, kind) for agent in agents] == [0, 0, 1]

    asyncio.run(run())


@pytest.mark.parametrize(
    ("rule", "updates"),
    [
        ("fltrust", "tls"),
        ("mean", "sealed"),
        slow("mean", "tls"),
        slow("krum", "tls"),
        slow("krum", "sealed"),
    ],
)
def test_a_round_that_had_closed_is_closed_again_without_a_word(
    running: Running, monkeypatch: pytest.MonkeyPatch, rule: str, updates: str
) -> None:
    """Between its close and its commit; in another order, which changes nothing."""
    spec = spec_with(rule, updates)

    async def run() -> None:
        async with running() as federation:
            closed = asyncio.Event()

            async def dying(*_: Any) -> None:
                closed.set()
                raise asyncio.CancelledError

            await join(federation, spec)
            name = await federation.submit(spec)
            monkeypatch.setattr(federation.coordinator.drivers[name], "commit", dying)
            await closed.wait()
        backwards(next(path for path in federation.coordinator.journals.folder.glob("*.train")))
        async with running() as federation:
            agents = await join(federation, spec)
            await ends_with_the_same_bits(federation, name, spec)
            assert [asked(agent) for agent in agents] == [0, 0, 0]

    asyncio.run(run())


def test_sealed_updates_whose_key_is_lost_are_asked_for_again(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    """The coordinator's identity, under which the key is kept, was replaced in between."""
    spec = spec_with("mean", "sealed")

    async def run() -> None:
        async with running() as federation:
            await join(federation, spec, {"client-2": silent})
            name = await federation.submit(spec)
            await acknowledged(federation, name, "train", {"client-0", "client-1"})
        async with running(known=federation.identity("coordinator", "other")) as federation:
            agents = await join(federation, spec)
            await ends_with_the_same_bits(federation, name, spec)
            assert [asked(agent) for agent in agents] == [1, 1, 1]

    asyncio.run(run())
    assert "attempt begun anew" in caplog.text


def backwards(folder: Path) -> None:
    """Let a journal tell that its updates were accepted in the opposite order."""
    journal = Journal.load(folder)
    assert journal and len(journal.records) == 3
    (folder / "records").write_bytes(b"")
    for record in (journal.opening.to_bytes(), *reversed(journal.records)):
        journal.note(record)


@asynccontextmanager
async def broken_off(
    running: Running, spec: RunSpec, others: Work = honest
) -> AsyncIterator[tuple[str, Journal, Callable[[], Awaitable[Federation]]]]:
    """Break a run off when its first two clients have answered; yields its id, its journal, and a restart."""
    async with running() as federation:
        await join(federation, spec, {"client-1": others, "client-2": silent})
        name = await federation.submit(spec)
        await acknowledged(federation, name, "train", {"client-0", "client-1"})
    journal = Journal.load(next(federation.coordinator.journals.folder.iterdir()))
    assert journal
    contexts = []

    async def again() -> Federation:
        contexts.append(running())
        federation: Federation = await contexts[0].__aenter__()
        return federation

    try:
        yield name, journal, again
    finally:
        for context in contexts:
            await context.__aexit__(None, None, None)


def test_an_update_that_a_loss_of_power_has_damaged_is_asked_for_again(running: Running) -> None:
    spec = spec_with("mean")

    async def run() -> None:
        async with broken_off(running, spec) as (name, journal, restart):
            path = journal.update("client-1")
            path.write_bytes(path.read_bytes()[:-8] + bytes(8))  # blocks that were never written are zero
            federation = await restart()
            agents = await join(federation, spec)
            await ends_with_the_same_bits(federation, name, spec)
            assert [asked(agent) for agent in agents] == [0, 1, 1]

    asyncio.run(run())


def test_an_update_without_a_record_was_not_acknowledged_and_is_asked_for_again(running: Running) -> None:
    spec = spec_with("mean")

    async def run() -> None:
        async with broken_off(running, spec) as (name, journal, restart):
            records = journal.folder / "records"
            records.write_bytes(records.read_bytes()[:-1])  # torn
            lost = Accepted.of_bytes(journal.records[-1]).client
            federation = await restart()
            agents = await join(federation, spec)
            await ends_with_the_same_bits(federation, name, spec)
            assert [asked(agent) for agent in agents] == [
                int(agent.name in (lost, "client-2")) for agent in agents
            ]

    asyncio.run(run())


def test_whose_receipt_was_lost_gets_it_after_a_restart_and_counts_once(running: Running) -> None:
    spec = spec_with("mean")

    async def run() -> None:
        async with broken_off(running, spec) as (name, _, restart):
            federation = await restart()
            agents = await join(federation, spec, dict.fromkeys(NAMES, silent))
            await until(lambda: agents[2].assignments)
            work = agents[2].assignments[0]
            parts = upload_parts(work.ref, await agents[2].update(work))
            for agent in agents[:2]:
                sent = upload_parts(work.ref, answer_of(agent, work, agents[2]))
                await agent.upload(sent)
                progress = await agent.stub.Standing(sent[0].header)
                assert (progress.received, progress.bytes) == (True, LAYOUT.nbytes)
            for agent in agents:
                agent.work = honest
            await agents[2].upload(parts)
            await ends_with_the_same_bits(federation, name, spec)

    asyncio.run(run())


def answer_of(agent: Agent, work: Assignment, other: Agent) -> Any:
    return answer(work.ref, agent.name, other.models[work.parameters.sha256])


def test_an_update_that_was_refused_is_refused_again_after_a_restart(running: Running) -> None:
    spec = spec_of(rounds=1)

    async def hostile(agent: Agent, work: Assignment) -> None:
        update = await agent.update(work)
        await agent.upload(upload_parts(work.ref, update, scalars={**update.scalars, "weight": -1.0}))

    async def run() -> None:
        async with broken_off(running, spec, hostile) as (name, _, restart):
            federation = await restart()
            agents = await join(federation, spec)
            info = await federation.ended(name)
            assert '"folded": 2, "refused": 1' in info.metrics[0]
            assert [asked(agent) for agent in agents] == [0, 0, 1]
            await until(lambda: len(agents[1].outcomes) == 2)
            assert "weight is -1" in agents[1].outcomes[0].verdict.reason

    asyncio.run(run())


def test_an_attempt_that_was_given_up_is_not_taken_up_again(running: Running) -> None:
    """Its clients have been told, and have dropped what they would have kept."""
    spec = spec_of(rounds=1, deadline=1.0, cohort={"minimum": 3})

    async def run() -> None:
        async with running() as federation:
            agents = await join(federation, spec, {"client-2": silent})
            name = await federation.submit(spec)
            await until(lambda: agents[0].outcomes)
            assert agents[0].outcomes[0].verdict.status == "late"
        async with running() as federation:
            agents = await join(federation, spec)
            await federation.ended(name)
            assert {
                work.ref.attempt for agent in agents for work in agent.assignments if work.ref.kind == "train"
            } != {0}
            assert all(asked(agent) for agent in agents)

    asyncio.run(run())


CUTS = [1, *map(slow, [0, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 4711])]
LARGE = sized(5 * CHUNK // 8)  # 2.5 chunks


def rest_of(parts: list[pb.UploadPart], offset: int) -> list[pb.UploadPart]:
    """Return an upload from a byte of its payload on."""
    head = pb.UploadPart()
    head.CopyFrom(parts[0])
    head.header.offset = offset
    return [head, *chunk_parts(b"".join(part.chunk.data for part in parts[1:])[offset:])]


def cut_at(parts: list[pb.UploadPart], offset: int) -> list[pb.UploadPart]:
    return [parts[0], *chunk_parts(b"".join(part.chunk.data for part in parts[1:])[:offset])]


async def parts_of(agent: Agent) -> list[pb.UploadPart]:
    await until(lambda: agent.assignments)
    work = agent.assignments[0]
    return upload_parts(work.ref, await agent.update(work))


async def send_some(agent: Agent, parts: list[pb.UploadPart]) -> None:
    """Send these parts, and end."""
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await agent.upload(parts)
    assert error.value.code() is grpc.StatusCode.ABORTED


@pytest.mark.parametrize("offset", CUTS)
def test_an_upload_that_is_cut_goes_on_where_it_was_even_after_a_restart(
    running: Running, offset: int
) -> None:
    spec = spec_of(rounds=1, evaluation={"every": 0})

    async def run() -> None:
        async with running() as federation:
            await federation.agents(2, layout=LARGE)
            name = await federation.submit(spec, LARGE)
            agent = await federation.agent("client-2", silent, LARGE)
            parts = await parts_of(agent)
            await acknowledged(federation, name, "train", {"client-0", "client-1"})
            await send_some(agent, cut_at(parts, offset))
        async with running() as federation:
            agent = await federation.agent("client-2", silent, LARGE)
            await until(lambda: agent.assignments)
            progress = await agent.stub.Standing(parts[0].header)
            assert (progress.bytes, progress.received) == (offset, False)
            agent.work = honest
            await agent.upload(rest_of(parts, offset))
            await federation.agents(2, layout=LARGE)
            assert (await federation.ended(name)).state == "finished"
            state, _ = reference(spec, LARGE, NAMES)
            assert same(federation.parameters(name, LARGE).shared, state.parameters.shared)

    asyncio.run(run())


def test_an_agent_sends_only_what_is_not_here(
    running: Running, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        async with running() as federation:
            agents = await federation.agents(3, silent, LARGE)
            name = await federation.submit(spec_of(rounds=1), LARGE)
            parts = await parts_of(agents[0])
            live = await acknowledged(federation, name, "train", set())
            await send_some(agents[0], cut_at(parts, CHUNK + 5))
            await asyncio.to_thread(write_payload, parts)
            address, identity = f"127.0.0.1:{federation.port}", federation.identity("client", "client-0")
            async with Session(address, identity) as session:
                for _ in range(2):  # the second time, only its receipt is missing
                    await session.upload(upload_head(parts[0]), tmp_path / "payload", 10.0, again=True)
            await until(lambda: live.round.folded == ["client-0"])

    def write_payload(parts: list[pb.UploadPart]) -> None:
        (tmp_path / "payload").write_bytes(b"".join(part.chunk.data for part in parts))

    with caplog.at_level("INFO"):
        asyncio.run(run())
    sent = [vars(record)["offset"] for record in caplog.records if record.msg == "update sent"]
    assert sent == [CHUNK + 5]


def test_who_comes_before_its_attempt_is_live_again_tries_again(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_with("mean")

    async def run() -> None:
        async with broken_off(running, spec) as (name, journal, restart):
            ready = threading.Event()
            resume_all = Journals.resume_all

            def slow(self: Journals, *what: Any) -> list[Journal]:
                assert ready.wait(10)
                return resume_all(self, *what)

            monkeypatch.setattr(Journals, "resume_all", slow)
            federation = await restart()
            agent = await federation.agent("client-2", silent)
            head = pb.UploadHeader(ref=to_wire(journal.opening.ref), payload=pb.Blob(sha256="0" * 64))
            for attempt, code in ((0, CODE.ABORTED), (7, CODE.FAILED_PRECONDITION)):
                head.ref.attempt = attempt
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await agent.stub.Standing(head)
                assert error.value.code() is code
            agent.work = honest
            ready.set()
            await federation.agents(2)
            await ends_with_the_same_bits(federation, name, spec)

    asyncio.run(run())


@pytest.mark.parametrize("harm", ["altered", "shorter", "gone"])
def test_where_the_first_part_is_not_what_was_sent_all_is_sent_again(running: Running, harm: str) -> None:
    async def run() -> None:
        async with running() as federation:
            agents = await federation.agents(3, silent)
            name = await federation.submit(spec_of(rounds=1))
            agent, parts = agents[0], await parts_of(agents[0])
            live = await acknowledged(federation, name, "train", set())
            await send_some(agent, cut_at(parts, 100))
            part = live.journal.update(agent.name).with_suffix(".part")
            content = part.read_bytes()
            part.unlink()
            if harm != "gone":
                part.write_bytes(content[:50] if harm == "shorter" else b"x" + content[1:])
            await send_some(agent, rest_of(parts, 100))
            for _ in range(3):  # as often as it takes; once where the part is gone by now
                offset = (await agent.stub.Standing(parts[0].header)).bytes
                try:
                    await agent.upload(rest_of(parts, offset))
                    break
                except grpc.aio.AioRpcError as again:
                    assert again.code() is grpc.StatusCode.ABORTED
            await until(lambda: live.round.folded == [agent.name])
            assert not federation.coordinator.admission.conduct  # it has done nothing wrong

    asyncio.run(run())


def test_a_download_goes_on_where_it_was(running: Running) -> None:
    async def run() -> None:
        async with running() as federation:
            agents = await federation.agents(3, silent, LARGE)
            await federation.submit(spec_of(), LARGE)
            await until(lambda: agents[0].assignments)
            blob = agents[0].assignments[0].parameters
            for offset in (0, 1, CHUNK, blob.size - 1, blob.size):
                wanted = pb.Wanted(blob=pb.Blob(sha256=blob.sha256, size=blob.size), offset=offset)
                rest = b"".join([chunk.data async for chunk in agents[0].stub.Download(wanted)])
                assert len(rest) == blob.size - offset
                if not offset:
                    whole = rest
                assert whole[offset:] == rest and sha256(whole).hexdigest() == blob.sha256
            wanted.offset = blob.size + 1
            with pytest.raises(grpc.aio.AioRpcError, match="beyond"):
                await agents[0].stub.Download(wanted).read()

    asyncio.run(run())


def test_who_reads_and_writes_slowly_holds_nobody_up(running: Running) -> None:
    """One client takes a chunk of the model and then no more, and sends a byte of its update now and then."""
    layout = sized(4 * CHUNK)

    async def run() -> None:
        async with running() as federation:
            slow = await federation.agent("slow", silent, layout)
            others = await federation.agents(3, layout=layout)
            name = await federation.submit(spec_of(rounds=1, size=4, evaluation={"every": 0}), layout)
            await until(lambda: slow.assignments)
            work = slow.assignments[0]
            blob = pb.Blob(sha256=work.parameters.sha256, size=work.parameters.size)
            download, upload = slow.stub.Download(pb.Wanted(blob=blob)), slow.stub.Upload()
            await download.read()
            parts = upload_parts(work.ref, await others[0].update(work))
            await upload.write(parts[0])
            for index in range(3):
                await upload.write(pb.UploadPart(chunk=pb.Chunk(index=index, data=b"x")))
            await acknowledged(federation, name, "train", {other.name for other in others})
            assert "slow" in federation.coordinator.live[work.ref].taken
            download.cancel()
            upload.cancel()

    asyncio.run(run())


def test_an_upload_of_an_attempt_that_is_over_ends_at_once(running: Running) -> None:
    async def run() -> None:
        async with running() as federation:
            agents = await federation.agents(3, silent, LARGE)
            name = await federation.submit(spec_of(rounds=1), LARGE)
            parts = await parts_of(agents[0])
            call = agents[0].stub.Upload()
            await call.write(parts[0])
            live = await acknowledged(federation, name, "train", set())
            await until(lambda: agents[0].name in live.taken)
            await (await federation.operator()).Stop(pb.RunName(run=name))
            with pytest.raises(grpc.aio.AioRpcError, match="has closed"):
                await call
            assert list(federation.coordinator.journals.folder.iterdir()) == []

    asyncio.run(run())
