from datetime import UTC, datetime, timedelta
from hashlib import sha256

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID

from fedcore.crypto import certificates
from fedcore.crypto.certificates import certificate_request, new_key, requested_key, verify_chain
from fedcore.crypto.names import Name
from fedcore.errors import AuthenticationError, ProtocolError

NOW = datetime(2030, 1, 1, tzinfo=UTC)
CLIENT = Name("fed", "client", "hospital-1")

Signer = tuple[x509.Certificate, x509.Certificate, certificates.Key]


def federation() -> Signer:
    """Return root, intermediate and the intermediate's key."""
    root_key, key = new_key(), new_key()
    root = certificates.issue_root("fed", root_key, NOW)
    return root, certificates.issue_intermediate("fed", key.public_key(), root, root_key, NOW), key


def leaf(signer: Signer, name: Name = CLIENT, now: datetime = NOW) -> x509.Certificate:
    return certificates.issue_leaf(name, new_key().public_key(), signer[1], signer[2], now)


def usages(certificate: x509.Certificate) -> set[x509.ObjectIdentifier]:
    return set(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)


def test_a_chain_says_who_it_is() -> None:
    signer = federation()
    assert verify_chain([leaf(signer), signer[1]], signer[0], NOW) == CLIENT


def test_only_coordinator_and_authority_can_be_servers() -> None:
    signer, server = federation(), ExtendedKeyUsageOID.SERVER_AUTH
    assert server not in usages(leaf(signer))
    assert server not in usages(leaf(signer, Name("fed", "operator", "alice")))
    assert server in usages(leaf(signer, Name("fed", "coordinator", "main")))
    assert server in usages(leaf(signer, Name("fed", "authority", "enrolment")))


@pytest.mark.parametrize("days", [-1, 31])
def test_a_certificate_holds_for_its_days_only(days: int) -> None:
    signer = federation()
    with pytest.raises(AuthenticationError, match="valid 2029-12-31 23:55 to 2030-01-31 00:00 UTC"):
        verify_chain([leaf(signer), signer[1]], signer[0], NOW + timedelta(days=days))


def test_another_root_and_a_missing_intermediate_are_refused() -> None:
    signer, other = federation(), federation()
    for chain, root in (([leaf(signer), signer[1]], other[0]), ([leaf(signer)], signer[0])):
        with pytest.raises(AuthenticationError, match="does not lead to the federation's root"):
            verify_chain(chain, root, NOW)


def test_a_participant_cannot_issue() -> None:
    root, intermediate, key = federation()
    client_key = new_key()
    client = certificates.issue_leaf(CLIENT, client_key.public_key(), intermediate, key, NOW)
    forged = leaf((root, client, client_key), Name("fed", "coordinator", "main"))
    with pytest.raises(AuthenticationError):
        verify_chain([forged, client, intermediate], root, NOW)


def test_no_leaf_outlives_the_intermediate() -> None:
    signer = federation()
    end = signer[1].not_valid_after_utc
    assert leaf(signer, now=end - timedelta(days=1)).not_valid_after_utc == end
    with pytest.raises(AuthenticationError, match="intermediate expired"):
        leaf(signer, now=end)


def test_a_fingerprint_is_what_openssl_prints() -> None:
    root = federation()[0]
    digest = sha256(certificates.to_der(root)).hexdigest().upper()
    assert certificates.fingerprint(root).replace(":", "") == digest


def test_a_request_proves_its_key() -> None:
    key = new_key()
    assert requested_key(certificate_request(key)) == key.public_key()


def test_a_request_signed_by_another_key_is_refused() -> None:
    request, other = certificate_request(new_key()), new_key()
    spki = serialization.PublicFormat.SubjectPublicKeyInfo
    mine = x509.load_der_x509_csr(request).public_key().public_bytes(serialization.Encoding.DER, spki)
    theirs = other.public_key().public_bytes(serialization.Encoding.DER, spki)
    with pytest.raises(ProtocolError, match="not signed by the key in it"):
        requested_key(request.replace(mine, theirs))


@pytest.mark.parametrize(
    "key", [ec.generate_private_key(ec.SECP384R1()), rsa.generate_private_key(65537, 2048)]
)
def test_only_the_curve_of_the_federation_is_taken(key: certificates.Key) -> None:
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    request = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)
    with pytest.raises(ProtocolError, match="expected ECDSA on P-256"):
        requested_key(request)


@pytest.mark.parametrize("request_der", [b"", b"x" * 300, certificate_request(new_key())[:-1]])
def test_a_malformed_request_is_refused(request_der: bytes) -> None:
    with pytest.raises(ProtocolError, match="malformed"):
        requested_key(request_der)


def test_a_certificate_of_another_version_is_malformed() -> None:
    der = bytearray(certificates.to_der(certificates.issue_root("clinics", new_key(), NOW)))
    der[der.index(b"\xa0\x03\x02\x01\x02") + 4] = 3  # there are versions 0 to 2
    with pytest.raises(ValueError, match="3 is not a valid X509 version"):
        certificates.from_der(bytes(der))
