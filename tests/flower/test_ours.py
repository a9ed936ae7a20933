"""Our strategies behind Flower's interface: the same rounds as our own, or a refusal that says why."""

import logging
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedcore.errors import SpecError
from fedcore.flower import as_flower
from fedcore.flower.flat import layout_of, parameters_of
from fedcore.flower.ours import FedcoreStrategy, Keys
from fedcore.messages import Ref
from fedcore.privacy.claims import spent
from fedcore.seeds import generator
from fedcore.spec import RunSpec
from fedcore.strategies import FedExP, FedProx, Krum, Median, Strategy, Uniform
from fedcore.strategies.aggregators import AGGREGATORS
from fedcore.strategies.algorithms import ALGORITHMS
from fedcore.strategies.catalog import from_table
from fedcore.strategies.modes import MODES
from fedcore.strategies.optimizers import OPTIMIZERS
from fedcore.strategies.preaggregators import PREAGGREGATORS
from fedcore.strategies.privacy import clip_norm, private, released
from fedcore.strategies.rounds import Round, advance, cohort, initial_state, receive, train_plan
from fedcore.strategies.samplers import SAMPLERS
from fedcore.strategies.terms import Rows

NODES, ROUNDS = 9, 3
Vector = NDArray[np.floating[Any]]
Change = Callable[[RecordDict], RecordDict | Error]


@pytest.fixture(autouse=True)
def identity() -> None:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 7, 1, 1


def trained(x: Vector, node: int, number: int) -> tuple[Vector, float, float]:
    """Return a client's model, its examples and its loss: a step towards a point of its own."""
    rng = generator("node", node, number)
    target = np.linspace(-1, 1, len(x)) * (1 + node / NODES)
    y = x + 0.3 * (target - x) + 0.01 * rng.normal(size=len(x))
    return y.astype(x.dtype), float(5 + 7 * node), float(np.square(target - x).mean())


def model(dtype: Any = np.float32) -> ArrayRecord:
    values = {"weight": np.linspace(-2, 2, 12).reshape(4, 3), "bias": np.zeros(5), "scale": np.ones(())}
    return ArrayRecord({name: Array(value.astype(dtype)) for name, value in values.items()})


class Nodes:
    """A grid of some nodes, which answer at once; `changes` says what becomes of a node's reply."""

    def __init__(self, count: int = NODES, changes: dict[int, Change] | None = None) -> None:
        self.count, self.changes = count, changes or {}
        self.sent: list[Message] = []

    def get_node_ids(self) -> Iterable[int]:
        return range(100, 100 + self.count)

    def answer(self, message: Message) -> Message:
        arrays, config = message.content["arrays"], message.content["config"]
        assert isinstance(arrays, ArrayRecord) and isinstance(config, ConfigRecord)
        node, number = message.metadata.dst_node_id - 100, cast(int, config["server-round"])
        flat = np.concatenate([a.numpy().reshape(-1) for a in arrays.values()])
        y, examples, loss = trained(flat, node, number)
        ends = np.cumsum([np.prod(a.shape, dtype=int) for a in arrays.values()])[:-1]
        parts = zip(arrays.items(), np.split(y, ends), strict=True)
        made = {name: Array(part.reshape(array.shape)) for (name, array), part in parts}
        metrics = MetricRecord({"num-examples": int(examples), "train_loss": loss})
        reply = RecordDict({"arrays": ArrayRecord(made), "metrics": metrics})
        changed = self.changes[node](reply) if node in self.changes else reply
        return Message(changed, reply_to=message)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        self.sent = list(messages)
        return [self.answer(message) for message in self.sent]

    @property
    def grid(self) -> Grid:
        return cast(Grid, self)

    @property
    def asked(self) -> list[int]:
        return [message.metadata.dst_node_id for message in self.sent]


def spec_for(**tables: dict[str, Any]) -> RunSpec:
    given: dict[str, dict[str, Any]] = {
        "run": {"seed": 3, "rounds": ROUNDS},
        "cohort": {"size": 6},
        "evaluation": {"where": "holdout"},
    }
    return RunSpec.parse({key: {**given.get(key, {}), **tables.get(key, {})} for key in {**given, **tables}})


