"""`fedcore bench`: the figures that the documents quote."""

import json
import os
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="bench",
    help="Figures, as JSON lines, measured beside their reference in one run.",
    no_args_is_help=True,
)


@app.command()
def simulate(
    job: Annotated[str, typer.Argument(help="A name of fedcore.bench.jobs, as digits-mlp-100.")],
    rounds: Annotated[int | None, typer.Option(help="Rounds, if not the job's own.")] = None,
    engine: Annotated[
        str, typer.Option(help="auto, sequential, vectorized, processes or ray.")
    ] = "sequential",
    workers: Annotated[int, typer.Option(min=0, help="Processes or threads; 0: measured.")] = 0,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="key=value of the spec, as client.device=cuda.")
    ] = None,
) -> None:
    """Time the simulation of a job beside the plain PyTorch loop.

    [bold]Examples[/bold]

    fedcore bench simulate digits-mlp-100 --engine auto

    fedcore bench simulate mnist-cnn-100 --engine processes --workers 2

    fedcore bench simulate digits-mlp-10000 --engine auto

    fedcore bench simulate cifar-cnn-1000 --engine auto --set client.device=cuda --set client.autocast=true
    """
    from fedcore.bench.simulate import measure

    typer.echo(json.dumps(measure(job, rounds, engine, workers, overrides or ())))


