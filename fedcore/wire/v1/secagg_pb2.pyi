from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Said(_message.Message):
    __slots__ = ("step", "content", "signature", "issuer")
    STEP_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    ISSUER_FIELD_NUMBER: _ClassVar[int]
    step: str
    content: bytes
    signature: bytes
    issuer: bytes
    def __init__(self, step: _Optional[str] = ..., content: _Optional[bytes] = ..., signature: _Optional[bytes] = ..., issuer: _Optional[bytes] = ...) -> None: ...

class Advertisement(_message.Message):
    __slots__ = ("mask_key", "channel_key", "commitment", "nonce", "leaf")
    MASK_KEY_FIELD_NUMBER: _ClassVar[int]
    CHANNEL_KEY_FIELD_NUMBER: _ClassVar[int]
    COMMITMENT_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    LEAF_FIELD_NUMBER: _ClassVar[int]
    mask_key: bytes
    channel_key: bytes
    commitment: bytes
    nonce: bytes
    leaf: bytes
    def __init__(self, mask_key: _Optional[bytes] = ..., channel_key: _Optional[bytes] = ..., commitment: _Optional[bytes] = ..., nonce: _Optional[bytes] = ..., leaf: _Optional[bytes] = ...) -> None: ...

class Cohort(_message.Message):
    __slots__ = ("advertisements", "issuers", "leaf")
    ADVERTISEMENTS_FIELD_NUMBER: _ClassVar[int]
    ISSUERS_FIELD_NUMBER: _ClassVar[int]
    LEAF_FIELD_NUMBER: _ClassVar[int]
    advertisements: _containers.RepeatedCompositeFieldContainer[Said]
    issuers: _containers.RepeatedScalarFieldContainer[bytes]
    leaf: bytes
    def __init__(self, advertisements: _Optional[_Iterable[_Union[Said, _Mapping]]] = ..., issuers: _Optional[_Iterable[bytes]] = ..., leaf: _Optional[bytes] = ...) -> None: ...

class Members(_message.Message):
    __slots__ = ("positions",)
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    positions: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, positions: _Optional[_Iterable[int]] = ...) -> None: ...

class Ciphertexts(_message.Message):
    __slots__ = ("each",)
    EACH_FIELD_NUMBER: _ClassVar[int]
    each: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, each: _Optional[_Iterable[bytes]] = ...) -> None: ...

class Holders(_message.Message):
    __slots__ = ("holders",)
    HOLDERS_FIELD_NUMBER: _ClassVar[int]
    holders: _containers.RepeatedCompositeFieldContainer[Holder]
    def __init__(self, holders: _Optional[_Iterable[_Union[Holder, _Mapping]]] = ...) -> None: ...

class Holder(_message.Message):
    __slots__ = ("position", "held", "signature")
    POSITION_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    position: int
    held: bytes
    signature: bytes
    def __init__(self, position: _Optional[int] = ..., held: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class Votes(_message.Message):
    __slots__ = ("votes",)
    VOTES_FIELD_NUMBER: _ClassVar[int]
    votes: _containers.RepeatedCompositeFieldContainer[Vote]
    def __init__(self, votes: _Optional[_Iterable[_Union[Vote, _Mapping]]] = ...) -> None: ...

class Vote(_message.Message):
    __slots__ = ("position", "signature")
    POSITION_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    position: int
    signature: bytes
    def __init__(self, position: _Optional[int] = ..., signature: _Optional[bytes] = ...) -> None: ...

class Shares(_message.Message):
    __slots__ = ("each",)
    EACH_FIELD_NUMBER: _ClassVar[int]
    each: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, each: _Optional[_Iterable[bytes]] = ...) -> None: ...

class Certificates(_message.Message):
    __slots__ = ("attempts",)
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    attempts: _containers.RepeatedCompositeFieldContainer[Certificate]
    def __init__(self, attempts: _Optional[_Iterable[_Union[Certificate, _Mapping]]] = ...) -> None: ...

class Certificate(_message.Message):
    __slots__ = ("transcript", "aborted")
    TRANSCRIPT_FIELD_NUMBER: _ClassVar[int]
    ABORTED_FIELD_NUMBER: _ClassVar[int]
    transcript: bytes
    aborted: Votes
    def __init__(self, transcript: _Optional[bytes] = ..., aborted: _Optional[_Union[Votes, _Mapping]] = ...) -> None: ...

class SentWords(_message.Message):
    __slots__ = ("run", "round", "attempt", "kind", "transcript", "keys")
    RUN_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    TRANSCRIPT_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    run: str
    round: int
    attempt: int
    kind: str
    transcript: bytes
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, run: _Optional[str] = ..., round: _Optional[int] = ..., attempt: _Optional[int] = ..., kind: _Optional[str] = ..., transcript: _Optional[bytes] = ..., keys: _Optional[_Iterable[bytes]] = ...) -> None: ...

class Recorded(_message.Message):
    __slots__ = ("received", "uploaded", "told", "aborted")
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    UPLOADED_FIELD_NUMBER: _ClassVar[int]
    TOLD_FIELD_NUMBER: _ClassVar[int]
    ABORTED_FIELD_NUMBER: _ClassVar[int]
    received: From
    uploaded: str
    told: bytes
    aborted: bytes
    def __init__(self, received: _Optional[_Union[From, _Mapping]] = ..., uploaded: _Optional[str] = ..., told: _Optional[bytes] = ..., aborted: _Optional[bytes] = ...) -> None: ...

class From(_message.Message):
    __slots__ = ("client", "message")
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    client: str
    message: bytes
    def __init__(self, client: _Optional[str] = ..., message: _Optional[bytes] = ...) -> None: ...
