"""What `auto` chooses, and when it tries worker processes."""

import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

import fedcore
from fedcore.client.trainer import TorchTrainer
from fedcore.errors import SpecError
from fedcore.simulations import engine
from fedcore.simulations.answers import ClientStates
from fedcore.simulations.engine import (
    Choice,
    Measured,
    choose,
    in_processes,
    promising,
    shortened,
)
from fedcore.simulations.population import Population
from fedcore.simulations.processes import Processes
from fedcore.task import Client, resolve

MODULE = """
import numpy as np
from torch import nn
import fedcore

class Ragged(fedcore.Task):
    def model(self):
        return nn.Linear(4, 2)

    def data(self, client):
        n = 40 + client.index
        return fedcore.Split((client.rng.normal(size=(n, 4)).astype("float32"), np.arange(n) % 2), None)
"""


@pytest.fixture
def ragged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[fedcore.Task]:
    """Yield a task that other processes can import."""
    name = f"tasks_of_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield resolve(f"{name}:Ragged")
    del sys.modules[name]


def spec(*overrides: str) -> fedcore.RunSpec:
    base = ("run.rounds=50", "cohort.size=8", "client.batch_size=8", "simulation.clients=8")
    return fedcore.RunSpec().with_(*base, "simulation.workers=2", *overrides)


def of(task: fedcore.Task, *overrides: str) -> tuple[Population, TorchTrainer, ClientStates]:
    return Population(task, spec(*overrides)), TorchTrainer(task, spec(*overrides)), ClientStates()


def tried(task: fedcore.Task, measured: Measured, *overrides: str) -> Choice | None:
    """Return what comes of trying workers, given what was measured of 16 of 43.5 examples."""
    parts = of(task, *overrides)
    return in_processes(*parts, shortened(*parts[:2], parts[0].names, 2), measured)


class Started(Exception):
    """In place of worker processes."""


