"""Whether a group of processes holds more memory than it may, as Linux counts it.

Anonymous pages and shared memory count, in RAM or swapped out, because only the end of the processes frees
them. Pages of mapped files do not: the kernel drops those when it needs to.
"""

import os
from contextlib import suppress
from pathlib import Path

PROC = Path("/proc")
SIZES = {"MiB": 2**20, "GiB": 2**30}
# What each process has mapped, at no cost; what of it is its own share, at 10 ms for a GiB.
MAPPED = ("status", ("RssAnon:", "RssShmem:", "VmSwap:"))
SHARE = ("smaps_rollup", ("Pss_Anon:", "Pss_Shmem:", "SwapPss:"))


def size_of(text: str) -> int:
    """Return the bytes of a size such as "4GiB"."""
    return int(text[:-3]) * SIZES[text[-3:]]


def exceeds(group: int, limit: int) -> bool:
    """Return whether the processes of a group hold more than `limit` bytes; what they share counts once."""
    members = _members(group)
    return all(sum(_bytes(member, *of) for member in members) > limit for of in (MAPPED, SHARE))


def _members(group: int) -> list[Path]:
    """Return the processes of a group, among all that there are: those whose parent has ended, too."""
    members = []
    for entry in os.scandir(PROC):
        if entry.name.isdecimal():
            with suppress(OSError):  # it has ended since
                stat = Path(entry.path, "stat").read_bytes()
                if int(stat.rpartition(b")")[2].split()[2]) == group:
                    members.append(Path(entry.path))
    return members


def _bytes(process: Path, file: str, keys: tuple[str, ...]) -> int:
    with suppress(OSError):
        lines = (process / file).read_text().splitlines()
        return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(keys))
    return 0
