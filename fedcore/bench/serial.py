"""The plain PyTorch loop without any framework: what a simulation is measured against."""

import time
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedcore.bench.jobs import LEARNING_RATE, Job, JobTask, load, partition

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

    def __init__(self, job: Job, clients: Sequence[int], start: Sequence[Tensor], device: str) -> None:
        """Begin at given parameters, with the clients' examples at hand."""
        self.job, self.device, self.current = job, device, [tensor.to(device) for tensor in start]
        self.model = JobTask(job).model().to(device)
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.SGD(self.parameters, lr=LEARNING_RATE)
        self.examples = {client: tensors(job, client, device) for client in clients}

    def round(self, cohort: Sequence[int]) -> float:
        """Train a cohort and average; return the seconds that it took."""
        started = time.perf_counter()
        sums, weight = [torch.zeros_like(c) for c in self.current], 0
        for client in cohort:
            copy_into(self.parameters, self.current)
            x, y = self.examples[client]
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
        x, y = (torch.split(torch.from_numpy(array).to(self.device), 1000) for array in (test.x, test.y))
        hits = [int((self.model(xb).argmax(1) == yb).sum()) for xb, yb in zip(x, y, strict=True)]
        return sum(hits) / len(test)


def tensors(job: Job, client: int, device: str) -> Examples:
    """Return a client's examples."""
    part = load(job.data).train.take(partition(job)[client])
    return torch.from_numpy(part.x).to(device), torch.from_numpy(part.y).to(device)
