"""How often training has begun of late."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import given
from hypothesis import strategies as st

from fedcore.client.pace import Pace

NOW = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)


@given(st.lists(st.integers(0, 3 * 86400), max_size=9))
def test_starts_of_the_last_day_are_counted_over_restarts(seconds: list[int]) -> None:
    with TemporaryDirectory() as folder:
        times = sorted(NOW + timedelta(seconds=each) for each in seconds)
        for number, time in enumerate(times):
            pace = Pace(Path(folder) / "starts.json")
            recent = [each for each in times[:number] if each > time - timedelta(days=1)]
            assert pace.starts(time) == len(recent)
            pace.note(time)


def test_a_clock_that_is_set_back_gives_nothing_back(tmp_path: Path) -> None:
    pace = Pace(tmp_path / "starts.json")
    pace.note(NOW)
    assert pace.starts(NOW - timedelta(days=400)) == 1
    assert (tmp_path / "starts.json").stat().st_mode & 0o777 == 0o600
