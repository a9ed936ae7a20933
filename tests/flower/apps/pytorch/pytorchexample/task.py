"""Model, data and local work."""

from functools import cache

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    """A small perceptron with batch statistics, so that not every array is a weight, nor of float32."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(64, 32)
        self.norm = nn.BatchNorm1d(32)
        self.out = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.norm(self.hidden(x))))


@cache
def load_all() -> tuple[Tensor, Tensor]:
    """Return the digits in an order of their own."""
    digits = load_digits()
    order = np.random.RandomState(0).permutation(len(digits.target))
    x = torch.from_numpy(digits.data[order].astype(np.float32) / 16)
    return x, torch.from_numpy(digits.target[order].astype(np.int64))


def load_data(partition: int, partitions: int, batch: int, number: int) -> tuple[DataLoader, DataLoader]:
    """Return a partition's training examples, shuffled for a round, and its test examples."""
    x, y = (part.tensor_split(partitions)[partition] for part in load_all())
    cut = int(0.8 * len(x))
    order = torch.Generator().manual_seed(1000 * number + partition)
    train = DataLoader(TensorDataset(x[:cut], y[:cut]), batch, shuffle=True, generator=order, drop_last=True)
    return train, DataLoader(TensorDataset(x[cut:], y[cut:]), batch)


def train(net: Net, examples: DataLoader, epochs: int, lr: float) -> float:
    """Train in place; return the mean loss of a batch."""
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    net.train()
    losses = []
    for _ in range(epochs):
        for x, y in examples:
            optimizer.zero_grad()
            loss = criterion(net(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return sum(losses) / max(1, len(losses))


@torch.no_grad()
def test(net: Net, examples: DataLoader) -> tuple[float, float]:
    """Return mean loss and accuracy."""
    net.eval()
    loss, hits, count = 0.0, 0, 0
    for x, y in examples:
        out = net(x)
        loss += nn.functional.cross_entropy(out, y, reduction="sum").item()
        hits += int((out.argmax(1) == y).sum())
        count += len(y)
    return loss / count, hits / count
