"""Messages to protobuf and back. What comes from a peer is bounded and checked here, or it is refused.

`to_wire` never fails; `from_wire` raises ProtocolError that says what is wrong with a message. Neither
does I/O.
"""

import re
from collections.abc import Sequence
from functools import lru_cache, singledispatch
from math import inf
from typing import Any

from pydantic import ValidationError

from fedcore.errors import Blameless, ProtocolError
from fedcore.layout import Layout
from fedcore.messages import (
    SMALL,
    Accept,
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
from fedcore.tables import checked_labels
from fedcore.wire.v1 import coordinator_pb2 as pb
from fedcore.wire.v1.authority_pb2 import Signed

VERSION = 1
MAX_TEXT = 1024  # characters of a reason
MAX_SPEC = 256 * 1024
MAX_LAYOUT = 3 * 2**20  # under the 4 MiB that gRPC takes as one message
MAX_SECURE = 3 * 2**20  # bytes of a message or certificate of secure aggregation
MAX_KEY = 16 * 1024  # bytes of a signed key, with the certificates of its signer
MAX_TASKS = 256
MAX_PARTS = 64  # vectors or scalars of an update
MAX_PAUSE = 3600.0  # seconds
MAX_PENDING = 8  # pieces of work whose outcome an agent has not heard, one a run
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
SHA256 = re.compile(r"[0-9a-f]{64}")

KINDS = {"train": pb.KIND_TRAIN, "evaluate": pb.KIND_EVALUATE, "root": pb.KIND_ROOT, "offer": pb.KIND_OFFER}
STATUSES = {"folded": pb.STATUS_FOLDED, "late": pb.STATUS_LATE, "refused": pb.STATUS_REFUSED}
KIND_NAMES: dict[Any, Any] = {value: name for name, value in KINDS.items()}
STATUS_NAMES: dict[Any, Any] = {value: name for name, value in STATUSES.items()}


@singledispatch
def to_wire(message: Any) -> Any:
    """Return the protobuf message for one of `fedcore.messages`."""
    raise TypeError(f"{type(message).__name__} does not travel")


@to_wire.register
def _(ref: Ref) -> pb.Ref:
    return pb.Ref(run=ref.run, round=ref.round, attempt=ref.attempt, kind=KINDS[ref.kind])


@to_wire.register
def _(blob: Blob) -> pb.Blob:
    return pb.Blob(sha256=blob.sha256, size=blob.size)


@to_wire.register
def _(hello: Hello) -> pb.FromAgent:
    tasks = [pb.TaskName(name=name, digest=digest) for name, digest in hello.tasks.items()]
    pending = [to_wire(ref) for ref in hello.pending]
    message = pb.Hello(version=VERSION, tasks=tasks, evaluator=hello.evaluator, pending=pending)
    message.instance = hello.instance
    message.labels.update(hello.labels)
    return pb.FromAgent(hello=message)


@to_wire.register
def _(accept: Accept) -> pb.FromAgent:
    return pb.FromAgent(accept=pb.Accept(ref=to_wire(accept.ref)))


@to_wire.register
def _(decline: Decline) -> pb.FromAgent:
    return pb.FromAgent(decline=pb.Decline(ref=to_wire(decline.ref), reason=decline.reason[:MAX_TEXT]))


@to_wire.register
def _(assignment: Assignment) -> pb.ToAgent:
    return pb.ToAgent(
        assignment=pb.Assignment(
            ref=to_wire(assignment.ref),
            task=pb.TaskName(name=assignment.task, digest=assignment.digest),
            spec=assignment.spec.travels(),
            layout=assignment.layout,
            parameters=to_wire(assignment.parameters),
            cohort=assignment.cohort,
            deadline=assignment.deadline,
            folded=to_wire(assignment.folded) if assignment.folded else None,
            clip=assignment.clip,
            key=Signed.FromString(assignment.key) if assignment.key else None,
            certificate=assignment.certificate,
            content=assignment.content,
        )
    )


@to_wire.register
def _(secure: Secure) -> pb.Secure:
    """Return what both sides put into a message of their stream, as its `secure`."""
    return pb.Secure(ref=to_wire(secure.ref), message=secure.message)


@to_wire.register
def _(outcome: Outcome) -> pb.ToAgent:
    status, reason = STATUSES[outcome.verdict.status], outcome.verdict.reason[:MAX_TEXT]
    verdict = pb.Verdict(status=status, reason=reason)
    return pb.ToAgent(outcome=pb.Outcome(ref=to_wire(outcome.ref), verdict=verdict))


@to_wire.register
def _(pause: Pause) -> pb.ToAgent:
    return pb.ToAgent(pause=pb.Pause(seconds=pause.seconds))


@to_wire.register
def _(head: UploadHead) -> pb.UploadPart:
    vectors = [pb.VectorHead(name=name, length=length) for name, length in head.vectors]
    ref, payload = to_wire(head.ref), to_wire(head.payload)
    facts = {"scalars": dict(head.scalars), "vectors": vectors, "payload": payload, "offset": head.offset}
    return pb.UploadPart(header=pb.UploadHeader(ref=ref, **facts))


@to_wire.register
def _(update: SmallUpdate) -> pb.FromAgent:
    header = to_wire(update.head).header
    return pb.FromAgent(update=pb.SmallUpdate(header=header, payload=update.payload))


@to_wire.register
def _(receipt: Receipt) -> pb.ToAgent:
    ref, reason = to_wire(receipt.ref), receipt.reason[:MAX_TEXT]
    return pb.ToAgent(receipt=pb.Receipt(ref=ref, code=receipt.code, reason=reason))


@to_wire.register
def _(submission: Submission) -> pb.SubmitPart:
    header = pb.SubmitHeader(
        spec=submission.spec.model_dump_json(),
        task=pb.TaskName(name=submission.task, digest=submission.digest),
        layout=submission.layout.to_json(),
        metrics=submission.metrics,
        parameters=to_wire(submission.parameters),
    )
    return pb.SubmitPart(header=header)


def ref_from_wire(message: pb.Ref) -> Ref:
    """Return the Ref; raises ProtocolError unless run, round and kind are set."""
    if message.kind not in KIND_NAMES or message.round < 1:
        raise ProtocolError(f"the message names round {message.round} and kind {message.kind}")
    return Ref(name_from_wire(message.run, "run"), message.round, message.attempt, KIND_NAMES[message.kind])


def blob_from_wire(message: pb.Blob) -> Blob:
    """Return the Blob; raises ProtocolError unless its address is a SHA-256."""
    return Blob(digest_from_wire(message.sha256, "blob"), message.size)


def from_agent(message: pb.FromAgent) -> Hello | Accept | Decline | Secure | SmallUpdate:
    """Return what an agent says on its stream."""
    if message.HasField("hello"):
        hello = message.hello
        if hello.version != VERSION:
            raise Blameless(f"the agent speaks version {hello.version}, expected {VERSION}; update fedcore")
        if len(hello.tasks) > MAX_TASKS:
            raise ProtocolError(f"the agent names {len(hello.tasks)} tasks; at most {MAX_TASKS} are taken")
        tasks = [
            (name_from_wire(task.name, "task"), digest_from_wire(task.digest, "task")) for task in hello.tasks
        ]
        _once([name for name, _ in tasks], "agent", "task")
        if len(hello.pending) > MAX_PENDING:
            raise ProtocolError(
                f"the agent waits for {len(hello.pending)} outcomes; at most {MAX_PENDING} are told"
            )
        try:
            labels = checked_labels(dict(hello.labels))
        except ValueError as error:
            raise ProtocolError(f"the agent's labels: {error}") from error
        pending = tuple(map(ref_from_wire, hello.pending))
        return Hello(dict(tasks), hello.evaluator, pending, hello.instance, labels)
    if message.HasField("decline"):
        return Decline(ref_from_wire(message.decline.ref), message.decline.reason[:MAX_TEXT])
    if message.HasField("accept"):
        return Accept(ref_from_wire(message.accept.ref))
    if message.HasField("secure"):
        return _secure(message.secure)
    if message.HasField("update"):
        payload = _bounded(message.update.payload, SMALL, "an update on the stream")
        return SmallUpdate(head_from_wire(message.update.header), payload)
    raise ProtocolError("the agent's message is empty or of a newer version")


def unbatched(message: pb.ToAgent) -> Sequence[pb.ToAgent]:
    """Return what a coordinator says at once."""
    return message.batch.messages if message.HasField("batch") else [message]


def to_agent(message: pb.ToAgent) -> Assignment | Outcome | Pause | Receipt | Secure | None:
    """Return what a coordinator says on an agent's stream; None for its welcome."""
    if message.HasField("welcome"):
        return None
    if message.HasField("outcome"):
        verdict = message.outcome.verdict
        if verdict.status not in STATUS_NAMES:
            raise ProtocolError(f"the verdict has status {verdict.status}")
        reason = verdict.reason[:MAX_TEXT]
        return Outcome(ref_from_wire(message.outcome.ref), Verdict(STATUS_NAMES[verdict.status], reason))
    if message.HasField("assignment"):
        work = message.assignment
        if not 0 < work.deadline < inf:
            raise ProtocolError(f"the assignment's deadline is {work.deadline} seconds")
        if not 0 <= work.clip < inf:
            raise ProtocolError(f"the assignment's clip norm is {work.clip}, expected 0 or more")
        return Assignment(
            ref=ref_from_wire(work.ref),
            task=name_from_wire(work.task.name, "task"),
            digest=digest_from_wire(work.task.digest, "task"),
            spec=_spec(work.spec),
            layout=digest_from_wire(work.layout, "layout"),
            parameters=blob_from_wire(work.parameters),
            cohort=work.cohort,
            deadline=work.deadline,
            folded=ref_from_wire(work.folded) if work.HasField("folded") else None,
            clip=work.clip,
            key=_bounded(work.key.SerializeToString(), MAX_KEY, "the aggregator's key"),
            certificate=_bounded(work.certificate, MAX_SECURE, "the certificate of another attempt"),
            content=_bounded(work.content, SMALL, "the parameters in an assignment"),
        )
    if message.HasField("secure"):
        return _secure(message.secure)
    if message.HasField("pause"):
        if not 0 <= message.pause.seconds <= MAX_PAUSE:
            given = message.pause.seconds
            raise ProtocolError(f"the pause is {given} seconds, expected at most {MAX_PAUSE:.0f}")
        return Pause(message.pause.seconds)
    if message.HasField("receipt"):
        receipt = message.receipt
        return Receipt(ref_from_wire(receipt.ref), receipt.code, receipt.reason[:MAX_TEXT])
    raise ProtocolError("the coordinator's message is empty or of a newer version")


def wanted(message: pb.Wanted) -> tuple[Blob, int]:
    """Return which blob is wanted, and from which byte on."""
    blob = blob_from_wire(message.blob)
    return blob, _offset(message.offset, blob)


def upload_head(message: pb.UploadPart) -> UploadHead:
    """Return the head of an upload, which must be its first part."""
    if not message.HasField("header"):
        raise ProtocolError("an upload begins with its header")
    return head_from_wire(message.header)


def head_from_wire(header: pb.UploadHeader) -> UploadHead:
    """Return the head of an update."""
    if len(header.vectors) > MAX_PARTS or len(header.scalars) > MAX_PARTS:
        counts = f"{len(header.vectors)} vectors and {len(header.scalars)} scalars"
        raise ProtocolError(f"the update has {counts}; at most {MAX_PARTS} of each are taken")
    vectors = tuple((name_from_wire(v.name, "vector"), v.length) for v in header.vectors)
    _once([name for name, _ in vectors], "update", "vector")
    scalars = {name_from_wire(name, "scalar"): value for name, value in header.scalars.items()}
    ref, payload = ref_from_wire(header.ref), blob_from_wire(header.payload)
    return UploadHead(ref, scalars, vectors, payload, _offset(header.offset, payload))


def submission(message: pb.SubmitPart) -> Submission:
    """Return the head of a submitted run, which must be its first part."""
    if not message.HasField("header"):
        raise ProtocolError("a submission begins with its header")
    header = message.header
    if len(header.layout) > MAX_LAYOUT:
        raise ProtocolError(f"the layout has {len(header.layout)} characters; at most {MAX_LAYOUT} are taken")
    if len(header.metrics) > MAX_METRICS + 1:
        raise ProtocolError(f"the run has {len(header.metrics)} metrics; at most {MAX_METRICS + 1} are taken")
    metrics = tuple(name_from_wire(metric, "metric") for metric in header.metrics)
    _once(metrics, "run", "metric")
    return Submission(
        spec=_spec(header.spec),
        task=name_from_wire(header.task.name, "task"),
        digest=digest_from_wire(header.task.digest, "task"),
        layout=Layout.from_json(header.layout),
        metrics=metrics,
        parameters=blob_from_wire(header.parameters),
    )


def _offset(offset: int, blob: Blob) -> int:
    if offset > blob.size:
        raise ProtocolError(f"the offset is {offset}, beyond the {blob.size} bytes of the blob")
    return offset


def _secure(message: pb.Secure) -> Secure:
    ref = ref_from_wire(message.ref)
    return Secure(ref, _bounded(message.message, MAX_SECURE, f"a message of {ref}"))


def _bounded(content: bytes, most: int, what: str) -> bytes:
    if len(content) > most:
        raise ProtocolError(f"{what} has {len(content)} bytes; at most {most} are taken")
    return content


def name_from_wire(text: str, what: str) -> str:
    """Return the name of a run, a task or the like."""
    if not NAME.fullmatch(text):
        raise ProtocolError(f"the {what}'s name is {text[:64]!r}, expected letters, digits and . _ : -")
    return text


def _once(names: Sequence[str], who: str, what: str) -> None:
    if len(set(names)) != len(names):
        raise ProtocolError(f"the {who} names a {what} twice")


def digest_from_wire(text: str, what: str) -> str:
    """Return a SHA-256 in hexadecimal."""
    if not SHA256.fullmatch(text):
        raise ProtocolError(f"the {what}'s digest is {text[:80]!r}, expected 64 hexadecimal digits")
    return text


@lru_cache(8)  # it comes again in every round
def _spec(text: str) -> RunSpec:
    if len(text) > MAX_SPEC:
        raise ProtocolError(f"the run spec has {len(text)} characters; at most {MAX_SPEC} are taken")
    try:
        return RunSpec.model_validate_json(text)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise ProtocolError(
            f"the run spec is not valid at {where or 'its root'}: {problem['msg']}"
        ) from error
