"""`fedcore`: the command line, a page for the ways in which people use it."""

from importlib.metadata import version
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from fedcore.audit_cli import audit
from fedcore.bench.cli import app as bench
from fedcore.client.cli import app as client
from fedcore.clients_cli import app as clients
from fedcore.demo import app as demo
from fedcore.errors import FedcoreError
from fedcore.flower_cli import app as flower
from fedcore.privacy_cli import app as privacy
from fedcore.run_cli import app as run
from fedcore.server.authority_cli import app as authority
from fedcore.server.cli import app as server
from fedcore.simulations.cli import app as simulations
from fedcore.strategies_cli import strategies

ORDER = (
    *("simulate", "new", "flower", "strategies", "privacy", "audit", "client"),
    *("authority", "server", "run", "clients", "demo", "bench"),
)
INTERRUPTED = 130  # 128 + SIGINT, as shells have it


class Roof(TyperGroup):
    """The commands in the order of their use, and errors as messages instead of tracebacks."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the commands' names, in the help's order."""
        return sorted(super().list_commands(ctx), key=ORDER.index)

    def invoke(self, ctx: Any) -> Any:
        """Run a command; exits with a FedcoreError's own code, and with 130 after Ctrl-C."""
        try:
            return super().invoke(ctx)
        except FedcoreError as error:
            complain("error: ", str(error))
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as error:
            complain("", str(error) or "interrupted")
            raise typer.Exit(INTERRUPTED) from error


def complain(head: str, message: str) -> None:
    """Print a message to standard error."""
    Console(stderr=True).print(Text.assemble((head, "bold red"), message), soft_wrap=True)


app = typer.Typer(
    cls=Roof,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # they print local variables, and those may be tokens and data
    epilog="Start with [bold]fedcore demo[/bold], or with a project of your own: "
    "[bold]fedcore new my-project[/bold]. Every command has examples: [bold]fedcore simulate --help[/bold].",
)


def show_version(wanted: bool) -> None:
    """Print the version and exit."""
    if wanted:
        typer.echo(f"fedcore {version('fedcore')}")
        raise typer.Exit


@app.callback()
def fedcore(
    _: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Federated learning whose privacy is enforced: one task simulated, then deployed, with the same bits."""


app.add_typer(simulations)
app.add_typer(flower, rich_help_panel="Simulate on this machine")
app.command(rich_help_panel="Simulate on this machine")(strategies)
app.add_typer(privacy, rich_help_panel="Simulate on this machine")
app.command(rich_help_panel="Simulate on this machine")(audit)
app.add_typer(client, rich_help_panel="Take part with a device")
for operated in (authority, server, run, clients):
    app.add_typer(operated, rich_help_panel="Operate a federation")
for seen in (demo, bench):
    app.add_typer(seen, rich_help_panel="See and measure")


def main() -> None:
    """Run the command line."""
    app(prog_name="fedcore")
