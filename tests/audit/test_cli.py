"""`fedcore audit`, as a person runs it."""

import json
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from fedcore.audit import client_level, example_level
from fedcore.cli import app
from fedcore.client.dpsgd import DPSGD

pytestmark = pytest.mark.slow  # together more than ten seconds

SPEC = """\
[run]
name = "small"
task = "fedcore.tasks:Digits"
rounds = 4

[cohort]
size = 2

[client]
steps = 1

[evaluation]
where = "holdout"

[simulation]
clients = 40
"""

EXAMPLE = """
[privacy]
level = "example"
target_epsilon = 2.0
sampling_rate = 1.0
"""

CLIENT = """
[privacy]
level = "client"
target_epsilon = 2.0
population = 40
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(client_level, "FEWEST", 100)
    monkeypatch.setattr(client_level, "MOST", 100)


def run(text: str, *options: str) -> Result:
    Path("run.toml").write_text(text)
    return CliRunner().invoke(app, ["audit", "run.toml", "--out", "out", *options])


def test_an_audit_says_claim_bounds_and_verdict_and_writes_them() -> None:
    done = run(SPEC + EXAMPLE)
    assert done.exit_code == 0, done.output
    printed = " ".join(done.stdout.split())
    assert (
        "claim (2.00, 1e-05)-DP for one example against the coordinator (enforced; add/remove, PLD)"
        in printed
    )
    assert "first linear layer, without privacy: recovers the example" in printed
    assert "first linear layer, in this run: fails" in printed
    assert "verdict no violation found: epsilon is at least" in printed
    assert "this audit could have found" in printed
    assert [line.split()[1] for line in done.stderr.splitlines()] == ["1/4", "2/4", "3/4", "4/4"]
    written = json.loads(Path("out/audit.json").read_text())
    assert written["verdict"] == "no violation found" and written["unit"] == "example"
    assert "target_epsilon = 2.0" in Path("out/spec.toml").read_text()


def test_json_is_the_file_and_nothing_else() -> None:
    done = run(SPEC + EXAMPLE, "--json", "--quiet")
    assert done.exit_code == 0, done.output
    assert done.stdout == Path("out/audit.json").read_text() and not done.stderr
    found = json.loads(done.stdout)
    names = [attack["name"] for attack in found["attacks"]]
    assert names == [
        "Dirac examples, by the sum of rounds",
        "wrong targets, by the loss",
        "natural examples, by the loss",
    ]
    assert all(set(attack["rates"]) == {"0.1 %", "1 %"} for attack in found["attacks"])


def test_a_violation_has_exit_code_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DPSGD, "begin", quiet(DPSGD.begin))
    done = run(SPEC + EXAMPLE)
    assert done.exit_code == 1
    assert "verdict violation: epsilon is at least" in " ".join(done.stdout.split())
    assert json.loads(Path("out/audit.json").read_text())["verdict"] == "violation"


def quiet(original: object) -> object:
    """Return `begin` with the noise off."""

    def begin(self: DPSGD, *args: object, **options: object) -> None:
        original(self, *args, **options)  # type: ignore[operator]  # it is DPSGD.begin
        self.optimizer.noise_multiplier = 0.0

    return begin


def test_a_run_without_privacy_shows_what_an_attacker_learns() -> None:
    done = run(SPEC.replace("steps = 1", "epochs = 1"))
    assert done.exit_code == 0, done.output
    printed = " ".join(done.stdout.split())
    assert "claim none: this run is not private" in printed
    assert "verdict no claim to refute: epsilon is at least 5" in printed
    assert "in this run" not in printed


def test_noise_of_many_clients_is_not_audited() -> None:
    done = run(SPEC + '[privacy]\nlevel = "distributed"\nnoise_multiplier = 1.0\n')
    assert done.exit_code == 2 and 'audit the same training with privacy.level = "local"' in done.stderr


def test_clients_are_audited_with_an_estimate_that_is_marked_as_one() -> None:
    done = run(SPEC + CLIENT, "--json", "--quiet")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["unit"] == "client"
    names = [attack["name"] for attack in found["attacks"]]
    assert names == [
        "Dirac clients, by the sum of rounds",
        "Dirac clients, by the likelihood of rounds",
        "natural clients, by the loss",
        "one-shot clients, in the last model",
    ]
    assert [bound["kind"] for bound in found["attacks"][-1]["bounds"]] == ["estimate"]
    assert {g["adversary"] for g in found["guarantees"]} == {"receiver", "coordinator"}


def test_a_setting_without_power_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example_level, "DIRACS", 8)
    done = run((SPEC + EXAMPLE).replace("target_epsilon = 2.0", "target_epsilon = 300.0"))
    assert done.exit_code == 0, done.output
    printed = " ".join(done.stdout.split())
    assert "no violation found, nor could one have been" in printed
    assert "is the most that this audit can find; audit it with more noise" in printed


def test_results_of_another_run_are_not_overwritten() -> None:
    assert run(SPEC, "--quiet").exit_code == 0
    done = run(SPEC, "--quiet")
    assert done.exit_code == 2 and "holds another audit" in done.stderr
