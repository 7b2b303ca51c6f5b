"""Blocks as a daemon gives them back compacted, made here without one. Nothing here asserts."""

from dataclasses import replace

import numpy as np

from kvcached.block import KVBlock
from kvcached.codec.compaction import compact
from kvcached_client import Block, Fidelity, FidelityKind, ModelSpec


def compacted(spec: ModelSpec, block: Block, ratio: float = 4.0, queries: np.ndarray | None = None) -> Block:
    """A dense block with about 1 / ratio of its tokens, unequally many in each head.

    queries: float32 [n_dense_layers, n_query_heads, n, key_dim]; random ones if there are none.
    """
    rng = np.random.default_rng(block.index)
    n_layers, n_kv_heads, size, key_dim = spec.dense_shapes()["keys"]
    share = np.exp(rng.uniform(-0.8, 0.8, (n_layers, n_kv_heads)))
    budgets = np.clip(np.rint(share / share.mean() * size / ratio), 5, size).astype(np.int32)
    if queries is None:
        queries = rng.standard_normal((n_layers, spec.dense_layers[0].n_query_heads, 32, key_dim), np.float32)
    small = compact(KVBlock.dense(block.tensors, size, block.first_position), spec, budgets, queries)
    return replace(block, tensors=small.to_tensors(), fidelity=Fidelity(FidelityKind.COMPACTED, "x8", ratio))


def n_rows(blocks: list[Block]) -> int:
    """Rows of all layers and heads that some blocks hold, dense or compacted."""
    return sum(int(np.prod(block.tensors["keys"].shape[:-1])) for block in blocks)
