"""When agents may come back: a rate that holds, and a time that stays one's own."""

from collections import Counter
from heapq import heapify, heappop, heapreplace
from itertools import islice, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.client.connection import backoff
from fedcore.seeds import generator
from fedcore.server.steering import BURST, RATE, Steering, returns


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_thousand_agents_at_once_are_all_in_within_ten_seconds_and_a_hundred_a_second() -> None:
    clock = Clock()
    steering = Steering(clock)
    waits = {f"client-{i}": steering.wait(f"client-{i}") for i in range(1000)}
    late = {client: wait for client, wait in waits.items() if wait}
    assert len(waits) - len(late) == BURST
    assert max(late.values()) < 8.01 and len(set(late.values())) == len(late)
    for client, wait in late.items():  # each at its time, while others still wait for theirs
        clock.now = 1000.0 + wait + 0.001
        assert steering.wait(client) == 0.0
    assert not steering.expected


def test_who_comes_too_early_keeps_its_time() -> None:
    clock = Clock()
    steering = Steering(clock)
    for i in range(BURST):
        assert steering.wait(f"client-{i}") == 0.0
    first = steering.wait("early")
    steering.wait("another")
    clock.now += first / 2
    assert abs(steering.wait("early") - first / 2) < 1e-9
    clock.now += 1.0
    assert steering.wait("early") == 0.0


@given(st.lists(st.floats(0, 0.1), min_size=1, max_size=600))
def test_never_more_are_let_in_than_the_rate_and_one_burst(pauses: list[float]) -> None:
    clock, let_in = Clock(), 0
    steering = Steering(clock)
    for i, pause in enumerate(pauses):
        clock.now += pause
        let_in += steering.wait(f"client-{i}") == 0.0
        assert let_in <= BURST + RATE * (clock.now - 1000.0) + 1


def test_after_a_stop_agents_come_back_one_after_the_other() -> None:
    times = list(islice(returns(), 1000))
    assert times[0] >= 1.0 and times[-1] < 11.1
    assert all(after > before for before, after in pairwise(times))


@pytest.mark.parametrize("down", [0.5, 3.0, 20.0, 300.0])
def test_a_thousand_agents_of_a_killed_coordinator_are_back_within_half_a_minute(down: float) -> None:
    """By their own back-off and the times that the new one gives them; however long it was away."""
    clock, rng, let_in = Clock(), generator("stampede", round(down * 10)), Counter[int]()
    steering, up, last = Steering(clock), 1000.0 + down, 0.0
    agents = [(1000.0 + backoff(0, rng.random()), i, 0) for i in range(1000)]
    heapify(agents)
    while agents:
        clock.now, agent, attempt = agents[0]
        if clock.now < up:
            heapreplace(agents, (clock.now + backoff(attempt + 1, rng.random()), agent, attempt + 1))
        elif wait := steering.wait(f"client-{agent}"):
            heapreplace(agents, (clock.now + wait, agent, attempt))
        else:
            heappop(agents)
            let_in[int(clock.now - up)] += 1
            last = clock.now - up
    assert last < 30.0 and sum(let_in.values()) == 1000
    assert max(let_in.values()) <= BURST + RATE + 1
