"""`fedcore bench secagg`: a masked sum with clients lost, without a network, beside Flower's primitives.

Every client encodes its own update, masks it and answers every step, up to the shares that it reveals; some
are lost when their shares are out and their words are not. What counts is the processor time of all that one
client does, as a median, and of all that the coordinator does, to the decoded sum. Certificates were
verified in a round before.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import sqrt
from statistics import median
from typing import Any, TypeVar

import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from fedcore.bench import flower_secagg
from fedcore.bench.aggregators import anonymous
from fedcore.crypto import certificates
from fedcore.crypto.prg import BLOCK, KEY, Masks
from fedcore.crypto.secagg import Client, Config, Floors, Server, Step
from fedcore.crypto.secagg.parameters import Graph, quorum
from fedcore.errors import SpecError
from fedcore.layout import Entry, Layout
from fedcore.messages import Ref, Update
from fedcore.seeds import generator
from fedcore.simulations.secure import NAME, Federation
from fedcore.spec import RunSpec
from fedcore.strategies import Strategy
from fedcore.strategies.rounds import train_plan
from fedcore.strategies.words import Accumulator, check_sum, encoded
from fedcore.task import client_name

T = TypeVar("T")

DISTINCT = 4  # updates that the clients share
WEIGHT = 100.0  # examples of a client, the most that there are


@dataclass(frozen=True)
class Fixed(Config):
    """An attempt whose graph is given, whatever is declared."""

    given: Graph

    def graph(self, n: int) -> Graph:
        """Return the given graph, for any cohort."""
        return self.given


class Spent:
    """Processor seconds, by who spent them and on what."""

    def __init__(self) -> None:
        self.seconds: dict[tuple[str, str], float] = defaultdict(float)

    def on(self, who: str, what: str, call: Callable[[], T]) -> T:
        """Return what a call returns, and note its time."""
        started = time.process_time()
        result = call()
        self.seconds[who, what] += time.process_time() - started
        return result

    def by(self, who: str) -> dict[str, float]:
        """Return the seconds of one, by what they went to."""
        return {what: seconds for (name, what), seconds in self.seconds.items() if name == who}


def measure(clients: int, size: int, lost: int, degree: int, encoding: str) -> Iterator[dict[str, Any]]:
    """Yield the lines to print: the masks' rate, the protocol, and Flower's functions.

    degree: with how many others a client masks, about; 0: as the spec's defaults have it. Raises SpecError
    where a third of the clients or more are lost.
    """
    if 3 * lost >= clients:
        raise SpecError(f"{lost} of {clients} clients are lost, expected fewer than a third; lower --lost")
    common = {"bench": "secagg", "clients": clients, "parameters": size, "lost": lost}
    yield {"bench": "secagg", "part": "masks", **rates()}
    ours = protocol(clients, size, lost, degree, encoding)
    yield common | {"part": "protocol", "encoding": encoding, **ours}
    theirs = flower_secagg.measure(clients, size, lost, ours["masks"])
    if "missing" not in theirs:
        theirs["client_ratio"] = round(theirs["client_s"] / ours["client_s"], 1)
        theirs["server_ratio"] = round(theirs["server_s"] / ours["server_s"], 1)
    yield common | {"part": "flower", **theirs, "measured": time.strftime("%Y-%m-%d")}


def rates(keys: int = 40, blocks: int = 64, runs: int = 9) -> dict[str, float]:
    """Return how fast masks are made and added, in 10^9 bytes a second, beside the bare cipher.

    The bare cipher writes to a buffer of the same size. generated_ratio: of making a mask, without adding it,
    to the bare cipher.
    """
    zeros, stream = bytes(BLOCK), bytearray(BLOCK)
    cipher = Cipher(algorithms.AES256(bytes(KEY)), modes.CTR(bytes(16))).encryptor()
    words, mask = np.zeros(blocks * BLOCK // 4, np.uint32), np.frombuffer(stream, np.uint32)
    each = np.split(words, blocks)
    names = [bytes([i]) * KEY for i in range(keys)]
    timed = []
    for _ in range(runs):
        spent = Spent()
        spent.on("masks", "", lambda: Masks(names).add_to(words))
        spent.on("cipher", "", lambda: [cipher.update_into(zeros, stream) for _ in range(keys * blocks)])
        spent.on("adding", "", lambda: [np.add(w, mask, out=w) for w in each for _ in range(keys)])
        timed.append([spent.seconds[what, ""] for what in ("masks", "cipher", "adding")])
    total = keys * blocks * BLOCK / 1e9
    return {
        "gb_per_s": round(median(total / masks for masks, _, _ in timed), 2),
        "cipher_gb_per_s": round(median(total / cipher for _, cipher, _ in timed), 2),
        "ratio": round(median(cipher / masks for masks, cipher, _ in timed), 2),
        "generated_ratio": round(median(cipher / (masks - adding) for masks, cipher, adding in timed), 2),
    }


def protocol(clients: int, size: int, lost: int, degree: int, encoding: str) -> dict[str, Any]:
    """Run the whole protocol once; return the times, bytes and memory that it took."""
    job = Job(clients, size, degree, encoding)
    sums, plain = Accumulator(job.plan), Accumulator(job.plan)
    spent, sent, told = Spent(), defaultdict[str, int](int), defaultdict[str, int](int)
    server = Server(
        job.config, job.federation.identity("coordinator", "main"), job.federation.trust, job.names
    )
    members = {name: spent.on(name, "protocol", partial(job.client, name)) for name in job.names}
    first, gone = job.names[-1], job.names[:lost]
    memory = 0.0

    def answer(name: str, message: bytes) -> None:
        sent[name] += len(message)
        spent.on("server", "protocol", partial(server.receive, name, message))

    def mask(name: str) -> None:
        words = spent.on(name, "encoding", partial(encoded, job.plan, job.update(name)))
        plain.add_words(words)
        spent.on(name, "masks", partial(members[name].mask, words.narrow, words.wide))
        sent[name] += job.plan.payload
        server.uploaded(name)
        spent.on("server", "adding", partial(sums.add_words, words))

    for name in job.names:
        answer(name, spent.on(name, "protocol", members[name].advertise))
    while server.step is not Step.DONE:
        for name, message in spent.on("server", "protocol", server.proceed).items():
            told[name] += len(message)
            if name not in members:
                continue
            reply = spent.on(name, "protocol", partial(members[name].receive, message))
            if reply is not None:
                answer(name, reply)
            elif name in gone:
                del members[name]
            elif name == first:
                with anonymous() as watched:
                    mask(name)
                memory = watched["peak"] - watched["start"]
            else:
                mask(name)
    narrow, wide = sums.words.narrow, sums.words.wide
    spent.on("server", "masks", partial(server.unmask, narrow, wide))
    exact = np.array_equal(narrow, plain.words.narrow) and np.array_equal(wide, plain.words.wide)
    spent.on("server", "decoding", partial(check_sum, job.plan, sums, len(server.included)))
    spent.on("server", "decoding", partial(sums.vector, "delta", slice(0, size)))
    stayed = [name for name in members if name != first]
    parts = {what: median(spent.seconds[name, what] for name in stayed) for what in spent.by(stayed[0])}
    return {
        "exact": exact,
        "masks": job.graph.degree * 2 - round(job.graph.degree**2 / (clients - 1)),
        "degree": job.graph.degree,
        "threshold": job.graph.threshold,
        "client_s": round(median(sum(spent.by(name).values()) for name in stayed), 4),
        "server_s": round(sum(spent.by("server").values()), 4),
        "client_parts_s": {what: round(seconds, 4) for what, seconds in parts.items()},
        "server_parts_s": {what: round(seconds, 4) for what, seconds in spent.by("server").items()},
        "upload_ratio": round(max(sent.values()) / (4 * size), 4),
        "told_bytes": max(told.values()),
        "client_memory_vectors": round(memory * 2**20 / (4 * size), 2),
    }


class Job:
    """A federation with one round to sum, and what every client needs for it."""

    def __init__(self, clients: int, size: int, degree: int, encoding: str) -> None:
        """Issue certificates, plan the round, and draw updates within its bounds."""
        self.names = tuple(client_name(i) for i in range(clients))
        spec = RunSpec.parse(
            {
                "cohort": {"size": clients},
                "limits": {"weight": WEIGHT, "norm": 1.0},
                "encryption": {"updates": "secagg", "encoding": encoding},
            }
        )
        layout = Layout((Entry("parameters", (size,), "float32", "shared"),))
        ref = Ref("bench", 1, 0, "train")
        self.plan = train_plan(Strategy(), spec, layout, ref, self.names, clients)
        self.config = self.configuration(spec, degree)
        self.graph = self.config.graph(clients)
        self.federation = Federation()
        for name in self.names:
            leaf, issuer = x509.load_pem_x509_certificates(self.federation.identity("client", name).chain)
            self.federation.trust.peer(certificates.to_der(leaf), [certificates.to_der(issuer)])
        rng, scale = generator("bench secagg"), np.float32(0.5 / size**0.5)
        self.deltas = [rng.standard_normal(size, dtype=np.float32) * scale for _ in range(DISTINCT)]

    def configuration(self, spec: RunSpec, degree: int) -> Config:
        """Return the attempt's configuration: with a graph of that degree, or that of the spec."""
        n, plan, encryption = len(self.names), self.plan, spec.encryption
        said = (NAME, plan.ref, "", "", n, plan.minimum, *plan.sizes)
        declared = (encryption.corrupt, encryption.lost, spec.run.rounds)
        if not degree:
            return Config(*said, *declared)
        return Fixed(*said, *declared, drawn(n, degree))

    def client(self, name: str) -> Client:
        """Return a client at its first step."""
        return Client(self.config, self.federation.identity("client", name), self.federation.trust, Floors())

    def update(self, name: str) -> Update:
        """Return what a client has learned."""
        scalars = dict.fromkeys(self.plan.scalars, 1.0)
        return Update({"delta": self.deltas[self.names.index(name) % DISTINCT]}, scalars)


def drawn(n: int, degree: int) -> Graph:
    """Return the graph in which each of n clients masks with `degree` others, those who drew it included.

    Of n - 1 others d are drawn and draw alike, so that d + d - d d / (n - 1) are on either side.
    """
    if degree >= n - 1:
        return Graph(n - 1, quorum(n) - 1)
    count = max(2, round((n - 1) * (1 - sqrt(1 - degree / (n - 1)))))
    return Graph(count, count // 2 + 1)
