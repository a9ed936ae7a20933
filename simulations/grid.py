"""A grid of runs: a spec with every combination of some values, run one by one, resumed where it stopped.

What is in a cell's folder says whether the cell is done, and nothing else does: a cell runs in `NAME.part`,
which becomes `NAME` when the run has ended, so that no kill leaves half a result that looks like a whole one.
"""

import json
import shutil
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import isfinite
from pathlib import Path
from typing import Any, Literal

from fedcore.data import PARTITIONS
from fedcore.errors import ConfigError, FedcoreError, SpecError
from fedcore.metrics import EXAMPLE_BOUND
from fedcore.plugins import Parts, build
from fedcore.privacy.claims import resolved
from fedcore.simulations.adversary import Adversary
from fedcore.simulations.attacks import ATTACKS
from fedcore.simulations.grid_cells import Axes, Cell, cells, label
from fedcore.simulations.grid_report import report, table
from fedcore.simulations.result import SPENT, make_folder, write
from fedcore.simulations.run import Progress, simulate
from fedcore.spec import RunSpec
from fedcore.strategies.catalog import strategy_of
from fedcore.strategies.conflicts import check
from fedcore.task import Task, client_name, resolve

RECORD = "grid.json"
FAILURE = "failure.txt"  # in the folder of a cell that failed: the reason, then where it happened


@dataclass(frozen=True)
class Outcome:
    """What became of a cell.

    status: `diverged` has all its rounds and a final metric at the bound of metrics, which NaN is clipped
        to; `failed` lacks rounds, and is run again when the grid is. reason: of these two. final: the last
        value of every metric, None where it is not finite. rounds: that ended. seconds: of training.
    """

    status: Literal["finished", "diverged", "failed", "not run"] = "not run"
    reason: str = ""
    final: Mapping[str, float | None] = field(default_factory=dict)
    rounds: int = 0
    seconds: float = 0.0

    @property
    def over(self) -> bool:
        """Whether to run it again would give the same."""
        return self.status in ("finished", "diverged")


@dataclass(frozen=True)
class GridProgress:
    """Where a grid is: when a cell starts, with the run's progress `now`, and with its `outcome`.

    over: cells that have ended. before: how many of them had when the grid was opened.
    """

    cell: str
    over: int
    before: int
    cells: int
    now: Progress | None = None
    outcome: Outcome | None = None


def run_grid(
    spec: RunSpec | str | Path,
    axes: Axes,
    out: str | Path,
    *,
    task: Task | None = None,
    progress: Callable[[GridProgress], None] | None = None,
) -> "Grid":
    """Run a spec with every combination of the axes' values, or what is left of them, and return the grid.

    axes: key of the spec -> its values, such as `{"strategy.aggregator": ["median", "krum"]}`. out: a folder
    for grid.json, table.csv, report.html and a folder for each cell; one that holds a part of this grid is
    continued, and failed cells are run again. task: None takes the spec's `run.task`. A cell that fails does
    not end the grid. Raises before the first run: SpecError that names the cell which is no run, TaskError,
    ConfigError where `out` holds something else.
    """
    folder = Path(spec).parent if isinstance(spec, str | Path) else None
    spec = RunSpec.load(spec) if isinstance(spec, str | Path) else spec
    grid = Grid(spec, axes, Path(out), task=task, folder=folder)
    grid.run(progress or (lambda _: None))
    return grid


