"""The border: what a caller says is checked here once, and trusted from here on. Pure.

Every message names what was expected and what came.
"""

import hashlib
from collections.abc import Mapping
from math import inf, prod
from typing import cast

import numpy as np

from kvcached.block import BlockId, Fidelity, FidelityKind, ModelSpec
from kvcached.codec.bundle import PROFILES
from kvcached.encoding import COMPACTED
from kvcached.errors import InvalidRequestError, PreconditionError
from kvcached.matching import BUDGETS, BudgetsBy
from kvcached_client import protocol, tensors
from kvcached_client._proto import kvcached_pb2 as pb
from kvcached_client.hashing import HASH_BYTES, block_hash, token_bytes
from kvcached_client.spec import kind_from_proto

EXACT = "exact"  # a name for a fidelity, beside those of the profiles
QUERIES = "queries"  # the tensor of a Put that is not the block's
MAX_QUERIES = 256  # of one head
MAX_HASHES = 100_000
MAX_ENGINE_NAME_BYTES = 128
MAX_MESSAGE_CHARACTERS = 1000
MAX_SPEC_BYTES = 256 << 10  # about 60 layers with longrope factors of their own, or 1,000 without
MAX_MODEL_NAME_BYTES = 128
MAX_PIECE_BLOCKS = 16  # of calibration text, in one piece
MAX_PIECE_WEIGHTS = 1 << 24  # of attention, of the queries in a piece over its tokens
MAX_TARGET = 1000.0  # compression that a profile may be asked for


def model_spec(message: pb.ModelSpec) -> ModelSpec:
    """A spec that can be registered."""
    if message.ByteSize() > MAX_SPEC_BYTES:
        raise InvalidRequestError(f"a model spec has at most {MAX_SPEC_BYTES} bytes, got {message.ByteSize()}")
    if len(message.name.encode()) > MAX_MODEL_NAME_BYTES:
        raise InvalidRequestError(f"a model's name has at most {MAX_MODEL_NAME_BYTES} bytes, got {message.name!r}")
    try:
        spec = ModelSpec.from_proto(message)
    except ValueError as error:
        raise InvalidRequestError(f"not a model spec: {error}") from None
    if problems := spec.problems():
        raise InvalidRequestError(f"not a model spec: {'; '.join(problems)}")
    return spec


NamesBlocks = pb.MatchRequest | pb.GetRequest | pb.DeleteRequest | pb.PinRequest | pb.UnpinRequest


def block_ids(request: NamesBlocks) -> list[BlockId]:
    """The blocks that a request names."""
    _check_namespace(request.namespace)
    if len(request.block_hashes) > MAX_HASHES:
        raise InvalidRequestError(f"at most {MAX_HASHES} blocks in one request, got {len(request.block_hashes)}")
    for block in request.block_hashes:
        if len(block) != HASH_BYTES:
            raise InvalidRequestError(f"a block hash has {HASH_BYTES} bytes, got {len(block)}")
    return [BlockId(request.model_id, request.namespace, block) for block in request.block_hashes]


def printable(request_id: str) -> str:
    """A caller's request id, as far as it may stand in a log."""
    return "".join(c for c in request_id[: protocol.MAX_REQUEST_ID_CHARACTERS] if c.isascii() and c.isprintable())


def brief(message: str) -> str:
    """A message of ours, which may quote what a caller said, as long as a status may be (gRPC: 8 KiB of headers)."""
    size = len(message)
    return message if size <= MAX_MESSAGE_CHARACTERS else f"{message[:MAX_MESSAGE_CHARACTERS]}... ({size} characters)"


def engine(message: pb.Engine) -> pb.Engine:
    """What an engine says of itself."""
    _check_namespace(message.namespace)
    if len(message.name.encode()) > MAX_ENGINE_NAME_BYTES:
        raise InvalidRequestError(f"an engine's name has at most {MAX_ENGINE_NAME_BYTES} bytes, got {message.name!r}")
    for name in ("name", "namespace"):
        if not getattr(message, name).isprintable():  # it goes to terminals
            raise InvalidRequestError(f"an engine's {name} must be printable, got {getattr(message, name)!r}")
    if message.local_tokens + message.restored_tokens > message.prompt_tokens:
        raise InvalidRequestError(
            f"of {message.prompt_tokens} prompt tokens, {message.local_tokens} cannot be in memory and "
            f"{message.restored_tokens} restored"
        )
    if len(message.model_id) != HASH_BYTES:
        raise InvalidRequestError(f"a model id has {HASH_BYTES} bytes, got {len(message.model_id)}")
    for name in ("prefill_tokens_per_second", "restore_tokens_per_second"):
        if not 0 <= getattr(message, name) < inf:
            raise InvalidRequestError(f"{name} must be finite and not negative, got {getattr(message, name)}")
    return message


