"""agent.toml: what people write into it, and what they are told when it does not fit."""

import tomllib
from pathlib import Path

import pytest

from fedcore.client.config import Config, Settings, write_template
from fedcore.errors import ConfigError, SpecError


def load(folder: Path, text: str) -> Config:
    (folder / "agent.toml").write_text(text, encoding="utf-8")
    return Config.load(folder)


def test_the_template_holds_every_key_with_its_default(tmp_path: Path) -> None:
    path = write_template(tmp_path / "agent", "example.org:8710")
    config = Config.load(path.parent)
    assert config.settings == Settings(coordinator="example.org:8710")
    written = tomllib.loads(path.read_text(encoding="utf-8"))
    assert set(written) == set(Settings.model_fields)
    for table in ("policy", "worker", "ledger", "flower"):
        assert set(written[table]) == set(type(getattr(config.settings, table)).model_fields)
    assert config.ledger is None and config.apps == {}
    assert config.state == (tmp_path / "agent" / "state").resolve()


def test_a_file_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    write_template(tmp_path).write_text("# mine")
    with pytest.raises(ConfigError, match="already exists"):
        write_template(tmp_path)
    assert (tmp_path / "agent.toml").read_text() == "# mine"


def test_the_template_takes_no_address_that_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="HOST:PORT"):
        write_template(tmp_path, 'x"\nstate = "/')
    assert not (tmp_path / "agent.toml").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('\ncoordinater = "h:1"', r"agent.toml:2: coordinater: no such key; did you mean 'coordinator'\?"),
        ('coordinator = "h"', "agent.toml:1: coordinator: 'h': expected HOST:PORT"),
        ("[policy]\nsmallest_cohort = 0", "agent.toml:2: policy.smallest_cohort: 0: expected at least 1"),
        ('[policy]\nsmallest_cohort = "2"', "agent.toml:2: policy.smallest_cohort: '2': expected a whole"),
        ("[policy]\nsmallest_cohorts = 2", r"agent.toml:2: .* did you mean 'smallest_cohort'\?"),
        ('[policy]\nencryption = "tsl"', r"agent.toml:2: .*'tsl' is not known; did you mean 'tls'\?"),
        ("[tasks]\n\nDigits = 3", "agent.toml:3: tasks.Digits: 3: expected text in quotes"),
        (
            'labels = {site = ""}',
            "agent.toml:1: labels: expected at most 16 labels, names and values of 1 to",
        ),
        ('labels = ["eu"]', "agent.toml:1: labels: .*expected a table"),
        ("labels = {site = 3}", "agent.toml:1: labels.site: 3: expected text in quotes"),
        ("[data]\nsince = 2020-01-31", "agent.toml:2: data.since"),
        ('[policy]\nhours = "22-6"', "agent.toml:2: policy.hours: '22-6': expected HH:MM-HH:MM, local time"),
        ('[policy]\nhours = "24:00-06:00"', "agent.toml:2: policy.hours: .* such as 22:00-06:00"),
        ('[ledger]\npath = "a"', "agent.toml:1: ledger: path needs dataset and epsilon beside it"),
        ('[ledger]\nunit = "patient"', "agent.toml:2: ledger.unit: 'patient' is not known"),
        (
            '[worker]\nmemory = "4GB"',
            "agent.toml:2: worker.memory: '4GB': expected most memory, such as 4GiB",
        ),
        ('[worker]\nmemory = "0GiB"', "agent.toml:2: worker.memory: '0GiB': expected most memory"),
        ("[flower]\napps = ['a']", "agent.toml:2: flower.apps: .*expected a table"),
        ("[flower]\nnode = {partition-id = [0]}", "agent.toml:2: flower.node.partition-id"),
        ("evaluator = 1", "agent.toml:1: evaluator: 1: expected true or false"),
        ("state = ", "not valid TOML"),
    ],
)
def test_what_does_not_fit_is_told_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, text)


