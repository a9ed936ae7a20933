"""Fixed point: a real number enters a sum as the integer `rint(value * 2^shift)`.

Integer addition is exact, commutative and associative, so a sum of encoded updates has the same bits in
any order, in any grouping and over any split across workers, edges and restarts; summed under masks
modulo 2^bits it is the same number again. The shift follows from bounds that the plan states, so that no
sum of a whole cohort can overflow.

Wide words have 64 bits and hold anything whose coordinates are bounded. Narrow ones have 32 or 16 and hold
vectors whose L2 norm is bounded: rotated first, no coordinate of which is then large (`rotation`).
"""

from collections.abc import Iterator
from math import frexp, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedcore.errors import SpecError
from fedcore.paging import passing
from fedcore.privacy.rotation import flatness, rotated, unrotated

Integers = NDArray[np.int64]
Narrow = NDArray[np.unsignedinteger[Any]]  # uint16 or uint32

BLOCK = 1 << 16  # scalars; a block and its temporaries stay in the cache
MIN_SHIFT = 8  # a coarser grid than 2^-8 would be seen in the model
WRAP = 2.0**-40  # probability that any coordinate of a narrow sum wraps around, over the rotation's signs
COARSEST = 1 / 8  # of the norm bound of a client that counts once: what rounding may add, in narrow words
INEXACT = 1 + 2.0**-20  # what rounding in float32 may add to a norm


def blocks(size: int, length: int = BLOCK) -> Iterator[slice]:
    """Cut 0..size into slices of at most `length`."""
    return (slice(start, min(start + length, size)) for start in range(0, size, length))


def shift_for(bound: float, clients: int) -> int:
    """Return the largest shift with clients * bound * 2^shift < 2^62, so that no sum can overflow int64.

    A client's value is rounded by at most 1/2, so a sum is below 2^62 + clients / 2 < 2^63 in magnitude. The
    binary exponent of the product is exact, hence the same on every machine; a logarithm is not. Raises
    SpecError where the grid would be coarser than 2^-8.
    """
    _, exponent = frexp(clients * bound)
    shift = 62 - exponent
    if shift < MIN_SHIFT:
        raise SpecError(
            f"a sum over {clients} clients of values up to {bound:g} leaves steps of 2^{-shift} in 64-bit "
            f"integers, expected 2^-{MIN_SHIFT} or finer; lower [limits] weight or update, or the cohort"
        )
    return shift


def narrow_shift_for(norm: float, factor: float, size: int, clients: int, bits: int) -> int:
    """Return the largest shift with clients * (factor * B * 2^shift + 1/2) <= 2^(bits - 1).

    B is above the coordinates of rotated vectors of `size` coordinates and L2 norm <= norm; factor: the
    largest by which one is multiplied. For a vector that cannot be spread B is its norm. Else a sum wraps
    around with probability at most WRAP over the signs, and the grid is some 14 times finer, or less for
    short vectors, than one with room for any vector. Hoeffding's bound is taken for the sum itself, so it
    holds for any clients whose vectors do not depend on the round's signs; one that chooses its vector by
    them may destroy the sum, as it may under masks in any case.

    Raises SpecError where rounding would add more than COARSEST * norm to a vector of factor 1.
    """
    bound = factor * norm * flatness(size, WRAP) * INEXACT
    room = 2.0 ** (bits - 1) - clients / 2
    shift = frexp(room / (clients * bound))[1] - 1
    if room <= 0 or rounding(size, shift) > COARSEST * norm:
        times = f", each counted up to {factor:g} times," if factor > 1 else ""
        remedy = "limits.weight to the most examples that a client has, or " if times else ""
        raise SpecError(
            f"a sum over {clients} clients of vectors of norm {norm:g}{times} in {bits}-bit integers leaves "
            f"steps of {2.0**-shift:.2g}; over {size} coordinates rounding adds {rounding(size, shift):.2g} "
            f"to a vector's norm, expected at most {COARSEST * norm:g}; set {remedy}encryption.encoding = "
            f'"{"q32" if bits == 16 else "exact"}"'
        )
    return shift


def rounding(size: int, shift: int) -> float:
    """Return the L2 norm of what rounding changes: each coordinate by up to half a step, uniformly."""
    return sqrt(size / 12) * 2.0**-shift


def add_encoded(
    total: Integers, rows: NDArray[np.floating[Any]], factors: NDArray[np.float64], shift: int
) -> None:
    """Add `rint(factors[i] * rows[i] * 2^shift)` for all i to `total` in place, block by block.

    total: shape (d,), int64. rows: shape (k, d), float32 or float64, finite and within the bound for which
    the shift was made. factors: shape (k,). The product is taken in float64 and scaling by a power of two is
    exact, so the result depends neither on k nor on the blocks. Where no partial sum can leave the integers
    that float64 holds exactly, the rows of a block are summed before they are turned into int64.
    """
    scales = (factors * np.float64(2.0) ** shift)[:, None]
    for columns in passing(total, rows, length=BLOCK):
        for some in blocks(len(rows), max(1, BLOCK // (columns.stop - columns.start))):
            scaled = rows[some, columns].astype(np.float64)
            scaled *= scales[some]  # not while converting, which takes twice as long
            np.rint(scaled, out=scaled)
            if len(scaled) > 1 and within(scaled.reshape(-1), 2.0**53 / len(scaled)):
                scaled = scaled.sum(axis=0, keepdims=True)
            integers = scaled.astype(np.int64)
            total[columns] += integers[0] if len(integers) == 1 else integers.sum(axis=0)


def add_rotated(
    total: Narrow, rows: NDArray[np.floating[Any]], factors: NDArray[np.float64], shift: int, seed: int
) -> None:
    """Add `rint(factors[i] * R rows[i] * 2^shift)` for all i to `total` in place, modulo 2^bits.

    R is the rotation of a seed. total: shape (d,). rows: shape (k, d). factors: shape (k,). The integers do
    not depend on k, nor on the machine.
    """
    scales = (factors * np.float64(2.0) ** shift)[:, None]
    for place, piece in rotated(rows, seed):
        scaled = np.multiply(piece, scales, dtype=np.float64)
        np.rint(scaled, out=scaled)
        total[place] += scaled.sum(axis=0).astype(np.int64).astype(total.dtype)


def decode_rotated(total: Narrow, shift: int, seed: int, vector: NDArray[np.float64]) -> None:
    """Write to `vector` what a sum of `add_rotated` stands for; both of shape (d,)."""
    for place, piece in unrotated(signed(total)[None], seed):
        np.multiply(piece[0], np.float64(2.0) ** -shift, out=vector[place])


def signed(words: Narrow) -> NDArray[np.signedinteger[Any]]:
    """Return words as the numbers around zero that they stand for, a view."""
    return words.view(f"int{8 * words.itemsize}")


def decode(total: Integers, shift: int) -> NDArray[np.float64]:
    """Return the real numbers that integers stand for; shape kept, float64."""
    return total * np.float64(2.0) ** -shift


def within(values: NDArray[Any], bound: float) -> bool:
    """Tell whether all values are finite and in [-bound, bound], block by block; NaN is outside."""
    return all(
        -bound <= values[block].min() and values[block].max() <= bound
        for block in passing(values, length=BLOCK)
    )