@app.command()
def scale(
    cohorts: Annotated[
        str, typer.Option(help="Sizes of the cohort, by commas.")
    ] = "10,100,1000,10000,100000",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds after the first, which warms up.")] = 3,
    plot: Annotated[Path | None, typer.Option(help="Draw the lines, as scale.svg.")] = None,
) -> None:
    """Time simulated rounds of growing cohorts, and say where their time goes.

    [bold]Examples[/bold]

    fedcore bench scale --cohorts 10,1000 --rounds 5

    fedcore bench scale --plot scale.svg
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler tells the terminal what it does
    from fedcore.bench import scale

    lines = []
    for line in scale.measure([int(size) for size in cohorts.split(",")], rounds):
        lines.append(line)
        typer.echo(json.dumps(line))
    if plot:
        scale.plot(lines, plot)


@app.command()
def deploy(
    parameters: Annotated[int, typer.Option("--params", min=1, help="Of the model, float32.")] = 1000,
    clients: Annotated[int, typer.Option(min=1, help="Agents.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds after the first, which warms up.")] = 10,
    encryption: Annotated[str, typer.Option(help="tls, sealed or secagg.")] = "tls",
    changes: Annotated[list[str] | None, typer.Option("--set", help="key=value of the spec.")] = None,
) -> None:
    """Time rounds of a real federation on loopback, with mutual TLS and without training.

    [bold]Examples[/bold]

    fedcore bench deploy --params 10000000 --clients 2 --rounds 5

    fedcore bench deploy --params 100000 --clients 8 --encryption secagg

    fedcore bench deploy --params 100000000 --clients 4 --rounds 1 --set strategy.name=krum
    """
    from fedcore.bench.deploy import measure

    typer.echo(json.dumps(measure(parameters, clients, rounds, encryption, changes or ())))


@app.command()
def load(
    agents: Annotated[int, typer.Option(min=2, help="Connected at once.")] = 1000,
    rounds: Annotated[int, typer.Option(min=2, help="Rounds before the coordinator is killed.")] = 8,
    parameters: Annotated[int, typer.Option("--params", min=1, help="Of the model, float32.")] = 10_000,
    registered: Annotated[int, typer.Option(help="Clients that the run knows, most of them away.")] = 10_000,
) -> None:
    """Load a coordinator with many light agents, kill it, and have them all back.

    [bold]Examples[/bold]

    fedcore bench load

    fedcore bench load --agents 100 --registered 0
    """
    from fedcore.bench.load import measure

    typer.echo(json.dumps(measure(agents, rounds, parameters, registered)))


@app.command()
def aggregators(
    clients: Annotated[int, typer.Option(min=1, help="Rows of the matrix.")] = 100,
    size: Annotated[int, typer.Option(min=1, help="Columns: parameters of the model, float32.")] = 1_000_000,
    byzantine: Annotated[int, typer.Option(min=0, help="f, of the rows.")] = 20,
    rule: Annotated[
        list[str] | None, typer.Option(help="A rule to time, as median; may be given again. Default: all.")
    ] = None,
    runs: Annotated[int, typer.Option(min=1, help="Runs of each rule after the first.")] = 5,
    disk: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="Keep the matrix in a file in this folder."),
    ] = None,
) -> None:
    """Time robust rules beside a single pass over the same memory.

    [bold]Examples[/bold]

    fedcore bench aggregators --rule median --rule multi_krum

    fedcore bench aggregators --disk . --size 25000000 --rule median --runs 1
    """
    from fedcore.bench.aggregators import measure

    for line in measure(clients, size, byzantine, rule or (), runs, disk):
        typer.echo(json.dumps(line))


@app.command()
def privacy(
    job: Annotated[str, typer.Argument(help="A name of fedcore.bench.jobs, as digits-mlp-100.")],
    clipping: Annotated[str, typer.Option(help="hooks or ghost.")] = "hooks",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds after the first, which warms up.")] = 40,
) -> None:
    """Time a client's DP-SGD beside Opacus by itself, on the same examples.

    [bold]Examples[/bold]

    fedcore bench privacy digits-mlp-100

    fedcore bench privacy digits-cnn-100 --clipping ghost
    """
    from fedcore.bench.privacy import measure

    typer.echo(json.dumps(measure(job, clipping, rounds)))


@app.command()
def noise(
    clients: Annotated[int, typer.Option(min=11, help="In the round; fewer drown in the noise.")] = 100,
    size: Annotated[int, typer.Option(min=1, help="Parameters of the model, float32.")] = 1_000_000,
    runs: Annotated[int, typer.Option(min=1, help="Rounds of each level after the first.")] = 5,
) -> None:
    """Time a round with noise in the sum beside the same round without.

    [bold]Examples[/bold]

    fedcore bench noise --size 100000
    """
    from fedcore.bench.noise import measure

    for line in measure(clients, size, runs):
        typer.echo(json.dumps(line))


@app.command()
def ledger(
    rows: Annotated[int, typer.Option(min=2, help="Reservations, one after another.")] = 1000,
    folder: Annotated[Path, typer.Option("--dir", exists=True, help="On the disk to measure.")] = Path("."),
) -> None:
    """Time the reservation of privacy budget on a device's disk.

    [bold]Examples[/bold]

    fedcore bench ledger --dir /var/lib
    """
    from fedcore.bench.ledger import measure

    for line in measure(rows, folder):
        typer.echo(json.dumps(line))


@app.command()
def secagg(
    clients: Annotated[int, typer.Option(min=3, help="In the cohort.")] = 100,
    parameters: Annotated[int, typer.Option("--params", min=1, help="Of the model, float32.")] = 1_000_000,
    lost: Annotated[int, typer.Option(min=0, help="Clients lost after sharing; fewer than a third.")] = 10,
    degree: Annotated[
        int, typer.Option(min=0, help="With how many others a client masks; 0: as the defaults have it.")
    ] = 40,
    encoding: Annotated[str, typer.Option(help="q32 or exact.")] = "q32",
) -> None:
    """Time a masked sum without a network, beside Flower's functions for the same.

    [bold]Examples[/bold]

    fedcore bench secagg --degree 99

    fedcore bench secagg --params 25000000
    """
    from fedcore.bench.secagg import measure

    for line in measure(clients, parameters, lost, degree, encoding):
        typer.echo(json.dumps(line))


@app.command()
def flower(
    job: Annotated[str, typer.Argument(help="A job of all clients, as digits-mlp-100.")] = "digits-mlp-100",
    rounds: Annotated[int, typer.Option(min=2, help="Rounds; the first warms up.")] = 20,
    pairs: Annotated[int, typer.Option(min=1, help="Runs of each, in turn.")] = 3,
    workers: Annotated[int, typer.Option(min=0, help="Processes of ours; 0: the default.")] = 0,
) -> None:
    """Time a Flower app, unchanged, in Flower's own simulation and in ours.

    [bold]Examples[/bold]

    taskset -c 0,1 fedcore bench flower

    fedcore bench flower digits-mlp-1000 --rounds 5 --pairs 1
    """
    from fedcore.bench.flower import measure

    for line in measure(job, rounds, pairs, workers):
        typer.echo(json.dumps(line))


@app.command()
def chaos(
    kills: Annotated[int, typer.Option(min=1, help="Processes to kill.")] = 300,
    seed: Annotated[int, typer.Option(help="Of which process dies when.")] = 0,
) -> None:
    """Kill the processes of a federation at random; fail if an update is lost or a model differs.

    [bold]Examples[/bold]

    fedcore bench chaos --kills 30
    """
    from fedcore.bench.chaos import measure

    for line in measure(kills, seed):
        typer.echo(json.dumps(line))
    raise typer.Exit(bool(line["lost"] or line["mismatches"]))