class Grid:
    """The cells of a grid and what became of them."""

    def __init__(
        self, spec: RunSpec, axes: Axes, out: Path, *, task: Task | None = None, folder: Path | None = None
    ) -> None:
        """Check every cell and take the folder; nothing runs yet. Raises as `run_grid` does.

        folder: searched first for the task's module, where task is None.
        """
        self.cells = cells(spec, axes)
        for cell in self.cells:
            _compose(cell, folder)
        self.asked = _as_json({"spec": spec.model_dump(mode="json"), "axes": dict(axes)})
        references = dict.fromkeys(cell.spec.run.task for cell in self.cells)
        self.tasks = {reference: task or resolve(reference, folder) for reference in references}
        self.folder = out
        _claim(out, self.asked, self.cells)
        self.outcomes = [read_outcome(out / cell.name) for cell in self.cells]
        self.before = len(self.cells) - self.left

    @property
    def left(self) -> int:
        """How many cells another start would run."""
        return sum(not outcome.over for outcome in self.outcomes)

    @property
    def unfinished(self) -> int:
        """How many cells failed, diverged or were not run."""
        return sum(outcome.status != "finished" for outcome in self.outcomes)

    def run(self, progress: Callable[[GridProgress], None]) -> None:
        """Run the cells that are left. Ctrl-C raises KeyboardInterrupt and keeps those that have ended."""
        waiting = [place for place, outcome in enumerate(self.outcomes) if not outcome.over]
        self._save()
        try:
            for over, place in enumerate(waiting, start=self.before):
                self._run(place, over, progress)
        finally:
            (self.folder / "report.html").write_text(report(self.summary()), encoding="utf-8")

    def summary(self) -> dict[str, Any]:
        """Return what `grid.json` holds: the spec and axes as asked, and a record a cell."""
        records = [
            {"cell": cell.name, "values": _as_json(cell.values), **asdict(outcome)}
            for cell, outcome in zip(self.cells, self.outcomes, strict=True)
        ]
        return {**self.asked, "cells": records}

    def _run(self, place: int, over: int, progress: Callable[[GridProgress], None]) -> None:
        """Run one cell in place of what an earlier attempt left; an error goes into its folder."""
        cell = self.cells[place]
        home, part = self.folder / cell.name, self.folder / f"{cell.name}.part"
        at = GridProgress(cell.name, over, self.before, len(self.cells))
        progress(at)
        for old in (home, part):
            if old.exists():
                shutil.rmtree(old)
        try:
            task = self.tasks[cell.spec.run.task]
            simulate(task, cell.spec, out=part, progress=lambda now: progress(replace(at, now=now)))
        except Exception as error:  # whatever it is, the other cells go on
            reason = str(error) if isinstance(error, FedcoreError) else f"{type(error).__name__}: {error}"
            text = f"{' '.join(reason.split())}\n\n{traceback.format_exc()}"
            part.mkdir(exist_ok=True)
            (part / FAILURE).write_text(text, encoding="utf-8")
        part.rename(home)
        self.outcomes[place] = read_outcome(home)
        self._save()
        progress(replace(at, over=over + 1, outcome=self.outcomes[place]))

    def _save(self) -> None:
        """Write grid.json, all of it or nothing, and table.csv."""
        summary = self.summary()
        write(self.folder / RECORD, json.dumps(summary, indent=2) + "\n")
        (self.folder / "table.csv").write_text(table(summary), encoding="utf-8")


def _compose(cell: Cell, folder: Path | None) -> None:
    """Put together what a cell's spec names; raises SpecError where that cannot be done."""
    try:
        spec = resolved(cell.spec)
        check(strategy_of(spec, local=True, folder=folder), spec)
        build(PARTITIONS, spec.simulation.partition, "simulation.partition")
        if spec.attack:
            names = [client_name(index) for index in range(spec.simulation.clients)]
            Adversary(spec.attack, names, spec.run.seed, Parts("attack", ATTACKS, local=True, folder=folder))
    except SpecError as error:
        raise SpecError(f"cell {cell.name}: {error}") from error


def read_outcome(folder: Path) -> Outcome:
    """Return what became of a cell, from its folder."""
    failure, result = folder / FAILURE, folder / "result.json"
    if not failure.exists() and not result.exists():
        return Outcome()
    reason = failure.read_text(encoding="utf-8").partition("\n")[0] if failure.exists() else ""
    if not result.exists():
        return Outcome("failed", reason)
    summary = json.loads(result.read_text(encoding="utf-8"))
    final = summary["final"]
    measured = {name: value for name, value in final.items() if name != SPENT}
    wild = [f"{name} is {value:g}" for name, value in measured.items() if not abs(value) < EXAMPLE_BOUND]
    return Outcome(
        status="failed" if failure.exists() else "diverged" if wild else "finished",
        reason=reason or ", ".join(wild),
        final={name: value if isfinite(value) else None for name, value in final.items()},
        rounds=summary["rounds"],
        seconds=round(sum(summary["seconds_per_round"]), 3),
    )


def _claim(folder: Path, asked: Mapping[str, Any], cells: Sequence[Cell]) -> None:
    """Make a grid's folder; raises ConfigError unless it is new or holds this very grid."""
    record = folder / RECORD
    if not record.exists():
        make_folder(folder)
        if stranger := next((cell.name for cell in cells if (folder / cell.name).exists()), ""):
            raise ConfigError(
                f"{folder} holds {stranger} of a grid whose {RECORD} is gone; name another folder with --out"
            )
        return
    try:
        there = json.loads(record.read_text(encoding="utf-8"))
        difference = _difference(there, asked)
    except (ValueError, LookupError, TypeError, OSError) as error:
        raise ConfigError(f"{record}: not the record of a grid ({error}); name another folder") from error
    if difference:
        raise ConfigError(f"{folder} holds another grid: {difference}; name another folder with --out")


def _difference(there: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """Return the first thing in which the record of a grid is not what is asked, or nothing."""
    if list(there["axes"].items()) != list(asked["axes"].items()):
        return f"its axes are {_line(there['axes'])}, and not {_line(asked['axes'])}"
    # What an older version did not write had its default.
    was, now = _flat(RunSpec().model_dump(mode="json")) | _flat(there["spec"]), _flat(asked["spec"])
    for key in {**was, **now}:
        if was.get(key) != now.get(key):
            return f"{key} is {was.get(key)!r} there and {now.get(key)!r} here"
    return ""


def _line(axes: Axes) -> str:
    return " ".join(f"{key}={','.join(map(label, values))}" for key, values in axes.items())


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested tables under their dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _as_json(value: Any) -> Any:
    """Return a value as it comes back from a file."""
    return json.loads(json.dumps(value, default=str))
