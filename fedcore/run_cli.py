"""`fedcore run`: submit runs to a coordinator, watch them, fetch their models."""

import json
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedcore.errors import SpecError
from fedcore.flower_cli import LargestWeight, RunConfig, submit_app

if TYPE_CHECKING:
    from fedcore.spec import RunSpec
    from fedcore.wire.v1.coordinator_pb2 import RunInfo

app = typer.Typer(
    name="run",
    help="Runs on a coordinator: submit, list, show, watch, stop, download.",
    no_args_is_help=True,
)

Dir = Annotated[
    Path, typer.Option("--dir", envvar="FEDCORE_OPERATOR", help="Folder that 'fedcore run enroll' made.")
]
Run = Annotated[str, typer.Argument(help="The run's id, or its name if only one has it.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
HOME = Path("operator")


@app.command()
def enroll(
    token: Annotated[str, typer.Argument(help="Token of role operator, or @FILE.", show_default=False)],
    coordinator: Annotated[str, typer.Option(help="HOST:PORT of the coordinator.", show_default=False)],
    folder: Dir = HOME,
) -> None:
    """Become an operator: exchange a token for a certificate.

    [bold]Examples[/bold]

    fedcore run enroll @alice.token --coordinator federation.example.org:8710
    """
    from fedcore.operator import enrol_operator
    from fedcore.wire.token import read_token

    identity = enrol_operator(folder, read_token(token), coordinator)
    typer.echo(f"operator {identity.name}, certificate until {identity.not_after:%Y-%m-%d}")
    typer.echo(f"root     SHA-256 {identity.root_fingerprint}")
    typer.echo(f"next     fedcore run submit SPEC.toml --dir {folder}")


@app.command()
def submit(
    path: Annotated[Path | None, typer.Argument(metavar="SPEC.toml", show_default=False)] = None,
    folder: Dir = HOME,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="key=value, as run.rounds=3.")] = None,
    follow: Annotated[bool, typer.Option("--watch", help="Stay and show the rounds.")] = False,
    flower: Annotated[
        Path | None,
        typer.Option(metavar="APP_DIR", help="Run a Flower app instead: its ServerApp here, until it ends."),
    ] = None,
    run_config: RunConfig = None,
    largest_weight: LargestWeight = None,
    as_json: Json = False,
) -> None:
    """Hand in a run: the task is imported here, and only its name and digest leave this machine.

    A Flower app stays in the foreground: its ServerApp is a part of this process. Ctrl-C stops the run.

    [bold]Examples[/bold]

    fedcore run submit run.toml --watch

    fedcore run submit run.toml --set run.rounds=3 --set cohort.size=4

    fedcore run submit --flower my-app --run-config "num-server-rounds=5" --largest-weight 10000
    """
    if flower:
        if path or overrides:
            raise SpecError("--flower takes no SPEC.toml and no --set; --run-config changes its run config")
        submit_app(flower, folder, run_config or (), largest_weight, as_json)
        return
    if path is None or run_config or largest_weight:
        raise SpecError("expected a SPEC.toml, or --flower APP_DIR, which --run-config and its like go with")
    from fedcore.operator import Operator, submission_for
    from fedcore.privacy.claims import guarantees
    from fedcore.spec import RunSpec
    from fedcore.task import resolve

    spec = RunSpec.load(path, overrides or ())
    submission, parameters = submission_for(resolve(spec.run.task, path.parent), spec)
    with Operator.connect(folder) as operator:
        info = operator.submit(submission, parameters)
        if not as_json:
            typer.echo(f"run {info.run}: {info.rounds} rounds of {info.task}", err=follow)
            typer.echo(f"updates: {travelling(submission.spec)}", err=True)
            for guarantee in guarantees(submission.spec, info.rounds):
                typer.echo(f"privacy: {guarantee}", err=True)
        elif not follow:
            typer.echo(json.dumps(as_dict(info)))
        if follow:
            show_progress(operator.watch(info.run), as_json)


@app.command("list")
def list_runs(folder: Dir = HOME, as_json: Json = False) -> None:
    """List all runs, the newest first.

    [bold]Examples[/bold]

    fedcore run list

    fedcore run list --json
    """
    from rich.console import Console
    from rich.table import Column, Table

    from fedcore.operator import Operator

    with Operator.connect(folder) as operator:
        runs = operator.list()
    if as_json:
        typer.echo(json.dumps([as_dict(info) for info in runs]))
        return
    whole = max((len(info.run) for info in runs), default=0)  # an id that is cut short is of no use
    table = Table(
        Column("run", no_wrap=True, min_width=whole), "task", "state", "rounds", "submitted", "", box=None
    )
    for info in runs:
        when = datetime.fromtimestamp(info.created).strftime("%Y-%m-%d %H:%M")
        table.add_row(info.run, info.task, info.state, progress(info), when, info.detail)
    Console().print(table)


