"""Apps as people write them, unchanged, under Flower's own simulation and under ours: equal results.

Where an app fixes the order of its sums (mods), results are equal to the bit. Where the order is Flower's
draw of nodes (pytorch, sklearn), which is another in each of its runs, sums differ in their last bits, and
training builds on them.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
Run = Callable[..., Path]
NODES = 4


def read(path: Path) -> dict[str, NDArray[Any]]:
    """Return the arrays that an app has written."""
    with np.load(path) as arrays:
        return dict(arrays)


def test_pytorch(ours: Run, flowers: Run) -> None:
    here, there = (read(run("pytorch", NODES, "result.npz")) for run in (ours, flowers))
    assert here.keys() == there.keys()
    for name, array in there.items():
        np.testing.assert_allclose(here[name], array, rtol=1e-4, atol=1e-6, err_msg=name)
    assert here["accuracies"][-1] > 0.9


def test_sklearn(ours: Run, flowers: Run) -> None:
    here, there = (read(run("sklearn", NODES, "result.npz")) for run in (ours, flowers))
    for name, array in there.items():
        np.testing.assert_allclose(here[name], array, rtol=1e-6, atol=1e-9, err_msg=name)
    assert here["accuracies"][-1] > 0.9


def test_mods_to_the_bit(ours: Run, flowers: Run) -> None:
    here, there = (read(run("mods", NODES, "result.npz", "scale=0.25")) for run in (ours, flowers))
    assert {name: array.tobytes() for name, array in here.items()} == {
        n: a.tobytes() for n, a in there.items()
    }
    # One lifespan around each message; a mod that changes its content in place changes nobody else's.
    assert all(here[name].item() == 1 for name in ("alive", "scaled", "took", "server_alive"))


def test_the_same_run_twice(ours: Run) -> None:
    """A draw of nodes, and workers that are free in another order: all bits are the seed's."""
    sampled = ("sklearn", 8, "result.npz", "fraction-train=0.5")
    first, again, other = (read(ours(*sampled, seed=seed)) for seed in (1, 1, 2))
    assert {n: a.tobytes() for n, a in first.items()} == {n: a.tobytes() for n, a in again.items()}
    assert not np.array_equal(first["coef"], other["coef"])


def test_nodes_remember(ours: Run) -> None:
    lines = json.loads(ours("stateful", 3, "result.json", "num-server-rounds=4").read_text(encoding="utf-8"))
    counts = [1.0, 2.0, 3.0, 4.0]
    assert lines == {"w": 3 * [20.0], "trained": counts, "evaluated": counts, "agree": 4 * [1.0]}


def test_questions(ours: Run) -> None:
    said = ours("query", 4, "result.json", "greeting='good day'").read_text(encoding="utf-8")
    lines = json.loads(said)
    assert lines["greetings"] == [f"good day from {partition}" for partition in range(4)]
    assert lines["kinds"] == ["int,float,bool,str,bytes,list"] and lines["blobs"] == ["ff00"]
    assert lines["sum"] == 10.0 and lines["all"][3] == [0.0, 1.0, 2.0, 3.0]
    (first, reason), (second, _) = lines["errors"]
    assert first == second == 2 and "no data on partition 1" in reason  # CLIENT_APP_RAISED_EXCEPTION
    assert lines["good"] == 2
    ((code, reason),) = lines["unknown"]
    assert code == 2 and "No query function registered with name 'nothing'" in reason
    assert lines["in time"] == 3 and lines["waited"]


@pytest.mark.parametrize("boasts, mean", [("false", 1.5), ("true", 2.0)])
def test_an_app_of_the_older_kind(boasts: str, mean: float, ours: Run) -> None:
    """Nodes add 0 to 3 a round; who claims too many examples is left out, by the name that its weight had."""
    result = ours("legacy", 4, "result.txt", f"boasts={boasts}", most=1000)
    assert float(result.read_text(encoding="utf-8")) == 3 * mean


def test_secure_aggregation_of_flower(ours: Run) -> None:
    """The mean of 0 to 4, in both rounds, to the rounding of its quantisation."""
    values = ours("masked", 5, "result.txt").read_text(encoding="utf-8").split()
    assert [float(value) for value in values] == pytest.approx([0.0, 2.0, 2.0], abs=1e-3)
