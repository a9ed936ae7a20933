"""FedBuff and FedAsync by hand, and what cannot work with late updates."""

import tracemalloc
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.errors import SpecError
from fedcore.layout import Entry, Layout, Parameters
from fedcore.messages import Ref
from fedcore.spec import RunSpec
from fedcore.strategies import SGD, Strategy, from_table
from fedcore.strategies.aggregators import Median, TrimmedMean
from fedcore.strategies.conflicts import check
from fedcore.strategies.modes import Asynchronous, Buffered, OnArrival, entering
from fedcore.strategies.optimizers import Adam
from fedcore.strategies.preaggregators import Clip
from fedcore.strategies.rounds import State, advance, initial_state, train_plan
from fedcore.strategies.steps import Arrival, step
from fedcore.strategies.terms import Rows

f32 = partial(np.array, dtype=np.float32)

LAYOUT = Layout((Entry("weight", (2,), "float32", "shared"), Entry("mean", (1,), "float32", "buffer")))
START = Parameters(f32([1.0, -1.0]), f32([5.0]))


def sent(delta: list[float], mean: float = 0.0, weight: float = 1.0) -> Rows:
    scalars = {"weight": np.array([weight]), "loss": np.array([0.0]), "count": np.array([weight])}
    return Rows({"delta": f32([delta]), "buffers": f32([[mean]])}, scalars)


def after(strategy: Strategy, state: State, arrivals: dict[str, tuple[Rows, int, Parameters]]) -> State:
    """Return the state after a step of updates, each with its staleness and the model it started from."""
    assert isinstance(strategy.mode, OnArrival)
    ref, clients = Ref("r", state.round + 1, 0, "train"), tuple(sorted(arrivals))
    plan = train_plan(strategy, RunSpec(), LAYOUT, ref, clients, 9)
    came = (Arrival(client, *each) for client, each in arrivals.items())
    round = step(strategy.mode, plan, came, state.parameters)
    assert round.sufficient and len(round.folded) == len(arrivals), round.verdicts
    return advance(strategy, round, state, 0)


@pytest.mark.parametrize(
    ("mode", "shares"),
    [
        (Buffered(), {0: 1.0, 3: 0.5, 8: 1 / 3}),
        (Buffered(exponent=0.0), {0: 1.0, 7: 1.0}),
        (Asynchronous(), {0: 0.6, 3: 0.3}),
        (Asynchronous(mixing=1.0, exponent=1.0), {0: 1.0, 1: 0.5, 9: 0.1}),
    ],
)
def test_what_an_update_counts_for_by_staleness(mode: OnArrival, shares: dict[int, float]) -> None:
    assert {s: mode.share(s) for s in shares} == pytest.approx(shares, rel=1e-15)


def test_fedbuff_by_hand() -> None:
    """K = 3, lr 0.5, staleness 0, 3, 8: x += 0.5 / 3 (D_1 + D_2 / 2 + D_3 / 3), whatever the examples.

    The mean buffers are by examples of 5 + share (b - 5), (1 * 2 + 2 * 6 + 5 * 8) / 8 = 6.75.
    """
    strategy = Strategy(optimizer=SGD(lr=0.5), mode=Buffered(k=3))
    updates = {
        "a": (sent([3.0, 6.0], 2.0, weight=1.0), 0, START),
        "b": (sent([6.0, 0.0], 7.0, weight=2.0), 3, START),
        "c": (sent([-9.0, 9.0], 14.0, weight=5.0), 8, START),
    }
    state = initial_state(strategy, START)
    moved = after(strategy, state, updates)
    assert moved.parameters.shared.tolist() == pytest.approx([1.0 + 0.5, -1.0 + 1.5], abs=1e-7)
    assert moved.parameters.buffers.tolist() == pytest.approx([6.75], abs=1e-6)
    assert moved.round == 1 and state.parameters.digest == START.digest


