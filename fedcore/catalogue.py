"""Every part that a run spec can name, described by what it is: fields, docstring, what it composes to."""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass, replace
from typing import Any, get_origin, get_type_hints

import numpy as np

from fedcore.errors import SpecError
from fedcore.plugins import GROUPS, Parts, installed
from fedcore.simulations.attacks import ATTACKS
from fedcore.spec import RunSpec
from fedcore.strategies import from_table
from fedcore.strategies.catalog import PARTS, RECIPES
from fedcore.strategies.encryption import hindrances
from fedcore.strategies.modes import Buffered, Synchronous
from fedcore.strategies.strategy import Strategy

KINDS: Mapping[str, Mapping[str, Any]] = {
    "strategy": RECIPES,
    **dict(PARTS.values()),
    "attack": ATTACKS,
    "task": {},
}
"""Kind -> ours by name."""

SOMETHING: Mapping[Any, Any] = {str: "x", tuple: ("x",)}
CITED = re.compile(r"[A-Z][\w'’-]+(?:(?:,| and)? [A-Z][\w'’-]+)*(?: et al\.)? (?:19|20)\d\d")


@dataclass(frozen=True)
class Entry:
    """A part as it is listed.

    sees: what of single clients the server sees for it: sums, scalars or updates. works: whether under a
    kind of protection or mode. Both empty where there is no such question. error: why a plug-in is of no use.
    """

    kind: str
    name: str
    summary: str = ""
    text: str = ""
    fields: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    source: str = ""
    sees: str = ""
    works: Mapping[str, bool] = field(default_factory=dict)
    origin: str = "fedcore"
    error: str = ""


def catalogue() -> Iterator[Entry]:
    """Yield every part, kind by kind: ours, then the plug-ins, which are imported for it.

    A recipe of ours that is called by a part's name stands for that part, and is left out.
    """
    for kind, ours in KINDS.items():
        for name, part in ours.items():
            if kind != "strategy":
                yield entry(kind, name, part)
            elif part[1] != {"name": name}:
                yield recipe(name, *part)
        for plugin in installed(kind) if kind in GROUPS else ():
            offer = Entry(kind, plugin.name, origin=plugin.distribution)
            if plugin.name in ours:
                yield replace(offer, error="the name is one of fedcore's own, which no plug-in replaces")
                continue
            try:
                yield replace(entry(kind, plugin.name, Parts(kind, ours)[plugin.name]), origin=offer.origin)
            except SpecError as error:
                yield replace(offer, error=str(error))
            except Exception as error:  # whatever it is that was offered
                reason = f"{type(error).__name__}: {error}"
                yield replace(offer, error=f"{plugin.reference} does not serve as {kind}: {reason}")


def recipe(name: str, place: str, table: Mapping[str, Any]) -> Entry:
    """Describe a recipe of ours: federated averaging with one part exchanged."""
    rest = "".join(f", {key} = {value}" for key, value in table.items() if key != "name")
    text = f"Federated averaging with {place} = {table['name']}{rest}."
    sees, works = fits(from_table({"name": name}))
    return Entry("strategy", name, text, text, sees=sees, works=works)


def entry(kind: str, name: str, part: Callable[..., Any]) -> Entry:
    """Describe a part from its class, or a recipe of a plug-in from its function."""
    text = inspect.getdoc(part) or ""
    summary = " ".join(text.split("\n\n")[0].split())
    hints = get_type_hints(part)
    known = fields(part) if is_dataclass(part) else ()
    listed = {f.name: described(f, hints[f.name]) for f in known}
    place = next((place for place, (owner, _) in PARTS.items() if owner == kind), None)
    found = Entry(kind, name, summary, text, listed, cited(text))
    if place is None and kind != "strategy":
        return found
    made: Any = example(part) if place else None
    composed: dict[str, Any] = {str(place): (made,) if place == "pre" else made}
    sees, works = fits(Strategy(**composed) if place else part())
    return replace(found, sees=sees, works=works)


def described(field: Field[Any], hint: Any) -> dict[str, Any]:
    """Return a field's type and, unless it has to be given, its default; JSON has no infinity."""
    kind = hint.__name__ if isinstance(hint, type) else re.sub(r"\b[a-z]\w*\.", "", str(hint))
    if field.default is MISSING:
        return {"type": kind}
    return {"type": kind, "default": "inf" if field.default == np.inf else field.default}


def cited(text: str) -> str:
    """Return the source that a docstring states after "Source:", or else the first work that it cites."""
    if stated := re.search(r"Source: (.+?)(?=\n\n|\Z)", text, re.DOTALL):
        return " ".join(stated[1].split()).rstrip(".")
    first = CITED.search(" ".join(text.split()))
    return first[0] if first else ""


def example(part: Any) -> Any:
    """Return a part with something for every field that has to be given."""
    needed = [f.name for f in fields(part) if f.default is MISSING and f.default_factory is MISSING]
    hints = get_type_hints(part)
    return part(**{name: SOMETHING.get(get_origin(hints[name]) or hints[name], 1) for name in needed})


def fits(strategy: Strategy) -> tuple[str, dict[str, bool]]:
    """Return what of single clients the server sees for a strategy, and what the strategy works under.

    Under secure aggregation nothing of a single client may be seen, and a cohort answers at once; under
    differential privacy the step may not hang on what clients report of themselves, either.
    """
    hidden = not any(hindrances(strategy, RunSpec(), fewest=0))
    reported = (*strategy.algorithm.trusts, *strategy.optimizer.scalars)
    return "updates" if not strategy.sums else "scalars" if strategy.sees else "sums", {
        "secure aggregation": hidden,
        "DP": hidden and not reported,
        "buffered mode": not isinstance(strategy.mode, Synchronous) or buffers(strategy),
    }


def buffers(strategy: Strategy) -> bool:
    """Tell whether a strategy's parts work with updates that arrive one by one."""
    try:
        replace(strategy, mode=Buffered())
    except SpecError:
        return False
    return True
