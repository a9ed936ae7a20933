"""Letters reach whom they are for, in order and once; answers come back once; nothing of them stays."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fedcore.faults import FAULTS, Fault
from fedcore.server import relay as relays
from fedcore.server.admission import OFFENCES
from fedcore.server.queues import OUTSTANDING
from fedcore.wire import grpc
from fedcore.wire.codec import to_wire
from fedcore.wire.relay import Answer, HostHello, LetterRef, Over, Void
from fedcore.wire.sending import sending
from fedcore.wire.v1 import coordinator_pb2 as pb
from fedcore.wire.v1 import relay_pb2
from fedcore.wire.v1.relay_pb2_grpc import PostStub, RelayStub
from tests.server.conftest import Federation, Running, each, until
from tests.server.posting import APP, FILES, AppHost, Sender, blob

CODE = grpc.StatusCode
MODEL = bytes(range(256)) * 8192  # two chunks


async def refused(call: Any) -> tuple[grpc.StatusCode, str]:
    """Return the status with which a call, of one answer or a stream of them, is refused."""
    with pytest.raises(grpc.aio.AioRpcError) as error:
        if hasattr(call, "read"):
            async for _ in call:
                pass
        else:
            await call
    return error.value.code(), error.value.details() or ""


async def sender(federation: Federation) -> Sender:
    return await Sender(await federation.channel("operator", "alice")).open()


@asynccontextmanager
async def hosting(
    federation: Federation, name: str, hello: HostHello | None = None
) -> AsyncIterator[AppHost]:
    """Connect an agent that hosts the app until the end of the block."""
    async with AppHost(name, await federation.channel("client", name), hello) as host:
        yield host
    await until(lambda: federation.coordinator.relay.queues.hosts.get(name) is None)


def files(federation: Federation, post: Sender) -> list[Path]:
    folder = federation.coordinator.relay.folder / post.run
    return sorted(folder.iterdir()) if folder.exists() else []


def stays(federation: Federation, post: Sender, count: int) -> bool:
    return len(files(federation, post)) == count


def test_a_letter_reaches_its_agent_and_the_answer_comes_back(running: Running) -> None:
    async def run() -> None:
        async with running() as federation, hosting(federation, "a") as a, hosting(federation, "b") as b:
            post = await sender(federation)
            await until(lambda: len(federation.coordinator.relay.queues.hosts) == 2)
            assert await post.hosts() == ["a", "b"]
            await post.deposit(MODEL)
            await post.send(post.letter("1", "a", MODEL), post.letter("2", "b", MODEL), post.letter("3", "b"))
            assert len(files(federation, post)) == 1  # what letters share lies there once
            first, second, third = await a.letter(), await b.letter(), await b.letter()
            assert (first.ref, first.app, first.digest) == (LetterRef(post.run, "1"), APP, FILES)
            assert (first.head, first.content, third.content) == (b"head of 1", blob(MODEL), None)
            assert 50 < first.ttl <= 60
            assert await a.take(first.ref) == await b.take(second.ref) == MODEL
            assert await a.take(first.ref, offset=2**20 + 5) == MODEL[2**20 + 5 :]
            await b.reply(third.ref)
            await a.reply(first.ref, b"trained", MODEL[:-1])
            await b.reply(second.ref, b"trained", MODEL[1:])
            answers = {answer.ref.id: answer for answer in await post.answered(3)}
            assert answers["3"] == Answer(third.ref, b"done", None)
            assert answers["1"] == Answer(first.ref, b"trained", blob(MODEL[:-1]))
            assert await post.collect(first.ref) == MODEL[:-1]
            assert await post.collect(second.ref, offset=7) == MODEL[8:]
            assert {path.name for path in files(federation, post)} == {
                answer.content.sha256 for answer in answers.values() if answer.content
            }
            await post.settle(["1", "2", "3"])
            assert files(federation, post) == []
            code, details = await refused(post.collect(first.ref))
            assert (code, "is settled" in details) == (CODE.FAILED_PRECONDITION, True)

    asyncio.run(run())


def test_an_agent_has_a_few_letters_at_a_time_in_the_order_of_sending(running: Running) -> None:
    count = OUTSTANDING + 3

    async def run() -> None:
        async with running() as federation:
            post, other = await sender(federation), await sender(federation)
            for i in range(count):  # of both runs in turn
                await (post, other)[i % 2].post(str(i), "a")
            async with hosting(federation, "a") as host:
                letters = [await host.letter() for _ in range(OUTSTANDING)]
                (session,) = federation.coordinator.relay.queues.hosts.values()
                for _ in range(count - OUTSTANDING):
                    assert session.outbox.empty()
                    await host.reply(letters[-OUTSTANDING].ref)
                    letters.append(await host.letter())
            assert [letter.ref.id for letter in letters] == [str(i) for i in range(count)]
            async with hosting(federation, "a") as host:  # which has lost them
                again = [await host.letter() for _ in range(OUTSTANDING)]
            assert [letter.ref for letter in again] == [letter.ref for letter in letters[-OUTSTANDING:]]

    asyncio.run(run())


def test_of_two_streams_of_an_agent_the_newer_one_is_pushed_to(running: Running) -> None:
    async def run() -> None:
        async with running() as federation:
            post = await sender(federation)
            async with AppHost("a", await federation.channel("client", "a")) as old:
                await until(lambda: federation.coordinator.relay.queues.hosts)
                async with hosting(federation, "a") as new:
                    assert await old.heard() is None
                    await post.post("1", "a")
                    assert (await new.letter()).ref.id == "1"

    asyncio.run(run())


def test_a_letter_has_one_answer(running: Running) -> None:
    async def run() -> None:
        async with running() as federation, hosting(federation, "a") as host:
            post = await sender(federation)
            await post.post("1", "a")
            ref = (await host.letter()).ref
            for _ in range(3):  # as after a receipt that was lost
                await host.reply(ref, b"done", MODEL)
            for head, content in ((b"other", MODEL), (b"done", b"other"), (b"done", b"")):
                code, details = await refused(host.reply(ref, head, content))
                assert (code, details) == (CODE.FAILED_PRECONDITION, f"{ref} has another answer already")
            assert len(await post.answered(1)) == 1
            assert await post.collect(ref) == MODEL
            await post.settle(["1"])
            code, details = await refused(host.reply(ref, b"done", MODEL))
            assert (code, details) == (CODE.FAILED_PRECONDITION, f"nobody waits for an answer to {ref}")

    asyncio.run(run())


def test_of_answers_that_come_together_one_is_taken(running: Running) -> None:
    async def run() -> None:
        async with running() as federation, hosting(federation, "a") as host:
            post = await sender(federation)
            await post.post("1", "a")
            ref = (await host.letter()).ref
            sent = [bytes([i]) * 4000 for i in range(8)]
            tries = await asyncio.gather(
                *(host.reply(ref, b"done", content) for content in sent[:6]), return_exceptions=True
            )
            taken = [content for content, error in zip(sent, tries, strict=False) if error is None]
            for error in tries:
                assert error is None or (
                    isinstance(error, grpc.aio.AioRpcError)
                    and error.code() in (CODE.FAILED_PRECONDITION, CODE.ABORTED)
                )
            if not taken:  # each has ended the one before, as those that come after a lost connection do
                await host.reply(ref, b"done", sent[7])
            assert await post.collect(ref) == (taken or sent[7:])[0] and len(taken) <= 1
            await until(lambda: len(files(federation, post)) == 1)

    asyncio.run(run())


def test_a_letter_is_for_its_client_alone(running: Running) -> None:
    async def run() -> None:
        async with running() as federation, hosting(federation, "b") as thief:
            post = await sender(federation)
            await post.post("1", "a", MODEL)
            ref = LetterRef(post.run, "1")
            said = (CODE.PERMISSION_DENIED, f"{ref} is not for b")
            assert await refused(thief.take(ref)) == said
            assert await refused(thief.reply(ref)) == said
            assert federation.coordinator.admission.refused["b"] == 2
            assert federation.coordinator.relay.books[post.run].letters["1"].state == "waiting"

    asyncio.run(run())


def test_an_expired_letter_is_not_delivered_and_its_answer_is_refused(running: Running) -> None:
    async def run() -> None:
        async with running() as federation:
            post = await sender(federation)
            book = federation.coordinator.relay.books[post.run]
            await post.post("gone", "a", MODEL, ttl=1e-3)
            await until(lambda: not book.letters and not files(federation, post))
            async with hosting(federation, "a") as host:
                await post.post("late", "a", ttl=0.2)
                await post.post("kept", "a")
                late = await host.letter()
                assert (late.ref.id, (await host.letter()).ref.id) == ("late", "kept")
                assert late.ttl <= 0.2
                assert await host.heard() == Void(late.ref)
                code, details = await refused(host.reply(late.ref))
                assert (code, details) == (
                    CODE.FAILED_PRECONDITION,
                    f"nobody waits for an answer to {late.ref}",
                )
            await post.post("gone", "a")  # sent again, it stays what it is
            await until(lambda: list(book.letters) == ["kept"])

    asyncio.run(run())


def test_letters_that_expire_together_are_forgotten_together(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        async with running() as federation:
            post, settled = await sender(federation), list[int]()
            store = federation.coordinator.relay.store
            settle = store.settle

            def counting(run: str, ids: Any) -> None:
                settled.append(len(ids))
                settle(run, ids)

            monkeypatch.setattr(store, "settle", counting)
            await post.send(*(post.letter(str(i), f"client-{i}", ttl=0.05) for i in range(500)))
            await until(lambda: not federation.coordinator.relay.books[post.run].letters)
            assert sum(settled) == 500 and len(settled) < 10

    asyncio.run(run())


@pytest.mark.parametrize("seconds", [0.25, 0.4])  # before and after what has expired is forgotten
def test_an_answer_that_is_being_noted_when_its_letter_expires_counts(
    running: Running, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    async def run() -> None:
        async with running() as federation, hosting(federation, "a") as host:
            post = await sender(federation)
            store = federation.coordinator.relay.store
            note = store.answer

            def slowly(answer: Answer) -> Any:
                time.sleep(seconds)
                return note(answer)

            monkeypatch.setattr(store, "answer", slowly)
            await post.post("1", "a", ttl=0.2)
            ref = (await host.letter()).ref
            await host.reply(ref, b"done", MODEL)
            await until(lambda: not federation.coordinator.errands)
            assert len(await post.answered(1)) == 1
            assert await post.collect(ref) == MODEL

    asyncio.run(run())


def test_a_letter_is_sent_once_however_often_it_is_handed_in(running: Running) -> None:
    async def run() -> None:
        async with running() as federation, hosting(federation, "a") as host:
            post = await sender(federation)
            await post.deposit(MODEL)
            letters = [post.letter("1", "a", MODEL), post.letter("2", "a")]
            await asyncio.gather(post.send(letters[0]), post.send(*letters), post.send(*letters))
            refs = {(await host.letter()).ref.id, (await host.letter()).ref.id}
            assert refs == {"1", "2"}
            await host.reply(LetterRef(post.run, "1"))
            await post.settle(["1", "2", "unknown"])
            assert await host.heard() == Void(LetterRef(post.run, "2"))
            await post.deposit(MODEL)
            await post.send(*letters)
            await post.post("3", "a")
            assert (await host.letter()).ref.id == "3"
            assert files(federation, post) == []

    asyncio.run(run())


def test_what_is_deposited_is_whole_and_needed(running: Running) -> None:
    async def run() -> None:
        async with running() as federation:
            post = await sender(federation)
            missing = blob(MODEL)
            assert missing and await post.send(post.letter("1", "a", MODEL)) == [missing.sha256]
            for content, said in (
                (MODEL[:-1], CODE.ABORTED),
                (MODEL[1:] + b"?", CODE.INVALID_ARGUMENT),
                (MODEL + b"?", CODE.INVALID_ARGUMENT),
            ):
                assert (await refused(post.deposit(MODEL, content)))[0] is said
            assert files(federation, post) == []
            await post.deposit(MODEL)
            await post.deposit(MODEL, b"")  # it is known
            await post.send(post.letter("1", "a", MODEL))
            assert len(files(federation, post)) == 1

    asyncio.run(run())


def test_what_does_not_fit_on_the_disk_is_answered_again(running: Running) -> None:
    async def run() -> None:
        async with running() as federation, hosting(federation, "a") as host:
            post = await sender(federation)
            await post.post("1", "a")
            ref = (await host.letter()).ref
            for point, kept in (("blob.write", 0), ("blob.rename.after", 0), ("store.commit.before", 1)):
                FAULTS[point] = Fault("ENOSPC")
                try:
                    assert await refused(host.reply(ref, content=MODEL)) == (
                        CODE.RESOURCE_EXHAUSTED,
                        "disk full",
                    )
                finally:
                    del FAULTS[point]
                # Nobody knows what became of a commit, so what it names stays.
                await until(partial(stays, federation, post, kept))
            await host.reply(ref, content=MODEL)
            assert await post.collect(ref) == MODEL

    asyncio.run(run())


@pytest.mark.parametrize("how", ["stop", "close"])
def test_of_a_run_that_has_ended_nothing_stays_but_how(running: Running, how: str) -> None:
    async def run() -> None:
        async with running() as federation, hosting(federation, "a") as host:
            post, operator = await sender(federation), await federation.operator()
            name, answers = pb.RunName(run=post.run), post.answers()
            watch = aiter(operator.Watch(name))
            assert (await anext(watch)).state == "running"
            for id, client in (("1", "a"), ("2", "a"), ("3", "b")):
                await post.post(id, client, MODEL)
            refs = [(await host.letter()).ref for _ in range(2)]
            await host.reply(refs[0], content=MODEL[1:])
            if how == "stop":
                ended = await operator.Stop(pb.RunName(run="job"))
            else:
                ended = await post.close("failed", "ValueError: no")
            said = ("stopped", "by an operator") if how == "stop" else ("failed", "ValueError: no")
            assert (ended.state, ended.detail, ended.task, ended.name) == (*said, APP, "job")
            assert (await post.close("finished")).state == said[0]  # once and for all
            assert [message.id async for message in answers] in (["1"], [])
            assert [message async for message in post.answers()] == []
            assert await host.heard() == Over(post.run)
            relay = federation.coordinator.relay
            assert not files(federation, post) and not relay.queues.waiting and not relay.queues.timers
            assert await asyncio.to_thread(relay.store.letters) == []
            late: list[Any] = [host.reply(refs[1]), host.take(refs[1])]
            for call in late:
                assert (await refused(call))[0] is CODE.FAILED_PRECONDITION
            late = [post.post("4", "a"), post.deposit(MODEL), post.hosts(), post.settle(["1"])]
            for call in late:
                code, details = await refused(call)
                assert (code, details) == (
                    CODE.FAILED_PRECONDITION,
                    f"the run {post.run} has ended: {said[0]}",
                )
            assert [info.state async for info in watch][-1] == said[0]
            assert (await operator.Show(name)).detail == said[1]
            (listed,) = (await operator.List(pb.ListRequest())).runs
            assert (listed.run, listed.rounds) == (post.run, 0)
            code, details = await refused(operator.Fetch(name))
            assert (code, "a run of an app" in details) == (CODE.INVALID_ARGUMENT, True)

    asyncio.run(run())


def test_a_run_tells_who_takes_part(running: Running) -> None:
    async def run() -> None:
        async with running() as federation, hosting(federation, "a"):
            post, operator = await sender(federation), await federation.operator()
            watch = aiter(operator.Watch(pb.RunName(run=post.run)))
            away = "; its ServerApp is not connected (if it has died: fedcore run stop)"
            assert (await anext(watch)).detail == f"agents that host it: 1{away}"
            async with hosting(federation, "b", HostHello({APP: "0" * 64})):
                said = f"agents that host it: 1; with other files of that name: 1{away}"
                assert (await anext(watch)).detail == said
                assert await post.hosts() == ["a"]
            assert (await anext(watch)).detail == f"agents that host it: 1{away}"
            answers = post.answers()
            assert (await anext(watch)).detail == "agents that host it: 1"
            answers.cancel()
            assert (await anext(watch)).detail == f"agents that host it: 1{away}"

    asyncio.run(run())


def test_an_agent_hears_of_runs_that_are_over(running: Running) -> None:
    async def run() -> None:
        async with running() as federation:
            post, other = await sender(federation), await sender(federation)
            await other.close()
            async with hosting(federation, "a", HostHello({}, (post.run, other.run, "long-ago"))) as host:
                assert [await host.heard() for _ in range(2)] == [Over(other.run), Over("long-ago")]

    asyncio.run(run())


def test_a_client_in_quarantine_gets_nothing(running: Running) -> None:
    async def run() -> None:
        async with running() as federation, hosting(federation, "a") as host:
            post = await sender(federation)
            await post.post("1", "a", MODEL)
            ref = (await host.letter()).ref
            for _ in range(OFFENCES):
                federation.coordinator.refuse("a", "made up", offence=True)
            assert await host.heard() is None
            assert await post.hosts() == []
            attend = host.stub.Attend()
            async with sending(attend, each([to_wire(host.hello)])):
                for call in (attend, host.take(ref), host.reply(ref)):
                    code, details = await refused(call)
                    assert (code, "quarantined" in details) == (CODE.FAILED_PRECONDITION, True)
            await federation.coordinator.lift("a")
            async with hosting(federation, "a") as lifted:
                assert (await lifted.letter()).ref == ref

    asyncio.run(run())


def test_a_client_that_comes_into_quarantine_before_its_hello_gets_nothing(running: Running) -> None:
    async def run() -> None:
        async with running() as federation:
            post = await sender(federation)
            await post.post("1", "a")
            calls = federation.coordinator.admission.calls
            host = AppHost("a", await federation.channel("client", "a"))
            attend = host.stub.Attend()
            await attend.wait_for_connection()
            await until(lambda: calls["a"])
            for _ in range(OFFENCES):
                federation.coordinator.refuse("a", "made up", offence=True)
            await attend.write(to_wire(host.hello))
            code, details = await refused(attend)
            assert (code, "quarantined" in details) == (CODE.FAILED_PRECONDITION, True)

    asyncio.run(run())


def test_what_a_client_may_lay_up_is_bounded(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relays, "MAX_CONTENT", 5000)

    async def run() -> None:
        async with running() as federation:
            async with hosting(federation, "a") as host:
                post, other = await sender(federation), await sender(federation)
                for sent, id in ((post, "1"), (other, "2"), (post, "3")):
                    await sent.post(id, "a")
                refs = [(await host.letter()).ref for _ in range(3)]
                await host.reply(refs[0], content=b"1" * 3000)
                await host.reply(refs[1], content=b"2" * 2000)
                code, details = await refused(host.reply(refs[2], content=b"3"))
                said = "5000 bytes that a has answered are not collected yet; try again"
                assert (code, details) == (CODE.RESOURCE_EXHAUSTED, said)
                await post.settle(["1"])
                await host.reply(refs[2], content=b"3")
        async with running() as federation:
            assert federation.coordinator.relay.unsettled["a"] == 2001
            other = Sender(await federation.channel("operator", "alice"), other.run)
            await other.close()
            assert federation.coordinator.relay.unsettled["a"] == 1

    asyncio.run(run())


def test_letters_that_nobody_settles_are_bounded(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relays, "MAX_LETTERS", 2)

    async def run() -> None:
        async with running() as federation:
            post = await sender(federation)
            await post.send(post.letter("1", "a"), post.letter("2", "a"))
            code, details = await refused(post.send(post.letter("3", "a")))
            assert (code, "2 letters to settle, at most 2" in details) == (CODE.RESOURCE_EXHAUSTED, True)
            await post.settle(["1"])
            await post.send(post.letter("3", "a"))

    asyncio.run(run())


def test_a_role_may_call_its_own_side_only(running: Running) -> None:
    async def run() -> None:
        async with running() as federation:
            taking, name = relay_pb2.Taking(), pb.RunName(run="x")
            for role in ("operator", "coordinator", "authority"):
                agents = RelayStub(await federation.channel(role, "x"))
                for call in (agents.Attend(each([])), agents.Take(taking), agents.Reply(each([]))):
                    said = (CODE.PERMISSION_DENIED, f"fedcore://fed/{role}/x is no client")
                    assert await refused(call) == said
            for role in ("client", "coordinator", "authority"):
                post = PostStub(await federation.channel(role, "x"))
                calls = (
                    post.Open(relay_pb2.AppHeader()),
                    post.Hosts(name),
                    post.Deposit(each([])),
                    post.Send(relay_pb2.LetterList()),
                    post.Answers(name),
                    post.Collect(taking),
                    post.Settle(relay_pb2.LetterNames()),
                    post.Close(relay_pb2.AppEnd()),
                )
                for call in calls:
                    said = (CODE.PERMISSION_DENIED, f"fedcore://fed/{role}/x is no operator")
                    assert await refused(call) == said

    asyncio.run(run())


def test_a_thousand_letters_are_sent_at_once(running: Running) -> None:
    async def run() -> None:
        async with running() as federation:
            post = await sender(federation)
            await post.deposit(b"model")
            started = time.perf_counter()
            await post.send(*(post.letter(str(i), f"client-{i}", b"model") for i in range(1000)))
            assert time.perf_counter() - started < 2.0
            assert len(federation.coordinator.relay.queues.waiting) == 1000
            await post.settle([str(i) for i in range(1000)])
            assert not federation.coordinator.relay.queues.waiting and not files(federation, post)

    asyncio.run(run())
