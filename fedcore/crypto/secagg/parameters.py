"""Who masks with whom, and how many shares open a secret: the graph of secure aggregation.

A client draws `degree` peers from its own randomness, uniformly and after the cohort is fixed, and splits
its two secrets among those alone, so that any `threshold` of them can open one. Masks run along every edge
that either end drew. A client masks only where at least `threshold` of its own draw are on the edge list, and
whoever holds a share of its seed opens it only where as many of them are in U1, the set that is summed. Up to
64 clients everybody draws everybody: the complete graph of Bonawitz et al. (2017). Above it is the sparse
graph of Bell et al. (2020, malicious variant), where only outgoing neighbours hold shares: corrupt clients
choose whom they draw, but not who draws them.

The adversary is a server that lies about drop-outs and delivery as it likes, with floor(corrupt n) clients
of the cohort, fewer than a third, that it picked before the draw. It also picks the cohort, so it must have
no more clients than that in the whole federation. All honest clients mask over one edge list and open shares
for one U1, each signed by a quorum. What can go wrong, over all clients and all attempts of a run:

1. *recovery* fails: an honest server cannot open some client's secret after floor(lost n) clients, picked
   independently of the draw, have gone. More than degree - threshold of a client's draw are among them.
2. *exposure*: the lying server learns the sum of a group S of honest clients that is not all of them, S = {i}
   being the worst. To part S from the rest, by leaving out edges and clients, each member of S must find
   its `threshold` neighbours within S and the corrupt; to open both secrets of i, `threshold` of its
   draw must be corrupt, which is the former with S = {i}.

On the complete graph the threshold is floor(2n/3), and neither can happen. (1) n - lost > 2n/3 clients are
left. (2) Two parted groups would need 2 (threshold + 1) <= n + corrupt < 4n/3. On the sparse graph both
are below 2^-40 for a whole run, and the groups of (2) are those of up to a fifth of the cohort: a union bound
over groups, each member's draw hypergeometric and independent of the others'. A lying server may so get the
sums of a few larger groups instead of one, never that of a few clients; Bell et al. promise the same.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import exp, inf, lgamma, log

from fedcore.errors import SpecError

COMPLETE = 64  # clients up to which the graph is complete
FAILURE = 2.0**-40  # most probability, for a run, that recovery fails; and the same for exposure
GROUP = (
    5  # groups of up to this fraction of a cohort, 1 / GROUP, stay inseparable from the other honest clients
)


@dataclass(frozen=True)
class Graph:
    """How many peers a client draws, and how many of those it takes to open one of its secrets."""

    degree: int
    threshold: int

    @property
    def incoming(self) -> int:
        """Return by how many peers a client may be drawn; more is a lie (chance below 2^-100: Chernoff)."""
        return 2 * self.degree + 64


def quorum(n: int) -> int:
    """Return how many of n signatures it takes: while fewer than n/3 lie, no two statements can get them."""
    return 2 * n // 3 + 1


@lru_cache(maxsize=64)
def graph(n: int, corrupt: float, lost: float, rounds: int) -> Graph:
    """Return the graph for a cohort of n, with the smallest degree that is safe, then the largest threshold.

    corrupt and lost are shares of the cohort; rounds counts all draws of the run: each attempt at each sum.
    Raises SpecError for fewer than 3 clients, and where a third of them or more may lie or be lost.
    """
    colluding, gone = _count(n, corrupt), _count(n, lost)
    if n < 3 or 3 * max(colluding, gone) >= n:
        raise SpecError(
            f"secure aggregation among {n} clients cannot bear {colluding} that lie and {gone} lost; "
            f"expected at least 3 clients, with fewer than a third that lie and fewer than a third lost; "
            f"lower encryption.corrupt = {corrupt:g} or encryption.lost = {lost:g}, or ask more clients"
        )
    limit = log(FAILURE / rounds)
    threshold = 1  # at any degree the largest that recovery allows; it never falls as the degree grows
    for degree in range(2, n - 1) if n > COMPLETE else ():
        while _recovery(n, Graph(degree, threshold + 1), gone) <= limit:
            threshold += 1
        chosen = Graph(degree, threshold)
        sizes = range(n // GROUP, 0, -1)  # each size gets its half of what the smaller ones leave
        if all(_exposure(n, chosen, colluding, size) <= limit - size * log(2) for size in sizes):
            return chosen
    return Graph(n - 1, quorum(n) - 1)


def failure(n: int, graph: Graph, corrupt: float, lost: float) -> tuple[float, float]:
    """Return how many clients one round fails to recover, and how many it exposes, as expected values.

    Each is a bound on the probability that it happens to anybody.
    """
    recovery = _recovery(n, graph, _count(n, lost))
    return exp(recovery), exp(_exposure(n, graph, _count(n, corrupt), 1))


def _count(n: int, share: float) -> int:
    return int(n * share + 1e-9)


def _recovery(n: int, graph: Graph, lost: int) -> float:
    """Return the logarithm of the bound of event 1 in one round."""
    if graph.threshold > graph.degree:
        return inf
    return log(n) + _tail(n - 1, lost, graph.degree, graph.degree - graph.threshold + 1)


def _exposure(n: int, graph: Graph, corrupt: int, size: int) -> float:
    """Return the logarithm of the bound of event 2 in one round, for groups of one size."""
    member = _tail(n - 1, corrupt + size - 1, graph.degree, graph.threshold)
    return _choices(n - corrupt, size) + size * member


def _tail(balls: int, red: int, drawn: int, least: int) -> float:
    """Return log P(at least so many of the drawn are red), or 0 where no less than that is expected.

    Exact (hypergeometric): the first term by log-gamma, the others by their ratios.
    """
    if least > min(red, drawn):
        return -inf
    if least * balls <= red * drawn:
        return 0.0
    total = term = 1.0
    for i in range(least, min(red, drawn)):
        term *= (red - i) * (drawn - i) / ((i + 1) * (balls - red - drawn + i + 1))
        total += term
        if term < 1e-17 * total:
            break
    first = _choices(red, least) + _choices(balls - red, drawn - least) - _choices(balls, drawn)
    return min(0.0, first + log(total))


def _choices(n: int, k: int) -> float:
    """Return the logarithm of n choose k."""
    return lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)
