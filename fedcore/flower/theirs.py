"""Flower's strategies of sum type in our runs, where secure aggregation and DP then hold."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords

from fedcore.errors import SpecError
from fedcore.privacy.levels import ClientLevel
from fedcore.strategies.algorithms import FedProx, QFedAvg
from fedcore.strategies.optimizers import SGD, Adagrad, Adam, Yogi
from fedcore.strategies.samplers import Poisson
from fedcore.strategies.strategy import Strategy

FIXED = (
    flower.DifferentialPrivacyServerSideFixedClipping,
    flower.DifferentialPrivacyClientSideFixedClipping,
)
ADAPTIVE = (
    flower.DifferentialPrivacyServerSideAdaptiveClipping,
    flower.DifferentialPrivacyClientSideAdaptiveClipping,
)

SUMS: Mapping[type[flower.Strategy], Callable[[Any], Strategy]] = {
    flower.FedAvg: lambda it: Strategy(),
    flower.FedAvgM: lambda it: Strategy(optimizer=SGD(it.server_learning_rate, it.server_momentum)),
    flower.FedAdagrad: lambda it: Strategy(optimizer=Adagrad(it.eta, it.beta_1, it.tau, v0=0.0)),
    flower.FedAdam: lambda it: Strategy(
        optimizer=Adam(it.eta, it.beta_1, it.beta_2, it.tau, v0=0.0, bias_correction=True)
    ),
    flower.FedYogi: lambda it: Strategy(optimizer=Yogi(it.eta, it.beta_1, it.beta_2, it.tau, v0=0.0)),
    flower.FedProx: lambda it: Strategy(algorithm=FedProx(it.proximal_mu)),
    flower.QFedAvg: lambda it: Strategy(algorithm=QFedAvg(it.q)),
}
# What looks at single updates, with ours that does.
ROBUST: Mapping[type[flower.Strategy], Callable[[Any], str]] = {
    flower.FedMedian: lambda it: "Median()",
    flower.FedTrimmedAvg: lambda it: f"TrimmedMean(f), with f = {it.beta:g} times the cohort",
    flower.MultiKrum: lambda it: f"MultiKrum(f={it.num_malicious_nodes}, m={it.num_nodes_to_select})",
    flower.Krum: lambda it: f"Krum(f={it.num_malicious_nodes})",
    flower.Bulyan: lambda it: f"Bulyan(f={it.num_malicious_nodes})",
}


def from_flower(strategy: flower.Strategy, *, population: int = 0) -> Strategy:
    """Return a Flower strategy that needs sums alone as ours, for `fedcore.simulate(..., strategy=...)`.

        strategy = from_flower(FedAdam(eta=0.01))
        spec.model_copy(update={"strategy": fedcore.strategies.to_table(strategy)})  # or in a run spec

    The server's half is the same to the rounding: Flower computes in the arrays' float32, and ours in float64
    or exact integers. Its moments start at zero and FedAdam's are corrected for their bias as Flower does it,
    unlike our own defaults, which are the paper's. Three things are a spec's: [cohort] size takes the place
    of fraction_train and the least nodes, [client] optimizer's lr that of eta_l and client_learning_rate, and
    the device trains by our half of FedProx and q-FedAvg, whose F_i is the loss of the model received.
    Running statistics are averaged, whatever the optimiser; Flower's takes them for parameters.

    A wrapper with fixed clipping around an average becomes the level "client" for a `population` of clients,
    Flower's accountant's if it has one; [cohort] size takes the place of num_sampled_clients. Clip norm and
    noise per client sampled are the same: with equal weights and everybody sampled, both add the same noise
    to the same mean. Three things differ. Every client counts once, where without Flower's accountant a
    weight may lift one above the clip norm. Deployed, the noise comes from the operating system's randomness
    instead of NumPy's global generator. Cohorts are drawn by Poisson sampling, whose amplification is in our
    epsilon, against whoever does not see who was drawn; Flower's accountant counts none.

    Raises SpecError for all that looks at single updates, naming ours that does, and for what is not known.
    """
    kind = type(strategy)
    if kind in FIXED:
        return _clipped(strategy, population)
    if kind in SUMS:
        return _summed(strategy)
    if kind in ROBUST:
        raise SpecError(
            f"from_flower: {kind.__name__} looks at every client's update, which no sum holds; write our "
            f"own, Strategy(aggregator={ROBUST[kind](strategy)}), whose updates travel sealed"
        )
    if kind in ADAPTIVE:
        raise SpecError(
            f"from_flower: {kind.__name__} lowers the clip norm the more updates it clips, and so runs away "
            "from the quantile; write Strategy(sampler=Poisson(), privacy=ClientLevel(level='client', "
            "adaptive=True, ...)), which follows Andrew et al. 2021"
        )
    known = ", ".join(each.__name__ for each in SUMS)
    raise SpecError(
        f"from_flower: what {kind.__name__} makes of replies is not known to be a sum of updates; expected "
        f"one of {known}, no subclass, or a wrapper with fixed clipping around an average; else write a "
        "fedcore.strategies.Strategy, or run the app itself: fedcore flower run"
    )


def _summed(strategy: Any) -> Strategy:
    """Return a strategy that averages, after a look at the fields that would make the average another."""
    if strategy.weighted_by_key != "num-examples":
        raise SpecError(
            f"from_flower: weighted_by_key = {strategy.weighted_by_key!r}, but clients weigh by their number "
            "of examples here, as with 'num-examples'"
        )
    if {strategy.train_metrics_aggr_fn, strategy.evaluate_metrics_aggr_fn} != {aggregate_metricrecords}:
        raise SpecError(
            "from_flower: a function of its own aggregates metrics, and here every metric is a mean over "
            "examples; leave train_metrics_aggr_fn and evaluate_metrics_aggr_fn out"
        )
    return SUMS[type(strategy)](strategy)


def _clipped(wrapper: Any, population: int) -> Strategy:
    """Return the strategy inside a wrapper with the wrapper's clip norm and noise."""
    inner, config = from_flower(wrapper.strategy), wrapper.accountant.config if wrapper.accountant else None
    if inner.optimizer != SGD():
        raise SpecError(
            f"from_flower: {type(wrapper).__name__} adds noise after {type(wrapper.strategy).__name__} has "
            "moved the model, and what that keeps stays without; ours adds it to the sum: write "
            f"Strategy(optimizer={inner.optimizer}, sampler=Poisson(), privacy=ClientLevel(...))"
        )
    if not wrapper.noise_multiplier:
        raise SpecError(
            "from_flower: noise_multiplier = 0 clips and protects nobody; take the strategy without its "
            f"wrapper, and limits.norm = {wrapper.clipping_norm:g}"
        )
    population = population or (config.population_size if config else 0)
    if population < wrapper.num_sampled_clients:
        raise SpecError(
            f"from_flower: population = {population}, expected at least the {wrapper.num_sampled_clients} "
            "sampled: how many clients there are in all, such as from_flower(strategy, population=100)"
        )
    if config and config.max_epsilon is not None:
        raise SpecError(
            f"from_flower: max_epsilon = {config.max_epsilon:g} stops Flower's run half-way; leave it out, "
            "and choose run.rounds by what `fedcore privacy plan` says of the spec"
        )
    privacy = ClientLevel(
        level="client",
        clip_norm=wrapper.clipping_norm,
        noise_multiplier=wrapper.noise_multiplier,
        population=population,
        delta=config.target_delta if config else 1e-5,
    )
    return replace(inner, sampler=Poisson(), privacy=privacy)
