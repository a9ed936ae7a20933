"""Private rounds whole, by hand and by laws: what one client moves, and what is told of who came."""

import json
from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedcore.errors import UpdateRefused
from fedcore.layout import Entry, Layout, Parameters
from fedcore.messages import Ref
from fedcore.seeds import generator
from fedcore.spec import RunSpec
from fedcore.strategies import Strategy, from_table
from fedcore.strategies.checkpoint import save_state
from fedcore.strategies.privacy import noise, private, released
from fedcore.strategies.rounds import (
    Round,
    State,
    advance,
    cohort,
    evaluate_plan,
    initial_state,
    metrics,
    receive,
    receive_rows,
    tally,
    train_plan,
)
from fedcore.strategies.terms import Rows
from fedcore.strategies.words import Accumulator, check_sum

LAYOUT = Layout((Entry("weight", (2,), "float64", "shared"),))
CLIENT: dict[str, Any] = {"level": "client", "noise_multiplier": 1.0, "population": 10}
Floats = NDArray[np.float64]


class Silence:
    """A generator of no noise at all."""

    def standard_normal(self, size: int) -> Floats:
        return np.zeros(size)

    def normal(self, mean: float, deviation: float) -> float:
        return 0.0


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the coordinator's noise, so that the rest can be compared with a computation by hand."""
    monkeypatch.setattr(noise, "generator", lambda *path: Silence())


def private_run(
    table: str | dict[str, Any], privacy: dict[str, Any] = CLIENT, size: int = 4
) -> tuple[Strategy, RunSpec]:
    client = {"optimizer": {"name": "sgd", "lr": 0.5}}
    spec = RunSpec.parse({"cohort": {"size": size}, "strategy": table, "privacy": privacy, "client": client})
    return private(from_table(spec.strategy), spec), spec


def answered(
    strategy: Strategy, spec: RunSpec, number: int, vectors: dict[str, list[Sequence[float]]]
) -> Round:
    """Return a closed round in which clients sent what they may of their updates, a row each."""
    rows = {name: np.array(sent, np.float64).reshape(-1, 2) for name, sent in vectors.items()}
    clients = tuple(str(i) for i in range(len(rows["delta"])))
    plan = train_plan(strategy, spec, LAYOUT, Ref("r", number, 0, "train"), clients, 99)
    round = Round(plan)
    if clients:
        told = dict.fromkeys(("weight", "loss", "count"), np.full(len(clients), 7.0))
        rngs = [generator("test", client) for client in clients]
        sent = released(strategy, "train", Rows(rows, told), plan.clip, rngs, plan.distributed)
        receive_rows(round, clients, sent)
        assert {v.status for v in round.verdicts.values()} == {"folded"}
    round.close()
    return round


def start(strategy: Strategy) -> State:
    return initial_state(strategy, Parameters(np.array([1.0, -1.0]), np.zeros(0)))


def moved(strategy: Strategy, *rounds: Round) -> State:
    state = start(strategy)
    for round in rounds:
        state = advance(strategy, round, state, 0)
    return state


@pytest.mark.parametrize("encoding", ["q32", "q16"])
def test_a_sum_of_words_is_that_of_clipped_updates_and_everybodys_noise(encoding: str) -> None:
    """(3, 4) and (0, 0) as one become (.6, .8, 0, 0), from nine of ten; the mean has its own deviation."""
    privacy = {"level": "distributed", "noise_multiplier": 0.1}
    strategy, spec = private_run({"name": "scaffold"}, privacy, size=10)
    spec = spec.with_(f"encryption.encoding={encoding}")
    round = answered(strategy, spec, 1, {"delta": [(3, 4)] * 9, "control_delta": [(0, 0)] * 9})
    made, sums = round.plan.distributed, round.sums
    assert made and len(round.folded) == 9
    means = [sums.vector(name, slice(0, 2)) / 9 for name in ("delta", "control_delta")]
    deviation = sqrt((made.variance + 1 / 4) / 9) / made.scale
    assert deviation < 0.02
    assert np.concatenate(means) == pytest.approx([0.6, 0.8, 0, 0], abs=5 * deviation)
    assert moved(strategy, round).parameters.shared == pytest.approx([1.6, -0.2], abs=5 * deviation)
    check_sum(round.plan, sums, 9)
    with pytest.raises(UpdateRefused, match="the norm of the sum of 1 clients is"):
        check_sum(round.plan, sums, 1)
    merged = Accumulator(round.plan)
    merged.add_words(sums.words)
    assert np.array_equal(merged.vector("delta", slice(0, 2)), sums.vector("delta", slice(0, 2)))


