"""Canaried tasks: the same model and losses, and canaries with coordinates of their own beside them."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedcore.audit.canaries import DIRACS, Assigned, Beside, Canaried, tagged
from fedcore.client.module import build
from fedcore.errors import TaskError
from fedcore.task import Client, Task

COUNT = 3
NATURAL, BLANK = COUNT, COUNT + 1


class Images(Task):
    """Small images through a convolution."""

    like = torch.rand(1, 1, 4, 4), torch.tensor([1])

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3))

    def shared(self, name: str) -> bool:
        return name != "2.bias"


class Words(Task):
    """The next of five words, at each of four places."""

    like = torch.randint(0, 5, (1, 4)), torch.randint(0, 5, (1, 4))

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Embedding(5, 6), nn.Linear(6, 5))

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output.transpose(1, 2), target)


def batch(task: Images | Words, n: int) -> tuple[Tensor, Tensor]:
    x, y = task.like
    x = torch.rand(n, *x.shape[1:]) if x.is_floating_point() else torch.randint(0, 5, (n, *x.shape[1:]))
    return x, y.expand(n, *y.shape[1:])


@pytest.mark.parametrize("task", [Images(), Words()])
def test_natural_examples_have_the_task_s_own_loss_and_gradients(task: Images | Words) -> None:
    canaried = Canaried(task, {}, task.like, COUNT, 50.0)
    module, own = build(canaried, 7), build(task, 7)
    assert isinstance(module, Beside)
    x, y = batch(task, 6)
    loss = canaried.loss(module(tagged(x, [NATURAL] * 6)), y)
    expected = task.loss(own(x), y)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()))
    loss.backward()  # type: ignore[no-untyped-call]
    expected.backward()  # type: ignore[no-untyped-call]
    for a, b in zip(module.base.parameters(), own.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None and torch.allclose(a.grad, b.grad)
    assert module.diracs.weight.grad is not None and not module.diracs.weight.grad.any()


@pytest.mark.parametrize("task", [Images(), Words()])
def test_a_canary_s_gradient_is_its_coordinate_and_a_blank_has_none(task: Images | Words) -> None:
    canaried = Canaried(task, {}, task.like, COUNT, 50.0)
    module = build(canaried, 7)
    x, y = batch(task, 2)
    for sign in (1.0, -1.0):
        canaried.sign = sign
        module.zero_grad()
        canaried.loss(module(tagged(x, [1, BLANK])), y).backward()  # type: ignore[no-untyped-call]
        gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        dirac = gradients.pop(DIRACS)
        assert dirac.tolist() == [[0.0, sign * 25.0, 0.0]]  # the mean over two examples
        assert not any(gradient.any() for gradient in gradients.values())


def test_tags_do_not_change_an_example() -> None:
    for x in (
        torch.rand(2, 3),
        torch.rand(2, 3, dtype=torch.float64),
        torch.tensor([[255], [7]], dtype=torch.uint8),
    ):
        rows = tagged(x, [70_000, 1])
        assert rows[:, 0].tolist() == [70_000, 1]
        assert torch.equal(rows[:, 1:].to(x.dtype), x)


def test_what_leaves_the_device_is_what_did_and_the_canaries() -> None:
    canaried = Canaried(Images(), {}, Images.like, COUNT, 1.0)
    names = dict(build(canaried, 0).named_parameters())
    assert [name for name in names if not canaried.shared(name)] == ["base.2.bias"]


def test_clients_have_what_they_were_given() -> None:
    given = {"a": (torch.zeros(2, 3), torch.zeros(2))}
    task = Assigned(Images(), given, Images.like)
    rng = np.random.default_rng()
    assert task.name == "Images" and task.dataset() is None and task.holdout() is Images.like
    assert task.data(Client("a", 0, rng)).train is given["a"]
    assert task.data(Client("b", 1, rng)).train is None


def test_a_task_with_a_trainer_of_its_own_is_refused() -> None:
    class Boosted(Images):
        trainer = object()

    with pytest.raises(TaskError, match="Boosted brings a trainer of its own"):
        Assigned(Boosted(), {}, Images.like)
