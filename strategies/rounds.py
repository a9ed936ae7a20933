"""The round: planned, filled, closed. A state machine without I/O, driven by simulations and coordinators.

    plan = train_plan(...)                  who takes part, what they send, how it is combined
    round = Round(plan)                     who has answered
    receive(round, client, update)          check, then add to the sums or keep as a row
    state = advance(strategy, round, state) new parameters

The drivers differ only in where updates come from and what a clock says.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from fedcore.encoding import BLOCK, blocks
from fedcore.errors import UpdateRefused
from fedcore.layout import Layout, Parameters, Vector
from fedcore.messages import Plan, Ref, ScalarSpec, Update, VectorSpec, Verdict
from fedcore.metrics import EXAMPLE_BOUND, means
from fedcore.paging import passing
from fedcore.privacy.levels import OFF, ClientLevel, Privacy
from fedcore.seeds import digest, generator
from fedcore.spec import RunSpec
from fedcore.strategies.aggregates import conclude
from fedcore.strategies.algorithms import BUFFER_BOUND, Aggregate
from fedcore.strategies.memory import remember
from fedcore.strategies.privacy import (
    clip_norm,
    metric_means,
    noised,
    noised_sums,
    private_evaluation,
    private_training,
    state_after,
)
from fedcore.strategies.samplers import Memory, Uniform
from fedcore.strategies.strategy import Strategy
from fedcore.strategies.terms import Rows, RowStore, Space, all_pass, check, in_memory
from fedcore.strategies.words import Accumulator

SQUARE_BOUND = 2.0**40  # of the squared norm of an update
BITS = {"auto": 64, "exact": 64, "q32": 32, "q16": 16}  # of a coordinate of a vector whose norm is bounded


@dataclass(frozen=True)
class State:
    """What one round hands to the next.

    parameters: the model and what is broadcast beside it. vectors: what the optimiser, the algorithm and the
    aggregator keep on the server, by "part.name". memory: what the sampler knows of single clients.
    """

    round: int
    parameters: Parameters
    vectors: Mapping[str, Vector] = field(default_factory=dict)
    memory: Memory = field(default_factory=dict)


def initial_state(strategy: Strategy, parameters: Parameters, space: Space = in_memory) -> State:
    """Return the state before the first round; `space` places its vectors."""
    x, algorithm = parameters.shared, strategy.algorithm
    begin = {f"optimizer.{name}": value for name, value in strategy.optimizer.state.items()}
    begin |= {f"algorithm.{name}": 0.0 for name in algorithm.remembers}
    if strategy.aggregator.anchor == "previous":
        begin["aggregator.previous"] = 0.0
    vectors = {name: space(name, x.shape, x.dtype) for name in begin}
    for name, value in begin.items():
        vectors[name][:] = value
    extra = {name: space(name, x.shape, x.dtype) for name in algorithm.receives}
    return State(0, Parameters(x, parameters.buffers, extra), vectors)


def cohort(
    strategy: Strategy,
    spec: RunSpec,
    ref: Ref,
    population: Sequence[str],
    size: int,
    memory: Memory,
    entropy: int | None = None,
) -> tuple[str, ...]:
    """Draw the clients of a piece of work, from (seed, kind, round, attempt), population and memory alone.

    Whatever the strategy's sampler prefers, an evaluation asks a uniform sample, or at client level one of
    the same law as training. entropy: in place of the seed; a deployment's private cohorts must be secret.
    """
    rng = generator(spec.run.seed if entropy is None else entropy, "cohort", ref.kind, ref.round, ref.attempt)
    fixed = ref.kind == "train" or isinstance(strategy.privacy, ClientLevel)
    sampler = strategy.sampler if fixed else Uniform()
    return sampler.sample(population, size, rng, memory, round=ref.round)


def train_plan(
    strategy: Strategy,
    spec: RunSpec,
    layout: Layout,
    ref: Ref,
    clients: tuple[str, ...],
    population: int,
    clip: float = 0.0,
) -> Plan:
    """Plan a training round: what the algorithm sends, and the buffers and the loss beside it.

    clip: the round's clip norm where it is private, from `clip_norm`; 0: the spec's.
    """
    algorithm, limits = strategy.algorithm, spec.limits
    metrics = _sums(("loss",), limits.weight * spec.client.epochs)
    vectors = _limited(algorithm.vectors(layout, spec), spec)
    rows = frozenset() if strategy.sums else frozenset(vectors)
    squares = {name: ScalarSpec(0.0, SQUARE_BOUND) for name in strategy.optimizer.scalars}
    if layout.buffer_size:
        vectors["buffers"] = VectorSpec(layout.buffer_size, layout.dtype, BUFFER_BOUND, "weight")
    goal = min(spec.cohort.size, len(clients))
    minimum = min(spec.cohort.fewest, goal)
    scalars = algorithm.scalars(spec) | squares | metrics
    plan = Plan(
        ref,
        clients,
        goal,
        minimum,
        spec.cohort.deadline,
        vectors,
        scalars,
        tuple(metrics),
        rows,
        strategy.sees,
        population,
        bits=BITS[spec.encryption.encoding],
        seed=spec.run.seed,
    )
    return private_training(strategy, spec, layout, plan, clip or clip_norm(strategy.privacy, {}))


def _limited(vectors: Mapping[str, VectorSpec], spec: RunSpec) -> dict[str, VectorSpec]:
    """Return vectors with their norm bounds: [limits] norm, on the scale of each one's coordinates."""
    norm = spec.limits.norm / spec.limits.update
    return {name: replace(vector, norm=norm * vector.bound) for name, vector in vectors.items()}


