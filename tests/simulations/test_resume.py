"""A run that was cut short and continued has the bits of one that never stopped."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedcore
from fedcore.errors import ConfigError, RunFailed, SpecError
from fedcore.layout import Vector
from fedcore.simulations import checkpoint
from fedcore.simulations.checkpoint import Journal
from fedcore.simulations.result import Result
from fedcore.simulations.resume import left, resume
from fedcore.simulations.run import Progress, Simulation, simulate
from fedcore.spec import RunSpec

pytestmark = pytest.mark.slow  # together more than ten seconds

CLIENTS, ROUNDS = 12, 6


class Blobs(fedcore.Task):
    """Two clouds of points, told apart by a small network."""

    def model(self) -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(output, target)

    def dataset(self) -> fedcore.ArrayDataset:
        rng = np.random.default_rng(5)
        y = rng.integers(0, 2, 240)
        return fedcore.ArrayDataset((rng.normal(size=(240, 3)) + y[:, None]).astype(np.float32), y)

    def holdout(self) -> fedcore.ArrayDataset:
        return self.dataset().take(np.arange(40))

    def root(self) -> fedcore.ArrayDataset:
        return self.dataset().take(np.arange(20))


class Normed(Blobs):
    """The same with buffers."""

    def model(self) -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))


PRIVATE: dict[str, Any] = {"level": "client", "noise_multiplier": 1.0, "delta": 1e-3, "population": CLIENTS}
QUIET: dict[str, Any] = {"evaluation": {"where": "holdout"}}
RUNS: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "momentum, cosine": {"strategy": {"optimizer": {"name": "sgd", "momentum": 0.9}}}
    | {"client": {"schedule": "cosine", "batch_size": 4}},
    "scaffold": {"strategy": {"name": "scaffold"}},
    "personal": {"strategy": {"algorithm": "fedper"}},
    "masked": {
        "encryption": {"updates": "secagg", "encoding": "q32"},
        "limits": {"norm": 1.0, "weight": 100},
    },
    "oort": {"strategy": {"sampler": "oort"}, "simulation": {"speed": "lognormal"}},
    "mimic": {"strategy": {"name": "median"}, "attack": {"name": "mimic", "fraction": 0.25, "warmup": 4}},
    "fltrust": {"strategy": {"aggregator": "fltrust"}, **QUIET},
    "centred": {"strategy": {"aggregator": "centered_clipping"}},
    "buffered": {
        "strategy": {"name": "fedbuff", "k": 2, "algorithm": "client_momentum"},
        "simulation": {"speed": "lognormal"},
    },
    "asynchronous": {
        "strategy": {"mode": "asynchronous", "aggregator": "mean"},
        "simulation": {"speed": "lognormal"},
        "attack": {"name": "mimic", "fraction": 0.25, "warmup": 4},
    },
    "adaptive": {"cohort": {"size": 11}, "privacy": {**PRIVATE, "adaptive": True}, **QUIET},
    "tree": {"privacy": {"level": "tree", "noise_multiplier": 1.0, "delta": 1e-3, "separation": 2}, **QUIET},
    "noisy metrics": {"privacy": {**PRIVATE, "metric_noise": 5.0}},
    "local": {"privacy": {"level": "local", "noise_multiplier": 1.0, "delta": 1e-3}, **QUIET},
}


@pytest.fixture(autouse=True)
def _no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw no pictures, which take longer than these runs."""
    monkeypatch.setattr("fedcore.simulations.report.report", lambda *_: "")


def spec(name: str, engine: str = "sequential", **run: Any) -> RunSpec:
    given: dict[str, Any] = {
        "run": {"seed": 2, "rounds": ROUNDS, **run},
        "cohort": {"size": 4},
        "client": {"batch_size": 4},
        "simulation": {"clients": CLIENTS, "engine": engine, "chunk": 3},
    }
    tables = RUNS[name]
    return RunSpec.parse({key: {**given.get(key, {}), **tables.get(key, {})} for key in {**given, **tables}})


def stopped(round: int, ended: bool = False) -> Callable[[Progress], None]:
    """Return a progress that interrupts when some clients of a round have trained, or when it has ended."""

    def progress(at: Progress) -> None:
        if at.round == round and bool(at.row) == ended:
            raise KeyboardInterrupt

    return progress


def interrupt(task: fedcore.Task, given: RunSpec, out: Path, round: int, ended: bool = False) -> None:
    with pytest.raises(KeyboardInterrupt):
        simulate(task, given, out=out, progress=stopped(round, ended))


