"""Compaction under test: whole frames of the daemon's own code, and what it is held against, none of it coded.

A compacted block comes back as a dense one, with a bias of -inf where a head has dropped a token: the model's forward
reads just what an engine would.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from under_test import Coded, Half

from kvcached import codec
from kvcached.block import BlockId, KVBlock
from kvcached.codec import compaction
from kvcached.codec.compaction import Budgets
from kvcached.codec.compactor import Compactor
from kvcached_client.tensors import DTYPES

_BLOCK_ID = BlockId(bytes(32), "", bytes(32))
_MAX_BYTES = 1 << 30
Uncoded = Callable[[KVBlock], KVBlock]


@dataclass(frozen=True, slots=True, eq=False)
class Compacted:
    """Compaction and coding, there and back; every byte of the frame counts."""

    compactor: Compactor

    def __call__(self, keys: Half, values: Half, first_position: int) -> Coded:
        block = KVBlock.dense({"keys": keys, "values": values}, keys.shape[2], first_position)
        small = codec.compact(block, self.compactor).block
        frame = codec.encode(_BLOCK_ID, small, coder=self.compactor)
        return _spread(codec.decode(_BLOCK_ID, frame, _MAX_BYTES, self.compactor), 8.0 * len(frame))


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """What is left of a block by some way of compacting it; counted as the engine holds it, nothing is coded."""

    way: Uncoded

    def __call__(self, keys: Half, values: Half, first_position: int) -> Coded:
        small = self.way(KVBlock.dense({"keys": keys, "values": values}, keys.shape[2], first_position))
        return _spread(small, 8.0 * active_bytes(small))


def matching(compactor: Compactor, budgets: Budgets | None = None) -> Uncoded:
    """Attention Matching with the compactor's budgets, or with others."""

    def way(block: KVBlock) -> KVBlock:
        found = compactor.budgets if budgets is None else budgets
        return compaction.compact(block, compactor.spec, found, codec.reservoir(block, compactor))

    return way


def without_bias(way: Uncoded) -> Uncoded:
    """The same rows, their biases thrown away (PR #418 computed them and did so)."""

    def bare(block: KVBlock) -> KVBlock:
        small = way(block)
        return replace(small, bias=np.zeros_like(small.bias))

    return bare


def every_nth(n: int) -> Uncoded:
    """Every n-th token of all heads, as PR #418 picked them."""

    def way(block: KVBlock) -> KVBlock:
        n_heads, n_tokens = block.lengths.size, block.n_source_tokens
        kept = (np.arange(n_heads)[:, None] * n_tokens + np.arange(0, n_tokens, n)).reshape(-1)
        rows = {name: getattr(block, name)[kept] for name in ("keys", "values", "positions", "bias")}
        return replace(block, **rows, lengths=np.full_like(block.lengths, len(kept) // n_heads))

    return way


def active_bytes(block: KVBlock) -> int:
    """What its rows take in an engine, biases in the KV dtype; without the padding of groups of heads."""
    return block.nbytes + (0 if block.is_dense else len(block.bias) * block.keys.dtype.itemsize)


def _spread(small: KVBlock, bits: float) -> Coded:
    heads, n_tokens = small.lengths.shape, small.n_source_tokens
    bias = np.full((*heads, n_tokens), -np.inf, np.float32).reshape(-1, n_tokens)
    sides = {s: np.zeros((*bias.shape, getattr(small, s).shape[1]), DTYPES["float16"]) for s in ("keys", "values")}
    for head, rows in enumerate(compaction.rows_of_heads(small)):
        at = small.positions[rows] - small.first_position
        bias[head, at] = small.bias[rows]
        for side, out in sides.items():
            out[head, at] = getattr(small, side)[rows]
    keys, values = (out.reshape(*heads, n_tokens, -1) for out in sides.values())
    return Coded(keys, values, bits, bits, keys.size + values.size, bias=bias.reshape(*heads, n_tokens))
