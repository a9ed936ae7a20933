"""The holes of Flower's SecAgg+ (1.41): each a property that holds here and fails there.

`xfail` is strict: a hole that Flower closes turns up as a test that passes, and its line here goes.
"""

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, Protocol

import numpy as np
import pytest

from fedcore.crypto.prg import Masks
from fedcore.crypto.secagg import Aborted, Step, edges
from fedcore.crypto.secagg.keys import Context, Pair
from fedcore.wire.v1 import secagg_pb2 as pb
from tests.crypto.secagg.conftest import CONFIG, Attempt, client_names, content, lie

CLIENTS, VICTIM = 7, 0
Request = Mapping[int, Sequence[set[int]]]  # to each client, the sets that are said to be summed


class Side(Protocol):
    """What is asked of both."""

    def mask(self, key: bytes) -> list[int]: ...
    def seeds(self) -> list[int]: ...
    def least_threshold(self) -> int: ...
    def swap_keys(self) -> None: ...
    def revealed(self, request: Request) -> set[str]: ...
    def lose_one_before_its_shares_are_out(self) -> None: ...


class Ours:
    """This implementation."""

    def mask(self, key: bytes) -> list[int]:
        """Return a mask modulo 4."""
        words = np.zeros(1000, np.uint16)
        Masks([key[:32]]).add_to(words)
        return [word % 4 for word in words.tolist()]

    def seeds(self) -> list[int]:
        """Return what seeds the masks between one client and many others."""
        context, mine = Context(CONFIG.digest, bytes(32)), Pair.of(b"m" * 32)
        others = [Pair.of(i.to_bytes(32, "big")).public for i in range(200)]
        return [int.from_bytes(context.pair_mask(mine.agreed(each), 0, 1)[:32], "big") for each in others]

    def least_threshold(self) -> int:
        """Return the smallest threshold that a coordinator can bring about."""
        return min(CONFIG.graph(n).threshold for n in range(3, 100))

    def swap_keys(self) -> None:
        """Tell a client keys of another that are the coordinator's."""
        attempt = Attempt()
        attempt.advertise()
        cohort = pb.Cohort.FromString(content(attempt.server.proceed()["client-00"]))
        advertisement = pb.Advertisement.FromString(cohort.advertisements[1].content)
        advertisement.mask_key, advertisement.channel_key = (Pair.of(bytes([i] * 32)).public for i in (1, 2))
        cohort.advertisements[1].content = advertisement.SerializeToString()
        attempt.clients["client-00"].receive(lie("cohort", CONFIG.digest, cohort.SerializeToString()))

    def revealed(self, request: Request) -> set[str]:
        """Return which shares of the victim's two secrets the clients gave away."""
        attempt = Attempt(CLIENTS).run(until=Step.MASK)
        clients = [attempt.clients[name] for name in attempt.names]
        held = {i: clients[i]._secrets.held[VICTIM] for i in request}

        def answers(i: int, step: str, content: bytes) -> list[pb.Said]:
            try:
                return [pb.Said.FromString(clients[i].receive(attempt.lie(step, content)) or b"")]
            except Aborted:
                return []

        votes, found = [], set[str]()
        for i, sums in request.items():
            signed = [said for each in sums for said in answers(i, "included", edges.bitmap(each, CLIENTS))]
            votes += [pb.Vote(position=i, signature=said.signature) for said in signed]
        for i in request:
            for said in answers(i, "quorum", pb.Votes(votes=votes).SerializeToString()):
                shares = zip(("seed", "mask key"), held[i], strict=True)
                found |= {which for which, share in shares if share in said.content}
        return found

    def lose_one_before_its_shares_are_out(self) -> None:
        """Lose one client between its keys and its shares; the others go on."""
        attempt = Attempt(CLIENTS).run(lost={Step.SHARE: client_names(1)})
        assert attempt.unmasked() == attempt.expected()


