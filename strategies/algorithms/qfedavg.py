"""q-FedAvg: more weight for clients on which the model is worse."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedcore.errors import expect
from fedcore.layout import Layout, Vector
from fedcore.messages import ScalarSpec, VectorSpec
from fedcore.spec import RunSpec
from fedcore.strategies.algorithms.base import Aggregate, LocalSGD, require_sgd

# A client is sure to be accepted up to this loss, and so many times it for L ‖y - x‖²; a model that learns
# stays far below. Wider bounds would only make the grid of the sums coarser.
LOSS, SQUARE = 16.0, 2.0**10


@dataclass(frozen=True)
class QFedAvg(LocalSGD):
    """Minimises sum_i F_i^(q+1) / (q+1): a higher q makes losses more alike (Li et al. 2020, Algorithm 2).

    With D_i = F_i^q L (x - y_i) and h_i = q F_i^(q-1) ‖L (x - y_i)‖² + L F_i^q the server's step is
    x -= sum_i D_i / sum_i h_i, where F_i is the loss of the received x on client i's examples and L = 1 / lr.
    Both are sent divided by L: `delta` = F_i^q (y_i - x) and `h` = q F_i^(q-1) L ‖y_i - x‖² + F_i^q.

    Every client counts once; at q = 0 this is FedAvg with equal weights. It costs one more pass over the
    examples. Raises SpecError unless q >= 0.
    """

    q: float = 1.0
    trusts: ClassVar[tuple[str, ...]] = ("h",)

    def __post_init__(self) -> None:
        expect(0 <= self.q < float("inf"), self, "q >= 0, such as 1")

    def check(self, spec: RunSpec) -> None:
        """Raise SpecError unless clients train by SGD, of whose rate L is the inverse."""
        require_sgd(self, spec, "takes 1 / lr for the smoothness of the loss, which SGD's alone tells")

    def vectors(self, layout: Layout, spec: RunSpec) -> dict[str, VectorSpec]:
        """Return `delta` = F_i^q (y_i - x), summed as it is."""
        bound = LOSS**self.q * spec.limits.update
        return {"delta": replace(super().vectors(layout, spec)["delta"], bound=bound, factor=None)}

    def scalars(self, spec: RunSpec) -> dict[str, ScalarSpec]:
        """Return `weight`, which the buffers are averaged by, and `h`."""
        return {**super().scalars(spec), "h": ScalarSpec(0.0, (1 + self.q * SQUARE) * LOSS**self.q)}

    def direction(
        self, aggregate: Aggregate, block: slice, server: Mapping[str, Vector]
    ) -> NDArray[np.float64]:
        """Return sum_i F_i^q delta_i / sum_i h_i; zero where no client has any loss."""
        h = aggregate.scalar("h")
        scale = aggregate.clients / h if h else 0.0
        return scale * super().direction(aggregate, block, server)