def test_a_missing_file_is_told_with_the_next_step(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'fedcore client init DIR' writes one"):
        Config.load(tmp_path)


def test_a_place_is_the_key_or_else_its_table(tmp_path: Path) -> None:
    config = load(tmp_path, '[tasks]\nA = "a:A"\n\n[policy]\nsmallest_cohort = 2\n')
    assert config.place("policy", "smallest_cohort") == "agent.toml:5: policy.smallest_cohort"
    assert config.place("policy", "encryption") == "agent.toml:4: policy.encryption"
    assert config.place("tasks", "A") == "agent.toml:2: tasks.A"
    assert config.place("coordinator") == "agent.toml: coordinator"


def test_data_options_may_be_anything_that_json_knows(tmp_path: Path) -> None:
    config = load(tmp_path, '[data]\npath = "a.npz"\nlimits = [1, 2.5]\nnested = { deep = true }\n')
    assert config.settings.data == {"path": "a.npz", "limits": [1, 2.5], "nested": {"deep": True}}


LEDGER = '[ledger]\npath = "{}"\ndataset = "clinic-a"\nepsilon = 8.0\n'


def test_a_ledger_lies_outside_the_agents_state(tmp_path: Path) -> None:
    assert load(tmp_path, LEDGER.format("../a.ledger")).ledger == (tmp_path / "../a.ledger").resolve()
    assert load(tmp_path, LEDGER.format("~/a.ledger")).ledger == Path.home() / "a.ledger"
    for inside in ("state/a.ledger", "../x/../state/a.ledger", str(tmp_path / "state" / "deep" / "a.ledger")):
        folder = tmp_path / "x" if inside.startswith("..") else tmp_path
        folder.mkdir(exist_ok=True)
        config = load(folder, f'state = "{tmp_path / "state"}"\n' + LEDGER.format(inside))
        with pytest.raises(ConfigError, match=r"agent.toml:3: ledger.path: .* lies in the agent's state"):
            _ = config.ledger


def test_an_evaluator_has_no_ledger(tmp_path: Path) -> None:
    config = load(tmp_path, "evaluator = true\n" + LEDGER.format("a.ledger"))
    with pytest.raises(ConfigError, match="an evaluator holds the operator's data"):
        _ = config.ledger


APP = '[flower.apps]\n"fedcore/a" = "{}"\n'


def test_apps_lie_relative_to_the_file(tmp_path: Path) -> None:
    assert load(tmp_path, APP.format("../a")).apps == {"fedcore/a": (tmp_path / "../a").resolve()}
    assert load(tmp_path, APP.format("~/a")).apps == {"fedcore/a": Path.home() / "a"}
    text = '[policy]\nhours = "22:00-06:00"\n[worker]\nmemory = "1GiB"\n' + APP.format("a")
    assert load(tmp_path, text).apps  # what holds for an app too


@pytest.mark.parametrize(
    ("promise", "key"),
    [
        (LEDGER.format("../a.ledger"), "agent.toml:2: ledger.path"),
        ("evaluator = true\n", "agent.toml:1: evaluator"),
        ('[policy]\nencryption = "sealed"\n', "agent.toml:2: policy.encryption"),
        ("[policy]\nsmallest_cohort = 2\n", "agent.toml:2: policy.smallest_cohort"),
        ("[policy]\nlargest_weight = 10\n", "agent.toml:2: policy.largest_weight"),
        ("[policy]\nrounds_per_day = 3\n", "agent.toml:2: policy.rounds_per_day"),
    ],
)
def test_no_app_beside_what_it_cannot_be_held_to(tmp_path: Path, promise: str, key: str) -> None:
    assert load(tmp_path, promise).apps == {}
    config = load(tmp_path, promise + APP.format("a"))
    with pytest.raises(ConfigError, match=rf"{key}: it cannot be kept for the apps of \[flower\]"):
        _ = config.apps
