"""Who takes part in the rounds of one run: waits until enough clients are there, and it is the run's turn."""

import asyncio
import time
from collections.abc import Callable, Collection
from contextlib import suppress

from fedcore.messages import Assignment, Blob, Ref
from fedcore.privacy.levels import ClientLevel
from fedcore.server.live import GRACE
from fedcore.server.offers import Offers
from fedcore.server.registry import Registry
from fedcore.server.store import Run


class Gathering:
    """The clients of one run, among all that are connected.

    offers: of a run whose clients are drawn from those who have accepted it, else None.
    """

    def __init__(self, registry: Registry, run: Run, say: Callable[[str], None]) -> None:
        """Wait for nobody yet. say: told what the run waits for."""
        self.registry, self.run, self.say = registry, run, say
        self.offers = Offers(registry) if isinstance(run.spec.privacy, ClientLevel) else None

    @property
    def wanted(self) -> str:
        """What clients must have, as text."""
        labels = [f"{name}={value}" for name, value in self.run.spec.cohort.labels.items()]
        return " and ".join([f"task {self.run.task}", *labels])

    def evaluators(self) -> list[str]:
        """Return the connected evaluators that fit the run, whoever they work for, by name."""
        return self.registry.eligible(self.run.task, self.run.digest, {}, evaluator=True)

    def clients(self) -> list[str]:
        """Return the connected clients that fit the run, whoever they work for, by name.

        Of a run that clients have to accept, those who have; the others are offered it.
        """
        connected = self.registry.eligible(self.run.task, self.run.digest, self.run.spec.cohort.labels)
        return self.offers.willing(connected, self.offer()) if self.offers else connected

    def offer(self) -> Assignment:
        """Return the question whether a device takes part in the run, at the price of all its rounds."""
        run, cohort = self.run, self.run.spec.cohort
        ref, blob = Ref(run.id, 1, 0, "offer"), Blob(run.initial, run.layout.nbytes)
        what = (run.task, run.digest, run.spec, run.layout.digest, blob)
        return Assignment(ref, *what, cohort.size, cohort.deadline)

    async def evaluator(self) -> list[str]:
        """Wait for the run's turn with an evaluator and return its name; nothing where none is connected."""
        with self.registry.turn(self.run.id):
            while evaluators := self.evaluators():
                changed = self.registry.changed.next
                self.registry.claim(self.run.id, evaluators)
                if free := self.registry.free(self.run.id, evaluators):
                    return free[:1]
                self.say("waiting for the evaluator, which works for another run")
                await changed.wait()
        return []

    async def gather(
        self, asked: int, fewest: int, rooted: bool = False, apart: Collection[str] = ()
    ) -> tuple[list[str], list[str]]:
        """Wait for enough clients and for the run's turn; return all that it may have now, by name.

        Enough are as many as are `asked`, once all have answered that were offered the run; or the `fewest`,
        once nobody has come, gone or answered for a tenth of the deadline, or they were there for all of it.
        Those that work for another run are waited for. rooted: so is an evaluator, which is returned too.
        apart: clients that are not asked, since they are at work for the run.
        """
        run, registry, since = self.run.id, self.registry, 0.0
        with registry.turn(run):
            while True:
                changed = registry.changed.next
                clients = [client for client in self.clients() if client not in apart]
                since = (since or time.monotonic()) if len(clients) >= fewest else 0.0
                patience = self.patience(len(clients) >= asked, since)
                evaluators = self.evaluators() if rooted else []
                ripe = patience == 0 and bool(evaluators) == rooted
                registry.claim(run, [*clients, *evaluators] if ripe else ())
                ready, trusted = registry.free(run, clients), registry.free(run, evaluators)[:1]
                most = min(asked, len(clients))
                if ripe and len(ready) >= most and bool(trusted) == rooted:
                    return ready, trusted
                if rooted and not evaluators:
                    self.say(f"waiting for an evaluator with task {self.run.task} and its root()")
                elif ripe:
                    self.say(f"waiting for clients that work for another run: {len(ready)} of {most}")
                else:
                    self.say(f"waiting for clients with {self.wanted}: {len(clients)} of {asked}")
                with suppress(TimeoutError):
                    async with asyncio.timeout(patience or None):
                        await changed.wait()

    async def regain(self, clients: Collection[str]) -> None:
        """Lease clients that work for the run; those who since a pause work for others are waited for."""
        run, registry = self.run.id, self.registry
        with registry.turn(run):
            registry.claim(run, clients)
            while len(free := registry.free(run, clients)) < len(clients):
                changed = registry.changed.next
                self.say(f"waiting for clients that work for another run: {len(free)} of {len(clients)}")
                await changed.wait()
            registry.lease(run, clients)

    def patience(self, all_here: bool, since: float) -> float | None:
        """Return for how many seconds more clients are waited for; None for as long as it takes.

        since: when enough were there for the first time, 0 where they are not.
        """
        if all_here and not (self.offers and self.offers.open):
            return 0.0
        if not since:
            return None
        deadline, quiet = self.run.spec.cohort.deadline, self.registry.quiet
        if self.offers:
            quiet = min(quiet, self.offers.quiet)
        return max(0.0, min(GRACE * deadline - quiet, deadline - (time.monotonic() - since)))
