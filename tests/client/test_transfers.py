"""Parameters that come with an assignment are kept as those that are fetched, and checked as they are."""

import asyncio
from hashlib import sha256
from pathlib import Path
from typing import cast

import pytest

from fedcore.client.connection import Connection
from fedcore.client.session import Session
from fedcore.client.state import State
from fedcore.client.transfers import Transfers
from fedcore.errors import ProtocolError
from fedcore.messages import Blob

CONTENT = b"parameters"


def fetch(folder: Path, blob: Blob, content: bytes) -> None:
    """Fetch without a session: whatever asked for one would fail."""
    (folder / "cache").mkdir(exist_ok=True)
    transfers = Transfers(cast("Session", None), State(folder), Connection(lambda _: None))
    asyncio.run(transfers.fetch(blob, 0.0, content))


def test_parameters_that_came_with_the_assignment_are_in_the_cache(tmp_path: Path) -> None:
    blob = Blob(sha256(CONTENT).hexdigest(), len(CONTENT))
    for _ in range(2):
        fetch(tmp_path, blob, CONTENT)
        assert [path.read_bytes() for path in (tmp_path / "cache").iterdir()] == [CONTENT]


def test_other_bytes_than_were_announced_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ProtocolError, match="the parameters in an assignment are not those of"):
        fetch(tmp_path, Blob(sha256(b"others").hexdigest(), len(CONTENT)), CONTENT)
    assert not list((tmp_path / "cache").iterdir())
