"""Letters arrive equal, and only ProtocolError comes of what a peer makes up."""

from collections.abc import Callable
from math import inf, nan
from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from fedcore.errors import ProtocolError
from fedcore.messages import Blob
from fedcore.wire import relay
from fedcore.wire.codec import to_wire
from fedcore.wire.relay import (
    MAX_APPS,
    MAX_CONTENT,
    MAX_HEAD,
    MAX_LETTERS,
    MAX_RUNS,
    MAX_TTL,
    Answer,
    AppLetter,
    HostHello,
    Letter,
    LetterRef,
    Over,
    Void,
)
from fedcore.wire.v1 import relay_pb2 as pb
from fedcore.wire.v1.coordinator_pb2 import RunName, TaskName

SHA = "0123456789abcdef" * 4
REF = LetterRef("job-1f0c22aa", "3f-1")
LETTER = Letter(REF, "acme/digits", SHA, b"{}", Blob(SHA, 24), 60.0)
POSTED = AppLetter(REF, "client-1", b"{}", Blob(SHA, 24), 60.0)
ANSWER = Answer(REF, b"{}", Blob(SHA, 24))

runs = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,20}", fullmatch=True)
refs = st.builds(LetterRef, runs, st.from_regex(r"[a-z0-9-]{1,64}", fullmatch=True))
shas = st.binary(min_size=32, max_size=32).map(bytes.hex)
apps = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,9}/[A-Za-z0-9][A-Za-z0-9._-]{0,9}", fullmatch=True)
contents = st.none() | st.builds(Blob, shas, st.integers(1, MAX_CONTENT))
heads = st.binary(max_size=40) | st.just(bytes(MAX_HEAD))
ttls = st.floats(1e-3, MAX_TTL)
clients = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,62}", fullmatch=True)


def parsed(message: Any) -> Any:
    """Send a message through bytes."""
    return type(message).FromString(message.SerializeToString())


def listed(*letters: AppLetter) -> pb.LetterList:
    return pb.LetterList(run=REF.run, letters=[to_wire(letter) for letter in letters])


@given(st.builds(HostHello, st.dictionaries(apps, shas, max_size=5), st.lists(runs, max_size=5).map(tuple)))
def test_what_a_host_says_arrives_equal(hello: HostHello) -> None:
    assert relay.from_host(parsed(to_wire(hello))) == hello


@given(
    st.builds(Letter, refs, apps, shas, heads, contents, ttls) | st.builds(Over, runs) | st.builds(Void, refs)
)
def test_what_a_host_hears_arrives_equal(message: Letter | Over | Void) -> None:
    assert relay.to_host(parsed(to_wire(message))) == message


@given(st.builds(Answer, refs, heads, contents))
def test_an_answer_arrives_equal_on_both_its_ways(answer: Answer) -> None:
    assert relay.reply_head(parsed(relay.reply_part(answer))) == answer
    assert relay.answer_from_wire(parsed(to_wire(answer)), answer.ref.run) == answer


@given(st.builds(AppLetter, st.just(REF), clients, heads, contents, ttls))
def test_a_letter_that_is_sent_arrives_equal(letter: AppLetter) -> None:
    assert relay.letters(parsed(listed(letter))) == [letter]


def test_a_letter_lives_for_a_year_at_most() -> None:
    (letter,) = relay.letters(listed(AppLetter(REF, "client-1", b"", None, 1e300)))
    assert letter.ttl == MAX_TTL


DECODERS: list[tuple[Callable[[Any], object], Any]] = [
    (relay.from_host, to_wire(HostHello({"acme/digits": SHA}, ("job",)))),
    (relay.to_host, to_wire(LETTER)),
    (relay.to_host, to_wire(Over("job"))),
    (relay.to_host, to_wire(Void(REF))),
    (relay.taking, pb.Taking(letter=to_wire(REF), offset=7)),
    (relay.reply_head, relay.reply_part(ANSWER)),
    (lambda message: relay.answer_from_wire(message, "job"), to_wire(ANSWER)),
    (relay.app_head, pb.AppHeader(app=TaskName(name="acme/digits", digest=SHA), name="job")),
    (relay.deposit_head, pb.DepositPart(header=pb.DepositHeader(run="job", content=to_wire(Blob(SHA, 1))))),
    (relay.letters, listed(POSTED)),
    (relay.names, pb.LetterNames(run="job", ids=["1", "2"])),
    (relay.app_end, pb.AppEnd(run="job", state="failed", detail="why")),
]


