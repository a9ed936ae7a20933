"""The owner's rules, one by one."""

from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.client.config import STRENGTHS, Config, Settings
from fedcore.client.policy import Policy
from fedcore.crypto.names import Name
from fedcore.errors import UpdateRefused
from fedcore.messages import Assignment, Blob, Ref
from fedcore.privacy.account import Claim
from fedcore.privacy.discrete import Skellam
from fedcore.privacy.events import Gaussian
from fedcore.spec import RunSpec

TEXT = '[tasks]\nDigits = "tasks:Digits"\n[policy]\nsmallest_cohort = 3\nencryption = "tls"\n'
DIGEST = "a" * 64


def policy(**terms: Any) -> Policy:
    settings = Settings.model_validate({"policy": {"smallest_cohort": 3, **terms}})
    return Policy(Config(Path(), settings, TEXT), {"Digits": DIGEST})


def assignment(
    task: str = "Digits",
    digest: str = DIGEST,
    cohort: int = 3,
    spec: Any = None,
    kind: Any = "train",
    round: int = 1,
    clip: float = 0.0,
) -> Assignment:
    ref, blob = Ref("run", round, 0, kind), Blob("b" * 64, 4)
    spec = spec or RunSpec().with_("encryption.updates=tls")
    return Assignment(ref, task, digest, spec, "c" * 64, blob, cohort, 60.0, clip=clip)


def test_what_keeps_to_every_rule_is_allowed() -> None:
    policy().judge(assignment())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"task": "Digit"}, r"^agent.toml:1: tasks: task 'Digit' is not allowed; did you mean 'Digits'\?$"),
        (
            {"digest": "0" * 64},
            r"^agent.toml:2: tasks.Digits: the run's code is 0{12}..., installed is a{12}",
        ),
        ({"cohort": 2}, "^agent.toml:4: policy.smallest_cohort: 2 clients take part, expected at least 3$"),
    ],
)
def test_what_breaks_a_rule_is_refused_with_its_line(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UpdateRefused, match=reason):
        policy().judge(assignment(**changes))


@given(st.integers(1, 10**6), st.integers(0, 2**32 - 1))
def test_a_cohort_is_large_enough_or_not(smallest: int, cohort: int) -> None:
    judge, work = policy(smallest_cohort=smallest).judge, assignment(cohort=cohort)
    if cohort >= smallest:
        judge(work)
    else:
        with pytest.raises(UpdateRefused, match="smallest_cohort"):
            judge(work)


@pytest.mark.parametrize("given", STRENGTHS)
@pytest.mark.parametrize("demanded", STRENGTHS)
def test_weaker_encryption_than_demanded_is_refused(given: Any, demanded: Any) -> None:
    spec = RunSpec().with_(f"encryption.updates={given}")
    judge, work = policy(encryption=demanded).judge, assignment(spec=spec)
    if STRENGTHS.index(given) >= STRENGTHS.index(demanded):
        judge(work)
    else:
        with pytest.raises(UpdateRefused, match=f"^agent.toml:5: policy.encryption: .*at least '{demanded}'"):
            judge(work)


@pytest.mark.parametrize(
    ("terms", "sets", "reason"),
    [
        (
            {"smallest_cohort": 5},
            ["encryption.updates=secagg", "cohort.size=9", "cohort.minimum=4"],
            "^agent.toml:4: policy.smallest_cohort: a sum may be over 4 clients, expected at least 5$",
        ),
        (
            {"corrupt": 0.3},
            ["encryption.updates=secagg", "encryption.corrupt=0.25"],
            r"^agent.toml:3: policy.corrupt: the run holds while 0.25 of its clients collude, .* least 0.3$",
        ),
        (
            {"largest_weight": 1000},
            ["encryption.updates=tls", "limits.weight=1001"],
            "^agent.toml:3: policy.largest_weight: a client may count for 1001 examples, .* at most 1000$",
        ),
    ],
)
def test_what_the_owner_asks_of_a_sum(terms: dict[str, Any], sets: list[str], reason: str) -> None:
    work = assignment(spec=RunSpec().with_(*sets), cohort=9)
    with pytest.raises(UpdateRefused, match=reason):
        policy(**terms).judge(work)
    policy().judge(work)


