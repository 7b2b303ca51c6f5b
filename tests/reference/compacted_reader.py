"""A second reader of COMPACTED frames, written from docs/format.md alone: one head after another.

What they share with CODED ones, symbols and from there to rows, is coded_reader's.
"""

from typing import Any

import numpy as np
from reference.bundle_reader import ANCHORS, read_bundle
from reference.coded_reader import (
    Plane,
    check_block,
    kv_dtype,
    plane_of,
    read_symbols,
    rounded,
    rows_of,
    sinks_of,
    turn,
    with_opaque,
)
from reference.frame_reader import (
    ALL_LAYERS,
    BIAS,
    COMPACTED,
    KEPT,
    KEY_ROWS,
    OPAQUE,
    SINK_KEYS,
    SINK_VALUES,
    VALUE_ROWS,
    Corrupt,
    Unsupported,
    read_frame,
)

Fields = dict[str, Any]
KINDS_OF = {"keys": (SINK_KEYS, KEY_ROWS, "key_dim"), "values": (SINK_VALUES, VALUE_ROWS, "value_dim")}
MAX_BIAS, BIAS_UNIT = 48, 1 / 16
MIN_RATIO, SLACK = 1.0, 1e-6


def read_compacted(frame: bytes, bundle_file: bytes) -> Fields:
    """What read_frame finds, and "kept", "lengths", "positions", "bias"; "symbols", "tensors", "exact", "tolerance".

    kept: for each head a list of tokens. lengths: int32 [n_heads]; the next two have a number for each row. The last
    four as read_coded has them, but for their rows, [n_rows, dim], and symbols, those of "keys" and "values" in one
    stream each.
    """
    found, bundle = read_frame(frame), read_bundle(bundle_file)
    if found["fidelity"] != COMPACTED:
        raise Unsupported("not a COMPACTED frame")
    ratio = _anchor(found, bundle)
    check_block(found, bundle)
    n_sinks = sinks_of(found)
    sections = _by_kind(found, n_sinks)
    kept = _read_kept(sections[KEPT], found, n_sinks)
    _check_planes(bundle["compaction"]["anchors"][ratio]["heads"], kept, found["n_source_tokens"])
    tokens = np.concatenate(kept)
    result: Fields = {
        **found,
        "kept": kept,
        "lengths": np.array([len(of_head) for of_head in kept], np.int32),
        "positions": (found["first_position"] + tokens).astype(np.int32),
        "bias": _read_bias(sections[BIAS], kept, n_sinks, found["n_source_tokens"]),
        **{name: {} for name in ("symbols", "tensors", "exact", "tolerance")},
    }
    for side in KINDS_OF:
        _read_side(side, sections, bundle, ratio, result)
    return with_opaque(result)


def _anchor(found: Fields, bundle: Fields) -> str:
    """The anchor of a frame, by its ratio, and that it has the frame's profile."""
    if found["bundle_id"] != bundle["id"] or "compaction" not in bundle:
        raise Unsupported("another bundle, or one that says nothing of compaction")
    anchors, ratio = bundle["compaction"]["anchors"], found["am_ratio"]
    fit = [a for a in ANCHORS if a in anchors and ratio >= MIN_RATIO and ratio - SLACK <= int(a)]
    if not fit or found["profile"] not in anchors[fit[0]]["profiles"]:
        raise Unsupported("a ratio without an anchor, or another profile")
    return fit[0]


def _by_kind(found: Fields, n_sinks: int) -> Fields:
    """One section of each kind that a block has, by kind."""
    sections = [section for section in found["sections"] if section["kind"] != OPAQUE]
    kinds = {KEPT, BIAS, KEY_ROWS, VALUE_ROWS} | ({SINK_KEYS, SINK_VALUES} if n_sinks else set())
    if sorted(section["kind"] for section in sections) != sorted(kinds):
        raise Corrupt("not one section of each kind")
    if any(section["layer"] != ALL_LAYERS for section in sections):
        raise Corrupt("a section of a layer")
    return {section["kind"]: section for section in sections}


def _check(section: Fields, dtype: str, shape: tuple[int, ...]) -> None:
    if (section["dtype"], section["shape"]) != (dtype, shape):
        raise Corrupt("a section of another dtype or shape")


