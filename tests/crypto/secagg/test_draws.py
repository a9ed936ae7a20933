"""A coordinator that has a draw repeated until it likes it: the odds of a run count every attempt."""

from dataclasses import replace

import pytest

from fedcore.crypto.secagg.config import ATTEMPTS, KINDS
from fedcore.crypto.secagg.parameters import FAILURE, failure
from fedcore.errors import SpecError
from fedcore.messages import Ref
from tests.crypto.secagg.conftest import CONFIG


@pytest.mark.parametrize("n", [65, 100, 300, 1000])
def test_no_number_of_attempts_makes_a_bad_draw_likely(n: int) -> None:
    config = replace(CONFIG, asked=n, rounds=100)
    recovery, exposure = failure(n, config.graph(n), config.corrupt, config.lost)
    assert 100 * len(KINDS) * ATTEMPTS * max(recovery, exposure) <= FAILURE


@pytest.mark.parametrize(
    "ref",
    [
        Ref("run", 11, 0, "train"),
        Ref("run", 10, ATTEMPTS, "train"),
        Ref("run", 1, 0, "root"),
        Ref("run", 1, 0, "offer"),
    ],
    ids=str,
)
def test_there_are_no_other_sums_than_those_that_are_counted(ref: Ref) -> None:
    replace(CONFIG, ref=Ref("run", 10, ATTEMPTS - 1, "evaluate"))
    with pytest.raises(SpecError, match=f"no sum of a run of 10 rounds, at most {ATTEMPTS} attempts"):
        replace(CONFIG, ref=ref)
