"""`fedcore bench chaos`: the processes of a federation are killed at random, and nothing may be lost.

Runs of 60 rounds follow each other. While one is under way, the coordinator or an agent dies by SIGKILL, at a
random moment or at a random point of `fedcore.faults`, and is started again at once. Each run has to end with
the model of a run that nothing happened to, bit for bit. An update counts as lost where an agent that had its
receipt had to send it again, and where a round was committed without it.
"""

import json
import random
import re
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import TimeoutExpired
from typing import TYPE_CHECKING, Any

from fedcore.errors import FedcoreError, RunFailed
from fedcore.faults import AGENT, COORDINATOR
from fedcore.loopback import START_TIMEOUT, Loopback, federation
from fedcore.operator import Operator, submission_for
from fedcore.spec import RunSpec
from fedcore.task import client_name, resolve

if TYPE_CHECKING:
    from fedcore.wire.v1.coordinator_pb2 import RunInfo

TASK = "from fedcore.bench.remembering import Remembering\n\ntask = Remembering({size}, {seconds})\n"
SPEC: dict[str, Any] = {
    "run": {"task": "remembering_task:task", "rounds": 60},
    "cohort": {"deadline": 60.0},
    "strategy": {"name": "fedavg", "optimizer": {"name": "sgd", "lr": 0.5, "momentum": 0.9}},
    "evaluation": {"every": 20},
}
KINDS: dict[str, dict[str, Any]] = {
    "tls": {"encryption": {"updates": "tls"}},
    "sealed": {"encryption": {"updates": "sealed"}},
    "rows": {"encryption": {"updates": "tls"}, "strategy": {"name": "median"}},
}
PATIENCE = 3.0  # seconds in which a process has to come by its point, otherwise it dies where it is
STUCK = 120.0  # seconds without a kill after which a run has to have ended


@contextmanager
def remembering(folder: Path, clients: int, size: int = 20_000, seconds: float = 0.0) -> Iterator[Loopback]:
    """Start a federation in an empty folder, with that many agents that remember."""
    with federation(folder) as loopback:
        names = [client_name(i) for i in range(clients)]
        source = TASK.format(size=size, seconds=seconds)
        loopback.start_agents(names, "Remembering", "remembering_task", source)
        yield loopback


def spec_of(name: str, clients: int, **tables: Any) -> RunSpec:
    """Return a run in which every round needs every client; `tables` replace those of SPEC."""
    table = {**SPEC, **tables}
    table["run"] = {**SPEC["run"], "name": name, **tables.get("run", {})}
    table["cohort"] = {**SPEC["cohort"], "size": clients, "minimum": clients}
    return RunSpec.parse(table)


def pause() -> None:
    """Wait a moment before the coordinator is asked again."""
    time.sleep(0.05)


def submit(loopback: Loopback, spec: RunSpec, meanwhile: Callable[[], None] = pause) -> str:
    """Hand in a run under a name that no other has, whatever happens to the coordinator; return its id."""
    submission, parameters = submission_for(resolve(spec.run.task, loopback.folder), spec)
    while True:
        try:
            with Operator.connect(loopback.folder / "operator") as operator:
                there = [info.run for info in operator.list() if info.name == spec.run.name]
                return there[0] if there else operator.submit(submission, parameters).run
        except FedcoreError:
            meanwhile()


def shown(loopback: Loopback, run: str) -> "RunInfo | None":
    """Return what the coordinator says of a run, None while it is not there."""
    try:
        with Operator.connect(loopback.folder / "operator") as operator:
            return operator.show(run)
    except FedcoreError:
        return None


def ended(loopback: Loopback, run: str, meanwhile: Callable[[], None] = pause) -> "RunInfo":
    """Wait until a run has finished; raises RunFailed where it does not."""
    end = time.monotonic() + STUCK
    while time.monotonic() < end:
        info = shown(loopback, run)
        if info and info.state == "finished":
            return info
        if info and info.state == "failed":
            break
        meanwhile()
    raise RunFailed(f"{run} did not finish within {STUCK:.0f} s: {info}")


