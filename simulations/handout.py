"""Clients handed out to workers, wherever these are: the largest first, and again where a worker has died.

Sums are exact, so whoever trains whom, and in whatever order, a run of workers that train one client after
another has the bits of the sequential engine.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Generic, Protocol, TypeVar

from fedcore.client.training import Trainer, uses_torch
from fedcore.errors import RunFailed, SpecError
from fedcore.layout import Parameters
from fedcore.messages import Plan
from fedcore.privacy.levels import OFF
from fedcore.simulations.answers import Answers, ClientStates, Summed
from fedcore.simulations.population import Population
from fedcore.simulations.sequential import SMALL, TOGETHER
from fedcore.simulations.worker import Given
from fedcore.spec import RunSpec
from fedcore.strategies import Strategy
from fedcore.strategies.modes import Synchronous

log = logging.getLogger("fedcore.simulations")

DEATHS = 3  # in a row, without an answer in between, after which the run ends


class Member(Protocol):
    """A worker; ready once it has built the model."""

    ready: bool


M = TypeVar("M", bound=Member)


class Handout(ABC, Generic[M]):
    """An engine whose clients are answered for by its members."""

    name: str
    members: list[M]
    workers: int

    def __init__(self, population: Population, trainer: Trainer, states: ClientStates) -> None:
        """Serve a population; a subclass starts the members."""
        self.population, self.states, self.layout = population, states, trainer.layout
        self.chunk = max(1, population.spec.simulation.chunk)
        strategy: Strategy | None = getattr(trainer, "strategy", None)
        self.sums = summable(strategy, population.spec)
        self.given = (population.task, population.spec, strategy, self.sums)
        self.alike = uses_torch(population.task)  # a trainer of the task's own may answer in any shape
        self.deaths = 0

    @abstractmethod
    def fill(self) -> None:
        """Start a member for each that is missing."""

    @abstractmethod
    def drop(self, member: M) -> None:
        """End a member, whatever it does."""

    @abstractmethod
    def begin(self, plan: Plan, parameters: Parameters) -> None:
        """Show all members what is to be done."""

    @abstractmethod
    def give(self, member: M, clients: Sequence[Given]) -> None:
        """Give a member clients; where it has died, `hear` says so."""

    @abstractmethod
    def waited(self, members: Sequence[M]) -> Sequence[M]:
        """Wait until some of the members have something to say, or have died; return those."""

    @abstractmethod
    def hear(self, member: M) -> Answers | Summed | None:
        """Return what a member says; None where it is ready now, or has died and was mourned."""

    @abstractmethod
    def close(self) -> None:
        """End all members."""

    def ready(self) -> None:
        """Wait until all members can work; raises SpecError where they cannot import or build the task."""
        try:
            while starting := [member for member in self.members if not member.ready]:
                for member in self.waited(starting):
                    self.hear(member)
        except RunFailed as error:
            self.close()
            raise self.unfit(str(error)) from error

    def unfit(self, reason: str) -> SpecError:
        """Return the error of a task that stays in its process."""
        return SpecError(
            f"no other process can run {self.population.task.name}: {reason}; define it in a module that "
            "can be imported by name, not in a notebook, in a function or in the script that runs"
        )

    def check(self, member: M, digest: str) -> None:
        """Take in a member that has built its model; raises RunFailed where that is another than ours."""
        if digest != self.layout.digest:
            raise RunFailed("model() builds another model in a worker process than here")
        member.ready = True

    def mourn(self, member: M, how: str) -> None:
        """Start another member in place of one that has died; raises RunFailed where too many do."""
        self.deaths += 1
        if self.deaths == DEATHS:
            raise RunFailed(
                f"{DEATHS} worker processes in a row died, the last {how}; if memory ran out, lower "
                "simulation.workers"
            )
        log.warning("a worker process %s; its clients run again in another", how)
        self.drop(member)
        self.fill()

    def answer(self, plan: Plan, parameters: Parameters) -> Iterator[Answers | Summed]:
        """Yield the answers of the cohort as they come.

        Raises RunFailed where a client's work fails, or where members die and do nothing else.
        """
        packets = self._packets(plan, parameters)
        self.fill()
        self.begin(plan, parameters)
        busy: dict[M, list[str]] = {}
        done: list[Answers | Summed] = []
        try:
            while packets or busy or done:
                for member in [m for m in self.members if m.ready and m not in busy][: len(packets)]:
                    busy[member] = packets.pop(0)
                    self.give(member, [self._given(plan, client) for client in busy[member]])
                yield from done  # only now, so that nobody waits until they are folded
                done = []
                for member in self.waited([m for m in self.members if m in busy or not m.ready]):
                    answers, packet = self.hear(member), busy.pop(member, [])
                    if answers:
                        self.deaths = 0
                        done.append(answers)
                    elif packet:  # it has died
                        packets.insert(0, packet)
        finally:
            for member in busy:  # nobody waits for their answers any more
                self.drop(member)

    def _packets(self, plan: Plan, parameters: Parameters) -> list[list[str]]:
        """Return the cohort in packets that shrink towards the end; chunks are the same in every run."""
        left, packets = list(plan.cohort), list[list[str]]()
        if plan.ref.kind != "evaluate":
            left.sort(key=lambda client: -self.population.size(client))
        most = TOGETHER if self.alike and parameters.shared.nbytes <= SMALL else 1
        while left:
            count = self.chunk if self.chunk > 1 else max(1, min(most, len(left) // (4 * self.workers)))
            packets.append(left[:count])
            del left[:count]
        return packets

    def _given(self, plan: Plan, client: str) -> Given:
        """Return a client with what it has kept, and what it trains on where somebody poisons that."""
        kept, given = self.states[client], None
        if self.population.poison and plan.ref.kind != "evaluate":
            held, _ = self.population.examples(client)
            poisoned = self.population.poison(client, held)
            given = None if poisoned is held else poisoned
        return client, kept, given


def summable(strategy: Strategy | None, spec: RunSpec) -> bool:
    """Return whether only sums of the answers are asked for: nobody forges, masks or noises a single one."""
    if strategy is None or not strategy.sums or spec.attack or spec.encryption.updates == "secagg":
        return False
    return strategy.mode == Synchronous() and strategy.privacy == OFF
