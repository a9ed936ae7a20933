"""Which engine trains: the one asked for, or the fastest, measured for a moment on the real task."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from typing import Any

from fedcore.client.examples import Examples, PairExamples
from fedcore.client.trainer import TorchTrainer
from fedcore.client.training import Trainer
from fedcore.cores import cores
from fedcore.errors import SpecError
from fedcore.messages import Ref
from fedcore.simulations.answers import ClientStates, Engine
from fedcore.simulations.handout import Handout
from fedcore.simulations.memory import memory_for
from fedcore.simulations.population import Population
from fedcore.simulations.processes import Processes, forkable, workers_for
from fedcore.simulations.sequential import Sequential
from fedcore.simulations.vectorized import Stack, Vectorized, obstacle
from fedcore.spec import RunSpec
from fedcore.strategies.rounds import train_plan

CHUNKS = (8, 32, 128, 512)  # clients; far apart, since the speed is flat around the best
MOMENT = 0.3  # seconds that one measurement may take before no larger chunk is tried
RUNS = 6  # of a quick measurement, since other work on the machine disturbs some
BATCHES = 2  # of each client, to begin with
PAYS = 0.5  # seconds that workers must promise to save before any is started: to measure them takes some
PAYS_SPAWNED = 8.0  # the same of workers that are no forks: to import torch takes 2 to 4
HEAVY = 0.005  # seconds of a client's training below which handing it out costs more


@dataclass(frozen=True)
class Choice:
    """An engine, and in words why it was chosen."""

    engine: Engine
    reason: str

    @property
    def chosen(self) -> dict[str, Any]:
        """What the resolved spec says of it, under [simulation]."""
        workers = {"workers": self.engine.workers} if self.engine.workers else {}
        return {"engine": self.engine.name, "chunk": self.engine.chunk, **workers}


def choose(population: Population, trainer: Trainer, states: ClientStates, clients: Sequence[str]) -> Choice:
    """Return the engine that `[simulation] engine` asks for; `auto` measures on a cohort's clients.

    Raises SpecError where another engine than the sequential one is asked for and cannot train the task.
    """
    simulation, sequential = population.spec.simulation, Sequential(population, trainer, states)
    if simulation.engine == "sequential":
        return Choice(sequential, "as asked")
    if simulation.engine in ("processes", "ray"):
        try:
            workers = ready(handout_for(simulation.engine), population, trainer, states)
        except SpecError as error:
            raise SpecError(f'simulation.engine = "{simulation.engine}": {error}; or use "auto"') from error
        return Choice(workers, f"{workers.workers} workers, as asked")
    if not isinstance(trainer, TorchTrainer):
        return Choice(sequential, _unfit(simulation.engine, "it brings its own trainer"))
    heads = shortened(population, trainer, clients, BATCHES)
    chunks = (simulation.chunk,) if simulation.chunk else CHUNKS
    measured = measure(population, trainer, heads, chunks, thread_counts(population.spec))
    if measured.problem:
        choice = Choice(sequential, _unfit(simulation.engine, measured.problem))
    else:
        count = f", {measured.threads} threads" if measured.threads > 1 else ""
        said = f"chunk {measured.chunk}{count}, {measured.gain:.1f}x sequential"
        choice = Choice(Vectorized(population, trainer, states, measured.chunk, measured.threads), said)
        if simulation.engine == "auto" and measured.gain < 1:
            choice = Choice(sequential, f"vectorised would be slower: {said}")
    if simulation.engine == "vectorized":
        return choice
    try:
        return in_processes(population, trainer, states, heads, measured) or choice
    except SpecError as error:
        return replace(choice, reason=f"{choice.reason}; {error}")


def handout_for(name: str) -> type[Handout[Any]]:
    """Return the kind of workers of that name; raises MissingExtra where Ray is not installed."""
    if name == "processes":
        return Processes
    from fedcore.simulations.cluster import Cluster

    return Cluster


def ready(
    kind: type[Handout[Any]], population: Population, trainer: Trainer, states: ClientStates
) -> Handout[Any]:
    """Return workers that are ready; raises SpecError where they cannot import or build the task."""
    workers = kind(population, trainer, states)
    workers.ready()
    return workers


def thread_counts(spec: RunSpec) -> tuple[int, ...]:
    """Return with how many threads to try the vectorised engine; more of them change the last bits."""
    simulation, least = spec.simulation, spec.client.threads
    if simulation.workers or simulation.engine != "auto":
        return (simulation.workers or least,)
    return tuple(sorted({least, max(least, cores())}))


def _unfit(engine: str, problem: str) -> str:
    """Return why a task is not vectorised; raises SpecError where it was to be."""
    if engine == "vectorized":
        raise SpecError(f'simulation.engine: "vectorized" cannot train this task: {problem}; use "auto"')
    return f"not vectorised: {problem}"


@dataclass(frozen=True)
class Measured:
    """Seconds a client in both engines, with the best chunk and threads; or what keeps it from being so."""

    sequential: float
    vectorized: float = float("inf")
    chunk: int = 0
    threads: int = 1
    problem: str = ""

    @property
    def gain(self) -> float:
        """How many times as fast the vectorised engine is."""
        return self.sequential / self.vectorized


def first_round(population: Population) -> Ref:
    """Return the work that measurements pretend to."""
    return Ref(population.spec.run.name, 1, 0, "train")


def shortened(
    population: Population, trainer: TorchTrainer, clients: Sequence[str], batches: int
) -> Mapping[str, Examples]:
    """Return the first batches of some clients; all for DP-SGD, whose batches come from everywhere."""
    parts = {client: population.examples(client)[0] for client in clients[: CHUNKS[-1]]}
    if trainer.private:
        return parts
    most = batches * trainer.spec.batch_size
    return {c: PairExamples(*part.batch(slice(0, min(most, len(part))))) for c, part in parts.items()}


def measure(
    population: Population,
    trainer: TorchTrainer,
    heads: Mapping[str, Examples],
    chunks: Sequence[int],
    counts: Sequence[int],
) -> Measured:
    """Train some clients on their first batches in both engines; nothing of it is kept."""
    ref, few = first_round(population), list(heads)[:8]

    def one_by_one() -> None:
        for client in few:
            trainer.train(ref, client, heads[client], {})

    row = trainer.layout.shared_size * trainer.layout.dtype.itemsize
    fits = population.spec.simulation.chunk or max(1, memory_for(trainer.device) // (6 * row))
    best, problem = (float("inf"), 0, 1), obstacle(trainer)
    try:
        for chunk in () if problem else dict.fromkeys(min(c, len(heads), fits) for c in chunks):
            names = tuple(heads)[:chunk]
            stack = Stack.of([heads[c] for c in names])
            tries = []
            for count in counts:
                engine = Vectorized(population, trainer, ClientStates(), chunk, count)
                tries.append((timed(partial(engine.train, ref, names, stack)) / chunk, chunk, count))
            best = min(best, *tries)
            if min(tries)[0] * chunk > MOMENT:
                break
    except (RuntimeError, ValueError, TypeError) as error:  # no batching rule, or one that takes no rows
        problem = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    sequential = timed(lambda: trainer.train(ref, few[0], heads[few[0]], {}))
    if sequential * len(few) < MOMENT:  # of quick clients more, which differ
        sequential = timed(one_by_one) / len(few)
    return Measured(sequential, problem=problem) if problem else Measured(sequential, *best)


def in_processes(
    population: Population,
    trainer: TorchTrainer,
    states: ClientStates,
    heads: Mapping[str, Examples],
    measured: Measured,
) -> Choice | None:
    """Return workers, started and measured; None where they would not pay.

    They train one client after another, or a chunk at a time, whichever is faster. Raises SpecError where
    they cannot import or build the task.
    """
    spec, workers = population.spec, workers_for(population.spec)
    chunks = promising(population, trainer, heads, measured) if workers > 1 else ()
    if spec.client.device != "cpu" or not chunks:
        return None
    engine, gains = ready(Processes, population, trainer, states), dict[int, float]()
    for engine.chunk in chunks:
        even = spec.cohort.size / (workers * engine.chunk * _turns(spec.cohort.size, engine.chunk, workers))
        gains[engine.chunk] = gain_of(engine, trainer, heads, measured) * min(1.0, even)
    engine.chunk = max(gains, key=gains.__getitem__)
    if (gain := gains[engine.chunk]) > max(measured.gain, 1.0):
        why = f"{_unfit('auto', measured.problem)}; " if measured.problem else ""
        said = f", chunk {engine.chunk}" if engine.chunk > 1 else ""
        return Choice(engine, f"{why}{workers} workers{said}, {gain:.1f}x sequential")
    engine.close()
    return None


def promising(
    population: Population, trainer: TorchTrainer, heads: Mapping[str, Examples], measured: Measured
) -> Sequence[int]:
    """Return the chunks with which workers may save more in the run than it takes to start and measure them.

    At best no worker is slower for the others, and the busiest decides.
    """
    spec, client, workers = population.spec, population.spec.client, workers_for(population.spec)
    size, asked = spec.cohort.size, spec.simulation.chunk
    seen, wholes = (
        sum(client.passes(len(part)) * len(part) for part in parts)
        for parts in (heads.values(), [population.examples(name)[0] for name in heads])
    )
    whole = measured.sequential * (1.0 if trainer.private else wholes / max(seen, 1))  # seconds of a client
    alone = whole * size * spec.run.rounds
    fastest = alone / max(measured.gain, 1.0)
    at_best = {}
    if whole >= HEAVY and asked <= 1:
        at_best[1] = alone * _turns(size, 1, workers) / size
    chunk = asked or min(measured.chunk, ceil(size / workers))
    if chunk > 1 and measured.gain > 1:
        at_best[chunk] = fastest * chunk * _turns(size, chunk, workers) / size
    price = PAYS if forkable(spec) else PAYS_SPAWNED
    return [chunk for chunk, seconds in at_best.items() if fastest - seconds >= price]


def _turns(size: int, chunk: int, workers: int) -> int:
    """Return how many chunks of a cohort the busiest worker has in a round."""
    return ceil(ceil(size / chunk) / workers)


def gain_of(
    engine: Handout[Any], trainer: TorchTrainer, heads: Mapping[str, Examples], measured: Measured
) -> float:
    """Return how many times as fast workers train some clients as one after another would be.

    Each worker has a chunk of clients on the first batches that were measured; or one client alone, on as
    many as take a moment.
    """
    if engine.chunk > 1:
        some = dict(list(heads.items())[: engine.chunk * engine.workers])
        return len(some) * measured.sequential / _seconds(engine, trainer, some)
    batches = max(BATCHES, int(BATCHES * MOMENT / 2 / measured.sequential))
    each = shortened(engine.population, trainer, list(heads)[: engine.workers], batches)
    ref, longest = first_round(engine.population), max(each, key=lambda name: len(each[name]))
    share = sum(len(part) for part in each.values()) / max(len(each[longest]), 1)
    seconds = _seconds(engine, trainer, each)
    return share * timed(lambda: trainer.train(ref, longest, each[longest], {})) / seconds


def _seconds(engine: Handout[Any], trainer: TorchTrainer, parts: Mapping[str, Examples]) -> float:
    """Return how long workers take for some clients with these examples."""
    population, size = engine.population, len(engine.population.names)
    plan = train_plan(
        trainer.strategy, population.spec, trainer.layout, first_round(population), tuple(parts), size
    )
    parameters = trainer.parameters()
    if any(len(part) < population.size(name) for name, part in parts.items()):  # to send them takes its time
        population.poison = lambda name, _: parts[name]
    try:
        list(engine.answer(plan, parameters))  # the first time is not like the others
        return timed(lambda: list(engine.answer(plan, parameters)))
    finally:
        population.poison = None


def timed(work: Callable[[], object]) -> float:
    """Return the seconds of the best of some runs, the first of which warms up; of one where it is long."""
    seconds: list[float] = []
    while sum(seconds) < MOMENT and len(seconds) < RUNS:
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
