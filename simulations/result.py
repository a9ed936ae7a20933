"""What a simulation returns and writes."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from fedcore.errors import ConfigError
from fedcore.layout import Layout, Parameters
from fedcore.privacy.claims import promise
from fedcore.spec import RunSpec
from fedcore.strategies.stopping import stopped_early
from fedcore.task import Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import nn

BOOKKEEPING = ("round", "seconds", "virtual_seconds", "folded", "refused", "expected", "staleness")
LOSSES = ("loss", "train_loss")
SPENT = "epsilon"  # of a private run, so far, against whoever receives the model
LAST = (*LOSSES, SPENT)


def metrics_of(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of a row without its bookkeeping: the task's own, the losses, epsilon."""
    metrics = {name: value for name, value in row.items() if name not in BOOKKEEPING}
    last = [name for name in LAST if name in metrics]
    return {name: metrics[name] for name in [*(n for n in metrics if n not in last), *last]}


def clients_of(row: Mapping[str, Any]) -> int:
    """Return how many clients a round had, or, where that is secret, how many were expected."""
    return int(row["folded"] if "folded" in row else row["expected"])


@dataclass(frozen=True)
class Result:
    """A finished run.

    metrics: a row a round, with `round`, `seconds`, `virtual_seconds`, `folded`, `refused`, `train_loss`, in
        buffered runs `staleness`, in private ones `epsilon` (spent so far, against the model's receiver), and
        after an evaluation `loss`, the task's metrics, and the `attack_success` of a backdoor. A round
        whose cohort is secret has `expected` in place of `folded` and `refused`. seconds: of rounds without
        evaluation.
    """

    task: Task
    spec: RunSpec
    layout: Layout
    parameters: Parameters
    metrics: list[Mapping[str, Any]]
    engine: str
    reason: str
    peak_rss_mb: int

    @property
    def final(self) -> dict[str, float]:
        """The last value of every metric."""
        return metrics_of({name: value for row in self.metrics for name, value in row.items()})

    def summary(self) -> dict[str, Any]:
        """Return what `result.json` holds."""
        private = promise(self.spec, len(self.metrics))
        if private["guarantees"]:
            private["epsilon_per_round"] = [row[SPENT] for row in self.metrics if SPENT in row]
        seconds = [row["seconds"] for row in self.metrics]
        folded = [clients_of(row) for row in self.metrics]
        warm = list(zip(folded[1:], seconds[1:], strict=True)) or list(zip(folded, seconds, strict=True))
        return {
            "name": self.spec.run.name,
            "rounds": len(self.metrics),
            "clients": self.spec.simulation.clients,
            "cohort_size": self.spec.cohort.size,
            "engine": self.engine,
            "engine_reason": self.reason,
            "seed": self.spec.run.seed,
            "final": self.final,
            "stopped_early": stopped_early(self.spec.evaluation, self.metrics),
            "encryption": self.spec.encryption.model_dump(include={"updates", "encoding"}),
            "privacy": private,
            "seconds_per_round": seconds,
            "clients_per_second": round(median(n / s for n, s in warm), 1),
            "first_round_seconds": seconds[0],
            "peak_rss_mb": self.peak_rss_mb,
            "parameters": self.layout.shared_size,
            "model_sha256": self.parameters.digest,
        }

    def module(self) -> "nn.Module":
        """Return the task's model with the trained parameters."""
        import torch

        from fedcore.client.module import Resident
        from fedcore.client.trainer import initial_seed

        local = {entry.name for entry in self.layout.entries if entry.kind == "local"}
        resident = Resident(self.task, initial_seed(self.spec.run.seed), personal=lambda _: local)
        resident.load(*(torch.from_numpy(vector.copy()) for vector in self.parameters.vectors().values()))
        return resident.module

    def plot(self) -> "Figure":
        """Return a matplotlib figure of the metrics over the rounds."""
        from fedcore.simulations.report import figure

        return figure(self.metrics)

    def save(self, folder: Path) -> None:
        """Write spec.toml, metrics.jsonl, result.json, model.safetensors and report.html."""
        from fedcore.model_files import save_model
        from fedcore.simulations.report import report

        folder.mkdir(parents=True, exist_ok=True)
        write(folder / "spec.toml", self.spec.to_toml())
        write(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in self.metrics))
        write(folder / "result.json", json.dumps(self.summary(), indent=2) + "\n")
        save_model(folder / "model.safetensors", self.layout, self.parameters)
        write(folder / "report.html", report(self.summary(), self.metrics, self.spec))


def write(path: Path, text: str) -> None:
    """Write a text, all of it or nothing."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def make_folder(folder: Path) -> None:
    """Make the folder of a run's results; raises ConfigError where another run's are in it."""
    if any((folder / name).exists() for name in ("metrics.jsonl", "result.json", "grid.json")):
        raise ConfigError(f"{folder} holds the results of another run; name another folder with --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"{error.strerror}; name a folder that can be written with --out"
        raise ConfigError(f"{folder}: {reason}") from error
