"""What leaves a device: clipped as one vector, noised where devices make the noise, and nothing beside."""

from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from fedcore.privacy.distributed import decode, parameters_for
from fedcore.privacy.levels import (
    ClientLevel,
    DistributedLevel,
    ExampleLevel,
    LocalLevel,
    Private,
    TreeLevel,
)
from fedcore.seeds import generator
from fedcore.strategies import Strategy
from fedcore.strategies.optimizers import FedExP
from fedcore.strategies.privacy import released
from fedcore.strategies.privacy.release import clipped
from fedcore.strategies.samplers import MinimumSeparation, Poisson
from fedcore.strategies.terms import Rows, joint_norm

f32 = partial(np.array, dtype=np.float32)

CLIENT = partial(ClientLevel, level="client", noise_multiplier=1.0, population=10)
LOCAL = partial(LocalLevel, level="local", noise_multiplier=2.0)
DISTRIBUTED = partial(DistributedLevel, level="distributed", noise_multiplier=1.0)
EXAMPLE = ExampleLevel(level="example", noise_multiplier=1.0, sampling_rate=0.1, metric_noise=2.0)

Matrix = NDArray[np.floating[Any]]
matrices = [
    arrays(np.float32, (3, 4), elements=st.floats(width=32)),
    arrays(np.float64, (3, 4), elements=st.floats(width=64)),
]
pairs = st.sampled_from(matrices).flatmap(lambda one: st.tuples(one, one))
clips = st.floats(2.0**-20, 2.0**20)


def strategy(privacy: Private, **parts: Any) -> Strategy:
    if isinstance(privacy, ClientLevel):
        parts["sampler"] = Poisson(0.5)
    if isinstance(privacy, TreeLevel):
        parts["sampler"] = MinimumSeparation(privacy.separation)
    return Strategy(privacy=privacy, **parts)


def rngs(count: int, seed: int = 0) -> list[np.random.Generator]:
    return [generator("test", seed, i) for i in range(count)]


def trained(delta: Matrix, **others: Matrix) -> Rows:
    ones = np.ones(len(delta))
    return Rows({"delta": delta, **others}, {"weight": 9 * ones, "loss": ones, "count": ones, "square": ones})


@given(pairs, clips, st.sampled_from([1, 2]))
def test_a_row_is_clipped_over_all_its_vectors_together(
    pair: tuple[Matrix, Matrix], clip: float, order: int
) -> None:
    sent = {"delta": pair[0], "control_delta": pair[1]}
    made, norms = clipped(sent, clip, order)
    for i, norm in enumerate(norms):
        row, after = [m[i] for m in sent.values()], [m[i] for m in made.values()]
        assert all(new.dtype == old.dtype for new, old in zip(after, row, strict=True))
        assert joint_norm(after, order) <= clip, "whatever the numbers, and however they were rounded"
        if not np.isfinite(joint_norm(row, order)):
            assert norm == 0 and not any(np.any(vector) for vector in after)
        elif norm <= clip * (1 - 2.0**-19):
            assert all(np.array_equal(new, old) for new, old in zip(after, row, strict=True))
        else:  # to nearly the whole clip norm, and in the same direction
            assert joint_norm(after, order) == pytest.approx(clip, rel=1e-5)
            for new, old in zip(after, row, strict=True):
                assert new == pytest.approx(old.astype(np.float64) * (clip / norm), rel=1e-5, abs=1e-44)


@given(pairs, clips)
def test_what_comes_in_is_not_written_to(pair: tuple[Matrix, Matrix], clip: float) -> None:
    before = pair[0].copy()
    clipped({"delta": pair[0]}, clip)
    assert np.array_equal(pair[0], before, equal_nan=True)


@given(st.integers(1, 10**5), st.floats(1e-3, 1e3), st.integers(0, 2**32))
def test_rounding_to_float32_never_leads_beyond_the_clip_norm(size: int, clip: float, seed: int) -> None:
    row = np.random.default_rng(seed).standard_normal((1, size), np.float32) * np.float32(1e4)
    made, _ = clipped({"delta": row}, clip)
    assert joint_norm([made["delta"][0]]) <= clip


def test_a_client_level_row_by_hand() -> None:
    """(3, 0) and (0, 4) together have norm 5: at clip norm 1 they become (.6, 0) and (0, .8)."""
    rows = trained(f32([[3, 0], [0.3, 0]]), control_delta=f32([[0, 4], [0, 0.4]]), buffers=f32([[7], [7]]))
    sent = released(strategy(CLIENT()), "train", rows, 0.0, rngs(2))
    assert sent.vectors["delta"] == pytest.approx(f32([[0.6, 0], [0.3, 0]]), rel=2e-6)
    assert sent.vectors["control_delta"] == pytest.approx(f32([[0, 0.8], [0, 0.4]]), rel=2e-6)
    assert sent.vectors.keys() == {"delta", "control_delta"} and sent.scalars == {}


