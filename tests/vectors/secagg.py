"""Writes secagg.json, the golden vectors of docs/secagg-protocol.md: python tests/vectors/secagg.py.

Keys and certificates are those of secagg-identities.json, which is made once: certificates hold random
numbers. All else follows from them and from the draws of the clients, which are in the vectors.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from cryptography import x509

from fedcore.crypto import certificates
from fedcore.crypto.identity import Identity
from fedcore.crypto.names import Name
from fedcore.crypto.prg import Masks
from fedcore.crypto.secagg import Client, Config, Floors, Server, Step, edges
from fedcore.crypto.secagg.keys import Context, Pair, commitment
from fedcore.crypto.secagg.parameters import graph, quorum
from fedcore.crypto.shamir import split
from fedcore.crypto.trust import Trust
from fedcore.messages import Ref

HERE = Path(__file__).parent
NOW = datetime(2030, 1, 1, tzinfo=UTC)
CLIENTS = ("ada", "bob", "cyd", "dan")
LOST = "cyd"  # after sharing, before masking
CONFIG = Config(
    federation="vectors",
    ref=Ref("run-1", 3, 0, "train"),
    parameters=sha256(b"parameters").hexdigest(),
    spec=sha256(b"spec").hexdigest(),
    asked=4,
    smallest=3,
    bits=32,
    narrow=5,
    wide=2,
    corrupt=0.2,
    lost=0.25,
    rounds=10,
)


def make_identities() -> dict[str, str]:
    """Return PEM files by name: the root, and of everybody the key and the chain."""
    root_key, key = certificates.new_key(), certificates.new_key()
    root = certificates.issue_root("vectors", root_key, NOW)
    issuer = certificates.issue_intermediate("vectors", key.public_key(), root, root_key, NOW)
    files = {"root": certificates.to_pem(root).decode()}
    for who in (
        *(Name("vectors", "client", name) for name in CLIENTS),
        Name("vectors", "coordinator", "main"),
    ):
        own = certificates.new_key()
        leaf = certificates.issue_leaf(who, own.public_key(), issuer, key, NOW)
        files[f"{who.name} key"] = certificates.key_to_pem(own).decode()
        files[f"{who.name} chain"] = certificates.to_pem(leaf, issuer).decode()
    return files


def identity(files: dict[str, str], name: str) -> Identity:
    """Return who somebody is."""
    key = certificates.key_from_pem(files[f"{name} key"].encode())
    chain = x509.load_pem_x509_certificates(files[f"{name} chain"].encode())
    return Identity.verified(key, chain, x509.load_pem_x509_certificate(files["root"].encode()), NOW)


def draws(seed: str, drawn: list[str]) -> Callable[[int], bytes]:
    """Return a source of bytes that notes what it gave: SHA-256 of seed, number and block."""

    def draw(size: int) -> bytes:
        blocks = (sha256(f"{seed} {len(drawn)} {i}".encode()).digest() for i in range(-(-size // 32)))
        given = b"".join(blocks)[:size]
        drawn.append(given.hex())
        return given

    return draw


def pieces() -> dict[str, Any]:
    """Return vectors of single functions."""
    transcript, secret = sha256(b"transcript").digest(), sha256(b"secret").digest()
    context, pair, other = Context(CONFIG.digest, transcript), Pair.of(secret), Pair.of(transcript)
    agreed = pair.agreed(other.public)
    words = {f"uint{bits}": np.zeros(6, f"u{bits // 8}") for bits in (16, 32, 64)}
    for each in words.values():
        Masks([secret]).add_to(each)
    drawn: list[str] = []
    shares = split(secret, 3, [1, 2, 5, 7], draws("shamir", drawn))
    return {
        "config": {"fields": asdict(CONFIG), "digest": CONFIG.digest.hex()},
        "transcript": {"cohort": b"cohort".hex(), "transcript": CONFIG.transcript(b"cohort").hex()},
        "keys": {
            "transcript": transcript.hex(),
            "secret": secret.hex(),
            "peer": other.public.hex(),
            "agreed": agreed.hex(),
            "commitment": commitment(CONFIG.digest, secret).hex(),
            "self mask of member 2": context.self_mask(secret, 2).hex(),
            "pair mask of members 2 and 1": context.pair_mask(agreed, 2, 1).hex(),
            "shares from member 1 to 2": bytes(range(66)).hex(),
            "ciphertext from member 1 to 2": context.sealed(agreed, 1, 2, bytes(range(66))).hex(),
        },
        "mask": {"key": secret.hex(), **{name: each.tolist() for name, each in words.items()}},
        "shamir": {
            "secret": secret.hex(),
            "threshold": 3,
            "points": [1, 2, 5, 7],
            "draw": drawn[0],
            "shares": [share.hex() for share in shares],
        },
        "bitmap": {"members": [0, 2, 9], "n": 10, "bytes": edges.bitmap([0, 2, 9], 10).hex()},
        "graphs": [
            {"n": n, "corrupt": corrupt, "lost": lost, "rounds": rounds, "quorum": quorum(n)}
            | asdict(graph(n, corrupt, lost, rounds))
            for n, corrupt, lost, rounds in (
                (3, 0.2, 0.1, 10),
                (64, 0.3, 0.3, 10**6),
                (65, 0.2, 0.1, 100),
                (100, 0.2, 0.1, 100),
                (100, 0.3, 0.3, 1000),
                (1000, 0.1, 0.2, 500),
            )
        ],
    }


def exchange(files: dict[str, str]) -> dict[str, Any]:
    """Return an attempt of four clients, of whom one is lost after sharing: all draws, messages and words."""
    trust = Trust(files["root"].encode(), "vectors", lambda: NOW)
    drawn: dict[str, list[str]] = {name: [] for name in CLIENTS}
    clients = {
        name: Client(CONFIG, identity(files, name), trust, Floors(), random=draws(name, drawn[name]))
        for name in CLIENTS
    }
    server = Server(CONFIG, identity(files, "main"), trust, CLIENTS)
    words, masked = {}, {}
    said: list[dict[str, Any]] = []
    narrow, wide = np.zeros(CONFIG.narrow, np.uint32), np.zeros(CONFIG.wide, np.uint64)

    def answer(name: str, message: bytes | None) -> None:
        if message is not None:
            said.append({"from": name, "message": message.hex()})
            server.receive(name, message)
            return
        source = np.frombuffer(sha256(name.encode()).digest(), "<u4")
        own = source[: CONFIG.narrow].copy(), source[:4].copy().view(np.uint64)
        words[name] = {"narrow": own[0].tolist(), "wide": own[1].tolist()}
        clients[name].mask(*own)
        masked[name] = {"narrow": own[0].tolist(), "wide": own[1].tolist()}
        np.add(narrow, own[0], out=narrow)
        np.add(wide, own[1], out=wide)
        server.uploaded(name)

    for name in CLIENTS:
        answer(name, clients[name].advertise())
    while server.step is not Step.DONE:
        told = server.proceed()
        said += [
            {"to": sorted(name for name in told if told[name] == message), "message": message.hex()}
            for message in dict.fromkeys(told.values())
        ]
        for name in told:
            if name != LOST or server.step in (Step.SHARE, Step.RECEIVE):
                answer(name, clients[name].receive(told[name]))
    server.unmask(narrow, wide)
    return {
        "draws": drawn,
        "said": said,
        "words": words,
        "masked": masked,
        "sum": {"narrow": narrow.tolist(), "wide": wide.tolist()},
    }


def vectors() -> dict[str, Any]:
    """Return all vectors, as secagg.json holds them."""
    files = json.loads((HERE / "secagg-identities.json").read_text())
    return {**pieces(), "exchange": exchange(files)}


if __name__ == "__main__":
    if not (HERE / "secagg-identities.json").exists():
        (HERE / "secagg-identities.json").write_text(json.dumps(make_identities(), indent=1) + "\n")
    (HERE / "secagg.json").write_text(json.dumps(vectors(), indent=1) + "\n")
