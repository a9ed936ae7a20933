from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EnrolRequest(_message.Message):
    __slots__ = ("secret", "certificate_request")
    SECRET_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_REQUEST_FIELD_NUMBER: _ClassVar[int]
    secret: bytes
    certificate_request: bytes
    def __init__(self, secret: _Optional[bytes] = ..., certificate_request: _Optional[bytes] = ...) -> None: ...

class EnrolResponse(_message.Message):
    __slots__ = ("chain",)
    CHAIN_FIELD_NUMBER: _ClassVar[int]
    chain: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, chain: _Optional[_Iterable[bytes]] = ...) -> None: ...

class RenewalRequest(_message.Message):
    __slots__ = ("certificate_request",)
    CERTIFICATE_REQUEST_FIELD_NUMBER: _ClassVar[int]
    certificate_request: bytes
    def __init__(self, certificate_request: _Optional[bytes] = ...) -> None: ...

class DeniedRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DenyList(_message.Message):
    __slots__ = ("certificates",)
    CERTIFICATES_FIELD_NUMBER: _ClassVar[int]
    certificates: _containers.RepeatedCompositeFieldContainer[DeniedCertificate]
    def __init__(self, certificates: _Optional[_Iterable[_Union[DeniedCertificate, _Mapping]]] = ...) -> None: ...

class DeniedCertificate(_message.Message):
    __slots__ = ("serial", "name", "not_after")
    SERIAL_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    NOT_AFTER_FIELD_NUMBER: _ClassVar[int]
    serial: str
    name: str
    not_after: int
    def __init__(self, serial: _Optional[str] = ..., name: _Optional[str] = ..., not_after: _Optional[int] = ...) -> None: ...

class Token(_message.Message):
    __slots__ = ("address", "root", "name", "secret")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    ROOT_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    SECRET_FIELD_NUMBER: _ClassVar[int]
    address: str
    root: bytes
    name: str
    secret: bytes
    def __init__(self, address: _Optional[str] = ..., root: _Optional[bytes] = ..., name: _Optional[str] = ..., secret: _Optional[bytes] = ...) -> None: ...

class Signed(_message.Message):
    __slots__ = ("content", "signature", "chain")
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    CHAIN_FIELD_NUMBER: _ClassVar[int]
    content: bytes
    signature: bytes
    chain: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, content: _Optional[bytes] = ..., signature: _Optional[bytes] = ..., chain: _Optional[_Iterable[bytes]] = ...) -> None: ...

class LedgerHead(_message.Message):
    __slots__ = ("sequence", "hash")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    HASH_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    hash: bytes
    def __init__(self, sequence: _Optional[int] = ..., hash: _Optional[bytes] = ...) -> None: ...

class LedgerStatement(_message.Message):
    __slots__ = ("ledger", "head", "previous")
    LEDGER_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_FIELD_NUMBER: _ClassVar[int]
    ledger: str
    head: LedgerHead
    previous: LedgerHead
    def __init__(self, ledger: _Optional[str] = ..., head: _Optional[_Union[LedgerHead, _Mapping]] = ..., previous: _Optional[_Union[LedgerHead, _Mapping]] = ...) -> None: ...

class LedgerReceipt(_message.Message):
    __slots__ = ("name", "ledger", "head", "time")
    NAME_FIELD_NUMBER: _ClassVar[int]
    LEDGER_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    name: str
    ledger: str
    head: LedgerHead
    time: float
    def __init__(self, name: _Optional[str] = ..., ledger: _Optional[str] = ..., head: _Optional[_Union[LedgerHead, _Mapping]] = ..., time: _Optional[float] = ...) -> None: ...
