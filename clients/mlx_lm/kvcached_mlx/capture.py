"""What calibration takes from a running model beside its cache: the queries, and how attention's output is read.

Models of mlx-lm call `scaled_dot_product_attention`, by that name in their own module, with rotated queries and the
layer's entry of the cache; for the time of a `with` the name stands for a function that notes both.
"""

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.nn.layers.linear import Linear
from mlx.nn.layers.quantized import QuantizedLinear

from kvcached_client import ModelSpec

from . import tree

log = logging.getLogger(__name__)

_ATTENTION = "scaled_dot_product_attention"


def run(
    model: Any, spec: ModelSpec, cache: Sequence[Any], token_ids: Sequence[int], sampled: Sequence[int]
) -> np.ndarray | None:
    """Feeds tokens to a model; the queries of some of them.

    sampled: indices into `token_ids`. Returns float32 [n_dense_layers, n_query_heads, n_sampled, key_dim], or None for
    a model whose dense layers do not all show their queries.
    """
    with queries_seen(model, cache, sampled) as seen:
        model(mx.array([list(token_ids)]), cache=cache)
    dense = [i for i, layer in enumerate(spec.layers) if not layer.opaque]
    found = [seen[i] for i in dense if i in seen]
    mx.eval([entry.state for entry in cache], found)
    shapes = {(1, layer.n_query_heads, len(sampled), layer.key_dim) for layer in spec.dense_layers}
    if len(found) < len(dense) or {tuple(array.shape) for array in found} != shapes or len(shapes) > 1:
        return None
    return np.stack([tree.to_numpy(array)[0].astype(np.float32) for array in found])


@contextmanager
def queries_seen(model: Any, cache: Sequence[Any], sampled: Sequence[int]) -> Iterator[dict[int, Any]]:
    """Within it, calls of the model fill what it yields: sampled queries by index of the layer's entry in `cache`.

    Not for two threads at a time.
    """
    indices = mx.array(list(sampled), mx.int32)
    seen: dict[int, Any] = {}

    def noting(layer: int, read: Any, queries: Any, _keys: Any, _values: Any) -> Any:
        seen[layer] = mx.take(queries, indices, axis=2)
        return read

    with attention_changed(model, cache, noting):
        yield seen


@contextmanager
def attention_changed(model: Any, cache: Sequence[Any], change: Callable[..., Any]) -> Iterator[None]:
    """Within it, what a layer's attention reads of its entry in `cache` is what `change` makes of it.

    change: called with the index of the entry, what was read [1, heads, n, dim], queries, keys and values. Not for two
    threads at a time: all models of one architecture share the module that is changed.
    """
    layer_of = {id(entry): i for i, entry in enumerate(cache)}

    def changing(attention: Any) -> Any:
        def call(queries: Any, keys: Any, values: Any, *args: Any, **kwargs: Any) -> Any:
            read = attention(queries, keys, values, *args, **kwargs)
            layer = layer_of.get(id(kwargs.get("cache", args[0] if args else None)))
            return read if layer is None else change(layer, read, queries, keys, values)

        return call

    modules = {sys.modules[type(part).__module__] for _, part in model.named_modules()}
    changed = [(module, getattr(module, _ATTENTION)) for module in modules if hasattr(module, _ATTENTION)]
    try:
        for module, attention in changed:
            setattr(module, _ATTENTION, changing(attention))
        yield
    finally:
        for module, attention in changed:
            setattr(module, _ATTENTION, attention)


def output_metric(model: Any, spec: ModelSpec) -> np.ndarray | None:
    """How much an error in a value matters: for each KV head the sum over its query heads h of W_h^T W_h.

    W_h: the columns of the output projection that read head h. float32 [n_dense_layers, n_kv_heads, value_dim,
    value_dim]; None where a dense layer has no such projection that we understand (one with a LoRA, say).
    """
    metrics = []
    for i, layer in enumerate(spec.layers):
        if layer.opaque:
            continue
        weight = _weight(getattr(getattr(model.layers[i], "self_attn", None), "o_proj", None))
        heads = (layer.n_kv_heads, layer.n_query_heads // layer.n_kv_heads, layer.value_dim)
        if weight is None or weight.shape[1] != np.prod(heads) or layer.n_query_heads % layer.n_kv_heads:
            log.info("no output metric: the output projection of layer %d is not plain", i)
            return None
        columns = weight.reshape(-1, *heads)
        rows = columns.transpose(1, 0, 2, 3).reshape(layer.n_kv_heads, -1, layer.value_dim)
        metrics.append(rows.swapaxes(1, 2) @ rows)
    return np.stack(metrics)


def _weight(projection: Any) -> np.ndarray | None:
    """The matrix of a linear layer, float32 [outputs, inputs]; of exactly these classes, for others add to it."""
    if type(projection) is Linear:
        weight = projection.weight
    elif type(projection) is QuantizedLinear:
        weight = mx.dequantize(
            projection.weight,
            projection.scales,
            projection.get("biases"),
            group_size=projection.group_size,
            bits=projection.bits,
            mode=projection.mode,
        )
    else:
        return None
    return np.array(weight.astype(mx.float32))
