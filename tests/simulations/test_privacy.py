"""Private runs whole, in both engines: by hand, by the noise that they show, and by what they do not tell."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from fedcore.data import Split
from fedcore.errors import SpecError
from fedcore.simulations.borrowed import threads
from fedcore.simulations.run import Simulation, simulate
from fedcore.spec import RunSpec
from fedcore.strategies.privacy import noise
from fedcore.strategies.rounds import advance, train_plan
from fedcore.task import Client, Task

Floats = NDArray[np.float64]
CLIENTS = 12
LEVELS: dict[str, dict[str, Any]] = {
    "client": {"level": "client", "population": CLIENTS, "noise_multiplier": 0.5, "clip_norm": 0.2},
    "adaptive": {"level": "client", "population": CLIENTS, "noise_multiplier": 0.2, "adaptive": True},
    "tree": {"level": "tree", "separation": 2, "noise_multiplier": 0.5, "clip_norm": 0.2},
    "gaussian": {"level": "local", "noise_multiplier": 0.5, "clip_norm": 0.2},
    "laplace": {"level": "local", "noise_multiplier": 0.5, "clip_norm": 0.2, "noise": "laplace"},
}


class Lines(Task):
    """y = A x with another A on each of 12 clients, in a dtype; `close` is a metric in 0..1."""

    def __init__(self, dtype: torch.dtype = torch.float64, size: int = 5) -> None:
        self.dtype, self.size = dtype, size
        self.metrics = {"close": lambda output, y: ((output - y).abs() < 1).double().mean(1)}

    def model(self) -> nn.Module:
        model = nn.Linear(self.size, 3).to(self.dtype)
        nn.init.zeros_(model.weight)
        return model

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return mse_loss(output, target)

    def data(self, client: Client) -> Split[Any]:
        assert client.index is not None
        rng = np.random.default_rng(client.index)
        x = rng.normal(size=(4 + client.index, self.size))
        y = x @ rng.normal(size=(self.size, 3)) * (client.index + 1)
        x, y = (torch.from_numpy(a).to(self.dtype).numpy() for a in (x, y))
        return Split((x, y), (x, y))

    def holdout(self) -> Any:
        return self.data(Client("holdout", 0, np.random.default_rng(0), {})).train


def spec_for(level: str, **tables: Any) -> RunSpec:
    given: dict[str, Any] = {
        "run": {"seed": 3, "rounds": 3},
        "cohort": {"size": 4},
        "client": {"batch_size": 4},
        "evaluation": {"where": "holdout"},
        "simulation": {"engine": "sequential", "clients": CLIENTS, "chunk": 2},
    }
    merged = {key: {**given.get(key, {}), **tables.get(key, {})} for key in {**given, **tables}}
    return RunSpec.parse({**merged, "privacy": {**LEVELS[level], **tables.get("privacy", {})}})


def played(task: Task, spec: RunSpec, rounds: int = 3) -> Simulation:
    run = Simulation(task, spec)
    with threads(1):
        for number in range(1, rounds + 1):
            run.train(number, lambda _: None)
    return run


def model(run: Simulation) -> Floats:
    return run.state.parameters.shared.astype(np.float64)


def moved(run: Simulation) -> Floats:
    """Return how far a run has taken its model, which starts the same for the same seed."""
    return model(run) - run.trainer.parameters().shared


@pytest.mark.parametrize("strategy", ["fedavg", "scaffold", "feddyn", "fedprox"])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_both_engines_make_the_same_private_model(
    level: str, strategy: str, dtype: torch.dtype, tolerance: float
) -> None:
    size = {"size": 6} if level == "adaptive" else {}
    tables = {"strategy": {"name": strategy}, "cohort": size}
    runs = [
        played(Lines(dtype), spec_for(level, **tables, simulation={"engine": engine}))
        for engine in ("sequential", "vectorized")
    ]
    one, other = (np.concatenate([model(run), *run.state.parameters.extra.values()]) for run in runs)
    assert np.linalg.norm(one - other) <= tolerance * np.linalg.norm(one)
    assert noise.CLIP not in runs[0].state.vectors or level == "adaptive"


class Silence:
    """A generator of no noise at all."""

    def standard_normal(self, size: int) -> Floats:
        return np.zeros(size)


def test_a_round_without_its_noise_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """x = sum of clip(D_i) / 4 over whoever was drawn, D_i trained by a run of client i alone."""
    monkeypatch.setattr(noise, "generator", lambda *path: Silence())
    task, spec = Lines(), spec_for("client")
    run = Simulation(task, spec)
    drawn, expected = run.cohort(1, "train"), np.zeros(run.layout.shared_size)
    examples = {name: run.population.training(name) for name in drawn}
    start = run.trainer.parameters()
    for name in drawn:
        run.trainer.receive(start)
        update, _ = run.trainer.train(run.ref(1, "train"), name, examples[name], {})
        delta = update.vectors["delta"]
        assert np.linalg.norm(delta) > 0.2, "or nothing would be clipped"
        expected += delta * (0.2 / np.linalg.norm(delta)) / 4
    assert len(drawn) not in (0, 4), "or the divisor would not show"
    assert moved(played(task, spec, 1)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("level", ["client", "tree"])
def test_the_model_shows_as_much_noise_as_was_promised(level: str) -> None:
    """Two seeds of noise on the same sum differ by sqrt(2) z C / m; 5 standard errors are passed at 6e-7."""
    task, spec, deviation = Lines(size=2000), spec_for(level), 0.5 * 0.2 / 4

    run = Simulation(task, spec)
    plan = train_plan(run.strategy, spec, run.layout, run.ref(1, "train"), run.cohort(1, "train"), CLIENTS)
    with threads(1):
        round, _ = run.fill(plan, lambda _: None)
    one, other = (advance(run.strategy, round, run.state, seed).parameters.shared for seed in (1, 2))
    difference = one.astype(np.float64) - other
    assert difference.std() == pytest.approx(2**0.5 * deviation, rel=5 / (2 * difference.size) ** 0.5)


def test_a_run_with_empty_rounds_goes_on_and_moves_in_each() -> None:
    spec = spec_for("client", cohort={"size": 1}, run={"rounds": 8})
    run = Simulation(Lines(), spec)
    sizes = [len(run.cohort(number, "train")) for number in range(1, 9)]
    assert 0 in sizes, "another seed is needed"
    models = [model(run)]
    with threads(1):
        for number in range(1, 9):
            assert run.train(number, lambda _: None)["expected"] == 1
            models.append(model(run))
    assert all(np.all(a != b) for a, b in pairwise(models))


@pytest.mark.parametrize("where", ["holdout", "clients"])
def test_no_output_has_the_size_of_a_cohort(where: str, tmp_path: Path) -> None:
    tables = {"evaluation": {"where": where}, "privacy": {"metric_noise": 0.01}}
    spec = spec_for("client", **tables)
    result = simulate(Lines(), spec, out=tmp_path)
    for row in result.metrics:
        assert row.keys().isdisjoint({"folded", "refused", "train_loss"}) and row["expected"] == 4.0
        assert ("loss" in row) == (where == "holdout"), "a loss has no bound"
        assert row["virtual_seconds"] == spec.cohort.deadline
        assert 0 <= row.get("close", 0) <= 1, "missing where noise ate the count"
    sizes = {len(Simulation(Lines(), spec).cohort(number, "train")) for number in (1, 2, 3)}
    assert sizes != {4}, "or the test would show nothing"
    assert "folded" not in (tmp_path / "metrics.jsonl").read_text()
    assert "folded" not in (tmp_path / "result.json").read_text()


def test_metrics_of_clients_are_their_means_with_noise_that_the_spec_says() -> None:
    """At hardly any noise: the mean over the drawn clients of each one's own mean."""
    tables = {"evaluation": {"where": "clients"}, "privacy": {"metric_noise": 1e-9}}
    run = played(Lines(), spec_for("client", **tables), 1)
    told = run.evaluate(2)
    own = []
    for name in run.cohort(2, "evaluate"):
        run.trainer.receive(run.state.parameters)
        scalars = run.trainer.evaluate(run.population.examples(name)[1], {}).scalars
        own.append(scalars["close"] / scalars["count"])
    assert told == {"close": pytest.approx(np.mean(own), abs=1e-6)}


