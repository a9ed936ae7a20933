"""What a run promises, from its spec alone: to whom, about what unit, and with which history of events."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import inf, isfinite
from typing import TYPE_CHECKING, Any

from fedcore.privacy.accounting import curve, epsilon, smallest_noise
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
from fedcore.privacy.levels import ClientLevel, ExampleLevel, LocalLevel, Off, Private, TreeLevel
from fedcore.privacy.tree import sensitivity

if TYPE_CHECKING:
    from fedcore.spec import RunSpec

BOTH: tuple[Adversary, ...] = ("receiver", "coordinator")


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
    return "enforced" if isinstance(privacy, ExampleLevel | LocalLevel) else "trusted"


def adjacency_of(privacy: Private) -> Adjacency:
    """Return what the neighbouring data set lacks: without independent draws, one client's place stays."""
    return "zero-out" if isinstance(privacy, TreeLevel | LocalLevel) else "add/remove"


def guarantees(spec: "RunSpec", rounds: int, accountant: Accountant = "pld") -> Iterator[Guarantee]:
    """Yield what holds after so many rounds, against the model's receiver and against the coordinator.

    Noise that the coordinator adds protects nobody against the coordinator: there, epsilon is infinite.
    """
    privacy = spec.privacy
    if isinstance(privacy, Off):
        return
    spent = epsilon(history(spec, rounds), privacy.delta, accountant)
    trust = trust_of(privacy)
    for adversary in BOTH:
        known = inf if adversary == "coordinator" and trust == "trusted" else spent
        yield Guarantee(
            known, privacy.delta, unit_of(privacy), adversary, trust, accountant, adjacency_of(privacy)
        )


def spent(spec: "RunSpec") -> list[float]:
    """Return the receiver's epsilon after each round of a run, [] where it promises nothing; see `curve`."""
    if isinstance(spec.privacy, Off):
        return []
    return curve(lambda rounds: history(spec, rounds), spec.run.rounds, spec.privacy.delta)


def assumption(privacy: Private) -> str:
    """Return what has to hold for the guarantees of a level to hold, as a sentence."""
    match privacy:
        case ExampleLevel():
            return "The device draws each batch and makes the noise; nobody else has to be trusted."
        case ClientLevel():
            return (
                "The coordinator makes the noise, and it is trusted; it draws each client independently, "
                "and no receiver learns who took part in which round."
            )
        case TreeLevel():
            return (
                "The coordinator makes the noise, and it is trusted; it asks no client again before "
                f"{privacy.separation} rounds have passed. Who took part may be published."
            )
        case LocalLevel():
            return (
                "The device makes the noise; nobody else has to be trusted, and who took part is no secret."
            )


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
        "assumes": assumption(privacy),
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
