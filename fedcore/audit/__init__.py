"""Audits that try to break a claim of differential privacy; `fedcore.audit.run.audit` attacks a run."""

from fedcore.audit.noise import Shown, shown
from fedcore.audit.one_run import ceiling, epsilon_lower_bound, guesses_needed
from fedcore.audit.one_shot import epsilon_estimate
from fedcore.audit.rates import Counts, at_false_rate, auc, clopper_pearson
from fedcore.audit.report import Attack, Audit, Bound, Inversion

__all__ = [
    "Attack",
    "Audit",
    "Bound",
    "Counts",
    "Inversion",
    "Shown",
    "at_false_rate",
    "auc",
    "ceiling",
    "clopper_pearson",
    "epsilon_estimate",
    "epsilon_lower_bound",
    "guesses_needed",
    "shown",
]
