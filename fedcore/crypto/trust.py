"""Whom a participant believes: certificates that lead to the federation's root, each verified once."""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec

from fedcore.crypto.certificates import PublicKey, from_der, leaf_name, verify_chain
from fedcore.crypto.identity import Clock, utc_now
from fedcore.crypto.names import Name
from fedcore.errors import AuthenticationError

KNOWN = 10_000  # certificates that are remembered


@dataclass(frozen=True)
class Peer:
    """Who a certificate is about, the key that its holder signs with, and who issued it (X.509, DER)."""

    name: Name
    key: PublicKey
    issuer: bytes


@dataclass(frozen=True)
class _Known:
    """A certificate that was verified, and the times between which it and its issuer hold."""

    peer: Peer
    start: datetime
    end: datetime


class Trust:
    """The certificates of a federation, under the root that is pinned.

    root: PEM, as an identity holds it. A round shows the certificates of its whole cohort to every client,
    mostly the same ones as the round before. So the chain of an issuer's first leaf is verified as TLS would,
    each other leaf by its issuer's signature, and no certificate twice.
    """

    def __init__(self, root: bytes, federation: str, clock: Clock = utc_now) -> None:
        self._root = x509.load_pem_x509_certificate(root)
        self._federation = federation
        self._clock = clock
        self._issuers: dict[bytes, x509.Certificate] = {}
        self._known: dict[bytes, _Known] = {}

    def peer(self, leaf: bytes, issuers: Collection[bytes]) -> Peer:
        """Return whose a certificate (DER) is, issued by one of `issuers` (DER).

        Raises AuthenticationError where it is malformed, does not hold now, does not lead to the root, or is
        about somebody in another federation.
        """
        now = self._clock()
        known = self._known.get(leaf)
        if known is None or known.peer.issuer not in issuers:  # of one certificate there may be two encodings
            try:
                known = self._verified(from_der(leaf), issuers, now)
            except ValueError as error:
                raise AuthenticationError(f"the certificate is malformed: {error}") from error
            if len(self._known) >= KNOWN:
                self._known.clear()
            self._known[leaf] = known
        if not known.start <= now <= known.end:
            raise AuthenticationError(
                f"the certificate of {known.peer.name} holds from {known.start:%Y-%m-%d %H:%M} to "
                f"{known.end:%Y-%m-%d %H:%M} UTC, and it is {now:%Y-%m-%d %H:%M} UTC"
            )
        return known.peer

    def _verified(self, leaf: x509.Certificate, issuers: Collection[bytes], now: datetime) -> _Known:
        """Return what a certificate says; raises AuthenticationError, or ValueError if it is malformed."""
        der, issuer = self._issuer(leaf, issuers, now)
        name, key = leaf_name(leaf), leaf.public_key()
        if name.federation != self._federation:
            raise AuthenticationError(f"{name} is of another federation than {self._federation}")
        assert isinstance(key, ec.EllipticCurvePublicKey)  # the authority issues nothing else
        start = max(leaf.not_valid_before_utc, issuer.not_valid_before_utc)
        return _Known(Peer(name, key, der), start, min(leaf.not_valid_after_utc, issuer.not_valid_after_utc))

    def _issuer(
        self, leaf: x509.Certificate, issuers: Collection[bytes], now: datetime
    ) -> tuple[bytes, x509.Certificate]:
        """Return who issued a leaf, verified up to the root, as it came and parsed."""
        for der in issuers:
            issuer = self._issuers.get(der) or from_der(der)
            try:
                leaf.verify_directly_issued_by(issuer)
            except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
                continue
            if der not in self._issuers:
                verify_chain([leaf, issuer], self._root, now)
                self._issuers[der] = issuer
            return der, issuer
        raise AuthenticationError("the certificate was issued by none of the authorities that came with it")
