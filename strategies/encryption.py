"""How updates travel and are encoded: what fits a strategy, and what a spec means that leaves it open.

secagg   the coordinator learns the sum and nothing else: for strategies that look at nothing else
sealed   it sees single updates, but nobody between, and they lie nowhere in the open
tls      as the connection protects them
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fedcore.errors import SpecError
from fedcore.privacy.levels import ClientLevel, DistributedLevel, TreeLevel
from fedcore.strategies.modes import Synchronous
from fedcore.strategies.preaggregators import Clip
from fedcore.strategies.privacy.conflicts import name_of
from fedcore.strategies.samplers import Poisson

if TYPE_CHECKING:
    from fedcore.spec import RunSpec
    from fedcore.strategies.strategy import Strategy

FEWEST = 3  # clients in a masked sum; with two, each learns the other's update
MOST = 3000  # clients that can hear of each other; with FEWEST the limits of `fedcore.crypto.secagg.config`
SENSIBLE = 5  # fewer are not masked unless that is asked for: the sum of three says much of each


def resolved(strategy: "Strategy", spec: "RunSpec") -> "RunSpec":
    """Return a spec that says how updates travel and are encoded, for a private strategy as it runs.

    "auto" is secagg where nothing keeps the strategy from it and at least 5 clients are in every sum, else
    sealed; and q32 where that sums vectors whose norm is bounded, else exact. Raises what `check` raises.
    """
    given = spec.encryption
    needed = isinstance(strategy.privacy, DistributedLevel)
    hindered = any(hindrances(strategy, spec, FEWEST if needed else SENSIBLE))
    updates, encoding = given.updates, given.encoding
    if updates == "auto":
        updates = "sealed" if hindered and not needed else "secagg"
    if encoding == "auto":
        encoding = "q32" if updates == "secagg" and bounded(strategy, spec) else "exact"
    explicit = given.model_copy(update={"updates": updates, "encoding": encoding})
    made = spec.model_copy(update={"encryption": explicit})
    check(strategy, made)
    return made


def bounded(strategy: "Strategy", spec: "RunSpec") -> bool:
    """Tell whether the L2 norm of what enters a sum has a bound, so that its rotation fits narrow words."""
    return spec.limits.norm > 0 or _clips(strategy)


def _clips(strategy: "Strategy") -> bool:
    return isinstance(strategy.privacy, ClientLevel | TreeLevel | DistributedLevel)


def check(strategy: "Strategy", spec: "RunSpec") -> None:
    """Raise SpecError, with the conflict and a remedy, where a strategy cannot travel as a spec asks."""
    encryption = spec.encryption
    if encryption.updates == "secagg":
        needed = isinstance(strategy.privacy, DistributedLevel)
        otherwise = 'privacy.level = "local"' if needed else 'encryption.updates = "sealed"'
        for why, remedy in hindrances(strategy, spec, FEWEST):
            raise SpecError(f'encryption.updates = "secagg": {why}; {remedy}, or set {otherwise}')
    if spec.limits.norm and _clips(strategy):
        raise SpecError(
            f'limits.norm = {spec.limits.norm:g}, but privacy.level = "{strategy.privacy.level}" clips to '
            "privacy.clip_norm already; remove limits.norm"
        )
    if spec.limits.norm and not strategy.sums:
        raise SpecError(
            f"limits.norm = {spec.limits.norm:g} bounds what enters a sum, but {_looks(strategy)} looks at "
            'single updates as they are; remove it, or clip with strategy.pre = [{name = "clip", ...}]'
        )
    if spec.limits.norm and (reported := strategy.optimizer.scalars):
        raise SpecError(
            f"limits.norm = {spec.limits.norm:g} scales updates down on their way into a sum, but "
            f"{name_of(strategy.optimizer)} takes a step by their {' and '.join(reported)} as clients "
            'report it, before; remove limits.norm, or use optimizer = "sgd"'
        )
    if encryption.encoding in ("q32", "q16") and not bounded(strategy, spec):
        raise SpecError(
            f'encryption.encoding = "{encryption.encoding}" fits vectors of a bounded norm into few bits; '
            'set limits.norm to the norm to which updates may be scaled down, or encoding = "exact"'
        )


def described(strategy: "Strategy", spec: "RunSpec") -> str:
    """Return how the updates of a spec that is resolved travel, who can read them, and why."""
    encryption = spec.encryption
    if encryption.updates == "secagg":
        sums = f"the coordinator learns the sum of at least {spec.cohort.fewest}, and no single update"
        return f"secagg, encoding {encryption.encoding}: {sums}, so that a client that lies can steer it"
    if encryption.updates == "tls":
        return "tls: the coordinator reads every update, on its disk too while a round is open"
    why, _ = next(hindrances(strategy, spec, SENSIBLE), ("", ""))
    because = f"; not secagg, because {why}" if why else ""
    return f"sealed: the coordinator alone reads every update{because}"


def hindrances(strategy: "Strategy", spec: "RunSpec", fewest: int) -> Iterator[tuple[str, str]]:
    """Yield what keeps a strategy from masked sums over at least so many clients, and a remedy for each."""
    if not strategy.sums:
        norms = [part.norm for part in strategy.pre if isinstance(part, Clip)]
        only = strategy.aggregator.needs == "sum" and len(norms) == len(strategy.pre)
        remedy = f"limits.norm = {min(norms):g} in its place" if only else 'aggregator = "mean" without `pre`'
        yield f"{_looks(strategy)} looks at single updates, and nobody sees one", f"use {remedy}"
    elif strategy.sees:
        why = f"{name_of(strategy.sampler)} chooses clients by what they report, and nobody sees that"
        yield why, 'use sampler = "uniform"'
    if not isinstance(strategy.mode, Synchronous):
        why = "takes updates as they arrive, and clients mask with those of their cohort"
        yield f"{name_of(strategy.mode)} {why}", 'use mode = "synchronous"'
    if isinstance(strategy.sampler, Poisson) and strategy.sampler.rate < 1:
        yield (
            f"cohorts are drawn with probability {strategy.sampler.rate:g}, in secret, but clients that mask "
            "together see who takes part, so that amplification by sampling is void",
            "set cohort.size = privacy.population" if _clips(strategy) else 'use sampler = "uniform"',
        )
    if spec.cohort.fewest < fewest:
        yield (
            f"a round may close with {spec.cohort.fewest} clients, expected at least {fewest}, since the sum "
            "of fewer says too much of each",
            "raise cohort.minimum or cohort.size",
        )
    if spec.cohort.asked > MOST:
        yield (
            f"a round asks {spec.cohort.asked} clients, expected at most {MOST}, since each hears of all",
            "lower cohort.size or cohort.over_select",
        )


def _looks(strategy: "Strategy") -> str:
    return name_of(strategy.pre[0] if strategy.pre else strategy.aggregator)
