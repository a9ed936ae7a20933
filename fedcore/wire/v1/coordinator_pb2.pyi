from fedcore.wire.v1 import authority_pb2 as _authority_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    KIND_UNSPECIFIED: _ClassVar[Kind]
    KIND_TRAIN: _ClassVar[Kind]
    KIND_EVALUATE: _ClassVar[Kind]
    KIND_ROOT: _ClassVar[Kind]
    KIND_OFFER: _ClassVar[Kind]

class Status(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STATUS_UNSPECIFIED: _ClassVar[Status]
    STATUS_FOLDED: _ClassVar[Status]
    STATUS_LATE: _ClassVar[Status]
    STATUS_REFUSED: _ClassVar[Status]
KIND_UNSPECIFIED: Kind
KIND_TRAIN: Kind
KIND_EVALUATE: Kind
KIND_ROOT: Kind
KIND_OFFER: Kind
STATUS_UNSPECIFIED: Status
STATUS_FOLDED: Status
STATUS_LATE: Status
STATUS_REFUSED: Status

class Ref(_message.Message):
    __slots__ = ("run", "round", "attempt", "kind")
    RUN_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    run: str
    round: int
    attempt: int
    kind: Kind
    def __init__(self, run: _Optional[str] = ..., round: _Optional[int] = ..., attempt: _Optional[int] = ..., kind: _Optional[_Union[Kind, str]] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("index", "data")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    index: int
    data: bytes
    def __init__(self, index: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class Blob(_message.Message):
    __slots__ = ("sha256", "size")
    SHA256_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    sha256: str
    size: int
    def __init__(self, sha256: _Optional[str] = ..., size: _Optional[int] = ...) -> None: ...

class FromAgent(_message.Message):
    __slots__ = ("hello", "decline", "accept", "secure", "update")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    DECLINE_FIELD_NUMBER: _ClassVar[int]
    ACCEPT_FIELD_NUMBER: _ClassVar[int]
    SECURE_FIELD_NUMBER: _ClassVar[int]
    UPDATE_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    decline: Decline
    accept: Accept
    secure: Secure
    update: SmallUpdate
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., decline: _Optional[_Union[Decline, _Mapping]] = ..., accept: _Optional[_Union[Accept, _Mapping]] = ..., secure: _Optional[_Union[Secure, _Mapping]] = ..., update: _Optional[_Union[SmallUpdate, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("version", "tasks", "evaluator", "pending", "labels", "instance")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    EVALUATOR_FIELD_NUMBER: _ClassVar[int]
    PENDING_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    version: int
    tasks: _containers.RepeatedCompositeFieldContainer[TaskName]
    evaluator: bool
    pending: _containers.RepeatedCompositeFieldContainer[Ref]
    labels: _containers.ScalarMap[str, str]
    instance: int
    def __init__(self, version: _Optional[int] = ..., tasks: _Optional[_Iterable[_Union[TaskName, _Mapping]]] = ..., evaluator: bool = ..., pending: _Optional[_Iterable[_Union[Ref, _Mapping]]] = ..., labels: _Optional[_Mapping[str, str]] = ..., instance: _Optional[int] = ...) -> None: ...

class TaskName(_message.Message):
    __slots__ = ("name", "digest")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    name: str
    digest: str
    def __init__(self, name: _Optional[str] = ..., digest: _Optional[str] = ...) -> None: ...

class Decline(_message.Message):
    __slots__ = ("ref", "reason")
    REF_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ref: Ref
    reason: str
    def __init__(self, ref: _Optional[_Union[Ref, _Mapping]] = ..., reason: _Optional[str] = ...) -> None: ...

class Accept(_message.Message):
    __slots__ = ("ref",)
    REF_FIELD_NUMBER: _ClassVar[int]
    ref: Ref
    def __init__(self, ref: _Optional[_Union[Ref, _Mapping]] = ...) -> None: ...

class ToAgent(_message.Message):
    __slots__ = ("welcome", "assignment", "outcome", "secure", "pause", "receipt", "batch")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    ASSIGNMENT_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    SECURE_FIELD_NUMBER: _ClassVar[int]
    PAUSE_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    assignment: Assignment
    outcome: Outcome
    secure: Secure
    pause: Pause
    receipt: Receipt
    batch: Batch
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., assignment: _Optional[_Union[Assignment, _Mapping]] = ..., outcome: _Optional[_Union[Outcome, _Mapping]] = ..., secure: _Optional[_Union[Secure, _Mapping]] = ..., pause: _Optional[_Union[Pause, _Mapping]] = ..., receipt: _Optional[_Union[Receipt, _Mapping]] = ..., batch: _Optional[_Union[Batch, _Mapping]] = ...) -> None: ...

class Batch(_message.Message):
    __slots__ = ("messages",)
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[ToAgent]
    def __init__(self, messages: _Optional[_Iterable[_Union[ToAgent, _Mapping]]] = ...) -> None: ...

class Pause(_message.Message):
    __slots__ = ("seconds",)
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    seconds: float
    def __init__(self, seconds: _Optional[float] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("coordinator",)
    COORDINATOR_FIELD_NUMBER: _ClassVar[int]
    coordinator: str
    def __init__(self, coordinator: _Optional[str] = ...) -> None: ...

class Assignment(_message.Message):
    __slots__ = ("ref", "task", "spec", "layout", "parameters", "cohort", "deadline", "folded", "clip", "key", "certificate", "content")
    REF_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    COHORT_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_FIELD_NUMBER: _ClassVar[int]
    FOLDED_FIELD_NUMBER: _ClassVar[int]
    CLIP_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    ref: Ref
    task: TaskName
    spec: str
    layout: str
    parameters: Blob
    cohort: int
    deadline: float
    folded: Ref
    clip: float
    key: _authority_pb2.Signed
    certificate: bytes
    content: bytes
    def __init__(self, ref: _Optional[_Union[Ref, _Mapping]] = ..., task: _Optional[_Union[TaskName, _Mapping]] = ..., spec: _Optional[str] = ..., layout: _Optional[str] = ..., parameters: _Optional[_Union[Blob, _Mapping]] = ..., cohort: _Optional[int] = ..., deadline: _Optional[float] = ..., folded: _Optional[_Union[Ref, _Mapping]] = ..., clip: _Optional[float] = ..., key: _Optional[_Union[_authority_pb2.Signed, _Mapping]] = ..., certificate: _Optional[bytes] = ..., content: _Optional[bytes] = ...) -> None: ...

class AggregatorKey(_message.Message):
    __slots__ = ("ref", "public_key")
    REF_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    ref: Ref
    public_key: bytes
    def __init__(self, ref: _Optional[_Union[Ref, _Mapping]] = ..., public_key: _Optional[bytes] = ...) -> None: ...

class Secure(_message.Message):
    __slots__ = ("ref", "message")
    REF_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    ref: Ref
    message: bytes
    def __init__(self, ref: _Optional[_Union[Ref, _Mapping]] = ..., message: _Optional[bytes] = ...) -> None: ...

class Outcome(_message.Message):
    __slots__ = ("ref", "verdict")
    REF_FIELD_NUMBER: _ClassVar[int]
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    ref: Ref
    verdict: Verdict
    def __init__(self, ref: _Optional[_Union[Ref, _Mapping]] = ..., verdict: _Optional[_Union[Verdict, _Mapping]] = ...) -> None: ...

class Verdict(_message.Message):
    __slots__ = ("status", "reason")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    status: Status
    reason: str
    def __init__(self, status: _Optional[_Union[Status, str]] = ..., reason: _Optional[str] = ...) -> None: ...

class Wanted(_message.Message):
    __slots__ = ("blob", "offset")
    BLOB_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    blob: Blob
    offset: int
    def __init__(self, blob: _Optional[_Union[Blob, _Mapping]] = ..., offset: _Optional[int] = ...) -> None: ...

class UploadPart(_message.Message):
    __slots__ = ("header", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: UploadHeader
    chunk: Chunk
    def __init__(self, header: _Optional[_Union[UploadHeader, _Mapping]] = ..., chunk: _Optional[_Union[Chunk, _Mapping]] = ...) -> None: ...

class UploadHeader(_message.Message):
    __slots__ = ("ref", "scalars", "vectors", "payload", "offset")
    class ScalarsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    REF_FIELD_NUMBER: _ClassVar[int]
    SCALARS_FIELD_NUMBER: _ClassVar[int]
    VECTORS_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    ref: Ref
    scalars: _containers.ScalarMap[str, float]
    vectors: _containers.RepeatedCompositeFieldContainer[VectorHead]
    payload: Blob
    offset: int
    def __init__(self, ref: _Optional[_Union[Ref, _Mapping]] = ..., scalars: _Optional[_Mapping[str, float]] = ..., vectors: _Optional[_Iterable[_Union[VectorHead, _Mapping]]] = ..., payload: _Optional[_Union[Blob, _Mapping]] = ..., offset: _Optional[int] = ...) -> None: ...

class SmallUpdate(_message.Message):
    __slots__ = ("header", "payload")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    header: UploadHeader
    payload: bytes
    def __init__(self, header: _Optional[_Union[UploadHeader, _Mapping]] = ..., payload: _Optional[bytes] = ...) -> None: ...

class VectorHead(_message.Message):
    __slots__ = ("name", "length")
    NAME_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    name: str
    length: int
    def __init__(self, name: _Optional[str] = ..., length: _Optional[int] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("bytes", "received")
    BYTES_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    bytes: int
    received: bool
    def __init__(self, bytes: _Optional[int] = ..., received: bool = ...) -> None: ...

class Receipt(_message.Message):
    __slots__ = ("ref", "code", "reason")
    REF_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ref: Ref
    code: int
    reason: str
    def __init__(self, ref: _Optional[_Union[Ref, _Mapping]] = ..., code: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class SubmitPart(_message.Message):
    __slots__ = ("header", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: SubmitHeader
    chunk: Chunk
    def __init__(self, header: _Optional[_Union[SubmitHeader, _Mapping]] = ..., chunk: _Optional[_Union[Chunk, _Mapping]] = ...) -> None: ...

class SubmitHeader(_message.Message):
    __slots__ = ("spec", "task", "layout", "metrics", "parameters")
    SPEC_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    spec: str
    task: TaskName
    layout: str
    metrics: _containers.RepeatedScalarFieldContainer[str]
    parameters: Blob
    def __init__(self, spec: _Optional[str] = ..., task: _Optional[_Union[TaskName, _Mapping]] = ..., layout: _Optional[str] = ..., metrics: _Optional[_Iterable[str]] = ..., parameters: _Optional[_Union[Blob, _Mapping]] = ...) -> None: ...

class ListRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RunName(_message.Message):
    __slots__ = ("run",)
    RUN_FIELD_NUMBER: _ClassVar[int]
    run: str
    def __init__(self, run: _Optional[str] = ...) -> None: ...

class RunList(_message.Message):
    __slots__ = ("runs",)
    RUNS_FIELD_NUMBER: _ClassVar[int]
    runs: _containers.RepeatedCompositeFieldContainer[RunInfo]
    def __init__(self, runs: _Optional[_Iterable[_Union[RunInfo, _Mapping]]] = ...) -> None: ...

class RunInfo(_message.Message):
    __slots__ = ("run", "name", "state", "detail", "round", "rounds", "task", "parameters", "metrics", "created", "layout")
    RUN_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    run: str
    name: str
    state: str
    detail: str
    round: int
    rounds: int
    task: str
    parameters: Blob
    metrics: _containers.RepeatedScalarFieldContainer[str]
    created: float
    layout: str
    def __init__(self, run: _Optional[str] = ..., name: _Optional[str] = ..., state: _Optional[str] = ..., detail: _Optional[str] = ..., round: _Optional[int] = ..., rounds: _Optional[int] = ..., task: _Optional[str] = ..., parameters: _Optional[_Union[Blob, _Mapping]] = ..., metrics: _Optional[_Iterable[str]] = ..., created: _Optional[float] = ..., layout: _Optional[str] = ...) -> None: ...

class ClientsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ClientName(_message.Message):
    __slots__ = ("client",)
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    client: str
    def __init__(self, client: _Optional[str] = ...) -> None: ...

class ClientList(_message.Message):
    __slots__ = ("clients",)
    CLIENTS_FIELD_NUMBER: _ClassVar[int]
    clients: _containers.RepeatedCompositeFieldContainer[ClientInfo]
    def __init__(self, clients: _Optional[_Iterable[_Union[ClientInfo, _Mapping]]] = ...) -> None: ...

class ClientInfo(_message.Message):
    __slots__ = ("client", "connected", "evaluator", "labels", "run", "refused", "reason", "offences", "offence", "offended", "quarantined")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    CONNECTED_FIELD_NUMBER: _ClassVar[int]
    EVALUATOR_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    OFFENCES_FIELD_NUMBER: _ClassVar[int]
    OFFENCE_FIELD_NUMBER: _ClassVar[int]
    OFFENDED_FIELD_NUMBER: _ClassVar[int]
    QUARANTINED_FIELD_NUMBER: _ClassVar[int]
    client: str
    connected: bool
    evaluator: bool
    labels: _containers.ScalarMap[str, str]
    run: str
    refused: int
    reason: str
    offences: int
    offence: str
    offended: float
    quarantined: bool
    def __init__(self, client: _Optional[str] = ..., connected: bool = ..., evaluator: bool = ..., labels: _Optional[_Mapping[str, str]] = ..., run: _Optional[str] = ..., refused: _Optional[int] = ..., reason: _Optional[str] = ..., offences: _Optional[int] = ..., offence: _Optional[str] = ..., offended: _Optional[float] = ..., quarantined: bool = ...) -> None: ...
