"""`fedcore simulate`, as a person runs it."""

import json
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from fedcore.cli import app
from fedcore.model_files import load_model

SPEC = """\
[run]
name = "small"
task = "fedcore.tasks:Digits"
rounds = 2

[cohort]
size = 4

[simulation]
clients = 4
"""


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a spec of two short rounds, in the folder where commands run."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.toml"
    path.write_text(SPEC)
    return path


def simulate(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["simulate", *map(str, arguments)])


def test_results_on_stdout_progress_on_stderr(spec: Path) -> None:
    done = simulate(spec, "--out", "out")
    assert done.exit_code == 0, done.output
    assert [line.split()[:2] for line in done.stderr.splitlines()] == [["round", "1/2"], ["round", "2/2"]]
    result = json.loads(Path("out/result.json").read_text())
    shown = {line.split()[0]: line.split(maxsplit=1)[1] for line in done.stdout.splitlines()}
    assert shown["accuracy"] == f"{result['final']['accuracy']:.4f}"
    assert shown["model"] == f"4,810 parameters, SHA-256 {result['model_sha256']}"
    assert shown["engine"] == f"{result['engine']} ({result['engine_reason']})"
    assert shown["files"] == "out"
    files = {"metrics.jsonl", "model.safetensors", "report.html", "result.json", "spec.toml", "state"}
    assert {path.name for path in Path("out").iterdir()} == files


def test_without_matplotlib_nothing_is_trained(spec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = simulate(spec, "--out", "out")
    assert done.exit_code == 2 and "matplotlib is not installed" in done.stderr
    assert not Path("out").exists()


def test_json_is_the_result_and_nothing_else(spec: Path) -> None:
    Path("noisy.py").write_text(
        "from fedcore.tasks import Digits\n"
        "class Noisy(Digits):\n"
        "    def model(self):\n"
        "        print('a word from the task')\n"
        "        return super().model()\n"
    )
    done = simulate(spec, "--set", "run.task=noisy:Noisy", "--out", "out", "--json", "--quiet")
    assert done.stdout == Path("out/result.json").read_text()
    assert done.stderr == "a word from the task\n"


def test_overrides_reach_the_run_and_its_spec(spec: Path) -> None:
    options = ("--set", "run.rounds=1", "--set", "client.optimizer.lr=0.3", "--engine", "sequential")
    assert simulate(spec, *options, "--seed", 7, "--out", "out").exit_code == 0
    result = json.loads(Path("out/result.json").read_text())
    assert (result["rounds"], result["seed"], result["engine"]) == (1, 7, "sequential")
    assert "lr = 0.3" in Path("out/spec.toml").read_text()


def test_without_out_a_new_folder_is_named_after_the_run(spec: Path) -> None:
    assert simulate(spec, "--set", "run.rounds=1").exit_code == 0
    assert [path.parent.name[:6] for path in Path("runs").glob("*/result.json")] == ["small-"]


def test_results_of_another_run_are_never_overwritten(spec: Path) -> None:
    Path("out").mkdir()
    Path("out/result.json").write_text("precious")
    done = simulate(spec, "--out", "out")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == "error: out holds the results of another run; name another folder with --out\n"
    assert Path("out/result.json").read_text() == "precious"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[run]\nround = 3", "{spec}:2: run.round: no such key; did you mean 'rounds'?"),
        ("[runs]", "{spec}:1: runs: no such key; did you mean 'run'?"),
        (
            "[cohort]\nclients = 3",
            "{spec}:2: cohort.clients: no such key; did you mean 'simulation.clients'?",
        ),
        ("[client]\nlr = 0.1", "{spec}:2: client.lr: no such key; did you mean 'client.optimizer.lr'?"),
        ("[run]\nrounds = 0", "{spec}:2: run.rounds: 0: expected at least 1"),
        ('[run]\nrounds = "3"', "{spec}:2: run.rounds: '3': expected a whole number"),
        ('[run]\nname = "a b"', "{spec}:2: run.name: 'a b': expected up to 63 letters, digits, . _ -"),
        ("[client]\nshuffle = 1", "{spec}:2: client.shuffle: 1: expected true or false"),
        (
            '[client]\n\noptimizer = {name = "sdg"}',
            "{spec}:3: client.optimizer.name: 'sdg' is not known; did you mean 'sgd'?",
        ),
        (
            "[client.optimizer]\nnesterov = true",
            "{spec}:1: client.optimizer: nesterov = true needs momentum > 0, such as momentum = 0.9",
        ),
        ("client = 3", "{spec}:1: client: 3: expected a table"),
        ("strategy = 3", "{spec}:1: strategy: 3: expected a table"),
        (
            "[privacy]\nepsilon = 1",
            "{spec}:2: privacy.epsilon: no such key; valid names: level",
        ),
        (
            "[run]\nrounds = ]\n",
            "{spec}: not valid TOML: Invalid value (at line 2, column 10)",
        ),
        ('[strategy]\nname = "fedavgg"', "strategy.name: 'fedavgg' is not known; did you mean 'fedavg'?"),
        (
            '[simulation]\npartition = {name = "dirichle", alpha = 1.0}',
            "simulation.partition.name: 'dirichle' is not known; did you mean 'dirichlet'?",
        ),
    ],
)
def test_a_wrong_spec_is_one_clear_line(spec: Path, line: str, message: str) -> None:
    spec.write_text(line)
    done = simulate(spec, "--set", "run.task=fedcore.tasks:Digits")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == f"error: {message.format(spec=spec)}\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "run.rounds"], "--set 'run.rounds': expected key=value, such as run.rounds=3"),
        (["--set", "rounds=3"], "--set rounds: no such key; did you mean 'run.rounds'?"),
        (["--set", "run.rounds=x"], "--set run.rounds: 'x': expected a whole number"),
        (["--set", "run.rounds.x=1"], "run.rounds.x: 'rounds' is a value, not a table"),
        (["--seed", "-1"], "--set run.seed: -1: expected at least 0"),
        (
            ["--engine", "sequental"],
            "--set simulation.engine: 'sequental' is not known; did you mean 'sequential'?",
        ),
        (
            ["--set", "run.task=x"],
            'run.task: \'x\': expected "module:object", such as "task:Digits", or an installed name',
        ),
        (
            ["--set", "run.task=fedcore.tasks:Digit"],
            "run.task: fedcore.tasks has no 'Digit'; did you mean 'Digits'?",
        ),
        (["--out", "run.toml"], "run.toml: File exists; name a folder that can be written with --out"),
    ],
)
def test_a_wrong_option_is_one_clear_line(spec: Path, options: list[str], message: str) -> None:
    done = simulate(spec, *options)
    assert (done.exit_code, done.stdout, done.stderr) == (2, "", f"error: {message}\n")