def test_a_run_that_leaves_open_how_updates_travel_is_refused() -> None:
    with pytest.raises(UpdateRefused, match='"auto" does not say how updates travel'):
        policy().judge(assignment(spec=RunSpec()))


def test_corruption_and_the_smallest_sum_are_judged_where_there_are_sums_alone() -> None:
    spec = RunSpec().with_("encryption.updates=sealed", "encryption.corrupt=0", "cohort.minimum=1")
    policy(corrupt=0.3, smallest_cohort=9).judge(assignment(spec=spec, cohort=9))


# --- when work may begin

DAY = datetime(2030, 1, 2).astimezone()


def at(time: str, folder: Path = Path(), **terms: Any) -> Policy:
    """Return a policy on a device whose clock stands at HH:MM, local time."""
    hour, minute = map(int, time.split(":"))
    settings = Settings.model_validate({"policy": terms})
    return Policy(Config(folder, settings, TEXT), {}, lambda: DAY.replace(hour=hour, minute=minute))


@pytest.mark.parametrize(
    ("hours", "inside", "outside"),
    [
        ("22:00-06:00", ("22:00", "23:59", "00:00", "05:59"), ("21:59", "06:00", "12:00")),
        ("08:30-17:00", ("08:30", "16:59"), ("08:29", "17:00", "00:00")),
        ("00:00-00:00", ("00:00", "12:00", "23:59"), ()),
        ("", ("00:00", "12:00"), ()),
    ],
)
def test_work_begins_within_the_hours(hours: str, inside: tuple[str, ...], outside: tuple[str, ...]) -> None:
    for time in inside:
        at(time, hours=hours).admit(assignment())
    for time in outside:
        with pytest.raises(
            UpdateRefused, match=rf"policy.hours: it is {time} here, work begins within {hours}"
        ):
            at(time, hours=hours).admit(assignment())


