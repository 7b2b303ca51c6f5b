"""What compaction needs of a model, from its caches and queries: curves of error, a reservoir, a few blocks. Pure.

Of some blocks of each text every head is compacted to every one of a few fractions, fitted to half of the queries that
come later, and read by the other half together with the tokens around the block: the squared error of what the head
adds to the residual stream is a point of its curve. Budgets are solved from the curves; see codec/budgets.py.
"""

from collections.abc import Iterator
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float32, Float64, Int32

from kvcached.block import KVBlock, LayerSpec, ModelSpec
from kvcached.codec import attention, compaction, rope
from kvcached.sensitivity import scale_of

BudgetsBy = Literal["curves", "entropy", "uniform"]
BUDGETS: tuple[str, ...] = get_args(BudgetsBy)
FRACTIONS = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8, 1.0)
N_RESERVOIR = 256  # queries
_BLOCKS_PER_TEXT, _MAX_BLOCKS, _MAX_BYTES = 3, 48, 256 << 20
_MIN_QUERIES, _MAX_QUERIES = 32, 256  # after one block, to fit and to read with

Queries = Float32[np.ndarray, "_n_layers _n_query_heads n_queries _key_dim"]
Positions = Int32[np.ndarray, " n_queries"]
OutputMetric = Float64[np.ndarray, "n_layers n_kv_heads value_dim value_dim"]


