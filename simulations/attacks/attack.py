"""What an attack is: up to three things that malicious clients do, each a method that an attack may have.

    forge(honest, own, context) -> rows    what they send in place of their updates
    scalars(own) -> scalars                what they say about themselves
    poison(x, y, rng) -> (x, y)            what they train on

An attack is a frozen dataclass whose fields are its configuration. Throughout, h honest clients send the rows
`honest`, shape (h, d), the m malicious ones would have sent `own`, shape (m, d), n = h + m, and mu and sigma
are the mean and the standard deviation of the honest rows, coordinate by coordinate. Attackers conspire and
see everything, which is the strongest position and the one in which defences are judged.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from fedcore.encoding import BLOCK, blocks
from fedcore.layout import Vector

Deltas = NDArray[np.floating[Any]]  # one update a row
Scalars = Mapping[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Context:
    """What attackers know beside the updates of their round.

    round: its number, from 1. rng: the only source of randomness. aggregate: what the server would make of
    rows of shape (n, d), the honest ones first; returns shape (d,). clients: who sent each honest row, as
    places in the population. state: arrays that survive to the attack's next round, empty before its first.
    """

    round: int
    rng: np.random.Generator
    aggregate: Callable[[Deltas], Vector]
    clients: Sequence[int]
    state: dict[str, Vector]


@runtime_checkable
class Forges(Protocol):
    """An attack on the model: other updates than those that were trained."""

    def forge(self, honest: Deltas, own: Deltas, context: Context) -> Deltas:
        """Return the rows that the attackers send, shape (m, d) in `own`'s dtype; inputs stay as they are.

        honest: shape (h, d), h at least 1. own: shape (m, d), m at least 1. Both finite and float32 or
        float64; sums over rows or coordinates are formed in float64.
        """
        ...


@runtime_checkable
class Lies(Protocol):
    """An attack by what clients say about themselves."""

    def scalars(self, own: Scalars) -> Scalars:
        """Return the scalars that the attackers send, each of shape (m,), given the true ones."""
        ...


@runtime_checkable
class Poisons(Protocol):
    """An attack on the data that malicious clients train on."""

    def poison(self, x: Any, y: Any, rng: np.random.Generator) -> tuple[Any, Any]:
        """Return one client's poisoned examples, new arrays or tensors like the given ones."""
        ...


@runtime_checkable
class Triggered(Protocol):
    """An attack that plants a behaviour, so that its success can be measured."""

    def triggered(self, x: Any, y: Any) -> tuple[Any, Any]:
        """Return the test examples on which the behaviour shows, labelled as the attacker wants them.

        The accuracy on them is the attack's success rate.
        """
        ...


def copies(vector: Vector, own: Deltas) -> Deltas:
    """Return the same row for every attacker, in the shape and dtype of `own`."""
    return np.tile(vector.astype(own.dtype), (len(own), 1))


def mean(rows: Deltas) -> NDArray[np.float64]:
    """Return the mean row, shape (d,), summed in float64."""
    mu: NDArray[np.float64] = rows.mean(axis=0, dtype=np.float64)
    return mu


def centred(rows: Deltas, centre: Vector) -> Iterator[tuple[slice, NDArray[np.float64]]]:
    """Yield `rows - centre` in float64, block by block: the columns, and what stands there."""
    for block in blocks(rows.shape[1], max(1, BLOCK // len(rows))):
        yield block, rows[:, block] - centre[block]


def deviation(rows: Deltas, centre: Vector) -> NDArray[np.float64]:
    """Return the standard deviation of each coordinate about the mean `centre`, shape (d,).

    With h - 1 in the denominator, as the authors of the attacks compute it; 0 for a single row.
    """
    sigma = np.empty(rows.shape[1])
    for block, part in centred(rows, centre):
        sigma[block] = np.sqrt((part**2).sum(axis=0) / max(1, len(rows) - 1))
    return sigma