def measured(profiles: Mapping[str, pb.Measured]) -> None:
    """What somebody says that profiles lose. Raises InvalidRequestError if it cannot be shown."""
    for name, message in profiles.items():
        if len(message.engine.encode()) > MAX_ENGINE_NAME_BYTES or not message.engine.isprintable():
            raise InvalidRequestError(
                f"the engine that measured {name!r} must be printable and at most {MAX_ENGINE_NAME_BYTES} bytes, "
                f"got {message.engine!r}"
            )


def store_as(header: pb.Header) -> str:
    """How a put is to be stored: "exact", a profile, one after compaction, or nothing: as the daemon's settings say."""
    name, bundle_id = header.store_as, header.store_as_bundle
    profiles = (*PROFILES, *COMPACTED)
    if name not in ("", EXACT, *profiles):
        raise InvalidRequestError(f"store_as is empty, {EXACT} or one of {', '.join(profiles)}, got {name!r}")
    if bundle_id and name not in profiles:
        raise InvalidRequestError(f"store_as_bundle goes with a profile in store_as, got {name!r}")
    if len(bundle_id) not in (0, HASH_BYTES):
        raise InvalidRequestError(f"a bundle id has {HASH_BYTES} bytes, got {len(bundle_id)}")
    return name


def am_ratio(header: pb.Header) -> float:
    """How much a put is to be compacted; 0: as the daemon's settings say."""
    if not header.am_ratio:
        return 0.0
    try:
        ratio = protocol.check_am_ratio(float(str(np.float32(header.am_ratio))))  # in the digits that were meant
    except ValueError as error:
        raise InvalidRequestError(str(error)) from None
    if header.store_as not in COMPACTED:
        raise InvalidRequestError(
            f"am_ratio goes with {' or '.join(COMPACTED)} in store_as, got {header.store_as!r} and {ratio:g}"
        )
    return ratio


def fidelity_kind(value: int) -> FidelityKind:
    """A kind from the wire; unspecified means EXACT."""
    try:
        return kind_from_proto(value)
    except ValueError as error:
        raise InvalidRequestError(f"not a fidelity: {error}") from None


def entry_of(header: pb.Header, spec: ModelSpec, max_block_bytes: int) -> tuple[BlockId, pb.Entry]:
    """What a Put says of a block, checked against the model and against itself, before any data is received.

    The entry's fidelity is EXACT, until the cache chooses.
    """
    _check_namespace(header.namespace)
    for name in ("block_hash", "parent_hash"):
        if (size := len(getattr(header, name))) != HASH_BYTES:
            raise InvalidRequestError(f"a {name.replace('_', ' ')} has {HASH_BYTES} bytes, got {size}")
    _check_tokens(header, spec)
    _check_tensors(header, spec, max_block_bytes)
    if (kind := fidelity_kind(header.fidelity.kind)) != FidelityKind.EXACT:
        raise InvalidRequestError(f"blocks are put at fidelity EXACT, got {kind.name}")
    lineage = fidelity_kind(header.lineage)
    fidelity_kind(header.min_fidelity)
    entry = pb.Entry(
        namespace=header.namespace,
        parent_hash=header.parent_hash,
        index=header.index,
        n_tokens=header.n_tokens,
        first_position=header.first_position,
        token_hash=hashlib.sha256(token_bytes(header.token_ids)).digest(),
        fidelity=Fidelity().to_proto(),
        lineage=pb.FidelityKind.Name(lineage),
        min_fidelity=header.min_fidelity,  # unspecified stays so: the daemon's own choice
        boundary=header.boundary,
        source_bytes=tensors.nbytes(tensor for tensor in header.tensors if tensor.name != QUERIES),
    )
    return BlockId(header.model_id, header.namespace, header.block_hash), entry


def _check_namespace(namespace: str) -> None:
    if len(namespace.encode()) > protocol.MAX_NAMESPACE_BYTES:
        raise InvalidRequestError(f"a namespace has at most {protocol.MAX_NAMESPACE_BYTES} bytes, got {namespace!r}")


