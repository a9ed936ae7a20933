"""Torch's global state, borrowed for a while: its threads and its random numbers."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch compute with so many threads, and as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def random_state(device: str) -> Iterator[None]:
    """Put torch's global random state back afterwards: trainers seed it for each client's dropout."""
    with torch.random.fork_rng([] if device == "cpu" else [device]):
        yield
