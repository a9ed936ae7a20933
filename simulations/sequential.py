"""The sequential engine: one resident model, one client after another. The reference for the others."""

import time
from collections.abc import Iterator

from fedcore.client.training import Kept, Trainer, uses_torch
from fedcore.layout import Parameters
from fedcore.messages import Plan, Update
from fedcore.simulations.answers import Answers, ClientStates
from fedcore.simulations.population import Population
from fedcore.strategies.terms import Rows

TOGETHER = 16  # answers, at the most, of clients that train in less than a MOMENT and send less than SMALL
MOMENT = 0.02  # seconds
SMALL = 1 << 16  # bytes


class Sequential:
    """Trains or evaluates a cohort with the trainer that an agent uses."""

    name, chunk, workers = "sequential", 1, 0

    def __init__(self, population: Population, trainer: Trainer, states: ClientStates) -> None:
        """Answer for the clients of a population, with what they have kept so far."""
        self.population, self.trainer, self.states = population, trainer, states

    def answer(self, plan: Plan, parameters: Parameters) -> Iterator[Answers]:
        """Yield the answers of the cohort in its order, small and quick ones some at a time.

        To receive one is a fifth of a small client's work; several at once cost little more, and the sums are
        the same.
        """
        self.trainer.receive(parameters)
        alike = uses_torch(self.population.task)  # a trainer of the task's own may answer in any shape
        most = TOGETHER if alike and parameters.shared.nbytes <= SMALL else 1
        done: list[tuple[str, Update, Kept]] = []
        since = time.perf_counter()
        for client in plan.cohort:
            done.append((client, *self.work(plan, client)))
            if len(done) >= most or time.perf_counter() - since > MOMENT:
                yield together(done)
                done, since = [], time.perf_counter()
        if done:
            yield together(done)

    def work(self, plan: Plan, client: str) -> tuple[Update, Kept]:
        """Train or evaluate one client; return its update, and what it keeps."""
        kept = self.states[client]
        if plan.ref.kind == "train":
            return self.trainer.train(plan.ref, client, self.population.training(client), kept)
        return self.trainer.evaluate(self.population.examples(client)[1], kept), kept


def together(done: list[tuple[str, Update, Kept]]) -> Answers:
    """Return the answers of several clients as one."""
    clients, updates, kept = zip(*done, strict=True)
    return Answers(clients, Rows.of(updates), kept)
