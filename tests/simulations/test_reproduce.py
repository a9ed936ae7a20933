"""The published experiments: every spec composes, and the script resumes and says what was not run."""

from pathlib import Path

import pytest

from fedcore.simulations.grid import Grid
from fedcore.simulations.scenarios import scenario
from fedcore.simulations.scenarios.reproduce import EXPERIMENTS, Experiment, main, row_of
from fedcore.spec import RunSpec

SMALL = Experiment(
    "digits",
    {
        "strategy.aggregator": [{"name": "median"}, {"name": "krum", "f": 1}],
        "strategy.pre": [[], [{"name": "bucketing", "s": 2}]],
        "run.rounds": [2],
        "run.seed": [0],
    },
    {
        "median, none, 2": "1.0 %",
        "median, bucketing, 2": "2.0 %",
        "krum, none, 2": "3.0 %",
        "krum, bucketing, 2": "4.0 %",
    },
)


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda experiment: experiment.spec)
def test_every_cell_composes_and_has_the_papers_figure(experiment: Experiment, tmp_path: Path) -> None:
    grid = Grid(RunSpec.load(scenario(experiment.spec)), experiment.axes, tmp_path)
    assert {row_of(cell.values) for cell in grid.cells} == set(experiment.paper)


@pytest.mark.slow
def test_what_was_not_run_is_said_and_what_was_run_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(tmp_path), "--report"], [SMALL])
    assert "| median, none, 2 | 1.0 % | not run |" in capsys.readouterr().out
    main([str(tmp_path)], [SMALL])
    first = capsys.readouterr().out
    assert "not run" not in first and "| krum, bucketing, 2 | 4.0 % |" in first
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}
    assert len(written) == 4
    main([str(tmp_path)], [SMALL])
    assert capsys.readouterr().out == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")} == written
