from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class LayerKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LAYER_KIND_UNSPECIFIED: _ClassVar[LayerKind]
    LAYER_KIND_ATTENTION: _ClassVar[LayerKind]
    LAYER_KIND_SLIDING_WINDOW: _ClassVar[LayerKind]
    LAYER_KIND_STATE: _ClassVar[LayerKind]
    LAYER_KIND_LATENT: _ClassVar[LayerKind]

class FidelityKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FIDELITY_KIND_UNSPECIFIED: _ClassVar[FidelityKind]
    FIDELITY_KIND_COMPACTED: _ClassVar[FidelityKind]
    FIDELITY_KIND_CODED: _ClassVar[FidelityKind]
    FIDELITY_KIND_EXACT: _ClassVar[FidelityKind]

class Outcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OUTCOME_UNSPECIFIED: _ClassVar[Outcome]
    OUTCOME_STORED: _ClassVar[Outcome]
    OUTCOME_REPLACED: _ClassVar[Outcome]
    OUTCOME_ALREADY_HELD: _ClassVar[Outcome]
    OUTCOME_REFUSED: _ClassVar[Outcome]
LAYER_KIND_UNSPECIFIED: LayerKind
LAYER_KIND_ATTENTION: LayerKind
LAYER_KIND_SLIDING_WINDOW: LayerKind
LAYER_KIND_STATE: LayerKind
LAYER_KIND_LATENT: LayerKind
FIDELITY_KIND_UNSPECIFIED: FidelityKind
FIDELITY_KIND_COMPACTED: FidelityKind
FIDELITY_KIND_CODED: FidelityKind
FIDELITY_KIND_EXACT: FidelityKind
OUTCOME_UNSPECIFIED: Outcome
OUTCOME_STORED: Outcome
OUTCOME_REPLACED: Outcome
OUTCOME_ALREADY_HELD: Outcome
OUTCOME_REFUSED: Outcome

class ModelSpec(_message.Message):
    __slots__ = ("fingerprint", "kv_dtype", "block_size", "layers", "name")
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    KV_DTYPE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    fingerprint: Fingerprint
    kv_dtype: str
    block_size: int
    layers: _containers.RepeatedCompositeFieldContainer[LayerSpec]
    name: str
    def __init__(self, fingerprint: _Optional[_Union[Fingerprint, _Mapping]] = ..., kv_dtype: _Optional[str] = ..., block_size: _Optional[int] = ..., layers: _Optional[_Iterable[_Union[LayerSpec, _Mapping]]] = ..., name: _Optional[str] = ...) -> None: ...

class Fingerprint(_message.Message):
    __slots__ = ("config", "weights", "adapter", "tokenizer")
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    config: str
    weights: str
    adapter: str
    tokenizer: str
    def __init__(self, config: _Optional[str] = ..., weights: _Optional[str] = ..., adapter: _Optional[str] = ..., tokenizer: _Optional[str] = ...) -> None: ...

class LayerSpec(_message.Message):
    __slots__ = ("kind", "n_query_heads", "n_kv_heads", "key_dim", "value_dim", "window", "softmax_scale", "soft_cap", "has_sinks", "rope", "opaque")
    KIND_FIELD_NUMBER: _ClassVar[int]
    N_QUERY_HEADS_FIELD_NUMBER: _ClassVar[int]
    N_KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    KEY_DIM_FIELD_NUMBER: _ClassVar[int]
    VALUE_DIM_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    SOFTMAX_SCALE_FIELD_NUMBER: _ClassVar[int]
    SOFT_CAP_FIELD_NUMBER: _ClassVar[int]
    HAS_SINKS_FIELD_NUMBER: _ClassVar[int]
    ROPE_FIELD_NUMBER: _ClassVar[int]
    OPAQUE_FIELD_NUMBER: _ClassVar[int]
    kind: LayerKind
    n_query_heads: int
    n_kv_heads: int
    key_dim: int
    value_dim: int
    window: int
    softmax_scale: float
    soft_cap: float
    has_sinks: bool
    rope: RopeSpec
    opaque: bool
    def __init__(self, kind: _Optional[_Union[LayerKind, str]] = ..., n_query_heads: _Optional[int] = ..., n_kv_heads: _Optional[int] = ..., key_dim: _Optional[int] = ..., value_dim: _Optional[int] = ..., window: _Optional[int] = ..., softmax_scale: _Optional[float] = ..., soft_cap: _Optional[float] = ..., has_sinks: bool = ..., rope: _Optional[_Union[RopeSpec, _Mapping]] = ..., opaque: bool = ...) -> None: ...

