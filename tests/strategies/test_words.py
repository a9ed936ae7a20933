"""A sum is the same words in any order and grouping, is close to the real one, and never wraps around."""

from dataclasses import replace
from hashlib import sha256
from io import BytesIO
from math import sqrt
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.encoding import COARSEST, rounding
from fedcore.errors import SpecError, UpdateRefused
from fedcore.messages import Plan, Ref, ScalarSpec, Update, VectorSpec
from fedcore.privacy.rotation import rotate
from fedcore.seeds import generator
from fedcore.strategies.terms import Rows, check, joint_norm
from fedcore.strategies.words import Accumulator, Words, check_sum, encoded

F32 = np.dtype(np.float32)
NORM, WEIGHT = 8.0, 50.0


def plan_for(bits: int, size: int = 37, clients: int = 8, factor: str | None = "weight", **of: Any) -> Plan:
    return Plan(
        ref=Ref("r", 1, 0, "train"),
        cohort=tuple(f"client-{i}" for i in range(clients)),
        goal=clients,
        minimum=2,
        deadline=60.0,
        vectors={
            "delta": VectorSpec(size, F32, 64.0, factor, NORM),
            "buffers": VectorSpec(3, F32, 2.0**14, "weight"),
        },
        scalars={"weight": ScalarSpec(0.0, WEIGHT), "loss": ScalarSpec(-1024.0, 1024.0)},
        bits=bits,
        seed=3,
        **of,
    )


PLANS = {64: plan_for(64), 32: plan_for(32), 16: plan_for(16, factor=None)}
SOME = st.sampled_from(sorted(PLANS))


def update(plan: Plan, seed: int, norm: float = NORM, weight: float = WEIGHT) -> Update:
    """Return an update in a random direction."""
    rng = generator("update", seed)
    delta = rng.normal(size=plan.vectors["delta"].length)
    delta *= norm / np.linalg.norm(delta)
    buffers = rng.uniform(-(2**14), 2**14, 3).astype(F32)
    return Update(
        {"delta": delta.astype(F32), "buffers": buffers}, {"weight": weight, "loss": rng.uniform(-1024, 1024)}
    )


cohorts = st.lists(
    st.tuples(st.integers(0, 2**40), st.floats(0, 64), st.floats(0, WEIGHT)), min_size=1, max_size=8
)


def summed(plan: Plan, updates: list[Update]) -> Accumulator:
    sums = Accumulator(plan)
    for each in updates:
        check(plan, each)
        sums.add(each)
    return sums


def bits_of(words: Words) -> tuple[list[int], list[int]]:
    return words.narrow.tolist(), words.wide.tolist()


def whole(sums: Accumulator, name: str) -> Any:
    return sums.vector(name, slice(0, sums.plan.vectors[name].length))


@given(SOME, cohorts, st.data())
def test_any_order_and_grouping_have_the_same_words(
    bits: int, cohort: list[Any], data: st.DataObject
) -> None:
    plan = PLANS[bits]
    updates = [update(plan, *each) for each in cohort]
    expected = bits_of(summed(plan, updates).words)
    shuffled, cut = data.draw(st.permutations(updates)), data.draw(st.integers(0, len(updates)))
    merged = summed(plan, shuffled[:cut])
    merged.add_words(summed(plan, shuffled[cut:]).words)
    together, apart = Accumulator(plan), Accumulator(plan)
    together.add_rows(Rows.of(shuffled))
    for each in shuffled:
        apart.add_words(encoded(plan, each))
    assert bits_of(merged.words) == bits_of(together.words) == bits_of(apart.words) == expected


@given(SOME, cohorts, st.integers(0, 2**64 - 1))
def test_masks_that_cancel_leave_the_same_words(bits: int, cohort: list[Any], mask: int) -> None:
    plan = PLANS[bits]
    updates = [update(plan, *each) for each in cohort]
    sums = summed(plan, updates)
    expected = bits_of(sums.words)
    sums.words.narrow[:] += plan.word.type(mask % 2**16)
    sums.words.wide[:] += np.uint64(mask)
    assert bits_of(sums.words) != expected or mask % 2**16 == 0
    sums.words.narrow[:] -= plan.word.type(mask % 2**16)
    sums.words.wide[:] -= np.uint64(mask)
    assert bits_of(sums.words) == expected


def clipped(each: Update) -> Any:
    delta = each.vectors["delta"].astype(float)
    return delta * min(1.0, NORM / max(float(np.linalg.norm(delta)), 1e-300))


@given(SOME, cohorts)
def test_the_sum_is_that_of_the_clipped_vectors_to_half_a_step_a_client(bits: int, cohort: list[Any]) -> None:
    plan = PLANS[bits]
    updates = [update(plan, *each) for each in cohort]
    sums = summed(plan, updates)
    factors = [each.scalars["weight"] if plan.vectors["delta"].factor else 1.0 for each in updates]
    real = sum(f * clipped(each) for f, each in zip(factors, updates, strict=True))
    step = 2.0 ** -sums.shifts["delta"]
    slack = len(updates) * (sqrt(37) / 2 * step + 1e-6 * NORM * WEIGHT)  # float32 where it is rotated
    assert np.linalg.norm(whole(sums, "delta") - real) <= slack
    buffers = sum(each.scalars["weight"] * each.vectors["buffers"].astype(float) for each in updates)
    assert np.abs(whole(sums, "buffers") - buffers).max() <= 1e-6
    check_sum(plan, sums, len(updates))


