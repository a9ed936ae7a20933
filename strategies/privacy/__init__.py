"""Private rounds: what may be combined, what is planned, what leaves a device, and the noise in the sum."""

from fedcore.strategies.privacy.conflicts import check as check
from fedcore.strategies.privacy.conflicts import conflicts as conflicts
from fedcore.strategies.privacy.conflicts import private as private
from fedcore.strategies.privacy.noise import clip_norm as clip_norm
from fedcore.strategies.privacy.noise import metric_means as metric_means
from fedcore.strategies.privacy.noise import noised as noised
from fedcore.strategies.privacy.noise import noised_sums as noised_sums
from fedcore.strategies.privacy.noise import state_after as state_after
from fedcore.strategies.privacy.noise import update_noise as update_noise
from fedcore.strategies.privacy.plans import private_evaluation as private_evaluation
from fedcore.strategies.privacy.plans import private_training as private_training
from fedcore.strategies.privacy.release import released as released
