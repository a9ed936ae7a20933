"""What DP-SGD cannot account for: refused before any data is read, with what to change."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fedcore.client.examples import Examples, examples_from
from fedcore.client.trainer import TorchTrainer
from fedcore.client.training import trainer_for
from fedcore.errors import SpecError, TaskError
from fedcore.messages import Ref, Update
from fedcore.spec import RunSpec
from fedcore.task import Task


def spec(algorithm: str = "fedavg", clipping: str = "hooks") -> RunSpec:
    return RunSpec.parse(
        {
            "client": {"batch_size": 4, "steps": 2},
            "strategy": algorithm,
            "privacy": {
                "level": "example",
                "noise_multiplier": 1.0,
                "sampling_rate": 0.5,
                "clipping": clipping,
            },
        }
    )


def examples() -> Examples:
    rng = np.random.default_rng(0)
    return examples_from((rng.normal(size=(7, 4)), rng.integers(0, 3, 7)))


def train(task: Task, clipping: str = "hooks") -> Update:
    return TorchTrainer(task, spec(clipping=clipping)).train(Ref("r", 1, 0, "train"), "a", examples(), {})[0]


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))


class Of(Task):
    def __init__(self, make: Callable[[], nn.Module] = two_layers) -> None:
        self.make = make

    def model(self) -> nn.Module:
        return self.make()


def batch_norm(**of: Any) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, **of), nn.Linear(6, 3))


def frozen_batch_norm() -> nn.Module:
    model = batch_norm()
    model[1].requires_grad_(False)  # type: ignore[index]
    return model


def instance_norm() -> nn.Module:
    return nn.Sequential(two_layers(), nn.InstanceNorm1d(3, track_running_stats=True))


class Offset(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 3))
        self.offset: Tensor
        self.register_buffer("offset", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.offset) @ self.weight


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "batch norm": (batch_norm, r"layer '1' \(BatchNorm1d\) .*use nn.GroupNorm\(groups, 6\) in its place"),
    "without parameters": (lambda: batch_norm(affine=False), r"layer '1' \(BatchNorm1d\) .*GroupNorm"),
    "frozen": (frozen_batch_norm, r"layer '1' \(BatchNorm1d\) .*GroupNorm"),
    "without statistics": (lambda: batch_norm(track_running_stats=False), r"\(BatchNorm1d\) .*GroupNorm"),
    "instance norm": (instance_norm, r"layer '1' \(InstanceNorm1d\) .*set track_running_stats=False"),
    "lstm": (lambda: nn.LSTM(4, 3), r"layer '' \(LSTM\) .*opacus.layers.DPLSTM"),
    "gru": (lambda: nn.GRU(4, 3), "opacus.layers.DPGRU"),
    "rnn": (lambda: nn.RNN(4, 3), "opacus.layers.DPRNN"),
    "attention": (lambda: nn.MultiheadAttention(4, 2), "opacus.layers.DPMultiheadAttention"),
    "buffer": (Offset, r"layer '' \(Offset\) has trained parameters and the buffer 'offset'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_layers_that_cannot_be_private_are_refused(case: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises(SpecError, match=f'privacy.level = "example": .*{message}'):
        TorchTrainer(Of(make), spec())
    TorchTrainer(Of(make), RunSpec())


class Still(nn.BatchNorm1d):
    """Stays in evaluation mode, as in a pretrained body at rest."""

    def train(self, mode: bool = True) -> "Still":
        super().train(False)
        return self


class Shift(nn.Module):
    """Remembers in a buffer what it has seen, or not."""

    shift: Tensor

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.register_buffer("shift", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.how == "in place":
            self.shift += x.detach().mean(0)
        elif self.training and self.how == "replaced":
            self.shift = self.shift + x.detach().mean(0)
        return x - self.shift


def test_layers_that_remember_nothing_pass() -> None:
    def model() -> nn.Module:
        still = Still(6).requires_grad_(False)
        return nn.Sequential(Shift(""), nn.Linear(4, 6), still, nn.Linear(6, 3))

    update = train(Of(lambda: model().double()))
    assert update.vectors["delta"].any() and not update.vectors["buffers"][:4].any()


@pytest.mark.parametrize("how", ["in place", "replaced"])
def test_a_buffer_that_remembers_examples_ends_the_training(how: str) -> None:
    task = Of(lambda: nn.Sequential(Shift(how), nn.Linear(4, 3)).double())
    with pytest.raises(TaskError, match=r"Of: training changed the buffer '0\.shift'"):
        train(task)


@pytest.mark.parametrize("name", ["moon", "ditto", "fedrep", "pfedme", "qfedavg"])
def test_algorithms_that_train_or_measure_beside_it_are_refused(name: str) -> None:
    message = "measures the loss" if name == "qfedavg" else "accounts for one phase of training of one model"
    with pytest.raises(SpecError, match=f"strategy.algorithm: .*{message}.*use another algorithm, such as"):
        TorchTrainer(Of(), spec(name))


def test_a_trainer_of_the_tasks_own_is_refused() -> None:
    class Own(Of):
        def trainer(self, spec: RunSpec) -> Any:
            raise AssertionError("it must not be asked")

    with pytest.raises(
        SpecError, match="Own brings a trainer of its own, whose steps cannot be accounted for"
    ):
        trainer_for(Own(), spec())


class Beside(nn.Module):
    """Uses a layer's weight beside the layer's own call, or by a layer of another kind, or not at all."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.layer = how, nn.Linear(4, 4, bias=False)
        self.other = Product(self.layer.weight) if how == "by another layer" else None
        self.idle = nn.Linear(4, 4) if how == "not at all" else None

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x)
        if self.other:
            output = self.other(output)
        return output + 9 * linear(x, self.layer.weight) if self.how == "beside" else output


class Product(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


@pytest.mark.parametrize(
    ("how", "clipping", "message"),
    [
        ("beside", "hooks", "parameter 'layer.weight' is used beside the calls of its layer.*call the layer"),
        ("beside", "ghost", "parameter 'layer.weight' is used beside the calls of its layer.*call the layer"),
        ("by another layer", "ghost", "parameter 'layer.weight' is used beside the calls of its layer"),
        ("not at all", "hooks", "does not depend on the parameter 'idle.weight'.*set its requires_grad to"),
        ("not at all", "ghost", "does not depend on the parameter 'idle.weight'.*set its requires_grad to"),
    ],
)
def test_gradients_that_opacus_does_not_see_whole_are_refused(how: str, clipping: str, message: str) -> None:
    """Under ghost clipping they would be six times as long as the clip norm, without a word."""
    with pytest.raises(TaskError, match=f"Of: .*{message}"):
        train(Of(lambda: Beside(how).double()), clipping)


def test_tied_layers_are_clipped_by_hooks_alone() -> None:
    def tied() -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double()
        model[1].weight = model[0].weight
        return model

    assert np.linalg.norm(train(Of(tied)).vectors["delta"]) > 0
    with pytest.raises(TaskError, match=r'Parameter tying .* set privacy.clipping = "hooks"'):
        train(Of(tied), "ghost")