@pytest.mark.usefixtures("silent")
def test_a_sum_of_clipped_updates_over_the_expected_size() -> None:
    """(3, 4) becomes (.6, .8), (0, .5) stays: the sum (.6, 1.3) is divided by 4, although two came."""
    strategy, spec = private_run("fedavg")
    x = moved(strategy, answered(strategy, spec, 1, {"delta": [(3, 4), (0, 0.5)]})).parameters.shared
    assert x == pytest.approx([1.15, -1 + 0.325], rel=2e-6)


@pytest.mark.usefixtures("silent")
def test_scaffold_counts_the_population_and_the_expected_size() -> None:
    """Jointly (.6, 0 | 0, .8): x moves by the sum / 4 and c by the sum / N = 10, whoever came."""
    strategy, spec = private_run("scaffold")
    sent: dict[str, list[Sequence[float]]] = {"delta": [(3, 0), (0, 0)], "control_delta": [(0, 4), (0, 0.4)]}
    parameters = moved(strategy, answered(strategy, spec, 1, sent)).parameters
    assert parameters.shared == pytest.approx([1.15, -1.0], rel=2e-6)
    assert parameters.extra["control"] == pytest.approx([0.0, 0.12], rel=2e-6)


@pytest.mark.usefixtures("silent")
def test_feddyn_counts_the_population_and_the_expected_size() -> None:
    """h = -alpha / N sum = -.01 (.6, .8); x moves by the sum / 4 - h / alpha = (.15, .2) + (.06, .08)."""
    strategy, spec = private_run({"name": "feddyn", "alpha": 0.1})
    state = moved(strategy, answered(strategy, spec, 1, {"delta": [(3, 4)]}))
    assert state.vectors["algorithm.correction"] == pytest.approx([-0.006, -0.008], rel=2e-6)
    assert state.parameters.shared == pytest.approx([1.21, -0.72], rel=2e-6)


@pytest.mark.parametrize(
    "table", ["fedavg", "fedadam", "fedyogi", "fedadagrad", "fedavgm", "scaffold", "feddyn"]
)
def test_every_server_step_is_made_of_the_noised_sum_alone(table: str) -> None:
    """Two rounds whose sums are the same leave the same state, whoever sent what, one or three of them."""
    strategy, spec = private_run(table)
    sent: list[dict[str, list[Sequence[float]]]] = [
        {"delta": [(0.5, 0.25)], "control_delta": [(0.1, 0.2)]},
        {"delta": [(0.5, 0), (0, 0.25), (0, 0)], "control_delta": [(0.1, 0), (0, 0.2), (0, 0)]},
    ]
    names = strategy.algorithm.vectors(LAYOUT, spec)
    one, more = (answered(strategy, spec, 1, {name: vectors[name] for name in names}) for vectors in sent)
    first, second = moved(strategy, one), moved(strategy, more)
    for a, b in zip(_numbers(first), _numbers(second), strict=True):
        assert a == pytest.approx(b, rel=1e-9)


def _numbers(state: State) -> list[Floats]:
    arrays = [state.parameters.shared, *state.parameters.extra.values(), *state.vectors.values()]
    return [array.astype(np.float64) for array in arrays]


@given(
    st.lists(st.tuples(*[st.floats(-1e30, 1e30)] * 2), min_size=1, max_size=6),
    st.integers(0, 5),
    st.randoms(),
)
def test_a_client_more_moves_the_sum_by_at_most_the_clip_norm(
    updates: list[tuple[float, float]], removed: int, shuffled: Any
) -> None:
    strategy, spec = private_run("fedavg", {**CLIENT, "clip_norm": 0.25})
    whole = answered(strategy, spec, 1, {"delta": list(updates)}).sums.vector("delta", slice(0, 2))
    fewer = [update for i, update in enumerate(updates) if i != removed % len(updates)]
    less = answered(strategy, spec, 1, {"delta": list(fewer)}).sums.vector("delta", slice(0, 2))
    assert np.linalg.norm(whole - less) <= 0.25
    shuffled.shuffle(updates)
    again = answered(strategy, spec, 1, {"delta": list(updates)}).sums.vector("delta", slice(0, 2))
    assert np.array_equal(again, whole), "and their order does not matter"


def test_an_update_beyond_the_clip_norm_is_refused_and_moves_nothing() -> None:
    """Forged rows among honest ones: refused one by one, and the model is that of the honest alone."""
    strategy, spec = private_run("fedavg")
    honest = moved(strategy, answered(strategy, spec, 1, {"delta": [(0.3, 0.4)]}))
    plan = train_plan(strategy, spec, LAYOUT, Ref("r", 1, 0, "train"), ("0", "1", "2", "3"), 99)
    round = Round(plan)
    forged = np.array([[0.3, 0.4], [0.8, 0.8], [np.nan, 0.0], [1e200, 1e200]])
    receive_rows(round, plan.cohort, Rows({"delta": forged}, {}))
    round.close()
    assert [round.verdicts[c].status for c in plan.cohort] == ["folded", "refused", "refused", "refused"]
    assert "norm is 1.13137, expected at most 1, the clip norm" in round.verdicts["1"].reason
    assert np.array_equal(moved(strategy, round).parameters.shared, honest.parameters.shared)


