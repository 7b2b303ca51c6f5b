"""A layer's cache whose prefix has lost tokens: heads of unequal length, a bias for each row, exact tokens behind.

Rows count physically, positions logically: `offset` is all source tokens, the lost ones too, for rotary positions. The
bias cannot go through mlx-lm's mask, which all layers share, so the cache computes attention itself, which
`attention.install` sends here.

Heads of like length are a group, left-padded to its longest, that one fused call serves:

    keys, values  [n_heads, 1, capacity, dim]   padding, prefix, exact tokens, room
    bias          [n_heads, 1, 1, capacity]     -inf, of the prefix, 0

Heads are the batch of that call, so that a bias is held once for all query heads that read a KV head.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import mlx.core as mx
from mlx_lm.models.cache import _BaseCache

# Of the rows of a layer's prefix, how many may be padding. A limit on the whole, not on how unlike the heads of a group
# are: it says how much memory is given away (of 4x, 3.76x are left), whatever the budgets, and all that it allows goes
# into fewer groups, so fewer calls.
_MAX_PADDING = 1 / 16
_STEP = 256  # tokens by which buffers grow, as KVCache's do
_MASK_VALUES = 1 << 24  # of one call at most: 32 MiB in half precision
_ALONE = "a batch is made of plain caches, got one with a compacted prefix: its sequence is to be served alone"


class Head(NamedTuple):
    """The prefix of one KV head, mlx arrays: keys [n, key_dim], values [n, value_dim], bias [n]."""

    keys: Any
    values: Any
    bias: Any


class _Kept:
    """What a model gets for keys and values, to hand on to attention: whatever else it does with it fails."""

    def __repr__(self) -> str:
        return "<kept in a CompactedKVCache>"


KEPT = _Kept()


class CompactedKVCache(_BaseCache):  # type: ignore[misc] # mlx_lm is untyped
    """The cache of one layer and one sequence.

    heads: what is left of the first `n_tokens` tokens, for each KV head, of one dtype.
    """

    def __init__(self, heads: Sequence[Head], n_tokens: int) -> None:
        lengths = [head.keys.shape[0] for head in heads]
        members = _grouped(lengths)
        self.n_source, self.offset = n_tokens, n_tokens
        self._n_heads = len(heads)
        self._groups = [_group([heads[i] for i in group]) for group in members]
        self._members = [mx.array(group) for group in members]
        order = [head for group in members for head in group]  # that of the heads themselves where there is one group
        self._places = mx.array(sorted(range(len(order)), key=order.__getitem__))  # of each head among the groups'

    # ---- mlx-lm's protocol

    def update_and_fetch(self, keys: Any, values: Any) -> tuple[Any, Any]:
        """Takes the keys and values of new tokens, [1, n_kv_heads, n, dim]; what it returns is for `attend` only."""
        if keys.shape[:2] != (1, self._n_heads):
            raise ValueError(f"one sequence of {self._n_heads} heads is expected, got {tuple(keys.shape)}")
        by_head = (self._split(array.swapaxes(0, 1)) for array in (keys, values))
        for group, some_keys, some_values in zip(self._groups, *by_head, strict=True):
            group.append(some_keys, some_values, self.n_exact)
        self.offset += keys.shape[2]
        return KEPT, KEPT

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> str | None:  # noqa: N803
        """Causal, whatever it covers: `attend` adds what it means here. Raises ValueError if more is asked for."""
        if return_array or window_size is not None:
            raise ValueError("a compacted cache has no mask that a model could change, and no window")
        return None if N == 1 else "causal"

    def is_trimmable(self) -> bool:
        """Never: who asks does not say by how much, and cuts however little came off. See `cut`."""
        return False

    def trim(self, n: int) -> int:
        """Cuts the last n tokens, or nothing if they are not all exact ones; how many were cut."""
        if not 0 <= n <= self.n_exact:
            return 0
        self.offset -= n
        return n

    @classmethod
    def merge(cls, _caches: Sequence[Any]) -> NoReturn:
        raise ValueError(_ALONE)

    @property
    def keys(self) -> NoReturn:
        """Asked for by plain caches that would take this one into their batch."""
        raise AttributeError(_ALONE)

    def size(self) -> int:
        return self.offset

    def empty(self) -> bool:
        return self.offset == 0

    @property
    def nbytes(self) -> int:
        """Of all buffers as they are held, with padding and room."""
        return sum(array.nbytes for array in self.state)

    @property
    def state(self) -> list[Any]:
        return [array for group in self._groups for array in (group.keys, group.values, group.bias)]

    @state.setter
    def state(self, _value: Any) -> NoReturn:
        raise ValueError("a compacted cache is made of blocks only")

    # ---- beyond it

    @property
    def n_exact(self) -> int:
        """Tokens behind the prefix."""
        return self.offset - self.n_source

    @property
    def n_groups(self) -> int:
        return len(self._groups)

    def exact_tokens(self) -> dict[str, Any]:
        """ "keys" and "values" of the tokens behind the prefix, [1, n_kv_heads, n_exact, dim]."""

        def of(name: str) -> Any:
            starts = [(getattr(group, name), group.n_prefix) for group in self._groups]
            return self._join([array[..., start : start + self.n_exact, :] for array, start in starts]).swapaxes(0, 1)

        return {name: of(name) for name in ("keys", "values")}

    def attend(self, queries: Any, scale: float) -> Any:
        """Attention of the last tokens that were taken, [1, n_query_heads, n, value_dim] for queries of this shape."""
        n_query_heads, n = queries.shape[1:3]
        by_head = queries.reshape(self._n_heads, n_query_heads // self._n_heads, n, queries.shape[3])
        parts = zip(self._groups, self._split(by_head), strict=True)
        outputs = [group.attend(part, scale, self.n_exact) for group, part in parts]
        return self._join(outputs).reshape(1, n_query_heads, n, -1)

    def _split(self, by_head: Any) -> list[Any]:
        """An array by its first axis, the KV heads, into those of the groups."""
        return [by_head] if self.n_groups == 1 else [by_head[members] for members in self._members]

    def _join(self, by_group: list[Any]) -> Any:
        """Inverse of `_split`."""
        return by_group[0] if self.n_groups == 1 else mx.concatenate(by_group)[self._places]


def cut(cache: Sequence[Any], n: int) -> bool:
    """Cuts the last n tokens off all layers of a prompt cache; False if one cannot lose them: then nothing is cut."""
    able = (entry.n_exact >= n if isinstance(entry, CompactedKVCache) else entry.is_trimmable() for entry in cache)
    if n and not all(able):
        return False
    for entry in cache if n else ():
        entry.trim(n)
    return True


@dataclass(slots=True, eq=False)
class _Group:
    """Buffers of some heads, as the module's first lines draw them. n_prefix: with padding."""

    keys: Any
    values: Any
    bias: Any
    n_prefix: int

    def append(self, keys: Any, values: Any, n_exact: int) -> None:
        """Takes new tokens [n_heads, 1, n, dim], behind `n_exact` that are there."""
        start = self.n_prefix + n_exact
        stop = start + keys.shape[2]
        if stop > self.keys.shape[2]:
            self._grow(start, -(-keys.shape[2] // _STEP) * _STEP)
        self.keys[..., start:stop, :] = keys
        self.values[..., start:stop, :] = values

    def _grow(self, n_used: int, n_more: int) -> None:
        def longer(array: Any) -> Any:
            room = mx.zeros((*array.shape[:2], n_more, array.shape[3]), array.dtype)
            return mx.concatenate([array[..., :n_used, :], room], axis=2)

        self.keys, self.values = longer(self.keys), longer(self.values)
        room = mx.zeros((*self.bias.shape[:3], n_more), self.bias.dtype)
        self.bias = mx.concatenate([self.bias[..., :n_used], room], axis=3)

    def attend(self, queries: Any, scale: float, n_exact: int) -> Any:
        """Of the last n of `n_exact` tokens: queries [n_heads, n_query_heads of each, n, key_dim]."""
        n, n_rows = queries.shape[2], self.n_prefix + n_exact
        if n == 1:
            return self._attend(queries, scale, n_rows, self.bias[..., :n_rows])
        at_once = max(_MASK_VALUES // (len(self.keys) * n_rows) // 64 * 64, 64)
        outputs = []
        for start in range(0, n, at_once):
            some = queries[:, :, start : start + at_once]
            n_seen = n_rows - n + start + some.shape[2]
            rows = mx.arange(n_seen - some.shape[2], n_seen)[:, None]
            bias = mx.where(mx.arange(n_seen) <= rows, self.bias[..., :n_seen], mx.array(-mx.inf, self.bias.dtype))
            outputs.append(self._attend(some, scale, n_seen, bias))
        return mx.concatenate(outputs, axis=2) if len(outputs) > 1 else outputs[0]

    def _attend(self, queries: Any, scale: float, n_rows: int, bias: Any) -> Any:
        keys, values = self.keys[..., :n_rows, :], self.values[..., :n_rows, :]
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=bias.astype(queries.dtype))


def _group(heads: Sequence[Head]) -> _Group:
    longest = max(head.keys.shape[0] for head in heads)

    def stacked(arrays: Sequence[Any], filler: float) -> Any:
        """Left-padded, [n_heads, 1, longest, ...]."""
        ends = [[(longest - array.shape[0], 0)] + [(0, 0)] * (array.ndim - 1) for array in arrays]
        padded = [mx.pad(array, end, constant_values=filler) for array, end in zip(arrays, ends, strict=True)]
        return mx.stack(padded)[:, None]

    keys = stacked([head.keys for head in heads], 0)
    bias = stacked([head.bias.astype(keys.dtype) for head in heads], -mx.inf)
    return _Group(keys, stacked([head.values for head in heads], 0), bias[:, None], longest)


def _grouped(lengths: Sequence[int]) -> list[list[int]]:
    """Heads in groups, by their lengths: the fewest that cheapest-first merging finds within _MAX_PADDING."""
    groups = [[head] for head in sorted(range(len(lengths)), key=lengths.__getitem__)]
    room = _MAX_PADDING * sum(lengths)
    while len(groups) > 1:
        costs = [len(low) * (lengths[high[-1]] - lengths[low[-1]]) for low, high in itertools.pairwise(groups)]
        at = costs.index(min(costs))
        if costs[at] > room:
            break
        room -= costs[at]
        groups[at : at + 2] = [groups[at] + groups[at + 1]]
    return [sorted(group) for group in groups]
