"""What is sent arrives equal, and only ProtocolError comes of what a peer makes up."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from fedcore.errors import ProtocolError
from fedcore.layout import Entry, Layout
from fedcore.messages import (
    SMALL,
    Assignment,
    Blob,
    Decline,
    Hello,
    Outcome,
    Pause,
    Receipt,
    Ref,
    Secure,
    SmallUpdate,
    Submission,
    UploadHead,
    Verdict,
)
from fedcore.metrics import MAX_METRICS
from fedcore.spec import RunSpec
from fedcore.wire import codec
from fedcore.wire.codec import (
    MAX_KEY,
    MAX_LAYOUT,
    MAX_PARTS,
    MAX_PAUSE,
    MAX_PENDING,
    MAX_SECURE,
    MAX_SPEC,
    MAX_TASKS,
    MAX_TEXT,
    to_wire,
)
from fedcore.wire.v1 import coordinator_pb2 as pb
from fedcore.wire.v1.authority_pb2 import Signed

SHA = "0123456789abcdef" * 4
REF = Ref("digits-1f0c22aa", 3, 1, "train")
LAYOUT = Layout((Entry("weight", (3, 2), "float32", "shared"), Entry("counter", (), "int64", "local")))
SPEC = RunSpec.parse({"run": {"name": "digits", "rounds": 4}, "cohort": {"size": 5, "over_select": 1.3}})
WORK = Assignment(REF, "Digits", SHA, SPEC, SHA, Blob(SHA, 24), 5, 60.0, REF)
HEAD = UploadHead(REF, {"weight": 3.0}, (("delta", 6),), Blob(SHA, 24))
RUN = Submission(SPEC, "Digits", SHA, LAYOUT, ("loss", "accuracy"), Blob(SHA, 24))

names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,20}", fullmatch=True)
shas = st.binary(min_size=32, max_size=32).map(bytes.hex)
blobs = st.builds(Blob, shas, st.integers(0, 2**64 - 1))
refs = st.builds(
    Ref,
    names,
    st.integers(1, 2**32 - 1),
    st.integers(0, 2**32 - 1),
    st.sampled_from(["train", "evaluate", "root"]),
)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=MAX_TEXT)
pending = st.lists(refs, max_size=MAX_PENDING).map(tuple)
instances = st.integers(0, 2**64 - 1)
words = st.from_regex(r"[A-Za-z0-9._-]{1,64}", fullmatch=True)
labels = st.dictionaries(words, words, max_size=16)
verdicts = st.builds(Verdict, st.sampled_from(["folded", "late", "refused"]), texts)
floats = st.floats(allow_nan=False)
lengths = st.integers(0, 2**64 - 1)
vectors = st.lists(st.tuples(names, lengths), unique_by=lambda v: v[0], max_size=5).map(tuple)
specs = st.builds(
    lambda rounds, size, lr: RunSpec.parse(
        {
            "run": {"rounds": rounds},
            "cohort": {"size": size},
            "client": {"optimizer": {"name": "adam", "lr": lr}},
        }
    ),
    st.integers(1, 10**6),
    st.integers(1, 10**6),
    st.floats(1e-6, 10.0),
)


keys = st.builds(
    lambda content, chain: Signed(content=content, signature=b"s", chain=chain).SerializeToString(),
    st.binary(max_size=9),
    st.lists(st.binary(max_size=9), max_size=3),
) | st.just(b"")


def parsed(message: Any) -> Any:
    """Send a message through bytes."""
    return type(message).FromString(message.SerializeToString())


@given(
    st.builds(Hello, st.dictionaries(names, shas, max_size=5), st.booleans(), pending, instances, labels)
    | st.builds(Decline, refs, texts)
)
def test_what_an_agent_says_arrives_equal(message: Hello | Decline) -> None:
    assert codec.from_agent(parsed(to_wire(message))) == message


coordinator_says = (
    st.builds(Outcome, refs, verdicts)
    | st.builds(Pause, st.floats(0, MAX_PAUSE))
    | st.builds(Receipt, refs, st.integers(0, 16), texts)
)


@given(st.lists(coordinator_says, min_size=1))
def test_what_a_coordinator_says_arrives_equal(messages: list[Outcome | Pause | Receipt]) -> None:
    (first, *_), batch = messages, pb.ToAgent(batch=pb.Batch(messages=map(to_wire, messages)))
    assert [codec.to_agent(parsed(each)) for each in codec.unbatched(to_wire(first))] == [first]
    assert [codec.to_agent(each) for each in codec.unbatched(parsed(batch))] == messages


@given(refs, st.binary(max_size=40))
def test_a_message_of_secure_aggregation_arrives_equal_from_either_side(ref: Ref, message: bytes) -> None:
    secure = Secure(ref, message)
    assert codec.from_agent(parsed(pb.FromAgent(secure=to_wire(secure)))) == secure
    assert codec.to_agent(parsed(pb.ToAgent(secure=to_wire(secure)))) == secure


@given(keys, st.binary(max_size=40))
def test_what_encryption_needs_arrives_equal_with_the_work(key: bytes, certificate: bytes) -> None:
    work = replace(WORK, key=key, certificate=certificate)
    assert codec.to_agent(parsed(to_wire(work))) == work


@given(refs, names, shas, specs, blobs, st.integers(1, 2**32 - 1), st.floats(1e-3, 1e6), st.none() | refs)
def test_an_assignment_arrives_equal(
    ref: Ref, task: str, sha: str, spec: RunSpec, blob: Blob, cohort: int, deadline: float, folded: Ref | None
) -> None:
    work = Assignment(ref, task, sha, spec, sha, blob, cohort, deadline, folded)
    assert codec.to_agent(parsed(to_wire(work))) == work


@given(st.builds(UploadHead, refs, st.dictionaries(names, floats, max_size=5), vectors, blobs))
def test_the_head_of_an_upload_arrives_equal(head: UploadHead) -> None:
    assert codec.upload_head(parsed(to_wire(head))) == head


@given(st.builds(UploadHead, refs, st.dictionaries(names, floats, max_size=5), vectors, blobs), st.binary())
def test_an_update_as_a_whole_arrives_equal(head: UploadHead, payload: bytes) -> None:
    update = SmallUpdate(head, payload)
    assert codec.from_agent(parsed(to_wire(update))) == update


@given(specs, st.lists(names, unique=True, max_size=MAX_METRICS + 1).map(tuple), blobs)
def test_a_submission_arrives_equal(spec: RunSpec, metrics: tuple[str, ...], blob: Blob) -> None:
    message = replace(RUN, spec=spec, metrics=metrics, parameters=blob)
    assert codec.submission(parsed(to_wire(message))) == message


def test_an_assignment_does_not_tell_agents_how_the_run_was_simulated() -> None:
    spec = RunSpec.parse({"simulation": {"clients": 7}})
    received = codec.to_agent(parsed(to_wire(replace(WORK, spec=spec))))
    assert isinstance(received, Assignment) and received.spec == RunSpec.parse({})


def test_a_welcome_is_nothing_to_act_on() -> None:
    assert codec.to_agent(pb.ToAgent(welcome=pb.Welcome(coordinator="x"))) is None


def test_a_reason_is_cut_to_its_limit() -> None:
    message = codec.from_agent(to_wire(Decline(REF, "x" * 5000)))
    assert isinstance(message, Decline) and len(message.reason) == MAX_TEXT


DECODERS: list[tuple[Any, Callable[[Any], object], Any]] = [
    (pb.FromAgent, codec.from_agent, Hello({"Digits": SHA}, False, (REF,))),
    (pb.FromAgent, codec.from_agent, Decline(REF, "busy")),
    (pb.FromAgent, codec.from_agent, SmallUpdate(HEAD, b"1234")),
    (pb.ToAgent, codec.to_agent, WORK),
    (pb.ToAgent, codec.to_agent, replace(WORK, key=Signed(chain=[b"c"]).SerializeToString())),
    (pb.ToAgent, codec.to_agent, Outcome(REF, Verdict("folded"))),
    (pb.ToAgent, codec.to_agent, Pause(1.5)),
    (pb.ToAgent, codec.to_agent, Receipt(REF, 9, "too late")),
    (pb.UploadPart, codec.upload_head, HEAD),
    (pb.SubmitPart, codec.submission, RUN),
    (pb.Blob, codec.blob_from_wire, Blob(SHA, 1)),
    (pb.Ref, codec.ref_from_wire, REF),
]


@pytest.mark.parametrize(("kind", "decode", "message"), DECODERS)
@given(data=st.data())
def test_any_bytes_are_a_message_or_a_protocol_error(
    kind: Any, decode: Callable[[Any], object], message: Any, data: st.DataObject
) -> None:
    """Both random bytes and a valid message with some bytes replaced, which gets further."""
    valid = to_wire(message).SerializeToString()
    start = data.draw(st.integers(0, len(valid)))
    end = data.draw(st.integers(start, min(len(valid), start + 8)))
    altered = valid[:start] + data.draw(st.binary(max_size=12)) + valid[end:]
    try:
        decode(kind.FromString(data.draw(st.sampled_from([altered, altered[start:]]))))
    except (DecodeError, ProtocolError):
        pass


def wire(message: Any, **fields: Any) -> Any:
    """Return the wire form of a message; each field, as path__of__it, is merged from or set to a value."""
    part = to_wire(message)
    for path, value in fields.items():
        *parents, last = path.split("__")
        holder = part
        for parent in parents:
            holder = getattr(holder, parent)
        if isinstance(value, list):
            getattr(holder, last).extend(value)
        elif isinstance(value, dict):
            getattr(holder, last).update(value)
        else:
            setattr(holder, last, value)
    return part


TASK = pb.TaskName(name="Digits", digest=SHA)
PENDING = pb.Ref(run="run", round=1, kind=pb.KIND_TRAIN)
LONG = pb.Secure(ref=to_wire(REF), message=bytes(MAX_SECURE + 1))
BAD = [
    (codec.from_agent, pb.FromAgent(), "empty"),
    (codec.from_agent, wire(Hello({}), hello__version=2), "version 2, expected 1; update"),
    (codec.from_agent, wire(Hello({}), hello__tasks=[pb.TaskName(name="a b", digest=SHA)]), "'a b'"),
    (codec.from_agent, wire(Hello({}), hello__tasks=[pb.TaskName(name="a", digest=SHA[:-1])]), "64 hex"),
    (codec.from_agent, wire(Hello({}), hello__tasks=[TASK] * (MAX_TASKS + 1)), f"at most {MAX_TASKS}"),
    (codec.from_agent, wire(Hello({}), hello__tasks=[TASK] * 2), "twice"),
    (
        codec.from_agent,
        wire(Hello({}), hello__pending=[PENDING] * (MAX_PENDING + 1)),
        f"at most {MAX_PENDING}",
    ),
    (codec.from_agent, wire(Hello({}), hello__pending=[pb.Ref(run="x")]), "round 0"),
    (codec.to_agent, wire(WORK, assignment__folded__run="../x"), "'../x'"),
    (codec.from_agent, wire(Decline(REF, ""), decline__ref__kind=0), "kind 0"),
    (codec.from_agent, wire(Decline(REF, ""), decline__ref__kind=9), "kind 9"),
    (codec.from_agent, wire(Decline(REF, ""), decline__ref__round=0), "round 0"),
    (codec.from_agent, wire(Decline(REF, ""), decline__ref__run="../x"), "'../x'"),
    (codec.from_agent, wire(Hello({}), hello__labels={"site": "e u"}), "labels: expected at most 16 labels"),
    (codec.from_agent, wire(Hello({}), hello__labels={"x" * 65: "eu"}), "1 to 64 letters"),
    (codec.from_agent, wire(Hello({}), hello__labels={f"x{i}": "" for i in range(17)}), "at most 16 labels"),
    (codec.to_agent, to_wire(Pause(MAX_PAUSE + 1)), "pause is 3601.0 seconds, expected at most 3600"),
    (codec.to_agent, to_wire(Pause(-1.0)), "pause is -1.0"),
    (codec.to_agent, to_wire(Pause(float("nan"))), "pause is nan"),
    (codec.to_agent, pb.ToAgent(), "empty"),
    (codec.to_agent, wire(Outcome(REF, Verdict("late")), outcome__verdict__status=0), "status 0"),
    (codec.to_agent, wire(WORK, assignment__deadline=0.0), "deadline is 0"),
    (codec.to_agent, wire(WORK, assignment__deadline=float("nan")), "deadline is nan"),
    (codec.to_agent, wire(WORK, assignment__deadline=float("inf")), "deadline is inf"),
    (codec.to_agent, wire(WORK, assignment__spec="{}}"), "its root"),
    (codec.to_agent, wire(WORK, assignment__spec='{"run": {"rounds": 0}}'), "run.rounds"),
    (codec.to_agent, wire(WORK, assignment__spec=" " * (MAX_SPEC + 1)), f"at most {MAX_SPEC}"),
    (codec.to_agent, wire(WORK, assignment__layout="x"), "layout's digest"),
    (codec.to_agent, wire(WORK, assignment__parameters__sha256=SHA.upper()), "blob's digest"),
    (codec.to_agent, wire(WORK, assignment__key__content=bytes(MAX_KEY)), f"at most {MAX_KEY}"),
    (codec.to_agent, wire(WORK, assignment__certificate=bytes(MAX_SECURE + 1)), f"at most {MAX_SECURE}"),
    (codec.to_agent, pb.ToAgent(secure=LONG), f"at most {MAX_SECURE}"),
    (codec.to_agent, pb.ToAgent(receipt=pb.Receipt()), "round 0"),
    (codec.to_agent, pb.ToAgent(batch=pb.Batch()), "newer version"),  # one in another, or none at all
    (codec.from_agent, to_wire(SmallUpdate(HEAD, bytes(SMALL + 1))), f"at most {SMALL}"),
    (codec.from_agent, pb.FromAgent(update=pb.SmallUpdate()), "round 0"),
    (codec.from_agent, pb.FromAgent(secure=LONG), f"at most {MAX_SECURE}"),
    (codec.from_agent, pb.FromAgent(secure=pb.Secure()), "round 0"),
    (codec.upload_head, pb.UploadPart(chunk=pb.Chunk()), "begins with its header"),
    (codec.upload_head, wire(HEAD, header__vectors=[pb.VectorHead(name="delta")]), "twice"),
    (codec.upload_head, wire(HEAD, header__vectors=[pb.VectorHead()]), "vector's name is ''"),
    (codec.upload_head, wire(HEAD, header__vectors=[pb.VectorHead()] * MAX_PARTS), f"at most {MAX_PARTS}"),
    (codec.upload_head, wire(HEAD, header__scalars={f"s{i}": 0.0 for i in range(MAX_PARTS)}), "at most"),
    (codec.upload_head, wire(HEAD, header__scalars={"a b": 0.0}), "'a b'"),
    (codec.submission, pb.SubmitPart(chunk=pb.Chunk()), "begins with its header"),
    (codec.submission, wire(RUN, header__layout="[" * 10_000), "layout is malformed"),
    (codec.submission, wire(RUN, header__layout=" " * (MAX_LAYOUT + 1)), f"at most {MAX_LAYOUT}"),
    (codec.submission, wire(RUN, header__layout='[["a", [1], "int64", "shared"]]'), "cannot travel"),
    (codec.submission, wire(RUN, header__metrics=["x"] * (MAX_METRICS + 1)), "metrics; at most"),
    (codec.submission, wire(RUN, header__metrics=["loss"]), "twice"),
    (codec.submission, wire(RUN, header__spec='{"unknown": 1}'), "unknown"),
]


@pytest.mark.parametrize(("decode", "message", "said"), BAD)
def test_a_wrong_message_is_refused_with_what_is_wrong(
    decode: Callable[[Any], object], message: Any, said: str
) -> None:
    with pytest.raises(ProtocolError) as refused:
        decode(message)
    assert said in str(refused.value)
    assert len(str(refused.value)) < 500
