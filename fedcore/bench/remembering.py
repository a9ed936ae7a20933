"""A task without torch or data whose model shows whatever is lost, done twice, or done on the wrong model."""

import time
from dataclasses import dataclass

import numpy as np

from fedcore.client.examples import Examples
from fedcore.client.training import Kept
from fedcore.data import ArrayDataset, Split
from fedcore.layout import Entry, Layout, Parameters
from fedcore.messages import Ref, Update
from fedcore.seeds import generator
from fedcore.spec import RunSpec
from fedcore.task import Client, Task


@dataclass(frozen=True)
class Remembering(Task):
    """Every client answers by the model it got and by how many of its updates have been folded.

    size: of the model, float32. seconds: how long training takes.
    """

    size: int
    seconds: float

    def trainer(self, spec: RunSpec) -> "RememberingTrainer":
        """Return what answers in place of a PyTorch loop."""
        return RememberingTrainer(self.size, self.seconds)

    def data(self, client: Client) -> Split[ArrayDataset]:
        """Return one example, for its weight."""
        one = ArrayDataset(np.zeros((1, 1), np.float32), np.zeros(1, np.int64))
        return Split(one, one)


class RememberingTrainer:
    """A `fedcore.client.training.Trainer` in NumPy whose clients keep a count."""

    def __init__(self, size: int, seconds: float) -> None:
        """Answer for `size` parameters after some seconds."""
        self.layout = Layout((Entry("parameters", (size,), "float32", "shared"),))
        self.seconds, self.received = seconds, self.parameters()

    def parameters(self) -> Parameters:
        """Return zeros."""
        return Parameters(np.zeros(self.layout.shared_size, np.float32), np.zeros(0, np.float32))

    def receive(self, parameters: Parameters) -> None:
        """Take the round's parameters."""
        self.received = parameters

    def train(self, ref: Ref, client: str, examples: Examples, kept: Kept) -> tuple[Update, Kept]:
        """Return a step towards zero, with noise by round and client, and add one to the count."""
        time.sleep(self.seconds)
        folded, shared = kept["folded"] if kept else np.zeros(1, np.float32), self.received.shared
        noise = generator("remembering", ref.round, client).standard_normal(len(shared), np.float32)
        delta = np.float32(0.1) * (noise - shared) + np.float32(1e-3) * folded
        return Update({"delta": delta}, {"weight": 1.0, "loss": 0.0, "count": 1.0}), {"folded": folded + 1}

    def evaluate(self, examples: Examples, kept: Kept) -> Update:
        """Return the size of the model, and the count."""
        loss = float(np.abs(self.received.shared).sum(dtype=np.float64))
        folded = float(kept["folded"][0]) if kept else 0.0
        return Update({}, {"loss": loss, "accuracy": folded, "count": 1.0})