def content(result: Result) -> Mapping[str, Any]:
    """Return all of a result that does not depend on a clock."""
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in result.metrics]
    return {"model": result.parameters.digest, "rows": rows, "spec": result.spec}


def bits(arrays: Mapping[str, Vector]) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in arrays.items()}


@pytest.mark.parametrize("engine", ["sequential", "vectorized"])
@pytest.mark.parametrize("name", RUNS)
def test_an_interrupted_run_continues_to_the_same_bits(name: str, engine: str, tmp_path: Path) -> None:
    given, task = spec(name, engine), Blobs()
    straight = simulate(task, given)
    interrupt(task, given, tmp_path, 3)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    with pytest.raises(KeyboardInterrupt):
        resume(tmp_path, task, progress=stopped(5))
    continued = resume(tmp_path, task)
    assert content(continued) == content(straight)
    assert continued.spec.simulation.engine == engine
    rows = [json.loads(row) for row in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == json.loads(json.dumps(continued.metrics))
    written = json.loads((tmp_path / "result.json").read_text())
    assert (written["rounds"], written["model_sha256"]) == (ROUNDS, straight.parameters.digest)


def test_all_that_a_run_keeps_is_restored(tmp_path: Path) -> None:
    """Were a part of it not there, the test above might pass by chance."""
    found = set()
    for name in ("scaffold", "oort", "mimic", "buffered", "adaptive", "tree", "momentum, cosine"):
        folder = tmp_path / name
        interrupt(Blobs(), spec(name), folder, 3)
        run = Simulation(Blobs(), left(folder)[0])
        rows, snapshot = Journal(folder, run.states, None).load()
        run.restore(rows, snapshot)
        whole = Simulation(Blobs(), spec(name))
        for _ in zip(range(2), whole.rounds(lambda _: None), strict=False):
            pass
        assert bits(run.state.vectors) == bits(whole.state.vectors)
        assert run.state.memory == whole.state.memory
        assert [bits(run.states[c]) for c in whole.population.names] == [
            bits(whole.states[c]) for c in whole.population.names
        ]
        found |= set(run.state.vectors) | {key for known in run.state.memory.values() for key in known}
        found |= {key for client in whole.states.states for key in whole.states[client]}
        if whole.adversary and run.adversary:
            assert bits(run.adversary.state) == bits(whole.adversary.state)
            found |= set(run.adversary.state)
        if whole.workers and run.workers:
            one, other = run.workers.now, whole.workers.now
            assert (one.clock, one.queue, one.started) == (other.clock, other.queue, other.started)
            assert bits(one.arrays()) == bits(other.arrays())
            assert any(version.trained for version in one.versions.values())
            found.add("at work")
        run.states.close()
    assert found >= {"optimizer.velocity", "seconds", "control", "mu", "z", "momentum", "at work"}
    assert found >= {"privacy.clip", "privacy.key"}


def test_the_noise_of_every_device_goes_on(tmp_path: Path) -> None:
    """DP-SGD draws batches and noise by (seed, round, client), and keeps nothing in between."""
    privacy = {"level": "example", "noise_multiplier": 1.0, "delta": 1e-3, "sampling_rate": 0.25}
    given = spec("fltrust").with_('strategy="fedavg"').model_dump() | {"privacy": privacy}
    straight = simulate(Blobs(), RunSpec.parse(given))
    interrupt(Blobs(), RunSpec.parse(given), tmp_path, 4)
    continued = resume(tmp_path, Blobs())
    assert content(continued) == content(straight)
    assert continued.metrics[-1]["epsilon"] > continued.metrics[2]["epsilon"] > 0


def test_a_model_with_buffers_continues_to_the_same_bits(tmp_path: Path) -> None:
    straight = simulate(Normed(), spec("fedavg"))
    interrupt(Normed(), spec("fedavg"), tmp_path, 4)
    assert content(resume(tmp_path, Normed())) == content(straight)


@pytest.mark.parametrize("name", ["personal", "buffered"])
def test_an_evaluation_that_was_interrupted_leaves_no_trace_of_its_round(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By then the model has moved, and clients have committed what they keep."""
    straight = simulate(Blobs(), spec(name))
    evaluate = Simulation.evaluate

    def interrupted(self: Simulation, number: int) -> dict[str, float]:
        if number == 3:
            raise KeyboardInterrupt
        return evaluate(self, number)

    monkeypatch.setattr(Simulation, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        simulate(Blobs(), spec(name), out=tmp_path)
    monkeypatch.undo()
    assert left(tmp_path)[2] == 2
    assert content(resume(tmp_path, Blobs())) == content(straight)


def test_a_round_that_has_ended_is_kept_even_if_nobody_could_be_told(tmp_path: Path) -> None:
    interrupt(Blobs(), spec("scaffold"), tmp_path, 3, ended=True)
    assert left(tmp_path)[2] == 3
    assert content(resume(tmp_path, Blobs())) == content(simulate(Blobs(), spec("scaffold")))


def test_an_error_keeps_the_rounds_before_it(tmp_path: Path) -> None:
    def failing(at: Progress) -> None:
        if at.round == 4:
            raise RunFailed("no more")

    with pytest.raises(RunFailed):
        simulate(Blobs(), spec("scaffold"), out=tmp_path, progress=failing)
    assert content(resume(tmp_path, Blobs())) == content(simulate(Blobs(), spec("scaffold")))


STEPS = ("save_state", "ClientStates.save", "StatesFile.commit", "Path.unlink")


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("step", STEPS)
def test_a_death_at_any_step_of_a_checkpoint_leaves_the_old_one_or_the_new(
    step: str, after: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the third checkpoint on a step raises before or after its work, and nothing is done any more."""
    monkeypatch.setattr(checkpoint, "PAUSE", 0.0)
    monkeypatch.setattr(checkpoint, "SHARE", 1e9)
    straight = simulate(Blobs(), spec("scaffold"))
    from fedcore.simulations.answers import ClientStates
    from fedcore.simulations.states_file import StatesFile

    homes = {"ClientStates": ClientStates, "StatesFile": StatesFile, "Path": Path}
    home, _, function = step.rpartition(".")
    place: Any = homes.get(home, checkpoint)
    genuine, calls = getattr(place, function), []

    class Died(BaseException):
        pass

    def dying(*arguments: Any, **options: Any) -> None:
        calls.append(step)
        if len(calls) < 3:
            genuine(*arguments, **options)
            return
        if after and len(calls) == 3:
            genuine(*arguments, **options)
        raise Died

    monkeypatch.setattr(place, function, dying)
    monkeypatch.setattr(Result, "save", lambda self, folder: None)
    with pytest.raises(Died):
        simulate(Blobs(), spec("scaffold"), out=tmp_path)
    monkeypatch.undo()
    assert 2 <= left(tmp_path)[2] <= 4
    assert content(resume(tmp_path, Blobs())) == content(straight)
    assert [path.name for path in (tmp_path / "state").glob("round-*")] == [f"round-{ROUNDS}.safetensors"]


TASK = """
from fedcore.tasks import Digits

class Mine(Digits):
    pass
"""
KILLED = """\
[run]
name = "killed"
task = "mine:Mine"
rounds = 120

[cohort]
size = 10

[strategy]
name = "scaffold"

[evaluation]
every = 10

[simulation]
clients = 30
engine = "sequential"
"""
EVERY_ROUND = """
import sys
from fedcore.simulations import answers, checkpoint
checkpoint.PAUSE, checkpoint.SHARE, answers.ClientStates.__init__.__defaults__ = 0.0, 1e9, (1 << 18, None)
from fedcore.cli import main
main()
"""


@pytest.mark.slow
def test_kill_9_at_any_moment_costs_no_more_than_the_rounds_since_the_checkpoint(tmp_path: Path) -> None:
    """A process that does little but write checkpoints, with a few clients in memory, dies often.

    The task lies beside the spec, which nothing that continues the run is told.
    """
    project, out = tmp_path / "project", tmp_path / "out"
    project.mkdir()
    (project / "mine.py").write_text(TASK)
    (project / "run.toml").write_text(KILLED)
    command = [sys.executable, "-c", EVERY_ROUND, "simulate"]
    first = [*command, str(project / "run.toml"), "--out", str(out)]
    again = [*command, "--resume", str(out)]
    metrics, rng = out / "metrics.jsonl", np.random.default_rng()
    done = 0
    for _ in range(4):
        with subprocess.Popen(again if done else first, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr
            while not process.stderr.readline().startswith(f"round {done + 3:>3}/"):
                assert process.poll() is None
            time.sleep(rng.uniform(0, 0.1))
            process.send_signal(signal.SIGKILL)
        rows = len(metrics.read_text().splitlines())
        before, done = done, left(out)[2]
        assert before + 2 <= done <= rows <= done + 1, "a checkpoint a round"
    assert done < 120, "the last kill came too late to show anything"
    result = subprocess.run([*again, "--json"], capture_output=True, text=True, check=True, timeout=300)
    from fedcore.tasks import Digits

    straight = simulate(Digits(), RunSpec.load(project / "run.toml"))
    shown = json.loads(result.stdout)
    assert shown["model_sha256"] == straight.parameters.digest
    rows_of = [json.loads(row) for row in metrics.read_text().splitlines()]
    assert [{**row, "seconds": 0} for row in rows_of] == [{**row, "seconds": 0} for row in straight.metrics]
    assert shown["rounds"] == 120


def test_a_checkpoint_a_second_at_most_and_one_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, saved = [100.0], []
    save = Journal._save

    def noted(self: Journal, snapshot: checkpoint.Snapshot) -> None:
        save(self, snapshot)
        saved.append(self.saved)

    def progress(at: Progress) -> None:
        clock[0] += 0.4 * bool(at.row)

    monkeypatch.setattr(checkpoint, "monotonic", lambda: clock[0])
    monkeypatch.setattr(Journal, "_save", noted)
    simulate(Blobs(), spec("fedavg"), out=tmp_path, progress=progress)
    assert saved == [1, 4, 6]


def test_a_finished_run_gives_its_result_again_and_goes_on_if_asked(tmp_path: Path) -> None:
    """With the last round's evaluation, which a longer run would not have made."""
    given = spec("scaffold", rounds=4)
    finished = simulate(Blobs(), given, out=tmp_path)
    assert content(resume(tmp_path, Blobs())) == content(finished)
    assert content(resume(tmp_path, Blobs(), rounds=6)) == content(simulate(Blobs(), spec("scaffold")))
    assert left(tmp_path)[0].run.rounds == 6


@pytest.mark.parametrize(
    ("name", "rounds", "message"),
    [
        ("fedavg", 2, "run.rounds = 2, but 3 rounds are done; expected at least 3"),
        ("momentum, cosine", 9, 'client.schedule = "cosine" ends with round 6'),
        ("tree", 9, "the noise and the epsilon of this run are those of 6 rounds"),
    ],
)
def test_a_length_that_would_change_what_was_done_is_refused(
    name: str, rounds: int, message: str, tmp_path: Path
) -> None:
    interrupt(Blobs(), spec(name), tmp_path, 4)
    with pytest.raises(SpecError, match=message):
        resume(tmp_path, Blobs(), rounds=rounds)
    resume(tmp_path, Blobs(), rounds=6)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run that can be continued; expected a folder"):
        resume(tmp_path, Blobs())
    interrupt(Blobs(), spec("fedavg"), tmp_path, 4)
    with pytest.raises(ConfigError, match="the run's model has 26 parameters and that of Line 2; continue"):
        resume(tmp_path, Line())
    metrics = tmp_path / "metrics.jsonl"
    rows = metrics.read_text()
    metrics.write_text(rows.partition("\n")[0])
    with pytest.raises(ConfigError, match="has 1 rows, expected the 3 of the checkpoint"):
        resume(tmp_path, Blobs())
    metrics.write_text(rows)
    (tmp_path / "state" / "clients.db").write_bytes(b"x" * 4096)
    with pytest.raises(ConfigError, match="expected states that fedcore wrote: file is not a database"):
        resume(tmp_path, Blobs())


class Line(Blobs):
    def model(self) -> torch.nn.Module:
        return torch.nn.Linear(1, 1)


def test_two_processes_do_not_continue_the_same_run(tmp_path: Path) -> None:
    interrupt(Blobs(), spec("fedavg"), tmp_path, 4)
    run = Simulation(Blobs(), left(tmp_path)[0])
    Journal(tmp_path, run.states, None).load()
    with pytest.raises(ConfigError, match="another process goes on with this run"):
        resume(tmp_path, Blobs())
    run.states.close()
    resume(tmp_path, Blobs())


def test_a_new_run_in_an_old_folder_owes_it_nothing(tmp_path: Path) -> None:
    interrupt(Blobs(), spec("scaffold"), tmp_path, 5)
    interrupt(Blobs(), spec("scaffold", seed=3), tmp_path, 3)
    assert content(resume(tmp_path, Blobs())) == content(simulate(Blobs(), spec("scaffold", seed=3)))
