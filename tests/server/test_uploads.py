"""Uploads that are wrong, late, twice or hostile are refused with a reason, and the run goes on."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedcore.messages import Assignment, Blob, Ref, Update
from fedcore.wire import grpc
from fedcore.wire.chunks import CHUNK
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
    sized,
    spec_of,
    until,
    upload_parts,
)

CODE = grpc.StatusCode


def spooled(federation: Federation, client: str) -> list[str]:
    """Return what lies on the disk of a client's uploads."""
    return [path.name for path in federation.coordinator.journals.folder.glob(f"*/{client}.*")]


def forgiven(federation: Federation, client: str) -> int:
    """Forget a client's offences, and return how many there were."""
    known = federation.coordinator.admission.conduct.get(client)
    federation.coordinator.admission.lift(client)
    return known.offences if known else 0


async def refused(agent: Agent, parts: list[pb.UploadPart]) -> tuple[grpc.StatusCode, str]:
    """Return the status with which an upload was refused."""
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await agent.upload(parts)
    return error.value.code(), error.value.details() or ""


def head_with(**fields: Any) -> Callable[[list[pb.UploadPart]], list[pb.UploadPart]]:
    """Return what sets fields of the header's Ref."""

    def change(parts: list[pb.UploadPart]) -> list[pb.UploadPart]:
        for name, value in fields.items():
            setattr(parts[0].header.ref, name, value)
        return parts

    return change


def vectors_as(*heads: pb.VectorHead) -> Callable[[list[pb.UploadPart]], list[pb.UploadPart]]:
    def change(parts: list[pb.UploadPart]) -> list[pb.UploadPart]:
        del parts[0].header.vectors[:]
        parts[0].header.vectors.extend(heads)
        return parts

    return change


def sized_as(size: int) -> Callable[[list[pb.UploadPart]], list[pb.UploadPart]]:
    def change(parts: list[pb.UploadPart]) -> list[pb.UploadPart]:
        parts[0].header.payload.size = size
        return parts

    return change


def chunk(index: int, data: bytes) -> pb.UploadPart:
    return pb.UploadPart(chunk=pb.Chunk(index=index, data=data))


DELTA, BUFFERS = pb.VectorHead(name="delta", length=44), pb.VectorHead(name="buffers", length=3)
BYTES = LAYOUT.nbytes
WRONG: dict[str, tuple[Callable[[list[pb.UploadPart]], list[pb.UploadPart]], str]] = {
    "no header": (lambda p: p[1:], "an upload begins with its header"),
    "two headers": (lambda p: [p[0], *p], "one header"),
    "another round": (head_with(round=2), "/2.0/train is not open"),
    "another attempt": (head_with(attempt=1), "/1.1/train is not open"),
    "another kind": (head_with(kind=pb.KIND_EVALUATE), "evaluate is not open"),
    "another run": (head_with(run="other"), "other/1.0/train is not open"),
    "a vector less": (vectors_as(DELTA), "has vectors {'delta': 44}, expected {'delta': 44, 'buffers': 3}"),
    "another name": (vectors_as(DELTA, pb.VectorHead(name="noise", length=3)), "'noise': 3"),
    "another length": (vectors_as(DELTA, pb.VectorHead(name="buffers", length=4)), "'buffers': 4"),
    "more announced": (sized_as(BYTES + 4), f"payload has {BYTES + 4} bytes, expected {BYTES}"),
    "less announced": (sized_as(BYTES - 4), f"payload has {BYTES - 4} bytes, expected {BYTES}"),
    "more sent": (lambda p: [*p, chunk(1, b"x")], f"chunk 1 has 1 bytes, {BYTES + 1} of {BYTES}"),
    "truncated": (lambda p: [p[0], chunk(0, p[1].chunk.data[:-1])], f"{BYTES - 1} of {BYTES} bytes came"),
    "no chunks": (lambda p: p[:1], f"0 of {BYTES} bytes came"),
    "altered": (lambda p: [p[0], chunk(0, bytes(BYTES))], "expected 188 bytes"),
    "gap": (lambda p: [p[0], chunk(1, p[1].chunk.data)], "chunk 1 came where chunk 0 was expected"),
    "repeated": (lambda p: [p[0], chunk(0, b"x"), chunk(0, b"x")], "chunk 0 came where chunk 1"),
    "empty chunk": (lambda p: [p[0], chunk(0, b""), p[1]], "chunk 0 has 0 bytes"),
    "large chunk": (lambda p: [p[0], chunk(0, bytes(CHUNK + 1))], f"chunk 0 has {CHUNK + 1} bytes"),
}
HARMLESS = {"is not open": CODE.FAILED_PRECONDITION, "bytes came": CODE.ABORTED}