def test_fedasync_by_hand() -> None:
    """a = 0.8 (1 + s)^-0.5. At s = 0 x = 0.2 x + 0.8 y; three steps later y of the first model has 0.4.

    What is mixed in is the client's model, not its delta from one that has moved on, and its buffers too.
    """
    strategy = Strategy(mode=Asynchronous(mixing=0.8))
    first = after(strategy, initial_state(strategy, START), {"a": (sent([1.0, 1.0], 10.0), 0, START)})
    assert first.parameters.shared.tolist() == pytest.approx([1.8, -0.2], abs=1e-7)
    assert first.parameters.buffers.tolist() == pytest.approx([9.0], abs=1e-6)
    now = State(3, Parameters(f32([10.0, 20.0]), f32([4.0])))
    late = after(strategy, now, {"b": (sent([1.0, 1.0], 10.0), 3, START)})
    assert late.parameters.shared.tolist() == pytest.approx([0.6 * 10 + 0.4 * 2, 0.6 * 20], abs=1e-6)
    assert late.parameters.buffers.tolist() == pytest.approx([0.6 * 4 + 0.4 * 10], abs=1e-6)


def test_what_enters_leaves_the_update_as_it_is_and_is_exact_at_a_share_of_1() -> None:
    rows = sent([0.1, -1 / 3], 0.7)
    before = {name: matrix.copy() for name, matrix in rows.vectors.items()}
    same = entering(Buffered(), rows, 0, START, START)
    entering(Asynchronous(), rows, 2, START, Parameters(f32([9.0, 9.0]), f32([9.0])))
    for name, matrix in before.items():
        assert np.array_equal(rows.vectors[name], matrix)
        assert np.array_equal(same.vectors[name], matrix) and same.vectors[name].dtype == np.float32
    assert same.scalars == rows.scalars


@pytest.mark.parametrize("strategy", [Strategy(), Strategy(aggregator=Median()), Strategy(optimizer=Adam())])
@given(order=st.permutations(list("abcde")))
def test_the_order_in_a_buffer_does_not_matter(strategy: Strategy, order: list[str]) -> None:
    strategy = Strategy(aggregator=strategy.aggregator, optimizer=strategy.optimizer, mode=Buffered(k=5))
    rng = np.random.default_rng(0)
    updates = {c: (sent(rng.normal(size=2).tolist(), 1.0, 3.0), s, START) for s, c in enumerate("abcde")}
    state = initial_state(strategy, START)
    expected = after(strategy, state, updates).parameters.digest
    assert after(strategy, state, {c: updates[c] for c in order}).parameters.digest == expected


def test_a_robust_rule_sees_the_discounted_updates() -> None:
    """Of 8, 4 / 2 and 9 / 3 the median is 3."""
    strategy = Strategy(aggregator=Median(), mode=Buffered(k=3))
    updates = {
        client: (sent([delta, 0.0]), staleness, START)
        for client, delta, staleness in (("a", 8.0, 0), ("b", 4.0, 3), ("c", 9.0, 8))
    }
    assert after(strategy, initial_state(strategy, START), updates).parameters.shared[0] == pytest.approx(4.0)


def test_recipes() -> None:
    assert from_table({"name": "fedbuff", "k": 5}) == Strategy(mode=Buffered(k=5))
    assert from_table({"name": "fedasync", "mixing": 0.3}) == Strategy(mode=Asynchronous(mixing=0.3))
    assert from_table({"mode": "buffered", "optimizer": "adam"}) == Strategy(
        optimizer=Adam(), mode=Buffered()
    )


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ({"name": "buffered", "k": 0}, "expected k >= 1"),
        ({"name": "buffered", "exponent": -0.5}, "expected exponent >= 0"),
        ({"name": "buffered", "concurrency": -1}, "concurrency >= 0"),
        ({"name": "asynchronous", "mixing": 0.0}, "expected 0 < mixing <= 1"),
        ({"name": "asynchronous", "exponent": float("inf")}, "expected exponent >= 0"),
        ({"name": "asynchronous", "k": 3}, "'asynchronous' has no field 'k'"),
    ],
)
def test_what_does_not_fit_is_refused(mode: dict[str, Any], expected: str) -> None:
    with pytest.raises(SpecError, match=expected):
        from_table({"mode": mode})


