"""A second reader of COMPACTED frames, written from docs/format.md alone: one plane after another, leaders first.

What they share with CODED ones, symbols and from there to rows, is coded_reader's.
"""

from typing import Any, NamedTuple

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
FEW = 12  # operations that round, besides products and sums


class Anchor(NamedTuple):
    """How planes are coded; the last two by side and number of the plane."""

    heads: list[list[int]]
    leaders: list[int | None]
    centroid: float
    planes: dict[tuple[str, int], Plane]
    predictors: dict[tuple[str, int], np.ndarray]


class Rows(NamedTuple):
    """A side of a plane after step 2: numbers [n_rows, n_features], the M of each, how many 2^-24 M it may be off."""

    exact: np.ndarray
    magnitude: np.ndarray
    off: int


def read_compacted(frame: bytes, bundle_file: bytes) -> Fields:
    """What read_frame finds, and "kept", "lengths", "positions", "bias"; "symbols", "tensors", "exact", "tolerance".

    kept: for each head a list of tokens. lengths: int32 [n_heads]; the next two have a number for each row. The last
    four as read_coded has them, but for their rows, [n_rows, dim], and symbols, those of "keys" and "values" in one
    stream each.
    """
    found, bundle = read_frame(frame), read_bundle(bundle_file)
    if found["fidelity"] != COMPACTED:
        raise Unsupported("not a COMPACTED frame")
    anchor = _read_anchor(found, bundle)
    check_block(found, bundle)
    n_sinks = sinks_of(found)
    sections = _by_kind(found, n_sinks)
    kept = _read_kept(sections[KEPT], found, n_sinks)
    _check_planes(anchor.heads, kept, found["n_source_tokens"])
    tokens = np.concatenate(kept)
    result: Fields = {
        **found,
        "kept": kept,
        "lengths": np.array([len(of_head) for of_head in kept], np.int32),
        "positions": (found["first_position"] + tokens).astype(np.int32),
        "bias": _read_bias(sections[BIAS], kept, n_sinks, found["n_source_tokens"]),
        **{name: {} for name in ("symbols", "tensors", "exact", "tolerance")},
    }
    coded = [[token for token in of_head if token >= n_sinks] for of_head in kept]
    symbols = {side: _read_stream(side, sections, anchor, coded, bundle) for side in KINDS_OF}
    rows = _read_planes(symbols, anchor, coded)
    for side in KINDS_OF:
        result["symbols"][side] = np.concatenate([of_plane.T.reshape(-1) for of_plane in symbols[side]])
        _add_side(side, sections, rows, anchor, bundle, result)
    return with_opaque(result)


def _read_anchor(found: Fields, bundle: Fields) -> Anchor:
    """The anchor of a frame, with the frame's profile."""
    if found["bundle_id"] != bundle["id"] or "compaction" not in bundle:
        raise Unsupported("another bundle, or one that says nothing of compaction")
    anchors, ratio, profile = bundle["compaction"]["anchors"], found["am_ratio"], found["profile"]
    fit = [a for a in ANCHORS if a in anchors and ratio >= MIN_RATIO and ratio - SLACK <= int(a)]
    if not fit or profile not in anchors[fit[0]]["profiles"]:
        raise Unsupported("a ratio without an anchor, or another profile")
    said, prefix, tensors = anchors[fit[0]], f"compaction.{fit[0]}.", bundle["tensors"]
    planes, predictors = {}, {}
    for side in KINDS_OF:
        for number in range(len(said["heads"])):
            at = f"{side}.{number}"
            planes[side, number] = plane_of(tensors, at, profile, prefix)
            if f"{prefix}{at}.predictor" in tensors:
                predictors[side, number] = tensors[f"{prefix}{at}.predictor"].astype(np.float64)
    return Anchor(said["heads"], said["leaders"], said["profiles"][profile]["centroid"], planes, predictors)


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