def test_a_wrong_upload_is_refused_with_the_reason_and_the_run_goes_on(running: Running) -> None:
    async def run() -> None:
        async with running() as federation:
            agents = [*await federation.agents(2), await federation.agent("client-2", silent)]
            spec = spec_of(rounds=2)
            name = await federation.submit(spec)
            await until(lambda: agents[2].assignments)
            bad, work = agents[2], agents[2].assignments[0]
            update, live = await bad.update(work), federation.coordinator.live[work.ref]
            for change, said in WRONG.values():
                await until(lambda: bad.name not in live.taken)
                code, details = await refused(bad, change(upload_parts(work.ref, update)))
                assert said in details
                expected = next((c for text, c in HARMLESS.items() if text in said), CODE.INVALID_ARGUMENT)
                offences = forgiven(federation, bad.name)
                assert (code, offences) == (expected, int(expected is CODE.INVALID_ARGUMENT)), said
                assert federation.coordinator.admission.reasons[bad.name] == details
            assert federation.coordinator.admission.refused[bad.name] == len(WRONG)
            huge = [*upload_parts(work.ref, update)[:1], chunk(0, bytes(4 * 2**20 + 1))]
            assert (await refused(bad, huge))[0] is CODE.RESOURCE_EXHAUSTED
            bad.work = honest
            await honest(bad, work)
            assert (await federation.ended(name)).state == "finished"
            state, _ = reference(spec, LAYOUT, [agent.name for agent in agents])
            assert same(federation.parameters(name).shared, state.parameters.shared)
            assert spooled(federation, "*") == []

    asyncio.run(run())


def changed(update: Update, scalar: tuple[str, float] | None = None, value: float | None = None) -> Update:
    if scalar:
        return Update(update.vectors, {**update.scalars, scalar[0]: scalar[1]})
    delta = update.vectors["delta"].copy()
    delta[3] = value
    return Update({**update.vectors, "delta": delta}, update.scalars)


HOSTILE = {
    "nan": (lambda u: changed(u, value=np.nan), "delta has a coordinate that is not finite"),
    "infinity": (lambda u: changed(u, value=-np.inf), "delta has a coordinate that is not finite"),
    "beyond its bound": (lambda u: changed(u, value=65.0), "beyond 64"),
    "negative weight": (lambda u: changed(u, ("weight", -1.0)), "weight is -1, expected 0 to 1e+06"),
    "huge weight": (lambda u: changed(u, ("weight", 2e6)), "weight is 2e+06"),
    "weight of nan": (lambda u: changed(u, ("weight", float("nan"))), "weight is nan"),
    "unknown scalar": (lambda u: changed(u, ("bonus", 1.0)), "sent ['bonus',"),
    "missing scalar": (lambda u: Update(u.vectors, {"weight": 1.0}), "expected ['buffers', 'count'"),
}


