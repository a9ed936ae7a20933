import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, Metadata, RecordDict
from flwr.app.message import make_message
from flwr.common.constant import ErrorCode

from fedcore.errors import RunFailed, TaskError
from fedcore.flower.app import App
from fedcore.flower.hosts import Hosts
from fedcore.flower.letters import Answer, letter_of, reply_of
from fedcore.flower.records import pack

APP = """
import os, random, signal, threading, time
import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()
{more}

def said(message, **values):
    return Message(RecordDict({{"config": ConfigRecord(values)}}), reply_to=message)

@app.query("echo")
def echo(message, context):
    return Message(message.content, reply_to=message)

@app.query("who")
def who(message, context):
    time.sleep(message.content["config"]["seconds"])
    return said(message, pid=os.getpid(), run=context.run_id, node=context.node_id, **context.node_config)

@app.query("count")
def count(message, context):
    n = context.state.setdefault("kept", ConfigRecord({{"n": 0}}))["n"]
    context.state["kept"]["n"] = n + 1
    return said(message, n=n)

@app.query("draw")
def draw(message, context):
    return said(message, a=random.random(), b=np.random.rand())

@app.query("die")
def die(message, context):
    os.kill(os.getpid(), signal.SIGKILL) if context.node_config["partition-id"] == 1 else time.sleep(0.01)
    return said(message)
"""
EMPTY = RecordDict({"config": ConfigRecord({"seconds": 0.0})})


def written(folder: Path, more: str = "") -> App:
    (folder / "hosted_app.py").write_text(dedent(APP).format(more=more))
    return App(folder, "a/b", "", "hosted_app:app", {"lr": 0.1})


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    hosts = Hosts(written(tmp_path_factory.mktemp("app")), 6, seed=1, workers=2)
    yield hosts
    hosts.close("finished", "")


class Sender:
    """Sends messages to nodes by partition, and gets their replies in the same order."""

    def __init__(self) -> None:
        self.count = 0

    def ask(self, hosts: Hosts, kind: str, *partitions: int, content: RecordDict = EMPTY) -> list[Message]:
        packed = pack(content)
        messages = []
        for partition in partitions:
            self.count += 1
            node = hosts.nodes()[partition]
            of = Metadata(5, f"m-{self.count}", 1, node, "", "", time.time(), 60.0, f"query.{kind}")
            messages.append(make_message(of, content))
        hosts.send([letter_of(message, packed) for message in messages])
        answers: dict[str, Answer] = {}
        end = time.monotonic() + 30
        while len(answers) < len(messages):
            assert time.monotonic() < end
            answers |= {answer.id: answer for answer in hosts.receive(1.0)}
        return [reply_of(answers[of.metadata.message_id], of.metadata) for of in messages]


SENDER = Sender()
ask = SENDER.ask


def said(replies: list[Message]) -> list[dict[str, object]]:
    return [dict(reply.content.config_records["config"]) for reply in replies]


def test_every_node_answers_as_itself_and_both_workers_work(hosts: Hosts) -> None:
    slow = RecordDict({"config": ConfigRecord({"seconds": 0.02})})
    found = said(ask(hosts, "who", *range(6), content=slow))
    assert [of["partition-id"] for of in found] == list(range(6))
    assert [of["node"] for of in found] == hosts.nodes()
    assert {of["run"] for of in found} == {5} and {of["num-partitions"] for of in found} == {6}
    assert len({of["pid"] for of in found}) == 2 and os.getpid() not in {of["pid"] for of in found}


def test_what_a_node_keeps_goes_with_it_whichever_worker_takes_it(hosts: Hosts) -> None:
    found = said(ask(hosts, "count", *[0, 1, 2, 0, 0, 1]))
    assert [of["n"] for of in found] == [0, 0, 0, 1, 2, 1]
    assert [of["n"] for of in said(ask(hosts, "count", 3, 0))] == [0, 3]


def test_a_large_content_comes_back_whole_though_workers_send_and_receive_at_once(hosts: Hosts) -> None:
    content = RecordDict({"arrays": ArrayRecord({"w": Array(np.random.default_rng(0).random(200_000))})})
    for reply in ask(hosts, "echo", *range(6), content=content):
        assert reply.content == content


def test_many_small_messages_are_handed_out_ahead_and_all_come_back(hosts: Hosts) -> None:
    replies = ask(hosts, "who", *(list(range(6)) * 50))
    assert [of["partition-id"] for of in said(replies)] == list(range(6)) * 50


def test_a_worker_that_dies_costs_its_own_message_only(hosts: Hosts) -> None:
    before = {of["pid"] for of in said(ask(hosts, "who", *range(6)))}
    ask(hosts, "who", *(list(range(6)) * 20))  # so that letters are handed out ahead
    asked = [0, 2, 0, 1, 3, 0, 2, 4, 5, 3, 0, 2] * 3
    replies = ask(hosts, "die", *asked)
    assert [reply.has_error() for reply in replies] == [partition == 1 for partition in asked]
    assert replies[3].error.code == ErrorCode.CLIENT_APP_CRASHED
    assert replies[3].error.reason == "the worker process was killed by SIGKILL while it ran this message"
    slow = RecordDict({"config": ConfigRecord({"seconds": 0.02})})
    after = {of["pid"] for of in said(ask(hosts, "who", *range(6), content=slow))}
    assert len(after) == 2 and after != before


