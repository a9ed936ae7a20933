"""Which sum an attempt of secure aggregation is about, as coordinator and client both derive it."""

from hashlib import sha256

from fedcore.crypto.secagg.config import SMALLEST, Config
from fedcore.messages import Blob, Ref
from fedcore.spec import RunSpec


def config_of(
    federation: str, ref: Ref, spec: RunSpec, parameters: Blob, asked: int, sizes: tuple[int, int, int]
) -> Config:
    """Return the configuration of an attempt, from its assignment and each side's own copy of the plan.

    parameters: that the round starts from. asked: how many clients the assignment names. sizes: the plan's.
    Raises SpecError for too few clients.
    """
    bits, narrow, wide = sizes
    return Config(
        federation=federation,
        ref=ref,
        parameters=parameters.sha256,
        spec=sha256(spec.travels().encode()).hexdigest(),
        asked=asked,
        smallest=max(SMALLEST, spec.cohort.fewest),
        bits=bits,
        narrow=narrow,
        wide=wide,
        corrupt=spec.encryption.corrupt,
        lost=spec.encryption.lost,
        rounds=spec.run.rounds,
    )
