"""Updates are checked before they are summed, and sums are the same however the work is divided."""

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.errors import UpdateRefused
from fedcore.messages import Plan, Ref, ScalarSpec, Update, VectorSpec
from fedcore.strategies.terms import check
from fedcore.strategies.words import Accumulator

f32 = partial(np.array, dtype=np.float32)

PLAN = Plan(
    ref=Ref("r", 1, 0, "train"),
    cohort=tuple("abcdefgh"),
    goal=8,
    minimum=6,
    deadline=60.0,
    vectors={
        "delta": VectorSpec(4, np.dtype(np.float32), 64.0, "weight"),
        "buffers": VectorSpec(2, np.dtype(np.float32), 2.0**14),
    },
    scalars={"weight": ScalarSpec(0.0, 1000.0), "loss": ScalarSpec(-1024.0, 1024.0)},
)


def floats(bound: float, size: int) -> st.SearchStrategy[Any]:
    return st.lists(st.floats(-bound, bound, width=32), min_size=size, max_size=size).map(f32)


updates = st.builds(
    lambda delta, buffers, weight, loss: Update(
        {"delta": delta, "buffers": buffers}, {"weight": weight, "loss": loss}
    ),
    floats(64.0, 4),
    floats(2.0**14, 2),
    st.floats(0, 1000),
    st.floats(-1024, 1024),
)


@given(update=updates)
def test_what_was_asked_for_is_accepted(update: Update) -> None:
    check(PLAN, update)


def with_vector(update: Update, name: str, value: Any) -> Update:
    return replace(update, vectors={**update.vectors, name: value})


def poisoned(update: Update, name: str, value: float, place: int) -> Update:
    vector = update.vectors[name].copy()
    vector[place % len(vector)] = value
    return with_vector(update, name, vector)


def without(update: Update, name: str) -> Update:
    vectors = {k: v for k, v in update.vectors.items() if k != name}
    return Update(vectors, {k: v for k, v in update.scalars.items() if k != name})


names = st.sampled_from(["delta", "buffers"])
not_finite = st.sampled_from([np.nan, np.inf, -np.inf])
mutations = st.one_of(
    st.builds(lambda n: lambda u: without(u, n), st.sampled_from(["delta", "buffers", "weight", "loss"])),
    st.builds(lambda n: lambda u: with_vector(u, n, np.zeros(1, np.float32)), st.text(min_size=8)),
    st.builds(lambda n: lambda u: replace(u, scalars={**u.scalars, n: 0.0}), st.text(min_size=7)),
    st.builds(
        lambda n, k: lambda u: with_vector(u, n, np.resize(u.vectors[n], k)),
        names,
        st.sampled_from([0, 1, 5]),
    ),
    st.builds(lambda n: lambda u: with_vector(u, n, u.vectors[n][None]), names),
    st.builds(
        lambda n, t: lambda u: with_vector(u, n, u.vectors[n].astype(t)), names, st.sampled_from("deil?")
    ),
    st.builds(lambda n, v, i: lambda u: poisoned(u, n, v, i), names, not_finite, st.integers(0, 3)),
    st.builds(
        lambda v, i: lambda u: poisoned(u, "delta", v, i), st.sampled_from([64.1, -65.0, 3e38]), st.integers()
    ),
    st.builds(lambda v: lambda u: replace(u, scalars={**u.scalars, "loss": v}), not_finite | st.just(1024.1)),
    st.builds(
        lambda v: lambda u: replace(u, scalars={**u.scalars, "weight": v}), st.sampled_from([-1e-9, 1000.5])
    ),
)


@given(update=updates, mutate=mutations)
def test_what_differs_in_anything_is_refused(update: Update, mutate: Any) -> None:
    with pytest.raises(UpdateRefused):
        check(PLAN, mutate(update))


