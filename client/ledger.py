"""The ledger of an agent's data: opened as agent.toml says, and shown to the authority that enrolled it."""

import asyncio
import logging
from collections.abc import Callable

from fedcore.chain import Head
from fedcore.client.config import Config
from fedcore.crypto.identity import Identity
from fedcore.errors import FedcoreError
from fedcore.privacy.ledger import Ledger, LedgerDamaged, Receipt, ledger_id
from fedcore.wire.witness import Statement, ask

log = logging.getLogger("fedcore.client")

AGAIN = 60.0  # seconds until a ledger is shown again, where its authority did not answer


def open_ledger(config: Config) -> Ledger | None:
    """Return the ledger of agent.toml, made if need be; None where none is kept.

    Raises ConfigError for a ledger that does not fit agent.toml, and LedgerDamaged.
    """
    path, terms = config.ledger, config.settings.ledger
    if path is None:
        return None
    return Ledger.open(path, terms.dataset, terms.unit, terms.epsilon, terms.delta)


def witnessed(ledger: Ledger, identity: Identity) -> Receipt:
    """Show the ledger to the authority of an identity, and return and keep the receipt.

    Raises LedgerDamaged where the authority has seen rows that are not in it, FedcoreError where it does not
    answer, AuthenticationError, and ProtocolError.
    """
    name, account = str(identity.name), ledger.account()
    for _ in range(2):  # again where an answer was lost: the authority remembers another of these rows
        last = ledger.receipt(name)
        previous = last.head if last else Head()
        receipt = ask(identity, Statement(ledger_id(account.dataset), account.head, previous))
        ledger.keep(receipt)
        if receipt.head.sequence >= account.head.sequence:
            break
    return receipt


async def show(ledger: Ledger, identity: Identity) -> bool:
    """Show a ledger, log what came of it, and tell whether there was an answer; without it, work goes on."""
    try:
        receipt = await asyncio.to_thread(witnessed, ledger, identity)
    except LedgerDamaged as error:  # which the ledger itself now says to every claim
        log.error("ledger refused", extra={"reason": str(error)})
    except FedcoreError as error:
        log.warning("ledger not witnessed", extra={"reason": str(error)})
        return False
    else:
        log.info("ledger witnessed", extra={"rows": receipt.head.sequence})
    return True


async def keep_showing(ledger: Ledger, current: Callable[[], Identity], reserved: asyncio.Event) -> None:
    """Show a ledger whenever `reserved` is set, and again later where the authority did not answer.

    current: says with which identity, for a certificate is renewed from time to time.
    """
    while await reserved.wait():
        reserved.clear()
        if not await show(ledger, current()):
            await asyncio.sleep(AGAIN)
            reserved.set()
