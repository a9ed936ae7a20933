"""TOML files that people write: checked against a model, with errors that name line and nearest key."""

import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict
from pydantic.fields import FieldInfo

from fedcore.errors import SpecError, nearest

MAX_LABELS, LABEL = 16, re.compile(r"[A-Za-z0-9._-]{1,64}")
QUOTED = r"'([^']*)'"  # a name in pydantic's list of valid ones
EXPECTED = {
    "bool_type": "true or false",
    "dict_type": "a table",
    "finite_number": "a finite number",
    "float_type": "a number",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "int_type": "a whole number",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "model_attributes_type": "a table",
    "model_type": "a table",
    "string_pattern_mismatch": "{description}",
    "string_type": "text in quotes",
}
"""What each kind of pydantic problem says was expected, with names of the problem's context."""


class Table(BaseModel):
    """A table of such a file: immutable, no unknown keys, and a string is no number, as TOML has types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def checked_labels(labels: dict[str, str]) -> dict[str, str]:
    """Return the labels of a device, name -> value; raises ValueError where they are too many or too long."""
    if len(labels) > MAX_LABELS or not all(map(LABEL.fullmatch, [*labels, *labels.values()])):
        raise ValueError(
            f"expected at most {MAX_LABELS} labels, names and values of 1 to 64 letters, digits and . _ -"
        )
    return labels


Labels = Annotated[dict[str, str], AfterValidator(checked_labels)]


def read_toml(path: Path) -> tuple[str, dict[str, Any]]:
    """Return a file's text and its content; raises ValueError that says why it is none, or OSError."""
    text = path.read_text(encoding="utf-8")
    try:
        return text, tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"not valid TOML: {error}") from error


def explain(
    model: type[BaseModel], problem: Any, source: str, text: str, overridden: Iterable[str] = ()
) -> str:
    """Return one line for one pydantic problem: where, the value, what was expected, the nearest name.

    source, text: the file's name and its TOML. overridden: key paths that came from `--set` instead.
    """
    keys, beside = _place(model, problem["loc"])
    if problem["type"] == "union_tag_invalid":
        keys.append(problem["ctx"]["discriminator"].strip("'"))
    path, line = ".".join(keys), line_of(text, keys)
    by_hand = any(f"{path}.".startswith(f"{key}.") or key.startswith(f"{path}.") for key in overridden)
    where = f"--set {path}" if by_hand else f"{source}:{line}: {path}" if line else f"{source}: {path}"
    if problem["type"] == "extra_forbidden":
        return f"{where}: no such key{_hint(model, keys, beside)}"
    return f"{where}: {_complaint(problem, keys[-1], beside)}"


def _complaint(problem: Any, key: str, beside: Mapping[str, FieldInfo]) -> str:
    """Return what is wrong with a value and what was expected."""
    kind, value, context = problem["type"], problem["input"], problem.get("ctx", {})
    if kind in ("literal_error", "union_tag_invalid"):
        given, valid = context.get("tag", value), context.get("expected_tags") or context["expected"]
        return f"{given!r} is not known{nearest(str(given), re.findall(QUOTED, valid))}"
    if kind == "missing":
        return f"missing; expected {beside[key].description}"
    if kind not in EXPECTED:
        given = (
            "" if isinstance(value, Mapping) else f"{value!r}: "
        )  # a validator of a whole table names its keys
        return f"{given}{problem['msg'].removeprefix('Value error, ')}"
    if kind == "string_pattern_mismatch":
        context["description"] = beside[key].description or f"a match of {context['pattern']}"
    expected = EXPECTED[kind].format(**context)
    if expected == "a table" and isinstance(value, str):
        expected += f', such as {key} = {{{beside[key].discriminator or "name"} = "{value}"}}'
    return f"{value!r}: expected {expected}"


def _hint(model: type[BaseModel], keys: list[str], beside: Mapping[str, FieldInfo]) -> str:
    """Return the hint for an unknown key: another table that has it, else the nearest key of its own.

    The other way round for a slip, such as a missing letter.
    """
    homes = [path for path in _paths(model) if path.rpartition(".")[2] == keys[-1]]
    if homes and ".".join(keys) not in homes and not get_close_matches(keys[-1], beside, cutoff=0.9):
        return f"; did you mean {homes[0]!r}?"
    if others := _variants(model, keys):
        return f"; it goes with {others}"
    return nearest(keys[-1], beside)


def _variants(model: type[BaseModel], keys: list[str]) -> str:
    """Return how to choose a model that has a key, where a table may be one of several; "" if none has it."""
    table = model.model_fields.get(keys[0])
    if table is None or not (tag := str(table.discriminator or "")):
        return ""
    having = [m.model_fields[tag].annotation for m in _models(table) if keys[-1] in m.model_fields]
    names = " or ".join(f'"{name}"' for names in having for name in get_args(names))
    return f"{keys[0]}.{tag} = {names}" if names else ""


def _paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the path of every key below a model."""
    for key, field in model.model_fields.items():
        yield prefix + key
        for inner in _models(field):
            yield from _paths(inner, f"{prefix}{key}.")


def _models(field: FieldInfo) -> list[type[BaseModel]]:
    """Return the models that a field may hold."""
    types = (field.annotation, *get_args(field.annotation))
    return [a for a in types if isinstance(a, type) and issubclass(a, BaseModel)]


def _place(model: type[BaseModel], loc: tuple[int | str, ...]) -> tuple[list[str], Mapping[str, FieldInfo]]:
    """Return the keys of a problem's place, and the fields that stand beside the last of them.

    Where a table may be one of several models, pydantic puts into `loc` the tag of the one it took, which
    is no key of the file.
    """
    keys: list[str] = []
    models: list[type[BaseModel]] = [model]
    beside: dict[str, FieldInfo] = {}
    tag = ""
    for part in map(str, loc):
        tagged = [m for m in models if tag and part in get_args(m.model_fields[tag].annotation)]
        if tagged:
            models, tag = tagged, ""
            continue
        keys.append(part)
        beside = {name: field for m in models for name, field in m.model_fields.items()}
        models = _models(beside[part]) if part in beside else []
        tag = str(beside[part].discriminator or "") if part in beside else ""
    return keys, beside


def line_of(text: str, keys: list[str]) -> int:
    """Return the line (from 1) on which a key stands in TOML text, or that of its table, or 0."""
    table: list[str] = []
    nearest_line, depth = 0, 0
    for number, line in enumerate(text.splitlines(), start=1):
        if header := re.match(r"\s*\[\[?([^\[\]]+)\]", line):
            table = [part.strip().strip("\"'") for part in header[1].split(".")]
            here = table
        elif key := re.match(r"\s*([\w.\"'-]+)\s*=", line):
            here = table + [part.strip("\"'") for part in key[1].split(".")]
        else:
            continue
        if keys[: len(here)] == here and len(here) > depth:
            nearest_line, depth = number, len(here)
    return nearest_line


def literal(text: str) -> Any:
    """Return what a text says in TOML, and a text that says nothing in TOML as it is."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def assign(table: dict[str, Any], path: str, value: Any) -> None:
    """Set `a.b.c` in place; below a part that is written as its name alone, the name becomes a table.

    Raises SpecError where the path leads through a value. Tables on the way are copied, not shared.
    """
    *above, last = path.split(".")
    for key in above:
        inner = table.get(key, {})
        if isinstance(inner, str):
            inner = {"name": inner}
        if not isinstance(inner, Mapping):
            raise SpecError(f"{path}: {key!r} is a value, not a table")
        table[key] = dict(inner)
        table = table[key]
    table[last] = value
