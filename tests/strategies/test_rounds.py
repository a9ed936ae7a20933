"""The round as a state machine, and FedAvg by hand."""

from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fedcore.errors import UpdateRefused
from fedcore.layout import Entry, Layout, Parameters
from fedcore.messages import Plan, Ref, Update
from fedcore.metrics import names
from fedcore.spec import RunSpec
from fedcore.strategies import SGD, Strategy, from_table
from fedcore.strategies.aggregators import Krum, Median
from fedcore.strategies.optimizers import Adam
from fedcore.strategies.preaggregators import NearestNeighborMixing
from fedcore.strategies.rounds import (
    Round,
    State,
    advance,
    cohort,
    evaluate_plan,
    initial_state,
    metrics,
    receive,
    train_plan,
)
from fedcore.strategies.samplers import PowerOfChoice

f32 = partial(np.array, dtype=np.float32)

LAYOUT = Layout((Entry("weight", (2,), "float32", "shared"), Entry("mean", (1,), "float32", "buffer")))
REF = Ref("r", 1, 0, "train")
CLIENTS = ("a", "b", "c")


def plan_for(clients: tuple[str, ...] = CLIENTS, layout: Layout = LAYOUT, **cohort: Any) -> Plan:
    spec = RunSpec.parse({"cohort": {"size": len(clients), **cohort}})
    return train_plan(Strategy(), spec, layout, REF, clients, len(clients))


def update(delta: list[float], mean: float, weight: float, loss: float = 0.0) -> Update:
    vectors = {"delta": f32(delta), "buffers": f32([mean])}
    return Update(vectors, {"weight": weight, "loss": loss, "count": weight})


NOBODY = update([0, 0], 0, 0)
NAN = update([float("nan"), 0], 0, 1)
START = Parameters(f32([1.0, -1.0]), f32([5.0]))
# Weights 1, 2, 5: the mean delta is (1*8 + 2*0 + 5*-0.8) / 8 = 0.5 and (1*0 + 2*4 + 5*1.6) / 8 = 2; the mean
# buffer (1*3 + 2*-1 + 5*3) / 8 = 2; the mean loss (4 + 2 + 10) / 8 = 2.
UPDATES = {
    "a": update([8.0, 0.0], 3.0, 1.0, 4.0),
    "b": update([0.0, 4.0], -1.0, 2.0, 2.0),
    "c": update([-0.8, 1.6], 3.0, 5.0, 10.0),
}


def filled(updates: dict[str, Update], plan: Plan | None = None) -> Round:
    round = Round(plan or plan_for())
    for client, one in updates.items():
        assert receive(round, client, one).status == "folded"
    round.close()
    return round


def test_fedavg_of_three_clients_by_hand() -> None:
    state = initial_state(Strategy(), START)
    round = filled(UPDATES)
    after = advance(Strategy(), round, state, 0)
    assert after.round == 1
    assert after.parameters.shared.tolist() == pytest.approx([1.5, 1.0], abs=1e-7)
    assert after.parameters.buffers.tolist() == [2.0]
    assert metrics(round) == {"loss": 2.0}
    assert state.parameters.shared.tolist() == [1.0, -1.0], "the old state is left as it is"


def test_server_momentum_over_two_rounds_by_hand() -> None:
    """lr 0.5, momentum 0.5, direction (0.5, 2) twice: v1 = d, v2 = 1.5 d, x2 = x0 + 0.5 (d + 1.5 d)."""
    strategy = Strategy(optimizer=SGD(lr=0.5, momentum=0.5))
    first = advance(strategy, filled(UPDATES), initial_state(strategy, START), 0)
    kept = first.vectors["optimizer.velocity"].copy()
    second = advance(strategy, filled(UPDATES), first, 0)
    assert first.parameters.shared.tolist() == pytest.approx([1.25, 0.0], abs=1e-7)
    assert second.parameters.shared.tolist() == pytest.approx([1.625, 1.5], abs=1e-6)
    assert second.vectors["optimizer.velocity"].tolist() == pytest.approx([0.75, 3.0], abs=1e-6)
    assert np.array_equal(first.vectors["optimizer.velocity"], kept), "the old state is left as it is"
    assert second.parameters.buffers.tolist() == [2.0], "buffers are averaged, never optimised"


