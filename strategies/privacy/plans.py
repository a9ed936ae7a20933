"""What a private round asks: nothing but what a mechanism makes of the data, within bounds that it states."""

from dataclasses import replace
from math import sqrt
from typing import TYPE_CHECKING

from fedcore.errors import SpecError
from fedcore.layout import Layout
from fedcore.messages import Plan, ScalarSpec
from fedcore.privacy.claims import honest
from fedcore.privacy.distributed import parameters_for
from fedcore.privacy.levels import (
    ClientLevel,
    DistributedLevel,
    ExampleLevel,
    LocalLevel,
    Off,
    Private,
    TreeLevel,
)
from fedcore.seeds import digest

if TYPE_CHECKING:
    from fedcore.spec import RunSpec
    from fedcore.strategies.strategy import Strategy

TAILS = {"gaussian": 12.0, "laplace": 40.0}  # noise goes beyond so many scales with probability below 1e-17


def private_training(strategy: "Strategy", spec: "RunSpec", layout: Layout, plan: Plan, clip: float) -> Plan:
    """Return a training plan as a private one; of the scalars only those stay that noise has already covered.

    Every client counts once. Client level: every vector is bounded by `clip`, all of them jointly, the sum
    is divided by the expected size of the cohort, and the round closes at its deadline, however few are in.
    Distributed noise: what is sent is words, and fewer clients than the noise was made for close no round.
    """
    privacy = strategy.privacy
    if isinstance(privacy, Off):
        return plan
    _check_buffers(layout)
    vectors = {name: replace(vector, factor=None) for name, vector in plan.vectors.items()}
    scalars = {name: plan.scalars[name] for name in strategy.optimizer.scalars}
    plan = replace(plan, vectors=vectors, scalars=scalars, metrics=())
    match privacy:
        case ExampleLevel():
            return plan
        case LocalLevel():
            return _bounded(plan, clip * (1 + TAILS[privacy.noise] * privacy.noise_multiplier))
        case DistributedLevel():
            return _in_words(plan, privacy, spec)
        case TreeLevel():
            return replace(_bounded(plan, clip, clip), clip=clip, expected=float(spec.cohort.size))
        case ClientLevel():
            fits = {"fits": ScalarSpec(-0.5, 0.5)} if privacy.adaptive else {}
            expected, population = float(spec.cohort.size), privacy.population
            plan = replace(plan, clip=clip, expected=expected, population=population, scalars=fits)
            return replace(_bounded(plan, clip, clip), minimum=0, timed=True)


def _in_words(plan: Plan, privacy: DistributedLevel, spec: "RunSpec") -> Plan:
    """Return a plan whose vectors are, one after the other, a share of a sum with noise."""
    parameters = parameters_for(
        privacy.noise,
        privacy.clip_norm,
        privacy.noise_multiplier,
        dimension=sum(vector.length for vector in plan.vectors.values()),
        clients=spec.cohort.asked,
        honest=honest(spec),
        bits=16 if spec.encryption.encoding == "q16" else 32,
        seed=digest(spec.run.seed, "rotation", plan.ref.round),
    )
    words = {
        name: replace(vector, dtype=parameters.dtype, bound=2.0**parameters.bits, norm=privacy.clip_norm)
        for name, vector in sorted(plan.vectors.items())
    }
    return replace(
        plan,
        vectors=words,
        distributed=parameters,
        bits=parameters.bits,
        minimum=spec.cohort.fewest,
    )


def _bounded(plan: Plan, bound: float, norm: float | None = None) -> Plan:
    """Return a plan with the bound of each coordinate, and the norm of each vector where it has one."""
    return replace(
        plan,
        vectors={
            name: replace(v, bound=bound, norm=v.norm if norm is None else norm)
            for name, v in plan.vectors.items()
        },
    )


def _check_buffers(layout: Layout) -> None:
    """Raise SpecError where a model has running statistics, which no noise would cover."""
    for entry in layout.entries:
        if entry.kind == "buffer":
            raise SpecError(
                f"the model's buffer {entry.name!r} is a statistic of the data, which no noise covers; "
                "replace BatchNorm by GroupNorm, or keep the buffer out of `Task.shared`"
            )


def private_evaluation(spec: "RunSpec", plan: Plan) -> Plan:
    """Return an evaluation's plan as a private one: noised sums of the task's metrics and of the count.

    The loss of an example has no bound, so it is not asked for. Central test data are not the clients'.
    """
    privacy = spec.privacy
    if isinstance(privacy, Off) or spec.evaluation.where == "holdout":
        return plan
    names = [name for name in plan.metrics if name not in ("loss", "count")]
    examples = spec.limits.weight if isinstance(privacy, ExampleLevel) else 1.0
    slack = 0.0 if noisy_in_sum(privacy) else TAILS["gaussian"] * deviation(privacy, len(names))
    ranges = {name: ScalarSpec(-slack, examples + slack) for name in [*names, "count"]}
    plan = replace(plan, scalars=ranges, metrics=tuple(ranges))
    if isinstance(privacy, ClientLevel):
        return replace(
            plan,
            expected=float(spec.cohort.size),
            population=privacy.population,
            minimum=0,
            timed=True,
        )
    return plan


def noisy_in_sum(privacy: Private) -> bool:
    """Tell whether the coordinator makes the noise, rather than each device."""
    return isinstance(privacy, ClientLevel | TreeLevel)


def deviation(privacy: Private, metrics: int) -> float:
    """Return the standard deviation of the noise on each of `metrics` sums of values in 0..1 and the count.

    One unit adds at most 1 to each, hence an L2 norm of sqrt(metrics + 1).
    """
    return privacy.metric_noise * sqrt(metrics + 1)
