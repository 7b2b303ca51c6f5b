"""Where attention over a compacted cache comes in: the function that models of mlx-lm call by name, in their modules.

A model's module binds `scaled_dot_product_attention` when it is imported; `install` puts a function in its place that
lets the cache compute attention where that is a CompactedKVCache, and is the old one for every other cache.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from kvcached_client import ModelSpec

from .compacted import KEPT, CompactedKVCache, Head
from .queries import note

NAME = "scaled_dot_product_attention"


def modules_of(model: Any) -> list[Any]:
    """The Python modules of a model's parts, base classes included, that have an attention function."""
    parts = {type(part) for _, part in model.named_modules()}
    names = {base.__module__ for part in parts for base in part.__mro__}
    return [sys.modules[name] for name in sorted(names) if hasattr(sys.modules.get(name), NAME)]


def install(model: Any, sampling: bool = False) -> None:
    """Lets a model take compacted caches. Once or many times, and for good: other caches do not notice.

    sampling: queries are sampled from now on.
    """
    for module in modules_of(model):
        if not isinstance(getattr(module, NAME), _Attention):
            setattr(module, NAME, _Attention(getattr(module, NAME)))
        getattr(module, NAME).samples |= sampling


class _Attention:
    """In the place of mlx-lm's function; queries are sampled where `samples` says so."""

    def __init__(self, plain: Callable[..., Any]) -> None:
        self._plain, self.samples = plain, False

    def __call__(self, queries: Any, keys: Any, values: Any, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("cache", args[0] if args else None)
        if self.samples:
            note(cache, queries)
        if isinstance(cache, CompactedKVCache):
            return _attend(queries, keys, values, *args, **kwargs)
        return self._plain(queries, keys, values, *args, **kwargs)


def _attend(
    queries: Any, keys: Any, values: Any, cache: CompactedKVCache, scale: float, mask: Any = None, sinks: Any = None
) -> Any:
    """Attention as mlx-lm's function has it; keys and values are in the cache. Raises ValueError for what is not."""
    if keys is not KEPT or values is not KEPT:
        raise ValueError("keys or values were changed between a compacted cache and attention")
    if sinks is not None or not (mask is None or isinstance(mask, str)):
        raise ValueError("attention over a compacted cache has neither sinks nor a mask of the model's own")
    return cache.attend(queries, scale)


class _Probe(CompactedKVCache):
    """Notes whether attention came here."""

    n_attended = 0

    def attend(self, queries: Any, scale: float) -> Any:
        self.n_attended += 1
        return super().attend(queries, scale)


def supports(model: Any, spec: ModelSpec, make_cache: Callable[[], list[Any]]) -> str:
    """Why a model cannot go on from compacted blocks; empty if it can, as two short forward passes show.

    make_cache: gives an empty prompt cache of the classes that the spec describes.
    """
    if not spec.dense_layers:
        return "no layer keeps plain keys and values"
    if any(layer.has_sinks for layer in spec.dense_layers):
        return "its attention has learned sinks, which a compacted cache does not apply"
    if any(layer.soft_cap for layer in spec.dense_layers):
        return "its attention caps logits, which a compacted cache does not"
    install(model)
    cache = make_cache()
    probes = put_in_place(spec, cache, [_probe(spec)] * len(spec.dense_layers), n_tokens=2, kind=_Probe)
    try:
        for n in (2, 1):
            mx.eval(model(mx.array([[0] * n]), cache=cache))
    except Exception as error:  # noqa: BLE001 - a model may do whatever it likes with its cache
        return f"its attention does not go through mlx-lm's function alone: {error!r}"
    if any(probe.n_attended < 2 or probe.n_exact != 3 for probe in probes):
        return "its attention does not go through mlx-lm's function"
    return ""


def put_in_place(
    spec: ModelSpec,
    cache: list[Any],
    layers: Sequence[Sequence[Head]],
    n_tokens: int,
    kind: type[CompactedKVCache] = CompactedKVCache,
) -> list[Any]:
    """Puts compacted caches of n_tokens where a fresh prompt cache has those of dense layers; returns them."""
    dense = [i for i, layer in enumerate(spec.layers) if not layer.opaque]
    for i, heads in zip(dense, layers, strict=True):
        cache[i] = kind(heads, n_tokens)
    return [cache[i] for i in dense]


def _probe(spec: ModelSpec) -> list[Head]:
    """Heads of two lengths."""
    layer, dtype = spec.dense_layers[0], getattr(mx, spec.kv_dtype)
    lengths = [1 + i % 2 for i in range(layer.n_kv_heads)]
    return [Head(mx.ones((n, layer.key_dim), dtype), mx.ones((n, layer.value_dim), dtype), mx.ones(n)) for n in lengths]
