"""Canaries: units put into the data with probability 1/2, to be guessed from what the mechanism releases.

A Dirac canary is the worst example there can be: its gradient lies along a coordinate of the model that no
other example touches, and is longer than the clip norm. What is released at that coordinate is the clipped
canary, if it was drawn, and noise: clip norm, noise and sampling rate are all laid open (Nasr et al. 2023).

    input     (tag, features ...)         a row an example, so that any data set can carry canaries
    output    (coordinate, output ...)    a row an example, so that any loss can be differentiated by example
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from fedcore.client.examples import Batch
from fedcore.client.module import build
from fedcore.data import Split
from fedcore.errors import TaskError
from fedcore.task import Client, Task

DIRACS = "diracs.weight"  # the canaries' coordinates among the model's parameters


class Assigned(Task):
    """A task with the data that an auditor gives its clients; one that is not named has none."""

    def __init__(self, task: Task, data: Mapping[str, Batch], holdout: Batch) -> None:
        """data: by client. holdout: any examples, since a private run may not be tested on its clients'."""
        if getattr(task, "trainer", None) is not None:
            raise TaskError(f"{task.name} brings a trainer of its own; only PyTorch models can be audited")
        self.task, self.assigned, self.test, self.metrics = task, data, holdout, {}

    @property
    def name(self) -> str:
        """The name of the task whose model is trained."""
        return self.task.name

    def model(self) -> nn.Module:
        """Return the task's model."""
        return self.task.model()

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the task's loss."""
        return self.task.loss(output, target)

    def shared(self, name: str) -> bool:
        """Tell whether a parameter leaves the device, as the task does."""
        return self.task.shared(name)

    def holdout(self) -> Batch:
        """Return some examples."""
        return self.test

    def data(self, client: Client) -> Split[Batch | None]:
        """Return what the auditor gave a client."""
        return Split(self.assigned.get(client.name))


class Canaried(Assigned):
    """A task whose model has a coordinate more for each Dirac canary, and whose examples carry a tag.

    Tag i < diracs is the i-th Dirac canary, NATURAL an example of the task, BLANK one without any gradient.
    """

    def __init__(
        self, task: Task, data: Mapping[str, Batch], like: Batch, diracs: int, strength: float
    ) -> None:
        """data: tagged. like: an untagged example of the task. strength: the norm of a canary's gradient."""
        super().__init__(task, data, (tagged(like[0], [diracs + 1]), like[1]))
        self.like, self.diracs, self.strength = like[0], diracs, strength
        with torch.no_grad():
            self.shape = build(task, 0).eval()(self.like).shape[1:]
        self.sign = 1.0  # of the canaries' gradients in the present round

    def model(self) -> nn.Module:
        """Return the task's model with the canaries' coordinates beside it."""
        return Beside(self.task.model(), self.diracs, self.like)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the task's loss, plus `strength` times the mean of the canaries' coordinates."""
        own = output[:, 1:].reshape(len(output), *self.shape)
        return self.task.loss(own, target) + self.sign * self.strength * output[:, 0].mean()

    def shared(self, name: str) -> bool:
        """Tell whether a parameter leaves the device: the canaries' do."""
        return name == DIRACS or self.task.shared(name.removeprefix("base."))


class Beside(nn.Module):
    """A model, and a weight for each canary beside it: (n, 1 + features) -> (n, 1 + outputs)."""

    def __init__(self, base: nn.Module, diracs: int, like: Tensor) -> None:
        """like: an example's features, for their shape and dtype."""
        super().__init__()
        self.base, self.count, self.shape, self.dtype = base, diracs, like.shape[1:], like.dtype
        self.diracs = nn.Linear(diracs, 1, bias=False)
        nn.init.zeros_(self.diracs.weight)

    def forward(self, rows: Tensor) -> Tensor:
        """Return the canaries' coordinates and the outputs; those of a canary are zero, without gradient."""
        tags = rows[:, 0].long()
        output = self.base(rows[:, 1:].reshape(len(rows), *self.shape).to(self.dtype)).flatten(1)
        natural = (tags == self.count)[:, None]
        marks = one_hot(tags, self.count + 2)[:, : self.count].to(self.diracs.weight.dtype)
        return torch.cat([self.diracs(marks), torch.where(natural, output, torch.zeros_like(output))], 1)


def tagged(x: Tensor, tags: list[int]) -> Tensor:
    """Return rows of a tag and an example's features, in a dtype that holds both: (n, ...) -> (n, 1 + d)."""
    whole = torch.float64 if x.dtype == torch.float64 else torch.float32
    dtype = whole if x.is_floating_point() else torch.int64
    return torch.cat([torch.tensor(tags, dtype=dtype)[:, None], x.cpu().flatten(1).to(dtype)], 1)
