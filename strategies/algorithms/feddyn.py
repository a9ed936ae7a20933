"""FedDyn: a regulariser on the device that makes the local optima agree with the global one."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedcore.errors import expect
from fedcore.layout import Layout, Vector
from fedcore.messages import VectorSpec
from fedcore.spec import RunSpec
from fedcore.strategies.algorithms.base import Aggregate, LocalSGD


@dataclass(frozen=True)
class FedDyn(LocalSGD):
    """Clients minimise F_i(w) - <h_i, w> + alpha/2 ‖w - x‖² (Acar et al. 2021, Algorithm 1).

    h_i estimates the gradient of F_i where client i ended last, and h their mean; all are zero at first. From
    x to y_i on the clients P of the round, of N in all,

        h_i -= alpha (y_i - x),    h -= (alpha / N) sum_P (y_i - x),    x = mean_P y_i - h / alpha.

    Every client counts once: the paper's objective is the plain mean of the F_i. Where sums are of vectors
    scaled down ([limits] norm, a clip norm), h is no longer the mean of the h_i, and the fixed point moves.
    Sends what FedAvg sends.
    The paper tunes alpha in {0.1, 0.01, 0.001}. Raises SpecError unless alpha > 0.
    """

    alpha: float = 0.01
    remembers: ClassVar[tuple[str, ...]] = ("correction",)
    keeps: ClassVar[tuple[str, ...]] = ("correction",)

    def __post_init__(self) -> None:
        expect(0 < self.alpha < float("inf"), self, "alpha > 0, such as 0.01; at 0 take FedAvg")

    def vectors(self, layout: Layout, spec: RunSpec) -> dict[str, VectorSpec]:
        """Return `delta`, where every client counts once."""
        return {"delta": replace(super().vectors(layout, spec)["delta"], factor=None)}

    def direction(
        self, aggregate: Aggregate, block: slice, server: Mapping[str, Vector]
    ) -> NDArray[np.float64]:
        """Move h, then return mean (y_i - x) - h / alpha."""
        mean, h = super().direction(aggregate, block, server), server["correction"]
        h[:] -= self.alpha * aggregate.clients / aggregate.population * mean
        return mean - h / self.alpha
