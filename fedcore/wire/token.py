"""The enrolment token: one string that a person passes on, and that pins the federation's root."""

import binascii
from base64 import urlsafe_b64decode, urlsafe_b64encode
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from cryptography import x509
from google.protobuf.message import DecodeError

from fedcore.crypto.certificates import from_der, to_der
from fedcore.crypto.names import Name
from fedcore.errors import AuthenticationError, ConfigError, SpecError
from fedcore.wire.address import parse_address
from fedcore.wire.v1 import authority_pb2

PREFIX = "fedcore-token-1."
SECRET_BYTES = 20


@dataclass(frozen=True)
class Token:
    """Where to enrol, as whom, and by which right; `str()` is the text that is passed on.

    address: HOST:PORT of the authority. root: the certificate to pin. secret: 160 random bits, single use.
    """

    address: str
    root: x509.Certificate
    name: Name
    secret: bytes = field(repr=False)

    def __str__(self) -> str:
        message = authority_pb2.Token(
            address=self.address, root=to_der(self.root), name=str(self.name), secret=self.secret
        )
        return PREFIX + urlsafe_b64encode(message.SerializeToString()).decode().rstrip("=")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the token that `str()` wrote; raises AuthenticationError, which never shows the text."""
        text = text.strip()
        body = text.removeprefix(PREFIX)
        try:
            if body == text:
                raise ValueError(f"it does not begin with {PREFIX!r}")
            padded = body.encode("ascii") + b"=" * (-len(body) % 4)
            message = authority_pb2.Token.FromString(urlsafe_b64decode(padded))
            if len(message.secret) != SECRET_BYTES:
                raise ValueError(f"its secret has {len(message.secret)} bytes instead of {SECRET_BYTES}")
            root = from_der(message.root)
            return cls(parse_address(message.address), root, Name.parse(message.name), message.secret)
        except (ValueError, binascii.Error, DecodeError, SpecError) as error:
            raise AuthenticationError(
                f"the token ({len(text)} characters) is malformed: {error}; "
                f"copy the whole line that 'fedcore authority token' printed"
            ) from error


def read_token(text: str) -> str:
    """Return a token given as it is or as @FILE; raises ConfigError where the file cannot be read."""
    if not text.startswith("@"):
        return text
    try:
        return Path(text[1:]).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError(
            f"{text}: {error.strerror}; 'fedcore authority token --out FOLDER' writes one"
        ) from error
