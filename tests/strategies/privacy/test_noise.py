"""Noise in the sum: as large as promised, never the same twice, and a clip norm that follows the median."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.encoding import BLOCK
from fedcore.errors import SpecError
from fedcore.layout import Entry, Layout, Parameters
from fedcore.messages import Plan, Ref, Update
from fedcore.privacy.levels import OFF, ClientLevel
from fedcore.spec import RunSpec
from fedcore.strategies import SGD, Strategy
from fedcore.strategies.checkpoint import load_state, save_state
from fedcore.strategies.privacy import clip_norm, metric_means, noised, noised_sums, private, update_noise
from fedcore.strategies.privacy.noise import CLIP, KEY, Noised
from fedcore.strategies.rounds import Round, State, advance, initial_state, receive, train_plan
from fedcore.strategies.words import Accumulator

f64 = partial(np.array, dtype=np.float64)

CLIENT = {"level": "client", "noise_multiplier": 1.5, "clip_norm": 2.0, "population": 100}
TREE = {"level": "tree", "noise_multiplier": 1.5, "clip_norm": 2.0, "separation": 2}


def spec_for(privacy: dict[str, Any], size: int = 4) -> RunSpec:
    return RunSpec.parse({"cohort": {"size": size}, "privacy": privacy})


def layout(size: int) -> Layout:
    return Layout((Entry("weight", (size,), "float64", "shared"),))


def plan_for(
    strategy: Strategy, spec: RunSpec, size: int, clients: Sequence[str], round: int = 1, clip: float = 0.0
) -> Plan:
    return train_plan(strategy, spec, layout(size), Ref("r", round, 0, "train"), tuple(clients), 50, clip)


def start(strategy: Strategy, size: int) -> State:
    return initial_state(strategy, Parameters(np.zeros(size), np.zeros(0)))


def empty(plan: Plan) -> Round:
    round = Round(plan)
    round.close()
    return round


def played(strategy: Strategy, spec: RunSpec, size: int, rounds: int, seed: int = 0) -> list[State]:
    """Return the states of a run in which nobody ever comes."""
    states = [start(strategy, size)]
    for number in range(1, rounds + 1):
        plan = plan_for(strategy, spec, size, (), number)
        states.append(advance(strategy, empty(plan), states[-1], seed))
    return states


# The values of Andrew et al. 2021 in the reference; 1e-6 is half a unit of their last digit, rounded up.
@pytest.mark.parametrize(("z", "m", "expected"), [(1.0, 100, 1.005038), (0.8, 1000, 0.800026)])
def test_the_update_gets_what_the_indicator_leaves_of_z(z: float, m: float, expected: float) -> None:
    assert update_noise(z, m) == pytest.approx(expected, abs=1e-6)


@given(st.floats(0.1, 10), st.floats(101, 1e6))
def test_both_releases_together_cost_what_z_costs(z: float, m: float) -> None:
    """Gaussians of multipliers a and b compose to (a^-2 + b^-2)^-1/2; the indicator's is sigma_b / (1/2)."""
    assert (update_noise(z, m) ** -2 + (2 * m / 20) ** -2) ** -0.5 == pytest.approx(z)


@pytest.mark.parametrize(("z", "m"), [(1.0, 10), (2.0, 20), (1.0, 9)])
def test_too_few_clients_for_an_adaptive_clip_norm_are_refused(z: float, m: float) -> None:
    with pytest.raises(SpecError, match=rf"noise_multiplier = {z:g}; raise cohort.size above {10 * z:g}, or"):
        update_noise(z, m)
    assert update_noise(z, 10 * z + 1) > z


def test_the_models_noise_is_z_clip_lr_over_the_expected_size() -> None:
    """1.5 * 2 * 0.5 / 4 = 0.375; 200,000 draws are off by 5 standard errors with probability 6e-7."""
    spec, size = spec_for(CLIENT), 200_000
    strategy = private(Strategy(optimizer=SGD(lr=0.5)), spec)
    x = played(strategy, spec, size, 1)[1].parameters.shared
    assert x.std() == pytest.approx(0.375, rel=5 / (2 * size) ** 0.5)
    assert abs(x.mean()) < 5 * 0.375 / size**0.5
    assert abs(np.corrcoef(x[:-1], x[1:])[0, 1]) < 5 / size**0.5, "coordinates are independent"
    shifted = x[: size - BLOCK], x[BLOCK:]
    assert abs(np.corrcoef(*shifted)[0, 1]) < 5 / (size - BLOCK) ** 0.5, "and so are blocks"


