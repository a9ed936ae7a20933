"""What virtual clients keep, in memory and on disk."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.layout import Vector
from fedcore.simulations.answers import ClientStates

NAMES = [f"client-{i:06d}" for i in range(6)]
MODEL = 16  # numbers in a client's state, of 8 bytes


def kept(number: int) -> Mapping[str, Vector]:
    return {"control": np.full(MODEL, float(number)), "local": np.zeros((0,), np.float32)}


def told(states: ClientStates) -> dict[str, float]:
    """Return what each client keeps, by the number that is all over it."""
    return {name: float(states[name]["control"][0]) for name in NAMES if states[name]}


ROUND = st.tuples(
    st.sets(st.sampled_from(NAMES), min_size=1), st.sampled_from(["go on", "save", "die", "give up"])
)


@given(st.lists(ROUND, max_size=25), st.integers(0, 8))
def test_clients_keep_the_same_however_little_is_in_memory(
    rounds: list[tuple[set[str], str]], room: int
) -> None:
    """Against two dictionaries: one of what was settled last, one of what was saved last.

    A process that dies loses what came since; one that gives up in a round saves what came before the round.
    """
    with TemporaryDirectory() as folder:
        path = Path(folder) / "state" / "clients.db"
        states = ClientStates(room * MODEL * 8, path)
        settled: dict[str, float] = {}
        saved: dict[str, float] = {}
        for number, (clients, end) in enumerate(rounds, start=1):
            states.commit({client: kept(number) for client in sorted(clients)})
            states.commit({"client-000000": {}})  # has nothing to keep, so what it kept stays
            assert told(states) == settled | dict.fromkeys(clients, number), "the round's evaluation sees it"
            if end == "give up":
                states.save(number - 1)
                saved = dict(settled)
            else:
                states.settle()
                settled |= dict.fromkeys(clients, number)
                assert (
                    sum(v.nbytes for state in states.states.values() for v in state.values()) <= states.memory
                )
            if end == "save":
                states.save(number)
                saved = dict(settled)
            if end in ("die", "give up"):
                states.close()
                states = ClientStates(room * MODEL * 8, path)
                assert states.file.round <= number
                settled = dict(saved)
            assert told(states) == settled
        states.close()


def test_without_a_folder_nothing_is_left_and_little_needs_no_file(tmp_path: Path) -> None:
    small, large = ClientStates(), ClientStates(memory=0)
    for states in (small, large):
        states.commit({NAMES[0]: kept(1)})
        states.settle()
        assert told(states) == {NAMES[0]: 1.0}
    assert "file" not in vars(small) and not small.unsaved - {NAMES[0]}
    assert "file" in vars(large) and not large.states
    large.close()


@pytest.mark.parametrize("value", [np.array(2.5), np.arange(6.0).reshape(2, 3).T, np.arange(9.0)[::2]])
def test_vectors_come_back_as_they_were(value: Vector, tmp_path: Path) -> None:
    states = ClientStates(memory=0, path=tmp_path / "clients.db")
    states.commit({NAMES[0]: {"value": value}})
    states.settle()
    found = states[NAMES[0]]["value"]
    assert (found.dtype, found.shape, found.tolist()) == (value.dtype, value.shape, value.tolist())
    states.close()
