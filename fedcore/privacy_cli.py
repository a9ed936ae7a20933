"""`fedcore privacy`: what a run promises, before it starts."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fedcore.errors import SpecError
from fedcore.privacy.words import AGAINST, TRUST, UNITS, released

if TYPE_CHECKING:
    from fedcore.privacy.levels import Private
    from fedcore.spec import RunSpec

app = typer.Typer(name="privacy", no_args_is_help=True)

TARGETS = (1.0, 3.0, 8.0)


@app.callback()
def privacy() -> None:
    """Differential privacy: what a run promises, before it starts."""


@app.command()
def plan(
    path: Annotated[Path, typer.Argument(metavar="SPEC.toml", show_default=False)],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="key=value, as run.rounds=3.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; null is no finite epsilon.")] = False,
) -> None:
    """Print the epsilon of a run before it starts, for whom and against whom it holds, and what it assumes.

    Then what one more round would cost, and the noise that other epsilons need. Nothing is trained, and no
    data are read. A spec that cannot be private is refused with what to change.

    [bold]Examples[/bold]

    fedcore privacy plan run.toml

    fedcore privacy plan run.toml --set privacy.noise_multiplier=1.2 --set run.rounds=50

    fedcore privacy plan run.toml --json | jq '.guarantees[] | select(.adversary == "receiver").epsilon'
    """
    from fedcore.spec import RunSpec

    planned = plan_of(RunSpec.load(path, overrides or ()), path.parent)
    if as_json:
        typer.echo(json.dumps(planned, indent=2))
    else:
        for part in picture(planned):
            Console(highlight=False).print(part, soft_wrap=True)


def plan_of(spec: "RunSpec", folder: Path | None = None) -> dict[str, Any]:
    """Return what a run promises, as `--json` prints it.

    folder: where "module:object" names of the spec are searched first. Raises SpecError where the run cannot
    be private as its spec asks.
    """
    from fedcore.privacy.claims import promise, resolved
    from fedcore.privacy.levels import Off
    from fedcore.strategies import encryption
    from fedcore.strategies.catalog import strategy_of
    from fedcore.strategies.privacy import check

    target, spec = getattr(spec.privacy, "target_epsilon", 0.0), resolved(spec)
    strategy = strategy_of(spec, local=True, folder=folder)
    check(strategy, spec)
    spec = encryption.resolved(strategy, spec)
    planned = {"run": spec.run.name, "rounds": spec.run.rounds, **promise(spec, spec.run.rounds)}
    if isinstance(level := spec.privacy, Off):
        return planned
    return planned | {
        "target_epsilon": target or None,
        "warnings": list(warnings(level)),
        "one_more_round": one_more_round(spec, level),
        "noise_for": {} if target else {f"{e:g}": noise_for(spec, level, e) for e in TARGETS},
    }


def warnings(level: "Private") -> Iterator[str]:
    """Yield what makes a promise worth little."""
    population = getattr(level, "population", 0)
    if population * level.delta >= 1:
        yield (
            f"delta = {level.delta:g} is not below 1/population = {1 / population:g}, so that to publish one "
            "client's data would keep the promise, too; set privacy.delta lower"
        )


def one_more_round(spec: "RunSpec", level: "Private") -> float:
    """Return what one more round adds to the receiver's epsilon."""
    from fedcore.privacy.accounting import epsilon
    from fedcore.privacy.claims import history

    longer = spec.with_(f"run.rounds={spec.run.rounds + 1}")
    spent = [epsilon(history(each, each.run.rounds), level.delta) for each in (spec, longer)]
    return max(0.0, spent[1] - spent[0])


def noise_for(spec: "RunSpec", level: "Private", target: float) -> float | None:
    """Return the noise multiplier with which the run would stay within an epsilon, None where none does."""
    from fedcore.privacy.claims import resolved

    other = level.model_copy(update={"noise_multiplier": 0.0, "target_epsilon": target})
    try:
        aimed = resolved(spec.model_copy(update={"privacy": other})).privacy
    except SpecError:
        return None
    return getattr(aimed, "noise_multiplier", None)


def picture(planned: Mapping[str, Any]) -> Iterator[Any]:
    """Yield a plan as a person reads it."""
    if not planned["guarantees"]:
        yield f'{planned["run"]}: no differential privacy (privacy.level = "none"), and so no epsilon'
        yield 'next: privacy.level = "example", "client", "tree", "local" or "distributed"'
        return
    target, first = planned["target_epsilon"], planned["guarantees"][0]
    least = f", the least within target_epsilon = {target:g}" if target else ""
    yield f"{planned['run']}: {planned['level']} level, {planned['rounds']} rounds"
    yield f"protects     {UNITS[planned['unit']]}"
    yield f"noise        {planned['noise_multiplier']:g} × clip norm {planned['clip_norm']:g}{least}"
    yield f"             {TRUST[planned['trust']]}"
    yield f"releases     {', '.join(map(released, planned['releases']))}"
    yield f"assumes      {planned['assumes']}\n"
    table = Table("against", "epsilon", "delta", box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for guarantee in planned["guarantees"]:
        known = guarantee["epsilon"]
        numbers = ("infinite", "") if known is None else (f"{known:.3f}", f"{guarantee['delta']:g}")
        table.add_row(AGAINST[guarantee["adversary"]], *numbers)
    yield table
    yield f"{first['adjacency']} adjacency, {first['accountant'].upper()} accountant\n"
    yield from (f"warning: {text}\n" for text in planned["warnings"])
    yield f"one more round costs {planned['one_more_round']:.3g}"
    for text, noise in planned["noise_for"].items():
        yield f"epsilon {text} needs noise_multiplier {noise}" if noise else f"epsilon {text} is out of reach"
