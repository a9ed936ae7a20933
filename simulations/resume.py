"""Continuing a run from what it left in its folder."""

from contextlib import closing
from pathlib import Path

from fedcore.errors import ConfigError, SpecError
from fedcore.privacy.levels import Off
from fedcore.simulations.checkpoint import CLIENTS, PROJECT, STATE, Journal
from fedcore.simulations.result import Result
from fedcore.simulations.run import Show, Simulation, drive
from fedcore.simulations.states_file import StatesFile
from fedcore.spec import Cosine, RunSpec
from fedcore.task import Task, resolve


def resume(
    out: str | Path,
    task: Task | None = None,
    *,
    rounds: int = 0,
    progress: Show = lambda _: None,
) -> Result:
    """Continue the run in a folder from its last checkpoint, and return the whole run's result.

    The result is that of a run that never stopped, to the same bits; one that was finished gives its result
    again. task: as in `simulate`; it must be the one that the run began with. rounds: of the whole run, in
    place of the spec's. Raises ConfigError where nothing can be continued, and SpecError where the run cannot
    have so many rounds.
    """
    spec, project, _ = left(Path(out), rounds)
    simulation = Simulation(task or resolve(spec.run.task, project), spec, project)
    journal = Journal(Path(out), simulation.states, project)
    with closing(simulation):
        simulation.restore(*journal.load())
        return drive(simulation, journal, progress)


def left(folder: Path, rounds: int = 0) -> tuple[RunSpec, Path | None, int]:
    """Return what a run left: its spec, where its project lies, if anywhere, and how many rounds are done.

    rounds: of the whole run, in place of the spec's; 0: the spec's. Raises ConfigError where nothing can be
    continued, and SpecError where the run cannot have another length.
    """
    clients = folder / STATE / CLIENTS
    if not clients.exists():
        raise ConfigError(
            f"{folder} holds no run that can be continued; expected a folder that `fedcore simulate --out` "
            "wrote, with at least one round in it"
        )
    with closing(StatesFile(clients)) as file:
        done = file.round
    spec = RunSpec.load(folder / "spec.toml")
    if rounds and rounds != spec.run.rounds:
        _check_length(spec, rounds, done)
        spec = spec.with_(f"run.rounds={rounds}")
    project = (folder / STATE / PROJECT).read_text(encoding="utf-8")
    return spec, Path(project) if project else None, done


def _check_length(spec: RunSpec, rounds: int, done: int) -> None:
    """Raise SpecError unless so many rounds are a run of this spec in another length."""
    if rounds < done:
        raise SpecError(f"run.rounds = {rounds}, but {done} rounds are done; expected at least {done}")
    if isinstance(spec.client.schedule, Cosine):
        raise SpecError(
            f'client.schedule = "cosine" ends with round {spec.run.rounds}, and earlier rounds went by it; '
            f"leave run.rounds as it is, or start anew with run.rounds = {rounds}"
        )
    if not isinstance(spec.privacy, Off):
        raise SpecError(
            f"the noise and the epsilon of this run are those of {spec.run.rounds} rounds "
            f'(privacy.level = "{spec.privacy.level}"); leave run.rounds as it is, or start anew with '
            f"run.rounds = {rounds}"
        )
