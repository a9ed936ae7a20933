"""The way from a spec's [strategy] table to a Strategy."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedcore.errors import SpecError, nearest
from fedcore.plugins import GROUPS, Parts, build, describe, installed
from fedcore.strategies.aggregators import AGGREGATORS
from fedcore.strategies.algorithms import ALGORITHMS
from fedcore.strategies.modes import MODES
from fedcore.strategies.optimizers import OPTIMIZERS
from fedcore.strategies.preaggregators import PREAGGREGATORS
from fedcore.strategies.privacy import private
from fedcore.strategies.samplers import SAMPLERS
from fedcore.strategies.strategy import Strategy

if TYPE_CHECKING:
    from fedcore.spec import RunSpec

Builders = Mapping[str, Callable[..., Any]]
# Field of a Strategy -> the kind of its parts, and ours by name.
PARTS: Mapping[str, tuple[str, Builders]] = {
    "algorithm": ("algorithm", ALGORITHMS),
    "pre": ("preaggregator", PREAGGREGATORS),
    "aggregator": ("aggregator", AGGREGATORS),
    "optimizer": ("optimizer", OPTIMIZERS),
    "sampler": ("sampler", SAMPLERS),
    "mode": ("mode", MODES),
}
# What the papers call FedAvg with one other part, as the part's place and its table.
RECIPES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "fedavg": ("algorithm", {"name": "local_sgd"}),
    "fedavgm": ("optimizer", {"name": "sgd", "momentum": 0.9}),
    "fedadagrad": ("optimizer", {"name": "adagrad"}),
    "fedadam": ("optimizer", {"name": "adam"}),
    "fedyogi": ("optimizer", {"name": "yogi"}),
    "fedexp": ("optimizer", {"name": "fedexp"}),
    "fedbuff": ("mode", {"name": "buffered"}),
    "fedasync": ("mode", {"name": "asynchronous"}),
    **{name: ("algorithm", {"name": name}) for name in ALGORITHMS},
    **{name: ("aggregator", {"name": name}) for name in AGGREGATORS},
}


# The parts of federated averaging, which a table without a name refines.
DEFAULTS = {"algorithm": "local_sgd", "aggregator": "mean", "optimizer": "sgd", "sampler": "uniform"}


def from_table(table: Mapping[str, Any], *, local: bool = False, folder: Path | None = None) -> Strategy:
    """Return the strategy that a spec's [strategy] table describes.

    `{name = "krum", f = 2}` names a recipe: federated averaging with one part exchanged, and that part's
    fields. A table for a part, such as `optimizer = {name = "adam", lr = 0.1}`, replaces that part, and so
    does `optimizer = "adam"` with its defaults; `pre` is a list of parts. A name is one of ours, an installed
    plug-in's, or, where the spec is `local`, "module:object", searched in `folder` first. Raises SpecError
    with the key and the nearest valid name, or with the conflict where parts cannot work together.
    """
    name, tables, own = _tables(table)
    base: Strategy = Strategy() if name in RECIPES else Parts("strategy", {})[name]()
    chosen: dict[str, Any] = {}
    for field, value in tables.items():
        kind, ours = PARTS[field]
        parts = Parts(kind, ours, local=local, folder=folder) if kind in GROUPS else ours
        where = "strategy" if field == own else f"strategy.{field}"
        chosen[field] = _pre(parts, value, where) if field == "pre" else build(parts, value, where)
    return replace(base, **chosen)


def strategy_of(spec: "RunSpec", *, local: bool = False, folder: Path | None = None) -> Strategy:
    """Return the strategy of a run: that of [strategy], private in the way that [privacy] says.

    local, folder: as in `from_table`. Raises SpecError, as `from_table` and `private` do.
    """
    return private(from_table(spec.strategy, local=local, folder=folder), spec)


def _tables(table: Mapping[str, Any]) -> tuple[str, dict[str, Any], str]:
    """Return the strategy's name, what is said of each part, and the part whose fields stand beside it."""
    given = dict(table)
    name = given.pop("name", "fedavg")
    tables = {field: given.pop(field) for field in PARTS if field in given}
    for field, value in tables.items():
        if isinstance(value, Mapping) and "name" not in value and field in DEFAULTS:
            recipe = RECIPES[name][1] if name in RECIPES and RECIPES[name][0] == field else {}
            tables[field] = {"name": DEFAULTS[field], **recipe, **value}
    if isinstance(name, str) and name in RECIPES:
        own, recipe = RECIPES[name]
        if own not in tables:
            return name, {own: recipe | given} | tables, own
        for key in given:
            raise SpecError(f"strategy.{key}: {own} has a table of its own; write strategy.{own}.{key}")
        return name, tables, ""
    if name not in [plugin.name for plugin in installed("strategy")]:
        raise SpecError(f"strategy.name: {name!r} is not known{nearest(str(name), RECIPES)}")
    for key in given:
        raise SpecError(f"strategy.{key}: no such part, and {name!r} has no fields{nearest(key, PARTS)}")
    return name, tables, ""


def _pre(parts: Builders, value: Any, where: str) -> tuple[Any, ...]:
    values = value if isinstance(value, list | tuple) else [value]
    return tuple(build(parts, item, f"{where}[{i}]") for i, item in enumerate(values))


def to_table(strategy: Strategy) -> dict[str, Any]:
    """Return the table from which `from_table(local=True)` builds a strategy.

    A part that is neither ours nor a plug-in's is written "module:object". Raises SpecError for one whose
    class lies in no module.
    """
    table: dict[str, Any] = {}
    for field, (kind, ours) in PARTS.items():
        parts = Parts(kind, ours) if kind in GROUPS else ours
        value = getattr(strategy, field)
        table[field] = [_named(parts, part) for part in value] if field == "pre" else _named(parts, value)
    return table


def _named(parts: Builders, part: Any) -> dict[str, Any]:
    kind = type(part)
    names = [name for name in parts if parts[name] is kind]
    if "." in kind.__qualname__:
        raise SpecError(f"{kind.__qualname__}: a spec can name it only where a module holds it")
    given = {key: value for key, value in describe(part).items() if value is not None}  # TOML has no null
    return {"name": names[0] if names else f"{kind.__module__}:{kind.__qualname__}", **given}
