"""An agent that hosts an app, with a host that stands for Flower: letters come, each is answered once."""

import asyncio
import errno
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from fedcore.client import hosting, session
from fedcore.client import relay as relaying
from fedcore.client.config import Config
from fedcore.client.letters import Letters
from fedcore.errors import ConfigError, MissingExtra
from fedcore.wire.chunks import stream
from fedcore.wire.relay import LetterRef, Over, Void

Federation = Any  # of conftest, which importlib mode cannot import
Relay = Any
APP, DIGEST = "fedcore/echo", "d" * 64

HOST = '''
"""A host without Flower: it echoes, and keeps all that it was told."""

import os
import time
from pathlib import Path

from fedcore.client.letters import spool, state_in
from fedcore.client.serving import main


def describe(folder, tasks):
    return dict.fromkeys(tasks, "d" * 64)


def work(app, digest, client, node, letter, head, content, newest):
    said = Path(content).read_bytes() if content else b""
    with Path("told.txt").open("a") as log:
        log.write(f"{letter} ")
    with Path("hosts.txt").open("a") as log:
        log.write(f"{os.getpid()} ")
    if said == b"die":
        os._exit(3)
    if said == b"hold":
        held = [b"1" * 2**20 for _ in range(2000)]
    while said == b"wait" and not Path("go.txt").exists():
        time.sleep(0.01)
    state = state_in(Path(newest)) + said
    spool(Path(newest), letter, bytes.fromhex(head), f"{client} {node} ".encode() + state, state)
    return {}


main({"describe": describe, "work": work})
'''


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the agent's apps hosted by HOST."""
    (tmp_path / "echo_host.py").write_text(HOST)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setattr(hosting, "HOSTED", "echo_host")


def hosted(federation: Federation, **settings: Any) -> Any:
    flower = {"apps": {APP: "echo"}, "node": {"partition-id": 3}}
    return federation.agent(**{"tasks": {}, "flower": flower, **settings})


async def soon(awaitable: Any) -> Any:
    return await asyncio.wait_for(awaitable, 20.0)


async def heard(relay: Relay, id: str) -> tuple[int, str]:
    """Return code and reason of the error that a letter is answered with."""
    letter, head, content = await soon(relay.answers.get())
    assert (letter, content) == (id, b"")
    code, reason = json.loads(head)["error"]
    return code, reason


def said(states: bytes) -> bytes:
    return b"client-000000 {'partition-id': 3} " + states


@pytest.mark.usefixtures("stub")
def test_letters_are_answered_in_their_order_and_the_state_is_kept(
    federation: Federation, relay: Relay
) -> None:
    async def run() -> None:
        async with federation.coordinator(relay=relay) as fake:
            relay.cut = 1
            async with hosted(federation):
                hello = await soon(relay.hellos.get())
                assert (hello.apps, hello.runs) == ({APP: DIGEST}, ())
                assert (await soon(fake.hellos.get())).tasks == {}
                assert federation.last.worker.process is None  # for there is no task
                for id in ("a", "b", "c"):
                    relay.send(id, id.encode() * 2)
                relay.send("d", b"dd", run="another")
                for id, state in (("a", b"aa"), ("b", b"aabb"), ("c", b"aabbcc"), ("d", b"dd")):
                    assert await soon(relay.answers.get()) == (id, f"head of {id}".encode(), said(state))
                await federation.until(lambda: ("another/d", "answered") in federation.journal())
            assert relay.taken == [("a", 0), ("a", 1), ("b", 0), ("c", 0), ("d", 0)]
            relay.over.add("another")
            async with hosted(federation):  # started again, it knows the one run and forgets the other
                assert (await soon(relay.hellos.get())).runs == ("another", "run")
                relay.send("e")
                assert await soon(relay.answers.get()) == ("e", b"head of e", said(b"aabbcc"))
                assert federation.last.hosting.letters.runs() == ["run"]

    asyncio.run(run())
    assert federation.lines("told.txt") == ["a", "b", "c", "d", "e"]


@pytest.mark.usefixtures("stub")
def test_an_answer_whose_receipt_is_lost_is_the_same_again(federation: Federation, relay: Relay) -> None:
    async def run() -> None:
        relay.lose = 1
        async with federation.coordinator(relay=relay):
            async with hosted(federation):
                await soon(relay.hellos.get())
                relay.send("a", b"x")
                first, second = await soon(relay.answers.get()), await soon(relay.answers.get())
                assert first == second == ("a", b"head of a", said(b"x"))
                relay.outbox.put_nowait(None)  # the stream breaks, and is sought again
                await soon(relay.hellos.get())
                relay.send("b", b"y")
                assert (await soon(relay.answers.get()))[2] == said(b"xy")

    asyncio.run(run())
    assert federation.lines("told.txt") == ["a", "b"]


