"""Canary examples in the data of clients: Dirac canaries, and examples whose loss gives them away."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from fedcore.audit.attacks import Setting, attack, dirac_attacks
from fedcore.audit.canaries import Canaried
from fedcore.audit.data import as_audited, held_by, losses, together
from fedcore.audit.report import Attack
from fedcore.audit.watch import Watched
from fedcore.privacy.levels import Off
from fedcore.seeds import generator
from fedcore.simulations.run import Progress
from fedcore.spec import RunSpec
from fedcore.task import Task

DIRACS = 2000
CLIENTS = 10  # that are trained, all of them in every round, as the claim assumes
CANDIDATES = 1000  # of the clients' own examples, and as many with a target that is not theirs
OVER = 100.0  # a canary's norm in clip norms


def attacks(
    task: Task, spec: RunSpec, folder: Path | None, progress: Callable[[Progress], None]
) -> Iterator[Attack]:
    """Yield the attacks on one run at the spec's own setting, of the coordinator, who sees every update.

    White box: each Dirac canary's coordinate, summed over the rounds. Black box: how much the loss of an
    example fell from the first model to the last, for examples with the target of another, and for natural
    ones, of which half are left out.
    """
    rng, clients = generator(spec.run.seed, "audit"), min(spec.simulation.clients, spec.cohort.size, CLIENTS)
    audited = as_audited(spec, f"simulation.clients={clients}", f"cohort.size={clients}")
    held = held_by(task, spec, clients)
    candidates = rng.permutation(len(held.owner))[:CANDIDATES]
    natural = held.taken(candidates)
    foreign = replace(natural, y=held.taken(rng.integers(len(held.owner), size=len(candidates))).y)
    diracs = replace(held.taken(np.zeros(DIRACS, np.intp)), owner=np.arange(DIRACS) % clients)
    own, wrong, marked = (rng.random(len(some.owner)) < 0.5 for some in (natural, foreign, diracs))

    kept = held.taken(np.setdiff1d(np.arange(len(held.owner)), candidates[~own]))
    parts = kept, foreign.taken(wrong), diracs.taken(marked)
    tags = [DIRACS] * (len(kept.owner) + int(wrong.sum())) + np.flatnonzero(marked).tolist()
    strength = OVER * (1.0 if isinstance(spec.privacy, Off) else spec.privacy.clip_norm)
    like = held.x[:1], held.y[:1]
    watched = Watched(Canaried(task, together(parts, tags).named, like, DIRACS, strength), audited, folder)
    watched.own(diracs.owner)
    watched.run(progress)

    setting, (first, last) = Setting.of(audited, rng), watched.models()
    yield from dirac_attacks("Dirac examples", watched.shown, marked, setting)
    for name, some, included in (("wrong targets", foreign, wrong), ("natural examples", natural, own)):
        fell = losses(task, first, some) - losses(task, last, some)
        yield attack(f"{name}, by the loss", fell, included, setting)
