"""What stands on standard error while a simulation runs."""

import io

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fedcore.simulations.display import clock, fraction_done, picture, shown
from fedcore.simulations.run import Progress

ROW = {
    "round": 2,
    "seconds": 0.5,
    "folded": 100,
    "refused": 0,
    "train_loss": 0.4,
    "loss": 0.3,
    "accuracy": 0.9,
}


def drawn(progress: Progress, row: dict[str, float], width: int = 80) -> list[str]:
    """Return the lines that a terminal of some width shows."""
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    with console.capture() as captured:
        console.print(picture(progress, row, elapsed=10))
    return captured.get().splitlines()


def test_the_bar_fits_eighty_columns() -> None:
    first, second = drawn(Progress(3, 40, 50, 100), ROW)
    assert first.startswith("round 3/40  ━")
    assert first.rstrip().endswith("200 clients/s  2:30 left")
    assert second.rstrip() == "accuracy 0.9000  loss 0.3000  train_loss 0.4000"


def test_a_run_that_is_continued_is_timed_from_where_it_goes_on() -> None:
    """A tenth of the rest took 10 seconds."""
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    with console.capture() as captured:
        console.print(picture(Progress(22, 40, 100, 100), ROW, elapsed=10, before=0.5))
    assert captured.get().splitlines()[0].rstrip().endswith("200 clients/s  1:30 left")


def test_before_the_first_round_has_ended_nothing_is_guessed() -> None:
    first, second = drawn(Progress(1, 40, 50, 100), {})
    assert "left" not in first and "clients/s" not in first and not second.strip()


def test_away_from_a_terminal_a_round_is_a_line() -> None:
    file = io.StringIO()
    with shown(Console(file=file)) as show:
        show(Progress(2, 40, 50, 100))
        show(Progress(2, 40, 100, 100, ROW))
    line = "round  2/40  accuracy 0.9000  loss 0.3000  train_loss 0.4000  200 clients/s\n"
    assert file.getvalue() == line


def test_quiet_is_silent_at_a_terminal_too() -> None:
    file = io.StringIO()
    with shown(Console(file=file, quiet=True, force_terminal=True)) as show:
        show(Progress(2, 40, 100, 100, ROW))
    assert file.getvalue() == ""


def test_metrics_stay_until_they_are_evaluated_again() -> None:
    file = io.StringIO()
    with shown(Console(file=file, force_terminal=True, width=90)) as show:
        show(Progress(2, 40, 100, 100, ROW))
        later = {name: value for name, value in ROW.items() if name not in ("accuracy", "loss")}
        show(Progress(3, 40, 100, 100, {**later, "train_loss": 0.1}))
    assert "accuracy 0.9000  loss 0.3000  train_loss 0.1000" in file.getvalue()


@given(st.integers(1, 50), st.integers(1, 50), st.data())
def test_the_fraction_only_grows_and_ends_at_one(rounds: int, asked: int, data: st.DataObject) -> None:
    number, done = data.draw(st.integers(1, rounds)), data.draw(st.integers(1, asked))
    here = fraction_done(Progress(number, rounds, done, asked))
    assert 0 < here <= 1
    assert here <= fraction_done(Progress(number, rounds, asked, asked, {}))
    assert fraction_done(Progress(rounds, rounds, asked, asked, {})) == 1


def test_clock() -> None:
    assert [clock(s) for s in (0.2, 59.6, 61, 3725)] == ["0:00", "1:00", "1:01", "1:02:05"]
