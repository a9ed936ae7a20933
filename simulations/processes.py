"""The engines in worker processes of this machine, which share memory with this one.

engine = Processes(...)     starts the workers, each with the model and the population
engine.ready()              waits until all can work
engine.answer(plan, x)      hands out clients: one after another, or where the spec has a chunk, that many
engine.close()              ends them; so does the end of the engine, or of its process
"""

import os
import pickle
import subprocess
import sys
import weakref
from collections.abc import Sequence
from contextlib import suppress
from math import ceil
from multiprocessing import Pipe
from multiprocessing.connection import wait

from fedcore.client.training import Trainer
from fedcore.cores import cores
from fedcore.errors import RunFailed
from fedcore.layout import Parameters
from fedcore.messages import Plan
from fedcore.simulations.answers import Answers, ClientStates, Summed
from fedcore.simulations.handout import Handout
from fedcore.simulations.mapped import Mapped
from fedcore.simulations.population import Population
from fedcore.simulations.worker import Given
from fedcore.spec import RunSpec


def workers_for(spec: RunSpec) -> int:
    """Return how many workers a spec asks for, or the fewest that are as fast as one for each core."""
    if spec.simulation.workers:
        return spec.simulation.workers
    size, most = spec.cohort.size, max(1, cores() // spec.client.threads)
    return ceil(size / ceil(size / most))


class Child:
    """A worker process, the pipe to it, and memory that both write in turn."""

    def __init__(self, setup: Mapped, sizes: list[int], board: Mapped) -> None:
        """Start it. It shares no terminal with this process: Ctrl-C is for us to deal with."""
        self.pipe, far = Pipe()
        self.shelf = Mapped.new()
        given = (far.fileno(), setup.fd, board.fd, self.shelf.fd)
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "fedcore.simulations.worker", *map(str, given)],
            stdin=subprocess.DEVNULL,
            stdout=2,  # what the task prints is no result
            pass_fds=given,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        far.close()
        self.pipe.send(sizes)
        self.ready = False

    def tell(self, round: int, sizes: list[int], clients: Sequence[Given]) -> None:
        """Give it clients of a round, which lies on the board; if it has died, its pipe will say so."""
        with suppress(OSError):
            self.pipe.send((round, sizes, self.shelf.put(clients)))

    def stop(self) -> None:
        """End it; it holds nothing that a kill could harm."""
        self.process.kill()
        self.process.wait()
        self.pipe.close()
        self.shelf.close()


class Processes(Handout[Child]):
    """Trains or evaluates a cohort in worker processes."""

    name = "processes"

    def __init__(self, population: Population, trainer: Trainer, states: ClientStates) -> None:
        """Start the workers that the population's spec asks for.

        trainer: the simulation's, of which every worker builds its own. Raises SpecError where the task
        cannot be handed to another process.
        """
        super().__init__(population, trainer, states)
        self.setup, self.board = Mapped.new(), Mapped.new()
        self.members: list[Child] = []
        self.stop = weakref.finalize(self, _stop, self.members, (self.setup, self.board))
        try:
            self.sizes = self.setup.put(self.given)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            self.close()
            raise self.unfit(str(error)) from error
        self.workers, self.round = workers_for(population.spec), 0
        self.fill()

    def close(self) -> None:
        """End all workers."""
        self.stop()

    def fill(self) -> None:
        """Start a worker for each that is missing."""
        while len(self.members) < self.workers:
            self.members.append(Child(self.setup, self.sizes, self.board))

    def drop(self, member: Child) -> None:
        """Kill a worker."""
        self.members.remove(member)
        member.stop()

    def begin(self, plan: Plan, parameters: Parameters) -> None:
        """Write a round on the board."""
        self.round += 1
        self.shown = self.board.put((plan, parameters))

    def give(self, member: Child, clients: Sequence[Given]) -> None:
        """Give a worker clients of the round."""
        member.tell(self.round, self.shown, clients)

    def waited(self, members: Sequence[Child]) -> list[Child]:
        """Return those of some workers that have said something, or died."""
        heard = wait([child.pipe for child in members]) if members else []
        return [child for child in members if child.pipe in heard]

    def hear(self, member: Child) -> Answers | Summed | None:
        """Take a worker's message; return the answers in it, and replace it where it has died."""
        try:
            kind, said = member.pipe.recv()
        except (EOFError, OSError):
            code = member.process.wait()
            self.mourn(
                member, f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            )
            return None
        if kind == "failed":
            raise RunFailed(f"a worker process raised {said}")
        if kind == "ready":
            self.check(member, said)
            return None
        answers: Answers | Summed = member.shelf.take(said)
        return answers


def _stop(children: list[Child], shared: Sequence[Mapped]) -> None:
    """End all children and give the memory back."""
    for child in children:
        child.stop()
    for memory in shared:
        memory.close()
