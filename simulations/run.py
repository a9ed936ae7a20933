"""The synchronous driver of rounds: the same state machine that a coordinator drives over the network."""

import resource
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from fedcore import metrics as metric_sums
from fedcore.client.examples import examples_from
from fedcore.client.trainer import device_of
from fedcore.client.training import Kept, trainer_for
from fedcore.encoding import within
from fedcore.errors import ConfigError, DataError, RunFailed
from fedcore.interrupts import uninterrupted
from fedcore.layout import Parameters, Vector
from fedcore.messages import Plan, Ref, Work
from fedcore.plugins import Parts
from fedcore.privacy.claims import resolved, spent
from fedcore.privacy.levels import OFF, ClientLevel
from fedcore.seeds import generator
from fedcore.simulations.adversary import Adversary, attacked
from fedcore.simulations.answers import Answers, ClientStates, Summed
from fedcore.simulations.attacks import ATTACKS
from fedcore.simulations.borrowed import random_state, threads
from fedcore.simulations.buffered import Step, Workers
from fedcore.simulations.checkpoint import Journal, Row, Snapshot
from fedcore.simulations.engine import choose
from fedcore.simulations.handout import Handout
from fedcore.simulations.population import Population, check_population
from fedcore.simulations.result import Result, clients_of
from fedcore.simulations.secure import Federation, Masked
from fedcore.simulations.speeds import Stopwatch
from fedcore.spec import RunSpec
from fedcore.strategies import Strategy, encryption, to_table
from fedcore.strategies.aggregators import Mean
from fedcore.strategies.catalog import strategy_of
from fedcore.strategies.conflicts import check
from fedcore.strategies.matrix import aggregate_rows
from fedcore.strategies.modes import Synchronous
from fedcore.strategies.preaggregators import Clip
from fedcore.strategies.privacy import clip_norm, released
from fedcore.strategies.privacy.conflicts import name_of
from fedcore.strategies.rounds import (
    Round,
    State,
    advance,
    cohort,
    evaluate_plan,
    initial_state,
    metrics,
    receive_rows,
    tally,
    train_plan,
)
from fedcore.strategies.stopping import check as check_stopping
from fedcore.strategies.stopping import stopped_early
from fedcore.task import Task, resolve

ROOT = "root"  # the name under which the server trains on data of its own


@dataclass(frozen=True)
class Progress:
    """Where a simulation is: after some clients, and with the round's `row` after every round."""

    round: int
    rounds: int
    done: int
    asked: int
    row: Row | None = None


Show = Callable[[Progress], None]


def simulate(
    task: Task | None = None,
    spec: RunSpec | str | Path | None = None,
    *,
    strategy: Strategy | None = None,
    out: str | Path | None = None,
    progress: Show = lambda _: None,
    project: Path | None = None,
) -> Result:
    """Run a federation of virtual clients on this machine and return its result.

    task: what is learned; None takes the spec's `run.task`. spec: a RunSpec or the path of one; None takes
    the defaults. strategy: in place of the spec's [strategy]. out: a folder for spec.toml, metrics.jsonl,
    result.json, model.safetensors and report.html, and for the state from which `resume` continues.
    progress: called after some clients and every round. project: where "module:object" names of the spec are
    searched first; None is the folder of the spec's path. Interrupting it (Ctrl-C) raises KeyboardInterrupt
    after the finished rounds have been written to `out`.
    """
    if isinstance(spec, str | Path):
        project, spec = project or Path(spec).parent, RunSpec.load(spec)
    spec = spec or RunSpec()
    if strategy:
        privacy = spec.privacy if strategy.privacy == OFF else strategy.privacy
        spec = spec.model_copy(update={"strategy": to_table(strategy), "privacy": privacy})
    simulation = Simulation(task or resolve(spec.run.task, project), spec, project)
    journal = Journal(Path(out), simulation.states, project) if out is not None else None
    if journal:
        journal.begin()
    with closing(simulation):
        return drive(simulation, journal, progress)


def drive(simulation: "Simulation", journal: Journal | None, progress: Show) -> Result:
    """Run the rounds that are left; whatever ends them, write those that are finished."""
    client, rows = simulation.spec.client, simulation.rows

    def keep(last: bool) -> None:
        if journal and rows:
            journal.keep(simulation.spec, rows, simulation.finished, last)

    with threads(client.threads), random_state(client.device):
        try:
            for _ in simulation.rounds(progress):
                keep(last=False)
        finally:
            result = simulation.result(rows)
            keep(last=True)
            if journal and rows:
                result.save(journal.folder)
    return result


