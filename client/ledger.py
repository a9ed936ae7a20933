"""The ledger of an agent's data: opened as agent.toml says, and shown to the authority that enrolled it."""

import asyncio
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from fedcore.chain import Head
from fedcore.client.config import Config
from fedcore.crypto.files import write_atomically
from fedcore.crypto.identity import Identity
from fedcore.errors import FedcoreError
from fedcore.privacy.ledger import Ledger, LedgerDamaged, Receipt, ledger_id
from fedcore.wire.witness import Statement, WitnessUnreachable, ask

log = logging.getLogger("fedcore.client")

AGAIN = 60.0  # seconds until a ledger is shown again, where its authority did not answer
AUTHORITY = "authority"  # in the identity's folder: HOST:PORT


def open_ledger(config: Config) -> Ledger | None:
    """Return the ledger of agent.toml, made if need be; None where none is kept.

    Raises ConfigError for a ledger that does not fit agent.toml, and LedgerDamaged.
    """
    path, terms = config.ledger, config.settings.ledger
    if path is None:
        return None
    return Ledger.open(path, terms.dataset, terms.unit, terms.epsilon, terms.delta)


def remember_authority(folder: Path, address: str) -> None:
    """Keep the address of the authority beside the identity that it has certified."""
    write_atomically(folder / AUTHORITY, f"{address}\n".encode(), 0o644)


@dataclass(frozen=True)
class Witness:
    """The authority at `address` (HOST:PORT, empty if unknown), as this identity talks to it."""

    address: str
    identity: Identity

    @classmethod
    def of(cls, folder: Path, identity: Identity) -> Self:
        """Return the witness of the identity in a folder."""
        path = folder / AUTHORITY
        return cls(path.read_text(encoding="utf-8").strip() if path.exists() else "", identity)

    def show(self, ledger: Ledger) -> Receipt:
        """Show the ledger, and return and keep the receipt.

        Raises LedgerDamaged where the authority has seen rows that are not in it, WitnessUnreachable,
        AuthenticationError, and ProtocolError.
        """
        if not self.address:
            raise WitnessUnreachable(
                "the authority's address is not known; enrol again with 'fedcore client enroll'"
            )
        name, account = str(self.identity.name), ledger.account()
        for _ in range(2):  # again where an answer was lost: the authority remembers another of these rows
            last = ledger.receipt(name)
            previous = last.head if last else Head()
            statement = Statement(ledger_id(account.dataset), account.head, previous)
            receipt = ask(self.address, self.identity, statement)
            ledger.keep(receipt)
            if receipt.head.sequence >= account.head.sequence:
                break
        return receipt


async def show(ledger: Ledger, witness: Witness) -> bool:
    """Show a ledger, log what came of it, and tell whether there was an answer; without it, work goes on."""
    try:
        receipt = await asyncio.to_thread(witness.show, ledger)
    except LedgerDamaged as error:  # which the ledger itself now says to every claim
        log.error("ledger refused", extra={"reason": str(error)})
    except FedcoreError as error:
        log.warning("ledger not witnessed", extra={"reason": str(error)})
        return False
    else:
        log.info("ledger witnessed", extra={"rows": receipt.head.sequence})
    return True


async def keep_showing(ledger: Ledger, witness: Witness, reserved: asyncio.Event) -> None:
    """Show a ledger whenever `reserved` is set, and again later where the authority did not answer."""
    while await reserved.wait():
        reserved.clear()
        if not await show(ledger, witness):
            await asyncio.sleep(AGAIN)
            reserved.set()
