"""`fedcore authority`: make a federation's authority, hand out tokens, serve, revoke, renew."""

import asyncio
import json
import logging
import re
import signal
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedcore import telemetry
from fedcore.crypto.files import make_private_folder, write_atomically
from fedcore.crypto.names import Name, as_role
from fedcore.errors import SpecError
from fedcore.wire.address import parse_address

if TYPE_CHECKING:
    from fedcore.server.authority import Authority

log = logging.getLogger("fedcore.authority")

app = typer.Typer(
    name="authority",
    help="Certificates of a federation: who may take part, and under which name.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

Dir = Annotated[Path, typer.Option("--dir", help="Folder that 'init' made.", show_default=False)]

STOP_GRACE = 0.5  # seconds that calls in progress get
UNITS = {"m": "minutes", "h": "hours", "d": "days"}


def parse_lifetime(text: str, option: str = "--expires") -> timedelta:
    """Return the time that '30m', '24h' or '7d' means, at least a minute; raises SpecError."""
    match = re.fullmatch(r"([1-9]\d{0,3})([mhd])", text)
    if match is None:
        raise SpecError(f"{option} {text!r} does not fit: expected minutes, hours or days as 30m, 24h or 7d")
    return timedelta(**{UNITS[match[2]]: int(match[1])})


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to make.", show_default=False)],
    federation: Annotated[str, typer.Option(help="Name of the federation, a-z, 0-9, '.', '_', '-'.")],
    address: Annotated[str, typer.Option(help="HOST:PORT where participants will find the authority.")],
    lifetime: Annotated[str, typer.Option(help="How long a certificate holds: 24h, 30d.")] = "30d",
) -> None:
    """Make a federation: its root, the intermediate that signs certificates, and the books.

    Prints the SHA-256 of the root's certificate; participants see the same one when they enrol.

    [bold]Examples[/bold]

    fedcore authority init authority --federation hospitals --address authority.example.org:8700
    """
    from fedcore.server.authority import Authority

    authority = Authority.create(folder, federation, address, parse_lifetime(lifetime, "--lifetime"))
    typer.echo(f"federation  {federation}")
    typer.echo(f"root        SHA-256 {authority.fingerprint}")
    typer.echo(f"root key    {folder / 'root'}: move it to a safe that is not on the network")
    typer.echo(f"next        fedcore authority token --dir {folder} --role coordinator coordinator")
    typer.echo(f"            fedcore authority start --dir {folder}")


@app.command()
def token(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Who may enrol.", show_default=False)],
    folder: Dir,
    role: Annotated[str, typer.Option(help="client, coordinator or operator.", show_default=False)],
    expires: Annotated[str, typer.Option(help="How long the tokens are valid: 30m, 24h, 7d.")] = "24h",
    out: Annotated[Path | None, typer.Option(help="Write FOLDER/NAME.token files instead.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object a line.")] = False,
) -> None:
    """Make single-use tokens, one for each name, and print one a line.

    A token lets whoever holds it enrol once, with a key of their own making, under exactly this name and
    role. It also carries the root's certificate, so hand it over on a way that nobody can alter.

    [bold]Examples[/bold]

    fedcore authority token --dir authority --role client hospital-1 hospital-2

    fedcore authority token --dir authority --role operator alice --expires 30m --out tokens
    """
    from fedcore.server.authority import Authority

    authority, lifetime = Authority.load(folder), parse_lifetime(expires)
    for name in _names(authority, role, names):
        text = str(authority.new_token(name, lifetime))
        kind, value = ("token", text) if out is None else ("file", _write(out, name.name, text))
        typer.echo(json.dumps({"name": str(name), kind: value}) if as_json else value)
    typer.echo(f"root SHA-256 {authority.fingerprint}", err=True)


def _names(authority: "Authority", role: str, names: list[str]) -> list[Name]:
    """Return the names of participants; raises SpecError for any that does not fit."""
    if role == "authority":
        raise SpecError("role 'authority' is no participant's; expected client, coordinator or operator")
    return [Name(authority.federation, as_role(role), name) for name in names]


def _write(out: Path, name: str, text: str) -> str:
    make_private_folder(out)
    path = out / f"{name}.token"
    write_atomically(path, f"{text}\n".encode(), 0o600)
    return str(path)


@app.command()
def revoke(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Who.", show_default=False)],
    folder: Dir,
    role: Annotated[str, typer.Option(help="client, coordinator or operator.")] = "client",
) -> None:
    """Refuse all certificates and unused tokens of a name from now on.

    A running coordinator hears of it within a second or two, and ends what these certificates have open.
    To take the device in again, move the folder of its identity away and enrol it with another token.

    [bold]Examples[/bold]

    fedcore authority revoke --dir authority hospital-1

    fedcore authority revoke --dir authority --role operator alice
    """
    from fedcore.server.authority import Authority

    authority = Authority.load(folder)
    for name in _names(authority, role, names):
        count = authority.revoke(name)
        typer.echo(f"revoked {name}: {count} certificate{'' if count == 1 else 's'}")


@app.command("list")
def list_issued(
    folder: Dir, as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object a line.")] = False
) -> None:
    """Show who holds which certificate, until when, and what was revoked; expired ones are left out.

    [bold]Examples[/bold]

    fedcore authority list --dir authority
    """
    from fedcore.server.authority import Authority

    for each in Authority.load(folder).issued():
        end = f"{datetime.fromtimestamp(each.not_after, UTC):%Y-%m-%d %H:%M} UTC"
        state = "revoked" if each.revoked is not None else "valid"
        typer.echo(
            json.dumps(asdict(each)) if as_json else f"{each.name}  {each.serial}  until {end}  {state}"
        )


@app.command()
def renew(folder: Dir) -> None:
    """Make a new intermediate before the old one ends; nobody has to enrol again.

    It needs the root's key in DIR/root, for this command only. A running authority goes on with the new one.

    [bold]Examples[/bold]

    fedcore authority renew --dir authority
    """
    from fedcore.server.authority import Authority

    made = Authority.load(folder).new_intermediate()
    typer.echo(f"intermediate until {made.not_valid_after_utc:%Y-%m-%d %H:%M} UTC")
    typer.echo(f"root key     {folder / 'root'}: move it back to its safe")


@app.command()
def start(
    folder: Dir,
    listen: Annotated[str | None, typer.Option(help="HOST:PORT, if not the address of 'init'.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Log JSON lines.")] = False,
) -> None:
    """Serve enrolment and renewal, tell who was revoked, witness ledgers, until SIGTERM or Ctrl-C.

    [bold]Examples[/bold]

    fedcore authority start --dir authority

    fedcore authority start --dir authority --listen 0.0.0.0:8700
    """
    from fedcore.server.authority import Authority

    telemetry.configure(as_json)
    authority = Authority.load(folder)
    asyncio.run(_serve(authority, parse_address(listen or authority.address, lowest_port=0)))


async def _serve(authority: "Authority", listen: str) -> None:
    from fedcore.server.authority_service import start_service

    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    server, port = await start_service(authority, listen)
    host = listen.rpartition(":")[0]
    facts = {"federation": authority.federation, "root": authority.fingerprint}
    log.info("listening", extra={"address": f"{host}:{port}", **facts})
    await stop.wait()
    await server.stop(STOP_GRACE)
    log.info("stopped")
