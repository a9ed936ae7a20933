from fedcore.wire.v1 import coordinator_pb2 as _coordinator_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FromHost(_message.Message):
    __slots__ = ("hello",)
    HELLO_FIELD_NUMBER: _ClassVar[int]
    hello: HostHello
    def __init__(self, hello: _Optional[_Union[HostHello, _Mapping]] = ...) -> None: ...

class HostHello(_message.Message):
    __slots__ = ("version", "apps", "runs")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    APPS_FIELD_NUMBER: _ClassVar[int]
    RUNS_FIELD_NUMBER: _ClassVar[int]
    version: int
    apps: _containers.RepeatedCompositeFieldContainer[_coordinator_pb2.TaskName]
    runs: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, version: _Optional[int] = ..., apps: _Optional[_Iterable[_Union[_coordinator_pb2.TaskName, _Mapping]]] = ..., runs: _Optional[_Iterable[str]] = ...) -> None: ...

class ToHost(_message.Message):
    __slots__ = ("letter", "over", "void")
    LETTER_FIELD_NUMBER: _ClassVar[int]
    OVER_FIELD_NUMBER: _ClassVar[int]
    VOID_FIELD_NUMBER: _ClassVar[int]
    letter: Letter
    over: _coordinator_pb2.RunName
    void: LetterName
    def __init__(self, letter: _Optional[_Union[Letter, _Mapping]] = ..., over: _Optional[_Union[_coordinator_pb2.RunName, _Mapping]] = ..., void: _Optional[_Union[LetterName, _Mapping]] = ...) -> None: ...

class Letter(_message.Message):
    __slots__ = ("name", "app", "head", "content", "ttl")
    NAME_FIELD_NUMBER: _ClassVar[int]
    APP_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    TTL_FIELD_NUMBER: _ClassVar[int]
    name: LetterName
    app: _coordinator_pb2.TaskName
    head: bytes
    content: _coordinator_pb2.Blob
    ttl: float
    def __init__(self, name: _Optional[_Union[LetterName, _Mapping]] = ..., app: _Optional[_Union[_coordinator_pb2.TaskName, _Mapping]] = ..., head: _Optional[bytes] = ..., content: _Optional[_Union[_coordinator_pb2.Blob, _Mapping]] = ..., ttl: _Optional[float] = ...) -> None: ...

class LetterName(_message.Message):
    __slots__ = ("run", "id")
    RUN_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    run: str
    id: str
    def __init__(self, run: _Optional[str] = ..., id: _Optional[str] = ...) -> None: ...

class Taking(_message.Message):
    __slots__ = ("letter", "offset")
    LETTER_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    letter: LetterName
    offset: int
    def __init__(self, letter: _Optional[_Union[LetterName, _Mapping]] = ..., offset: _Optional[int] = ...) -> None: ...

class ReplyPart(_message.Message):
    __slots__ = ("header", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: ReplyHeader
    chunk: _coordinator_pb2.Chunk
    def __init__(self, header: _Optional[_Union[ReplyHeader, _Mapping]] = ..., chunk: _Optional[_Union[_coordinator_pb2.Chunk, _Mapping]] = ...) -> None: ...

class ReplyHeader(_message.Message):
    __slots__ = ("letter", "head", "content")
    LETTER_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    letter: LetterName
    head: bytes
    content: _coordinator_pb2.Blob
    def __init__(self, letter: _Optional[_Union[LetterName, _Mapping]] = ..., head: _Optional[bytes] = ..., content: _Optional[_Union[_coordinator_pb2.Blob, _Mapping]] = ...) -> None: ...

class AppHeader(_message.Message):
    __slots__ = ("app", "name")
    APP_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    app: _coordinator_pb2.TaskName
    name: str
    def __init__(self, app: _Optional[_Union[_coordinator_pb2.TaskName, _Mapping]] = ..., name: _Optional[str] = ...) -> None: ...

class HostList(_message.Message):
    __slots__ = ("clients", "others")
    CLIENTS_FIELD_NUMBER: _ClassVar[int]
    OTHERS_FIELD_NUMBER: _ClassVar[int]
    clients: _containers.RepeatedScalarFieldContainer[str]
    others: int
    def __init__(self, clients: _Optional[_Iterable[str]] = ..., others: _Optional[int] = ...) -> None: ...

class DepositPart(_message.Message):
    __slots__ = ("header", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: DepositHeader
    chunk: _coordinator_pb2.Chunk
    def __init__(self, header: _Optional[_Union[DepositHeader, _Mapping]] = ..., chunk: _Optional[_Union[_coordinator_pb2.Chunk, _Mapping]] = ...) -> None: ...

class DepositHeader(_message.Message):
    __slots__ = ("run", "content")
    RUN_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    run: str
    content: _coordinator_pb2.Blob
    def __init__(self, run: _Optional[str] = ..., content: _Optional[_Union[_coordinator_pb2.Blob, _Mapping]] = ...) -> None: ...

class LetterList(_message.Message):
    __slots__ = ("run", "letters")
    RUN_FIELD_NUMBER: _ClassVar[int]
    LETTERS_FIELD_NUMBER: _ClassVar[int]
    run: str
    letters: _containers.RepeatedCompositeFieldContainer[AppLetter]
    def __init__(self, run: _Optional[str] = ..., letters: _Optional[_Iterable[_Union[AppLetter, _Mapping]]] = ...) -> None: ...

class AppLetter(_message.Message):
    __slots__ = ("id", "client", "head", "content", "ttl")
    ID_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    TTL_FIELD_NUMBER: _ClassVar[int]
    id: str
    client: str
    head: bytes
    content: _coordinator_pb2.Blob
    ttl: float
    def __init__(self, id: _Optional[str] = ..., client: _Optional[str] = ..., head: _Optional[bytes] = ..., content: _Optional[_Union[_coordinator_pb2.Blob, _Mapping]] = ..., ttl: _Optional[float] = ...) -> None: ...

class Missing(_message.Message):
    __slots__ = ("contents",)
    CONTENTS_FIELD_NUMBER: _ClassVar[int]
    contents: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, contents: _Optional[_Iterable[str]] = ...) -> None: ...

class LetterNames(_message.Message):
    __slots__ = ("run", "ids")
    RUN_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    run: str
    ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, run: _Optional[str] = ..., ids: _Optional[_Iterable[str]] = ...) -> None: ...

class Answer(_message.Message):
    __slots__ = ("id", "head", "content")
    ID_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    id: str
    head: bytes
    content: _coordinator_pb2.Blob
    def __init__(self, id: _Optional[str] = ..., head: _Optional[bytes] = ..., content: _Optional[_Union[_coordinator_pb2.Blob, _Mapping]] = ...) -> None: ...

class AppEnd(_message.Message):
    __slots__ = ("run", "state", "detail")
    RUN_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    run: str
    state: str
    detail: str
    def __init__(self, run: _Optional[str] = ..., state: _Optional[str] = ..., detail: _Optional[str] = ...) -> None: ...
