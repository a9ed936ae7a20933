"""Flower apps on a real coordinator and two devices: what was simulated, and what survives a kill."""

import json
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import Popen

import numpy as np
import pytest

from fedcore.loopback import Loopback, federation
from fedcore.task import client_name
from tests.integration.conftest import shown

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

SOURCE = Path(__file__).parents[1] / "flower" / "apps"
NAMES = [client_name(i) for i in range(2)]
APPS = ("mods", "stateful")


@pytest.fixture(scope="module")
def hosted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    """A coordinator and two agents that host two apps; the operator and each device have their own copies."""
    folder = tmp_path_factory.mktemp("flower")
    with federation(folder) as running:

        def settings(name: str) -> dict[str, object]:
            apps = {f"fedcore/{app}-example": f"apps/{app}" for app in APPS}
            return {
                "flower": {"apps": apps, "node": {"partition-id": NAMES.index(name), "num-partitions": 2}}
            }

        running.make_agents(NAMES, settings)
        for place in ("", *NAMES):
            shutil.copytree(SOURCE, folder / place / "apps", ignore=shutil.ignore_patterns("__pycache__"))
        for name in NAMES:
            running.start(name)
        for name in NAMES:
            running.wait_for(name, "connected")
        yield running


def submit(loopback: Loopback, app: str, *config: str) -> tuple[Popen[bytes], Path]:
    """Start an app's ServerApp against the coordinator; return its process and where its result will be."""
    loopback.log("serverapp").unlink(missing_ok=True)
    result = loopback.folder / f"{app}.{'npz' if app == 'mods' else 'json'}"
    result.unlink(missing_ok=True)
    overrides = " ".join([f'result="{result}"', *config])
    loopback.spawn(
        "serverapp", "run", "submit", "--flower", f"apps/{app}", "--run-config", overrides, "--json"
    )
    return loopback.processes["serverapp"], result


def ended(loopback: Loopback, process: Popen[bytes], code: int = 0) -> str:
    """Wait until a ServerApp has ended, and return all that it has said."""
    found = process.wait(90)
    said = loopback.log("serverapp").read_text(encoding="utf-8")
    assert found == code, said[-3000:]
    return said


def begun(log: Path, what: str) -> None:
    """Wait until an app has begun a message, by round and partition."""
    end = time.monotonic() + 30
    while not (log.exists() and what in log.read_text(encoding="utf-8")):
        assert time.monotonic() < end, f"{what} has never begun"
        time.sleep(0.02)


def test_the_deployed_model_is_the_simulated_one(hosted: Loopback) -> None:
    process, result = submit(hosted, "mods")
    ended(hosted, process)
    here = hosted.folder / "simulated.npz"
    hosted.fedcore(
        *(
            "flower",
            "run",
            "apps/mods",
            "--num-supernodes",
            "2",
            "--run-config",
            f'result="{here}"',
            "--quiet",
        )
    )
    with np.load(here) as simulated, np.load(result) as deployed:
        assert simulated["w"].any()
        assert {n: a.tobytes() for n, a in simulated.items()} == {n: a.tobytes() for n, a in deployed.items()}
    (row,) = json.loads(hosted.fedcore("run", "list", "--json"))
    assert (row["name"], row["state"]) == ("mods-example", "finished")


def test_no_kill_loses_a_message_or_what_a_node_remembers(hosted: Loopback) -> None:
    """An agent at work, another after its answer is on its disk, and the coordinator die: nothing shows."""
    hosted.stop(NAMES[1])
    hosted.start(NAMES[1], faults="agent.letter.spooled:3=kill")  # that of training in round 2
    log = hosted.folder / "begun.txt"
    process, result = submit(hosted, "stateful", f'log="{log}"', "seconds=0.4", "num-server-rounds=5")
    begun(log, "2.0 begun")
    hosted.stop(NAMES[0], signal.SIGKILL)
    assert hosted.processes[NAMES[1]].wait(30) == -9
    for name in NAMES:
        hosted.start(name)
    begun(log, "4.1 begun")
    hosted.stop("coordinator", signal.SIGKILL)
    hosted.start("coordinator")
    said = ended(hosted, process)
    counts = [1.0, 2.0, 3.0, 4.0, 5.0]
    lines = json.loads(result.read_text(encoding="utf-8"))
    assert lines == {"w": 3 * [22.5], "trained": counts, "evaluated": counts, "agree": 5 * [1.0]}
    trained = log.read_text(encoding="utf-8").split("\n")
    assert trained.count("2.0 begun") == 2  # killed at work, so it ran again, from what it knew before
    assert trained.count("2.1 begun") == 1  # killed with its answer on the disk, so it did not
    assert '"failed": 0' in said and '"lost": 0' in said
    assert not list((hosted.folder / NAMES[0] / "state" / "apps").glob("*"))


def test_a_device_runs_only_the_code_that_it_has(hosted: Loopback) -> None:
    """Another digest, and nobody hosts it; the run says so, and can be stopped from elsewhere."""
    with (hosted.folder / "apps" / "stateful" / "stateful_app.py").open("a", encoding="utf-8") as code:
        code.write("# changed\n")
    process, _ = submit(hosted, "stateful")
    run = hosted.wait_for("serverapp", r"run (stateful-example-\w+)")[1]
    assert "with other files of that name: 2" in shown(hosted, run)["detail"]
    hosted.fedcore("run", "stop", run)
    assert "was stopped" in ended(hosted, process, code=1)
