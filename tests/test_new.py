"""`fedcore new`: a project that works before its owner has changed a line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedcore.cli import app
from fedcore.spec import RunSpec


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "my project"
    done = CliRunner().invoke(app, ["new", str(folder)])
    assert done.exit_code == 0, done.output
    assert done.stdout.endswith(f"next   cd '{folder}'\n       fedcore simulate run.toml\n")
    return folder


def run(*arguments: str, folder: Path) -> str:
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_simulates_at_once(project: Path) -> None:
    printed = run("fedcore", "simulate", "run.toml", "--set", "run.rounds=3", "--json", folder=project)
    assert json.loads(printed)["final"]["accuracy"] > 0.2


@pytest.mark.slow
def test_its_test_passes(project: Path) -> None:
    assert "1 passed" in run("pytest", "-p", "no:asyncio", folder=project)


def test_its_files_are_short_and_the_spec_has_every_table(project: Path) -> None:
    assert sorted(path.name for path in project.iterdir()) == [
        "README.md",
        "run.toml",
        "task.py",
        "test_task.py",
    ]
    assert len((project / "task.py").read_text().splitlines()) <= 20
    spec = (project / "run.toml").read_text()
    missing = [table for table in RunSpec.model_fields if f"\n[{table}]" not in spec]
    assert missing == ["attack"], "it is there as a comment"
    assert "\n# [attack]" in spec


def test_a_folder_with_anything_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text("mine")
    done = CliRunner().invoke(app, ["new", str(tmp_path)])
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == f"error: {tmp_path} is not empty; name a folder that does not exist yet\n"
    assert (tmp_path / "task.py").read_text() == "mine"


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = CliRunner().invoke(app, ["new", str(tmp_path / "file")])
    assert (done.exit_code, done.stderr) == (
        2,
        f"error: {tmp_path / 'file'}: File exists; name another folder\n",
    )


def test_a_package_with_a_part_of_a_strategy(tmp_path: Path) -> None:
    folder = tmp_path / "my rule"
    done = CliRunner().invoke(app, ["new", "--strategy", str(folder)])
    assert done.exit_code == 0, done.output
    assert done.stdout.endswith(f"next   cd '{folder}'\n       python -m pytest\n")
    assert "2 passed" in run("pytest", "-p", "no:asyncio", folder=folder)
