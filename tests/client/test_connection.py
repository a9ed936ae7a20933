"""When an agent tries again, on a clock that the test turns."""

import logging
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.client.connection import FIRST_WAIT, LONGEST_WAIT, QUIET, STOOD, Connection, backoff


@dataclass
class World:
    """A clock, a connection, and what it has told."""

    now: float = 0.0
    told: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.connection = Connection(self.told.append, lambda: self.now)

    def stand(self, seconds: float) -> float:
        """Have a stream for so long, and return the wait that follows its loss."""
        self.connection.welcome("host:1")
        self.now += seconds
        return self.connection.lose("gone")


@given(st.integers(0, 10**6), st.floats(0, 1, exclude_max=True))
def test_the_wait_grows_to_a_limit_and_is_never_the_same_for_all(attempt: int, chance: float) -> None:
    assert FIRST_WAIT / 2 <= backoff(attempt, chance) <= LONGEST_WAIT
    assert backoff(attempt + 1, chance) >= backoff(attempt, chance)
    assert backoff(attempt, 0.0) < backoff(attempt, 0.9)


def test_an_outage_of_an_hour_is_a_line_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    world, attempts = World(), 0
    with caplog.at_level(logging.INFO, "fedcore.client"):
        while world.now < 3600:
            world.now += world.connection.lose("refused")
            attempts += 1
    assert 3600 / LONGEST_WAIT < attempts < 2.2 * 3600 / LONGEST_WAIT
    assert 3600 / (QUIET + LONGEST_WAIT) < len(caplog.records) <= 3600 / QUIET + 1
    assert len({row["since"] for row in world.told}) == 1 and world.told[-1]["reason"] == "refused"


def test_a_stream_that_is_thrown_out_at_once_ends_no_back_off() -> None:
    """Two agents with one identity take turns, ever more slowly."""
    world = World()
    waits = [world.stand(0.05) for _ in range(12)]
    assert all(2 * earlier >= FIRST_WAIT * 2**i for i, earlier in enumerate(waits[:8]))
    assert waits[-1] >= LONGEST_WAIT / 2
    assert world.stand(STOOD) <= FIRST_WAIT


def test_work_that_came_to_its_end_makes_the_next_wait_short() -> None:
    world = World()
    for _ in range(12):
        world.stand(0.05)
    world.connection.worked()
    assert world.stand(0.05) <= FIRST_WAIT


@given(st.floats(0.1, 3600))
def test_a_pause_is_kept_to_the_moment_and_once(seconds: float) -> None:
    world = World()
    world.connection.welcome("host:1")
    world.connection.rest(seconds)
    assert world.connection.pause == pytest.approx(seconds)
    assert world.connection.lose("asked") == pytest.approx(seconds)
    assert world.told[-1]["until"] > world.told[-1]["since"]
    world.now += seconds + 0.001
    assert world.connection.pause == 0.0 and world.connection.lose("refused") <= FIRST_WAIT
    assert not world.told[-1]["until"]