class Simulation:
    """A run in progress: population, engine and the state that the next round starts from."""

    def __init__(self, task: Task, spec: RunSpec, folder: Path | None = None) -> None:
        """Build everything a run needs; raises SpecError, TaskError or DataError where it cannot work.

        folder: where "module:object" names of the spec are searched first.
        """
        client = spec.client.model_copy(update={"device": device_of(spec.client)})
        self.spec = resolved(spec.model_copy(update={"client": client}))
        self.task = task
        self.strategy: Strategy = strategy_of(self.spec, local=True, folder=folder)
        check(self.strategy, self.spec)
        check_stopping(spec.evaluation, metric_sums.names(task.metrics))
        # What a spec leaves open is encoded as a deployment would, but not masked: the sums are the same.
        self.federation = Federation() if self.spec.encryption.updates == "secagg" else None
        encoding = encryption.resolved(self.strategy, self.spec).encryption.encoding
        explicit = self.spec.encryption.model_copy(update={"encoding": encoding})
        self.spec = self.spec.model_copy(update={"encryption": explicit})
        check_population(self.spec)
        self.spent = spent(self.spec)
        self.population = Population(task, self.spec, client.device)
        self.trainer = trainer_for(task, self.spec, self.strategy)
        self.layout = self.trainer.layout
        self.states = ClientStates()
        self.seconds = Stopwatch(self.population).seconds
        names, seed = self.population.names, spec.run.seed
        ref = self.ref(1, "train")  # a plan that cannot be made is said before anything is measured
        most = tuple(names[: spec.cohort.size])
        plan = train_plan(self.strategy, self.spec, self.layout, ref, most, len(names))
        for term in plan.terms:
            plan.shift(term)
        parts = Parts("attack", ATTACKS, local=True, folder=folder)
        self.adversary = Adversary(spec.attack, names, seed, parts) if spec.attack else None
        self.state: State = initial_state(self.strategy, self.trainer.parameters())
        self.workers = (
            Workers(self.strategy, self.spec, self.layout, names, self.seconds, self.answers)
            if self.strategy.mode != Synchronous()
            else None
        )
        with threads(client.threads), random_state(client.device):
            # A cohort that is secret may be empty, and the chunk that is chosen should not tell its size.
            secret = isinstance(self.spec.privacy, ClientLevel)
            clients = tuple(names[: spec.cohort.size]) if secret else self.cohort(1, "train")
            self.choice = choose(self.population, self.trainer, self.states, clients)
        self.engine = self.choice.engine
        simulation = spec.simulation.model_copy(update=self.choice.chosen)
        self.spec = self.spec.model_copy(update={"simulation": simulation})
        self.rows: list[Row] = []
        self.finished = self.snapshot()  # of the last whole round: an interrupted evaluation has no row
        self.holdout = examples_from(task.holdout(), self.population.device)
        self.triggered = self.adversary.triggered(self.holdout) if self.adversary else None
        trusting = self.strategy.aggregator.anchor == "root"
        self.root_examples = examples_from(task.root() if trusting else None, self.population.device)
        if trusting and not len(self.root_examples):
            raise DataError(
                f"{name_of(self.strategy.aggregator)} needs data that the server trusts, "
                f"but {task.name}.root() returned nothing; return some clean examples from it"
            )
        if spec.evaluation.where == "holdout" and not len(self.holdout):
            raise DataError(
                f'evaluation.where = "holdout", but {task.name}.holdout() returned nothing; '
                'return test examples from it, or set evaluation.where = "clients"'
            )

    def close(self) -> None:
        """End what the simulation started: worker processes, and the file of what clients keep."""
        if isinstance(self.engine, Handout):
            self.engine.close()
        self.states.close()

    def ref(self, number: int, kind: Work) -> Ref:
        """Return the name of a piece of work."""
        return Ref(self.spec.run.name, number, 0, kind)

    def cohort(self, number: int, kind: Work) -> tuple[str, ...]:
        """Draw the clients of a round; nobody drops out of a simulation, so nobody is asked in excess."""
        size = self.spec.cohort.size
        ref, names = self.ref(number, kind), self.population.names
        return cohort(self.strategy, self.spec, ref, names, size, self.state.memory)

    def rounds(self, progress: Show) -> Iterator[Row]:
        """Run the rounds that are left, yielding a row of metrics for each."""
        total, every = self.spec.run.rounds, self.spec.evaluation.every
        for number in range(len(self.rows) + 1, total + 1):
            if stopped_early(self.spec.evaluation, self.rows):
                return
            row = self.train(number, progress)
            if number == total or (every and number % every == 0):
                row |= self.evaluate(number)
            if self.spent:
                row["epsilon"] = self.spent[number - 1]
            self.finish(row)
            size = clients_of(row)
            progress(Progress(number, total, size, size, row))
            yield row

    def finish(self, row: Row) -> None:
        """End a round: its row, the state after it and what clients keep count together or not at all."""
        if self.engine.chunk < self.spec.simulation.chunk:  # memory ran out
            simulation = self.spec.simulation.model_copy(update={"chunk": self.engine.chunk})
            self.spec = self.spec.model_copy(update={"simulation": simulation})
        with uninterrupted():
            self.rows.append(row)
            self.finished = self.snapshot()
            self.states.settle()

    def snapshot(self) -> Snapshot:
        """Return what is known now, and what later rounds leave as it is."""
        attack = self.adversary.state if self.adversary else {}
        at_work = self.workers.now.copy() if self.workers else None
        return Snapshot(self.state, {name: vector.copy() for name, vector in attack.items()}, at_work)

    def restore(self, rows: list[Row], snapshot: Snapshot) -> None:
        """Go on from a snapshot, with the rows before it. Raises ConfigError where the model is another."""
        self.rows, self.finished, self.state = rows, snapshot, snapshot.state
        lengths = [len(vector) for vector in self.state.parameters.vectors().values()]
        if lengths != [self.layout.shared_size, self.layout.buffer_size]:
            raise ConfigError(
                f"the run's model has {lengths[0]} parameters and that of {self.task.name} "
                f"{self.layout.shared_size}; continue with the task as it was"
            )
        if self.adversary:
            self.adversary.state = dict(snapshot.attack)
        if self.workers and snapshot.at_work:
            self.workers.now = snapshot.at_work.copy()

    def train(self, number: int, progress: Show) -> Row:
        """Run one training round and move the state."""
        started = time.perf_counter()
        if self.workers:
            rounds, asked = self.spec.run.rounds, self.workers.mode.k
            step = self.workers.step(self.state, lambda n: progress(Progress(number, rounds, n, asked)))
        else:
            step = self.gather(number, progress)
        round, kept = step.round, step.kept
        if not round.sufficient:
            reasons = sorted({v.reason for v in round.verdicts.values() if v.reason})
            raise RunFailed(
                f"round {number} had {len(round.folded)} of at least {round.plan.minimum} updates; "
                f"refused: {'; '.join(reasons[:3])}"
            )
        self.state = advance(self.strategy, round, self.state, self.spec.run.seed)
        self.states.commit({client: kept[client] for client in round.folded})
        seconds = time.perf_counter() - started
        return {"round": number, "seconds": seconds} | tally(round) | step.row

    def gather(self, number: int, progress: Show) -> Step:
        """Let a cohort answer and wait for the slowest."""
        ref, clients = self.ref(number, "train"), self.cohort(number, "train")
        size = len(self.population.names)
        clip = clip_norm(self.strategy.privacy, self.state.vectors)
        plan = train_plan(self.strategy, self.spec, self.layout, ref, clients, size, clip)
        round, kept = self.fill(plan, progress)
        round.seconds = {client: self.seconds(client) for client in clients}
        took = plan.deadline if plan.timed else max(round.seconds.values(), default=0.0)
        return Step(round, kept, took)

    def fill(self, plan: Plan, progress: Show) -> tuple[Round, dict[str, Kept]]:
        """Let the engine answer a plan until the round is done; return it closed, and what clients keep."""
        round, kept, rounds = Round(plan), dict[str, Kept](), self.spec.run.rounds
        round.root = self.trusted = self.root_update(plan)
        parameters = self.state.parameters
        masked = Masked(self.federation, self.spec, plan, parameters) if self.federation else None
        take = masked.receive if masked else receive_rows
        summed = isinstance(self.engine, Handout) and self.engine.sums
        source = self.engine.answer if summed else self.answers
        for answers in source(plan, parameters):
            if isinstance(answers, Summed):
                answers.enter(round)
            else:
                take(round, answers.clients, answers.rows)
            kept.update(zip(answers.clients, answers.kept, strict=True))
            progress(Progress(plan.ref.round, rounds, len(round.verdicts), len(plan.cohort)))
            if round.done:
                break
        if masked and round.sufficient:
            masked.finish(round)
        round.close()
        return round, kept

    def answers(self, plan: Plan, parameters: Parameters) -> Iterator[Answers]:
        """Let the engine answer, and whoever attacks forge."""
        number, adversary = plan.ref.round, self.adversary
        if plan.ref.kind == "evaluate" or adversary is None or not adversary.active(number):
            self.population.poison = None
            return self.released(plan, self.unsummed(plan, parameters))
        self.population.poison = adversary.poisoned
        honest = self.released(plan, self.unsummed(plan, parameters))
        return attacked(honest, adversary, lambda rows: self.guess(plan, rows), number)

    def unsummed(self, plan: Plan, parameters: Parameters) -> Iterator[Answers]:
        """Let the engine answer with every client's own numbers."""
        for answers in self.engine.answer(plan, parameters):
            assert isinstance(answers, Answers), "a run that is not summable was summed"
            yield answers

    def released(self, plan: Plan, answers: Iterable[Answers]) -> Iterator[Answers]:
        """Yield what clients may send of their answers: all of it, unless the run is private."""
        if self.strategy.privacy == OFF:
            yield from answers
            return
        work, number, seed = plan.ref.kind, plan.ref.round, self.spec.run.seed
        for each in answers:
            rngs = [generator(seed, "device noise", work, number, client) for client in each.clients]
            sent = released(self.strategy, work, each.rows, plan.clip, rngs, plan.distributed)
            yield replace(each, rows=sent)

    def guess(self, plan: Plan, rows: Vector) -> Vector:
        """Return what the server would make of a cohort's deltas, (n, d) -> (d,), if all weighed the same.

        Rows beyond the bound count for nothing, since they would be refused. Where clients arrive one by one,
        attackers cannot tell with whom they will meet in a step, and expect a mean.
        """
        rng = generator(self.spec.run.seed, "aggregate", plan.ref.round)
        strategy, bound = self.strategy, plan.vectors["delta"].bound
        previous = self.state.vectors.get("aggregator.previous")
        anchor = self.trusted if strategy.aggregator.anchor == "root" else previous
        taken = rows[[within(row, bound) for row in rows]]
        if self.workers:
            return Mean().aggregate(taken)
        norm = plan.vectors["delta"].norm
        pre = (Clip(norm),) if norm else strategy.pre
        return aggregate_rows(pre, strategy.aggregator, taken, rng=rng, anchor=anchor)

    def root_update(self, plan: Plan) -> Vector | None:
        """Train on the data that the server trusts, where the aggregator asks for it (FLTrust)."""
        if self.strategy.aggregator.anchor != "root" or plan.ref.kind == "evaluate":
            return None
        self.trainer.receive(self.state.parameters)
        update, _ = self.trainer.train(plan.ref, ROOT, self.root_examples, {})
        return update.vectors["delta"]

    def evaluate(self, number: int) -> dict[str, float]:
        """Return the means of the loss and the task's metrics with the present model."""
        names = metric_sums.names(self.task.metrics)
        row = self.success()
        if self.spec.evaluation.where == "holdout":
            self.trainer.receive(self.state.parameters)
            return metric_sums.means(self.trainer.evaluate(self.holdout, {}).scalars) | row
        ref, clients = self.ref(number, "evaluate"), self.cohort(number, "evaluate")
        round, _ = self.fill(evaluate_plan(self.spec, ref, clients, names), lambda _: None)
        return metrics(round, self.strategy.privacy, seed=self.spec.run.seed) | row

    def success(self) -> dict[str, float]:
        """Return how often a backdoor opens: the first metric on triggered examples with their new label."""
        if self.triggered is None or not self.task.metrics:
            return {}
        self.trainer.receive(self.state.parameters)
        means = metric_sums.means(self.trainer.evaluate(self.triggered, {}).scalars)
        return {"attack_success": means[next(iter(self.task.metrics))]}

    def result(self, rows: list[Row]) -> Result:
        """Return the result so far."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        engine, reason = self.engine.name, self.choice.reason
        parameters = self.finished.state.parameters
        return Result(self.task, self.spec, self.layout, parameters, list(rows), engine, reason, peak)