def _check_tokens(header: pb.Header, spec: ModelSpec) -> None:
    if header.n_tokens != spec.block_size or len(header.token_ids) != spec.block_size:
        raise InvalidRequestError(
            f"only full blocks of {spec.block_size} tokens are stored, "
            f"got n_tokens {header.n_tokens} and {len(header.token_ids)} token ids"
        )
    if header.first_position + header.n_tokens >= 1 << 31:
        raise InvalidRequestError(f"positions must be below 2**31, got first_position {header.first_position}")
    try:
        expected = block_hash(header.parent_hash, header.token_ids, header.namespace)
    except ValueError as error:
        raise InvalidRequestError(str(error)) from None
    if header.block_hash != expected:
        raise InvalidRequestError(
            f"the block hash does not match its token ids: expected {expected.hex()}, got {header.block_hash.hex()}"
        )


def queries_bytes(header: pb.Header) -> int:
    """Of what a Put carries beside the block."""
    return sum(tensors.nbytes([tensor]) for tensor in header.tensors if tensor.name == QUERIES)


def _check_tensors(header: pb.Header, spec: ModelSpec, max_block_bytes: int) -> None:
    if problems := tensors.problems(header.tensors):
        raise InvalidRequestError("; ".join(problems))
    expected = {name: (spec.kv_dtype, shape) for name, shape in spec.dense_shapes().items()}
    got = {t.name: (t.dtype, tuple(t.shape)) for t in header.tensors if t.name in ("keys", "values")}
    if got != expected:
        raise InvalidRequestError(f"dense tensors of this model are {expected}, got {got}")
    for tensor in header.tensors:
        if tensor.name in tensors.PACKED:
            raise InvalidRequestError(f"{tensor.name!r} is a tensor of compacted blocks: call an opaque one otherwise")
        if tensor.name == QUERIES:
            _check_queries(tensor, spec, max_block_bytes)
    _check_size(header, max_block_bytes, queries_bytes(header))


def _check_queries(tensor: pb.Tensor, spec: ModelSpec, max_block_bytes: int) -> None:
    """What is said of the queries in a Put."""
    if not spec.dense_layers:
        raise InvalidRequestError(f"{QUERIES!r} are of dense layers, and {spec.name!r} has none")
    shape = tuple(tensor.shape)
    n_queries = shape[2] if len(shape) == 4 else 0
    n_layers, n_heads, dim = len(spec.dense_layers), _n_query_heads(spec), spec.dense_layers[0].key_dim
    if (tensor.dtype, shape) != (
        spec.kv_dtype,
        (n_layers, n_heads, n_queries, dim),
    ) or not 1 <= n_queries <= MAX_QUERIES:
        expected = f"{spec.kv_dtype} ({n_layers}, {n_heads}, 1 to {MAX_QUERIES}, {dim})"
        raise InvalidRequestError(f"queries of this model are {expected}, got {tensor.dtype} {shape}")
    if (n_bytes := tensors.nbytes([tensor])) > max_block_bytes // 4:
        raise InvalidRequestError(
            f"queries take at most a quarter of max_block_bytes, {max_block_bytes // 4} bytes, got {n_bytes}"
        )


def _check_size(header: pb.Header | pb.CalibrateHeader, max_block_bytes: int, besides: int = 0) -> None:
    """besides: bytes of tensors that have a limit of their own."""
    n_bytes = tensors.nbytes(header.tensors)
    if n_bytes != header.data_bytes:
        raise InvalidRequestError(f"the tensors described take {n_bytes} bytes, data_bytes says {header.data_bytes}")
    if (size := n_bytes - besides) > max_block_bytes:
        raise InvalidRequestError(f"a block of {size} bytes, at most max_block_bytes = {max_block_bytes} are taken")


# ---- calibration

_Described = dict[str, tuple[str, tuple[int, ...]]]  # dtype and shape of tensors, by name


def calibration_profiles(start: pb.CalibrateStart, spec: ModelSpec) -> dict[str, float]:
    """The profiles that a calibration is to fit, the best first, with the compression that each is to reach."""
    if not spec.dense_layers:
        raise PreconditionError(f"{spec.name!r} has no dense layers: its blocks are only ever kept exactly")
    if start.layers_per_group > (n_layers := len(spec.dense_layers)):
        raise InvalidRequestError(
            f"layers_per_group must be 1 to {n_layers}, or 0 for the daemon's choice, got {start.layers_per_group}"
        )
    asked = dict(start.profiles) or dict(PROFILES)
    for name, target in asked.items():
        if name not in PROFILES:
            raise InvalidRequestError(f"profiles are {', '.join(PROFILES)}, got {name[:MAX_MESSAGE_CHARACTERS]!r}")
        if target and not 1 <= target <= MAX_TARGET:
            raise InvalidRequestError(
                f"{name} must reach a compression of 1 to {MAX_TARGET:g}, or 0 for the usual one, got {target}"
            )
    return {name: asked[name] or usual for name, usual in PROFILES.items() if name in asked}


