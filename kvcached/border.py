"""The border: what a caller says is checked here once, and trusted from here on. Pure.

Every message names what was expected and what came.
"""

import hashlib
from math import inf

from kvcached.block import BlockId, Fidelity, FidelityKind, ModelSpec
from kvcached.errors import InvalidRequestError
from kvcached_client import protocol, tensors
from kvcached_client._proto import kvcached_pb2 as pb
from kvcached_client.hashing import HASH_BYTES, block_hash, token_bytes
from kvcached_client.spec import kind_from_proto

MAX_HASHES = 100_000
MAX_ENGINE_NAME_BYTES = 128
MAX_MESSAGE_CHARACTERS = 1000
MAX_SPEC_BYTES = 256 << 10  # about 60 layers with longrope factors of their own, or 1,000 without
MAX_MODEL_NAME_BYTES = 128


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


def fidelity_kind(value: int) -> FidelityKind:
    """A kind from the wire; unspecified means EXACT."""
    try:
        return kind_from_proto(value)
    except ValueError as error:
        raise InvalidRequestError(f"not a fidelity: {error}") from None


def entry_of(header: pb.Header, spec: ModelSpec, max_block_bytes: int) -> tuple[BlockId, pb.Entry]:
    """What a Put says of a block, checked against the model and against itself, before any data is received."""
    _check_namespace(header.namespace)
    for name in ("block_hash", "parent_hash"):
        if (size := len(getattr(header, name))) != HASH_BYTES:
            raise InvalidRequestError(f"a {name.replace('_', ' ')} has {HASH_BYTES} bytes, got {size}")
    _check_tokens(header, spec)
    _check_tensors(header, spec, max_block_bytes)
    if (kind := fidelity_kind(header.fidelity.kind)) != FidelityKind.EXACT:
        raise InvalidRequestError(f"blocks are put at fidelity EXACT, got {kind.name}")
    lineage, min_fidelity = fidelity_kind(header.lineage), fidelity_kind(header.min_fidelity)
    entry = pb.Entry(
        namespace=header.namespace,
        parent_hash=header.parent_hash,
        index=header.index,
        n_tokens=header.n_tokens,
        first_position=header.first_position,
        token_hash=hashlib.sha256(token_bytes(header.token_ids)).digest(),
        fidelity=Fidelity().to_proto(),
        lineage=pb.FidelityKind.Name(lineage),
        min_fidelity=pb.FidelityKind.Name(min_fidelity),
        boundary=header.boundary,
        source_bytes=header.data_bytes,
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


def _check_tensors(header: pb.Header, spec: ModelSpec, max_block_bytes: int) -> None:
    if problems := tensors.problems(header.tensors):
        raise InvalidRequestError("; ".join(problems))
    expected = {name: (spec.kv_dtype, shape) for name, shape in spec.dense_shapes().items()}
    got = {t.name: (t.dtype, tuple(t.shape)) for t in header.tensors if t.name in ("keys", "values")}
    if got != expected:
        raise InvalidRequestError(f"dense tensors of this model are {expected}, got {got}")
    n_bytes = tensors.nbytes(header.tensors)
    if n_bytes != header.data_bytes:
        raise InvalidRequestError(f"the tensors described take {n_bytes} bytes, data_bytes says {header.data_bytes}")
    if n_bytes > max_block_bytes:
        raise InvalidRequestError(f"a block of {n_bytes} bytes, at most max_block_bytes = {max_block_bytes} are taken")
