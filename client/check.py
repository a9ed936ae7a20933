"""`fedcore client check`: what this device would do in a round, without contacting anybody."""

import resource
import time
from collections import Counter
from contextlib import chdir
from dataclasses import dataclass

import numpy as np

from fedcore.client.config import Config, Terms
from fedcore.client.examples import Examples, PairExamples
from fedcore.client.worker import Job
from fedcore.crypto.secagg.config import SMALLEST
from fedcore.errors import ConfigError, DataError, TaskError, nearest
from fedcore.messages import Ref
from fedcore.spec import RunSpec
from fedcore.task import digest, resolve

STEP = Ref("check", 1, 0, "train")
MAX_LABELS = 100  # more distinct targets are no classes, and a histogram of them says nothing


@dataclass(frozen=True)
class Report:
    """What was found; everything but `sends` stays on this device.

    labels: target -> how many training examples have it; empty where targets are no whole numbers.
    sends: for each vector of an update its name, length and bytes. scalars: name -> value of this step.
    readers: who may read that at worst, by [policy] encryption. memory_mb: this process's peak resident size.
    """

    task: str
    digest: str
    train: int
    test: int
    labels: dict[str, int]
    seconds_loading: float
    seconds_step: float
    memory_mb: float
    sends: list[tuple[str, int, int]]
    scalars: dict[str, float]
    readers: str


def check(config: Config, task: str | None, client: str) -> list[Report]:
    """Load the data of one or all tasks of agent.toml and train one batch of each.

    client: the name that the data are made for. Raises ConfigError where no such task is allowed, and
    TaskError or DataError, naming the line of agent.toml, where one cannot be imported or has no examples.
    """
    tasks = config.settings.tasks
    if task is not None and task not in tasks:
        raise ConfigError(f"{config.place('tasks')}: task {task!r} is not allowed{nearest(task, tasks)}")
    if not tasks and not config.apps:
        raise ConfigError(f'{config.place("tasks")}: no task is allowed; add one as NAME = "module:object"')
    with chdir(config.folder):
        return [_check(config, name, client) for name in ([task] if task else tasks)]


def _check(config: Config, name: str, client: str) -> Report:
    try:
        task = resolve(config.settings.tasks[name], config.folder)
    except TaskError as error:
        raise TaskError(f"{config.place('tasks', name)}: {error}") from error
    job = Job(task, RunSpec(), client, config.settings.data, config.settings.evaluator)
    trainer, started = job.trainer, time.perf_counter()
    try:
        split = job.examples
    except DataError as error:
        raise DataError(f"{config.place('data')}: {error}") from error
    loaded = time.perf_counter()
    evaluates = config.settings.evaluator
    examples = split.test if evaluates else split.train
    if not examples:
        raise DataError(f"{config.place('data')}: {name} has no examples here; expected at least one")
    batch = PairExamples(*examples.batch(slice(0, min(job.spec.client.batch_size, len(examples)))))
    update = trainer.evaluate(batch, {}) if evaluates else trainer.train(STEP, client, batch, {})[0]
    stepped = time.perf_counter()
    return Report(
        task=name,
        digest=digest(task),
        train=len(split.train),
        test=len(split.test or ()),
        labels=labels(examples),
        seconds_loading=loaded - started,
        seconds_step=stepped - loaded,
        memory_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        sends=[(name, len(vector), vector.nbytes) for name, vector in update.vectors.items()],
        scalars=dict(update.scalars),
        readers=readers(config.settings.policy),
    )


def readers(terms: Terms) -> str:
    """Return who may read an update at worst, by what the policy accepts."""
    fewest = max(SMALLEST, terms.smallest_cohort)
    return {
        "tls": "the coordinator, which may also keep it",
        "sealed": "the coordinator, in its memory alone until the round closes",
        "secagg": f"nobody; the coordinator sees sums over {fewest} clients or more",
    }[terms.encryption]


def labels(examples: Examples) -> dict[str, int]:
    """Return how many examples have each target; nothing where targets are no classes."""
    counts: Counter[int] = Counter()
    for start in range(0, len(examples), 1024):
        targets = np.asarray(examples.batch(slice(start, min(start + 1024, len(examples))))[1])
        if targets.ndim != 1 or not np.issubdtype(targets.dtype, np.integer):
            return {}
        counts.update(targets.tolist())
    return {str(label): counts[label] for label in sorted(counts)} if len(counts) <= MAX_LABELS else {}
