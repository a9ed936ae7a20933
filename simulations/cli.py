"""`fedcore simulate` and `fedcore new`."""

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from fedcore.errors import MissingExtra, RunFailed, SpecError
from fedcore.interrupts import terminable

if TYPE_CHECKING:
    from fedcore.simulations.result import Result
    from fedcore.spec import RunSpec

app = typer.Typer(help="Federations on this machine.", no_args_is_help=True)

PANEL = "Simulate on this machine"


@app.command(rich_help_panel=PANEL)
def simulate(
    path: Annotated[
        Path | None, typer.Argument(metavar="SPEC.toml", help="The run spec.", show_default=False)
    ] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="key=value, as run.rounds=3.")] = None,
    engine: Annotated[
        str | None,
        typer.Option(metavar="auto|sequential|vectorized|processes|ray", help="As simulation.engine."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="As run.seed.")] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option("--grid", metavar="KEY=VALUE,...", help="Run every combination of such values."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results; runs/NAME-TIME if left out.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Continue the run in this folder, of an earlier --out.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print result.json, or grid.json, and nothing else.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> None:
    """Simulate a federation; get its model, metrics and report.

    Progress goes to standard error, results to standard output. Ctrl-C keeps the rounds that are finished.
    A run that was cut short goes on with --resume, to the same bits. A grid does if it is started again with
    the same --out.

    [bold]Examples[/bold]

    fedcore simulate run.toml

    fedcore simulate run.toml --set client.epochs=5 --set 'simulation.partition={name="shards", k=2}'

    fedcore simulate run.toml --seed 1 --out runs/second --json --quiet

    fedcore simulate run.toml --grid client.optimizer.lr=0.1,0.3 --grid run.seed=0,1,2 --out runs/lr

    fedcore simulate --resume runs/second --set run.rounds=200
    """
    from fedcore.spec import RunSpec

    console = Console(stderr=True, quiet=quiet)
    if resume:
        if path or engine or grid or out or seed is not None:
            raise SpecError(
                f"--resume continues the run in {resume} as it was; of all other options only "
                "--set run.rounds=N, --json and --quiet go with it"
            )
        rounds = asked_rounds(overrides or ())
        with redirect_stdout(sys.stderr):
            result = run_on(resume, rounds, console)
        print_result(result, resume, as_json)
        return
    if path is None:
        raise SpecError("expected a SPEC.toml, or --resume DIR for a run that was cut short")
    engines = [f"simulation.engine={engine}"] if engine else []
    seeds = [] if seed is None else [f"run.seed={seed}"]
    spec = RunSpec.load(path, [*(overrides or ()), *engines, *seeds])
    folder = out or Path("runs") / f"{spec.run.name}-{datetime.now():%Y%m%d-%H%M%S}"
    if grid:
        run_grid(path, spec, grid, folder, console, as_json)
        return
    with redirect_stdout(sys.stderr):  # what the task prints is no result
        result = run(path, spec, folder, console)
    print_result(result, folder, as_json)


@app.command(rich_help_panel=PANEL)
def new(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to make.", show_default=False)],
    strategy: Annotated[
        bool, typer.Option("--strategy", help="Make a package with a part of a strategy instead.")
    ] = False,
) -> None:
    """Make a project of your own: a task, a run spec, a test.

    [bold]Examples[/bold]

    fedcore new my-project && cd my-project && fedcore simulate run.toml

    fedcore new --strategy my-rule && cd my-rule && python -m pytest
    """
    from fedcore.projects import new_project, new_strategy

    for written in (new_strategy if strategy else new_project)(folder):
        typer.echo(f"wrote  {written}")
    typer.echo(f"next   cd {shlex.quote(str(folder))}")
    typer.echo("       python -m pytest" if strategy else "       fedcore simulate run.toml")


def run(path: Path, spec: "RunSpec", folder: Path, console: Console) -> "Result":
    """Simulate the spec that was read from `path`, with the results in `folder`.

    Raises KeyboardInterrupt and RunFailed with what is kept of the run.
    """
    from fedcore.simulations.display import shown
    from fedcore.simulations.result import make_folder
    from fedcore.task import resolve

    with shown(console) as progress:
        with simulation_extra():
            from fedcore.simulations.run import simulate
        drawable()
        task = resolve(spec.run.task, path.parent)
        make_folder(folder)
        with cut_short(folder):
            return simulate(task, spec, out=folder, progress=progress, project=path.parent)


def run_on(folder: Path, rounds: int, console: Console) -> "Result":
    """Continue the run in a folder up to so many rounds, 0 for its own, as `run` does."""
    from fedcore.simulations.display import shown

    with simulation_extra():
        from fedcore.simulations.resume import left, resume
    drawable()
    spec, _, done = left(folder, rounds)
    console.print(f"{done} of {spec.run.rounds} rounds were done before", highlight=False)
    with shown(console) as progress, cut_short(folder):
        return resume(folder, rounds=rounds, progress=progress)


def asked_rounds(overrides: Sequence[str]) -> int:
    """Return the `run.rounds` that --set asks of a run that is continued, 0 for its own.

    Raises SpecError for any other key, as the result would be that of neither spec.
    """
    from fedcore.spec import RunSpec

    for item in overrides:
        if item.partition("=")[0].strip() != "run.rounds":
            raise SpecError(f"--set {item!r}: only run.rounds may change in a run that is continued")
    return RunSpec.parse({}, overrides).run.rounds if overrides else 0


@contextmanager
def cut_short(folder: Path) -> Iterator[None]:
    """End at SIGTERM as at Ctrl-C, and say what is kept of a run that ends early."""
    try:
        with terminable():
            yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; {kept(folder)}") from None
    except RunFailed as error:
        raise RunFailed(f"{error}; {kept(folder)}") from error


def run_grid(
    path: Path, spec: "RunSpec", options: list[str], folder: Path, console: Console, as_json: bool
) -> None:
    """Run the grid of the `--grid` options, or what is left of it, and print what it came to.

    Raises KeyboardInterrupt with what is kept, and RunFailed where a cell did not finish.
    """
    from fedcore.simulations.grid_cells import read_axes
    from fedcore.simulations.grid_display import grid_shown

    axes = read_axes(options)
    with redirect_stdout(sys.stderr), grid_shown(console) as progress:
        with simulation_extra():
            from fedcore.simulations.grid import Grid
        grid = Grid(spec, axes, folder, folder=path.parent)
        if grid.before:
            console.print(f"{grid.before} of {len(grid.cells)} cells were done before", highlight=False)
        try:
            grid.run(progress)
        except KeyboardInterrupt:
            done = f"{len(grid.cells) - grid.left} of {len(grid.cells)} cells are done and kept in {folder}"
            again = f"the same command with --out {shlex.quote(str(folder))} goes on"
            raise KeyboardInterrupt(f"interrupted; {done}; {again}") from None
    if as_json:
        typer.echo((folder / "grid.json").read_text(encoding="utf-8"), nl=False)
    else:
        show_grid(grid.summary(), folder)
    if grid.unfinished:
        raise RunFailed(
            f"{grid.unfinished} of {len(grid.cells)} cells did not finish; see {folder / 'table.csv'}"
        )


@contextmanager
def simulation_extra() -> Iterator[None]:
    """Name the extra to install where an import of the block fails."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingExtra(str(error.name), "simulation") from error


def drawable() -> None:
    """Raise MissingExtra where the report could not be drawn: now, and not after an hour of training.

    The import itself, of a third of a second, waits until there is something to draw.
    """
    if find_spec("matplotlib") is None:
        raise MissingExtra("matplotlib", "simulation")


def kept(folder: Path) -> str:
    """Say how many rounds a run that was cut short has left, and where."""
    metrics = folder / "metrics.jsonl"
    if not metrics.exists():
        return "no round had ended, so nothing is kept"
    rounds = len(metrics.read_text(encoding="utf-8").splitlines())
    again = f"fedcore simulate --resume {shlex.quote(str(folder))} goes on"
    return f"{rounds} round{'s' * (rounds > 1)} and the model after them are kept in {folder}; {again}"


def print_result(result: "Result", folder: Path, as_json: bool) -> None:
    """Print what a run reached, for people or as JSON."""
    if as_json:
        typer.echo((folder / "result.json").read_text(encoding="utf-8"), nl=False)
        return
    summary = result.summary()
    rows = {name: f"{value:.4f}" for name, value in result.final.items()}
    if summary["stopped_early"]:
        rows["ended"] = summary["stopped_early"]
    rows |= {
        "speed": f"{summary['clients_per_second']:,.0f} clients/s",
        "seconds": f"{sum(summary['seconds_per_round']):.1f} of training in {summary['rounds']} rounds",
        "engine": f"{result.engine} ({result.reason})",
        "model": f"{summary['parameters']:,} parameters, SHA-256 {summary['model_sha256']}",
        "files": str(folder),
        "report": str(folder / "report.html"),
    }
    width = max(map(len, rows)) + 2
    for name, value in rows.items():
        Console().print(Text.assemble((name.ljust(width), "dim"), value), soft_wrap=True)


def show_grid(summary: Mapping[str, Any], folder: Path) -> None:
    """Print a line for each cell of a grid, and where its files are."""
    from fedcore.simulations.grid_report import lines

    for line, cell in zip(lines(summary), [None, *summary["cells"]], strict=True):
        style = "dim" if cell is None else "red" if cell["status"] != "finished" else ""
        Console().print(Text(line, style), soft_wrap=True)
    for name, value in {"table": "table.csv", "report": "report.html"}.items():
        Console().print(Text.assemble((name.ljust(8), "dim"), str(folder / value)), soft_wrap=True)
