"""Who is blamed for what, how much one client may ask, and quarantine, on a live coordinator too."""

import asyncio
import json
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from fedcore.cli import app
from fedcore.errors import (
    AuthenticationError,
    Blameless,
    Overloaded,
    ProtocolError,
    UpdateRefused,
)
from fedcore.messages import Assignment, Blob, Decline, Hello, Ref, Secure, Update
from fedcore.server.admission import (
    BURST,
    CALLS,
    LINES_AT_ONCE,
    OFFENCES,
    RATE,
    SMALL,
    TRIES,
    Admission,
    Bucket,
    Flood,
    Places,
    Sparing,
    is_offence,
)
from fedcore.server.store import Conduct
from fedcore.wire import grpc
from fedcore.wire.chunks import CHUNK
from fedcore.wire.codec import to_wire
from fedcore.wire.sending import sending
from fedcore.wire.v1 import coordinator_pb2 as pb
from fedcore.wire.v1.coordinator_pb2_grpc import CoordinatorStub
from tests.server.conftest import (
    DIGEST,
    LAYOUT,
    TASK,
    Agent,
    Federation,
    Running,
    each,
    silent,
    spec_of,
    until,
    upload_parts,
)

CODE = grpc.StatusCode


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_only_what_no_agent_does_is_an_offence() -> None:
    blamed = [ProtocolError("x"), AuthenticationError("x"), Flood("x")]
    forgiven = [Blameless("x"), UpdateRefused("x"), Overloaded("x"), OSError("x")]
    assert [is_offence(error) for error in (*blamed, *forgiven)] == [True] * 3 + [False] * 4


@given(st.lists(st.tuples(st.floats(0.0, 5.0), st.integers(1, 30)), max_size=60))
def test_a_bucket_gives_no_more_than_its_burst_and_its_rate(asked: list[tuple[float, int]]) -> None:
    bucket, now, given_out = Bucket(rate=4.0, burst=20.0), 0.0, 0
    for pause, tokens in asked:
        now += pause
        given_out += tokens * bucket.take(tokens, now)
        assert given_out <= 20.0 + 4.0 * now + 1e-6
        assert 0.0 <= bucket.level <= 20.0


def test_a_rate_below_the_limit_is_never_refused() -> None:
    clock = Clock()
    admission = Admission({}, clock)
    for _ in range(20_000):
        admission.charge("a")
        clock.now += 1 / RATE


def test_each_flood_is_one_offence() -> None:
    admission, floods = Admission({}, Clock()), 0
    for _ in range(int(3 * (BURST + 1))):
        try:
            admission.charge("a")
        except Flood as error:
            assert "a sends more than 200 messages a second" in str(error)
            floods += 1
    assert floods == 3
    admission.charge("b")


def test_calls_in_progress_are_few_and_each_ends() -> None:
    admission = Admission({}, Clock())
    calls = [admission.call("a") for _ in range(CALLS + 1)]
    for call in calls[:-1]:
        call.__enter__()
    with pytest.raises(Overloaded, match="a has 8 calls in progress, the most"):
        calls[-1].__enter__()
    with admission.call("b"):
        calls[0].__exit__(None, None, None)
    with admission.call("a"):
        pass


def test_three_offences_bring_quarantine_until_it_is_lifted() -> None:
    admission = Admission({"old": Conduct(3, "NaN", 1.0, quarantined=True)}, Clock())
    assert admission.barred == {"old"}
    for count in range(1, OFFENCES + 1):
        admission.check("a")
        known = admission.offend("a", f"offence {count}")
        assert (known.offences, known.quarantined) == (count, count == OFFENCES)
    with pytest.raises(UpdateRefused, match="quarantined: 3 offences, the last: offence 3; an operator"):
        admission.check("a")
    admission.lift("a")
    admission.check("a")
    assert admission.offend("a", "again").offences == 1
    assert admission.barred == {"old"}


