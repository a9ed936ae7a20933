"""Sealed updates: what is packed comes out equal, and keys are believed from their coordinator alone."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.crypto import hpke
from fedcore.crypto.identity import Identity
from fedcore.crypto.names import Name, Role
from fedcore.errors import AuthenticationError, FedcoreError, ProtocolError
from fedcore.messages import Plan, Ref, ScalarSpec, Update, VectorSpec
from fedcore.server.authority import Authority
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
    content = sealing.packed(plan, shuffled)
    assert len(content) == sealing.size(plan)
    back = sealing.unpacked(plan, content)
    assert back.scalars == update.scalars and list(back.vectors) == list(plan.vectors)
    assert all(back.vectors[name].tobytes() == vectors[name].tobytes() for name in vectors)


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
