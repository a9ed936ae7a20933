"""Whatever hostile clients send, the coordinator lives, logs no error, and honest runs have their bits."""

from pathlib import Path

import pytest

from tests.tools.fuzz import fuzz


@pytest.mark.parametrize(
    ("examples", "rounds"), [(25, 10), pytest.param(1000, 100, marks=pytest.mark.slow)], ids=["quick", "long"]
)
def test_hostile_clients_harm_nobody(tmp_path: Path, examples: int, rounds: int) -> None:
    arena = fuzz(tmp_path, examples, seed=0, rounds=rounds)
    methods = {code.partition(" ")[0] for code in arena.codes}
    assert methods >= {"Coordinator/Connect", "Coordinator/Upload", "Coordinator/Download"}
