"""Canary clients: Dirac canaries, clients whose loss gives them away, one-shot canaries for an estimate."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from fedcore.audit.attacks import Setting, attack, dirac_attacks
from fedcore.audit.canaries import Assigned, Canaried, tagged
from fedcore.audit.data import as_audited, held_by, losses
from fedcore.audit.example_level import OVER
from fedcore.audit.one_shot import cosines, directions, epsilon_estimate
from fedcore.audit.report import Attack, Bound
from fedcore.audit.watch import Watched
from fedcore.privacy.claims import sampling_rate
from fedcore.privacy.levels import ClientLevel, Off, TreeLevel
from fedcore.seeds import generator
from fedcore.simulations.run import Progress
from fedcore.spec import RunSpec
from fedcore.task import Task, client_name

TRAININGS = 20_000  # of canary clients, about
FEWEST, MOST = 400, 4000  # canary clients
PLANTED, LEAST = 64, 8  # one-shot canaries, at most, and for any estimate

Show = Callable[[Progress], None]


def attacks(task: Task, spec: RunSpec, folder: Path | None, progress: Show) -> Iterator[Attack]:
    """Yield the attacks on two runs: of canary clients alone, and the spec's own with half of its clients."""
    yield from mechanism(task, spec, folder, progress)
    yield from population(task, spec, folder, progress)


def mechanism(task: Task, spec: RunSpec, folder: Path | None, progress: Show) -> Iterator[Attack]:
    """Yield the attacks on Dirac canaries: clients whose update lies along a coordinate of their own.

    Half of them have an example that makes such an update, and the product clips it; the others' is zero, as
    if they were not there. Sampling rate, noise and rounds are the spec's; the number of clients is not, of
    which the claim is independent.
    """
    assert not isinstance(spec.privacy, Off)
    rng, audited = generator(spec.run.seed, "audit"), of_canaries(spec)
    count = audited.simulation.clients
    included = rng.random(count) < 0.5
    held = held_by(task, spec, spec.simulation.clients)
    x, y = held.x[:1], held.y[:1]
    tags = np.where(included, np.arange(count), count + 1).tolist()
    data = {client_name(i): (tagged(x, [tag]), y) for i, tag in enumerate(tags)}
    watched = Watched(Canaried(task, data, (x, y), count, OVER * spec.privacy.clip_norm), audited, folder)
    watched.own(np.arange(count))
    watched.run(progress)
    yield from dirac_attacks("Dirac clients", watched.shown, included, Setting.of(audited, rng))


def of_canaries(spec: RunSpec) -> RunSpec:
    """Return the spec with as many clients as an audit wants, at the same rate, who take one large step."""
    privacy = spec.privacy
    rate = sampling_rate(spec) if isinstance(privacy, ClientLevel) else 1.0
    rate = 1 / privacy.separation if isinstance(privacy, TreeLevel) else rate
    size = max(1, round(rate * np.clip(TRAININGS / (rate * spec.run.rounds), FEWEST, MOST)))
    count = round(size / rate)
    sizes = [f"simulation.clients={count}", f"cohort.size={size}"]
    if isinstance(privacy, ClientLevel):
        sizes.append(f"privacy.population={count}")
    step = [
        "client.epochs=1",
        "client.steps=0",
        "client.batch_size=1",
        'client.optimizer={name="sgd", lr=1.0}',
    ]
    return as_audited(spec, *sizes, *step)


def population(task: Task, spec: RunSpec, folder: Path | None, progress: Show) -> Iterator[Attack]:
    """Yield the loss attack on the spec's own clients, and the estimate from updates planted among them.

    Half of the natural clients are left without data. The estimate is from the cosines of the planted
    directions with the way that the model went.
    """
    rng = generator(spec.run.seed, "audit", "population")
    held = held_by(task, spec, spec.simulation.clients)
    order = rng.permutation(np.unique(held.owner))
    planted, natural = np.split(order, [min(PLANTED, len(order) // 4)])
    included = rng.random(len(natural)) < 0.5
    data = held.taken(np.isin(held.owner, natural[included])).named
    watched = Watched(Assigned(task, data, (held.x[:1], held.y[:1])), as_audited(spec), folder)
    drawn = directions(len(planted), watched.layout.shared_size, rng)
    watched.planted = {client_name(int(i)): row for i, row in zip(planted, drawn, strict=True)}
    watched.run(progress)

    setting, (first, last) = Setting.of(watched.spec, rng), watched.models()
    fell = losses(task, first, held) - losses(task, last, held)
    means = np.array([fell[held.owner == i].mean() for i in natural])
    yield attack("natural clients, by the loss", means, included, setting)
    if len(planted) < LEAST:
        return
    moved = watched.state.parameters.shared.astype(np.float64) - watched.started.shared
    estimate = epsilon_estimate(cosines(drawn, moved), len(moved), setting.delta)
    yield Attack("one-shot clients, in the last model", len(drawn), bounds=(Bound("estimate", estimate),))
