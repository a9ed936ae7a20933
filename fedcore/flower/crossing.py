"""What of a strategy and a spec cannot cross to Flower, why, and what to do instead."""

from collections.abc import Iterator
from math import isfinite

from fedcore.privacy.levels import ClientLevel, Off, TreeLevel
from fedcore.spec import RunSpec
from fedcore.strategies.algorithms import FedProx, LocalSGD
from fedcore.strategies.modes import Synchronous
from fedcore.strategies.privacy.conflicts import name_of
from fedcore.strategies.samplers import Oort
from fedcore.strategies.strategy import Strategy

HERE = "or run the task with fedcore"


def obstacles(strategy: Strategy, spec: RunSpec) -> Iterator[str]:
    """Yield why a strategy under a spec cannot run in a Flower project, with a remedy."""
    algorithm, aggregator, sampler = strategy.algorithm, strategy.aggregator, strategy.sampler
    if type(algorithm) not in (LocalSGD, FedProx):
        yield (
            f"{name_of(algorithm)} changes how clients train and what they keep or send, and in Flower the "
            f"ClientApp alone decides that; use LocalSGD() or FedProx(mu), {HERE}"
        )
    if strategy.mode != Synchronous():
        yield (
            f"{name_of(strategy.mode)} moves the model as updates arrive, and Flower's rounds wait for all "
            f"replies; use Synchronous(), {HERE}"
        )
    if aggregator.anchor == "root":
        yield (
            f"{name_of(aggregator)} compares updates with one that the server trains on data of its own, and "
            f"a ServerApp has no trainer; use another aggregator, such as Median(), {HERE}"
        )
    if isinstance(sampler, Oort) and isfinite(sampler.duration):
        yield (
            f"Oort(duration={sampler.duration:g}) prefers fast clients, and Flower does not tell how long "
            "one took; use Oort() without a duration"
        )
    yield from _of_spec(spec)


def _of_spec(spec: RunSpec) -> Iterator[str]:
    """Yield what a spec asks that nobody would do here."""
    privacy = spec.privacy
    if not isinstance(privacy, Off | ClientLevel | TreeLevel):
        yield (
            f'privacy.level = "{privacy.level}" has devices make the noise, and a ClientApp does not; use '
            f'"client" or "tree", where it is made with the sum, {HERE}'
        )
    elif not isinstance(privacy, Off) and privacy.metric_noise:
        yield (
            f"privacy.metric_noise = {privacy.metric_noise:g} is for metrics of known names and bounds, and "
            'an app states neither; set it to 0 and evaluation.where = "holdout", and measure in evaluate_fn'
        )
    if spec.encryption.updates in ("secagg", "sealed"):
        yield (
            f'encryption.updates = "{spec.encryption.updates}", but the ServerApp reads every reply; leave '
            f"it out, {HERE}"
        )
    if spec.evaluation.patience:
        yield "evaluation.patience: Flower's `start` runs all its rounds; set it to 0"
    if spec.attack:
        yield "attack forges the updates of simulated clients, and a ClientApp makes its own; remove it"
