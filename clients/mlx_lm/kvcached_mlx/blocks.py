"""Prompt caches to blocks and back: cut into blocks of tokens, dense layers together, everything else opaque.

    layers.<i>.<part>         opaque, a row for each token: cut into blocks like dense layers
    state.layers.<i>.<part>   opaque, as it is after the last token: only in a block that ends there

Blocks that come back compacted have packed rows for dense layers; what they give are CompactedKVCaches. Of those, only
what was computed behind them is ever read again.

What does not fit the ModelSpec is refused with a reason, never stored in another shape.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from kvcached_client import ROOT, Block, FidelityKind, ModelSpec
from kvcached_client.tensors import DTYPES

from . import attention, tree
from .compacted import Head
from .tree import UnsupportedCacheError

_TOKEN_AXIS = 2
_PACKED = ("keys", "values", "lengths", "positions", "bias")  # not opaque; the last three in compacted blocks only


@dataclass(frozen=True, slots=True, eq=False)
class Taken:
    """The full blocks of a prompt cache, as it was then: views of its buffers, which any thread may read.

    hashes, lineages: of the full blocks. first: the token that rows begin at, what is before it was compacted.
    rows: [heads, tokens, dim] of each layer from there to the end of the last full block. state: after all tokens.
    """

    spec: ModelSpec
    token_ids: Sequence[int]
    hashes: Sequence[bytes]
    lineages: Sequence[FidelityKind]
    first: int
    rows: Mapping[str, np.ndarray]
    state: Mapping[str, np.ndarray]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in (*self.rows.values(), *self.state.values()))

    @property
    def block_bytes(self) -> int:
        """Of the largest block."""
        n_blocks = max(len(self.indices), 1)
        of_state = sum(array.nbytes for array in self.state.values())
        return max((self.nbytes - of_state) // n_blocks + of_state, 1)

    @property
    def indices(self) -> range:
        """Of the blocks that lie behind what was compacted."""
        return range(-(-self.first // self.spec.block_size), len(self.hashes))

    def has_state(self, index: int) -> bool:
        """Whether a block is the one with the state; what is held of it may lack that."""
        return bool(self.state) and index == len(self.hashes) - 1

    def block(self, index: int) -> Block:
        """One of them, copied."""
        start, stop = (at * self.spec.block_size for at in (index, index + 1))
        rows = {name: array[:, start - self.first : stop - self.first] for name, array in self.rows.items()}
        has_state = self.has_state(index)
        state = {name: np.array(array) for name, array in self.state.items()} if has_state else {}
        return Block(
            block_hash=self.hashes[index],
            parent_hash=self.hashes[index - 1] if index else ROOT,
            index=index,
            token_ids=self.token_ids[start:stop],
            tensors=_join_dense(self.spec, rows) | state,
            first_position=start,
            boundary=has_state,
            lineage=self.lineages[index],
        )


def take(
    spec: ModelSpec,
    token_ids: Sequence[int],
    hashes: Sequence[bytes],
    cache: Sequence[Any],
    lineages: Sequence[FidelityKind] = (),
) -> Taken:
    """The full blocks of a prompt cache that holds exactly `token_ids`, without a copy. For the thread that generates.

    hashes: of the full blocks. The rest after the last full block is left out.
    lineages: of the full blocks; empty: all EXACT.

    Raises:
        UnsupportedCacheError: the cache is not what the spec describes, does not hold these tokens, or has state that
            is not at the end of a block.
    """
    first = max(map(tree.first_token, cache), default=0)
    tokens, state = _named_arrays(spec, cache, first)
    for name, array in tokens.items():
        if (n_held := first + array.shape[_TOKEN_AXIS]) != len(token_ids):
            raise UnsupportedCacheError(f"{name} holds {n_held} tokens, {len(token_ids)} were named")
    if state and len(token_ids) % spec.block_size:
        raise UnsupportedCacheError(
            f"state after {len(token_ids)} tokens is not at the end of a block of {spec.block_size}"
        )
    n_tokens = len(hashes) * spec.block_size
    full = {name: array[:, :, : max(n_tokens - first, 0)] for name, array in tokens.items()}
    rows = {name: array[0] for name, array in tree.views(full).items()}
    of_blocks = list(lineages) or [FidelityKind.EXACT] * len(hashes)
    return Taken(spec, list(token_ids[:n_tokens]), list(hashes), of_blocks, first, rows, tree.views(state))


def to_blocks(
    spec: ModelSpec,
    token_ids: Sequence[int],
    hashes: Sequence[bytes],
    cache: Sequence[Any],
    lineages: Sequence[FidelityKind] = (),
) -> list[Block]:
    """The same as blocks, copies: without those that were compacted before this cache was made of them."""
    taken = take(spec, token_ids, hashes, cache, lineages)
    return [taken.block(index) for index in taken.indices]


def own(block: Block, *, for_mlx: bool) -> Block:
    """A block that came from the daemon, out of the memory that it came in, which is wanted back for the next one.

    for_mlx: its tensors are mlx arrays then, with which `from_blocks` makes a copy less, unless a block is compacted.

    Raises:
        UnsupportedCacheError: mlx has no such arrays.
    """
    take = tree.to_mlx if for_mlx and "lengths" not in block.tensors else np.array
    try:
        return replace(block, tensors={name: take(array) for name, array in block.tensors.items()})
    except (TypeError, ValueError, RuntimeError) as error:
        raise UnsupportedCacheError(f"a tensor of the block is none of mlx's: {error}") from None


def from_blocks(spec: ModelSpec, blocks: Sequence[Block], cache: list[Any]) -> None:
    """Fills a fresh prompt cache with consecutive blocks from the first one on. Inverse of `to_blocks`.

    Where one of them is compacted, CompactedKVCaches take the place of the caches of dense layers.

    Raises:
        UnsupportedCacheError: the blocks do not make a cache of this model.
    """
    n_tokens = len(blocks) * spec.block_size
    compacted = any("lengths" in block.tensors for block in blocks)
    try:
        per_block = [_opaque(block.tensors) if compacted else _split_dense(spec, block.tensors) for block in blocks]
        arrays: dict[str, Any] = {
            name: _joined([tensors[name] for tensors in per_block], axis=_TOKEN_AXIS - 1)[None]
            for name in per_block[-1]
            if not name.startswith("state.")
        }
        arrays |= {
            name.removeprefix("state."): tree.to_mlx(array) if isinstance(array, np.ndarray) else array
            for name, array in per_block[-1].items()
            if name.startswith("state.")
        }
        for i, (entry, layer) in enumerate(zip(cache, spec.layers, strict=True)):
            if compacted and not layer.opaque:
                continue
            prefix = f"layers.{i}."
            parts = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
            _check_precision(spec, i, entry)
            tree.fill(entry, parts, n_tokens)
        if compacted:
            made = attention.put_in_place(spec, cache, _ragged_layers(spec, blocks), n_tokens)
            mx.eval([entry.state for entry in made])
    except (KeyError, ValueError, IndexError) as error:
        raise UnsupportedCacheError(f"the blocks do not make a cache of this model: {error!r}") from None
    mx.eval(list(arrays.values()))


def _joined(parts: Sequence[Any], axis: int) -> Any:
    """One mlx array of NumPy's, or of mlx's own."""
    if all(isinstance(part, np.ndarray) for part in parts):
        return tree.to_mlx(np.concatenate(parts, axis))
    return mx.concatenate(list(parts), axis)


def dense_rows(spec: ModelSpec, cache: Sequence[Any], start: int, stop: int) -> dict[str, np.ndarray]:
    """ "keys" and "values" of some tokens of a prompt cache, [n_dense_layers, n_kv_heads, stop - start, dim].

    Raises:
        UnsupportedCacheError: the cache is not what the spec describes, or was compacted there.
    """
    rows: tree.Arrays = {}
    for i, layer in enumerate(spec.layers):
        if not layer.opaque:
            tokens, _ = tree.read(cache[i])
            _check_dense(spec, i, tokens)
            if start < (first := tree.first_token(cache[i])):
                raise UnsupportedCacheError(
                    f"tokens from {start} on were asked for, those before {first} are compacted"
                )
            rows |= {f"layers.{i}.{name}": array[:, :, start - first : stop - first] for name, array in tokens.items()}
    mx.eval(list(rows.values()))
    return _join_dense(spec, {name: tree.to_numpy(array)[0] for name, array in rows.items()})


def _named_arrays(spec: ModelSpec, cache: Sequence[Any], first: int) -> tuple[tree.Arrays, tree.Arrays]:
    """Token and state tensors of all layers by their names on the wire, checked against the spec.

    first: the token that the former begin at.
    """
    if len(cache) != len(spec.layers):
        raise UnsupportedCacheError(f"a cache of {len(cache)} layers, the model has {len(spec.layers)}")
    tokens: tree.Arrays = {}
    state: tree.Arrays = {}
    for i, (entry, layer) in enumerate(zip(cache, spec.layers, strict=True)):
        entry_tokens, entry_state = tree.read(entry)
        _check_precision(spec, i, entry)
        if not layer.opaque:
            _check_dense(spec, i, entry_tokens)
        skipped = first - tree.first_token(entry)
        tokens |= {f"layers.{i}.{name}": array[:, :, skipped:] for name, array in entry_tokens.items()}
        state |= {f"state.layers.{i}.{name}": array for name, array in entry_state.items()}
    batches = {array.shape[0] for array in tokens.values()}
    if batches - {1}:
        raise UnsupportedCacheError(f"a cache of one sequence is expected, got batches of {sorted(batches)}")
    return tokens, state


def _check_precision(spec: ModelSpec, index: int, entry: Any) -> None:
    """A cache in another precision is that of another model, even where its arrays have the same names and shapes."""
    expected, got = tree.expected_precision(spec.kv_dtype), tree.precision(entry)
    if got not in (None, expected):
        raise UnsupportedCacheError(f"layer {index} is kept in {got}, the cache of the model in {expected}")


def _check_dense(spec: ModelSpec, index: int, tokens: Mapping[str, Any]) -> None:
    layer = spec.layers[index]
    expected = {name: (layer.n_kv_heads, dim) for name, dim in (("keys", layer.key_dim), ("values", layer.value_dim))}
    got = {name: (array.shape[1], array.shape[-1]) for name, array in tokens.items()}
    dtypes = {str(array.dtype).removeprefix("mlx.core.") for array in tokens.values()}
    if got != expected or dtypes != {spec.kv_dtype}:
        raise UnsupportedCacheError(f"layer {index} has {got} in {dtypes}, the model {expected} in {spec.kv_dtype}")


def _join_dense(spec: ModelSpec, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """[heads, tokens, dim] of each dense layer -> "keys" and "values" of all; the others as they are. Copies."""
    dense = [i for i, layer in enumerate(spec.layers) if not layer.opaque]
    joined = {name: np.stack([tensors[f"layers.{i}.{name}"] for i in dense]) for name in ("keys", "values") if dense}
    taken = {f"layers.{i}.{name}" for i in dense for name in joined}
    return joined | {name: np.array(array, order="C") for name, array in tensors.items() if name not in taken}


def _split_dense(spec: ModelSpec, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Inverse of `_join_dense`."""
    dense = [i for i, layer in enumerate(spec.layers) if not layer.opaque]
    split = {f"layers.{i}.{name}": tensors[name][at] for at, i in enumerate(dense) for name in ("keys", "values")}
    return split | _opaque(tensors)


