"""What a person sees while a ServerApp runs: how many messages, how fast; rounds are the app's own."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner

from fedcore.flower.grid import Tally

EVERY = 10.0  # seconds between two lines where there is no terminal


@contextmanager
def shown(console: Console) -> Iterator[Callable[[Tally], None]]:
    """Yield what a Fleet calls with its tally; Flower's own log lines stay, above what moves."""
    if not console.is_terminal:
        last = perf_counter()

        def print_line(tally: Tally) -> None:
            nonlocal last
            if perf_counter() - last >= EVERY:
                last = perf_counter()
                console.print(str(tally), highlight=False, soft_wrap=True)

        yield print_line
        return
    spinner = Spinner("dots", "starting")
    terminal = sys.stdout.isatty()  # otherwise what the ServerApp prints goes where it was sent
    live = Live(spinner, console=console, refresh_per_second=8, transient=True, redirect_stdout=terminal)
    with live, above():
        yield lambda tally: spinner.update(text=str(tally))


@contextmanager
def above() -> Iterator[None]:
    """Send Flower's log to the standard error of now, which a moving display has replaced."""
    handlers = [h for h in logging.getLogger("flwr").handlers if isinstance(h, logging.StreamHandler)]
    before = [handler.setStream(sys.stderr) for handler in handlers]
    try:
        yield
    finally:
        for handler, stream in zip(handlers, before, strict=True):
            if stream:
                handler.setStream(stream)
