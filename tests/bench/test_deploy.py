"""The benchmarks of a deployment: bounded memory, and nothing lost under load and a sudden end."""

import sys

import pytest

from fedcore.bench import deploy, load

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc"),
]
BOUND = 256  # MiB of anonymous memory above the coordinator's base, whatever the model


@pytest.mark.parametrize(
    ("clients", "encryption", "changes"),
    [
        (3, "sealed", ["strategy.name=krum"]),
        (3, "secagg", []),
        (2, "tls", ["strategy.name=scaffold", "strategy.optimizer=adam"]),
    ],
)
def test_a_model_larger_than_the_bound_stays_within_it(
    clients: int, encryption: str, changes: list[str]
) -> None:
    """360 MB of parameters; state and sums are several times as much."""
    line = deploy.measure(90_000_000, clients, 1, encryption, changes)
    assert line["coordinator_peak_anonymous_mb"] - line["coordinator_base_anonymous_mb"] <= BOUND
    assert line["upload_of_limit"] > 0 and line["download_of_limit"] > 0
    assert len(line["seconds_per_round"]) == 1


def test_nothing_is_lost_and_all_are_back_after_a_sudden_end() -> None:
    line = load.measure(agents=20, rounds=2, parameters=1000, registered=100)
    assert (line["lost"], line["acknowledged"], line["refused"]) == (0, 80, {})
    assert line["all_back_after_s"] < 30
