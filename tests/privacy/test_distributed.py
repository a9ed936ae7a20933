"""Distributed differential privacy: encodings sum modulo 2^b to what was meant, within every bound."""

from dataclasses import replace
from math import log, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.encoding import Narrow, signed
from fedcore.errors import SpecError, UpdateRefused
from fedcore.privacy.discrete import LEAST_VARIANCE
from fedcore.privacy.distributed import (
    Noise,
    Parameters,
    decode,
    encode,
    largest_norm,
    parameters_for,
    rounded,
)
from fedcore.privacy.rotation import rotate, unrotate
from fedcore.seeds import generator

NOISES: list[Noise] = ["discrete_gaussian", "skellam"]


def some(
    noise: Noise = "skellam", dimension: int = 1000, clients: int = 20, bits: int = 32, seed: int = 1
) -> Parameters:
    return parameters_for(
        noise, 1.0, 1.0, dimension=dimension, clients=clients, honest=clients // 2, bits=bits, seed=seed
    )


def total_of(shares: list[Narrow]) -> Narrow:
    total = np.zeros_like(shares[0])
    for share in shares:
        total += share
    return total


@settings(max_examples=40)
@given(
    st.sampled_from(NOISES),
    st.integers(1, 700),
    st.integers(2, 8),
    st.floats(0.01, 100),
    st.sampled_from([16, 32]),
    st.integers(0, 2**40),
)
def test_the_sum_decodes_to_the_sum(
    noise: Noise, dimension: int, clients: int, clip_norm: float, bits: int, seed: int
) -> None:
    parameters = parameters_for(
        noise, clip_norm, 0.5, dimension=dimension, clients=clients, honest=clients, bits=bits, seed=seed
    )
    rng = generator("data", seed)
    vectors = rng.normal(size=(clients, dimension)) * clip_norm
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    clipped = vectors * np.minimum(1, clip_norm / lengths)
    shares = [encode(vector, parameters, rng) for vector in vectors]
    assert all(share.dtype == f"uint{bits}" and share.shape == (dimension,) for share in shares)
    error = decode(total_of(shares), parameters, np.empty(parameters.dimension)) - clipped.sum(axis=0)
    deviation = sqrt(clients * (parameters.variance + 1 / 4)) / parameters.scale
    assert abs(error).max() < 8 * deviation
    assert np.linalg.norm(error) < deviation * (sqrt(dimension) + 6)


def spread(parameters: Parameters, makers: int, rng: np.random.Generator) -> float:
    """Return the noise of a sum in which so many clients make it, as chi-square over its degrees of freedom.

    Relative to what the parameters say of `honest` clients: 1 for so many.
    """
    nothing = np.zeros(parameters.dimension)
    shares = [encode(nothing, parameters, rng) for _ in range(makers)]
    error = decode(total_of(shares), parameters, np.empty(parameters.dimension))
    said = parameters.honest * parameters.variance / parameters.scale**2
    return float(error @ error / said / parameters.dimension)


@pytest.mark.parametrize("noise", NOISES)
def test_noise_of_the_sum_is_what_the_parameters_say(noise: Noise) -> None:
    """Within five deviations of a chi-square; noise that one client of ten leaves out is far outside."""
    parameters = some(noise, dimension=20_000)
    band = 5 * sqrt(2 / parameters.dimension)
    rng = generator("noise")
    assert spread(parameters, parameters.honest, rng) == pytest.approx(1, abs=band)
    assert spread(parameters, parameters.honest - 1, rng) < 1 - band
    assert sqrt(parameters.honest * parameters.variance) >= 1.0 * parameters.norm


@pytest.mark.parametrize("noise", NOISES)
def test_the_longest_sum_is_about_as_long_as_it_may_be(noise: Noise) -> None:
    """All send the same vector, as long as may be, and all their noise; garbage is far longer."""
    parameters = some(noise, dimension=5000)
    rng, vector = generator("long"), np.full(5000, 1.0)
    total = total_of([encode(vector, parameters, rng) for _ in range(20)])
    norm = np.linalg.norm(signed(total).astype(np.float64))
    most = largest_norm(parameters, 20)
    assert 0.7 * most < norm <= most
    garbage = signed(rng.integers(0, 2**32, 5000, np.uint32)).astype(np.float64)
    assert np.linalg.norm(garbage) > 100 * most


@given(st.integers(0, 2**40))
def test_the_order_of_clients_does_not_matter(seed: int) -> None:
    parameters = some(dimension=50)
    rng = generator("order", seed)
    shares = [encode(rng.normal(size=50), parameters, rng) for _ in range(10)]
    shuffled = [shares[i] for i in rng.permutation(10)]
    assert np.array_equal(total_of(shares), total_of(shuffled))
    assert np.array_equal(total_of([total_of(shares[:4]), total_of(shares[4:])]), total_of(shares))


def test_rounding_is_unbiased() -> None:
    vector = np.array([0.1, -0.25, 2.5, 3.0, -7.9, 1e-3])
    rng = generator("rounding")
    draws = np.array([rounded(vector, 100, rng) for _ in range(20_000)])
    assert np.all(np.abs(draws - vector) < 1)
    deviation = np.sqrt((vector % 1) * (1 - vector % 1) / len(draws))
    assert np.all(np.abs(draws.mean(axis=0) - vector) <= 5 * deviation)


