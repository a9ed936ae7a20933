"""What a sampler owes: distinct clients in order, as many as asked, chosen by no more than it `sees`."""

from collections.abc import Mapping
from copy import deepcopy

import numpy as np

from fedcore.seeds import generator
from fedcore.strategies.samplers import Memory, Sampler
from fedcore.task import client_name
from fedcore.testing.laws import check_configuration, demand, repeatable

POPULATION = tuple(client_name(i) for i in range(40))
ROUND = 9
DRAWS = 400
PARTICIPATION = ("round", "rounds")


def check_sampler(part: Sampler) -> None:
    """Check a sampler; raises AssertionError with the law that it breaks and the draw that shows it."""
    check_configuration(part)
    _cohorts_are_distinct_and_in_order(part)
    _draws_repeat(part)
    _memory_is_left_alone(part)
    _sees_what_it_says(part)
    _size_is_about_as_asked(part)


def _memory() -> dict[str, dict[str, float]]:
    """Return what a server knows at round 9: of some clients, of one asked in vain, of one that left."""
    rng = generator("testing", "memory")
    names = [*POPULATION[::2], "client-that-left"]
    memory = {
        name: {
            "round": float(rng.integers(1, ROUND)),
            "rounds": float(rng.integers(1, 4)),
            "loss": float(rng.gamma(2.0)),
            "weight": float(rng.integers(1, 200)),
            "seconds": float(rng.gamma(3.0)),
        }
        for name in names
    }
    return memory | {POPULATION[1]: {"round": 3.0, "rounds": 1.0}}


def _draw(part: Sampler, memory: Memory, size: int = 8, draw: int = 0) -> tuple[str, ...]:
    return part.sample(POPULATION, size, generator("testing", "sampler", draw), memory, round=ROUND)


def _cohorts_are_distinct_and_in_order(part: Sampler) -> None:
    law = "expected a tuple of distinct names of the population, in its order"
    for memory in ({}, _memory()):
        for size in (1, 8, len(POPULATION), 2 * len(POPULATION)):
            for draw in range(20):
                cohort = _draw(part, memory, size, draw)
                in_order = tuple(name for name in POPULATION if name in cohort)
                demand(cohort == in_order, part, law, size=size, cohort=cohort, memory=memory)


def _draws_repeat(part: Sampler) -> None:
    for memory in ({}, _memory()):
        repeatable(part, "sample", lambda memory=memory: _draw(part, memory), lambda a, b: a == b)  # type: ignore[misc]


def _memory_is_left_alone(part: Sampler) -> None:
    memory = _memory()
    before = deepcopy(memory)
    _draw(part, memory)
    demand(memory == before, part, "sample writes into the memory", before=before, after=memory)


def _sees_what_it_says(part: Sampler) -> None:
    known = {"none": (), "participation": PARTICIPATION, "scalars": None}
    demand(part.sees in known, part, f"sees is {part.sees!r}, expected one of {', '.join(known)}")
    allowed = known[part.sees]
    if allowed is None:
        return
    whole = _memory()
    seen = {name: {k: v for k, v in known.items() if k in allowed} for name, known in whole.items()}
    blind: Mapping[str, Mapping[str, float]] = seen if allowed else {}
    law = f'sees = "{part.sees}", but the cohort depends on more of the memory; expected an honest `sees`'
    for draw in range(20):
        with_all, with_less = _draw(part, whole, draw=draw), _draw(part, blind, draw=draw)
        demand(with_all == with_less, part, law, with_all=with_all, with_less=with_less)


def _size_is_about_as_asked(part: Sampler) -> None:
    """At the start, when nobody has been asked before, cohorts have the size asked, on average at least."""
    for size in (1, 8):
        mean = np.mean([len(_draw(part, {}, size, draw)) for draw in range(DRAWS)])
        law = f"cohorts of {mean:.2f} on average over {DRAWS} draws, expected about {size}"
        demand(abs(mean - size) <= 5 * np.sqrt(size / DRAWS), part, law)
