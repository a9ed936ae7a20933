"""What cannot be private, why, and what to do instead; and who draws the cohorts of what can."""

from collections.abc import Iterator
from dataclasses import replace
from math import ceil, log2, sqrt
from typing import TYPE_CHECKING

from fedcore.errors import SpecError
from fedcore.privacy.claims import honest, sampling_rate, steps
from fedcore.privacy.levels import ClientLevel, DistributedLevel, ExampleLevel, LocalLevel, Off, TreeLevel
from fedcore.spec import SGD, RunSpec
from fedcore.strategies.modes import Synchronous
from fedcore.strategies.privacy.noise import update_noise
from fedcore.strategies.samplers import MinimumSeparation, Poisson, Sampler, Uniform

if TYPE_CHECKING:
    from fedcore.strategies.strategy import Strategy


TAIL = 7.0  # deviations; one coordinate in 10^11 has noise beyond


def private(strategy: "Strategy", spec: RunSpec) -> "Strategy":
    """Return a strategy as one whose rounds are private in the way that a spec says.

    Client level draws its cohorts by Poisson sampling at a fixed rate and tree aggregation by minimum
    separation, because their epsilon holds for these alone. Raises SpecError with the first conflict.
    """
    privacy = spec.privacy
    return replace(strategy, privacy=privacy, sampler=_sampler(strategy.sampler, spec))


def _sampler(sampler: Sampler, spec: RunSpec) -> Sampler:
    """Return the sampler of private rounds in place of a plain uniform one, and any other as it is."""
    if isinstance(spec.privacy, ClientLevel) and sampler in (Uniform(), Poisson()):
        return Poisson(sampling_rate(spec))
    if isinstance(spec.privacy, TreeLevel) and sampler == Uniform():
        return MinimumSeparation(spec.privacy.separation)
    return sampler


def conflicts(strategy: "Strategy") -> Iterator[str]:
    """Yield what keeps a strategy from being private."""
    if isinstance(strategy.privacy, Off):
        return
    yield from _at_any_level(strategy)
    if not isinstance(strategy.privacy, ExampleLevel):
        yield from _with_clipped_updates(strategy)


def _at_any_level(strategy: "Strategy") -> Iterator[str]:
    """Yield what would have single numbers leave the device without noise."""
    sampler, algorithm = strategy.sampler, strategy.algorithm
    if sampler.sees == "scalars":
        yield (
            f"{name_of(sampler)} chooses clients by the losses and sizes that they report, and under "
            'differential privacy they report neither; use sampler = "uniform"'
        )
    if algorithm.trusts:
        yield (
            f"{name_of(algorithm)} has every client report {listed(algorithm.trusts)}, which would leave the "
            'device without noise; use another algorithm, such as "local_sgd" or "fedprox"'
        )
    if strategy.mode != Synchronous():
        yield (
            f"{name_of(strategy.mode)} lets fast clients take part more often, and the privacy of that is "
            'not accounted for; use mode = "synchronous"'
        )


def _with_clipped_updates(strategy: "Strategy") -> Iterator[str]:
    """Yield what does not fit updates that are clipped and noised whole, most of them in the sum alone."""
    level, optimizer = strategy.privacy.level, strategy.optimizer
    if not strategy.sums and not isinstance(strategy.privacy, LocalLevel):
        robust = name_of(strategy.pre[0] if strategy.pre else strategy.aggregator)
        yield (
            f"{robust} looks at single updates, so the clip norm does not bound what one client changes "
            f'(privacy.level = "{level}"); use aggregator = "mean" and no `pre`, or privacy.level = "example"'
        )
    if optimizer.scalars:
        yield (
            f"{name_of(optimizer)} has every client report {listed(optimizer.scalars)}, which no noise "
            f'covers (privacy.level = "{level}"); use another optimizer, such as "sgd" or "adam"'
        )
    expected = {"client": Poisson, "tree": MinimumSeparation}.get(level)
    if expected and not isinstance(strategy.sampler, expected):
        yield (
            f'privacy.level = "{level}" draws its cohorts itself ({expected.__name__}), because its epsilon '
            f"holds for these only; remove strategy.sampler, which is {name_of(strategy.sampler)}"
        )
    separation = getattr(strategy.privacy, "separation", None)
    if isinstance(strategy.sampler, MinimumSeparation) and separation not in (None, strategy.sampler.rounds):
        yield (
            f"strategy.sampler keeps participations {strategy.sampler.rounds} rounds apart, but "
            f"privacy.separation = {separation}; remove strategy.sampler"
        )


