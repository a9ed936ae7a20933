"""One client that would keep all others from a sum, by what the coordinator would hand on to everybody."""

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature

from fedcore.crypto.certificates import key_from_pem, to_der
from fedcore.crypto.secagg import Server, Step
from fedcore.crypto.secagg.cohort import LONGEST
from fedcore.crypto.secagg.signing import say
from fedcore.crypto.trust import Trust
from fedcore.errors import ProtocolError
from fedcore.wire.v1 import secagg_pb2 as pb
from tests.crypto.secagg.conftest import CONFIG, NOW, VICTIM, Attempt, certificates_of, content, identity

LIAR = "client-01"
ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551  # of P-256
SHA256_ECDSA = bytes.fromhex("300a06082a8648ce3d040302")


def says_of_itself(attempt: Attempt, advertisement: bytes, issuer: bytes) -> bytes:
    return say(key_from_pem(identity(LIAR).key), "advertise", CONFIG.digest, advertisement, issuer)


def tagged(tag: bytes, value: bytes) -> bytes:
    """Return DER of up to 65,535 bytes."""
    size = len(value)
    if size < 128:
        return tag + bytes([size]) + value
    return tag + (b"\x81" + bytes([size]) if size < 256 else b"\x82" + size.to_bytes(2, "big")) + value


def other_encoding(certificate: bytes) -> bytes:
    """Return other bytes of a certificate that hold as well: where (r, s) is a signature, (r, -s) is one."""
    parsed = x509.load_der_x509_certificate(certificate)
    r, s = decode_dss_signature(parsed.signature)
    signature = tagged(b"\x03", b"\0" + encode_dss_signature(r, ORDER - s))
    return tagged(b"\x30", parsed.tbs_certificate_bytes + SHA256_ECDSA + signature)


def fresh_server(names: list[str]) -> Server:
    trust = Trust(identity("main", "coordinator").root, "fed", lambda: NOW)
    return Server(CONFIG, identity("main", "coordinator"), trust, names)


def test_what_a_client_adds_to_its_advertisement_reaches_nobody() -> None:
    """A field that no version has: it is signed, so it would travel on, and no message would fit any more."""
    attempt = Attempt()
    said = pb.Said.FromString(attempt.clients[LIAR].advertise())
    junk = said.content + b"\x7a\x80\x08" + bytes(1024)
    with pytest.raises(ProtocolError, match=f"expected at most {LONGEST}"):
        attempt.server.receive(LIAR, says_of_itself(attempt, junk, said.issuer))


def test_the_longest_names_fit() -> None:
    attempt = Attempt(names=["a" * 63, "b" * 63, "c" * 63]).run(until=Step.SHARE)
    (told,) = {content(message) for message in attempt.told[Step.SHARE].values()}
    assert all(len(each.content) < LONGEST - 63 for each in pb.Cohort.FromString(told).advertisements)


def test_nobody_can_make_the_coordinator_forget_who_issued_anothers_certificate() -> None:
    """The liar shows the victim's certificate with other bytes of its issuer's; the victim still gets in."""
    attempt = Attempt()
    server, (leaf, issuer) = fresh_server(attempt.names), certificates_of(identity(VICTIM))
    told = pb.Advertisement.FromString(content(attempt.clients[LIAR].advertise()))
    told.leaf = leaf
    with pytest.raises(ProtocolError, match="is not signed by its key"):
        server.receive(LIAR, says_of_itself(attempt, told.SerializeToString(), other_encoding(issuer)))
    for name in attempt.names:
        server.receive(name, attempt.clients[name].advertise())
    (cohort,) = {content(message) for message in server.proceed().values()}
    assert pb.Cohort.FromString(cohort).issuers == [issuer]
    assert to_der(x509.load_der_x509_certificate(issuer)) == issuer


def test_an_issuer_in_other_bytes_is_the_same_issuer() -> None:
    """So a client that sends it takes part, and the others of its cohort find its certificate good."""
    attempt = Attempt()
    attempt.server, (_, issuer) = fresh_server(attempt.names), certificates_of(identity(LIAR))
    said = pb.Said.FromString(attempt.clients[LIAR].advertise())
    said.issuer = other_encoding(issuer)
    attempt.server.receive(LIAR, said.SerializeToString())
    for name in attempt.names:
        if name != LIAR:
            attempt.server.receive(name, attempt.clients[name].advertise())
    attempt.replies[Step.ADVERTISE] = {}
    assert attempt.run().unmasked() == attempt.expected()