def flat(arrays: ArrayRecord | None) -> Vector:
    assert arrays is not None
    return np.concatenate([array.numpy().reshape(-1) for array in arrays.values()])


def one_round(
    strategy: FedcoreStrategy, nodes: Nodes, number: int = 1, arrays: ArrayRecord | None = None
) -> Any:
    messages = strategy.configure_train(number, arrays or model(), ConfigRecord(), nodes.grid)
    return strategy.aggregate_train(number, nodes.send_and_receive(messages))


def simulated(table: dict[str, Any], spec: RunSpec, entropy: Sequence[int] = ()) -> Vector:
    """Return the model after rounds driven as the simulation drives them."""
    strategy, layout = private(from_table(table), spec), layout_of(model())
    names = [str(100 + i) for i in range(NODES)]
    state = initial_state(strategy, parameters_of(model(), layout))
    draws = iter(entropy)
    for number in range(1, ROUNDS + 1):
        ref, clip = Ref(spec.run.name, number, 0, "train"), clip_norm(strategy.privacy, state.vectors)
        clients = cohort(strategy, spec, ref, names, spec.cohort.size, state.memory, next(draws, None))
        round = Round(train_plan(strategy, spec, layout, ref, clients, NODES, clip))
        for client in clients:
            x = state.parameters.shared
            y, examples, loss = trained(x, int(client) - 100, number)
            delta = y - x
            every = {"weight": examples, "loss": loss * examples, "count": examples}
            every["square"] = float(delta.astype(np.float64) @ delta.astype(np.float64))
            scalars = {name: np.array([every[name]]) for name in round.plan.scalars if name in every}
            rows = Rows({"delta": delta[None]}, scalars)
            (update,) = released(strategy, "train", rows, clip, ()).updates()
            assert receive(round, client, update).status == "folded"
        round.close()
        state = advance(strategy, round, state, spec.run.seed, entropy=next(draws, None))
    return state.parameters.shared


CATALOGUE: dict[str, dict[str, Any]] = {
    **{f"algorithm.{name}": {"algorithm": name} for name in ALGORITHMS},
    **{f"aggregator.{name}": {"aggregator": name} for name in AGGREGATORS},
    **{f"optimizer.{name}": {"optimizer": name} for name in OPTIMIZERS},
    **{f"pre.{name}": {"pre": [name], "aggregator": "median"} for name in PREAGGREGATORS},
    **{f"sampler.{name}": {"sampler": name} for name in SAMPLERS},
    **{f"mode.{name}": {"mode": name} for name in MODES},
    "pre.clip": {"pre": [{"name": "clip", "norm": 0.5}], "aggregator": {"name": "trimmed_mean", "f": 1}},
    "sampler.power_of_choice": {"sampler": {"name": "power_of_choice", "candidates": 8}},
    "sampler.minimum_separation": {"sampler": {"name": "minimum_separation", "rounds": 2}},
    "composed": {"pre": ["nnm"], "aggregator": {"name": "trimmed_mean", "f": 1}, "optimizer": "adam"},
}
REFUSED = {
    **{f"algorithm.{name}": "the ClientApp alone decides" for name in ALGORITHMS},
    "aggregator.fltrust": "FLTrust compares updates with one that the server trains",
    "mode.buffered": "Buffered moves the model as updates arrive",
    "mode.asynchronous": "Asynchronous moves the model as updates arrive",
}
del REFUSED["algorithm.local_sgd"], REFUSED["algorithm.fedprox"]


