"""Small updates on an agent's stream: the same checks as of an upload, and few messages a round."""

import asyncio
import time
from collections.abc import Callable, Sequence
from itertools import chain

import pytest

from fedcore.messages import SMALL, Assignment, Blob, Outcome, Receipt, Ref, Secure, Update, Verdict
from fedcore.server.registry import Push
from fedcore.server.service import BATCH, LAG, leaving, pushed
from fedcore.wire import codec, grpc
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
from tests.server.devices import Masking, Sealing

CODE = grpc.StatusCode
NAMES = [f"client-{i}" for i in range(3)]
REF = Ref("run", 1, 0, "train")
RECEIPT, OUTCOME, STEP = Receipt(REF), Outcome(REF, Verdict("folded")), Secure(REF, b"step")
Parts = list[pb.UploadPart]


async def device(federation: Federation, name: str, encryption: str) -> Agent:
    """Return an agent that sends its updates on its stream, hidden as a run wants them."""
    identity = federation.identity("client", name)
    if encryption == "tls":
        agent = await federation.agent(name)
    elif encryption == "sealed":
        agent = await federation.agent(name, Sealing(identity).work)
    else:
        masking = Masking(identity)
        agent = await federation.agent(name, masking.work, heed=masking.heed)
    agent.streams = True
    return agent


@pytest.mark.parametrize("encryption", ["tls", "sealed", "secagg"])
def test_small_updates_on_the_stream_give_the_same_bits(running: Running, encryption: str) -> None:
    secagg = {"corrupt": 0.0, "lost": 0.2} if encryption == "secagg" else {}
    names = [f"client-{i}" for i in range(5 if secagg else 3)]
    spec = spec_of(size=len(names), encryption={"updates": encryption, **secagg})

    async def run() -> None:
        async with running() as federation:
            agents = [await device(federation, name, encryption) for name in names]
            name = await federation.submit(spec)
            info = await federation.ended(name)
            assert (info.state, info.detail) == ("finished", "")
            state, _ = reference(spec, LAYOUT, names)
            assert same(federation.parameters(name).shared, state.parameters.shared)
            await until(lambda: all(len(agent.outcomes) == 6 for agent in agents))
            for agent in agents:  # evaluations too, whose updates have no bytes
                assert agent.receipts == [Receipt(work.ref) for work in agent.assignments]

    asyncio.run(run())


def other_payload(parts: Parts) -> Parts:
    parts[1].chunk.data = bytes(len(parts[1].chunk.data))
    return parts


def shorter(parts: Parts) -> Parts:
    parts[1].chunk.data = parts[1].chunk.data[:-1]
    return parts


def of_round(round: int) -> Callable[[Parts], Parts]:
    def change(parts: Parts) -> Parts:
        parts[0].header.ref.round = round
        return parts

    return change


def without_a_vector(parts: Parts) -> Parts:
    del parts[0].header.vectors[1:]
    return parts


WRONG: dict[str, tuple[Callable[[Parts], Parts], grpc.StatusCode, str]] = {
    "another round": (of_round(2), CODE.FAILED_PRECONDITION, "/2.0/train is not open"),
    "a vector less": (without_a_vector, CODE.INVALID_ARGUMENT, "has vectors {'delta': 44}, expected"),
    "altered": (other_payload, CODE.INVALID_ARGUMENT, "188 bytes with SHA-256"),
    "truncated": (shorter, CODE.INVALID_ARGUMENT, "187 bytes with SHA-256"),
}


def test_a_wrong_update_is_refused_as_an_upload_is_and_the_stream_stands(running: Running) -> None:
    async def run() -> None:
        async with running() as federation:
            agents = [await federation.agent(name, silent) for name in NAMES[:2]]
            bad = await federation.agent(NAMES[2], silent)
            spec = spec_of(rounds=1)
            name = await federation.submit(spec)
            await until(lambda: all(agent.assignments for agent in [*agents, bad]))
            work, admission = bad.assignments[0], federation.coordinator.admission
            update = await bad.update(work)
            for change, code, said in WRONG.values():
                receipt = await bad.send(change(upload_parts(work.ref, update)))
                assert (receipt.code, said in receipt.reason) == (code.value[0], True), receipt
                known = admission.conduct.get(bad.name)
                assert (known.offences if known else 0) == (code is CODE.INVALID_ARGUMENT)
                assert admission.reasons[bad.name] == receipt.reason
                admission.lift(bad.name)
            folder = federation.coordinator.journals.folder
            assert not list(folder.glob(f"*/{bad.name}.*"))
            right = upload_parts(work.ref, update)
            for _ in range(2):  # the second time, only its receipt was missing
                assert await bad.send(right) == Receipt(work.ref)
            await bad.upload(right)  # by the other way, too
            another = upload_parts(work.ref, update, payload=Blob("0" * 64, LAYOUT.nbytes))
            assert "has answered" in (await bad.send(another)).reason
            for agent in [*agents, bad]:
                agent.work = honest
            for agent in agents:
                await honest(agent, work)
            assert (await federation.ended(name)).state == "finished"
            state, _ = reference(spec, LAYOUT, NAMES)
            assert same(federation.parameters(name).shared, state.parameters.shared)

    asyncio.run(run())


