"""What a run promises, from its spec alone: to whom, about what unit, and with which history of events."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import floor, inf, isfinite
from typing import TYPE_CHECKING, Any

from fedcore.crypto.secagg.parameters import COMPLETE
from fedcore.privacy.accounting import accountant_for, curve, epsilon, smallest_noise
from fedcore.privacy.discrete import DiscreteGaussian, Skellam
from fedcore.privacy.events import (
    Accountant,
    Adjacency,
    Adversary,
    Event,
    Gaussian,
    Guarantee,
    Laplace,
    Trust,
    Unit,
)
from fedcore.privacy.levels import (
    ClientLevel,
    DistributedLevel,
    ExampleLevel,
    LocalLevel,
    Off,
    Private,
    TreeLevel,
)
from fedcore.privacy.tree import sensitivity

if TYPE_CHECKING:
    from fedcore.spec import RunSpec

BOTH: tuple[Adversary, ...] = ("receiver", "coordinator")
SPLIT = (
    " Above 64 clients the coordinator may look at all that it gets, but does not lie: its lies could split "
    "a sum in a few, each with a part of the noise."
)


def steps(spec: "RunSpec") -> int:
    """Return the steps of DP-SGD that a client takes in a round, the same whatever its number of examples.

    [client] steps, or as many as [client] epochs passes take on average at the sampling rate.
    """
    assert isinstance(spec.privacy, ExampleLevel)
    return spec.client.steps or max(1, round(spec.client.epochs / spec.privacy.sampling_rate))


def sampling_rate(spec: "RunSpec") -> float:
    """Return the probability of a client to be in a cohort where that is drawn by Poisson sampling."""
    assert isinstance(spec.privacy, ClientLevel)
    return min(1.0, spec.cohort.size / spec.privacy.population)


def honest(spec: "RunSpec") -> int:
    """Return how many clients make noise as told in the smallest sum: all but the corrupt of a whole cohort.

    Who is corrupt may stay where others drop out, so they count whole.
    """
    return spec.cohort.fewest - floor(spec.encryption.corrupt * spec.cohort.asked)


def evaluations(spec: "RunSpec", rounds: int) -> int:
    """Return how often clients have been asked for metrics after so many rounds, the last one's included."""
    if isinstance(spec.privacy, Off) or not spec.privacy.metric_noise or spec.evaluation.where != "clients":
        return 0
    every = spec.evaluation.every
    regular = rounds // every if every else 0
    return regular + (rounds == spec.run.rounds and not (every and rounds % every == 0))


def training(spec: "RunSpec", rounds: int) -> tuple[Event, ...]:
    """Return what training for so many rounds does to the data of a client that is in all it can be in."""
    privacy = spec.privacy
    match privacy:
        case ExampleLevel():
            return (Gaussian(privacy.noise_multiplier, privacy.sampling_rate, rounds * steps(spec)),)
        case ClientLevel():
            return (Gaussian(privacy.noise_multiplier, sampling_rate(spec), rounds),)
        case TreeLevel():
            worst = sensitivity(rounds, privacy.separation)
            return (Gaussian(privacy.noise_multiplier / worst),) if rounds else ()
        case LocalLevel():
            kind = Gaussian if privacy.noise == "gaussian" else Laplace
            return (kind(privacy.noise_multiplier, steps=rounds),)
        case DistributedLevel():
            integers = Skellam if privacy.noise == "skellam" else DiscreteGaussian
            return (integers(privacy.noise_multiplier, rounds),)
        case Off():
            return ()


def history(spec: "RunSpec", rounds: int) -> tuple[Event, ...]:
    """Return all that so many rounds do to the data of one unit, metrics included.

    It is what the model's receiver learns; the coordinator learns no more where the device makes the noise.
    """
    asked, privacy = evaluations(spec, rounds), spec.privacy
    if isinstance(privacy, Off) or not asked:
        return training(spec, rounds)
    rate = sampling_rate(spec) if isinstance(privacy, ClientLevel) else 1.0
    return (*training(spec, rounds), Gaussian(privacy.metric_noise, rate, asked))


def unit_of(privacy: Private) -> Unit:
    """Return what a level protects."""
    return "example" if isinstance(privacy, ExampleLevel) else "client"


def trust_of(privacy: Private) -> Trust:
    """Return who makes the noise of a level."""
    if isinstance(privacy, DistributedLevel):
        return "distributed"
    return "enforced" if isinstance(privacy, ExampleLevel | LocalLevel) else "trusted"


def adjacency_of(spec: "RunSpec") -> Adjacency:
    """Return what the neighbouring data set lacks: without independent draws, one client's place stays.

    So it does where secure aggregation has the members of a cohort see each other.
    """
    match spec.privacy:
        case TreeLevel() | LocalLevel() | DistributedLevel():
            return "zero-out"
        case ClientLevel() if spec.encryption.updates == "secagg":
            return "zero-out"
        case _:
            return "add/remove"


