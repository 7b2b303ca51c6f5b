"""Blocks to matrices and back: what the transform coder sees, and where sink tokens are kept out of its way.

One row is one token; its features are the KV heads of a group of consecutive dense layers, side by side. Keys lose
their rotary positions. Sink tokens draw attention from everywhere, so that a small error in them is a large one: they
stay as they are. Sinks are the first tokens of a *text*, not the first of each block.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import BFloat16, Float16, Float32, Int32, Shaped

from kvcached.block import KVBlock, ModelSpec
from kvcached.codec import rope

N_SINKS = 4  # absolute positions 0 to 3
_LARGEST = {"float16": 65504.0, "bfloat16": 3.3895313892515355e38, "float32": 3.4028234663852886e38}

Plane = Float32[np.ndarray, "n_rows _features"]
LayerRows = Float32[np.ndarray, "n_kv_heads n_rows dim"]
Turn = Callable[[LayerRows], LayerRows]
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
    turns = _turns(positions, spec, inverse=True)
    return Planes(
        keys=_split(keys[:, :, sinks:], turns, layers_per_group),
        values=_split(values[:, :, sinks:], [_as_it_is] * len(turns), layers_per_group),
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
    sinks = planes.sink_keys.shape[2]
    n_tokens = sinks + max(map(len, planes.keys), default=0)
    if sinks != n_sinks(planes.first_position, n_tokens):
        raise ValueError(f"{n_tokens} tokens from position {planes.first_position} do not have {sinks} sinks")
    turns = _turns(_positions(planes.first_position, n_tokens)[sinks:], spec)
    tensors = {
        "keys": _merge(planes.keys, planes.sink_keys, n_tokens, turns),
        "values": _merge(planes.values, planes.sink_values, n_tokens, [_as_it_is] * len(turns)),
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


def _turns(positions: Int32[np.ndarray, " n_rows"], spec: ModelSpec, *, inverse: bool = False) -> list[Turn]:
    """Rotary positions on or off, for each layer: models mix layers with and without them."""
    kinds, dim = [layer.rope for layer in spec.dense_layers], spec.dense_shapes()["keys"][-1]
    turns = {kind: rope.rotation(positions, kind, dim, inverse=inverse) for kind in dict.fromkeys(kinds)}
    return [turns[kind] for kind in kinds]


def _as_it_is(rows: LayerRows) -> LayerRows:
    return rows


# Both go layer by layer, so that what is computed on lies in the cache of a core, and a block is passed over once.


def _split(tensor: Kept, turns: Sequence[Turn], layers_per_group: int) -> tuple[Plane, ...]:
    n_layers, n_kv_heads, n_rows, dim = tensor.shape
    n_features, width = n_layers * n_kv_heads * dim, layers_per_group * n_kv_heads * dim
    bounds = [(start, min(start + width, n_features)) for start in range(0, n_features, width)]
    # One array under all, which gets large pages: the kernel takes as long to give small ones as all else here takes.
    whole = np.empty(n_rows * n_features, np.float32)
    planes = tuple(whole[n_rows * start : n_rows * stop].reshape(n_rows, stop - start) for start, stop in bounds)
    with np.errstate(over="ignore", invalid="ignore"):  # looked at below
        for layer, turn, out in zip(tensor, turns, _by_layer(planes, n_kv_heads, dim), strict=True):
            out[:] = rows = turn(layer.astype(np.float32))
            if not np.isfinite(rows).all():
                raise ValueError("keys and values that are not finite can only be kept exactly")
    return planes


def _merge(
    planes: Sequence[Plane], sinks: Kept, n_tokens: int, turns: Sequence[Turn]
) -> Shaped[np.ndarray, "n_layers n_kv_heads _ _dim"]:
    n_layers, n_kv_heads, n_sinks, dim = sinks.shape
    layers = list(_by_layer(planes, n_kv_heads, dim))
    if len(layers) != n_layers:
        raise ValueError(f"expected planes of the model's {n_layers} layers, got those of {len(layers)}")
    tensor = np.empty((n_layers, n_kv_heads, n_tokens, dim), sinks.dtype)
    tensor[:, :, :n_sinks] = sinks
    with np.errstate(over="ignore"):  # bounded when rounded
        for layer, turn, out in zip(layers, turns, tensor, strict=True):
            out[:, n_sinks:] = rounded(turn(layer), sinks.dtype)
    return tensor


def rounded(numbers: Float32[np.ndarray, "..."], dtype: np.dtype) -> Shaped[np.ndarray, "..."]:
    """Numbers in a KV dtype; what is beyond its largest becomes that."""
    limit = np.float32(_LARGEST[dtype.name])
    bounded: np.ndarray = np.clip(numbers, -limit, limit).astype(dtype)
    return bounded


def _by_layer(planes: Sequence[Plane], n_kv_heads: int, dim: int) -> Iterator[LayerRows]:
    """Views of the planes; the layers of a group lie side by side. Raises ValueError for planes of other widths."""
    for plane in planes:
        n_rows, n_features = plane.shape
        # NumPy cannot infer the number of layers where there are no rows.
        yield from plane.reshape(n_rows, n_features // (n_kv_heads * dim), n_kv_heads, dim).transpose(1, 2, 0, 3)