@app.command()
def show(run: Run, folder: Dir = HOME, as_json: Json = False) -> None:
    """Show one run and its rounds.

    [bold]Examples[/bold]

    fedcore run show digits-1f0c22aa
    """
    from fedcore.operator import Operator

    with Operator.connect(folder) as operator:
        info = operator.show(run)
    if as_json:
        typer.echo(json.dumps(as_dict(info)))
        return
    typer.echo("  ".join(filter(None, (info.run, info.task, info.state, progress(info), info.detail))))
    if info.rounds:
        typer.echo(f"model {info.parameters.sha256}  {info.parameters.size} bytes")
    for text in info.metrics:
        typer.echo(line(json.loads(text), info.rounds))


@app.command()
def watch(run: Run, folder: Dir = HOME, as_json: Json = False) -> None:
    """Show a run's rounds as they are committed, until it ends.

    [bold]Examples[/bold]

    fedcore run watch digits-1f0c22aa
    """
    from fedcore.operator import Operator

    with Operator.connect(folder) as operator:
        show_progress(operator.watch(run), as_json)


@app.command()
def stop(run: Run, folder: Dir = HOME) -> None:
    """End a run, keeping its committed rounds.

    [bold]Examples[/bold]

    fedcore run stop digits-1f0c22aa
    """
    from fedcore.operator import Operator

    with Operator.connect(folder) as operator:
        info = operator.stop(run)
    typer.echo(f"{info.run} {info.state}" + f" after {info.round} rounds" * bool(info.rounds))


@app.command()
def download(
    run: Run,
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("model.safetensors"),
    folder: Dir = HOME,
) -> None:
    """Fetch a run's newest model as a safetensors file.

    [bold]Examples[/bold]

    fedcore run download digits-1f0c22aa --out model.safetensors
    """
    from fedcore.model_files import save_model
    from fedcore.operator import Operator

    with Operator.connect(folder) as operator:
        layout, parameters = operator.parameters(run)
    save_model(out, layout, parameters)
    typer.echo(f"{out}: {layout.shared_size} parameters, SHA-256 {parameters.digest}")


def show_progress(updates: Iterable["RunInfo"], as_json: bool) -> None:
    """Print each new round, and what a run waits for; raise RunFailed where it failed."""
    from fedcore.errors import RunFailed

    detail = ""
    for info in updates:
        for text in info.metrics:
            typer.echo(text if as_json else line(json.loads(text), info.rounds))
        waits = info.detail.startswith("waiting") or info.state == "paused" or is_running_app(info)
        if info.detail != detail and waits:
            typer.echo("paused: " * (info.state == "paused") + info.detail, err=True)
        detail = info.detail
    if info.state == "failed":
        raise RunFailed(f"run {info.run} failed: {info.detail}")
    if info.detail:  # who stopped it, or why it stopped early
        typer.echo(info.detail, err=True)
    if not as_json:
        model = f" after {info.round} rounds, model {info.parameters.sha256}"
        typer.echo(info.state + model * bool(info.rounds))


def progress(info: "RunInfo") -> str:
    """Return how far a run has come; that of an app is known to its ServerApp alone."""
    return f"{info.round}/{info.rounds}" if info.rounds else ""


def is_running_app(info: "RunInfo") -> bool:
    """Tell whether this is a run of an app, of which all that moves here is who takes part."""
    return not info.rounds and info.state == "running"


def travelling(spec: "RunSpec") -> str:
    """Return how the updates of a submitted run travel, who reads them, and why."""
    from fedcore.strategies.catalog import strategy_of
    from fedcore.strategies.encryption import described

    return described(strategy_of(spec), spec)


def line(row: dict[str, Any], rounds: int) -> str:
    """Return one round as a line."""
    if row.get("skipped"):
        return f"round {row['round']}/{rounds}  skipped, the model stays as it is  {row['seconds']:.2f} s"
    beside = ("round", "folded", "refused", "expected", "seconds")
    named = {name: value for name, value in row.items() if name not in beside}
    updates = f"{row['folded']} updates" if "folded" in row else f"{row['expected']:g} expected"
    values = "  ".join(f"{name} {value:.4g}" for name, value in named.items())
    return f"round {row['round']}/{rounds}  {updates}  {row['seconds']:.2f} s  {values}"


def as_dict(info: "RunInfo") -> dict[str, Any]:
    """Return a run as JSON shows it."""
    facts = ("run", "name", "task", "state", "detail", "round", "rounds", "created")
    return {
        **{name: getattr(info, name) for name in facts},
        "model_sha256": info.parameters.sha256,
        "metrics": [json.loads(text) for text in info.metrics],
    }
