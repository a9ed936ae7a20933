"""The engine of worker processes: the sequential engine's bits, and nothing left whatever happens."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

import fedcore
from fedcore.errors import RunFailed, SpecError
from fedcore.simulations.answers import Answers
from fedcore.simulations.mapped import Mapped
from fedcore.simulations.processes import Processes, forkable, workers_for
from fedcore.simulations.run import Simulation
from fedcore.strategies.rounds import train_plan
from fedcore.task import resolve
from tests.simulations import handed
from tests.simulations.handed import played, spec

pytestmark = pytest.mark.slow  # together more than ten seconds

MODULE = '''
class Sized(Ragged):
    """With a wider model, too large to be sent with others."""

    def model(self):
        return nn.Sequential(nn.Linear(6, 4000), nn.ReLU(), nn.Linear(4000, 3))

class Broken(Ragged):
    def loss(self, output, target):
        raise ValueError("no such loss")

class Deadly(Ragged):
    def loss(self, output, target):
        os.kill(os.getpid(), 9)

class Endless(Ragged):
    def loss(self, output, target):
        os.write(2, b"busy\\n")
        time.sleep(1000)
'''
NOISY = "privacy={level='client', population=10, noise_multiplier=0.5, metric_noise=5.0}"
PRIVATE = "privacy={level='example', noise_multiplier=1.0, sampling_rate=0.3, metric_noise=5.0}"


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Yield the name of a module of tasks that other processes can import."""
    with handed.module(tmp_path, MODULE, monkeypatch) as name:
        yield name


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("Ragged", ("strategy=scaffold",)),
        ("Sized", ("strategy={name='fedavg', aggregator='median'}", "attack={name='label_flip', classes=3}")),
        ("Ragged", (PRIVATE,)),
        (
            "Ragged",
            (
                "privacy={level='client', population=10, noise_multiplier=0.5, metric_noise=5.0}",
                "strategy=fedprox",
            ),
        ),
        ("Ragged", ("strategy=ditto", "client.optimizer={name='adam'}")),
    ],
)
def test_every_run_has_the_bits_of_the_sequential_engine(
    tasks: str, task: str, options: tuple[str, ...]
) -> None:
    expected, rows = played(resolve(f"{tasks}:{task}"), "simulation.engine=sequential", *options)
    got, ours = played(resolve(f"{tasks}:{task}"), "simulation.engine=processes", *options)
    np.testing.assert_equal(got, expected)
    assert ours == rows
    assert "accuracy" in rows[-1], "or evaluations would go untested"


