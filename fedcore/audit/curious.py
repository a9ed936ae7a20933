"""A curious coordinator: gradient inversion on all that reaches it, by how updates travel.

The worst case for clients: one step of SGD on one picture each, an untrained model with a linear first layer.
What the coordinator gets is made by the code of a deployment, without its network.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedcore.audit.inversion import candidates, first_linear, from_update, layer, relative_error
from fedcore.client.examples import examples_from
from fedcore.client.training import trainer_for
from fedcore.crypto import hpke
from fedcore.errors import MissingExtra
from fedcore.layout import Layout, Parameters, Vector
from fedcore.messages import Plan, Ref, Update
from fedcore.simulations.secure import Federation, Masked
from fedcore.spec import RunSpec
from fedcore.strategies.catalog import strategy_of
from fedcore.strategies.privacy import released
from fedcore.strategies.rounds import Round, train_plan
from fedcore.strategies.terms import Rows
from fedcore.strategies.words import Accumulator
from fedcore.task import client_name
from fedcore.tasks import Digits
from fedcore.wire import sealing

CLIENTS = 10  # one for each digit
FEDERATION = "demo"
REF = Ref("curious", 1, 0, "train")
STEP = {"steps": 1, "batch_size": 1, "optimizer": {"name": "sgd", "lr": 0.1}}
NOISE = {"level": "example", "noise_multiplier": 1.0, "sampling_rate": 1.0}
RECOVERED = 0.1  # relative error below which a picture is there, and not only something like it


@dataclass(frozen=True)
class Attempt:
    """What the coordinator makes of the clients' pictures, (clients, 8, 8), and the relative error of each.

    An error is 0 for the picture itself and at most 1, which a blank picture has.
    """

    name: str
    pictures: NDArray[np.float64]
    errors: tuple[float, ...]

    @property
    def similarity(self) -> float:
        """The mean over clients of 1 - error: 1 for the pictures themselves, 0 for nothing of them."""
        return 1.0 - sum(self.errors) / len(self.errors)

    @property
    def recovered(self) -> int:
        """How many pictures are there as they were, or nearly."""
        return sum(error < RECOVERED for error in self.errors)

    def summary(self) -> dict[str, object]:
        """Return what `fedcore demo attack --json` prints of it."""
        return {"name": self.name, "similarity": round(self.similarity, 6), "recovered": self.recovered}


@dataclass(frozen=True)
class Scene:
    """A round that was trained: the plan, a picture of each client, (1, 1, 8, 8), and what each answers.

    first: names of weight and bias of the first layer.
    """

    spec: RunSpec
    plan: Plan
    layout: Layout
    parameters: Parameters
    pictures: tuple[Tensor, ...]
    updates: tuple[Update, ...]
    first: tuple[str, str]

    def attempt(self, name: str, deltas: Iterable[Vector]) -> Attempt:
        """Return what inversion makes of one vector for each client."""
        return self.judged(name, [from_update(self.layout, delta, self.first) for delta in deltas])

    def closest(self, name: str, total: Vector) -> Attempt:
        """Return for each client the best of all guesses at a sum; an attacker knows not which is whose."""
        guesses = candidates(*layer(self.layout, total, self.first))
        best = [min(guesses, key=lambda guess: relative_error(guess, truth)) for truth in self.pictures]
        return self.judged(name, best)

    def judged(self, name: str, guesses: list[Tensor]) -> Attempt:
        """Return guesses beside their errors."""
        errors = tuple(map(relative_error, guesses, self.pictures))
        return Attempt(name, np.stack([guess.reshape(8, 8).double().numpy() for guess in guesses]), errors)


def trained(**tables: object) -> Scene:
    """Return a round in which each client has taken one step on one picture."""
    spec = RunSpec.parse({"client": STEP, "cohort": {"size": CLIENTS}, **tables})
    task, names = Digits(), tuple(map(client_name, range(CLIENTS)))
    strategy, trainer = strategy_of(spec), trainer_for(task, spec)
    parameters = trainer.parameters()
    trainer.receive(parameters)
    data = task.dataset()
    held = [examples_from(data.take([np.flatnonzero(data.y == digit)[0]])) for digit in range(CLIENTS)]
    rows = Rows.of([trainer.train(REF, name, one, {})[0] for name, one in zip(names, held, strict=True)])
    updates = tuple(released(strategy, "train", rows, 0.0, ()).updates())
    pictures = tuple(one.batch(slice(0, 1))[0] for one in held)
    first = first_linear(task.model(), pictures[0])
    assert first
    plan = train_plan(strategy, spec, trainer.layout, REF, names, CLIENTS)
    return Scene(spec, plan, trainer.layout, parameters, pictures, updates, first)


def attempts() -> Iterator[Attempt]:
    """Yield what the coordinator makes of the pictures, the pictures themselves first."""
    plain, noised = trained(), trained(privacy=NOISE, evaluation={"where": "holdout"})
    yield plain.judged("what the clients hold", list(plain.pictures))
    yield plain.attempt("tls: an update", map(delta, plain.updates))
    yield plain.attempt("sealed: its file", at_rest(plain))
    masked, total = aggregated(plain)
    yield plain.attempt("secagg: masked words", map(delta_of, masked))
    yield plain.attempt("secagg: the sum", [delta_of(total)] * CLIENTS)
    yield plain.closest("secagg: the sum, best guess", delta_of(total))
    yield noised.attempt("tls: an update with DP noise", map(delta, noised.updates))
    yield noised.closest("secagg: noised sum, best guess", delta_of(aggregated(noised)[1]))


def delta(update: Update) -> Vector:
    """Return what SGD has changed."""
    return update.vectors["delta"]


def delta_of(sums: Accumulator) -> Vector:
    """Return what words say that SGD has changed."""
    return sums.vector("delta", slice(None))


def at_rest(scene: Scene) -> Iterator[Vector]:
    """Yield the end of each client's file under `sealed`, read as if it were the update's."""
    key = hpke.new_key()
    for name, update in zip(scene.plan.cohort, scene.updates, strict=True):
        bound = sealing.binding(FEDERATION, REF, name, scene.layout.digest)
        content = sealing.packed(scene.plan, update)
        sealed = b"".join(sealing.seal(hpke.public_bytes(key), content, bound))
        yield np.frombuffer(sealed[-scene.layout.nbytes :], scene.layout.dtype)


def aggregated(scene: Scene) -> tuple[list[Accumulator], Accumulator]:
    """Run secure aggregation; return each client's masked words, read as if they were not, and the sum."""
    plan, total = scene.plan, Round(scene.plan)
    protocol, masked = Masked(Federation(), scene.spec, plan, scene.parameters), []
    for name, update in zip(plan.cohort, scene.updates, strict=True):
        alone = Round(plan)
        protocol.receive(alone, [name], Rows.of([update]))
        total.sums.add_words(alone.sums.words)
        masked.append(alone.sums)
    protocol.finish(total)
    return masked, total.sums


def drawn(attempts: list[Attempt], path: Path) -> None:
    """Write the pictures as a PNG: a row for each attempt, a column for each client."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra("matplotlib", "simulation") from error
    figure = Figure(figsize=(CLIENTS + 5, len(attempts)), layout="constrained", facecolor="white")
    for row, attempt in zip(figure.subplots(len(attempts), CLIENTS), attempts, strict=True):
        for place, picture in zip(row, attempt.pictures, strict=True):
            place.imshow(shades(picture), cmap="gray_r", vmin=0, vmax=1)
            place.set(xticks=[], yticks=[])
        row[0].set_ylabel(attempt.name, rotation=0, ha="right", va="center")
        row[-1].yaxis.set_label_position("right")
        row[-1].set_ylabel(f"{attempt.recovered} of {CLIENTS} recovered", rotation=0, ha="left", va="center")
    figure.savefig(path, dpi=100)


def shades(picture: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return a picture as greys in 0..1; where its numbers are others, by their order."""
    if picture.min() > -0.1 and picture.max() < 1.1 and picture.mean() > 0.1:
        return picture
    return picture.ravel().argsort().argsort().reshape(picture.shape) / (picture.size - 1)
