"""Secret sharing: any threshold of shares opens, fewer say nothing, and what is malformed is refused."""

import secrets
from collections.abc import Callable
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.crypto.shamir import PRIME, combine, split

SECRETS = st.binary(min_size=32, max_size=32)


def fixed(*coefficients: int) -> Callable[[int], bytes]:
    """Return a source of randomness that gives these coefficients."""
    drawn = b"".join(c.to_bytes(48, "big") for c in coefficients)
    return lambda size: drawn[:size]


def test_the_prime_is_prime_and_above_every_secret() -> None:
    assert PRIME > 2**256 - 1
    assert PRIME == 2**256 + 297
    witnesses = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)
    assert all(strong_probable_prime(witness) for witness in witnesses)


def strong_probable_prime(base: int) -> bool:
    """Return whether the prime passes Miller and Rabin's test to a base."""
    odd, twos = PRIME - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    powers = [pow(base, odd << i, PRIME) for i in range(twos)]
    return powers[0] == 1 or PRIME - 1 in powers


def test_shares_are_values_of_the_polynomial() -> None:
    secret = (1000).to_bytes(32, "big")
    shares = split(secret, 3, [1, 2, 10], fixed(20, 3))  # 1000 + 20 x + 3 x^2
    assert [int.from_bytes(share, "big") for share in shares] == [1023, 1052, 1500]
    assert {len(share) for share in shares} == {33}
    assert combine(dict(zip([1, 2, 10], shares, strict=True)), 3) == secret


@given(SECRETS, st.data())
def test_any_threshold_of_shares_opens(secret: bytes, data: st.DataObject) -> None:
    points = data.draw(st.lists(st.integers(1, PRIME - 1), min_size=1, max_size=12, unique=True))
    threshold = data.draw(st.integers(1, len(points)))
    shares = dict(zip(points, split(secret, threshold, points, secrets.token_bytes), strict=True))
    kept = data.draw(st.lists(st.sampled_from(points), min_size=threshold, unique=True))
    assert combine({x: shares[x] for x in kept}, threshold) == secret


def test_fewer_than_the_threshold_say_nothing() -> None:
    """For two shares of three, every secret has a polynomial that goes through them."""
    points, secret = [3, 8, 21], secrets.token_bytes(32)
    shares = split(secret, 3, points, secrets.token_bytes)
    for other in (bytes(32), b"\xff" * 32, secrets.token_bytes(32)):
        third = third_point(
            other, {x: int.from_bytes(s, "big") for x, s in zip(points[:2], shares, strict=False)}
        )
        guess = {3: shares[0], 8: shares[1], 21: third.to_bytes(33, "big")}
        assert combine(guess, 3) == other
    with pytest.raises(ValueError, match="threshold 3 does not fit 2 shares"):
        combine(dict(zip(points[:2], shares, strict=False)), 3)


def third_point(secret: bytes, values: dict[int, int]) -> int:
    """Return the value at 21 of the parabola through the secret at 0 and two values (Lagrange)."""
    total, knots = 0, {0: int.from_bytes(secret, "big"), **values}
    for x, y in knots.items():
        weight = Fraction(1)
        for other in knots:
            weight *= Fraction(21 - other, x - other) if other != x else 1
        total += y * weight.numerator * pow(weight.denominator, -1, PRIME)
    return total % PRIME


def test_more_shares_than_needed_do_no_harm() -> None:
    secret = secrets.token_bytes(32)
    shares = dict(zip(range(1, 101), split(secret, 67, range(1, 101), secrets.token_bytes), strict=True))
    assert combine(shares, 67) == combine(dict(reversed(shares.items())), 67) == secret


def test_a_tampered_share_gives_another_secret() -> None:
    secret = secrets.token_bytes(32)
    shares = dict(zip((1, 2, 3), split(secret, 2, (1, 2, 3), fixed(7)), strict=True))
    shares[1] = (int.from_bytes(shares[1], "big") ^ 1).to_bytes(33, "big")
    assert combine(shares, 2) != secret
    assert combine({x: shares[x] for x in (2, 3)}, 2) == secret


@pytest.mark.parametrize("points", [[0, 1, 2], [1, 1, 2], [1, 2, PRIME], [1, 2, -1]])
def test_bad_points_are_refused(points: list[int]) -> None:
    with pytest.raises(ValueError, match="points must be distinct, at least 1 and below the prime"):
        split(bytes(32), 2, points, secrets.token_bytes)
    with pytest.raises(ValueError, match=r"points must be|does not fit"):
        combine(dict.fromkeys(points, bytes(33)), 3)


@pytest.mark.parametrize("threshold", [-1, 0, 4])
def test_bad_thresholds_are_refused(threshold: int) -> None:
    with pytest.raises(ValueError, match=f"threshold {threshold} does not fit 3 shares"):
        split(bytes(32), threshold, [1, 2, 3], secrets.token_bytes)


@pytest.mark.parametrize("share", [b"", bytes(32), bytes(34), PRIME.to_bytes(33, "big"), b"\xff" * 33])
def test_bad_shares_are_refused(share: bytes) -> None:
    with pytest.raises(ValueError, match="the share of point 2 is no field element of 33 bytes"):
        combine({1: bytes(33), 2: share}, 2)


@pytest.mark.parametrize("size", [0, 31, 33])
def test_bad_secrets_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"a secret has {size} bytes, expected 32"):
        split(bytes(size), 1, [1], secrets.token_bytes)


def test_a_result_beyond_32_bytes_is_refused() -> None:
    top = (PRIME - 1).to_bytes(33, "big")
    with pytest.raises(ValueError, match="the shares give no 32-byte secret"):
        combine({1: top, 2: top}, 2)
