"""Sealed updates: what is packed comes out equal, and keys are believed from their coordinator alone."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedcore.crypto import hpke
from fedcore.crypto.identity import Identity
from fedcore.crypto.names import Name, Role
from fedcore.errors import AuthenticationError, FedcoreError, ProtocolError, UpdateRefused
from fedcore.messages import Plan, Ref, ScalarSpec, Update, VectorSpec
from fedcore.server.authority import Authority
from fedcore.strategies.rounds import Round, fold
from fedcore.strategies.terms import check
from fedcore.wire import sealing
from fedcore.wire.v1.authority_pb2 import Signed

REF = Ref("digits-1f0c22aa", 3, 1, "train")


def plan_of(lengths: list[int], scalars: int, dtype: str) -> Plan:
    vectors = {f"v{i}": VectorSpec(length, np.dtype(dtype), 1.0) for i, length in enumerate(lengths)}
    ranges = {f"s{i}": ScalarSpec(-1.0, 1.0) for i in range(scalars)}
    return Plan(REF, ("a",), 1, 1, 1.0, vectors, ranges)


@given(st.lists(st.integers(0, 9), max_size=3), st.integers(0, 4), st.sampled_from(["float32", "float64"]))
def test_what_is_packed_comes_out_equal(lengths: list[int], scalars: int, dtype: str) -> None:
    plan, rng = plan_of(lengths, scalars, dtype), np.random.default_rng(0)
    vectors = {name: rng.standard_normal(spec.length).astype(dtype) for name, spec in plan.vectors.items()}
    update = Update(vectors, {name: float(rng.standard_normal()) for name in plan.scalars})
    shuffled = Update(
        {name: vectors[name] for name in reversed(vectors)},
        {name: update.scalars[name] for name in reversed([*plan.scalars])},
    )
    content = b"".join(sealing.packed(plan, shuffled))
    assert len(content) == sealing.size(plan)
    back = sealing.unpacked(plan, lambda start, stop: content[start:stop])
    assert back.scalars == update.scalars and list(back.vectors) == list(plan.vectors)
    for name, vector in vectors.items():
        found = back.vectors[name]
        assert (found.shape, found.dtype) == (vector.shape, vector.dtype)
        assert found[:].tobytes() == vector.tobytes() == found[None][:, 0:9][0].tobytes()
        assert found[None][0][2:5].tobytes() == vector[2:5].tobytes()


KEY = hpke.new_key()
PUBLIC = hpke.public_bytes(KEY)


def sealed_of(content: Iterable[bytes], bound: bytes = b"here") -> NDArray[np.uint8]:
    return np.frombuffer(b"".join(sealing.seal(PUBLIC, content, bound)), np.uint8)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealing, "BLOCK", 64)


@given(st.lists(st.binary(max_size=150), max_size=5), st.integers(0, 400), st.integers(0, 400))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
def test_any_range_opens_to_what_was_sealed(
    small_blocks: None, pieces: list[bytes], start: int, stop: int
) -> None:
    content = b"".join(pieces)
    start, stop = min(start, len(content)), min(stop, len(content))
    assert sealing.Sealed(KEY, sealed_of(pieces), b"here").read(start, stop) == content[start:stop]


def test_blocks_open_in_their_place_alone(small_blocks: None) -> None:
    """Reordered, repeated, left out, cut off, or of another update under the same key: nothing opens."""
    content = bytes(range(200))
    whole, size = sealed_of([content]).tobytes(), sealing.BLOCK + sealing.TAG
    head, body = whole[: sealing.HEAD], whole[sealing.HEAD :]
    first, second, third, last = (body[i * size : (i + 1) * size] for i in range(4))
    other = sealed_of([content]).tobytes()[sealing.HEAD :]
    forged = {
        "reordered": head + second + first + third + last,
        "repeated": head + first + first + third + last,
        "left out": head + first + third + last,
        "cut off": head + first + second + third,
        "cut within": whole[:-1],
        "grown": whole + bytes(size),
        "another's": head + other,
    }
    for name, sealed in forged.items():
        with pytest.raises(UpdateRefused, match="does not open"):
            sealing.Sealed(KEY, np.frombuffer(sealed, np.uint8), b"here").read(0, 200)
            pytest.fail(name)
    with pytest.raises(UpdateRefused, match="does not open"):
        sealing.Sealed(KEY, np.frombuffer(whole, np.uint8), b"there")


def test_an_update_of_another_size_is_refused_before_it_is_read(small_blocks: None) -> None:
    plan = plan_of([100], 2, "float32")
    update = Update({"v0": np.ones(100, np.float32)}, {"s0": 0.5, "s1": -0.5})
    sealed = sealed_of(sealing.packed(plan, update))
    back = sealing.opened_update(plan, KEY, sealed, b"here")
    assert back.scalars == update.scalars
    check(plan, back)
    assert np.array_equal(back.vectors["v0"][10:90], update.vectors["v0"][10:90])
    with pytest.raises(UpdateRefused, match=f"{len(sealed) - 1} bytes, expected {len(sealed)}"):
        sealing.opened_update(plan, KEY, sealed[:-1], b"here")


@given(st.lists(st.text("ab/.0", min_size=1, max_size=4), min_size=3, max_size=3), st.integers(0, 2))
def test_no_two_places_have_the_same_binding(parts: list[str], which: int) -> None:
    other = [part + "a" if i == which else part for i, part in enumerate(parts)]
    assert sealing.binding(parts[0], REF, *parts[1:]) != sealing.binding(other[0], REF, *other[1:])
    for ref in (
        replace(REF, run="r"),
        replace(REF, round=4),
        replace(REF, attempt=2),
        replace(REF, kind="root"),
    ):
        assert sealing.binding("fed", ref, "a", "b") != sealing.binding("fed", REF, "a", "b")


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.create(tmp_path_factory.mktemp("fed") / "authority", "fed", "127.0.0.1:8700")


def member(authority: Authority, role: Role, name: str) -> Identity:
    return authority.new_identity(Name("fed", role, name))


def test_a_key_is_believed_from_a_coordinator_of_the_federation_for_this_attempt_alone(
    authority: Authority, tmp_path: Path
) -> None:
    coordinator, client = member(authority, "coordinator", "main"), member(authority, "client", "a")
    public = hpke.public_bytes(hpke.new_key())
    key = sealing.announce(coordinator, REF, public)
    assert sealing.announced(key, REF, client) == public
    abroad = Authority.create(tmp_path / "authority", "fed", "127.0.0.1:8700")
    told = Signed.FromString(key)
    told.content = told.content.replace(public[:9], bytes(9))
    refused: list[tuple[bytes, type[FedcoreError], str]] = [
        (
            sealing.announce(coordinator, replace(REF, attempt=2), public),
            AuthenticationError,
            "another attempt",
        ),
        (sealing.announce(client, REF, public), AuthenticationError, "expected a coordinator"),
        (sealing.announce(member(abroad, "coordinator", "main"), REF, public), AuthenticationError, "root"),
        (told.SerializeToString(), AuthenticationError, "signature"),
        (b"", ProtocolError, "no certificate"),
    ]
    for wrong, error, said in refused:
        with pytest.raises(error, match=said):
            sealing.announced(wrong, REF, client)


@pytest.mark.parametrize("bits", [64, 32])
def test_what_is_opened_where_it_is_read_makes_the_same_sums_and_rows(bits: int) -> None:
    """More than a block of an update, and more than a piece of its rotation."""
    plan = plan_of([100_000, 70_001], 1, "float32")
    bounded = {name: replace(spec, norm=1.0) for name, spec in plan.vectors.items()}
    plan = replace(plan, vectors=bounded, bits=bits, rows=frozenset({"v1"}), sees=True)
    rng = np.random.default_rng(0)
    vectors = {n: rng.uniform(-1, 1, v.length).astype(np.float32) for n, v in plan.vectors.items()}
    update = Update(vectors, {"s0": 0.5})
    opened = sealing.opened_update(plan, KEY, sealed_of(sealing.packed(plan, update)), b"here")
    rounds = [Round(plan), Round(plan)]
    for round, each in zip(rounds, (update, opened), strict=True):
        assert fold(round, "a", each).status == "folded"
    (plain, sealed), names = (round.sums.words for round in rounds), ("narrow", "wide")
    assert all(np.array_equal(getattr(plain, name), getattr(sealed, name)) for name in names)
    one, other = (round.rows.packed()["v1"] for round in rounds)
    assert np.array_equal(one, other)