def _opaque(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: array for name, array in tensors.items() if name not in _PACKED}


def _ragged_layers(spec: ModelSpec, blocks: Sequence[Block]) -> list[list[Head]]:
    """The heads of each dense layer, with their rows of all blocks one after another. Raises ValueError."""
    by_block = [_heads(spec, block.tensors) for block in blocks]
    heads = [
        Head(*(tree.to_mlx(np.concatenate(arrays)) for arrays in zip(*parts, strict=True)))
        for parts in zip(*by_block, strict=True)
    ]
    n_heads = spec.dense_layers[0].n_kv_heads
    return [heads[i : i + n_heads] for i in range(0, len(heads), n_heads)]


def _heads(spec: ModelSpec, tensors: Mapping[str, np.ndarray]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Keys, values and bias of each layer and head of a block, views. Raises ValueError for those of another model."""
    (*heads, n_tokens, key_dim), value_dim = spec.dense_shapes()["keys"], spec.dense_shapes()["values"][-1]
    lengths = tensors.get("lengths", np.full(heads, n_tokens, np.int32))
    keys, values = tensors["keys"].reshape(-1, key_dim), tensors["values"].reshape(-1, value_dim)
    bias = tensors.get("bias", np.zeros(len(keys), np.float32))
    if lengths.shape != tuple(heads) or lengths.min() < 0 or lengths.max() > n_tokens:
        raise ValueError(f"lengths are {heads} numbers from 0 to {n_tokens}, got {lengths.shape}")
    if {len(keys), len(values), len(bias)} != {lengths.sum()} or bias.ndim != 1:
        raise ValueError(f"{lengths.sum()} rows are expected, got {len(keys)}, {len(values)} and {len(bias)}")
    if keys.dtype != DTYPES[spec.kv_dtype] or values.dtype != keys.dtype or not np.isfinite(bias).all():
        raise ValueError(f"rows in {spec.kv_dtype} with a finite bias are expected, got {keys.dtype}, {values.dtype}")
    ends = lengths.ravel().cumsum()[:-1]
    return list(zip(np.split(keys, ends), np.split(values, ends), np.split(bias, ends), strict=True))
