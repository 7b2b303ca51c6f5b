"""A second reader of CODED frames, written from docs/format.md alone: integers in plain Python, all else in float64.

Where kvcached may round in another order the document allows a tolerance; the reader says what it is for each number.
"""

import struct
from functools import cache
from math import isqrt
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from reference.bundle_reader import frequencies, n_features, read_bundle
from reference.frame_reader import (
    ALL_LAYERS,
    CODED,
    DTYPES,
    KEY_PLANE,
    OPAQUE,
    SINK_KEYS,
    SINK_VALUES,
    VALUE_PLANE,
    Corrupt,
    Unsupported,
    read_frame,
)

Fields = dict[str, Any]
N_SINKS = 4  # positions
KINDS_OF = {"keys": (SINK_KEYS, KEY_PLANE), "values": (SINK_VALUES, VALUE_PLANE)}
LIMIT = 1e30


class Plane(NamedTuple):
    """What codes the rows of a plane: of kept components only."""

    steps: np.ndarray
    scales: list[int]
    inverse: np.ndarray
    mean: np.ndarray


class Table(NamedTuple):
    """One of the 64."""

    shift: int
    reach: int
    frequencies: list[int]


def read_coded(frame: bytes, bundle_file: bytes) -> Fields:
    """What read_frame finds, and "symbols", "tensors", "exact", "tolerance": each by name.

    symbols: of each plane, as "keys.0", int32 [n_rows, kept components]. tensors: in their dtypes, opaque ones too.
    exact: keys and values before they are rounded. tolerance: how far from exact another reader's may be.
    """
    found, bundle = read_frame(frame), read_bundle(bundle_file)
    if found["fidelity"] != CODED:
        raise Unsupported("not a CODED frame")
    if found["bundle_id"] != bundle["id"] or found["profile"] not in bundle["profiles"]:
        raise Unsupported("another bundle, or another profile")
    check_block(found, bundle)
    result: Fields = {**found, "symbols": {}, "tensors": {}, "exact": {}, "tolerance": {}}
    for side in KINDS_OF:
        _read_side(side, found, bundle, result)
    return with_opaque(result)


def with_opaque(result: Fields) -> Fields:
    """Adds the opaque tensors to the others."""
    for section in result["sections"]:
        if section["kind"] == OPAQUE:
            if section["name"] in ("keys", "values") or section["name"] in result["tensors"]:
                raise Corrupt("two tensors of one name")
            result["tensors"][section["name"]] = section["array"]
    return result


# ---- the family of tables


