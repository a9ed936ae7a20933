"""What an aggregator owes: the same answer in any order, finite, and out of reach of f arbitrary rows."""

import numpy as np
from numpy.typing import NDArray

from fedcore.errors import SpecError
from fedcore.seeds import generator
from fedcore.strategies.aggregators import Aggregator
from fedcore.strategies.passes import Rows, Vector
from fedcore.testing.laws import check_configuration, demand, refuses_half, repeatable, same_bits, untouched

SIZE = 24
WIDE = 40_000  # columns that do not fit into one block
REACH = 2.0  # honest diameters by which f rows may move the aggregate
CLOSE = 1e-8  # of the rows' scale: two orders of adding up float64
SHIFT = 50.0  # the norm of a common offset


def check_aggregator(part: Aggregator, *, f: int | None = None, equivariant: bool = True) -> None:
    """Check an aggregator; raises AssertionError with the law that it breaks and the rows that show it.

    f: how many arbitrary rows it is to withstand, by default its field `f` if it has one, else none.
    equivariant: whether a shift of all rows by one vector shifts the aggregate by it; not so for a rule
    that measures from a fixed point, such as norms. The rows are normal around a mean, one unit a
    coordinate: a field in units of the updates' norm should suit.
    """
    check_configuration(part)
    faults, n = _faults(part, f)
    honest = _honest(n)
    _input_is_left_alone(part, honest)
    _answers_repeat(part, honest)
    _order_does_not_matter(part, honest)
    if part.weighted:
        _weights_count(part, honest)
    _bad_rows_are_dropped(part, honest)
    _results_are_finite(part, honest)
    _blocks_agree_with_the_whole(part, honest)
    refuses_half(part)
    if equivariant:
        _shifts_with_the_rows(part, honest)
    _precision_is_enough(part, honest, equivariant)
    if faults:
        _arbitrary_rows_do_not_reach_it(part, faults, n, equivariant)


def _faults(part: Aggregator, f: int | None) -> tuple[int, int]:
    """Return the number of arbitrary rows to try, and of rows: at least 4f + 3, which suits most rules."""
    given = getattr(part, "f", 0) if f is None else f
    if given is None:  # as many as it can stand
        n = _enough(part, 15)
        return part.faults(n), n  # type: ignore[attr-defined]
    return given, _enough(part, max(11, 4 * given + 3))


def _enough(part: Aggregator, least: int) -> int:
    for n in range(least, 1000):
        try:
            part.check(n)
        except SpecError:
            continue
        return n
    raise AssertionError(f"{part!r}: expected that check(n) takes some n from {least} to 999")


def _honest(n: int) -> Rows:
    return 1.0 + generator("testing", "rows").normal(size=(n, SIZE))


def _aggregate(part: Aggregator, rows: Rows, weights: Vector | None = None) -> Vector:
    """Return the aggregate; a rule that works with the server's own update gets an honest one."""
    root = np.zeros(rows.shape[1])
    root[:SIZE] = 1.0
    return part.aggregate(rows, weights, anchor=root if part.anchor == "root" else None)


def _close(a: Vector, b: Vector, scale: float) -> bool:
    return bool(np.linalg.norm(a - b) <= CLOSE * scale)


def _input_is_left_alone(part: Aggregator, rows: Rows) -> None:
    for dtype in ("float32", "float64"):
        given = rows.astype(dtype)
        before = given.copy()
        result = _aggregate(part, given)
        untouched(part, "aggregate", before, given)
        law = f"expected a vector of shape ({SIZE},), float64, and no view of the rows"
        vector = result.shape == (SIZE,) and result.dtype == np.float64
        demand(vector and not np.shares_memory(result, given), part, law, rows=given, result=result)


def _answers_repeat(part: Aggregator, rows: Rows) -> None:
    repeatable(part, "aggregate", lambda: _aggregate(part, rows), same_bits)


def _order_does_not_matter(part: Aggregator, rows: Rows) -> None:
    rng = generator("testing", "order")
    weights = rng.uniform(1, 5, len(rows))
    expected = _aggregate(part, rows, weights)
    for _ in range(5):
        order = rng.permutation(len(rows))
        came = _aggregate(part, rows[order], weights[order])
        law = "expected the same for the same rows in another order"
        demand(_close(came, expected, SHIFT), part, law, rows=rows, order=order, expected=expected, came=came)


def _weights_count(part: Aggregator, rows: Rows) -> None:
    weights = generator("testing", "weights").uniform(1, 5, len(rows))
    came = _aggregate(part, rows, weights)
    law = "expected that only the ratios of weights count"
    demand(_close(_aggregate(part, rows, 7 * weights), came, SHIFT), part, law, rows=rows, weights=weights)
    weights[-1] = 0.0
    came, without = _aggregate(part, rows, weights), _aggregate(part, rows[:-1], weights[:-1])
    law = "weighted is True, expected that a row of weight 0 counts as none"
    demand(_close(came, without, SHIFT), part, law, rows=rows, weights=weights)


