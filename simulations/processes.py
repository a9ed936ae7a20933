"""The sequential engine in processes: clients are handed out to workers, the largest first.

    engine = Processes(...)     starts the workers, each with the model and the population
    engine.ready()              waits until all can work
    engine.answer(plan, x)      hands out clients in packets that shrink towards the end
    engine.close()              ends them; so does the end of the engine, or of its process

Sums are exact, so whoever trains whom, a run has the bits of the sequential engine. A packet whose worker
dies goes to another.
"""

import logging
import os
import pickle
import subprocess
import sys
import weakref
from collections.abc import Iterator, Sequence
from contextlib import suppress
from math import ceil
from multiprocessing import Pipe
from multiprocessing.connection import wait

from fedcore.client.training import Trainer, uses_torch
from fedcore.errors import RunFailed, SpecError
from fedcore.layout import Parameters
from fedcore.messages import Plan, Ref
from fedcore.simulations.answers import Answers, ClientStates
from fedcore.simulations.mapped import Mapped
from fedcore.simulations.population import Population
from fedcore.simulations.sequential import SMALL, TOGETHER
from fedcore.simulations.worker import Given
from fedcore.spec import RunSpec

log = logging.getLogger("fedcore.simulations")

DEATHS = 3  # in a row, without an answer in between, after which the run ends


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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


class Processes:
    """Trains or evaluates a cohort in worker processes, to the sequential engine's bits."""

    name, chunk = "processes", 1

    def __init__(self, population: Population, trainer: Trainer, states: ClientStates) -> None:
        """Start the workers that the population's spec asks for.

        trainer: the simulation's, of which every worker builds its own. Raises SpecError where the task
        cannot be handed to another process.
        """
        self.population, self.states, self.layout = population, states, trainer.layout
        task, strategy = population.task, getattr(trainer, "strategy", None)
        self.alike = uses_torch(task)  # a trainer of the task's own may answer in any shape
        self.setup, self.board = Mapped.new(), Mapped.new()
        self.children: list[Child] = []
        self.close = weakref.finalize(self, _stop, self.children, (self.setup, self.board))
        try:
            self.sizes = self.setup.put((task, population.spec, strategy))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            self.close()
            raise self._unfit(str(error)) from error
        self.workers, self.deaths, self.round = workers_for(population.spec), 0, 0
        self._fill()

    def _fill(self) -> None:
        """Start a worker for each that is missing."""
        while len(self.children) < self.workers:
            self.children.append(Child(self.setup, self.sizes, self.board))

    def _drop(self, child: Child) -> None:
        self.children.remove(child)
        child.stop()

    def ready(self) -> None:
        """Wait until all workers can work; raises SpecError where they cannot import or build the task."""
        try:
            while starting := [child for child in self.children if not child.ready]:
                for child in _waited(starting):
                    self._hear(child)
        except RunFailed as error:
            self.close()
            raise self._unfit(str(error)) from error

    def _unfit(self, reason: str) -> SpecError:
        return SpecError(
            f"no other process can run {self.population.task.name}: {reason}; define it in a module that "
            "can be imported by name, not in a notebook, in a function or in the script that runs"
        )

    def answer(self, plan: Plan, parameters: Parameters) -> Iterator[Answers]:
        """Yield the answers of the cohort as they come."""
        return self.work(plan.ref, plan.cohort, parameters)

    def work(self, ref: Ref, clients: Sequence[str], parameters: Parameters) -> Iterator[Answers]:
        """Yield the answers of some clients as they come.

        Raises RunFailed where a client's work fails, or where workers die and do nothing else.
        """
        left = self._largest_first(ref, clients)
        most = TOGETHER if self.alike and parameters.shared.nbytes <= SMALL else 1
        self._fill()
        self.round += 1
        sizes = self.board.put((ref, parameters))
        busy: dict[Child, list[str]] = {}
        done: list[Answers] = []
        try:
            while left or busy or done:
                for child in [c for c in self.children if c.ready and c not in busy][: len(left)]:
                    count = max(1, min(most, len(left) // (4 * self.workers)))
                    busy[child], left = left[:count], left[count:]
                    child.tell(self.round, sizes, [self._given(ref, client) for client in busy[child]])
                yield from done  # only now, so that nobody waits until they are folded
                done = []
                for child in _waited([c for c in self.children if c in busy or not c.ready]):
                    answers, packet = self._hear(child), busy.pop(child, [])
                    if answers:
                        done.append(answers)
                    else:  # it has died, or is ready now
                        left = packet + left
        finally:
            for child in busy:  # nobody waits for their answers any more
                self._drop(child)

    def _largest_first(self, ref: Ref, clients: Sequence[str]) -> list[str]:
        if ref.kind != "train":
            return list(clients)
        sizes = {client: len(self.population.examples(client)[0]) for client in clients}
        return sorted(clients, key=lambda client: -sizes[client])

    def _given(self, ref: Ref, client: str) -> Given:
        """Return a client with what it has kept, and what it trains on where somebody poisons that."""
        kept, given = self.states[client], None
        if self.population.poison and ref.kind == "train":
            held, _ = self.population.examples(client)
            poisoned = self.population.poison(client, held)
            given = None if poisoned is held else poisoned
        return client, kept, given

    def _hear(self, child: Child) -> Answers | None:
        """Take a child's message; return the answers in it, and replace it where it has died."""
        try:
            kind, said = child.pipe.recv()
        except (EOFError, OSError):
            self._mourn(child)
            return None
        if kind == "failed":
            raise RunFailed(f"a worker process raised {said}")
        if kind == "ready":
            if said != self.layout.digest:
                raise RunFailed("model() builds another model in a worker process than here")
            child.ready = True
            return None
        self.deaths = 0
        answers: Answers = child.shelf.take(said)
        return answers

    def _mourn(self, child: Child) -> None:
        """Start another worker in place of one that has died."""
        code = child.process.wait()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        self.deaths += 1
        if self.deaths == DEATHS:
            raise RunFailed(
                f"{DEATHS} worker processes in a row died, the last {how}; if memory ran out, lower "
                "simulation.workers"
            )
        log.warning("a worker process %s; its clients run again in another", how)
        self._drop(child)
        self._fill()


def _waited(children: Sequence[Child]) -> list[Child]:
    """Return those of some children that have said something, or died."""
    heard = wait([child.pipe for child in children]) if children else []
    return [child for child in children if child.pipe in heard]


def _stop(children: list[Child], shared: Sequence[Mapped]) -> None:
    """End all children and give the memory back."""
    for child in children:
        child.stop()
    for memory in shared:
        memory.close()
