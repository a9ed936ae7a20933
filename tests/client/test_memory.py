"""What a process group is taken to hold, against processes whose memory is known."""

import subprocess
import sys

import pytest

from fedcore.client.memory import exceeds, size_of

HOLD = """
import os, mmap, sys, tempfile
os.setpgrp()
megabytes = b"1" * (60 << 20)
file = tempfile.TemporaryFile()
file.truncate(80 << 20)
mapped = mmap.mmap(file.fileno(), 0)
mapped[:] = b"2" * len(mapped)
child = os.fork()
if child:
    print(flush=True)
sys.stdin.read()
"""


def test_sizes() -> None:
    assert size_of("512MiB") == 2**29 and size_of("4GiB") == 2**32


@pytest.mark.parametrize(("limit", "expected"), [("40MiB", True), ("100MiB", False)])
def test_what_is_shared_counts_once_and_files_do_not_count(limit: str, expected: bool) -> None:
    """Parent and child have 60 MiB between them, and 80 MiB of a file that the kernel can write away."""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", HOLD], stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout and process.stdin
        process.stdout.readline()
        assert exceeds(process.pid, size_of(limit)) == expected
        process.stdin.close()


def test_a_group_that_has_ended_holds_nothing() -> None:
    process = subprocess.Popen([sys.executable, "-c", "pass"], process_group=0)
    process.wait()
    assert not exceeds(process.pid, 0)
