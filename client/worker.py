"""The training process: `python -m fedcore.client.worker`, JSON lines in and out.

    {"do": "describe", "folder": ..., "tasks": {name: "module:object"}}  -> {name: digest}
    {"do": "work", "task": ..., "digest": ..., "spec": ..., "layout": ..., "ref": [run, round, attempt, kind],
     "client": ..., "options": {...}, "evaluator": ..., "parameters": path, "kept": path, "keep": path,
     "out": path, "clip": norm, "cohort": clients, "encryption": ..., "public": hex, "bound": hex}
        -> {"vectors": [[name, length], ...], "scalars": {...}, "words": [...], "sha256": ..., "size": ...}

`kept` is what the client kept of earlier rounds, if there is such a file; what it would keep of this one goes
to `keep`. A sealed update is sealed to `public` and bound to `bound`; of one that will be masked, `words`
says how its words lie in `out`. Both have neither vectors nor scalars in the reply.
"""

import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedcore.client.examples import Examples, examples_from
from fedcore.client.kept import load_kept, save_kept
from fedcore.client.serving import Message, Unfit, main
from fedcore.client.training import Kept, Trainer, trainer_for, uses_torch
from fedcore.data import Split
from fedcore.errors import SpecError, TaskError, UpdateRefused
from fedcore.layout import Layout, Parameters
from fedcore.messages import Plan, Ref, Update
from fedcore.metrics import names
from fedcore.privacy.levels import OFF, ExampleLevel
from fedcore.seeds import generator
from fedcore.spec import RunSpec
from fedcore.strategies import Strategy
from fedcore.strategies.catalog import strategy_of
from fedcore.strategies.privacy import released
from fedcore.strategies.rounds import evaluate_plan, train_plan
from fedcore.strategies.terms import Rows, check
from fedcore.strategies.words import encoded
from fedcore.task import Client, Task, digest, resolve
from fedcore.wire import sealing


@dataclass(frozen=True)
class Job:
    """A task of this device under one run's spec; trainer and data are made once and stay."""

    task: Task
    spec: RunSpec
    client: str
    options: Mapping[str, Any]
    evaluator: bool

    @cached_property
    def strategy(self) -> Strategy:
        """The run's; raises UpdateRefused where a part of it is not installed here."""
        try:
            return strategy_of(self.spec)
        except SpecError as error:
            raise UpdateRefused(f"{error}; install it on this device too") from error

    @cached_property
    def trainer(self) -> Trainer:
        """What trains, with as many torch threads as the spec says; raises UpdateRefused where it cannot."""
        if uses_torch(self.task):
            import torch

            torch.set_num_threads(self.spec.client.threads)
        # What hides a device's examples must not follow from the run's seed, which the coordinator knows.
        entropy = None if self.spec.privacy == OFF else secrets.randbits(256)
        try:
            return trainer_for(self.task, self.spec, entropy=entropy)
        except SpecError as error:
            raise UpdateRefused(str(error)) from error

    @cached_property
    def examples(self) -> Split[Examples]:
        """What the client holds: the task's data, or its central test set where this is an evaluator."""
        if self.evaluator:
            split: Split[Any] = Split(None, self.task.holdout())
        else:
            rng = generator(self.spec.run.seed, "data", self.client)
            split = self.task.data(Client(self.client, None, rng, self.options))
        return Split(self._examples(split.train), self._examples(split.test))

    def _examples(self, data: Any) -> Examples:
        if not uses_torch(self.task):
            return examples_from(data, device=None)
        from fedcore.client.trainer import device_of

        return examples_from(data, device_of(self.spec.client))

    @cached_property
    def root(self) -> Examples:
        """The data that the server trusts; raises UpdateRefused where an evaluator has none."""
        examples = self._examples(self.task.root())
        if not len(examples):
            raise UpdateRefused(f"{self.task.name}.root() returned nothing; expected some clean examples")
        return examples

    def work(self, ref: Ref, parameters: Parameters, kept: Kept, clip: float) -> tuple[Update, Kept]:
        """Train or evaluate from the parameters of a round; return what is sent, and what is kept of it.

        clip: the clip norm of a private round.
        """
        self.trainer.receive(parameters)
        update, state = self.measure(ref, kept)
        if self.spec.privacy == OFF or (self.evaluator and ref.kind == "evaluate"):  # on the operator's data
            return update, state
        rng = generator("device noise", secrets.randbits(256))
        made = self.plan(ref, 1, clip).distributed if ref.kind == "train" else None
        (sent,) = released(self.strategy, ref.kind, Rows.of([update]), clip, [rng], made).updates()
        return sent, state

    def measure(self, ref: Ref, kept: Kept) -> tuple[Update, Kept]:
        """Train or evaluate, and return all that came of it."""
        if ref.kind == "train":
            if isinstance(self.spec.privacy, ExampleLevel):
                # Asked twice for one piece of work, from other parameters, the noise must be another too:
                # equal noise would cancel in the difference. DP-SGD draws it by the attempt's number.
                ref = replace(ref, attempt=secrets.randbits(63))
            return self.trainer.train(ref, self.client, self.examples.train, kept)
        if ref.kind == "root":  # under the name that it has in a simulation, and it keeps nothing
            return self.trainer.train(ref, "root", self.root, {})[0], {}
        assert self.examples.test is not None
        return self.trainer.evaluate(self.examples.test, kept), {}

    def plan(self, ref: Ref, cohort: int, clip: float) -> Plan:
        """Return the plan of a round with so many clients, by this device's own copy of what decides it."""
        if cohort > self.spec.cohort.asked:
            asked = self.spec.cohort.asked
            raise UpdateRefused(f"{ref} is said to have {cohort} clients; the run asks {asked} at most")
        clients = tuple(map(str, range(cohort)))
        if ref.kind == "evaluate":
            return evaluate_plan(self.spec, ref, clients, names(self.task.metrics))
        return train_plan(self.strategy, self.spec, self.trainer.layout, ref, clients, cohort, clip)


