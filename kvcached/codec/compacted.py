"""Compacted blocks to sections and back: the rows of each head by themselves, those of whole heads side by side.

    KEPT        which tokens each head keeps, a bit for each
    BIAS        of the rows of all heads that are not whole, in steps; none of sinks
    KEY_ROWS    symbols of all planes one after another, component by component; VALUE_ROWS likewise: one stream each,
                because a stream of its own costs more than a head that keeps ten tokens

Keys lose their rotary positions, each at its own. Sinks and opaque tensors are kept exactly, as in `coded`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Bool, Float32, Int, Int32, Shaped, UInt8

from kvcached.block import KVBlock
from kvcached.codec import compaction, entropy, exact, klt, lossless, planes, quantize, rope
from kvcached.codec.compactor import Compactor
from kvcached.codec.container import ALL_LAYERS, Coding, Header, Section, SectionKind
from kvcached.codec.tables import SIDES, PlaneCoder
from kvcached.errors import CorruptFrameError
from kvcached_client.tensors import DTYPES

_MAX_MAGNITUDE = 1e30  # of a decoded row: far beyond any model, far within float32
_MAX_BIAS_STEPS = round(compaction.MAX_BIAS / compaction.BIAS_STEP)
_ROWS = {"keys": SectionKind.KEY_ROWS, "values": SectionKind.VALUE_ROWS}
_SINKS = {"keys": SectionKind.SINK_KEYS, "values": SectionKind.SINK_VALUES}

Rows = Float32[np.ndarray, "_n_rows _dim"]
Symbols = Int32[np.ndarray, "_n_rows _n_components"]
Where = Int[np.ndarray, " _n"]
Mask = Bool[np.ndarray, "n_heads n_tokens"]


def to_sections(block: KVBlock, coder: Compactor, zstd_level: int) -> Iterator[Section]:
    """The sections of a compacted block. Inverse, to the coder's loss: `from_sections`.

    Raises:
        ValueError: heads that are coded side by side do not keep all tokens, biases are none that `compaction` fits, or
            numbers are not finite or too large for their steps.
        UnsupportedRopeError: the rotary positions of a layer cannot be removed.
    """
    layout = _Layout(_kept(block), coder, block.first_position)
    yield exact.section_of(SectionKind.KEPT, np.packbits(layout.kept, axis=1), zstd_level)
    yield exact.section_of(SectionKind.BIAS, _bias_steps(block, layout), zstd_level)
    symbols, _ = _coded(block, layout, coder)
    for side in SIDES:
        tensor: Shaped[np.ndarray, ...] = getattr(block, side)
        if layout.sinks.size:
            yield exact.section_of(_SINKS[side], tensor[layout.sinks], zstd_level)
        payload = _encode(symbols[side], layout, coder, side)
        shape = (layout.n_coded, tensor.shape[-1])
        yield Section(_ROWS[side], Coding.TRANSFORM, tensor.dtype, shape, payload)
    yield from exact.opaque_sections(block.opaque, zstd_level)


def from_sections(header: Header, sections: Sequence[Section], coder: Compactor) -> KVBlock:
    """The block of sections. Raises CorruptFrameError for those that `to_sections` does not make."""
    heads, n_tokens = coder.spec.dense_shapes()["keys"][:2], header.n_source_tokens
    if (header.n_layers, header.n_kv_heads) != heads or not n_tokens:
        got = (header.n_layers, header.n_kv_heads, n_tokens)
        raise CorruptFrameError(f"(layers, KV heads) {heads} of some tokens expected, got {got}")
    found = _Sections(sections)
    kept = _read_kept(found, heads[0] * heads[1], header)
    try:
        layout = _Layout(kept, coder, header.first_position)
    except ValueError as error:
        raise CorruptFrameError(str(error)) from None
    symbols = {side: _read_symbols(found, layout, coder, side) for side in SIDES}
    rows = _restored(lambda i, side, _: symbols[side][i], layout, coder)
    block = KVBlock(
        **rows,
        positions=(header.first_position + np.nonzero(kept)[1]).astype(np.int32),
        bias=_read_bias(found, layout),
        lengths=kept.sum(axis=1).astype(np.int32).reshape(heads),
        first_position=header.first_position,
        n_source_tokens=n_tokens,
        opaque=exact.opaque_of(sections),
    )
    sinks = {side: _read_sinks(found, layout, coder, side) for side in SIDES}
    found.check_all_taken()
    turned = _turned(block.keys, block, coder, inverse=False)
    return replace(
        block,
        keys=_with_sinks(turned, sinks["keys"], layout),
        values=_with_sinks(block.values, sinks["values"], layout),
    )


def seen_keys(picked: KVBlock, coder: Compactor) -> Rows:
    """The keys of picked rows as whoever decodes them will have them, in float32. Raises what `to_sections` does."""
    return seen(picked, coder).keys


def seen(small: KVBlock, coder: Compactor) -> KVBlock:
    """A compacted block as whoever decodes it will have it, keys in float32. Raises what `to_sections` does."""
    layout = _Layout(_kept(small), coder, small.first_position)
    _, rows = _coded(small, layout, coder)
    block = replace(small, keys=rows["keys"], values=rows["values"])
    keys = _turned(block.keys, block, coder, inverse=False)
    return replace(
        block,
        keys=_with_sinks(keys, small.keys[layout.sinks], layout).astype(np.float32),
        values=_with_sinks(block.values, small.values[layout.sinks], layout),
    )


def plain_rows(block: KVBlock, coder: Compactor) -> dict[str, Rows]:
    """Keys without rotary positions, and values, in float32."""
    keys = _turned(block.keys.astype(np.float32), block, coder, inverse=True)
    return {"keys": keys, "values": block.values.astype(np.float32)}


class _Layout:
    """Which rows of a compacted block are whose, and which are coded. kept: tokens of each head, of all layers."""

    def __init__(self, kept: Mask, coder: Compactor, first_position: int) -> None:
        """Raises ValueError if heads that are coded side by side do not keep all tokens, or sinks are missing."""
        self.kept = kept
        n_heads, n_tokens = kept.shape
        n_sinks = planes.n_sinks(first_position, n_tokens)
        together = [head for plane in coder.planes if len(plane.heads) > 1 for head in plane.heads]
        if not kept[together].all() or not kept[:, :n_sinks].all() or not kept.any(axis=1).all():
            raise ValueError("a head keeps one token at least, sinks, and where it is coded beside others all tokens")
        ends = np.cumsum(kept.sum(axis=1))
        starts = np.append(0, ends[:-1])
        of_heads = [np.arange(start + n_sinks, end) for start, end in zip(starts, ends, strict=True)]
        self.n_rows, self.n_coded = int(ends[-1]), int(ends[-1]) - n_heads * n_sinks
        self.sinks: Where = (starts[:, None] + np.arange(n_sinks)).reshape(-1)
        self.of_planes = [np.stack([of_heads[head] for head in plane.heads], axis=1) for plane in coder.planes]
        self.order = sorted(range(len(coder.planes)), key=lambda i: coder.planes[i].leader is not None)
        # of the rows of a plane, among the rows of one that keeps all tokens
        self.tokens = [np.nonzero(kept[plane.heads[0], n_sinks:])[0] for plane in coder.planes]
        ragged = [rows for rows, of_head in zip(of_heads, kept, strict=True) if not of_head.all()]
        self.biased: Where = np.concatenate([np.zeros(0, np.int64), *ragged])


def _kept(block: KVBlock) -> Mask:
    n_heads = block.lengths.size
    kept = np.zeros((n_heads, block.n_source_tokens), bool)
    kept[np.repeat(np.arange(n_heads), block.lengths.reshape(-1)), block.positions - block.first_position] = True
    return kept


def _read_kept(found: "_Sections", n_heads: int, header: Header) -> Mask:
    n_tokens = header.n_source_tokens
    packed = found.exact(SectionKind.KEPT, (n_heads, -(-n_tokens // 8)), np.dtype(np.uint8))
    # A bit costs nothing in a frame. Before anything is made for each row there must be as many rows.
    n_coded = int(np.bitwise_count(packed).sum()) - n_heads * planes.n_sinks(header.first_position, n_tokens)
    found.check_rows(n_coded)
    bits = np.unpackbits(packed, axis=1)
    if bits[:, n_tokens:].any():
        raise CorruptFrameError(f"KEPT names tokens beyond the {n_tokens} of the block")
    kept: Mask = bits[:, :n_tokens].view(bool)
    return kept


def _bias_steps(block: KVBlock, layout: _Layout) -> np.ndarray:
    steps = block.bias / np.float32(compaction.BIAS_STEP)
    others = np.delete(steps, layout.biased)
    if others.any() or np.abs(steps).max(initial=0) > _MAX_BIAS_STEPS or (steps != np.rint(steps)).any():
        raise ValueError(
            f"biases are multiples of {compaction.BIAS_STEP} up to {compaction.MAX_BIAS}, of no whole head"
        )
    biased: np.ndarray = steps[layout.biased].astype(np.int8)
    return biased


def _read_bias(found: "_Sections", layout: _Layout) -> Float32[np.ndarray, " n_rows"]:
    steps = found.exact(SectionKind.BIAS, (len(layout.biased),), np.dtype(np.int8))
    if np.abs(steps.astype(np.int32)).max(initial=0) > _MAX_BIAS_STEPS:
        raise CorruptFrameError(f"a bias of more than {_MAX_BIAS_STEPS} steps")
    bias = np.zeros(layout.n_rows, np.float32)
    bias[layout.biased] = steps * np.float32(compaction.BIAS_STEP)
    return bias


def _read_sinks(found: "_Sections", layout: _Layout, coder: Compactor, side: str) -> Shaped[np.ndarray, "_n_rows _dim"]:
    dtype, dim = DTYPES[coder.spec.kv_dtype], coder.spec.dense_shapes()[side][-1]
    if not layout.sinks.size:
        return np.zeros((0, dim), dtype)
    return found.exact(_SINKS[side], (len(layout.sinks), dim), dtype)


def _with_sinks(
    rows: Rows, sinks: Shaped[np.ndarray, "_n_sinks _dim"], layout: _Layout
) -> Shaped[np.ndarray, "_n _dim"]:
    """Rows in the KV dtype, sinks among them."""
    whole = planes.rounded(rows, sinks.dtype)
    whole[layout.sinks] = sinks
    return whole


def _coded(block: KVBlock, layout: _Layout, coder: Compactor) -> tuple[dict[str, list[Symbols]], dict[str, Rows]]:
    """Symbols of each plane, by side, and the rows that they stand for. Inverse, to the coder's loss: `_restored`."""
    rows = plain_rows(block, coder)
    symbols: dict[str, list[Symbols]] = {side: [np.zeros((0, 0), np.int32)] * len(coder.planes) for side in SIDES}

    def quantized(i: int, side: str, expected: Rows | np.float32) -> Symbols:
        one: PlaneCoder = getattr(coder.planes[i], side)
        coefficients = klt.project(_rows_of(i, rows[side], one, layout) - expected, one.basis)
        symbols[side][i] = quantize.quantize(coefficients, one.tables.steps, coder.dead_zone)
        return symbols[side][i]

    restored = _restored(quantized, layout, coder)
    return symbols, restored


