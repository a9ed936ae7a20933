"""Flower's secure aggregation by its own functions, for comparison: SecAgg+ of one client, and of the server.

A client's steps are those of its mod. The server's time is that of the primitives of its workflow, each as
often as the workflow calls it in the same round.
"""

import os
import time
from collections.abc import Callable
from importlib import import_module
from statistics import median
from typing import Any

import numpy as np

from fedcore.seeds import generator

TIMED = 3  # clients
CLIPPING, LEVELS, MODULUS, WEIGHT = 8.0, 1 << 22, 1 << 32, 1000.0  # Flower's defaults


def measure(clients: int, size: int, lost: int, degree: int) -> dict[str, Any]:
    """Return the processor seconds of a client (median) and of the server; or what to install.

    degree: with how many others a client masks; any two thirds of these can open its secrets.
    """
    try:
        mod = import_module("flwr.client.mod.secure_aggregation.secaggplus_mod")
    except ModuleNotFoundError:
        return {"missing": "flwr is not installed; run: pip install flwr"}
    threshold = 2 * degree // 3
    timed = [client(mod, size, degree, threshold) for _ in range(TIMED)]
    vector = timed[0][1]
    return {
        "client_s": round(median(seconds for seconds, _ in timed), 4),
        "server_s": round(server(mod, vector, clients, lost, degree, threshold), 4),
        "upload_ratio": round(sum(part.nbytes for part in vector) / (4 * size), 4),
    }


def client(mod: Any, size: int, degree: int, threshold: int) -> tuple[float, list[Any]]:
    """Return the seconds of one client's steps, and its masked vector."""
    common, key = import_module("flwr.common"), mod.Key
    settings = {
        key.SAMPLE_NUMBER: degree + 1,
        key.SHARE_NUMBER: degree + 1,
        key.THRESHOLD: threshold,
        key.CLIPPING_RANGE: CLIPPING,
        key.TARGET_RANGE: LEVELS,
        key.MOD_RANGE: MODULUS,
        key.MAX_WEIGHT: WEIGHT,
    }
    me, *others = states = [mod.SecAggPlusState() for _ in range(degree + 1)]
    for number, state in enumerate(states):
        state.nid = number
    delta = generator("bench flower").standard_normal(size, dtype=np.float32)
    update = common.ndarrays_to_parameters([delta])
    public = {str(state.nid): tuple(mod._setup(state, settings).values()) for state in others}
    started = time.process_time()
    public[str(me.nid)] = tuple(mod._setup(me, settings).values())
    mod._share_keys(me, public)
    seconds = time.process_time() - started
    share = me.rd_seed_share_dict[me.nid]
    delivered = {
        key.SOURCE_LIST: [state.nid for state in others],
        key.CIPHERTEXT_LIST: [
            mod.encrypt(
                me.ss2_dict[state.nid], mod.share_keys_plaintext_concat(state.nid, me.nid, share, share)
            )
            for state in others
        ],
    }
    started = time.process_time()
    masked = mod._collect_masked_vectors(me, delivered, 100, update)
    mod._unmask(me, {key.ACTIVE_NODE_ID_LIST: [s.nid for s in others], key.DEAD_NODE_ID_LIST: []})
    seconds += time.process_time() - started
    return seconds, [common.bytes_to_ndarray(part) for part in masked[key.MASKED_PARAMETERS]]


def server(mod: Any, vector: list[Any], clients: int, lost: int, degree: int, threshold: int) -> float:
    """Return the seconds of adding up, of opening everybody's secret, and of taking the masks off.

    From the median of each primitive and how often it is called.
    """
    shamir = import_module("flwr.common.secure_aggregation.crypto.shamir")
    quantization = import_module("flwr.common.secure_aggregation.quantization")
    shapes, stayed, seed = [part.shape for part in vector], clients - lost, os.urandom(32)
    shares = shamir.create_shares(seed, threshold, degree)[: degree * stayed // clients]
    private, public = mod.generate_key_pairs()
    return (
        stayed * cost(lambda: mod.parameters_addition(vector, vector))
        + clients * cost(lambda: shamir.combine_shares(shares))
        + lost * degree * cost(lambda: mod.generate_shared_key(private, public))
        + (stayed + lost * degree)
        * cost(lambda: mod.parameters_subtraction(vector, mod.pseudo_rand_gen(seed, MODULUS, shapes)))
        + cost(lambda: mod.parameters_mod(vector, MODULUS))
        + cost(lambda: quantization.dequantize(vector[1:], CLIPPING, LEVELS))
    )


def cost(call: Callable[[], object], runs: int = 5) -> float:
    """Return the processor seconds of a call, a median."""
    seconds = []
    for _ in range(runs):
        started = time.process_time()
        call()
        seconds.append(time.process_time() - started)
    return median(seconds)