LATE: tuple[dict[str, Any], ...] = ({"mode": "buffered"}, {"mode": "asynchronous"})


@pytest.mark.parametrize("mode", LATE)
@pytest.mark.parametrize(
    ("parts", "conflict"),
    [
        ({"algorithm": "scaffold"}, "Scaffold moves `control` together with the model"),
        ({"algorithm": "feddyn"}, "FedDyn moves `correction` together with the model"),
        ({"algorithm": "fednova"}, "FedNova scales the step by `steps`"),
        ({"algorithm": "qfedavg"}, "QFedAvg scales the step by `h`"),
        ({"optimizer": "fedexp"}, "FedExP scales the step by `square`"),
        ({"sampler": "oort"}, "Oort draws the cohort of a round as a whole"),
        ({"sampler": {"name": "minimum_separation", "rounds": 2}}, "MinimumSeparation draws the cohort"),
        ({"sampler": "poisson"}, "Poisson draws the cohort of a round as a whole"),
        ({"aggregator": "fltrust"}, "FLTrust compares updates with the server's own"),
    ],
)
def test_what_needs_a_common_start_or_a_cohort_is_refused(
    parts: dict[str, Any], conflict: str, mode: dict[str, Any]
) -> None:
    from_table(parts)
    with pytest.raises(SpecError, match=conflict) as refused:
        from_table(parts | mode)
    assert 'mode = "synchronous"' in str(refused.value), "a remedy"


@pytest.mark.parametrize(
    "parts", [{"aggregator": "median"}, {"pre": ["bucketing"]}, {"name": "krum", "f": 0}]
)
def test_a_rule_that_compares_needs_more_than_one_arrival(parts: dict[str, Any]) -> None:
    from_table(parts | {"mode": "buffered"})
    with pytest.raises(SpecError, match=r'compares updates with each other.*use mode = .name = "buffered"'):
        from_table(parts | {"mode": "asynchronous"})
    assert from_table({"pre": [{"name": "clip", "norm": 1.0}], "mode": "asynchronous"}).pre == (Clip(1.0),)


def test_a_rule_is_checked_with_the_arrivals_of_a_step() -> None:
    strategy, spec = Strategy(aggregator=TrimmedMean(f=2), mode=Buffered(k=4)), RunSpec()
    with pytest.raises(SpecError, match=r"may close with 4 updates: raise strategy\.mode\.k"):
        check(strategy, spec)
    check(Strategy(aggregator=TrimmedMean(f=2), mode=Buffered(k=5)), spec)


def test_a_step_of_any_size_is_made_in_the_space_that_is_given(tmp_path: Path) -> None:
    """A million coordinates of three late clients, over many blocks: the same bits, and little memory."""
    strategy, size = Strategy(mode=Buffered(k=3)), 10**6
    layout = Layout((Entry("weight", (size,), "float32", "shared"),))
    numbers = np.random.default_rng(0).normal(size=(4, size)).astype(np.float32)
    now = Parameters(numbers[0], f32([]))
    plan = train_plan(strategy, RunSpec(), layout, Ref("r", 9, 0, "train"), tuple("abc"), 3)
    one = {name: np.ones(1) for name in plan.scalars}
    came = [
        Arrival(c, Rows({"delta": row[None]}, one), 3, now) for c, row in zip("abc", numbers[1:], strict=True)
    ]
    taken: list[int] = []

    def space(name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        taken.append(len(taken))
        return np.memmap(tmp_path / f"{taken[-1]}", dtype, mode="w+", shape=shape)

    mode = strategy.mode
    assert isinstance(mode, OnArrival)
    tracemalloc.start()
    try:
        mapped = step(mode, plan, came, now, space)
        assert tracemalloc.get_traced_memory()[1] < 4 * size
    finally:
        tracemalloc.stop()
    whole = step(mode, plan, came, now)
    assert np.array_equal(mapped.sums.integers("delta"), whole.sums.integers("delta"))
    halves = numbers[1:].astype(np.float64) * 0.5
    mean = mapped.sums.vector("delta", slice(0, size)) / 3
    assert np.allclose(mean, halves.mean(axis=0), rtol=0, atol=1e-6)
