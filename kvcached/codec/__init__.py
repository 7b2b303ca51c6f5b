"""Arrays to bytes and back: encode makes the frame of a block, decode the block of a frame. Read this first.

Pure: no clock, thread, file or socket. Every stage is one file with its inverse beside it, and only this one joins
them. So far there is one road, EXACT: each layer's keys and values, and each opaque tensor, through `lossless`.
"""

from collections.abc import Iterator, Mapping

import numpy as np
from jaxtyping import Shaped

from kvcached.block import BlockId, FidelityKind, KVBlock
from kvcached.codec import container, lossless
from kvcached.codec.container import Coding, Header, Section, SectionKind
from kvcached.errors import CorruptFrameError, UnsupportedFrameError
from kvcached_client.spec import DENSE_DTYPES


def encode(
    block_id: BlockId, block: KVBlock, *, lineage: FidelityKind = FidelityKind.EXACT, zstd_level: int = 1
) -> bytes:
    """The frame of a block, at fidelity EXACT. Inverse: `decode`."""
    n_layers, n_kv_heads = block.lengths.shape
    header = Header(
        model_id=block_id.model_id,
        block_hash=block_id.block_hash,
        n_layers=n_layers,
        n_kv_heads=n_kv_heads,
        n_source_tokens=block.n_source_tokens,
        first_position=block.first_position,
        lineage=lineage,
    )
    return container.pack(header, list(_encode_sections(block.to_tensors(), zstd_level)))


def decode(block_id: BlockId, frame: bytes | memoryview, max_source_bytes: int) -> KVBlock:
    """The block of a frame, allocating at most `max_source_bytes`.

    Raises:
        CorruptFrameError: the bytes are damaged, or hold another block than `block_id`.
        UnsupportedFrameError: they were made by a later version.
    """
    header, sections = container.unpack(frame, max_source_bytes)
    if (header.model_id, header.block_hash) != (block_id.model_id, block_id.block_hash):
        raise CorruptFrameError(f"expected the frame of block {block_id}, got block {header.block_hash.hex()[:16]}")
    if header.fidelity.kind != FidelityKind.EXACT:
        raise UnsupportedFrameError(f"frames of fidelity {header.fidelity.kind.name} are of a later version")
    layers: dict[SectionKind, list[Shaped[np.ndarray, ...]]] = {SectionKind.KEYS: [], SectionKind.VALUES: []}
    opaque: dict[str, Shaped[np.ndarray, ...]] = {}
    for section in sections:
        array = lossless.decode(section.payload, section.dtype, section.shape)
        if section.kind == SectionKind.OPAQUE:
            if section.name in opaque or section.name in ("keys", "values"):
                raise CorruptFrameError(f"two tensors are called {section.name!r}")
            opaque[section.name] = array
        else:
            if section.layer != len(layers[section.kind]):
                expected = len(layers[section.kind])
                raise CorruptFrameError(f"{section.kind.name} of layer {expected} expected, got {section.layer}")
            layers[section.kind].append(array)
    return _dense_block(header, layers[SectionKind.KEYS], layers[SectionKind.VALUES], opaque)


def _encode_sections(tensors: Mapping[str, Shaped[np.ndarray, "..."]], zstd_level: int) -> Iterator[Section]:
    dense = {"keys": SectionKind.KEYS, "values": SectionKind.VALUES}
    for name, array in tensors.items():
        if name in dense:
            for layer, rows in enumerate(array):
                payload = lossless.encode(rows, zstd_level)
                yield Section(dense[name], Coding.LOSSLESS, array.dtype, rows.shape, payload, layer)
        else:
            payload = lossless.encode(array, zstd_level)
            yield Section(SectionKind.OPAQUE, Coding.LOSSLESS, array.dtype, array.shape, payload, name=name)


def _dense_block(
    header: Header,
    keys: list[Shaped[np.ndarray, "..."]],
    values: list[Shaped[np.ndarray, "..."]],
    opaque: dict[str, Shaped[np.ndarray, "..."]],
) -> KVBlock:
    """A frame that passed its checksums can still be one that no encoder writes: shapes are checked here."""
    heads = (header.n_kv_heads, header.n_source_tokens)
    for arrays in (keys, values):
        kinds = {(array.dtype, array.shape) for array in arrays}
        # An empty layer has no bytes to bound its rows by.
        if len(arrays) != header.n_layers or len(kinds) > 1 or any(a.shape[:-1] != heads or not a.size for a in arrays):
            raise CorruptFrameError(f"{header.n_layers} layers of (heads, tokens) {heads} expected, got {kinds}")
    dtypes = {array.dtype.name for array in (*keys, *values)}
    if len(dtypes) > 1 or not dtypes <= set(DENSE_DTYPES):
        raise CorruptFrameError(f"keys and values of one dtype of {', '.join(DENSE_DTYPES)} expected, got {dtypes}")
    if header.first_position + header.n_source_tokens >= 1 << 31:
        raise CorruptFrameError(f"positions must be below 2**31, got first_position {header.first_position}")
    if not keys:
        return KVBlock.dense(opaque, header.n_source_tokens, header.first_position)
    tensors = {"keys": np.stack(keys), "values": np.stack(values), **opaque}
    return KVBlock.dense(tensors, header.n_source_tokens, header.first_position)