def guarantees(spec: "RunSpec", rounds: int, accountant: Accountant | None = None) -> Iterator[Guarantee]:
    """Yield what holds after so many rounds, against the model's receiver and against the coordinator.

    Noise that the coordinator adds protects nobody against the coordinator: there, epsilon is infinite.
    accountant: None takes the tightest there is.
    """
    privacy = spec.privacy
    if isinstance(privacy, Off):
        return
    done = history(spec, rounds)
    accountant = accountant or accountant_for(done)
    spent, trust = epsilon(done, privacy.delta, accountant), trust_of(privacy)
    for adversary in BOTH:
        known = inf if adversary == "coordinator" and trust == "trusted" else spent
        yield Guarantee(
            known, privacy.delta, unit_of(privacy), adversary, trust, accountant, adjacency_of(spec)
        )


def spent(spec: "RunSpec") -> list[float]:
    """Return the receiver's epsilon after each round of a run, [] where it promises nothing; see `curve`."""
    if isinstance(spec.privacy, Off):
        return []
    return curve(lambda rounds: history(spec, rounds), spec.run.rounds, spec.privacy.delta)


def assumption(spec: "RunSpec") -> str:
    """Return what has to hold for the guarantees of a level to hold, as a sentence; "" without any."""
    match spec.privacy:
        case ExampleLevel():
            return "The device draws each batch and makes the noise; nobody else has to be trusted."
        case ClientLevel() if adjacency_of(spec) == "zero-out":
            return (
                "The coordinator adds the noise to the sum, which is all that it sees, and it is trusted; "
                "everybody is asked in every round, and who took part is no secret."
            )
        case ClientLevel():
            return (
                "The coordinator makes the noise, and it is trusted; it draws each client independently, "
                "and no receiver learns who took part in which round."
            )
        case TreeLevel(separation=separation):
            return (
                "The coordinator makes the noise, and it is trusted; it asks no client again before "
                f"{separation} rounds have passed. Who took part may be published."
            )
        case LocalLevel():
            return (
                "The device makes the noise; nobody else has to be trusted, and who took part is no secret."
            )
        case DistributedLevel():
            return (
                f"At least {honest(spec)} clients of every sum make their part of the noise as told and keep "
                "it to themselves, and secure aggregation keeps all but the sum from sight; who took part is "
                f"no secret.{'' if spec.cohort.asked <= COMPLETE else SPLIT}"
            )
        case Off():
            return ""


def promise(spec: "RunSpec", rounds: int) -> dict[str, Any]:
    """Return what holds after so many rounds as JSON shows it; an epsilon of null is infinite."""
    privacy = spec.privacy
    if isinstance(privacy, Off):
        return {"level": privacy.level, "guarantees": []}
    holding = [asdict(guarantee) for guarantee in guarantees(spec, rounds)]
    return {
        "level": privacy.level,
        "unit": unit_of(privacy),
        "trust": trust_of(privacy),
        "assumes": assumption(spec),
        "clip_norm": privacy.clip_norm,
        "noise_multiplier": privacy.noise_multiplier,
        "releases": [{"event": type(each).__name__, **asdict(each)} for each in history(spec, rounds)],
        "guarantees": [g | {"epsilon": g["epsilon"] if isfinite(g["epsilon"]) else None} for g in holding],
    }


def resolved(spec: "RunSpec") -> "RunSpec":
    """Return the spec with the smallest noise multiplier that keeps the whole run within target_epsilon.

    Raises SpecError where no noise does, such as where metrics alone spend more.
    """
    privacy = spec.privacy
    if isinstance(privacy, Off) or privacy.noise_multiplier:
        return spec

    def with_noise(noise: float) -> "RunSpec":
        levelled = privacy.model_copy(update={"noise_multiplier": noise, "target_epsilon": 0.0})
        return spec.model_copy(update={"privacy": levelled})

    rounds = spec.run.rounds
    noise = smallest_noise(lambda z: history(with_noise(z), rounds), privacy.target_epsilon, privacy.delta)
    return with_noise(noise)


@dataclass(frozen=True)
class Schedule:
    """What a device reserves for a run, by the run's public spec alone.

    whole: the history of all its rounds. train, evaluate: of a single piece of work. at_once: whether the
    device reserves the whole when it accepts the run, rather than before each piece of work.
    """

    unit: Unit
    trust: Trust
    whole: tuple[Event, ...]
    train: tuple[Event, ...]
    evaluate: tuple[Event, ...]
    at_once: bool


def schedule(spec: "RunSpec") -> Schedule | None:
    """Return what a run costs a device, None where it promises nothing.

    Where the coordinator makes the noise, a device that is asked in some rounds only must still reserve all
    of them: the amplification by sampling is of the whole run, and charging it for participations alone
    would count it twice.
    """
    privacy = spec.privacy
    if isinstance(privacy, Off):
        return None
    at_once = trust_of(privacy) == "trusted"
    train = () if at_once else training(spec, 1)
    asked = () if at_once or not privacy.metric_noise else (Gaussian(privacy.metric_noise),)
    return Schedule(
        unit_of(privacy), trust_of(privacy), history(spec, spec.run.rounds), train, asked, at_once
    )
