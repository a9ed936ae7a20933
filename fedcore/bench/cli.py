"""`fedcore bench`: the figures that the documents quote."""

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="bench",
    help="Figures, as JSON lines, measured beside their reference in one run.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)


@app.command()
def simulate(
    job: Annotated[str, typer.Argument(help="A name of fedcore.bench.jobs, as digits-mlp-100.")],
    rounds: Annotated[int | None, typer.Option(help="Rounds, if not the job's own.")] = None,
    engine: Annotated[str, typer.Option(help="auto, sequential, vectorized or processes.")] = "sequential",
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0: what helps, up to the cores.")] = 0,
) -> None:
    """Time the simulation of a job beside the plain PyTorch loop.

    [bold]Examples[/bold]

    fedcore bench simulate digits-mlp-100 --engine auto

    fedcore bench simulate mnist-cnn-100 --engine processes --workers 2
    """
    from fedcore.bench.jobs import JOBS
    from fedcore.bench.simulate import measure
    from fedcore.errors import SpecError, nearest

    if job not in JOBS:
        raise SpecError(f"job {job!r} is not known{nearest(job, JOBS)}")
    typer.echo(json.dumps(measure(job, rounds, engine, workers)))


@app.command()
def deploy(
    parameters: Annotated[int, typer.Option("--params", min=1, help="Of the model, float32.")] = 1000,
    clients: Annotated[int, typer.Option(min=1, help="Agents.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds after the first, which warms up.")] = 10,
    encryption: Annotated[str, typer.Option(help="tls, sealed or secagg.")] = "tls",
) -> None:
    """Time rounds of a real federation on loopback, with mutual TLS and without training.

    [bold]Examples[/bold]

    fedcore bench deploy --params 10000000 --clients 2 --rounds 5

    fedcore bench deploy --params 100000 --clients 8 --encryption secagg
    """
    from fedcore.bench.deploy import measure

    typer.echo(json.dumps(measure(parameters, clients, rounds, encryption)))


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
    from fedcore.bench.jobs import JOBS
    from fedcore.bench.privacy import measure
    from fedcore.errors import SpecError, nearest

    if job not in JOBS:
        raise SpecError(f"job {job!r} is not known{nearest(job, JOBS)}")
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
