from datetime import UTC, datetime, timedelta

import pytest

from fedcore.crypto import certificates, trust
from fedcore.crypto.certificates import new_key, to_der, to_pem
from fedcore.crypto.names import Name
from fedcore.crypto.trust import Trust
from fedcore.errors import AuthenticationError

NOW = datetime(2030, 1, 1, tzinfo=UTC)


class Federation:
    """Root, intermediate and leaves, and a clock that can be turned."""

    def __init__(self, name: str = "fed") -> None:
        self.name, self.now = name, NOW
        self.root_key, self.key = new_key(), new_key()
        self.root = certificates.issue_root(name, self.root_key, NOW)
        self.issuer = certificates.issue_intermediate(
            name, self.key.public_key(), self.root, self.root_key, NOW
        )
        self.trust = Trust(to_pem(self.root), name, lambda: self.now)

    def leaf(self, name: str = "hospital-1") -> bytes:
        who = Name(self.name, "client", name)
        return to_der(certificates.issue_leaf(who, new_key().public_key(), self.issuer, self.key, NOW))

    @property
    def issuers(self) -> list[bytes]:
        return [to_der(self.issuer)]


def test_a_certificate_says_who_it_is_and_which_key_signs() -> None:
    federation, key = Federation(), new_key()
    name = Name("fed", "client", "hospital-1")
    leaf = certificates.issue_leaf(name, key.public_key(), federation.issuer, federation.key, NOW)
    peer = federation.trust.peer(to_der(leaf), federation.issuers)
    assert (peer.name, peer.key) == (name, key.public_key())


def test_what_is_known_is_not_verified_again(monkeypatch: pytest.MonkeyPatch) -> None:
    federation = Federation()
    leaf = federation.leaf()
    peer = federation.trust.peer(leaf, federation.issuers)
    federation.trust.peer(federation.leaf("hospital-2"), federation.issuers)
    monkeypatch.setattr(trust, "verify_chain", None)  # an issuer is verified once
    federation.trust.peer(federation.leaf("hospital-3"), federation.issuers)
    monkeypatch.setattr(Trust, "_verified", None)
    assert federation.trust.peer(leaf, federation.issuers) == peer


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("days", [-1, 31])
def test_dates_hold_also_for_what_is_known(days: int, known: bool) -> None:
    federation = Federation()
    leaf = federation.leaf()
    if known:
        federation.trust.peer(leaf, federation.issuers)
    federation.trust.peer(federation.leaf("hospital-2"), federation.issuers)
    federation.now = NOW + timedelta(days=days)
    with pytest.raises(AuthenticationError, match="hospital-1 holds from 2029-12-31 23:55 to 2030-01-31"):
        federation.trust.peer(leaf, federation.issuers)


def test_another_federation_is_refused_whether_its_issuer_is_known_or_not() -> None:
    federation, other = Federation(), Federation()
    with pytest.raises(AuthenticationError, match="does not lead to the federation's root"):
        federation.trust.peer(other.leaf(), other.issuers)
    federation.trust.peer(federation.leaf(), federation.issuers)
    for issuers in ([], federation.issuers, [*federation.issuers, b"x"]):
        with pytest.raises(AuthenticationError, match=r"issued by none of the authorities|malformed"):
            federation.trust.peer(other.leaf(), issuers)


def test_a_root_of_several_federations_does_not_mix_them() -> None:
    federation = Federation()
    federation.name = "other"
    with pytest.raises(AuthenticationError, match="is of another federation than fed"):
        federation.trust.peer(federation.leaf(), federation.issuers)


def test_a_participant_cannot_issue() -> None:
    federation, key = Federation(), new_key()
    name = Name("fed", "client", "hospital-1")
    client = certificates.issue_leaf(name, key.public_key(), federation.issuer, federation.key, NOW)
    forged = certificates.issue_leaf(
        Name("fed", "coordinator", "main"), new_key().public_key(), client, key, NOW
    )
    with pytest.raises(AuthenticationError):
        federation.trust.peer(to_der(forged), [to_der(client), *federation.issuers])


@pytest.mark.parametrize("leaf", [b"", b"x" * 400])
def test_a_malformed_certificate_is_refused(leaf: bytes) -> None:
    federation = Federation()
    with pytest.raises(AuthenticationError, match="malformed"):
        federation.trust.peer(leaf, federation.issuers)


def test_the_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust, "KNOWN", 2)
    federation = Federation()
    for i in range(5):
        federation.trust.peer(federation.leaf(f"hospital-{i}"), federation.issuers)
    assert len(federation.trust._known) <= 2


def test_a_certificate_of_another_version_is_refused() -> None:
    federation = Federation()
    leaf = bytearray(federation.leaf())
    leaf[leaf.index(b"\xa0\x03\x02\x01\x02") + 4] = 3  # there are versions 0 to 2
    for certificate, issuers in ((bytes(leaf), federation.issuers), (federation.leaf(), [bytes(leaf)])):
        with pytest.raises(AuthenticationError, match="malformed"):
            federation.trust.peer(certificate, issuers)