@pytest.mark.parametrize("name", [name for name in CATALOGUE if name not in REFUSED])
def test_a_strategy_moves_the_model_as_in_our_own_rounds_to_the_bit(name: str) -> None:
    spec = spec_for(strategy=CATALOGUE[name])
    result = as_flower(spec=spec).start(Nodes().grid, model(), ROUNDS)
    assert flat(result.arrays).tobytes() == simulated(CATALOGUE[name], spec).tobytes()
    assert result.train_metrics_clientapp[1]["folded"] in range(1, 10)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_cross_is_refused_by_name(name: str) -> None:
    with pytest.raises(SpecError, match=f"^as_flower: .*{REFUSED[name]}"):
        as_flower(spec=spec_for(strategy=CATALOGUE[name]))


def test_what_our_own_runs_refuse_is_refused_here() -> None:
    with pytest.raises(SpecError, match=r"raise cohort\.minimum or cohort\.size"):
        as_flower(Strategy(aggregator=Krum(f=5)), spec_for())
    with pytest.raises(SpecError, match='set it to "holdout"'):
        level = {"level": "client", "population": NODES, "noise_multiplier": 1.0}
        as_flower(spec=spec_for(privacy=level, evaluation={"where": "clients"}))


def replaced(**arrays: Any) -> Change:
    """Return a change of some arrays of a reply; None takes one away."""

    def change(reply: RecordDict) -> RecordDict:
        record = cast(ArrayRecord, reply["arrays"])
        kept = {name: array for name, array in record.items() if name not in arrays}
        kept |= {name: v if isinstance(v, Array) else Array(v) for name, v in arrays.items() if v is not None}
        return RecordDict({**reply, "arrays": ArrayRecord(kept)})

    return change


def measured(**metrics: Any) -> Change:
    def change(reply: RecordDict) -> RecordDict:
        own = cast(MetricRecord, reply["metrics"])
        return RecordDict({**reply, "metrics": MetricRecord({**own, **metrics})})

    return change


def bare(reply: RecordDict) -> RecordDict:
    return RecordDict({"arrays": reply["arrays"]})


TORN = Array("float32", (), "numpy.ndarray", b"\x93NUMPY\x01\x00")
BAD: dict[str, tuple[Change, str]] = {
    "nan": (replaced(scale=np.array(np.nan, np.float32)), "not finite"),
    "infinite": (replaced(scale=np.array(np.inf, np.float32)), "not finite"),
    "too wide": (replaced(scale=np.array(1e300)), "not finite"),
    "far": (replaced(scale=np.array(1e6, np.float32)), "beyond 64"),
    "shape": (replaced(scale=np.zeros(2, np.float32)), r"'scale' is \(2,\) float32, expected \(\) float32"),
    "integers": (replaced(scale=np.zeros((), np.int64)), "'scale' is .* int64"),
    "missing": (replaced(scale=None), "sent the arrays"),
    "too many": (replaced(more=np.zeros(2, np.float32)), "sent the arrays"),
    "torn": (replaced(scale=TORN), "'scale' cannot be read"),
    "heavy": (measured(**{"num-examples": 10**12}), "num-examples is 1e.12, expected 0 to 1e.06"),
    "heavier": (measured(**{"num-examples": 10**400}), "num-examples is inf"),
    "negative": (measured(**{"num-examples": -1}), "num-examples is -1"),
    "no number": (measured(**{"num-examples": float("nan")}), "num-examples is nan"),
    "a list": (measured(**{"num-examples": [1]}), r"num-examples' is \[1\], expected a number"),
    "no metrics": (bare, "sent 0 MetricRecords"),
    "error": (lambda _: Error(3, "out of memory"), "error 3: out of memory"),
}