def _bad_rows_are_dropped(part: Aggregator, rows: Rows) -> None:
    for value in (np.nan, np.inf, -np.inf):
        given = np.insert(rows, 1, rows[0], axis=0)
        given[1, 3] = value
        result = _aggregate(part, given)
        law = "expected a finite aggregate beside a row that is not finite"
        demand(bool(np.isfinite(result).all()), part, law, rows=given, result=result)


def _results_are_finite(part: Aggregator, rows: Rows) -> None:
    alike, zeros = np.tile(rows[0], (len(rows), 1)), np.zeros_like(rows)
    far = rows.copy()
    far[0] *= 1e15
    for given in (rows, alike, zeros, 1e-30 * rows, 1e30 * rows, far, rows[:, :1]):
        result = _aggregate(part, given)
        law = "expected a finite aggregate of finite rows"
        demand(bool(np.isfinite(result).all()), part, law, rows=given, result=result)
    result = _aggregate(part, zeros)
    demand(not result.any(), part, "expected zero from rows of zeros", result=result)


def _precision_is_enough(part: Aggregator, rows: Rows, equivariant: bool) -> None:
    """Rows that are nearly alike and far from zero, where squared distances in float32 are all rounding."""
    offset = np.float64(10.0)  # a norm of 49 in 24 coordinates
    near = (offset + 1e-3 * rows).astype(np.float32)
    exact = near.astype(np.float64)
    came = _aggregate(part, near)
    expected = _aggregate(part, exact - offset) + offset if equivariant else _aggregate(part, exact)
    law = "expected in float32 what exact numbers give; form sums and distances in float64"
    close = bool(np.linalg.norm(came - expected) <= 2e-6 * SHIFT)
    demand(close, part, law, rows=near, expected=expected, came=came)


def _blocks_agree_with_the_whole(part: Aggregator, rows: Rows) -> None:
    """The rows' columns, spread out among zeros over many blocks, give the same values there."""
    if part.needs == "rows":
        return
    places = np.sort(generator("testing", "places").choice(WIDE, SIZE, replace=False))
    wide = np.zeros((len(rows), WIDE))
    wide[:, places] = rows
    root = np.zeros(WIDE)
    root[places] = 1.0
    came = part.aggregate(wide, anchor=root if part.anchor == "root" else None)
    expected = np.zeros(WIDE)
    expected[places] = _aggregate(part, rows)
    law = (
        f"expected the same among {WIDE} columns as by themselves; a block must not depend on its neighbours"
    )
    demand(_close(came, expected, SHIFT), part, law, rows=rows, expected=expected[places], came=came[places])


def _shifts_with_the_rows(part: Aggregator, rows: Rows) -> None:
    shift = SHIFT * _unit("shift")
    expected, came = _aggregate(part, rows) + shift, _aggregate(part, rows + shift)
    law = (
        "expected that a common shift of the rows shifts the aggregate; pass equivariant=False where the "
        "definition has a fixed point, such as a norm or an anchor"
    )
    demand(_close(came, expected, SHIFT), part, law, rows=rows, shift=shift, expected=expected, came=came)


def _arbitrary_rows_do_not_reach_it(part: Aggregator, f: int, n: int, equivariant: bool) -> None:
    honest = _honest(n)[f:]
    centre = honest.mean(axis=0)
    radius = np.linalg.norm(honest[:, None] - honest, axis=2).max()
    if not equivariant:
        radius += np.linalg.norm(honest, axis=1).max()
    for name, bad in _attacks(honest, f).items():
        came = _aggregate(part, np.concatenate([bad, honest]))
        distance = np.linalg.norm(came - centre)
        law = (
            f"{f} of {n} rows ({name}) move the aggregate {distance:.3g} from the honest mean, expected at "
            f"most {REACH * radius:.3g}"
        )
        demand(bool(distance <= REACH * radius), part, law, bad=bad, honest=honest, result=came)


def _attacks(honest: Rows, f: int) -> dict[str, Rows]:
    """Return what f arbitrary rows may be, by a name."""
    rng = generator("testing", "attacks")
    mean, spread = honest.mean(axis=0), honest.std(axis=0)
    out, own = _unit("out"), rng.normal(size=(f, SIZE))
    own /= np.linalg.norm(own, axis=1, keepdims=True)
    attacks = {
        "minus the mean": np.tile(-mean, (f, 1)),
        "a little too far": np.tile(mean + 1.5 * spread, (f, 1)),
        "copies of an honest row": np.tile(honest[0], (f, 1)),
        "zeros": np.zeros((f, SIZE)),
        "one of them far out": np.concatenate([1e6 * out[None], np.tile(honest[0], (f - 1, 1))]),
        "not finite": np.full((f, SIZE), np.nan),
    }
    for distance in (30.0, 1e4, 1e9):
        attacks[f"together, {distance:g} away"] = mean + distance * np.tile(out, (f, 1))
        attacks[f"each its own way, {distance:g} away"] = mean + distance * own
    return attacks


def _unit(name: str) -> NDArray[np.float64]:
    vector = generator("testing", name).normal(size=SIZE)
    return vector / np.linalg.norm(vector)
