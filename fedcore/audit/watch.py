"""A simulation that an auditor watches from where the adversary sits, and plants canaries in."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fedcore.audit.canaries import DIRACS, Beside, Canaried
from fedcore.layout import Parameters, Vector
from fedcore.messages import Plan
from fedcore.privacy.levels import ClientLevel, Off, TreeLevel
from fedcore.simulations.answers import Answers
from fedcore.simulations.borrowed import random_state, threads
from fedcore.simulations.run import Progress, Simulation
from fedcore.spec import RunSpec
from fedcore.task import Task

Floats = NDArray[np.float64]


class Watched(Simulation):
    """A run whose releases are recorded at the coordinates of the Dirac canaries.

    Where devices make the noise, the adversary sees what each sends; where the coordinator does, how the
    model moves. Canaries change their sign from round to round, and the records with them, so that their sum
    keeps the canaries and independent noise, while noise that comes again cancels. The noise of tree
    aggregation cancels by itself, in a sum without signs.
    """

    def __init__(self, task: Task, spec: RunSpec, folder: Path | None = None) -> None:
        """Prepare a run as `Simulation` does."""
        super().__init__(task, spec, folder)
        self.canaried = task if isinstance(task, Canaried) else None
        self.planted: Mapping[str, Vector] = {}  # directions of unit length, in place of clients' updates
        self.owned: dict[str, NDArray[np.intp]] = {}  # client -> its Dirac canaries
        self.alternates = not isinstance(self.spec.privacy, TreeLevel)
        self.central = isinstance(self.spec.privacy, ClientLevel | TreeLevel)
        count = self.canaried.diracs if self.canaried else 0
        self.shown: Floats = np.zeros((self.spec.run.rounds, count))  # by round and canary
        places = [place for place, entry in self.layout.of("shared") if entry.name == DIRACS]
        self.place = places[0] if places else slice(0, 0)
        self.started: Parameters = self.state.parameters

    def train(self, number: int, progress: Callable[[Progress], None]) -> dict[str, object]:
        """Run a round, and record what it shows."""
        sign = -1.0 if self.alternates and number % 2 else 1.0
        if self.canaried:
            self.canaried.sign = sign
        before = self.state.parameters.shared[self.place].astype(np.float64)
        row = super().train(number, progress)
        if self.central:  # against the gradient
            self.shown[number - 1] = -sign * (self.state.parameters.shared[self.place] - before)
        return row

    def evaluate(self, number: int) -> dict[str, float]:
        """Return nothing: how good the model is, no audit asks."""
        return {}

    def released(self, plan: Plan, answers: Iterable[Answers]) -> Iterator[Answers]:
        """Yield what clients send, planted updates among them, and record what it shows."""
        training = plan.ref.kind == "train"
        for each in super().released(plan, map(self._plant, answers) if training else answers):
            if training and not self.central and self.canaried:
                for client, delta in zip(each.clients, each.rows.vectors["delta"], strict=True):
                    own = self.owned.get(client, np.zeros(0, np.intp))
                    self.shown[plan.ref.round - 1, own] -= self.canaried.sign * delta[self.place][own]
            yield each

    def _plant(self, answers: Answers) -> Answers:
        """Return answers with the planted updates in place of what their clients trained."""
        if not any(client in self.planted for client in answers.clients):
            return answers
        rows = answers.rows.vectors["delta"].copy()
        length = 1.0 if isinstance(self.spec.privacy, Off) else 2 * self.spec.privacy.clip_norm
        for i, client in enumerate(answers.clients):
            if client in self.planted:
                rows[i] = length * self.planted[client]
        vectors = {**answers.rows.vectors, "delta": rows}
        return replace(answers, rows=replace(answers.rows, vectors=vectors))

    def own(self, owner: NDArray[np.intp]) -> None:
        """Take the numbers of the clients that have the Dirac canaries, (m,), left out of the data or not."""
        self.owned = {name: np.flatnonzero(owner == i) for i, name in enumerate(self.population.names)}

    def models(self) -> tuple[nn.Module, nn.Module]:
        """Return the task's own model, as it was at first and as it is now, ready to be evaluated."""
        now = self.result([])
        modules = (replace(now, parameters=at).module().eval() for at in (self.started, now.parameters))
        first, last = (m.base if isinstance(m, Beside) else m for m in modules)
        return first, last

    def run(self, progress: Callable[[Progress], None]) -> None:
        """Run all rounds."""
        with threads(self.spec.client.threads), random_state(self.spec.client.device):
            for _ in self.rounds(progress):
                pass
