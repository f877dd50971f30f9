from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetServerInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetServerInfoResponse(_message.Message):
    __slots__ = ("version", "platform", "mesh", "uptime_s", "draining", "num_running", "num_waiting", "num_pages_free", "num_pages_total", "prompt_tokens", "generation_tokens", "num_steps", "num_preemptions", "num_recompilations", "prefix_queries", "prefix_hits", "num_scheduled_tokens", "num_bucket_tokens", "host_time_s", "device_wait_time_s", "adapters", "takes_adapters", "num_drafts", "num_draft_tokens", "num_accepted_tokens", "accepted_per_pos", "transfers", "media_queries", "media_hits", "media_time_s")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PLATFORM_FIELD_NUMBER: _ClassVar[int]
    MESH_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    NUM_PAGES_FREE_FIELD_NUMBER: _ClassVar[int]
    NUM_PAGES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    GENERATION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    NUM_PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_RECOMPILATIONS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_QUERIES_FIELD_NUMBER: _ClassVar[int]
    PREFIX_HITS_FIELD_NUMBER: _ClassVar[int]
    NUM_SCHEDULED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_BUCKET_TOKENS_FIELD_NUMBER: _ClassVar[int]
    HOST_TIME_S_FIELD_NUMBER: _ClassVar[int]
    DEVICE_WAIT_TIME_S_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    TAKES_ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    NUM_DRAFTS_FIELD_NUMBER: _ClassVar[int]
    NUM_DRAFT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_ACCEPTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_PER_POS_FIELD_NUMBER: _ClassVar[int]
    TRANSFERS_FIELD_NUMBER: _ClassVar[int]
    MEDIA_QUERIES_FIELD_NUMBER: _ClassVar[int]
    MEDIA_HITS_FIELD_NUMBER: _ClassVar[int]
    MEDIA_TIME_S_FIELD_NUMBER: _ClassVar[int]
    version: str
    platform: str
    mesh: str
    uptime_s: float
    draining: bool
    num_running: int
    num_waiting: int
    num_pages_free: int
    num_pages_total: int
    prompt_tokens: int
    generation_tokens: int
    num_steps: int
    num_preemptions: int
    num_recompilations: int
    prefix_queries: int
    prefix_hits: int
    num_scheduled_tokens: int
    num_bucket_tokens: int
    host_time_s: float
    device_wait_time_s: float
    adapters: _containers.RepeatedCompositeFieldContainer[LoadedAdapter]
    takes_adapters: bool
    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    accepted_per_pos: _containers.RepeatedScalarFieldContainer[int]
    transfers: TransferFigures
    media_queries: int
    media_hits: int
    media_time_s: float
    def __init__(self, version: _Optional[str] = ..., platform: _Optional[str] = ..., mesh: _Optional[str] = ..., uptime_s: _Optional[float] = ..., draining: _Optional[bool] = ..., num_running: _Optional[int] = ..., num_waiting: _Optional[int] = ..., num_pages_free: _Optional[int] = ..., num_pages_total: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., generation_tokens: _Optional[int] = ..., num_steps: _Optional[int] = ..., num_preemptions: _Optional[int] = ..., num_recompilations: _Optional[int] = ..., prefix_queries: _Optional[int] = ..., prefix_hits: _Optional[int] = ..., num_scheduled_tokens: _Optional[int] = ..., num_bucket_tokens: _Optional[int] = ..., host_time_s: _Optional[float] = ..., device_wait_time_s: _Optional[float] = ..., adapters: _Optional[_Iterable[_Union[LoadedAdapter, _Mapping]]] = ..., takes_adapters: _Optional[bool] = ..., num_drafts: _Optional[int] = ..., num_draft_tokens: _Optional[int] = ..., num_accepted_tokens: _Optional[int] = ..., accepted_per_pos: _Optional[_Iterable[int]] = ..., transfers: _Optional[_Union[TransferFigures, _Mapping]] = ..., media_queries: _Optional[int] = ..., media_hits: _Optional[int] = ..., media_time_s: _Optional[float] = ...) -> None: ...

