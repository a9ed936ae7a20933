"""Tree aggregation: prefix sums over rounds whose noise grows with the logarithm of their number.

Dwork et al. 2010 and Chan et al. 2011; DP-FTRL of Kairouz et al. 2021 (arXiv 2103.00039). Node (l, j) of the
binary tree covers rounds j 2^l + 1 .. (j + 1) 2^l and carries one draw of noise N(0, (z C)^2) per coordinate.
The sum of rounds 1..t is released with the noise of the nodes of t's binary representation, so its variance
is (z C)^2 times the number of ones in t. The noise of different nodes is independent, and that of a node is
the same whenever it is used.

No cohort is sampled and no amplification is claimed: the guarantee holds for any order of clients in which
two participations of one client lie at least `separation` rounds apart.
"""

from functools import lru_cache
from math import sqrt

import numpy as np
from numpy.typing import NDArray

Node = tuple[int, int]
Patterns = NDArray[np.int64]

# More patterns of a block than this are thinned out, which makes the sensitivity an upper bound.
_LARGEST_FRONT = 100


def nodes(t: int) -> tuple[Node, ...]:
    """Return the nodes (level, index) that together cover rounds 1..t, the largest last."""
    return tuple((level, (t >> level) - 1) for level in range(t.bit_length()) if t >> level & 1)


def increment(t: int) -> tuple[tuple[Node, ...], tuple[Node, ...]]:
    """Return the nodes whose noise comes in, and those whose noise goes, between the prefixes t - 1 and t.

    The release of round t >= 1 is its sum plus the noise of the first less the noise of the second; added
    up over rounds 1..t, what is left is the noise of `nodes(t)`.
    """
    level = (t & -t).bit_length() - 1
    return ((level, (t >> level) - 1),), nodes(t - 1)[:level]


def sensitivity(rounds: int, separation: int) -> float:
    """Return the L2 sensitivity of the tree over so many rounds, in units of the clip norm.

    It is the largest change of all nodes that are ever used, taken as one vector, when a client comes or goes
    whose updates have norm <= 1 and who takes part in any rounds at least `separation` apart. All releases
    are post-processing of these nodes plus noise: one Gaussian mechanism of noise multiplier z / sensitivity,
    also where updates answer to earlier releases (Denisov et al. 2022, arXiv 2202.08312, Theorem 2.1). Nodes
    of odd index are in no binary representation, so they are neither released nor counted.

    Updates that all point one way are the worst; then the square is the sum over nodes of m^2, m the
    participations that a node covers. Its maximum over all patterns of participation is found from the leaves
    up, keeping of each block the patterns that no other beats in all that matters outside the block. The
    result is exact for separations up to about twenty, and for single participation; elsewhere it is an
    upper bound, not more than two per cent above where that could be compared.
    """
    return sqrt(int(_prefix(rounds, separation)[:, 1].max()))


# A row of Patterns is (count, square, before, after, both): so many participations, and the sum of m^2 over
# the block's nodes. They fit into the block with `a` rounds free before the first and `c` after the last if
# a <= before, c <= after and a + c <= both. Sets of that form stay so when two blocks are joined.


@lru_cache(maxsize=128)
def _prefix(rounds: int, separation: int) -> Patterns:
    """Return the best patterns within rounds 1..rounds."""
    if not rounds:
        return np.zeros((1, 5), np.int64)
    last = rounds & -rounds
    head = _prefix(rounds - last, separation)
    tail = _with_node(_block(last.bit_length() - 1, separation))
    return _joined(head, tail, rounds - last, last, separation)


@lru_cache(maxsize=128)
def _block(level: int, separation: int) -> Patterns:
    """Return the best patterns within 2^level rounds, the node that covers them all not counted."""
    if not level:
        return np.array([(0, 0, 0, 0, 0), (1, 0, 0, 0, 0)], np.int64)
    half, size = _block(level - 1, separation), 1 << (level - 1)
    return _joined(_with_node(half), half, size, size, separation)


def _with_node(patterns: Patterns) -> Patterns:
    """Return the patterns with the node above them counted."""
    count, square, *room = patterns.T
    return np.stack([count, square + count**2, *room], axis=1)


def _joined(left: Patterns, right: Patterns, left_size: int, right_size: int, separation: int) -> Patterns:
    """Return the best patterns of two neighbouring blocks of so many rounds."""
    p_count, p_square, p_before, p_after, p_both = left.T[:, :, None]
    q_count, q_square, q_before, q_after, q_both = right.T[:, None, :]
    apart = separation - 1  # the fewest rounds between two participations
    no_p, no_q = p_count == 0, q_count == 0
    fits = no_p | no_q | (p_after + q_before >= apart)
    both = np.where(no_q, p_both + right_size, np.where(no_p, q_both + left_size, p_both + q_both - apart))
    first = np.where(no_q, p_before, np.minimum(p_before, p_both + q_before - apart))
    before = np.minimum(np.where(no_p, q_before + left_size, first), apart)
    last = np.where(no_p, q_after, np.minimum(q_after, q_both + p_after - apart))
    after = np.minimum(np.where(no_q, p_after + right_size, last), apart)
    before, after = np.minimum(before, both), np.minimum(after, both)
    both = np.minimum(both, before + after)
    columns = (p_count + q_count, p_square + q_square, before, after, both)
    return _thinned(_undominated(np.stack([column[fits] for column in columns], axis=1)))


def _undominated(patterns: Patterns) -> Patterns:
    """Return the patterns that no other equals or exceeds in every column, and always the empty one."""
    ordered = np.unique(patterns, axis=0)[::-1]
    kept, rest = [ordered[-1]], ordered[:-1]
    while len(rest):
        kept.append(rest[0])
        rest = rest[(rest > rest[0]).any(axis=1)]
    return np.array(kept)


def _thinned(patterns: Patterns) -> Patterns:
    """Return at most about _LARGEST_FRONT patterns that beat all given: neighbours merge to their maximum."""
    group = -(-len(patterns) // _LARGEST_FRONT)
    if group == 1:
        return patterns
    merged = []
    for count in np.unique(patterns[:, 0]):
        same = patterns[patterns[:, 0] == count]
        _, square, before, after, _ = same.T
        same = same[np.lexsort((square, -after, before))]
        merged.append(np.maximum.reduceat(same, np.arange(0, len(same), group), axis=0))
    return _undominated(np.concatenate(merged))
