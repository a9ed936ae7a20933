"""A task without training, torch or data: what is left of a round is transport, disk and aggregation."""

from dataclasses import dataclass

import numpy as np

from fedcore.client.examples import Examples
from fedcore.client.training import Kept
from fedcore.data import ArrayDataset, Split
from fedcore.layout import Entry, Layout, Parameters
from fedcore.messages import Ref, Update
from fedcore.seeds import integer
from fedcore.spec import RunSpec
from fedcore.strategies.catalog import strategy_of
from fedcore.task import Client, Task


@dataclass(frozen=True)
class Echo(Task):
    """Every client adds a constant of its own to `size` float32 parameters."""

    size: int

    def trainer(self, spec: RunSpec) -> "EchoTrainer":
        """Return what answers in place of a PyTorch loop."""
        layout = Layout((Entry("parameters", (self.size,), "float32", "shared"),))
        return EchoTrainer(layout, tuple(strategy_of(spec).algorithm.vectors(layout, spec)))

    def data(self, client: Client) -> Split[ArrayDataset]:
        """Return one example, for its weight."""
        return Split(ArrayDataset(np.zeros((1, 1), np.float32), np.zeros(1, np.int64)), None)


@dataclass(frozen=True)
class EchoTrainer:
    """A `fedcore.client.training.Trainer` in NumPy; sent: the vectors of an update."""

    layout: Layout
    sent: tuple[str, ...]

    def parameters(self) -> Parameters:
        """Return zeros."""
        return Parameters(np.zeros(self.layout.shared_size, np.float32), np.zeros(0, np.float32))

    def receive(self, parameters: Parameters) -> None:
        """Take the round's parameters, which the answer does not depend on."""

    def train(self, ref: Ref, client: str, examples: Examples, kept: Kept) -> tuple[Update, Kept]:
        """Return a constant delta that differs between rounds and clients."""
        step = np.float32(1e-9 * (integer(client, ref.round) % 10**6))
        delta = np.full(self.layout.shared_size, step, np.float32)
        return Update(dict.fromkeys(self.sent, delta), {"weight": 1.0, "loss": 0.0, "count": 1.0}), kept

    def evaluate(self, examples: Examples, kept: Kept) -> Update:
        """Return no examples."""
        return Update({}, {"loss": 0.0, "accuracy": 0.0, "count": 0.0})
