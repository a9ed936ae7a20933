"""What comes in: every update is checked, then added up as integers (`words`), or kept as a row."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedcore.encoding import blocks, within
from fedcore.errors import UpdateRefused
from fedcore.layout import Vector
from fedcore.messages import Plan, Update
from fedcore.paging import passing

Space = Callable[[str, tuple[int, ...], np.dtype[Any]], NDArray[Any]]

SHORT = 1 << 13  # numbers, of which BLAS forms the product in one thread, so to the same bits everywhere


def in_memory(name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return zeros: the `Space` of whoever has memory for all that is as long as the model."""
    return np.zeros(shape, dtype)


def check(plan: Plan, update: Update) -> None:
    """Raise UpdateRefused, with the reason, unless an update is what the plan asked for.

    It has exactly the plan's vectors and scalars, in length and dtype, all finite and within bounds. So a
    single client moves a sum by no more than its bounds, and NaN never enters one.
    """
    if update.vectors.keys() != plan.vectors.keys() or update.scalars.keys() != plan.scalars.keys():
        sent = sorted([*update.vectors, *update.scalars])
        raise UpdateRefused(f"sent {sent}, expected {sorted([*plan.vectors, *plan.scalars])}")
    for name, scalar in plan.scalars.items():
        value = update.scalars[name]
        if not scalar.low <= value <= scalar.high:
            raise UpdateRefused(f"{name} is {value:g}, expected {scalar.low:g} to {scalar.high:g}")
    for name, spec in plan.vectors.items():
        vector = update.vectors[name]
        if vector.shape != (spec.length,) or vector.dtype != spec.dtype:
            expected = f"({spec.length},) {spec.dtype}"
            raise UpdateRefused(f"{name} is {vector.shape} {vector.dtype}, expected {expected}")
        if not plan.clip and not within(vector, spec.bound):
            raise UpdateRefused(f"{name} has a coordinate that is not finite or beyond {spec.bound:g}")
    if plan.clip and not (norm := joint_norm(update.vectors.values())) <= plan.clip:  # nor may it be NaN
        raise UpdateRefused(f"the update's norm is {norm:g}, expected at most {plan.clip:g}, the clip norm")


def joint_norm(vectors: Iterable[NDArray[Any]], order: int = 2) -> float:
    """Return the L2 or L1 norm of several vectors as one, summed in float64; NaN or inf if one of them is."""
    total = 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        for vector in vectors:
            for block in passing(vector, length=SHORT):
                wide = vector[block].astype(np.float64)
                total += float(wide @ wide if order == 2 else np.abs(wide).sum())
    return sqrt(total) if order == 2 else total


@dataclass(frozen=True)
class Rows:
    """The updates of k clients, one a row: vectors (k, d) and scalars (k,)."""

    vectors: Mapping[str, NDArray[np.floating[Any]]]
    scalars: Mapping[str, NDArray[np.float64]]

    @classmethod
    def of(cls, updates: Sequence[Update]) -> "Rows":
        """Return updates of the same names and shapes as rows; a single one is not copied."""
        first, *others = updates
        vectors = {
            name: np.stack([update.vectors[name] for update in updates]) if others else vector[None]
            for name, vector in first.vectors.items()
        }
        return cls(vectors, {name: np.array([u.scalars[name] for u in updates]) for name in first.scalars})

    @classmethod
    def stacked(cls, parts: Sequence["Rows"]) -> "Rows":
        """Return the rows of several, one after the other."""
        vectors = {name: np.concatenate([part.vectors[name] for part in parts]) for name in parts[0].vectors}
        scalars = {name: np.concatenate([part.scalars[name] for part in parts]) for name in parts[0].scalars}
        return cls(vectors, scalars)

    def taken(self, order: Sequence[int]) -> "Rows":
        """Return a copy with the rows in another order."""
        vectors = {name: matrix[order] for name, matrix in self.vectors.items()}
        return Rows(vectors, {name: column[order] for name, column in self.scalars.items()})

    def __len__(self) -> int:
        return len(next(iter((self.scalars or self.vectors).values())))

    def updates(self) -> Iterator[Update]:
        """Yield each row as an update."""
        for i in range(len(self)):
            vectors = {name: matrix[i] for name, matrix in self.vectors.items()}
            yield Update(vectors, {name: float(column[i]) for name, column in self.scalars.items()})


def all_pass(plan: Plan, rows: Rows) -> bool:
    """Tell whether `check` passes every row, at the cost of one pass over the numbers."""
    return (
        rows.vectors.keys() == plan.vectors.keys()
        and rows.scalars.keys() == plan.scalars.keys()
        and all(
            scalar.low <= rows.scalars[name].min() and rows.scalars[name].max() <= scalar.high
            for name, scalar in plan.scalars.items()
        )
        and all(
            rows.vectors[name].shape[1:] == (spec.length,)
            and rows.vectors[name].dtype == spec.dtype
            and (plan.clip or within(rows.vectors[name].reshape(-1), spec.bound))
            for name, spec in plan.vectors.items()
        )
        and (not plan.clip or all(joint_norm(u.vectors.values()) <= plan.clip for u in rows.updates()))
    )


class RowStore:
    """The vectors and scalars that a plan keeps client by client, a row each, in the cohort's order."""

    def __init__(self, plan: Plan, space: Space = in_memory) -> None:
        """Make room for the cohort; `space(name, shape, dtype)` places the rows."""
        self.place = {client: i for i, client in enumerate(plan.cohort)} if plan.rows else {}
        specs = {name: plan.vectors[name] for name in sorted(plan.rows)}
        self.vectors = {n: space(n, (len(plan.cohort), spec.length), spec.dtype) for n, spec in specs.items()}
        self.reported: dict[str, Mapping[str, float]] = {}

    def add(self, clients: Sequence[str], rows: Rows) -> None:
        """Keep the rows of clients that `check` passed; not called where the plan `sees` nothing."""
        places = [self.place[client] for client in clients] if self.vectors else []
        for name, matrix in self.vectors.items():
            for block in blocks(matrix.shape[1]):
                matrix[places, block] = rows.vectors[name][:, block]
        columns = {name: column.tolist() for name, column in rows.scalars.items()}
        for i, client in enumerate(clients):
            self.reported[client] = {name: column[i] for name, column in columns.items()}

    def packed(self) -> Mapping[str, Vector]:
        """Return the rows that came in, (k, d) by name, in the cohort's order whatever the order of arrival.

        Rows move up over the gaps of clients that did not answer, so that nothing is copied where all did.
        """
        clients = [client for client in self.place if client in self.reported]
        for target, client in enumerate(clients):
            if (source := self.place[client]) != target:
                for matrix in self.vectors.values():
                    matrix[target] = matrix[source]
                self.place[client] = target
        return {name: matrix[: len(clients)] for name, matrix in self.vectors.items()}

    def scalar(self, name: str) -> NDArray[np.float64]:
        """Return a scalar of every client that came in, shape (k,), in the cohort's order."""
        return np.array([self.reported[client][name] for client in self.place if client in self.reported])
