"""The loss example by example, also where there are few classes and many examples."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fedcore
from fedcore.client.losses import MANY, REGISTER, single_losses


class Plain(fedcore.Task):
    def model(self) -> nn.Module:
        return nn.Linear(1, 1)


class Weighted(Plain):
    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(output, target, label_smoothing=0.1)


@pytest.mark.parametrize("classes", [2, REGISTER - 1, REGISTER, 65])
@pytest.mark.parametrize("rows", [0, 1, MANY, MANY + 1, 1000])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_each_example_has_its_loss_and_its_gradient(classes: int, rows: int, smoothing: float) -> None:
    generator = torch.Generator().manual_seed(classes * 1000 + rows)
    output = torch.randn(rows, classes, generator=generator, dtype=torch.float64).requires_grad_()
    target = torch.randint(0, classes, (rows,), generator=generator)
    got = single_losses(Weighted() if smoothing else Plain())(output, target)
    expected = cross_entropy(output, target, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(got, expected)
    weights = torch.randn(rows, generator=generator, dtype=torch.float64)
    gradients = [torch.autograd.grad((weights * each).sum(), output)[0] for each in (got, expected)]
    torch.testing.assert_close(*gradients)


def test_targets_may_be_probabilities() -> None:
    output, target = torch.randn(MANY + 1, 4), torch.softmax(torch.randn(MANY + 1, 4), 1)
    expected = cross_entropy(output, target, reduction="none")
    torch.testing.assert_close(single_losses(Plain())(output, target), expected)
