"""The apps that a device hosts: letters come, an app answers them in a process of its own, answers go back.

One letter at a time, the oldest first. An answer and the app's new state are on the disk, as one file, before
the answer leaves (see `fedcore.client.letters`). What nobody has answered when the agent stops is delivered
again. What an app says, and the message of an error that it raises, are between its two sides; a letter that
the app does not get is answered with an error that says why, in Flower's terms.
"""

import asyncio
import json
import logging
import time
from contextlib import aclosing
from importlib.util import find_spec

from fedcore.client import relay
from fedcore.client.config import Config
from fedcore.client.connection import STOOD, Retries
from fedcore.client.letters import Letters, spooled
from fedcore.client.policy import Policy
from fedcore.client.process import WorkerProcess, WorkFailed
from fedcore.client.session import ConnectionLost
from fedcore.client.transfers import Transfers
from fedcore.errors import ConfigError, FedcoreError, MissingExtra, ProtocolError, UpdateRefused
from fedcore.faults import point
from fedcore.wire.relay import (
    APP,
    MAX_APPS,
    MAX_RUNS,
    Answer,
    HostHello,
    Letter,
    LetterRef,
    Over,
    Void,
    to_host,
)

log = logging.getLogger("fedcore.client")

HOSTED = "fedcore.flower.hosted"
UNKNOWN, UNAVAILABLE, CRASHED = 0, 5, 8  # of Flower's ErrorCode


def hosts_of(config: Config) -> dict[str, WorkerProcess]:
    """Return the process that will host each app, not started yet.

    Raises ConfigError as `Config.apps` does and for what no coordinator takes, and MissingExtra where Flower
    is not installed.
    """
    if unfit := [name for name in config.apps if not APP.fullmatch(name)]:
        expected = 'expected "PUBLISHER/NAME" of letters, digits and . _ -'
        raise ConfigError(f"{config.place('flower', 'apps', unfit[0])}: {expected}")
    if (count := len(config.apps)) > MAX_APPS:
        raise ConfigError(f"{config.place('flower', 'apps')}: {count} apps, expected at most {MAX_APPS}")
    if config.apps and find_spec("flwr") is None:
        raise MissingExtra("flwr", "flower")
    memory = config.settings.worker.memory
    return {
        name: WorkerProcess(config.folder, {name: str(folder)}, memory, HOSTED)
        for name, folder in config.apps.items()
    }


async def described(config: Config, name: str, host: WorkerProcess) -> str:
    """Return the digest of an app as the process that hosts it has imported it; raises ConfigError."""
    try:
        return (await host.describe())[name]
    except WorkFailed as error:
        raise ConfigError(f"{config.place('flower', 'apps', name)}: {error}") from error


def digest_of(config: Config, name: str) -> str:
    """Return the digest of an app that is imported for this alone; raises ConfigError, as the agent would."""

    async def ask(host: WorkerProcess) -> str:
        try:
            return await described(config, name, host)
        finally:
            await host.stop()

    return asyncio.run(ask(hosts_of(config)[name]))


