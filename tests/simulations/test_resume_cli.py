"""`fedcore simulate --resume`, as a person uses it."""

import json
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from fedcore.cli import app

pytestmark = pytest.mark.slow  # together more than ten seconds

SPEC = """\
[run]
name = "small"
task = "mine_to_resume:Mine"
rounds = 3

[cohort]
size = 4

[simulation]
clients = 4
engine = "sequential"
"""
TASK = """\
from fedcore.tasks import Digits

class Mine(Digits):
    def model(self):
        print("a word from the task")
        return super().model()
"""


def simulate(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["simulate", *map(str, arguments)])


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of a finished run whose spec and task lie in another folder than the present one."""
    project = tmp_path / "project"
    project.mkdir()
    (project / "run.toml").write_text(SPEC)
    (project / "mine_to_resume.py").write_text(TASK)
    monkeypatch.chdir(tmp_path)
    assert simulate("project/run.toml", "--out", "out", "--quiet").exit_code == 0
    return tmp_path / "out"


def test_a_finished_run_says_so_and_shows_its_result(out: Path) -> None:
    before = json.loads((out / "result.json").read_text())
    done = simulate("--resume", "out")
    assert done.exit_code == 0, done.output
    assert done.stderr.splitlines() == ["3 of 3 rounds were done before", "a word from the task"]
    shown = {line.split()[0]: line.split(maxsplit=1)[1] for line in done.stdout.splitlines()}
    assert shown["model"] == f"4,810 parameters, SHA-256 {before['model_sha256']}"


def test_it_may_go_on_for_more_rounds(out: Path) -> None:
    rows = (out / "metrics.jsonl").read_text().splitlines()
    done = simulate("--resume", "out", "--set", "run.rounds=5", "--json")
    assert done.exit_code == 0, done.output
    assert [line.split()[:2] for line in done.stderr.splitlines()] == [
        *(["3", "of"], ["a", "word"], ["round", "4/5"], ["round", "5/5"])
    ]
    assert json.loads(done.stdout)["rounds"] == 5
    assert done.stdout == (out / "result.json").read_text()
    longer = (out / "metrics.jsonl").read_text().splitlines()
    assert longer[:3] == rows and [json.loads(row)["round"] for row in longer] == [1, 2, 3, 4, 5]


ALONE = (
    "--resume continues the run in out as it was; of all other options only --set run.rounds=N, --json and "
    "--quiet go with it"
)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["project/run.toml"], ALONE),
        (["--engine", "vectorized"], ALONE),
        (["--seed", 0], ALONE),
        (["--out", "other"], ALONE),
        (["--grid", "run.seed=0,1"], ALONE),
        (
            ["--set", "client.epochs=2"],
            "--set 'client.epochs=2': only run.rounds may change in a run that is continued",
        ),
        (["--set", "run.rounds=x"], "--set run.rounds: 'x': expected a whole number"),
        (["--set", "run.rounds=2"], "run.rounds = 2, but 3 rounds are done; expected at least 3"),
    ],
)
def test_a_run_is_not_continued_as_another(out: Path, options: list[object], message: str) -> None:
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    done = simulate("--resume", "out", *options)
    assert (done.exit_code, done.stdout, done.stderr) == (2, "", f"error: {message}\n")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_neither_a_spec_nor_a_run_is_one_clear_line(tmp_path: Path) -> None:
    done = simulate("--json")
    line = "error: expected a SPEC.toml, or --resume DIR for a run that was cut short\n"
    assert (done.exit_code, done.stderr) == (2, line)
    done = simulate("--resume", tmp_path)
    assert done.exit_code == 2
    assert done.stderr.startswith(
        f"error: {tmp_path} holds no run that can be continued; expected a folder that"
    )