@pytest.mark.parametrize("bits", [32, 16])
@pytest.mark.parametrize("size", [1, 37, 5000, 40_000])
def test_the_worst_cohort_does_not_wrap(bits: int, size: int) -> None:
    """All clients send the same vector, at the bounds: one coordinate, or what the rotation makes one."""
    clients = 40 if bits == 32 else 7
    plan = plan_for(bits, size, clients, factor="weight" if bits == 32 else None)
    signs = rotate(np.eye(1, size, size // 2)[0], plan.rotation(plan.terms[0]))
    spread, peak = np.sign(signs) * NORM / sqrt(size), np.eye(1, size, size // 2)[0] * NORM
    for vector in (peak, -peak, spread):
        delta = vector.astype(F32)
        each = Update({"delta": delta, "buffers": np.zeros(3, F32)}, {"weight": WEIGHT, "loss": 0.0})
        one = whole(summed(plan, [each]), "delta")
        assert np.linalg.norm(one - vector * plan.most(plan.vectors["delta"].factor)) <= NORM * COARSEST * 2
        np.testing.assert_allclose(whole(summed(plan, [each] * clients), "delta"), clients * one, atol=1e-9)


def test_a_limit_means_the_same_in_every_encoding() -> None:
    plans = [plan_for(bits) for bits in (64, 32)]
    wide, narrow = (whole(summed(plan, [update(plan, 1, 5 * NORM)]), "delta") / WEIGHT for plan in plans)
    assert np.linalg.norm(wide) == pytest.approx(NORM, rel=1e-9)
    np.testing.assert_allclose(narrow, wide, atol=1e-5)


@pytest.mark.parametrize(("bits", "most"), [(32, 2e-5), (16, 0.1)])
def test_a_mean_is_close_to_that_of_floats(bits: int, most: float) -> None:
    plan = plan_for(bits, 100_000, 100, factor="weight" if bits == 32 else None)
    updates = [update(plan, seed) for seed in range(20)]
    mean = np.mean([each.vectors["delta"].astype(float) for each in updates], axis=0)
    found = whole(summed(plan, updates), "delta") / 20 / plan.most(plan.vectors["delta"].factor)
    assert np.linalg.norm(found - mean) <= most * np.linalg.norm(mean)


@pytest.mark.parametrize(
    ("bits", "clients", "factor", "message"),
    [
        (
            32,
            10**8,
            "weight",
            r"up to 50 times.* set limits.weight to the most .*, or encryption.encoding = \"exact\"",
        ),
        (16, 2000, None, r"expected at most 1; set encryption.encoding = \"q32\""),
        (16, 2**17, None, r"set encryption.encoding = \"q32\""),
        (16, 10, "weight", r"16 bits .*`delta` is multiplied by `weight`, up to 50; .*\"q32\""),
    ],
)
def test_a_grid_that_is_too_coarse_is_refused(
    bits: int, clients: int, factor: str | None, message: str
) -> None:
    plan = plan_for(bits, 10_000, factor=factor, population=clients, timed=True)
    with pytest.raises(SpecError, match=message):
        plan.shift(plan.terms[0])


@given(st.integers(1, 10**6), st.integers(1, 10**4), st.floats(1, 1e6), st.sampled_from([16, 32]))
def test_a_grid_is_the_finest_with_room_for_all(size: int, clients: int, factor: float, bits: int) -> None:
    plan = plan_for(bits, size, clients, factor="weight" if bits == 32 else None)
    plan = replace(plan, scalars={**plan.scalars, "weight": ScalarSpec(0.0, factor)})
    try:
        shift = plan.shift(plan.terms[0])
    except SpecError:
        return
    bound = (factor if bits == 32 else 1.0) * NORM * min(1.0, sqrt(2 * np.log(2.0**41 * size) / wide(size)))
    assert clients * (bound * 2.0**shift + 0.5) < 2 ** (bits - 1)
    assert clients * (bound * 2.0 ** (shift + 1) + 0.5) >= 2 ** (bits - 1) * 0.999
    assert rounding(size, shift) <= COARSEST * NORM


def wide(size: int) -> int:
    return min(1 << 14, 1 << (size.bit_length() - 1))


@pytest.mark.parametrize("bits", [32, 16])
def test_rounding_leaves_a_private_update_within_its_clip_norm(bits: int) -> None:
    """Two vectors at the clip norm together: what enters the sum is what the noise has to cover."""
    vector = VectorSpec(5000, F32, NORM, None, NORM)
    plan = replace(
        plan_for(bits, clients=50), vectors={"delta": vector, "other": vector}, scalars={}, clip=NORM
    )
    for seed in range(5):
        rng = generator("private", seed)
        rows = rng.normal(size=(2, 5000))
        rows *= NORM * (1 - 2.0**-20) / np.linalg.norm(rows)
        each = Update({"delta": rows[0].astype(F32), "other": rows[1].astype(F32)}, {})
        sums = summed(plan, [each])
        entered = [whole(sums, name) for name in plan.vectors]
        assert 0.8 * NORM < joint_norm(entered) <= NORM


@pytest.mark.parametrize("bits", [64, 32, 16])
def test_an_empty_vector_has_no_words(bits: int) -> None:
    plan = plan_for(bits, 0, factor=None)
    vectors = {"delta": np.zeros(0, F32), "buffers": np.zeros(3, F32)}
    sums = summed(plan, [Update(vectors, {"weight": 1.0, "loss": 0.0})])
    check_sum(plan, sums, 1)
    assert plan.narrow == 0 and not len(whole(sums, "delta"))


def test_words_are_the_same_on_every_machine() -> None:
    """Whoever changes these bits changes the protocol: both ends of a sum must agree on them."""
    found = {}
    for bits, plan in PLANS.items():
        file = BytesIO()
        delta = (np.arange(37) % 7 - 3).astype(F32) / 8
        each = Update({"delta": delta, "buffers": delta[:3]}, {"weight": 20.0, "loss": 1.5})
        encoded(plan, each).write(file)
        found[bits] = sha256(file.getvalue()).hexdigest()[:16]
    assert found == {64: "f43a82c92e1b87d9", 32: "24057b862c6d7803", 16: "8b94bbde03d97597"}


def test_every_vector_and_every_round_has_a_rotation_of_its_own() -> None:
    vector = VectorSpec(100, F32, 64.0, None, NORM)
    plan = replace(plan_for(32), vectors={"delta": vector, "control": vector})
    seeds = {p.rotation(term) for term in plan.terms[:2] for p in (plan, replace(plan, seed=4))}
    seeds |= {replace(plan, ref=Ref("r", 2, 0, "train")).rotation(term) for term in plan.terms[:2]}
    assert len(seeds) == 6
    assert plan.rotation(plan.terms[0]) == replace(plan, ref=Ref("q", 1, 3, "train")).rotation(plan.terms[0])


@pytest.mark.parametrize("bits", [64, 32, 16])
def test_words_are_read_as_they_were_written(bits: int) -> None:
    plan = PLANS[bits]
    words, file = encoded(plan, update(plan, 1)), BytesIO()
    words.write(file)
    raw = np.frombuffer(file.getvalue(), np.uint8)
    assert len(raw) == plan.payload == plan.narrow * plan.word.itemsize + 8 * plan.wide
    assert bits_of(Words.read(plan, raw)) == bits_of(words)
    first = words.wide[0] if bits == 64 else words.narrow[0]
    assert int.from_bytes(raw[: first.nbytes].tobytes(), "little") == first
    sums = Accumulator(plan)
    sums.add_words(Words.read(plan, raw))  # which nobody may write, and whose wide words are not aligned
    assert bits_of(sums.words) == bits_of(words)


@pytest.mark.parametrize("bits", [64, 32, 16])
@pytest.mark.parametrize(
    ("place", "change", "reason"),
    [
        ("weight", 2**58, "the sum of weight of 2 clients is .*, expected 0 to 100"),
        ("weight", -(2**58), "the sum of weight of 2 clients is -"),
        ("loss", 2**60, "the sum of loss of 2 clients is .*, expected -2048 to 2048"),
        ("buffers", 2**61, "the sum of buffers of 2 clients is larger, expected coordinates up to"),
        ("delta", 2**61, "the norm of the sum of delta of 2 clients is .*, expected at most"),
    ],
)
def test_a_sum_that_no_cohort_can_have_is_refused(bits: int, place: str, change: int, reason: str) -> None:
    plan = PLANS[bits]
    sums = summed(plan, [update(plan, 1), update(plan, 2)])
    check_sum(plan, sums, 2)
    assert sums.words.wide.size  # what was read is forgotten when words change
    integers = sums.integers(place)
    integers += integers.dtype.type(change % 2 ** (8 * integers.itemsize - 1) or 2 ** (bits - 2))
    if change < 0:
        integers -= integers.dtype.type(2 * -change)
    with pytest.raises(UpdateRefused, match=reason):
        check_sum(plan, sums, 2)


def test_what_is_read_follows_the_words() -> None:
    plan = PLANS[32]
    sums = summed(plan, [update(plan, 1)])
    before = whole(sums, "delta")
    sums.add_words(encoded(plan, update(plan, 1)))
    np.testing.assert_array_equal(whole(sums, "delta"), 2 * before)
    sums.add(update(plan, 1))
    np.testing.assert_allclose(whole(sums, "delta"), 3 * before)
    sums.words.narrow[:] = 0
    assert not whole(sums, "delta").any()
