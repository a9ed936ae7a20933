"""What a server optimiser owes: a step in place, on any block, whose whole memory is its declared state."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fedcore.seeds import generator
from fedcore.strategies.optimizers import ServerOptimizer
from fedcore.testing.laws import Array, check_configuration, demand, remade, same_bits, untouched

SIZE = 24
CLIENTS = 10
DTYPES = (np.float32, np.float64)


def check_optimizer(part: ServerOptimizer) -> None:
    """Check a server optimiser; raises AssertionError with the law that it breaks and the vectors."""
    check_configuration(part)
    _state_is_named_numbers(part)
    _rate_is_positive(part)
    for dtype in DTYPES:
        _steps_are_finite_and_in_place(part, np.dtype(dtype))
        _blocks_agree_with_the_whole(part, np.dtype(dtype))
        _a_restart_changes_nothing(part, np.dtype(dtype))


class Reported:
    """The sums of a round in which every scalar that clients send beside their update came to `value`."""

    clients = population = CLIENTS
    round = 1

    def __init__(self, value: float) -> None:
        self.value = value

    def scalar(self, name: str) -> float:
        """Return the sum of a scalar over the clients."""
        return float(CLIENTS) if name == "clients" else self.value


class Model:
    """Parameters and a state, moved by an optimiser made anew for them."""

    def __init__(self, part: ServerOptimizer, dtype: np.dtype[np.floating]) -> None:
        self.part = remade(part)
        self.x = generator("testing", "model").normal(size=SIZE).astype(dtype)
        self.state = {name: np.full(SIZE, first, dtype) for name, first in part.state.items()}

    def vectors(self) -> dict[str, Array]:
        """Return the parameters and the state by name."""
        return {"parameters": self.x, **self.state}

    def move(self, direction: NDArray[np.float64], blocks: int = 1) -> None:
        """Take one step along a direction, in so many blocks."""
        rate = self.part.rate(Reported(20.0), lambda: float(direction @ direction))
        for block in np.array_split(np.arange(SIZE), blocks):
            where = slice(int(block[0]), int(block[-1]) + 1)
            state = {name: vector[where] for name, vector in self.state.items()}
            self.part.step(self.x[where], direction[where], rate, state)


def _directions() -> list[NDArray[np.float64]]:
    """Return what rounds may bring: updates of usual size, none at all, and a large one."""
    rng = generator("testing", "directions")
    usual = [0.1 * rng.normal(size=SIZE) for _ in range(3)]
    return [*usual, np.zeros(SIZE), 1e4 * usual[0], usual[1]]


def _state_is_named_numbers(part: ServerOptimizer) -> None:
    named = isinstance(part.state, Mapping) and all(
        isinstance(name, str) and np.isfinite(first) for name, first in part.state.items()
    )
    law = "expected `state` to give the initial value of every vector by its name"
    demand(named, part, law, state=part.state)


def _rate_is_positive(part: ServerOptimizer) -> None:
    law = "expected a rate that is finite and not negative"
    for value, squared in ((0.0, 0.0), (20.0, 1.5), (1e-12, 1e-12), (1e12, 1e12)):
        rate = part.rate(Reported(value), lambda squared=squared: squared)  # type: ignore[misc]
        demand(np.isfinite(rate) and rate >= 0, part, law, rate=rate, reported=value, squared_norm=squared)


def _steps_are_finite_and_in_place(part: ServerOptimizer, dtype: np.dtype[np.floating]) -> None:
    model = Model(part, dtype)
    for direction in _directions():
        before = direction.copy()
        held = model.vectors()
        model.move(direction)
        untouched(part, "step", before, direction)
        for name, vector in model.vectors().items():
            demand(vector is held[name] and vector.dtype == dtype, part, f"expected {name} moved in place")
            law = f"expected finite {name} after a step"
            demand(bool(np.isfinite(vector).all()), part, law, direction=direction, **{name: vector})


def _blocks_agree_with_the_whole(part: ServerOptimizer, dtype: np.dtype[np.floating]) -> None:
    whole, blocked = Model(part, dtype), Model(part, dtype)
    for direction in _directions():
        whole.move(direction)
        blocked.move(direction, blocks=5)
    law = "expected the same bits in five blocks as at once; `step` must be elementwise"
    _agree(part, law, whole, blocked)


def _a_restart_changes_nothing(part: ServerOptimizer, dtype: np.dtype[np.floating]) -> None:
    """A part made anew from its table goes on from saved vectors to the bits of an uninterrupted run."""
    straight, first, second = (Model(part, dtype) for _ in range(3))
    directions = _directions()
    for direction in directions:
        straight.move(direction)
    for direction in directions[:3]:
        first.move(direction)
    for name, vector in second.vectors().items():
        vector[:] = np.frombuffer(first.vectors()[name].tobytes(), dtype)
    for direction in directions[3:]:
        second.move(direction)
    law = "expected that a restart after three steps changes no bit; all that it remembers belongs in `state`"
    _agree(part, law, straight, second)


def _agree(part: ServerOptimizer, law: str, a: Model, b: Model) -> None:
    for name, vector in a.vectors().items():
        other = b.vectors()[name]
        demand(same_bits(vector, other), part, f"{law} ({name})", expected=vector, came=other)
