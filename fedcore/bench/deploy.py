"""`fedcore bench deploy`: a federation on loopback over mutual TLS, without any training."""

import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from statistics import median
from threading import Event, Thread
from typing import Any

from fedcore.bench.raw import streams, write_rate
from fedcore.loopback import Loopback, federation
from fedcore.task import client_name

TASK = "from fedcore.bench.echo import Echo\n\ntask = Echo({size})\n"
SPEC = """[run]
name = "echo"
task = "echo_task:task"
rounds = {rounds}
[cohort]
size = {clients}
minimum = {clients}
[evaluation]
every = 0
[encryption]
updates = "{encryption}"
"""
NORM = "[limits]\nnorm = 1.0\nweight = 1.0\n"  # so that sums under masks fit narrow words


def measure(
    parameters: int, clients: int, rounds: int, encryption: str, changes: Sequence[str] = ()
) -> dict[str, Any]:
    """Run rounds with so many parameters and clients; return the line to print.

    changes: "key=value" of the spec. Rates are of one client's stream while all of them stream, in 10^6 bytes
    a second; limits are what gRPC and the disk do with as many bytes when nothing else is done.
    """
    with tempfile.TemporaryDirectory(prefix="fedcore-bench-") as home:
        folder = Path(home)
        spec = SPEC.format(rounds=rounds + 1, clients=clients, encryption=encryption)
        spec += NORM if encryption == "secagg" else ""
        (folder / "spec.toml").write_text(spec, encoding="utf-8")
        with federation(folder) as loopback:
            names = [client_name(i) for i in range(clients)]
            loopback.start_agents(names, "Echo", "echo_task", TASK.format(size=parameters))
            for name in names:
                loopback.wait_for(name, "connected")
            base = memory_of(loopback)["RssAnon"]
            with peak_of(loopback) as peak:
                overrides = [part for change in changes for part in ("--set", change)]
                loopback.fedcore("run", "submit", "spec.toml", "--watch", *overrides)
            memory = memory_of(loopback)
        log = loopback.log("coordinator").read_text(encoding="utf-8")
        seconds, size = periods(log), 4 * parameters
        identities = [folder / name / "state" / "identity" for name in names]
        up, down = streams(folder / "coordinator" / "identity", identities, size)
        disk = write_rate(folder / "coordinator", size * clients) / clients
    sent, got = rate(log, "update received"), rate(log, "parameters sent")
    return {
        "bench": "deploy",
        "parameters": parameters,
        "clients": clients,
        "encryption": encryption,
        "set": list(changes),
        "seconds_per_round": [round(s, 4) for s in seconds],
        "warm_round_s": round(median(seconds), 4),
        "upload_mb_per_s": round(sent / 1e6, 1),
        "download_mb_per_s": round(got / 1e6, 1),
        "stream_limits_mb_per_s": [round(up / 1e6, 1), round(down / 1e6, 1)],
        "write_limit_mb_per_s": round(disk / 1e6, 1),
        "upload_of_limit": round(sent / min(up, disk), 2),
        "download_of_limit": round(got / down, 2),
        "coordinator_peak_rss_mb": memory["VmHWM"],
        "coordinator_base_anonymous_mb": base,
        "coordinator_peak_anonymous_mb": peak["RssAnon"],
        "measured": time.strftime("%Y-%m-%d"),
    }


def periods(log: str) -> list[float]:
    """Return the seconds between one committed round and the next; the first, cold round is left out."""
    times = re.findall(r"^(\S+) info +server: round committed", log, re.MULTILINE)
    marks = [datetime.fromisoformat(text).timestamp() for text in times]
    return [after - before for before, after in pairwise(marks)]


def rate(log: str, event: str) -> float:
    """Return the median rate of transfers as one stream sees it, in bytes a second; 0 without one."""
    moved = re.findall(rf"{event} .*bytes=(\d+) seconds=([\d.e-]+)", log)
    return median([int(size) / float(seconds) for size, seconds in moved] or [0.0])


def memory_of(loopback: Loopback) -> dict[str, int]:
    """Return the coordinator's memory in MiB: peak resident size, and anonymous memory now."""
    text = Path(f"/proc/{loopback.processes['coordinator'].pid}/status").read_text(encoding="utf-8")
    return {name: int(kib) // 1024 for name, kib in re.findall(r"(VmHWM|RssAnon):\s+(\d+) kB", text)}


@contextmanager
def peak_of(loopback: Loopback) -> Iterator[dict[str, int]]:
    """Watch the coordinator's memory, and give the peak of each of `memory_of`."""
    peak, done = memory_of(loopback), Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak.update({name: max(peak[name], mib) for name, mib in memory_of(loopback).items()})

    watching = Thread(target=watch)
    watching.start()
    try:
        yield peak
    finally:
        done.set()
        watching.join()
