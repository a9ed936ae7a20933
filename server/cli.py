"""`fedcore server`: make a coordinator's folder, run it."""

import asyncio
import fcntl
import tomllib
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
CONFIG = "server.toml"


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to make.", show_default=False)],
    token: Annotated[str, typer.Option(help="Token of role coordinator, or @FILE.", show_default=False)],
    listen: Annotated[str, typer.Option(help="HOST:PORT to listen on.")] = "0.0.0.0:8710",
) -> None:
    """Make a coordinator: enrol it with a token and write its settings.

    [bold]Examples[/bold]

    fedcore server init coordinator --token @coordinator.token

    fedcore server init coordinator --token @coordinator.token --listen 127.0.0.1:8710
    """
    from fedcore.wire.address import parse_address
    from fedcore.wire.enrolment import enrol
    from fedcore.wire.token import read_token

    listen = parse_address(listen, lowest_port=0)
    make_private_folder(folder)
    identity = enrol(read_token(token), folder / "identity", "coordinator")
    write_atomically(folder / CONFIG, tomli_w.dumps({"listen": listen}).encode(), 0o644)
    typer.echo(f"coordinator {identity.name}, certificate until {identity.not_after:%Y-%m-%d}")
    typer.echo(f"next        fedcore server start --dir {folder}")


@app.command()
def start(
    folder: Dir,
    listen: Annotated[str | None, typer.Option(help="HOST:PORT, if not that of 'init'.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Log JSON lines.")] = False,
) -> None:
    """Run the coordinator until SIGTERM or Ctrl-C; unfinished runs continue at the next start.

    [bold]Examples[/bold]

    fedcore server start --dir coordinator

    fedcore server start --dir coordinator --json 2>> coordinator.log
    """
    from fedcore.crypto.passphrase import unlocked
    from fedcore.server.serve import serve
    from fedcore.wire.address import parse_address

    telemetry.configure(as_json)
    try:
        settings = tomllib.loads((folder / CONFIG).read_text(encoding="utf-8"))
        address = parse_address(listen or settings["listen"], lowest_port=0)
    except (OSError, ValueError, KeyError) as error:
        reason, hint = getattr(error, "strerror", error), "make the folder with 'fedcore server init'"
        raise ConfigError(f"{folder / CONFIG}: {reason}; {hint}") from error
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"{folder} is in use by another coordinator; stop that one first") from error
        asyncio.run(serve(folder, unlocked(folder / "identity"), address))
