"""Signals: put off, taken as Ctrl-C, and as they were when the block has ended."""

import signal
from threading import Thread

import pytest

from fedcore.interrupts import BOTH, handled, terminable, uninterrupted


@pytest.mark.parametrize("number", BOTH)
def test_a_signal_waits_for_the_end_of_the_block(number: signal.Signals) -> None:
    heard: list[str] = []
    with handled(lambda *_: heard.append("signal"), number):
        with uninterrupted():
            signal.raise_signal(number)
            heard.append("written")
        assert heard == ["written", "signal"]
        signal.raise_signal(number)
        assert heard == ["written", "signal", "signal"]


def test_a_signal_is_not_lost_where_the_block_fails() -> None:
    heard: list[int] = []
    with handled(lambda number, _: heard.append(number), *BOTH):
        with pytest.raises(OSError, match="full"), uninterrupted():
            signal.raise_signal(signal.SIGTERM)
            raise OSError("the disk is full")
        assert heard == [signal.SIGTERM]


def test_sigterm_is_taken_as_ctrl_c_and_only_in_the_block() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), terminable():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_other_threads_change_nothing() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def inside() -> None:
        with terminable(), uninterrupted():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [before]
