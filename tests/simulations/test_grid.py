"""Grids run, resumed, and what they leave in their folder."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch

import fedcore
from fedcore.errors import ConfigError, SpecError, TaskError
from fedcore.simulations.grid import Grid, GridProgress, Outcome, read_outcome, run_grid
from fedcore.simulations.run import simulate

pytestmark = pytest.mark.slow  # together more than ten seconds

AXES: dict[str, list[Any]] = {"client.optimizer.lr": [0.1, 0.2], "run.seed": [0, 1]}
NAMES = ["lr=0.1,seed=0", "lr=0.1,seed=1", "lr=0.2,seed=0", "lr=0.2,seed=1"]
FILES = {"metrics.jsonl", "model.safetensors", "report.html", "result.json", "spec.toml", "state"}


class Line(fedcore.Task):
    """y = 3 x, by least squares."""

    metrics = MappingProxyType({"error": lambda output, target: (output - target).abs().squeeze(1)})

    def model(self) -> torch.nn.Module:
        return torch.nn.Linear(1, 1)

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.mse_loss(output, target)

    def dataset(self) -> fedcore.ArrayDataset:
        x = np.linspace(-1, 1, 40, dtype=np.float32)[:, None]
        return fedcore.ArrayDataset(x, 3 * x)

    def holdout(self) -> fedcore.ArrayDataset:
        return self.dataset()


class Lost(Line):
    """Is measured as no number."""

    metrics = MappingProxyType({"error": lambda output, target: output.squeeze(1) * np.nan})


def spec(*overrides: str) -> fedcore.RunSpec:
    """Return 2 rounds of 2 clients; `auto` might choose another engine each time."""
    simulation = {"clients": 2, "engine": "sequential"}
    tables = {
        "run": {"rounds": 2},
        "simulation": simulation,
        "cohort": {"size": 2},
        "evaluation": {"where": "holdout"},
    }
    return fedcore.RunSpec.parse(tables, overrides)


def folders(out: Path) -> list[str]:
    return sorted(path.name for path in out.iterdir() if path.is_dir())


def interrupted_at(cell: str, round: int) -> Callable[[GridProgress], None]:
    """Return a progress that interrupts a cell when a round of it has ended."""

    def progress(at: GridProgress) -> None:
        if at.cell == cell and at.now and at.now.row and at.now.round == round:
            raise KeyboardInterrupt

    return progress


def test_every_cell_is_the_run_that_its_spec_alone_gives(tmp_path: Path) -> None:
    grid = run_grid(spec(), AXES, tmp_path / "grid", task=Line())
    assert folders(tmp_path / "grid") == NAMES and grid.unfinished == 0
    for cell in grid.cells:
        folder = tmp_path / "grid" / cell.name
        assert {path.name for path in folder.iterdir()} == FILES
        alone = simulate(Line(), cell.spec)
        assert json.loads((folder / "result.json").read_text())["model_sha256"] == alone.parameters.digest
        assert fedcore.RunSpec.load(folder / "spec.toml").run.seed == cell.values["run.seed"]


def test_what_it_leaves_as_a_whole(tmp_path: Path) -> None:
    grid = run_grid(spec(), AXES, tmp_path, task=Line())
    written = json.loads((tmp_path / "grid.json").read_text())
    assert written == grid.summary()
    assert (written["axes"], written["spec"]) == (AXES, spec().model_dump(mode="json"))
    with (tmp_path / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [f"lr={row['client.optimizer.lr']},seed={row['run.seed']}" for row in rows] == NAMES
    assert [float(row["error"]) for row in rows] == [cell["final"]["error"] for cell in written["cells"]]
    assert {(row["rounds"], row["status"], row["reason"]) for row in rows} == {("2", "finished", "")}
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 1 and all(f"{name.replace('=', '%3D')}" in page for name in ("lr=0.1",))


def test_a_grid_that_was_interrupted_goes_on_where_it_was(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_grid(spec(), AXES, tmp_path / "twice", task=Line(), progress=interrupted_at(NAMES[2], 2))
    assert folders(tmp_path / "twice") == [*NAMES[:2], f"{NAMES[2]}.part"]
    cells = json.loads((tmp_path / "twice" / "grid.json").read_text())["cells"]
    assert [cell["status"] for cell in cells] == ["finished", "finished", "not run", "not run"]
    kept = (tmp_path / "twice" / NAMES[0] / "result.json").stat().st_mtime_ns

    seen: list[GridProgress] = []
    grid = run_grid(spec(), AXES, tmp_path / "twice", task=Line(), progress=seen.append)
    assert (grid.before, grid.left, folders(tmp_path / "twice")) == (2, 0, NAMES)
    assert list(dict.fromkeys(at.cell for at in seen)) == NAMES[2:]
    assert (tmp_path / "twice" / NAMES[0] / "result.json").stat().st_mtime_ns == kept
    once = run_grid(spec(), AXES, tmp_path / "once", task=Line())
    for here, there in zip(once.outcomes, grid.outcomes, strict=True):
        assert here.final == there.final


def test_progress_counts_cells(tmp_path: Path) -> None:
    seen: list[GridProgress] = []
    run_grid(spec(), {"run.seed": [0, 1]}, tmp_path, task=Line(), progress=seen.append)
    assert [(at.cell, at.over) for at in seen if at.now is None] == [
        ("seed=0", 0),
        ("seed=0", 1),
        ("seed=1", 1),
        ("seed=1", 2),
    ]
    rows = [(at.cell, at.now.round) for at in seen if at.now and at.now.row]
    assert rows == [("seed=0", 1), ("seed=0", 2), ("seed=1", 1), ("seed=1", 2)]


def test_a_cell_that_fails_does_not_end_the_grid_and_is_tried_again(tmp_path: Path) -> None:
    axes = {"client.optimizer.lr": [0.1, 1e30, 0.2]}
    grid = run_grid(spec(), axes, tmp_path, task=Line())
    assert [outcome.status for outcome in grid.outcomes] == ["finished", "failed", "finished"]
    failed = grid.outcomes[1]
    assert failed.reason.startswith("round 1 had 0 of at least 2 updates; refused:") and failed.final == {}
    assert (tmp_path / "lr=1e+30" / "failure.txt").read_text().startswith(failed.reason)
    assert grid.unfinished == grid.left == 1

    seen: list[GridProgress] = []
    again = run_grid(spec(), axes, tmp_path, task=Line(), progress=seen.append)
    assert {at.cell for at in seen} == {"lr=1e+30"} and again.outcomes[1].status == "failed"


def test_a_bug_is_recorded_with_its_place_and_the_rounds_before_it(tmp_path: Path) -> None:
    class Late(Line):
        """Fails in the second round."""

        calls = 0

        def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            Late.calls += 1
            if Late.calls == 4:  # two clients of one batch each, an evaluation, the next client
                raise ZeroDivisionError("a bug of\nthe task")
            return super().loss(output, target)

    grid = run_grid(spec(), {"run.seed": [3]}, tmp_path, task=Late())
    (outcome,) = grid.outcomes
    assert (outcome.status, outcome.reason) == ("failed", "ZeroDivisionError: a bug of the task")
    assert outcome.rounds == 1 and set(outcome.final) == {"error", "loss", "train_loss"}
    assert "in loss" in (tmp_path / "seed=3" / "failure.txt").read_text()
    assert len((tmp_path / "seed=3" / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_run_that_ends_as_no_number_has_diverged_and_is_not_repeated(tmp_path: Path) -> None:
    grid = run_grid(spec(), {"run.seed": [0]}, tmp_path, task=Lost())
    (outcome,) = grid.outcomes
    assert (outcome.status, outcome.reason, outcome.final["error"]) == ("diverged", "error is 1024", 1024.0)
    assert (grid.unfinished, grid.left) == (1, 0)
    seen: list[GridProgress] = []
    assert run_grid(spec(), {"run.seed": [0]}, tmp_path, task=Lost(), progress=seen.append).before == 1
    assert not seen


def test_a_number_that_json_does_not_have(tmp_path: Path) -> None:
    result = {"final": {"error": float("inf"), "loss": 0.5}, "rounds": 2, "seconds_per_round": [0.25, 0.5]}
    (tmp_path / "result.json").write_text(json.dumps(result))
    assert read_outcome(tmp_path) == Outcome(
        "diverged", "error is inf", {"error": None, "loss": 0.5}, rounds=2, seconds=0.75
    )


@pytest.mark.parametrize(
    ("overrides", "axes", "difference"),
    [
        (["run.rounds=3"], {"run.seed": [0, 1]}, "run.rounds is 2 there and 3 here"),
        (["client.optimizer.lr=0.3"], {"run.seed": [0, 1]}, "client.optimizer.lr is 0.1 there and 0.3 here"),
        ([], {"run.seed": [0, 1, 2]}, "its axes are run.seed=0,1, and not run.seed=0,1,2"),
        (
            [],
            {"run.seed": [0, 1], "cohort.size": [1]},
            "its axes are run.seed=0,1, and not run.seed=0,1 cohort.size=1",
        ),
    ],
)
def test_another_grid_is_never_mixed_in(
    tmp_path: Path, overrides: list[str], axes: dict[str, Any], difference: str
) -> None:
    run_grid(spec(), {"run.seed": [0, 1]}, tmp_path, task=Line())
    before = (tmp_path / "grid.json").read_bytes()
    with pytest.raises(ConfigError) as raised:
        run_grid(spec(*overrides), axes, tmp_path, task=Line())
    message = f"{tmp_path} holds another grid: {difference}; name another folder with --out"
    assert str(raised.value) == message
    assert (tmp_path / "grid.json").read_bytes() == before


def test_results_of_anything_else_are_left_alone(tmp_path: Path) -> None:
    simulate(Line(), spec(), out=tmp_path / "run")
    with pytest.raises(ConfigError, match="holds the results of another run"):
        run_grid(spec(), AXES, tmp_path / "run", task=Line())
    run_grid(spec(), {"run.seed": [0]}, tmp_path / "grid", task=Line())
    (tmp_path / "grid" / "grid.json").unlink()
    with pytest.raises(ConfigError, match=r"holds seed=0 of a grid whose grid\.json is gone"):
        run_grid(spec(), {"run.seed": [0]}, tmp_path / "grid", task=Line())
    (tmp_path / "grid" / "grid.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"grid\.json: not the record of a grid"):
        run_grid(spec(), {"run.seed": [0]}, tmp_path / "grid", task=Line())


def test_a_cell_whose_folder_was_removed_is_run_again(tmp_path: Path) -> None:
    run_grid(spec(), {"run.seed": [0, 1]}, tmp_path, task=Line())
    shutil.rmtree(tmp_path / "seed=1")
    seen: list[GridProgress] = []
    run_grid(spec(), {"run.seed": [0, 1]}, tmp_path, task=Line(), progress=seen.append)
    assert {at.cell for at in seen} == {"seed=1"}


@pytest.mark.parametrize(
    ("axes", "error", "message"),
    [
        (
            {"strategy.optimizer": [{"name": "sgd"}, {"name": "sdg"}]},
            SpecError,
            "cell optimizer=sdg: strategy.",
        ),
        (
            {"simulation.partition": ["iid", "idd"]},
            SpecError,
            "cell partition=idd: simulation.partition.name",
        ),
        (
            {"strategy.aggregator": ["median", {"name": "krum", "f": 5}]},
            SpecError,
            "cell aggregator=krum-f=5: ",
        ),
        (
            {"attack": ["alie", "allie"], "attack.fraction": [0.5]},
            SpecError,
            "cell attack=allie,fraction=0.5: ",
        ),
        ({"run.task": ["fedcore.tasks:Digits", "fedcore.tasks:Digit"]}, TaskError, "did you mean 'Digits'?"),
    ],
)
def test_a_mistake_in_the_last_cell_is_found_before_the_first_runs(
    tmp_path: Path, axes: dict[str, Any], error: type[Exception], message: str
) -> None:
    task = None if "run.task" in axes else Line()
    with pytest.raises(error) as raised:
        Grid(spec(), axes, tmp_path / "grid", task=task)
    assert message in str(raised.value)
    assert not (tmp_path / "grid").exists()


def test_a_spec_by_its_path_finds_the_task_beside_it(tmp_path: Path) -> None:
    source = "from fedcore.tasks import Digits\nclass Mine(Digits): pass\n"
    (tmp_path / "beside_the_grid.py").write_text(source)
    text = spec("run.rounds=1", "run.task=beside_the_grid:Mine").to_toml()
    (tmp_path / "run.toml").write_text(text)
    grid = run_grid(tmp_path / "run.toml", {"run.seed": [5]}, tmp_path / "out")
    assert [outcome.status for outcome in grid.outcomes] == ["finished"]
