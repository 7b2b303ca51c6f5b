"""How much an error in a cached key or value matters: what it does to the residual stream, to first order.

A query with attention weights a_j reads o = sum_j a_j v_j through the output projection W. An error in value j moves
what is read by a_j W dv_j; an error in key j moves a logit by s q·dk_j, and what is read by a_j (s q·dk_j) W (v_j - o).
Errors of different tokens are independent, so that with G = W^T W the expected squared error is

    values    sum_j a_j^2  dv_j^T G dv_j
    keys      sum_j a_j^2 s^2 |W (v_j - o)|^2  (q_j·dk_j)^2      q_j: the query without rotation, as key j meets it

Both are in one unit, in which keys and values, layers and heads can be compared. Averaged over queries, G and the
second moment of q_j are the metrics of a KV head. Heads that spread their attention average errors out and weigh
little; so do heads that look at near tokens alone, because the adapter computes those anew.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64, Int32, Shaped

from kvcached.block import LayerSpec
from kvcached.codec import rope

_N_DRAWS = 8  # of a query: keys that stand for all that it reads

Keys = Float32[np.ndarray, "n_kv_heads n_tokens key_dim"]
Values = Float32[np.ndarray, "n_kv_heads n_tokens value_dim"]
Queries = Float32[np.ndarray, "n_query_heads n_queries key_dim"]
Positions = Int32[np.ndarray, " n_queries"]
Weights = Float32[np.ndarray, "n_queries n_tokens"]


@dataclass(frozen=True, slots=True, eq=False)
class Text:
    """The keys (rotated) and values of one layer, from `first_position` on, and which of them are read from a store."""

    keys: Keys
    values: Values
    first_position: int
    n_exact: int  # tokens at the beginning that are kept exactly
    n_recomputed: int  # tokens before a query that are computed anew

    def attention(
        self, head: int, queries: Float32[np.ndarray, "n_queries key_dim"], positions: Positions, layer: LayerSpec
    ) -> tuple[Weights, Weights]:
        """Weights of some queries on the tokens that they see; and squared, on those that come out of a store."""
        scores = queries @ self.keys[head].T * np.float32(scale_of(layer))
        if layer.soft_cap:
            scores = np.float32(layer.soft_cap) * np.tanh(scores / np.float32(layer.soft_cap))
        distances = positions[:, None] - self.first_position - np.arange(self.keys.shape[1])
        scores[distances < 0] = -np.inf
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        stored = distances >= self.n_recomputed
        stored[:, : self.n_exact] = False
        return weights, np.square(weights) * stored


def scale_of(layer: LayerSpec) -> float:
    """By what a layer multiplies its logits."""
    return layer.softmax_scale or layer.key_dim**-0.5


def of_head(
    text: Text,
    head: int,
    queries: Queries,
    positions: Positions,
    layer: LayerSpec,
    output_metric: Float64[np.ndarray, "value_dim value_dim"],
    rng: np.random.Generator,
) -> tuple[Float64[np.ndarray, "key_dim key_dim"], float]:
    """Summed over queries: the metric of the head's keys, and the factor on the output metric that is its values'.

    queries: of the query heads that read this KV head, rotated to `positions`; output_metric: G of one of them.
    Raises UnsupportedRopeError.
    """
    values = text.values[head]
    projected = values @ output_metric.astype(np.float32)
    squares = (projected * values).sum(axis=1)
    metric, weight = np.zeros((queries.shape[-1],) * 2), 0.0
    for of_one in queries:
        attention, squared = text.attention(head, of_one, positions, layer)
        read = attention @ values
        apart = squares - 2 * read @ projected.T + ((read @ output_metric) * read).sum(axis=1, keepdims=True)
        matter = squared * np.maximum(apart, 0) * scale_of(layer) ** 2
        met = _as_keys_meet(of_one, matter, text.first_position, layer, rng)
        metric += met.T @ met
        weight += float(squared.sum(dtype=np.float64))
    return metric, weight


def _as_keys_meet(
    queries: Float32[np.ndarray, "n_queries key_dim"],
    matter: Shaped[np.ndarray, "n_queries n_tokens"],
    first_position: int,
    layer: LayerSpec,
    rng: np.random.Generator,
) -> Float64[np.ndarray, "n_rows key_dim"]:
    """Queries turned back to keys that are drawn by how much they matter, weighted so that squares add up to all."""
    whole = np.cumsum(matter, axis=1, dtype=np.float64)
    reads = whole[:, -1] > 0
    if not reads.any():
        return np.zeros((0, queries.shape[1]))
    whole, queries = whole[reads], np.repeat(queries[reads], _N_DRAWS, axis=0)
    levels = rng.random((len(whole), _N_DRAWS)) * whole[:, -1:]
    drawn = np.stack([np.searchsorted(row, level, side="right") for row, level in zip(whole, levels, strict=True)])
    positions = (first_position + np.minimum(drawn, matter.shape[1] - 1).reshape(-1)).astype(np.int32)
    # remove() divides by the factor of a scaling where the transpose of a rotation multiplies.
    ones, start = np.ones((1, queries.shape[-1]), np.float32), np.zeros(1, np.int32)
    factor = rope.apply(ones, start, layer.rope)[0].astype(np.float64)
    met = rope.remove(queries, positions, layer.rope) * np.square(factor)
    weighted: Float64[np.ndarray, "n_rows key_dim"] = (
        met * np.sqrt(np.repeat(whole[:, -1] / _N_DRAWS, _N_DRAWS))[:, None]
    )
    return weighted
