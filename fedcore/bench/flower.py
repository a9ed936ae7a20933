"""`fedcore bench flower`: one Flower app, unchanged, under Flower's own simulation and under ours, in turn.

Machines drift, so the two alternate and a ratio is the median of those of neighbouring runs. Memory is
watched in a pair of runs of its own, as watching costs time. Both have the processors that this process has.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from fedcore.bench.jobs import job_of
from fedcore.bench.under_flower import QUIET
from fedcore.cores import cores
from fedcore.errors import MissingExtra, RunFailed, SpecError

PROJECT = """[project]
name = "bench"
version = "1.0.0"
license = "Apache-2.0"
[tool.flwr.app]
publisher = "fedcore"
[tool.flwr.app.components]
serverapp = "job_app:server"
clientapp = "job_app:client"
[tool.flwr.app.config]
job = ""
num-server-rounds = 1
result = ""
"""
ENGINES = ("flower", "fedcore")
Figures = dict[str, Any]
WATCHED = 3  # rounds of the runs whose memory is watched
PERIOD = 0.25  # seconds between two looks at it


def measure(name: str, rounds: int, pairs: int, workers: int = 0) -> Iterator[Figures]:
    """Yield a line for each engine, medians over the pairs of runs, and a line of ratios, Flower's to ours.

    workers: of ours; 0: its default.
    """
    if job_of(name).cohort != job_of(name).clients:
        raise SpecError(f"job {name!r} draws cohorts, which Flower draws otherwise; take one of all clients")
    for library in ("flwr", "ray"):
        if find_spec(library) is None:
            raise MissingExtra(library, "flower,ray")
    with tempfile.TemporaryDirectory(prefix="fedcore-bench-") as home:
        folder = Path(home)
        source = Path(__file__).with_name("flower_app.py").read_text(encoding="utf-8")
        (folder / "job_app.py").write_text(source, encoding="utf-8")
        (folder / "pyproject.toml").write_text(PROJECT, encoding="utf-8")
        runs: dict[str, list[Figures]] = {engine: [] for engine in ENGINES}
        for _ in range(pairs):
            for engine in ENGINES:
                runs[engine].append(run(engine, name, rounds, folder, workers))
        memory = {e: peaks(run(e, name, WATCHED, folder, workers, watched=True)) for e in ENGINES}
    common = {"bench": "flower", "job": name, "clients": job_of(name).clients, "rounds": rounds}
    for line in lines(runs, memory):
        yield common | line


def lines(runs: Mapping[str, list[Figures]], memory: Mapping[str, Figures]) -> Iterator[Figures]:
    """Yield the figures of each engine, and the ratios."""
    for engine in ENGINES:
        middle = {key: round(median(each[key] for each in runs[engine]), 5) for key in runs[engine][0]}
        yield {"engine": engine, "runs": len(runs[engine]), **middle, **memory[engine]}
    pairs = list(zip(*(runs[engine] for engine in ENGINES), strict=True))
    ratios = {key: median(a[key] / b[key] for a, b in pairs) for key in ("warm_round_s", "shell_to_end_s")}
    ratios |= {key: memory["flower"][key] / memory["fedcore"][key] for key in memory["flower"]}
    yield {f"{key}_ratio": round(ratio, 2) for key, ratio in ratios.items()} | {
        "cpus": cores(),
        "measured": time.strftime("%Y-%m-%d"),
    }


def peaks(line: Figures) -> Figures:
    """Return what of a run's figures is memory."""
    return {key: value for key, value in line.items() if key.startswith("peak_")}


def run(engine: str, name: str, rounds: int, folder: Path, workers: int, watched: bool = False) -> Figures:
    """Run the app in an engine, from the shell to its end; return its figures.

    overhead_ms: processor time of a message beyond what the app's function took, if all processors were busy:
    an upper bound, with the strategy's own aggregation in it.
    """
    clients, result = job_of(name).clients, folder / "result.json"
    overrides = [f'job="{name}"', f"num-server-rounds={rounds}", f'result="{result}"']
    started = time.perf_counter()
    process = subprocess.Popen(
        command(engine, folder, clients, overrides, workers),
        stdout=subprocess.DEVNULL,
        stderr=(log := (folder / "log").open("w+b")),
        env=os.environ | QUIET,
    )
    with log:
        memory = peaks_of(process) if watched else {}
        if process.wait():
            log.seek(0)
            raise RunFailed(f"{engine}: {log.read().decode(errors='replace')[-2000:]}")
    seconds = time.perf_counter() - started
    line = json.loads(result.read_text(encoding="utf-8"))
    result.unlink()
    each = [after - before for before, after in pairwise(line["marks"])]
    warm, own = median(each[1:]), median(line["own"][1:])
    return {
        "warm_round_s": warm,
        "clients_per_s": clients / warm,
        "first_round_s": each[0],
        "shell_to_end_s": seconds,
        "own_ms": 1000 * own,
        "overhead_ms": 1000 * (warm * cores() / clients - own),
        "accuracy": line["accuracy"],
        **memory,
    }


def command(engine: str, folder: Path, clients: int, overrides: Sequence[str], workers: int) -> list[str]:
    """Return how an engine is started."""
    if engine == "flower":
        return [sys.executable, "-m", "fedcore.bench.under_flower", str(folder), str(clients), *overrides]
    ours = [sys.executable, "-m", "fedcore", "flower", "run", str(folder), f"--num-supernodes={clients}"]
    ours += [f"--workers={workers}"] if workers else []
    return [*ours, "--run-config", " ".join(overrides)]


def peaks_of(process: subprocess.Popen[bytes]) -> dict[str, int]:
    """Watch a process and its descendants until it ends; return peaks of the sums in MiB.

    Resident pages count once for each process that has them; proportionally (PSS), a page that n share counts
    as 1/n in each of them, so the sum is what the machine gives.
    """
    resident = proportional = 0
    while process.poll() is None:
        family = [_memory(pid) for pid in tree(process.pid)]
        resident = max(resident, sum(rss for rss, _ in family))
        proportional = max(proportional, sum(pss for _, pss in family))
        time.sleep(PERIOD)
    return {"peak_rss_mb": resident // 1024, "peak_pss_mb": proportional // 1024}


def tree(root: int) -> set[int]:
    """Return a process and all its living descendants."""
    children: dict[int, list[int]] = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        stat = _read(f"/proc/{entry}/stat").rpartition(")")[2].split()
        if stat:
            children.setdefault(int(stat[1]), []).append(int(entry))
    found, queue = set[int](), [root]
    while queue:
        found.add(pid := queue.pop())
        queue += children.get(pid, [])
    return found


def _memory(pid: int) -> tuple[int, int]:
    """Return a process's resident and proportional memory in KiB; 0 of one that has ended."""
    lines = [line.split() for line in _read(f"/proc/{pid}/smaps_rollup").splitlines()[1:]]
    sizes = {key: int(size) for key, size, *_ in lines}
    return sizes.get("Rss:", 0), sizes.get("Pss:", 0)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""