def resent(loopback: Loopback) -> list[str]:
    """Return the updates, as "CLIENT REF", that an agent sent again although it had a receipt for them."""
    found = list[str]()
    for path in loopback.folder.glob("client-*.log"):
        sent = re.findall(r"update sent  ref=(\S+)", path.read_text(encoding="utf-8"))
        found += [f"{path.stem} {ref}" for ref, count in Counter(sent).items() if count > 1]
    return found


@dataclass
class Killer:
    """Who kills the processes of a federation, and how often it has."""

    loopback: Loopback
    rng: random.Random
    kills: Counter[str] = field(default_factory=Counter)

    def strike(self) -> None:
        """Kill the coordinator or an agent: at a random moment, or when it comes by a random point."""
        agents = [name for name in self.loopback.processes if name.startswith("client")]
        name = self.rng.choice(["coordinator", self.rng.choice(agents)])
        if self.rng.random() < 0.5:
            time.sleep(self.rng.uniform(0.0, 0.5))
            self.kill(name, "moment")
        else:
            self.loopback.stop(name)
            point = self.rng.choice(COORDINATOR if name == "coordinator" else AGENT)
            self.start(name, f"{point}:{self.rng.randint(1, 12)}=kill")
            try:
                self.loopback.processes[name].wait(PATIENCE)
            except TimeoutExpired:
                self.kill(name, "moment")
            else:
                self.kills[point] += 1
        self.start(name)

    def kill(self, name: str, where: str) -> None:
        """Kill a process here and now."""
        self.loopback.stop(name, signal.SIGKILL)
        self.kills[where] += 1

    def start(self, name: str, faults: str = "") -> None:
        """Start a process, and wait until it is there or has died."""
        up = "listening" if name == "coordinator" else " connected"
        log, before = self.loopback.log(name), self.loopback.log(name).stat().st_size
        self.loopback.start(name, faults)
        end = time.monotonic() + START_TIMEOUT
        while time.monotonic() < end and self.loopback.processes[name].poll() is None:
            with log.open("rb") as file:
                file.seek(before)
                if up.encode() in file.read():
                    return
            time.sleep(0.02)
        if not faults:
            tail = "\n".join(log.read_text(encoding="utf-8").splitlines()[-5:])
            raise RunFailed(f"{name} did not come up again; its log ends:\n{tail}")


def measure(kills: int, seed: int, clients: int = 2) -> Iterator[dict[str, Any]]:
    """Kill so many processes; yield a line for each run, and at last one with `lost` and `mismatches`."""
    started, expected, same, lost = time.monotonic(), dict[str, str](), list[bool](), list[str]()
    with (
        tempfile.TemporaryDirectory(prefix="fedcore-chaos-") as home,
        remembering(Path(home), clients, seconds=0.05) as loopback,
    ):
        for kind, tables in KINDS.items():
            run = submit(loopback, spec_of(f"quiet-{kind}", clients, **tables))
            expected[kind] = ended(loopback, run).parameters.sha256
        killer = Killer(loopback, random.Random(seed))
        while killer.kills.total() < kills:
            kind = list(KINDS)[len(same) % len(KINDS)]
            run = submit(loopback, spec_of(f"{kind}-{len(same)}", clients, **KINDS[kind]))
            while (info := shown(loopback, run)) is None or info.state in ("running", "paused"):
                if killer.kills.total() < kills:
                    killer.strike()
                else:
                    ended(loopback, run)
            same.append(info.state == "finished" and info.parameters.sha256 == expected[kind])
            folded = {row["round"]: row["folded"] for row in map(json.loads, info.metrics)}
            lost += [f"{run} round {number}" for number, count in folded.items() if count != clients]
            yield {"run": run, "state": info.state, "kills": killer.kills.total(), "same_bits": same[-1]}
        lost += resent(loopback)
    yield {
        "bench": "chaos",
        "seed": seed,
        "kills": killer.kills.total(),
        "kills_at_points": killer.kills.total() - killer.kills["moment"],
        "points": len(killer.kills.keys() - {"moment"}),
        "runs": len(same),
        "lost": lost,
        "mismatches": same.count(False),
        "seconds": round(time.monotonic() - started),
        "measured": time.strftime("%Y-%m-%d"),
    }
