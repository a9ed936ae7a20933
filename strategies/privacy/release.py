"""What leaves a device: the output of a mechanism and nothing else.

Example level: DP-SGD has made the noise already. Client level: the whole update, clipped. Local: clipped and
noised. Distributed: clipped, rounded and noised, as words of a sum. Everything else that training measured
stays where it is.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedcore.messages import Work
from fedcore.privacy.distributed import Parameters, encode
from fedcore.privacy.levels import ClientLevel, DistributedLevel, ExampleLevel, LocalLevel, Off, Private
from fedcore.strategies.privacy.plans import deviation, noisy_in_sum
from fedcore.strategies.terms import Rows, joint_norm

if TYPE_CHECKING:
    from fedcore.strategies.strategy import Strategy

Column = NDArray[np.float64]
INSIDE = 1 - 2.0**-20  # of the clip norm: rounding to float32 must not lead beyond it


def released(
    strategy: "Strategy",
    work: Work,
    rows: Rows,
    clip: float,
    rngs: Sequence[np.random.Generator],
    distributed: Parameters | None = None,
) -> Rows:
    """Return what k clients may send of their training or of an evaluation, one row each.

    clip: the round's clip norm, 0: the spec's, which alone counts where the device makes the noise. rngs: one
    a client, for that noise; from OS entropy in a deployment. distributed: the plan's.

    A client level row has an L2 norm of at most `clip` over all its vectors together (L1 for Laplace noise),
    so one client changes the sum by no more. Of the scalars only those stay that are made of noised numbers
    (an optimiser's, at example level) or are noised with the sum (whether the update was within the clip
    norm). A row that is not finite becomes zero before noise is added.
    """
    privacy = strategy.privacy
    if isinstance(privacy, Off):
        return rows
    if work == "evaluate":
        return _released_metrics(privacy, rows, rngs)
    vectors = {name: matrix for name, matrix in rows.vectors.items() if name != "buffers"}
    if isinstance(privacy, ExampleLevel) or work == "root":  # the server's own data need no noise
        return Rows(vectors, {name: rows.scalars[name] for name in strategy.optimizer.scalars})
    if isinstance(privacy, LocalLevel):
        made, _ = clipped(vectors, privacy.clip_norm, order=1 if privacy.noise == "laplace" else 2)
        return Rows(_with_noise(made, privacy, rngs), {})
    if isinstance(privacy, DistributedLevel):
        assert distributed, "the plan of such a round says how to encode"
        return Rows(_shares(vectors, distributed, rngs), {})
    clip = clip or privacy.clip_norm
    made, norms = clipped(vectors, clip)
    adaptive = isinstance(privacy, ClientLevel) and privacy.adaptive
    return Rows(made, {"fits": np.where(norms <= clip, 0.5, -0.5)} if adaptive else {})


def clipped(
    vectors: Mapping[str, NDArray[np.floating[Any]]], clip: float, order: int = 2
) -> tuple[dict[str, NDArray[np.floating[Any]]], Column]:
    """Return v min(1, clip / ‖v‖) for each row v of all vectors together, and the norms before, (k,).

    vectors: (k, d) each. order: of the norm, 2 or 1, taken in float64. Rows that are not finite become zero.
    """
    norms = np.array([joint_norm(row, order) for row in zip(*vectors.values(), strict=True)])
    sound, limit = np.isfinite(norms), clip * INSIDE
    changed = np.flatnonzero(~(norms <= limit))
    made: dict[str, NDArray[np.floating[Any]]] = {}
    for name, matrix in vectors.items():
        made[name] = matrix.copy() if changed.size else matrix
        for i in changed:
            made[name][i] = matrix[i] * (limit / norms[i]) if sound[i] else 0
    return made, np.where(sound, norms, 0.0)


def _with_noise(
    vectors: Mapping[str, NDArray[np.floating[Any]]], privacy: LocalLevel, rngs: Sequence[np.random.Generator]
) -> dict[str, NDArray[np.floating[Any]]]:
    """Return clipped rows with noise of scale noise_multiplier * clip_norm on each coordinate.

    Against the coordinator too, one round is the Gaussian or the Laplace mechanism at that noise multiplier,
    if the numbers of `rngs` are known to nobody. Neither number is the coordinator's to choose.
    """
    scale = privacy.noise_multiplier * privacy.clip_norm
    made = {name: np.empty_like(matrix) for name, matrix in vectors.items()}
    for i, rng in enumerate(rngs):
        draw = rng.normal if privacy.noise == "gaussian" else rng.laplace
        for name in sorted(vectors):
            made[name][i] = vectors[name][i] + draw(0.0, scale, vectors[name].shape[1])
    return made


def _shares(
    vectors: Mapping[str, NDArray[np.floating[Any]]],
    parameters: Parameters,
    rngs: Sequence[np.random.Generator],
) -> dict[str, NDArray[Any]]:
    """Return each row's share of a sum with noise: words of shape (k, d), cut where the vectors end.

    The vectors lie one after the other in the order of their names.
    """
    sound, _ = clipped(vectors, parameters.clip_norm)
    names = sorted(sound)
    rows = zip(*(sound[name] for name in names), strict=True)
    shares = [encode(np.concatenate(row), parameters, rng) for row, rng in zip(rows, rngs, strict=True)]
    ends = np.cumsum([sound[name].shape[1] for name in names])[:-1]
    return dict(zip(names, np.split(np.stack(shares), ends, axis=1), strict=True))


def _released_metrics(privacy: Private, rows: Rows, rngs: Sequence[np.random.Generator]) -> Rows:
    """Return metrics as sums of values in 0..1, and the count, with noise where the device makes it.

    At example level these are sums over examples, each clipped by the trainer to 0..metric_bound; above it a
    client is one unit, so its means go out and it counts once. The loss has no bound and stays.
    """
    names, bound = [n for n in rows.scalars if n not in ("loss", "count")], privacy.metric_bound
    count = rows.scalars["count"]
    if isinstance(privacy, ExampleLevel):
        sent = {name: rows.scalars[name] / bound for name in names} | {"count": count}
    else:
        most = bound * np.maximum(count, 1.0)
        means = {name: np.clip(rows.scalars[name] / most, 0.0, 1.0) for name in names}
        sent = means | {"count": np.ones(len(rows))}
    if not noisy_in_sum(privacy):
        scale = deviation(privacy, len(names))
        noise = np.array([rng.normal(0.0, scale, len(sent)) for rng in rngs])
        sent = {name: sent[name] + noise[:, i] for i, name in enumerate(sent)}
    return Rows({}, sent)
