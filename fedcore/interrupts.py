"""What Ctrl-C and SIGTERM do while a block runs; they only ever reach the main thread."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

BOTH = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def handled(handler: Callable[..., object], *numbers: signal.Signals) -> Iterator[None]:
    """Have a handler take signals until the block has ended; in any other thread change nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def terminable() -> AbstractContextManager[None]:
    """End the block at SIGTERM as at Ctrl-C: it stops what it has started."""
    return handled(signal.default_int_handler, signal.SIGTERM)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Put off Ctrl-C and SIGTERM until the block has ended."""
    came: list[int] = []
    try:
        with handled(lambda number, _: came.append(number), *BOTH):
            yield
    finally:
        for late in came[:1]:
            signal.raise_signal(late)
