"""Server optimisers: from a direction to new parameters, block by block.

The direction D of a round is the negative of what a gradient would be, so parameters move along it. What an
optimiser keeps between rounds lies in vectors as long as the model, in the model's dtype; every step is
computed in float64 and rounded once.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import sqrt
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from fedcore.errors import expect
from fedcore.layout import Vector

Float64s = NDArray[np.float64]


class Reports(Protocol):
    """What an optimiser may know of the clients of a closed round."""

    @property
    def round(self) -> int:
        """The number of the round, from 1."""
        ...

    @property
    def clients(self) -> float:
        """How many updates were folded; in a private sum, how many were expected."""
        ...

    def scalar(self, name: str) -> float:
        """Return the sum of a scalar over these clients."""
        ...


class ServerOptimizer(Protocol):
    """A server optimiser: one number for the round, then elementwise, so that a block of the model is enough.

    scalars: what every client must report beside its update; "square" is ‖D_i‖², of its own delta.
    """

    scalars: ClassVar[tuple[str, ...]]

    @property
    def state(self) -> Mapping[str, float]:
        """Names of the vectors that it keeps between rounds, with the value that fills each at first."""
        ...

    def rate(self, reports: Reports, squared_norm: Callable[[], float]) -> float:
        """Return the step size of a closed round; `squared_norm()` is ‖D‖², at the cost of a pass over D."""
        ...

    def step(self, x: Vector, direction: Float64s, rate: float, state: Mapping[str, Vector]) -> None:
        """Move a block `x` along `direction`, and the same block of `state` with it, all in place."""
        ...


@dataclass(frozen=True)
class SGD:
    """v = momentum * v + D; x += lr * v (FedAvgM, Hsu et al. 2019). FedAvg at lr 1 and momentum 0.

    Raises SpecError unless lr > 0 and 0 <= momentum < 1.
    """

    lr: float = 1.0
    momentum: float = 0.0
    scalars: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        sound = 0 < self.lr < np.inf and 0 <= self.momentum < 1
        expect(sound, self, "finite lr > 0 and 0 <= momentum < 1")

    @property
    def state(self) -> Mapping[str, float]:
        """The velocity, where there is momentum."""
        return {"velocity": 0.0} if self.momentum else {}

    def rate(self, reports: Reports, squared_norm: Callable[[], float]) -> float:
        """Return `lr`."""
        return self.lr

    def step(self, x: Vector, direction: Float64s, rate: float, state: Mapping[str, Vector]) -> None:
        """Apply one step in place."""
        if self.momentum:
            direction = _scaled(self.momentum, state["velocity"]) + direction
            state["velocity"][:] = direction
        x[:] = x + rate * direction


class Adaptive(ABC):
    """What the adaptive optimisers of Reddi et al. 2021, Algorithm 2, share: all but how v follows D²."""

    lr: float
    beta1: float
    tau: float
    v0: float | None
    scalars: ClassVar[tuple[str, ...]] = ()

    def check(self, *betas: float) -> None:
        """Raise SpecError unless the fields make sense."""
        sound = 0 < self.lr < np.inf and 0 < self.tau < np.inf and all(0 <= beta < 1 for beta in betas)
        sound = sound and 0 <= (self.v0 or 0) < np.inf
        expect(sound, self, "finite lr > 0, finite tau > 0, 0 <= beta < 1 and finite v0 >= 0")

    @property
    def state(self) -> Mapping[str, float]:
        """The moments `m`, unless beta1 is 0, and `v`."""
        v = self.tau**2 if self.v0 is None else self.v0
        return {"m": 0.0, "v": v} if self.beta1 else {"v": v}

    def rate(self, reports: Reports, squared_norm: Callable[[], float]) -> float:
        """Return `lr`."""
        return self.lr

    @abstractmethod
    def second(self, v: Vector, square: Float64s) -> Float64s:
        """Return the new v, given D²."""

    def step(self, x: Vector, direction: Float64s, rate: float, state: Mapping[str, Vector]) -> None:
        """Apply one step in place."""
        v, m = self.second(state["v"], direction**2), direction
        if self.beta1:
            m = _scaled(self.beta1, state["m"]) + (1 - self.beta1) * direction
            state["m"][:] = m
        state["v"][:] = v
        x[:] = x + rate * m / (np.sqrt(v) + self.tau)


@dataclass(frozen=True)
class Adagrad(Adaptive):
    """v = v + D²; x += lr * m / (sqrt(v) + tau), with m = beta1 m + (1 - beta1) D.

    FedAdagrad (Reddi et al. 2021, Algorithm 2): m starts at 0, v at `v0`, by default the paper's tau². The
    paper's experiments take beta1 = 0, for which m is D and is not kept. Raises SpecError unless lr > 0,
    0 <= beta1 < 1, tau > 0 and v0 >= 0.
    """

    lr: float = 0.1
    beta1: float = 0.0
    tau: float = 1e-3
    v0: float | None = None

    def __post_init__(self) -> None:
        self.check(self.beta1)

    def second(self, v: Vector, square: Float64s) -> Float64s:
        """Return the new v, given D²."""
        return v + square


@dataclass(frozen=True)
class Adam(Adaptive):
    """v = beta2 v + (1 - beta2) D²; x += lr * m / (sqrt(v) + tau), with m = beta1 m + (1 - beta1) D.

    FedAdam (Reddi et al. 2021, Algorithm 2): m starts at 0, v at `v0`, by default the paper's tau², and
    neither is corrected for its bias, unlike in Adam itself. bias_correction: multiply lr in round t by
    sqrt(1 - beta2^(t+1)) / (1 - beta1^(t+1)), as Flower's FedAdam does; Kingma and Ba 2015 have t for t + 1.
    Raises SpecError unless lr > 0, 0 <= beta1, beta2 < 1, tau > 0 and v0 >= 0.
    """

    lr: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3
    v0: float | None = None
    bias_correction: bool = False

    def __post_init__(self) -> None:
        self.check(self.beta1, self.beta2)

    def rate(self, reports: Reports, squared_norm: Callable[[], float]) -> float:
        """Return `lr`, corrected for the bias of the moments where that is asked for."""
        if not self.bias_correction:
            return self.lr
        after = reports.round + 1
        return self.lr * sqrt(1 - self.beta2**after) / (1 - self.beta1**after)

    def second(self, v: Vector, square: Float64s) -> Float64s:
        """Return the new v, given D²."""
        return _scaled(self.beta2, v) + (1 - self.beta2) * square


@dataclass(frozen=True)
class Yogi(Adam):
    """v = v - (1 - beta2) D² sign(v - D²); x += lr * m / (sqrt(v) + tau), with m = beta1 m + (1 - beta1) D.

    FedYogi (Reddi et al. 2021, Algorithm 2): where D² falls, v follows by steps of D², more slowly than
    Adam's; all else is as in `Adam`.
    """

    def second(self, v: Vector, square: Float64s) -> Float64s:
        """Return the new v, given D²."""
        return v - (1 - self.beta2) * square * np.sign(v - square)


@dataclass(frozen=True)
class FedExP:
    """x += rate * D, rate = max(1, sum_i ‖D_i‖² / (2 M (‖D‖² + eps))), for the M clients of the round.

    The more the clients disagree, the shorter their mean D is beside their own deltas D_i, and the further
    the step goes beyond it (Jhunjhunwala et al. 2023, Algorithm 1). Every client counts once in the rate,
    whatever its weight in D. The paper tunes eps from 1e-3 to 0.1 and evaluates the mean of the last two
    models; here the model is the last one. Raises SpecError unless eps > 0.
    """

    eps: float = 1e-3
    scalars: ClassVar[tuple[str, ...]] = ("square",)

    def __post_init__(self) -> None:
        expect(0 < self.eps < np.inf, self, "finite eps > 0")

    @property
    def state(self) -> Mapping[str, float]:
        """Nothing is kept."""
        return {}

    def rate(self, reports: Reports, squared_norm: Callable[[], float]) -> float:
        """Return the step size that the disagreement of the clients allows, at least 1."""
        if not reports.clients:
            return 1.0
        mean_square = reports.scalar("square") / reports.clients
        return max(1.0, mean_square / (2 * (squared_norm() + self.eps)))

    def step(self, x: Vector, direction: Float64s, rate: float, state: Mapping[str, Vector]) -> None:
        """Apply one step in place."""
        x[:] = x + rate * direction


def _scaled(factor: float, vector: Vector) -> Float64s:
    """Return factor * vector, multiplied in float64 whatever the vector's dtype."""
    return np.multiply(vector, factor, dtype=np.float64)


OPTIMIZERS: Mapping[str, type[ServerOptimizer]] = {
    "sgd": SGD,
    "adagrad": Adagrad,
    "adam": Adam,
    "yogi": Yogi,
    "fedexp": FedExP,
}