@given(order=st.permutations(list(CLIENTS)))
def test_the_order_of_arrival_does_not_matter(order: list[str]) -> None:
    state = initial_state(Strategy(), START)
    expected = advance(Strategy(), filled(UPDATES), state, 0).parameters.digest
    assert advance(Strategy(), filled({c: UPDATES[c] for c in order}), state, 0).parameters.digest == expected


@given(order=st.permutations(list("abcdefg")), lost=st.sets(st.sampled_from("abcdefg"), max_size=2))
def test_a_robust_rule_gives_the_same_bits_in_any_order_of_arrival(order: list[str], lost: set[str]) -> None:
    """Two of seven never answer: their rows are gaps, over which the others move up."""
    strategy = Strategy(pre=(NearestNeighborMixing(f=1),), aggregator=Krum(f=1), optimizer=Adam())
    clients, rng = tuple("abcdefg"), np.random.default_rng(0)
    spec, layout = RunSpec.parse({"cohort": {"size": 7, "minimum": 5}}), Layout(LAYOUT.entries[:1])
    sent = {
        c: Update({"delta": f32(rng.normal(size=2))}, {"weight": 1.0, "loss": 0.0, "count": 1.0})
        for c in clients
    }

    def played(order: list[str]) -> State:
        round = Round(train_plan(strategy, spec, layout, REF, clients, 7))
        for client in order:
            if client not in lost:
                receive(round, client, sent[client])
        round.close()
        start = Parameters(f32([1.0, -1.0]), f32([]))
        return advance(strategy, round, initial_state(strategy, start), 0)

    once, again = played(order), played(sorted(order))
    assert once.parameters.digest == again.parameters.digest
    assert {n: v.tobytes() for n, v in once.vectors.items()} == {
        n: v.tobytes() for n, v in again.vectors.items()
    }


def test_a_robust_rule_sees_rows_and_the_buffers_are_still_averaged() -> None:
    strategy = Strategy(aggregator=Median())
    spec = RunSpec.parse({"cohort": {"size": 3}})
    plan = train_plan(strategy, spec, LAYOUT, REF, CLIENTS, 3)
    assert plan.rows == {"delta"} and plan.sees
    assert [term.name for term in plan.terms] == ["buffers", "weight", "loss", "count"]
    after = advance(strategy, filled(UPDATES, plan), initial_state(strategy, START), 0)
    assert after.parameters.shared.tolist() == pytest.approx([1.0, 0.6], abs=1e-6)  # median (0, 1.6)
    assert after.parameters.buffers.tolist() == [2.0]


def test_a_sampler_that_asks_for_it_has_a_memory() -> None:
    strategy = Strategy(sampler=PowerOfChoice(candidates=3))
    plan = train_plan(strategy, RunSpec.parse({"cohort": {"size": 3}}), LAYOUT, REF, CLIENTS, 3)
    round = filled({"a": UPDATES["a"], "c": UPDATES["c"]}, plan)
    after = advance(strategy, round, initial_state(strategy, START), 0)
    assert after.memory == {
        "a": {"round": 1.0, "rounds": 1.0, "weight": 1.0, "loss": 4.0, "seconds": 0.0},
        "b": {"round": 1.0, "rounds": 1.0},
        "c": {"round": 1.0, "rounds": 1.0, "weight": 5.0, "loss": 2.0, "seconds": 0.0},
    }
    assert advance(Strategy(), filled(UPDATES), initial_state(Strategy(), START), 0).memory == {}


def test_a_round_in_which_nobody_has_examples_moves_nothing() -> None:
    round = filled(dict.fromkeys(CLIENTS, NOBODY))
    after = advance(Strategy(), round, initial_state(Strategy(), START), 0)
    assert after.parameters.digest == START.digest and after.round == 1
    assert metrics(round) == {}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_mean_of_equal_deltas_is_the_delta(dtype: str) -> None:
    layout = Layout((Entry("weight", (3,), dtype, "shared"),))
    delta = np.array([0.1, -1 / 3, 1e-5], layout.dtype)
    one = Update({"delta": delta}, {"weight": 3.0, "loss": 0.0, "count": 3.0})
    round = filled(dict.fromkeys(CLIENTS, one), plan_for(layout=layout))
    zero = Parameters(np.zeros(3, layout.dtype), np.zeros(0, layout.dtype))
    after = advance(Strategy(), round, State(0, zero), 0).parameters.shared
    assert after.dtype == layout.dtype and after.tolist() == pytest.approx(delta.tolist(), abs=1e-9)


