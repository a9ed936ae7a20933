"""What a private round asks, and what it does not ask."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedcore.errors import SpecError, UpdateRefused
from fedcore.layout import Entry, Layout
from fedcore.messages import Plan, Ref, ScalarSpec, Update
from fedcore.spec import RunSpec
from fedcore.strategies import from_table
from fedcore.strategies.privacy import private
from fedcore.strategies.rounds import Round, evaluate_plan, receive, train_plan
from fedcore.strategies.terms import Rows, all_pass, check

LAYOUT = Layout((Entry("weight", (3,), "float32", "shared"),))
REF = Ref("r", 1, 0, "train")


def spec_for(privacy: dict[str, Any], **tables: Any) -> RunSpec:
    return RunSpec.parse(
        {"cohort": {"size": 20}, "privacy": {"noise_multiplier": 2.0, "clip_norm": 0.5, **privacy}, **tables}
    )


def plan_for(spec: RunSpec, clients: int = 3, clip: float = 0.0, layout: Layout = LAYOUT) -> Plan:
    names = tuple(str(i) for i in range(clients))
    return train_plan(private(from_table(spec.strategy), spec), spec, layout, REF, names, 77, clip)


def bounds(plan: Plan) -> dict[str, float]:
    return {name: vector.bound for name, vector in plan.vectors.items()}


def test_a_client_level_round_asks_for_the_update_alone_and_ends_at_its_deadline() -> None:
    plan = plan_for(spec_for({"level": "client", "population": 100}, strategy={"name": "scaffold"}))
    assert plan.scalars == {} and plan.metrics == () and not plan.rows and not plan.sees
    assert bounds(plan) == {"delta": 0.5, "control_delta": 0.5} and plan.clip == 0.5
    assert (plan.expected, plan.population, plan.minimum, plan.timed) == (20.0, 100, 0, True)
    assert all(vector.factor is None for vector in plan.vectors.values()), "every client counts once"


def test_an_adaptive_round_asks_who_was_within_the_clip_norm_of_the_round() -> None:
    plan = plan_for(spec_for({"level": "client", "population": 100, "adaptive": True}), clip=0.25)
    assert plan.scalars == {"fits": ScalarSpec(-0.5, 0.5)} and plan.clip == 0.25
    assert bounds(plan) == {"delta": 0.25}


def test_a_round_of_tree_aggregation_has_a_fixed_size_and_no_secret() -> None:
    plan = plan_for(spec_for({"level": "tree", "separation": 2}))
    assert plan.scalars == {} and (plan.expected, plan.population, plan.clip) == (20.0, 77, 0.5)
    assert plan.minimum == 3 and not plan.timed


@pytest.mark.parametrize(("encoding", "bits"), [("auto", 32), ("q32", 32), ("q16", 16)])
def test_distributed_noise_is_of_words_enough_for_the_smallest_sum(encoding: str, bits: int) -> None:
    """20 are asked, a round may close with 14, and 4 of the 20 may have made no noise."""
    spec = spec_for(
        {"level": "distributed"}, strategy={"name": "scaffold"}, encryption={"encoding": encoding}
    )
    plan = plan_for(spec, clients=20)
    assert plan.distributed and plan.scalars == {} and (plan.clip, plan.expected) == (0.0, 0.0)
    assert (plan.minimum, plan.narrow, plan.wide, plan.bits) == (14, 6, 0, bits)
    assert {vector.dtype for vector in plan.vectors.values()} == {np.dtype(f"uint{bits}")}
    made = plan.distributed
    assert (made.clients, made.honest, made.dimension, made.clip_norm, made.bits) == (20, 10, 6, 0.5, bits)
    assert made.honest * made.variance >= (2.0 * made.norm) ** 2
    strategy = private(from_table(spec.strategy), spec)
    another = train_plan(strategy, spec, LAYOUT, replace(REF, round=2), (), 77).distributed
    assert another and another.seed != made.seed and replace(another, seed=made.seed) == made
    assert plan_for(spec, clients=3).minimum == 14, "fewer would have too little noise"


@pytest.mark.parametrize(("noise", "tails"), [("gaussian", 12), ("laplace", 40)])
def test_local_noise_fits_into_the_bounds(noise: str, tails: int) -> None:
    plan = plan_for(spec_for({"level": "local", "noise": noise}))
    assert bounds(plan) == {"delta": 0.5 + tails * 2.0 * 0.5} and plan.scalars == {}
    assert (plan.clip, plan.expected) == (0.0, 0.0)


def test_example_level_asks_for_what_dp_sgd_made_and_every_client_counts_once() -> None:
    spec = spec_for({"level": "example", "sampling_rate": 0.1}, strategy={"name": "fedexp"})
    plan = plan_for(spec)
    assert plan.scalars.keys() == {"square"} and plan.metrics == ()
    assert bounds(plan) == {"delta": spec.limits.update} and plan.vectors["delta"].factor is None


@pytest.mark.parametrize(
    "privacy",
    [
        {"level": "example", "sampling_rate": 0.1},
        {"level": "client", "population": 100},
        {"level": "tree", "separation": 2},
        {"level": "local"},
        {"level": "distributed"},
    ],
)
def test_running_statistics_are_refused_at_every_level(privacy: dict[str, Any]) -> None:
    layout = Layout((*LAYOUT.entries, Entry("bn.running_mean", (3,), "float32", "buffer")))
    with pytest.raises(
        SpecError, match=r"'bn.running_mean' is a statistic .* replace BatchNorm by GroupNorm, or"
    ):
        plan_for(spec_for(privacy), layout=layout)


def evaluation(privacy: dict[str, Any], where: str = "clients") -> Plan:
    spec = spec_for({"metric_noise": 3.0, **privacy}, evaluation={"where": where}, limits={"weight": 50.0})
    return evaluate_plan(spec, Ref("r", 1, 0, "evaluate"), ("a", "b"), ("loss", "right", "near"))


@pytest.mark.parametrize(
    ("privacy", "examples", "slack"),
    [
        ({"level": "client", "population": 100}, 1.0, 0.0),
        ({"level": "tree", "separation": 2}, 1.0, 0.0),
        ({"level": "local"}, 1.0, 12 * (3 * 3**0.5)),
        ({"level": "distributed"}, 1.0, 12 * (3 * 3**0.5)),
        ({"level": "example", "sampling_rate": 0.1}, 50.0, 12 * (3 * 3**0.5)),
    ],
)
def test_an_evaluation_asks_for_sums_and_the_count_without_the_loss(
    privacy: dict[str, Any], examples: float, slack: float
) -> None:
    plan = evaluation(privacy)
    assert plan.metrics == ("right", "near", "count")
    assert plan.scalars == dict.fromkeys(plan.metrics, ScalarSpec(-slack, examples + slack))
    assert (plan.timed, plan.minimum) == ((True, 0) if privacy["level"] == "client" else (False, 1))


def test_an_evaluation_on_central_data_is_as_it_always_was() -> None:
    """They are no client's."""
    plan = evaluation({"level": "client", "population": 100}, where="holdout")
    assert plan.metrics == ("loss", "right", "near", "count") and not plan.timed


