"""Our strategies in somebody's Flower project: who is asked, how updates combine, how the model moves."""

import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from logging import INFO, WARNING
from pathlib import Path
from time import sleep

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy as FlowerStrategy
from flwr.supercore import log

from fedcore.errors import SpecError, UpdateRefused
from fedcore.flower.crossing import obstacles
from fedcore.flower.flat import arrays_of, layout_of, parameters_of
from fedcore.flower.means import Metrics, number, only, weighted_means
from fedcore.layout import Layout
from fedcore.messages import Plan, Ref, Update, Work
from fedcore.privacy.claims import adjacency_of, assumption, resolved, spent, unit_of
from fedcore.privacy.levels import OFF, Off
from fedcore.spec import RunSpec
from fedcore.strategies import encryption
from fedcore.strategies.algorithms import FedProx
from fedcore.strategies.catalog import PARTS, from_table
from fedcore.strategies.conflicts import check
from fedcore.strategies.privacy import clip_norm, private, released
from fedcore.strategies.rounds import Round, State, advance, cohort, initial_state, receive, tally, train_plan
from fedcore.strategies.strategy import Strategy
from fedcore.strategies.terms import Rows, joint_norm

Entropy = Callable[[], int]


def fresh() -> int:
    """Return 256 bits that nothing else knows or keeps."""
    return secrets.randbits(256)


@dataclass(frozen=True)
class Keys:
    """Under which names the records and metrics of messages go, as Flower's own strategies call them."""

    weighted_by: str = "num-examples"
    arrays: str = "arrays"
    config: str = "config"
    loss: str = "train_loss"


def as_flower(
    strategy: Strategy | None = None,
    spec: RunSpec | str | Path | None = None,
    *,
    weighted_by_key: str = "num-examples",
    arrayrecord_key: str = "arrays",
    configrecord_key: str = "config",
    train_loss_key: str = "train_loss",
) -> "FedcoreStrategy":
    """Return one of our strategies as a Flower strategy, whose `start` a ServerApp calls.

        strategy = as_flower(Strategy(aggregator=Krum(f=2), optimizer=Adam(lr=0.1)))
        strategy.start(grid=grid, initial_arrays=ArrayRecord(model.state_dict()), num_rounds=10)

    strategy: in place of the spec's [strategy]. spec: a RunSpec or the path of one, of which [run] seed and
    rounds, [cohort] size, minimum and over_select, [limits], [evaluation] every and where, and [privacy] are
    read. Clients that over_select asks beyond size count as well, because Flower's rounds wait for all. The
    ClientApp trains, so [client] says nothing; `start` is told the timeout, and the number of rounds, which
    a private run's [run] rounds must cover, as its epsilon is for those. The keys are Flower's; the loss is
    read for samplers alone that choose by it. FedProx's mu goes out as config["proximal-mu"], as Flower's
    own does; whether the ClientApp heeds it, nobody sees.

    A reply is refused, with a line in the log, and the round goes on without it, where a number in it is NaN,
    infinite or further than [limits] update from what was sent, where its arrays have other names or shapes,
    or where it claims more examples than [limits] weight. A round with fewer replies than [cohort] minimum
    leaves the model as it is. A node that fails is left out likewise.

    Guarantee, at privacy level "client" and "tree": (epsilon, delta)-DP of all models of the run together
    for one client, all of whose data are added or removed ("tree": whose updates are zeroed), against
    whoever sees the models and the metrics that this strategy returns. Every client's whole update is
    clipped here and counts once; cohorts ("client": by Poisson sampling) and noise are drawn here, from the
    operating system's randomness. It assumes that this process and Flower's servers are trusted: they see
    every update, and who was drawn, which at level "client" has to stay secret from those whom the guarantee
    is against. What replies measure has no noise, so none of it is returned; "epsilon" among the train
    metrics is what has been spent so far.

    Raises SpecError, with a remedy, for what cannot cross.
    """
    if isinstance(spec, str | Path):
        spec = RunSpec.load(spec)
    spec = spec or RunSpec()
    if strategy and strategy.privacy != OFF:
        spec = spec.model_copy(update={"privacy": strategy.privacy})
    chosen = strategy or from_table(spec.strategy, local=True)
    for why in obstacles(chosen, spec):
        raise SpecError(f"as_flower: {why}")
    spec = resolved(spec)
    chosen = private(chosen, spec)
    check(chosen, spec)
    encryption.check(chosen, spec)
    keys = Keys(weighted_by_key, arrayrecord_key, configrecord_key, train_loss_key)
    return FedcoreStrategy(chosen, spec, keys)


