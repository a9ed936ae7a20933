"""The buffered driver of steps: clients train at their own speed, and the model moves on arrivals.

    queue                            clients at work, by (virtual second of arrival, name)
    step = workers.step(state, ...)  arrivals until K of them are good, in a round like any other
    state = advance(..., step.round, state, ...)

Clients that arrive in the same instant do so by name, and all of them before their places are filled again. A
client that has arrived rests until the model has moved: a step has K different clients. So this is a
synchronous run where K = concurrency and all are equally fast.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

from fedcore.client.training import Kept
from fedcore.errors import SpecError
from fedcore.layout import Layout, Parameters
from fedcore.messages import Plan, Ref
from fedcore.simulations.answers import Answers
from fedcore.simulations.at_work import AtWork, Version
from fedcore.spec import RunSpec
from fedcore.strategies import Strategy
from fedcore.strategies.modes import OnArrival
from fedcore.strategies.rounds import Round, State, cohort, train_plan
from fedcore.strategies.steps import Arrival, passes, step
from fedcore.strategies.terms import Rows


@dataclass(frozen=True)
class Step:
    """A closed round, what its clients keep, and the virtual seconds that it took.

    staleness: of every arrival, by client; empty where all clients start from the same model.
    """

    round: Round
    kept: Mapping[str, Kept]
    seconds: float
    staleness: Mapping[str, int] = field(default_factory=dict)

    @property
    def row(self) -> dict[str, float]:
        """The step's `virtual_seconds`, and the mean `staleness` of what was folded where it may be late."""
        stale = [self.staleness[client] for client in self.round.folded if self.staleness]
        mean = {"staleness": sum(stale) / len(stale)} if stale else {}
        return {"virtual_seconds": self.seconds, **mean}


class Workers:
    """The clients that are at work, in virtual time.

    Nobody trains before a first result of a version is due: then all who have started from it train together,
    so that an engine may take them as a chunk. Attackers see the updates of those that train with them.
    """

    def __init__(
        self,
        strategy: Strategy,
        spec: RunSpec,
        layout: Layout,
        names: Sequence[str],
        seconds: Callable[[str], float],
        answer: Callable[[Plan, Parameters], Iterable[Answers]],
    ) -> None:
        """Begin at second 0 with nobody at work.

        seconds: how long a client works. answer: trains the cohort of a plan. Raises SpecError where there
        are fewer clients than a step takes.
        """
        mode = strategy.mode
        assert isinstance(mode, OnArrival)
        if mode.k > len(names):
            raise SpecError(
                f"{mode}: a step takes {mode.k} different clients and there are {len(names)}; set "
                f"strategy.mode.k to at most {len(names)}, or raise simulation.clients"
            )
        self.strategy, self.mode, self.spec, self.layout, self.names = strategy, mode, spec, layout, names
        self.seconds, self.answer = seconds, answer
        self.places = mode.concurrency or spec.cohort.size
        self.order = {name: i for i, name in enumerate(names)}
        self.now = AtWork()

    def step(self, state: State, progress: Callable[[int], None]) -> Step:
        """Let clients work until K updates are in that pass the checks, or nobody is left to wait for.

        progress: told the number of them after each arrival.
        """
        now = self.now
        began, accepted, draws = now.clock, 0, 0
        arrived: dict[str, Arrival] = {}
        kept: dict[str, Kept] = {}
        while accepted < self.mode.k:
            if not now.queue or now.queue[0][0] > now.clock:
                draws += self.hire(state, draws, arrived)
            if not now.queue:
                break
            now.clock, client = heappop(now.queue)
            arrival, kept[client] = self.collect(client, state)
            arrived[client] = arrival
            accepted += passes(self.mode, self.plan(state.round, (client,)), arrival, state.parameters)
            progress(accepted)
        plan = self.plan(state.round, tuple(sorted(arrived, key=self.order.__getitem__)))
        round = step(self.mode, plan, arrived.values(), state.parameters)
        staleness = {client: arrival.staleness for client, arrival in arrived.items()}
        return Step(round, kept, now.clock - began, staleness)

    def plan(self, version: int, clients: tuple[str, ...]) -> Plan:
        """Plan training from a version, as a synchronous round would that starts from it."""
        ref = Ref(self.spec.run.name, version + 1, 0, "train")
        return train_plan(self.strategy, self.spec, self.layout, ref, clients, len(self.names))

    def hire(self, state: State, draw: int, resting: Iterable[str]) -> bool:
        """Give the present model to as many clients as there are free places; tell whether any was drawn.

        draw: how many draws this model has seen, as a deployed round would count its attempts. resting: who
        has arrived since the model moved.
        """
        now = self.now
        busy = {*now.started, *resting}
        idle = [name for name in self.names if name not in busy]
        free = self.places - len(now.queue)
        if not idle or not free:
            return False
        ref = Ref(self.spec.run.name, state.round + 1, draw, "train")
        version = now.versions.setdefault(state.round, Version(state.parameters))
        for client in cohort(self.strategy, self.spec, ref, idle, free, state.memory):
            now.started[client] = state.round
            version.untrained.add(client)
            heappush(now.queue, (now.clock + self.seconds(client), client))
        return True

    def collect(self, client: str, state: State) -> tuple[Arrival, Kept]:
        """Return what a client has sent, and what it keeps; it is at work no more."""
        number = self.now.started.pop(client)
        version = self.now.versions[number]
        if client in version.untrained:
            clients = tuple(sorted(version.untrained, key=self.order.__getitem__))
            version.untrained.clear()
            for answers in self.answer(self.plan(number, clients), version.parameters):
                single = [Rows.of([update]) for update in answers.rows.updates()]
                version.trained |= zip(answers.clients, zip(single, answers.kept, strict=True), strict=True)
        rows, kept = version.trained.pop(client)
        if not version.untrained and not version.trained:
            del self.now.versions[number]
        staleness = state.round - number
        return Arrival(client, rows, staleness, version.parameters, self.seconds(client)), kept