def test_a_missing_file_or_module_is_named(spec: Path) -> None:
    done = simulate("none.toml")
    assert done.exit_code == 2
    assert done.stderr.startswith("error: none.toml: No such file or directory; expected a run spec")
    done = simulate(spec, "--set", "run.task=nowhere_to_be_found:Digits")
    assert done.exit_code == 2
    assert "no module 'nowhere_to_be_found'" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_keeps_the_rounds_that_ended(spec: Path, number: signal.Signals) -> None:
    command = [
        sys.executable,
        "-m",
        "fedcore",
        "simulate",
        str(spec),
        "--set",
        "run.rounds=100000",
        "--out",
        "out",
    ]
    pipe = subprocess.PIPE
    # A shell's background jobs are born deaf to Ctrl-C; this one hears it wherever the tests are run.
    hearing = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, preexec_fn=hearing) as process:
        assert process.stdout and process.stderr
        while not process.stderr.readline().startswith("round      3/"):
            assert process.poll() is None
        time.sleep(0.05)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    result = json.loads(Path("out/result.json").read_text())
    kept = f"{result['rounds']} rounds and the model after them are kept in out"
    last = f"interrupted; {kept}; fedcore simulate --resume out goes on"
    assert (process.returncode, out, err.splitlines()[-1]) == (130, "", last)
    assert result["rounds"] >= 3
    assert len(Path("out/metrics.jsonl").read_text().splitlines()) == result["rounds"]
    assert load_model(Path("out/model.safetensors"))[1].digest == result["model_sha256"]