def test_minimum_separation_keeps_clients_apart_in_a_tree() -> None:
    run = Simulation(Lines(), spec_for("tree", privacy={"separation": 3}))
    last: dict[str, int] = {}
    with threads(1):
        for number in range(1, 8):
            for client in run.cohort(number, "train"):
                assert number - last.get(client, -9) >= 3
                last[client] = number
            run.train(number, lambda _: None)
    assert len(last) == CLIENTS


def test_a_forged_update_is_refused_and_the_model_is_that_of_a_round_without_it() -> None:
    """Everybody forges far beyond the clip norm, so what is left is noise, of the deviation z C / m."""
    attack = {"name": "gaussian", "fraction": 1.0, "sigma": 100.0}
    run = played(Lines(size=2000), spec_for("client", attack=attack), 1)
    change = moved(run)
    assert change.std() == pytest.approx(0.025, rel=5 / (2 * change.size) ** 0.5)


def test_a_target_epsilon_becomes_a_noise_multiplier() -> None:
    target = {"noise_multiplier": 0.0, "target_epsilon": 8.0, "delta": 1e-3}
    run = Simulation(Lines(), spec_for("client", privacy=target))
    privacy = run.spec.privacy
    assert privacy.level == "client" and privacy.noise_multiplier > 0 and run.strategy.privacy == privacy


def test_a_model_with_batch_norm_is_refused() -> None:
    class Normed(Lines):
        def model(self) -> nn.Module:
            return nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)).to(self.dtype)

    with pytest.raises(SpecError, match="replace BatchNorm by GroupNorm"):
        played(Normed(), spec_for("client"), 1)


def test_a_population_that_is_not_the_simulated_one_is_refused() -> None:
    with pytest.raises(SpecError, match=r"privacy.population = 99, but simulation.clients = 12; .* set both"):
        Simulation(Lines(), spec_for("client", privacy={"population": 99}))
