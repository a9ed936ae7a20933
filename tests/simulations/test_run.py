"""Simulations as the Python API gives them."""

import json
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import torch

import fedcore
from fedcore.errors import DataError, SpecError
from fedcore.model_files import load_model
from fedcore.simulations.resume import resume
from fedcore.simulations.run import Progress, simulate

RNG = np.random.default_rng(0)


class Line(fedcore.Task):
    """y = 3 x, by least squares."""

    metrics = MappingProxyType({"error": lambda output, target: (output - target).abs().squeeze(1)})

    def model(self) -> torch.nn.Module:
        return torch.nn.Linear(1, 1)

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.mse_loss(output, target)

    def dataset(self) -> fedcore.ArrayDataset:
        x = np.linspace(-1, 1, 200, dtype=np.float32)[:, None]
        return fedcore.ArrayDataset(x, 3 * x)


def spec(*overrides: str) -> fedcore.RunSpec:
    """Return 6 rounds of 10 clients, of whom 5 take part; `auto` might choose another engine each time."""
    simulation = {"clients": 10, "engine": "sequential"}
    tables = {"run": {"rounds": 6}, "simulation": simulation, "cohort": {"size": 5}}
    return fedcore.RunSpec.parse(tables, overrides)


def test_it_learns_and_writes_what_it_returns(tmp_path: Path) -> None:
    result = simulate(Line(), spec("client.epochs=5", "client.batch_size=4"), out=tmp_path)
    assert result.final["error"] < 0.05
    written = json.loads((tmp_path / "result.json").read_text())
    assert written == json.loads(json.dumps(result.summary()))
    assert written["model_sha256"] == load_model(tmp_path / "model.safetensors")[1].digest
    rows = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row) for row in rows] == result.metrics
    assert fedcore.RunSpec.load(tmp_path / "spec.toml") == result.spec
    assert result.spec.simulation.engine == "sequential"
    assert result.module().state_dict()["weight"].item() == pytest.approx(3, abs=0.1)


def test_the_spec_that_a_run_wrote_repeats_it_bit_for_bit(tmp_path: Path) -> None:
    first = simulate(Line(), spec(), out=tmp_path)
    again = simulate(Line(), tmp_path / "spec.toml")
    assert again.parameters.digest == first.parameters.digest
    assert simulate(Line(), spec("run.seed=1")).parameters.digest != first.parameters.digest


def interrupted_at(round: int, kind: str) -> Callable[[Progress], None]:
    """Return a progress that interrupts while a round's clients train, or when the round has ended."""

    def progress(at: Progress) -> None:
        if at.round == round and (at.row is None) == (kind == "train"):
            raise KeyboardInterrupt

    return progress


def test_an_interrupted_run_keeps_the_rounds_that_ended(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        simulate(Line(), spec(), out=tmp_path, progress=interrupted_at(4, "train"))
    three = simulate(Line(), spec("run.rounds=3"))
    written = json.loads((tmp_path / "result.json").read_text())
    assert (written["rounds"], written["model_sha256"]) == (3, three.parameters.digest)


def test_a_round_without_its_evaluation_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedcore.simulations.run import Simulation

    evaluate = Simulation.evaluate

    def interrupted(self: Simulation, number: int) -> dict[str, float]:
        if number == 3:
            raise KeyboardInterrupt
        return evaluate(self, number)

    monkeypatch.setattr(Simulation, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        simulate(Line(), spec(), out=tmp_path)
    monkeypatch.undo()
    written = json.loads((tmp_path / "result.json").read_text())
    assert written["model_sha256"] == simulate(Line(), spec("run.rounds=2")).parameters.digest


def test_interrupted_in_its_first_round_it_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        simulate(Line(), spec(), out=tmp_path / "out", progress=interrupted_at(1, "train"))
    assert not (tmp_path / "out").exists()


def test_a_run_that_does_not_improve_any_more_ends_and_stays_ended(tmp_path: Path) -> None:
    """The error falls, as it should, but whatever is no loss is expected to rise."""
    given = spec("evaluation.patience=2", "evaluation.monitor=error")
    result = simulate(Line(), given, out=tmp_path)
    said = "stopped early: error has not improved for 2 evaluations (best"
    assert len(result.metrics) == 3 and result.summary()["stopped_early"].startswith(said)
    assert result.parameters.digest == simulate(Line(), spec("run.rounds=3")).parameters.digest
    again = resume(tmp_path, Line(), rounds=9)
    assert (again.metrics, again.parameters.digest) == (result.metrics, result.parameters.digest)
    assert simulate(Line(), spec("evaluation.patience=2")).summary()["stopped_early"] == ""


def test_progress_tells_of_clients_and_every_round() -> None:
    """Quick clients are told of some at a time; how many is a matter of the clock."""
    seen: list[Progress] = []
    simulate(Line(), spec("run.rounds=2"), progress=seen.append)
    for number in (1, 2):
        *within, ended = [at for at in seen if at.round == number]
        done = [at.done for at in within]
        assert done == sorted(set(done)) and done[-1] == 5 and all(at.asked == 5 for at in within)
        assert not any(at.row for at in within)
        assert ended.row is not None and ended.done == 5


def test_evaluation_every_third_round_and_after_the_last() -> None:
    result = simulate(Line(), spec("run.rounds=4", "evaluation.every=3"))
    assert [row["round"] for row in result.metrics if "error" in row] == [3, 4]


def test_it_leaves_torch_as_it_was() -> None:
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    simulate(Line(), spec("run.rounds=1", f"client.threads={threads + 1}"))
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("override", "error", "text"),
    [
        ("simulation.partition.name=dirichle", SpecError, "did you mean 'dirichlet'?"),
        ("strategy.name=fedavgg", SpecError, "did you mean 'fedavg'?"),
        ("simulation.clients=201", DataError, "200 examples cannot give 201 clients one each"),
        ('evaluation={patience = 1, monitor = "eror"}', SpecError, "did you mean 'error'"),
        ("evaluation.where=holdout", DataError, "Line.holdout() returned nothing"),
    ],
)
def test_what_cannot_work_is_refused_before_training(
    override: str, error: type[Exception], text: str
) -> None:
    def progress(at: Progress) -> None:
        raise AssertionError("a client was trained")

    with pytest.raises(error) as caught:
        simulate(Line(), spec(override), progress=progress)
    assert text in str(caught.value)
