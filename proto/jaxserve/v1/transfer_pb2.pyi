from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FetchRequest(_message.Message):
    __slots__ = ("identity", "token_ids", "first", "tokens", "adapter", "cache_salt", "ticket", "timeout_s", "media", "device")
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    MEDIA_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    identity: bytes
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    first: int
    tokens: int
    adapter: str
    cache_salt: str
    ticket: str
    timeout_s: float
    media: _containers.RepeatedCompositeFieldContainer[MediaPlaces]
    device: DeviceWay
    def __init__(self, identity: _Optional[bytes] = ..., token_ids: _Optional[_Iterable[int]] = ..., first: _Optional[int] = ..., tokens: _Optional[int] = ..., adapter: _Optional[str] = ..., cache_salt: _Optional[str] = ..., ticket: _Optional[str] = ..., timeout_s: _Optional[float] = ..., media: _Optional[_Iterable[_Union[MediaPlaces, _Mapping]]] = ..., device: _Optional[_Union[DeviceWay, _Mapping]] = ...) -> None: ...

class DeviceWay(_message.Message):
    __slots__ = ("platform", "version")
    PLATFORM_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    platform: str
    version: str
    def __init__(self, platform: _Optional[str] = ..., version: _Optional[str] = ...) -> None: ...

class MediaPlaces(_message.Message):
    __slots__ = ("digest", "runs")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    RUNS_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    runs: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, digest: _Optional[bytes] = ..., runs: _Optional[_Iterable[int]] = ...) -> None: ...

class FetchResponse(_message.Message):
    __slots__ = ("page", "content", "digest", "offer")
    PAGE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    OFFER_FIELD_NUMBER: _ClassVar[int]
    page: int
    content: bytes
    digest: bytes
    offer: Offer
    def __init__(self, page: _Optional[int] = ..., content: _Optional[bytes] = ..., digest: _Optional[bytes] = ..., offer: _Optional[_Union[Offer, _Mapping]] = ...) -> None: ...

class Offer(_message.Message):
    __slots__ = ("address", "number", "first", "rows")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    address: str
    number: int
    first: int
    rows: int
    def __init__(self, address: _Optional[str] = ..., number: _Optional[int] = ..., first: _Optional[int] = ..., rows: _Optional[int] = ...) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("ticket", "pulled")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    PULLED_FIELD_NUMBER: _ClassVar[int]
    ticket: str
    pulled: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ticket: _Optional[str] = ..., pulled: _Optional[_Iterable[int]] = ...) -> None: ...

class ReleaseResponse(_message.Message):
    __slots__ = ("found",)
    FOUND_FIELD_NUMBER: _ClassVar[int]
    found: bool
    def __init__(self, found: _Optional[bool] = ...) -> None: ...
