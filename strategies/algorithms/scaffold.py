"""SCAFFOLD: control variates against the drift of clients with unlike data."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedcore.layout import Layout, Vector
from fedcore.messages import VectorSpec
from fedcore.spec import RunSpec
from fedcore.strategies.algorithms.base import Aggregate, LocalSGD, require_sgd


@dataclass(frozen=True)
class Scaffold(LocalSGD):
    """Clients step along g - c_i + c (Karimireddy et al. 2020, Algorithm 1, option II).

    c_i estimates client i's own gradient and c = mean_i c_i everybody's; all are zero at first. After K local
    steps at rate lr from x to y,

        c_i+ = c_i - c + (x - y) / (K lr),        c += (|S| / N) mean_{i in S} (c_i+ - c_i),

    over the clients S of the round, of N in all. (x - y) / (K lr) is the mean of the steps' directions for
    plain SGD only, hence `check`. A client that is not folded keeps its c_i, so c stays the mean of all c_i.

    Departure: the paper's mean of the deltas is plain, here it is FedAvg's, weighted by examples, which is
    what the first round then gives. Either way the fixed point is that of the plain mean of the losses, since
    c is a plain mean. Where sums are of vectors scaled down ([limits] norm, a clip norm), c is that of what
    came, no longer of the c_i, and the fixed point moves. Sends twice what FedAvg sends.
    """

    receives: ClassVar[tuple[str, ...]] = ("control",)
    keeps: ClassVar[tuple[str, ...]] = ("control",)

    def check(self, spec: RunSpec) -> None:
        """Raise SpecError unless clients train by plain SGD."""
        require_sgd(self, spec, "takes (x - y) / (K lr) for the mean gradient, true of SGD alone", plain=True)

    def vectors(self, layout: Layout, spec: RunSpec) -> dict[str, VectorSpec]:
        """Return `delta`, and `control_delta` = c_i+ - c_i, where every client counts once.

        Both controls are means of gradients, and a delta within its bound made of one step gives a mean
        gradient of at most bound / lr.
        """
        bound = 2 * spec.limits.update / spec.client.optimizer.lr
        control = VectorSpec(layout.shared_size, layout.dtype, bound)
        return {**super().vectors(layout, spec), "control_delta": control}

    def direction(
        self, aggregate: Aggregate, block: slice, server: Mapping[str, Vector]
    ) -> NDArray[np.float64]:
        """Return the mean of the deltas; c moves by the share of all clients that took part."""
        share = aggregate.clients / aggregate.population
        server["control"][:] += share * aggregate.vector("control_delta", block)
        return super().direction(aggregate, block, server)