def test_the_rounds_clip_norm_counts_where_it_is_given_and_fits_says_who_was_within() -> None:
    rows = trained(f32([[3, 4], [0.3, 0.4], [np.nan, 0]]))
    sent = released(strategy(CLIENT(adaptive=True)), "train", rows, 2.5, rngs(3))
    assert [joint_norm([row]) for row in sent.vectors["delta"]] == pytest.approx([2.5, 0.5, 0], rel=2e-6)
    assert sent.scalars.keys() == {"fits"} and sent.scalars["fits"].tolist() == [-0.5, 0.5, 0.5]


def test_tree_aggregation_clips_and_says_nothing_beside() -> None:
    privacy = TreeLevel(level="tree", noise_multiplier=1.0, separation=2)
    sent = released(strategy(privacy), "train", trained(f32([[3, 4]])), 0.0, rngs(1))
    assert joint_norm([sent.vectors["delta"][0]]) == pytest.approx(1.0, rel=2e-6) and sent.scalars == {}


def test_example_level_sends_vectors_as_they_are_and_only_scalars_made_of_them() -> None:
    """DP-SGD has noised the update: what is computed from it, such as its square, is covered."""
    rows = trained(f32([[30, 40]]), buffers=f32([[7]]))
    plain = released(strategy(EXAMPLE), "train", rows, 0.0, rngs(1))
    assert plain.vectors["delta"] is rows.vectors["delta"]
    assert plain.vectors.keys() == {"delta"} and plain.scalars == {}
    squared = released(strategy(EXAMPLE, optimizer=FedExP()), "train", rows, 0.0, rngs(1))
    assert squared.scalars.keys() == {"square"}


@pytest.mark.parametrize(("noise", "deviation"), [("gaussian", 6.0), ("laplace", 6.0 * 2**0.5)])
def test_local_noise_is_as_large_as_it_says(noise: Any, deviation: float) -> None:
    """z C = 6, whatever clip norm a coordinator asks for, and on zeros as on anything else.

    The variance of 10^5 draws is off by 5 standard errors (of sqrt(2) resp. sqrt(5) / sqrt(n)) with
    probability 6e-7.
    """
    size, privacy = 100_000, LOCAL(clip_norm=3.0, noise=noise)
    rows = trained(np.zeros((1, size), np.float32))
    sent = released(strategy(privacy), "train", rows, 1e-30, rngs(1))
    made = sent.vectors["delta"][0].astype(np.float64)
    assert made.var() == pytest.approx(deviation**2, rel=5 * 5**0.5 / size**0.5)
    assert sent.scalars == {} and made.dtype == np.float64 and sent.vectors["delta"].dtype == np.float32


def test_local_noise_is_on_top_of_the_clipped_update_and_of_each_client_its_own() -> None:
    rows = trained(f32([[30, 0, 0], [0, 0, 0]]), control_delta=f32([[0, 40], [0, 0]]))
    quiet = released(
        strategy(LOCAL()), "train", trained(f32([[0] * 3] * 2), control_delta=f32([[0] * 2] * 2)), 0, rngs(2)
    )
    sent = released(strategy(LOCAL()), "train", rows, 1e-3, rngs(2))  # a clip norm that nobody asked for
    assert sent.vectors["delta"][0] - quiet.vectors["delta"][0] == pytest.approx(f32([0.6, 0, 0]), abs=1e-5)
    difference = sent.vectors["control_delta"][0] - quiet.vectors["control_delta"][0]
    assert difference == pytest.approx(f32([0, 0.8]), abs=1e-5)
    assert np.array_equal(sent.vectors["delta"][1], quiet.vectors["delta"][1])
    drawn = np.concatenate([*quiet.vectors["delta"], *quiet.vectors["control_delta"]])
    assert len(np.unique(drawn)) == 10, "no number is used twice"


def test_local_laplace_clips_to_an_l1_norm() -> None:
    both = [LOCAL(noise="laplace"), LOCAL(noise="gaussian")]
    for privacy, expected in zip(both, (1.0, 2**0.5), strict=True):
        far, zero = (trained(f32([row])) for row in ([500, 500], [0, 0]))
        sent, noise = (
            released(strategy(privacy), "train", r, 0, rngs(1)).vectors["delta"] for r in (far, zero)
        )
        assert np.abs(sent - noise).sum() == pytest.approx(expected, rel=1e-4)


