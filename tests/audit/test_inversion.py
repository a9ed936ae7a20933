"""Gradient inversion: exact for a linear layer, close for a small smooth network, nothing under noise."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedcore.audit.inversion import candidates, deep_leakage, first_linear, invert_linear, relative_error
from fedcore.audit.run import inversions
from fedcore.spec import RunSpec
from fedcore.task import Task


class Smooth(Task):
    """A small smooth CNN on 6 x 6 images."""

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.Sigmoid(),
            nn.Conv2d(4, 4, 3),
            nn.Sigmoid(),
            nn.Flatten(),
            nn.Linear(64, 4),
        )

    def dataset(self) -> Any:
        return np.random.default_rng(0).random((8, 1, 6, 6), np.float32), np.arange(8) % 4


class Flat(Smooth):
    """A perceptron on the same images."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.ReLU(), nn.Linear(16, 4))


def spec(**tables: Any) -> RunSpec:
    return RunSpec.parse({"simulation": {"clients": 2}, "evaluation": {"where": "holdout"}, **tables})


PRIVATE: dict[str, dict[str, Any]] = {
    "example": {"noise_multiplier": 1.0, "sampling_rate": 0.5},
    "client": {"noise_multiplier": 1.0, "population": 2},
    "tree": {"noise_multiplier": 1.0, "separation": 2},
    "local": {"noise_multiplier": 1.0},
}


def test_a_linear_layer_is_inverted_exactly() -> None:
    layer, x = nn.Linear(5, 3).double(), torch.rand(1, 5, dtype=torch.float64)
    nn.functional.cross_entropy(layer(x), torch.tensor([2])).backward()  # type: ignore[no-untyped-call]
    assert layer.weight.grad is not None and layer.bias.grad is not None
    assert invert_linear(-0.1 * layer.weight.grad, -0.1 * layer.bias.grad).tolist() == pytest.approx(
        x[0].tolist()
    )


def test_an_output_that_one_example_moves_gives_it_away_in_a_sum_too() -> None:
    x, y = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([5.0, 0.0, 1.0])
    errors_x, errors_y = torch.tensor([1.0, 2.0, 0.0, 0.0]), torch.tensor([0.0, 2.0, 4.0, 0.0])
    weight = torch.outer(errors_x, x) + torch.outer(errors_y, y)
    found = candidates(weight, errors_x + errors_y)
    assert [each.tolist() for each in found] == [x.tolist(), ((x + y) / 2).tolist(), y.tolist()]


def test_the_layer_must_read_the_example_itself() -> None:
    x = torch.rand(1, 4)
    assert first_linear(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), x) == ("1.weight", "1.bias")
    assert first_linear(nn.Linear(4, 2), x) == ("weight", "bias")
    assert first_linear(nn.Sequential(nn.Sigmoid(), nn.Linear(4, 2)), x) is None
    assert first_linear(nn.Sequential(nn.Linear(4, 2, bias=False)), x) is None


def test_a_run_gives_its_example_away() -> None:
    (found,) = inversions(Flat(), spec(), deep=False)
    assert found.name == "first linear layer, without privacy"
    assert found.succeeded and found.error < 1e-3


@pytest.mark.parametrize("level", PRIVATE)
def test_a_private_run_does_not(level: str) -> None:
    privacy = {"level": level, **PRIVATE[level]}
    _, found = inversions(Flat(), spec(privacy=privacy, cohort={"size": 2}), deep=False)
    assert found.name == "first linear layer, in this run"
    assert not found.succeeded and found.error > 0.8


def test_dlg_on_a_small_cnn_finds_the_example_and_under_dp_does_not() -> None:
    privacy = {"level": "example", **PRIVATE["example"]}
    plain, noised = inversions(Smooth(), spec(privacy=privacy), deep=True)
    assert (plain.name, noised.name) == ("DLG, without privacy", "DLG, in this run")
    assert plain.error < 0.1 and plain.succeeded
    assert not noised.succeeded


def test_dlg_directly() -> None:
    torch.manual_seed(0)
    module, x, y = Smooth().model(), torch.rand(1, 1, 6, 6), torch.tensor([1])
    nn.functional.cross_entropy(module(x), y).backward()  # type: ignore[no-untyped-call]
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    guess = deep_leakage(module, lambda output: nn.functional.cross_entropy(output, y), gradients, x.shape)
    assert relative_error(guess, x) < 0.1


def test_no_guess_is_worse_than_a_blank_one() -> None:
    x = torch.ones(4)
    assert relative_error(x, x) == 0.0
    assert (
        relative_error(torch.zeros(4), x)
        == relative_error(1e9 * x, x)
        == relative_error(x * torch.nan, x)
        == 1.0
    )
