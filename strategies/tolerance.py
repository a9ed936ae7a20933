"""How many Byzantine rows a part is made for, and which n it takes."""

from dataclasses import dataclass, replace
from typing import Self

from fedcore.errors import SpecError, expect


@dataclass(frozen=True)
class Tolerant:
    """A part made for f Byzantine rows among n; with f None, for as many as it can stand among n.

    That is less than half of them, unless a subclass says otherwise in `most`.
    """

    f: int | None = None

    def __post_init__(self) -> None:
        expect((self.f or 0) >= 0, self, "f >= 0, the number of Byzantine clients to withstand")

    def most(self, n: int) -> int:
        """Return the largest f that n rows allow; below 0 where they are too few for any."""
        return (n - 1) // 2

    def faults(self, n: int) -> int:
        """Return f for n rows."""
        return self.most(n) if self.f is None else self.f

    def check(self, n: int) -> None:
        """Raise SpecError, with the n and the f that would do, unless n rows allow f."""
        if (self.f or 0) <= self.most(n):
            return
        enough = next(m for m in range(n + 1, 1 << 62) if self.most(m) >= (self.f or 0))
        lower = f", or f <= {self.most(n)}" if self.most(n) >= 0 else ""
        raise SpecError(f"{self}: {n} rows, expected at least {enough}{lower}")

    def without(self, lost: int, n: int) -> Self:
        """Return the part for the n rows that are left when `lost` others were not finite.

        Those were Byzantine, so where n rows do not allow f any more, f goes down by their number. Without
        this, a few clients could stop a round by sending NaN.
        """
        if self.f is None or self.f <= self.most(n):
            return self
        return replace(self, f=max(0, self.f - lost))
