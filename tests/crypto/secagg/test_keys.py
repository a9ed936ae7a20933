import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.crypto.secagg.keys import CIPHERTEXT, Context, Pair, commitment
from fedcore.errors import ProtocolError
from tests.crypto.secagg.conftest import CONFIG

CONTEXT = Context(CONFIG.digest, b"t" * 32)
ONE, OTHER = Pair.of(b"1" * 32), Pair.of(b"2" * 32)
AGREED = ONE.agreed(OTHER.public)


def test_both_ends_agree() -> None:
    assert OTHER.agreed(ONE.public) == AGREED


def test_a_key_of_low_order_is_refused() -> None:
    with pytest.raises(ProtocolError, match="of low order"):
        ONE.agreed(bytes(32))


def test_no_key_serves_two_purposes() -> None:
    other = Context(b"d" * 32, CONTEXT.transcript), Context(CONTEXT.digest, b"u" * 32)
    derived = [
        *(context.self_mask(AGREED, 1) for context in (CONTEXT, *other)),
        *(context.pair_mask(AGREED, 1, 2) for context in (CONTEXT, *other)),
        CONTEXT.self_mask(AGREED, 2),
        CONTEXT.pair_mask(AGREED, 1, 3),
    ]
    halves = {half for keys in derived for half in (keys[:32], keys[32:])}
    assert len(halves) == 2 * len(derived)
    assert CONTEXT.pair_mask(AGREED, 2, 1) == CONTEXT.pair_mask(AGREED, 1, 2)


@given(shares=st.binary(min_size=66, max_size=66))
def test_shares_open_where_they_were_sent(shares: bytes) -> None:
    sealed = CONTEXT.sealed(AGREED, 1, 2, shares)
    assert len(sealed) == CIPHERTEXT
    assert CONTEXT.opened(AGREED, 1, 2, sealed) == shares
    assert CONTEXT.opened(AGREED, 2, 1, sealed) is None
    assert Context(CONFIG.digest, b"u" * 32).opened(AGREED, 1, 2, sealed) is None
    assert Context(b"d" * 32, CONTEXT.transcript).opened(AGREED, 1, 2, sealed) is None


@given(at=st.integers(0, CIPHERTEXT - 1), bit=st.integers(0, 7))
def test_an_altered_ciphertext_does_not_open(at: int, bit: int) -> None:
    sealed = bytearray(CONTEXT.sealed(AGREED, 1, 2, b"s" * 66))
    sealed[at] ^= 1 << bit
    assert CONTEXT.opened(AGREED, 1, 2, bytes(sealed)) is None


def test_a_commitment_is_to_one_seed_in_one_attempt() -> None:
    made = {commitment(digest, seed) for digest in (b"d" * 32, b"e" * 32) for seed in (b"1" * 32, b"2" * 32)}
    assert len(made) == 4


def test_keys_are_not_shown() -> None:
    assert "1" * 32 not in repr(ONE) and b"1" * 32 not in repr(ONE).encode()