@pytest.mark.parametrize(
    ("vectors", "scalars", "reason"),
    [
        ({}, {}, r"sent \['buffers', 'loss', 'weight'\], expected \['buffers', 'delta', 'loss', 'weight'\]"),
        ({"delta": np.zeros(3, np.float32)}, {}, r"delta is \(3,\) float32, expected \(4,\) float32"),
        (
            {"delta": np.full(4, np.nan, np.float32)},
            {},
            "delta has a coordinate that is not finite or beyond 64",
        ),
        ({"delta": np.zeros(4, np.float32)}, {"weight": 2e3}, "weight is 2000, expected 0 to 1000"),
    ],
)
def test_the_reason_says_what_was_expected(vectors: Any, scalars: Any, reason: str) -> None:
    update = Update({"buffers": np.zeros(2, np.float32), **vectors}, {"weight": 1.0, "loss": 0.0, **scalars})
    with pytest.raises(UpdateRefused, match=reason):
        check(PLAN, update)


def totals(accumulator: Accumulator) -> Any:
    return accumulator.words.wide.tolist()


def accumulated(rows: list[Update]) -> Accumulator:
    accumulator = Accumulator(PLAN)
    for row in rows:
        accumulator.add(row)
    return accumulator


@given(rows=st.lists(updates, max_size=8), data=st.data())
def test_any_order_and_grouping_have_the_same_sums(rows: list[Update], data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(rows))
    cut = data.draw(st.integers(0, len(rows)))
    one, other, third = accumulated(shuffled[:cut]), accumulated(shuffled[cut:]), Accumulator(PLAN)
    third.add_words(other.words)
    third.add_words(one.words)
    assert totals(third) == totals(accumulated(rows))


@given(rows=st.lists(updates, min_size=1, max_size=8))
def test_sums_are_the_real_ones_to_half_a_step_a_client(rows: list[Update]) -> None:
    sums = accumulated(rows)
    for term in PLAN.terms:
        step = 2.0 ** -sums.shifts[term.name]
        factors = [row.scalars[term.factor] if term.factor else 1.0 for row in rows]
        if term.vector is None:
            assert sums.scalar(term.name) == pytest.approx(sum(factors), rel=1e-14, abs=len(rows) * step)
            continue
        products = [f * row.vectors[term.vector].astype(float) for f, row in zip(factors, rows, strict=True)]
        exact = np.sum(products, axis=0)
        found = sums.vector(term.name, slice(0, len(exact)))
        slack = len(rows) * (step + 2.0**-52 * 2.0**24)  # and float64's own rounding in the test's sum
        assert np.abs(found - exact).max() <= slack


def test_a_cohort_at_its_bounds_does_not_overflow() -> None:
    worst = Update(
        {"delta": f32([64, -64, 64, -64]), "buffers": f32([2**14, -(2**14)])},
        {"weight": 1000.0, "loss": 1024.0},
    )
    check(PLAN, worst)
    sums = accumulated([worst] * len(PLAN.cohort))
    assert sums.vector("delta", slice(0, 2)).tolist() == [8 * 64e3, -8 * 64e3]
    assert sums.vector("buffers", slice(0, 2)).tolist() == [8 * 2**14, -8 * 2**14]
    assert sums.scalar("weight") == 8000.0


def test_the_sums_lie_where_they_are_told() -> None:
    placed: dict[str, np.ndarray[Any, Any]] = {}

    def space(name: str, shape: tuple[int, ...], dtype: Any) -> Any:
        placed[name] = np.zeros(shape, dtype)
        return placed[name]

    accumulator = Accumulator(PLAN, space)
    accumulator.add(Update(
        {"delta": np.ones(4, np.float32), "buffers": np.ones(2, np.float32)}, {"weight": 1.0, "loss": 0.0}
    ))  # fmt: skip
    assert {name: len(vector) for name, vector in placed.items()} == {"narrow": 0, "wide": 4 + 2 + 2}
    assert placed["wide"][:7].all()  # the loss was 0
