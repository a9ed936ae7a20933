"""What fits secure aggregation, what is taken where a spec leaves it open, and what a refusal says."""

from typing import Any

import pytest

from fedcore.crypto.secagg import config
from fedcore.errors import SpecError
from fedcore.spec import RunSpec
from fedcore.strategies import Strategy, from_table
from fedcore.strategies.catalog import RECIPES
from fedcore.strategies.encryption import FEWEST, MOST, described, resolved
from fedcore.strategies.privacy import private

LIMIT = {"limits": {"norm": 10.0}}
CLIENT = {"level": "client", "population": 100, "noise_multiplier": 1.0}
TREE = {"level": "tree", "separation": 2, "noise_multiplier": 1.0}
LOCAL = {"level": "local", "noise_multiplier": 1.0}
DISTRIBUTED = {"level": "distributed", "noise_multiplier": 1.0}


def composed(**tables: Any) -> tuple[Strategy, RunSpec]:
    spec = RunSpec.parse({"evaluation": {"where": "holdout"}, **tables})
    return private(from_table(spec.strategy), spec), spec


def chosen(**tables: Any) -> tuple[str, str]:
    encryption = resolved(*composed(**tables)).encryption
    return encryption.updates, encryption.encoding


@pytest.mark.parametrize(
    ("tables", "updates", "encoding"),
    [
        ({}, "secagg", "exact"),
        (LIMIT, "secagg", "q32"),
        (LIMIT | {"strategy": {"name": "scaffold"}}, "secagg", "q32"),
        (LIMIT | {"encryption": {"encoding": "exact"}}, "secagg", "exact"),
        (LIMIT | {"encryption": {"encoding": "q16"}}, "secagg", "q16"),
        (LIMIT | {"encryption": {"updates": "tls"}}, "tls", "exact"),
        (LIMIT | {"encryption": {"updates": "tls", "encoding": "q32"}}, "tls", "q32"),
        (LIMIT | {"encryption": {"updates": "sealed"}}, "sealed", "exact"),
        (LIMIT | {"cohort": {"size": 5, "minimum": 4}}, "sealed", "exact"),
        (LIMIT | {"cohort": {"size": 6, "minimum": 5}}, "secagg", "q32"),
        (
            LIMIT | {"cohort": {"size": 4, "minimum": 3}, "encryption": {"updates": "secagg"}},
            "secagg",
            "q32",
        ),
        (LIMIT | {"cohort": {"over_select": 1.5}}, "secagg", "q32"),
        ({"strategy": {"name": "krum"}}, "sealed", "exact"),
        ({"strategy": {"name": "fedavg", "pre": [{"name": "clip", "norm": 1.0}]}}, "sealed", "exact"),
        ({"strategy": {"name": "fedavg", "sampler": "oort"}}, "sealed", "exact"),
        ({"strategy": {"name": "fedavg", "sampler": "poisson"}}, "sealed", "exact"),
        ({"strategy": {"name": "fedavg", "mode": "buffered"}}, "sealed", "exact"),
        ({"privacy": CLIENT}, "sealed", "exact"),
        ({"privacy": CLIENT, "cohort": {"size": 100}}, "secagg", "q32"),
        ({"privacy": TREE}, "secagg", "q32"),
        ({"privacy": LOCAL}, "secagg", "exact"),
        ({"cohort": {"size": 3000}}, "secagg", "exact"),
        ({"cohort": {"size": 3000, "over_select": 1.1}}, "sealed", "exact"),
        ({"privacy": DISTRIBUTED}, "secagg", "q32"),
        ({"privacy": DISTRIBUTED, "cohort": {"size": 4}}, "secagg", "q32"),
    ],
)
def test_what_is_open_is_taken_by_the_rule(tables: dict[str, Any], updates: str, encoding: str) -> None:
    assert chosen(**tables) == (updates, encoding)
    strategy, spec = composed(**tables)
    explicit = resolved(strategy, spec)
    assert resolved(strategy, explicit) == explicit
    assert explicit.encryption.corrupt == spec.encryption.corrupt


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        (LIMIT, "secagg, encoding q32: the coordinator learns the sum of at least 7, and no single update"),
        ({"encryption": {"updates": "tls"}}, "tls: the coordinator reads every update, on its disk too"),
        ({"encryption": {"updates": "sealed"}}, "sealed: the coordinator alone reads every update"),
        (
            {"strategy": {"name": "krum"}},
            "alone reads every update; not secagg, because Krum looks at single updates",
        ),
    ],
)
def test_it_is_said_who_reads_updates_and_why(tables: dict[str, Any], said: str) -> None:
    strategy, spec = composed(**tables)
    assert said in described(strategy, resolved(strategy, spec))


def test_the_limits_are_those_of_the_protocol() -> None:
    assert (FEWEST, MOST) == (config.SMALLEST, config.LARGEST)


@pytest.mark.parametrize("name", RECIPES)
def test_whoever_sees_nothing_of_a_client_is_masked(name: str) -> None:
    strategy, spec = composed(strategy={"name": name})
    assert (resolved(strategy, spec).encryption.updates == "secagg") == (
        not strategy.sees and name not in ("fedbuff", "fedasync")
    )


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"strategy": {"name": "krum"}}, 'Krum looks at single updates, .* use aggregator = "mean"'),
        (
            {"strategy": {"name": "fedavg", "pre": [{"name": "clip", "norm": 1.0}]}},
            'Clip looks at single updates, .* use limits.norm = 1 .*, or set encryption.updates = "sealed"',
        ),
        ({"strategy": {"name": "fedavg", "sampler": "oort"}}, 'Oort chooses clients .* sampler = "uniform"'),
        ({"strategy": {"name": "fedavg", "mode": "buffered"}}, 'Buffered .* mode = "synchronous"'),
        (
            {"privacy": CLIENT},
            "drawn with probability 0.1, in secret, .* amplification by sampling is void; "
            'set cohort.size = privacy.population, or set encryption.updates = "sealed"',
        ),
        ({"strategy": {"name": "fedavg", "sampler": "poisson"}}, 'use sampler = "uniform"'),
        ({"cohort": {"size": 3, "minimum": 2}}, "with 2 clients, expected at least 3.* raise cohort.minimum"),
        ({"cohort": {"size": 3001}}, "asks 3001 clients, expected at most 3000, .* lower cohort.size"),
        (
            {"privacy": DISTRIBUTED, "cohort": {"size": 3, "minimum": 2}},
            'raise cohort.minimum or cohort.size, or set privacy.level = "local"',
        ),
    ],
)
def test_what_masks_cannot_bear_is_refused_with_a_remedy(tables: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=f'encryption.updates = "secagg": .*{message}'):
        chosen(**tables, encryption={"updates": "secagg"})


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"encryption": {"encoding": "q32"}}, '"q32" fits .* set limits.norm .* or encoding = "exact"'),
        ({"encryption": {"encoding": "q16"}, "privacy": LOCAL}, '"q16" fits'),
        (
            LIMIT | {"strategy": {"name": "fedexp"}},
            'FedExP takes a step by their square .* remove limits.norm, or use optimizer = "sgd"',
        ),
        (LIMIT | {"strategy": {"name": "median"}}, "limits.norm = 10 .*Median looks at single updates"),
        (
            LIMIT | {"privacy": TREE},
            'limits.norm = 10, but privacy.level = "tree" clips .* remove limits.norm',
        ),
    ],
)
def test_what_cannot_be_encoded_is_refused_with_a_remedy(tables: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        chosen(**tables)