class Hosting:
    """The hosts of an agent's apps, and the letters that wait for them."""

    def __init__(self, config: Config, client: str) -> None:
        """Host what agent.toml allows, as the client of that name; raises as `hosts_of` does."""
        self.config, self.client = config, client
        self.letters, self.hosts = Letters(config.state / "apps"), hosts_of(config)
        self.served: dict[str, str] = {}  # run -> app, since this agent has started
        self.waiting: dict[LetterRef, tuple[Letter, float]] = {}  # with its deadline, the oldest first
        self.came = asyncio.Event()
        self.current: tuple[Letter, asyncio.Task[None]] | None = None

    async def describe(self) -> None:
        """Start the hosts, so that the first letter finds its app imported; raises ConfigError."""
        digests = {name: await described(self.config, name, host) for name, host in self.hosts.items()}
        self.policy = Policy(self.config, digests)

    async def run(self, transfers: Transfers) -> None:
        """Hear and answer letters until cancelled; a lost connection is sought again, for ever."""
        self.transfers = transfers
        answering = asyncio.create_task(self._answer_all())
        try:
            retries = Retries("relay lost")
            while True:
                started = time.monotonic()
                try:
                    await self._attend()
                except ConnectionLost as error:
                    if time.monotonic() - started >= STOOD:
                        retries.attempt = 0
                    await asyncio.sleep(max(retries.after(str(error)), transfers.connection.pause))
        finally:
            answering.cancel()
            await asyncio.wait([answering])

    async def stop(self) -> None:
        """End the hosts."""
        for host in self.hosts.values():
            await host.stop()

    async def _attend(self) -> None:
        hello = HostHello(self.policy.digests, tuple(self.letters.runs()[:MAX_RUNS]))
        self.waiting.clear()  # all that is not answered comes again
        async with aclosing(relay.attend(self.transfers.session, hello)) as messages:
            async for message in messages:
                try:
                    await self._hear(to_host(message))
                except ProtocolError as error:
                    log.warning("letter refused", extra={"reason": str(error)})

    async def _hear(self, message: Letter | Over | Void) -> None:
        match message:
            case Letter(ref) if not (self.current and self.current[0].ref == ref):
                self.waiting[ref] = message, time.monotonic() + message.ttl
                self.came.set()
            case Void(ref):  # an app that is at it comes to its end, as Flower has it
                self.waiting.pop(ref, None)
            case Over(run):
                await self._end(run)

    async def _end(self, run: str) -> None:
        """Forget a run; an app that is at a letter of it is ended."""
        self.waiting = {ref: waiting for ref, waiting in self.waiting.items() if ref.run != run}
        if self.current and self.current[0].ref.run == run:
            task = self.current[1]
            task.cancel()
            await asyncio.wait([task])
        await asyncio.to_thread(self.letters.forget, run)
        app = self.served.pop(run, None)
        if app and not (self.current and self.current[0].app == app):
            await self.hosts[app].stop()  # so that the next run finds nothing of this one's
        log.info("run over", extra={"run": run})

    async def _answer_all(self) -> None:
        while await self.came.wait():
            while self.waiting:
                letter, deadline = self.waiting.pop(next(iter(self.waiting)))
                task = asyncio.create_task(self._answer(letter, deadline))
                self.current = letter, task
                try:
                    await asyncio.wait([task])
                finally:
                    self.current = None
                    task.cancel()
            self.came.clear()

    async def _answer(self, letter: Letter, deadline: float) -> None:
        """Answer a letter and send that."""
        ref, path, session = letter.ref, self.letters.newest(letter.ref.run), self.transfers.session
        started, event, reason = time.perf_counter(), "answered", {}
        try:
            answer = await self._answered(letter, deadline)
            await self.transfers.persist(lambda left: relay.reply(session, answer, path, left), deadline)
            point("agent.letter.sent")
        except FedcoreError as error:  # nobody waits for it, or the coordinator was away for too long
            event, reason = "not answered", {"reason": str(error)}
        seconds = round(time.perf_counter() - started, 6)
        log.info(event, extra={"ref": ref, "app": letter.app, "seconds": seconds, **reason})
        self.transfers.state.record(ref, event, **reason)

    async def _answered(self, letter: Letter, deadline: float) -> Answer:
        """Return the answer that lies in the spool, where the app puts it, or an error that says why not.

        What fails here never ends the agent.
        """
        ref, path = letter.ref, self.letters.newest(letter.ref.run)
        try:
            answer = await asyncio.to_thread(spooled, path)
            if answer is None or answer.letter != ref.id:
                self.policy.known("app", letter.app, letter.digest, "flower", "apps")
                self.policy.keep_hours()
                await self._ask(letter, await self._content(letter, deadline), deadline)
                point("agent.letter.spooled")
                answer = await asyncio.to_thread(spooled, path)
                assert answer
            return Answer(ref, answer.head, answer.content)
        except UpdateRefused as error:
            return failed(ref, UNAVAILABLE, str(error))
        except WorkFailed as error:
            log.warning("letter failed", extra={"ref": ref, "reason": str(error)})
            return failed(ref, CRASHED, error.public)
        except Exception as error:
            log.exception("letter failed", extra={"ref": ref})
            return failed(ref, UNKNOWN, f"the agent failed: {type(error).__name__}")

    async def _content(self, letter: Letter, deadline: float) -> str:
        """Return the path of a letter's content, fetched unless it is here; "" where it has none."""
        if (blob := letter.content) is None:
            return ""
        path = await asyncio.to_thread(self.letters.content, letter.ref.run, blob)
        if not path.exists():
            session = self.transfers.session
            await self.transfers.persist(
                lambda left: relay.take(session, letter.ref, blob, path, left), deadline
            )
        return str(path)

    async def _ask(self, letter: Letter, content: str, deadline: float) -> None:
        """Have the app answer a letter into the spool; raises as `WorkerProcess.work` does."""
        self.served[letter.ref.run] = letter.app
        await self.hosts[letter.app].work(
            deadline - time.monotonic(),
            app=letter.app,
            digest=letter.digest,
            client=self.client,
            node=self.config.settings.flower.node,
            letter=letter.ref.id,
            head=letter.head.hex(),
            content=content,
            newest=str(self.letters.newest(letter.ref.run)),
        )


def failed(ref: LetterRef, code: int, reason: str) -> Answer:
    """Return the answer to a letter that the app has not answered, as `fedcore.flower.letters` reads it."""
    return Answer(ref, json.dumps({"created": time.time(), "error": [code, reason]}).encode(), None)
