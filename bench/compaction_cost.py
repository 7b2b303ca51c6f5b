"""What compaction costs the pool: megabytes of source a second on one core, and its share of a COMPACTED put's work.

Measured on blocks of the reference model, whole frames of the daemon's own code, beside coding alone of the same blocks
in the same turn; and on one 7B-shaped block (28 layers, 4 KV heads of 128, 28 query heads, 256 tokens, numbers at
random), of which only the fit is timed: how long it takes depends on shapes and budgets, not on what the numbers say.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kvcached import codec
from kvcached.block import BlockId, Fingerprint, KVBlock, LayerSpec, ModelSpec, RopeSpec
from kvcached.codec import compaction
from kvcached.codec.bundle import Bundle
from kvcached_client.tensors import DTYPES

PROFILE, RATIO = "x16", 4.0
N_LAYERS, N_KV_HEADS, N_QUERY_HEADS, HEAD_DIM, N_TOKENS, N_QUERIES = 28, 4, 28, 128, 256, 64
N_ROUNDS = 3  # of the large block
_BLOCK_ID = BlockId(bytes(32), "", bytes(32))


def measure(bundle: Bundle, blocks: Sequence[KVBlock]) -> dict[str, Any]:
    """`compact_mb_s`, `encode_mb_s` of what compaction leaves, `share_of_pool`, `over_coding_alone`, `shape_7b`.

    Medians over the blocks. share_of_pool: compacting over compacting and coding. over_coding_alone: both over what
    coding the whole block takes. Raises KeyError for a bundle that cannot compact.
    """
    compactor, coder = bundle.compactor(PROFILE, RATIO), bundle.coder(PROFILE)
    seconds: dict[str, list[float]] = {"compact": [], "encode": [], "alone": []}
    for block in blocks:
        small = codec.compact(block, compactor).block
        seconds["compact"].append(_timed(lambda block=block: codec.compact(block, compactor)))
        seconds["encode"].append(_timed(lambda small=small: codec.encode(_BLOCK_ID, small, coder=compactor)))
        seconds["alone"].append(_timed(lambda block=block: codec.encode(_BLOCK_ID, block, coder=coder)))
    compact, encode, alone = (np.array(each) for each in seconds.values())
    mb = np.array([block.nbytes / 1e6 for block in blocks])
    return {
        "profile": PROFILE,
        "am_ratio": RATIO,
        "n_blocks": len(blocks),
        "compact_mb_s": float(np.median(mb / compact)),
        "encode_mb_s": float(np.median(mb / encode)),
        "share_of_pool": float(np.median(compact / (compact + encode))),
        "over_coding_alone": float(np.median((compact + encode) / alone)),
        "shape_7b": _large(),
    }


def _large() -> dict[str, float]:
    """A block of a 7B model, its heads of unequal budgets that are a quarter of its tokens together."""
    rng = np.random.default_rng(0)
    layer = LayerSpec(
        n_query_heads=N_QUERY_HEADS,
        n_kv_heads=N_KV_HEADS,
        key_dim=HEAD_DIM,
        value_dim=HEAD_DIM,
        rope=RopeSpec(HEAD_DIM, 1e6),
    )
    spec = ModelSpec(Fingerprint(weights="synthetic"), "bfloat16", N_TOKENS, (layer,) * N_LAYERS)
    shape = (N_LAYERS, N_KV_HEADS, N_TOKENS, HEAD_DIM)
    tensors = {s: rng.standard_normal(shape, np.float32).astype(DTYPES["bfloat16"]) for s in ("keys", "values")}
    block = KVBlock.dense(tensors, N_TOKENS, 4096)
    queries = rng.standard_normal((N_LAYERS, N_QUERY_HEADS, N_QUERIES, HEAD_DIM), np.float32)
    budgets = _budgets(rng)
    seconds = [_timed(lambda: compaction.compact(block, spec, budgets, queries)) for _ in range(N_ROUNDS)]
    found = float(np.median(seconds))
    return {"seconds": found, "mb_s": block.nbytes / 1e6 / found, "am_ratio": N_TOKENS / float(budgets.mean())}


def _budgets(rng: np.random.Generator) -> compaction.Budgets:
    """One head in eight keeps all tokens, the others share what is left of a quarter."""
    found = rng.integers(8, 64, (N_LAYERS, N_KV_HEADS)).astype(np.int32)
    found.reshape(-1)[::8] = N_TOKENS
    return found


def _timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
