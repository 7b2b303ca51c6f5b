"""Blocks to matrices and back: what the transform coder sees, and where sink tokens are kept out of its way.

One row is one token; its features are the KV heads of a group of consecutive dense layers, side by side. Keys lose
their rotary positions. Sink tokens draw attention from everywhere, so that a small error in them is a large one: they
stay as they are. Sinks are the first tokens of a *text*, not the first of each block.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import BFloat16, Float16, Float32, Int32, Shaped

from kvcached.block import KVBlock, LayerSpec, ModelSpec
from kvcached.codec import rope
from kvcached_client.tensors import DTYPES

N_SINKS = 4  # absolute positions 0 to 3
_LARGEST = {"float16": 65504.0, "bfloat16": 3.3895313892515355e38, "float32": 3.4028234663852886e38}

Plane = Float32[np.ndarray, "n_rows _features"]
Rows = Float32[np.ndarray, "n_layers n_kv_heads n_rows dim"]
Kept = (
    Float16[np.ndarray, "n_layers n_kv_heads n_tokens _dim"]
    | BFloat16[np.ndarray, "n_layers n_kv_heads n_tokens _dim"]
    | Float32[np.ndarray, "n_layers n_kv_heads n_tokens _dim"]
)


@dataclass(frozen=True, slots=True, eq=False)
class Planes:
    """A dense block as matrices, one of keys and one of values for each group of layers; the last may be narrower.

    Rows are the tokens after the sinks, in order; features are ordered by layer, KV head, dim. Sinks are in the KV
    dtype, keys rotated, as the engine holds them. What is not rows of tokens (`opaque`) is not here.
    """

    keys: tuple[Plane, ...]
    values: tuple[Plane, ...]
    sink_keys: Kept
    sink_values: Kept
    first_position: int


def split(block: KVBlock, spec: ModelSpec, layers_per_group: int) -> Planes:
    """The planes of a dense block, exact but for float32 rounding in the rotation of keys. Inverse: `merge`.

    Raises:
        ValueError: the block is compacted, not of this model, or holds numbers that are not finite.
        UnsupportedRopeError: the rotary positions of a layer cannot be removed.
    """
    if not block.is_dense or not block.lengths.size:
        raise ValueError("a block has planes if it is dense and has dense layers, this one is compacted or opaque")
    if layers_per_group < 1:
        raise ValueError(f"layers_per_group must be at least 1, got {layers_per_group}")
    tensors = block.to_tensors()
    keys, values = tensors["keys"], tensors["values"]
    _check(keys, values, spec)
    sinks = n_sinks(block.first_position, block.n_source_tokens)
    positions = _positions(block.first_position, block.n_source_tokens)[sinks:]
    with np.errstate(over="ignore", invalid="ignore"):  # looked at below
        key_rows = _turn(rope.remove, keys[:, :, sinks:].astype(np.float32), positions, spec.dense_layers)
        value_rows = values[:, :, sinks:].astype(np.float32)
    if not (np.isfinite(key_rows).all() and np.isfinite(value_rows).all()):
        raise ValueError("keys and values that are not finite can only be kept exactly")
    return Planes(
        keys=_planes(key_rows, layers_per_group),
        values=_planes(value_rows, layers_per_group),
        sink_keys=keys[:, :, :sinks],
        sink_values=values[:, :, :sinks],
        first_position=block.first_position,
    )


def merge(planes: Planes, spec: ModelSpec, opaque: Mapping[str, Shaped[np.ndarray, "..."]]) -> KVBlock:
    """The dense block of planes, rounded to the KV dtype; what coding pushed beyond its largest number becomes that.

    The layers of a group are not told: the features of all groups together are those of all layers.

    Raises:
        ValueError: the planes are not of this model.
        UnsupportedRopeError: the rotary positions of a layer cannot be applied.
    """
    _check(planes.sink_keys, planes.sink_values, spec)
    key_rows, value_rows = _rows(planes.keys, planes.sink_keys), _rows(planes.values, planes.sink_values)
    sinks = planes.sink_keys.shape[2]
    n_tokens = sinks + key_rows.shape[2]
    if sinks != n_sinks(planes.first_position, n_tokens):
        raise ValueError(f"{n_tokens} tokens from position {planes.first_position} do not have {sinks} sinks")
    positions = _positions(planes.first_position, n_tokens)[sinks:]
    with np.errstate(over="ignore"):  # bounded when rounded
        key_rows = _turn(rope.apply, key_rows, positions, spec.dense_layers)
    tensors = {
        "keys": np.concatenate([planes.sink_keys, _rounded(key_rows, spec.kv_dtype)], axis=2),
        "values": np.concatenate([planes.sink_values, _rounded(value_rows, spec.kv_dtype)], axis=2),
    }
    return KVBlock.dense({**tensors, **opaque}, n_tokens, planes.first_position)


def n_sinks(first_position: int, n_tokens: int) -> int:
    """How many tokens of a block are sinks: its first ones, if any."""
    return min(max(N_SINKS - first_position, 0), n_tokens)


def _check(keys: Kept, values: Kept, spec: ModelSpec) -> None:
    """Raises ValueError unless layers, heads, dims and dtype are the model's; tokens may be any number."""
    expected = [(*shape[:2], shape[3], spec.kv_dtype) for shape in spec.dense_shapes().values()]
    found = [(*array.shape[:2], array.shape[3], array.dtype.name) for array in (keys, values)]
    if found != expected:
        raise ValueError(f"expected the model's layers, KV heads, dim and dtype {expected}, got {found}")


def _positions(first: int, n_tokens: int) -> Int32[np.ndarray, " n_tokens"]:
    return np.arange(first, first + n_tokens, dtype=np.int32)


def _turn(
    turn: Callable[..., Rows], rows: Rows, positions: Int32[np.ndarray, " n_rows"], layers: Sequence[LayerSpec]
) -> Rows:
    """Rotary positions on or off, for all layers of a kind at once: models mix layers with and without them."""
    turned = np.empty_like(rows)
    for kind in dict.fromkeys(layer.rope for layer in layers):
        of_kind = [layer.rope == kind for layer in layers]
        turned[of_kind] = turn(rows[of_kind], positions, kind)
    return turned


def _planes(rows: Rows, layers_per_group: int) -> tuple[Plane, ...]:
    n_layers, n_kv_heads, n_rows, dim = rows.shape
    groups = (rows[start : start + layers_per_group] for start in range(0, n_layers, layers_per_group))
    # NumPy cannot infer the number of features where there are no rows.
    return tuple(group.transpose(2, 0, 1, 3).reshape(n_rows, len(group) * n_kv_heads * dim) for group in groups)


def _rows(planes: tuple[Plane, ...], sinks: Kept) -> Rows:
    n_layers, n_kv_heads, _, dim = sinks.shape
    features = np.concatenate(planes, axis=1)
    return features.reshape(len(features), n_layers, n_kv_heads, dim).transpose(1, 2, 0, 3)


def _rounded(rows: Rows, kv_dtype: str) -> Kept:
    limit = np.float32(_LARGEST[kv_dtype])
    rounded: Kept = np.clip(rows, -limit, limit).astype(DTYPES[kv_dtype])
    return rounded
