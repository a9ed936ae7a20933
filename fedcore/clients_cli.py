"""`fedcore clients`: who is there, what was refused of whom, and an end to a quarantine."""

import json
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedcore.run_cli import HOME, Dir, Json

if TYPE_CHECKING:
    from fedcore.wire.v1.coordinator_pb2 import ClientInfo

app = typer.Typer(
    name="clients",
    help="Clients of a coordinator: who is there, who misbehaves.",
    no_args_is_help=True,
)


@app.command("list")
def list_clients(folder: Dir = HOME, as_json: Json = False) -> None:
    """List the clients that are connected, and those of which something was refused.

    A client that three times does what no agent does is in quarantine: it gets no work. What else was refused
    is counted since the coordinator's start.

    [bold]Examples[/bold]

    fedcore clients list

    fedcore clients list --json
    """
    from rich.console import Console
    from rich.table import Column, Table

    from fedcore.operator import Operator

    with Operator.connect(folder) as operator:
        clients = operator.clients()
    if as_json:
        typer.echo(json.dumps([as_dict(info) for info in clients]))
        return
    names = (Column("client", no_wrap=True), Column("state", no_wrap=True), "works for", "labels")
    table = Table(*names, "refused", "offences", "the last", box=None)
    for info in clients:
        labels = " ".join(f"{name}={value}" for name, value in sorted(info.labels.items()))
        counts = str(info.refused), str(info.offences)
        table.add_row(info.client, state(info), info.run, labels, *counts, info.offence or info.reason)
    Console().print(table)


@app.command()
def lift(
    client: Annotated[str, typer.Argument(metavar="NAME", help="The client's name.", show_default=False)],
    folder: Dir = HOME,
    as_json: Json = False,
) -> None:
    """Forget a client's offences, and end its quarantine.

    [bold]Examples[/bold]

    fedcore clients lift hospital-3
    """
    from fedcore.operator import Operator

    with Operator.connect(folder) as operator:
        info = operator.lift(client)
    typer.echo(json.dumps(as_dict(info)) if as_json else f"{info.client} may work again; it is {state(info)}")


def state(info: "ClientInfo") -> str:
    """Return whether a client is there, and whether it may work."""
    there = "connected" if info.connected else "away"
    return f"{there}, quarantined" if info.quarantined else there


def as_dict(info: "ClientInfo") -> dict[str, Any]:
    """Return a client as JSON shows it; `offended` is None where there is no offence."""
    when = datetime.fromtimestamp(info.offended).astimezone().isoformat() if info.offences else None
    return {
        "client": info.client,
        "connected": info.connected,
        "evaluator": info.evaluator,
        "labels": dict(info.labels),
        "run": info.run or None,
        "refused": info.refused,
        "reason": info.reason,
        "offences": info.offences,
        "offence": info.offence,
        "offended": when,
        "quarantined": info.quarantined,
    }
