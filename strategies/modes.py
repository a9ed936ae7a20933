"""When the model moves: after every cohort, or after every so many arrivals.

Without cohorts an update may come in late: its staleness s is the number of times the model has moved since
the client received it. What then enters a step is made here, so that the round itself is always the same one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from fedcore.encoding import blocks
from fedcore.errors import expect
from fedcore.layout import Parameters
from fedcore.messages import Plan
from fedcore.strategies.terms import Rows, Space, in_memory


@dataclass(frozen=True)
class Synchronous:
    """A round waits for its cohort; every update starts from the same model (McMahan et al. 2017)."""


@dataclass(frozen=True)
class Buffered:
    """x += lr * (1/K) sum_i (1 + s_i)^-exponent D_i, after every K arrivals (FedBuff, Nguyen et al. 2022).

    `concurrency` clients, 0: as many as [cohort] size, are at work at any time; lr is the server optimiser's,
    and `exponent` 1/2 the paper's. Every update counts once, whatever its number of examples. Another
    aggregator sees the K discounted updates in place of their mean: what it keeps of them is what FedBuff
    would add. Raises SpecError unless k >= 1, concurrency >= 0 and exponent >= 0.
    """

    k: int = 10
    concurrency: int = 0
    exponent: float = 0.5
    mixes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        expect(self.k >= 1, self, "k >= 1, the arrivals that move the model")
        _check_discount(self, self.exponent, self.concurrency)

    def share(self, staleness: int) -> float:
        """Return (1 + s)^-exponent."""
        return _discount(staleness, self.exponent)


@dataclass(frozen=True)
class Asynchronous:
    """x = (1 - a) x + a y_i, a = mixing (1 + s)^-exponent, on every arrival (FedAsync, Xie et al. 2019).

    It mixes models: the direction is a (y_i - x), with y_i = D_i + the model that the client received. At
    server lr 1 this is the paper's rule with its polynomial discount. The regulariser of the paper's clients
    is the algorithm FedProx. [limits] update bounds a (y_i - x). Raises SpecError unless 0 < mixing <= 1,
    exponent >= 0 and concurrency >= 0; `concurrency` is as in `Buffered`.
    """

    mixing: float = 0.6
    exponent: float = 0.5
    concurrency: int = 0
    k: ClassVar[int] = 1
    mixes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        expect(0 < self.mixing <= 1, self, "0 < mixing <= 1, the share of a fresh model")
        _check_discount(self, self.exponent, self.concurrency)

    def share(self, staleness: int) -> float:
        """Return a."""
        return self.mixing * _discount(staleness, self.exponent)


OnArrival = Buffered | Asynchronous
Mode = Synchronous | OnArrival


def _check_discount(mode: object, exponent: float, concurrency: int) -> None:
    sound = 0 <= exponent < np.inf and concurrency >= 0
    expect(sound, mode, "exponent >= 0 and concurrency >= 0, where 0 is [cohort] size")


def _discount(staleness: int, exponent: float) -> float:
    return float((1.0 + staleness) ** -exponent)


def step_plan(mode: OnArrival, plan: Plan) -> Plan:
    """Return a training plan as one for a step: its cohort has arrived, and every update counts once.

    The buffers alone are still averaged by examples.
    """
    once = {n: v if n == "buffers" else replace(v, factor=None) for n, v in plan.vectors.items()}
    return replace(plan, vectors=once, goal=mode.k, minimum=mode.k)


def entering(
    mode: OnArrival,
    rows: Rows,
    staleness: int,
    start: Parameters,
    now: Parameters,
    space: Space = in_memory,
) -> Rows:
    """Return what enters a step of updates that started `staleness` versions ago from `start`.

    With a = mode.share(staleness) an update becomes a D, or a (D + start - now) where models are mixed, and
    its buffers b become a b + (1 - a) now. rows: vectors (k, d), which stay as they are. space: for what is
    new.
    """
    share = mode.share(staleness)
    if share == 1.0 and not mode.mixes:
        return rows
    vectors = {name: space(name, matrix.shape, matrix.dtype) for name, matrix in rows.vectors.items()}
    for name, matrix in rows.vectors.items():
        for block in blocks(matrix.shape[1]):
            wide = matrix[:, block].astype(np.float64)
            if name == "delta" and mode.mixes:
                wide += np.subtract(start.shared[block], now.shared[block], dtype=np.float64)
            wide *= share
            if name == "buffers":
                wide += (1.0 - share) * now.buffers[block]
            vectors[name][:, block] = wide
    return Rows(vectors, rows.scalars)


MODES: Mapping[str, type[Mode]] = {
    "synchronous": Synchronous,
    "buffered": Buffered,
    "asynchronous": Asynchronous,
}
