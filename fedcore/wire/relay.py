"""Letters of apps to protobuf and back. What comes from a peer is bounded and checked here, or it is refused.

Heads and contents are the app's own and are not looked into: see `fedcore/wire/v1/relay.proto`. As in
`fedcore.wire.codec`, `to_wire` never fails, and everything else raises ProtocolError that says what is wrong.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any

from fedcore.crypto.names import PART
from fedcore.errors import Blameless, ProtocolError
from fedcore.messages import Blob
from fedcore.wire.codec import MAX_TEXT, blob_from_wire, digest_from_wire, name_from_wire, to_wire
from fedcore.wire.v1 import relay_pb2 as pb
from fedcore.wire.v1.coordinator_pb2 import RunName, TaskName

VERSION = 1
MAX_HEAD = 16 * 1024  # bytes
MAX_CONTENT = 2 * 2**30  # bytes
MAX_LETTERS = 1000  # that one message sends or settles
MAX_APPS = 64  # that a device hosts
MAX_RUNS = 1000  # of which it keeps a state
MAX_TTL = 366 * 86400.0  # seconds
ID = re.compile(r"[a-z0-9-]{1,64}")
LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
APP = re.compile(rf"{LABEL.pattern}/{LABEL.pattern}")
ENDS = ("finished", "stopped", "failed")


@dataclass(frozen=True)
class LetterRef:
    """Which letter something belongs to; `id` is the sender's, unique in the run."""

    run: str
    id: str

    def __str__(self) -> str:
        return f"{self.run}/{self.id}"


@dataclass(frozen=True)
class HostHello:
    """The first words of an agent that hosts apps, name -> digest; `runs` are those it keeps a state for."""

    apps: Mapping[str, str]
    runs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Letter:
    """A letter as its agent gets it; `digest` is of the run's app, `ttl` in seconds from now."""

    ref: LetterRef
    app: str
    digest: str
    head: bytes = field(repr=False)
    content: Blob | None
    ttl: float


@dataclass(frozen=True)
class Over:
    """The word that a run has ended: what is kept for it can go."""

    run: str


@dataclass(frozen=True)
class Void:
    """The word that nobody waits for a letter's answer any more."""

    ref: LetterRef


@dataclass(frozen=True)
class AppLetter:
    """A letter as its sender hands it in, for a client of that name; `ttl` in seconds from now."""

    ref: LetterRef
    client: str
    head: bytes = field(repr=False)
    content: Blob | None
    ttl: float


@dataclass(frozen=True)
class Answer:
    """The answer to a letter."""

    ref: LetterRef
    head: bytes = field(repr=False)
    content: Blob | None


@to_wire.register
def _(ref: LetterRef) -> pb.LetterName:
    return pb.LetterName(run=ref.run, id=ref.id)


@to_wire.register
def _(hello: HostHello) -> pb.FromHost:
    apps = [TaskName(name=name, digest=digest) for name, digest in hello.apps.items()]
    return pb.FromHost(hello=pb.HostHello(version=VERSION, apps=apps, runs=hello.runs))


@to_wire.register
def _(letter: Letter) -> pb.ToHost:
    app = TaskName(name=letter.app, digest=letter.digest)
    parts = {"head": letter.head, "content": _content(letter.content), "ttl": letter.ttl}
    return pb.ToHost(letter=pb.Letter(name=to_wire(letter.ref), app=app, **parts))


@to_wire.register
def _(over: Over) -> pb.ToHost:
    return pb.ToHost(over=RunName(run=over.run))


@to_wire.register
def _(void: Void) -> pb.ToHost:
    return pb.ToHost(void=to_wire(void.ref))


@to_wire.register
def _(letter: AppLetter) -> pb.AppLetter:
    """Return a part of a LetterList, which names the run."""
    parts = {"head": letter.head, "content": _content(letter.content), "ttl": letter.ttl}
    return pb.AppLetter(id=letter.ref.id, client=letter.client, **parts)


@to_wire.register
def _(answer: Answer) -> pb.Answer:
    return pb.Answer(id=answer.ref.id, head=answer.head, content=_content(answer.content))


def reply_part(answer: Answer) -> pb.ReplyPart:
    """Return the first part of a Reply; the content's chunks follow."""
    parts = {"head": answer.head, "content": _content(answer.content)}
    return pb.ReplyPart(header=pb.ReplyHeader(letter=to_wire(answer.ref), **parts))


def from_host(message: pb.FromHost) -> HostHello:
    """Return what an agent says on its stream."""
    if not message.HasField("hello"):
        raise ProtocolError("the agent's message is empty or of a newer version")
    hello = message.hello
    if hello.version != VERSION:
        raise Blameless(f"the agent speaks version {hello.version}, expected {VERSION}; update fedcore")
    _most(len(hello.apps), MAX_APPS, "the agent hosts", "apps")
    _most(len(hello.runs), MAX_RUNS, "the agent keeps states of", "runs")
    apps = dict(_app(app) for app in hello.apps)
    if len(apps) < len(hello.apps):
        raise ProtocolError("the agent names an app twice")
    return HostHello(apps, tuple(_run(run) for run in hello.runs))