@pytest.mark.parametrize("privacy", [CLIENT, {**CLIENT, "adaptive": True, "noise_multiplier": 0.1}])
def test_a_round_that_nobody_came_to_releases_noise_all_the_same(privacy: dict[str, Any]) -> None:
    strategy, spec = private_run("fedadam", privacy)
    round = answered(strategy, spec, 1, {"delta": []})
    assert round.sufficient
    x = moved(strategy, round).parameters.shared
    assert not np.any(x == [1.0, -1.0]) and np.isfinite(x).all()


def test_nothing_tells_how_many_came(tmp_path: Path) -> None:
    """Rows and checkpoints of a round have the same keys, lengths and public numbers with 0 and 7 clients."""
    strategy, spec = private_run("scaffold", {**CLIENT, "adaptive": True, "noise_multiplier": 0.1})
    told = []
    for came in (0, 7):
        sent: dict[str, list[Sequence[float]]] = {
            name: [(0, 0)] * came for name in ("delta", "control_delta")
        }
        round = answered(strategy, spec, 1, sent)
        state = moved(strategy, round)
        save_state(tmp_path / f"{came}", state)
        assert state.memory == {}
        told.append((tally(round), json.dumps(sorted(state.vectors)), (tmp_path / f"{came}").stat().st_size))
    assert told[0] == told[1] and told[0][0] == {"expected": 4.0}


def test_a_private_cohort_is_drawn_at_the_public_rate_and_anew_for_every_entropy() -> None:
    """q = size / population = .4 of whoever is there, be it 2,000: within 5 standard errors."""
    strategy, spec = private_run("fedavg")
    there = [str(i) for i in range(2000)]
    draws = {
        (kind, entropy): cohort(strategy, spec, Ref("r", 1, 0, kind), there, 4, {}, entropy)
        for kind in ("train", "evaluate")
        for entropy in (None, 1, 2)
    }
    assert len(set(draws.values())) == 6
    for drawn in draws.values():
        assert len(drawn) / 2000 == pytest.approx(0.4, abs=5 * (0.24 / 2000) ** 0.5)


def evaluated(came: int, **privacy: Any) -> Round:
    table = {**CLIENT, "metric_noise": 2.0, **privacy}
    spec = RunSpec.parse({"cohort": {"size": 4}, "privacy": table})
    clients = tuple(str(i) for i in range(came))
    plan = evaluate_plan(spec, Ref("r", 1, 0, "evaluate"), clients, ("loss", "right"))
    round = Round(plan)
    strategy = private(Strategy(), spec)
    for i, client in enumerate(clients):
        counts = {"loss": np.array([9.0]), "right": np.array([5.0 * (i % 2)]), "count": np.array([5.0])}
        (update,) = released(strategy, "evaluate", Rows({}, counts), 0.0, [generator("test")]).updates()
        assert receive(round, client, update).status == "folded"
    round.close()
    return round


@pytest.mark.usefixtures("silent")
def test_metrics_of_clients_that_count_once_by_hand() -> None:
    """Half of six clients are right on everything; nobody's number of examples enters."""
    privacy = private_run("fedavg", {**CLIENT, "metric_noise": 2.0})[0].privacy
    assert metrics(evaluated(6), privacy) == {"right": 0.5}


def test_metrics_have_noise_anew_for_every_seed_and_entropy() -> None:
    privacy = private_run("fedavg", {**CLIENT, "metric_noise": 0.01})[0].privacy
    round = evaluated(6, metric_noise=0.01)
    told = [
        metrics(round, privacy, entropy, seed)["right"]
        for entropy, seed in ((None, 0), (None, 1), (1, 0), (2, 0))
    ]
    assert len(set(told)) == 4 and told == pytest.approx([0.5] * 4, abs=0.05)
    assert metrics(round, privacy, 1, 0) == metrics(round, privacy, 1, 5), "an entropy decides alone"


def test_local_noise_may_be_followed_by_a_robust_rule() -> None:
    """The median of three rows that differ by little but their noise is within it of the truth."""
    strategy, spec = private_run("median", {"level": "local", "noise_multiplier": 0.001}, size=3)
    round = answered(strategy, spec, 1, {"delta": [(0.3, 0.4), (0.3, 0.4), (-300, 400)]})
    assert moved(strategy, round).parameters.shared == pytest.approx([1.3, -0.6], abs=0.01)
    assert tally(round) == {"folded": 3, "refused": 0}
