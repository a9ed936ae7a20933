"""The run spec: every default, overrides, errors that name the line and the nearest key, and the way back."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from fedcore.errors import SpecError
from fedcore.spec import Cohort, RunSpec

DEFAULTS: dict[str, dict[str, Any]] = {
    "run": {"name": "run", "task": "", "rounds": 10, "seed": 0},
    "cohort": {"size": 10, "minimum": 0, "over_select": 1.0, "deadline": 600.0, "labels": {}},
    "client": {
        "epochs": 1,
        "batch_size": 32,
        "steps": 0,
        "shuffle": True,
        "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.0, "nesterov": False, "weight_decay": 0.0},
        "schedule": {"name": "constant", "warmup": 0},
        "device": "cpu",
        "threads": 1,
        "autocast": False,
    },
    "strategy": {"name": "fedavg"},
    "limits": {"weight": 1e6, "update": 64.0, "norm": 0.0},
    "evaluation": {"every": 1, "where": "clients", "patience": 0, "monitor": "loss"},
    "encryption": {"updates": "auto", "encoding": "auto", "corrupt": 0.2, "lost": 0.1},
    "privacy": {"level": "none"},
    "simulation": {
        "clients": 100,
        "partition": {"name": "iid"},
        "test_fraction": 0.2,
        "engine": "auto",
        "chunk": 0,
        "workers": 0,
        "speed": {"name": "constant"},
    },
    "attack": {},
}

TEXT = """\
# a comment
[run]
name = "digits"
rounds = 4

[client]
epochs = 2
optimizer = {name = "sgd", lr = 0.5}

