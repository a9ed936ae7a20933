"""`fedcore bench ledger`: how long a device waits for its privacy budget to be reserved, on its own disk.

A reservation is durable when it returns (SQLite with synchronous = FULL), so the disk decides.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from fedcore.privacy.account import Claim
from fedcore.privacy.events import Gaussian
from fedcore.privacy.ledger import Ledger

LIMIT_MS = 20.0


def measure(rows: int, folder: Path) -> Iterator[dict[str, Any]]:
    """Reserve for so many rounds of DP-SGD, in a ledger made in a folder; yield one line.

    The first reservation of a process, which starts the accountant, has a figure of its own.
    """
    round_ = (Gaussian(1.0, 0.01, 20),)
    whole = (Gaussian(1.0, 0.01, 20 * rows),)
    seconds = []
    with TemporaryDirectory(dir=folder) as name:
        ledger = Ledger.open(Path(name) / "bench.ledger", "bench", "example", 1e6, 1e-5)
        for number in range(1, rows + 1):
            ref = f"bench/{number}.0/train"
            claim = Claim("bench", ref, "bench", "example", "enforced", round_, whole, once=False)
            started = time.perf_counter()
            ledger.reserve(claim)
            seconds.append(time.perf_counter() - started)
    first, *others = np.array(seconds) * 1e3
    yield {
        "bench": "ledger",
        "rows": rows,
        "median_ms": round(float(np.median(others)), 2),
        "p99_ms": round(float(np.quantile(others, 0.99)), 2),
        "first_ms": round(float(first), 1),
        "limit_ms": LIMIT_MS,
    }
