"""What was acknowledged is there again after any end of the coordinator, and each letter is answered once."""

import asyncio
import signal
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from fedcore.crypto.identity import Identity
from fedcore.crypto.names import Role
from fedcore.server.database import StoreUnavailable
from fedcore.wire import grpc, relay
from fedcore.wire.relay import HostHello, Letter, Over
from fedcore.wire.v1 import coordinator_pb2 as pb
from tests.server.conftest import Federation, Running, until
from tests.server.killed import Killed
from tests.server.posting import APP, FILES, AppHost, Sender

MODEL = bytes(range(256)) * 100
LATER = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.ABORTED, grpc.StatusCode.RESOURCE_EXHAUSTED)


@asynccontextmanager
async def hosting(federation: Federation, name: str, *runs: str) -> AsyncIterator[AppHost]:
    channel = await federation.channel("client", name)
    async with AppHost(name, channel, HostHello({APP: FILES}, runs)) as host:
        yield host


async def post_of(federation: Federation, run: str = "") -> Sender:
    post = Sender(await federation.channel("operator", "alice"), run)
    return post if run else await post.open()


def test_a_restart_forgets_nothing_that_was_acknowledged(running: Running, database_url: str) -> None:
    async def run() -> None:
        async with running(database_url=database_url) as federation:
            post, over = await post_of(federation), await post_of(federation)
            await post.deposit(MODEL)
            for id in ("answered", "settled", "second", "first"):
                await post.send(post.letter(id, "a", MODEL, ttl=60.0))
            await post.post("expired", "b", MODEL, ttl=0.4)
            await over.post("1", "a", MODEL)
            await post.deposit(b"for a letter that is never sent")
            async with hosting(federation, "a") as host:
                for _ in range(2):
                    ref = (await host.letter()).ref
                    await host.reply(ref, b"done", ref.id.encode())
            await post.settle(["settled"])
            await over.close("failed", "by the test")
            (federation.coordinator.relay.folder / over.run).mkdir()  # as if it had been killed there
        await asyncio.sleep(0.4)
        async with running(database_url=database_url) as federation:
            post = await post_of(federation, post.run)
            folder = federation.coordinator.relay.folder
            (answer,) = await post.answered(1)
            assert (answer.ref.id, answer.head) == ("answered", b"done")
            assert await post.collect(answer.ref) == b"answered"
            async with hosting(federation, "a", post.run, over.run) as host:
                assert await host.heard() == Over(over.run)
                letters = [await host.letter() for _ in range(2)]
                assert [(letter.ref.id, letter.head) for letter in letters] == [
                    ("second", b"head of second"),
                    ("first", b"head of first"),
                ]
                assert await host.take(letters[0].ref) == MODEL
                await host.reply(answer.ref, b"done", b"answered")  # as after a receipt that was lost
                await post.post("settled", "a", MODEL)
                await post.post("third", "a", MODEL)
                assert (await host.letter()).ref.id == "third"
            await until(lambda: "expired" not in federation.coordinator.relay.books[post.run].letters)
            assert [path.name for path in folder.iterdir()] == [post.run]
            await until(lambda: len(list((folder / post.run).iterdir())) == 2)
            shown = await (await federation.operator()).Show(pb.RunName(run=over.run))
            assert (shown.state, shown.detail) == ("failed", "by the test")
            actions = [entry.action for entry in await asyncio.to_thread(federation.coordinator.store.trail)]
            assert actions == ["open", "open", "close"]

    asyncio.run(run())


