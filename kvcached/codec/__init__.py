"""Arrays to bytes and back: encode makes the frame of a block, decode the block of a frame. Read this first.

Pure: no clock, thread, file or socket. Every stage is one file with its inverse beside it. Two roads join them, and
both end in `container`:

    EXACT   exact.py   each tensor through `lossless`
    CODED   coded.py   planes (rope off, sinks apart) -> klt -> quantize -> entropy, as a profile of a bundle says
    COMPACTED          compact() first, a block with fewer tokens; then compacted.py, the same stages head by head
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kvcached.block import Allocate, BlockId, Fidelity, FidelityKind, KVBlock, fresh
from kvcached.codec import coded, compacted, compaction, container, exact, rope
from kvcached.codec.bundle import Coder
from kvcached.codec.compaction import BlockQueries
from kvcached.codec.compactor import Compactor
from kvcached.codec.container import Header, Section
from kvcached.errors import CorruptFrameError, UnsupportedFrameError

_SPREAD = 1024  # tokens after a block among which the reservoir's queries are put
_HELD_OUT = 4  # every so many queries are not fitted to


@dataclass(frozen=True, slots=True, eq=False)
class Compacted:
    """A compacted block, and what it loses once coded, on queries that it was not fitted to: relative errors."""

    block: KVBlock
    mass_error: float
    output_error: float


class LossError(ValueError):
    """A block that would lose more than its profile allows."""


def compact(block: KVBlock, compactor: Compactor, queries: BlockQueries | None = None) -> Compacted:
    """A dense block with fewer tokens, ready for `encode` with the same compactor.

    queries: float32, of tokens after the block, rotary positions applied; None: the bundle's reservoir.

    Raises:
        LossError: it would lose more than the profile allows.
        ValueError: it cannot be compacted, see `compaction.compact`.
        UnsupportedRopeError: the rotary positions of the model cannot be removed.
    """
    if queries is None:
        queries = reservoir(block, compactor)
    seen = np.arange(queries.shape[2]) % _HELD_OUT > 0
    fitted, unseen = (queries[:, :, seen], queries[:, :, ~seen]) if seen.any() else (queries, queries)
    spec = compactor.spec
    picked = compaction.pick(block, spec, compactor.budgets, fitted)
    small = compaction.fit(picked, block, spec, fitted, compacted.seen_keys(picked, compactor))
    restored = compacted.seen(small, compactor)  # what coding costs, counts
    mass_error, output_error = compaction.errors(restored, block, spec, unseen, compactor.output_metric)
    if not output_error <= compactor.bound:  # catches NaN too
        raise LossError(f"an output error of {output_error:.3g}, the profile allows {compactor.bound:.3g}")
    return Compacted(small, mass_error, output_error)


def reservoir(block: KVBlock, compactor: Compactor) -> BlockQueries:
    """The bundle's queries, as tokens after the block would ask."""
    first = block.first_position + block.n_source_tokens
    apart = np.random.default_rng(0).integers(0, _SPREAD, compactor.queries.shape[2])
    positions = np.asarray(first + apart, np.int32)
    layers = zip(compactor.queries, compactor.spec.dense_layers, strict=True)
    return np.stack([rope.apply(queries, positions, layer.rope) for queries, layer in layers])


def encode(
    block_id: BlockId,
    block: KVBlock,
    *,
    lineage: FidelityKind = FidelityKind.EXACT,
    zstd_level: int = 1,
    coder: Coder | Compactor | None = None,
) -> bytes:
    """The frame of a block: exact, or as `coder` codes it. Inverse: `decode`.

    Raises:
        ValueError: the block cannot be coded: it is not of the coder's model, or holds numbers that are not finite or
            too large for its steps. Exactly it can.
        UnsupportedRopeError: the rotary positions of the coder's model cannot be removed.
    """
    n_layers, n_kv_heads = block.lengths.shape
    header = Header(
        model_id=block_id.model_id,
        block_hash=block_id.block_hash,
        n_layers=n_layers,
        n_kv_heads=n_kv_heads,
        n_source_tokens=block.n_source_tokens,
        first_position=block.first_position,
        fidelity=coder.fidelity if coder else Fidelity(),
        lineage=lineage,
    )
    return container.pack(header, list(_sections(block, coder, zstd_level)))


def _sections(block: KVBlock, coder: Coder | Compactor | None, zstd_level: int) -> Iterator[Section]:
    if isinstance(coder, Compactor):
        return compacted.to_sections(block, coder, zstd_level)
    return coded.to_sections(block, coder, zstd_level) if coder else exact.to_sections(block, zstd_level)


def decode(
    block_id: BlockId,
    frame: bytes | memoryview,
    max_source_bytes: int,
    coder: Coder | Compactor | None = None,
    allocate: Allocate = fresh,
) -> KVBlock:
    """The block of a frame, allocating at most a small multiple of `max_source_bytes`.

    coder: that of the frame's bundle and profile, unless its fidelity is EXACT. allocate: memory for the tensors of the
    block, in which they are decoded; those of a compacted block, which are small, lie elsewhere.

    Raises:
        CorruptFrameError: the bytes are damaged, or hold another block than `block_id`.
        UnsupportedFrameError: they were made by a later version, or with another coder.
    """
    header, sections = container.unpack(frame, max_source_bytes)
    if (header.model_id, header.block_hash) != (block_id.model_id, block_id.block_hash):
        raise CorruptFrameError(f"expected the frame of block {block_id}, got block {header.block_hash.hex()[:16]}")
    if header.first_position + header.n_source_tokens >= 1 << 31:
        raise CorruptFrameError(f"positions must be below 2**31, got first_position {header.first_position}")
    if header.fidelity.kind == FidelityKind.EXACT:
        return exact.from_sections(header, sections, allocate)
    if coder is None or header.fidelity != coder.fidelity:
        needed = f"{header.fidelity.profile!r} of bundle {header.fidelity.bundle_id.hex()[:16]}"
        raise UnsupportedFrameError(f"a frame coded with {needed} cannot be read without it")
    if isinstance(coder, Compactor):
        return compacted.from_sections(header, sections, coder)
    return coded.from_sections(header, sections, coder, allocate)
