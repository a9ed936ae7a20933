"""The clients of a simulation: stable names, and their examples made when asked for."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Subset

from fedcore.client.examples import Examples, PairExamples, examples_from
from fedcore.client.training import uses_torch
from fedcore.data import PARTITIONS, ArrayDataset, Split
from fedcore.errors import DataError, SpecError
from fedcore.plugins import build
from fedcore.privacy.levels import ClientLevel
from fedcore.seeds import generator
from fedcore.simulations.memory import Cache, Room, memory_for
from fedcore.spec import RunSpec
from fedcore.task import Client, Task, client_name

OBJECTS = 1 << 10  # bytes of what holds two tensors
DATASET = 1 << 15  # bytes that are taken for a client's data set, which may hold anything


def check_population(spec: RunSpec) -> None:
    """Raise SpecError unless the simulated clients are as many as the spec states or needs elsewhere."""
    clients, privacy = spec.simulation.clients, spec.privacy
    if isinstance(privacy, ClientLevel) and privacy.population != clients:
        raise SpecError(
            f"privacy.population = {privacy.population}, but simulation.clients = {clients}; "
            "the amplification by sampling is that of the population, so set both to the same number"
        )
    if spec.encryption.updates == "secagg" and clients < spec.cohort.fewest:
        raise SpecError(
            f"simulation.clients = {clients}, but under secure aggregation fewer than {spec.cohort.fewest} "
            "close no round; raise simulation.clients, or lower cohort.size and cohort.minimum"
        )


class Population:
    """What `[simulation]` describes: `Task.dataset()` cut by the partition, or `Task.data()` by index."""

    def __init__(self, task: Task, spec: RunSpec, device: str = "cpu") -> None:
        """Cut the task's data set; raises DataError where that is impossible."""
        self.task, self.spec = task, spec
        self.device = device if uses_torch(task) else None
        self.names = [client_name(i) for i in range(spec.simulation.clients)]
        self.index = {name: i for i, name in enumerate(self.names)}
        self.dataset = _as_dataset(task.dataset())
        self.parts = None if self.dataset is None else self._cut(self.dataset)
        self.room = Room(memory_for(self.device))
        self.examples = Cache(self._examples, lambda parts: sum(map(_nbytes, parts)), self.room)
        self.sizes: dict[str, int] = {}
        self.poison: Callable[[str, Examples], Examples] | None = None  # in the rounds of an attack on data

    def _cut(self, dataset: Any) -> list[Split[NDArray[np.int64]]]:
        """Return the indices of each client's training and test examples."""
        simulation, seed = self.spec.simulation, self.spec.run.seed
        labels, keys = _labels(dataset), getattr(dataset, "keys", {})
        partition = build(PARTITIONS, simulation.partition, "simulation.partition")
        parts = partition.split(labels, keys, simulation.clients, generator(seed, "partition"))
        if self.spec.evaluation.where == "holdout":
            return [Split(part, None) for part in parts]
        rng, tested = generator(seed, "split"), simulation.test_fraction
        return [_divided(rng.permutation(part), int(tested * len(part))) for part in parts]

    def split(self, name: str) -> Split[Any]:
        """Return what a client holds, as its task would on a device."""
        index = self.index[name]
        if self.parts is None:
            return self.task.data(Client(name, index, generator(self.spec.run.seed, "data", name)))
        part = self.parts[index]
        return Split(self._take(part.train), self._take(part.test))

    def _take(self, index: NDArray[np.int64] | None) -> Any:
        if index is None:
            return None
        if isinstance(self.dataset, ArrayDataset):
            return self.dataset.take(index)
        return Subset(self.dataset, index.tolist())

    def size(self, name: str) -> int:
        """Return how many examples a client trains on; remembered, since the examples of many are not."""
        if name not in self.sizes:
            self.sizes[name] = len(self.examples(name)[0])
        return self.sizes[name]

    def training(self, name: str) -> Examples:
        """Return what a client trains on: its training examples, unless somebody poisons them."""
        examples, _ = self.examples(name)
        return self.poison(name, examples) if self.poison else examples

    def _examples(self, name: str) -> tuple[Examples, Examples]:
        """Return a client's training and test examples on the device."""
        split = self.split(name)
        return examples_from(split.train, self.device), examples_from(split.test, self.device)


def _nbytes(examples: Examples) -> int:
    """Return about how much memory examples take."""
    return OBJECTS + examples.x.nbytes + examples.y.nbytes if isinstance(examples, PairExamples) else DATASET


def _divided(order: NDArray[np.int64], tested: int) -> Split[NDArray[np.int64]]:
    return Split(order[tested:], order[:tested])


def _as_dataset(data: Any) -> Any:
    """Return a pair (x, y) as an ArrayDataset and anything else as it is."""
    if isinstance(data, tuple) and len(data) == 2:
        return ArrayDataset(np.asarray(data[0]), np.asarray(data[1]))
    return data


def _labels(dataset: Any) -> NDArray[Any]:
    """Return the label of every example, from `y`, `targets` or `labels`, or by reading them all."""
    for name in ("y", "targets", "labels"):
        if hasattr(dataset, name):
            return np.asarray(getattr(dataset, name))
    if not hasattr(dataset, "__len__"):
        raise DataError(f"dataset() returned a {type(dataset).__name__}, expected something with a length")
    return np.asarray([dataset[i][1] for i in range(len(dataset))])
