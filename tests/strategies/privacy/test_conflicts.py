"""What cannot be private is refused with what to do instead, and what can be is not."""

from typing import Any

import pytest

from fedcore.errors import SpecError
from fedcore.spec import RunSpec
from fedcore.strategies import Strategy, from_table
from fedcore.strategies.conflicts import check
from fedcore.strategies.encryption import resolved
from fedcore.strategies.privacy import private
from fedcore.strategies.samplers import MinimumSeparation, Poisson, Uniform

TABLES: dict[str, dict[str, Any]] = {
    "example": {"level": "example", "sampling_rate": 0.1},
    "client": {"level": "client", "population": 100},
    "tree": {"level": "tree", "separation": 3},
    "local": {"level": "local"},
    "distributed": {"level": "distributed"},
}
LEVELS = tuple(TABLES)
ROBUST = (
    {"name": "krum", "f": 1},
    {"name": "multi_krum", "f": 1},
    "median",
    {"name": "trimmed_mean", "f": 1},
    "geometric_median",
    {"name": "centered_clipping", "radius": 1.0},
    {"pre": {"name": "nnm", "f": 1}},
    {"pre": {"name": "clip", "norm": 1.0}},
)


def composed(level: str, table: dict[str, Any] | str = "fedavg", **tables: Any) -> tuple[Strategy, RunSpec]:
    """Return a strategy that was composed and checked as private, and its spec."""
    given = dict(tables)
    privacy = {"noise_multiplier": 1.0, **TABLES[level], **given.pop("privacy", {})}
    spec = {"cohort": {"size": 20}, "evaluation": {"where": "holdout"}, "privacy": privacy, "strategy": table}
    parsed = RunSpec.parse({**spec, **given})
    strategy = private(from_table(parsed.strategy), parsed)
    check(strategy, parsed)
    return strategy, parsed


@pytest.mark.parametrize(
    ("level", "sampler"),
    [
        ("example", Uniform()),
        ("client", Poisson(0.2)),
        ("tree", MinimumSeparation(3)),
        ("local", Uniform()),
        ("distributed", Uniform()),
    ],
)
def test_the_level_draws_its_cohorts(level: str, sampler: object) -> None:
    assert composed(level)[0].sampler == sampler


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    "name", ["fedprox", "scaffold", "feddyn", "fedavgm", "fedadam", "fedyogi", "fedadagrad"]
)
def test_what_sends_updates_alone_and_what_follows_from_sums_can_be_private(level: str, name: str) -> None:
    assert composed(level, name)[0].privacy.level == level


@pytest.mark.parametrize("level", ["example", "local"])
@pytest.mark.parametrize("table", ROBUST)
def test_robust_rules_may_follow_noise_that_each_device_makes(
    level: str, table: dict[str, Any] | str
) -> None:
    assert not composed(level, table)[0].sums


@pytest.mark.parametrize("level", ["client", "tree", "distributed"])
@pytest.mark.parametrize("table", ROBUST)
def test_robust_rules_have_no_clip_norm_for_a_sensitivity(level: str, table: dict[str, Any] | str) -> None:
    text = (
        rf'looks at single updates, so .* \(privacy.level = "{level}"\); use aggregator = "mean" and no `pre`'
    )
    with pytest.raises(SpecError, match=text):
        composed(level, table)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("table", "text"),
    [
        (
            {"sampler": {"name": "power_of_choice", "candidates": 30}},
            "PowerOfChoice chooses clients by the loss",
        ),
        ({"sampler": "oort"}, "Oort chooses clients by the losses and sizes that they report"),
        ({"sampler": "weighted"}, 'Weighted chooses .* they report neither; use sampler = "uniform"'),
        ("fednova", "FedNova has every client report `steps`, which would leave the device without noise"),
        ("qfedavg", 'QFedAvg has every client report `h`, .* use another algorithm, such as "local_sgd"'),
        ("fedbuff", 'Buffered lets fast clients take part more often, .* use mode = "synchronous"'),
        ("fedasync", "Asynchronous lets fast clients take part more often"),
    ],
)
def test_what_would_send_more_than_noise_covers_is_refused(
    level: str, table: dict[str, Any] | str, text: str
) -> None:
    with pytest.raises(SpecError, match=text):
        composed(level, table)


@pytest.mark.parametrize("level", ["client", "tree", "local", "distributed"])
def test_fedexp_needs_the_norms_of_single_updates(level: str) -> None:
    with pytest.raises(
        SpecError, match=rf"FedExP .* `square`, which no noise covers .*{level}.*; use another"
    ):
        composed(level, "fedexp")
    composed("example", "fedexp")  # there, the norm is that of an update which has its noise


@pytest.mark.parametrize(
    ("level", "table", "text"),
    [
        (
            "client",
            {"name": "minimum_separation", "rounds": 2},
            "draws its cohorts itself .Poisson.*remove strategy",
        ),
        ("tree", "poisson", "draws its cohorts itself .MinimumSeparation.*which is Poisson"),
        (
            "tree",
            {"name": "minimum_separation", "rounds": 2},
            "2 rounds apart, but privacy.separation = 3; remove",
        ),
        ("client", {"name": "poisson", "rate": 0.5}, r"Poisson\(rate=0.5\), but .*population = 0.2; remove"),
    ],
)
def test_a_sampler_of_ones_own_is_not_what_epsilon_holds_for(level: str, table: Any, text: str) -> None:
    with pytest.raises(SpecError, match=text):
        composed(level, {"sampler": table})


