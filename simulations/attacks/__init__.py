"""Attacks to try a strategy against: on updates, on what clients say, and on their data."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from fedcore.simulations.attacks.attack import Context as Context
from fedcore.simulations.attacks.attack import Forges as Forges
from fedcore.simulations.attacks.attack import Lies as Lies
from fedcore.simulations.attacks.attack import Poisons as Poisons
from fedcore.simulations.attacks.attack import Triggered as Triggered
from fedcore.simulations.attacks.data import Backdoor as Backdoor
from fedcore.simulations.attacks.data import LabelFlip as LabelFlip
from fedcore.simulations.attacks.data import ModelReplacement as ModelReplacement
from fedcore.simulations.attacks.deviations import ALIE as ALIE
from fedcore.simulations.attacks.deviations import IPM as IPM
from fedcore.simulations.attacks.deviations import OptimisedALIE as OptimisedALIE
from fedcore.simulations.attacks.deviations import OptimisedIPM as OptimisedIPM
from fedcore.simulations.attacks.distances import MinMax as MinMax
from fedcore.simulations.attacks.distances import MinSum as MinSum
from fedcore.simulations.attacks.mimic import Mimic as Mimic
from fedcore.simulations.attacks.simple import Gaussian as Gaussian
from fedcore.simulations.attacks.simple import NonFinite as NonFinite
from fedcore.simulations.attacks.simple import SignFlip as SignFlip
from fedcore.simulations.attacks.simple import Sybil as Sybil
from fedcore.simulations.attacks.simple import WeightLiar as WeightLiar

ATTACKS: Mapping[str, type[Any]] = MappingProxyType(
    {
        "sign_flip": SignFlip,
        "gaussian": Gaussian,
        "non_finite": NonFinite,
        "label_flip": LabelFlip,
        "alie": ALIE,
        "ipm": IPM,
        "optimised_alie": OptimisedALIE,
        "optimised_ipm": OptimisedIPM,
        "mimic": Mimic,
        "min_max": MinMax,
        "min_sum": MinSum,
        "model_replacement": ModelReplacement,
        "sybil": Sybil,
        "weight_liar": WeightLiar,
        "backdoor": Backdoor,
    }
)
"""The attacks by the name that a run spec gives them."""