class FedcoreStrategy(FlowerStrategy):
    """A strategy of ours behind Flower's interface; `as_flower` makes one and says what holds.

    One object is one run: it keeps what the optimiser, the aggregator and the sampler know between rounds.
    """

    def __init__(self, strategy: Strategy, spec: RunSpec, keys: Keys, entropy: Entropy = fresh) -> None:
        """Hold a strategy as it runs under a spec that is resolved; `entropy` is fixed in tests alone."""
        super().__init__()
        self.strategy, self.spec, self.keys, self._entropy = strategy, spec, keys, entropy
        self.private = strategy.privacy != OFF
        self.spent = spent(spec)
        self.sent = ArrayRecord()
        self.layout: Layout | None = None
        self.state: State | None = None
        self.round: Round | None = None

    def summary(self) -> None:
        """Log the parts of the strategy, and what it promises."""
        for part in PARTS:
            log(INFO, "\t├──> %s: %s", part, getattr(self.strategy, part))
        privacy, rounds = self.spec.privacy, self.spec.run.rounds
        if not isinstance(privacy, Off):
            promise = f"epsilon {self.spent[-1]:.3g} at delta {privacy.delta:g} after {rounds} rounds"
            log(INFO, "\t├──> %s, for one %s, %s", promise, unit_of(privacy), adjacency_of(self.spec))
            log(INFO, "\t└──> %s", assumption(self.spec))

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Draw the cohort of a round and send it the model.

        Raises SpecError for arrays that the strategy cannot train, or that are another model's than before,
        and for a private round that its epsilon does not count.
        """
        state = self._start(server_round, arrays)
        nodes = self._nodes(grid)
        ref, memory = self._ref(server_round, "train"), state.memory
        size = self.spec.cohort.asked
        clients = cohort(self.strategy, self.spec, ref, list(nodes), size, memory, self.entropy())
        self.round = Round(self._plan(ref, clients, len(nodes)))
        algorithm = self.strategy.algorithm
        beside = {"proximal-mu": algorithm.mu} if isinstance(algorithm, FedProx) else {}
        content = self._content(arrays, config, server_round, beside)
        return [_message(content, nodes[client], MessageType.TRAIN) for client in clients]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the model after a round, in the arrays' own dtypes, and its metrics.

        These are the means of what replies report and how many were folded and refused; of a private round
        its epsilon alone. Without enough replies there is no new model.
        """
        round, state, layout = self.round, self.state, self.layout
        if round is None or state is None or layout is None or round.plan.ref.round != server_round:
            raise SpecError(f"aggregate_train of round {server_round}: configure_train has to come before it")
        metrics = {}
        for reply in replies:
            client = str(reply.metadata.src_node_id)
            if self._take(round, client, reply) and not self.private:
                metrics[client] = only(reply.content.metric_records, "MetricRecord")
        round.close()
        self.round = None
        told = MetricRecord(self._told(round, metrics))
        if not round.sufficient:
            short = f"{len(round.folded)} of at least {round.plan.minimum} updates"
            log(WARNING, "round %s: %s, so the model stays", server_round, short)
            return None, told
        self.state = advance(self.strategy, round, state, self.spec.run.seed, entropy=self.entropy())
        return arrays_of(self.state.parameters, layout, self.sent), told

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Draw the clients that test the model, where and when [evaluation] says so."""
        evaluation, last = self.spec.evaluation, self.spec.run.rounds
        due = server_round == last or (evaluation.every and server_round % evaluation.every == 0)
        if evaluation.where == "holdout" or not due:
            return []
        nodes, ref = self._nodes(grid), self._ref(server_round, "evaluate")
        clients = cohort(self.strategy, self.spec, ref, list(nodes), self.spec.cohort.size, {})
        content = self._content(arrays, config, server_round, {})
        return [_message(content, nodes[client], MessageType.EVALUATE) for client in clients]

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return the means of what replies report, weighed as in training; None where no reply counts."""
        metrics = {}
        for reply in replies:
            client = str(reply.metadata.src_node_id)
            try:
                record = only(_content_of(reply).metric_records, "MetricRecord")
                self._weight(record)
                metrics[client] = record
            except UpdateRefused as refused:
                log(WARNING, "round %s: evaluation of node %s: %s", server_round, client, refused)
        return MetricRecord(self._means(metrics)) if metrics else None

    def entropy(self) -> int | None:
        """Return new randomness for a private round; None where the seed decides."""
        return self._entropy() if self.private else None

    def _start(self, number: int, arrays: ArrayRecord) -> State:
        """Return the state from which a round starts: the model is what is sent, the rest as we left it."""
        if self.layout is None:
            self.layout = layout_of(arrays)
        try:
            parameters = parameters_of(arrays, self.layout)
        except UpdateRefused as error:
            raise SpecError(f"round {number}: the model is not that of round 1: {error}") from error
        state = self.state or initial_state(self.strategy, parameters)
        if self.private and number != state.round + 1:
            raise SpecError(
                f"round {number} of a private run, expected {state.round + 1}: its epsilon counts every "
                "round once; make a new strategy for a new run"
            )
        if self.private and number > self.spec.run.rounds:
            raise SpecError(
                f"round {number} of a private run of run.rounds = {self.spec.run.rounds}, for which its "
                "epsilon is; set run.rounds to num_rounds"
            )
        self.sent, self.state = arrays, replace(state, parameters=parameters)
        return self.state

    def _nodes(self, grid: Grid) -> dict[str, int]:
        """Return the nodes by name, in the grid's order, once there are enough for a round."""
        while len(nodes := list(grid.get_node_ids())) < (fewest := self.spec.cohort.fewest):
            log(INFO, "Waiting for nodes: %s of at least %s, which is cohort.minimum", len(nodes), fewest)
            sleep(1)
        return {str(node): node for node in nodes}

    def _ref(self, number: int, kind: Work) -> Ref:
        return Ref(self.spec.run.name, number, 0, kind)

    def _plan(self, ref: Ref, clients: tuple[str, ...], population: int) -> Plan:
        """Return the plan of a round; of what an app measures it has only what the sampler goes by."""
        assert self.layout and self.state
        clip = clip_norm(self.strategy.privacy, self.state.vectors)
        plan = train_plan(self.strategy, self.spec, self.layout, ref, clients, population, clip)
        if self.private:  # whoever came, its noise is in the model, so the next round may build on it
            return replace(plan, minimum=0)
        if self.strategy.sampler.sees == "scalars":
            return plan
        scalars = {name: bounds for name, bounds in plan.scalars.items() if name not in plan.metrics}
        return replace(plan, scalars=scalars, metrics=())

    def _content(
        self, arrays: ArrayRecord, config: ConfigRecord, number: int, beside: Mapping[str, float]
    ) -> RecordDict:
        said = ConfigRecord({**config, "server-round": number, **beside})
        return RecordDict({self.keys.arrays: arrays, self.keys.config: said})

    def _take(self, round: Round, client: str, reply: Message) -> bool:
        """Fold a reply, or leave it out with a line in the log; tell which."""
        try:
            update = self._update(round.plan, _content_of(reply))
        except UpdateRefused as refused:
            round.lose(client, reason := str(refused))
        else:
            verdict = receive(round, client, update)
            if verdict.status == "folded":
                return True
            reason = verdict.reason
        log(WARNING, "round %s: node %s is left out: %s", round.plan.ref.round, client, reason)
        return False

    def _update(self, plan: Plan, content: RecordDict) -> Update:
        """Return a reply as the update that the plan asks for."""
        assert self.layout and self.state
        trained = parameters_of(only(content.array_records, "ArrayRecord"), self.layout)
        delta = trained.shared
        with np.errstate(over="ignore"):  # what becomes infinite is refused as that
            delta -= self.state.parameters.shared
        if self.private:
            row = Rows({"delta": delta[None]}, {})
            (sent,) = released(self.strategy, "train", row, plan.clip, ()).updates()
            return sent
        vectors = {"delta": delta} | ({"buffers": trained.buffers} if "buffers" in plan.vectors else {})
        metrics = only(content.metric_records, "MetricRecord")
        weight = self._weight(metrics)
        scalars = {"weight": weight}
        if "square" in plan.scalars:
            scalars["square"] = joint_norm([delta]) ** 2
        if "loss" in plan.scalars:
            scalars |= {"loss": number(metrics, self.keys.loss) * weight, "count": weight}
        return Update(vectors, scalars)

    def _weight(self, metrics: MetricRecord) -> float:
        """Return the examples that a reply claims; raises UpdateRefused for more than [limits] weight."""
        weight, most = number(metrics, self.keys.weighted_by), self.spec.limits.weight
        if not 0 <= weight <= most:
            name = self.keys.weighted_by
            raise UpdateRefused(f"{name} is {weight:g}, expected 0 to {most:g}, limits.weight")
        return weight

    def _told(self, round: Round, metrics: Mapping[str, MetricRecord]) -> Metrics:
        """Return what is told of a closed round."""
        if self.private:
            return {"epsilon": self.spent[round.plan.ref.round - 1]}
        return {**self._means(metrics), **tally(round)}

    def _means(self, metrics: Mapping[str, MetricRecord]) -> Metrics:
        """Return the means of clients' metrics, the same in whatever order they came."""
        key = self.keys.weighted_by
        return weighted_means(((number(m, key), m) for _, m in sorted(metrics.items())), key)


def _content_of(reply: Message) -> RecordDict:
    """Return what a node answered; raises UpdateRefused where that is an error, or nothing."""
    if reply.has_error():
        raise UpdateRefused(f"error {reply.error.code}: {reply.error.reason}")
    if not reply.has_content():
        raise UpdateRefused("sent nothing")
    return reply.content


def _message(content: RecordDict, node: int, kind: str) -> Message:
    return Message(content, dst_node_id=node, message_type=kind)
