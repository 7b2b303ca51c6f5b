"""Reference queries: a few that a model asked while it prefilled a cache, for the daemon to compact its blocks with.

`note` is called from attention, once installed so. What it keeps is an attribute of the cache's entry: it is copied
with that and gone with it. Every layer of a cache keeps the queries of the same positions, multiples of a stride that
doubles when there are too many of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from kvcached_client import Block, ModelSpec

from . import tree

_ATTRIBUTE = "kvcached_queries"
_SAMPLED = ("KVCache", "CompactedKVCache")
_STRIDE = 8  # tokens, to begin with: 32 queries of each head in a block of 256
_MAX_QUERIES, _MAX_BYTES = 256, 1 << 20  # of a layer's sample: whichever is less
_MOST, _LEAST = 64, 8  # queries of each head with a block; of fewer than the latter a fit learns nothing


def note(entry: Any, queries: Any) -> None:
    """Samples queries [1, n_query_heads, n, key_dim] of the last n tokens of a cache's entry, rotated."""
    if type(entry).__name__ in _SAMPLED and len(queries) == 1:
        if not hasattr(entry, _ATTRIBUTE):
            setattr(entry, _ATTRIBUTE, _Sample())
        getattr(entry, _ATTRIBUTE).add(queries, entry.offset - queries.shape[2])


@dataclass(frozen=True, slots=True, eq=False)
class Sampled:
    """Queries of a cache: rows [n_dense_layers, n_query_heads, n, key_dim] in its dtype, at ascending positions."""

    spec: ModelSpec
    rows: np.ndarray
    positions: np.ndarray
    n_tokens: int  # of the cache

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes

    def beside(self, block: Block) -> Block:
        """A block with those queries that came after it, as tensor "queries": at most 64 of a head, spread evenly.

        A block that too few came after is left as it is.
        """
        behind = block.first_position + self.spec.block_size
        after = np.flatnonzero((self.positions >= behind) & (self.positions < self.n_tokens))
        if len(after) < _LEAST:
            return block
        chosen = after[np.linspace(0, len(after) - 1, min(len(after), _MOST)).astype(int)]
        return replace(block, tensors={**block.tensors, "queries": np.ascontiguousarray(self.rows[:, :, chosen])})


def sampled(spec: ModelSpec, cache: Sequence[Any]) -> Sampled | None:
    """The queries that were sampled while a cache was made; None if none were, or not alike in all layers."""
    entries = [entry for entry, layer in zip(cache, spec.layers, strict=True) if not layer.opaque]
    samples = [getattr(entry, _ATTRIBUTE, None) for entry in entries]
    positions = {tuple(sample.positions) if sample else () for sample in samples}
    if len(positions) != 1 or not (of_all := np.array(positions.pop())).size:
        return None
    dtype = getattr(mx, spec.kv_dtype)
    rows = mx.concatenate([sample.rows for sample in samples if sample]).astype(dtype)
    shape = (len(spec.dense_layers), spec.dense_layers[0].n_query_heads, len(of_all), spec.dense_layers[0].key_dim)
    if rows.shape != shape:
        return None
    mx.eval(rows)
    return Sampled(spec, tree.to_numpy(rows), of_all, entries[0].offset)


def with_queries(spec: ModelSpec, cache: Sequence[Any], blocks: Sequence[Block]) -> list[Block]:
    """Blocks of a cache, each with the queries that came after it."""
    found = sampled(spec, cache)
    return [found.beside(block) for block in blocks] if found else list(blocks)


class _Sample:
    """Of one layer: rows [1, n_query_heads, n, key_dim] at ascending positions. rows is None as long as n is 0."""

    def __init__(self) -> None:
        self.positions: list[int] = []
        self.rows: Any = None
        self._stride, self._is_pending = _STRIDE, False

    def add(self, queries: Any, start: int) -> None:
        """Of tokens from `start` on, unless it is a single one; what was sampled from there on was cut off since."""
        if self._is_pending:  # computed by now; unevaluated, it would hold on to all that it is a sample of
            mx.eval(self.rows)
            self._is_pending = False
        if self.positions and self.positions[-1] >= start:
            self._keep([i for i, position in enumerate(self.positions) if position < start])
        first, n = -start % self._stride, queries.shape[2]
        if n == 1 or first >= n:  # sampling while decoding would wait for each token
            return
        rows = queries[:, :, first :: self._stride]
        self.positions += range(start + first, start + n, self._stride)
        self.rows = rows if self.rows is None else mx.concatenate([self.rows, rows], axis=2)
        self._is_pending = True
        most = min(_MAX_QUERIES, max(_MAX_BYTES // (rows.nbytes // rows.shape[2]), _LEAST))
        while len(self.positions) > most:
            self._stride *= 2
            self._keep([i for i, position in enumerate(self.positions) if position % self._stride == 0])

    def _keep(self, indices: list[int]) -> None:
        self.positions = [self.positions[i] for i in indices]
        self.rows = self.rows[:, :, mx.array(indices)] if indices else None
        self._is_pending = bool(indices)
