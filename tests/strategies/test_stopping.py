"""When a run that does not improve any more ends, and what is told of it."""

from math import nan
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.errors import SpecError
from fedcore.spec import Evaluation
from fedcore.strategies.stopping import check, stopped_early


def rows_of(monitor: str, *values: float | None) -> list[dict[str, Any]]:
    """Return the rows of rounds from 1; None where a round was not evaluated."""
    return [{"round": i, **({} if v is None else {monitor: v})} for i, v in enumerate(values, start=1)]


def test_a_run_ends_after_so_many_evaluations_without_improvement() -> None:
    evaluation = Evaluation(patience=2)
    assert stopped_early(evaluation, rows_of("loss", 0.9, 0.31, 0.4)) == ""
    said = "stopped early: loss has not improved for 2 evaluations (best 0.31 at round 2)"
    assert stopped_early(evaluation, rows_of("loss", 0.9, 0.31, 0.4, 0.31)) == said, "a tie is no improvement"
    assert stopped_early(evaluation, rows_of("loss", 0.9, 0.31, 0.4, 0.3)) == ""


def test_any_other_metric_is_to_rise() -> None:
    evaluation = Evaluation(patience=1, monitor="accuracy")
    assert stopped_early(evaluation, rows_of("accuracy", 0.5, 0.6)) == ""
    assert "(best 0.6 at round 2)" in stopped_early(evaluation, rows_of("accuracy", 0.5, 0.6, 0.55))


def test_rounds_that_were_not_evaluated_count_for_nothing() -> None:
    evaluation = Evaluation(every=2, patience=2)
    assert stopped_early(evaluation, rows_of("loss", None, 1.0, None, 2.0, None)) == ""
    assert "at round 2" in stopped_early(evaluation, rows_of("loss", None, 1.0, None, 2.0, None, 3.0))


def test_a_model_that_is_lost_ends_too() -> None:
    assert stopped_early(Evaluation(patience=2), rows_of("loss", nan, nan)).endswith(
        "(it was never a number)"
    )
    assert "(best 1 at round 2)" in stopped_early(Evaluation(patience=1), rows_of("loss", nan, 1.0, nan))


@given(st.lists(st.floats(0, 10) | st.none(), max_size=30), st.integers(1, 5))
def test_a_run_stops_where_the_best_lies_patience_evaluations_behind(
    values: list[float | None], patience: int
) -> None:
    rows, measured = rows_of("loss", *values), [v for v in values if v is not None]
    behind = len(measured) - 1 - measured.index(min(measured)) if measured else 0
    assert bool(stopped_early(Evaluation(patience=patience), rows)) == (behind >= patience)
    assert stopped_early(Evaluation(), rows) == ""


def test_what_is_not_measured_cannot_be_monitored() -> None:
    check(Evaluation(monitor="f1"), ("loss", "accuracy"))
    check(Evaluation(patience=3, monitor="accuracy"), ("loss", "accuracy"))
    with pytest.raises(SpecError, match="'acuracy' is not measured by the task; did you mean 'accuracy'"):
        check(Evaluation(patience=3, monitor="acuracy"), ("loss", "accuracy"))
    with pytest.raises(ValueError, match="patience = 3 counts evaluations; set every >= 1"):
        Evaluation(patience=3, every=0)
