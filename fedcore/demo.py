"""`fedcore demo`: the whole way in one command, and what a curious coordinator reads on it."""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Annotated

import typer
from rich.console import Console

console = Console()
CLIENTS = 4

app = typer.Typer(name="demo")


@app.callback(invoke_without_command=True)
def demo(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder for the two simulations' results.")] = Path("runs/demo"),
) -> None:
    """Simulate 100 clients; then run 4 of them once simulated and once as real processes, and compare.

    The federation is authority, coordinator and agents on this machine, over mutual TLS, with secure
    aggregation: the masks change no bit of the model.

    [bold]Examples[/bold]

    fedcore demo

    fedcore demo --out /tmp/demo
    """
    if context.invoked_subcommand:
        return
    from fedcore.simulations.scenarios import scenario

    started = perf_counter()
    spec = scenario("digits")
    few = ("--set", f"simulation.clients={CLIENTS}", "--set", f"cohort.size={CLIENTS}")

    with step("1  A simulation of 100 clients on skewed digits"):
        simulated(spec, out / "simulation")
    with step(f"2  The same spec with {CLIENTS} clients, simulated one by one"):
        digest = simulated(spec, out / f"{CLIENTS}-clients", *few, "--engine", "sequential")
    with step(f"3  The same {CLIENTS} clients as processes, authority, coordinator, agents; updates masked"):
        deployed = federated(spec, (*few, "--set", "encryption.updates=secagg"))

    console.print(f"\nsimulated  model {digest}\ndeployed   model {deployed}", soft_wrap=True)
    if digest != deployed:
        from fedcore.errors import RunFailed

        raise RunFailed("the two models differ; expected the same bits")
    console.print("[bold green]The two models are bit for bit the same.[/]")
    console.print(f"{perf_counter() - started:.0f} s in all; the reports are in {out}")


@app.command()
def attack(
    out: Annotated[Path, typer.Option(help="Folder for attack.png.")] = Path("runs/demo"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Show what a curious coordinator reads of ten clients, by how their updates travel.

    It inverts gradients: of single updates, of what lies on its disk, of masked words and of their sum.

    [bold]Examples[/bold]

    fedcore demo attack

    fedcore demo attack --out /tmp/demo --json
    """
    from fedcore.audit.curious import attempts, drawn

    found, path = [], out / "attack.png"
    if not as_json:
        console.print("Ten clients take one step of SGD on a picture each. The coordinator reads:\n")
    for attempt in attempts():
        found.append(attempt)
        if not as_json:
            recovered = f"{attempt.recovered} of {len(attempt.errors)} recovered"
            console.print(
                f"{attempt.name:30} similarity {attempt.similarity:.2f}   {recovered}", highlight=False
            )
    out.mkdir(parents=True, exist_ok=True)
    drawn(found, path)
    if as_json:
        typer.echo(json.dumps({"attempts": [attempt.summary() for attempt in found], "pictures": str(path)}))
    else:
        console.print("\nA sum is no secret: what one client adds may show in it, unless there is noise.")
        console.print(f"the pictures are in {path}", soft_wrap=True)


@contextmanager
def step(title: str) -> Iterator[None]:
    """Print a title and, at the end, the seconds that it took."""
    console.print(f"\n[bold]{title}[/]")
    started = perf_counter()
    yield
    console.print(f"[dim]{perf_counter() - started:.1f} s[/]")


def simulated(spec: Path, out: Path, *options: str) -> str:
    """Run `fedcore simulate` as a person would and return the model's hash."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "fedcore", "simulate", str(spec), *options, "--out", str(out)]
    subprocess.run(command, check=True)
    return str(json.loads((out / "result.json").read_text(encoding="utf-8"))["model_sha256"])


def federated(spec: Path, options: tuple[str, ...]) -> str:
    """Run the spec as a federation on loopback and return the model's hash."""
    from fedcore.data import save_split
    from fedcore.loopback import federation
    from fedcore.simulations.population import Population
    from fedcore.spec import RunSpec
    from fedcore.task import client_name, resolve

    run = RunSpec.load(spec, options[1::2])
    task = resolve(run.run.task)
    population = Population(task, run)
    names = [client_name(i) for i in range(CLIENTS)]
    with tempfile.TemporaryDirectory(prefix="fedcore-demo-") as home, federation(Path(home)) as loopback:

        def settings(name: str) -> dict[str, object]:
            path = loopback.folder / f"{name}.npz"
            save_split(path, population.split(name))
            return {"tasks": {task.name: run.run.task}, "data": {"path": str(path)}}

        loopback.make_agents(names, settings)
        for name in names:
            loopback.start(name)
        console.print(f"coordinator at {loopback.address}, agents {', '.join(names)}")
        rounds = loopback.fedcore("run", "submit", spec, *options, "--watch").splitlines()
        for line in rounds[-3:]:
            console.print(line, highlight=False, soft_wrap=True)
        return rounds[-1].split()[-1]
