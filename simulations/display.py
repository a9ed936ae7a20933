"""What a person sees while a simulation runs: a bar at a terminal, a line a round anywhere else."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from time import perf_counter
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.constrain import Constrain
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedcore.simulations.result import clients_of, metrics_of

if TYPE_CHECKING:
    from fedcore.simulations.run import Progress

Show = Callable[["Progress"], None]
WIDTH = 100  # columns; a longer bar says no more


@contextmanager
def shown(console: Console) -> Iterator[Show]:
    """Yield what a simulation calls with its progress; at a terminal, it moves until the block ends."""
    if not console.is_terminal:
        yield lambda progress: print_round(console, progress)
        return
    view = View()
    with Live(get_renderable=view.render, console=console, refresh_per_second=8):
        yield view.update


class View:
    """The latest progress, drawn by the display's own clock: a call costs the simulation next to nothing."""

    def __init__(self) -> None:
        self.latest: Progress | None = None
        self.row: Mapping[str, Any] = {}
        self.started = 0.0
        self.before = 0.0  # the part of the run that an earlier process did

    def update(self, progress: "Progress") -> None:
        """Take the progress of a run."""
        if self.latest is None:
            self.started, self.before = perf_counter(), (progress.round - 1) / progress.rounds
        self.latest = progress
        self.row = {**self.row, **(progress.row or {})}  # metrics stay until they are evaluated again

    def render(self) -> RenderableType:
        """Return what to draw now."""
        if self.latest is None:
            return Text("preparing the clients", style="dim")
        return picture(self.latest, self.row, perf_counter() - self.started, self.before)


def picture(
    progress: "Progress", row: Mapping[str, Any], elapsed: float, before: float = 0.0
) -> RenderableType:
    """Return two lines: how far the run is and how fast; the metrics of the last rounds.

    row: the newest value of every metric, empty before the first round ends. elapsed: seconds, since the part
    `before` of the run was done.
    """
    fraction = fraction_done(progress)
    left = time_left(elapsed, (fraction - before) / (1 - before)) if row else ""
    line = bar(f"round {progress.round}/{progress.rounds}", fraction, speed(row), left)
    return Constrain(Group(line, Text(values(row), style="cyan")), WIDTH)


def bar(head: str, fraction: float, *texts: str) -> Table:
    """Return a line: what is counted, a bar for the fraction from 0 to 1 that is done, and some texts."""
    line = Table.grid(padding=(0, 2), expand=True)
    for ratio in (None, 1, *(None for _ in texts)):
        line.add_column(ratio=ratio, no_wrap=True)
    moving = ProgressBar(total=1.0, completed=fraction, complete_style="cyan", finished_style="green")
    line.add_row(Text(head, style="bold"), moving, *(Text(text, style="dim") for text in texts))
    return line


def time_left(elapsed: float, fraction: float) -> str:
    """Return what is left as text if the fraction took so many seconds, or what all took at the end."""
    return clock(elapsed) if fraction == 1 else f"{clock(elapsed * (1 - fraction) / fraction)} left"


def fraction_done(progress: "Progress") -> float:
    """Return the part of the whole run that is done, from 0 to 1."""
    return (progress.round - 1 + progress.done / progress.asked) / progress.rounds


def values(row: Mapping[str, Any]) -> str:
    """Return a round's metrics as text, the task's own before the losses."""
    return "  ".join(f"{name} {value:.4f}" for name, value in metrics_of(row).items())


def speed(row: Mapping[str, Any]) -> str:
    """Return a round's clients per second as text, or nothing before a round has ended."""
    return f"{clients_of(row) / row['seconds']:,.0f} clients/s" if row else ""


def clock(seconds: float) -> str:
    """Return a duration as people read clocks, such as 0:07 or 1:02:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def print_round(console: Console, progress: "Progress") -> None:
    """Print the line of a round that has ended."""
    if progress.row:
        number = f"{progress.round:>{len(str(progress.rounds))}}"
        line = f"round {number}/{progress.rounds}  {values(progress.row)}  {speed(progress.row)}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