def test_training_begins_so_often_a_day(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    early, late = (at(time, tmp_path, rounds_per_day=2) for time in ("08:00", "23:59"))
    for number in range(2):
        early.begin(assignment())
        assert late.pace.starts(late.clock()) == number + 1
    for refusing in (late.admit, late.begin):
        with pytest.raises(
            UpdateRefused, match="rounds_per_day: training has begun 2 times in 24 hours, expec"
        ):
            refusing(assignment())
    late.begin(assignment(kind="evaluate"))
    tomorrow = replace(late, clock=lambda: DAY.replace(hour=8, minute=1) + timedelta(days=1))
    tomorrow.begin(assignment())


# --- what goes into the ledger

LEDGER = {"path": "a.ledger", "dataset": "clinic-a", "epsilon": 8.0}
EXAMPLE = {"level": "example", "noise_multiplier": 1.0, "sampling_rate": 0.01}
DISTRIBUTED = {"level": "distributed", "noise_multiplier": 2.0}
CLIENT = {"level": "client", "noise_multiplier": 1.0, "population": 100}
NAME = Name("fed", "client", "hospital-1")


def claim(
    privacy: dict[str, Any], kind: Any = "train", round: int = 1, clip: float = 0.0, **terms: Any
) -> Claim | None:
    spec = RunSpec.parse({"run": {"rounds": 5}, "client": {"steps": 20}, "privacy": privacy})
    settings = Settings.model_validate({"ledger": {**LEDGER, **terms}})
    work = assignment(spec=spec, kind=kind, round=round, clip=clip)
    return Policy(Config(Path(), settings, '[ledger]\npath = "a.ledger"'), {}).claim(work, NAME)


def test_a_claim_is_what_the_runs_spec_says() -> None:
    asked = claim(EXAMPLE)
    piece, whole = (Gaussian(1.0, 0.01, steps) for steps in (20, 100))
    assert asked == Claim(
        "fed/run", "run/1.0/train", str(NAME), "example", "enforced", (piece,), (whole,), once=False
    )
    metrics = claim({**EXAMPLE, "metric_noise": 4.0}, "evaluate")
    assert metrics and metrics.history == (Gaussian(4.0),)
    assert metrics.whole == (whole, Gaussian(4.0, 1.0, 5))


def test_where_the_coordinator_makes_the_noise_the_whole_run_is_claimed_once() -> None:
    asked = claim(CLIENT, unit="client", accept_trusted=True)
    assert asked and asked.history == asked.whole == (Gaussian(1.0, 0.1, 5),)
    assert asked.once and (asked.unit, asked.trust) == ("client", "trusted")


@pytest.mark.parametrize("updates", ["tls", "sealed", "secagg"])
def test_a_part_of_the_noise_is_never_seen_by_itself(updates: str) -> None:
    spec = RunSpec.parse({"encryption": {"updates": updates}, "privacy": DISTRIBUTED})
    if updates == "secagg":
        return policy(encryption="tls").judge(assignment(spec=spec))
    with pytest.raises(UpdateRefused, match=r"policy.encryption: .* a part of the noise only, .* 'secagg'$"):
        policy(encryption="tls").judge(assignment(spec=spec))


def test_noise_that_clients_make_together_is_claimed_by_participation() -> None:
    asked = claim(DISTRIBUTED, unit="client")
    assert asked and (asked.history, asked.whole) == ((Skellam(2.0),), (Skellam(2.0, 5),))
    assert not asked.once and (asked.unit, asked.trust) == ("client", "distributed")


def test_an_offer_claims_the_whole_run_and_only_the_median_may_move_the_clip_norm() -> None:
    terms: dict[str, Any] = {"unit": "client", "accept_trusted": True}
    train, offer = (claim(CLIENT, kind, clip=1.0, **terms) for kind in ("train", "offer"))
    assert train and offer and (train.history, train.whole) == (offer.history, offer.whole)
    assert claim({**CLIENT, "adaptive": True}, clip=3.0, **terms)


def test_without_a_ledger_nothing_is_claimed() -> None:
    assert claim({}, path="") is None


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"privacy": {}}, '^agent.toml:1: ledger: the run has no differential privacy.* level = "example"'),
        ({"privacy": {}, "unit": "client"}, 'level = "local"'),
        ({"privacy": CLIENT}, r"ledger.accept_trusted: the noise of level 'client' is the coordinator's"),
        ({"privacy": EXAMPLE, "kind": "evaluate"}, "ledger: evaluate would send numbers without noise"),
        (
            {"privacy": CLIENT, "kind": "evaluate", "accept_trusted": True},
            "evaluate would send numbers without noise",
        ),
        ({"privacy": {**EXAMPLE, "metric_noise": 1.0}, "kind": "root"}, "root would send numbers without"),
        (
            {"privacy": EXAMPLE, "kind": "offer"},
            "level 'example' is paid for round by round, not by an offer",
        ),
        (
            {"privacy": {"level": "tree", "noise_multiplier": 1.0, "separation": 10**9}},
            r"ledger.accept_trusted: the noise of level 'tree'",
        ),
        (
            {"privacy": CLIENT, "accept_trusted": True, "clip": 1e9},
            "ledger: the round's clip norm is 1e\\+09, but the run's is 1 in all rounds",
        ),
        ({"privacy": EXAMPLE, "round": 6}, "round 6 of a run of 5 rounds is in no schedule"),
    ],
)
def test_what_has_no_place_in_the_ledger_is_refused(asked: dict[str, Any], reason: str) -> None:
    with pytest.raises(UpdateRefused, match=reason):
        claim(**asked)
