"""`fedcore audit`: try to break what a run claims."""

import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from datetime import datetime
from math import isfinite, isnan
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fedcore.errors import ConfigError

if TYPE_CHECKING:
    from fedcore.audit.report import Audit, Bound
    from fedcore.spec import RunSpec

REFUTED = 1  # exit code of a violation


def audit(
    path: Annotated[Path, typer.Argument(metavar="SPEC.toml", help="The run spec.", show_default=False)],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="key=value, as run.rounds=3.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for audit.json; runs/NAME-audit-TIME if left out.")
    ] = None,
    deep: Annotated[bool, typer.Option("--deep", help="Try to invert gradients by DLG, too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print audit.json and nothing else.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> None:
    """Try to break what a run claims: simulate it with canaries, attack it, compare.

    Exit code 1 is a violation: a lower bound on epsilon above the claim. An audit that finds none proves
    nothing; it says what it could have found. A spec without privacy shows what an attacker learns.

    [bold]Examples[/bold]

    fedcore audit run.toml

    fedcore audit run.toml --set privacy.target_epsilon=2.0

    fedcore audit run.toml --json --quiet | jq .verdict
    """
    from fedcore.simulations.result import make_folder
    from fedcore.spec import RunSpec

    spec = RunSpec.load(path, overrides or ())
    folder = out or Path("runs") / f"{spec.run.name}-audit-{datetime.now():%Y%m%d-%H%M%S}"
    if (written := folder / "audit.json").exists():
        raise ConfigError(f"{folder} holds another audit; name another folder with --out")
    make_folder(folder)
    with redirect_stdout(sys.stderr):  # what the task prints is no result
        found = attacked(path, spec, Console(stderr=True, quiet=quiet), deep)
    written.write_text(found.to_json(), encoding="utf-8")
    (folder / "spec.toml").write_text(spec.to_toml(), encoding="utf-8")
    if as_json:
        typer.echo(found.to_json(), nl=False)
    else:
        typer.echo("\n".join(picture(found)))
        typer.echo(f"file       {written}")
    if found.violation:
        raise typer.Exit(REFUTED)


def attacked(path: Path, spec: "RunSpec", console: Console, deep: bool) -> "Audit":
    """Audit the spec that was read from `path`."""
    from fedcore.simulations.cli import simulation_extra
    from fedcore.simulations.display import shown
    from fedcore.task import resolve

    with shown(console) as progress:
        with simulation_extra():
            from fedcore.audit.run import audit as attack
        return attack(resolve(spec.run.task, path.parent), spec, path.parent, progress, deep=deep)


def picture(found: "Audit") -> Iterator[str]:
    """Yield an audit as a person reads it, line by line: claim, attacks, verdict."""
    if found.claimed is None:
        yield "claim      none: this run is not private; what follows is what an attacker learns"
    for guarantee in found.guarantees:
        none = f"none against the {guarantee.adversary}, who makes the noise"
        yield f"claim      {guarantee if isfinite(guarantee.epsilon) else none}"
    if found.claimed is not None:
        yield f"attacked   epsilon {found.claimed:.2f}, of training alone"
    for attack in found.attacks:
        yield f"\n{attack.name} ({attack.canaries} canaries)"
        if not isnan(attack.auc):
            rates = (f"{r[0]:.3f} ({r[1]:.3f} to {r[2]:.3f}) at {at}" for at, r in attack.rates.items())
            yield f"  AUC {attack.auc:.3f}, true positives {', '.join(rates)} false ones"
        yield from (f"  {bounded(bound)}" for bound in attack.bounds)
    yield ""
    for inversion in found.inversions:
        said = "recovers the example" if inversion.succeeded else "fails"
        yield f"inversion  {inversion.name}: {said} (relative error {inversion.error:.2g})"
    yield f"verdict    {found.verdict}: {_explained(found)}"


def bounded(bound: "Bound") -> str:
    """Return a bound in words."""
    if bound.kind == "estimate":
        return f"epsilon is about {bound.epsilon:.2f}, an estimate and no bound"
    text = f"epsilon >= {bound.epsilon:.2f}, of {bound.ceiling:.2f} that could be found, for {bound.kind}"
    return f"{text}; noise <= {bound.noise:.2f} × what is claimed" if isfinite(bound.noise) else text


def _explained(found: "Audit") -> str:
    """Return the verdict's reason."""
    bound = f"epsilon is at least {found.epsilon:.2f} with {1 - found.significance:.0%} confidence"
    if found.claimed is None:
        return bound
    if found.violation:
        return f"{bound}, and {found.claimed:.2f} is claimed"
    if found.ceiling <= found.claimed:
        return (
            f"{found.claimed:.2f} is claimed, and {found.ceiling:.2f} is the most that this audit can find; "
            "audit it with more noise, such as --set privacy.target_epsilon=2.0"
        )
    return f"{bound}; this audit could have found {found.ceiling:.2f}"