@pytest.mark.parametrize("table", [CLIENT, TREE])
def test_two_rounds_and_two_runs_have_nothing_in_common(table: dict[str, Any]) -> None:
    """The noise of tree aggregation is that of its prefix sums: x after round 1, and from round 2 to 3."""
    spec, size = spec_for(table), 20_000
    strategy = private(Strategy(), spec)
    one, other = (played(strategy, spec, size, 3, seed) for seed in (0, 1))
    steps = [after.parameters.shared - before.parameters.shared for before, after in pairwise(one)]
    first, last = steps[0], steps[2]
    assert abs(np.corrcoef(first, last)[0, 1]) < 5 / size**0.5
    assert abs(np.corrcoef(first, other[1].parameters.shared)[0, 1]) < 5 / size**0.5


def test_an_entropy_decides_and_not_the_seed() -> None:
    spec = spec_for(CLIENT)
    strategy = private(Strategy(), spec)
    round, state = empty(plan_for(strategy, spec, 9, ())), start(strategy, 9)
    one, same, other = (
        advance(strategy, round, state, seed, entropy=e) for seed, e in ((0, 7), (1, 7), (0, 8))
    )
    assert np.array_equal(one.parameters.shared, same.parameters.shared)
    assert not np.any(one.parameters.shared == other.parameters.shared)


def noised_round(size: int = BLOCK + 3) -> Noised:
    spec = spec_for(CLIENT)
    strategy = private(Strategy(), spec)
    plan = plan_for(strategy, spec, size, ())
    plan = replace(plan, vectors={"delta": plan.vectors["delta"], "control_delta": plan.vectors["delta"]})
    made = noised(strategy.privacy, plan, Accumulator(plan), {}, 5)
    assert isinstance(made, Noised)
    return made


def test_a_block_has_the_same_noise_however_often_it_is_read() -> None:
    made, first, last = noised_round(), slice(0, BLOCK), slice(BLOCK, BLOCK + 3)
    once = made.vector("delta", first)
    drawn = [made.vector("delta", last), made.vector("control_delta", last)]
    assert np.array_equal(made.vector("delta", first), once)
    assert len(np.unique(np.concatenate([once, *drawn]))) == BLOCK + 6, "vectors and blocks have their own"


def test_a_noised_sum_has_a_fixed_size_and_no_scalar() -> None:
    made = noised_round()
    assert made.clients == 4 and made.population == 100
    with pytest.raises(SpecError, match="`weight` is not in the noised sum of a private round"):
        made.scalar("weight")


# Tree aggregation


def test_the_noise_of_a_tree_telescopes() -> None:
    """After t rounds x has the noise of as many nodes as t has ones: 5 standard errors, 15 rounds."""
    spec, size = spec_for(TREE), 20_000
    states = played(private(Strategy(), spec), spec, size, 15)
    for t, state in enumerate(states[1:], 1):
        expected = 0.75 * t.bit_count() ** 0.5  # z C / m for each node
        assert state.parameters.shared.std() == pytest.approx(expected, rel=5 / (2 * size) ** 0.5)


def test_a_tree_goes_on_after_a_restart_whatever_the_new_entropy(tmp_path: Path) -> None:
    spec, size = spec_for(TREE), 50
    strategy = private(Strategy(), spec)

    def step(state: State, entropy: int) -> State:
        plan = plan_for(strategy, spec, size, (), state.round + 1)
        return advance(strategy, empty(plan), state, 0, entropy=entropy)

    key = 2**256 - 12345
    whole = step(step(step(start(strategy, size), key), 1), 2)
    stopped = step(start(strategy, size), key)
    save_state(tmp_path / "state", stopped)
    again, _ = load_state(tmp_path / "state")
    again = step(step(again, 3), 4)
    assert again.parameters.digest == whole.parameters.digest
    assert step(start(strategy, size), key - 1).parameters.digest != stopped.parameters.digest
    assert again.vectors[KEY].tolist() == whole.vectors[KEY].tolist() and len(whole.vectors[KEY]) == 8
    words = whole.vectors[KEY].astype(np.uint32).astype("<u4").tobytes()
    assert int.from_bytes(words, "little") == key, "all of its 256 bits are kept"


