"""The benchmark of a Flower app: its lines, and that memory is a whole family's."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedcore.bench import flower
from fedcore.bench.flower import PROJECT, measure, peaks_of, run, tree
from fedcore.errors import SpecError


def test_ratios_are_of_neighbouring_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([9.0, 1.0, 8.0, 2.0, 30.0, 3.0])  # Flower's and ours, in turn
    engines = []

    def ran(engine: str, *_: Any, watched: bool = False) -> dict[str, Any]:
        engines.append(engine)
        if watched:
            return {"peak_rss_mb": 600 if engine == "flower" else 200, "peak_pss_mb": 100, "accuracy": 0.5}
        return {"warm_round_s": (s := next(seconds)), "shell_to_end_s": s + 1, "accuracy": 0.5}

    monkeypatch.setattr(flower, "run", ran)
    theirs, ours, ratios = measure("digits-mlp-10", 5, 3)
    assert engines == 4 * ["flower", "fedcore"]
    assert (theirs["engine"], theirs["warm_round_s"], theirs["peak_rss_mb"]) == ("flower", 9.0, 600)
    assert (ours["engine"], ours["warm_round_s"], ours["accuracy"]) == ("fedcore", 2.0, 0.5)
    assert ratios["warm_round_s_ratio"] == 9.0  # of 9, 4 and 10
    assert ratios["peak_rss_mb_ratio"] == 3.0


def test_a_job_of_cohorts_is_refused() -> None:
    with pytest.raises(SpecError, match="draws cohorts"):
        next(measure("mnist-cnn-100", 2, 1))


def test_the_memory_of_a_family_is_that_of_all() -> None:
    child = "import os, subprocess, sys, time; big = bytearray(os.urandom(40 * 2**20)); time.sleep(1)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    process = subprocess.Popen([sys.executable, "-c", code])
    assert process.pid in tree(os.getpid())
    peaks = peaks_of(process)
    assert peaks["peak_rss_mb"] > peaks["peak_pss_mb"] > 40


@pytest.mark.slow
def test_the_app_runs_here(tmp_path: Path) -> None:
    source = Path(flower.__file__).with_name("flower_app.py").read_text(encoding="utf-8")
    (tmp_path / "job_app.py").write_text(source, encoding="utf-8")
    (tmp_path / "pyproject.toml").write_text(PROJECT, encoding="utf-8")
    line = run("fedcore", "digits-mlp-10", 3, tmp_path, 2, watched=True)
    assert 0 < line["accuracy"] < 1 and line["peak_pss_mb"] > 100
    assert line["clients_per_s"] * line["warm_round_s"] == pytest.approx(10)
    assert line["first_round_s"] < line["shell_to_end_s"]