def check(strategy: "Strategy", spec: RunSpec) -> None:
    """Raise SpecError, with a remedy, where a private strategy cannot work under a spec."""
    privacy = strategy.privacy
    if isinstance(privacy, Off):
        return
    if not privacy.noise_multiplier:
        raise SpecError(
            "privacy.target_epsilon has not been turned into a noise multiplier, "
            "which `fedcore privacy plan` prints"
        )
    if spec.evaluation.where == "clients" and not privacy.metric_noise:
        raise SpecError(
            'evaluation.where = "clients" has every client send what it measured on its data; set it to '
            '"holdout", or give metrics noise of their own, such as privacy.metric_noise = 5.0'
        )
    if beside := sorted(strategy.algorithm.scalars(spec).keys() - {"weight"}):
        raise SpecError(
            f"{name_of(strategy.algorithm)} has every client report {listed(tuple(beside))}, which would "
            'leave the device without noise; use another algorithm, such as "local_sgd" or "fedprox"'
        )
    if isinstance(privacy, ClientLevel | TreeLevel) and spec.cohort.over_select != 1:
        raise SpecError(
            f'cohort.over_select = {spec.cohort.over_select:g}, but under privacy.level = "{privacy.level}" '
            "nobody may take the place of another; set cohort.over_select = 1.0"
        )
    if isinstance(privacy, ClientLevel):
        _check_client_level(strategy.sampler, privacy, spec)
    if isinstance(privacy, DistributedLevel):
        _check_distributed(spec)
    if isinstance(privacy, ExampleLevel):
        _check_room_for_noise(privacy, spec)


def _check_distributed(spec: RunSpec) -> None:
    """Raise SpecError where a client's part of the noise would be seen alone, or too few made theirs."""
    cohort, encryption, level = spec.cohort, spec.encryption, 'privacy.level = "distributed"'
    if encryption.updates not in ("auto", "secagg"):
        raise SpecError(
            f'encryption.updates = "{encryption.updates}", but under {level} a client makes a part of the '
            "noise only, which is too little for an update that is seen by itself; set encryption.updates = "
            '"secagg", or privacy.level = "local"'
        )
    if encryption.encoding == "exact":
        raise SpecError(
            f'encryption.encoding = "exact", but the noise of {level} is made of integers of 16 or 32 bits; '
            'set encryption.encoding = "q32"'
        )
    if honest(spec) < 1:
        raise SpecError(
            f"a round may close with {cohort.fewest} clients, of which encryption.corrupt = "
            f"{encryption.corrupt:g} of {cohort.asked} asked may not make their noise, so that none is left "
            f"to count on ({level}); raise cohort.minimum, or lower cohort.over_select or encryption.corrupt"
        )
    if spec.attack:
        raise SpecError(
            f"attack forges updates, but under {level} nobody sees one; remove [attack], or set "
            'privacy.level = "local"'
        )


def _check_room_for_noise(privacy: ExampleLevel, spec: RunSpec) -> None:
    """Raise SpecError where noise alone would lead an update beyond its limit, so that it is refused.

    After K steps of SGD at rate lr a coordinate has noise of deviation about lr z C sqrt(K) / B, and momentum
    multiplies that by up to 1 / (1 - momentum). Adam's steps are as long as its rate, whatever the noise.
    """
    optimizer, limit = spec.client.optimizer, spec.limits.update
    if not isinstance(optimizer, SGD):
        return
    step = optimizer.lr * privacy.noise_multiplier * privacy.clip_norm / spec.client.batch_size
    deviation = step * sqrt(steps(spec)) / (1 - optimizer.momentum)
    if TAIL * deviation > limit:
        raise SpecError(
            f"limits.update = {limit:g}, but a round's noise has a standard deviation of about "
            f"{deviation:.3g} on every coordinate, so that updates would be refused; set limits.update = "
            f"{2 ** ceil(log2(TAIL * deviation))}, or raise client.batch_size with privacy.sampling_rate"
        )


def _check_client_level(sampler: Sampler, privacy: ClientLevel, spec: RunSpec) -> None:
    cohort, rate = spec.cohort, sampling_rate(spec)
    if cohort.size > privacy.population:
        raise SpecError(
            f"cohort.size = {cohort.size}, but privacy.population = {privacy.population}; "
            "expected a cohort no larger than the population"
        )
    if sampler != Poisson(rate):
        raise SpecError(
            f'strategy.sampler is {sampler}, but privacy.level = "client" accounts for cohort.size / '
            f"privacy.population = {rate:g}; remove strategy.sampler"
        )
    if cohort.minimum:
        raise SpecError(
            f'cohort.minimum = {cohort.minimum}, but privacy.level = "client" closes a round with whoever '
            "came, since to give one up would tell how many did; remove cohort.minimum"
        )
    if privacy.adaptive:
        update_noise(privacy.noise_multiplier, float(cohort.size))


def name_of(part: object) -> str:
    """Return what a message calls a part."""
    return type(part).__name__


def listed(names: tuple[str, ...]) -> str:
    """Return names as a message lists them."""
    return " and ".join(f"`{name}`" for name in names)
