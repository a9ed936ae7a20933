"""The masks in a sum, from revealed shares; a secret is held against what its owner had said of it."""

from collections.abc import Callable, Mapping, Set

import numpy as np

from fedcore.crypto.secagg.cohort import Cohort
from fedcore.crypto.secagg.edges import Matrix
from fedcore.crypto.secagg.errors import Failed
from fedcore.crypto.secagg.keys import Pair, commitment
from fedcore.crypto.shamir import combine

Shares = Mapping[int, bytes]  # of one secret, by their points


def masks_in_sum(
    cohort: Cohort, links: Matrix, included: Set[int], revealed: Mapping[int, Shares]
) -> tuple[list[bytes], list[bytes]]:
    """Return the keys of the masks to add and to subtract, so that the sum of `included` is bare.

    revealed: for every member with links, shares of its seed if it is included, else of its mask key. Raises
    Failed where a secret cannot be recovered.
    """
    plus: list[bytes] = []
    minus: list[bytes] = []
    for member, shares in revealed.items():
        if member in included:
            minus.append(cohort.context.self_mask(_seed(cohort, member, shares), member))
            continue
        lost = _mask_pair(cohort, member, shares)
        for peer in included & set(np.flatnonzero(links[member] | links[:, member]).tolist()):
            agreed = lost.agreed(cohort.members[peer].mask_key)
            (minus if member > peer else plus).append(cohort.context.pair_mask(agreed, member, peer))
    return plus, minus


def _seed(cohort: Cohort, member: int, shares: Shares) -> bytes:
    """Return the seed that a member committed to."""
    committed = cohort.members[member].commitment
    return _recovered(cohort, member, shares, lambda s: commitment(cohort.context.digest, s) == committed)


def _mask_pair(cohort: Cohort, member: int, shares: Shares) -> Pair:
    """Return the pair of keys of which a member advertised the public one."""
    public = cohort.members[member].mask_key
    return Pair.of(_recovered(cohort, member, shares, lambda s: Pair.of(s).public == public))


def _recovered(cohort: Cohort, member: int, shares: Shares, genuine: Callable[[bytes], bool]) -> bytes:
    """Return a secret; of the shares in use one may be wrong, and is found by leaving out each in turn."""
    threshold, points = cohort.graph.threshold, sorted(shares)
    for wrong in (None, *points[:threshold]):
        used = {point: shares[point] for point in points if point != wrong}
        try:
            if genuine(secret := combine(used, threshold)):
                return secret
        except ValueError:
            continue
    raise Failed(
        f"the {len(shares)} shares of a secret of {cohort.members[member].name} do not give it, expected "
        f"{threshold} that are right"
    )