def test_rows_that_are_not_finite_are_all_noise() -> None:
    for bad in (np.nan, np.inf, -np.inf):
        sent = released(strategy(LOCAL()), "train", trained(f32([[bad, 1]])), 0.0, rngs(1))
        zero = released(strategy(LOCAL()), "train", trained(f32([[0, 0]])), 0.0, rngs(1))
        assert np.array_equal(sent.vectors["delta"], zero.vectors["delta"])


def test_distributed_noise_is_on_words_of_all_vectors_one_after_the_other() -> None:
    """(0, 30) and (40,) together have norm 50, and at clip norm 1 lie as (.8, 0, .6), by name."""
    k, made = 10, parameters_for("skellam", 1.0, 1e-3, dimension=3, clients=10, honest=10, bits=32)
    rows = trained(f32([[0, 30]] * k), control_delta=f32([[40]] * k), buffers=f32([[7]] * k))
    sent = released(strategy(DISTRIBUTED()), "train", rows, 1e-3, rngs(k), made)
    assert {name: matrix.shape for name, matrix in sent.vectors.items()} == {
        "control_delta": (k, 1),
        "delta": (k, 2),
    }
    assert sent.scalars == {} and all(matrix.dtype == np.uint32 for matrix in sent.vectors.values())
    joint = np.concatenate([*sent.vectors.values()], axis=1)
    assert len(np.unique(joint)) == joint.size, "of each client its own"
    total = decode(joint.sum(axis=0, dtype=np.uint32), made, np.empty(3))
    assert total / k == pytest.approx([0.8, 0, 0.6], abs=1e-3)


def test_nothing_is_sent_where_nobody_says_how_much_noise_it_needs() -> None:
    with pytest.raises(AssertionError, match="how to encode"):
        released(strategy(DISTRIBUTED()), "train", trained(f32([[3, 4]])), 0.0, rngs(1))


def test_distributed_rows_that_are_not_finite_are_all_noise() -> None:
    made = parameters_for("skellam", 1.0, 1.0, dimension=2, clients=1, honest=1, bits=32)
    for bad in (np.nan, np.inf):
        sent, zero = (
            released(strategy(DISTRIBUTED()), "train", trained(f32([row])), 0.0, rngs(1), made)
            for row in ([bad, 1], [0, 0])
        )
        assert np.array_equal(sent.vectors["delta"], zero.vectors["delta"])


def test_the_root_update_of_the_server_gets_no_noise() -> None:
    rows = trained(f32([[3, 4]]))
    assert released(strategy(LOCAL()), "root", rows, 0.0, rngs(1)).vectors["delta"] is rows.vectors["delta"]


METRICS = Rows(
    {}, {"loss": np.array([9.0, 9.0]), "right": np.array([6.0, 9.0]), "count": np.array([8.0, 3.0])}
)


def test_metrics_of_a_client_are_means_and_it_counts_once() -> None:
    """Of 8 examples 6 are right; 9 of 3 cannot be, so that is 1; at a bound of 2 both halve."""
    sent = released(strategy(CLIENT(metric_noise=1.0)), "evaluate", METRICS, 0.0, rngs(2))
    assert sent.scalars["right"].tolist() == [0.75, 1.0] and sent.scalars["count"].tolist() == [1.0, 1.0]
    assert sent.scalars.keys() == {"right", "count"} and sent.vectors == {}
    sent = released(strategy(CLIENT(metric_noise=1.0, metric_bound=2.0)), "evaluate", METRICS, 0.0, rngs(2))
    assert sent.scalars["right"].tolist() == [0.375, 1.0]


def test_metrics_of_a_client_without_examples_are_zero() -> None:
    rows = Rows({}, {"loss": np.zeros(1), "right": np.zeros(1), "count": np.zeros(1)})
    sent = released(strategy(CLIENT(metric_noise=1.0)), "evaluate", rows, 0.0, rngs(1))
    assert sent.scalars["right"].tolist() == [0.0] and sent.scalars["count"].tolist() == [1.0]


@pytest.mark.parametrize("privacy", [EXAMPLE, LOCAL(metric_noise=2.0), DISTRIBUTED(metric_noise=2.0)])
def test_metrics_have_noise_from_the_device_where_that_makes_it(privacy: Private) -> None:
    """2 sqrt(1 + 1) on each; 20,000 draws are off by 5 standard errors with probability 6e-7."""
    k = 10_000
    rows = Rows({}, {name: np.zeros(k) for name in ("loss", "right", "count")})
    sent = released(strategy(privacy), "evaluate", rows, 0.0, rngs(k))
    counted = 0.0 if privacy == EXAMPLE else 1.0
    noise = np.concatenate([sent.scalars["right"], sent.scalars["count"] - counted])
    assert noise.std() == pytest.approx(8**0.5, rel=5 / (2 * len(noise)) ** 0.5)
    assert abs(np.corrcoef(noise[:k], noise[k:])[0, 1]) < 5 / k**0.5
