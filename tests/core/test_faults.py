"""A process ends or fails at the place and the time that were asked for, and every place exists once."""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from fedcore import faults
from fedcore.errors import ConfigError
from fedcore.faults import FAULTS, POINTS, Fault, parse, point

ROOT = Path(__file__).parents[2]


def run(asked: str, program: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", f"from fedcore.faults import point\n{program}"]
    environment = {**os.environ, "FEDCORE_FAULTS": asked}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_every_point_is_used_once_and_there_is_no_other() -> None:
    used = Counter[str]()
    for room in ("fedcore", "server", "client", "strategies"):
        for path in (ROOT / room).rglob("*.py"):
            if path.resolve() != Path(faults.__file__).resolve():
                used.update(re.findall(r'\bpoint\("([^"]*)"\)', path.read_text(encoding="utf-8")))
    assert used == Counter(POINTS)


def test_a_process_is_killed_when_it_comes_by_for_the_nth_time() -> None:
    done = run("blob.write:3=kill", "for i in range(9):\n    print(i, flush=True)\n    point('blob.write')")
    assert (done.returncode, done.stdout.split()) == (-9, ["0", "1", "2"])


def test_the_disk_fails_from_the_nth_time_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAULTS, "blob.write", Fault("ENOSPC", 1))
    point("blob.write")
    point("blob.rename.before")
    for _ in range(3):
        with pytest.raises(OSError, match="No space left on device"):
            point("blob.write")


def test_nothing_happens_unasked() -> None:
    assert run("", "point('blob.write')").returncode == 0


def test_several_faults_are_asked_for_at_once() -> None:
    asked = parse("blob.write=EIO,agent.receipt:20=kill")
    assert asked == {"blob.write": Fault("EIO", 0), "agent.receipt": Fault("kill", 19)}


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        ("blob.writ=kill", "no point 'blob.writ'; did you mean 'blob.write'"),
        ("blob.write=explode", "expected kill, ENOSPC, EROFS or EIO"),
        ("blob.write", "expected kill"),
        ("blob.write:0=kill", "expected 1 or more"),
        ("blob.write:x=kill", "expected 1 or more"),
    ],
)
def test_what_makes_no_sense_is_refused(asked: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(problem)):
        parse(asked)
