"""The certificates of a federation: an offline root, an online intermediate, leaves that live for days.

X.509 (RFC 5280) with ECDSA on P-256, because gRPC's TLS takes no Ed25519. All functions are pure: the
time comes in as an argument, and files are other modules' business.
"""

from collections.abc import Sequence
from datetime import datetime, timedelta
from hashlib import sha256

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from fedcore.crypto.names import SERVERS, Name, server_name
from fedcore.errors import AuthenticationError, ProtocolError, SpecError

ROOT_LIFETIME = timedelta(days=3650)
INTERMEDIATE_LIFETIME = timedelta(days=730)
LEAF_LIFETIME = timedelta(days=30)
CLOCK_SKEW = timedelta(minutes=5)  # devices' clocks differ; a certificate must not be refused when it is new

Key = ec.EllipticCurvePrivateKey
PublicKey = ec.EllipticCurvePublicKey


def new_key() -> Key:
    """Return a new P-256 private key from the operating system's entropy."""
    return ec.generate_private_key(ec.SECP256R1())


def key_to_pem(key: Key, passphrase: bytes = b"") -> bytes:
    """Return the private key as PKCS8, encrypted where there is a passphrase."""
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase:
        encryption = serialization.BestAvailableEncryption(passphrase)
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


def key_from_pem(pem: bytes, passphrase: bytes = b"") -> Key:
    """Return the P-256 private key in a PKCS8 file; `passphrase` counts only where it is encrypted.

    Raises AuthenticationError for a passphrase that is missing or wrong, and ValueError for anything else
    than such a key.
    """
    encrypted = b"BEGIN ENCRYPTED PRIVATE KEY" in pem
    if encrypted and not passphrase:
        raise AuthenticationError("the key is encrypted, and there is no passphrase")
    try:
        key = serialization.load_pem_private_key(pem, password=passphrase if encrypted else None)
    except ValueError as error:
        if encrypted and "password" in str(error):
            raise AuthenticationError("the passphrase does not open the key") from error
        raise
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ValueError(f"expected an ECDSA key on P-256, not {type(key).__name__}")
    return key


def to_pem(*certificates: x509.Certificate) -> bytes:
    """Return certificates as PEM, one after the other."""
    return b"".join(c.public_bytes(serialization.Encoding.PEM) for c in certificates)


def to_der(certificate: x509.Certificate) -> bytes:
    """Return a certificate as DER."""
    return certificate.public_bytes(serialization.Encoding.DER)


def from_der(der: bytes) -> x509.Certificate:
    """Return the certificate in DER, which may come from a peer; raises ValueError for anything else."""
    try:
        return x509.load_der_x509_certificate(der)
    except x509.InvalidVersion as error:
        raise ValueError(str(error)) from error


def fingerprint(certificate: x509.Certificate) -> str:
    """Return the SHA-256 of a certificate as `openssl x509 -fingerprint -sha256` writes it."""
    return certificate.fingerprint(hashes.SHA256()).hex(":").upper()


def _subject(federation: str, common_name: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, federation),
            x509.NameAttribute(NameOID.COMMON_NAME, common_name),
        ]
    )


def _key_usage(ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        key_cert_sign=ca,
        crl_sign=ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _builder(
    subject: x509.Name, public_key: PublicKey, path_length: int | None, start: datetime, end: datetime
) -> x509.CertificateBuilder:
    """Return what every certificate has; `path_length` is None for a leaf."""
    ca = path_length is not None
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start - CLOCK_SKEW)
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(ca=ca, path_length=path_length), critical=True)
        .add_extension(_key_usage(ca), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _sign(
    builder: x509.CertificateBuilder, issuer: x509.Name, issuer_public: PublicKey, key: Key
) -> x509.Certificate:
    signed_by = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_public)
    return builder.issuer_name(issuer).add_extension(signed_by, critical=False).sign(key, hashes.SHA256())


def issue_root(federation: str, key: Key, now: datetime) -> x509.Certificate:
    """Return the self-signed certificate that everyone in the federation pins."""
    subject = _subject(federation, "fedcore root")
    builder = _builder(subject, key.public_key(), 1, now, now + ROOT_LIFETIME)
    return _sign(builder, subject, key.public_key(), key)


def issue_intermediate(
    federation: str, public_key: PublicKey, root: x509.Certificate, root_key: Key, now: datetime
) -> x509.Certificate:
    """Return the certificate of the key that signs leaves, so that the root's key can be taken offline."""
    subject = _subject(federation, "fedcore intermediate")
    builder = _builder(subject, public_key, 0, now, now + INTERMEDIATE_LIFETIME)
    return _sign(builder, root.subject, root_key.public_key(), root_key)


