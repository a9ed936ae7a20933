"""DP-SGD in the vectorised engine: the clip of Opacus, its noise, and the same Poisson batches."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fedcore
from fedcore.client.dpsgd import DPSGD
from fedcore.client.trainer import TorchTrainer
from fedcore.errors import TaskError
from fedcore.messages import Ref
from fedcore.simulations.answers import ClientStates
from fedcore.simulations.population import Population
from fedcore.simulations.vectorized import Stack, Vectorized
from fedcore.task import Client
from tests.simulations import ragged

SIZES = (0, 1, 3, 7, 12, 20)


class Tokens(nn.Module):
    """An embedding, whose gradient is sparse in the examples, and a layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(11, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.norm(self.embed((x.abs() * 5).long().clamp(max=10))).mean(1))
        return output


MODELS = {**ragged.MODELS, "tokens": Tokens}


class Ragged(ragged.Ragged):
    """Some clients have fewer examples than a batch, one has none."""

    sizes, models = SIZES, MODELS


def spec(noise: float, *overrides: str) -> fedcore.RunSpec:
    private = (
        f'{{level="example", noise_multiplier={noise}, clip_norm=0.5, sampling_rate=0.3, metric_noise=1.0}}'
    )
    return fedcore.RunSpec().with_(
        "run.rounds=3",
        "cohort.size=12",
        "cohort.minimum=1",
        "client.batch_size=4",
        "client.optimizer.lr=0.5",
        "simulation.clients=12",
        f"privacy={private}",
        "privacy.metric_noise=1.0",
        *overrides,
    )


def answers(task: fedcore.Task, of: fedcore.RunSpec) -> tuple[Any, Any]:
    """Return what a cohort answers in both engines: all that its clients send and keep."""
    population, trainer = Population(task, of, "cpu"), TorchTrainer(task, of)
    ref = Ref("run", 1, 0, "train")
    alone = [trainer.train(ref, client, population.training(client), {}) for client in population.names]
    order = sorted(population.names, key=lambda name: -len(population.training(name)))
    engine = Vectorized(population, trainer, ClientStates(), len(order))
    chunk = engine.train(ref, order, Stack.of([population.training(client) for client in order]))
    found = dict(zip(chunk.clients, zip(chunk.rows.updates(), chunk.kept, strict=True), strict=True))
    return alone, [found[client] for client in population.names]


@pytest.mark.parametrize("model", list(MODELS))
@pytest.mark.parametrize("noise", [1e-9, 1.0])
@pytest.mark.parametrize("more", [(), ("client.optimizer={name='adam', lr=0.01}", "privacy.at_once=2")])
def test_a_chunk_takes_the_steps_of_opacus(model: str, noise: float, more: tuple[str, ...]) -> None:
    alone, chunk = answers(Ragged(model), spec(noise, *more))
    near = 1e-10 if model == "float64" else 1e-5
    for (expected, _), (got, _) in zip(alone, chunk, strict=True):
        delta = expected.vectors["delta"]
        assert np.linalg.norm(delta - got.vectors["delta"]) <= near * np.linalg.norm(delta)
        assert got.scalars == pytest.approx(expected.scalars, rel=1e-5)


def distance(a: Any, b: Any) -> float:
    return float(np.linalg.norm(a.astype(float) - b) / np.linalg.norm(a))


@pytest.mark.parametrize("personal", ["", "0."])
@pytest.mark.parametrize("strategy", ["fedavg", "fedprox", "scaffold"])
def test_private_runs_agree(strategy: str, personal: str) -> None:
    algorithm = "local_sgd" if strategy == "fedavg" else strategy
    options = (f"strategy.algorithm={algorithm}", "simulation.chunk=5")
    models = []
    for engine in ("sequential", "vectorized"):
        of = spec(0.8, f"simulation.engine={engine}", *options)
        models.append(fedcore.simulate(Ragged(personal=personal), of))
    assert distance(models[0].parameters.shared, models[1].parameters.shared) <= 1e-5


class Poisoned(Ragged):
    """A client's first example has no finite gradient."""

    def data(self, client: Client) -> fedcore.Split[Any]:
        split = super().data(client)
        if len(split.train[0]) > 3:
            split.train[0][0] = np.inf
        return split


def test_an_example_without_a_finite_gradient_is_left_out_as_by_opacus() -> None:
    alone, chunk = answers(Poisoned(), spec(0.5))
    for (expected, _), (got, _) in zip(alone, chunk, strict=True):
        assert np.isfinite(got.vectors["delta"]).all()
        assert distance(expected.vectors["delta"], got.vectors["delta"]) <= 1e-5


class Beside(nn.Module):
    """Uses a parameter beside the call of its layer, where Opacus does not see its gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x) + self.layer.weight.sum(1)
        return output


def test_what_a_deployment_would_refuse_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "beside", Beside)
    with pytest.raises(TaskError, match="beside the calls of its layer"):
        fedcore.simulate(Ragged("beside"), spec(1.0, "simulation.engine=vectorized", "simulation.chunk=4"))


def test_the_noise_has_the_deviation_that_was_promised() -> None:
    task, of = Ragged(), spec(1.5)
    private = TorchTrainer(task, of).private
    assert isinstance(private, DPSGD)
    drawn = private.noise(private.draws(Ref("run", 1, 0, "train"), "client"), torch.zeros(200_000))
    assert float(drawn.std()) == pytest.approx(1.5 * 0.5, rel=0.01)
    assert abs(float(drawn.mean())) < 0.01
