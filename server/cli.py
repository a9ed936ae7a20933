"""`fedcore server`: make a coordinator's folder, run it, read its audit trail."""

import asyncio
import fcntl
import json
import tomllib
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import tomli_w
import typer

from fedcore import telemetry
from fedcore.crypto.files import make_private_folder, write_atomically
from fedcore.errors import ConfigError

app = typer.Typer(
    name="server",
    help="The coordinator: runs rounds with the agents that connect to it.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

Dir = Annotated[Path, typer.Option("--dir", help="Folder that 'init' made.", show_default=False)]
Database = Annotated[
    str,
    typer.Option(
        help="postgresql+psycopg://USER@HOST/DATABASE, with the password in PGPASSWORD or PGPASSFILE; "
        "a SQLite file in DIR if left out.",
        show_default=False,
    ),
]
CONFIG = "server.toml"


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to make.", show_default=False)],
    token: Annotated[str, typer.Option(help="Token of role coordinator, or @FILE.", show_default=False)],
    listen: Annotated[str, typer.Option(help="HOST:PORT to listen on.")] = "0.0.0.0:8710",
    database_url: Database = "",
) -> None:
    """Make a coordinator: enrol it with a token and write its settings.

    [bold]Examples[/bold]

    fedcore server init coordinator --token @coordinator.token

    fedcore server init coordinator --token @coordinator.token --listen 127.0.0.1:8710

    fedcore server init coordinator --token @coordinator.token --database-url postgresql+psycopg://fed@db/fed
    """
    from fedcore.server.database import url_of
    from fedcore.wire.address import parse_address
    from fedcore.wire.enrolment import enrol
    from fedcore.wire.token import read_token

    listen = parse_address(listen, lowest_port=0)
    url_of(folder, database_url)  # a token is good once, so what can be wrong is found before it is used
    make_private_folder(folder)
    identity = enrol(read_token(token), folder / "identity", "coordinator")
    settings = {"listen": listen} | ({"database_url": database_url} if database_url else {})
    write_atomically(folder / CONFIG, tomli_w.dumps(settings).encode(), 0o644)
    typer.echo(f"coordinator {identity.name}, certificate until {identity.not_after:%Y-%m-%d}")
    typer.echo(f"next        fedcore server start --dir {folder}")


@app.command()
def start(
    folder: Dir,
    listen: Annotated[str, typer.Option(help="HOST:PORT, if not that of 'init'.", show_default=False)] = "",
    database_url: Database = "",
    as_json: Annotated[bool, typer.Option("--json", help="Log JSON lines.")] = False,
) -> None:
    """Run the coordinator until SIGTERM or Ctrl-C; unfinished runs continue at the next start.

    [bold]Examples[/bold]

    fedcore server start --dir coordinator

    fedcore server start --dir coordinator --json 2>> coordinator.log

    PGPASSFILE=pgpass fedcore server start --dir coordinator --database-url postgresql+psycopg://fed@db/fed
    """
    from fedcore.crypto.passphrase import unlocked
    from fedcore.server.serve import serve

    telemetry.configure(as_json)
    address, url = settings_of(folder, listen, database_url)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"{folder} is in use by another coordinator; stop that one first") from error
        asyncio.run(serve(folder, unlocked(folder / "identity"), address, url))


@app.command()
def service(folder: Dir) -> None:
    """Print a unit with which systemd runs the coordinator, and how to install it.

    [bold]Examples[/bold]

    fedcore server service --dir /srv/fedcore/coordinator

    fedcore server service --dir /srv/fedcore/coordinator > /etc/systemd/system/fedcore-server.service
    """
    from fedcore.systemd import unit

    typer.echo(unit("server", "coordinator", folder, [folder.absolute()]), nl=False)


@app.command()
def audit(
    folder: Dir,
    database_url: Database = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show who has done what on a coordinator, running or not, and check that nobody has altered it.

    Keep the last hash elsewhere: rows that are missing at the end are seen by it alone.

    [bold]Examples[/bold]

    fedcore server audit --dir coordinator

    fedcore server audit --dir coordinator --json | jq '.[] | select(.action == "quarantine")'
    """
    from fedcore.server.trail import read

    _, url = settings_of(folder, "", database_url)
    entries = read(folder, url)
    if as_json:
        typer.echo(json.dumps([asdict(entry) for entry in entries]))
        return
    for entry in entries:
        when = datetime.fromtimestamp(entry.time, UTC)
        line = f"{when:%Y-%m-%d %H:%M:%S} UTC  {entry.actor}  {entry.action}  {entry.detail}"
        typer.echo("".join(c if c.isprintable() else "?" for c in line))  # what a client sent may be in it
    last = f", the last one {entries[-1].hash}" if entries else ""
    typer.echo(f"{len(entries)} entries, each as it was written{last}")


def settings_of(folder: Path, listen: str, database_url: str) -> tuple[str, str]:
    """Return a coordinator's address and database URL: those that are given, else those in its folder."""
    from fedcore.wire.address import parse_address

    try:
        settings = tomllib.loads((folder / CONFIG).read_text(encoding="utf-8"))
        address = parse_address(listen or settings["listen"], lowest_port=0)
        return address, database_url or str(settings.get("database_url", ""))
    except (OSError, ValueError, KeyError) as error:
        reason, hint = getattr(error, "strerror", error), "make the folder with 'fedcore server init'"
        raise ConfigError(f"{folder / CONFIG}: {reason}; {hint}") from error
