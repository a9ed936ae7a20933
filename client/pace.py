"""How often a device has begun to train of late: times in a file, over restarts."""

import json
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from fedcore.crypto.files import write_atomically

DAY = timedelta(days=1)


@dataclass(frozen=True)
class Pace:
    """The starts of training of the last 24 hours, in `path` (JSON, seconds since 1970)."""

    path: Path

    def starts(self, now: datetime) -> int:
        """Return how many there were; one that a clock set back puts into the future counts."""
        return len(self._recent(now))

    def note(self, now: datetime) -> None:
        """Add one, on disk when this returns."""
        times = [*self._recent(now), now.timestamp()]
        write_atomically(self.path, json.dumps(times).encode(), 0o600)

    def _recent(self, now: datetime) -> list[float]:
        try:
            times: list[float] = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return []
        return [time for time in times if time > (now - DAY).timestamp()]
