"""Copies of this process that do one thing and end."""

import os
import sys
import traceback
from collections.abc import Callable


def forked(work: Callable[[], None]) -> int:
    """Return the id of a fork of this process that does some work and ends, whatever happens."""
    if pid := os.fork():
        return pid
    try:
        work()
    except BaseException:  # whatever it is, it must not go on as a second one of this process
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def cuda_begun() -> bool:
    """Return whether this process uses CUDA, which survives no fork."""
    torch = sys.modules.get("torch")
    return bool(torch and torch.cuda.is_initialized())
