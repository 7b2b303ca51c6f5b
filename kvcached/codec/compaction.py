"""Attention Matching: fewer tokens for each KV head, that queries read almost what all of them gave.

For a head with keys K and values V, reference queries Q and a number t of tokens to keep:

    select      the t keys with the largest root mean square of attention weight over the queries; sinks always
    fit_bias    non-negative w, so that sum_i w_i exp(q·c_i s) is the mass sum_j exp(q·k_j s), and bias beta = log w
    fit_values  C_v, so that softmax(q·C^T s + beta) C_v is softmax(q·K^T s) V

Source: Attention Matching, arXiv 2602.16284 (HighestAttnKeys; C_1 there are our kept keys, C_2 our fitted values).
Both fits are pulled towards plain picking, w = 1 and the kept tokens' own values: so they are determined by however
few queries, and what no query asked about stays what it was. The mass is that of exponentials, each query's shifted by
its own largest logit; of normalised weights it would be 1 for whatever is kept, and the bias would mean nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int32, Int64
from scipy.optimize import nnls

from kvcached.block import KVBlock, LayerSpec, ModelSpec
from kvcached.codec import attention, planes
from kvcached.codec.attention import Keys, Logits, Values

MAX_BIAS = 3.0  # of either sign: w within [e^-3, e^3], as in the paper's code
BIAS_RIDGE = 0.01  # of the mean diagonal, towards w = 1
VALUE_RIDGE = 0.1  # of the mean diagonal, towards the kept tokens' own values
_MAX_GROWTH = 8.0  # of the largest value: beyond it a fit is of noise

Kept = Int64[np.ndarray, " n_kept"]
KeptBias = Float32[np.ndarray, " n_kept"]
KeptValues = Float32[np.ndarray, "n_kept value_dim"]
BlockQueries = Float32[np.ndarray, "_n_layers _n_query_heads n_queries _key_dim"]
HeadQueries = Float32[np.ndarray, "n_rows key_dim"]  # of its query heads, one after another
Budgets = Int32[np.ndarray, "_n_layers _n_kv_heads"]


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """What is kept of one head: which tokens, in order, and their bias and values."""

    kept: Kept
    bias: KeptBias
    values: KeptValues


def select(of: Logits, n_kept: int, n_sinks: int) -> Kept:
    """Indices of the keys to keep, ascending: the first `n_sinks`, then those that queries look at most."""
    found, _ = attention.weights(of)
    looked_at = np.square(found).mean(axis=0)
    looked_at[:n_sinks] = np.inf
    return np.sort(np.argsort(-looked_at, kind="stable")[:n_kept])


def fit_bias(of: Logits, kept: Kept) -> KeptBias:
    """The bias of kept keys, with which they have the mass of all; within MAX_BIAS."""
    largest = of.max(axis=1, keepdims=True)
    exponentials = np.exp(of - largest)
    features = exponentials[:, kept]
    pull = np.sqrt(BIAS_RIDGE * max(np.square(features).sum(axis=0).mean(), np.finfo(np.float64).tiny))
    rows = np.concatenate([features, pull * np.eye(len(kept))])
    targets = np.concatenate([exponentials.sum(axis=1), np.full(len(kept), pull)])
    factors, _ = nnls(rows, targets)
    bias: KeptBias = np.log(np.clip(factors, np.exp(-MAX_BIAS), np.exp(MAX_BIAS))).astype(np.float32)
    return bias


def fit_values(of: Logits, values: Values, kept: Kept, bias: KeptBias) -> KeptValues:
    """Values for the kept keys, with which queries read what they read of all.

    Raises ValueError for values that grow beyond any use.
    """
    found, _ = attention.weights(of[:, kept] + bias)
    own = values[kept].astype(np.float64)
    missing = attention.read(of, values).output - found @ own
    gram = found.T @ found
    pull = VALUE_RIDGE * max(float(np.trace(gram)) / len(kept), np.finfo(np.float64).tiny)
    fitted = own + np.linalg.solve(gram + pull * np.eye(len(kept)), found.T @ missing)
    limit = _MAX_GROWTH * float(np.abs(values).max(initial=0))
    if not np.abs(fitted).max(initial=0) <= limit:  # catches NaN too
        raise ValueError(f"fitted values grow to {np.abs(fitted).max():.3g}, more than {limit:.3g}")
    as_float: KeptValues = fitted.astype(np.float32)
    return as_float


def compact_head(of: Logits, values: Values, n_kept: int, n_sinks: int = 0) -> Head:
    """One head, down to `n_kept` tokens; of: logits of the reference queries. All tokens kept is the identity."""
    if n_kept == len(values):
        return Head(np.arange(n_kept), np.zeros(n_kept, np.float32), values)
    kept = select(of, n_kept, n_sinks)
    bias = fit_bias(of, kept)
    return Head(kept, bias, fit_values(of, values, kept, bias))


def compact(block: KVBlock, spec: ModelSpec, budgets: Budgets, queries: BlockQueries) -> KVBlock:
    """A dense block with `budgets` tokens left in each layer and head. The inverse is not to be had.

    queries: of every query head, rotary positions applied; they read the whole block, so they come from after it.

    Raises:
        ValueError: the block is compacted already or not of the model, its numbers or the queries are not finite, the
            queries are of another shape, a budget is below the sinks or above the block, or a fit fails.
    """
    n_sinks = _check(block, spec, budgets, queries)
    tensors = block.to_tensors()
    heads = [
        _compacted(
            tensors["keys"][layer, head].astype(np.float32),
            tensors["values"][layer, head].astype(np.float32),
            _group(queries[layer], head, budgets.shape[1]),
            spec.dense_layers[layer],
            int(budgets[layer, head]),
            n_sinks,
        )
        for layer, head in np.ndindex(*budgets.shape)
    ]
    return _packed(block, budgets, heads)


def _compacted(keys: Keys, values: Values, queries: HeadQueries, layer: LayerSpec, n_kept: int, n_sinks: int) -> Head:
    of = attention.logits(queries, keys, layer.softmax_scale or layer.key_dim**-0.5, layer.soft_cap)
    return compact_head(of, values, n_kept, n_sinks)


def _group(queries: Float32[np.ndarray, "n_query_heads n_queries key_dim"], head: int, n_kv_heads: int) -> HeadQueries:
    """The queries of all query heads that read a KV head, one after another."""
    per_kv_head = len(queries) // n_kv_heads
    return queries[head * per_kv_head : (head + 1) * per_kv_head].reshape(-1, queries.shape[-1])


def _packed(block: KVBlock, budgets: Budgets, heads: Sequence[Head]) -> KVBlock:
    first_rows = block.n_source_tokens * np.arange(len(heads))
    rows = np.concatenate([first + head.kept for first, head in zip(first_rows, heads, strict=True)])
    return KVBlock(
        keys=block.keys[rows],
        values=planes.rounded(np.concatenate([head.values for head in heads]), block.values.dtype),
        positions=block.positions[rows],
        bias=np.concatenate([head.bias for head in heads]),
        lengths=budgets,
        first_position=block.first_position,
        n_source_tokens=block.n_source_tokens,
        opaque=block.opaque,
    )


def _check(block: KVBlock, spec: ModelSpec, budgets: Budgets, queries: BlockQueries) -> int:
    """How many of the block's tokens are sinks. Raises ValueError."""
    if not block.is_dense or not block.lengths.size:
        raise ValueError("a block is compacted if it is dense and has dense layers, this one is compacted or opaque")
    n_layers, n_kv_heads, _, key_dim = spec.dense_shapes()["keys"]
    n_query_heads = spec.dense_layers[0].n_query_heads or n_kv_heads
    if block.lengths.shape != (n_layers, n_kv_heads) or budgets.shape != (n_layers, n_kv_heads):
        raise ValueError(
            f"expected (layers, KV heads) {(n_layers, n_kv_heads)}, got a block of {block.lengths.shape} and budgets "
            f"of {budgets.shape}"
        )
    n_queries = queries.shape[2]
    if n_query_heads % n_kv_heads:
        raise ValueError(f"{n_query_heads} query heads do not share {n_kv_heads} KV heads evenly")
    if not n_queries or queries.shape != (n_layers, n_query_heads, n_queries, key_dim):
        raise ValueError(f"queries are of shape ({n_layers}, {n_query_heads}, n > 0, {key_dim}), got {queries.shape}")
    n_sinks = planes.n_sinks(block.first_position, block.n_source_tokens)
    least = max(n_sinks, 1)
    if budgets.min() < least or budgets.max() > block.n_source_tokens:
        raise ValueError(
            f"budgets are {least} to {block.n_source_tokens} tokens, got {budgets.min()} to {budgets.max()}"
        )
    for name, numbers in (("queries", queries), ("keys", block.keys), ("values", block.values)):
        if not np.isfinite(numbers.astype(np.float32)).all():
            raise ValueError(f"{name} to compact must be finite, got NaN or infinity")
    return n_sinks
