"""What an audit concludes."""

import json
import math

import pytest

from fedcore.audit.report import Attack, Audit, Bound, Inversion


def audit_of(claimed: float | None, *bounds: Bound) -> Audit:
    return Audit((), claimed, 1e-5, "example", (Attack("an attack", 100, 0.6, {}, bounds),))


@pytest.mark.parametrize(
    ("claimed", "bound", "verdict"),
    [
        (2.0, Bound("any mechanism", 1.9, 5.0), "no violation found"),
        (2.0, Bound("any mechanism", 2.1, 5.0), "violation"),
        (2.0, Bound("this mechanism", 2.1, 5.0, 0.9), "violation"),
        (2.0, Bound("estimate", 99.0), "no violation found, nor could one have been"),
        (8.0, Bound("any mechanism", 1.0, 5.0), "no violation found, nor could one have been"),
        (None, Bound("any mechanism", 5.0, 5.0), "no claim to refute"),
    ],
)
def test_verdicts(claimed: float | None, bound: Bound, verdict: str) -> None:
    found = audit_of(claimed, bound)
    assert found.verdict == verdict
    assert found.violation == (verdict == "violation")


def test_the_highest_bound_counts_and_estimates_do_not() -> None:
    found = audit_of(
        2.0, Bound("any mechanism", 0.5, 4.0), Bound("this mechanism", 1.0, 9.0), Bound("estimate", 7.0)
    )
    assert (found.epsilon, found.ceiling) == (1.0, 9.0)


def test_json_has_no_number_that_json_does_not_know() -> None:
    found = json.loads(audit_of(2.0, Bound("estimate", 3.0)).to_json())
    (bound,) = found["attacks"][0]["bounds"]
    assert bound == {"kind": "estimate", "epsilon": 3.0, "ceiling": None, "noise": None}
    assert found["verdict"].startswith("no violation found") and found["claimed"] == 2.0


def test_most_of_an_example_recovered_is_a_success() -> None:
    assert Inversion("x", 0.1).succeeded and not Inversion("x", 0.9).succeeded
    assert not Inversion("x", math.nan).succeeded