def test_a_sampler_that_says_the_same_is_accepted() -> None:
    assert composed("client", {"sampler": {"name": "poisson", "rate": 0.2}})[0].sampler == Poisson(0.2)
    assert composed("client", {"sampler": "poisson"})[0].sampler == Poisson(0.2)
    same = {"sampler": {"name": "minimum_separation", "rounds": 3}}
    assert composed("tree", same)[0].sampler == MinimumSeparation(3)
    assert composed("example", {"sampler": "poisson"})[0].sampler == Poisson()


@pytest.mark.parametrize("level", ["client", "tree"])
def test_nobody_is_asked_in_excess_where_the_coordinator_makes_the_noise(level: str) -> None:
    with pytest.raises(
        SpecError, match=rf'over_select = 1.5, but under privacy.level = "{level}" nobody may'
    ):
        composed(level, cohort={"size": 20, "over_select": 1.5})
    composed("local", cohort={"size": 20, "over_select": 1.5})


def test_a_round_of_a_secret_cohort_is_never_given_up() -> None:
    with pytest.raises(SpecError, match=r"cohort.minimum = 5, but .* closes a round with whoever came"):
        composed("client", cohort={"size": 20, "minimum": 5})


def test_a_cohort_is_no_larger_than_the_population() -> None:
    with pytest.raises(
        SpecError, match=r"cohort.size = 101, but privacy.population = 100; expected a cohort"
    ):
        composed("client", cohort={"size": 101})
    assert composed("client", cohort={"size": 100})[0].sampler == Poisson(1.0)


@pytest.mark.parametrize("level", LEVELS)
def test_metrics_on_clients_need_noise_of_their_own(level: str) -> None:
    where = {"where": "clients"}
    with pytest.raises(
        SpecError, match=r'set it to "holdout", or give .* such as privacy.metric_noise = 5.0'
    ):
        composed(level, evaluation=where)
    composed(level, evaluation=where, privacy={"metric_noise": 5.0})


@pytest.mark.parametrize(
    ("tables", "text"),
    [
        (
            {"encryption": {"updates": "tls"}},
            r'"tls", but .* set encryption.updates = "secagg", or .*"local"',
        ),
        ({"encryption": {"updates": "sealed"}}, r'"sealed", but under .* makes a part of the noise only'),
        ({"encryption": {"encoding": "exact"}}, r'16 or 32 bits; set encryption.encoding = "q32"'),
        (
            {"cohort": {"size": 20, "over_select": 4.0}},
            r"with 14 clients, .* 0.2 of 80 asked .* raise cohort.minimum, or lower cohort.over_select",
        ),
        ({"attack": {"name": "sign_flip", "fraction": 0.1}}, r"attack forges .* remove \[attack\], or set"),
    ],
)
def test_a_part_of_the_noise_protects_nobody_alone(tables: dict[str, Any], text: str) -> None:
    with pytest.raises(SpecError, match=text):
        composed("distributed", **tables)


@pytest.mark.parametrize("updates", ["auto", "secagg"])
@pytest.mark.parametrize("encoding", ["auto", "q32", "q16"])
def test_distributed_noise_is_masked(updates: str, encoding: str) -> None:
    made = resolved(*composed("distributed", encryption={"updates": updates, "encoding": encoding}))
    assert made.encryption.updates == "secagg"
    assert made.encryption.encoding == ("q32" if encoding == "auto" else encoding)


def test_an_adaptive_clip_norm_needs_a_cohort_that_outweighs_its_noise() -> None:
    with pytest.raises(SpecError, match=r"with 20 clients expected .* raise cohort.size above 30, or"):
        composed("client", privacy={"adaptive": True, "noise_multiplier": 3.0})
    composed("client", privacy={"adaptive": True, "noise_multiplier": 1.9})


def test_a_target_is_no_noise_multiplier_yet() -> None:
    with pytest.raises(SpecError, match="target_epsilon has not been turned into a noise multiplier"):
        composed("client", privacy={"target_epsilon": 3.0, "noise_multiplier": 0.0})


def test_noise_beyond_the_limit_of_an_update_is_said_before_the_run() -> None:
    """lr z C sqrt(K) / B = 0.5 * 32 * 1 * 2 / 2 = 16, and seven times that is beyond 64, for SGD."""
    privacy = {"level": "example", "sampling_rate": 0.5, "noise_multiplier": 32.0}
    table = {
        "client": {"batch_size": 2, "steps": 4, "optimizer": {"lr": 0.5}},
        "evaluation": {"where": "holdout"},
        "privacy": privacy,
    }
    spec = RunSpec.parse(table)
    with pytest.raises(SpecError, match=r"limits.update = 64, .* about 16 .* set limits.update = 128, or"):
        check(private(Strategy(), spec), spec)
    for change in ("limits.update=128", 'client.optimizer={name = "adam", lr = 0.5}', "client.batch_size=4"):
        other = spec.with_(change)
        check(private(Strategy(), other), other)
