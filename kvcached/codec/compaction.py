"""Attention Matching: fewer tokens for each KV head, that queries read almost what all of them gave.

For a head with keys K and values V, reference queries Q, the scale s of its logits and a number t of tokens to keep:

    pick   the t keys with the largest root mean square of attention weight over the queries; sinks always
    fit    bias     non-negative w, so that sum_i w_i exp(q·c_i s) is the mass sum_j exp(q·k_j s); bias beta = log w
           values   C_v, so that softmax(q·C^T s + beta) C_v is softmax(q·K^T s) V

Source: Attention Matching, arXiv 2602.16284 (HighestAttnKeys; C_1 there are our kept keys, C_2 our fitted values).
Both fits are pulled towards plain picking, w = 1 and the kept tokens' own values: so they are determined by however
few queries, and what no query asked about stays what it was. The mass is that of exponentials, each query's shifted by
its own largest logit; of normalised weights it would be 1 for whatever is kept, and the bias would mean nothing. Keys
are coded between `pick` and `fit`, so that what is fitted makes up for what coding changed.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from jaxtyping import Float32, Float64, Int32, Int64
from scipy.optimize import nnls

from kvcached.block import KVBlock, LayerSpec, ModelSpec
from kvcached.codec import attention, planes
from kvcached.codec.attention import Keys, Logits, Values

BIAS_STEP = 1 / 16  # biases are multiples of it, as frames keep them
MAX_BIAS = 3.0  # of either sign: w within [e^-3, e^3], as in the paper's code
BIAS_RIDGE = 0.01  # of the mean diagonal, towards w = 1
VALUE_RIDGE = 0.1  # of the mean diagonal, towards the kept tokens' own values
_MAX_GROWTH = 8.0  # of the largest value: beyond it a fit is of noise
_TINY = float(np.finfo(np.float64).tiny)

Kept = Int64[np.ndarray, " n_kept"]
KeptLogits = Float64[np.ndarray, "n_queries n_kept"]
KeptBias = Float32[np.ndarray, " n_kept"]
KeptValues = Float32[np.ndarray, "n_kept value_dim"]
BlockQueries = Float32[np.ndarray, "_n_layers _n_query_heads n_queries _key_dim"]
HeadQueries = Float32[np.ndarray, "n_rows key_dim"]  # of its query heads, one after another
Budgets = Int32[np.ndarray, "_n_layers _n_kv_heads"]
Rows = Float32[np.ndarray, "_n_rows _dim"]


def compact(block: KVBlock, spec: ModelSpec, budgets: Budgets, queries: BlockQueries) -> KVBlock:
    """A dense block with `budgets` tokens left in each layer and head. The inverse is not to be had.

    queries: of every query head, rotary positions applied; they read the whole block, so they come from after it.

    Raises:
        ValueError: the block is compacted already or not of the model, its numbers or the queries are not finite, the
            queries are of another shape, a budget is below the sinks or above the block, or a fit fails.
    """
    picked = pick(block, spec, budgets, queries)
    return fit(picked, block, spec, queries, picked.keys.astype(np.float32))


def pick(block: KVBlock, spec: ModelSpec, budgets: Budgets, queries: BlockQueries) -> KVBlock:
    """A dense block with the most read tokens of each head, as they are. Raises what `compact` does."""
    n_sinks = _check(block, spec, budgets, queries)
    rows = []
    for head, (keys, _) in enumerate(_heads(block)):
        n_kept = int(budgets.flat[head])
        if n_kept == block.n_source_tokens:
            kept = np.arange(n_kept)
        else:
            kept = select(_logits(spec, queries, keys, head), n_kept, n_sinks)
        rows.append(head * block.n_source_tokens + kept)
    taken = np.concatenate(rows)
    return replace(
        block,
        keys=block.keys[taken],
        values=block.values[taken],
        positions=block.positions[taken],
        bias=block.bias[taken],
        lengths=budgets,
    )


def fit(picked: KVBlock, block: KVBlock, spec: ModelSpec, queries: BlockQueries, seen_keys: Rows) -> KVBlock:
    """Picked rows with biases and values that give queries what they read of the whole block.

    seen_keys: float32, those of `picked` as whoever restores the block will have them. Heads that keep all tokens, and
    sinks, stay as they are.

    Raises ValueError for values that grow beyond any use.
    """
    n_sinks = planes.n_sinks(block.first_position, block.n_source_tokens)
    values, bias = picked.values.astype(np.float32), picked.bias.copy()
    for head, (rows, (keys, of_all)) in enumerate(zip(rows_of_heads(picked), _heads(block), strict=True)):
        if rows.stop - rows.start < block.n_source_tokens:
            whole = _logits(spec, queries, keys, head)
            kept = _logits(spec, queries, seen_keys[rows], head)
            bias[rows] = fit_bias(whole, kept, n_sinks)
            values[rows] = fit_values(whole, of_all, kept + bias[rows], values[rows], n_sinks)
    return replace(picked, values=planes.rounded(values, block.values.dtype), bias=bias)


def select(of: Logits, n_kept: int, n_sinks: int) -> Kept:
    """Indices of the keys to keep, ascending: the first `n_sinks`, then those that queries look at most."""
    found, _ = attention.weights(of)
    looked_at = np.square(found).mean(axis=0)
    looked_at[:n_sinks] = np.inf
    return np.sort(np.argsort(-looked_at, kind="stable")[:n_kept])


def fit_bias(whole: Logits, kept: KeptLogits, n_fixed: int = 0) -> KeptBias:
    """The bias of kept keys, with which they have the mass of all; multiples of BIAS_STEP within MAX_BIAS.

    The first `n_fixed` keep a bias of 0.
    """
    bias = np.zeros(kept.shape[1], np.float32)
    if n_fixed >= len(bias):
        return bias
    largest = whole.max(axis=1, keepdims=True)
    features = np.exp(np.minimum(kept - largest, MAX_BIAS))
    missing = np.exp(whole - largest).sum(axis=1) - features[:, :n_fixed].sum(axis=1)
    free = features[:, n_fixed:]
    pull = np.sqrt(BIAS_RIDGE * max(float(np.square(free).sum(axis=0).mean()), _TINY))
    towards = np.full(free.shape[1], pull)
    factors, _ = nnls(np.concatenate([free, np.diag(towards)]), np.concatenate([missing, towards]))
    fitted = np.log(np.clip(factors, np.exp(-MAX_BIAS), np.exp(MAX_BIAS)))
    bias[n_fixed:] = np.rint(fitted / BIAS_STEP) * BIAS_STEP
    return bias


def fit_values(whole: Logits, values: Values, kept: KeptLogits, own: KeptValues, n_fixed: int = 0) -> KeptValues:
    """Values for the kept keys, with which queries read what they read of all. kept: logits with the bias.

    The first `n_fixed` stay. Raises ValueError for values that grow beyond any use.
    """
    found, _ = attention.weights(kept)
    missing = attention.read(whole, values).output - found @ own.astype(np.float64)
    free = found[:, n_fixed:]
    gram = free.T @ free
    pull = VALUE_RIDGE * max(float(np.trace(gram)) / max(len(gram), 1), _TINY)
    fitted = own.astype(np.float64)
    fitted[n_fixed:] += np.linalg.solve(gram + pull * np.eye(len(gram)), free.T @ missing)
    limit = _MAX_GROWTH * float(np.abs(values).max(initial=0))
    if not np.abs(fitted).max(initial=0) <= limit:  # catches NaN too
        raise ValueError(f"fitted values grow to {np.abs(fitted).max():.3g}, more than {limit:.3g}")
    return fitted.astype(np.float32)


def errors(
    compacted: KVBlock,
    block: KVBlock,
    spec: ModelSpec,
    queries: BlockQueries,
    output_metric: Float32[np.ndarray, "n_layers n_kv_heads value_dim value_dim"],
) -> tuple[float, float]:
    """What a compacted block loses on queries, over all heads: of the mass, and of the output through the metric.

    Both relative, root mean squares, and of this block alone, as if there were no other tokens.
    """
    mass, lost, whole = [], 0.0, 0.0
    for head, (rows, (keys, values)) in enumerate(zip(rows_of_heads(compacted), _heads(block), strict=True)):
        metric = output_metric.reshape(-1, *output_metric.shape[2:])[head].astype(np.float64)
        exact = attention.read(_logits(spec, queries, keys, head), values)
        kept = _logits(spec, queries, compacted.keys[rows].astype(np.float32), head) + compacted.bias[rows]
        found = attention.read(kept, compacted.values[rows].astype(np.float32))
        mass.append(attention.mass_error(found, exact))
        lost += attention.output_error(found, exact, metric)
        whole += attention.output_error(attention.Read(np.zeros_like(exact.output), exact.log_mass), exact, metric)
    return float(np.sqrt(np.square(mass).mean())), float(np.sqrt(lost / max(whole, _TINY)))


def rows_of_heads(block: KVBlock) -> Iterator[slice]:
    """Where the rows of each head lie, layer by layer."""
    ends = np.cumsum(block.lengths, dtype=np.int64).tolist()
    for start, stop in zip([0, *ends], ends, strict=False):
        yield slice(start, stop)


def _heads(block: KVBlock) -> Iterator[tuple[Keys, Values]]:
    """Keys and values of each head of a dense block."""
    for rows in rows_of_heads(block):
        yield block.keys[rows].astype(np.float32), block.values[rows].astype(np.float32)


def _logits(spec: ModelSpec, queries: BlockQueries, keys: Rows, head: int) -> Float64[np.ndarray, "_n_queries _n_keys"]:
    """Of all queries that read a KV head, counted over all layers, on some keys of it."""
    layers = spec.dense_layers
    n_kv_heads = layers[0].n_kv_heads
    layer = layers[head // n_kv_heads]
    group = _group(queries[head // n_kv_heads], head % n_kv_heads, n_kv_heads)
    return attention.logits(group, keys, _scale(layer), layer.soft_cap)


def _scale(layer: LayerSpec) -> float:
    return layer.softmax_scale or float(layer.key_dim**-0.5)


def _group(queries: Float32[np.ndarray, "n_query_heads n_queries key_dim"], head: int, n_kv_heads: int) -> HeadQueries:
    """The queries of all query heads that read a KV head, one after another."""
    per_kv_head = len(queries) // n_kv_heads
    return queries[head * per_kv_head : (head + 1) * per_kv_head].reshape(-1, queries.shape[-1])


def _check(block: KVBlock, spec: ModelSpec, budgets: Budgets, queries: BlockQueries) -> int:
    """How many of the block's tokens are sinks. Raises ValueError."""
    if not block.is_dense or not block.lengths.size:
        raise ValueError("a block is compacted if it is dense and has dense layers, this one is compacted or opaque")
    n_layers, n_kv_heads, _, key_dim = spec.dense_shapes()["keys"]
    if block.lengths.shape != (n_layers, n_kv_heads) or budgets.shape != (n_layers, n_kv_heads):
        raise ValueError(
            f"expected (layers, KV heads) {(n_layers, n_kv_heads)}, got a block of {block.lengths.shape} and budgets "
            f"of {budgets.shape}"
        )
    heads = {layer.n_query_heads or n_kv_heads for layer in spec.dense_layers}
    n_query_heads = max(heads)
    if len(heads) > 1 or n_query_heads % n_kv_heads:
        raise ValueError(f"layers of {sorted(heads)} query heads do not share {n_kv_heads} KV heads evenly")
    n_queries = queries.shape[2]
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
