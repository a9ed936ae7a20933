"""A grid's metric against epsilon: which cells make a line, and what is drawn."""

from itertools import product
from typing import Any

import numpy as np
import pytest

from fedcore.simulations.grid_report import report
from fedcore.simulations.grid_utility import costs, draw
from fedcore.spec import RunSpec

NOISE = "privacy.noise_multiplier"
EPSILON = {0.5: 20.0, 1.0: 4.0, 2.0: 1.5}


def cell(values: dict[str, Any], accuracy: float, epsilon: float | None, **changed: Any) -> dict[str, Any]:
    final = {"accuracy": accuracy, "loss": 1.0} | ({} if epsilon is None else {"epsilon": epsilon})
    name = ",".join(map(str, values.values()))
    known = {"cell": name, "values": values, "status": "finished", "reason": "", "final": final}
    return known | {"rounds": 3, "seconds": 1.0} | changed


def grid(axes: dict[str, list[Any]], cells: list[dict[str, Any]]) -> dict[str, Any]:
    return {"spec": RunSpec().model_dump(mode="json"), "axes": axes, "cells": cells}


def by_noise(**changed: Any) -> dict[str, Any]:
    axes: dict[str, list[Any]] = {NOISE: [0.5, 1.0, 2.0], "run.seed": [0, 1]}
    cells = [
        cell({NOISE: z, "run.seed": seed}, 1 - z / 10 + seed / 50, EPSILON[z], **changed)
        for z, seed in product(*axes.values())
    ]
    return grid(axes, cells)


def test_seeds_are_averaged_and_points_run_from_the_most_private() -> None:
    (points,) = costs(by_noise(), "accuracy").values()
    assert [x for x, _ in points] == [1.5, 4.0, 20.0]
    assert [y for _, y in points] == pytest.approx([0.81, 0.91, 0.96])


def test_other_axes_and_levels_are_lines_of_their_own() -> None:
    tables: list[dict[str, Any]] = [{"level": "none"}, {"level": "example"}, {"level": "client"}]
    axes: dict[str, list[Any]] = {"privacy": tables, "client.optimizer.lr": [0.1, 1.0]}
    spent = {"none": None, "example": 2.0, "client": 2.0}
    cells = [
        cell({"privacy": level, "client.optimizer.lr": lr}, lr / 2, spent[level["level"]])
        for level, lr in product(*axes.values())
    ]
    lines = costs(grid(axes, cells), "accuracy")
    assert sorted(lines) == [
        f"lr {lr}, privacy {level}" for lr in ("0.1", "1") for level in ("client", "example", "none")
    ]
    assert lines["lr 1, privacy none"] == [(np.inf, 0.5)]
    assert lines["lr 1, privacy client"] == lines["lr 1, privacy example"] == [(2.0, 0.5)]


def test_only_finished_cells_count_and_a_grid_without_privacy_has_no_costs() -> None:
    assert costs(by_noise(status="failed"), "accuracy") == {}
    assert costs(by_noise(), "no such metric") == {}
    plain = grid({"run.seed": [0]}, [cell({"run.seed": 0}, 0.5, None)])
    assert costs(plain, "accuracy") == {}
    assert "against epsilon" not in report(plain)


def test_the_picture() -> None:
    axes = draw({"": [(1.0, 0.5), (4.0, 0.7), (np.inf, 0.9)]}, "accuracy").axes[0]
    curve, reached = axes.lines
    assert np.asarray(curve.get_xdata()).tolist() == [1.0, 4.0]
    assert np.asarray(reached.get_ydata()).tolist() == [0.9, 0.9]
    assert axes.get_xlabel().startswith("epsilon") and axes.get_ylabel() == "accuracy"
    assert axes.get_legend() is None
    named = draw({"private": [(1.0, 0.5)], "plain": [(np.inf, 0.9)]}, "accuracy").axes[0].get_legend()
    assert named and [text.get_text() for text in named.get_texts()] == ["private", "plain"]


def test_the_page_has_it_first() -> None:
    page = report(by_noise())
    places = [page.index(text) for text in ("Accuracy against epsilon", "Final accuracy by", "<h2>Runs</h2>")]
    assert places == sorted(places)
    assert "Final epsilon by" not in page and "<th>epsilon</th>" in page
