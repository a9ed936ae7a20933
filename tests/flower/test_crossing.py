"""What cannot run in a Flower project says so, with the part and a remedy."""

from typing import Any

import pytest

from fedcore.flower.crossing import obstacles
from fedcore.spec import RunSpec
from fedcore.strategies import Buffered, FLTrust, Oort, Scaffold, Strategy

PRIVATE = {"noise_multiplier": 1.0}
CASES: dict[str, tuple[Strategy, dict[str, Any], str]] = {
    "algorithm": (
        Strategy(algorithm=Scaffold()),
        {},
        "Scaffold changes how clients train and what they keep or send, and in Flower the ClientApp alone "
        "decides that; use LocalSGD() or FedProx(mu), or run the task with fedcore",
    ),
    "mode": (Strategy(mode=Buffered()), {}, "Flower's rounds wait for all replies; use Synchronous()"),
    "anchor": (Strategy(aggregator=FLTrust()), {}, "a ServerApp has no trainer; use another aggregator"),
    "seconds": (Strategy(sampler=Oort(duration=9.0)), {}, "use Oort() without a duration"),
    "device": (
        Strategy(),
        {"privacy": {"level": "local", **PRIVATE}},
        '"local" has devices make the noise, and a ClientApp does not; use "client" or "tree"',
    ),
    "metrics": (
        Strategy(),
        {"privacy": {"level": "tree", "separation": 1, "metric_noise": 2.0, **PRIVATE}},
        'set it to 0 and evaluation.where = "holdout", and measure in evaluate_fn',
    ),
    "secagg": (Strategy(), {"encryption": {"updates": "secagg"}}, "the ServerApp reads every reply"),
    "sealed": (Strategy(), {"encryption": {"updates": "sealed"}}, "the ServerApp reads every reply"),
    "patience": (Strategy(), {"evaluation": {"patience": 2}}, "set it to 0"),
    "attack": (Strategy(), {"attack": {"name": "sign_flip"}}, "remove it"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_obstacle_is_told_with_what_to_do(case: str) -> None:
    strategy, tables, told = CASES[case]
    (why,) = obstacles(strategy, RunSpec.parse(tables))
    assert told in why


def test_what_every_reply_tells_is_enough_for_the_rest() -> None:
    assert not list(obstacles(Strategy(sampler=Oort()), RunSpec()))