def _read_stream(
    side: str, sections: Fields, anchor: Anchor, coded: list[list[int]], bundle: Fields
) -> list[np.ndarray]:
    """The symbols of each plane, [n_rows, kept components], out of the one stream of all. coded: tokens of heads."""
    _, kind, dim_name = KINDS_OF[side]
    shape = (sum(len(of_head) for of_head in coded), bundle["dense"][0][dim_name])
    _check(sections[kind], np.dtype(kv_dtype(bundle)).name, shape)
    planes = [(anchor.planes[side, number], len(coded[heads[0]])) for number, heads in enumerate(anchor.heads)]
    scales = [scale for plane, n in planes for scale in plane.scales for _ in range(n)]
    symbols, parts, at = read_symbols(sections[kind]["payload"], 1, scales)[0], [], 0
    for plane, n in planes:
        end = at + n * len(plane.scales)
        parts.append(symbols[at:end].reshape(len(plane.scales), n).T)
        at = end
    return parts


def _read_planes(
    symbols: dict[str, list[np.ndarray]], anchor: Anchor, coded: list[list[int]]
) -> dict[tuple[str, int], Rows]:
    """Rows by side and plane: leaders before those that they lead, keys before values."""
    rows: dict[tuple[str, int], Rows] = {}
    led = [number for number, leader in enumerate(anchor.leaders) if leader is not None]
    for number in [*(n for n in range(len(anchor.heads)) if n not in led), *led]:
        for side in KINDS_OF:
            plane, predictor = anchor.planes[side, number], anchor.predictors.get((side, number))
            of_plane, off = symbols[side][number], len(plane.steps) + FEW
            if predictor is None:
                rows[side, number] = Rows(*rows_of(of_plane, plane, anchor.centroid), off)
                continue
            known = _known(side, number, rows, anchor, coded)
            exact = np.concatenate([part.exact for part in known], axis=1) @ predictor
            magnitude = np.concatenate([part.magnitude for part in known], axis=1) @ np.abs(predictor)
            off += len(predictor) + max(part.off for part in known)
            rows[side, number] = Rows(*rows_of(of_plane, plane, anchor.centroid, exact, magnitude), off)
    return rows


def _known(
    side: str, number: int, rows: dict[tuple[str, int], Rows], anchor: Anchor, coded: list[list[int]]
) -> list[Rows]:
    """What a plane is predicted from, token by token."""
    known: list[Rows] = []
    leader = anchor.leaders[number]
    if leader is not None:
        of_leader = coded[anchor.heads[leader][0]]
        same = [of_leader.index(token) for token in coded[anchor.heads[number][0]]]
        both = (rows["keys", leader], rows["values", leader])
        known = [Rows(part.exact[same], part.magnitude[same], part.off) for part in both]
    return [*known, rows["keys", number]] if side == "values" else known


def _add_side(
    side: str, sections: Fields, rows: dict[tuple[str, int], Rows], anchor: Anchor, bundle: Fields, result: Fields
) -> None:
    """Adds what one side has to the result."""
    sink_kind, _, dim_name = KINDS_OF[side]
    n_sinks, dtype, dim = sinks_of(result), kv_dtype(bundle), bundle["dense"][0][dim_name]
    of_heads = _rows_of_heads(result["lengths"])
    exact, magnitude, off = (np.zeros((of_heads[-1].stop, dim)) for _ in range(3))  # of sinks 0 for now
    for number, heads in enumerate(anchor.heads):
        for beside, head in enumerate(heads):
            coded = slice(of_heads[head].start + n_sinks, of_heads[head].stop)
            features = slice(beside * dim, (beside + 1) * dim)
            exact[coded], magnitude[coded] = (part[:, features] for part in rows[side, number][:2])
            off[coded] = rows[side, number].off
    turned = _turn_heads(exact, magnitude, bundle["dense"], result) if side == "keys" else 0.0
    exact, tensor, units = rounded(exact, dtype)
    tolerance = off * 2.0**-24 * magnitude + turned + units
    if n_sinks:
        _check(sections[sink_kind], np.dtype(dtype).name, (len(of_heads) * n_sinks, dim))
        of_sinks = np.concatenate([np.arange(one.start, one.start + n_sinks) for one in of_heads])
        tensor[of_sinks], tolerance[of_sinks] = sections[sink_kind]["array"], 0
        exact[of_sinks] = tensor[of_sinks].astype(np.float64)
    result["tensors"][side], result["exact"][side], result["tolerance"][side] = tensor, exact, tolerance


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
