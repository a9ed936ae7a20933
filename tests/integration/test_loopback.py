"""A federation on loopback leaves no process behind, however the one that made it is told to end."""

import json
import os
import signal
import sys
import time
from pathlib import Path
from subprocess import PIPE, Popen

import pytest

MAKER = """
import json, sys, time
from pathlib import Path
from fedcore.loopback import federation

with federation(Path(sys.argv[1])) as running:
    print(json.dumps({name: process.pid for name, process in running.processes.items()}), flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_federation_ends_with_whoever_made_it(number: signal.Signals, tmp_path: Path) -> None:
    with Popen([sys.executable, "-c", MAKER, str(tmp_path)], stdout=PIPE, stderr=PIPE, text=True) as maker:
        assert maker.stdout is not None and maker.stderr is not None
        pids = json.loads(maker.stdout.readline())
        assert set(pids) == {"authority", "coordinator"} and all(map(running, pids.values()))
        maker.send_signal(number)
        assert "KeyboardInterrupt" in maker.stderr.read()
    deadline = time.monotonic() + 5
    while any(map(running, pids.values())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(running, pids.values()))


def running(pid: int) -> bool:
    """Tell whether there is a process of this number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
