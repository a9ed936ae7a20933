"""A worker process: a fork, or `python -m fedcore.simulations.worker PIPE SETUP BOARD SHELF`, all open files.

    SETUP   task, spec, strategy, whether to sum    once         -> ("ready", digest of the layout)
    BOARD   what to do, from which parameters, and  each round
            how many clients are trained at once
    SHELF   clients, with what they have kept       each packet  -> ("done", sizes of the answers there)

What goes wrong is ("failed", text), with the traceback on standard error if it was a client's work. When the
pipe closes, the run is gone, and the process ends at once, even amid training.
"""

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from queue import SimpleQueue
from threading import Thread
from typing import Any

import torch

from fedcore.client.examples import Examples
from fedcore.client.trainer import TorchTrainer
from fedcore.client.training import Kept, Trainer, trainer_for
from fedcore.layout import Parameters
from fedcore.messages import Plan
from fedcore.simulations.answers import Answers, ClientStates, Summed
from fedcore.simulations.mapped import Mapped
from fedcore.simulations.population import Population
from fedcore.simulations.sequential import together
from fedcore.simulations.vectorized import Stack, Vectorized
from fedcore.spec import RunSpec
from fedcore.strategies import Strategy
from fedcore.task import Task

Given = tuple[str, Kept, Examples | None]  # a client, what it has kept, and examples in place of its own
Board = tuple[Plan, Parameters, int]  # the last: how many clients are trained at once


class Worker:
    """The population, and one resident model for whichever of its clients come."""

    def __init__(self, population: Population, trainer: Trainer, sums: bool) -> None:
        """Take what the simulation has built, with as many torch threads as the spec says.

        sums: whether the clients of a packet may be summed here.
        """
        torch.set_num_threads(population.spec.client.threads)
        self.population, self.trainer, self.sums = population, trainer, sums
        self.stacked: Vectorized | None = None

    @classmethod
    def built(cls, task: Task, spec: RunSpec, strategy: Strategy | None, sums: bool) -> "Worker":
        """Build it all anew, elsewhere."""
        return cls(Population(task, spec, spec.client.device), trainer_for(task, spec, strategy), sums)

    def receive(self, board: Board) -> None:
        """Take over what a round is about."""
        self.plan, parameters, chunk = board
        self.trainer.receive(parameters)
        if chunk == 1:
            self.stacked = None
        elif self.stacked is None and isinstance(self.trainer, TorchTrainer):
            threads = self.population.spec.client.threads
            self.stacked = Vectorized(self.population, self.trainer, ClientStates(), chunk, threads)

    def work(self, clients: Sequence[Given]) -> Answers | Summed:
        """Train or evaluate clients of the round, as an engine by itself would."""
        plan, answers = self.plan, self._answers(self.plan, clients)
        # The words of one client are more bytes than its numbers.
        return Summed.of(plan, answers) if self.sums and len(clients) > 1 and not plan.sees else answers

    def _answers(self, plan: Plan, clients: Sequence[Given]) -> Answers:
        if plan.ref.kind == "evaluate":
            of = self.population.examples
            return together([(c, self.trainer.evaluate(of(c)[1], kept), {}) for c, kept, _ in clients])
        parts = {c: self.population.training(c) if given is None else given for c, _, given in clients}
        if not self.stacked:
            return together([(c, *self.trainer.train(plan.ref, c, parts[c], kept)) for c, kept, _ in clients])
        self.stacked.states.commit({client: kept for client, kept, _ in clients})
        poisoned = any(given is not None for *_, given in clients)
        stack = Stack.of(list(parts.values())) if poisoned else self.stacked.stack(tuple(parts))
        return self.stacked.train(plan.ref, tuple(parts), stack)


def serve(pipe: Connection, board: Mapped, shelf: Mapped, build: Callable[[], Worker]) -> None:
    """Answer until the simulation is gone."""
    messages: SimpleQueue[Any] = SimpleQueue()

    def listen() -> None:
        try:
            while True:
                messages.put(pipe.recv())
        except (EOFError, OSError):
            os._exit(0)

    Thread(target=listen, daemon=True).start()
    try:
        worker = build()
    except Exception as error:
        pipe.send(("failed", f"{type(error).__name__}: {error}"))
        return
    pipe.send(("ready", worker.trainer.layout.digest))
    try:
        present = 0
        while True:
            round, sizes, clients = messages.get()
            if round != present:
                present = round
                worker.receive(board.take(sizes))
            pipe.send(("done", shelf.put(worker.work(shelf.take(clients)))))
    except Exception as error:
        traceback.print_exc()
        pipe.send(("failed", f"{type(error).__name__}: {error}"))


if __name__ == "__main__":
    places = [int(argument) for argument in sys.argv[1:]]
    pipe, (setup, board, shelf) = Connection(places[0]), map(Mapped, places[1:])
    try:
        sizes = pipe.recv()
    except EOFError:
        sys.exit()  # the simulation is gone
    serve(pipe, board, shelf, lambda: Worker.built(*setup.take(sizes)))
