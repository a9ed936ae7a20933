"""The sums of a round as words: unsigned integers that are added modulo a power of two, masked or not.

    narrow   uint16 or uint32: vectors with a bounded norm, rotated, under the encodings q16 and q32
    wide     uint64: everything else; scalars follow the vectors

The sum of all clients' words stands for the sum of their terms, `factor * vector`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from fedcore.encoding import (
    BLOCK,
    INEXACT,
    Narrow,
    add_encoded,
    add_rotated,
    decode,
    decode_rotated,
    signed,
    within,
)
from fedcore.errors import UpdateRefused
from fedcore.messages import Plan, Term, Update
from fedcore.paging import passing
from fedcore.privacy import distributed
from fedcore.strategies.terms import Rows, Space, in_memory, joint_norm


@dataclass(frozen=True)
class Words:
    """What one client adds, or what a cohort has added; shapes (plan.narrow,) and (plan.wide,)."""

    narrow: Narrow
    wide: NDArray[np.uint64]

    @classmethod
    def read(cls, plan: Plan, raw: NDArray[np.uint8]) -> "Words":
        """Return views of the bytes of words, shape (plan.payload,): narrow, then wide, little-endian."""
        end = plan.narrow * plan.word.itemsize
        return cls(raw[:end].view(plan.word.newbyteorder("<")), raw[end:].view("<u8"))

    def write(self, file: IO[bytes]) -> None:
        """Write what `read` reads."""
        for words in (self.narrow, self.wide):
            file.write(np.ascontiguousarray(words, words.dtype.newbyteorder("<")).data)


def encoded(plan: Plan, update: Update) -> Words:
    """Return what one client adds to the sums; the update has passed `check`."""
    sums = Accumulator(plan)
    sums.add(update)
    return sums.words


class Accumulator:
    """The sums of a plan's terms, over any number of updates.

    Adding is exact, so order and grouping do not matter: with the words of another accumulator of the plan it
    is the one that saw the updates of both.
    """

    def __init__(self, plan: Plan, space: Space = in_memory) -> None:
        """Start at zero; `space` places the words, "narrow" and "wide", and what narrow ones stand for."""
        self.plan, self.space = plan, space
        self.terms = {term.name: term for term in plan.terms}
        self.shifts = {term.name: plan.shift(term) for term in plan.terms}
        self._narrow: Narrow = space("narrow", (plan.narrow,), plan.word)
        self._wide: NDArray[np.uint64] = space("wide", (plan.wide,), np.dtype(np.uint64))
        self._signed = self._wide.view(np.int64)
        self._scalars = self._signed[plan.wide - len(plan.scalars) :]
        self._vectors = [(term, self.integers(term.name)) for term in plan.terms if term.vector]
        self._limits = _limits(plan, self.shifts)
        self._unrotated: dict[str, NDArray[np.float64]] = {}

    @property
    def words(self) -> Words:
        """The sums themselves, to be changed in place."""
        self._unrotated.clear()
        return Words(self._narrow, self._wide)

    def integers(self, name: str) -> NDArray[Any]:
        """Return the words of a term, a view: narrow ones as they are, wide ones as int64."""
        place = self.plan.places[name]
        return self._narrow[place] if self.plan.is_narrow(self.terms[name]) else self._signed[place]

    def add(self, update: Update) -> None:
        """Add an update that `check` passed."""
        self.add_rows(Rows.of([update]))

    def add_rows(self, rows: Rows) -> None:
        """Add k updates that `check` passes, to the same integers as one by one."""
        self._unrotated.clear()
        plan = self.plan
        columns = np.array([rows.scalars[name] * 2.0 ** self.shifts[name] for name in plan.scalars])
        self._scalars += np.rint(columns).astype(np.int64).sum(axis=-1)
        for term, total in self._vectors:
            matrix, shift = rows.vectors[term.name], self.shifts[term.name]
            if plan.distributed:
                total += matrix.sum(axis=0, dtype=total.dtype)
                continue
            factors = rows.scalars[term.factor] if term.factor else np.ones(len(rows))
            if term.name in self._limits:
                factors = factors * self._scales(term.name, rows)
            if plan.is_narrow(term):
                add_rotated(total, matrix, factors, shift, plan.rotation(term))
            else:
                add_encoded(total, matrix, factors, shift)

    def add_words(self, words: Words) -> None:
        """Add what clients have encoded, and perhaps masked, or the sums of others."""
        self._unrotated.clear()
        for total, added in ((self._narrow, words.narrow), (self._wide, words.wide)):
            for block in passing(total, added, length=BLOCK):
                total[block] += added[block]

    def _scales(self, name: str, rows: Rows) -> NDArray[np.float64]:
        """Return by what each of k vectors is multiplied so that its norm is within its limit, shape (k,)."""
        names = tuple(self.plan.vectors) if self.plan.clip else (name,)
        norms = [joint_norm(rows.vectors[each][i] for each in names) for i in range(len(rows))]
        return np.array([min(1.0, self._limits[name] / norm) if norm else 1.0 for norm in norms])

    def scalar(self, name: str) -> float:
        """Return the sum of a scalar term."""
        return int(self.integers(name)[0]) * 2.0 ** -self.shifts[name]

    def vector(self, name: str, block: slice) -> NDArray[np.float64]:
        """Return a block of the sum of a vector term; a narrow one is rotated back as a whole, once."""
        shift, term = self.shifts[name], self.terms[name]
        if not self.plan.is_narrow(term):
            return decode(self.integers(name)[block], shift)
        if name not in self._unrotated:
            self._unrotate(term)
        return self._unrotated[name][block].copy()

    def _unrotate(self, term: Term) -> None:
        """Decode a narrow term, or all of them where clients rotate them as one."""
        made = self.plan.distributed
        words = self._narrow if made else self.integers(term.name)
        vector = self.space(f"{term.name} decoded", words.shape, np.dtype(np.float64))
        if made:
            distributed.decode(words, made, vector)
            self._unrotated = {each: vector[place] for each, place in self.plan.places.items()}
        else:
            decode_rotated(words, self.shifts[term.name], self.plan.rotation(term), vector)
            self._unrotated[term.name] = vector


def _limits(plan: Plan, shifts: Mapping[str, int]) -> dict[str, float]:
    """Return the norm to which each vector is scaled down on its way into a sum, where it has one.

    Under client-level differential privacy all vectors of an update are within the clip norm together, and
    must be so after their rounding in narrow words too, since this is what the noise has to cover. For wide
    ones `check` is enough.
    """
    if not plan.clip:
        return {name: vector.norm for name, vector in plan.vectors.items() if vector.norm}
    if not plan.narrow:
        return {}
    rounded = sqrt(sum(v.length * 4.0 ** -shifts[name] for name, v in plan.vectors.items())) / 2
    return dict.fromkeys(plan.vectors, (plan.clip - rounded) / INEXACT)


def check_sum(plan: Plan, sums: Accumulator, clients: int) -> None:
    """Raise UpdateRefused unless sums over so many clients can be those of updates that `check` passes.

    All that can be checked where single updates are not seen: scalars are within `clients` times their
    range; coordinates and norms within the sum of the weights times their bound, and what rounding adds.
    """
    for name, scalar in plan.scalars.items():
        total, slack = sums.scalar(name), clients * 2.0 ** -sums.shifts[name]
        low, high = clients * scalar.low, clients * scalar.high
        if not low - slack <= total <= high + slack:
            raise _impossible(f"the sum of {name}", f"{total:g}", f"{low:g} to {high:g}", clients)
    if made := plan.distributed:
        norm, most = joint_norm([signed(sums.words.narrow)]), distributed.largest_norm(made, clients)
        if norm > most:
            raise _impossible("the norm of the sum", f"{norm:g}", f"at most {most:g}", clients)
    for name, term in sums.terms.items():
        if term.vector is None or made:
            continue
        vector, step, integers = plan.vectors[term.vector], 2.0 ** -sums.shifts[name], sums.integers(name)
        weight = INEXACT * (sums.scalar(term.factor) if term.factor else clients)
        most = weight * vector.norm + clients * step * sqrt(vector.length)
        if vector.norm and (norm := joint_norm([signed(integers)]) * step) > most:
            raise _impossible(f"the norm of the sum of {name}", f"{norm:g}", f"at most {most:g}", clients)
        most = weight * vector.bound + clients * step
        if not plan.is_narrow(term) and not within(integers, most / step):
            raise _impossible(f"the sum of {name}", "larger", f"coordinates up to {most:g}", clients)


def _impossible(what: str, found: str, expected: str, clients: int) -> UpdateRefused:
    return UpdateRefused(
        f"{what} of {clients} clients is {found}, expected {expected}; "
        "one of them at least sent what it should not"
    )
