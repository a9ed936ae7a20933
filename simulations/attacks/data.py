"""Attacks through the data that malicious clients train on: false labels, and a backdoor with its trigger.

They work alike on NumPy arrays and torch tensors: x of shape (n, ...), y of shape (n, ...).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from fedcore.errors import DataError, expect
from fedcore.simulations.attacks.attack import Context, Deltas


@dataclass(frozen=True)
class LabelFlip:
    """Every label y becomes classes - 1 - y.

    Source: Fang et al. 2020 (arXiv:1911.11815).
    """

    classes: int = 10

    def __post_init__(self) -> None:
        expect(self.classes >= 2, self, "classes >= 2")

    def poison(self, x: Any, y: Any, rng: np.random.Generator) -> tuple[Any, Any]:
        """See `Poisons.poison`; raises DataError for labels that are not 0 to classes - 1."""
        if len(y) and not (y.min() >= 0 and y.max() < self.classes):
            found = f"labels from {y.min()} to {y.max()}"
            raise DataError(f"{self}: {found}, expected 0 to {self.classes - 1}; set attack.classes")
        return _copy(x), self.classes - 1 - y


@dataclass(frozen=True)
class Backdoor:
    """A patch in the corner means `target`: a share of the attacker's examples is stamped and relabelled.

    The trigger sets the last `size` x `size` features to `value`, for x of shape (n, ..., height, width), or
    the last `size` features of x of shape (n, features). A model that learned it is as good as before on
    clean examples and answers `target` wherever it sees the patch.

    Source: Gu et al. 2017, BadNets (arXiv:1708.06733); Bagdasaryan et al. 2020
    (arXiv:1807.00459) in federated learning.
    """

    target: int = 0
    share: float = 0.5
    size: int = 3
    value: float = 1.0

    def __post_init__(self) -> None:
        expect(0 < self.share <= 1, self, "0 < share <= 1, of an attacker's examples")
        expect(self.target >= 0 and self.size >= 1, self, "target >= 0, a class, and size >= 1")
        expect(bool(np.isfinite(self.value)), self, "a finite value")

    def poison(self, x: Any, y: Any, rng: np.random.Generator) -> tuple[Any, Any]:
        """See `Poisons.poison`; the stamped examples are drawn. Raises DataError for other shapes."""
        self._check(x, y)
        chosen = np.sort(rng.permutation(len(y))[: round(self.share * len(y))])
        x, y = _copy(x), _copy(y)
        x[chosen], y[chosen] = self._stamped(x[chosen]), self.target
        return x, y

    def triggered(self, x: Any, y: Any) -> tuple[Any, Any]:
        """See `Triggered.triggered`: all examples of other classes than the target, stamped."""
        self._check(x, y)
        others = y != self.target
        labels = _copy(y[others])
        labels[:] = self.target
        return self._stamped(x[others]), labels

    def _stamped(self, x: Any) -> Any:
        """Return a copy with the trigger on every example."""
        x, corner = _copy(x), slice(-self.size, None)
        x[(..., corner) if x.ndim == 2 else (..., corner, corner)] = self.value
        return x

    def _check(self, x: Any, y: Any) -> None:
        if x.ndim < 2 or y.ndim != 1:
            raise DataError(
                f"{self}: inputs of shape {tuple(x.shape)} and targets of shape {tuple(y.shape)}; expected "
                "(n, features) or (n, ..., height, width), and one class per example"
            )


@dataclass(frozen=True)
class ModelReplacement(Backdoor):
    """A backdoored update, scaled up so that the mean over the cohort is replaced by it.

    scale: the factor; 0 takes n/m, with which the mean of n equal weights is the attackers' mean update but
    for what the honest ones add. norm: where positive, a row is scaled to no more than this Euclidean norm,
    to pass a server that clips or refuses by it. The other fields are `Backdoor`'s.

    Source: Bagdasaryan et al. 2020 (arXiv:1807.00459), "model replacement"; with a norm, "train-and-scale".
    """

    scale: float = 0.0
    norm: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        finite = 0 <= self.scale < np.inf and 0 <= self.norm < np.inf
        expect(finite, self, "scale >= 0 and norm >= 0, finite numbers")

    def forge(self, honest: Deltas, own: Deltas, context: Context) -> Deltas:
        """See `Forges.forge`."""
        scale = self.scale or (len(honest) + len(own)) / len(own)
        rows = np.empty_like(own)
        for row, trained in zip(rows, own, strict=True):
            length = scale * float(np.linalg.norm(trained.astype(np.float64)))
            row[:] = trained * (self.norm / length * scale if self.norm and length > self.norm else scale)
        return rows


def _copy(data: Any) -> Any:
    return data.copy() if isinstance(data, np.ndarray) else data.clone()
