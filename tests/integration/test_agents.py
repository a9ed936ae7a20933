"""Agents and a real coordinator that come and go amid the work of one another."""

import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedcore.loopback import Loopback, federation
from fedcore.task import client_name
from tests.integration.conftest import shown, submit, watch

pytestmark = pytest.mark.slow

TASK = '''
"""A sum, taken slowly."""

import time
from pathlib import Path

import numpy as np

import fedcore
from fedcore.data import ArrayDataset, Split
from fedcore.layout import Entry, Layout, Parameters
from fedcore.messages import Update


class Slow(fedcore.Task):
    def trainer(self, spec):
        return Trainer()

    def data(self, client):
        examples = ArrayDataset(np.zeros((3, 1)), np.arange(3))
        return Split(examples, examples)


class Trainer:
    layout = Layout((Entry("w", (4,), "float32", "shared"),))

    def parameters(self):
        return Parameters(np.zeros(4, np.float32), np.zeros(0, np.float32))

    def receive(self, parameters):
        self.received = parameters.shared

    def train(self, ref, client, examples, kept):
        with Path("trained.txt").open("a") as log:
            log.write(f"{ref.round}.{ref.attempt} ")
        time.sleep(2)
        delta = np.full(4, ref.round, np.float32)
        return Update({"delta": delta}, {"weight": 3.0, "loss": 3.0, "count": 3.0}), {}

    def evaluate(self, examples, kept):
        return Update({}, {"loss": 3.0, "accuracy": 3.0, "count": 3.0})
'''
SPEC = """
[run]
name = "slow"
task = "slow:Slow"
rounds = 3
[cohort]
size = 2
minimum = 1
deadline = 100.0
[encryption]
updates = "tls"
[simulation]
engine = "sequential"
clients = 2
"""
NAMES = [client_name(i) for i in range(2)]


@pytest.fixture
def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Loopback]:
    """A coordinator and two agents that train for two seconds, all of them started."""
    (tmp_path / "slow.py").write_text(TASK, encoding="utf-8")
    (tmp_path / "run.toml").write_text(SPEC, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    with federation(tmp_path) as running:
        running.make_agents(NAMES, lambda _: {"tasks": {"Slow": "slow:Slow"}})
        for name in NAMES:
            (tmp_path / name / "slow.py").write_text(TASK, encoding="utf-8")
            running.start(name)
        for name in NAMES:
            running.wait_for(name, "connected")
        yield running
    sys.modules.pop("slow", None)


def trained(loopback: Loopback, name: str, count: int) -> list[str]:
    """Return what an agent has trained, once it has begun so often."""
    path = loopback.folder / name / "trained.txt"
    end = time.monotonic() + 30
    while time.monotonic() < end:
        if path.exists() and len(words := path.read_text(encoding="utf-8").split()) >= count:
            return words
        time.sleep(0.05)
    raise AssertionError(f"{name} has not begun {count} times")


def test_a_coordinator_that_is_killed_amid_training_costs_no_training(slow: Loopback) -> None:
    """The agents train on meanwhile, and what they made is sent to the attempt that goes on."""
    run = submit(slow)
    for number in range(1, 4):
        for name in NAMES:
            trained(slow, name, number)
        slow.stop("coordinator", signal.SIGKILL)
        slow.start("coordinator")
        slow.wait_for("coordinator", "(?s)" + ".*".join(["listening"] * (number + 1)))
    watch(slow, run)
    assert shown(slow, run)["state"] == "finished"
    assert [trained(slow, name, 3) for name in NAMES] == 2 * [["1.0", "2.0", "3.0"]]


def test_nobody_waits_for_a_device_that_shuts_down(slow: Loopback) -> None:
    going, staying = NAMES
    run = submit(slow)
    trained(slow, going, 1)
    trained(slow, staying, 1)
    assert slow.stop(going, signal.SIGTERM) == 0
    assert trained(slow, staying, 2) == ["1.0", "2.0"]
    assert trained(slow, going, 1) == ["1.0"]
    row = watch(slow, run)[0]
    assert (row["round"], row["folded"]) == (1, 1) and row["seconds"] < 10
    assert "the device is shutting down" in slow.log("coordinator").read_text(encoding="utf-8")
