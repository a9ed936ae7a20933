"""The sealed updates of one attempt: opened in memory to be judged, at rest until the round closes."""

from pathlib import Path

from fedcore.crypto import hpke
from fedcore.crypto.identity import Identity
from fedcore.errors import UpdateRefused
from fedcore.layout import Layout
from fedcore.messages import Plan, Update, Verdict
from fedcore.strategies.rounds import Round, fold
from fedcore.strategies.terms import check
from fedcore.wire import sealing


class Vault:
    """The only key that opens the updates of one attempt, and the files in which they lie.

    The key is nowhere but in this object, so with the process ends what can be learned from the disk.
    """

    def __init__(self, identity: Identity, plan: Plan, layout: Layout) -> None:
        """Make the key pair; `announced` is what clients are told of it."""
        self.plan, self.layout, self.federation = plan, layout, identity.name.federation
        self.key = hpke.new_key()
        self.announced = sealing.announce(identity, plan.ref, hpke.public_bytes(self.key))
        self.size = sealing.size(plan) + hpke.OVERHEAD
        self.files: dict[str, Path] = {}

    def _opened(self, client: str, path: Path) -> Update:
        bound = sealing.binding(self.federation, self.plan.ref, client, self.layout.digest)
        return sealing.unpacked(self.plan, sealing.unseal(self.key, path.read_bytes(), bound))

    def take(self, client: str, path: Path) -> Verdict:
        """Judge a sealed file, and keep it as it is if it counts."""
        self.files[client] = path
        try:
            check(self.plan, self._opened(client, path))
        except UpdateRefused as error:
            self.files.pop(client).unlink()
            return Verdict("refused", str(error))
        return Verdict("folded")

    def fold(self, round: Round) -> None:
        """Open what counts once more, and add it to a round that has closed."""
        for client in round.folded:
            fold(round, client, self._opened(client, self.files[client]))

    def clear(self) -> None:
        """Remove the files."""
        while self.files:
            self.files.popitem()[1].unlink()
