"""`fedcore simulate --grid`, as a person runs it."""

import json
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from fedcore.cli import app

pytestmark = pytest.mark.slow  # together more than ten seconds

SPEC = """\
[run]
name = "small"
task = "fedcore.tasks:Digits"
rounds = 1

[cohort]
size = 4

[simulation]
clients = 4
engine = "sequential"
"""
GRID = ("--grid", "client.optimizer.lr=0.1,0.2", "--grid", "run.seed=0,1", "--out", "out")
NAMES = ["lr=0.1,seed=0", "lr=0.1,seed=1", "lr=0.2,seed=0", "lr=0.2,seed=1"]


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a spec of one short round, in the folder where commands run."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.toml"
    path.write_text(SPEC)
    return path


def simulate(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["simulate", *map(str, arguments)])


def test_a_line_a_cell_on_stdout_and_progress_on_stderr(spec: Path) -> None:
    done = simulate(spec, *GRID)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["lr", "seed", "accuracy", "loss", "train_loss", "seconds"]
    assert [line.split()[:2] for line in lines[1:5]] == [
        ["0.1", "0"],
        ["0.1", "1"],
        ["0.2", "0"],
        ["0.2", "1"],
    ]
    assert lines[5:] == ["table   out/table.csv", "report  out/report.html"]
    started = [line.split()[:3] for line in done.stderr.splitlines() if line.startswith("cell")]
    assert started == [["cell", f"{n}/4", name] for n, name in enumerate(NAMES, start=1)]
    files = {"grid.json", "report.html", "table.csv", *NAMES}
    assert {path.name for path in Path("out").iterdir()} == files

    again = simulate(spec, *GRID)
    assert (again.exit_code, again.stderr) == (0, "4 of 4 cells were done before\n")
    assert again.stdout == done.stdout


def test_json_is_the_summary_and_nothing_else(spec: Path) -> None:
    done = simulate(spec, *GRID, "--json", "--quiet")
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout == Path("out/grid.json").read_text()
    assert [cell["cell"] for cell in json.loads(done.stdout)["cells"]] == NAMES


def test_a_failed_cell_is_told_and_the_others_are_there(spec: Path) -> None:
    done = simulate(spec, "--grid", "client.optimizer.lr=1e30,0.1", "--out", "out", "--json")
    assert done.exit_code == 1
    assert [cell["status"] for cell in json.loads(done.stdout)["cells"]] == ["failed", "finished"]
    last = done.stderr.splitlines()[-1]
    assert last == "error: 1 of 2 cells did not finish; see out/table.csv"
    shown = simulate(spec, "--grid", "client.optimizer.lr=1e30,0.1", "--out", "out")
    assert "failed: round 1 had 0 of at least 3 updates" in shown.stdout.splitlines()[1]
    assert shown.stderr.startswith("1 of 2 cells were done before\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--grid", "run.seed"],
            "--grid 'run.seed': expected key=value,value, such as --grid run.seed=0,1,2",
        ),
        (["--grid", "run.sed=0,1"], "cell sed=0: run.sed: no such key; did you mean 'seed'?"),
        (["--grid", "run.rounds=1,x"], "cell rounds=x: run.rounds: 'x': expected a whole number"),
        (
            ["--grid", "strategy.optimizer=sgd,sdg"],
            "cell optimizer=sdg: strategy.optimizer.name: 'sdg' is not known; did you mean 'sgd'?",
        ),
        (["--grid", "run.seed=0,1", "--out", "run.toml"], "run.toml: File exists; name a folder that can be"),
    ],
)
def test_a_wrong_grid_is_one_clear_line(spec: Path, options: list[str], message: str) -> None:
    done = simulate(spec, *options)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1
    assert [path.name for path in spec.parent.iterdir()] == ["run.toml"]


def test_another_spec_in_the_same_folder_is_refused(spec: Path) -> None:
    assert simulate(spec, *GRID).exit_code == 0
    done = simulate(spec, *GRID, "--set", "run.rounds=2")
    assert (done.exit_code, done.stdout) == (2, "")
    said = "out holds another grid: run.rounds is 1 there and 2 here; name another folder with --out"
    assert done.stderr == f"error: {said}\n"
    single = simulate(spec, "--out", "out")
    assert single.stderr == "error: out holds the results of another run; name another folder with --out\n"


def test_ctrl_c_keeps_the_cells_that_ended(spec: Path) -> None:
    grid = ["--grid", "run.rounds=1,100000", "--out", "out"]
    command = [sys.executable, "-m", "fedcore", "simulate", str(spec), *grid]
    pipe = subprocess.PIPE
    # A shell's background jobs are born deaf to Ctrl-C; this one hears it wherever the tests are run.
    hearing = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, preexec_fn=hearing) as process:
        assert process.stdout and process.stderr
        while not process.stderr.readline().startswith("round      3/"):
            assert process.poll() is None, process.stderr.read()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    said = "1 of 2 cells are done and kept in out; the same command with --out out goes on"
    assert (process.returncode, out, err.splitlines()[-1]) == (130, "", f"interrupted; {said}")
    assert sorted(path.name for path in Path("out").glob("rounds=*")) == ["rounds=1", "rounds=100000.part"]
    cells = json.loads(Path("out/grid.json").read_text())["cells"]
    assert [cell["status"] for cell in cells] == ["finished", "not run"]