def test_a_plan_without_buffers_has_no_term_for_them() -> None:
    plan = plan_for(layout=Layout(LAYOUT.entries[:1]))
    assert [term.name for term in plan.terms] == ["delta", "weight", "loss", "count"]
    assert [term.name for term in plan_for().terms] == ["delta", "buffers", "weight", "loss", "count"]
    assert set(plan_for().vectors) == {"delta", "buffers"}


@pytest.mark.parametrize(
    ("size", "minimum", "clients", "goal", "fewest"),
    [(3, 0, 3, 3, 2), (2, 0, 3, 2, 2), (3, 1, 3, 3, 1), (10, 0, 3, 3, 3), (10, 0, 8, 8, 7)],
)
def test_goal_and_minimum(size: int, minimum: int, clients: int, goal: int, fewest: int) -> None:
    plan = plan_for(tuple("abcdefghij"[:clients]), size=size, minimum=minimum)
    assert (plan.goal, plan.minimum) == (goal, fewest)


def test_a_round_is_done_at_its_goal_and_sufficient_at_its_minimum() -> None:
    round = Round(plan_for(size=2, minimum=1))
    assert not round.done and not round.sufficient
    receive(round, "b", NOBODY)
    assert not round.done and round.sufficient
    receive(round, "a", NOBODY)
    assert round.done and round.folded == ["b", "a"]
    round.close()
    assert round.verdicts["c"].status == "late"


def test_a_round_is_done_when_everybody_has_been_heard_of() -> None:
    round = Round(plan_for())
    receive(round, "a", NAN)
    round.lose("b", "the connection was lost")
    assert not round.done
    round.lose("c", "declined")
    assert round.done and not round.sufficient
    assert {c: (v.status, v.reason) for c, v in round.verdicts.items() if c != "a"} == {
        "b": ("refused", "the connection was lost"),
        "c": ("refused", "declined"),
    }


@pytest.mark.parametrize(
    ("client", "reason"),
    [("z", "z is not in the cohort of r/1.0/train"), ("a", "a has answered r/1.0/train already")],
)
def test_who_is_not_awaited_is_not_admitted(client: str, reason: str) -> None:
    round = Round(plan_for())
    receive(round, "a", UPDATES["a"])
    before = round.sums.words.wide.copy()
    with pytest.raises(UpdateRefused, match=reason):
        round.admit(client)
    assert receive(round, client, UPDATES["b"]).reason == reason
    assert np.array_equal(round.sums.words.wide, before) and round.folded == ["a"]
    assert round.verdicts["a"].status == "folded", "a second answer does not change the first's verdict"


def planned(name: str, **tables: Any) -> Plan:
    spec = RunSpec.parse({"strategy": {"name": name}, "run": {"seed": 9}, **tables})
    return train_plan(from_table(spec.strategy), spec, LAYOUT, REF, CLIENTS, 3)


def test_a_norm_is_on_the_scale_of_each_vector() -> None:
    plan = planned("scaffold", limits={"update": 4.0, "norm": 2.0}, client={"optimizer": {"lr": 0.5}})
    assert {name: vector.norm for name, vector in plan.vectors.items()} == {
        "delta": 2.0,
        "control_delta": 8.0,  # of the difference of two means of gradients, each up to norm / lr
        "buffers": 0.0,
    }
    assert not any(vector.norm for vector in planned("fedavg").vectors.values())


@pytest.mark.parametrize(("encoding", "bits"), [("auto", 64), ("exact", 64), ("q32", 32), ("q16", 16)])
def test_a_plan_has_the_words_of_the_encoding(encoding: str, bits: int) -> None:
    plan = planned("scaffold", limits={"norm": 2.0}, encryption={"encoding": encoding})
    assert (plan.bits, plan.seed) == (bits, 9)
    assert (plan.narrow, plan.wide) == ((0, 8) if bits == 64 else (4, 4))
    assert plan.payload == plan.narrow * min(bits, 32) // 8 + plan.wide * 8


