"""The plain PyTorch loop without any framework: what a simulation is measured against."""

import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedcore.bench.jobs import LEARNING_RATE, Job, JobTask, load, partition
from fedcore.data import ArrayDataset

Examples = tuple[Tensor, Tensor]


@torch.no_grad()
def copy_into(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source tensor into the target at the same position."""
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


@torch.no_grad()
def add_weighted(sums: Sequence[Tensor], parameters: Sequence[Tensor], weight: int) -> None:
    """Add weight * parameters to the running sums."""
    for total, parameter in zip(sums, parameters, strict=True):
        total.add_(parameter, alpha=weight)


class PlainLoop:
    """FedAvg over given cohorts, written as one would without a framework."""

    def __init__(self, job: Job, start: Sequence[Tensor], device: str) -> None:
        """Begin at given parameters."""
        self.job, self.device, self.current = job, device, [tensor.to(device) for tensor in start]
        self.model = JobTask(job).model().to(device)
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.SGD(self.parameters, lr=LEARNING_RATE)

    def round(self, cohort: Sequence[int]) -> float:
        """Train a cohort and average; return the seconds that it took, with the examples at hand."""
        examples = {client: tensors(self.job, client, self.device) for client in cohort}
        started = time.perf_counter()
        sums, weight = [torch.zeros_like(c) for c in self.current], 0
        for client in cohort:
            copy_into(self.parameters, self.current)
            x, y = examples[client]
            for xb, yb in zip(torch.split(x, self.job.batch), torch.split(y, self.job.batch), strict=True):
                self.optimizer.zero_grad()
                cross_entropy(self.model(xb), yb).backward()  # type: ignore[no-untyped-call]
                self.optimizer.step()
            add_weighted(sums, self.parameters, len(x))
            weight += len(x)
        self.current = [total / weight for total in sums]
        if self.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    @torch.no_grad()
    def accuracy(self) -> float:
        """Return the fraction of test examples that the averaged model classifies correctly."""
        copy_into(self.parameters, self.current)
        test = load(self.job.data).test
        assert test is not None
        pieces = np.array_split(np.arange(len(test)), 100)  # a model's activations are larger than its input
        return sum(self.hits(on_device(test.take(piece), self.device)) for piece in pieces) / len(test)

    def hits(self, examples: Examples) -> int:
        """Return how many examples the model classifies correctly."""
        x, y = examples
        return int((self.model(x).argmax(1) == y).sum())


def tensors(job: Job, client: int, device: str) -> Examples:
    """Return a client's examples."""
    return on_device(load(job.data).train.take(partition(job)[client]), device)


def on_device(part: ArrayDataset, device: str) -> Examples:
    """Return examples as tensors."""
    return torch.from_numpy(part.x).to(device), torch.from_numpy(part.y).to(device)
