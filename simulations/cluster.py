"""The engines on Ray: actors on the machines of a cluster, or on this one where no cluster is named.

RAY_ADDRESS names the cluster; without it a local Ray of `[simulation] workers` actors starts, and ends with
the run. The user's own module goes along by value, so the machines need fedcore and what it imports, and see
the same data. Ray pickles between processes of one user's cluster; nothing here comes from anybody else.
"""

import os
import sys
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from fedcore.client.trainer import device_of
from fedcore.client.training import Trainer
from fedcore.errors import MissingExtra, RunFailed
from fedcore.layout import Parameters
from fedcore.messages import Plan
from fedcore.simulations.answers import Answers, ClientStates, Summed
from fedcore.simulations.handout import Handout
from fedcore.simulations.population import Population
from fedcore.simulations.processes import workers_for
from fedcore.simulations.worker import Board, Given, Worker

try:
    import ray
    from ray.exceptions import RayActorError, RayTaskError
except ImportError as error:
    raise MissingExtra("ray", "ray") from error


@dataclass(eq=False)
class Actor:
    """A worker somewhere in the cluster, and what it is at."""

    handle: Any
    doing: Any
    ready: bool = False


class OnRay:
    """What runs in an actor."""

    def __init__(self, given: tuple[Any, ...]) -> None:
        """Build nothing yet: what an actor's constructor raises would only look like its death."""
        self.given, self.present = given, -1

    def digest(self) -> str:
        """Build the model and the population; return the digest of the model's layout."""
        self.worker = Worker.built(*self.given)
        return self.worker.trainer.layout.digest

    def work(self, round: int, board: Board, clients: Sequence[Given]) -> Answers | Summed:
        """Answer for some clients of a round."""
        if round != self.present:
            self.present = round
            self.worker.receive(board)
        return self.worker.work(clients)


class Cluster(Handout[Actor]):
    """Trains or evaluates a cohort in actors of Ray, which come back with sums where sums are enough."""

    name = "ray"

    def __init__(self, population: Population, trainer: Trainer, states: ClientStates) -> None:
        """Connect to the cluster, or start one here, and start as many actors as the spec asks for.

        Raises SpecError where the task cannot be handed to another process.
        """
        super().__init__(population, trainer, states)
        spec = population.spec
        started = not ray.is_initialized()
        if started:
            for name in ("RAY_USAGE_STATS_ENABLED", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"):
                os.environ.setdefault(name, "0")  # it reports to nobody, and leaves the GPUs as they are
            cpus = None if "RAY_ADDRESS" in os.environ else workers_for(spec) * spec.client.threads
            ray.init(num_cpus=cpus, include_dashboard=False, log_to_driver=False, configure_logging=False)
        self.gpus = int(device_of(spec.client) != "cpu")
        each = "GPU" if self.gpus else "CPU"
        held = int(ray.cluster_resources().get(each, 1)) // (1 if self.gpus else spec.client.threads)
        self.workers = spec.simulation.workers or max(1, min(held, spec.cohort.size))
        self.members: list[Actor] = []
        self.stop = weakref.finalize(self, _stop, self.members, started)
        module = sys.modules[type(population.task).__module__]
        if not _installed(module):
            ray.cloudpickle.register_pickle_by_value(module)
        try:
            self.shipped = ray.put(self.given)
        except Exception as error:
            self.close()
            raise self.unfit(str(error)) from error
        self.round = 0
        self.fill()

    def close(self) -> None:
        """End all actors, and the local Ray."""
        self.stop()

    def fill(self) -> None:
        """Start an actor for each that is missing; one waits until its machine has room."""
        kind = ray.remote(OnRay).options(num_cpus=self.population.spec.client.threads, num_gpus=self.gpus)
        while len(self.members) < self.workers:
            handle = kind.remote(self.shipped)
            self.members.append(Actor(handle, handle.digest.remote()))

    def drop(self, member: Actor) -> None:
        """Kill an actor."""
        self.members.remove(member)
        ray.kill(member.handle)

    def begin(self, plan: Plan, parameters: Parameters) -> None:
        """Put a round where all machines can read it."""
        self.round += 1
        self.board = ray.put((plan, parameters, self.chunk))

    def give(self, member: Actor, clients: Sequence[Given]) -> None:
        """Give an actor clients of the round."""
        member.doing = member.handle.work.remote(self.round, self.board, clients)

    def waited(self, members: Sequence[Actor]) -> list[Actor]:
        """Return those of some actors that have something to say, or have died."""
        done = ray.wait([m.doing for m in members], num_returns=1)[0] if members else []
        return [member for member in members if member.doing in done]

    def hear(self, member: Actor) -> Answers | Summed | None:
        """Return an actor's answers, and replace it where it, or its machine, has died."""
        try:
            said = ray.get(member.doing)
        except RayTaskError as error:
            raise RunFailed(f"a worker process raised {type(error.cause).__name__}: {error.cause}") from error
        except RayActorError:
            self.mourn(member, "of Ray died")
            return None
        if not member.ready:
            self.check(member, said)
            return None
        answers: Answers | Summed = said
        return answers


def _installed(module: ModuleType) -> bool:
    """Return whether a module is there wherever fedcore is: a part of it, or beside it."""
    return module.__name__.partition(".")[0] == "fedcore" or "site-packages" in (module.__file__ or "")


def _stop(actors: list[Actor], started: bool) -> None:
    for actor in actors:
        ray.kill(actor.handle)
    actors.clear()
    if started:
        ray.shutdown()
