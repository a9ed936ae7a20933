"""`fedcore client ledger`: what was reserved of a data set, whether the record is whole, a copy of it."""

import json
from base64 import b64encode
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from fedcore.client.config import Config
    from fedcore.privacy.ledger import Ledger

app = typer.Typer(
    name="ledger",
    help="The privacy ledger of the data: what all runs together have spent of the owner's budget.",
    no_args_is_help=True,
)

Dir = Annotated[Path, typer.Option("--dir", help="Folder of agent.toml.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def show(folder: Dir = Path("."), as_json: Json = False) -> None:
    """List what was reserved, and say what is spent and what remains. Contacts nobody.

    The filter adds up Renyi divergences (RDP) and decides by them. Privacy loss distributions (PLD) bound the
    same history more tightly, which is the figure to report; of integer noise, which many clients make
    together, nobody knows them.

    [bold]Examples[/bold]

    fedcore client ledger show

    fedcore client ledger show --dir agent --json
    """
    _, ledger = ledger_of(folder)
    found = summary(ledger)
    if as_json:
        typer.echo(json.dumps(found))
        return
    for entry in found["entries"]:
        events = " + ".join(" ".join(map(str, event.values())) for event in entry["history"])
        what = f"{entry['ref']}  {entry['trust']}  {events}"
        typer.echo(f"{entry['sequence']:>6}  {when(entry['time'])}  {what}  -> {entry['spent']:.4f}")
    typer.echo(f"data set   {found['dataset']}; for one {found['unit']}, adjacency {found['adjacency']}")
    typer.echo(f"budget     epsilon {found['epsilon']:g} at delta {found['delta']:g}")
    tighter = "" if (pld := found["spent_pld"]) is None else f"; {pld:.4f} by PLD"
    typer.echo(f"spent      {found['spent']:.4f} (RDP, the filter's){tighter}")
    typer.echo(f"remaining  {found['remaining']:.4f}")
    typer.echo(f"witness    {found['witness']}")


@app.command()
def verify(folder: Dir = Path("."), as_json: Json = False) -> None:
    """Check every row and its sum, then ask the authority whether it has seen the same rows.

    Exits with 1 where the ledger was altered, truncated or rolled back. An authority that does not answer is
    mentioned, and no failure.

    [bold]Examples[/bold]

    fedcore client ledger verify

    fedcore client ledger verify --dir agent --json
    """
    config, ledger = ledger_of(folder)
    head = ledger.account().head
    found = {"rows": head.sequence, "head": head.hash.hex(), "witness": ask_witness(config, ledger)}
    if as_json:
        typer.echo(json.dumps(found))
        return
    typer.echo(f"rows       {found['rows']}; their hashes, signatures and sums hold")
    typer.echo(f"head       {found['head']}")
    typer.echo(f"witness    {found['witness']}")


@app.command()
def export(folder: Dir = Path(".")) -> None:
    """Print the ledger as JSON lines: its rows as they are, then the authorities' receipts.

    A row's hash is the SHA-256 of the hash before it and of its content; the first row holds the key.

    [bold]Examples[/bold]

    fedcore client ledger export > clinic-a.jsonl
    """
    _, ledger = ledger_of(folder)
    for row in ledger.rows():
        typer.echo(json.dumps(asdict(row) | {"hash": row.hash.hex(), "signature": row.signature.hex()}))
    for receipt in ledger.receipts():
        head, proof = receipt.head, b64encode(receipt.proof).decode()
        facts = {"receipt": receipt.name, "sequence": head.sequence, "hash": head.hash.hex()}
        typer.echo(json.dumps(facts | {"time": receipt.time, "proof": proof}))


def ledger_of(folder: Path) -> tuple["Config", "Ledger"]:
    """Return the settings in a folder and the ledger that they name; raises ConfigError without one."""
    from fedcore.client.config import Config
    from fedcore.errors import ConfigError
    from fedcore.privacy.ledger import Ledger

    config = Config.load(folder)
    if config.ledger is None:
        raise ConfigError(f"{config.place('ledger', 'path')}: '': expected the file of the data set's ledger")
    return config, Ledger(config.ledger)


def summary(ledger: "Ledger") -> dict[str, Any]:
    """Return the state of a ledger as JSON; epsilons are at its delta, times in seconds since 1970.

    spent_pld: None where an entry has no privacy loss distribution.
    """
    from fedcore.privacy.account import event_to_json
    from fedcore.privacy.accounting import accountant_for, epsilon

    account, entries = ledger.account(), ledger.entries()
    spent = account.epsilon_with()
    history = [event for entry in entries for event in entry.history]
    return {
        **{name: getattr(account, name) for name in ("dataset", "unit", "epsilon", "delta")},
        "adjacency": "add/remove",
        "spent": spent,
        "remaining": account.epsilon - spent,
        "spent_pld": epsilon(history, account.delta) if accountant_for(history) == "pld" else None,
        "witness": witnessed(ledger),
        "entries": [
            {**vars(entry), "history": [event_to_json(event) for event in entry.history]} for entry in entries
        ],
    }


def witnessed(ledger: "Ledger") -> str:
    """Return up to which row an authority has seen the ledger, and since when there are others."""
    rows, receipts = ledger.rows(), ledger.receipts()
    newest = max(receipts, key=lambda receipt: receipt.head.sequence, default=None)
    seen = newest.head.sequence if newest else 0
    upto = f"rows to {seen}, {when(newest.time)}, by the authority of {newest.name}" if newest else "none"
    since = [json.loads(row.content)["time"] for row in rows[seen : seen + 1]]
    return f"{upto}; unwitnessed since {when(since[0])}" if since else upto


def ask_witness(config: "Config", ledger: "Ledger") -> str:
    """Return what the authority says to the ledger; raises LedgerDamaged where it has seen another."""
    from fedcore.client.ledger import witnessed as shown
    from fedcore.client.state import State
    from fedcore.crypto.passphrase import unlocked
    from fedcore.errors import FedcoreError
    from fedcore.privacy.ledger import LedgerDamaged

    try:
        shown(ledger, unlocked(State(config.state).identity))
    except LedgerDamaged:
        raise
    except FedcoreError as error:
        return f"{witnessed(ledger)}; not asked now: {error}"
    return witnessed(ledger)


def when(seconds: float) -> str:
    """Return a time for a person."""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"