class Matching:
    """Accumulates what compaction needs. Not safe for concurrent calls.

    blocks: a few whole ones, as they came. reservoir: queries without rotary positions. problem: why a block could not
    be compacted, if one could not: it has no part in the curves.
    """

    problem = ""

    def __init__(self, spec: ModelSpec, seed: int, n_recomputed: int) -> None:
        self._spec, self._n_recomputed = spec, n_recomputed
        self._rng = np.random.default_rng([seed, 2])
        n_layers, n_kv_heads = spec.dense_shapes()["keys"][:2]
        self._errors = np.zeros((n_layers, n_kv_heads, len(FRACTIONS)))
        self._entropy = np.zeros((n_layers, n_kv_heads))
        self._n_blocks = 0
        self._ranks = np.zeros(0)
        self.reservoir: np.ndarray | None = None
        self.blocks: list[KVBlock] = []

    def add(self, text: KVBlock, queries: Queries, positions: Positions, output_metric: OutputMetric) -> None:
        """Takes a run of text with its queries into account. output_metric: of one query head of each KV head."""
        self._fill_reservoir(queries, positions)
        size, last = self._spec.block_size, text.first_position + text.n_source_tokens
        first = max(-(-text.first_position // size), 1) * size  # sinks, of the first block, are kept in any case
        later = {end: positions >= end + self._n_recomputed for end in range(first + size, last + 1, size)}
        able = [end for end, these in later.items() if these.sum() >= _MIN_QUERIES]
        for end in able[:: max(1, -(-len(able) // _BLOCKS_PER_TEXT))]:
            if self._n_blocks < _MAX_BLOCKS:
                step = -(-int(later[end].sum()) // _MAX_QUERIES)
                self._add_block(text, end, queries[:, :, later[end]][:, :, ::step], output_metric)

    def curves(
        self, by: BudgetsBy, head_weights: Float32[np.ndarray, "n_layers n_kv_heads"] | None = None
    ) -> Float32[np.ndarray, "n_layers n_kv_heads n_fractions"]:
        """Error of each head at FRACTIONS, the largest 1: as measured, times what it weighs, or what a proxy says.

        entropy: a head that looks at few tokens, exp(entropy), loses little with the others. uniform: all alike.

        Raises ValueError if no block had queries.
        """
        if not self._n_blocks:
            raise ValueError("no block had queries that came after it")
        fractions = np.array(FRACTIONS)
        if by == "uniform":
            found = np.broadcast_to(1 - fractions, self._errors.shape)
        elif by == "entropy":
            looked_at = np.exp(self._entropy / self._n_blocks)[:, :, None] / self._spec.block_size
            found = np.exp(-fractions / looked_at) - np.exp(-1 / looked_at)
        else:
            found = self._errors if head_weights is None else self._errors * head_weights[:, :, None]
        return (found / max(float(found.max()), 1e-300)).astype(np.float32)

    def _fill_reservoir(self, queries: Queries, positions: Positions) -> None:
        """Each query is as likely to be kept as any other: those with the smallest of random numbers are."""
        layers = zip(queries, self._spec.dense_layers, strict=True)
        plain = np.stack([rope.remove(of_layer, positions, layer.rope) for of_layer, layer in layers])
        ranks = np.concatenate([self._ranks, self._rng.random(len(positions))])
        both = plain if self.reservoir is None else np.concatenate([self.reservoir, plain], axis=2)
        kept = np.sort(np.argsort(ranks, kind="stable")[:N_RESERVOIR])
        self._ranks, self.reservoir = ranks[kept], both[:, :, kept]

    def _add_block(self, text: KVBlock, end: int, queries: Queries, output_metric: OutputMetric) -> None:
        tensors, start = text.to_tensors(), end - self._spec.block_size
        at, stop = start - text.first_position, end + self._n_recomputed - text.first_position
        block = KVBlock.dense(
            {side: tensors[side][:, :, at : end - text.first_position].copy() for side in ("keys", "values")},
            self._spec.block_size,
            start,
        )
        n_kv_heads = self._errors.shape[1]
        errors, entropy = np.zeros_like(self._errors), np.zeros_like(self._entropy)
        for layer, head in np.ndindex(*entropy.shape):
            keys, values = (tensors[side][layer, head, :stop].astype(np.float32) for side in ("keys", "values"))
            per_kv_head = queries.shape[1] // n_kv_heads
            group = queries[layer, head * per_kv_head : (head + 1) * per_kv_head]
            measured = _Head(keys, values, slice(at, at + self._spec.block_size), group, self._spec.dense_layers[layer])
            entropy[layer, head] = measured.entropy()
            try:
                errors[layer, head] = list(measured.errors(output_metric[layer, head]))
            except (ValueError, RuntimeError) as error:  # as compaction says it, and scipy of a fit that does not end
                self.problem = str(error)
                return
        self._n_blocks += 1
        self._errors += errors
        self._entropy += entropy
        if block.nbytes * (len(self.blocks) + 1) <= _MAX_BYTES:
            self.blocks.append(block)


class _Head:
    """One head of a text around a block. keys, values: of all tokens that the queries see, the block among them."""

    def __init__(
        self, keys: np.ndarray, values: np.ndarray, block: slice, queries: np.ndarray, layer: LayerSpec
    ) -> None:
        self._values, self._block = values, block
        self._fit, self._test = (
            attention.logits(_rows(half), keys, scale_of(layer), layer.soft_cap)
            for half in (queries[:, ::2], queries[:, 1::2])
        )

    def entropy(self) -> float:
        """Of attention within the block, in nats, mean over queries."""
        found, _ = attention.weights(self._fit[:, self._block])
        return float(-(found * np.log(np.maximum(found, 1e-300))).sum(axis=1).mean())

    def errors(self, output_metric: Float64[np.ndarray, "d d"]) -> Iterator[float]:
        """Through the output projection, for each fraction of kept tokens."""
        whole, values = self._fit[:, self._block], self._values[self._block]
        exact = attention.read(self._test, self._values)
        around = attention.read(np.delete(self._test, self._block, 1), np.delete(self._values, self._block, 0))
        for fraction in FRACTIONS:
            n_kept = max(1, round(fraction * len(values)))
            if n_kept == len(values):
                yield 0.0
                continue
            kept = compaction.select(whole, n_kept, 0)
            bias = compaction.fit_bias(whole, whole[:, kept])
            fitted = compaction.fit_values(whole, values, whole[:, kept] + bias, values[kept])
            found = attention.read(self._test[:, self._block][:, kept] + bias, fitted)
            yield attention.output_error(_joined(around, found), exact, output_metric)


def _joined(a: attention.Read, b: attention.Read) -> attention.Read:
    """What is read of two parts together. Of a sum, not of a difference: all of it may lie in either part."""
    log_mass = np.logaddexp(a.log_mass, b.log_mass)
    of_a, of_b = (np.exp(read.log_mass - log_mass)[:, None] for read in (a, b))
    return attention.Read(of_a * a.output + of_b * b.output, log_mass)


def _rows(queries: Float32[np.ndarray, "heads n dim"]) -> Float32[np.ndarray, "rows dim"]:
    return queries.reshape(-1, queries.shape[-1])
