"""A client's examples: whatever a task returns, as batches of tensors, or of arrays without PyTorch."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from fedcore.data import ArrayDataset
from fedcore.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

Batch = tuple["Tensor", "Tensor"]


class Examples(Protocol):
    """Examples that can be counted and drawn by index."""

    def __len__(self) -> int: ...

    def batch(self, index: "Tensor | slice") -> Batch:
        """Return inputs and targets of some examples."""
        ...


@dataclass(frozen=True)
class PairExamples:
    """Examples along the first axis of two tensors, or of two arrays where a trainer is no PyTorch loop."""

    x: Any
    y: Any

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, index: Any) -> Any:
        """Return inputs and targets of some examples."""
        return self.x[index], self.y[index]


@dataclass(frozen=True)
class DatasetExamples:
    """Examples of a map-style torch data set, fetched one by one and collated."""

    dataset: Any
    index: Sequence[int]
    device: str

    def __len__(self) -> int:
        return len(self.index)

    def batch(self, index: "Tensor | slice") -> Batch:
        """Return inputs and targets of some examples."""
        from torch.utils.data import default_collate

        chosen = range(len(self))[index] if isinstance(index, slice) else index.tolist()
        x, y = default_collate([self.dataset[self.index[i]] for i in chosen])
        return x.to(self.device), y.to(self.device)


def examples_from(data: Any, device: str | None = "cpu") -> Examples:
    """Return examples from an ArrayDataset, a pair of arrays or tensors, or a map-style torch data set.

    device: where tensors lie; None gives arrays instead, from an ArrayDataset or a pair only. No data count
    as no examples. Raises DataError for anything else, or where lengths differ.
    """
    if data is None:
        return _nothing(device)
    if isinstance(data, ArrayDataset):
        data = (data.x, data.y)
    if isinstance(data, tuple) and len(data) == 2:
        x, y = data
        if len(x) != len(y):
            raise DataError(f"{len(x)} inputs but {len(y)} targets; expected as many of each")
        if device is None:
            return PairExamples(np.asarray(x), np.asarray(y))
        return PairExamples(_tensor(x, device), _tensor(y, device))
    if device is not None and hasattr(data, "__len__") and hasattr(data, "__getitem__"):
        return DatasetExamples(data, range(len(data)), device)
    raise DataError(
        f"data of type {type(data).__name__}: expected a fedcore.ArrayDataset, a pair (x, y) of arrays or "
        "tensors, or, for PyTorch, a data set with __len__ and __getitem__"
    )


@cache
def _nothing(device: str | None) -> Examples:
    """Return no examples; clients without test examples would each make them anew."""
    return examples_from((np.empty(0, np.float32), np.empty(0, np.float32)), device)


def _tensor(part: Any, device: str) -> "Tensor":
    """Return a tensor in memory of its own, aligned as torch aligns.

    Kernels may add in another order where memory is aligned otherwise, so the same examples give the same
    bits only from the same alignment.
    """
    import torch

    if not isinstance(part, np.ndarray):
        return torch.as_tensor(part).detach().clone().to(device)
    try:  # it copies, also from read-only memory
        return torch.tensor(np.ascontiguousarray(part, part.dtype.newbyteorder("=")), device=device)
    except TypeError as error:
        raise DataError(f"an array of dtype {part.dtype}: expected numbers; encode it as such") from error
