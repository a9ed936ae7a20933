"""A task whose clients have different numbers of examples, with models of several families."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

import fedcore
from fedcore.task import Client


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "perceptron": perceptron,
    "float64": lambda: perceptron().double(),
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 6)),
        nn.Conv1d(1, 4, 3),
        nn.GroupNorm(2, 4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 3),
    ),
}


class Ragged(fedcore.Task):
    """Clients of the sizes in `sizes`, again and again; six features, three classes."""

    sizes: Sequence[int]
    models: Mapping[str, Callable[[], nn.Module]] = MODELS

    def __init__(self, model: str = "perceptron", personal: str = "") -> None:
        self.kind, self.personal = model, personal

    def model(self) -> nn.Module:
        return self.models[self.kind]()

    def shared(self, name: str) -> bool:
        return not self.personal or not name.startswith(self.personal)

    def data(self, client: Client) -> fedcore.Split[Any]:
        assert client.index is not None
        n = self.sizes[client.index % len(self.sizes)]
        x = client.rng.normal(size=(n, 6)).astype("float64" if self.kind == "float64" else "float32")
        return fedcore.Split((x, client.rng.integers(0, 3, n)), (x, client.rng.integers(0, 3, n)))
