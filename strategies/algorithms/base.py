"""What a client algorithm is to the server: what it receives, sends and keeps, and the step that follows."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from fedcore.errors import SpecError
from fedcore.layout import Layout, Vector
from fedcore.messages import ScalarSpec, VectorSpec
from fedcore.spec import SGD, RunSpec

BUFFER_BOUND = 2.0**14  # of a running statistic; an input scaled sanely stays far below


class Aggregate(Protocol):
    """What a closed round gave: the aggregator's word on each vector, and sums of scalars."""

    @property
    def round(self) -> int:
        """The number of the round, from 1."""
        ...

    @property
    def clients(self) -> float:
        """How many updates were folded; in a private sum, how many were expected."""
        ...

    @property
    def population(self) -> int:
        """How many clients the cohort was drawn from."""
        ...

    def scalar(self, name: str) -> float:
        """Return the sum of a scalar over the clients."""
        ...

    def vector(self, name: str, block: slice) -> NDArray[np.float64]:
        """Return a block of what the aggregator made of a vector, such as its weighted mean."""
        ...


class ClientAlgorithm(Protocol):
    """One client algorithm, as the server sees it; the half that trains is in `fedcore.client.algorithms`.

    The vectors that it receives, remembers and keeps have the shape of the shared parameters and are zero at
    first. What it trusts, no robust rule can protect.
    """

    @property
    def receives(self) -> tuple[str, ...]:
        """Vectors that are broadcast beside the model."""
        ...

    @property
    def remembers(self) -> tuple[str, ...]:
        """Vectors that stay on the server."""
        ...

    @property
    def keeps(self) -> tuple[str, ...]:
        """Vectors that stay on the client, from one folded round to the next."""
        ...

    @property
    def trusts(self) -> tuple[str, ...]:
        """Scalars by which one client scales everybody's step."""
        ...

    def check(self, spec: RunSpec) -> None:
        """Raise SpecError, with a remedy, where it cannot work under a spec."""
        ...

    def vectors(self, layout: Layout, spec: RunSpec) -> dict[str, VectorSpec]:
        """Return the vectors that an update carries, `delta` among them."""
        ...

    def scalars(self, spec: RunSpec) -> dict[str, ScalarSpec]:
        """Return the scalars that an update carries, `weight` among them."""
        ...

    def direction(
        self, aggregate: Aggregate, block: slice, server: Mapping[str, Vector]
    ) -> NDArray[np.float64]:
        """Return a block of the direction for the server optimiser.

        server: blocks of what it `receives` and `remembers`, to be moved in place.
        """
        ...


@dataclass(frozen=True)
class LocalSGD:
    """FedAvg's client: some epochs of the local optimiser from the received model (McMahan et al. 2017).

    Sends delta_i = y_i - x and w_i, its number of examples. The weighted mean of the delta_i is the
    direction, so that x + direction is the weighted mean of the y_i.
    """

    receives: ClassVar[tuple[str, ...]] = ()
    remembers: ClassVar[tuple[str, ...]] = ()
    keeps: ClassVar[tuple[str, ...]] = ()
    trusts: ClassVar[tuple[str, ...]] = ()

    def check(self, spec: RunSpec) -> None:
        """Accept every spec."""

    def vectors(self, layout: Layout, spec: RunSpec) -> dict[str, VectorSpec]:
        """Return `delta`, in the layout's dtype, weighted by `weight`."""
        return {"delta": VectorSpec(layout.shared_size, layout.dtype, spec.limits.update, "weight")}

    def scalars(self, spec: RunSpec) -> dict[str, ScalarSpec]:
        """Return `weight`."""
        return {"weight": ScalarSpec(0.0, spec.limits.weight)}

    def direction(
        self, aggregate: Aggregate, block: slice, server: Mapping[str, Vector]
    ) -> NDArray[np.float64]:
        """Return sum w_i delta_i / sum w_i, or what a robust rule made of the delta_i."""
        return aggregate.vector("delta", block)


def require_sgd(algorithm: ClientAlgorithm, spec: RunSpec, because: str, *, plain: bool = False) -> None:
    """Raise SpecError, saying why, unless clients train by SGD; `plain`: without momentum.

    Weight decay may stay: it is the gradient of a part of the loss.
    """
    optimizer = spec.client.optimizer
    if isinstance(optimizer, SGD) and not (plain and optimizer.momentum):
        return
    given = f"momentum = {optimizer.momentum:g}" if isinstance(optimizer, SGD) else f'"{optimizer.name}"'
    remedy = '{name = "sgd", momentum = 0}' if plain else '{name = "sgd"}'
    raise SpecError(
        f"client.optimizer: {given}, but {type(algorithm).__name__} {because}; "
        f"set client.optimizer = {remedy}, or use another algorithm"
    )