def issue_leaf(
    name: Name,
    public_key: PublicKey,
    issuer: x509.Certificate,
    issuer_key: Key,
    now: datetime,
    lifetime: timedelta = LEAF_LIFETIME,
) -> x509.Certificate:
    """Return the certificate of one participant: its name as URI, and what its role may do in TLS.

    Only coordinator and authority may act as servers, each under the DNS name of its role, so no client
    can pose as one. The authority's own leaf lives as long as the issuer: its key never leaves the
    process that holds the issuer's. Raises AuthenticationError where the issuer has expired.
    """
    if now >= issuer.not_valid_after_utc:
        raise AuthenticationError(
            f"the authority's intermediate expired at {issuer.not_valid_after_utc:%Y-%m-%d %H:%M} UTC, "
            f"so it can issue nothing; its operator has to run 'fedcore authority renew'"
        )
    usages = [ExtendedKeyUsageOID.CLIENT_AUTH]
    alternatives: list[x509.GeneralName] = [x509.UniformResourceIdentifier(str(name))]
    if name.role in SERVERS:
        usages.append(ExtendedKeyUsageOID.SERVER_AUTH)
        alternatives.append(x509.DNSName(server_name(name.federation, name.role)))
    end = issuer.not_valid_after_utc
    if name.role != "authority":
        end = min(now + lifetime, end)
    builder = (
        _builder(_subject(name.federation, name.name), public_key, None, now, end)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
    )
    return _sign(builder, issuer.subject, issuer_key.public_key(), issuer_key)


def renewal_time(certificate: x509.Certificate) -> datetime:
    """Return when to replace a certificate: at two thirds of its life (UTC)."""
    start, end = certificate.not_valid_before_utc + CLOCK_SKEW, certificate.not_valid_after_utc
    return start + (end - start) * 2 / 3


def certificate_request(key: Key) -> bytes:
    """Return a PKCS10 request (DER) that proves possession of the key; it asks for no name."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def requested_key(request: bytes) -> PublicKey:
    """Return the public key of a PKCS10 request (DER), and nothing else of what it says.

    Raises ProtocolError where it is malformed, not signed by its own key, or not on P-256.
    """
    try:
        parsed = x509.load_der_x509_csr(request)
        key, proven = parsed.public_key(), parsed.is_signature_valid
    except (ValueError, TypeError, InvalidSignature) as error:
        raise ProtocolError(f"the certificate request is malformed: {error}") from error
    if not proven:
        raise ProtocolError("the certificate request is not signed by the key in it")
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ProtocolError(f"the certificate request holds {type(key).__name__}, expected ECDSA on P-256")
    return key


def key_digest(public_key: PublicKey) -> bytes:
    """Return the SHA-256 of a public key (its SubjectPublicKeyInfo, DER)."""
    info = serialization.PublicFormat.SubjectPublicKeyInfo
    return sha256(public_key.public_bytes(serialization.Encoding.DER, info)).digest()


def serial_of(certificate: x509.Certificate) -> str:
    """Return a certificate's serial number as 40 hexadecimal digits: its 160 bits fit no 64-bit integer."""
    return f"{certificate.serial_number:040x}"


def leaf_name(leaf: x509.Certificate) -> Name:
    """Return the name in a certificate's URI; raises AuthenticationError unless there is exactly one."""
    try:
        extension = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        (uri,) = extension.value.get_values_for_type(x509.UniformResourceIdentifier)
        return Name.parse(uri)
    except (x509.ExtensionNotFound, ValueError, SpecError) as error:
        raise AuthenticationError(f"the certificate names nobody in a federation: {error}") from error


def verify_chain(chain: Sequence[x509.Certificate], root: x509.Certificate, now: datetime) -> Name:
    """Return the name of a participant's chain (leaf, then intermediates) that ends in `root`.

    Raises AuthenticationError where signatures, dates, key usages or the name do not hold.
    """
    leaf, *intermediates = chain
    verifier = PolicyBuilder().store(Store([root])).time(now).build_client_verifier()
    try:
        verifier.verify(leaf, intermediates)
    except VerificationError as error:
        raise AuthenticationError(
            f"the certificate (valid {leaf.not_valid_before_utc:%Y-%m-%d %H:%M} to "
            f"{leaf.not_valid_after_utc:%Y-%m-%d %H:%M} UTC) does not lead to the federation's root "
            f"{fingerprint(root)} at {now:%Y-%m-%d %H:%M} UTC: {error}"
        ) from error
    return leaf_name(leaf)
