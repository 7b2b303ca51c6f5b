"""Blocks to matrices and back: what the transform coder sees, and where sink tokens are kept out of its way.

One row is one token; its features are the KV heads of a group of consecutive dense layers, side by side. Keys lose
their rotary positions. Sink tokens draw attention from everywhere, so that a small error in them is a large one: they
stay as they are. Sinks are the first tokens of a *text*, not the first of each block.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import BFloat16, Float16, Float32, Int32, Shaped

from kvcached.block import Allocate, KVBlock, ModelSpec, fresh
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
    """The dense block of planes. Raises what `Merging` does."""
    sinks = {"keys": planes.sink_keys, "values": planes.sink_values}
    n_tokens = planes.sink_keys.shape[2] + max(map(len, planes.keys), default=0)
    merging = Merging(sinks, planes.first_position, n_tokens, spec)
    for side, of_side in (("keys", planes.keys), ("values", planes.values)):
        for plane in of_side:
            merging.add(side, plane)
    return merging.block(opaque)


class Merging:
    """A dense block that is made as its planes come, in order on each side, so that one at a time is in memory.

    Numbers are rounded to the KV dtype; what coding pushed beyond its largest number becomes that. The layers of a
    group are not told: the features of all groups together are those of all layers.

    Raises:
        ValueError: sinks or planes are not of this model.
        UnsupportedRopeError: the rotary positions of a layer cannot be applied.
    """

    def __init__(
        self,
        sinks: Mapping[str, Kept],
        first_position: int,
        n_tokens: int,
        spec: ModelSpec,
        allocate: Allocate = fresh,
    ) -> None:
        _check(sinks["keys"], sinks["values"], spec)
        self._first_position, self._n_tokens, self._n_sinks = first_position, n_tokens, sinks["keys"].shape[2]
        if self._n_sinks != n_sinks(first_position, n_tokens):
            raise ValueError(f"{n_tokens} tokens from position {first_position} do not have {self._n_sinks} sinks")
        turns = _turns(_positions(first_position, n_tokens)[self._n_sinks :], spec)
        self._turns: dict[str, list[Turn]] = {"keys": turns, "values": [_as_it_is] * len(turns)}
        self._tensors: dict[str, Shaped[np.ndarray, ...]] = {}
        self._n_layers = dict.fromkeys(sinks, 0)  # merged
        for side, kept in sinks.items():
            n_layers, n_kv_heads, _, dim = kept.shape
            self._tensors[side] = allocate(side, (n_layers, n_kv_heads, n_tokens, dim), kept.dtype)
            self._tensors[side][:, :, : self._n_sinks] = kept

    def add(self, side: str, plane: Plane) -> None:
        """The next plane of "keys" or "values"."""
        tensor, turns = self._tensors[side], self._turns[side]
        n_layers, n_kv_heads, _, dim = tensor.shape
        if len(plane) != self._n_tokens - self._n_sinks:
            raise ValueError(f"expected planes of {self._n_tokens - self._n_sinks} rows, got {len(plane)}")
        with np.errstate(over="ignore"):  # bounded when rounded
            for layer in _by_layer([plane], n_kv_heads, dim):
                at = self._n_layers[side]
                if at == n_layers:
                    raise ValueError(f"expected planes of the model's {n_layers} layers, got more")
                _round_into(tensor[at, :, self._n_sinks :], turns[at](layer))
                self._n_layers[side] += 1

    def block(self, opaque: Mapping[str, Shaped[np.ndarray, "..."]]) -> KVBlock:
        """The block, when all planes were added."""
        n_layers = {side: len(tensor) for side, tensor in self._tensors.items()}
        if self._n_layers != n_layers:
            raise ValueError(f"expected planes of the model's {n_layers} layers, got those of {self._n_layers}")
        return KVBlock.dense({**self._tensors, **opaque}, self._n_tokens, self._first_position)


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


def rounded(numbers: Float32[np.ndarray, "..."], dtype: np.dtype) -> Shaped[np.ndarray, "..."]:
    """Numbers in a KV dtype; what is beyond its largest becomes that."""
    result = np.empty(numbers.shape, dtype)
    _round_into(result, numbers)
    return result


def _round_into(out: Shaped[np.ndarray, "..."], numbers: Float32[np.ndarray, "..."]) -> None:
    limit = np.float32(_LARGEST[out.dtype.name])
    out[...] = np.clip(numbers, -limit, limit)


def _by_layer(planes: Sequence[Plane], n_kv_heads: int, dim: int) -> Iterator[LayerRows]:
    """Views of the planes; the layers of a group lie side by side. Raises ValueError for planes of other widths."""
    for plane in planes:
        n_rows, n_features = plane.shape
        # NumPy cannot infer the number of layers where there are no rows.
        yield from plane.reshape(n_rows, n_features // (n_kv_heads * dim), n_kv_heads, dim).transpose(1, 2, 0, 3)
