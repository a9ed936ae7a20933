"""Who attacks, when, and what the server receives then."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedcore.client.examples import PairExamples
from fedcore.errors import SpecError
from fedcore.simulations.adversary import Adversary, Schedule
from fedcore.simulations.attacks import ALIE, ATTACKS, Context, Mimic
from fedcore.strategies.terms import Rows
from fedcore.task import client_name

NAMES = [client_name(i) for i in range(10)]


def adversary(name: str, clients: int = 10, seed: int = 0, **fields: Any) -> Adversary:
    return Adversary({"name": name, **fields}, [client_name(i) for i in range(clients)], seed)


def cohort(seed: int = 0, dtype: type[Any] = np.float32) -> Rows:
    delta = np.random.default_rng(seed).normal(size=(10, 4)).astype(dtype)
    return Rows({"delta": delta, "control": 2 * delta}, {"weight": np.arange(1.0, 11.0), "loss": np.ones(10)})


def averaged(rows: NDArray[Any]) -> NDArray[Any]:
    mean: NDArray[Any] = rows.mean(axis=0)
    return mean


def bad(of: Adversary) -> NDArray[np.bool_]:
    return np.array([name in of.malicious for name in NAMES])


@given(clients=st.integers(1, 200), fraction=st.floats(0, 1), seed=st.integers(0, 2**32))
def test_a_fraction_of_the_clients_is_malicious(clients: int, fraction: float, seed: int) -> None:
    names = [client_name(i) for i in range(clients)]
    table = {"name": "ipm", "fraction": fraction}
    if 0 < fraction < 0.999 / clients:
        with pytest.raises(SpecError, match=f"which {clients} clients have one"):
            Adversary(table, names, seed)
    elif not 0.999 <= fraction * clients <= 1.0 or fraction == 0:
        malicious = Adversary(table, names, seed).malicious
        assert malicious <= set(names) and abs(len(malicious) - int(fraction * clients + 1e-6)) <= 0


def test_a_fraction_is_not_lost_to_rounding() -> None:
    assert len(adversary("ipm", 100, fraction=0.29).malicious) == 29
    assert len(adversary("ipm", 25).malicious) == 5
    assert not adversary("ipm", fraction=0.0).malicious


def test_the_seed_decides_who_and_the_attack_does_not() -> None:
    assert adversary("ipm", 100).malicious == adversary("mimic", 100).malicious
    assert adversary("ipm", 100).malicious != adversary("ipm", 100, seed=1).malicious


def test_the_schedule_says_when() -> None:
    at = adversary("ipm", first=3, every=4)
    assert [number for number in range(1, 16) if at.active(number)] == [3, 7, 11, 15]
    assert all(adversary("ipm").active(number) for number in range(1, 5))
    once = adversary("model_replacement", first=90, every=10**6)
    assert [number for number in range(1, 200) if once.active(number)] == [90]


def test_no_attack_has_a_field_of_the_schedule() -> None:
    for part in ATTACKS.values():
        assert not set(part.__dataclass_fields__) & set(Schedule.__dataclass_fields__)


def test_a_table_or_a_bare_name() -> None:
    assert adversary("alie", z=1.5).attack == ALIE(1.5)
    assert Adversary("mimic", NAMES, 0).attack == Mimic()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"name": "aliee"}, "attack.name.*'alie'"),
        ({"name": "alie", "zz": 1.0}, "attack.zz"),
        ({"name": "alie", "z": "big"}, "attack.z"),
        ({"name": "alie", "fraction": 2.0}, "0 <= fraction <= 1"),
        ({"name": "alie", "fraction": "all"}, "attack.fraction"),
        ({"name": "alie", "first": 0}, "first >= 1"),
        ({"name": "alie", "every": 0}, "every >= 1"),
        ({"name": "alie", "fraction": 0.05}, "at least 0.1"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(table: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Adversary(table, NAMES, 0)


@pytest.mark.parametrize("name", ATTACKS)
def test_honest_clients_are_left_alone_and_inputs_too(name: str) -> None:
    at, sent = adversary(name, fraction=0.3), cohort()
    for array in (*sent.vectors.values(), *sent.scalars.values()):
        array.flags.writeable = False
    received = at.forge(NAMES, sent, averaged, 1)
    honest = ~bad(at)
    assert received.vectors["delta"].dtype == np.float32
    for part, old in ((received.vectors, sent.vectors), (received.scalars, sent.scalars)):
        assert part.keys() == old.keys()
        for key, array in part.items():
            np.testing.assert_array_equal(array[honest], old[key][honest])
    np.testing.assert_array_equal(received.vectors["control"], sent.vectors["control"])
    again = adversary(name, fraction=0.3).forge(NAMES, sent, averaged, 1)
    np.testing.assert_array_equal(again.vectors["delta"], received.vectors["delta"])


def test_forged_rows_come_from_the_honest_ones_of_the_cohort() -> None:
    at, sent = adversary("ipm", fraction=0.3, eps=0.5), cohort(dtype=np.float64)
    received = at.forge(NAMES, sent, averaged, 1).vectors["delta"]
    expected = -0.5 * sent.vectors["delta"][~bad(at)].mean(0)
    np.testing.assert_allclose(received[bad(at)], np.tile(expected, (3, 1)))


def test_weights_are_lied_about_and_updates_are_not_forged() -> None:
    at, sent = adversary("weight_liar", weight=1e5), cohort()
    received = at.forge(NAMES, sent, averaged, 1)
    assert (received.scalars["weight"][bad(at)] == 1e5).all()
    np.testing.assert_array_equal(received.vectors["delta"], sent.vectors["delta"])


def test_rounds_without_attack_and_cohorts_without_attackers_pass_unchanged() -> None:
    at, sent = adversary("non_finite", first=2), cohort()
    assert at.forge(NAMES, sent, averaged, 1) is sent
    assert at.forge(NAMES, sent, averaged, 2) is not sent
    honest = [name for name in NAMES if name not in at.malicious]
    part = Rows({"delta": np.ones((8, 4))}, {"weight": np.ones(8)})
    assert at.forge(honest, part, averaged, 2) is part


def test_attackers_among_themselves_take_each_other_for_honest() -> None:
    at = adversary("ipm", fraction=1.0)
    sent = cohort(dtype=np.float64)
    expected = np.tile(-0.1 * sent.vectors["delta"].mean(0), (10, 1))
    np.testing.assert_allclose(at.forge(NAMES, sent, averaged, 1).vectors["delta"], expected)
    search = adversary("optimised_ipm", fraction=1.0)
    assert np.isfinite(search.forge(NAMES, sent, averaged, 1).vectors["delta"]).all()


def test_the_aggregate_is_asked_about_rows_in_the_order_of_the_clients() -> None:
    at, sent, seen = adversary("optimised_ipm", fraction=0.3), cohort(dtype=np.float64), []

    def watched(rows: NDArray[Any]) -> NDArray[Any]:
        seen.append(rows.copy())
        return averaged(rows)

    at.forge(NAMES, sent, watched, 1)
    assert len(seen) == 16
    for rows in seen:
        assert rows.shape == (10, 4)
        np.testing.assert_array_equal(rows[~bad(at)], sent.vectors["delta"][~bad(at)])


def test_randomness_comes_from_the_round_so_a_repeated_round_is_the_same() -> None:
    at, sent = adversary("gaussian"), cohort()
    first, second = (at.forge(NAMES, sent, averaged, number).vectors["delta"] for number in (1, 2))
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(at.forge(NAMES, sent, averaged, 1).vectors["delta"], first)


def test_a_saved_state_continues_the_attack_in_another_process() -> None:
    one = adversary("mimic", fraction=0.3, warmup=3)
    for number in (1, 2):
        one.forge(NAMES, cohort(number), averaged, number)
    other = adversary("mimic", fraction=0.3, warmup=3)
    other.state = {name: vector.copy() for name, vector in one.state.items()}
    for number in (3, 4, 5):
        sent = cohort(number)
        first, second = (at.forge(NAMES, sent, averaged, number).vectors["delta"] for at in (one, other))
        np.testing.assert_array_equal(first, second)


def test_mimic_knows_clients_by_their_place_in_the_population() -> None:
    at = adversary("mimic", fraction=0.3)
    at.forge(NAMES, cohort(), averaged, 1)
    target = int(at.state["target"][0])
    assert client_name(target) not in at.malicious
    order = NAMES[::-1]
    sent = cohort(1)
    received = at.forge(order, sent, averaged, 2).vectors["delta"]
    expected = sent.vectors["delta"][order.index(client_name(target))]
    attackers = [i for i, name in enumerate(order) if name in at.malicious]
    np.testing.assert_array_equal(received[attackers], [expected] * 3)


@pytest.mark.parametrize("tensors", [True, False])
def test_only_the_malicious_train_on_poisoned_examples(tensors: bool) -> None:
    x, y = np.zeros((20, 9), np.float32), np.arange(20) % 10
    examples = PairExamples(*map(torch.from_numpy, (x, y)) if tensors else (x, y))
    at = adversary("label_flip")
    for name in NAMES:
        held = at.poisoned(name, examples)
        assert [type(part) for part in held.batch(slice(0, 2))] == [type(examples.x), type(examples.y)]
        assert (held is examples) == (name not in at.malicious)
        if name in at.malicious:
            assert held.batch(slice(0, 20))[1].tolist() == [9 - label for label in y]
    assert all(adversary("ipm").poisoned(name, examples) is examples for name in NAMES)


def test_each_attacker_stamps_its_own_choice_the_same_in_every_round() -> None:
    examples = PairExamples(np.zeros((20, 9), np.float32), np.arange(20) % 10)
    at = adversary("backdoor", fraction=0.2)
    one, other = (at.poisoned(name, examples).batch(slice(0, 20))[0] for name in sorted(at.malicious))
    assert not np.array_equal(one, other)
    again = at.poisoned(min(at.malicious), examples).batch(slice(0, 20))[0]
    np.testing.assert_array_equal(again, one)


def test_the_success_of_a_backdoor_has_examples_and_others_have_none() -> None:
    examples = PairExamples(np.zeros((20, 9), np.float32), np.arange(20) % 10)
    triggered = adversary("backdoor", target=4).triggered(examples)
    assert triggered is not None and len(triggered) == 18
    x, y = triggered.batch(slice(0, 18))
    assert set(np.asarray(y).tolist()) == {4} and (np.asarray(x)[:, -3:] == 1).all()
    assert adversary("model_replacement").triggered(examples) is not None
    assert adversary("label_flip").triggered(examples) is None


def test_parts_may_hold_an_authors_attack() -> None:
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Ones:
        value: float = 1.0

        def forge(self, honest: NDArray[Any], own: NDArray[Any], context: Context) -> NDArray[Any]:
            return np.full_like(own, self.value)

    at = Adversary({"name": "ones", "value": 3.0}, NAMES, 0, {**ATTACKS, "ones": Ones})
    assert (at.forge(NAMES, cohort(), averaged, 1).vectors["delta"][bad(at)] == 3).all()
