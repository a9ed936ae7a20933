"""`fedcore bench aggregators`: every rule beside a single pass over the same memory, in turn.

The matrix is the one that the peers are measured on: n rows of d float32 deltas, the last f shifted. What
counts is the median of the ratios of neighbouring runs, because machines drift.
"""

import ctypes
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from fedcore.errors import SpecError, nearest
from fedcore.strategies.aggregators import (
    Aggregator,
    Bulyan,
    CenteredClipping,
    GeometricMedian,
    MeaMed,
    Mean,
    Median,
    MultiKrum,
    TrimmedMean,
)
from fedcore.strategies.matrix import aggregate_rows, mix_rows
from fedcore.strategies.passes import Rows, sweep
from fedcore.strategies.preaggregators import NearestNeighborMixing, PreAggregator

# name -> (rule, nearest-neighbour mixing before it, at most so many passes); no rule: only the mixing
CASES: dict[str, tuple[Callable[[int], Aggregator] | None, bool, float]] = {
    "mean": (lambda f: Mean(), False, 2),
    "median": (lambda f: Median(), False, 12),
    "trimmed_mean": (TrimmedMean, False, 12),
    "meamed": (MeaMed, False, 20),
    "multi_krum": (MultiKrum, False, 22),
    "geometric_median": (lambda f: GeometricMedian(iterations=32), False, 22),
    "centered_clipping": (lambda f: CenteredClipping(radius=5.0, iterations=1), False, 7),
    "nnm": (None, True, 35),
    "nnm+trimmed_mean": (TrimmedMean, True, 60),
    "bulyan": (Bulyan, False, 60),
}
NOISE, SHIFT, LIE = 0.01, 0.005, -0.03  # of a coordinate: deviation, honest mean, what a Byzantine row adds


def measure(
    clients: int, size: int, byzantine: int, rules: Sequence[str], runs: int, folder: Path | None
) -> Iterator[dict[str, Any]]:
    """Yield the line to print of each rule; with a folder the matrix lies there, in a file of its own."""
    chosen = list(rules) or (["median"] if folder else list(CASES))
    for name in chosen:
        if name not in CASES:
            raise SpecError(f"rule {name!r} is not known{nearest(name, CASES)}")
    with matrix(clients, size, byzantine, folder) as rows:
        for name in chosen:
            call, limit = case(name, byzantine)
            yield {
                "bench": "aggregators",
                "rule": name,
                "clients": clients,
                "parameters": size,
                "byzantine": byzantine,
                "matrix": "file" if folder else "memory",
                **timed(call, rows, runs),
                "limit_ratio": limit,
                "measured": time.strftime("%Y-%m-%d"),
            }


def case(name: str, byzantine: int) -> tuple[Callable[[Rows], Rows], float]:
    """Return the call that a case times, and how many passes it may take."""
    make, mixed, limit = CASES[name]
    pre: tuple[PreAggregator, ...] = (NearestNeighborMixing(byzantine),) if mixed else ()
    if make is None:
        return lambda rows: mix_rows(pre, rows), limit
    rule = make(byzantine)
    return lambda rows: aggregate_rows(pre, rule, rows), limit


def timed(call: Callable[[Rows], Rows], rows: Rows, runs: int) -> dict[str, Any]:
    """Time a call and a pass in turn; seconds, their ratio, and the memory beyond the matrix in MiB.

    cpu_s counts all threads: seconds well above cpu_s over the threads say that the machine had other work.
    """
    with anonymous() as memory:
        call(rows)  # also starts what a first call starts
    ours, passes, busy = [], [], []
    for _ in range(runs):
        passes.append(seconds(partial(read, rows)))
        begun = time.process_time()
        ours.append(seconds(partial(call, rows)))
        busy.append(time.process_time() - begun)
    ratio = median(a / b for a, b in zip(ours, passes, strict=True))
    return {
        "seconds": round(median(ours), 4),
        "cpu_s": round(median(busy), 4),
        "pass_s": round(median(passes), 4),
        "ratio_to_pass": round(ratio, 1),
        "anonymous_mib": round(memory["peak"]),
        "extra_anonymous_mib": round(memory["peak"] - memory["start"]),
    }


def seconds(call: Callable[[], object]) -> float:
    """Return how long a call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def read(rows: Rows) -> None:
    """Read all rows once with as many threads as the rules have, and do next to nothing with them."""

    def work(parts: Iterator[slice]) -> None:
        for part in parts:
            for row in rows:
                np.dot(row[part], row[part])

    sweep(rows.shape[1], 1 << 17, work)


@contextmanager
def matrix(clients: int, size: int, byzantine: int, folder: Path | None) -> Iterator[Rows]:
    """Make the matrix, in memory or in a temporary file in a folder."""
    if folder is None:
        rows: Rows = np.empty((clients, size), np.float32)
        yield fill(rows, byzantine)
        return
    needed, free = 4 * clients * size, shutil.disk_usage(folder).free
    if free < needed + 2**30:
        raise SpecError(
            f"{folder} has {free / 1e9:.0f} GB free, expected {needed / 1e9 + 1:.0f} GB; lower the size"
        )
    with tempfile.TemporaryDirectory(prefix="fedcore-bench-", dir=folder) as home:
        path = Path(home) / "rows.float32"
        written = np.memmap(path, np.float32, "w+", shape=(clients, size))
        fill(written, byzantine)
        written.flush()
        yield np.memmap(path, np.float32, "r", shape=(clients, size))


def fill(rows: Rows, byzantine: int) -> Rows:
    """Draw honest rows around one mean and Byzantine rows around another, in place."""
    rng = np.random.default_rng(0)
    for i, row in enumerate(rows):
        row[:] = rng.standard_normal(rows.shape[1], dtype=np.float32) * np.float32(NOISE)
        row += np.float32(SHIFT + (LIE if i >= len(rows) - byzantine else 0.0))
    return rows


@contextmanager
def anonymous() -> Iterator[dict[str, float]]:
    """Watch this process's anonymous memory: `start` and `peak` in MiB."""
    give_back()
    start, done = resident(), threading.Event()
    memory = {"start": start, "peak": start}

    def watch() -> None:
        while not done.wait(0.001):
            memory["peak"] = max(memory["peak"], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield memory
    finally:
        done.set()
        watcher.join()


def give_back() -> None:
    """Return the allocator's free memory to the system, so that what comes next does not hide in it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)


def resident() -> float:
    """Return this process's anonymous resident memory in MiB: what it holds beyond mapped files."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    raise OSError("/proc/self/status has no RssAnon; this figure needs Linux")
