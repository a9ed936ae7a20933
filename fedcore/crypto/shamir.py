"""Shamir's secret sharing of 32-byte keys (Shamir 1979) over the prime 2^256 + 297.

The prime is above every 32-byte number, so any key is a field element, and no share says anything about it.
A share is a value alone: who holds it is known, and with it the point that it belongs to. Nothing shows that
a share is genuine; whoever combines shares must know what the secret should be by other means.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from math import prod

PRIME = 2**256 + 297
SECRET = 32  # bytes of a secret
SHARE = 33  # bytes of a share, a field element, big-endian
_DRAW = 48  # random bytes to a coefficient: reduced modulo the prime they are uniform up to 2^-127


def split(
    secret: bytes, threshold: int, points: Sequence[int], random: Callable[[int], bytes]
) -> list[bytes]:
    """Return one share for each point, of which any `threshold` give the secret and fewer give nothing.

    A share is f(x) for a polynomial f of degree threshold - 1 with f(0) the secret and all other coefficients
    drawn from `random`, called once for 48 bytes to a coefficient, from x^1 up, each big-endian. Raises
    ValueError unless the secret has 32 bytes, the points are distinct and in 1..PRIME - 1, and the threshold
    is in 1..len(points).
    """
    if len(secret) != SECRET:
        raise ValueError(f"a secret has {len(secret)} bytes, expected {SECRET}")
    _check(points, threshold)
    drawn = random(_DRAW * (threshold - 1))
    coefficients = [
        int.from_bytes(drawn[start : start + _DRAW], "big") % PRIME for start in range(0, len(drawn), _DRAW)
    ]
    downwards = [*reversed(coefficients), int.from_bytes(secret, "big")]
    return [_value(downwards, x).to_bytes(SHARE, "big") for x in points]


def combine(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """Return the secret, from the shares of the `threshold` lowest points.

    Raises ValueError for too few shares, points or shares outside the field, and for a result that is no
    32-byte secret. Shares that were tampered with give another secret, mostly without any error.
    """
    _check(list(shares), threshold)
    used = tuple(sorted(shares)[:threshold])
    total = 0
    for weight, x in zip(_weights(used), used, strict=True):
        value = int.from_bytes(shares[x], "big")
        if len(shares[x]) != SHARE or value >= PRIME:
            raise ValueError(f"the share of point {x} is no field element of {SHARE} bytes")
        total += weight * value
    secret = total % PRIME
    if secret >> 8 * SECRET:
        raise ValueError("the shares give no 32-byte secret: at least one of them is wrong")
    return secret.to_bytes(SECRET, "big")


def _check(points: Sequence[int], threshold: int) -> None:
    """Raise ValueError for points or a threshold that cannot share a secret."""
    if not all(0 < x < PRIME for x in points) or len(set(points)) != len(points):
        raise ValueError("points must be distinct, at least 1 and below the prime: at 0 lies the secret")
    if not 1 <= threshold <= len(points):
        raise ValueError(f"threshold {threshold} does not fit {len(points)} shares")


def _value(downwards: Sequence[int], x: int) -> int:
    """Return a polynomial's value by Horner's rule.

    Reduced once, at the end: for the small points in use the few more digits cost less than the divisions.
    """
    value = 0
    for coefficient in downwards:
        value = value * x + coefficient
    return value % PRIME


@lru_cache(maxsize=128)
def _weights(points: tuple[int, ...]) -> tuple[int, ...]:
    """Return the Lagrange weights at zero, w_i = prod_{j != i} x_j / (x_j - x_i), with one inversion for all.

    Points are public, and a server combines many secrets from the shares of the same clients.
    """
    whole = prod(points) % PRIME
    below = [x * prod(other - x for other in points if other != x) % PRIME for x in points]
    before = [1]  # products of all denominators before each
    for factor in below:
        before.append(before[-1] * factor % PRIME)
    inverse = pow(before[-1], -1, PRIME)
    weights = []
    for factor, product in zip(reversed(below), reversed(before[:-1]), strict=True):
        weights.append(whole * product * inverse % PRIME)
        inverse = inverse * factor % PRIME
    return tuple(reversed(weights))
