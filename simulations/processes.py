"""The engines in worker processes of this machine, which share memory with this one.

A fork has what this process has built, after milliseconds; where torch would not survive one, workers are new
processes that import and build it all again.

engine = Processes(...)     starts the workers, each with the model and the population
engine.ready()              waits until all can work
engine.answer(plan, x)      hands out clients: one after another, or where the spec has a chunk, that many
engine.close()              ends them; so does the end of the engine, or of its process
"""

import gc
import logging
import os
import pickle
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from math import ceil
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Protocol

from fedcore.client.training import Trainer
from fedcore.cores import cores
from fedcore.errors import RunFailed
from fedcore.forks import cuda_begun, forked
from fedcore.interrupts import BOTH
from fedcore.layout import Parameters
from fedcore.messages import Plan
from fedcore.simulations.answers import Answers, ClientStates, Summed
from fedcore.simulations.handout import Handout
from fedcore.simulations.mapped import Mapped
from fedcore.simulations.population import Population
from fedcore.simulations.worker import Given, Worker, serve
from fedcore.spec import RunSpec


def workers_for(spec: RunSpec) -> int:
    """Return how many workers a spec asks for, or the fewest that are as fast as one for each core."""
    if spec.simulation.workers:
        return spec.simulation.workers
    size, most = spec.cohort.size, max(1, cores() // spec.client.threads)
    return ceil(size / ceil(size / most))


def forkable(spec: RunSpec) -> bool:
    """Return whether workers may be forks: CUDA survives none, and OpenMP only with one thread."""
    one = spec.client.threads == 1 and spec.client.device == "cpu"
    return sys.platform == "linux" and one and not cuda_begun()


class Process(Protocol):
    """What a worker runs in."""

    pid: int
    returncode: int | None

    def kill(self) -> None:
        """Kill it, if it still runs."""

    def wait(self) -> int:
        """Return its exit code, or the negative number of the signal that killed it."""


class Forked:
    """A fork of this process, in the terms of `subprocess.Popen`."""

    def __init__(self, work: Callable[[], None]) -> None:
        """Start it at its work, without this process's terminal, signal handlers and clean-up."""
        self.returncode: int | None = None
        self.pid = forked(partial(_alone, work))

    def kill(self) -> None:
        """Kill it, if it still runs."""
        if self.returncode is None:
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        """Return its exit code, or the negative number of the signal that killed it."""
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode


def _alone(work: Callable[[], None]) -> None:
    """Do a fork's work, apart from what the process that it is of has at hand."""
    gc.freeze()  # what is garbage is not ours to finalise, and a collection would copy what is shared
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what the task prints is no result
    sys.stdout = sys.stderr = open(2, "w", buffering=1, closefd=False)  # a thread may hold the lock
    for name in ("root", "fedcore"):
        logging.getLogger(name).handlers.clear()
    for number in BOTH:
        signal.signal(number, signal.SIG_DFL)
    work()


class Child:
    """A worker process, the pipe to it, and memory that both write in turn."""

    def __init__(self, start: Callable[["Child", Connection], Process]) -> None:
        """Start it, with the far end of the pipe."""
        self.pipe, far = Pipe()
        self.shelf = Mapped.new()
        self.process = start(self, far)
        far.close()
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

        trainer: the simulation's, of which every worker has its own. Raises SpecError where the task cannot
        be handed to another process.
        """
        super().__init__(population, trainer, states)
        self.trainer, self.forks = trainer, self.alike and forkable(population.spec)
        self.setup, self.board = Mapped.new(), Mapped.new()
        self.members: list[Child] = []
        self.stop = weakref.finalize(self, _stop, self.members, (self.setup, self.board))
        try:
            self.sizes = [] if self.forks else self.setup.put(self.given)
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
            self.members.append(Child(self._forked if self.forks else self._spawned))

    def _forked(self, child: Child, far: Connection) -> Process:
        """Start a worker with what is here."""

        def work() -> None:
            for each in (*self.members, child):
                each.pipe.close()  # which would keep it from hearing that this process is gone
            self.population.poison = None
            serve(far, self.board, child.shelf, partial(Worker, self.population, self.trainer, self.sums))

        return Forked(work)

    def _spawned(self, child: Child, far: Connection) -> Process:
        """Start a worker that builds what is in the setup."""
        given = (far.fileno(), self.setup.fd, self.board.fd, child.shelf.fd)
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "fedcore.simulations.worker", *map(str, given)],
            stdin=subprocess.DEVNULL,
            stdout=2,  # what the task prints is no result
            pass_fds=given,
            start_new_session=True,  # which has no terminal: Ctrl-C is for us to deal with
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        child.pipe.send(self.sizes)
        return process

    def drop(self, member: Child) -> None:
        """Kill a worker."""
        self.members.remove(member)
        member.stop()

    def begin(self, plan: Plan, parameters: Parameters) -> None:
        """Write a round on the board."""
        self.round += 1
        self.shown = self.board.put((plan, parameters, self.chunk))

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
