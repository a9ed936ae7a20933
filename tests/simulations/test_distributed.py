"""Runs whose clients make the noise together: what a decoded sum holds, and what the result promises."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from fedcore.data import Split
from fedcore.encoding import Narrow
from fedcore.errors import RunFailed
from fedcore.layout import Vector
from fedcore.messages import Plan
from fedcore.privacy.accounting import epsilon
from fedcore.privacy.discrete import Skellam
from fedcore.privacy.distributed import Parameters, encode
from fedcore.simulations.answers import Answers
from fedcore.simulations.borrowed import threads
from fedcore.simulations.run import Simulation, simulate
from fedcore.spec import RunSpec
from fedcore.strategies.privacy import release
from fedcore.strategies.rounds import Round, train_plan
from fedcore.task import Client, Task

SIZE = 6


class Lines(Task):
    """y = a x of 2000 numbers, with another a on each client; updates are far longer than the clip norm."""

    def __init__(self) -> None:
        self.metrics = {}

    def model(self) -> nn.Module:
        model = nn.Linear(2000, 3)
        nn.init.zeros_(model.weight)
        return model

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return mse_loss(output, target)

    def data(self, client: Client) -> Split[Any]:
        assert client.index is not None
        rng = np.random.default_rng(client.index)
        x = rng.normal(size=(4, 2000)).astype(np.float32)
        y = x[:, :3] * (client.index + 1)
        return Split((x, y), (x, y))

    def holdout(self) -> Any:
        return self.data(Client("holdout", 0, np.random.default_rng(0), {})).train


def spec_for(*overrides: str, **privacy: Any) -> RunSpec:
    spec = RunSpec.parse(
        {
            "run": {"seed": 3, "rounds": 2},
            "cohort": {"size": SIZE},
            "client": {"batch_size": 4},
            "evaluation": {"where": "holdout"},
            "simulation": {"clients": 9, "engine": "sequential", "chunk": 2},
            "privacy": {"level": "distributed", "noise_multiplier": 0.5, "clip_norm": 0.2, **privacy},
        }
    )
    return spec.with_(*overrides)


class Watched(Simulation):
    """A simulation that adds up what clients have trained, clipped as it should be."""

    meant: NDArray[np.float64]

    def released(self, plan: Plan, answers: Iterable[Answers]) -> Iterator[Answers]:
        """Yield what is sent, which is no secret from who sits on the device."""

        def noted(each: Answers) -> Answers:
            for row in each.rows.vectors["delta"].astype(np.float64):
                self.meant += row * min(1, 0.2 / np.linalg.norm(row))
            return each

        return super().released(plan, map(noted, answers))


def first_round(spec: RunSpec) -> tuple[Round, NDArray[np.float64]]:
    """Return a round that has closed, and the sum without noise."""
    run = Watched(Lines(), spec)
    run.meant = np.zeros(run.layout.shared_size)
    clients = run.cohort(1, "train")
    plan = train_plan(run.strategy, run.spec, run.layout, run.ref(1, "train"), clients, 9)
    with threads(1):
        round, _ = run.fill(plan, lambda _: None)
    assert len(round.folded) == SIZE
    return round, run.meant


def spread(round: Round, meant: NDArray[np.float64]) -> tuple[float, float]:
    """Return chi-square over its degrees of freedom, of the noise that all made, and 5 deviations of that."""
    made, size = round.plan.distributed, len(meant)
    assert made and made.honest == 3, "a round closes with 4 of 6, one of which may make none"
    assert made.honest * made.variance >= (0.5 * made.norm) ** 2
    error = round.sums.vector("delta", slice(0, size)) - meant
    said = SIZE * (made.variance + 1 / 4) / made.scale**2
    return float(error @ error / said / size), 5 * sqrt(2 / size)


@pytest.mark.parametrize("engine", ["sequential", "vectorized"])
@pytest.mark.parametrize("noise", ["skellam", "discrete_gaussian"])
@pytest.mark.parametrize("encoding", ["q32", "q16"])
def test_a_sum_has_the_noise_of_all_who_are_in_it(engine: str, noise: str, encoding: str) -> None:
    overrides = (f"simulation.engine={engine}", f"encryption.encoding={encoding}")
    chi_square, band = spread(*first_round(spec_for(*overrides, noise=noise)))
    assert chi_square == pytest.approx(1, abs=band)


def test_noise_that_one_client_leaves_out_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    left_out: list[np.random.Generator] = []

    def once(vector: Vector, parameters: Parameters, rng: np.random.Generator) -> Narrow:
        if left_out:
            return encode(vector, parameters, rng)
        left_out.append(rng)
        return encode(vector, replace(parameters, variance=0), rng)

    monkeypatch.setattr(release, "encode", once)
    chi_square, band = spread(*first_round(spec_for()))
    assert left_out and chi_square < 1 - band


@pytest.mark.parametrize("encoding", ["q32", "q16"])
def test_masks_come_off_to_the_same_bits(encoding: str) -> None:
    specs = [
        spec_for(f"encryption.updates={updates}", f"encryption.encoding={encoding}")
        for updates in ("auto", "secagg")
    ]
    open_, masked = (first_round(spec)[0].sums.words for spec in specs)
    assert np.array_equal(open_.narrow, masked.narrow) and not len(open_.wide) + len(masked.wide)


def test_engines_differ_by_steps_of_the_grid_at_most() -> None:
    rounds = [first_round(spec_for(f"simulation.engine={e}"))[0] for e in ("sequential", "vectorized")]
    made = rounds[0].plan.distributed
    assert made and made == rounds[1].plan.distributed
    one, other = (round.sums.vector("delta", slice(0, made.dimension)) for round in rounds)
    assert np.linalg.norm(one - other) < 0.01 * np.linalg.norm(one)


def test_the_result_promises_what_renyi_divergences_bound(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        result = simulate(Lines(), spec_for(), out=tmp_path)
    assert [row["epsilon"] for row in result.metrics] == [epsilon([Skellam(0.5, n)], 1e-5) for n in (1, 2)]
    promised = json.loads((tmp_path / "result.json").read_text())["privacy"]
    assert {(g["trust"], g["accountant"]) for g in promised["guarantees"]} == {("distributed", "rdp")}
    assert promised["guarantees"][1]["epsilon"] == result.metrics[-1]["epsilon"], "the coordinator's as well"
    assert "At least 3 clients" in promised["assumes"]


def test_too_few_clients_for_their_noise_make_no_round() -> None:
    spec = spec_for("simulation.clients=3")
    with pytest.raises(RunFailed, match="round 1 had 3 of at least 4 updates"), torch.random.fork_rng():
        simulate(Lines(), spec)
