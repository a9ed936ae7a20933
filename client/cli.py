"""`fedcore client`: make an agent, enrol it, see what it would do, run it."""

import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedcore.client.ledger_cli import app as ledger

if TYPE_CHECKING:
    from fedcore.client.check import Report
    from fedcore.client.config import Config

app = typer.Typer(
    name="client",
    help="The agent on a device: trains on data that stay there, within the limits of agent.toml.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
app.add_typer(ledger)

Dir = Annotated[Path, typer.Option("--dir", help="Folder of agent.toml.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to make.")] = Path("."),
    coordinator: Annotated[str, typer.Option(help="HOST:PORT of the coordinator.", show_default=False)] = "",
) -> None:
    """Write a commented agent.toml: which tasks may run, on which data, on what terms.

    [bold]Examples[/bold]

    fedcore client init

    fedcore client init agent --coordinator federation.example.org:8710
    """
    from fedcore.client.config import write_template

    path = write_template(folder, coordinator)
    typer.echo(f"wrote  {path}: allow a task there and say where the data are")
    typer.echo(f"next   fedcore client check --dir {folder}")
    typer.echo(f"       fedcore client enroll TOKEN --dir {folder}")


@app.command()
def enroll(
    token: Annotated[str, typer.Argument(metavar="TOKEN", help="From the authority, or @FILE.")],
    folder: Dir = Path("."),
    lock: Annotated[bool, typer.Option("--passphrase", help="Ask for one, and encrypt the key.")] = False,
) -> None:
    """Exchange a token for this device's certificate; the private key is made here and stays.

    Compare the printed fingerprint with the one that the federation's authority shows. A passphrase is asked
    for again at every start; a service gives it in FEDCORE_PASSPHRASE, or in a file of mode 0600 that
    FEDCORE_PASSPHRASE_FILE names.

    [bold]Examples[/bold]

    fedcore client enroll @hospital-1.token

    fedcore client enroll fedcore-token-1.CgkxMjcuMC4w... --dir agent --passphrase
    """
    from fedcore.client.config import Config
    from fedcore.client.state import State
    from fedcore.crypto.files import make_private_folder
    from fedcore.crypto.identity import is_locked
    from fedcore.crypto.passphrase import passphrase
    from fedcore.wire.enrolment import enrol
    from fedcore.wire.token import read_token

    state, text = State(Config.load(folder).state), read_token(token)
    locked = is_locked(state.identity)
    secret = passphrase(new=not locked) if lock or locked else b""
    make_private_folder(state.folder)
    identity = enrol(text, state.identity, passphrase=secret)
    typer.echo(f"name         {identity.name.name}")
    typer.echo(f"federation   {identity.name.federation}")
    typer.echo(f"root         SHA-256 {identity.root_fingerprint}")
    typer.echo(f"certificate  until {identity.not_after:%Y-%m-%d %H:%M} UTC")
    typer.echo(f"next         fedcore client start --dir {folder}")


@app.command()
def check(
    folder: Dir = Path("."),
    task: Annotated[str | None, typer.Option(help="One task of agent.toml instead of all.")] = None,
    as_json: Json = False,
) -> None:
    """Load the data and train one batch here; show what an update would send. Contacts nobody.

    An app of Flower is imported, and no more: what it sends is for its own code to say.

    [bold]Examples[/bold]

    fedcore client check

    fedcore client check --dir agent --task Digits
    """
    from fedcore.client import check as checking
    from fedcore.client.config import Config
    from fedcore.client.hosting import digest_of

    config = Config.load(folder)
    reports = checking.check(config, task, client_name(config))
    apps = [] if task else [{"app": name, "digest": digest_of(config, name)} for name in config.apps]
    if as_json:
        typer.echo(json.dumps([asdict(report) for report in reports] + apps))
        return
    for report in reports:
        typer.echo("\n".join(lines_of(report)))
    for found in apps:
        typer.echo(f"{found['app']}  (app of Flower, code {found['digest'][:12]})")
        typer.echo("read by   the coordinator, and whoever runs the other side of the app\n")
    typer.echo("nobody was contacted; nothing has left this device")


