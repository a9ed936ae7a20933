"""What the rows of a ledger say, and what they add up to. Pure: files are `ledger.py`'s business.

A row is JSON with a `time` (seconds since 1970) and a `kind`. "ledger", the first: dataset, unit, key (hex).
"budget", the owner's limit from here on: epsilon, delta. "entry", what was reserved: the fields of `Entry`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self, get_args

import numpy as np
from numpy.typing import NDArray

from fedcore.chain import ChainBroken, Head, Row
from fedcore.errors import SpecError
from fedcore.privacy.accounting import ORDERS, rdp, rdp_epsilon
from fedcore.privacy.events import Event, Trust, Unit

EVENTS: Mapping[str, type[Event]] = {kind.__name__: kind for kind in get_args(Event)}
TOLERANCE = (
    0.01  # relative, of epsilon: another release of the accountant may bound the same history a little better
)


@dataclass(frozen=True)
class Claim:
    """What a piece of work would do to a data set.

    run, ref, by: the run, the piece of it and the identity that does it, each under a name that is the same
    on every device and over restarts. history: what this piece does. whole: what the whole run may do by its
    public schedule, this piece included. once: `history` is the whole run's, reserved when the run is
    accepted and not again.
    """

    run: str
    ref: str
    by: str
    unit: Unit
    trust: Trust
    history: tuple[Event, ...]
    whole: tuple[Event, ...]
    once: bool = False


@dataclass(frozen=True)
class Entry:
    """A claim that was granted, at `time` (seconds since 1970).

    spent: epsilon of all that the ledger holds up to here, at the ledger's delta, as the filter counts it.
    """

    sequence: int
    time: float
    run: str
    ref: str
    by: str
    trust: Trust
    history: tuple[Event, ...]
    spent: float

    @classmethod
    def read(cls, sequence: int, content: Mapping[str, Any]) -> Self:
        """Return the entry in a row of kind "entry"."""
        history = tuple(event_from_json(event) for event in content["history"])
        names = ("time", "run", "ref", "by", "trust", "spent")
        return cls(sequence, history=history, **{name: content[name] for name in names})


def event_to_json(event: Event) -> dict[str, Any]:
    """Return an event as JSON: its type's name and its fields; raises SpecError for one of another type."""
    if type(event).__name__ not in EVENTS:
        raise SpecError(f"{event!r}: a ledger cannot hold it; expected one of {', '.join(EVENTS)}")
    return {"event": type(event).__name__, **asdict(event)}


def event_from_json(content: Mapping[str, Any]) -> Event:
    """Return the event of `event_to_json`; raises ChainBroken for one that this version cannot count."""
    kind, fields = content["event"], {name: value for name, value in content.items() if name != "event"}
    if kind not in EVENTS:
        raise ChainBroken(f"event {kind!r} is unknown to this version of fedcore, so it cannot be counted")
    return EVENTS[kind](**fields)


def rdp_of(history: Iterable[Event]) -> NDArray[np.float64]:
    """Return the Renyi divergences of a history at ORDERS, shape (len(ORDERS),), float64."""
    return sum((rdp(event) for event in history), np.zeros(len(ORDERS)))


@dataclass(frozen=True)
class Account:
    """What a ledger's rows add up to.

    epsilon, delta: the owner's limit. rdp: Renyi divergences at ORDERS of all entries, shape (len(ORDERS),).
    """

    head: Head = Head()
    dataset: str = ""
    unit: Unit = "example"
    key: str = ""
    epsilon: float = 0.0
    delta: float = 0.0
    entries: int = 0
    rdp: NDArray[np.float64] = field(default_factory=lambda: np.zeros(len(ORDERS)))

    def epsilon_with(self, history: Iterable[Event] = ()) -> float:
        """Return the epsilon of all entries and of a history, at the ledger's delta."""
        total = self.rdp + rdp_of(history)
        return rdp_epsilon(total, self.delta) if total.any() else 0.0

    def after(self, row: Row, content: Mapping[str, Any]) -> "Account":
        """Return the account with one row more; raises ChainBroken where its sum does not hold."""
        known = replace(self, head=row.head)
        match content["kind"]:
            case "ledger":
                facts = {name: content[name] for name in ("dataset", "unit", "key")}
                return replace(known, **facts)
            case "budget":
                return replace(known, epsilon=content["epsilon"], delta=content["delta"])
            case "entry":
                entry = Entry.read(row.sequence, content)
                spent = self.epsilon_with(entry.history)
                if abs(spent - entry.spent) > TOLERANCE * spent or entry.spent > self.epsilon:
                    raise ChainBroken(
                        f"row {row.sequence} says that epsilon {entry.spent:.4g} of {self.epsilon:g} is "
                        f"spent; the histories up to it add up to {spent:.4g}"
                    )
                return replace(known, entries=self.entries + 1, rdp=self.rdp + rdp_of(entry.history))
            case kind:
                raise ChainBroken(f"row {row.sequence} is of kind {kind!r}, which this version does not know")
