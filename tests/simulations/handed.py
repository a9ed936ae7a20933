"""A task in a module of its own, and what a run of it leaves, for engines that hand work to others."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import fedcore
from fedcore.simulations.run import Simulation

RAGGED = '''
import os, time
from torch import nn
import fedcore

class Ragged(fedcore.Task):
    """Clients of 3 to 30 examples."""

    def model(self):
        return nn.Sequential(nn.Linear(6, 40), nn.Dropout(0.2), nn.Tanh(), nn.Linear(40, 3))

    def data(self, client):
        n = 3 * (client.index % 10 + 1)
        def part():
            return client.rng.normal(size=(n, 6)).astype("float32"), client.rng.integers(0, 3, n)
        return fedcore.Split(part(), part())
'''


@contextmanager
def module(folder: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Yield the name of a module of tasks, `Ragged` and those of `source`, that can be imported."""
    name = f"tasks_of_{folder.name}".replace("-", "_")
    (folder / f"{name}.py").write_text(RAGGED + source)
    monkeypatch.syspath_prepend(folder)
    yield name
    sys.modules.pop(name, None)


def spec(*overrides: str) -> fedcore.RunSpec:
    base = ("run.rounds=2", "cohort.size=8", "client.batch_size=8", "client.epochs=2")
    return fedcore.RunSpec().with_(*base, "simulation.clients=10", "simulation.workers=2", *overrides)


def played(task: fedcore.Task, *overrides: str) -> tuple[list[Any], list[dict[str, Any]]]:
    """Return the model, what goes with it and what clients keep after two rounds, and the rows."""
    run = Simulation(task, spec(*overrides))
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in run.rounds(lambda _: None)]
    kept = [sorted(run.states[name].items()) for name in run.population.names]
    state = {**run.state.parameters.extra, **run.state.vectors}
    run.close()
    return [run.state.parameters.digest, sorted(state.items()), kept], rows
