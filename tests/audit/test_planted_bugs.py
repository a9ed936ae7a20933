"""The audit finds bugs that are planted in the product, each by the statistic that can see it.

Every test holds the bound against the claim below it, and the epsilon of the bug, where that is finite, above
it. The runs without a bug are the control. Bounds when this was written, all at a claim of 2.00:

    bug                                 bound   epsilon of the bug
    none                                0.7     2.0
    none, sampled                       0.3     2.0
    none, central                       0.9     2.0
    none, local                         1.1     2.0
    none, tree                          0.6     2.0
    noise off                           29      infinite
    half the noise                      2.7     4.4
    half the noise, central             3.2     4.4
    three times the clip norm, local    5.3     7.1
    clipping off                        29      infinite
    noise before clipping               14      infinite
    the same noise every round          29      infinite
    the same, sampled                   13      infinite
    the same, central                   32      infinite
    told a quarter of the rate          4.2     6.7
    told a quarter of the rate, central 3.2     5.3
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from opacus.optimizers import DPOptimizer
from torch import nn

from fedcore.audit import client_level
from fedcore.audit.noise import sampled, scaled
from fedcore.audit.report import Audit
from fedcore.audit.run import audit
from fedcore.client import dpsgd
from fedcore.client.dpsgd import DPSGD
from fedcore.messages import Ref
from fedcore.privacy.accounting import epsilon
from fedcore.privacy.claims import resolved, sampling_rate, training
from fedcore.seeds import generator
from fedcore.spec import RunSpec
from fedcore.strategies import rounds
from fedcore.strategies.privacy import noise, release
from fedcore.task import Task

pytestmark = pytest.mark.slow  # together more than ten seconds

Patch = pytest.MonkeyPatch
CLAIM, DELTA = 2.0, 1e-5


class Blobs(Task):
    """Two clouds in the plane."""

    def model(self) -> nn.Module:
        return nn.Linear(2, 2)

    def dataset(self) -> Any:
        y = np.arange(80) % 2
        x = np.random.default_rng(0).normal(size=(80, 2)) + 3 * y[:, None]
        return x.astype(np.float32), y


def spec(level: str, **privacy: Any) -> RunSpec:
    """Return a run that claims epsilon 2 at delta 1e-5."""
    return RunSpec.parse(
        {
            "run": {"rounds": 10 if level == "example" else 4, "seed": 3},
            "cohort": {"size": 4},
            "client": {"batch_size": 16, "steps": 1},
            "simulation": {"clients": privacy.get("population", 4)},
            "evaluation": {"where": "holdout"},
            "privacy": {"level": level, "target_epsilon": CLAIM, **privacy},
        }
    )


FULL = spec("example", sampling_rate=1.0)
SAMPLED = spec("example", sampling_rate=0.1)
CENTRAL = spec("client", population=4)
SAMPLED_CENTRAL = spec("client", population=40)
LOCAL = spec("local")
TREE = spec("tree", separation=2)


@pytest.fixture(autouse=True)
def small(monkeypatch: Patch) -> None:
    """Let an audit of clients train 3,000 of them for four rounds, in place of 4,000."""
    monkeypatch.setattr(client_level, "TRAININGS", 12_000)


def begun(monkeypatch: Patch, change: Callable[[DPSGD], None]) -> None:
    """Change what DP-SGD has prepared for a client, before it trains."""
    original = DPSGD.begin

    def begin(self: DPSGD, ref: Ref, client: str, *, careful: bool = False) -> None:
        original(self, ref, client, careful=careful)
        change(self)

    monkeypatch.setattr(DPSGD, "begin", begin)


def found_in(run: RunSpec) -> dict[str, float]:
    """Audit a run that claims what is not true; return the highest bound of each attack."""
    found = audit(Blobs(), run)
    assert found.verdict == "violation" and found.epsilon > CLAIM
    assert found.claimed == pytest.approx(CLAIM, abs=0.01)
    return {a.name.partition(", ")[2]: max(b.epsilon for b in a.bounds) for a in found.attacks if a.bounds}


def truth(run: RunSpec, *, noise: float = 1.0, rate: float = 1.0) -> float:
    """Return the epsilon of a run with so many times the noise and the sampling rate."""
    claimed = training(resolved(run), run.run.rounds)
    return epsilon(sampled(scaled(claimed, noise), rate), DELTA)


CONTROLS = [
    FULL,
    SAMPLED,
    pytest.param(CENTRAL, marks=pytest.mark.slow),
    pytest.param(LOCAL, marks=pytest.mark.slow),
    pytest.param(TREE, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("run", CONTROLS)
def test_nothing_is_found_where_nothing_is_wrong(run: RunSpec) -> None:
    found: Audit = audit(Blobs(), run)
    assert found.verdict == "no violation found"
    assert found.claimed == pytest.approx(CLAIM, abs=0.01)
    assert (
        0.1 < found.epsilon < CLAIM < 10 < found.ceiling
    )  # it could have found something, and saw something


def test_noise_off(monkeypatch: Patch) -> None:
    def quiet(private: DPSGD) -> None:
        private.optimizer.noise_multiplier = 0.0

    begun(monkeypatch, quiet)
    assert found_in(FULL)["by the sum of rounds"] > 20


def test_half_the_noise(monkeypatch: Patch) -> None:
    """Only the bound that takes the mechanism at its word is tight enough."""

    def halved(private: DPSGD) -> None:
        private.optimizer.noise_multiplier /= 2

    begun(monkeypatch, halved)
    found = audit(Blobs(), FULL)
    refuting = {b.kind for a in found.attacks for b in a.bounds if b.refutes(CLAIM)}
    assert refuting == {"this mechanism"}
    assert CLAIM < found.epsilon < truth(FULL, noise=0.5)


def test_clipping_off(monkeypatch: Patch) -> None:
    def unclipped(private: DPSGD) -> None:
        optimizer, far = private.optimizer, 2.0**20
        optimizer.noise_multiplier *= optimizer.max_grad_norm / far  # the same noise
        optimizer.max_grad_norm = far

    begun(monkeypatch, unclipped)
    assert found_in(FULL)["by the sum of rounds"] > 20


def test_noise_before_clipping(monkeypatch: Patch) -> None:
    """Each gradient is noised, then clipped, so that a long one drowns the noise."""
    clip = DPOptimizer.clip_and_accumulate

    def noise_and_clip(self: DPOptimizer) -> None:
        spread = self.noise_multiplier * self.max_grad_norm
        for parameter in self.params:
            parameter.grad_sample = parameter.grad_sample + spread * torch.randn_like(parameter.grad_sample)
        clip(self)

    def no_more_noise(self: DPOptimizer) -> None:
        for parameter in self.params:
            parameter.grad = parameter.summed_grad.view_as(parameter)

    monkeypatch.setattr(DPOptimizer, "clip_and_accumulate", noise_and_clip)
    monkeypatch.setattr(DPOptimizer, "add_noise", no_more_noise)
    assert found_in(FULL)["by the sum of rounds"] > 10


@pytest.mark.parametrize("run", [FULL, SAMPLED])
def test_the_same_noise_every_round(monkeypatch: Patch, run: RunSpec) -> None:
    """It cancels in a sum of rounds with alternating signs."""
    original = dpsgd.noise_generator
    monkeypatch.setattr(dpsgd, "noise_generator", lambda device, _: original(device, generator(0, "same")))
    found = found_in(run)
    assert max(found, key=found.__getitem__) == "by the sum of rounds"
    assert found["by the sum of rounds"] > 10


def test_the_accountant_is_told_a_smaller_rate(monkeypatch: Patch) -> None:
    def more_often(private: DPSGD) -> None:
        private.privacy = private.privacy.model_copy(update={"sampling_rate": 0.4})

    begun(monkeypatch, more_often)
    assert CLAIM < max(found_in(SAMPLED).values()) < truth(SAMPLED, rate=4.0)


@pytest.mark.slow
def test_central_half_the_noise(monkeypatch: Patch) -> None:
    vector = noise.Noised.vector

    def halved(self: noise.Noised, name: str, block: slice) -> Any:
        return vector(replace(self, standard=self.standard / 2), name, block)

    monkeypatch.setattr(noise.Noised, "vector", halved)
    assert CLAIM < found_in(CENTRAL)["by the sum of rounds"] < truth(CENTRAL, noise=0.5)


@pytest.mark.slow
def test_central_the_same_noise_every_round(monkeypatch: Patch) -> None:
    monkeypatch.setattr(rounds, "digest", lambda *_: 7)
    assert found_in(CENTRAL)["by the sum of rounds"] > 20


@pytest.mark.slow
def test_central_told_a_smaller_rate(monkeypatch: Patch) -> None:
    composing = sys.modules["fedcore.strategies.privacy.conflicts"]  # a function of the package has its name
    monkeypatch.setattr(composing, "sampling_rate", lambda spec: min(1.0, 4 * sampling_rate(spec)))
    assert CLAIM < max(found_in(SAMPLED_CENTRAL).values()) < truth(SAMPLED_CENTRAL, rate=4.0)


@pytest.mark.slow
def test_local_clipped_at_three_times_the_norm(monkeypatch: Patch) -> None:
    clipped = release.clipped
    monkeypatch.setattr(release, "clipped", lambda vectors, clip, order: clipped(vectors, 3 * clip, order))
    assert CLAIM < found_in(LOCAL)["by the sum of rounds"] < truth(LOCAL, noise=1 / 3)
