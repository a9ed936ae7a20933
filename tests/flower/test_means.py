"""What replies say of themselves, believed as far as it makes sense."""

from typing import Any

import pytest
from flwr.app import MetricRecord
from hypothesis import given
from hypothesis import strategies as st

from fedcore.errors import UpdateRefused
from fedcore.flower.means import number, only, weighted_means

NAN = float("nan")


def test_means_are_weighed_and_the_weight_is_none_of_them() -> None:
    first, second = MetricRecord({"n": 1, "loss": 4.0, "list": [1, 2]}), MetricRecord({"n": 3, "loss": 0.0})
    replies = [(1.0, first), (3.0, second)]
    assert weighted_means(replies, "n") == {"loss": 1.0, "list": [1.0, 2.0]}


@pytest.mark.parametrize("value", [NAN, float("inf"), 1e308, 10**400, [1.0], [1.0, NAN]], ids=str)
def test_nonsense_is_left_out_of_its_mean_alone(value: Any) -> None:
    replies = [(1.0, MetricRecord({"a": 2.0})), (9.0, MetricRecord({"a": value, "b": 5.0}))]
    assert weighted_means(replies, "n") == {"a": 2.0, "b": 5.0}


def test_without_weight_there_is_no_mean() -> None:
    assert weighted_means([(0.0, MetricRecord({"a": 2.0}))], "n") == {}


PAIRS = st.lists(st.tuples(st.floats(0.1, 1e6), st.floats(-1e6, 1e6)), min_size=1)


@given(PAIRS.flatmap(lambda pairs: st.tuples(st.just(pairs), st.permutations(pairs))))
def test_a_mean_lies_between_the_least_and_the_greatest_in_any_order(
    orders: tuple[list[tuple[float, float]], list[tuple[float, float]]],
) -> None:
    means = [
        weighted_means([(weight, MetricRecord({"a": value})) for weight, value in pairs], "n")["a"]
        for pairs in orders
    ]
    assert means[0] == means[1] and isinstance(means[0], float)
    values = [value for _, value in orders[0]]
    assert min(values) - 1e-6 <= means[0] <= max(values) + 1e-6


def test_a_number_is_a_single_one() -> None:
    assert number(MetricRecord({"n": 7}), "n") == 7.0
    for metrics, said in ((MetricRecord(), "None"), (MetricRecord({"n": [1]}), r"\[1\]")):
        with pytest.raises(UpdateRefused, match=f"metric 'n' is {said}, expected a number"):
            number(metrics, "n")


def test_one_record_is_expected() -> None:
    assert only({"a": 1}, "MetricRecord") == 1
    with pytest.raises(UpdateRefused, match="sent 2 MetricRecords, expected exactly one"):
        only({"a": 1, "b": 2}, "MetricRecord")
