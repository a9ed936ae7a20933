"""An audit of a run: simulate it with canaries, attack what it releases, hold the bounds against a claim."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from fedcore.audit import client_level, example_level
from fedcore.audit.attacks import SIGNIFICANCE, Setting
from fedcore.audit.canaries import Assigned
from fedcore.audit.data import Some, as_audited, held_by
from fedcore.audit.inversion import deep_leakage, first_linear, from_update, relative_error
from fedcore.audit.report import Audit, Inversion
from fedcore.audit.watch import Watched
from fedcore.errors import SpecError
from fedcore.privacy.claims import guarantees, resolved, unit_of
from fedcore.privacy.levels import ClientLevel, DistributedLevel, ExampleLevel, Off
from fedcore.seeds import generator
from fedcore.simulations.run import Progress
from fedcore.spec import RunSpec
from fedcore.strategies.catalog import strategy_of
from fedcore.strategies.conflicts import check
from fedcore.task import Task

RATE = 0.1  # of the one step of SGD that is inverted


def audit(
    task: Task,
    spec: RunSpec,
    folder: Path | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
    *,
    deep: bool = False,
) -> Audit:
    """Attack simulations of a run and return what was found, beside what the run claims.

    folder: where the spec's "module:object" names are searched first. deep: try DLG as well. Canaries are
    drawn from the run's seed. An audit that finds nothing proves nothing: see `Audit.ceiling` for what it
    could have found. Raises what a simulation raises.
    """
    spec = resolved(spec)
    if isinstance(spec.privacy, DistributedLevel):
        raise SpecError(
            'privacy.level = "distributed": an audit has larger cohorts than the run, and its noise would be '
            'made for those; audit the same training with privacy.level = "local"'
        )
    check(strategy_of(spec, local=True, folder=folder), spec)
    privacy = spec.privacy
    level = example_level if isinstance(privacy, Off | ExampleLevel) else client_level
    setting = Setting.of(spec, generator(spec.run.seed))
    return Audit(
        tuple(guarantees(spec, spec.run.rounds)),
        setting.claimed,
        setting.delta,
        "example" if isinstance(privacy, Off) else unit_of(privacy),
        tuple(level.attacks(task, spec, folder, progress)),
        tuple(inversions(task, spec, deep)),
        SIGNIFICANCE,
    )


def inversions(task: Task, spec: RunSpec, deep: bool) -> Iterator[Inversion]:
    """Yield what one example's update gives away: plain, and as the run releases it."""
    held = held_by(task, spec, spec.simulation.clients).taken(np.array([0]))
    runs = {"without privacy": spec.model_copy(update={"privacy": Off()})}
    if not isinstance(spec.privacy, Off):
        runs["in this run"] = spec
    for where, each in runs.items():
        yield from inverted(task, alone(each), held, where, deep)


def alone(spec: RunSpec) -> RunSpec:
    """Return the spec of one client that takes one step of SGD on its one example, in a single round."""
    step = ["client.epochs=1", "client.steps=1", "client.batch_size=1"]
    plain = [f'client.optimizer={{name="sgd", lr={RATE}}}', 'strategy={name="fedavg"}']
    sizes = ["run.rounds=1", "simulation.clients=1", "cohort.size=1"]
    if isinstance(spec.privacy, ExampleLevel):
        sizes.append("privacy.sampling_rate=1.0")
    if isinstance(spec.privacy, ClientLevel):
        sizes += ["privacy.population=1", "privacy.adaptive=false"]
    return as_audited(spec, *sizes, *step, *plain)


def inverted(task: Task, spec: RunSpec, one: Some, where: str, deep: bool) -> Iterator[Inversion]:
    """Yield the reconstructions of an example from the movement of the model."""
    watched = Watched(Assigned(task, one.named, (one.x, one.y)), spec)
    first, _ = watched.models()
    watched.run(lambda _: None)
    moved = watched.state.parameters.shared - watched.started.shared
    if names := first_linear(first, one.x):
        guess = from_update(watched.layout, moved, names)
        yield Inversion(f"first linear layer, {where}", relative_error(guess, one.x))
    if deep:
        parts = watched.layout.unflatten(moved, "shared")
        gradients = {name: torch.from_numpy(part.copy()) / -RATE for name, part in parts.items()}
        guess = deep_leakage(first, lambda output: task.loss(output, one.y), gradients, one.x.shape)
        yield Inversion(f"DLG, {where}", relative_error(guess, one.x))