def test_whoever_is_in_quarantine_gets_no_receipt_but_the_reason(running: Running) -> None:
    async def run() -> None:
        async with running() as federation:
            bad = await federation.agent(NAMES[0], silent)
            nothing = upload_parts(REF, Update({}, {}))
            assert (await bad.send(nothing)).code == CODE.FAILED_PRECONDITION.value[0]
            for _ in range(3):
                federation.coordinator.refuse(bad.name, "it lied", offence=True)
            assert "quarantined: 3 offences" in (await bad.send(nothing)).reason

    asyncio.run(run())


def test_an_update_that_is_too_large_for_the_stream_ends_it(running: Running) -> None:
    async def run() -> None:
        async with running() as federation:
            bad = await federation.agent(NAMES[0], silent)
            update = pb.SmallUpdate(
                header=upload_parts(REF, Update({}, {}))[0].header, payload=bytes(SMALL + 1)
            )
            await bad.call.write(pb.FromAgent(update=update))
            assert await bad.call.code() is CODE.INVALID_ARGUMENT
            assert f"at most {SMALL} are taken" in (await bad.call.details() or "")
            assert federation.coordinator.admission.conduct[bad.name].offences == 1

    asyncio.run(run())


def test_the_receipt_the_verdict_and_the_next_work_come_as_one_message(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[list[type]] = []
    unbatched = codec.unbatched

    def noting(message: pb.ToAgent) -> Sequence[pb.ToAgent]:
        messages = unbatched(message)
        heard.append([type(codec.to_agent(each)) for each in messages])
        return messages

    async def run() -> None:
        async with running() as federation:
            agent = await device(federation, NAMES[0], "tls")
            await federation.ended(await federation.submit(spec_of(rounds=4, size=1)))
            await until(lambda: len(agent.outcomes) == 8)

    monkeypatch.setattr(codec, "unbatched", noting)
    asyncio.run(run())
    usual = [Receipt, Outcome, Assignment]
    assert heard[0] == [Assignment] and heard.count(usual) >= 3, heard
    assert list(chain(*heard)) == [Assignment, *7 * usual, Receipt, Outcome]


@pytest.mark.parametrize(
    ("messages", "left"),
    [
        ([STEP, STEP, None], [[STEP], [STEP]]),
        ([RECEIPT, OUTCOME, STEP, None], [[RECEIPT, OUTCOME, STEP], []]),
        ([RECEIPT, OUTCOME, None], [[RECEIPT, OUTCOME], []]),  # nothing is lost at the end
        ([RECEIPT] * (BATCH + 1), [[RECEIPT] * BATCH, [RECEIPT]]),
    ],
)
def test_what_needs_no_answer_waits_for_what_does(
    messages: list[Push | None], left: list[list[Push]]
) -> None:
    async def run() -> list[list[Push]]:
        outbox: asyncio.Queue[Push | None] = asyncio.Queue()
        for message in messages:
            outbox.put_nowait(message)
        return [await leaving(outbox) for _ in left]

    assert asyncio.run(run()) == left


def test_it_does_not_wait_for_long() -> None:
    async def run() -> None:
        outbox: asyncio.Queue[Push | None] = asyncio.Queue()
        outbox.put_nowait(RECEIPT)
        started = time.monotonic()
        assert await leaving(outbox) == [RECEIPT]
        assert LAG / 2 < time.monotonic() - started < 5
        outbox.put_nowait(OUTCOME)
        asyncio.get_running_loop().call_later(LAG / 5, outbox.put_nowait, STEP)
        assert await leaving(outbox) == [OUTCOME, STEP]

    asyncio.run(run())


def test_one_message_is_no_batch() -> None:
    assert not pushed([OUTCOME]).HasField("batch")
    assert [codec.to_agent(m) for m in codec.unbatched(pushed([RECEIPT, STEP]))] == [RECEIPT, STEP]
