"""Renewal: a certificate is replaced at two thirds of its life, with a new key, while its process goes on.

The request is signed with the key of the present certificate, for the authority's port asks callers for none.
"""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from pathlib import Path

from cryptography import x509

from fedcore.crypto.certificates import certificate_request
from fedcore.crypto.identity import ENROL, Clock, Identity, requesting, utc_now
from fedcore.errors import AuthenticationError, FedcoreError
from fedcore.wire.authority import DEADLINE, authority_at, chain_of
from fedcore.wire.signing import sign
from fedcore.wire.v1.authority_pb2 import RenewalRequest

log = logging.getLogger("fedcore.renewal")

LONGEST_SLEEP = 3600.0  # seconds: the loop's clock stands still while a machine is suspended
EXPIRED = 60.0  # seconds between looks for a certificate that somebody has enrolled meanwhile


def renew(folder: Path, identity: Identity, clock: Clock = utc_now) -> Identity:
    """Replace key and certificate of the identity in `folder`, and return the new identity.

    One that another process has renewed meanwhile is only read. Safe to repeat after a crash or a lost reply.
    Raises AuthenticationError for a certificate that has expired or was revoked, ConfigError for a damaged
    folder, ProtocolError for a malformed reply, and FedcoreError where the authority cannot be reached.
    """
    with requesting(folder, identity.passphrase, fresh=True) as key:
        present = Identity.load(folder, clock, identity.passphrase)
        if present.renewal > clock():
            return present
        message = sign(present, RenewalRequest(certificate_request=certificate_request(key)))
        name, address = present.name, present.authority
        with authority_at(address, name.federation, present.root, ENROL) as authority:
            reply = authority.Renew(message, timeout=DEADLINE)
        root = x509.load_pem_x509_certificate(present.root)
        chain = chain_of(reply, address)
        renewed = Identity.verified(key, chain, root, clock(), address, present.passphrase)
        if renewed.name != name:
            raise AuthenticationError(f"the authority's certificate is for {renewed.name}, not {name}")
        renewed.save(folder)
    log.info("certificate renewed", extra={"identity": name, "until": renewed.not_after})
    return renewed


async def keep_renewed(folder: Path, identity: Identity, use: Callable[[Identity], Awaitable[None]]) -> None:
    """Renew an identity whenever it is due, for ever, and hand each new one to `use`.

    While the authority cannot be reached, the old certificate goes on and the attempt is repeated.
    """
    while True:
        if (wait := (identity.renewal - utc_now()).total_seconds()) > 0:
            await asyncio.sleep(min(wait, LONGEST_SLEEP))
            continue
        try:
            identity = await asyncio.to_thread(renew, folder, identity)
        except (FedcoreError, OSError) as error:
            left = (identity.not_after - utc_now()).total_seconds()
            # Spread, so that devices which were enrolled together do not come back together.
            pause = min(max(left / 8, 1.0), LONGEST_SLEEP) if left > 0 else EXPIRED
            pause *= random.uniform(0.5, 1.0)
            facts = {"reason": str(error), "until": identity.not_after, "wait_s": round(pause, 1)}
            log.warning("certificate not renewed", extra=facts)
            await asyncio.sleep(pause)
        else:
            await use(identity)


def renewed_if_due(folder: Path, identity: Identity) -> Identity:
    """Return the identity in `folder`, renewed where it is due and the authority can be reached."""
    if identity.renewal > utc_now():
        return identity
    try:
        return renew(folder, identity)
    except (FedcoreError, OSError) as error:
        # The reason is in the text, for a command's log shows nothing else.
        log.warning("certificate, valid until %s, not renewed: %s", identity.not_after, error)
        return identity