def client_name(config: "Config") -> str:
    """Return the name of this device in its federation, or `client` before it is enrolled."""
    from fedcore.client.state import State
    from fedcore.crypto.identity import IDENTITY, Certified

    folder = State(config.state).identity
    return Certified.load(folder).name.name if (folder / IDENTITY).exists() else "client"


def lines_of(report: "Report") -> list[str]:
    """Return a check's report as lines for a person."""
    most = max(report.labels.values(), default=1)
    histogram = [
        f"  {label:>8} {count:>8}  {'█' * round(30 * count / most)}" for label, count in report.labels.items()
    ]
    sends = [f"  {name:12} {length:>12,} numbers {size:>14,} bytes" for name, length, size in report.sends]
    scalars = [f"  {name:12} {value:>12.6g}" for name, value in report.scalars.items()]
    return [
        f"{report.task}  (code {report.digest[:12]})",
        f"examples  {report.train:,} to train on, {report.test:,} to test on",
        f"loading   {report.seconds_loading:.2f} s",
        *(["labels, on this device only", *histogram] if histogram else []),
        f"one step  {1000 * report.seconds_step:.1f} ms, {report.memory_mb:.0f} MB at most",
        "an update sends",
        *sends,
        *scalars,
        f"read by   {report.readers}",
        "",
    ]


@app.command()
def start(
    folder: Dir = Path("."),
    as_json: Annotated[bool, typer.Option("--json-logs", help="Log JSON lines.")] = False,
) -> None:
    """Run the agent until SIGTERM or Ctrl-C; a lost connection is sought again.

    [bold]Examples[/bold]

    fedcore client start

    fedcore client start --dir agent --json-logs 2>> agent.log
    """
    import asyncio

    from fedcore import telemetry
    from fedcore.client.agent import Agent, serve
    from fedcore.client.config import Config
    from fedcore.client.state import State
    from fedcore.crypto.passphrase import unlocked
    from fedcore.errors import ConfigError

    telemetry.configure(as_json)
    config = Config.load(folder)
    if not config.settings.coordinator:
        raise ConfigError(
            f"{config.place('coordinator')}: '': expected HOST:PORT of the federation's coordinator"
        )
    state = State(config.state)
    identity = unlocked(state.identity)
    with state.locked():
        asyncio.run(serve(Agent(config, identity)))


@app.command()
def service(folder: Dir = Path(".")) -> None:
    """Print a unit with which systemd runs the agent, and how to install it.

    [bold]Examples[/bold]

    fedcore client service --dir /srv/fedcore/agent

    fedcore client service --dir /srv/fedcore/agent > /etc/systemd/system/fedcore-client.service
    """
    from fedcore.client.config import Config
    from fedcore.systemd import unit

    config = Config.load(folder)
    writable = [config.state, *([config.ledger.parent] if config.ledger else [])]
    typer.echo(unit("client", "agent", config.folder, writable), nl=False)


@app.command()
def status(folder: Dir = Path("."), as_json: Json = False) -> None:
    """Show identity, tasks and the last rounds, from the state folder. Contacts nobody.

    [bold]Examples[/bold]

    fedcore client status

    fedcore client status --dir agent --json
    """
    from fedcore.client.config import Config
    from fedcore.client.status import status_of

    found = status_of(Config.load(folder))
    if as_json:
        typer.echo(json.dumps(found))
        return
    for key in ("agent", "name", "federation", "root", "certificate", "coordinator", "connection", "limits"):
        typer.echo(f"{key:12} {found[key]}")
    for name, digest in found["tasks"].items():
        typer.echo(f"{'task':12} {name}  {digest}")
    for name, digest in found["apps"].items():
        typer.echo(f"{'app':12} {name}  {digest}")
    for row in found["rounds"]:
        when = datetime.fromtimestamp(row["time"], UTC)
        typer.echo(
            f"{when:%Y-%m-%d %H:%M:%S}  {row['ref']}  {row['event']}  {row.get('reason', '')}".rstrip()
        )