def evaluate_plan(spec: RunSpec, ref: Ref, clients: tuple[str, ...], metrics: Sequence[str]) -> Plan:
    """Plan an evaluation: sums of the loss and the metrics over test examples, and their count."""
    scalars = _sums(metrics, spec.limits.weight)
    plan = Plan(ref, clients, len(clients), 1, spec.cohort.deadline, {}, scalars, tuple(scalars))
    return private_evaluation(spec, plan)


def _sums(metrics: Sequence[str], examples: float) -> dict[str, ScalarSpec]:
    """Return the ranges of metric sums over at most so many examples, and of `count`."""
    bound = EXAMPLE_BOUND * examples
    return {name: ScalarSpec(-bound, bound) for name in metrics} | {"count": ScalarSpec(0.0, examples)}


class Round:
    """Who has answered, and the sums and rows so far.

    A client is folded, refused or lost exactly once; when the round has closed, whoever was still at work
    is late. Nothing here waits, reads a clock or touches a file.
    """

    def __init__(self, plan: Plan, space: Space = in_memory) -> None:
        """Open the round; `space` places whatever is as long as the model: sums, rows, the next state."""
        self.plan, self.space = plan, space
        self.root: Vector | None = None  # the update from the data that the server trusts, for rules that ask
        self.seconds: dict[str, float] = {}  # how long clients took, as far as the driver knows
        self.waiting = set(plan.cohort)
        self.verdicts: dict[str, Verdict] = {}
        self.folded: list[str] = []
        self.closed = False

    @cached_property
    def sums(self) -> Accumulator:
        """The sums so far; a round of which only the books are kept has room for none."""
        return Accumulator(self.plan, self.space)

    @cached_property
    def rows(self) -> RowStore:
        """The rows so far."""
        return RowStore(self.plan, self.space)

    @property
    def done(self) -> bool:
        """Whether there is nothing to wait for: the goal is reached or everybody has been heard of."""
        if self.plan.timed:
            return False
        return not self.waiting or len(self.folded) >= self.plan.goal

    @property
    def sufficient(self) -> bool:
        """Whether enough updates are in to close the round rather than abandon it."""
        return len(self.folded) >= self.plan.minimum

    def admit(self, client: str) -> None:
        """Raise UpdateRefused unless an update of this client is awaited."""
        if client not in self.plan.cohort:
            raise UpdateRefused(f"{client} is not in the cohort of {self.plan.ref}")
        if self.closed:
            raise UpdateRefused(f"{self.plan.ref} has closed")
        if client not in self.waiting:
            raise UpdateRefused(f"{client} has answered {self.plan.ref} already")

    def settle(self, client: str, verdict: Verdict) -> None:
        """Record what became of an awaited client."""
        self.waiting.discard(client)
        self.verdicts[client] = verdict
        if verdict.status == "folded":
            self.folded.append(client)

    def lose(self, client: str, reason: str) -> None:
        """Stop waiting for a client that is gone or declined."""
        if client in self.waiting and not self.closed:
            self.settle(client, Verdict("refused", reason))

    def close(self) -> None:
        """Take no more updates; whoever is still at work is late."""
        self.closed = True
        for client in list(self.waiting):
            self.settle(client, Verdict("late"))


def fold(round: Round, client: str, update: Update) -> Verdict:
    """Check an update and add it to the sums and rows; the books are kept by `settle`."""
    try:
        check(round.plan, update)
    except UpdateRefused as error:
        return Verdict("refused", str(error))
    round.sums.add(update)
    if round.plan.sees:
        round.rows.add((client,), Rows.of([update]))
    return Verdict("folded")


def receive(round: Round, client: str, update: Update) -> Verdict:
    """Admit, fold and settle a client's update in one go; return what became of it."""
    try:
        round.admit(client)
    except UpdateRefused as error:
        return Verdict("refused", str(error))
    verdict = fold(round, client, update)
    round.settle(client, verdict)
    return verdict


