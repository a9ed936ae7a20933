"""The runs of apps: every letter is kept until it is settled, pushed to the agent it is for, answered once.

Lives on the event loop. A letter is acknowledged when its row is committed, an answer when its content is a
blob on disk and then its row is committed; what is here in memory is what those rows say. The contents of a
run lie in a folder of its own, which goes with the run.
"""

import asyncio
import logging
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from fedcore.crypto.files import sync_folder
from fedcore.errors import Interrupted, Overloaded, SpecError, UpdateRefused
from fedcore.faults import point
from fedcore.messages import Blob
from fedcore.server.blobs import Blobs
from fedcore.server.database import StoreUnavailable
from fedcore.server.letters import AppRun, Letters, Posted, ended
from fedcore.server.queues import Host, Queues
from fedcore.server.registry import Signal
from fedcore.wire.relay import MAX_CONTENT, Answer, AppLetter, LetterRef, Over

if TYPE_CHECKING:
    from fedcore.server.coordinator import Coordinator

log = logging.getLogger("fedcore.server")

MAX_LETTERS = 100_000  # of a run that are not settled
COMPANY = 0.1  # seconds for which an expired letter waits for others that share a transaction
AT_ONCE = 1000  # letters of such a transaction

Answers = asyncio.Queue[Answer | None]  # None ends them


@dataclass(eq=False)
class Book:
    """A run of an app that has not ended: its letters that are not settled, by id, and who hears the answers.

    blobs: of letters, by their ids; of what was deposited for letters to come, by `deposit`. noting: the
    letters of which an answer is being noted. begun: answers that may be committed or not, by letter.
    expired: letters to forget.
    """

    run: AppRun
    blobs: Blobs
    letters: dict[str, Posted]
    listeners: set[Answers] = field(default_factory=set)
    expired: list[str] = field(default_factory=list)
    noting: set[str] = field(default_factory=set)
    begun: dict[str, Answer] = field(default_factory=dict)
    keeping: Lock = field(default_factory=Lock)
    sending: asyncio.Lock = field(default_factory=asyncio.Lock)
    changed: Signal = field(default_factory=Signal)

    @contextmanager
    def listening(self) -> Iterator[Answers]:
        """Yield a queue of every answer that is not settled, and of each that comes."""
        answers = Answers()
        for letter in self.letters.values():
            if letter.state == "answered":
                answers.put_nowait(letter.answer)
        self.listeners.add(answers)
        self.changed.send()
        try:
            yield answers
        finally:
            self.listeners.discard(answers)
            self.changed.send()

    @contextmanager
    def there(self) -> Iterator[None]:
        """Raise UpdateRefused where the run's folder has gone with the run's end while the block used it."""
        try:
            yield
        except FileNotFoundError as error:
            raise ended(self.run.id, self.run.state) from error

    def tell(self, answer: Answer | None) -> None:
        """Have all who listen hear of an answer, or of the end."""
        for answers in self.listeners:
            answers.put_nowait(answer)

    def hold(self, letters: Iterable[Posted]) -> set[str]:
        """Let letters have their contents, and return which were not deposited; it blocks."""
        wanted = ((letter.ref.id, address) for letter in letters for address in addresses(letter.content))
        return {address for id, address in wanted if not self.blobs.hold(id, address)}

    def keep(self, ids: Iterable[str], deposits: Iterable[str] = ()) -> None:
        """Let letters have what they need now, and no more, and let go of deposits; it blocks."""
        for id in ids:
            with self.keeping:  # or another thread could bring back what this one lets go of
                known = (self.letters.get(id), self.begun.get(id))
                self.blobs.keep(id, addresses(*(each.content for each in known if each)))
        for address in deposits:
            self.blobs.keep(deposit(address), ())


def addresses(*contents: Blob | None) -> set[str]:
    """Return under which names contents lie."""
    return {content.sha256 for content in contents if content}


def deposit(address: str) -> str:
    """Return under which name a content is held for letters to come; no letter's id has a "+"."""
    return f"+{address}"


