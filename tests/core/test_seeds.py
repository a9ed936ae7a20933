"""Streams are named by their paths: distinct paths share nothing, and a path means the same everywhere."""

import os
import subprocess
import sys

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fedcore.seeds import Path, digest, generator, integer

# Text that looks like the encoding itself, so that a sloppy separator would be found.
parts = st.one_of(st.integers(), st.text("ab01:strin", max_size=6), st.text(max_size=3))
paths = st.lists(parts, max_size=4).map(tuple)


@given(one=paths, other=paths)
def test_distinct_paths_have_distinct_digests(one: tuple[Path, ...], other: tuple[Path, ...]) -> None:
    assert (digest(*one) == digest(*other)) == (one == other)


def test_part_borders_and_types_are_part_of_a_path() -> None:
    near = [("a", 1), ("a1",), ("a", "1"), ("a", "", 1), (1, "a"), ("int1:1",), ("a", -1), ()]
    assert len({digest(*path) for path in near}) == len(near)


def test_golden_values() -> None:
    """Whoever changes these changes every run that was ever recorded."""
    assert digest(0, "model") == 272617141526967987706534494495880338086
    assert integer(7, "dropout", 3, "client-000017") == 1363651709991630281
    order = generator(1, "batches", 2, "client-000003").permutation(10)
    assert order.tolist() == [5, 8, 1, 0, 3, 9, 2, 4, 6, 7]


@given(path=paths)
def test_a_stream_is_philox_under_the_digest(path: tuple[Path, ...]) -> None:
    expected = np.random.Generator(np.random.Philox(key=digest(*path)))
    np.testing.assert_array_equal(generator(*path).random(9), expected.random(9))


def test_another_process_with_another_hash_seed_agrees() -> None:
    program = "from fedcore.seeds import *; print(digest('x', 3), generator('x', 3).integers(2**63))"
    environment = {**os.environ, "PYTHONHASHSEED": "1234"}
    printed = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, check=True
    )
    assert printed.stdout.split() == [b"%d" % digest("x", 3), b"%d" % generator("x", 3).integers(2**63)]


@given(path=paths)
def test_integers_fit_a_torch_seed(path: tuple[Path, ...]) -> None:
    assert 0 <= integer(*path) < 2**63


def test_streams_of_neighbours_are_uncorrelated() -> None:
    one, other = (generator(0, "batches", 1, client).standard_normal(20_000) for client in ("a", "b"))
    assert abs(float((one * other).mean())) < 5 / 20_000**0.5