@given(st.integers(1, 500), st.floats(0.1, 1e4), st.integers(0, 2**40))
def test_rounding_keeps_to_its_norm(dimension: int, length: float, seed: int) -> None:
    """At the norm that rounding has on average at most, so that many draws are too long."""
    rng = generator("norm", seed)
    vector = rng.normal(size=dimension)
    vector *= length / np.linalg.norm(vector)
    norm = sqrt(length**2 + dimension / 4)
    assert np.linalg.norm(rounded(vector, norm, rng)) <= norm


def test_rounding_beyond_its_norm_is_drawn_again() -> None:
    """Half of the draws of (1/2, 1/2) are longer than 1, three quarters longer than 0."""
    rng = generator("again")
    draws = np.array([rounded(np.array([0.5, 0.5]), 1.0, rng) for _ in range(3000)])
    assert {tuple(map(int, draw)) for draw in draws} == {(0, 0), (0, 1), (1, 0)}
    assert draws[:, 0].mean() == pytest.approx(1 / 3, abs=0.05)


@given(
    st.sampled_from([16, 32]),
    st.integers(1, 10**6),
    st.integers(1, 500),
    st.floats(0.1, 10),
    st.floats(0.01, 1),
)
def test_parameters_fit_or_are_refused(
    bits: int, dimension: int, clients: int, noise_multiplier: float, share: float
) -> None:
    honest = max(1, int(share * clients))
    try:
        parameters = parameters_for(
            "skellam",
            2.0,
            noise_multiplier,
            dimension=dimension,
            clients=clients,
            honest=honest,
            bits=bits,
        )
    except SpecError as error:
        assert "take more bits" in str(error)
        return
    assert sqrt(parameters.variance * honest) >= noise_multiplier * parameters.norm
    assert 2 * parameters.scale < parameters.norm <= 2 * 2 * parameters.scale
    assert parameters.variance >= LEAST_VARIANCE
    # Of what a sum holds, noise alone must stay 7.4 deviations (2^-40, one coordinate) from the edge.
    assert sqrt(2 * 40 * log(2) * clients * parameters.variance) < 2 ** (bits - 1)


def test_the_worst_vector_of_all_clients_does_not_wrap() -> None:
    """All clients send the same single large coordinate: unrotated it would need 4 times the range."""
    parameters = some(dimension=2**14, clients=100, bits=16, seed=3)
    vector = np.zeros(2**14)
    vector[77] = 5.0
    rng = generator("worst")
    shares = [encode(vector, parameters, rng) for _ in range(100)]
    decoded = decode(total_of(shares), parameters, np.empty(parameters.dimension))
    deviation = sqrt(100 * (parameters.variance + 1 / 4)) / parameters.scale
    assert 100 * parameters.scale > 2**15
    assert abs(decoded[77] - 100) < 6 * deviation
    assert abs(np.delete(decoded, 77)).max() < 6 * deviation


@pytest.mark.parametrize("dimension", [1, 3, 64])
def test_no_direction_wraps_where_few_coordinates_cannot_spread_it(dimension: int) -> None:
    """All of every client's norm in one coordinate of the rotated vector."""
    parameters = parameters_for(
        "skellam", 1.0, 1.0, dimension=dimension, clients=50, honest=50, bits=16, seed=4
    )
    vector = unrotate(5 * np.eye(dimension)[0], 4)
    rng = generator("one")
    shares = [encode(vector, parameters, rng) for _ in range(50)]
    decoded = rotate(decode(total_of(shares), parameters, np.empty(parameters.dimension)), 4)
    assert decoded[0] == pytest.approx(50, abs=6 * sqrt(50 * parameters.variance + 50) / parameters.scale)


def test_noise_too_coarse_for_its_bounds_is_refused() -> None:
    with pytest.raises(
        SpecError, match=r"noise of variance \d+ to its integers, expected at least 1024; take"
    ):
        parameters_for("skellam", 1.0, 0.03, dimension=1000, clients=100, honest=80, bits=16)


def test_a_narrow_modulus_is_refused() -> None:
    with pytest.raises(SpecError, match=r"16 bits, .*: rounding would add more than the clip norm"):
        parameters_for("skellam", 1.0, 1.0, dimension=10**6, clients=5000, honest=3000, bits=16)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"honest": 11}, "honest <= clients"),
        ({"honest": 0}, "honest <= clients"),
        ({"dimension": 0}, "positive"),
        ({"clip_norm": 0.0}, "positive"),
        ({"noise_multiplier": 0.0}, "positive"),
        ({"bits": 24}, "16 or 32 bits"),
    ],
)
def test_parameters_without_sense_are_refused(changed: dict[str, float], said: str) -> None:
    usual = {
        "clip_norm": 1.0,
        "noise_multiplier": 1.0,
        "dimension": 10,
        "clients": 10,
        "honest": 5,
        "bits": 32,
    }
    values = usual | changed
    with pytest.raises(SpecError, match=said):
        parameters_for(
            "skellam",
            values["clip_norm"],
            values["noise_multiplier"],
            dimension=int(values["dimension"]),
            clients=int(values["clients"]),
            honest=int(values["honest"]),
            bits=int(values["bits"]),
        )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_update_that_is_not_finite_is_refused(bad: float) -> None:
    vector = np.zeros(1000)
    vector[3] = bad
    with pytest.raises(UpdateRefused, match="not finite"):
        encode(vector, some(), generator("x"))


def test_a_share_is_a_function_of_vector_parameters_and_generator() -> None:
    parameters, vector = some(), np.ones(1000)
    first, again = (encode(vector, parameters, generator("same")) for _ in range(2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, encode(vector, replace(parameters, seed=6), generator("same")))
    assert not np.array_equal(first, encode(vector, parameters, generator("another")))