class Relay:
    """The runs of apps on one coordinator: `runs` are all of them, `books` those that have not ended."""

    def __init__(self, coordinator: "Coordinator", folder: Path) -> None:
        """Load what is not settled, and remove from `folder`, where contents lie, what nobody needs."""
        self.coordinator, self.folder = coordinator, folder
        self.store = Letters(coordinator.store.engine)
        self.runs = {run.id: run for run in self.store.runs()}
        self.unsettled = Counter[str]()  # bytes of each client's answers that nobody has settled
        self.places, self.queues = count(self.store.last() + 1), Queues(self.runs, self._expire)
        running = {run.id: dict[str, Posted]() for run in self.runs.values() if run.state == "running"}
        for letter in self.store.letters():
            running[letter.ref.run][letter.ref.id] = letter
        for path in folder.iterdir() if folder.exists() else ():
            if path.name not in running:
                shutil.rmtree(path)
        self.books = {run: self._book(self.runs[run], letters) for run, letters in running.items()}

    def _book(self, run: AppRun, letters: dict[str, Posted]) -> Book:
        held = {id: addresses(letter.content) for id, letter in letters.items()}
        book = Book(run, Blobs(self.folder / run.id, held), letters)
        for folder in (self.folder, self.folder.parent):  # no loss of power takes the book's own one
            sync_folder(folder)
        self._count(letters.values())
        return book

    def _count(self, letters: Iterable[Posted], sign: int = 1) -> None:
        for letter in letters:
            if letter.state == "answered" and letter.content:
                self.unsettled[letter.client] += sign * letter.content.size

    def start(self) -> None:
        """Queue up what waits, in the order of sending."""
        every = (letter for book in self.books.values() for letter in book.letters.values())
        waiting = (letter for letter in every if letter.state == "waiting")
        self.queues.add(sorted(waiting, key=lambda letter: letter.place))

    def dismiss(self) -> None:
        """End all streams; the runs stay as they are and go on at the next start."""
        self.queues.tell(None)
        for book in self.books.values():
            book.tell(None)

    def find(self, run_id: str) -> Book | None:
        """Return a run, None where it has ended; raises SpecError where there is none."""
        if run_id not in self.runs:
            raise SpecError(f"no run of an app has the id {run_id!r}; `fedcore run list` shows the ids")
        return self.books.get(run_id)

    def book(self, run_id: str) -> Book:
        """Return a run that has not ended; raises UpdateRefused if it has, SpecError where there is none."""
        if book := self.find(run_id):
            return book
        raise ended(run_id, self.runs[run_id].state)

    def letter(self, ref: LetterRef) -> tuple[Book, Posted]:
        """Return a letter that waits or is answered; raises UpdateRefused where nobody waits for it."""
        book = self.books.get(ref.run)
        letter = book.letters.get(ref.id) if book else None
        if not book or not letter or (letter.state == "waiting" and letter.expires <= time.time()):
            raise unawaited(ref)
        return book, letter

    def hosting(self, run: AppRun) -> list[str]:
        """Return the connected agents that host a run's app, by name."""
        hosts, barred = self.queues.hosts, self.coordinator.admission.barred
        return sorted(
            client
            for client, host in hosts.items()
            if host.hello.apps.get(run.app) == run.digest and client not in barred
        )

    def others(self, run: AppRun) -> int:
        """Return how many connected agents have other files of a run's app."""
        hosts = self.queues.hosts.values()
        return sum(host.hello.apps.get(run.app, run.digest) != run.digest for host in hosts)

    def described(self, run: AppRun) -> str:
        """Return how a run ended, or who takes part in it."""
        if run.id not in self.books:
            return run.detail
        said = [f"agents that host it: {len(self.hosting(run))}"]
        if others := self.others(run):
            said.append(f"with other files of that name: {others}")
        if not self.books[run.id].listeners:
            said.append("its ServerApp is not connected (if it has died: fedcore run stop)")
        return "; ".join(said)

    # --- what agents do

    def attend(self, host: Host) -> None:
        """Take in an agent's stream: push to it what has ended, and what waits."""
        for run in host.hello.runs:
            if run not in self.books:
                host.outbox.put_nowait(Over(run))
        self.queues.attend(host)
        self._moved(host)

    def leave(self, host: Host) -> None:
        """An agent's stream has ended."""
        self.queues.leave(host)
        self._moved(host)

    def _moved(self, host: Host) -> None:
        for book in self.books.values():
            if book.run.app in host.hello.apps:
                book.changed.send()

    def room(self, client: str, content: Blob) -> None:
        """Raise Overloaded where too much that a client has answered is not settled yet."""
        if (stored := self.unsettled[client]) + content.size > MAX_CONTENT:
            raise Overloaded(f"{stored} bytes that {client} has answered are not collected yet; try again")

    async def answer(self, book: Book, answer: Answer, path: Path | None) -> None:
        """Note an answer for good; its content is in a file of the book's blobs, which is taken.

        Raises UpdateRefused where nobody waits for it any more or another one was there first, Interrupted
        where another one is noted at the same time, or may have been without our knowing it.
        """
        ref = answer.ref
        if ref.id in book.noting or book.begun.get(ref.id, answer) != answer:
            if path:
                await asyncio.to_thread(path.unlink, missing_ok=True)
            raise Interrupted(f"another answer to {ref} is being noted; try again")
        book.noting.add(ref.id)
        try:
            if path:
                with book.there():
                    await asyncio.to_thread(book.blobs.adopt, path, ref.id)
            book.begun[ref.id] = answer
            noted = await self.coordinator.write(self.store.answer, answer)
            point("answer.noted")
            book.begun.pop(ref.id, None)
            if noted is None or noted.state == "settled":
                raise unawaited(ref)
            if (before := book.letters.get(ref.id)) and before.state == "waiting":
                book.letters[ref.id] = noted
                self._count([noted])
                self.queues.drop([before])
                book.tell(noted.answer)
            if noted.answer != answer:
                raise other(ref)
        finally:
            book.noting.discard(ref.id)
            await asyncio.to_thread(book.keep, [ref.id])

    # --- what operators do

    async def open(self, app: str, digest: str, name: str) -> AppRun:
        """Begin a run of an app."""
        run = AppRun(f"{name}-{secrets.token_hex(4)}", name, app, digest, "running", "", time.time())
        book = await asyncio.to_thread(self._book, run, {})
        await self.coordinator.write(self.store.open, run)
        self.runs[run.id], self.books[run.id] = run, book
        log.info("run of an app opened", extra={"run": run.id, "app": app})
        return run

    async def send(self, book: Book, letters: Sequence[AppLetter]) -> set[str]:
        """Take letters for good, each once, and push them; or return the contents that were not deposited.

        Raises Overloaded where too many are not settled, UpdateRefused where the run has ended.
        """
        run, now = book.run.id, time.time()
        async with book.sending:
            new = [
                Posted(each.ref, each.client, "waiting", place, now + each.ttl, each.head, each.content)
                for each, place in zip(letters, self.places, strict=False)
                if each.ref.id not in book.letters
            ]
            if len(book.letters) + len(new) > MAX_LETTERS:
                raise Overloaded(f"{run} has {len(book.letters)} letters to settle, at most {MAX_LETTERS}")
            if missing := await asyncio.to_thread(book.hold, new):
                return missing
            settled = await self.coordinator.write(self.store.send, run, new)
            point("letter.sent")
            if run not in self.books:
                raise ended(run, self.runs[run].state)
            new = [letter for letter in new if letter.ref.id not in settled]
            book.letters.update({letter.ref.id: letter for letter in new})
            self.queues.add(new)
            deposits = addresses(*(letter.content for letter in letters))
            await asyncio.to_thread(book.keep, settled, deposits)
        return set()

    async def settle(self, book: Book, ids: Collection[str]) -> None:
        """Forget letters, whether answered or not, but for their ids."""
        async with book.sending:
            await self.coordinator.write(self.store.settle, book.run.id, ids)
            found = [letter for id in ids if (letter := book.letters.pop(id, None))]
            self._count(found, -1)
            self.queues.drop(found, void=True)
            for id in ids:
                book.begun.pop(id, None)
            await asyncio.to_thread(book.keep, ids)

    async def end(self, run_id: str, state: str, detail: str) -> None:
        """End a run for good, if it has not ended, and forget all its letters."""
        run = await self.coordinator.write(self.store.end, run_id, state, detail)
        book = self.books.pop(run_id, None)
        if not book:
            return
        self.runs[run_id] = book.run = run
        self._count(book.letters.values(), -1)
        self.queues.drop(book.letters.values())
        self.queues.tell(Over(run_id))
        book.tell(None)
        book.changed.send()
        log.info("run of an app %s", run.state, extra={"run": run_id, "detail": run.detail})
        await asyncio.to_thread(shutil.rmtree, book.blobs.folder, ignore_errors=True)

    def _expire(self, letter: Posted) -> None:
        """Forget a letter whose time is over, and all that are over at about the same time at once."""
        book = self.books[letter.ref.run]
        self.queues.drop([letter], void=True)
        book.expired.append(letter.ref.id)
        if len(book.expired) == 1:
            self.coordinator.begin(self._forget(book))

    async def _forget(self, book: Book) -> None:
        await asyncio.sleep(COMPANY)
        while book.expired:
            several, book.expired = book.expired[:AT_ONCE], book.expired[AT_ONCE:]
            found = [book.letters[id] for id in several if id in book.letters and id not in book.noting]
            try:  # the others' answers came in time
                await self.settle(book, [each.ref.id for each in found if each.state == "waiting"])
            except StoreUnavailable as error:  # what comes for them is refused all the same
                log.warning("expired letters are kept", extra={"run": book.run.id, "reason": str(error)})


def unawaited(ref: LetterRef) -> UpdateRefused:
    """Return what is told of a letter that is settled, has expired, or was never sent."""
    return UpdateRefused(f"nobody waits for an answer to {ref}")


def other(ref: LetterRef) -> UpdateRefused:
    """Return what is told of a second answer that is not the first one."""
    return UpdateRefused(f"{ref} has another answer already")
