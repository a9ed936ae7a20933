"""Strategies of ours in a project of Flower's, under its own simulation with Ray and under ours."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_three_compositions_learn_the_same_under_both(
    ours: Callable[..., Path], flowers: Callable[..., Path]
) -> None:
    """All nodes take part: sums are of integers and the same to the bit, whatever the order of replies.

    Rules that compare rows read them in the grid's order, which is a draw of Flower's.
    """
    here, there = (dict(np.load(run("composed", 6, "result.npz"))) for run in (ours, flowers))
    assert here.keys() == there.keys()
    for each in here:
        if each.startswith("extrapolated/"):
            assert here[each].tobytes() == there[each].tobytes(), each
        elif not each.startswith("private/"):
            np.testing.assert_allclose(here[each], there[each], rtol=1e-6, err_msg=each)
    assert np.abs(here["robust/w"] - 1).max() < 0.3, "the attack of node 0 came to nothing"
    assert (here["extrapolated/refused"], here["extrapolated/folded"]) == (1, 5), "it claims 10^9 examples"
    assert here["private/w"].tobytes() != there["private/w"].tobytes(), "noise is nobody's to repeat"
    assert here["private/epsilon"] == there["private/epsilon"] == pytest.approx(8.0, rel=0.01)