def to_host(message: pb.ToHost) -> Letter | Over | Void:
    """Return what a coordinator says on the stream of an agent that hosts apps."""
    if message.HasField("letter"):
        letter = message.letter
        ref, (app, digest) = ref_from_wire(letter.name), _app(letter.app)
        return Letter(ref, app, digest, *_parts(letter, ref), _ttl(letter.ttl, ref))
    if message.HasField("over"):
        return Over(_run(message.over.run))
    if message.HasField("void"):
        return Void(ref_from_wire(message.void))
    raise ProtocolError("the coordinator's message is empty or of a newer version")


def ref_from_wire(message: pb.LetterName) -> LetterRef:
    """Return which letter is meant."""
    return _ref(message.run, message.id)


def taking(message: pb.Taking) -> tuple[LetterRef, int]:
    """Return of which letter a content is wanted, and from which byte on."""
    return ref_from_wire(message.letter), message.offset


def reply_head(message: pb.ReplyPart) -> Answer:
    """Return the answer that the first part of a Reply announces."""
    if not message.HasField("header"):
        raise ProtocolError("a reply begins with its header")
    ref = ref_from_wire(message.header.letter)
    return Answer(ref, *_parts(message.header, ref))


def answer_from_wire(message: pb.Answer, run: str) -> Answer:
    """Return an answer to a letter of a run."""
    ref = _ref(run, message.id)
    return Answer(ref, *_parts(message, ref))


def app_head(message: pb.AppHeader) -> tuple[str, str, str]:
    """Return app, digest and name of a new run."""
    name = _matching(LABEL, message.name, "run's name", "at most 64 letters, digits and . _ -")
    return *_app(message.app), name


def deposit_head(message: pb.DepositPart) -> tuple[str, Blob]:
    """Return for which run the first part of a Deposit announces which content."""
    if not message.HasField("header"):
        raise ProtocolError("a deposit begins with its header")
    blob = _blob(message.header.content, "a deposit")
    if blob is None:
        raise ProtocolError("a deposit has no bytes; a letter without a content needs none")
    return _run(message.header.run), blob


def letters(message: pb.LetterList) -> list[AppLetter]:
    """Return the letters that are sent, of one run."""
    _most(len(message.letters), MAX_LETTERS, "one message sends", "letters")
    sent = [_letter(message.run, letter) for letter in message.letters]
    if len({letter.ref for letter in sent}) < len(sent):
        raise ProtocolError(f"one message sends two letters of one id for {message.run}")
    return sent


def _letter(run: str, message: pb.AppLetter) -> AppLetter:
    ref = _ref(run, message.id)
    client = _matching(PART, message.client, "client's name", "what certificates can name")
    return AppLetter(ref, client, *_parts(message, ref), _ttl(message.ttl, ref))


def names(message: pb.LetterNames) -> list[LetterRef]:
    """Return the letters that are meant, of one run."""
    _most(len(message.ids), MAX_LETTERS, "one message settles", "letters")
    return [_ref(message.run, id) for id in message.ids]


def app_end(message: pb.AppEnd) -> tuple[str, str, str]:
    """Return which run has ended, how, and why."""
    if message.state not in ENDS:
        raise ProtocolError(f"the run's end is {message.state[:80]!r}, expected one of {', '.join(ENDS)}")
    return _run(message.run), message.state, message.detail[:MAX_TEXT]


def _content(content: Blob | None) -> Any:
    return to_wire(content) if content else None


def _parts(message: Any, ref: LetterRef) -> tuple[bytes, Blob | None]:
    """Return head and content of a letter or an answer."""
    if len(message.head) > MAX_HEAD:
        size = len(message.head)
        raise ProtocolError(f"the head of {ref} has {size} bytes; at most {MAX_HEAD} are taken")
    return message.head, _blob(message.content, str(ref))


def _blob(message: Any, what: str) -> Blob | None:
    if message.size > MAX_CONTENT:
        raise ProtocolError(
            f"the content of {what} has {message.size} bytes; at most {MAX_CONTENT} are taken"
        )
    return blob_from_wire(message) if message.size else None


def _ttl(seconds: float, ref: LetterRef) -> float:
    if not 0 < seconds < inf:
        raise ProtocolError(f"{ref} is to live {seconds} seconds, expected more than 0")
    return min(seconds, MAX_TTL)


def _app(message: TaskName) -> tuple[str, str]:
    name = _matching(APP, message.name, "app's name", "PUBLISHER/NAME of letters, digits and . _ -")
    return name, digest_from_wire(message.digest, "app")


def _run(text: str) -> str:
    return name_from_wire(text, "run")


def _ref(run: str, id: str) -> LetterRef:
    return LetterRef(_run(run), _matching(ID, id, "letter's id", "1 to 64 of a-z 0-9 -"))


def _matching(pattern: re.Pattern[str], text: str, what: str, expected: str) -> str:
    if not pattern.fullmatch(text):
        raise ProtocolError(f"the {what} is {text[:80]!r}, expected {expected}")
    return text


def _most(count: int, most: int, who: str, what: str) -> None:
    if count > most:
        raise ProtocolError(f"{who} {count} {what}; at most {most} are taken")