@pytest.mark.usefixtures("spawning")
@pytest.mark.parametrize(
    ("measured", "options", "starts"),
    [
        (Measured(1.0), (), True),
        (Measured(0.02), (), True),  # 0.02 * 43.5 / 16 * 8 * 50 / 2 = 10.9 s to be saved
        (Measured(0.01), (), False),  # 5.4 s
        (Measured(0.02), ("run.rounds=30",), False),
        (Measured(0.01), ("client.epochs=3",), False),  # in what was measured, too
        (Measured(0.01, 0.0075, 8), ("run.rounds=1000",), True),
        (Measured(0.001, 0.0005, 8), ("run.rounds=2000",), True),  # chunks of 4: 43.5 / 2 / 2 s to be saved
        (Measured(0.001, 0.0005, 8), ("run.rounds=1000",), False),
        (Measured(0.001), ("run.rounds=100000",), False),  # handing out clients would cost more
        (Measured(1.0), ("simulation.workers=1",), False),
    ],
)
def test_workers_are_started_where_they_promise_to_save_more_than_that_takes(
    ragged: fedcore.Task,
    measured: Measured,
    options: tuple[str, ...],
    starts: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def start(*parts: Any) -> Processes:
        raise Started

    monkeypatch.setattr(engine, "ready", start)
    if starts:
        with pytest.raises(Started):
            tried(ragged, measured, *options)
    else:
        assert tried(ragged, measured, *options) is None


@pytest.mark.parametrize(
    ("asked", "cohort", "expected"),
    [(0, 8, [1, 4]), (3, 8, [3]), (1, 8, [1]), (0, 3, [1, 2]), (0, 100, [1, 8])],
)
def test_clients_are_tried_one_by_one_and_in_chunks(
    ragged: fedcore.Task, asked: int, cohort: int, expected: list[int]
) -> None:
    parts = of(ragged, f"simulation.chunk={asked}", f"cohort.size={cohort}", "simulation.clients=100")
    heads = shortened(*parts[:2], parts[0].names[:8], 2)
    assert promising(*parts[:2], heads, Measured(1.0, 0.9, 8)) == expected


def test_forks_cost_next_to_nothing(ragged: fedcore.Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """0.002 * 43.5 / 16 * 8 * 50 / 2 is 1.1 s to be saved; a new process would need 8."""
    starts: list[str] = []

    def start(*parts: Any) -> Processes:
        starts.append("once")
        raise Started

    monkeypatch.setattr(engine, "ready", start)
    monkeypatch.setattr(engine, "HEAVY", 0.0)
    for seconds, threads in ((0.002, 1), (0.0009, 1), (0.002, 2)):
        with suppress(Started):
            tried(ragged, Measured(seconds), f"client.threads={threads}")
    assert len(starts) == 1


def test_workers_that_are_measured_to_be_faster_are_chosen_and_written_down(
    ragged: fedcore.Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    gains = iter((1.7, 0.9, 1.3, 3.5, 3.0, 1.5))
    monkeypatch.setattr(engine, "gain_of", lambda *_: next(gains))
    choice = tried(ragged, Measured(1.0))
    assert choice and isinstance(choice.engine, Processes)
    assert choice.reason == "2 workers, 1.7x sequential"
    assert choice.chosen == {"engine": "processes", "chunk": 1, "workers": 2}
    choice.engine.close()
    assert tried(ragged, Measured(1.0)) is None, "slower than one after another"
    choice = tried(ragged, Measured(1.0, problem="no rule for it"))
    assert choice and isinstance(choice.engine, Processes)
    assert choice.reason == "not vectorised: no rule for it; 2 workers, 1.3x sequential"
    choice.engine.close()
    choice = tried(ragged, Measured(1.0, 0.5, 8))
    assert choice and isinstance(choice.engine, Processes)
    assert choice.reason == "2 workers, chunk 4, 3.5x sequential"
    assert choice.chosen == {"engine": "processes", "chunk": 4, "workers": 2}
    choice.engine.close()
    choice = tried(ragged, Measured(1.0, 0.9, 8))
    assert choice and isinstance(choice.engine, Processes) and choice.reason == "2 workers, 3.0x sequential"
    choice.engine.close()


@pytest.mark.parametrize(("chunk", "most"), [(1, 4), (4, 50)])
def test_the_gain_is_measured_on_the_workers_and_leaves_no_trace(
    ragged: fedcore.Task, chunk: int, most: float
) -> None:
    parts = of(ragged, "simulation.engine=processes", f"simulation.chunk={chunk}")
    choice = choose(*parts, parts[0].names)
    assert choice.reason == "2 workers, as asked" and isinstance(choice.engine, Processes)
    heads = shortened(*parts[:2], parts[0].names, 2)
    assert [len(head) for head in heads.values()] == [16] * 8
    assert 0 < engine.gain_of(choice.engine, parts[1], heads, Measured(0.001)) < most
    assert parts[0].poison is None
    choice.engine.close()


class Local(fedcore.Task):
    """Known to this file alone, which has no name of its own in a test."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))

    def data(self, client: Client) -> fedcore.Split[Any]:
        x = client.rng.normal(size=(12, 4)).astype(np.float32)
        return fedcore.Split((x, np.arange(12) % 2), None)


@pytest.mark.usefixtures("spawning")
def test_auto_says_in_one_line_why_a_task_has_no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "HEAVY", 0.0)
    monkeypatch.setattr(engine, "PAYS_SPAWNED", -1e9)
    parts = of(Local())
    choice = choose(*parts, parts[0].names)
    assert choice.engine.name in ("sequential", "vectorized")
    assert "; no other process can run Local: " in choice.reason and "\n" not in choice.reason
    assert (choice.chosen["engine"], choice.chosen["chunk"]) == (choice.engine.name, choice.engine.chunk)


def test_dp_sgd_is_measured_on_whole_clients(ragged: fedcore.Task) -> None:
    private = "privacy={level='example', noise_multiplier=1.0, sampling_rate=0.2}"
    population, trainer, _ = of(ragged, private, "evaluation.where='holdout'")
    assert [len(head) for head in shortened(population, trainer, population.names, 2).values()] == [
        *range(40, 48)
    ]


def test_a_task_with_a_trainer_of_its_own_is_not_vectorised() -> None:
    trainer: Any = object()
    choice = choose(Population(Local(), spec()), trainer, ClientStates(), [])
    assert (choice.engine.name, choice.reason) == ("sequential", "not vectorised: it brings its own trainer")
    with pytest.raises(SpecError, match='"vectorized" cannot train this task: it brings its own trainer'):
        choose(Population(Local(), spec("simulation.engine=vectorized")), trainer, ClientStates(), [])
