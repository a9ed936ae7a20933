"""From a table of a run spec to an object: `{name = "dirichlet", alpha = 0.3}` -> `Dirichlet(alpha=0.3)`.

Every part of fedcore that a spec can name is a frozen dataclass whose fields are its configuration, so
one function reads them all. A name is one of ours, or one that an installed distribution offers as an entry
point of the group of its kind; `GROUPS` lists them. Nothing that an entry point names is imported before a
spec asks for it, so a plug-in that cannot be imported harms nobody else.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import KW_ONLY, MISSING, dataclass, fields, is_dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from pydantic import TypeAdapter, ValidationError

from fedcore.errors import SpecError, nearest

T = TypeVar("T")

GROUPS = {
    "strategy": "fedcore.strategies",
    "algorithm": "fedcore.algorithms",
    "preaggregator": "fedcore.preaggregators",
    "aggregator": "fedcore.aggregators",
    "optimizer": "fedcore.optimizers",
    "sampler": "fedcore.samplers",
    "attack": "fedcore.attacks",
    "task": "fedcore.tasks",
}
"""Kind of part -> the entry-point group in which distributions offer more of them."""


@dataclass(frozen=True)
class Plugin:
    """A part that an installed distribution offers: what its entry point says, nothing imported yet."""

    name: str
    reference: str
    distribution: str

    def load(self) -> Any:
        """Import the part; raises SpecError with the distribution and what went wrong."""
        return _load(EntryPoint(self.name, self.reference, ""), f"{self.name!r} of {self.distribution}")


def installed(kind: str) -> tuple[Plugin, ...]:
    """Return the plug-ins of a kind, by name; two distributions may offer the same name."""
    points = entry_points(group=GROUPS[kind])
    found = (Plugin(point.name, point.value, _distribution(point)) for point in points)
    return tuple(sorted(found, key=lambda plugin: (plugin.name, plugin.distribution)))


def _distribution(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else "an unnamed distribution"


def _load(point: EntryPoint, what: str) -> Any:
    try:
        return point.load()
    except (Exception, SystemExit) as error:
        raise SpecError(f"{what}: importing {point.value} failed: {type(error).__name__}: {error}") from error


@dataclass(frozen=True, eq=False)
class Parts(Mapping[str, Callable[..., Any]]):
    """The parts of one kind by name: ours, then the plug-ins, which never replace one of ours.

    local: also take "module:object" for a name, and import it, `folder` searched first. That runs code which
    the spec names: only for a spec of one's own, never for what came from a peer.
    """

    kind: str
    built_in: Mapping[str, Callable[..., Any]]
    _: KW_ONLY
    local: bool = False
    folder: Path | None = None

    def __getitem__(self, name: str) -> Callable[..., Any]:
        if name in self.built_in:
            return self.built_in[name]
        if ":" in name:
            return self._import(name)
        offers = [plugin for plugin in installed(self.kind) if plugin.name == name]
        if not offers:
            raise KeyError(name)
        if len(offers) > 1:
            rivals = " and ".join(plugin.distribution for plugin in offers)
            raise SpecError(f"{name!r} is offered by {rivals}; uninstall all but one")
        part: Callable[..., Any] = offers[0].load()
        return part

    def _import(self, reference: str) -> Callable[..., Any]:
        if not self.local:
            raise SpecError(
                f"{reference!r}: only a simulation imports module:object; elsewhere install the {self.kind} "
                "as a plug-in and write its name (`fedcore new --strategy DIR` makes one)"
            )
        if not EntryPoint.pattern.fullmatch(reference) or reference.endswith(":"):
            raise SpecError(f'{reference!r}: expected "module:object", such as "rules:Mine"')
        if self.folder is not None and str(self.folder.resolve()) not in sys.path:
            sys.path.insert(0, str(self.folder.resolve()))
        part: Callable[..., Any] = _load(EntryPoint("", reference, ""), repr(reference))
        return part

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (name in self.built_in or ":" in name or name in set(self))

    def __iter__(self) -> Iterator[str]:
        return iter({**self.built_in, **{plugin.name: None for plugin in installed(self.kind)}})

    def __len__(self) -> int:
        return len(list(iter(self)))


def build(parts: Mapping[str, Callable[..., T]], table: Mapping[str, Any] | str, where: str) -> T:
    """Return the part that `table["name"]` names, made with the table's other keys as fields.

    parts: name -> frozen dataclass. table: a bare name is short for {name = "..."}; a list in it becomes a
    tuple, as a frozen field should be. where: the table's place in the spec, for messages.
    Raises SpecError with the key, what was expected and the nearest valid name.
    """
    if not isinstance(table, Mapping | str):
        raise SpecError(f'{where}: {table!r}: expected a name, or a table such as {{name = "..."}}')
    given = {"name": table} if isinstance(table, str) else dict(table)
    name = given.pop("name", None)
    if not isinstance(name, str) or name not in parts:
        raise SpecError(f"{where}.name: {name!r} is not known{nearest(str(name), parts)}")
    try:
        part = parts[name]
    except SpecError as error:
        raise SpecError(f"{where}.name: {error}") from error
    if not _is_part(part):
        raise SpecError(f"{where}.name: {name!r} is {part!r}, expected a class that is a frozen dataclass")
    hints, known = get_type_hints(part), {f.name: f for f in fields(part)}  # type: ignore[arg-type]
    for key, value in given.items():
        if key not in known:
            raise SpecError(f"{where}.{key}: {name!r} has no field {key!r}{nearest(key, known)}")
        try:
            given[key] = TypeAdapter(hints[key]).validate_python(_frozen(value), strict=True)
        except ValidationError as error:
            raise SpecError(f"{where}.{key}: {value!r}: {error.errors()[0]['msg']}") from error
    for key, field in known.items():
        required = field.default is MISSING and field.default_factory is MISSING
        if key not in given and required:
            kind = getattr(hints[key], "__name__", hints[key])  # a union has no name
            raise SpecError(f"{where}.{key}: {name!r} needs {key!r}, a {kind}")
    return part(**given)


def _is_part(value: object) -> bool:
    return isinstance(value, type) and is_dataclass(value)


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def describe(part: Any) -> dict[str, Any]:
    """Return the table of a part that `build` made, defaults included and without its name."""
    return {field.name: getattr(part, field.name) for field in fields(part)}
