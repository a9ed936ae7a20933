"""How long to wait before something is tried again."""


def doubling(attempt: int, shortest: float, longest: float) -> float:
    """Return the seconds before an attempt, from 0: they double, from the shortest to the longest."""
    return min(longest, shortest * 2.0 ** min(attempt, 64))  # beyond which a float ends
