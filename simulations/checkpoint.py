"""What a run leaves in its folder as it goes on, and how it is taken up from there.

    spec.toml                      the resolved spec
    metrics.jsonl                  a row a round
    state/project                  the folder in which the spec's "module:object" names are searched first
    state/round-12.safetensors     what the server, the attackers and the clients at work know after round 12
    state/clients.db               what clients keep, and which round counts

The commit of the database is the checkpoint: the state file of its round was complete before, and rows that
are later than it are cut off. So a process may die at any moment. Loss of power is not provided for.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from fedcore.errors import ConfigError
from fedcore.interrupts import uninterrupted
from fedcore.layout import Vector
from fedcore.simulations.answers import ClientStates
from fedcore.simulations.at_work import AtWork
from fedcore.simulations.result import write
from fedcore.spec import RunSpec
from fedcore.strategies.checkpoint import group, load_state, save_state
from fedcore.strategies.rounds import State

Row = dict[str, Any]

STATE, CLIENTS, PROJECT = "state", "clients.db", "project"
PAUSE = 1.0  # seconds between two checkpoints, at least
SHARE = 0.1  # of the time, which writing them may take


@dataclass(frozen=True)
class Snapshot:
    """What the next round starts from, but for what clients keep."""

    state: State
    attack: Mapping[str, Vector]
    at_work: AtWork | None


class Journal:
    """Writes the rows of a run as they come, and a checkpoint now and then."""

    def __init__(self, folder: Path, states: ClientStates, project: Path | None) -> None:
        """Write into a folder, from the first row on; whatever run is there is continued or ends here."""
        self.folder, self.states, self.project = folder, states, project
        states.path = folder / STATE / CLIENTS
        self.spec: RunSpec | None = None
        self.rows = self.saved = 0
        self.due = 0.0

    def begin(self) -> None:
        """Forget a run that was in the folder before."""
        if (self.folder / STATE).exists():
            shutil.rmtree(self.folder / STATE)

    def load(self) -> tuple[list[Row], Snapshot]:
        """Return the rows up to the checkpoint, and its snapshot; what is later in the folder is removed.

        Raises ConfigError where a file is missing, or another process goes on with the run.
        """
        number = self.states.file.round
        state, beside = load_state(self._state(number))
        at_work = group("at_work", beside)
        snapshot = Snapshot(state, group("attack", beside), AtWork.of(at_work) if at_work else None)
        path = self.folder / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines()[:number]
        if len(lines) < number:
            raise ConfigError(f"{path} has {len(lines)} rows, expected the {number} of the checkpoint")
        write(path, "".join(f"{line}\n" for line in lines))
        self.rows = self.saved = number
        return [json.loads(line) for line in lines], snapshot

    def keep(self, spec: RunSpec, rows: Sequence[Row], snapshot: Snapshot, last: bool = False) -> None:
        """Write the rows that are new, and a checkpoint if it is time for one, or the last.

        spec: resolved; it may have changed. snapshot: after the last of the rows.
        """
        with uninterrupted():
            if spec is not self.spec:
                (self.folder / STATE).mkdir(parents=True, exist_ok=True)
                write(self.folder / STATE / PROJECT, str(self.project.resolve()) if self.project else "")
                write(self.folder / "spec.toml", spec.to_toml())
                self.spec = spec
            with (self.folder / "metrics.jsonl").open("a" if self.rows else "w", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows[self.rows :])
            self.rows = len(rows)
            if self.saved < self.rows and (last or monotonic() >= self.due):
                self._save(snapshot)

    def _save(self, snapshot: Snapshot) -> None:
        started = monotonic()
        beside = {f"attack/{name}": vector for name, vector in snapshot.attack.items()}
        if snapshot.at_work:
            beside |= {f"at_work/{name}": array for name, array in snapshot.at_work.arrays().items()}
        save_state(self._state(self.rows), snapshot.state, beside)
        self.states.save(self.rows)
        for old in (self.folder / STATE).glob("round-*"):
            if old != self._state(self.rows):
                old.unlink()
        self.saved = self.rows
        self.due = monotonic() + max(PAUSE, (monotonic() - started) / SHARE)

    def _state(self, number: int) -> Path:
        return self.folder / STATE / f"round-{number}.safetensors"