def receive_rows(round: Round, clients: Sequence[str], rows: Rows) -> None:
    """Receive the updates of several clients at once, to the same sums as one by one."""
    if all(client in round.waiting for client in clients) and all_pass(round.plan, rows):
        round.sums.add_rows(rows)
        if round.plan.sees:
            round.rows.add(clients, rows)
        folded = Verdict("folded")
        for client in clients:
            round.settle(client, folded)
    else:
        for client, update in zip(clients, rows.updates(), strict=True):
            receive(round, client, update)


def copied(parameters: Parameters) -> Parameters:
    """Return a writable copy."""
    extra = {name: vector.copy() for name, vector in parameters.extra.items()}
    return Parameters(parameters.shared.copy(), parameters.buffers.copy(), extra)


def advance(
    strategy: Strategy,
    round: Round,
    state: State,
    seed: int,
    copy: Callable[[Parameters], Parameters] = copied,
    entropy: int | None = None,
) -> State:
    """Return the state after a closed training round; the old one is left as it is.

    Block by block: x <- optimiser(x, direction), buffers <- sum w_i b_i / sum w_i. seed: the run's, for
    rules that draw. `copy` says where the new parameters lie, in memory or on disk; what else is as long lies
    in the round's space. entropy: 256 bits for the noise of a private round, new for every call and kept
    nowhere; None takes the seed, in simulations.
    """
    parameters, plan = copy(state.parameters), round.plan
    shared, buffers = parameters.shared, parameters.buffers
    vectors = {name: round.space(name, v.shape, v.dtype) for name, v in state.vectors.items()}
    for name, vector in vectors.items():
        vector[:] = state.vectors[name]
    previous = vectors.get("aggregator.previous")
    anchor = round.root if strategy.aggregator.anchor == "root" else previous
    rng = generator(seed, "aggregate", plan.ref.round)
    secret = digest(seed, "noise", plan.ref.round) if entropy is None else entropy
    aggregate = noised(strategy.privacy, plan, round.sums, vectors, secret) or conclude(
        strategy, round.sums, round.rows, len(round.folded), anchor, rng, round.space
    )
    rate = strategy.optimizer.rate(aggregate, lambda: _squared_norm(aggregate, len(shared)))
    optimizer, server = _part("optimizer", vectors), {**parameters.extra, **_part("algorithm", vectors)}
    sums = [round.sums.integers(t.name) for t in plan.terms if t.vector and plan.length(t) == len(shared)]
    for block in passing(shared, *sums, *vectors.values(), *parameters.extra.values(), length=BLOCK):
        direction = strategy.algorithm.direction(aggregate, block, _at(block, server))
        strategy.optimizer.step(shared[block], direction, rate, _at(block, optimizer))
        if previous is not None:
            previous[block] = aggregate.vector("delta", block)
    if len(buffers) and (weight := round.sums.scalar("weight")):
        for block in blocks(len(buffers)):
            buffers[block] = round.sums.vector("buffers", block) / weight
    vectors |= state_after(strategy.privacy, plan, round.sums, vectors, secret)
    memory = remember(strategy.sampler, plan, round.rows, round.seconds, state.memory)
    return State(state.round + 1, parameters, vectors, memory)


def _part(part: str, vectors: Mapping[str, Vector]) -> dict[str, Vector]:
    """Return the vectors that one part of the strategy keeps, by their own names."""
    return {n.removeprefix(f"{part}."): vector for n, vector in vectors.items() if n.startswith(f"{part}.")}


def _at(block: slice, vectors: Mapping[str, Vector]) -> dict[str, Vector]:
    return {name: vector[block] for name, vector in vectors.items()}


def _squared_norm(aggregate: Aggregate, size: int) -> float:
    """Return the squared norm of the aggregated delta."""
    return sum(float(np.square(aggregate.vector("delta", block)).sum()) for block in blocks(size))


def tally(round: Round) -> dict[str, float]:
    """Return what is told of a closed training round: how many updates, and the means of what they report.

    Of a round whose cohort is secret only the expected size, since the true one would tell who took part.
    """
    if round.plan.timed:
        return {"expected": round.plan.expected}
    refused = sum(verdict.status == "refused" for verdict in round.verdicts.values())
    means = {f"train_{name}": value for name, value in metrics(round).items()}
    return {"folded": len(round.folded), "refused": refused, **means}


def metrics(
    round: Round, privacy: Privacy = OFF, entropy: int | None = None, seed: int = 0
) -> dict[str, float]:
    """Return the means over all examples of the metric sums that a round collected.

    Those of a private evaluation have noise, and lie within 0..metric_bound. entropy, seed: as in `advance`.
    """
    sums = {name: round.sums.scalar(name) for name in round.plan.metrics}
    if privacy == OFF:
        return means(sums)
    secret = digest(seed, "metrics", round.plan.ref.round) if entropy is None else entropy
    return metric_means(privacy, noised_sums(privacy, sums, secret))