def calibration_budgets(start: pb.CalibrateStart) -> BudgetsBy:
    """By what compaction is to share tokens between heads."""
    if start.budgets not in ("", *BUDGETS):
        raise InvalidRequestError(
            f"budgets are by {', '.join(BUDGETS)}, got {start.budgets[:MAX_MESSAGE_CHARACTERS]!r}"
        )
    return cast(BudgetsBy, start.budgets or BUDGETS[0])


def check_piece(header: pb.CalibrateHeader, spec: ModelSpec, max_block_bytes: int) -> None:
    """What is said of a piece of calibration data, before any of it is received: text, or metrics of the output."""
    if problems := tensors.problems(header.tensors):
        raise InvalidRequestError("; ".join(problems))
    got = {t.name: (t.dtype, tuple(t.shape)) for t in header.tensors}
    expected = _metric_tensors(spec, got) if "output_metric" in got else _text_tensors(header, spec, got)
    if got != expected:
        raise InvalidRequestError(f"tensors of this piece of calibration data should be {expected}, got {got}")
    _check_size(header, max_block_bytes)


def _metric_tensors(spec: ModelSpec, got: _Described) -> _Described:
    n_layers, n_kv_heads, _, dim = spec.dense_shapes()["values"]
    expected: _Described = {"output_metric": ("float32", (n_layers, n_kv_heads, dim, dim))}
    return expected | ({"head_weights": ("float32", (n_layers, n_kv_heads))} if "head_weights" in got else {})


def _text_tensors(header: pb.CalibrateHeader, spec: ModelSpec, got: _Described) -> _Described:
    if header.part not in (pb.CALIBRATION_PART_FIT, pb.CALIBRATION_PART_TUNE):
        raise InvalidRequestError(f"a piece of text is to fit (1) or to tune (2), got part {header.part}")
    if not 1 <= header.n_tokens <= MAX_PIECE_BLOCKS * spec.block_size:
        raise InvalidRequestError(
            f"a piece has 1 to {MAX_PIECE_BLOCKS} blocks of {spec.block_size} tokens, got {header.n_tokens} tokens"
        )
    if header.first_position + header.n_tokens >= 1 << 31:
        raise InvalidRequestError(f"positions must be below 2**31, got first_position {header.first_position}")
    expected: _Described = {
        name: (spec.kv_dtype, (n_layers, n_kv_heads, header.n_tokens, dim))
        for name, (n_layers, n_kv_heads, _, dim) in spec.dense_shapes().items()
    }
    if "queries" in got or "query_positions" in got:
        n_queries = max(prod(got.get("query_positions", ("", ()))[1]), 1)
        if n_queries * header.n_tokens > MAX_PIECE_WEIGHTS:
            raise InvalidRequestError(
                f"queries times tokens of a piece are at most {MAX_PIECE_WEIGHTS}, "
                f"got {n_queries} and {header.n_tokens}"
            )
        shape = (len(spec.dense_layers), _n_query_heads(spec), n_queries, spec.dense_layers[0].key_dim)
        expected |= {"queries": ("float32", shape), "query_positions": ("int32", (n_queries,))}
    return expected


def _n_query_heads(spec: ModelSpec) -> int:
    n_kv_heads, heads = spec.dense_layers[0].n_kv_heads, {layer.n_query_heads for layer in spec.dense_layers}
    n_query_heads = max(heads)
    if len(heads) > 1 or not n_query_heads or n_query_heads % n_kv_heads:
        raise InvalidRequestError(
            f"no queries are taken of a model whose layers have {sorted(heads)} query heads for {n_kv_heads} KV heads"
        )
    return n_query_heads


def check_piece_values(arrays: Mapping[str, np.ndarray]) -> None:
    """The numbers of a piece: finite, positions not negative, metrics symmetric."""
    for name, array in arrays.items():
        if name == "query_positions":
            if array.min() < 0:
                raise InvalidRequestError(f"positions of queries must be 0 to 2**31 - 1, got {array.min()}")
        elif not np.isfinite(array).all():
            raise InvalidRequestError(f"{name} must be finite, got NaN or infinity")
    if "head_weights" in arrays and not arrays["head_weights"].min() > 0:
        raise InvalidRequestError(f"head_weights must be above 0, got {arrays['head_weights'].min()}")
    if "output_metric" in arrays:
        metric = arrays["output_metric"].astype(np.float64)
        difference = np.abs(metric - metric.swapaxes(-1, -2)).max()
        if difference > 1e-4 * np.abs(metric).max():
            raise InvalidRequestError(f"output_metric must be symmetric, got entries that differ by {difference:.3g}")