# The adaptive clip norm


def adapted(fits: Sequence[float], size: int = 40, clip: float = 2.0, seed: int = 0) -> float:
    spec = spec_for({**CLIENT, "adaptive": True}, size)
    strategy = private(Strategy(), spec)
    clients = [str(i) for i in range(len(fits))]
    round = Round(plan_for(strategy, spec, 1, clients, clip=clip))
    for client, value in zip(clients, fits, strict=True):
        verdict = receive(round, client, Update({"delta": f64([0.0])}, {"fits": value}))
        assert verdict.status == "folded"
    round.close()
    state = advance(strategy, round, start(strategy, 1), seed)
    assert clip_norm(strategy.privacy, state.vectors) == state.vectors[CLIP][0]
    return clip_norm(strategy.privacy, state.vectors)


def test_the_clip_norm_moves_towards_the_median() -> None:
    """ln(C'/C) = -0.2 (b - 1/2), b with a deviation of 1/20: means of 300 within 5 standard errors."""
    for fits, share in (([0.5] * 40, 1.0), ([-0.5] * 40, 0.0), ([0.5] * 30 + [-0.5] * 10, 0.75), ([], 0.5)):
        moved = [np.log(adapted(fits, seed=seed) / 2.0) for seed in range(300)]
        assert np.mean(moved) == pytest.approx(-0.2 * (share - 0.5), abs=5 * 0.01 / 300**0.5)
        assert np.std(moved) == pytest.approx(0.01, rel=5 / 600**0.5)


@given(st.sampled_from([2.0**-20, 2.0**20]), st.integers(0, 100), st.sampled_from([0.5, -0.5]))
def test_the_clip_norm_stays_in_its_range(clip: float, seed: int, fits: float) -> None:
    """At 0 it would mean that there is none."""
    assert 2.0**-20 <= adapted([fits] * 40, clip=clip, seed=seed) <= 2.0**20


def test_adaptive_clipping_adds_more_noise_to_the_update() -> None:
    spec, size = spec_for({**CLIENT, "adaptive": True}, 40), 200_000
    strategy = private(Strategy(), spec)
    plan = plan_for(strategy, spec, size, (), clip=3.0)
    x = advance(strategy, empty(plan), start(strategy, size), 0).parameters.shared
    assert x.std() == pytest.approx(update_noise(1.5, 40) * 3.0 / 40, rel=5 / (2 * size) ** 0.5)
    assert update_noise(1.5, 40) > 1.6, "far enough from 1.5 for the test to tell"


def test_a_clip_norm_that_does_not_adapt_is_the_specs() -> None:
    privacy = spec_for(CLIENT).privacy
    assert clip_norm(privacy, {}) == 2.0 and clip_norm(OFF, {}) == 0.0


# Metrics


def test_sums_of_metrics_get_noise_for_a_client_that_moves_all_of_them() -> None:
    """3 sqrt(2 + 1) on each; 6,000 draws are off by 5 standard errors with probability 6e-7."""
    privacy = ClientLevel(level="client", noise_multiplier=1, population=9, metric_noise=3)
    sums = dict.fromkeys(("right", "near", "count"), 0.0)
    drawn = f64([list(noised_sums(privacy, sums, entropy).values()) for entropy in range(2000)])
    assert drawn.std() == pytest.approx(27**0.5, rel=5 / (2 * drawn.size) ** 0.5)
    assert np.abs(np.corrcoef(drawn.T) - np.eye(3)).max() < 5 / 2000**0.5
    assert noised_sums(OFF, sums, 0) == sums


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6), st.floats(1e-3, 1e3))
def test_means_of_noised_sums_lie_in_their_range(value: float, count: float, bound: float) -> None:
    privacy = ClientLevel(
        level="client", noise_multiplier=1, population=9, metric_noise=3, metric_bound=bound
    )
    means = metric_means(privacy, {"right": value, "count": count})
    assert means.keys() == {"right"}, "a missing metric would tell of the count"
    assert all(0 <= mean <= bound for mean in means.values())


def test_a_mean_of_noised_sums_by_hand() -> None:
    privacy = ClientLevel(level="client", noise_multiplier=1, population=9, metric_noise=3, metric_bound=4.0)
    assert metric_means(privacy, {"right": 3.0, "count": 8.0}) == {"right": 1.5}
