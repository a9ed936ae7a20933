"""The apps, and what runs them elsewhere."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

import fedcore.wire  # noqa: F401  # before Flower, which imports gRPC without its bounds on TLS

APPS = Path(__file__).with_name("apps")
Run = Callable[..., Path]


@pytest.fixture(scope="session")
def apps() -> Path:
    """Return the folder of the apps."""
    return APPS


@pytest.fixture
def ours(tmp_path: Path) -> Run:
    """Return what runs an app by `fedcore flower run`; see `run`."""

    def here(app: str, nodes: int, result: str, *overrides: str, seed: int = 0, most: float = 1e9) -> Path:
        command = [sys.executable, "-m", "fedcore", "flower", "run", str(APPS / app)]
        written = tmp_path / f"ours-{seed}-{result}"
        config = " ".join([f'result="{written}"', *overrides])
        run(
            [
                *command,
                f"--seed={seed}",
                f"--largest-weight={most}",
                f"--num-supernodes={nodes}",
                "-c",
                config,
            ]
        )
        return written

    return here


@pytest.fixture
def flowers(tmp_path: Path) -> Run:
    """Return what runs an app in Flower's own simulation, with Ray; see `run`."""

    def there(app: str, nodes: int, result: str, *overrides: str) -> Path:
        written = tmp_path / f"flowers-{result}"
        command = [sys.executable, "-m", "fedcore.bench.under_flower", str(APPS / app), str(nodes)]
        run([*command, f'result="{written}"', *overrides])
        return written

    return there


def run(command: list[str]) -> None:
    """Run a command in a process group of its own, of which nothing is left; Ray's servers take a while."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        said, _ = process.communicate(timeout=120)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, said[-3000:]
