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

class CalibrationPart(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CALIBRATION_PART_UNSPECIFIED: _ClassVar[CalibrationPart]
    CALIBRATION_PART_FIT: _ClassVar[CalibrationPart]
    CALIBRATION_PART_TUNE: _ClassVar[CalibrationPart]
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
CALIBRATION_PART_UNSPECIFIED: CalibrationPart
CALIBRATION_PART_FIT: CalibrationPart
CALIBRATION_PART_TUNE: CalibrationPart

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
    __slots__ = ("model_id", "namespace", "block_hash", "parent_hash", "index", "token_ids", "n_tokens", "first_position", "fidelity", "lineage", "min_fidelity", "boundary", "tensors", "data_bytes", "found", "request_id", "store_as", "store_as_bundle", "am_ratio", "slot", "lease")
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
    STORE_AS_FIELD_NUMBER: _ClassVar[int]
    STORE_AS_BUNDLE_FIELD_NUMBER: _ClassVar[int]
    AM_RATIO_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
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
    store_as: str
    store_as_bundle: bytes
    am_ratio: float
    slot: int
    lease: bytes
    def __init__(self, model_id: _Optional[bytes] = ..., namespace: _Optional[str] = ..., block_hash: _Optional[bytes] = ..., parent_hash: _Optional[bytes] = ..., index: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., n_tokens: _Optional[int] = ..., first_position: _Optional[int] = ..., fidelity: _Optional[_Union[Fidelity, _Mapping]] = ..., lineage: _Optional[_Union[FidelityKind, str]] = ..., min_fidelity: _Optional[_Union[FidelityKind, str]] = ..., boundary: bool = ..., tensors: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ..., data_bytes: _Optional[int] = ..., found: bool = ..., request_id: _Optional[str] = ..., store_as: _Optional[str] = ..., store_as_bundle: _Optional[bytes] = ..., am_ratio: _Optional[float] = ..., slot: _Optional[int] = ..., lease: _Optional[bytes] = ...) -> None: ...

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
    __slots__ = ("model_id", "namespace", "block_hashes", "floor", "accepts_compacted", "request_id", "longest_prefix", "at_least", "lease")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_HASHES_FIELD_NUMBER: _ClassVar[int]
    FLOOR_FIELD_NUMBER: _ClassVar[int]
    ACCEPTS_COMPACTED_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    LONGEST_PREFIX_FIELD_NUMBER: _ClassVar[int]
    AT_LEAST_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    model_id: bytes
    namespace: str
    block_hashes: _containers.RepeatedScalarFieldContainer[bytes]
    floor: FidelityKind
    accepts_compacted: bool
    request_id: str
    longest_prefix: bool
    at_least: int
    lease: bytes
    def __init__(self, model_id: _Optional[bytes] = ..., namespace: _Optional[str] = ..., block_hashes: _Optional[_Iterable[bytes]] = ..., floor: _Optional[_Union[FidelityKind, str]] = ..., accepts_compacted: bool = ..., request_id: _Optional[str] = ..., longest_prefix: bool = ..., at_least: _Optional[int] = ..., lease: _Optional[bytes] = ...) -> None: ...

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

class CalibrateRequest(_message.Message):
    __slots__ = ("start", "header", "data")
    START_FIELD_NUMBER: _ClassVar[int]
    HEADER_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    start: CalibrateStart
    header: CalibrateHeader
    data: bytes
    def __init__(self, start: _Optional[_Union[CalibrateStart, _Mapping]] = ..., header: _Optional[_Union[CalibrateHeader, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class CalibrateStart(_message.Message):
    __slots__ = ("model_id", "layers_per_group", "seed", "profiles", "budgets")
    class ProfilesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    LAYERS_PER_GROUP_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    PROFILES_FIELD_NUMBER: _ClassVar[int]
    BUDGETS_FIELD_NUMBER: _ClassVar[int]
    model_id: bytes
    layers_per_group: int
    seed: int
    profiles: _containers.ScalarMap[str, float]
    budgets: str
    def __init__(self, model_id: _Optional[bytes] = ..., layers_per_group: _Optional[int] = ..., seed: _Optional[int] = ..., profiles: _Optional[_Mapping[str, float]] = ..., budgets: _Optional[str] = ...) -> None: ...

class CalibrateHeader(_message.Message):
    __slots__ = ("part", "first_position", "n_tokens", "tensors", "data_bytes")
    PART_FIELD_NUMBER: _ClassVar[int]
    FIRST_POSITION_FIELD_NUMBER: _ClassVar[int]
    N_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    DATA_BYTES_FIELD_NUMBER: _ClassVar[int]
    part: CalibrationPart
    first_position: int
    n_tokens: int
    tensors: _containers.RepeatedCompositeFieldContainer[Tensor]
    data_bytes: int
    def __init__(self, part: _Optional[_Union[CalibrationPart, str]] = ..., first_position: _Optional[int] = ..., n_tokens: _Optional[int] = ..., tensors: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ..., data_bytes: _Optional[int] = ...) -> None: ...

class CalibrateResponse(_message.Message):
    __slots__ = ("bundle",)
    BUNDLE_FIELD_NUMBER: _ClassVar[int]
    bundle: BundleStatus
    def __init__(self, bundle: _Optional[_Union[BundleStatus, _Mapping]] = ...) -> None: ...

class Measured(_message.Message):
    __slots__ = ("bits_per_value", "compression", "kl", "kl_low", "kl_high", "perplexity_delta", "perplexity_delta_low", "perplexity_delta_high", "attention_error_mean", "attention_error_worst", "n_tokens", "n_documents", "engine")
    BITS_PER_VALUE_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_FIELD_NUMBER: _ClassVar[int]
    KL_FIELD_NUMBER: _ClassVar[int]
    KL_LOW_FIELD_NUMBER: _ClassVar[int]
    KL_HIGH_FIELD_NUMBER: _ClassVar[int]
    PERPLEXITY_DELTA_FIELD_NUMBER: _ClassVar[int]
    PERPLEXITY_DELTA_LOW_FIELD_NUMBER: _ClassVar[int]
    PERPLEXITY_DELTA_HIGH_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_ERROR_MEAN_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_ERROR_WORST_FIELD_NUMBER: _ClassVar[int]
    N_TOKENS_FIELD_NUMBER: _ClassVar[int]
    N_DOCUMENTS_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    bits_per_value: float
    compression: float
    kl: float
    kl_low: float
    kl_high: float
    perplexity_delta: float
    perplexity_delta_low: float
    perplexity_delta_high: float
    attention_error_mean: float
    attention_error_worst: float
    n_tokens: int
    n_documents: int
    engine: str
    def __init__(self, bits_per_value: _Optional[float] = ..., compression: _Optional[float] = ..., kl: _Optional[float] = ..., kl_low: _Optional[float] = ..., kl_high: _Optional[float] = ..., perplexity_delta: _Optional[float] = ..., perplexity_delta_low: _Optional[float] = ..., perplexity_delta_high: _Optional[float] = ..., attention_error_mean: _Optional[float] = ..., attention_error_worst: _Optional[float] = ..., n_tokens: _Optional[int] = ..., n_documents: _Optional[int] = ..., engine: _Optional[str] = ...) -> None: ...

class ProfileStatus(_message.Message):
    __slots__ = ("name", "target_compression", "measured")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TARGET_COMPRESSION_FIELD_NUMBER: _ClassVar[int]
    MEASURED_FIELD_NUMBER: _ClassVar[int]
    name: str
    target_compression: float
    measured: Measured
    def __init__(self, name: _Optional[str] = ..., target_compression: _Optional[float] = ..., measured: _Optional[_Union[Measured, _Mapping]] = ...) -> None: ...

class BundleStatus(_message.Message):
    __slots__ = ("bundle_id", "model_id", "model_name", "layers_per_group", "bytes", "installed", "n_blocks", "current", "profiles", "compacts")
    BUNDLE_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    LAYERS_PER_GROUP_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    INSTALLED_FIELD_NUMBER: _ClassVar[int]
    N_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    CURRENT_FIELD_NUMBER: _ClassVar[int]
    PROFILES_FIELD_NUMBER: _ClassVar[int]
    COMPACTS_FIELD_NUMBER: _ClassVar[int]
    bundle_id: bytes
    model_id: bytes
    model_name: str
    layers_per_group: int
    bytes: int
    installed: int
    n_blocks: int
    current: bool
    profiles: _containers.RepeatedCompositeFieldContainer[ProfileStatus]
    compacts: bool
    def __init__(self, bundle_id: _Optional[bytes] = ..., model_id: _Optional[bytes] = ..., model_name: _Optional[str] = ..., layers_per_group: _Optional[int] = ..., bytes: _Optional[int] = ..., installed: _Optional[int] = ..., n_blocks: _Optional[int] = ..., current: bool = ..., profiles: _Optional[_Iterable[_Union[ProfileStatus, _Mapping]]] = ..., compacts: bool = ...) -> None: ...

class AttachMeasurementsRequest(_message.Message):
    __slots__ = ("bundle_id", "profiles")
    class ProfilesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Measured
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Measured, _Mapping]] = ...) -> None: ...
    BUNDLE_ID_FIELD_NUMBER: _ClassVar[int]
    PROFILES_FIELD_NUMBER: _ClassVar[int]
    bundle_id: bytes
    profiles: _containers.MessageMap[str, Measured]
    def __init__(self, bundle_id: _Optional[bytes] = ..., profiles: _Optional[_Mapping[str, Measured]] = ...) -> None: ...

class AttachMeasurementsResponse(_message.Message):
    __slots__ = ("bundle",)
    BUNDLE_FIELD_NUMBER: _ClassVar[int]
    bundle: BundleStatus
    def __init__(self, bundle: _Optional[_Union[BundleStatus, _Mapping]] = ...) -> None: ...

class InstallBundleRequest(_message.Message):
    __slots__ = ("total_bytes", "data")
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    total_bytes: int
    data: bytes
    def __init__(self, total_bytes: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class InstallBundleResponse(_message.Message):
    __slots__ = ("bundle",)
    BUNDLE_FIELD_NUMBER: _ClassVar[int]
    bundle: BundleStatus
    def __init__(self, bundle: _Optional[_Union[BundleStatus, _Mapping]] = ...) -> None: ...

class ListBundlesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListBundlesResponse(_message.Message):
    __slots__ = ("bundles",)
    BUNDLES_FIELD_NUMBER: _ClassVar[int]
    bundles: _containers.RepeatedCompositeFieldContainer[BundleStatus]
    def __init__(self, bundles: _Optional[_Iterable[_Union[BundleStatus, _Mapping]]] = ...) -> None: ...

class RemoveBundleRequest(_message.Message):
    __slots__ = ("bundle_id", "with_blocks")
    BUNDLE_ID_FIELD_NUMBER: _ClassVar[int]
    WITH_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    bundle_id: bytes
    with_blocks: bool
    def __init__(self, bundle_id: _Optional[bytes] = ..., with_blocks: bool = ...) -> None: ...

class RemoveBundleResponse(_message.Message):
    __slots__ = ("n_deleted",)
    N_DELETED_FIELD_NUMBER: _ClassVar[int]
    n_deleted: int
    def __init__(self, n_deleted: _Optional[int] = ...) -> None: ...

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
    __slots__ = ("model_id", "spec", "fidelities", "bundle_id")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    FIDELITIES_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_ID_FIELD_NUMBER: _ClassVar[int]
    model_id: bytes
    spec: ModelSpec
    fidelities: _containers.RepeatedCompositeFieldContainer[FidelityStatus]
    bundle_id: bytes
    def __init__(self, model_id: _Optional[bytes] = ..., spec: _Optional[_Union[ModelSpec, _Mapping]] = ..., fidelities: _Optional[_Iterable[_Union[FidelityStatus, _Mapping]]] = ..., bundle_id: _Optional[bytes] = ...) -> None: ...

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
    __slots__ = ("n_workers", "n_jobs", "put_bytes", "get_bytes", "limit_bytes", "device")
    N_WORKERS_FIELD_NUMBER: _ClassVar[int]
    N_JOBS_FIELD_NUMBER: _ClassVar[int]
    PUT_BYTES_FIELD_NUMBER: _ClassVar[int]
    GET_BYTES_FIELD_NUMBER: _ClassVar[int]
    LIMIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    n_workers: int
    n_jobs: int
    put_bytes: int
    get_bytes: int
    limit_bytes: int
    device: str
    def __init__(self, n_workers: _Optional[int] = ..., n_jobs: _Optional[int] = ..., put_bytes: _Optional[int] = ..., get_bytes: _Optional[int] = ..., limit_bytes: _Optional[int] = ..., device: _Optional[str] = ...) -> None: ...

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
    __slots__ = ("namespace", "parent_hash", "index", "n_tokens", "first_position", "token_hash", "fidelity", "lineage", "min_fidelity", "boundary", "source_bytes", "stored_bytes", "frame_bytes", "payload_id", "created", "last_used", "expires", "pinned_until", "mass_error", "output_error")
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
    MASS_ERROR_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_ERROR_FIELD_NUMBER: _ClassVar[int]
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
    mass_error: float
    output_error: float
    def __init__(self, namespace: _Optional[str] = ..., parent_hash: _Optional[bytes] = ..., index: _Optional[int] = ..., n_tokens: _Optional[int] = ..., first_position: _Optional[int] = ..., token_hash: _Optional[bytes] = ..., fidelity: _Optional[_Union[Fidelity, _Mapping]] = ..., lineage: _Optional[_Union[FidelityKind, str]] = ..., min_fidelity: _Optional[_Union[FidelityKind, str]] = ..., boundary: bool = ..., source_bytes: _Optional[int] = ..., stored_bytes: _Optional[int] = ..., frame_bytes: _Optional[int] = ..., payload_id: _Optional[int] = ..., created: _Optional[int] = ..., last_used: _Optional[int] = ..., expires: _Optional[int] = ..., pinned_until: _Optional[int] = ..., mass_error: _Optional[float] = ..., output_error: _Optional[float] = ...) -> None: ...

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
