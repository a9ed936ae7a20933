"""Secure aggregation among virtual clients: the protocol of a deployment, in one process.

    federation = Federation()                          certificates, once a simulation
    masked = Masked(federation, spec, plan, parameters) keys and shares, before anybody trains
    masked.receive(round, clients, rows)               each update is masked, added and forgotten
    masked.finish(round)                               the masks are taken off the sum

Devices train first and advertise then, so that long training costs no drop-outs. Here it is the other way
round, so that there is never more than one masked vector; the sums are the same. A client whose update does
not pass its own check drops out after sharing.
"""

from collections.abc import Sequence
from functools import lru_cache

from fedcore.crypto.certificates import issue_intermediate, issue_leaf, issue_root, new_key
from fedcore.crypto.identity import Identity, utc_now
from fedcore.crypto.names import Name, Role
from fedcore.crypto.secagg import Client, Floors, Server, Step
from fedcore.crypto.trust import Trust
from fedcore.errors import UpdateRefused
from fedcore.layout import Parameters
from fedcore.messages import Blob, Plan, Verdict
from fedcore.spec import RunSpec
from fedcore.strategies.rounds import Round
from fedcore.strategies.terms import Rows, check
from fedcore.strategies.words import check_sum, encoded
from fedcore.wire.secure import config_of

NAME = "simulation"  # of the federation


class Federation:
    """An authority in memory, and the identities that it has certified; nothing of it is ever written."""

    def __init__(self) -> None:
        root_key, self._key, self._start = new_key(), new_key(), utc_now()
        self._root = issue_root(NAME, root_key, self._start)
        public = self._key.public_key()
        self._intermediate = issue_intermediate(NAME, public, self._root, root_key, self._start)
        self.identity = lru_cache(maxsize=None)(self._identity)
        self.trust = Trust(self.identity("coordinator", "main").root, NAME)

    def _identity(self, role: Role, name: str) -> Identity:
        """Return a participant's key and certificate, the same ones whenever they are asked for."""
        key = new_key()
        named = Name(NAME, role, name)
        leaf = issue_leaf(named, key.public_key(), self._intermediate, self._key, self._start)
        return Identity.verified(key, [leaf, self._intermediate], self._root, self._start)


class Masked:
    """A round whose updates are masked, from the clients' keys to the sum without masks."""

    def __init__(self, federation: Federation, spec: RunSpec, plan: Plan, parameters: Parameters) -> None:
        """Let the cohort of a plan agree on its masks; parameters: what the round starts from.

        Raises Failed where it is too small.
        """
        blob = Blob(parameters.digest, 0)
        config = config_of(NAME, plan.ref, spec, blob, len(plan.cohort), plan.sizes)
        identity, trust = federation.identity, federation.trust
        self.server = Server(config, identity("coordinator", "main"), trust, plan.cohort)
        self.clients = {
            name: Client(config, identity("client", name), trust, Floors()) for name in plan.cohort
        }
        for name, client in self.clients.items():
            self.server.receive(name, client.advertise())
        self._converse()

    def _converse(self) -> None:
        """Let the protocol run until masked words are due, or it is over."""
        while (told := self.server.proceed()) or self.server.step is not Step.DONE:
            for name in told.keys() & self.clients.keys():
                if answer := self.clients[name].receive(told[name]):
                    self.server.receive(name, answer)
            if self.server.step is Step.MASK:
                return

    def receive(self, round: Round, clients: Sequence[str], rows: Rows) -> None:
        """Have clients mask their updates and send them; one that its own check refuses is gone."""
        for client, update in zip(clients, rows.updates(), strict=True):
            try:
                check(round.plan, update)
            except UpdateRefused as error:
                round.settle(client, Verdict("refused", str(error)))
                del self.clients[client]
                continue
            words = encoded(round.plan, update)
            self.clients[client].mask(words.narrow, words.wide)
            round.sums.add_words(words)
            self.server.uploaded(client)
            round.settle(client, Verdict("folded"))

    def finish(self, round: Round) -> None:
        """Take the masks off the sum; raises Failed where too few are left, and UpdateRefused for no sum."""
        self._converse()
        words = round.sums.words
        self.server.unmask(words.narrow, words.wide)
        check_sum(round.plan, round.sums, len(self.server.included))