class Worker:
    """The tasks of this device, and the job of the present run."""

    def __init__(self) -> None:
        """Know no task until `describe`."""
        self.tasks: dict[str, Task] = {}
        self.key: object = None
        self.job: Job

    def describe(self, folder: str, tasks: Mapping[str, str]) -> dict[str, str]:
        """Import the tasks and return the digest of each; raises TaskError, naming the key in agent.toml."""
        for name, reference in tasks.items():
            try:
                self.tasks[name] = resolve(reference, Path(folder))
            except TaskError as error:
                raise TaskError(f"tasks.{name}: {error}") from error
            if self.tasks[name].name != name:
                raise TaskError(
                    f"tasks.{name}: {reference!r} is named {self.tasks[name].name!r}; "
                    f'expected {self.tasks[name].name} = "{reference}"'
                )
        return {name: digest(task) for name, task in self.tasks.items()}

    def work(
        self,
        task: str,
        digest: str,
        spec: str,
        ref: list[Any],
        parameters: str,
        kept: str,
        keep: str,
        out: str,
        layout: str,
        clip: float,
        cohort: int,
        encryption: str,
        public: str,
        bound: str,
        **of: Any,
    ) -> Message:
        """Train or evaluate, write what is kept and what is sent, and return the update's head."""
        if self.key != (key := (task, digest, spec, ref[0])):
            self.job = self.prepare(task, digest, RunSpec.model_validate_json(spec), **of)
            self.key = key
        extra = self.job.strategy.algorithm.receives
        own = self.job.trainer.layout
        if own.digest != layout:
            raise UpdateRefused(
                f"the model of {task} has layout {own.digest[:12]}... here and {layout[:12]}... in the "
                f"run; install the same versions of the task and of what it imports on both sides"
            )
        received = read(Path(parameters), own, extra)
        try:
            update, state = self.job.work(Ref(*ref), received, load_kept(Path(kept)), clip)
        except Exception:
            self.key = None  # a trainer that was interrupted amid a step may hold half of it
            raise
        save_kept(Path(keep), state)
        return written(self.job.plan(Ref(*ref), cohort, clip), update, Path(out), encryption, public, bound)

    def prepare(self, task: str, announced: str, spec: RunSpec, **of: Any) -> Job:
        """Return the job of a run, if the task's files are still those that the agent announced."""
        if digest(self.tasks[task]) != announced:
            raise UpdateRefused(f"the files of {task} have changed since the agent started; start it again")
        return Job(self.tasks[task], spec, **of)


def read(path: Path, layout: Layout, extra: Sequence[str] = ()) -> Parameters:
    """Return the parameters in a blob, little-endian; `extra` names what lies behind the model."""
    size, expected = path.stat().st_size, layout.blob_size(extra)
    if size != expected:
        raise UpdateRefused(f"the parameters have {size} bytes, the layout needs {expected}")
    return Parameters.of_blob(np.fromfile(path, layout.dtype.newbyteorder("<")), layout, extra)


def written(plan: Plan, update: Update, path: Path, encryption: str, public: str, bound: str) -> Message:
    """Write an update plain, sealed, or as words that the agent will mask; return its head.

    Raises Unfit where the coordinator would refuse it: training that diverged is not an offence.
    """
    try:
        check(plan, update)
    except UpdateRefused as error:
        raise Unfit(str(error)) from error
    head: Message = {"vectors": [], "scalars": {}, "words": []}
    if encryption == "tls":
        head["vectors"] = [[name, len(vector)] for name, vector in update.vectors.items()]
        head["scalars"] = dict(update.scalars)
        return head | write(update.vectors.values(), path)
    if encryption == "sealed":
        sealed = sealing.seal(bytes.fromhex(public), sealing.packed(plan, update), bytes.fromhex(bound))
        return head | write((np.frombuffer(part, np.uint8) for part in sealed), path)
    words = encoded(plan, update)
    head["words"] = list(plan.sizes)
    return head | write([words.narrow, words.wide], path)


def write(arrays: Iterable[NDArray[Any]], path: Path) -> Message:
    """Write arrays one after the other, little-endian; return what the file is."""
    state, size = sha256(), 0
    part = path.with_name(f"{path.name}.part")
    with part.open("wb") as file:
        for array in arrays:
            data = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).view(np.uint8)
            state.update(data.data)
            size += file.write(data.data)
    os.replace(part, path)
    return {"sha256": state.hexdigest(), "size": size}


if __name__ == "__main__":
    worker = Worker()
    main({"describe": worker.describe, "work": worker.work})