def _restored(
    symbols: Callable[[int, str, Rows | np.float32], Symbols], layout: _Layout, coder: Compactor
) -> dict[str, Rows]:
    """Rows of all heads, by side, those of sinks 0. symbols: of a plane and side, given what its rows should be.

    Planes that others are predicted from come first, keys before values.
    """
    dims = {side: coder.spec.dense_shapes()[side][-1] for side in SIDES}
    rows = {side: np.zeros((layout.n_rows, dims[side]), np.float32) for side in SIDES}
    with np.errstate(over="ignore", invalid="ignore"):  # quantize refuses what is not finite; rows are looked at below
        for i in layout.order:
            for side in SIDES:
                one: PlaneCoder = getattr(coder.planes[i], side)
                expected = _expected(i, side, rows, layout, coder)
                found = quantize.dequantize(symbols(i, side, expected), one.tables.steps, coder.centroid)
                of_plane = klt.reconstruct(found, one.basis) + expected
                rows[side][layout.of_planes[i].reshape(-1)] = of_plane.reshape(-1, dims[side])
    for of_side in rows.values():
        if of_side.size and not max(of_side.max(), -of_side.min()) < _MAX_MAGNITUDE:  # catches NaN too
            raise CorruptFrameError("rows decode to numbers that no model has")
    return rows