class Flower:
    """Flower's mod on the client, driven as its workflow drives it."""

    def __init__(self) -> None:
        self.mod: Any = import_module("flwr.client.mod.secure_aggregation.secaggplus_mod")

    def mask(self, key: bytes) -> list[int]:
        """Return a mask modulo 4."""
        (mask,) = self.mod.pseudo_rand_gen(key, 4, [(1000,)])
        return [int(word) for word in mask]

    def seeds(self) -> list[int]:
        """Return what seeds the masks: the key's words of 32 bits, folded by exclusive or."""
        mine, _ = self.mod.generate_key_pairs()
        keys = [self.mod.generate_shared_key(mine, self.mod.generate_key_pairs()[1]) for _ in range(200)]
        return [int(np.bitwise_xor.reduce(np.frombuffer(key, "<u4"))) for key in keys]

    def _set_up(self, threshold: int = 5) -> tuple[list[Any], dict[str, tuple[bytes, bytes]]]:
        """Return clients that have made keys, and the keys."""
        key = self.mod.Key
        settings = {key.SAMPLE_NUMBER: CLIENTS, key.SHARE_NUMBER: CLIENTS, key.THRESHOLD: threshold}
        settings |= {
            key.CLIPPING_RANGE: 8.0,
            key.TARGET_RANGE: 1 << 22,
            key.MOD_RANGE: 1 << 32,
            key.MAX_WEIGHT: 1.0,
        }
        states = [self.mod.SecAggPlusState() for _ in range(CLIENTS)]
        for i, state in enumerate(states):
            state.nid = i
        return states, {str(s.nid): tuple(self.mod._setup(s, dict(settings)).values()) for s in states}

    def _masked(self, present: Sequence[int]) -> list[Any]:
        """Return clients that have shared and masked; only those present got to share."""
        common: Any = import_module("flwr.common")
        states, public = self._set_up()
        shared = {i: self.mod._share_keys(states[i], dict(public)) for i in present}
        key = self.mod.Key
        for i in present:
            sources = [j for j in present if j != i]
            mail = [shared[j][key.CIPHERTEXT_LIST][shared[j][key.DESTINATION_LIST].index(i)] for j in sources]
            told = {key.SOURCE_LIST: sources, key.CIPHERTEXT_LIST: mail}
            update = common.ndarrays_to_parameters([np.ones(3, np.float32)])
            self.mod._collect_masked_vectors(states[i], told, 1, update)
        return states

    def _unmask(self, state: Any, active: set[int], dead: set[int]) -> dict[int, list[bytes]]:
        """Return what a client gives away, by whose secret it is of."""
        key = self.mod.Key
        told = {key.STAGE: self.mod.Stage.UNMASK, key.ACTIVE_NODE_ID_LIST: [*active]}
        told[key.DEAD_NODE_ID_LIST] = [*dead]
        self.mod.check_configs(self.mod.Stage.UNMASK, told)
        given = self.mod._unmask(state, told)
        shares: dict[int, list[bytes]] = {}
        for owner, share in zip(given[key.NODE_ID_LIST], given[key.SHARE_LIST], strict=True):
            shares.setdefault(owner, []).append(share)
        return shares

    def least_threshold(self) -> int:
        """Return the smallest threshold that a coordinator can bring about."""
        states, public = self._set_up(threshold=1)
        self.mod._share_keys(states[0], dict(public))
        return int(states[0].threshold)

    def swap_keys(self) -> None:
        """Tell a client keys of another that are the coordinator's."""
        states, public = self._set_up()
        public["1"] = tuple(self.mod.public_key_to_bytes(self.mod.generate_key_pairs()[1]) for _ in range(2))
        self.mod._share_keys(states[0], dict(public))

    def revealed(self, request: Request) -> set[str]:
        """Return which shares of the victim's two secrets the clients gave away."""
        states, everybody, found = self._masked(range(CLIENTS)), set(range(CLIENTS)), set[str]()
        for i, sums in request.items():
            dead = {j for each in sums for j in everybody - each}
            given = self._unmask(states[i], set().union(*sums), dead)[VICTIM]
            known = {
                states[i].rd_seed_share_dict[VICTIM]: "seed",
                states[i].sk1_share_dict[VICTIM]: "mask key",
            }
            found |= {known[share] for share in given}
        return found

    def lose_one_before_its_shares_are_out(self) -> None:
        """Lose one client between its keys and its shares; the others go on."""
        present = set(range(1, CLIENTS))
        for state in self._masked(sorted(present))[1:]:
            self._unmask(state, present, {VICTIM})


@pytest.fixture(
    params=[
        Ours,
        pytest.param(
            Flower, marks=pytest.mark.xfail(raises=(AssertionError, KeyError, pytest.fail.Exception))
        ),
    ]
)
def side(request: pytest.FixtureRequest) -> Side:
    made: Side = request.param()
    return made


def test_a_mask_takes_its_whole_key(side: Side) -> None:
    """The same words in another order are another key; Flower folds them, so they are the same."""
    one, other = b"AAAABBBB" * 5 + b"CCCC", b"BBBBAAAA" * 5 + b"CCCC"
    assert side.mask(one) != side.mask(other)


def test_a_seed_has_too_many_values_to_search(side: Side) -> None:
    """Of Flower's 32 bits four never vary, as keys are in base64: 2^28 trials open a mask."""
    seeds = side.seeds()
    assert sum(len({seed >> bit & 1 for seed in seeds}) == 2 for bit in range(256)) >= 128


def test_a_mask_takes_every_value(side: Side) -> None:
    """Flower's masks leave out the largest."""
    assert set(side.mask(b"k" * 44)) == {0, 1, 2, 3}


def test_no_single_client_opens_a_secret(side: Side) -> None:
    assert side.least_threshold() >= 2


def test_keys_that_the_coordinator_swapped_are_refused(side: Side) -> None:
    with pytest.raises(Aborted):
        side.swap_keys()


def test_both_shares_of_a_victim_are_not_given(side: Side) -> None:
    everybody = set(range(CLIENTS))
    request = {i: [everybody, everybody - {VICTIM}] for i in range(1, CLIENTS)}
    assert len(side.revealed(request)) <= 1


def test_clients_that_are_told_different_sums_do_not_give_both(side: Side) -> None:
    everybody = set(range(CLIENTS))
    request = {i: [everybody if i % 2 else everybody - {VICTIM}] for i in range(1, CLIENTS)}
    assert len(side.revealed(request)) <= 1


def test_one_lost_before_its_shares_are_out_loses_no_round(side: Side) -> None:
    side.lose_one_before_its_shares_are_out()