@cache
def table(i: int) -> Table:
    shift = max(0, (i - 39) // 3)
    j = i - 3 * shift
    n = (65536, 82570, 104032)[j % 3] * 2 ** (j // 3)
    p = (isqrt((2**54 + 4 * n**2) * 2**64) - 2**59) * 2**28 // (2 * n)
    q = p**2 // 2**60
    w = [p * (2**60 - q) // 2**61]
    while 8192 * (w[-1] * q // 2**60) >= 2**60:
        w.append(w[-1] * q // 2**60)
    rest = max(p - 2 * sum(w), 1)
    return Table(shift, len(w), _shared_out([*reversed(w), 2**60 - p, *w, rest]))


def _shared_out(weights: list[int]) -> list[int]:
    """4096 slots for the weights."""
    a = [weight * 4096 // sum(weights) for weight in weights]
    b = [weight * 4096 % sum(weights) if a[k] else 0 for k, weight in enumerate(weights)]
    f = [max(1, number) for number in a]
    missing = 4096 - sum(f)
    if missing < 0:
        f[weights.index(max(weights))] += missing
    for _ in range(missing):
        k = b.index(max(b))
        f[k] += 1
        b[k] = -1
    return f


@cache
def slots(i: int) -> list[tuple[int, int, int]]:
    """For each of 4096 slots: index, frequency, slot minus start."""
    return [(k, f, offset) for k, f in enumerate(table(i).frequencies) for offset in range(f)]


# ---- bytes to symbols


def read_symbols(payload: bytes, n_rows: int, scales: list[int]) -> np.ndarray:
    """int32 [n_rows, len(scales)]"""
    n = n_rows * len(scales)
    if len(payload) < 5:
        raise Corrupt("no stream")
    width, n_escapes = struct.unpack_from("<BI", payload)
    start = 5 + width * n_escapes
    if width not in (1, 2, 4) or n_escapes > n or start > len(payload):
        raise Corrupt("escapes that do not fit")
    escapes = [int.from_bytes(payload[at : at + width], "little", signed=True) for at in range(5, start, width)]
    if n_escapes == n:
        if start != len(payload):
            raise Corrupt("bytes behind the symbols")
        symbols = escapes
    else:
        symbols = _read_lanes(payload[start:], escapes, n_rows, scales)
    return np.array(symbols, np.int32).reshape(len(scales), n_rows).T


def _read_lanes(coded: bytes, escapes: list[int], n_rows: int, scales: list[int]) -> list[int]:
    n = n_rows * len(scales)
    if len(coded) % 2 or not 128 <= len(coded) <= 128 + 4 * n:
        raise Corrupt("no size of a coded stream")
    state = list(struct.unpack_from("<32I", coded))
    if not all(2**15 <= x < 2**31 for x in state):
        raise Corrupt("states that coding cannot leave")
    words, escaped = iter(struct.unpack(f"<{(len(coded) - 128) // 2}H", coded[128:])), iter(escapes)
    try:
        symbols = [_pop(state, i % 32, scales[i // n_rows], words, escaped) for i in range(n)]
    except StopIteration:
        raise Corrupt("words or escapes end too soon") from None
    if [*words] or [*escaped] or state != [2**15] * 32:
        raise Corrupt("a stream that goes on after its symbols")
    return symbols


def _pop(state: list[int], lane: int, scale: int, words: Any, escaped: Any) -> int:
    shift, reach, _ = table(scale)
    x, low = state[lane], 0
    k, f, offset = slots(scale)[x % 4096]
    x = f * (x // 4096) + offset
    x = 2**16 * x + next(words) if x < 2**15 else x
    if shift:
        low, x = x % 2**shift, x // 2**shift
        x = 2**16 * x + next(words) if x < 2**15 else x
    state[lane] = x
    if k == 2 * reach + 1:
        return int(next(escaped))
    return (k - reach) * 2**shift + low - 2**shift // 2


# ---- symbols to keys and values


def check_block(found: Fields, bundle: Fields) -> None:
    heads = bundle["dense"][0]["n_kv_heads"]
    if (found["n_layers"], found["n_kv_heads"]) != (len(bundle["dense"]), heads):
        raise Corrupt("layers or heads of another model")
    if found["n_source_tokens"] < 1 or found["first_position"] + found["n_source_tokens"] >= 2**31:
        raise Corrupt("no tokens, or positions that no block has")


def sinks_of(found: Fields) -> int:
    """How many tokens of a block are sinks."""
    return min(max(N_SINKS - int(found["first_position"]), 0), int(found["n_source_tokens"]))


def kv_dtype(bundle: Fields) -> Any:
    return {name: numpy_dtype for name, numpy_dtype, _ in DTYPES.values()}[bundle["model"]["kv_dtype"]]


def _read_side(side: str, found: Fields, bundle: Fields, result: Fields) -> None:
    """Adds what one side has to the result."""
    dense, n_tokens, first = bundle["dense"], found["n_source_tokens"], found["first_position"]
    heads, dim = dense[0]["n_kv_heads"], n_features(side, dense[:1]) // dense[0]["n_kv_heads"]
    n_sinks, dtype = sinks_of(found), kv_dtype(bundle)
    sinks = _sinks(found["sections"], KINDS_OF[side][0], (len(dense), heads, n_sinks, dim), dtype)
    planes = [section for section in found["sections"] if section["kind"] == KINDS_OF[side][1]]
    if len(planes) != len(bundle["groups"]):
        raise Corrupt("not one plane for each group")
    rows, magnitudes, relative = [], [], []
    for group, (section, layers) in enumerate(zip(planes, bundle["groups"], strict=True)):
        shape = (n_tokens - n_sinks, n_features(side, layers))
        if (section["layer"], section["shape"]) != (group, shape) or section["dtype"] != np.dtype(dtype).name:
            raise Corrupt("a plane out of order, or of another shape or dtype")
        plane = plane_of(bundle["tensors"], f"{side}.{group}", found["profile"])
        symbols = read_symbols(section["payload"], shape[0], plane.scales)
        result["symbols"][f"{side}.{group}"] = symbols
        of_plane = rows_of(symbols, plane, bundle["profiles"][found["profile"]]["centroid"])
        for numbers, all_of_them in zip(of_plane, (rows, magnitudes), strict=True):
            all_of_them.append(numbers.reshape(shape[0], len(layers), heads, dim).transpose(1, 2, 0, 3))
        relative += [(symbols.shape[1] + 12) * 2.0**-24] * len(layers)
    exact, magnitude = np.concatenate(rows), np.concatenate(magnitudes)
    bound = np.zeros(exact.shape)
    for number, layer in enumerate(dense):
        if side == "keys":
            positions = np.arange(first + n_sinks, first + n_tokens)
            turn(exact[number], magnitude[number], bound[number], positions, layer)
        bound[number] += relative[number] * magnitude[number]
    exact, tensor, units = rounded(exact, dtype)
    result["tensors"][side] = np.concatenate([sinks, tensor], axis=2)
    result["exact"][side] = np.concatenate([sinks.astype(np.float64), exact], axis=2)
    result["tolerance"][side] = np.concatenate([np.zeros(sinks.shape), bound + units], axis=2)


def _sinks(sections: list[Fields], kind: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    found = [section for section in sections if section["kind"] == kind]
    if len(found) != (shape[2] > 0):
        raise Corrupt("sinks that are missing, or too many")
    if not found:
        return np.zeros(shape, dtype)
    section = found[0]
    if (section["layer"], section["shape"]) != (ALL_LAYERS, shape) or section["dtype"] != np.dtype(dtype).name:
        raise Corrupt("sinks of another layer, shape or dtype")
    array: np.ndarray = section["array"]
    return array


def plane_of(tensors: Fields, at: str, profile: str, prefix: str = "") -> Plane:
    steps, scales = (tensors[f"{prefix}{profile}.{at}.{name}"] for name in ("steps", "scales"))
    kept = steps > 0
    inverse, mean = (tensors[f"{prefix}{at}.{name}"].astype(np.float64) for name in ("inverse", "mean"))
    return Plane(steps[kept].astype(np.float64), [int(scale) for scale in scales[kept]], inverse[kept], mean)


def rows_of(
    symbols: np.ndarray, plane: Plane, centroid: float, predicted: Any = 0.0, of_predicted: Any = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Rows, and the M of each of their numbers. predicted: what is added to them; of_predicted: to their M."""
    s = symbols.astype(np.float64)
    coefficients = np.sign(s) * (np.abs(s) - centroid) * plane.steps
    rows = coefficients @ plane.inverse + plane.mean + predicted
    if rows.size and np.abs(rows).max() >= LIMIT:
        raise Corrupt("numbers that no model has")
    return rows, np.abs(coefficients) @ np.abs(plane.inverse) + np.abs(plane.mean) + of_predicted


def turn(rows: np.ndarray, magnitude: np.ndarray, bound: np.ndarray, positions: np.ndarray, layer: Fields) -> None:
    """Gives rows [head, token, dim] their rotary positions, in place; adds to the bound how far off angles may be."""
    interleaved, dims = layer.get("rope", {}).get("interleaved", False), layer.get("rope", {}).get("dims", 0)
    for i, theta in enumerate(frequencies(layer)):
        pair = [2 * i, 2 * i + 1] if interleaved else [i, i + dims // 2]
        angle = positions * theta
        a, b = rows[..., pair[0]], rows[..., pair[1]]
        turned = [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)]
        rows[..., pair] = np.stack(turned, axis=-1)
        magnitude[..., pair] = magnitude[..., pair].sum(axis=-1, keepdims=True)
        bound[..., pair] += 2.0**-50 * angle[:, None] * magnitude[..., pair]


def rounded(exact: np.ndarray, dtype: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What is beyond the KV dtype's largest number as that; the same in the KV dtype; units in the last place."""
    limits = ml_dtypes.finfo(dtype)
    bounded = np.clip(exact, -float(limits.max), float(limits.max))
    exponent = np.floor(np.log2(np.maximum(np.abs(bounded), float(limits.smallest_normal))))
    return bounded, bounded.astype(dtype), 2.0 ** (exponent - limits.nmant)
