"""Private rounds: what may be combined, what is planned, what leaves a device, and the noise in the sum."""

from fedcore.strategies.privacy.conflicts import check, conflicts, private
from fedcore.strategies.privacy.noise import (
    Noised,
    clip_norm,
    metric_means,
    noised,
    noised_sums,
    state_after,
    update_noise,
)
from fedcore.strategies.privacy.plans import private_evaluation, private_training
from fedcore.strategies.privacy.release import released

__all__ = [
    "Noised",
    "check",
    "clip_norm",
    "conflicts",
    "metric_means",
    "noised",
    "noised_sums",
    "private",
    "private_evaluation",
    "private_training",
    "released",
    "state_after",
    "update_noise",
]
