from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FollowRequest(_message.Message):
    __slots__ = ("hello", "arrival", "heartbeat", "sampled", "end")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    ARRIVAL_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    SAMPLED_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    arrival: Arrival
    heartbeat: Heartbeat
    sampled: Sampled
    end: End
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., arrival: _Optional[_Union[Arrival, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., sampled: _Optional[_Union[Sampled, _Mapping]] = ..., end: _Optional[_Union[End, _Mapping]] = ...) -> None: ...

class FollowResponse(_message.Message):
    __slots__ = ("welcome", "departure", "heartbeat", "command", "end")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    DEPARTURE_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    COMMAND_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    departure: Departure
    heartbeat: Heartbeat
    command: Command
    end: End
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., departure: _Optional[_Union[Departure, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., command: _Optional[_Union[Command, _Mapping]] = ..., end: _Optional[_Union[End, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("process_id", "facts")
    class FactsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    PROCESS_ID_FIELD_NUMBER: _ClassVar[int]
    FACTS_FIELD_NUMBER: _ClassVar[int]
    process_id: int
    facts: _containers.ScalarMap[str, str]
    def __init__(self, process_id: _Optional[int] = ..., facts: _Optional[_Mapping[str, str]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Arrival(_message.Message):
    __slots__ = ("point", "value")
    POINT_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    point: str
    value: int
    def __init__(self, point: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...

class Departure(_message.Message):
    __slots__ = ("point", "value")
    POINT_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    point: str
    value: int
    def __init__(self, point: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...

class Sampled(_message.Message):
    __slots__ = ("number", "digest")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    number: int
    digest: bytes
    def __init__(self, number: _Optional[int] = ..., digest: _Optional[bytes] = ...) -> None: ...

class End(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class Command(_message.Message):
    __slots__ = ("forward", "sample", "decode_loop", "load_slot", "pool", "prompt_logprobs", "pages_out", "pages_in", "pages_dropped", "clear_states", "load_states", "save_states", "load_adapter")
    FORWARD_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    DECODE_LOOP_FIELD_NUMBER: _ClassVar[int]
    LOAD_SLOT_FIELD_NUMBER: _ClassVar[int]
    POOL_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PAGES_OUT_FIELD_NUMBER: _ClassVar[int]
    PAGES_IN_FIELD_NUMBER: _ClassVar[int]
    PAGES_DROPPED_FIELD_NUMBER: _ClassVar[int]
    CLEAR_STATES_FIELD_NUMBER: _ClassVar[int]
    LOAD_STATES_FIELD_NUMBER: _ClassVar[int]
    SAVE_STATES_FIELD_NUMBER: _ClassVar[int]
    LOAD_ADAPTER_FIELD_NUMBER: _ClassVar[int]
    forward: Forward
    sample: Sample
    decode_loop: DecodeLoop
    load_slot: LoadSlot
    pool: Pool
    prompt_logprobs: PromptLogprobs
    pages_out: PageMoves
    pages_in: PageMoves
    pages_dropped: PageMoves
    clear_states: StateMoves
    load_states: StateMoves
    save_states: StateMoves
    load_adapter: LoadAdapter
    def __init__(self, forward: _Optional[_Union[Forward, _Mapping]] = ..., sample: _Optional[_Union[Sample, _Mapping]] = ..., decode_loop: _Optional[_Union[DecodeLoop, _Mapping]] = ..., load_slot: _Optional[_Union[LoadSlot, _Mapping]] = ..., pool: _Optional[_Union[Pool, _Mapping]] = ..., prompt_logprobs: _Optional[_Union[PromptLogprobs, _Mapping]] = ..., pages_out: _Optional[_Union[PageMoves, _Mapping]] = ..., pages_in: _Optional[_Union[PageMoves, _Mapping]] = ..., pages_dropped: _Optional[_Union[PageMoves, _Mapping]] = ..., clear_states: _Optional[_Union[StateMoves, _Mapping]] = ..., load_states: _Optional[_Union[StateMoves, _Mapping]] = ..., save_states: _Optional[_Union[StateMoves, _Mapping]] = ..., load_adapter: _Optional[_Union[LoadAdapter, _Mapping]] = ...) -> None: ...

class PageMoves(_message.Message):
    __slots__ = ("replicas", "pages", "keys")
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    replicas: bytes
    pages: bytes
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, replicas: _Optional[bytes] = ..., pages: _Optional[bytes] = ..., keys: _Optional[_Iterable[bytes]] = ...) -> None: ...

class StateMoves(_message.Message):
    __slots__ = ("replicas", "slots", "rows")
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    replicas: bytes
    slots: bytes
    rows: bytes
    def __init__(self, replicas: _Optional[bytes] = ..., slots: _Optional[bytes] = ..., rows: _Optional[bytes] = ...) -> None: ...

class Bucket(_message.Message):
    __slots__ = ("decode", "chunk", "rows", "queries")
    DECODE_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    QUERIES_FIELD_NUMBER: _ClassVar[int]
    decode: int
    chunk: int
    rows: int
    queries: int
    def __init__(self, decode: _Optional[int] = ..., chunk: _Optional[int] = ..., rows: _Optional[int] = ..., queries: _Optional[int] = ...) -> None: ...

class Forward(_message.Message):
    __slots__ = ("bucket", "packed", "adapted")
    BUCKET_FIELD_NUMBER: _ClassVar[int]
    PACKED_FIELD_NUMBER: _ClassVar[int]
    ADAPTED_FIELD_NUMBER: _ClassVar[int]
    bucket: Bucket
    packed: bytes
    adapted: bool
    def __init__(self, bucket: _Optional[_Union[Bucket, _Mapping]] = ..., packed: _Optional[bytes] = ..., adapted: _Optional[bool] = ...) -> None: ...

class LoadAdapter(_message.Message):
    __slots__ = ("slot", "packed")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    PACKED_FIELD_NUMBER: _ClassVar[int]
    slot: int
    packed: bytes
    def __init__(self, slot: _Optional[int] = ..., packed: _Optional[bytes] = ...) -> None: ...

class Sample(_message.Message):
    __slots__ = ("rows", "packed", "mask", "adapted")
    ROWS_FIELD_NUMBER: _ClassVar[int]
    PACKED_FIELD_NUMBER: _ClassVar[int]
    MASK_FIELD_NUMBER: _ClassVar[int]
    ADAPTED_FIELD_NUMBER: _ClassVar[int]
    rows: int
    packed: bytes
    mask: bytes
    adapted: bool
    def __init__(self, rows: _Optional[int] = ..., packed: _Optional[bytes] = ..., mask: _Optional[bytes] = ..., adapted: _Optional[bool] = ...) -> None: ...

class DecodeLoop(_message.Message):
    __slots__ = ("bucket", "forward", "sample", "steps")
    BUCKET_FIELD_NUMBER: _ClassVar[int]
    FORWARD_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    bucket: Bucket
    forward: bytes
    sample: bytes
    steps: int
    def __init__(self, bucket: _Optional[_Union[Bucket, _Mapping]] = ..., forward: _Optional[bytes] = ..., sample: _Optional[bytes] = ..., steps: _Optional[int] = ...) -> None: ...

class LoadSlot(_message.Message):
    __slots__ = ("replica", "slot", "seen", "bias_ids", "bias_values", "banned_ids")
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    SEEN_FIELD_NUMBER: _ClassVar[int]
    BIAS_IDS_FIELD_NUMBER: _ClassVar[int]
    BIAS_VALUES_FIELD_NUMBER: _ClassVar[int]
    BANNED_IDS_FIELD_NUMBER: _ClassVar[int]
    replica: int
    slot: int
    seen: bytes
    bias_ids: bytes
    bias_values: bytes
    banned_ids: bytes
    def __init__(self, replica: _Optional[int] = ..., slot: _Optional[int] = ..., seen: _Optional[bytes] = ..., bias_ids: _Optional[bytes] = ..., bias_values: _Optional[bytes] = ..., banned_ids: _Optional[bytes] = ...) -> None: ...

class Pool(_message.Message):
    __slots__ = ("tokens", "weights")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    tokens: int
    weights: bytes
    def __init__(self, tokens: _Optional[int] = ..., weights: _Optional[bytes] = ...) -> None: ...

class PromptLogprobs(_message.Message):
    __slots__ = ("tokens", "rows", "targets", "adapters")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    tokens: int
    rows: bytes
    targets: bytes
    adapters: bytes
    def __init__(self, tokens: _Optional[int] = ..., rows: _Optional[bytes] = ..., targets: _Optional[bytes] = ..., adapters: _Optional[bytes] = ...) -> None: ...
