"""Early stopping: a run ends when what it is evaluated by has not improved for a while (Prechelt 1998)."""

from collections.abc import Iterable, Mapping, Sequence
from math import isnan
from typing import Any

from fedcore.errors import SpecError, nearest
from fedcore.spec import Evaluation


def stopped_early(evaluation: Evaluation, rows: Iterable[Mapping[str, Any]]) -> str:
    """Return why a run ends after the rounds that have these rows, "" where it goes on.

    It ends once `monitor` has been measured `patience` times since it was best; the loss is best where it is
    least, every other metric where it is greatest, and NaN never is.
    """
    name, best, since = evaluation.monitor, None, 0
    for row in rows:
        if name not in row:
            continue
        value = row[name] if name == "loss" else -row[name]
        if not isnan(value) and (best is None or value < best[0]):
            best, since = (value, row["round"], row[name]), 0
        else:
            since += 1
    if not 0 < evaluation.patience <= since:
        return ""
    where = f"best {best[2]:.4g} at round {best[1]}" if best else "it was never a number"
    return f"stopped early: {name} has not improved for {since} evaluations ({where})"


def check(evaluation: Evaluation, metrics: Sequence[str]) -> None:
    """Raise SpecError unless a run that may stop early is evaluated by what it monitors."""
    if evaluation.patience and evaluation.monitor not in metrics:
        known = nearest(evaluation.monitor, metrics)
        raise SpecError(f"evaluation.monitor: {evaluation.monitor!r} is not measured by the task{known}")
