"""Arrays to bytes and back: encode makes the frame of a block, decode the block of a frame. Read this first.

Pure: no clock, thread, file or socket. Every stage is one file with its inverse beside it. Two roads join them, and
both end in `container`:

    EXACT   exact.py   each tensor through `lossless`
    CODED   coded.py   planes (rope off, sinks apart) -> klt -> quantize -> entropy, as a profile of a bundle says
"""

from kvcached.block import BlockId, Fidelity, FidelityKind, KVBlock
from kvcached.codec import coded, container, exact
from kvcached.codec.bundle import Coder
from kvcached.codec.container import Header
from kvcached.errors import CorruptFrameError, UnsupportedFrameError


def encode(
    block_id: BlockId,
    block: KVBlock,
    *,
    lineage: FidelityKind = FidelityKind.EXACT,
    zstd_level: int = 1,
    coder: Coder | None = None,
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
    sections = coded.to_sections(block, coder, zstd_level) if coder else exact.to_sections(block, zstd_level)
    return container.pack(header, list(sections))


def decode(block_id: BlockId, frame: bytes | memoryview, max_source_bytes: int, coder: Coder | None = None) -> KVBlock:
    """The block of a frame, allocating at most a small multiple of `max_source_bytes`.

    coder: that of the frame's bundle and profile, where its fidelity is CODED; see `fidelity_of`.

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
        return exact.from_sections(header, sections)
    if header.fidelity.kind == FidelityKind.COMPACTED:
        raise UnsupportedFrameError("frames of fidelity COMPACTED are of a later version")
    if coder is None or header.fidelity != coder.fidelity:
        needed = f"{header.fidelity.profile!r} of bundle {header.fidelity.bundle_id.hex()[:16]}"
        raise UnsupportedFrameError(f"a frame coded with {needed} cannot be read without it")
    return coded.from_sections(header, sections, coder)