def test_a_transfer_may_be_tried_again_but_not_without_end() -> None:
    admission, update, size = Admission({}, Clock()), Ref("run", 1, 0, "train"), 4 * CHUNK
    for _ in range(TRIES * 5):
        admission.transfer("a", update, CHUNK, size)
    with pytest.raises(UpdateRefused, match="a has moved 42991616 bytes for a transfer of 4194304, at most"):
        admission.transfer("a", update, CHUNK, size)
    admission.transfer("b", update, CHUNK, size)
    admission.transfer("a", Blob("0" * 64, size), CHUNK, size)  # what goes down
    admission.transfer("a", Ref("run", 2, 0, "train"), CHUNK, size)
    for _ in range(TRIES * CHUNK // SMALL):  # many small messages are work, too
        admission.transfer("b", Ref("run", 1, 0, "evaluate"), 1, 0)
    with pytest.raises(UpdateRefused):
        admission.transfer("b", Ref("run", 1, 0, "evaluate"), 1, 0)


def test_a_slow_upload_keeps_no_other_one_waiting() -> None:
    async def run() -> None:
        places, order = Places(2), list[str]()

        async def upload(name: str, slow: bool) -> None:
            async with places.place() as give_up:
                if slow:
                    give_up()
                    give_up()
                order.append(name)
                await asyncio.sleep(0.01)
                order.append(f"{name} done")

        await asyncio.gather(*(upload(name, slow=name == "a") for name in "abcd"))
        assert order[:4] == ["a", "b", "c", "a done"] and places.free._value == 2
        with pytest.raises(ProtocolError):
            async with places.place():
                raise ProtocolError("x")
        assert places.free._value == 2

    asyncio.run(run())


def test_warnings_about_one_client_are_few_and_say_how_many_are_missing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock, log = Clock(), logging.getLogger("test_admission")
    log.addFilter(sparing := Sparing(clock))
    with caplog.at_level(logging.INFO, "test_admission"):
        for _ in range(100):
            log.warning("refused", extra={"client": "a"})
            log.info("update received", extra={"client": "a"})
        log.warning("refused", extra={"client": "b"})
        log.warning("client lost", extra={"client": "a"})
        log.warning("of nobody")
        clock.now = 5.0
        log.warning("refused", extra={"client": "a"})
    log.removeFilter(sparing)
    told = Counter((record.message, getattr(record, "client", "")) for record in caplog.records)
    assert told["refused", "a"] == LINES_AT_ONCE + 1 and told["update received", "a"] == 100
    assert told["refused", "b"] == told["client lost", "a"] == told["of nobody", ""] == 1
    assert vars(caplog.records[-1])["unsaid"] == 80


# --- on a live coordinator


async def not_finite(agent: Agent, work: Assignment) -> None:
    """Send what no agent sends."""
    update = await agent.update(work)
    delta = np.full_like(update.vectors["delta"], np.nan)
    await agent.upload(upload_parts(work.ref, Update({**update.vectors, "delta": delta}, update.scalars)))


def operated(federation: Federation, folder: Path) -> Callable[..., Any]:
    """Return what runs `fedcore clients` as an operator, and gives back the JSON that it prints."""
    federation.identity("operator", "alice").save(folder / "identity")
    (folder / "operator.toml").write_text(tomli_w.dumps({"coordinator": f"127.0.0.1:{federation.port}"}))

    async def call(*arguments: str, fails: bool = False) -> Any:
        command = ["clients", *arguments, "--dir", str(folder), "--json"]
        result = await asyncio.to_thread(CliRunner().invoke, app, command)
        assert result.exit_code == 2 * fails, result.output
        return result.output if fails else json.loads(result.output)

    return call


def test_an_offender_is_quarantined_for_good_until_an_operator_lifts_it(
    running: Running, tmp_path: Path
) -> None:
    spec = spec_of(rounds=OFFENCES + 2, cohort={"minimum": 2}, evaluation={"every": 0}, deadline=5.0)
    late = spec_of(rounds=1, run={"name": "late", "rounds": 1}, deadline=100.0)

    async def first() -> None:
        async with running() as federation:
            clients = operated(federation, tmp_path / "alice")
            await federation.agents(2)
            bad = await federation.agent("client-2", not_finite)
            name = await federation.submit(spec)
            info = await federation.ended(name)
            rows = [json.loads(row) for row in info.metrics]
            assert [row["refused"] for row in rows] == [1] * OFFENCES + [0] * 2
            assert {work.ref.round for work in bad.assignments if work.ref.kind == "train"} == {1, 2, 3}
            parts = upload_parts(bad.assignments[0].ref, Update({}, {}))
            with pytest.raises(grpc.aio.AioRpcError, match="quarantined: 3 offences, the last: delta has a"):
                await bad.upload(parts)
            told = {row["client"]: row for row in await clients("list")}
            assert told["client-2"]["quarantined"] and told["client-2"]["connected"]
            assert (told["client-2"]["offences"], told["client-2"]["refused"]) == (3, 4)
            assert "not finite" in told["client-2"]["offence"] and "quarantined" in told["client-2"]["reason"]
            assert (told["client-0"]["offences"], told["client-0"]["offended"]) == (0, None)
            table = await asyncio.to_thread(
                CliRunner().invoke, app, ["clients", "list", "--dir", str(tmp_path / "alice")]
            )
            assert "connected, quarantined" in " ".join(table.output.split())

    async def second() -> None:
        async with running() as federation:
            clients = operated(federation, tmp_path / "bob")
            bad = (await federation.agents(3))[2]
            name = await federation.submit(late)
            await until(lambda: "2 of 3" in federation.coordinator.drivers[name].run.detail)
            assert not bad.assignments
            assert "client-7" in await clients("lift", "client-7", fails=True)
            assert not (await clients("lift", "client-2"))["quarantined"]
            await federation.ended(name)
            assert bad.assignments
            trail = [(e.actor.rpartition("/")[2], e.action) for e in federation.coordinator.store.trail()]
            assert trail == [
                ("alice", "submit"),
                ("coordinator", "quarantine"),
                ("alice", "submit"),
                ("alice", "lift"),
            ]

    asyncio.run(first())
    asyncio.run(second())


def test_a_flood_ends_the_stream_and_is_an_offence(running: Running) -> None:
    nothing = Ref("other", 1, 0, "train")
    messages = [to_wire(Decline(nothing, "")), pb.FromAgent(secure=to_wire(Secure(nothing, b"")))]

    async def run() -> None:
        async with running() as federation:
            call = CoordinatorStub(await federation.channel("client", "client-0")).Connect()
            with pytest.raises(grpc.aio.AioRpcError) as error:
                async with sending(call, each([to_wire(Hello({TASK: DIGEST})), *messages * int(BURST)])):
                    assert [message async for message in call]
            assert error.value.code() is CODE.RESOURCE_EXHAUSTED
            admission = federation.coordinator.admission
            assert admission.conduct["client-0"].offences == 1
            assert admission.conduct["client-0"].reason.startswith("client-0 sends more than 200 messages")
            await federation.agent("client-0", silent)

    asyncio.run(run())


def test_of_two_agents_with_one_identity_the_first_stays(running: Running) -> None:
    async def run() -> None:
        async with running() as federation:
            channel = await federation.channel("client", "client-0")

            def agent(instance: int) -> Agent:
                return Agent("client-0", channel, LAYOUT, silent, Hello({TASK: DIGEST}, instance=instance))

            sessions = federation.coordinator.registry.sessions
            async with agent(1) as first:
                session = sessions["client-0"]
                with pytest.raises(
                    grpc.aio.AioRpcError, match="another agent is connected as client-0"
                ) as error:
                    await agent(2).__aenter__()
                assert error.value.code() is CODE.RESOURCE_EXHAUSTED
                assert sessions["client-0"] is session and not first.reader.done()
                async with agent(1):  # as after a lost connection
                    await until(first.reader.done)
                    assert sessions["client-0"] is not session
            await until(lambda: not sessions)
            async with agent(2):
                assert not federation.coordinator.admission.conduct

    asyncio.run(run())


def test_one_client_has_few_calls_at_a_time(running: Running) -> None:
    async def run() -> None:
        async with running() as federation:
            stub = CoordinatorStub(await federation.channel("client", "client-0"))
            waiting = [stub.Upload(timeout=30) for _ in range(CALLS)]
            await until(lambda: federation.coordinator.admission.calls["client-0"] == CALLS)
            with pytest.raises(grpc.aio.AioRpcError, match="client-0 has 8 calls in progress") as error:
                await stub.Standing(pb.UploadHeader())
            assert error.value.code() is CODE.RESOURCE_EXHAUSTED
            for call in waiting:
                call.cancel()
            await until(lambda: not federation.coordinator.admission.calls["client-0"])
            assert not federation.coordinator.admission.conduct

    asyncio.run(run())
