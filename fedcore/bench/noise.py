"""`fedcore bench noise`: a round with noise in the sum beside the same round without, in turn.

A round is what a coordinator does with updates that are in memory: check and add each, then advance. What
counts is the median of the ratios of neighbouring runs, because machines drift.
"""

import time
from collections.abc import Iterator
from statistics import median
from typing import Any

import numpy as np

from fedcore.layout import Entry, Layout, Parameters
from fedcore.messages import Plan, Ref, Update
from fedcore.seeds import generator
from fedcore.spec import RunSpec
from fedcore.strategies import Strategy
from fedcore.strategies.privacy import private
from fedcore.strategies.rounds import Round, advance, initial_state, receive, train_plan

NOISY = {"noise_multiplier": 1.0, "clip_norm": 1.0}
DISTINCT = 4  # updates that the clients share, more than a cache holds at once
LIMIT = 1.5  # times the round without noise


def measure(clients: int, size: int, runs: int) -> Iterator[dict[str, Any]]:
    """Time rounds of so many clients and parameters; yield a line for each level."""
    levels = {
        "client": {"level": "client", "population": clients, **NOISY},
        "adaptive": {"level": "client", "population": clients, "adaptive": True, **NOISY},
        "tree": {"level": "tree", "separation": 1, **NOISY},
    }
    plain = Job(clients, size, {})
    for name, table in levels.items():
        noisy = Job(clients, size, table)
        pairs = [(noisy.seconds(number), plain.seconds(number)) for number in range(1, runs + 2)]
        del pairs[0]  # which also starts what a first call starts
        ratio = median(ours / theirs for ours, theirs in pairs)
        yield {
            "bench": "noise",
            "level": name,
            "clients": clients,
            "size": size,
            "seconds": round(median(ours for ours, _ in pairs), 4),
            "plain_s": round(median(theirs for _, theirs in pairs), 4),
            "ratio_to_plain": round(ratio, 3),
            "limit_ratio": LIMIT,
        }


class Job:
    """Rounds of one strategy, always from the same state."""

    def __init__(self, clients: int, size: int, privacy: dict[str, Any]) -> None:
        """Draw updates within the clip norm, if there is one."""
        self.spec = RunSpec.parse({"cohort": {"size": clients}, "privacy": privacy})
        self.strategy = private(Strategy(), self.spec)
        self.layout = Layout((Entry("parameters", (size,), "float32", "shared"),))
        start = Parameters(np.zeros(size, np.float32), np.zeros(0, np.float32))
        self.state = initial_state(self.strategy, start)
        self.names = tuple(str(i) for i in range(clients))
        rng, scale = generator("bench noise"), np.float32(0.5 / size**0.5)
        deltas = [rng.standard_normal(size, dtype=np.float32) * scale for _ in range(DISTINCT)]
        scalars = dict.fromkeys(self.plan(1).scalars, 0.0)
        self.updates = [Update({"delta": delta}, scalars) for delta in deltas]

    def plan(self, number: int) -> Plan:
        """Plan a round in which everybody takes part."""
        ref, count = Ref("bench", number, 0, "train"), len(self.names)
        return train_plan(self.strategy, self.spec, self.layout, ref, self.names, count)

    def seconds(self, number: int) -> float:
        """Return how long the round took from the first update to the new model."""
        plan = self.plan(number)
        started = time.perf_counter()
        live = Round(plan)
        for i, client in enumerate(self.names):
            receive(live, client, self.updates[i % DISTINCT])
        live.close()
        advance(self.strategy, live, self.state, 0)
        return time.perf_counter() - started