def _expected(i: int, side: str, rows: Mapping[str, Rows], layout: _Layout, coder: Compactor) -> Rows | np.float32:
    """What a plane's rows should be, going by those of its leader at the same tokens; values by its keys too."""
    plane = coder.planes[i]
    if side not in plane.predictors:
        return np.float32(0)
    known = [_rows_of(i, rows["keys"], plane.keys, layout)] if side == "values" else []
    if plane.leader is not None:
        leader = coder.planes[plane.leader]
        of_leader = (_rows_of(plane.leader, rows[s], getattr(leader, s), layout) for s in SIDES)
        known = [each[layout.tokens[i]] for each in of_leader] + known
    found: Rows = np.concatenate(known, axis=1) @ plane.predictors[side]
    return found


def _rows_of(i: int, rows: Rows, one: PlaneCoder, layout: _Layout) -> Rows:
    """Those of a plane, heads side by side."""
    where = layout.of_planes[i]
    of_plane: Rows = rows[where].reshape(len(where), one.n_features)
    return of_plane


def _scales(layout: _Layout, coder: Compactor, side: str) -> list[UInt8[np.ndarray, " _n"]]:
    """The scale index of each symbol of each plane, component by component."""
    tables = (getattr(plane, side).tables for plane in coder.planes)
    return [np.repeat(one.scales, len(where)) for one, where in zip(tables, layout.of_planes, strict=True)]


