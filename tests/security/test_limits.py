"""What is not promised, shown: Sybils of an operator who is the authority, one client that spoils a sum."""

from dataclasses import replace

import numpy as np
import pytest

from fedcore.audit.curious import CLIENTS, NOISE, aggregated, delta_of, trained
from fedcore.errors import UpdateRefused
from fedcore.messages import Update
from fedcore.strategies.terms import check
from fedcore.strategies.words import Accumulator, Words, check_sum


@pytest.mark.parametrize("private", [False, True])
def test_among_sybils_only_noise_that_the_device_makes_protects(private: bool) -> None:
    scene = trained(**({"privacy": NOISE, "evaluation": {"where": "holdout"}} if private else {}))
    victim, *others = scene.updates
    known = [replace(u, vectors={name: np.zeros_like(v) for name, v in u.vectors.items()}) for u in others]
    _, total = aggregated(replace(scene, updates=(victim, *known)))
    error = scene.attempt("the sum", [delta_of(total)] * CLIENTS).errors[0]
    assert error > 0.9 if private else error < 1e-4


def test_one_client_steers_a_sum_beyond_what_it_could_send_in_the_open() -> None:
    scene = trained()
    plan, (first, *others) = scene.plan, scene.updates
    bound, length = plan.vectors["delta"].bound, plan.vectors["delta"].length
    poison = Update({"delta": np.full(length, 0.9 * CLIENTS * bound, np.float32)}, first.scalars)
    with pytest.raises(UpdateRefused, match="beyond"):  # where the coordinator sees it
        check(plan, poison)
    sums = Accumulator(plan)
    for update in (poison, *others):
        sums.add(update)
    check_sum(plan, sums, CLIENTS)  # where it sees the sum alone
    assert sums.vector("delta", slice(None)).min() / sums.scalar("weight") > 0.8 * bound


def test_one_client_destroys_a_sum_and_the_round_is_refused() -> None:
    scene, rng = trained(), np.random.default_rng(0)
    plan, sums = scene.plan, Accumulator(scene.plan)
    for update in scene.updates[1:]:
        sums.add(update)
    noise = rng.integers(0, 256, plan.payload, np.uint8)
    sums.add_words(Words.read(plan, noise))
    with pytest.raises(UpdateRefused, match="sum"):
        check_sum(plan, sums, CLIENTS)
