"""`fedcore bench deploy`: a federation on loopback over mutual TLS, without any training."""

import re
import tempfile
import time
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from fedcore.loopback import Loopback, federation

TASK = "from fedcore.bench.echo import Echo\n\ntask = Echo({size})\n"
SPEC = """[run]
name = "echo"
task = "echo_task:task"
rounds = {rounds}
[cohort]
size = {clients}
[evaluation]
every = 0
[encryption]
updates = "{encryption}"
[limits]
norm = 1.0
"""


def measure(parameters: int, clients: int, rounds: int, encryption: str) -> dict[str, Any]:
    """Run rounds with so many parameters and clients; return the line to print."""
    with tempfile.TemporaryDirectory(prefix="fedcore-bench-") as home:
        folder = Path(home)
        (folder / "echo_task.py").write_text(TASK.format(size=parameters), encoding="utf-8")
        spec = SPEC.format(rounds=rounds + 1, clients=clients, encryption=encryption)
        (folder / "spec.toml").write_text(spec, encoding="utf-8")
        with federation(folder) as loopback:
            names = [f"client-{i:06d}" for i in range(clients)]
            loopback.make_agents(names, lambda _: {"tasks": {"Echo": "echo_task:task"}})
            for name in names:
                (folder / name / "echo_task.py").write_text(TASK.format(size=parameters), encoding="utf-8")
                loopback.start(name)
            loopback.fedcore("run", "submit", "spec.toml", "--watch")
            memory = status_of(loopback)
        log = loopback.log("coordinator").read_text(encoding="utf-8")
    seconds = periods(log)
    return {
        "bench": "deploy",
        "parameters": parameters,
        "clients": clients,
        "encryption": encryption,
        "seconds_per_round": [round(s, 4) for s in seconds],
        "warm_round_s": round(median(seconds), 4),
        "upload_mb_per_s": rate(log, "update received"),
        "download_mb_per_s": rate(log, "parameters sent"),
        "coordinator_peak_rss_mb": memory["VmHWM"],
        "coordinator_anonymous_mb": memory["RssAnon"],
        "measured": time.strftime("%Y-%m-%d"),
    }


def periods(log: str) -> list[float]:
    """Return the seconds between one committed round and the next; the first, cold round is left out."""
    times = re.findall(r"^(\S+) info +server: round committed", log, re.MULTILINE)
    marks = [datetime.fromisoformat(text).timestamp() for text in times]
    return [after - before for before, after in pairwise(marks)]


def rate(log: str, event: str) -> float:
    """Return the median rate of transfers as one stream sees it, in 10^6 bytes a second."""
    moved = re.findall(rf"{event} .*bytes=(\d+) seconds=([\d.e-]+)", log)
    return round(median(int(size) / float(seconds) for size, seconds in moved) / 1e6, 1)


def status_of(loopback: Loopback) -> dict[str, int]:
    """Return the coordinator's memory in MiB: peak resident size, and anonymous memory now."""
    text = Path(f"/proc/{loopback.processes['coordinator'].pid}/status").read_text(encoding="utf-8")
    return {name: int(kib) // 1024 for name, kib in re.findall(r"(VmHWM|RssAnon):\s+(\d+) kB", text)}
