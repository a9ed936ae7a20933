"""The laws that parts of a strategy keep, as checks for the tests of whoever writes one.

    from fedcore.testing import check_aggregator

    def test_my_rule() -> None:
        check_aggregator(MyRule(f=2))

A check raises AssertionError with the law that the part breaks and the input that shows it. Inputs come from
fixed seeds, so the verdict is the same every time. All of fedcore's own parts pass.
"""

from fedcore.testing.aggregators import check_aggregator as check_aggregator
from fedcore.testing.algorithms import check_algorithm as check_algorithm
from fedcore.testing.attacks import check_attack as check_attack
from fedcore.testing.optimizers import check_optimizer as check_optimizer
from fedcore.testing.preaggregators import check_preaggregator as check_preaggregator
from fedcore.testing.samplers import check_sampler as check_sampler