@pytest.mark.parametrize(("poison", "said"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_update_is_refused_and_the_others_make_the_round(
    running: Running, poison: Callable[[Update], Update], said: str
) -> None:
    async def hostile(agent: Agent, work: Assignment) -> None:
        update = await agent.update(work)
        await agent.upload(upload_parts(work.ref, poison(update) if work.ref.kind == "train" else update))

    async def run() -> None:
        async with running() as federation:
            await federation.agents(2)
            bad = await federation.agent("client-2", hostile)
            name = await federation.submit(spec_of(rounds=1))
            info = await federation.ended(name)
            assert (info.state, '"folded": 2, "refused": 1' in info.metrics[0]) == ("finished", True)
            await until(lambda: len(bad.outcomes) == 2)
            verdict = bad.outcomes[0].verdict
            assert verdict.status == "refused" and said in verdict.reason
            assert bad.outcomes[1].verdict.status == "folded"  # its evaluation
            assert forgiven(federation, bad.name) == 1
            assert federation.coordinator.admission.reasons[bad.name] == verdict.reason
            assert spooled(federation, "*") == []

    asyncio.run(run())


def test_an_update_is_taken_once(running: Running) -> None:
    """From outside the cohort, again after its acceptance, and another in its place."""

    async def run() -> None:
        async with running() as federation:
            agents = await federation.agents(3, silent)
            name = await federation.submit(spec_of(rounds=1))
            await until(lambda: all(agent.assignments for agent in agents))
            work = agents[0].assignments[0]
            parts = [upload_parts(work.ref, await agent.update(work)) for agent in agents]
            stranger = await federation.agent("client-9")
            assert await refused(stranger, parts[0]) == (
                CODE.FAILED_PRECONDITION,
                f"client-9 is not in the cohort of {work.ref}",
            )
            live = federation.coordinator.live[work.ref]
            await agents[0].upload(parts[0])
            await agents[0].upload(parts[0])  # the receipt was lost
            await until(lambda: live.round.folded == ["client-0"])
            await agents[0].upload(parts[0])
            other = upload_parts(work.ref, changed(await agents[0].update(work), value=1.0))
            assert "has answered" in (await refused(agents[0], other))[1]
            for agent, rest in zip(agents[1:], parts[1:], strict=True):
                agent.work = honest
                await agent.upload(rest)
            agents[0].work = honest
            await federation.ended(name)
            assert "is not open" in (await refused(agents[0], parts[0]))[1]
            assert not federation.coordinator.admission.conduct  # nobody has done wrong

    asyncio.run(run())


def test_a_replay_while_the_update_is_folded_is_not_folded_twice(running: Running) -> None:
    async def run() -> None:
        async with running() as federation:
            agents = await federation.agents(3, silent)
            name = await federation.submit(spec_of(rounds=1))
            await until(lambda: all(agent.assignments for agent in agents))
            work = agents[0].assignments[0]
            parts = upload_parts(work.ref, await agents[0].update(work))
            busy = asyncio.Event()
            loop = asyncio.get_running_loop()
            hold = asyncio.run_coroutine_threadsafe  # the compute thread waits for the loop
            blocked = loop.run_in_executor(
                federation.coordinator.compute, lambda: hold(busy.wait(), loop).result(10)
            )
            await agents[0].upload(parts)
            await agents[0].upload(parts)
            busy.set()
            await blocked
            live = federation.coordinator.live[work.ref]
            await until(lambda: live.round.folded == ["client-0"])
            assert name == work.ref.run

    asyncio.run(run())


def test_what_comes_after_the_deadline_is_refused_and_leaves_nothing(running: Running) -> None:
    async def run() -> None:
        async with running() as federation:
            agents = [*await federation.agents(2), await federation.agent("client-2", silent)]
            name = await federation.submit(spec_of(rounds=1, deadline=2.0))
            late = agents[2]
            await until(lambda: late.assignments)
            work = late.assignments[0]
            parts = upload_parts(work.ref, await late.update(work))
            call = late.stub.Upload(timeout=10)
            await call.write(parts[0])  # and never the rest
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await call
            assert error.value.code() is CODE.FAILED_PRECONDITION
            assert "deadline" in str(error.value.details()) or "closed" in str(error.value.details())
            await until(lambda: late.outcomes)
            assert late.outcomes[0].verdict.status == "late"
            late.work = honest
            assert (await federation.ended(name)).state == "finished"
            assert "is not open" in (await refused(late, parts))[1]
            assert spooled(federation, "*") == []
            assert not federation.coordinator.admission.conduct

    asyncio.run(run())


def test_a_cut_upload_can_be_sent_again_and_is_no_offence(running: Running) -> None:
    async def run() -> None:
        async with running() as federation:
            layout = sized(3 * CHUNK // 4)
            agents = await federation.agents(2, layout=layout)
            cut = await federation.agent("client-2", silent, layout)
            name = await federation.submit(spec_of(rounds=1), layout)
            await until(lambda: cut.assignments)
            work = cut.assignments[0]
            parts = upload_parts(work.ref, await cut.update(work))
            assert len(parts) == 4
            live = federation.coordinator.live[work.ref]
            for sent in range(1, 4):
                call = cut.stub.Upload(timeout=10)
                for part in parts[:sent]:
                    await call.write(part)
                await until(lambda: "client-2" in live.taken)
                call.cancel()
                await until(lambda: "client-2" not in live.taken)
            cut.work = honest
            await cut.upload(parts)
            assert (await federation.ended(name)).state == "finished"
            state, _ = reference(spec_of(rounds=1), layout, [agent.name for agent in [*agents, cut]])
            assert same(federation.parameters(name, layout).shared, state.parameters.shared)
            assert spooled(federation, "*") == []
            assert not federation.coordinator.admission.conduct

    asyncio.run(run())


def test_an_announced_digest_is_part_of_the_header(running: Running) -> None:
    async def run() -> None:
        async with running() as federation:
            agents = await federation.agents(3, silent)
            await federation.submit(spec_of(rounds=1))
            await until(lambda: agents[0].assignments)
            work = replace(agents[0].assignments[0])
            update = await agents[0].update(work)
            parts = upload_parts(work.ref, update, payload=Blob("no digest", BYTES))
            code, details = await refused(agents[0], parts)
            assert (code, "64 hexadecimal digits" in details) == (CODE.INVALID_ARGUMENT, True)
            assert Ref(work.ref.run, 1, 0, "train") == work.ref

    asyncio.run(run())
