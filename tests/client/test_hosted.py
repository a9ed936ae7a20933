"""An agent that hosts a real app of Flower, killed where it hurts: each letter counts once."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Metadata, RecordDict
from flwr.app.message.message import make_message
from typer.testing import CliRunner

from fedcore.client.cli import app
from fedcore.client.config import Config
from fedcore.client.hosting import digest_of, failed
from fedcore.client.status import status_of
from fedcore.errors import ConfigError
from fedcore.flower.app import App
from fedcore.flower.letters import Answer, letter_of, node_id, reply_of
from fedcore.flower.records import pack
from fedcore.wire.relay import LetterRef

pytestmark = pytest.mark.slow  # agents that import Flower, two of them for each point

Federation = Any  # of conftest, which importlib mode cannot import
Relay = Any
STATEFUL = Path(__file__).parents[1] / "flower" / "apps" / "stateful"
NAME, CLIENT = "fedcore/stateful-example", "client-000000"
START = """
import sys
from fedcore.client.cli import app
app(["start", "--dir", *sys.argv[1:]], standalone_mode=False)
found = {"flwr", "torch"} & {*sys.modules}
assert not found, f"the agent's loop has imported {found}"
"""


@contextmanager
def started(federation: Federation, faults: str = "") -> Iterator["subprocess.Popen[bytes]"]:
    """Run an agent that hosts the app, in a process."""
    flower = {"apps": {NAME: str(STATEFUL)}, "node": {"partition-id": 4}}
    folder = federation.agent_folder(tasks={}, flower=flower)
    environment = {**os.environ, "FEDCORE_FAULTS": faults}
    process = subprocess.Popen([sys.executable, "-c", START, folder], env=environment)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def asking(round: int, log: Path, seconds: float = 0.0) -> tuple[Metadata, dict[str, Any]]:
    """Return what a train message of a round is, and the fields of its letter."""
    content = RecordDict({"arrays": ArrayRecord({"w": Array(np.zeros(3))})})
    content["config"] = ConfigRecord({"server-round": round})
    metadata = Metadata(7, f"letter-{round}", 1, node_id(CLIENT), "", str(round), time.time(), 60.0, "train")
    config: dict[str, str | float] = {"log": str(log), "seconds": seconds}
    letter = letter_of(make_message(metadata, content), pack(content), config)
    fields = {"id": letter.id, "content": letter.content, "head": letter.head}
    return metadata, {**fields, "app": NAME, "digest": App.read(STATEFUL).digest}


async def said(relay: Relay, metadata: Metadata) -> Any:
    """Wait for the reply to a message."""
    letter, head, content = await asyncio.wait_for(relay.answers.get(), 30)
    assert letter == metadata.message_id
    return reply_of(Answer(letter, head, content or None), metadata)


@pytest.mark.parametrize("fault", ["agent.letter.spooled", "agent.letter.sent"])
def test_killed_after_the_app_has_answered(federation: Federation, relay: Relay, fault: str) -> None:
    log = federation.folder / "log.txt"

    async def run() -> None:
        async with federation.coordinator(relay=relay):
            with started(federation, f"{fault}:2=kill") as process:
                for round in (1, 2):
                    metadata, fields = asking(round, log)
                    relay.send(**fields)
                    if round == 1 or fault == "agent.letter.sent":
                        reply = await said(relay, metadata)
                        assert reply.content["metrics"]["count"] == round
                assert await asyncio.to_thread(process.wait, 20) == -signal.SIGKILL
            with started(federation) as process:
                if fault == "agent.letter.spooled":
                    assert (await said(relay, metadata)).content["metrics"]["count"] == 2
                metadata, fields = asking(3, log)
                relay.send(**fields)
                reply = await said(relay, metadata)
                assert reply.content["metrics"]["count"] == 3
                assert reply.content["arrays"]["w"].numpy().tolist() == [15.0] * 3  # thrice its partition + 1
                process.terminate()
                assert await asyncio.to_thread(process.wait, 20) == 0  # neither torch nor Flower was there

    asyncio.run(run())
    assert log.read_text() == "1.4 begun\n2.4 begun\n3.4 begun\n"


def test_killed_while_the_app_is_at_it(federation: Federation, relay: Relay) -> None:
    log = federation.folder / "log.txt"

    async def run() -> None:
        async with federation.coordinator(relay=relay):
            with started(federation) as process:
                metadata, fields = asking(1, log)
                relay.send(**fields)
                await said(relay, metadata)
                relay.send(**asking(2, log, seconds=60.0)[1])
                await federation.until(lambda: "2.4" in log.read_text())
                process.kill()
            metadata, fields = asking(2, log)
            relay.send(**fields)  # in place of the other one
            with started(federation):
                assert (await said(relay, metadata)).content["metrics"]["count"] == 2

    asyncio.run(run())
    assert log.read_text() == "1.4 begun\n2.4 begun\n2.4 begun\n"


def test_what_the_agent_says_of_a_letter_is_an_error_of_flowers() -> None:
    metadata, _ = asking(1, Path())
    answer = failed(LetterRef("run", metadata.message_id), 8, "it was killed")
    assert answer.content is None
    reply = reply_of(Answer(answer.ref.id, answer.head, None), metadata)
    assert (reply.error.code, reply.error.reason) == (8, "it was killed")


def test_check_and_status_say_which_app_is_here(federation: Federation) -> None:
    flower = {"apps": {NAME: str(STATEFUL), "fedcore/another": str(STATEFUL)}}
    config = Config.load(federation.agent_folder(tasks={}, coordinator="h:1", flower=flower))
    assert digest_of(config, NAME) == App.read(STATEFUL).digest
    with pytest.raises(ConfigError, match=f"is the app '{NAME}'; expected \"{NAME}\" ="):
        digest_of(config, "fedcore/another")
    apps = status_of(config)["apps"]
    assert apps[NAME] == App.read(STATEFUL).digest and "is the app" in apps["fedcore/another"]


def test_check_imports_an_app_and_says_who_may_read_what_it_sends(federation: Federation) -> None:
    folder = federation.agent_folder(tasks={}, flower={"apps": {NAME: str(STATEFUL)}})
    digest = App.read(STATEFUL).digest
    assert json.loads(invoke("check", "--json", "--dir", folder)) == [{"app": NAME, "digest": digest}]
    printed = invoke("check", "--dir", folder)
    assert f"{NAME}  (app of Flower, code {digest[:12]})\nread by   the coordinator, and" in printed
    assert f"{NAME}  {digest}" in invoke("status", "--dir", folder)


def invoke(*arguments: object) -> str:
    """Return what a command prints on standard output."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False).stdout
