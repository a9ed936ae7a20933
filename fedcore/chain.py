"""A chain of signed rows: none can be altered, removed or slipped in without its being found.

    hash of a row = SHA-256(hash of the row before || content), 32 zero bytes before the first

The content is canonical JSON, and each hash is signed with Ed25519 (RFC 8032). What no chain can show by
itself is that rows at its end are missing; for that, somebody else has to keep its head.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedcore.errors import FedcoreError

PURPOSE = b"fedcore chain 1\0"  # so that a signature made here means nothing elsewhere


class ChainBroken(FedcoreError):
    """A row that does not follow from the one before it, or that the chain's key has not signed."""


@dataclass(frozen=True)
class Head:
    """How many rows a chain has, and the hash (32 bytes) of the last."""

    sequence: int = 0
    hash: bytes = bytes(32)


@dataclass(frozen=True)
class Row:
    """One row: its number (from 1), its content (canonical JSON), hash (32 bytes), signature (64 bytes)."""

    sequence: int
    content: str
    hash: bytes
    signature: bytes

    @property
    def head(self) -> Head:
        """The head of the chain that ends here."""
        return Head(self.sequence, self.hash)


def next_row(head: Head, content: Mapping[str, Any], key: Ed25519PrivateKey) -> Row:
    """Return the row that follows `head`; raises ValueError for content that JSON cannot hold."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    hashed = _hash(head, text)
    return Row(head.sequence + 1, text, hashed, key.sign(PURPOSE + hashed))


def follow(head: Head, rows: Iterable[Row], key: Ed25519PublicKey) -> Iterator[tuple[Row, dict[str, Any]]]:
    """Yield rows that follow `head`, with their contents; raises ChainBroken at the first that does not."""
    for row in rows:
        if row.sequence != head.sequence + 1:
            raise ChainBroken(f"row {head.sequence + 1} is missing")
        if _hash(head, row.content) != row.hash:
            raise ChainBroken(f"row {row.sequence} has been altered: its hash is not that of its content")
        try:
            key.verify(row.signature, PURPOSE + row.hash)
        except InvalidSignature as error:
            raise ChainBroken(f"row {row.sequence} has been altered: its signature does not hold") from error
        yield row, json.loads(row.content)
        head = row.head


def _hash(before: Head, content: str) -> bytes:
    return sha256(before.hash + content.encode()).digest()
