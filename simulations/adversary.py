"""Who attacks in a simulation, when, and with what: the run spec's table `attack`, at work."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from fedcore.client.examples import Examples, PairExamples
from fedcore.errors import expect
from fedcore.layout import Vector
from fedcore.plugins import build
from fedcore.seeds import generator
from fedcore.simulations.answers import Answers
from fedcore.simulations.attacks import ATTACKS, Context, Forges, Lies, Poisons, Triggered
from fedcore.simulations.attacks.attack import Deltas
from fedcore.strategies.terms import Rows


@dataclass(frozen=True)
class Schedule:
    """Which clients are malicious, and in which rounds they act: `first`, then `every` so many.

    fraction: of all clients, rounded down, drawn at random; 0 leaves everybody honest. which: their numbers,
    from 0, in place of a fraction.
    """

    fraction: float = 0.2
    which: tuple[int, ...] = ()
    first: int = 1
    every: int = 1

    def __post_init__(self) -> None:
        expect(0 <= self.fraction <= 1, self, "0 <= fraction <= 1, of all clients")
        expect(self.first >= 1 and self.every >= 1, self, "first >= 1, a round, and every >= 1")


class Adversary:
    """The malicious clients of a population, who act as one.

    `state` is what their attack keeps between rounds: arrays only, so a checkpoint can save and set it.
    """

    def __init__(
        self,
        table: Mapping[str, Any] | str,
        names: Sequence[str],
        seed: int,
        parts: Mapping[str, Callable[..., Any]] = ATTACKS,
    ) -> None:
        """Read the table `{name, fraction, first, every, ...the attack's own fields}` and draw the clients.

        names: the population's, in order. seed: the run's. parts: attacks by name. Raises SpecError for a
        key, a type or a value that does not fit, and for a positive fraction that is nobody.
        """
        table = {"name": table} if isinstance(table, str) else dict(table)
        when = {f.name: table.pop(f.name) for f in fields(Schedule) if f.name in table}
        self.schedule = build({"attack": Schedule}, {"name": "attack", **when}, "attack")
        self.attack: object = build(parts, table, "attack")
        self.seed = seed
        self.index = {name: i for i, name in enumerate(names)}
        self.state: dict[str, Vector] = {}
        self.malicious = frozenset(names[i] for i in self._drawn(len(names)))

    def _drawn(self, clients: int) -> Sequence[int]:
        """Return the numbers of the malicious clients."""
        fraction, which = self.schedule.fraction, self.schedule.which
        if which:
            expect(0 <= min(which) and max(which) < clients, self.schedule, f"which from 0 to {clients - 1}")
            return which
        count = int(round(fraction * clients, 6))  # 0.29 * 100 is 28.999999999999996
        nobody = f"a fraction of which {clients} clients have one: at least {1 / clients:.3g}, or 0"
        expect(count > 0 or not fraction, self.schedule, nobody)
        drawn: list[int] = generator(self.seed, "attackers").choice(clients, count, replace=False).tolist()
        return drawn

    def active(self, round: int) -> bool:
        """Whether the malicious clients act in a round; in the others they are honest."""
        since = round - self.schedule.first
        return since >= 0 and since % self.schedule.every == 0

    def poisoned(self, client: str, examples: Examples) -> Examples:
        """Return what a client trains on in an active round: `examples` itself unless it is to be poisoned.

        Poisoned examples are drawn from (seed, client), the same in every round.
        """
        if client not in self.malicious or not isinstance(self.attack, Poisons) or not len(examples):
            return examples
        x, y = examples.batch(slice(0, len(examples)))
        return PairExamples(*self.attack.poison(x, y, generator(self.seed, "poison", client)))

    def triggered(self, examples: Examples) -> Examples | None:
        """Return the test examples on which a backdoor shows, labelled with what the attacker wants.

        The accuracy on them is the attack's success rate; None for an attack that has no trigger.
        """
        if not isinstance(self.attack, Triggered) or not len(examples):
            return None
        return PairExamples(*self.attack.triggered(*examples.batch(slice(0, len(examples)))))

    def forge(
        self, clients: Sequence[str], rows: Rows, aggregate: Callable[[Deltas], Vector], round: int
    ) -> Rows:
        """Return what the server receives from a cohort, given what all would send honestly.

        clients: who sent each of the k rows; rows: with the vector `delta`, shape (k, d). aggregate: what the
        server would make of k such rows in this order, shape (d,). Where nobody in the cohort is honest, the
        attackers take each other for it. Nothing is written into `rows`.
        """
        bad = np.array([client in self.malicious for client in clients], bool)
        if not bad.any() or not self.active(round):
            return rows
        vectors, scalars = dict(rows.vectors), dict(rows.scalars)
        if isinstance(self.attack, Forges):
            good = bad if bad.all() else ~bad
            honest, own = vectors["delta"][good], vectors["delta"][bad]
            place = np.empty(len(clients), np.int64)  # of each client's row among the honest and then the own
            place[good], place[bad] = np.arange(len(honest)), len(honest) + np.arange(len(own))
            context = Context(
                round,
                generator(self.seed, "attack", round),
                lambda stacked: aggregate(stacked[place]),
                [self.index[client] for client, chosen in zip(clients, good, strict=True) if chosen],
                self.state,
            )
            vectors["delta"] = vectors["delta"].copy()
            vectors["delta"][bad] = self.attack.forge(honest, own, context)
        if isinstance(self.attack, Lies):
            said = self.attack.scalars({name: column[bad] for name, column in scalars.items()})
            for name, column in said.items():
                scalars[name] = scalars[name].copy()
                scalars[name][bad] = column
        return Rows(vectors, scalars)


def attacked(
    answers: Iterable[Answers], adversary: Adversary, aggregate: Callable[[Deltas], Vector], round: int
) -> Iterator[Answers]:
    """Yield a cohort's answers at once, by name, with the attackers' forged: they see everybody's first."""
    parts = list(answers)
    clients = [client for part in parts for client in part.clients]
    kept = [state for part in parts for state in part.kept]
    order = sorted(range(len(clients)), key=clients.__getitem__)
    names = [clients[i] for i in order]
    rows = adversary.forge(names, Rows.stacked([part.rows for part in parts]).taken(order), aggregate, round)
    yield Answers(names, rows, [kept[i] for i in order])