@pytest.mark.usefixtures("stub")
def test_an_answer_that_cannot_be_read_now_is_sent_before_the_next(
    federation: Federation, relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [errno.EIO, errno.EMFILE]

    def streamed(*arguments: Any, **options: Any) -> Any:
        if left:
            raise OSError(left.pop(), "not now")
        return stream(*arguments, **options)

    async def run() -> None:
        async with federation.coordinator(relay=relay), hosted(federation):
            await soon(relay.hellos.get())
            monkeypatch.setattr(relaying, "stream", streamed)
            relay.send("a", b"x")
            relay.send("b", b"y")
            states = [(await soon(relay.answers.get()))[2] for _ in range(2)]
            assert states == [said(b"x"), said(b"xy")] and not left

    asyncio.run(run())
    assert federation.lines("told.txt") == ["a", "b"]


@pytest.mark.usefixtures("stub")
def test_what_is_in_hand_goes_on_while_the_stream_breaks(federation: Federation, relay: Relay) -> None:
    async def run() -> None:
        async with federation.coordinator(relay=relay), hosted(federation):
            await soon(relay.hellos.get())
            relay.send("a", b"wait")
            relay.send("b", b"z")
            relay.send("void", b"v")
            await federation.until(lambda: federation.lines("told.txt") == ["a"])
            relay.outbox.put_nowait(None)
            await soon(relay.hellos.get())  # and a comes again, while it is in hand
            del relay.waiting["void"]
            relay.push(Void(LetterRef("run", "void")))
            relay.send("c", b"c", ttl=1e-9)  # too late at once
            relay.send("d", b"d")
            await federation.until(lambda: len(federation.last.hosting.waiting) == 3)
            (federation.folder / "agent" / "go.txt").touch()
            states = [(await soon(relay.answers.get()))[2] for _ in range(3)]
            assert states == [said(b"wait"), said(b"waitz"), said(b"waitzd")]

    asyncio.run(run())
    assert federation.lines("told.txt") == ["a", "b", "d"]
    assert ("run/c", "not answered") in federation.journal()


@pytest.mark.usefixtures("stub")
def test_an_app_that_may_not_run_or_dies_is_an_error_that_says_so(
    federation: Federation, relay: Relay
) -> None:
    async def run() -> None:
        async with federation.coordinator(relay=relay), hosted(federation):
            await soon(relay.hellos.get())
            relay.send("a", app="fedcore/ecco")
            code, reason = await heard(relay, "a")
            assert code == 5 and "flower.apps: app 'fedcore/ecco' is not allowed; did you mean" in reason
            relay.send("b", digest="e" * 64)
            code, reason = await heard(relay, "b")
            assert code == 5 and f"{APP}: the run's code is eeeeeeeeeeee..., installed is dddd" in reason
            relay.send("c", b"die")
            assert await heard(relay, "c") == (
                8,
                "the training process ended with exit code 3; the agent's log may say why",
            )
            relay.send("d", b"as it was sent")
            relay.contents["d"] = b"as it came now"
            assert await heard(relay, "d") == (0, "the agent failed: ProtocolError")
            relay.send("e", b"e")
            assert (await soon(relay.answers.get()))[2] == said(b"e")

    asyncio.run(run())
    assert federation.lines("told.txt") == ["c", "e"]


@pytest.mark.usefixtures("stub")
def test_outside_the_hours_an_app_is_not_asked(federation: Federation, relay: Relay) -> None:
    async def run() -> None:
        begin, end = (time.strftime("%H:00", time.localtime(time.time() + 3600 * later)) for later in (2, 3))
        hours = f"{begin}-{end}"
        async with federation.coordinator(relay=relay):
            async with hosted(federation, policy={"hours": hours}):
                await soon(relay.hellos.get())
                relay.send("a")
                code, reason = await heard(relay, "a")
                assert code == 5 and f"work begins within {hours}" in reason

    asyncio.run(run())
    assert federation.lines("told.txt") == []


@pytest.mark.slow
@pytest.mark.usefixtures("stub")
def test_a_run_that_is_over_ends_its_app_and_what_is_kept_of_it(federation: Federation, relay: Relay) -> None:
    async def run() -> None:
        async with federation.coordinator(relay=relay), hosted(federation):
            await soon(relay.hellos.get())
            kept = federation.last.hosting.letters
            relay.send("a", b"a", run="one")
            await soon(relay.answers.get())
            relay.send("b", b"wait", run="one")
            relay.send("c", b"c", run="one")
            await federation.until(lambda: federation.lines("told.txt") == ["a", "b"])
            relay.waiting.clear()
            relay.push(Over("one"))
            relay.send("d", b"d", run="two")
            assert (await soon(relay.answers.get()))[0::2] == ("d", said(b"d"))
            assert kept.runs() == ["two"]
            relay.push(Over("two"))
            relay.send("e", b"e", run="three")  # which finds nothing of the other run's process
            assert (await soon(relay.answers.get()))[0::2] == ("e", said(b"e"))
            assert kept.runs() == ["three"]

    asyncio.run(run())
    assert federation.lines("told.txt") == ["a", "b", "d", "e"]
    assert len(set(federation.lines("hosts.txt"))) == 3


@pytest.mark.slow
@pytest.mark.usefixtures("stub")
def test_a_letter_in_hand_is_abandoned_when_the_agent_leaves(federation: Federation, relay: Relay) -> None:
    async def run() -> None:
        async with federation.coordinator(relay=relay):
            async with hosted(federation) as running:
                await soon(relay.hellos.get())
                relay.send("a", b"wait")
                await federation.until(lambda: federation.lines("told.txt") == ["a"])
                host = federation.last.hosting.hosts[APP].process
                await soon(federation.last.leave())
                await soon(running)
                assert host.returncode is not None
            (federation.folder / "agent" / "go.txt").touch()
            async with hosted(federation):
                assert (await soon(relay.answers.get()))[2] == said(b"wait")

    asyncio.run(run())
    assert federation.lines("told.txt") == ["a", "a"]


@pytest.mark.slow
@pytest.mark.usefixtures("stub")
def test_a_renewed_certificate_has_the_stream_opened_again(
    federation: Federation, relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "LINGER", 0.1)

    async def run() -> None:
        async with federation.coordinator(relay=relay), hosted(federation):
            await soon(relay.hellos.get())
            agent = federation.last
            await agent.session.renew(federation.identity("client", "client-000000"), agent._hello())
            await soon(relay.hellos.get())
            relay.send("a", b"a")
            assert (await soon(relay.answers.get()))[2] == said(b"a")

    asyncio.run(run())


@pytest.mark.slow
@pytest.mark.usefixtures("stub")
def test_an_app_that_takes_too_much_memory_is_ended(federation: Federation, relay: Relay) -> None:
    async def run() -> None:
        async with federation.coordinator(relay=relay):
            async with hosted(federation, worker={"memory": "500MiB"}):
                await soon(relay.hellos.get())
                relay.send("a", b"hold")
                code, reason = await heard(relay, "a")
                assert code == 8 and "went over its memory limit of 500MiB" in reason

    asyncio.run(run())


@pytest.mark.parametrize(
    ("apps", "said"),
    [
        (
            {"fedcore/my echo": "echo"},
            r"agent.toml:\d+: flower.apps.fedcore/my echo: expected \"PUBL",
        ),
        (
            {f"fedcore/{i}": "echo" for i in range(65)},
            r"flower.apps: 65 apps, expected at most 64",
        ),
    ],
)
def test_apps_that_no_coordinator_takes_are_told_here(
    federation: Federation, apps: dict[str, str], said: str
) -> None:
    config = Config.load(federation.agent_folder(coordinator="h:1", flower={"apps": apps}))
    with pytest.raises(ConfigError, match=said):
        hosting.hosts_of(config)


def test_what_else_lies_beside_the_runs_is_no_run(tmp_path: Path) -> None:
    letters = Letters(tmp_path / "apps")
    assert letters.runs() == []
    for name in ("run-2", ".hidden", "lost+found", "run-1"):
        (letters.folder / name).mkdir(parents=True)
    (letters.folder / "file").touch()
    assert letters.runs() == ["run-1", "run-2"]


def test_an_app_needs_flower(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosting, "find_spec", lambda _: None)
    config = Config.load(federation.agent_folder(coordinator="h:1", flower={"apps": {APP: "echo"}}))
    with pytest.raises(MissingExtra, match=r"flwr is not installed; run: pip install 'fedcore\[flower\]'"):
        hosting.hosts_of(config)


@pytest.mark.slow
@pytest.mark.usefixtures("stub")
def test_a_coordinator_without_a_relay_is_asked_again(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        async with federation.coordinator(), hosted(federation):
            await federation.until(lambda: len(asked) >= 2)

    asked, attend = list[Any](), relaying.attend

    def counted(*arguments: Any) -> Any:
        asked.append(arguments)
        return attend(*arguments)

    monkeypatch.setattr(relaying, "attend", counted)
    asyncio.run(run())


@pytest.mark.slow
@pytest.mark.usefixtures("stub")
def test_an_app_that_cannot_be_imported_is_told_with_its_line(federation: Federation, tmp_path: Path) -> None:
    (tmp_path / "echo_host.py").write_text(
        HOST.replace("return dict", "raise ValueError('odd')\n    return dict")
    )

    async def run() -> None:
        async with hosted(federation) as running:
            await soon(running)

    with pytest.raises(
        ConfigError, match=r"agent.toml:\d+: flower.apps.fedcore/echo: importing .* ValueError: odd"
    ):
        asyncio.run(run())