def test_a_timed_round_waits_for_its_deadline_even_where_all_have_answered() -> None:
    round = Round(plan_for(spec_for({"level": "client", "population": 100}), clients=1))
    assert receive(round, "0", Update({"delta": np.zeros(3, np.float32)}, {})).status == "folded"
    assert not round.done and round.sufficient
    assert not Round(plan_for(spec_for({"level": "client", "population": 100}), clients=0)).done


@pytest.mark.parametrize("value", [0.6, -0.6, np.nan, np.inf, -np.inf])
def test_the_server_refuses_an_update_beyond_the_clip_norm(value: float) -> None:
    """(.3, .4) has norm .5 and passes; with anything more beside it, jointly, it does not."""
    plan = plan_for(spec_for({"level": "client", "population": 100}, strategy={"name": "scaffold"}))
    good = {
        "delta": np.array([0.3, 0.4, 0], np.float32) * np.float32(1 - 2e-7),
        "control_delta": np.zeros(3, np.float32),
    }
    check(plan, Update(good, {}))
    bad = {**good, "control_delta": np.array([0, 0, value], np.float32)}
    with pytest.raises(UpdateRefused, match=r"the update's norm is .*, expected at most 0.5, the clip norm"):
        check(plan, Update(bad, {}))
    both = Rows({name: np.stack([good[name], bad[name]]) for name in good}, {})
    assert not all_pass(plan, both)
    assert all_pass(plan, Rows({name: matrix[:1] for name, matrix in both.vectors.items()}, {}))
    jointly = {"delta": good["delta"], "control_delta": good["delta"]}
    with pytest.raises(UpdateRefused, match=r"norm is 0.707"):
        check(plan, Update(jointly, {}))
    assert not all_pass(replace(plan, clip=0.4), Rows({n: v[None] for n, v in good.items()}, {}))
