"""What an auditor makes of a run's data and spec before planting anything."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedcore.audit.canaries import tagged
from fedcore.client.examples import Batch, Examples
from fedcore.errors import DataError
from fedcore.simulations.population import Population
from fedcore.spec import RunSpec
from fedcore.task import Task, client_name


@dataclass(frozen=True)
class Some:
    """Examples, each with the number of the client that owns it: x (n, ...), y (n, ...), owner (n,)."""

    x: Tensor
    y: Tensor
    owner: NDArray[np.intp]

    def taken(self, which: NDArray[Any]) -> "Some":
        """Return the examples at some places, by number or by mask."""
        places = torch.from_numpy(np.arange(len(self.owner))[which])
        return Some(self.x[places], self.y[places], self.owner[which])

    @property
    def named(self) -> dict[str, Batch]:
        """The examples of each client that has any."""
        places = {int(i): torch.from_numpy(np.flatnonzero(self.owner == i)) for i in np.unique(self.owner)}
        return {client_name(i): (self.x[place], self.y[place]) for i, place in places.items()}


def held_by(task: Task, spec: RunSpec, clients: int) -> Some:
    """Return what the first clients of a run train on; raises DataError where that is nothing."""
    population = Population(task, spec)
    parts: list[Examples] = [population.examples(name)[0] for name in population.names[:clients]]
    batches = [part.batch(slice(0, len(part))) for part in parts if len(part)]
    if not batches:
        raise DataError(
            f"the first {clients} clients of {task.name} have no examples, so there are none to guess"
        )
    owner = np.repeat(np.arange(clients), [len(part) for part in parts])
    return Some(torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]), owner)


def together(parts: Sequence[Some], tags: list[int]) -> Some:
    """Return all examples of several, tagged."""
    x, y = torch.cat([part.x for part in parts]), torch.cat([part.y for part in parts])
    return Some(tagged(x, tags), y, np.concatenate([part.owner for part in parts]))


def as_audited(spec: RunSpec, *overrides: str) -> RunSpec:
    """Return the spec with some overrides, and without all that is not training."""
    return spec.with_(
        *overrides,
        "cohort.minimum=0",
        'simulation.engine="sequential"',
        'evaluation.where="holdout"',
        "evaluation.every=0",
        'attack="none"',
    )


@torch.no_grad()
def losses(task: Task, module: nn.Module, some: Some) -> NDArray[np.float64]:
    """Return the loss of each example, (n,), under a task's own model."""
    count = len(some.y)
    outputs = torch.cat([module(some.x[i : i + 256]) for i in range(0, count, 256)])
    each = [float(task.loss(outputs[i : i + 1], some.y[i : i + 1])) for i in range(count)]
    made: NDArray[np.float64] = np.nan_to_num(np.array(each))
    return made