class TransferFigures(_message.Message):
    __slots__ = ("requests_in", "requests_out", "bytes_in", "bytes_out", "tokens_in", "seconds_in", "seconds_out", "fallbacks", "leases", "leased_pages", "leases_expired", "receiving", "device_bytes_in", "device_bytes_out")
    class FallbacksEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    REQUESTS_IN_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_OUT_FIELD_NUMBER: _ClassVar[int]
    BYTES_IN_FIELD_NUMBER: _ClassVar[int]
    BYTES_OUT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_IN_FIELD_NUMBER: _ClassVar[int]
    SECONDS_IN_FIELD_NUMBER: _ClassVar[int]
    SECONDS_OUT_FIELD_NUMBER: _ClassVar[int]
    FALLBACKS_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    LEASED_PAGES_FIELD_NUMBER: _ClassVar[int]
    LEASES_EXPIRED_FIELD_NUMBER: _ClassVar[int]
    RECEIVING_FIELD_NUMBER: _ClassVar[int]
    DEVICE_BYTES_IN_FIELD_NUMBER: _ClassVar[int]
    DEVICE_BYTES_OUT_FIELD_NUMBER: _ClassVar[int]
    requests_in: int
    requests_out: int
    bytes_in: int
    bytes_out: int
    tokens_in: int
    seconds_in: float
    seconds_out: float
    fallbacks: _containers.ScalarMap[str, int]
    leases: int
    leased_pages: int
    leases_expired: int
    receiving: int
    device_bytes_in: int
    device_bytes_out: int
    def __init__(self, requests_in: _Optional[int] = ..., requests_out: _Optional[int] = ..., bytes_in: _Optional[int] = ..., bytes_out: _Optional[int] = ..., tokens_in: _Optional[int] = ..., seconds_in: _Optional[float] = ..., seconds_out: _Optional[float] = ..., fallbacks: _Optional[_Mapping[str, int]] = ..., leases: _Optional[int] = ..., leased_pages: _Optional[int] = ..., leases_expired: _Optional[int] = ..., receiving: _Optional[int] = ..., device_bytes_in: _Optional[int] = ..., device_bytes_out: _Optional[int] = ...) -> None: ...

class LoadedAdapter(_message.Message):
    __slots__ = ("name", "digest", "rank", "num_matrices", "path", "tenants", "own_text")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    NUM_MATRICES_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    TENANTS_FIELD_NUMBER: _ClassVar[int]
    OWN_TEXT_FIELD_NUMBER: _ClassVar[int]
    name: str
    digest: str
    rank: int
    num_matrices: int
    path: str
    tenants: _containers.RepeatedScalarFieldContainer[str]
    own_text: bool
    def __init__(self, name: _Optional[str] = ..., digest: _Optional[str] = ..., rank: _Optional[int] = ..., num_matrices: _Optional[int] = ..., path: _Optional[str] = ..., tenants: _Optional[_Iterable[str]] = ..., own_text: _Optional[bool] = ...) -> None: ...

class GetModelInfoRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class GetModelInfoResponse(_message.Message):
    __slots__ = ("id", "names", "architecture", "num_parameters", "vocab_size", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "page_size", "num_pages", "dtype", "quantization", "eos_token_ids", "has_chat_template", "tasks", "pooling", "prompts", "default_prompt", "labels", "parent", "role", "modalities", "media_patches", "kv_cache_dtype")
    class PromptsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    ID_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    NUM_PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_SEQS_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_BATCHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_PAGES_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    HAS_CHAT_TEMPLATE_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    POOLING_FIELD_NUMBER: _ClassVar[int]
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_PROMPT_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    MODALITIES_FIELD_NUMBER: _ClassVar[int]
    MEDIA_PATCHES_FIELD_NUMBER: _ClassVar[int]
    KV_CACHE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    id: str
    names: _containers.RepeatedScalarFieldContainer[str]
    architecture: str
    num_parameters: int
    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    page_size: int
    num_pages: int
    dtype: str
    quantization: str
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    has_chat_template: bool
    tasks: _containers.RepeatedScalarFieldContainer[str]
    pooling: str
    prompts: _containers.ScalarMap[str, str]
    default_prompt: str
    labels: _containers.RepeatedScalarFieldContainer[str]
    parent: str
    role: str
    modalities: _containers.RepeatedScalarFieldContainer[str]
    media_patches: int
    kv_cache_dtype: str
    def __init__(self, id: _Optional[str] = ..., names: _Optional[_Iterable[str]] = ..., architecture: _Optional[str] = ..., num_parameters: _Optional[int] = ..., vocab_size: _Optional[int] = ..., max_model_len: _Optional[int] = ..., max_num_seqs: _Optional[int] = ..., max_num_batched_tokens: _Optional[int] = ..., page_size: _Optional[int] = ..., num_pages: _Optional[int] = ..., dtype: _Optional[str] = ..., quantization: _Optional[str] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., has_chat_template: _Optional[bool] = ..., tasks: _Optional[_Iterable[str]] = ..., pooling: _Optional[str] = ..., prompts: _Optional[_Mapping[str, str]] = ..., default_prompt: _Optional[str] = ..., labels: _Optional[_Iterable[str]] = ..., parent: _Optional[str] = ..., role: _Optional[str] = ..., modalities: _Optional[_Iterable[str]] = ..., media_patches: _Optional[int] = ..., kv_cache_dtype: _Optional[str] = ...) -> None: ...

class AbortRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class AbortResponse(_message.Message):
    __slots__ = ("found",)
    FOUND_FIELD_NUMBER: _ClassVar[int]
    found: bool
    def __init__(self, found: _Optional[bool] = ...) -> None: ...

class PauseRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class PauseResponse(_message.Message):
    __slots__ = ("state",)
    STATE_FIELD_NUMBER: _ClassVar[int]
    state: ControlState
    def __init__(self, state: _Optional[_Union[ControlState, _Mapping]] = ...) -> None: ...

class ResumeRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class ResumeResponse(_message.Message):
    __slots__ = ("state",)
    STATE_FIELD_NUMBER: _ClassVar[int]
    state: ControlState
    def __init__(self, state: _Optional[_Union[ControlState, _Mapping]] = ...) -> None: ...

class SleepRequest(_message.Message):
    __slots__ = ("level", "model")
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    level: int
    model: str
    def __init__(self, level: _Optional[int] = ..., model: _Optional[str] = ...) -> None: ...

class SleepResponse(_message.Message):
    __slots__ = ("state",)
    STATE_FIELD_NUMBER: _ClassVar[int]
    state: ControlState
    def __init__(self, state: _Optional[_Union[ControlState, _Mapping]] = ...) -> None: ...

class WakeUpRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class WakeUpResponse(_message.Message):
    __slots__ = ("state",)
    STATE_FIELD_NUMBER: _ClassVar[int]
    state: ControlState
    def __init__(self, state: _Optional[_Union[ControlState, _Mapping]] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("timeout_s",)
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    timeout_s: float
    def __init__(self, timeout_s: _Optional[float] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("state",)
    STATE_FIELD_NUMBER: _ClassVar[int]
    state: ControlState
    def __init__(self, state: _Optional[_Union[ControlState, _Mapping]] = ...) -> None: ...

class ResetPrefixCacheRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class ResetPrefixCacheResponse(_message.Message):
    __slots__ = ("state",)
    STATE_FIELD_NUMBER: _ClassVar[int]
    state: ControlState
    def __init__(self, state: _Optional[_Union[ControlState, _Mapping]] = ...) -> None: ...

class WatchPagesRequest(_message.Message):
    __slots__ = ("log_id", "after", "model")
    LOG_ID_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    log_id: str
    after: int
    model: str
    def __init__(self, log_id: _Optional[str] = ..., after: _Optional[int] = ..., model: _Optional[str] = ...) -> None: ...

class WatchPagesResponse(_message.Message):
    __slots__ = ("log_id", "sequence", "time", "events")
    LOG_ID_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    log_id: str
    sequence: int
    time: float
    events: _containers.RepeatedCompositeFieldContainer[PageEvent]
    def __init__(self, log_id: _Optional[str] = ..., sequence: _Optional[int] = ..., time: _Optional[float] = ..., events: _Optional[_Iterable[_Union[PageEvent, _Mapping]]] = ...) -> None: ...

class PageEvent(_message.Message):
    __slots__ = ("stored", "removed", "cleared", "replica")
    STORED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    CLEARED_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    stored: PagesStored
    removed: PagesRemoved
    cleared: PagesCleared
    replica: int
    def __init__(self, stored: _Optional[_Union[PagesStored, _Mapping]] = ..., removed: _Optional[_Union[PagesRemoved, _Mapping]] = ..., cleared: _Optional[_Union[PagesCleared, _Mapping]] = ..., replica: _Optional[int] = ...) -> None: ...

class PagesStored(_message.Message):
    __slots__ = ("hashes", "parent", "token_ids", "page_size", "adapter", "cache_salt", "group", "window")
    HASHES_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    hashes: _containers.RepeatedScalarFieldContainer[bytes]
    parent: bytes
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    page_size: int
    adapter: str
    cache_salt: str
    group: int
    window: int
    def __init__(self, hashes: _Optional[_Iterable[bytes]] = ..., parent: _Optional[bytes] = ..., token_ids: _Optional[_Iterable[int]] = ..., page_size: _Optional[int] = ..., adapter: _Optional[str] = ..., cache_salt: _Optional[str] = ..., group: _Optional[int] = ..., window: _Optional[int] = ...) -> None: ...

class PagesRemoved(_message.Message):
    __slots__ = ("hashes", "group")
    HASHES_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    hashes: _containers.RepeatedScalarFieldContainer[bytes]
    group: int
    def __init__(self, hashes: _Optional[_Iterable[bytes]] = ..., group: _Optional[int] = ...) -> None: ...

class PagesCleared(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class UpdateWeightsRequest(_message.Message):
    __slots__ = ("source", "model")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    source: str
    model: str
    def __init__(self, source: _Optional[str] = ..., model: _Optional[str] = ...) -> None: ...

class UpdateWeightsResponse(_message.Message):
    __slots__ = ("state",)
    STATE_FIELD_NUMBER: _ClassVar[int]
    state: ControlState
    def __init__(self, state: _Optional[_Union[ControlState, _Mapping]] = ...) -> None: ...

class ControlState(_message.Message):
    __slots__ = ("paused", "asleep", "draining", "num_live")
    PAUSED_FIELD_NUMBER: _ClassVar[int]
    ASLEEP_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    NUM_LIVE_FIELD_NUMBER: _ClassVar[int]
    paused: bool
    asleep: bool
    draining: bool
    num_live: int
    def __init__(self, paused: _Optional[bool] = ..., asleep: _Optional[bool] = ..., draining: _Optional[bool] = ..., num_live: _Optional[int] = ...) -> None: ...

class LoadAdapterRequest(_message.Message):
    __slots__ = ("name", "path", "load_inplace", "tenants", "base_model")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    LOAD_INPLACE_FIELD_NUMBER: _ClassVar[int]
    TENANTS_FIELD_NUMBER: _ClassVar[int]
    BASE_MODEL_FIELD_NUMBER: _ClassVar[int]
    name: str
    path: str
    load_inplace: bool
    tenants: _containers.RepeatedScalarFieldContainer[str]
    base_model: str
    def __init__(self, name: _Optional[str] = ..., path: _Optional[str] = ..., load_inplace: _Optional[bool] = ..., tenants: _Optional[_Iterable[str]] = ..., base_model: _Optional[str] = ...) -> None: ...

class LoadAdapterResponse(_message.Message):
    __slots__ = ("adapter",)
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    adapter: LoadedAdapter
    def __init__(self, adapter: _Optional[_Union[LoadedAdapter, _Mapping]] = ...) -> None: ...

class UnloadAdapterRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class UnloadAdapterResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListAdaptersRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListAdaptersResponse(_message.Message):
    __slots__ = ("adapters",)
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    adapters: _containers.RepeatedCompositeFieldContainer[LoadedAdapter]
    def __init__(self, adapters: _Optional[_Iterable[_Union[LoadedAdapter, _Mapping]]] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[ModelStatus]
    def __init__(self, models: _Optional[_Iterable[_Union[ModelStatus, _Mapping]]] = ...) -> None: ...

class ModelStatus(_message.Message):
    __slots__ = ("name", "names", "state", "pinned", "device_bytes", "num_live", "progress", "error")
    NAME_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    DEVICE_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_LIVE_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    name: str
    names: _containers.RepeatedScalarFieldContainer[str]
    state: str
    pinned: bool
    device_bytes: int
    num_live: int
    progress: str
    error: str
    def __init__(self, name: _Optional[str] = ..., names: _Optional[_Iterable[str]] = ..., state: _Optional[str] = ..., pinned: _Optional[bool] = ..., device_bytes: _Optional[int] = ..., num_live: _Optional[int] = ..., progress: _Optional[str] = ..., error: _Optional[str] = ...) -> None: ...

class LoadModelRequest(_message.Message):
    __slots__ = ("model", "pinned")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    model: str
    pinned: bool
    def __init__(self, model: _Optional[str] = ..., pinned: _Optional[bool] = ...) -> None: ...

class LoadModelResponse(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: ModelStatus
    def __init__(self, model: _Optional[_Union[ModelStatus, _Mapping]] = ...) -> None: ...

class UnloadModelRequest(_message.Message):
    __slots__ = ("model", "sleep")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SLEEP_FIELD_NUMBER: _ClassVar[int]
    model: str
    sleep: bool
    def __init__(self, model: _Optional[str] = ..., sleep: _Optional[bool] = ...) -> None: ...

class UnloadModelResponse(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: ModelStatus
    def __init__(self, model: _Optional[_Union[ModelStatus, _Mapping]] = ...) -> None: ...
