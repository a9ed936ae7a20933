"""The benchmarks of simulations: their lines, and jobs that do not exist."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from fedcore.bench.cli import app
from fedcore.bench.jobs import job_of, load, mnist_as_bytes, partition
from fedcore.data import mnist
from fedcore.errors import SpecError


def test_a_job_beside_the_plain_loop() -> None:
    options = ["simulate", "digits-mlp-20", "--engine", "vectorized", "--set", "client.optimizer.lr=0.1"]
    line = json.loads(CliRunner().invoke(app, options, catch_exceptions=False).stdout)
    assert (line["job"], line["engine"], line["device"], line["rounds"]) == (
        "digits-mlp-20",
        "vectorized",
        "cpu",
        5,
    )
    assert line["accuracy"] == line["plain_loop_accuracy"]
    assert line["ratio_to_plain_loop"] > 0 and line["peak_rss_mb"] > 0


@pytest.mark.slow
def test_growing_cohorts_and_their_picture(tmp_path: Path) -> None:
    picture = tmp_path / "scale.png"
    options = ["scale", "--cohorts", "5,20", "--rounds", "1", "--plot", str(picture)]
    said = CliRunner().invoke(app, options, catch_exceptions=False).stdout
    lines = [json.loads(line) for line in said.splitlines()]
    assert [(line["engine"], line["cohort"]) for line in lines] == [
        (engine, cohort) for engine in ("vectorized", "sequential") for cohort in (5, 20)
    ]
    for line in lines:
        assert sum(line[part] for part in ("arithmetic", "movement", "python")) == pytest.approx(1, abs=0.01)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_mnist_is_kept_as_bytes_and_taken_as_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels, labels = np.arange(6 * 784, dtype=np.uint8).reshape(6, 28, 28), np.arange(6, dtype=np.uint8)
    np.savez(tmp_path / "mnist.npz", x_train=pixels, y_train=labels, x_test=pixels[:2], y_test=labels[:2])
    monkeypatch.setenv("FEDCORE_DATA", str(tmp_path))
    kept, whole = mnist_as_bytes(), mnist()
    assert kept.test is not None and whole.test is not None
    assert kept.train.x.dtype == np.uint8
    for part, numbers in (
        (kept.train.take([4, 1]), whole.train.take([4, 1])),
        (kept.test.take([0]), whole.test.take([0])),
    ):
        assert part.x.dtype == np.float32 and np.array_equal(part.x, numbers.x)
        assert part.y.dtype == np.int64 and np.array_equal(part.y, numbers.y)


def test_jobs() -> None:
    assert load("noise").train.x.shape == (1000, 3, 32, 32)
    assert job_of("digits-mlp-7").clients == 7 and len(partition(job_of("digits-mlp-7"))[6]) == 32
    for name in ("digits-mlp-0", "digits-mlp-x", "digits-cnn-10"):
        with pytest.raises(SpecError, match="is not known"):
            job_of(name)
