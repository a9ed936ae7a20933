"""The clients of a simulation: stable names, every example with one client, made when asked for."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from fedcore.client.examples import Examples
from fedcore.data import ArrayDataset, Split
from fedcore.errors import DataError, SpecError
from fedcore.simulations.population import Population
from fedcore.spec import RunSpec
from fedcore.task import Client, Task, client_name

X, Y = np.arange(120, dtype=np.float32)[:, None], np.arange(120) % 10
FORMS: dict[str, Any] = {
    "array data set": ArrayDataset(X, Y, {"speaker": Y % 4}),
    "arrays": (X, Y),
    "tensors": (torch.from_numpy(X), torch.from_numpy(Y)),
    "torch data set": TensorDataset(torch.from_numpy(X), torch.from_numpy(Y)),
}


class Given(Task):
    def __init__(self, data: Any) -> None:
        self.all = data

    def dataset(self) -> Any:
        return self.all


def spec(clients: int = 6, seed: int = 0, where: str = "clients", **simulation: Any) -> RunSpec:
    tables = {"run": {"seed": seed}, "evaluation": {"where": where}}
    return RunSpec.parse({**tables, "simulation": {"clients": clients, **simulation}})


def held(population: Population, name: str) -> tuple[list[int], list[int]]:
    """Return the numbers of the examples that a client trains and tests on, which are their inputs."""
    train, test = population.examples(name)
    return numbers(train), numbers(test)


def numbers(examples: Examples | None) -> list[int]:
    if examples is None or not len(examples):
        return []
    x, _ = examples.batch(slice(0, len(examples)))
    return [int(i) for i in x.flatten()]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("partition", [{"name": "iid"}, {"name": "dirichlet", "alpha": 0.5}])
def test_every_example_is_with_one_client(form: Any, partition: dict[str, Any]) -> None:
    population = Population(Given(form), spec(partition=partition))
    everybody = [held(population, name) for name in population.names]
    assert sorted(i for train, test in everybody for i in train + test) == list(range(120))


@given(clients=st.integers(1, 60), fraction=st.floats(0, 0.99), seed=st.integers(0, 2**32))
def test_the_test_split_is_a_fraction_and_never_the_whole(clients: int, fraction: float, seed: int) -> None:
    population = Population(Given(FORMS["arrays"]), spec(clients, seed, test_fraction=fraction))
    for name in population.names:
        train, test = held(population, name)
        assert len(test) == int(fraction * (len(train) + len(test))) and len(train) >= 1


def test_with_a_holdout_clients_keep_everything_for_training() -> None:
    population = Population(Given(FORMS["arrays"]), spec(where="holdout"))
    rows = [held(population, name) for name in population.names]
    assert sum(len(train) for train, _ in rows) == 120 and not any(test for _, test in rows)


def test_the_seed_decides_and_the_form_does_not() -> None:
    def shares(form: str, seed: int) -> list[Any]:
        population = Population(Given(FORMS[form]), spec(seed=seed))
        return [held(population, name) for name in population.names]

    assert all(shares(form, 3) == shares("arrays", 3) for form in FORMS)
    assert shares("arrays", 3) != shares("arrays", 4)


def test_a_natural_partition_reads_the_keys() -> None:
    natural = {"name": "natural", "key": "speaker"}
    population = Population(Given(FORMS["array data set"]), spec(4, partition=natural, test_fraction=0.0))
    speakers = [{i % 10 % 4 for i in held(population, name)[0]} for name in population.names]
    assert sorted(min(s) for s in speakers) == [0, 1, 2, 3] and all(len(s) == 1 for s in speakers)


def test_names_are_stable_and_sort_as_numbers() -> None:
    assert client_name(17) == "client-000017"
    names = Population(Given(FORMS["arrays"]), spec(101)).names
    assert names == sorted(names) and len(set(names)) == 101


class Own(Task):
    """A task whose clients make their own data, as devices do."""

    def data(self, client: Client) -> Split[Any]:
        assert client.index is not None and client.name == client_name(client.index) and not client.options
        x = client.rng.normal(size=(3, 1)).astype(np.float32)
        return Split((x, np.full(3, client.index)))


def test_a_task_without_a_data_set_is_asked_for_each_clients_data() -> None:
    one, other = Population(Own(), spec(3)), Population(Own(), spec(3))
    drawn = {}
    for name in reversed(one.names):
        x, y = one.examples(name)[0].batch(slice(0, 3))
        assert torch.equal(x, other.examples(name)[0].batch(slice(0, 3))[0])
        assert numbers(one.examples(name)[1]) == []
        drawn[int(y[0])] = x
    assert sorted(drawn) == [0, 1, 2] and not torch.equal(drawn[0], drawn[1])


def test_examples_are_made_once() -> None:
    population = Population(Own(), spec(3))
    assert population.examples("client-000001") is population.examples("client-000001")


@pytest.mark.parametrize(
    ("data", "partition", "error", "message"),
    [
        (
            FORMS["arrays"],
            {"name": "dirichlett", "alpha": 1.0},
            SpecError,
            "simulation.partition.name.*'dirichlet'",
        ),
        (FORMS["arrays"], {"name": "dirichlet"}, SpecError, "simulation.partition.alpha"),
        (FORMS["arrays"], {"name": "natural", "key": "speaker"}, DataError, "speaker"),
        (iter([1]), {"name": "iid"}, DataError, r"dataset\(\) returned a list_iterator"),
        ((X[:5], Y[:5]), {"name": "iid"}, DataError, "5"),
    ],
)
def test_what_cannot_be_cut_is_refused(
    data: Any, partition: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Population(Given(data), spec(partition=partition))
