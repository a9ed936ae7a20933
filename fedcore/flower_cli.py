"""`fedcore flower`: apps written for Flower, as they are."""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from fedcore.flower.run import Outcome

app = typer.Typer(name="flower", help="Flower apps, unchanged.", no_args_is_help=True)

RunConfig = Annotated[
    list[str] | None,
    typer.Option("--run-config", "-c", help="'key=value key2=value2', or a TOML file."),
]
LargestWeight = Annotated[
    float | None,
    typer.Option(help="Refuse replies whose num-examples is larger.", show_default="no limit"),
]


@app.callback()
def flower() -> None:
    """Flower apps, unchanged."""


@app.command()
def run(
    folder: Annotated[
        Path,
        typer.Argument(metavar="APP_DIR", help="The folder with its pyproject.toml.", show_default=False),
    ],
    run_config: RunConfig = None,
    nodes: Annotated[int, typer.Option("--num-supernodes", help="Nodes, each with a partition-id.")] = 10,
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0: as many as are worth it.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of all random numbers: the same run again.")] = 0,
    largest_weight: LargestWeight = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a summary as JSON, and nothing else on standard output.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> None:
    """Simulate a Flower app: its ServerApp here, its ClientApps in worker processes that stay alive.

    Replies with nan or infinite arrays, or a num-examples that is no weight, reach the strategy as errors.

    [bold]Examples[/bold]

    fedcore flower run my-app

    fedcore flower run my-app --num-supernodes 100 --run-config "num-server-rounds=5 lr=0.05"

    fedcore flower run my-app --seed 1 --largest-weight 10000 --json
    """
    from fedcore.flower.app import App
    from fedcore.flower.guards import Limits
    from fedcore.flower.progress import shown
    from fedcore.flower.run import simulate

    read, limits = App.read(folder, run_config or ()), Limits(largest_weight)
    with out_of_the_way(as_json), shown(Console(stderr=True, quiet=quiet)) as notice:
        outcome = simulate(read, nodes, seed=seed, workers=workers, limits=limits, notice=notice)
    show(outcome, as_json)


def submit_app(
    folder: Path, home: Path, run_config: Sequence[str], largest_weight: float | None, as_json: bool
) -> None:
    """Run an app on the coordinator of an operator's folder `home`, as `fedcore run submit --flower` does."""
    from fedcore.flower.app import App
    from fedcore.flower.guards import Limits
    from fedcore.flower.mail import Mail
    from fedcore.flower.progress import shown
    from fedcore.flower.run import deploy
    from fedcore.operator import Operator

    read, limits = App.read(folder, run_config), Limits(largest_weight)
    with Operator.connect(home) as operator:
        mail = Mail.open(operator, read)
        typer.echo(f"run {mail.run}: the ServerApp of {read.name} runs here; Ctrl-C stops it", err=True)
        with out_of_the_way(as_json), shown(Console(stderr=True)) as notice:
            outcome = deploy(read, mail, limits, notice)
    show(outcome, as_json)


@contextmanager
def out_of_the_way(as_json: bool) -> Iterator[None]:
    """Send what the ServerApp and its child processes print to standard error, where a summary is asked."""
    if not as_json:
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def show(outcome: "Outcome", as_json: bool) -> None:
    """Print what became of a run's messages, for people or as JSON."""
    if as_json:
        typer.echo(json.dumps(outcome.summary()))
        return
    rows = {"messages": str(outcome.tally), "seconds": f"{outcome.seconds:.1f}"}
    if outcome.nodes:
        rows["nodes"] = f"{outcome.nodes:,} in {outcome.workers} worker processes"
    for name, value in rows.items():
        Console().print(Text.assemble((name.ljust(10), "dim"), value), soft_wrap=True)
