"""Messages with a bit the wrong way, and bytes that are none: neither side takes them."""

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.crypto.secagg import Aborted, Step
from fedcore.errors import AuthenticationError, ProtocolError
from tests.crypto.secagg.conftest import VICTIM, Attempt, sparse

# The library warns of serial numbers that a flipped bit makes negative, before it refuses the signature.
pytestmark = pytest.mark.filterwarnings("ignore:Parsed a serial number")

TOLD = [Step.CHOOSE, Step.SHARE, Step.RECEIVE, Step.CONFIRM, Step.MASK, Step.AGREE, Step.REVEAL]
SAID = [Step.ADVERTISE, *(step for step in TOLD if step is not Step.MASK)]
BITS = st.integers(0, 2**20)


@pytest.fixture(scope="module", autouse=True)
def draws() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        sparse(patch, 3, 2)
        yield


def flipped(message: bytes, bit: int) -> bytes:
    """Return a message with one bit flipped."""
    altered = bytearray(message)
    altered[bit // 8 % len(message)] ^= 1 << bit % 8
    return bytes(altered)


def before(step: Step) -> Attempt:
    """Return an attempt in which the victim is about to be told of a step."""
    attempt = Attempt(6)
    attempt.advertise()
    while True:
        told = attempt.server.proceed()
        attempt.told[attempt.server.step] = told
        for name in told:
            if name != VICTIM or attempt.server.step is not step:
                attempt.hear(name, told[name])
        if attempt.server.step is step:
            return attempt


@pytest.mark.parametrize("step", TOLD)
@settings(max_examples=20)
@given(bit=BITS)
def test_a_client_takes_no_altered_message(step: Step, bit: int) -> None:
    attempt = before(step)
    with pytest.raises(Aborted):
        attempt.clients[VICTIM].receive(flipped(attempt.told[step][VICTIM], bit))


@pytest.fixture(scope="module")
def waiting() -> dict[Step, tuple[Attempt, bytes]]:
    """Return, for each step, a coordinator that waits for the victim alone, and what that would say."""
    found: dict[Step, tuple[Attempt, bytes]] = {}
    for step in SAID:
        attempt = Attempt(6)
        if step is Step.ADVERTISE:
            attempt.advertise([VICTIM])
            found[step] = attempt, attempt.clients[VICTIM].advertise()
        else:
            attempt = before(step)
            reply = attempt.clients[VICTIM].receive(attempt.told[step][VICTIM])
            assert reply is not None
            found[step] = attempt, reply
    return found


@pytest.mark.parametrize("step", SAID)
@given(bit=BITS)
def test_the_coordinator_takes_no_altered_message(
    step: Step, waiting: dict[Step, tuple[Attempt, bytes]], bit: int
) -> None:
    attempt, reply = waiting[step]
    with pytest.raises((ProtocolError, AuthenticationError)):
        attempt.server.receive(VICTIM, flipped(reply, bit))


@given(message=st.binary(max_size=200))
def test_bytes_that_are_no_message(message: bytes) -> None:
    attempt = Attempt(3)
    attempt.clients[VICTIM].advertise()
    with pytest.raises(Aborted):
        attempt.clients[VICTIM].receive(message)
    with pytest.raises((ProtocolError, AuthenticationError)):
        attempt.server.receive(VICTIM, message)
