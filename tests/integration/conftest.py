"""A federation of real processes, and the ways to talk to it."""

import json
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import DEVNULL, Popen
from typing import Any

import pytest

from fedcore.data import save_split
from fedcore.loopback import Loopback, federation
from fedcore.simulations.borrowed import random_state, threads
from fedcore.simulations.population import Population
from fedcore.simulations.run import Simulation
from fedcore.spec import RunSpec
from fedcore.task import client_name, resolve

TASK = '''
from torch import nn

import fedcore
from fedcore.data import digits


class Small(fedcore.Task):
    """Everything that could break equality: batch statistics, dropout, momentum, shuffling, odd batches."""

    def model(self):
        return nn.Sequential(
            nn.Flatten(), nn.Linear(64, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.2), nn.Linear(24, 10)
        )

    def dataset(self):
        return digits().train.take(range(500))

    def root(self):
        return digits().train.take(range(500, 560))

    def holdout(self):
        return digits().test
'''
SPEC = """
[run]
name = "small"
task = "small:Small"
rounds = 3
seed = 7
[cohort]
size = 3
minimum = 2
deadline = 20.0
[client]
epochs = 2
batch_size = 32
optimizer = { name = "sgd", lr = 0.1, momentum = 0.9 }
[simulation]
engine = "sequential"
clients = 3
partition = { name = "dirichlet", alpha = 1.0 }
"""
Rows = list[dict[str, Any]]
NAMES = [client_name(i) for i in range(3)]
MAIN = "\nfrom fedcore.cli import main\nmain()\n"
DIE = "import os, signal\ndef die(*_): os.kill(os.getpid(), signal.SIGKILL)\n"


@pytest.fixture
def loopback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Loopback]:
    """Authority, coordinator, and three agents that are enrolled but not started."""
    with made(tmp_path, monkeypatch, SPEC, NAMES) as running:
        yield running


@contextmanager
def made(folder: Path, monkeypatch: pytest.MonkeyPatch, spec: str, names: list[str]) -> Iterator[Loopback]:
    """Make a federation whose agents hold the simulated clients' data, in a folder with run.toml."""
    (folder / "small.py").write_text(TASK, encoding="utf-8")
    (folder / "run.toml").write_text(spec, encoding="utf-8")
    monkeypatch.syspath_prepend(str(folder))
    sys.modules.pop("small", None)
    with federation(folder) as running:
        task = resolve("small:Small")
        population = Population(task, RunSpec.load(folder / "run.toml"))

        def settings(name: str) -> dict[str, Any]:
            save_split(folder / f"{name}.npz", population.split(name))
            return {"tasks": {"Small": "small:Small"}, "data": {"path": str(folder / f"{name}.npz")}}

        running.make_agents(names, settings)
        for name in names:
            (folder / name / "small.py").write_text(TASK, encoding="utf-8")
        yield running
    sys.modules.pop("small", None)


def start_dying(loopback: Loopback, name: str, code: str) -> None:
    """Start the coordinator or an agent as a process that kills itself where `code` says."""
    room = "server" if name == "coordinator" else "client"
    command = [sys.executable, "-c", DIE + code + MAIN, room, "start", "--dir", name]
    with loopback.log(name).open("ab") as log:
        loopback.processes[name] = Popen(command, stdin=DEVNULL, stdout=log, stderr=log, cwd=loopback.folder)


def died(loopback: Loopback, name: str) -> None:
    """Wait until a process has killed itself, and start it anew."""
    assert loopback.processes[name].wait(60) == -9
    loopback.start(name)


def simulated(loopback: Loopback, sets: tuple[str, ...]) -> tuple[Simulation, Rows]:
    """Run the simulation of a run, and return it as it ended."""
    spec = RunSpec.load(loopback.folder / "run.toml", sets)
    with threads(1), random_state("cpu"):
        simulation = Simulation(resolve(spec.run.task), spec)
        return simulation, list(simulation.rounds(lambda _: None))


def evaluator(loopback: Loopback) -> str:
    """Make and start an agent that holds the operator's data, and return its name."""
    name = "evaluator"
    loopback.make_agents([name], lambda _: {"tasks": {"Small": "small:Small"}, "evaluator": True})
    (loopback.folder / name / "small.py").write_text(TASK, encoding="utf-8")
    loopback.start(name)
    return name


def submit(loopback: Loopback, *overrides: str) -> str:
    """Hand in the run and return its id."""
    sets = [word for item in overrides for word in ("--set", item)]
    return str(json.loads(loopback.fedcore("run", "submit", "run.toml", "--json", *sets))["run"])


def watch(loopback: Loopback, run: str) -> list[dict[str, Any]]:
    """Wait for the end of a run and return its rows."""
    return [json.loads(line) for line in loopback.fedcore("run", "watch", run, "--json").splitlines()]


def shown(loopback: Loopback, run: str) -> dict[str, Any]:
    """Return a run as `fedcore run show --json` has it."""
    answer: dict[str, Any] = json.loads(loopback.fedcore("run", "show", run, "--json"))
    return answer


def wait_for_detail(loopback: Loopback, run: str, pattern: str) -> None:
    """Wait until a run says what it waits for."""
    for _ in range(150):
        if re.search(pattern, shown(loopback, run)["detail"]):
            return
        time.sleep(0.1)
    raise AssertionError(f"{run} never said {pattern}: {shown(loopback, run)}")