@pytest.mark.parametrize(("decode", "message"), DECODERS)
@given(data=st.data())
def test_any_bytes_are_a_message_or_a_protocol_error(
    decode: Callable[[Any], object], message: Any, data: st.DataObject
) -> None:
    """Both random bytes and a valid message with some bytes replaced, which gets further."""
    valid = message.SerializeToString()
    decode(message)
    start = data.draw(st.integers(0, len(valid)))
    end = data.draw(st.integers(start, min(len(valid), start + 8)))
    altered = valid[:start] + data.draw(st.binary(max_size=12)) + valid[end:]
    try:
        decode(type(message).FromString(data.draw(st.sampled_from([altered, altered[start:]]))))
    except (DecodeError, ProtocolError):
        pass


def app(name: str, digest: str = SHA) -> TaskName:
    return TaskName(name=name, digest=digest)


def hello(*apps: TaskName, version: int = 1, runs: int = 0) -> pb.FromHost:
    return pb.FromHost(hello=pb.HostHello(version=version, apps=apps, runs=["job"] * runs))


def posted(**fields: Any) -> pb.LetterList:
    return listed(AppLetter(**{**vars(POSTED), **fields}))


BAD = [
    (relay.from_host, pb.FromHost(), "empty"),
    (relay.from_host, hello(version=2), "version 2, expected 1; update"),
    (relay.from_host, hello(app("digits")), "'digits', expected PUBLISHER/NAME"),
    (relay.from_host, hello(app("../digits")), "'../digits'"),
    (relay.from_host, hello(app("a/b", "x")), "64 hexadecimal digits"),
    (relay.from_host, hello(app("a/b"), app("a/b")), "twice"),
    (relay.from_host, hello(*[app("a/b")] * (MAX_APPS + 1)), f"at most {MAX_APPS}"),
    (relay.from_host, hello(runs=MAX_RUNS + 1), f"at most {MAX_RUNS}"),
    (relay.to_host, pb.ToHost(), "empty"),
    (relay.to_host, pb.ToHost(over=RunName(run="../x")), "'../x'"),
    (relay.taking, pb.Taking(letter=pb.LetterName(run="job", id="A")), "'A', expected 1 to 64 of a-z 0-9 -"),
    (relay.taking, pb.Taking(letter=pb.LetterName(run="job", id="a" * 65)), "letter's id"),
    (relay.reply_head, pb.ReplyPart(), "begins with its header"),
    (
        relay.reply_head,
        relay.reply_part(Answer(REF, bytes(MAX_HEAD + 1), None)),
        f"{MAX_HEAD + 1} bytes; at most {MAX_HEAD}",
    ),
    (relay.reply_head, relay.reply_part(Answer(REF, b"", Blob(SHA, MAX_CONTENT + 1))), f"{MAX_CONTENT}"),
    (relay.reply_head, relay.reply_part(Answer(REF, b"", Blob("x", 1))), "blob's digest"),
    (relay.app_head, pb.AppHeader(app=app("a/b"), name="a/b"), "run's name is 'a/b'"),
    (relay.app_head, pb.AppHeader(app=app("a/b"), name="x" * 65), "at most 64"),
    (relay.deposit_head, pb.DepositPart(), "begins with its header"),
    (relay.deposit_head, pb.DepositPart(header=pb.DepositHeader(run="job")), "no bytes"),
    (relay.letters, listed(POSTED, POSTED), "two letters of one id"),
    (relay.letters, listed(*[POSTED] * (MAX_LETTERS + 1)), f"at most {MAX_LETTERS}"),
    (relay.letters, posted(client="Client 1"), "'Client 1'"),
    (relay.letters, posted(ttl=0.0), "live 0.0 seconds"),
    (relay.letters, posted(ttl=nan), "live nan seconds"),
    (relay.letters, posted(ttl=inf), "live inf seconds"),
    (relay.names, pb.LetterNames(run="job", ids=["1"] * (MAX_LETTERS + 1)), f"at most {MAX_LETTERS}"),
    (relay.app_end, pb.AppEnd(run="job", state="running"), "'running', expected one of finished"),
]


@pytest.mark.parametrize(("decode", "message", "said"), BAD)
def test_a_wrong_message_is_refused_with_what_is_wrong(
    decode: Callable[[Any], object], message: Any, said: str
) -> None:
    with pytest.raises(ProtocolError) as refused:
        decode(message)
    assert said in str(refused.value)
    assert len(str(refused.value)) < 500


def test_a_reason_is_cut_to_its_limit() -> None:
    end = pb.AppEnd(run="job", state="failed", detail="x" * 5000)
    assert relay.app_end(end) == ("job", "failed", "x" * 1024)
