"""The server's halves of the personal algorithms: tables, bad fields, and what an update may carry."""

from typing import Any

import numpy as np
import pytest

from fedcore.errors import SpecError
from fedcore.layout import Entry, Layout
from fedcore.messages import Ref
from fedcore.spec import RunSpec
from fedcore.strategies import algorithms, from_table
from fedcore.strategies.algorithms import LocalSGD
from fedcore.strategies.conflicts import check
from fedcore.strategies.rounds import train_plan

LAYOUT = Layout(
    (
        Entry("body.weight", (4, 5), "float32", "shared"),
        Entry("head.weight", (3, 4), "float32", "local"),
        Entry("norm.mean", (4,), "float32", "buffer"),
    )
)

BUILT: list[tuple[dict[str, Any], LocalSGD]] = [
    ({"name": "moon", "mu": 5.0, "layer": "2"}, algorithms.Moon(mu=5.0, layer="2")),
    ({"name": "ditto", "lam": 0.1}, algorithms.Ditto(0.1)),
    ({"name": "fedper", "personal": ["head.*"]}, algorithms.FedPer(("head.*",))),
    ({"name": "fedrep", "head_epochs": 3}, algorithms.FedRep(head_epochs=3)),
    ({"name": "fedbn"}, algorithms.FedBN()),
    ({"name": "pfedme", "lam": 20.0, "steps": 3, "eta": 0.01}, algorithms.PFedMe(20.0, 3, 0.01)),
]
NAMES = [table["name"] for table, _ in BUILT]


@pytest.mark.parametrize(("table", "algorithm"), BUILT, ids=NAMES)
def test_a_table_builds_it(table: dict[str, Any], algorithm: LocalSGD) -> None:
    assert from_table({"algorithm": table}).algorithm == algorithm
    assert from_table(table).algorithm == algorithm, "a recipe too"


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"name": "moon", "mu": 0.0}, r"Moon\(mu=0.0\): expected mu > 0"),
        ({"name": "moon", "tau": -1.0}, r"Moon\(tau=-1.0\): expected tau > 0"),
        ({"name": "ditto", "lam": float("nan")}, r"Ditto\(lam=nan\): expected lam > 0"),
        ({"name": "ditto", "lam": float("inf")}, r"Ditto\(lam=inf\): expected lam > 0"),
        ({"name": "fedrep", "head_epochs": 0}, r"head_epochs=0\): expected head_epochs >= 1"),
        ({"name": "pfedme", "steps": 0}, r"PFedMe\(steps=0\): expected steps > 0"),
        ({"name": "pfedme", "lam": 300.0}, r"expected eta \* lam <= 1, or w would pass theta"),
    ],
)
def test_bad_fields_are_refused(table: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        from_table({"algorithm": table})


@pytest.mark.parametrize("name", NAMES)
def test_an_update_has_no_room_for_what_is_local(name: str) -> None:
    spec = RunSpec.parse({"strategy": {"algorithm": name}})
    strategy = from_table(spec.strategy)
    plan = train_plan(strategy, spec, LAYOUT, Ref("r", 1, 0, "train"), ("a", "b"), 2)
    assert {name: vector.length for name, vector in plan.vectors.items()} == {"delta": 20, "buffers": 4}
    assert set(plan.scalars) == {"weight", "loss", "count"}
    assert plan.vectors["delta"].dtype == np.float32


@pytest.mark.parametrize("name", NAMES)
def test_split_models_are_not_tested_centrally(name: str) -> None:
    spec = RunSpec.parse({"strategy": {"algorithm": name}, "evaluation": {"where": "holdout"}})
    strategy = from_table(spec.strategy)
    check(strategy, spec.with_("evaluation.where=clients"))
    if name in ("fedper", "fedrep", "fedbn"):
        with pytest.raises(SpecError, match=r'"holdout", but Fed.* set evaluation.where = "clients"'):
            check(strategy, spec)
    else:
        check(strategy, spec)
