"""The engine on Ray: the sequential engine's bits from actors, which may die, here or on a cluster."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from fedcore.errors import SpecError
from fedcore.messages import Plan
from fedcore.simulations.answers import Answers, Summed
from fedcore.simulations.cluster import Cluster
from fedcore.simulations.run import Simulation
from fedcore.strategies.rounds import train_plan
from fedcore.task import resolve
from tests.simulations import handed
from tests.simulations.handed import played, spec

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning")]

MODULE = """
class Broken(Ragged):
    def model(self):
        if os.environ.get("DRIVER") != str(os.getpid()):
            raise ValueError("no model elsewhere")
        return super().model()
"""


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Yield the name of a module that only this process can import: Ray takes it along."""
    with handed.module(tmp_path, MODULE, monkeypatch) as name:
        yield name


@pytest.fixture(scope="module", autouse=True)
def local() -> Iterator[None]:
    """Start one Ray of two workers for all tests; a run that finds one leaves it."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


@pytest.mark.parametrize("options", [("strategy=scaffold",), ("strategy.aggregator=median",)])
def test_actors_have_the_bits_of_the_sequential_engine(tasks: str, options: tuple[str, ...]) -> None:
    expected, rows = played(resolve(f"{tasks}:Ragged"), "simulation.engine=sequential", *options)
    got, ours = played(resolve(f"{tasks}:Ragged"), "simulation.engine=ray", "simulation.chunk=1", *options)
    np.testing.assert_equal(got, expected)
    assert ours == rows and "accuracy" in rows[-1]


def engine_of(reference: str, *overrides: str) -> tuple[Simulation, Cluster, Plan]:
    run = Simulation(resolve(reference), spec("simulation.engine=ray", *overrides))
    assert isinstance(run.engine, Cluster)
    clients = run.cohort(1, "train")
    return run, run.engine, train_plan(run.strategy, run.spec, run.layout, run.ref(1, "train"), clients, 10)


def test_actors_return_sums_of_chunks_and_those_of_a_dead_one_are_made_again(
    tasks: str, caplog: pytest.LogCaptureFixture
) -> None:
    run, engine, plan = engine_of(f"{tasks}:Ragged", "simulation.chunk=3")
    whole = list[Any]()
    for number in (1, 2):
        parts: list[Answers | Summed] = []
        for part in engine.answer(plan, run.state.parameters):
            if number == 2 and not parts:
                for member in list(engine.members):
                    ray.kill(member.handle)
            parts.append(part)
        assert sorted(client for part in parts for client in part.clients) == sorted(plan.cohort)
        summed = [part for part in parts if isinstance(part, Summed)]
        assert len(summed) == 3, "eight clients in chunks of three"
        whole.append(sum(part.words.wide for part in summed))
    np.testing.assert_array_equal(whole[0], whole[1])
    assert "a worker process of Ray died; its clients run again in another" in caplog.messages
    run.close()


def test_a_task_that_fails_in_an_actor_says_so(tasks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRIVER", str(os.getpid()))
    with pytest.raises(SpecError, match=r'simulation.engine = "ray": .*no model elsewhere'):
        Simulation(resolve(f"{tasks}:Broken"), spec("simulation.engine=ray"))


SCRIPT = """
import sys
from fedcore import RunSpec, simulate
from fedcore.task import resolve
import ray

spec = RunSpec().with_("run.rounds=1", "cohort.size=4", "simulation.clients=4", "simulation.engine=ray")
result = simulate(resolve(sys.argv[1]), spec)
print(result.engine, result.reason, ray.is_initialized())
"""


def test_a_cluster_is_taken_from_the_environment(tasks: str, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    address = ray.get_runtime_context().gcs_address
    done = subprocess.run(
        [sys.executable, "script.py", f"{tasks}:Ragged"],
        cwd=tmp_path,
        env={**os.environ, "RAY_ADDRESS": address},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout == "ray 2 workers, as asked False\n", done.stderr  # it has left the cluster as it was
