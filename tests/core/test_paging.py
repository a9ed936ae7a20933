"""Passes over mapped files: every column once, in order, nothing lost, and only a window in memory."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedcore import paging
from fedcore.paging import passing


def file_of(path: Path, values: NDArray[Any], mode: Any = "r+") -> NDArray[Any]:
    values.tofile(path)
    return np.memmap(path, values.dtype, mode=mode, shape=values.shape)


@given(st.integers(0, 5000), st.integers(1, 700), st.integers(1, 40_000))
def test_slices_cut_an_array_as_they_should(
    tmp_path_factory: pytest.TempPathFactory, size: int, length: int, window: int
) -> None:
    values = np.arange(size, dtype=np.int64)
    arrays: list[NDArray[Any]] = [values, values.astype(np.float32)]
    if size:
        folder = tmp_path_factory.mktemp("files")
        arrays.append(file_of(folder / "a", values))
        arrays.append(file_of(folder / "b", np.stack([values, values]).astype(np.int16), "r"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paging, "WINDOW", window)
        for some in (arrays[:1], arrays[:2], arrays):
            parts = list(passing(*some, length=length))
            assert all(0 < part.stop - part.start <= length for part in parts)
            assert [i for part in parts for i in range(part.start, part.stop)] == list(range(size))


@pytest.mark.parametrize("offset", [0, 1, 511, 4097])
def test_what_is_written_stays_and_what_is_only_copied_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offset: int
) -> None:
    monkeypatch.setattr(paging, "WINDOW", 1 << 14)
    expected = np.arange(50_000, dtype=np.int64)
    total, copied = (file_of(tmp_path / f"{mode}", expected * 0, mode) for mode in ("r+", "c"))
    copied[:] = 7  # which no file has
    part = total[offset:].view(np.uint64).view(np.int64)
    for block in passing(part, copied[offset:], length=1000):
        part[block] += expected[offset:][block]
    assert (total[offset:] == expected[offset:]).all() and not total[:offset].any()
    assert (np.fromfile(tmp_path / "r+", np.int64) == total).all()
    assert (copied == 7).all()


def test_of_a_large_file_only_a_window_is_in_memory(tmp_path: Path) -> None:
    def resident() -> int:
        """Return how many KiB of files this process has mapped and in memory."""
        found = re.search(r"RssFile:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))
        return int(found[1]) if found else 0

    size = 64 << 20
    total = file_of(tmp_path / "file", np.zeros(size // 8, np.int64))
    before, most = resident(), 0
    for block in passing(total, length=1 << 16):
        total[block] += 1
        most = max(most, resident())
    assert most - before < 6 << 10 and resident() - before < 1 << 10
    assert (total == 1).all()