def test_a_refused_update_leaves_no_trace_in_the_sums() -> None:
    round = Round(plan_for())
    verdict = receive(round, "a", NAN)
    assert verdict.status == "refused" and "delta has a coordinate that is not finite" in verdict.reason
    assert not round.sums.words.wide.any() and metrics(round) == {}


def test_a_closed_round_takes_nothing_and_closes_once() -> None:
    round = filled({"a": UPDATES["a"]})
    assert receive(round, "b", UPDATES["b"]).reason == "r/1.0/train has closed"
    round.lose("b", "gone")
    round.close()
    assert {c: v.status for c, v in round.verdicts.items()} == {"a": "folded", "b": "late", "c": "late"}


class AnyRound(RuleBasedStateMachine):
    """Whatever happens in whatever order: one verdict a client, and the sums are of the folded ones."""

    @initialize(size=st.integers(1, 6))
    def open(self, size: int) -> None:
        self.round = Round(plan_for(tuple("abcdef"[:size])))
        self.first: dict[str, str] = {}

    def settled(self, client: str, status: str) -> None:
        if client in self.round.plan.cohort and not self.round.closed:
            self.first.setdefault(client, status)

    @rule(client=st.sampled_from("abcdefg"), weight=st.sampled_from([1.0, 2.0, float("nan")]))
    def answer(self, client: str, weight: float) -> None:
        self.settled(client, "folded" if weight == weight else "refused")
        receive(self.round, client, update([1.0, 0.0], 0.0, weight))

    @rule(client=st.sampled_from("abcdefg"))
    def lose(self, client: str) -> None:
        self.settled(client, "refused")
        self.round.lose(client, "gone")

    @precondition(lambda self: len(self.first) > 2)
    @rule()
    def close(self) -> None:
        self.round.close()
        for client in self.round.plan.cohort:
            self.first.setdefault(client, "late")

    @invariant()
    def first_words_count(self) -> None:
        if not hasattr(self, "round"):
            return
        round = self.round
        assert {c: v.status for c, v in round.verdicts.items()} == self.first
        assert sorted(round.folded) == sorted(c for c, status in self.first.items() if status == "folded")
        assert round.waiting == set(round.plan.cohort) - set(self.first)
        assert round.sums.vector("delta", slice(0, 1))[0] == round.sums.scalar("weight")
        assert len(round.folded) <= round.sums.scalar("weight") <= 2 * len(round.folded)


TestAnyRound = AnyRound.TestCase


def test_an_evaluation_sums_metrics_over_examples() -> None:
    plan = evaluate_plan(RunSpec(), Ref("r", 1, 0, "evaluate"), ("a", "b"), names(["accuracy"]))
    round = Round(plan)
    receive(round, "a", Update({}, {"loss": 6.0, "accuracy": 1.0, "count": 2.0}))
    receive(round, "b", Update({}, {"loss": 2.0, "accuracy": 5.0, "count": 6.0}))
    assert metrics(round) == {"loss": 1.0, "accuracy": 0.75}
    assert (plan.goal, plan.minimum, plan.vectors) == (2, 1, {})


def test_cohorts_follow_from_seed_kind_round_and_attempt() -> None:
    population = [f"client-{i:06d}" for i in range(500)]

    def drawn(
        seed: int = 0, run: str = "r", round: int = 1, attempt: int = 0, kind: Any = "train"
    ) -> tuple[str, ...]:
        spec = RunSpec.parse({"run": {"seed": seed}, "cohort": {"size": 20, "over_select": 1.5}})
        return cohort(Strategy(), spec, Ref(run, round, attempt, kind), population, spec.cohort.asked, {})

    assert len(drawn()) == 30 and drawn() == drawn(run="another name")
    others = [drawn(seed=1), drawn(round=2), drawn(attempt=1), drawn(kind="evaluate")]
    assert len({drawn(), *others}) == 5
