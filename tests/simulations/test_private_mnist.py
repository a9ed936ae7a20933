"""The worked example of private MNIST: its features, its specs, and the script that runs them."""

from collections.abc import Iterator
from math import inf
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.privacy.claims import guarantees, resolved
from fedcore.privacy.levels import ClientLevel, ExampleLevel
from fedcore.simulations.grid import Grid
from fedcore.simulations.scenarios import private_mnist, private_mnist_utility, scenario
from fedcore.simulations.scenarios.private_mnist import DIRECTIONS, FEATURES, WINDOWS, edges
from fedcore.simulations.scenarios.private_mnist_utility import EPSILONS, SPECS, grid, main, title
from fedcore.spec import RunSpec

pytestmark = pytest.mark.slow  # together more than ten seconds

EXAMPLES = 60_000


@pytest.fixture
def few_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A file of 40 images that look like no digits, in place of MNIST."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (40, 28, 28), np.uint8), np.arange(40) % 10
    folder = tmp_path / "data"
    folder.mkdir()
    np.savez(folder / "mnist.npz", x_train=images, y_train=labels, x_test=images[:10], y_test=labels[:10])
    monkeypatch.setenv("FEDCORE_DATA", str(folder))
    private_mnist._examples.cache_clear()
    yield
    private_mnist._examples.cache_clear()


@given(seed=st.integers(0, 2**32), cut=st.integers(1, 4))
def test_features_have_norm_one_and_an_image_has_its_own_whatever_is_beside_it(seed: int, cut: int) -> None:
    images = np.random.default_rng(seed).random((5, 28, 28), np.float32)
    rows = edges(images)
    assert rows.shape == (5, FEATURES) and rows.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(rows[cut:], edges(images[cut:]))


def test_an_edge_counts_for_its_direction_and_an_image_without_edges_is_zero() -> None:
    step = np.zeros((2, 28, 28), np.float32)
    step[0, :, 14:] = 1  # brighter to the right: direction 0
    flat, windows = edges(step)[1], edges(step)[0].reshape(DIRECTIONS, WINDOWS, WINDOWS)
    assert not flat.any()
    strongest = windows.argmax(0)[:, 2:4]  # the two columns of windows across the edge
    assert (strongest == 0).all() and np.allclose(windows[:, :, [0, 5]], 0)
    turned = edges(np.swapaxes(step, 1, 2))[0].reshape(DIRECTIONS, WINDOWS, WINDOWS)
    assert (turned.argmax(0)[2:4] == DIRECTIONS // 4).all()


@pytest.mark.parametrize("name", SPECS)
def test_a_spec_composes_at_every_epsilon_and_its_public_constants_are_those_of_mnist(
    name: str, tmp_path: Path
) -> None:
    spec = RunSpec.load(scenario(name))
    assert spec.run.name == name and spec.evaluation.where == "holdout"
    for epsilon in EPSILONS:
        assert isinstance(grid(spec, epsilon, tmp_path, run=False), Grid)
    each = EXAMPLES // spec.simulation.clients
    match spec.privacy:
        case ClientLevel():
            assert spec.privacy.delta * spec.privacy.population <= 0.01 + 1e-12
        case ExampleLevel():
            assert spec.client.batch_size == spec.privacy.sampling_rate * each
            assert spec.privacy.delta * each <= 0.01 and spec.cohort.size == spec.simulation.clients
        case other:
            pytest.fail(f"{other} is no level of the example")


def test_the_levels_differ_in_whom_they_hold_against() -> None:
    spent = {
        (spec.privacy.level, each.adversary): each.epsilon
        for name in ("private_mnist_client_100", "private_mnist_example_100")
        for spec in [resolved(RunSpec.load(scenario(name)))]
        for each in guarantees(spec, spec.run.rounds)
    }
    assert spent["client", "receiver"] == pytest.approx(8, abs=0.02)
    assert spent["client", "coordinator"] == inf
    assert spent["example", "receiver"] == spent["example", "coordinator"] == pytest.approx(8, abs=0.02)


@pytest.mark.usefixtures("few_digits")
def test_the_script_goes_on_where_it_was_and_says_what_was_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(private_mnist_utility, "EPSILONS", (8.0, inf))
    monkeypatch.setattr(private_mnist_utility, "SEEDS", (0,))
    small = ("run.rounds=1", "simulation.clients=4", "cohort.size=4", "evaluation.every=0")
    client = RunSpec.load(scenario(SPECS[1]), [*small, "privacy.population=4"])
    example = RunSpec.load(scenario(SPECS[2]), [*small, "client.batch_size=5"])
    out = tmp_path / "out"
    main([str(out), "--report"], [client, example])
    assert f"| {title(client)} | not run | not run |" in capsys.readouterr().out
    main([str(out)], [client, example])
    first = capsys.readouterr().out
    assert "not run" not in first and (out / "utility.png").stat().st_size > 10_000
    written = {path: path.stat().st_mtime_ns for path in out.rglob("result.json")}
    assert len(written) == 4
    main([str(out)], [client, example])
    assert capsys.readouterr().out == first
    assert {path: path.stat().st_mtime_ns for path in out.rglob("result.json")} == written
