"""The witness of a ledger: an agent shows its head, the authority answers what it remembers, both signed.

The authority's port asks callers for no certificate, because they enrol there; so who shows a ledger signs
what it says with the key of its certificate. The authority takes a new head only from one who knows the head
that it remembers. A ledger that was rolled back does not know it, and finds it in the answer.
"""

from dataclasses import dataclass

from cryptography import x509

from fedcore.chain import Head
from fedcore.crypto.identity import ENROL, Clock, Identity, utc_now
from fedcore.errors import ProtocolError
from fedcore.privacy.ledger import Receipt
from fedcore.wire.authority import DEADLINE, authority_at
from fedcore.wire.signing import opened, sign
from fedcore.wire.v1 import authority_pb2 as pb


@dataclass(frozen=True)
class Statement:
    """A client's word on its ledger: its head, and that of the last receipt."""

    ledger: str
    head: Head
    previous: Head


def head_to_wire(head: Head) -> pb.LedgerHead:
    """Return a head as a message."""
    return pb.LedgerHead(sequence=head.sequence, hash=head.hash)


def head_from_wire(message: pb.LedgerHead) -> Head:
    """Return the head; raises ProtocolError unless it can be one."""
    if len(message.hash) != 32 or message.sequence >= 2**63:
        raise ProtocolError(f"a head has {message.sequence} rows and {len(message.hash)} bytes of hash")
    return Head(message.sequence, message.hash)


def ask(identity: Identity, statement: Statement, clock: Clock = utc_now) -> Receipt:
    """Show a head to the authority of an identity, and return what it remembers.

    Raises FedcoreError where the authority does not answer, AuthenticationError where either side does not
    accept the other, and ProtocolError for an answer that makes no sense.
    """
    head, previous = head_to_wire(statement.head), head_to_wire(statement.previous)
    request = sign(identity, pb.LedgerStatement(ledger=statement.ledger, head=head, previous=previous))
    with authority_at(identity.authority, identity.name.federation, identity.root, ENROL) as authority:
        signed = authority.Witness(request, timeout=DEADLINE)
    said_by, answer = opened(pb.LedgerReceipt, signed, x509.load_pem_x509_certificate(identity.root), clock)
    about = (said_by.role, answer.name, answer.ledger)
    if about != ("authority", str(identity.name), statement.ledger):
        raise ProtocolError(f"the receipt of {said_by} is for {answer.name}'s ledger {answer.ledger}")
    return Receipt(answer.name, head_from_wire(answer.head), answer.time, signed.SerializeToString())
