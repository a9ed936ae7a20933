"""Which parts cannot work together, why, and what to do instead."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fedcore.errors import SpecError
from fedcore.strategies import privacy
from fedcore.strategies.matrix import check_rows
from fedcore.strategies.modes import Asynchronous, Synchronous
from fedcore.strategies.privacy.conflicts import listed, name_of
from fedcore.strategies.samplers import Poisson

if TYPE_CHECKING:
    from fedcore.spec import RunSpec
    from fedcore.strategies.strategy import Strategy


def conflicts(strategy: "Strategy") -> Iterator[str]:
    """Yield what keeps the parts of a strategy from working together."""
    algorithm, optimizer, aggregator = strategy.algorithm, strategy.optimizer, strategy.aggregator
    for part, scalars in ((algorithm, algorithm.trusts), (optimizer, optimizer.scalars)):
        if scalars and not strategy.sums:
            robust = name_of(strategy.pre[0] if strategy.pre else aggregator)
            yield (
                f"{name_of(part)} scales the step by {listed(scalars)}, which a client says of itself and "
                f'{robust} cannot check; use another one, or aggregator = "mean" without `pre`'
            )
    if optimizer.scalars and (moved := (*algorithm.trusts, *algorithm.remembers)):
        yield (
            f"{name_of(optimizer)} computes its step for a plain mean of updates, but {name_of(algorithm)} "
            f'moves the model by {listed(moved)} too; use optimizer = "sgd" with it'
        )
    if aggregator.anchor and algorithm.receives:
        yield (
            f"{name_of(aggregator)} compares updates with one reference, but {name_of(algorithm)} also sends "
            f'{listed(algorithm.receives)}, which has none; use another one, such as aggregator = "median"'
        )
    yield from privacy.conflicts(strategy)
    if not isinstance(strategy.mode, Synchronous):
        yield from _with_late_updates(strategy)


def _with_late_updates(strategy: "Strategy") -> Iterator[str]:
    """Yield what cannot work where updates of one step started from different models."""
    algorithm, aggregator, sampler = strategy.algorithm, strategy.aggregator, strategy.sampler
    late, remedy = f"{name_of(strategy.mode)} takes updates as they arrive", 'mode = "synchronous"'
    if together := (*algorithm.receives, *algorithm.remembers):
        yield (
            f"{name_of(algorithm)} moves {listed(together)} together with the model, for clients that all "
            f"start from the same one, but {late}; use another algorithm, or {remedy}"
        )
    for part, scalars in ((algorithm, algorithm.trusts), (strategy.optimizer, strategy.optimizer.scalars)):
        if scalars:
            yield (
                f"{name_of(part)} scales the step by {listed(scalars)}, true of updates as they were "
                f"sent, but {late} and discounts the late ones; use another one, or {remedy}"
            )
    if sampler.sees != "none" or isinstance(sampler, Poisson):
        yield (
            f"{name_of(sampler)} draws the cohort of a round as a whole, but {late} and fills single places; "
            f'use sampler = "uniform", or {remedy}'
        )
    if aggregator.anchor == "root":
        yield (
            f"{name_of(aggregator)} compares updates with the server's own, made from the present model, but "
            f"{late}, some from older ones; use another aggregator, or {remedy}"
        )
    if isinstance(strategy.mode, Asynchronous):
        comparing = [name_of(part) for part in strategy.pre if not part.scales]
        comparing += [name_of(aggregator)] if aggregator.needs != "sum" else []
        for rule in comparing:
            yield (
                f"{rule} compares updates with each other, but {late}, one a step; use "
                'mode = {name = "buffered", k = 10}, or aggregator = "mean" without `pre`'
            )


def check(strategy: "Strategy", spec: "RunSpec") -> None:
    """Raise SpecError, with a remedy, where a strategy cannot work under a spec."""
    strategy.algorithm.check(spec)
    privacy.check(strategy, spec)
    for name in set(strategy.optimizer.scalars) - {"square"}:
        raise SpecError(
            f"{name_of(strategy.optimizer)} asks clients for `{name}`, and they know only `square`"
        )
    if strategy.sums:
        return
    if isinstance(strategy.mode, Synchronous):
        count, remedy = spec.cohort.fewest, "raise cohort.minimum or cohort.size"
    else:
        count, remedy = strategy.mode.k, "raise strategy.mode.k"
    try:
        check_rows(strategy.pre, strategy.aggregator, count)
    except SpecError as error:
        raise SpecError(f"{error}; a round may close with {count} updates: {remedy}") from error
