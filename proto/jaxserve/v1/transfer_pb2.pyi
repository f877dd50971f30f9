from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FetchRequest(_message.Message):
    __slots__ = ("identity", "token_ids", "first", "tokens", "adapter", "cache_salt", "ticket", "timeout_s", "media")
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    MEDIA_FIELD_NUMBER: _ClassVar[int]
    identity: bytes
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    first: int
    tokens: int
    adapter: str
    cache_salt: str
    ticket: str
    timeout_s: float
    media: _containers.RepeatedCompositeFieldContainer[MediaPlaces]
    def __init__(self, identity: _Optional[bytes] = ..., token_ids: _Optional[_Iterable[int]] = ..., first: _Optional[int] = ..., tokens: _Optional[int] = ..., adapter: _Optional[str] = ..., cache_salt: _Optional[str] = ..., ticket: _Optional[str] = ..., timeout_s: _Optional[float] = ..., media: _Optional[_Iterable[_Union[MediaPlaces, _Mapping]]] = ...) -> None: ...

class MediaPlaces(_message.Message):
    __slots__ = ("digest", "runs")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    RUNS_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    runs: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, digest: _Optional[bytes] = ..., runs: _Optional[_Iterable[int]] = ...) -> None: ...

class FetchResponse(_message.Message):
    __slots__ = ("page", "content", "digest")
    PAGE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    page: int
    content: bytes
    digest: bytes
    def __init__(self, page: _Optional[int] = ..., content: _Optional[bytes] = ..., digest: _Optional[bytes] = ...) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("ticket",)
    TICKET_FIELD_NUMBER: _ClassVar[int]
    ticket: str
    def __init__(self, ticket: _Optional[str] = ...) -> None: ...

class ReleaseResponse(_message.Message):
    __slots__ = ("found",)
    FOUND_FIELD_NUMBER: _ClassVar[int]
    found: bool
    def __init__(self, found: _Optional[bool] = ...) -> None: ...