@pytest.mark.usefixtures("spawning")
@pytest.mark.parametrize("options", [("strategy=scaffold",), ("simulation.chunk=4",)])
def test_new_processes_have_the_bits_of_forks(
    tasks: str, options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = resolve(f"{tasks}:Ragged")
    got = played(task, "simulation.engine=processes", *options)
    monkeypatch.setattr("fedcore.simulations.processes.forkable", lambda spec: True)
    np.testing.assert_equal(got, played(task, "simulation.engine=processes", *options))


@pytest.mark.parametrize(
    ("options", "possible"), [((), True), (("client.threads=2",), False), (("client.device=cuda",), False)]
)
def test_a_fork_is_for_one_thread_without_cuda(options: tuple[str, ...], possible: bool) -> None:
    assert forkable(spec(*options)) is (possible and sys.platform == "linux")


def engine_of(reference: str, *overrides: str) -> tuple[Simulation, Processes]:
    run = Simulation(resolve(reference), spec("simulation.engine=processes", *overrides))
    assert isinstance(run.engine, Processes)
    return run, run.engine


def test_clients_of_a_killed_worker_run_again_in_another(
    tasks: str, caplog: pytest.LogCaptureFixture
) -> None:
    run, engine = engine_of(f"{tasks}:Sized")
    ref, clients = run.ref(1, "train"), run.cohort(1, "train")
    plan = train_plan(run.strategy, run.spec, run.layout, ref, clients, 10)
    for number in (1, 2):
        answers = engine.answer(plan, run.state.parameters)
        deltas: dict[str, Any] = {}
        for part in answers:
            assert isinstance(part, Answers)
            deltas |= dict(zip(part.clients, part.rows.vectors["delta"], strict=True))
            if number == 2 and len(deltas) == 2:
                for child in engine.members:  # one of them at work, at the least
                    os.kill(child.process.pid, signal.SIGKILL)
        assert sorted(deltas) == sorted(clients)
        if number == 1:
            expected = deltas
    np.testing.assert_equal(deltas, expected)
    assert (
        caplog.messages == ["a worker process was killed by signal 9; its clients run again in another"] * 2
    )


@pytest.mark.slow  # four workers, one after the other
def test_a_client_that_kills_every_worker_ends_the_run_with_the_reason(tasks: str) -> None:
    run, _ = engine_of(f"{tasks}:Deadly", "simulation.workers=1")
    with pytest.raises(
        RunFailed, match="3 worker processes in a row died, the last was killed by signal 9; if"
    ):
        list(run.rounds(lambda _: None))


def test_what_a_client_raises_ends_the_run(tasks: str, capfd: pytest.CaptureFixture[str]) -> None:
    run, engine = engine_of(f"{tasks}:Broken")
    before = [child.process for child in engine.members]
    with pytest.raises(RunFailed, match="a worker process raised ValueError: no such loss"):
        list(run.rounds(lambda _: None))
    assert "Traceback" in capfd.readouterr().err
    engine.close()
    assert all(process.returncode is not None for process in before)


def test_the_largest_come_first_in_packets_that_shrink_and_a_round_may_end_early(tasks: str) -> None:
    run, engine = engine_of(f"{tasks}:Ragged", "simulation.clients=30", "simulation.workers=1")
    names, x = tuple(run.population.names), run.state.parameters
    plan = train_plan(run.strategy, run.spec, run.layout, run.ref(1, "train"), names, 30)
    first = next(iter(engine.answer(plan, x)))
    packets = [part.clients for part in engine.answer(plan, x)]
    assert packets[0] == first.clients and len(first.clients) == 7
    assert [len(packet) for packet in packets][1:4] == [5, 4, 3] and len(packets[-1]) == 1
    sizes = [len(run.population.training(c)) for packet in packets for c in packet]
    assert len(sizes) == 30 and sizes == sorted(sizes, reverse=True)


class Local(fedcore.Task):
    """Importable by nobody: pytest gives this file a name of its own."""

    def model(self) -> nn.Module:
        return nn.Linear(2, 2)

    def data(self, client: fedcore.Client) -> fedcore.Split[Any]:
        x = client.rng.normal(size=(12, 2)).astype(np.float32)
        return fedcore.Split((x, np.arange(12) % 2), (x, np.arange(12) % 2))


def test_a_fork_runs_a_task_that_is_known_here_alone_and_prints_no_result(
    capfd: pytest.CaptureFixture[str],
) -> None:
    class Inner(Local):
        def loss(self, output: Any, target: Any) -> Any:
            sys.stdout.write(f"at work in {os.getpid()}\n")
            return super().loss(output, target)

    expected, _ = played(Inner(), "simulation.engine=sequential")
    assert {line.split()[-1] for line in capfd.readouterr().out.splitlines()} == {str(os.getpid())}
    got, _ = played(Inner(), "simulation.engine=processes", "simulation.workers=2")
    np.testing.assert_equal(got, expected)
    said = capfd.readouterr()
    assert said.out == "" and len(set(said.err.splitlines()) - {f"at work in {os.getpid()}"}) == 2


@pytest.mark.usefixtures("spawning")
def test_a_task_that_cannot_be_imported_says_what_to_do() -> None:
    class Inner(Local):
        pass

    for task in (Inner(), Local()):
        reason = rf"no other process can run {task.name}: .*; define it in a module that can be imported"
        with pytest.raises(SpecError, match=rf'simulation.engine = "processes": {reason}.*; or use "auto"'):
            Simulation(task, spec("simulation.engine=processes"))


SCRIPT = """
import signal
import sys
from fedcore.simulations import processes
from fedcore.simulations.run import Simulation
from fedcore.spec import RunSpec
from fedcore.task import resolve

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores Ctrl-C
    spec = RunSpec().with_("simulation.engine=processes", "simulation.workers=2", "simulation.clients=10")
    processes.forkable = lambda spec: sys.argv[2] == "True"
    run = Simulation(resolve(sys.argv[1]), spec)
    print("ready", flush=True)
    list(run.rounds(lambda _: None))
"""


@pytest.mark.parametrize("forks", [True, False])
@pytest.mark.parametrize("killed", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_is_left_when_the_simulation_ends(
    tasks: str, tmp_path: Path, killed: signal.Signals, forks: bool
) -> None:
    """Workers write to the same pipe, which is at its end only when none is left, at work as they are."""
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), f"{tasks}:Endless", str(forks)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, bufsize=1) as process:
        assert process.stdout and process.stderr
        try:
            said = process.stdout.readline(), process.stderr.readline()
            process.send_signal(killed)
            process.communicate(timeout=10)
        finally:
            process.kill()
    assert said == ("ready\n", "busy\n")
    assert process.returncode in (-killed, 130)


@pytest.mark.parametrize(("cohort", "expected"), [(1, 1), (8, 8), (9, 5), (10, 5), (100, 8)])
def test_there_are_as_many_workers_as_help(
    cohort: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedcore.simulations.processes.cores", lambda: 8)
    run = fedcore.RunSpec().with_(f"cohort.size={cohort}")
    assert workers_for(run) == expected
    assert workers_for(run.with_("client.threads=4")) == min(2, cohort)
    assert workers_for(run.with_("simulation.workers=3")) == 3


def test_mapped_memory_grows_and_gives_copies() -> None:
    memory = Mapped.new()
    other = Mapped(os.dup(memory.fd))
    for value in ([1, "a"], {"x": np.arange(10_000.0), "y": np.zeros((0, 3))}, np.arange(6).reshape(2, 3).T):
        taken = other.take(memory.put(value))
        np.testing.assert_equal(taken, value)
        memory.put("something else")
        np.testing.assert_equal(taken, value)
    memory.close()
    other.close()
