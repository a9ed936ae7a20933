"""Worker processes as they start where nothing can be forked."""

import pytest


@pytest.fixture
def spawning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let workers be new processes, as where torch survives no fork."""
    for module in ("engine", "processes"):
        monkeypatch.setattr(f"fedcore.simulations.{module}.forkable", lambda spec: False)