[simulation]
partition.name = "dirichlet"
partition.alpha = 0.3
"""


def parse(**tables: Any) -> RunSpec:
    return RunSpec.parse(tables)


def test_defaults() -> None:
    assert RunSpec().model_dump() == DEFAULTS == RunSpec.parse({}).model_dump()


def test_every_key_of_a_table_is_documented() -> None:
    for name, field in RunSpec.model_fields.items():
        table = field.annotation
        if isinstance(table, type) and issubclass(table, BaseModel):
            assert (table.__doc__ or "").startswith(f"[{name}]")


def test_a_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(TEXT, encoding="utf-8")
    spec = RunSpec.load(tmp_path / "run.toml", ["run.rounds=3", "client.optimizer.momentum=0.9"])
    assert (spec.run.name, spec.run.rounds, spec.client.epochs) == ("digits", 3, 2)
    assert spec.client.optimizer.model_dump(include={"lr", "momentum"}) == {"lr": 0.5, "momentum": 0.9}
    assert spec.simulation.partition == {"name": "dirichlet", "alpha": 0.3}


@pytest.mark.parametrize(
    ("override", "table", "key", "value"),
    [
        ("run.rounds=3", "run", "rounds", 3),
        (" run.rounds = 3 ", "run", "rounds", 3),
        ("run.task=task:Digits", "run", "task", "task:Digits"),
        ('run.task="task:Digits"', "run", "task", "task:Digits"),
        ("run.task=", "run", "task", ""),
        ("limits.update=3", "limits", "update", 3.0),
        ("client.shuffle=false", "client", "shuffle", False),
        (
            'simulation.partition={name = "shards", k = 2}',
            "simulation",
            "partition",
            {"name": "shards", "k": 2},
        ),
        ("simulation.partition.name=natural", "simulation", "partition", {"name": "natural"}),
        ("strategy.optimizer.lr=0.5", "strategy", "optimizer", {"lr": 0.5}),
        ("client.optimizer.lr=0.5", "client", "optimizer", {**DEFAULTS["client"]["optimizer"], "lr": 0.5}),
    ],
)
def test_an_override_sets_one_key(override: str, table: str, key: str, value: Any) -> None:
    changed = RunSpec().with_(override).model_dump()
    assert changed[table][key] == value
    assert {**changed, table: {**changed[table], key: None}} == {
        **DEFAULTS,
        table: {**DEFAULTS[table], key: None},
    }


@pytest.mark.parametrize("override", ["run.rounds", "=3", "run..rounds=3", ".=3"])
def test_an_override_without_key_or_value_is_refused(override: str) -> None:
    with pytest.raises(SpecError, match=r"expected key=value, such as run.rounds=3"):
        RunSpec().with_(override)


def test_an_override_below_a_value_is_refused() -> None:
    with pytest.raises(SpecError, match="'rounds' is a value, not a table"):
        RunSpec().with_("run.rounds.x=3")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[run]\nround = 3", r"run.toml:2: run.round: no such key; did you mean 'rounds'\?"),
        ("\n\n[runs]\nrounds = 3", r"run.toml:3: runs: no such key; did you mean 'run'\?"),
        ("[encryption]\nupdate = 'tls'", r"encryption.update: no such key; did you mean 'updates'\?"),
        ("[run]\n\n# why\nrounds = 0", "run.toml:4: run.rounds: 0: expected at least 1"),
        ("run.rounds = 0", "run.toml:1: run.rounds: 0"),
        ("[run]\nrounds = 'ten'", "run.toml:2: run.rounds: 'ten': expected a whole number"),
        ("[run]\nrounds = true", "run.toml:2: run.rounds: True: expected a whole number"),
        ("[run]\nname = 'no spaces'", "run.toml:2: run.name: 'no spaces'"),
        ("[run]\nseed = 9223372036854775808", "run.toml:2: run.seed"),
        ("run = 3", "run.toml:1: run: 3: expected a table"),
        ("[cohort]\nover_select = 0.9", "run.toml:2: cohort.over_select: 0.9: expected at least 1"),
        ("[cohort]\nlabels = {site = 'e u'}", "run.toml:2: cohort.labels: expected at most 16 labels"),
        ("[cohort]\n[cohort.labels]\n'' = 'eu'", "run.toml:2: cohort.labels: expected at most 16 labels"),
        ("[evaluation]\nevery = 0\npatience = 3", "run.toml:1: evaluation: patience = 3 counts evaluations"),
        ("[cohort]\ndeadline = inf", "run.toml:2: cohort.deadline: inf"),
        ("[client]\ndevice = 'gpu'", "run.toml:2: client.device: 'gpu': expected auto, cpu, cuda or cuda:N"),
        (
            "[client]\noptimizer = {name = 'sgd', lr = 0.0}",
            "run.toml:2: client.optimizer.lr: 0.0: expected more",
        ),
        (
            "[client]\noptimizer = {name = 'sgd', lrr = 1.0}",
            "client.optimizer.lrr: no such key; did you mean 'lr'",
        ),
        (
            "[client.optimizer]\nname = 'adam'\nmomentum = 0.9",
            "run.toml:3: client.optimizer.momentum: no such key",
        ),
        ("[client.optimizer]\nname = 'adan'", "run.toml:2: client.optimizer.*'adan'.*did you mean 'adam'"),
        (
            "[client.optimizer]\nname = 'adam'\nbetas = [0.9, 1.0]",
            "run.toml:3: client.optimizer.betas.1: 1.0",
        ),
        ("[client]\noptimizer = {name = 'sgd', nesterov = true}", "nesterov = true needs momentum > 0"),
        ("[client]\nsgd = {lr = 1.0}", "run.toml:2: client.sgd: no such key"),
        ("[limits]\nweight = 0", "run.toml:2: limits.weight: 0"),
        ("[limits]\nupdate = nan", "run.toml:2: limits.update: nan"),
        (
            "[evaluation]\nwhere = 'holdouts'",
            "run.toml:2: evaluation.where: 'holdouts'.*did you mean 'holdout'",
        ),
        ("[encryption]\nupdates = 'masked'", "run.toml:2: encryption.updates: 'masked'"),
        ("[privacy]\nepsilon = 1.0", "run.toml:2: privacy.epsilon: no such key"),
        ("[simulation]\npartition = 3", "run.toml:2: simulation.partition: 3: expected a table"),
        ("[run\n", "run.toml: not valid TOML: .*line 1"),
    ],
)
def test_what_does_not_fit_is_named_with_its_line(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(line, encoding="utf-8")
    with pytest.raises(SpecError, match=message) as caught:
        RunSpec.load(tmp_path / "run.toml")
    assert caught.value.exit_code == 2


def test_every_problem_is_told_at_once() -> None:
    with pytest.raises(SpecError) as caught:
        parse(run={"rounds": 0, "seeds": 1}, cohort={"size": 0})
    assert len(str(caught.value).splitlines()) == 3


def test_an_override_is_blamed_for_its_own_value(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(TEXT, encoding="utf-8")
    for override in ("client.epochs=0", "client={epochs=0}"):
        with pytest.raises(SpecError, match=r"^--set client.epochs: 0: expected at least 1$"):
            RunSpec.load(tmp_path / "run.toml", [override])


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"none.toml: No such file.*fedcore new"):
        RunSpec.load(tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(SpecError, match=r"binary.toml"):
        RunSpec.load(tmp_path / "binary.toml")


optimizers = st.one_of(
    st.fixed_dictionaries(
        {"name": st.just("sgd"), "lr": st.floats(1e-9, 1e9), "momentum": st.floats(0, 0.999)}
    ),
    st.fixed_dictionaries({"name": st.sampled_from(["adam", "adamw"]), "lr": st.floats(1e-9, 1e9)}),
)


@given(
    rounds=st.integers(1, 10**6),
    seed=st.integers(0, 2**63 - 1),
    over_select=st.floats(1, 10),
    optimizer=optimizers,
    alpha=st.floats(allow_nan=False, allow_infinity=False),
    text=st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
)
def test_the_text_of_a_spec_gives_the_spec(
    rounds: int, seed: int, over_select: float, optimizer: Any, alpha: float, text: str, tmp_path_factory: Any
) -> None:
    spec = parse(
        run={"rounds": rounds, "seed": seed, "task": text},
        cohort={"over_select": over_select},
        client={"optimizer": optimizer},
        simulation={"partition": {"name": text, "alpha": alpha}},
    )
    path = tmp_path_factory.mktemp("spec") / "spec.toml"
    path.write_text(spec.to_toml(), encoding="utf-8", newline="")
    assert RunSpec.load(path) == spec


@pytest.mark.parametrize(
    ("size", "minimum", "fewest"), [(10, 0, 7), (9, 0, 6), (1, 0, 1), (2, 0, 2), (10, 4, 4), (10, 12, 10)]
)
def test_the_fewest_updates_are_two_thirds_or_as_said(size: int, minimum: int, fewest: int) -> None:
    assert Cohort(size=size, minimum=minimum).fewest == fewest


@given(size=st.integers(1, 10**4), tenths=st.integers(10, 100))
def test_the_asked_are_the_size_times_over_select_rounded_up(size: int, tenths: int) -> None:
    assert Cohort(size=size, over_select=tenths / 10).asked == -(-size * tenths // 10)


def test_a_spec_is_immutable_and_with_returns_a_copy() -> None:
    spec = RunSpec()
    assert spec.with_("run.rounds=3", "strategy.optimizer.lr=0.5").run.rounds == 3
    assert spec == RunSpec()
    with pytest.raises(ValueError, match="frozen"):
        spec.run.rounds = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("overrides", "field", "value"),
    [
        (["strategy=krum"], "strategy", {"name": "krum"}),
        (["strategy=krum", "strategy.f=2"], "strategy", {"name": "krum", "f": 2}),
        (["attack=alie", "attack.fraction=0.1"], "attack", {"name": "alie", "fraction": 0.1}),
        (["attack=none"], "attack", {}),
    ],
)
def test_a_part_may_be_written_as_its_name_alone(overrides: list[str], field: str, value: Any) -> None:
    assert getattr(RunSpec.parse({}, overrides), field) == value


def test_a_path_through_a_value_is_refused() -> None:
    with pytest.raises(SpecError, match=r"run.rounds.x: 'rounds' is a value, not a table"):
        RunSpec().with_("run.rounds.x=1")


@pytest.mark.parametrize(
    ("steps", "epochs", "examples", "passes"),
    [(0, 3, 10, 3.0), (0, 1, 0, 0.0), (1, 1, 64, 0.5), (2, 1, 64, 1.0), (5, 1, 40, 1.0)],
)
def test_how_often_a_round_goes_over_the_examples(
    steps: int, epochs: int, examples: int, passes: float
) -> None:
    spec = parse(client={"steps": steps, "epochs": epochs, "batch_size": 32})
    assert spec.client.passes(examples) == passes


def test_steps_are_of_one_epoch() -> None:
    with pytest.raises(SpecError, match="steps = 3 cuts one epoch short; set epochs = 1, not 2"):
        parse(client={"steps": 3, "epochs": 2})
