"""mlx-lm's caches as named arrays, and back: one pair of functions for each cache class.

A cache entry gives *token* tensors, which have a row for each token ([1, heads, tokens, dim]) and can be cut into
blocks, and *state* tensors, which are what they are after the last token and cannot be cut. Attributes are read, not
`state`: mlx-lm 0.31 and 0.32 differ in what that holds, and agree in the attributes. Classes that are not listed are
refused: a cache that is not understood is never guessed at. Ours are read like mlx-lm's, and made elsewhere.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np

from .compacted import CompactedKVCache

Arrays = dict[str, Any]  # of mx.array


class UnsupportedCacheError(Exception):
    """A cache that cannot be stored. The message says which and why."""


@dataclass(frozen=True, slots=True)
class _Kind:
    """How one class of cache becomes arrays (token and state tensors), and is filled from them again."""

    read: Callable[[Any], tuple[Arrays, Arrays]]
    fill: Callable[[Any, Mapping[str, Any], int], None]


def read(entry: Any) -> tuple[Arrays, Arrays]:
    """Token and state tensors of a cache entry, the former from `first_token` on. Raises UnsupportedCacheError."""
    kind = _kind(entry)
    if entry.empty():
        raise UnsupportedCacheError(f"an empty {type(entry).__name__}")
    return kind.read(entry)


def fill(entry: Any, arrays: Mapping[str, Any], n_tokens: int) -> None:
    """Makes a fresh cache entry hold what `read` gave, n_tokens of it."""
    _kind(entry).fill(entry, arrays, n_tokens)


def first_token(entry: Any) -> int:
    """The first token whose rows a cache entry holds as they were computed."""
    return entry.n_source if isinstance(entry, CompactedKVCache) else 0


def _kind(entry: Any) -> _Kind:
    name = type(entry).__name__
    is_known = isinstance(entry, CompactedKVCache) or type(entry).__module__.startswith("mlx_lm.")
    if not is_known or name not in _KINDS:
        known = ", ".join(name for name in _KINDS if name != CompactedKVCache.__name__)
        raise UnsupportedCacheError(f"cache class {type(entry).__module__}.{name}; known are those of mlx-lm: {known}")
    return _KINDS[name]


def to_numpy(array: Any) -> np.ndarray:
    """A copy of an evaluated mlx array, bfloat16 as ml_dtypes has it."""
    if array.dtype == mx.bfloat16:
        return np.array(array.view(mx.uint16)).view(ml_dtypes.bfloat16)
    return np.array(array)


def views(arrays: Arrays) -> dict[str, np.ndarray]:
    """What some arrays hold now, as numpy's, read-only and without a copy; for any thread to read.

    Each is of an array of its own, which nobody writes to: whoever writes to the ones given gets other memory.
    """
    own = {name: array.view(mx.uint16) if array.dtype == mx.bfloat16 else array[...] for name, array in arrays.items()}
    mx.eval(list(own.values()))
    found = {}
    for name, array in own.items():
        found[name] = np.asarray(array)
        found[name].flags.writeable = False
        if arrays[name].dtype == mx.bfloat16:
            found[name] = found[name].view(ml_dtypes.bfloat16)
    return found


def to_mlx(array: np.ndarray) -> Any:
    """Inverse of `to_numpy`."""
    if array.dtype == ml_dtypes.bfloat16:
        return mx.array(array.view(np.uint16)).view(mx.bfloat16)
    return mx.array(array)


# ---- KVCache: keys and values, in buffers longer than what they hold


def _read_kv(cache: Any) -> tuple[Arrays, Arrays]:
    return {name: getattr(cache, name)[..., : cache.offset, :] for name in ("keys", "values")}, {}


def _fill_kv(cache: Any, arrays: Mapping[str, Any], n_tokens: int) -> None:
    cache.keys, cache.values, cache.offset = arrays["keys"], arrays["values"], n_tokens


# ---- CompactedKVCache: only the tokens behind what was compacted


def _read_compacted(cache: CompactedKVCache) -> tuple[Arrays, Arrays]:
    return cache.exact_tokens(), {}


def _fill_compacted(_cache: CompactedKVCache, _arrays: Mapping[str, Any], _n_tokens: int) -> None:
    raise UnsupportedCacheError("a fresh cache is not compacted")


# ---- QuantizedKVCache: each of keys and values is (codes, scales, biases)

_QUANTIZED_PARTS = ("codes", "scales", "biases")


FULL_PRECISION = "full precision"
_QUANTIZED = "mlx-q"


def quantized_dtype(bits: int, group_size: int) -> str:
    """The kv_dtype of a model whose cache is quantised like this."""
    return f"{_QUANTIZED}{bits}-g{group_size}"


def expected_precision(kv_dtype: str) -> str:
    """What `precision` says of the caches of a model with this kv_dtype."""
    return kv_dtype if kv_dtype.startswith(_QUANTIZED) else FULL_PRECISION


def precision(entry: Any) -> str | None:
    """How exactly a cache entry keeps what it was given; None for a class that mlx-lm never quantises."""
    if type(entry).__name__ == "QuantizedKVCache":
        return quantized_dtype(entry.bits, entry.group_size)
    return FULL_PRECISION if type(entry).__name__ in ("KVCache", "CompactedKVCache") else None


def _read_quantized(cache: Any) -> tuple[Arrays, Arrays]:
    tokens = {
        f"{name}.{part}": array[..., : cache.offset, :]
        for name in ("keys", "values")
        for part, array in zip(_QUANTIZED_PARTS, getattr(cache, name), strict=True)
    }
    return tokens, {}


def _fill_quantized(cache: Any, arrays: Mapping[str, Any], n_tokens: int) -> None:
    for name in ("keys", "values"):
        setattr(cache, name, tuple(arrays[f"{name}.{part}"] for part in _QUANTIZED_PARTS))
    cache.offset = n_tokens


# ---- RotatingKVCache and ChunkedKVCache: the last tokens, in an order that `numbers` describe


def _windowed(*attributes: str) -> _Kind:
    def read_window(cache: Any) -> tuple[Arrays, Arrays]:
        numbers = mx.array([getattr(cache, name) for name in attributes], mx.int64)
        return {}, {"keys": cache.keys, "values": cache.values, "numbers": numbers}

    def fill_window(cache: Any, arrays: Mapping[str, Any], n_tokens: int) -> None:
        cache.keys, cache.values = arrays["keys"], arrays["values"]
        for name, value in zip(attributes, arrays["numbers"].tolist(), strict=True):
            setattr(cache, name, value)
        if cache.offset != n_tokens:
            raise UnsupportedCacheError(f"a window after {cache.offset} tokens, expected {n_tokens}")

    return _Kind(read_window, fill_window)


# ---- ArraysCache: recurrent states, some of which may be unset


def _read_arrays(cache: Any) -> tuple[Arrays, Arrays]:
    if cache.lengths is not None or cache.left_padding is not None:
        raise UnsupportedCacheError("an ArraysCache in the middle of a batch")
    return {}, {str(i): array for i, array in enumerate(cache.cache) if array is not None}


def _fill_arrays(cache: Any, arrays: Mapping[str, Any], _n_tokens: int) -> None:
    cache.cache = [arrays.get(str(i)) for i in range(len(cache.cache))]


# ---- CacheList: several of the above


def _read_list(cache: Any) -> tuple[Arrays, Arrays]:
    tokens: Arrays = {}
    state: Arrays = {}
    for i, part in enumerate(cache.caches):
        part_tokens, part_state = read(part)
        tokens |= {f"{i}.{name}": array for name, array in part_tokens.items()}
        state |= {f"{i}.{name}": array for name, array in part_state.items()}
    return tokens, state


def _fill_list(cache: Any, arrays: Mapping[str, Any], n_tokens: int) -> None:
    for i, part in enumerate(cache.caches):
        prefix = f"{i}."
        fill(part, {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}, n_tokens)


_KINDS = {
    "KVCache": _Kind(_read_kv, _fill_kv),
    "CompactedKVCache": _Kind(_read_compacted, _fill_compacted),
    "QuantizedKVCache": _Kind(_read_quantized, _fill_quantized),
    "RotatingKVCache": _windowed("offset", "keep", "max_size", "_idx"),
    "ChunkedKVCache": _windowed("offset", "chunk_size", "start_position"),
    "ArraysCache": _Kind(_read_arrays, _fill_arrays),
    "CacheList": _Kind(_read_list, _fill_list),
}