def test_what_is_forgotten_is_not_handed_out(hosts: Hosts) -> None:
    content = RecordDict({"config": ConfigRecord({"seconds": 0.1})})
    nodes, packed = hosts.nodes(), pack(content)
    letters = [
        letter_of(
            make_message(Metadata(5, f"f-{i}", 1, nodes[i], "", "", 1.0, 60.0, "query.who"), content), packed
        )
        for i in range(6)
    ]
    hosts.send(letters)
    hosts.forget([letter.id for letter in letters[2:]])
    came = []
    while answers := hosts.receive(0.3):
        came += answers
    assert {"f-0", "f-1"} >= {answer.id for answer in came} and len(came) <= 2
    assert hosts.receive(0.0) == []


@pytest.mark.slow
def test_what_an_app_draws_follows_from_the_seed_and_not_from_the_workers(
    tmp_path: Path, hosts: Hosts
) -> None:
    app = written(tmp_path)

    def drawn(seed: int, workers: int) -> list[dict[str, object]]:
        hosts = Hosts(app, 6, seed=seed, workers=workers)
        try:
            return said(ask(hosts, "draw", *range(6), *range(6)))
        finally:
            hosts.close("finished", "")

    one = drawn(3, 1)
    assert one == drawn(3, 2) and one != drawn(4, 2)
    assert len({of["a"] for of in one}) == len({of["b"] for of in one}) == 12


def test_an_app_that_cannot_be_imported_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    hosts = Hosts(written(tmp_path, "import nothing_of_this_name"), 2, seed=0, workers=1)
    with pytest.raises(
        TaskError, match=r"ClientApp cannot be loaded: importing 'hosted_app:app' raised .*nothing_of"
    ):
        ask(hosts, "who", 0)
    hosts.close("failed", "")
    assert "nothing_of_this_name" in capfd.readouterr().err


@pytest.mark.slow
def test_where_a_fork_is_unsafe_each_worker_imports_for_itself(tmp_path: Path) -> None:
    more = """
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
loaded = os.getpid()

@app.query("home")
def home(message, context):
    time.sleep(0.05)
    return said(message, here=loaded == os.getpid())
"""
    hosts = Hosts(written(tmp_path, more), 4, seed=0, workers=2)
    try:
        assert said(ask(hosts, "home", *range(4))) == [{"here": True}] * 4
        assert ask(hosts, "die", 1)[0].has_error()
        assert said(ask(hosts, "home", *range(4))) == [{"here": True}] * 4
    finally:
        hosts.close("finished", "")


def test_the_end_of_the_process_that_starts_workers_fails_the_run(tmp_path: Path) -> None:
    hosts = Hosts(written(tmp_path), 2, seed=0, workers=1)
    try:
        ask(hosts, "who", 0)
        os.kill(hosts._zygote.pid, signal.SIGKILL)
        with pytest.raises(RunFailed, match="has ended; its log may say why"):
            for _ in range(1000):  # its worker lives on, until this process notices
                ask(hosts, "who", 0, 1)
    finally:
        hosts.close("failed", "")


@pytest.mark.slow
def test_no_process_outlives_a_close_or_the_death_of_this_process(tmp_path: Path) -> None:
    written(tmp_path)
    script = f"""
import sys, time, os
from pathlib import Path
from fedcore.flower.app import App
from fedcore.flower.hosts import Hosts
hosts = Hosts(App(Path({str(tmp_path)!r}), "a/b", "", "hosted_app:app"), 4, seed=0, workers=2)
while len(hosts._members) < 2:
    time.sleep(0.01)
print(hosts._zygote.pid, flush=True)
if sys.argv[1] == "close":
    hosts.close("finished", "")
    os.write(1, b"closed")
time.sleep(60)
"""
    for how in ("close", "kill"):
        process = subprocess.Popen([sys.executable, "-c", script, how], stdout=subprocess.PIPE, text=True)
        assert process.stdout
        with process:
            group = int(process.stdout.readline())
            if how == "close":
                assert process.stdout.read(6) == "closed"
                assert gone(group, 1.0)
            assert how == "close" or not gone(group, 0.0)
            process.kill()
        assert gone(group, 5.0)


def gone(group: int, seconds: float) -> bool:
    """Return whether a process group has ended within some seconds, zombies aside."""
    end = time.monotonic() + seconds
    while True:
        found = subprocess.run(
            ["ps", "-o", "stat=", "-g", str(group)], capture_output=True, text=True, check=False
        )
        if not [line for line in found.stdout.split() if not line.startswith("Z")]:
            return True
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
