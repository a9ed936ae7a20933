"""What an audit found: attacks, each with a bound on epsilon, beside the claim."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from fedcore.privacy.events import Guarantee

Rate = tuple[float, float, float]  # estimate, lower and upper bound


@dataclass(frozen=True)
class Bound:
    """A lower bound on epsilon, and the largest that the same audit gives where every guess is right.

    kind: "any mechanism" assumes nothing (`one_run`), "this mechanism" takes it at its word but for the noise
    (`noise`), of which it shows at most `noise` times what is claimed. "estimate" is no bound.
    """

    kind: Literal["any mechanism", "this mechanism", "estimate"]
    epsilon: float
    ceiling: float = math.inf
    noise: float = math.nan

    def refutes(self, claim: float) -> bool:
        """Tell whether a claim cannot be true; an estimate refutes nothing."""
        return self.kind != "estimate" and self.epsilon > claim


@dataclass(frozen=True)
class Attack:
    """An attack on membership: what it looked at, how well it did, and the bounds that follow.

    rates: true positive rate at a false positive rate, as text. canaries: how many there were.
    """

    name: str
    canaries: int
    auc: float = math.nan
    rates: Mapping[str, Rate] = field(default_factory=dict)
    bounds: tuple[Bound, ...] = ()


@dataclass(frozen=True)
class Inversion:
    """A reconstruction of one example from one update: the relative error, 0 for the example itself."""

    name: str
    error: float

    @property
    def succeeded(self) -> bool:
        """Whether the example can be recognised: most of its energy is there."""
        return self.error < 0.5


@dataclass(frozen=True)
class Audit:
    """A claim, the attacks on it, and the verdict.

    claimed: the epsilon of the receiver at the audited setting, training alone; None where nothing is. delta:
    of the claim, or the one that bounds are given for. significance: of all bounds together.
    """

    guarantees: tuple[Guarantee, ...]
    claimed: float | None
    delta: float
    unit: str
    attacks: tuple[Attack, ...]
    inversions: tuple[Inversion, ...] = ()
    significance: float = 0.05

    @property
    def violation(self) -> bool:
        """Whether some bound is above the claim."""
        claimed = self.claimed
        return claimed is not None and any(b.refutes(claimed) for a in self.attacks for b in a.bounds)

    @property
    def bounds(self) -> list[Bound]:
        """All bounds, without the estimates."""
        return [b for a in self.attacks for b in a.bounds if b.kind != "estimate"]

    @property
    def epsilon(self) -> float:
        """The highest lower bound."""
        return max((b.epsilon for b in self.bounds), default=0.0)

    @property
    def ceiling(self) -> float:
        """The most that could have been found."""
        return max((b.ceiling for b in self.bounds), default=0.0)

    @property
    def verdict(self) -> str:
        """The result in words."""
        if self.claimed is None:
            return "no claim to refute"
        if self.violation:
            return "violation"
        return "no violation found" + (", nor could one have been" if self.ceiling <= self.claimed else "")

    def summary(self) -> dict[str, Any]:
        """Return what `audit.json` holds; infinite and undefined numbers are null."""
        head = {"verdict": self.verdict, "epsilon": self.epsilon, "ceiling": self.ceiling}
        found: dict[str, Any] = _finite(head | asdict(self))
        return found

    def to_json(self) -> str:
        """Return the summary as text."""
        return json.dumps(self.summary(), indent=2, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """Return a tree with null in place of numbers that JSON does not know."""
    match value:
        case dict():
            return {key: _finite(item) for key, item in value.items()}
        case list() | tuple():
            return [_finite(item) for item in value]
        case float() if not math.isfinite(value):
            return None
    return value
