"""`fedcore flower run` and `fedcore run submit --flower`, as people type them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedcore.cli import app as fedcore

PROJECT = """
[project]
name = "tiny"
version = "1.0"
[tool.flwr.app]
publisher = "lab"
components = { serverapp = "tiny:server", clientapp = "tiny:client" }
config = { rounds = 2, seconds = 0.0, fail = "" }
"""
TINY = '''
"""Every node says its partition; the server adds them up."""
import random, subprocess, time
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

client, server = ClientApp(), ServerApp()


@client.query()
def say(message, context):
    time.sleep(context.run_config["seconds"])
    number = context.node_config["partition-id"] + 100 * context.node_config["num-partitions"]
    metrics = MetricRecord({"partition": number, "num-examples": number})
    return Message(RecordDict({"m": metrics}), reply_to=message)


@server.main()
def main(grid, context):
    for _ in range(context.run_config["rounds"]):
        asked = [Message(RecordDict({"c": ConfigRecord()}), node, "query") for node in grid.get_node_ids()]
        random.shuffle(asked)
        replies = grid.send_and_receive(asked)
        print("sums", *[r.content["m"]["partition"] if r.has_content() else "refused" for r in replies])
    subprocess.run(["echo", "a child"])
    if context.run_config["fail"]:
        raise RuntimeError(context.run_config["fail"])
'''


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    (tmp_path / "pyproject.toml").write_text(PROJECT)
    (tmp_path / "tiny.py").write_text(TINY)
    return tmp_path


def flower_run(folder: Path, *options: str) -> subprocess.Popen[str]:
    """Start `fedcore flower run` in the app's folder."""
    command = [sys.executable, "-m", "fedcore", "flower", "run", ".", "--workers=2", *options]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=folder)


def test_an_app_runs_and_what_it_prints_stays(tiny: Path) -> None:
    """The ServerApp's shuffle is seeded, its prints go where they should, and the guards see every reply."""
    options = ["--num-supernodes=3", "--run-config", "rounds=1", "--largest-weight=301"]
    plain, of_json = flower_run(tiny, *options), flower_run(tiny, *options, "--json")
    said, errors = plain.communicate(timeout=60)
    summary, progress = of_json.communicate(timeout=60)
    assert (plain.returncode, of_json.returncode) == (0, 0), errors + progress
    sums = next(line for line in said.splitlines() if line.startswith("sums"))
    assert sorted(sums.split()[1:]) == ["300", "301", "refused"]
    assert sums in progress and "a child" in progress  # the same order, of the same seed
    assert "'m/num-examples' is 302, expected at most 301" in errors
    assert "3 sent, 2 answered, 1 refused" in said
    assert "3 in 2 worker processes" in said
    found = json.loads(summary)
    assert (found["app"], found["nodes"], found["workers"]) == ("lab/tiny", 3, 2)
    assert found["tally"]["answered"] == 2 and found["messages_per_second"] > 0


@pytest.mark.slow
def test_a_server_app_that_raises_is_an_error_with_its_traceback(tiny: Path) -> None:
    process = flower_run(tiny, "--num-supernodes=2", "-c", "fail='no more'")
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "sums 200 201" in said.replace("201 200", "200 201")
    assert 'tiny.py", line' in errors and "RuntimeError: no more" in errors
    assert errors.splitlines()[-1] == "error: the ServerApp raised RuntimeError: no more"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing_within_two_seconds(tiny: Path, number: signal.Signals) -> None:
    process = flower_run(tiny, "--num-supernodes=4", "-c", "rounds=1000 seconds=0.2")
    assert process.stdout and process.stderr
    assert process.stdout.readline().startswith("sums")
    before = workers(tiny)
    assert len(before) >= 3
    began = time.monotonic()
    process.send_signal(number)
    assert process.wait(10) == 130
    assert time.monotonic() - began < 2
    process.stdout.close()
    process.stderr.close()
    while left := workers(tiny):
        assert time.monotonic() - began < 2, left


def workers(folder: Path) -> set[str]:
    """Return the processes that work in a folder, which only those of its run do."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if Path(os.readlink(process / "cwd")) == folder.resolve():
                found.add(process.name)
    return found


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["flower", "run", "nowhere"], "no such file; name the folder of a Flower app"),
        (["flower", "run", ".", "-c", "round=1"], "did you mean 'rounds'?"),
        (["flower", "run", ".", "--num-supernodes=0"], "--num-supernodes 0: expected at least 1"),
        (["flower", "run", ".", "--largest-weight=0"], "--largest-weight 0.0: expected more than 0"),
        (["run", "submit"], "expected a SPEC.toml, or --flower APP_DIR"),
        (["run", "submit", "run.toml", "-c", "rounds=1"], "expected a SPEC.toml, or --flower APP_DIR"),
        (["run", "submit", "run.toml", "--flower", "."], "--flower takes no SPEC.toml and no"),
        (
            ["run", "submit", "--flower", ".", "--set", "run.rounds=1"],
            "--flower takes no SPEC.toml and no --set",
        ),
        (["run", "submit", "--flower", "."], "make the folder with 'fedcore run enroll TOKEN"),
    ],
)
def test_what_does_not_fit_is_said(
    tiny: Path, options: Sequence[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny)
    done = CliRunner().invoke(fedcore, list(options))
    assert (done.exit_code, said in done.stderr) == (2, True), done.stderr
