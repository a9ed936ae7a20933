"""The benchmark jobs, free of any engine: data, partition, model and local work.

Each is one local epoch of FedAvg. Nothing is shuffled and no randomness is left to an engine, so all engines
do the same arithmetic and only the order of sums differs. They are the jobs that the peers are measured on.

| job | data, model | clients | cohort | local work |
|---|---|---|---|---|
| digits-mlp-100 | digits, perceptron 64-64-10 | 100, IID, 14-15 examples | all | batch 16, SGD 0.1 |
| digits-mlp-1000 | the same | 1000, 32 examples, redrawn | all | the same |
| digits-cnn-100 | digits, two convolutions | 100, as the first | all | the same |
| mnist-cnn-100 | MNIST, CNN of the FedAvg paper | 100, IID, 600 examples | 10 | batch 10, SGD 0.1 |
| cifar-cnn-50, -1000 | noise like CIFAR-10, small CNN | 1000, 50 examples | 50, 1000 | batch 10, SGD 0.1 |
| digits-mlp-N | digits, perceptron | N, 32 examples, redrawn | all | batch 16, SGD 0.1 |

The last two are ours alone: for a GPU, and for any cohort, as digits-mlp-100000.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedcore.data import ArrayDataset, Split, digits
from fedcore.data.datasets import images, mnist_pixels
from fedcore.errors import SpecError, nearest
from fedcore.seeds import generator
from fedcore.spec import RunSpec
from fedcore.task import Client, Task

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Job:
    """One federated job; counts are in clients, rounds and examples."""

    data: str
    model: str
    clients: int
    cohort: int
    rounds: int
    batch: int
    draw: int = 0  # above 0: each client draws so many examples with replacement


JOBS = {
    "digits-mlp-100": Job("digits", "digits_mlp", 100, 100, 40, 16),
    "digits-mlp-1000": Job("digits", "digits_mlp", 1000, 1000, 10, 16, draw=32),
    "digits-cnn-100": Job("digits", "digits_cnn", 100, 100, 40, 16),
    "mnist-cnn-100": Job("mnist", "mnist_cnn", 100, 10, 5, 10),
    "cifar-cnn-50": Job("noise", "cifar_cnn", 1000, 50, 10, 10, draw=50),
    "cifar-cnn-1000": Job("noise", "cifar_cnn", 1000, 1000, 3, 10, draw=50),
}
LEARNING_RATE = 0.1


@cache
def load(data: str) -> Split[ArrayDataset]:
    """Return a job's training and test examples, to be taken from."""
    sources: dict[str, Callable[[], Split[ArrayDataset]]]
    sources = {"digits": digits, "mnist": mnist_as_bytes, "noise": noise}
    return sources[data]()


class Pixels(ArrayDataset):
    """Images as the bytes that they are, in a quarter of the memory; those that are taken become numbers."""

    def take(self, index: ArrayLike) -> ArrayDataset:
        """Return the images at `index` as float32 in [0, 1]."""
        return images(super().take(index))


def mnist_as_bytes() -> Split[ArrayDataset]:
    """Return MNIST as it is stored, since a round needs but a tenth of it as numbers."""
    stored = mnist_pixels()
    assert stored.test is not None
    return Split(Pixels(stored.train.x, stored.train.y), Pixels(stored.test.x, stored.test.y))


def noise() -> Split[ArrayDataset]:
    """Return examples of CIFAR-10's shape in which there is nothing to learn."""
    rng = generator("bench noise")
    x = rng.standard_normal((2000, 3, 32, 32), np.float32)
    whole = ArrayDataset(x, rng.integers(0, 10, len(x)))
    return Split(whole.take(np.arange(1000)), whole.take(np.arange(1000, 2000)))


def job_of(name: str) -> Job:
    """Return a job; digits-mlp-N has N clients. Raises SpecError for a name that is none."""
    kind, _, count = name.rpartition("-")
    if name not in JOBS and kind == "digits-mlp" and count.isdecimal() and 1 <= int(count) <= 10**6:
        return Job("digits", "digits_mlp", int(count), int(count), 5, 16, draw=32)
    if name not in JOBS:
        raise SpecError(f"job {name!r} is not known{nearest(name, JOBS)}")
    return JOBS[name]


@cache
def partition(job: Job) -> list[NDArray[np.int64]]:
    """Return each client's indices into the training examples."""
    count = len(load(job.data).train)
    if job.draw:
        return [np.random.RandomState(c).randint(0, count, job.draw) for c in range(job.clients)]
    return np.array_split(np.random.RandomState(1).permutation(count), job.clients)


@dataclass(frozen=True)
class JobTask(Task):
    """A job as a task."""

    job: Job

    def model(self) -> "nn.Module":
        """Return the job's model."""
        from fedcore.models import MODELS

        return MODELS[self.job.model]()

    def data(self, client: Client) -> Split[Any]:
        """Return a client's examples in stored order."""
        assert client.index is not None
        return Split(load(self.job.data).train.take(partition(self.job)[client.index]), None)

    def holdout(self) -> ArrayDataset | None:
        """Return the test examples."""
        test = load(self.job.data).test
        return test and test.take(np.arange(len(test)))


def spec_of(name: str, rounds: int) -> RunSpec:
    """Return a job's run spec; it is evaluated once, after the last round."""
    job = job_of(name)
    return RunSpec.model_validate(
        {
            "run": {"name": name, "rounds": rounds},
            "cohort": {"size": job.cohort},
            "client": {
                "batch_size": job.batch,
                "shuffle": False,
                "optimizer": {"name": "sgd", "lr": LEARNING_RATE},
            },
            "evaluation": {"every": 0, "where": "holdout"},
            "simulation": {"clients": job.clients},
        }
    )