@pytest.mark.parametrize("strategy", [Strategy(), Strategy(aggregator=Median())], ids=["mean", "median"])
@pytest.mark.parametrize("case", BAD)
def test_a_bad_reply_is_left_out_with_a_line_in_the_log(
    case: str, strategy: Strategy, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is what the others alone make, whatever the ninth node sends."""
    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)
    change, reason = BAD[case]
    spec = spec_for(cohort={"size": NODES, "minimum": 2})
    arrays, told = one_round(as_flower(strategy, spec), Nodes(changes={8: change}))
    alone, _ = one_round(as_flower(strategy, spec), Nodes(NODES - 1))
    assert flat(arrays) == pytest.approx(flat(alone), abs=1e-7) and np.isfinite(flat(arrays)).all()
    assert (told["folded"], told["refused"]) == (8, 1)
    (line,) = [each.getMessage() for each in caplog.records if "left out" in each.getMessage()]
    assert line.startswith("round 1: node 108 is left out: ")
    assert re.search(reason, line)


def test_one_node_counts_once_and_a_stranger_not_at_all() -> None:
    nodes, strategy = Nodes(), as_flower(spec=spec_for(cohort={"size": 4}))
    messages = list(strategy.configure_train(1, model(), ConfigRecord(), nodes.grid))
    stranger = next(i for i in nodes.get_node_ids() if i not in {m.metadata.dst_node_id for m in messages})
    forged = Message(messages[0].content, dst_node_id=stranger, message_type="train")
    replies = nodes.send_and_receive([*messages, messages[0], forged])
    _, told = strategy.aggregate_train(1, replies)
    assert told is not None and told["folded"] == 4


def test_too_few_replies_leave_the_model_and_the_next_round_goes_on() -> None:
    failing: dict[int, Change] = {node: lambda _: Error(0, "gone") for node in range(NODES)}
    strategy = as_flower(spec=spec_for())
    arrays, told = one_round(strategy, Nodes(changes=failing))
    assert arrays is None and (told["folded"], told["refused"]) == (0, 6)
    after, _ = one_round(strategy, Nodes(), 2)
    assert not np.array_equal(flat(after), flat(model()))


@settings(max_examples=20)
@given(order=st.permutations(range(NODES)), name=st.sampled_from(["mean", "median", "krum"]))
def test_the_order_of_replies_changes_no_bit(order: list[int], name: str) -> None:
    spec = spec_for(cohort={"size": NODES}, strategy={"aggregator": name})
    results = []
    for places in (range(NODES), order):
        nodes, strategy = Nodes(), as_flower(spec=spec)
        replies = nodes.send_and_receive(strategy.configure_train(1, model(), ConfigRecord(), nodes.grid))
        arrays, told = strategy.aggregate_train(1, [replies[i] for i in places])
        assert told is not None
        results.append((flat(arrays).tobytes(), dict(told)))
    assert results[0] == results[1]


def test_what_is_sent_is_the_model_the_round_and_fedprox_mu() -> None:
    nodes, config = Nodes(), ConfigRecord({"lr": 0.1})
    ours = Strategy(algorithm=FedProx(mu=0.5))
    strategy = as_flower(ours, spec_for(), arrayrecord_key="a", configrecord_key="c")
    messages = list(strategy.configure_train(2, model(), config, nodes.grid))
    assert {m.metadata.message_type for m in messages} == {"train"} and len(messages) == 6
    content = messages[0].content
    assert dict(content.config_records["c"]) == {"lr": 0.1, "server-round": 2, "proximal-mu": 0.5}
    assert dict(config) == {"lr": 0.1}, "the caller's is left as it is"
    assert flat(content.array_records["a"]).tobytes() == flat(model()).tobytes()


def test_fedexp_measures_norms_by_itself() -> None:
    """A client cannot claim to disagree more than it does: the norms are of the deltas that came."""
    made = [as_flower(Strategy(optimizer=FedExP()), spec_for()) for _ in range(2)]
    honest, _ = one_round(made[0], Nodes())
    boasted, _ = one_round(made[1], Nodes(changes={node: measured(square=1e9) for node in range(NODES)}))
    assert flat(honest).tobytes() == flat(boasted).tobytes()


def test_statistics_are_averaged_and_integers_stay() -> None:
    """BatchNorm's running mean is no parameter: Adam must not move it."""
    tracked = {"bn.running_mean": np.full(2, 3.0, np.float32), "bn.num_batches_tracked": np.array(7)}
    given = {"w": np.zeros(2, np.float32), **tracked}
    arrays = ArrayRecord({name: Array(value) for name, value in given.items()})
    sent = {"bn.running_mean": np.full(2, 5.0, np.float32), "bn.num_batches_tracked": np.array(9)}
    nodes = Nodes(3, dict.fromkeys(range(3), replaced(**sent)))
    spec = spec_for(cohort={"size": 3}, strategy={"optimizer": "adam"})
    after, _ = one_round(as_flower(spec=spec), nodes, arrays=arrays)
    values = {name: array.numpy().tolist() for name, array in after.items()}
    assert list(values) == list(arrays) and values["w"][0] != 0
    assert (values["bn.running_mean"], values["bn.num_batches_tracked"]) == ([5, 5], 7)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_dtypes_and_shapes_come_back(dtype: str) -> None:
    after, _ = one_round(as_flower(spec=spec_for()), Nodes(), arrays=model(dtype))
    assert [(a.dtype, a.shape) for a in after.values()] == [(dtype, a.shape) for a in model().values()]


def test_another_model_in_the_middle_is_refused() -> None:
    strategy = as_flower(spec=spec_for())
    one_round(strategy, Nodes())
    with pytest.raises(SpecError, match="round 2: the model is not that of round 1: sent the arrays"):
        one_round(strategy, Nodes(), 2, ArrayRecord({"w": Array(np.zeros(2, np.float32))}))
    with pytest.raises(SpecError, match="round 3: configure_train has to come before"):
        strategy.aggregate_train(3, [])


def test_a_round_waits_for_as_many_nodes_as_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes, slept = Nodes(2), list[float]()

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        nodes.count += 1

    monkeypatch.setattr("fedcore.flower.ours.sleep", sleep)
    one_round(as_flower(spec=spec_for(cohort={"size": 6, "minimum": 5})), nodes)
    assert len(slept) == 3 and len(nodes.asked) == 5


def test_a_run_spec_is_read_from_its_path(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('[strategy]\nname = "krum"\nf = 1\n[cohort]\nsize = 8\n')
    assert as_flower(spec=path).strategy.aggregator == Krum(f=1)
    assert as_flower(Strategy(aggregator=Median()), str(path)).strategy.aggregator == Median()


CLIENT = {"level": "client", "population": NODES, "noise_multiplier": 1e-3, "clip_norm": 0.1}
TREE = {"level": "tree", "separation": 1, "noise_multiplier": 1.0, "clip_norm": 0.1}


def counted() -> Iterator[int]:
    return iter(range(10**6, 2 * 10**6))


class TestPrivate:
    @pytest.mark.parametrize("level", [CLIENT, TREE, CLIENT | {"adaptive": True}], ids=str)
    def test_with_the_same_randomness_a_private_run_is_our_own(self, level: dict[str, Any]) -> None:
        spec = spec_for(privacy=level)
        made = as_flower(spec=spec)
        draws = counted()
        strategy = FedcoreStrategy(made.strategy, made.spec, Keys(), lambda: next(draws))
        result = strategy.start(Nodes().grid, model(), ROUNDS)
        entropy = [next(again) for again in [counted()] for _ in range(2 * ROUNDS)]
        assert flat(result.arrays).tobytes() == simulated({}, spec, entropy).tobytes()

    def test_nothing_but_epsilon_is_told(self) -> None:
        spec = spec_for(privacy=CLIENT | {"noise_multiplier": 1.0})
        result = as_flower(spec=spec).start(Nodes().grid, model(), ROUNDS)
        assert [dict(row) for row in result.train_metrics_clientapp.values()] == [
            {"epsilon": epsilon} for epsilon in spent(spec)
        ]
        assert result.evaluate_metrics_clientapp == {}

    def test_noise_and_cohorts_come_from_the_operating_system(self, monkeypatch: pytest.MonkeyPatch) -> None:
        spec, drawn = spec_for(privacy=CLIENT), list[int]()

        def bits(count: int) -> int:
            drawn.append(count)
            return len(drawn)

        one, two = (one_round(as_flower(spec=spec), Nodes())[0] for _ in range(2))
        assert flat(one).tobytes() != flat(two).tobytes()
        monkeypatch.setattr(secrets, "randbits", bits)
        one_round(as_flower(spec=spec), Nodes())
        assert drawn == [256, 256], "one for the cohort, one for the noise"

    def test_one_client_moves_the_model_by_the_clip_norm_at_most(self) -> None:
        """All nodes are asked; one sends a vast update, or claims a vast weight, or fails."""
        spec = spec_for(privacy=CLIENT | {"noise_multiplier": 1e-9}, cohort={"size": NODES})
        far = replaced(scale=np.array(1e30, np.float32))
        changes: list[dict[int, Change]] = [
            {},
            {3: far},
            {3: measured(**{"num-examples": 10**12})},
            {3: lambda _: Error(0, "gone")},
            {3: replaced(scale=np.array(np.nan, np.float32))},
        ]
        models = [flat(one_round(as_flower(spec=spec), Nodes(changes=change))[0]) for change in changes]
        moves = [float(np.linalg.norm(each - models[0])) for each in models]
        assert all(move <= 2 * 0.1 / NODES * (1 + 1e-3) for move in moves)
        assert moves[2] < 1e-6 < moves[1], "a weight counts for nothing here"

    def test_a_round_that_nobody_entered_is_noise_all_the_same(self) -> None:
        spec = spec_for(privacy=CLIENT | {"population": 10**6, "noise_multiplier": 5.0})
        after, told = one_round(as_flower(spec=spec), nodes := Nodes())
        assert nodes.asked == [] and not np.array_equal(flat(after), flat(model())) and "epsilon" in told

    def test_rounds_that_epsilon_does_not_count_are_refused(self) -> None:
        spec = spec_for(privacy=CLIENT)
        with pytest.raises(SpecError, match=r"set run\.rounds to num_rounds"):
            as_flower(spec=spec).start(Nodes().grid, model(), ROUNDS + 1)
        strategy = as_flower(spec=spec)
        strategy.start(Nodes().grid, model(), 1)
        with pytest.raises(SpecError, match="round 1 of a private run, expected 2"):
            strategy.start(Nodes().grid, model(), 1)

    def test_a_target_is_met_by_the_last_round(self) -> None:
        level = {"level": "client", "population": NODES, "target_epsilon": 3.0}
        result = as_flower(spec=spec_for(privacy=level)).start(Nodes().grid, model(), ROUNDS)
        assert 2.9 < cast(float, result.train_metrics_clientapp[ROUNDS]["epsilon"]) <= 3.0

    def test_the_summary_says_what_is_promised(
        self, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)
        as_flower(spec=spec_for(privacy=CLIENT | {"noise_multiplier": 1.0})).summary()
        assert "for one client, add/remove" in caplog.text
        assert "no receiver learns who took part" in caplog.text


class TestEvaluation:
    def test_metrics_are_means_over_believable_replies(self) -> None:
        spec = spec_for(evaluation={"where": "clients"}, cohort={"size": 3, "minimum": 1})
        nodes = Nodes(3, {0: measured(train_loss=1.0), 1: measured(**{"num-examples": 10**12})})
        nodes.changes[2] = measured(train_loss=4.0)
        strategy = as_flower(spec=spec)
        replies = nodes.send_and_receive(strategy.configure_evaluate(1, model(), ConfigRecord(), nodes.grid))
        assert {m.metadata.message_type for m in nodes.sent} == {"evaluate"}
        told = strategy.aggregate_evaluate(1, replies)
        assert told is not None and told["train_loss"] == pytest.approx((5 * 1.0 + 19 * 4.0) / 24)
        assert strategy.aggregate_evaluate(1, []) is None

    def test_clients_are_asked_when_it_is_due_and_after_the_last_round(self) -> None:
        spec = spec_for(run={"rounds": 5}, evaluation={"where": "clients", "every": 2})
        result = as_flower(Strategy(sampler=Uniform()), spec).start(Nodes().grid, model(), 5)
        assert list(result.evaluate_metrics_clientapp) == [2, 4, 5]