def test_a_commit_whose_word_was_lost_counts(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked again after StoreUnavailable, all goes on as if the first time had gone well."""

    async def run() -> None:
        async with running() as federation, hosting(federation, "a") as host:
            post = await post_of(federation)

            def losing(name: str) -> None:
                store = federation.coordinator.relay.store
                call = getattr(store, name)

                def once(*arguments: Any) -> None:
                    call(*arguments)
                    monkeypatch.setattr(store, name, call)
                    raise StoreUnavailable("database unreachable")

                monkeypatch.setattr(store, name, once)

            async def twice(name: str, action: Callable[[], Coroutine[Any, Any, Any]]) -> None:
                losing(name)
                with pytest.raises(grpc.aio.AioRpcError, match="database unreachable"):
                    await action()
                await action()

            await post.deposit(MODEL)
            await twice("send", lambda: post.send(post.letter("1", "a", MODEL)))
            ref = (await host.letter()).ref
            assert await host.take(ref) == MODEL
            await twice("answer", lambda: host.reply(ref, b"done", MODEL[1:]))
            (answer,) = await post.answered(1)
            assert await post.collect(answer.ref) == MODEL[1:]
            await twice("settle", lambda: post.settle(["1"]))
            await twice("end", lambda: post.close("finished"))
            assert not list(federation.coordinator.relay.folder.iterdir())

    asyncio.run(run())


@pytest.mark.parametrize("how", ["again", "another", "none"])
def test_an_answer_whose_commit_was_lost_from_sight_keeps_its_content(
    running: Running, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """The database may have it, so it counts, even if the coordinator is started anew before it is asked."""

    async def run() -> None:
        async with running() as federation, hosting(federation, "a") as host:
            post = await post_of(federation)
            await post.post("1", "a")
            ref, store = (await host.letter()).ref, federation.coordinator.relay.store
            note = store.answer

            def once(answer: Any) -> None:
                note(answer)
                monkeypatch.setattr(store, "answer", note)
                raise StoreUnavailable("database unreachable")

            monkeypatch.setattr(store, "answer", once)
            with pytest.raises(grpc.aio.AioRpcError, match="database unreachable"):
                await host.reply(ref, b"done", MODEL)
            if how == "again":
                await host.reply(ref, b"done", MODEL)
            elif how == "another":
                with pytest.raises(grpc.aio.AioRpcError, match="has another answer already"):
                    await host.reply(ref, b"done", MODEL[1:])
        async with running() as federation:
            post = await post_of(federation, post.run)
            await post.answered(1)
            assert await post.collect(ref) == MODEL

    asyncio.run(run())


def test_an_answer_that_is_noted_while_the_coordinator_stops_keeps_its_content(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        async with running() as federation, hosting(federation, "a") as host:
            post = await post_of(federation)
            await post.post("1", "a")
            ref, relay = (await host.letter()).ref, federation.coordinator.relay
            note, begun = relay.store.answer, threading.Event()

            def slowly(answer: Any) -> Any:
                begun.set()
                time.sleep(0.2)
                return note(answer)

            monkeypatch.setattr(relay.store, "answer", slowly)
            replying = asyncio.create_task(host.reply(ref, b"done", MODEL))
            await asyncio.to_thread(begun.wait)
            for task in asyncio.all_tasks():  # as the end of the process does
                if "Relay.answer" in repr(task.get_coro()):
                    task.cancel()
            replying.cancel()  # nobody tells it any more
            await asyncio.gather(replying, return_exceptions=True)
        async with running() as federation:
            post = await post_of(federation, post.run)
            await post.answered(1)
            assert await post.collect(ref) == MODEL

    asyncio.run(run())


class Life:
    """An agent and a server side that go on, whatever becomes of the coordinator, until all is answered."""

    def __init__(self, federation: Federation, ids: list[str]) -> None:
        self.federation, self.ids = federation, ids
        self.worked = Counter[str]()
        self.found = dict[str, bytes]()

    async def agent(self, run: str) -> None:
        """Answer letters with bytes that depend on the letter alone, as an agent that spools does."""
        async with hosting(self.federation, "a", run) as host:
            while not isinstance(letter := await host.heard(), Over):
                assert isinstance(letter, Letter) and await host.take(letter.ref) == MODEL
                self.worked[letter.ref.id] += 1
                await host.reply(letter.ref, b"done", letter.ref.id.encode() * 100)

    async def server(self, run: str) -> None:
        """Send the letters until they are taken, and collect their answers."""
        post = await post_of(self.federation, run)
        await post.deposit(MODEL)
        await post.send(*(post.letter(id, "a", MODEL) for id in self.ids))
        call = post.answers()
        while self.found.keys() != set(self.ids):
            answer = relay.answer_from_wire(await call.read(), run)
            self.found[answer.ref.id] = await post.collect(answer.ref)
        await post.settle(self.ids)
        await post.close()

    async def insist(self, part: Callable[[str], Coroutine[Any, Any, None]], run: str) -> None:
        """Do a part again until it comes to its end."""
        while True:
            try:
                return await part(run)
            except grpc.aio.AioRpcError as error:
                assert error.code() in LATER, error
                await asyncio.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    "point",
    [
        "letter.sent",
        "transfer.rename.after:2",  # the first is of what is deposited, the second of an answer
        "blob.rename.after:2",
        "answer.noted",
        "store.commit.before:9",
    ],
)
def test_killed_anywhere_it_loses_no_letter_and_no_answer(
    tmp_path: Path, identity: Callable[[Role, str], Identity], point: str
) -> None:
    killed, ids = Killed(tmp_path / "coordinator", identity), ["1", "2", "3"]

    async def run() -> None:
        federation = Federation(identity, None, killed.port)  # type: ignore[arg-type]
        async with federation.stack:
            async with killed.process(f"{point}=kill") as process:
                post = await post_of(federation)
                life = Life(federation, ids)
                parts = [asyncio.create_task(life.insist(p, post.run)) for p in (life.agent, life.server)]
                assert await asyncio.wait_for(process.wait(), 20) == -signal.SIGKILL
            async with killed.process():
                await asyncio.wait_for(asyncio.gather(*parts), 20)
                shown = await (await federation.operator()).Show(pb.RunName(run=post.run))
                assert shown.state == "finished"
        assert life.found == {id: id.encode() * 100 for id in ids}
        assert set(life.worked) == set(ids) and max(life.worked.values()) <= 2
        assert not list((killed.folder / "apps").iterdir())

    asyncio.run(run())