def _encode(symbols: Sequence[Symbols], layout: _Layout, coder: Compactor, side: str) -> bytes:
    """One stream of all planes. Inverse: `_decode`."""
    flat = np.concatenate([plane.T.reshape(-1) for plane in symbols])
    return entropy.encode(flat[None], np.concatenate(_scales(layout, coder, side)))


def _decode(payload: bytes | memoryview, layout: _Layout, coder: Compactor, side: str) -> list[Symbols]:
    scales = _scales(layout, coder, side)
    flat = entropy.decode(payload, 1, np.concatenate(scales))[0]
    parts = np.split(flat, np.cumsum([len(part) for part in scales])[:-1])
    ranks = [len(getattr(plane, side).tables.steps) for plane in coder.planes]
    return [p.reshape(rank, len(rows)).T for p, rank, rows in zip(parts, ranks, layout.of_planes, strict=True)]


def _turned(rows: Rows, block: KVBlock, coder: Compactor, *, inverse: bool) -> Rows:
    """Rotary positions on, or off: each row at its own position."""
    turned = np.empty_like(rows)
    ends = np.cumsum(block.lengths.sum(axis=1)).tolist()
    for layer, start, stop in zip(coder.spec.dense_layers, [0, *ends], ends, strict=False):
        part = slice(start, stop)
        turned[part] = rope.rotation(block.positions[part], layer.rope, rows.shape[1], inverse=inverse)(rows[part])
    return turned


def _read_symbols(found: "_Sections", layout: _Layout, coder: Compactor, side: str) -> list[Symbols]:
    shape = (layout.n_coded, coder.spec.dense_shapes()[side][-1])
    payload = found.take(_ROWS[side], Coding.TRANSFORM, shape, DTYPES[coder.spec.kv_dtype]).payload
    return _decode(payload, layout, coder, side)


class _Sections:
    """The sections of a frame by their kinds, each taken once. All of it raises CorruptFrameError."""

    def __init__(self, sections: Sequence[Section]) -> None:
        self._left: dict[SectionKind, Section] = {}
        for section in sections:
            if section.kind != SectionKind.OPAQUE:
                if section.kind in self._left:
                    raise CorruptFrameError(f"one section of {section.kind.name} expected, got more")
                self._left[section.kind] = section

    def check_rows(self, n_coded: int) -> None:
        for kind in _ROWS.values():
            section = self._left.get(kind)
            if not section or section.shape[:1] != (n_coded,):
                got = f"{section.shape}" if section else "none"
                raise CorruptFrameError(f"{kind.name} of {n_coded} rows, as KEPT says, expected, got {got}")

    def take(self, kind: SectionKind, coding: Coding, shape: tuple[int, ...], dtype: np.dtype) -> Section:
        section = self._left.pop(kind, None)
        if section is None or (section.shape, section.dtype, section.layer) != (shape, dtype, ALL_LAYERS):
            got = f"{section.dtype.name} {section.shape} of layer {section.layer}" if section else "none"
            raise CorruptFrameError(f"{kind.name} of {dtype.name} {shape} and all layers expected, got {got}")
        exact.check_coding(section, coding)
        return section

    def exact(self, kind: SectionKind, shape: tuple[int, ...], dtype: np.dtype) -> Shaped[np.ndarray, "..."]:
        return lossless.decode(self.take(kind, Coding.LOSSLESS, shape, dtype).payload, dtype, shape)

    def check_all_taken(self) -> None:
        for kind in self._left:
            raise CorruptFrameError(f"a section of {kind.name} does not belong into a frame of this fidelity")
