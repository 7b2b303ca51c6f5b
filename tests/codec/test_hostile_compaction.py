"""Compacted frames and compacting bundles that no encoder makes: bounded memory, and errors of the two kinds only."""

import json
import tracemalloc

import numpy as np
import pytest
from bundles import low_rank_tensors
from compacting import make_compacting
from safetensors.numpy import load, save
from support import tiny_spec

from kvcached import codec
from kvcached.block import BlockId, FidelityKind, KVBlock
from kvcached.codec import container, exact
from kvcached.codec.bundle import Bundle
from kvcached.codec.container import Header, SectionKind
from kvcached.errors import CorruptBundleError, CorruptFrameError

SPEC = tiny_spec(block_size=64)
BUNDLE = make_compacting(SPEC)
ID = BlockId(SPEC.model_id, "", bytes(32))


def flattened(array: np.ndarray, n_dims: int) -> np.ndarray:
    """The same numbers in fewer dimensions, or in more; in none the first of them."""
    if not n_dims:
        return array.reshape(-1)[0]
    return array.reshape(-1, *array.shape[array.ndim + 1 - n_dims :]) if n_dims < array.ndim else array[None]


@pytest.mark.parametrize(
    ("name", "n_dims"),
    [(name, n) for name, n_own in (("fractions", 1), ("curves", 3), ("queries", 4)) for n in range(5) if n != n_own]
    + [(name, n) for name in ("output_metric", "4.keys.0.forward", "4.x8.keys.0.steps") for n in (0, 5)],
)
def test_a_bundle_whose_tensors_of_compaction_have_other_dimensions_is_corrupt(name: str, n_dims: int) -> None:
    data = BUNDLE.pack()
    n = int.from_bytes(data[:8], "little")
    metadata, tensors = json.loads(data[8 : 8 + n])["__metadata__"], load(data)
    shaped = np.ascontiguousarray(flattened(tensors[f"compaction.{name}"], n_dims))
    with pytest.raises(CorruptBundleError):
        Bundle.unpack(save({**tensors, f"compaction.{name}": shaped}, metadata))


def test_a_small_frame_that_claims_many_tokens_takes_a_small_multiple_of_the_bytes_that_are_expected() -> None:
    coder, expected = BUNDLE.compactor("x8", 4.0), 4 << 20
    kept = np.full((4, expected // 4 - 1024), 255, np.uint8)
    header = Header(
        model_id=ID.model_id,
        block_hash=ID.block_hash,
        n_layers=2,
        n_kv_heads=2,
        n_source_tokens=8 * kept.shape[1],
        first_position=64,
        fidelity=coder.fidelity,
        lineage=FidelityKind.EXACT,
    )
    frame = container.pack(header, [exact.section_of(SectionKind.KEPT, kept, 1)])
    tracemalloc.start()
    with pytest.raises(CorruptFrameError, match=r"KEY_ROWS of .* expected, got none"):
        codec.decode(ID, frame, expected, coder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * expected


@pytest.mark.parametrize("ratio", [1.1, 3.3, 4.0, 7.9])
def test_a_frame_is_read_with_the_ratio_that_it_was_made_with(ratio: float) -> None:
    coder = BUNDLE.compactor("x8", ratio)
    block = KVBlock.dense(low_rank_tensors(SPEC, 1), 64, 64)
    small = codec.compact(block, coder).block
    back = codec.decode(ID, codec.encode(ID, small, coder=coder), block.nbytes, BUNDLE.compactor("x8", ratio))
    np.testing.assert_array_equal(back.lengths, small.lengths)
