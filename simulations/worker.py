"""A worker process: `python -m fedcore.simulations.worker PIPE SETUP BOARD SHELF`, which are open files.

    SETUP   task, spec, strategy                    once         -> ("ready", digest of the layout)
    BOARD   what to do, and from which parameters   each round
    SHELF   clients, with what they have kept       each packet  -> ("done", sizes of the answers there)

What goes wrong is ("failed", text), with the traceback on standard error if it was a client's work. When the
pipe closes, the run is gone, and the process ends at once, even amid training.
"""

import os
import sys
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from queue import SimpleQueue
from threading import Thread
from typing import Any

import torch

from fedcore.client.examples import Examples
from fedcore.client.training import Kept, trainer_for
from fedcore.messages import Ref
from fedcore.simulations.answers import Answers
from fedcore.simulations.mapped import Mapped
from fedcore.simulations.population import Population
from fedcore.simulations.sequential import together
from fedcore.spec import RunSpec
from fedcore.strategies import Strategy
from fedcore.task import Task

Given = tuple[str, Kept, Examples | None]  # a client, what it has kept, and examples in place of its own


class Worker:
    """The population, and one resident model for whichever of its clients come."""

    def __init__(self, task: Task, spec: RunSpec, strategy: Strategy | None) -> None:
        """Build what the simulation has built, with as many torch threads as the spec says."""
        torch.set_num_threads(spec.client.threads)
        self.population = Population(task, spec, spec.client.device)
        self.trainer = trainer_for(task, spec, strategy)

    def work(self, ref: Ref, clients: Sequence[Given]) -> Answers:
        """Train or evaluate clients from the received parameters, as the sequential engine would."""
        done = []
        for client, kept, given in clients:
            if ref.kind == "train":
                examples = self.population.training(client) if given is None else given
                done.append((client, *self.trainer.train(ref, client, examples, kept)))
            else:
                examples = self.population.examples(client)[1]
                done.append((client, self.trainer.evaluate(examples, kept), {}))
        return together(done)


def serve(pipe: Connection, setup: Mapped, board: Mapped, shelf: Mapped) -> None:
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
        worker = Worker(*setup.take(messages.get()))
    except Exception as error:
        pipe.send(("failed", f"{type(error).__name__}: {error}"))
        return
    pipe.send(("ready", worker.trainer.layout.digest))
    try:
        present = 0
        while True:
            round, sizes, clients = messages.get()
            if round != present:
                present, (ref, parameters) = round, board.take(sizes)
                worker.trainer.receive(parameters)
            pipe.send(("done", shelf.put(worker.work(ref, shelf.take(clients)))))
    except Exception as error:
        traceback.print_exc()
        pipe.send(("failed", f"{type(error).__name__}: {error}"))


if __name__ == "__main__":
    places = [int(argument) for argument in sys.argv[1:]]
    serve(Connection(places[0]), *map(Mapped, places[1:]))