class RopeSpec(_message.Message):
    __slots__ = ("dims", "theta", "interleaved", "scaling_json")
    DIMS_FIELD_NUMBER: _ClassVar[int]
    THETA_FIELD_NUMBER: _ClassVar[int]
    INTERLEAVED_FIELD_NUMBER: _ClassVar[int]
    SCALING_JSON_FIELD_NUMBER: _ClassVar[int]
    dims: int
    theta: float
    interleaved: bool
    scaling_json: str
    def __init__(self, dims: _Optional[int] = ..., theta: _Optional[float] = ..., interleaved: bool = ..., scaling_json: _Optional[str] = ...) -> None: ...

class RegisterModelRequest(_message.Message):
    __slots__ = ("spec",)
    SPEC_FIELD_NUMBER: _ClassVar[int]
    spec: ModelSpec
    def __init__(self, spec: _Optional[_Union[ModelSpec, _Mapping]] = ...) -> None: ...

class RegisterModelResponse(_message.Message):
    __slots__ = ("model_id", "already_known")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    ALREADY_KNOWN_FIELD_NUMBER: _ClassVar[int]
    model_id: bytes
    already_known: bool
    def __init__(self, model_id: _Optional[bytes] = ..., already_known: bool = ...) -> None: ...

class Fidelity(_message.Message):
    __slots__ = ("kind", "profile", "am_ratio", "bundle_id")
    KIND_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    AM_RATIO_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_ID_FIELD_NUMBER: _ClassVar[int]
    kind: FidelityKind
    profile: str
    am_ratio: float
    bundle_id: bytes
    def __init__(self, kind: _Optional[_Union[FidelityKind, str]] = ..., profile: _Optional[str] = ..., am_ratio: _Optional[float] = ..., bundle_id: _Optional[bytes] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("header", "data")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    header: Header
    data: bytes
    def __init__(self, header: _Optional[_Union[Header, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class Header(_message.Message):
    __slots__ = ("model_id", "namespace", "block_hash", "parent_hash", "index", "token_ids", "n_tokens", "first_position", "fidelity", "lineage", "min_fidelity", "boundary", "tensors", "data_bytes", "found", "request_id")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_HASH_FIELD_NUMBER: _ClassVar[int]
    PARENT_HASH_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    N_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FIRST_POSITION_FIELD_NUMBER: _ClassVar[int]
    FIDELITY_FIELD_NUMBER: _ClassVar[int]
    LINEAGE_FIELD_NUMBER: _ClassVar[int]
    MIN_FIDELITY_FIELD_NUMBER: _ClassVar[int]
    BOUNDARY_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    DATA_BYTES_FIELD_NUMBER: _ClassVar[int]
    FOUND_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    model_id: bytes
    namespace: str
    block_hash: bytes
    parent_hash: bytes
    index: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    n_tokens: int
    first_position: int
    fidelity: Fidelity
    lineage: FidelityKind
    min_fidelity: FidelityKind
    boundary: bool
    tensors: _containers.RepeatedCompositeFieldContainer[Tensor]
    data_bytes: int
    found: bool
    request_id: str
    def __init__(self, model_id: _Optional[bytes] = ..., namespace: _Optional[str] = ..., block_hash: _Optional[bytes] = ..., parent_hash: _Optional[bytes] = ..., index: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., n_tokens: _Optional[int] = ..., first_position: _Optional[int] = ..., fidelity: _Optional[_Union[Fidelity, _Mapping]] = ..., lineage: _Optional[_Union[FidelityKind, str]] = ..., min_fidelity: _Optional[_Union[FidelityKind, str]] = ..., boundary: bool = ..., tensors: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ..., data_bytes: _Optional[int] = ..., found: bool = ..., request_id: _Optional[str] = ...) -> None: ...

class Tensor(_message.Message):
    __slots__ = ("name", "dtype", "shape")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...

class PutResult(_message.Message):
    __slots__ = ("block_hash", "outcome", "code", "message", "source_bytes", "stored_bytes", "fidelity")
    BLOCK_HASH_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    SOURCE_BYTES_FIELD_NUMBER: _ClassVar[int]
    STORED_BYTES_FIELD_NUMBER: _ClassVar[int]
    FIDELITY_FIELD_NUMBER: _ClassVar[int]
    block_hash: bytes
    outcome: Outcome
    code: str
    message: str
    source_bytes: int
    stored_bytes: int
    fidelity: Fidelity
    def __init__(self, block_hash: _Optional[bytes] = ..., outcome: _Optional[_Union[Outcome, str]] = ..., code: _Optional[str] = ..., message: _Optional[str] = ..., source_bytes: _Optional[int] = ..., stored_bytes: _Optional[int] = ..., fidelity: _Optional[_Union[Fidelity, _Mapping]] = ...) -> None: ...

class GetRequest(_message.Message):
    __slots__ = ("model_id", "namespace", "block_hashes", "floor", "accepts_compacted", "request_id")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_HASHES_FIELD_NUMBER: _ClassVar[int]
    FLOOR_FIELD_NUMBER: _ClassVar[int]
    ACCEPTS_COMPACTED_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    model_id: bytes
    namespace: str
    block_hashes: _containers.RepeatedScalarFieldContainer[bytes]
    floor: FidelityKind
    accepts_compacted: bool
    request_id: str
    def __init__(self, model_id: _Optional[bytes] = ..., namespace: _Optional[str] = ..., block_hashes: _Optional[_Iterable[bytes]] = ..., floor: _Optional[_Union[FidelityKind, str]] = ..., accepts_compacted: bool = ..., request_id: _Optional[str] = ...) -> None: ...

class MatchRequest(_message.Message):
    __slots__ = ("model_id", "namespace", "block_hashes", "floor", "accepts_compacted", "request_id", "before_put")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_HASHES_FIELD_NUMBER: _ClassVar[int]
    FLOOR_FIELD_NUMBER: _ClassVar[int]
    ACCEPTS_COMPACTED_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    BEFORE_PUT_FIELD_NUMBER: _ClassVar[int]
    model_id: bytes
    namespace: str
    block_hashes: _containers.RepeatedScalarFieldContainer[bytes]
    floor: FidelityKind
    accepts_compacted: bool
    request_id: str
    before_put: bool
    def __init__(self, model_id: _Optional[bytes] = ..., namespace: _Optional[str] = ..., block_hashes: _Optional[_Iterable[bytes]] = ..., floor: _Optional[_Union[FidelityKind, str]] = ..., accepts_compacted: bool = ..., request_id: _Optional[str] = ..., before_put: bool = ...) -> None: ...

class MatchResponse(_message.Message):
    __slots__ = ("blocks",)
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    blocks: _containers.RepeatedCompositeFieldContainer[HeldBlock]
    def __init__(self, blocks: _Optional[_Iterable[_Union[HeldBlock, _Mapping]]] = ...) -> None: ...

class HeldBlock(_message.Message):
    __slots__ = ("fidelity", "lineage", "boundary", "n_tokens", "source_bytes", "stored_bytes")
    FIDELITY_FIELD_NUMBER: _ClassVar[int]
    LINEAGE_FIELD_NUMBER: _ClassVar[int]
    BOUNDARY_FIELD_NUMBER: _ClassVar[int]
    N_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SOURCE_BYTES_FIELD_NUMBER: _ClassVar[int]
    STORED_BYTES_FIELD_NUMBER: _ClassVar[int]
    fidelity: Fidelity
    lineage: FidelityKind
    boundary: bool
    n_tokens: int
    source_bytes: int
    stored_bytes: int
    def __init__(self, fidelity: _Optional[_Union[Fidelity, _Mapping]] = ..., lineage: _Optional[_Union[FidelityKind, str]] = ..., boundary: bool = ..., n_tokens: _Optional[int] = ..., source_bytes: _Optional[int] = ..., stored_bytes: _Optional[int] = ...) -> None: ...

class DeleteRequest(_message.Message):
    __slots__ = ("model_id", "namespace", "block_hashes")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_HASHES_FIELD_NUMBER: _ClassVar[int]
    model_id: bytes
    namespace: str
    block_hashes: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, model_id: _Optional[bytes] = ..., namespace: _Optional[str] = ..., block_hashes: _Optional[_Iterable[bytes]] = ...) -> None: ...

class DeleteResponse(_message.Message):
    __slots__ = ("n_deleted",)
    N_DELETED_FIELD_NUMBER: _ClassVar[int]
    n_deleted: int
    def __init__(self, n_deleted: _Optional[int] = ...) -> None: ...

class PinRequest(_message.Message):
    __slots__ = ("model_id", "namespace", "block_hashes", "ttl_seconds")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_HASHES_FIELD_NUMBER: _ClassVar[int]
    TTL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    model_id: bytes
    namespace: str
    block_hashes: _containers.RepeatedScalarFieldContainer[bytes]
    ttl_seconds: int
    def __init__(self, model_id: _Optional[bytes] = ..., namespace: _Optional[str] = ..., block_hashes: _Optional[_Iterable[bytes]] = ..., ttl_seconds: _Optional[int] = ...) -> None: ...

class PinResponse(_message.Message):
    __slots__ = ("n_pinned",)
    N_PINNED_FIELD_NUMBER: _ClassVar[int]
    n_pinned: int
    def __init__(self, n_pinned: _Optional[int] = ...) -> None: ...

class UnpinRequest(_message.Message):
    __slots__ = ("model_id", "namespace", "block_hashes")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_HASHES_FIELD_NUMBER: _ClassVar[int]
    model_id: bytes
    namespace: str
    block_hashes: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, model_id: _Optional[bytes] = ..., namespace: _Optional[str] = ..., block_hashes: _Optional[_Iterable[bytes]] = ...) -> None: ...

class UnpinResponse(_message.Message):
    __slots__ = ("n_unpinned",)
    N_UNPINNED_FIELD_NUMBER: _ClassVar[int]
    n_unpinned: int
    def __init__(self, n_unpinned: _Optional[int] = ...) -> None: ...

class AnnounceRequest(_message.Message):
    __slots__ = ("engine",)
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    engine: Engine
    def __init__(self, engine: _Optional[_Union[Engine, _Mapping]] = ...) -> None: ...

class AnnounceResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Engine(_message.Message):
    __slots__ = ("name", "pid", "model_id", "namespace", "prefill_tokens_per_second", "restore_tokens_per_second", "prompt_tokens", "local_tokens", "restored_tokens", "dropped_blocks", "seconds_since_announced")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    RESTORE_TOKENS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOCAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RESTORED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DROPPED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_SINCE_ANNOUNCED_FIELD_NUMBER: _ClassVar[int]
    name: str
    pid: int
    model_id: bytes
    namespace: str
    prefill_tokens_per_second: float
    restore_tokens_per_second: float
    prompt_tokens: int
    local_tokens: int
    restored_tokens: int
    dropped_blocks: int
    seconds_since_announced: float
    def __init__(self, name: _Optional[str] = ..., pid: _Optional[int] = ..., model_id: _Optional[bytes] = ..., namespace: _Optional[str] = ..., prefill_tokens_per_second: _Optional[float] = ..., restore_tokens_per_second: _Optional[float] = ..., prompt_tokens: _Optional[int] = ..., local_tokens: _Optional[int] = ..., restored_tokens: _Optional[int] = ..., dropped_blocks: _Optional[int] = ..., seconds_since_announced: _Optional[float] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusResponse(_message.Message):
    __slots__ = ("version", "pid", "uptime_seconds", "socket_path", "store", "models", "pool", "counters", "engines", "web_address", "web_problem")
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    UPTIME_SECONDS_FIELD_NUMBER: _ClassVar[int]
    SOCKET_PATH_FIELD_NUMBER: _ClassVar[int]
    STORE_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    POOL_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    ENGINES_FIELD_NUMBER: _ClassVar[int]
    WEB_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    WEB_PROBLEM_FIELD_NUMBER: _ClassVar[int]
    version: str
    pid: int
    uptime_seconds: float
    socket_path: str
    store: StoreStatus
    models: _containers.RepeatedCompositeFieldContainer[ModelStatus]
    pool: PoolStatus
    counters: _containers.ScalarMap[str, float]
    engines: _containers.RepeatedCompositeFieldContainer[Engine]
    web_address: str
    web_problem: str
    def __init__(self, version: _Optional[str] = ..., pid: _Optional[int] = ..., uptime_seconds: _Optional[float] = ..., socket_path: _Optional[str] = ..., store: _Optional[_Union[StoreStatus, _Mapping]] = ..., models: _Optional[_Iterable[_Union[ModelStatus, _Mapping]]] = ..., pool: _Optional[_Union[PoolStatus, _Mapping]] = ..., counters: _Optional[_Mapping[str, float]] = ..., engines: _Optional[_Iterable[_Union[Engine, _Mapping]]] = ..., web_address: _Optional[str] = ..., web_problem: _Optional[str] = ...) -> None: ...

class StoreStatus(_message.Message):
    __slots__ = ("path", "n_blocks", "n_tokens", "source_bytes", "stored_bytes", "used_bytes", "file_bytes", "quota_bytes", "free_disk_bytes", "set_aside")
    PATH_FIELD_NUMBER: _ClassVar[int]
    N_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    N_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SOURCE_BYTES_FIELD_NUMBER: _ClassVar[int]
    STORED_BYTES_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    FILE_BYTES_FIELD_NUMBER: _ClassVar[int]
    QUOTA_BYTES_FIELD_NUMBER: _ClassVar[int]
    FREE_DISK_BYTES_FIELD_NUMBER: _ClassVar[int]
    SET_ASIDE_FIELD_NUMBER: _ClassVar[int]
    path: str
    n_blocks: int
    n_tokens: int
    source_bytes: int
    stored_bytes: int
    used_bytes: int
    file_bytes: int
    quota_bytes: int
    free_disk_bytes: int
    set_aside: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, path: _Optional[str] = ..., n_blocks: _Optional[int] = ..., n_tokens: _Optional[int] = ..., source_bytes: _Optional[int] = ..., stored_bytes: _Optional[int] = ..., used_bytes: _Optional[int] = ..., file_bytes: _Optional[int] = ..., quota_bytes: _Optional[int] = ..., free_disk_bytes: _Optional[int] = ..., set_aside: _Optional[_Iterable[str]] = ...) -> None: ...

class ModelStatus(_message.Message):
    __slots__ = ("model_id", "spec", "fidelities")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    FIDELITIES_FIELD_NUMBER: _ClassVar[int]
    model_id: bytes
    spec: ModelSpec
    fidelities: _containers.RepeatedCompositeFieldContainer[FidelityStatus]
    def __init__(self, model_id: _Optional[bytes] = ..., spec: _Optional[_Union[ModelSpec, _Mapping]] = ..., fidelities: _Optional[_Iterable[_Union[FidelityStatus, _Mapping]]] = ...) -> None: ...

class FidelityStatus(_message.Message):
    __slots__ = ("kind", "n_blocks", "n_tokens", "source_bytes", "stored_bytes")
    KIND_FIELD_NUMBER: _ClassVar[int]
    N_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    N_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SOURCE_BYTES_FIELD_NUMBER: _ClassVar[int]
    STORED_BYTES_FIELD_NUMBER: _ClassVar[int]
    kind: FidelityKind
    n_blocks: int
    n_tokens: int
    source_bytes: int
    stored_bytes: int
    def __init__(self, kind: _Optional[_Union[FidelityKind, str]] = ..., n_blocks: _Optional[int] = ..., n_tokens: _Optional[int] = ..., source_bytes: _Optional[int] = ..., stored_bytes: _Optional[int] = ...) -> None: ...

class PoolStatus(_message.Message):
    __slots__ = ("n_workers", "n_jobs", "put_bytes", "get_bytes", "limit_bytes")
    N_WORKERS_FIELD_NUMBER: _ClassVar[int]
    N_JOBS_FIELD_NUMBER: _ClassVar[int]
    PUT_BYTES_FIELD_NUMBER: _ClassVar[int]
    GET_BYTES_FIELD_NUMBER: _ClassVar[int]
    LIMIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    n_workers: int
    n_jobs: int
    put_bytes: int
    get_bytes: int
    limit_bytes: int
    def __init__(self, n_workers: _Optional[int] = ..., n_jobs: _Optional[int] = ..., put_bytes: _Optional[int] = ..., get_bytes: _Optional[int] = ..., limit_bytes: _Optional[int] = ...) -> None: ...

class CheckRequest(_message.Message):
    __slots__ = ("frames",)
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    frames: bool
    def __init__(self, frames: bool = ...) -> None: ...

class CheckResponse(_message.Message):
    __slots__ = ("problems", "n_blocks", "n_frames_decoded")
    PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    N_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    N_FRAMES_DECODED_FIELD_NUMBER: _ClassVar[int]
    problems: _containers.RepeatedScalarFieldContainer[str]
    n_blocks: int
    n_frames_decoded: int
    def __init__(self, problems: _Optional[_Iterable[str]] = ..., n_blocks: _Optional[int] = ..., n_frames_decoded: _Optional[int] = ...) -> None: ...

class GetConfigRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetConfigResponse(_message.Message):
    __slots__ = ("settings",)
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    settings: _containers.RepeatedCompositeFieldContainer[Setting]
    def __init__(self, settings: _Optional[_Iterable[_Union[Setting, _Mapping]]] = ...) -> None: ...

class Setting(_message.Message):
    __slots__ = ("name", "value", "description", "live")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    LIVE_FIELD_NUMBER: _ClassVar[int]
    name: str
    value: str
    description: str
    live: bool
    def __init__(self, name: _Optional[str] = ..., value: _Optional[str] = ..., description: _Optional[str] = ..., live: bool = ...) -> None: ...

class SetConfigRequest(_message.Message):
    __slots__ = ("values",)
    class ValuesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.ScalarMap[str, str]
    def __init__(self, values: _Optional[_Mapping[str, str]] = ...) -> None: ...

class SetConfigResponse(_message.Message):
    __slots__ = ("settings",)
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    settings: _containers.RepeatedCompositeFieldContainer[Setting]
    def __init__(self, settings: _Optional[_Iterable[_Union[Setting, _Mapping]]] = ...) -> None: ...

class Entry(_message.Message):
    __slots__ = ("namespace", "parent_hash", "index", "n_tokens", "first_position", "token_hash", "fidelity", "lineage", "min_fidelity", "boundary", "source_bytes", "stored_bytes", "frame_bytes", "payload_id", "created", "last_used", "expires", "pinned_until")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    PARENT_HASH_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    N_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FIRST_POSITION_FIELD_NUMBER: _ClassVar[int]
    TOKEN_HASH_FIELD_NUMBER: _ClassVar[int]
    FIDELITY_FIELD_NUMBER: _ClassVar[int]
    LINEAGE_FIELD_NUMBER: _ClassVar[int]
    MIN_FIDELITY_FIELD_NUMBER: _ClassVar[int]
    BOUNDARY_FIELD_NUMBER: _ClassVar[int]
    SOURCE_BYTES_FIELD_NUMBER: _ClassVar[int]
    STORED_BYTES_FIELD_NUMBER: _ClassVar[int]
    FRAME_BYTES_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_ID_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    LAST_USED_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_FIELD_NUMBER: _ClassVar[int]
    PINNED_UNTIL_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    parent_hash: bytes
    index: int
    n_tokens: int
    first_position: int
    token_hash: bytes
    fidelity: Fidelity
    lineage: FidelityKind
    min_fidelity: FidelityKind
    boundary: bool
    source_bytes: int
    stored_bytes: int
    frame_bytes: int
    payload_id: int
    created: int
    last_used: int
    expires: int
    pinned_until: int
    def __init__(self, namespace: _Optional[str] = ..., parent_hash: _Optional[bytes] = ..., index: _Optional[int] = ..., n_tokens: _Optional[int] = ..., first_position: _Optional[int] = ..., token_hash: _Optional[bytes] = ..., fidelity: _Optional[_Union[Fidelity, _Mapping]] = ..., lineage: _Optional[_Union[FidelityKind, str]] = ..., min_fidelity: _Optional[_Union[FidelityKind, str]] = ..., boundary: bool = ..., source_bytes: _Optional[int] = ..., stored_bytes: _Optional[int] = ..., frame_bytes: _Optional[int] = ..., payload_id: _Optional[int] = ..., created: _Optional[int] = ..., last_used: _Optional[int] = ..., expires: _Optional[int] = ..., pinned_until: _Optional[int] = ...) -> None: ...

class Departure(_message.Message):
    __slots__ = ("model_id", "block_hash", "reason", "time")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    BLOCK_HASH_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    model_id: bytes
    block_hash: bytes
    reason: str
    time: int
    def __init__(self, model_id: _Optional[bytes] = ..., block_hash: _Optional[bytes] = ..., reason: _Optional[str] = ..., time: _Optional[int] = ...) -> None: ...