def _read_kept(section: Fields, found: Fields, n_sinks: int) -> list[list[int]]:
    """The tokens of each head."""
    n_heads, n_tokens = found["n_layers"] * found["n_kv_heads"], found["n_source_tokens"]
    n_bytes = -(-n_tokens // 8)
    _check(section, "uint8", (n_heads, n_bytes))
    kept = []
    for row in section["array"].tolist():
        tokens = [8 * at + bit for at, byte in enumerate(row) for bit in range(8) if byte & 0x80 >> bit]
        if not tokens or tokens[-1] >= n_tokens or tokens[:n_sinks] != list(range(n_sinks)):
            raise Corrupt("a head without tokens or sinks, or with tokens beyond those of the block")
        kept.append(tokens)
    return kept


def _check_planes(planes: list[list[int]], kept: list[list[int]], n_tokens: int) -> None:
    for heads in planes:
        if len(heads) > 1 and any(len(kept[head]) < n_tokens for head in heads):
            raise Corrupt("a head that is coded beside others and not whole")


def _read_bias(section: Fields, kept: list[list[int]], n_sinks: int, n_tokens: int) -> np.ndarray:
    biased = [len(of_head) < n_tokens and i >= n_sinks for of_head in kept for i in range(len(of_head))]
    _check(section, "int8", (sum(biased),))
    sixteenths = section["array"].astype(np.int64)
    if (np.abs(sixteenths) > MAX_BIAS).any():
        raise Corrupt("a bias beyond 48 sixteenths")
    bias = np.zeros(len(biased), np.float32)
    bias[np.array(biased, bool)] = sixteenths * BIAS_UNIT
    return bias


def _read_side(side: str, sections: Fields, bundle: Fields, ratio: str, result: Fields) -> None:
    """Adds what one side has to the result."""
    sink_kind, kind, dim_name = KINDS_OF[side]
    lengths, n_sinks, dtype = result["lengths"], sinks_of(result), kv_dtype(bundle)
    dim, n_heads = bundle["dense"][0][dim_name], len(lengths)
    _check(sections[kind], np.dtype(dtype).name, (int(lengths.sum()) - n_heads * n_sinks, dim))
    exact, magnitude, relative = _read_rows(side, sections[kind]["payload"], bundle, ratio, result)
    turned = _turn_heads(exact, magnitude, bundle["dense"], result) if side == "keys" else 0.0
    exact, tensor, units = rounded(exact, dtype)
    tolerance = relative * magnitude + turned + units
    if n_sinks:
        _check(sections[sink_kind], np.dtype(dtype).name, (n_heads * n_sinks, dim))
        of_sinks = np.concatenate([np.arange(rows.start, rows.start + n_sinks) for rows in _rows_of_heads(lengths)])
        tensor[of_sinks], tolerance[of_sinks] = sections[sink_kind]["array"], 0
        exact[of_sinks] = tensor[of_sinks].astype(np.float64)
    result["tensors"][side], result["exact"][side], result["tolerance"][side] = tensor, exact, tolerance


def _read_rows(
    side: str, payload: bytes, bundle: Fields, ratio: str, result: Fields
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of all heads, those of sinks 0: rows, the M of their numbers, and by what part of it they may be off."""
    anchor, n_sinks = bundle["compaction"]["anchors"][ratio], sinks_of(result)
    of_heads, profile = _rows_of_heads(result["lengths"]), result["profile"]
    at = [f"{side}.{number}" for number in range(len(anchor["heads"]))]
    planes = [plane_of(bundle["tensors"], name, profile, f"compaction.{ratio}.") for name in at]
    counts = [int(result["lengths"][heads[0]]) - n_sinks for heads in anchor["heads"]]
    parts = _read_stream(payload, planes, counts)
    result["symbols"][side] = np.concatenate([symbols.T.reshape(-1) for symbols in parts])
    dim = len(planes[0].mean) // len(anchor["heads"][0])
    exact, magnitude, relative = (np.zeros((of_heads[-1].stop, dim)) for _ in range(3))
    for heads, plane, symbols in zip(anchor["heads"], planes, parts, strict=True):
        rows, of_rows = rows_of(symbols, plane, anchor["profiles"][profile]["centroid"])
        for beside, head in enumerate(heads):
            coded = slice(of_heads[head].start + n_sinks, of_heads[head].stop)
            features = slice(beside * dim, (beside + 1) * dim)
            exact[coded], magnitude[coded] = rows[:, features], of_rows[:, features]
            relative[coded] = (len(plane.steps) + 12) * 2.0**-24
    return exact, magnitude, relative


def _read_stream(payload: bytes, planes: list[Plane], counts: list[int]) -> list[np.ndarray]:
    """The symbols of each plane, [n_rows, kept components], out of the one stream of all; counts: rows of each."""
    scales = [scale for plane, n in zip(planes, counts, strict=True) for scale in plane.scales for _ in range(n)]
    symbols, parts, at = read_symbols(payload, 1, scales)[0], [], 0
    for plane, n in zip(planes, counts, strict=True):
        end = at + n * len(plane.scales)
        parts.append(symbols[at:end].reshape(len(plane.scales), n).T)
        at = end
    return parts


def _turn_heads(exact: np.ndarray, magnitude: np.ndarray, dense: list[Fields], result: Fields) -> np.ndarray:
    """Gives the rows of every head the rotary positions of their tokens; how far off angles may put them."""
    bound = np.zeros(exact.shape)
    for head, rows in enumerate(_rows_of_heads(result["lengths"])):
        layer, positions = dense[head // result["n_kv_heads"]], result["positions"][rows].astype(np.float64)
        turn(exact[rows], magnitude[rows], bound[rows], positions, layer)
    return bound


def _rows_of_heads(lengths: np.ndarray) -> list[slice]:
    ends = np.cumsum(lengths).tolist()
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
