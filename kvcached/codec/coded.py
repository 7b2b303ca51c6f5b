"""Blocks to sections and back by transform coding: planes -> klt -> quantize -> entropy, and the same list upwards.

One section for each plane, keys and values of each group of layers, and two for the sink tokens, if the block has any.
Sinks and opaque tensors are kept exactly. Source: KVTC, arXiv 2511.01815; what differs is in docs/decisions, 4 and 5.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Shaped

from kvcached.block import Allocate, KVBlock, fresh
from kvcached.codec import entropy, exact, klt, lossless, planes, quantize
from kvcached.codec.bundle import Coder
from kvcached.codec.container import ALL_LAYERS, Coding, Header, Section, SectionKind
from kvcached.codec.planes import Merging, Plane
from kvcached.codec.tables import PlaneCoder
from kvcached.errors import CorruptFrameError
from kvcached_client.tensors import DTYPES

_MAX_MAGNITUDE = 1e30  # of a decoded row: far beyond any model, far within float32


def to_sections(block: KVBlock, coder: Coder, zstd_level: int) -> Iterator[Section]:
    """The sections of a dense block. Inverse, to the coder's loss: `from_sections`. Raises what `codec.encode` does."""
    split = planes.split(block, coder.spec, coder.layers_per_group)
    for kind, sinks in ((SectionKind.SINK_KEYS, split.sink_keys), (SectionKind.SINK_VALUES, split.sink_values)):
        if sinks.size:
            yield exact.section_of(kind, sinks, zstd_level)
    dtype = DTYPES[coder.spec.kv_dtype]
    for kind, side, coders in (
        (SectionKind.KEY_PLANE, split.keys, coder.keys),
        (SectionKind.VALUE_PLANE, split.values, coder.values),
    ):
        for group, (rows, plane) in enumerate(zip(side, coders, strict=True)):
            payload = _encode_plane(rows, plane, coder)
            yield Section(kind, Coding.TRANSFORM, dtype, rows.shape, payload, group)
    yield from exact.opaque_sections(block.opaque, zstd_level)


def from_sections(header: Header, sections: Sequence[Section], coder: Coder, allocate: Allocate = fresh) -> KVBlock:
    """The block of sections. Raises CorruptFrameError for those that `to_sections` does not make."""
    n_tokens = header.n_source_tokens
    if not n_tokens:  # planes of no rows would have no bytes to bound them by
        raise CorruptFrameError("a coded frame of no tokens")
    n_sinks = planes.n_sinks(header.first_position, n_tokens)
    shapes = {side: (*shape[:2], n_sinks, shape[3]) for side, shape in coder.spec.dense_shapes().items()}
    if (header.n_layers, header.n_kv_heads) != shapes["keys"][:2]:
        raise CorruptFrameError(
            f"the bundle's model has (layers, KV heads) {shapes['keys'][:2]}, "
            f"the frame {(header.n_layers, header.n_kv_heads)}"
        )
    dtype = DTYPES[coder.spec.kv_dtype]
    if exact_ones := [s.kind.name for s in sections if s.kind in (SectionKind.KEYS, SectionKind.VALUES)]:
        raise CorruptFrameError(f"a section of {exact_ones[0]} does not belong into a frame of this fidelity")
    sinks = {
        "keys": _sinks(SectionKind.SINK_KEYS, sections, shapes["keys"], dtype),
        "values": _sinks(SectionKind.SINK_VALUES, sections, shapes["values"], dtype),
    }
    n_rows = n_tokens - n_sinks
    payloads = {
        "keys": _payloads(SectionKind.KEY_PLANE, sections, coder.keys, n_rows, dtype),
        "values": _payloads(SectionKind.VALUE_PLANE, sections, coder.values, n_rows, dtype),
    }  # which bound the number of tokens
    merging = Merging(sinks, header.first_position, n_tokens, coder.spec, allocate)
    for side, coders in (("keys", coder.keys), ("values", coder.values)):
        for payload, plane in zip(payloads[side], coders, strict=True):
            merging.add(side, _decode_plane(payload, n_rows, plane, coder))
    return merging.block(exact.opaque_of(sections, allocate))


def _encode_plane(rows: Plane, plane: PlaneCoder, coder: Coder) -> bytes:
    with np.errstate(over="ignore", invalid="ignore"):  # quantize refuses what is not finite
        coefficients = klt.project(rows, plane.basis, coder.product)
    return entropy.encode(quantize.quantize(coefficients, plane.tables.steps, coder.dead_zone), plane.tables.scales)


def _decode_plane(payload: bytes | memoryview, n_rows: int, plane: PlaneCoder, coder: Coder) -> Plane:
    symbols = entropy.decode(payload, n_rows, plane.tables.scales)
    with np.errstate(over="ignore", invalid="ignore"):  # looked at below
        coefficients = quantize.dequantize(symbols, plane.tables.steps, coder.centroid)
        rows = klt.reconstruct(coefficients, plane.basis, coder.product)
        if rows.size and not max(rows.max(), -rows.min()) < _MAX_MAGNITUDE:  # catches NaN too
            raise CorruptFrameError("a plane decodes to numbers that no model has")
    return rows


def _payloads(
    kind: SectionKind, sections: Sequence[Section], coders: Sequence[PlaneCoder], n_rows: int, dtype: np.dtype
) -> list[bytes | memoryview]:
    """Those of the planes of one side, one for each coder."""
    found: Mapping[SectionKind, list[bytes | memoryview]] = {kind: []}
    for section in sections:
        if section.kind != kind:
            continue
        exact.check_next(section, Coding.TRANSFORM, found)
        if section.layer >= len(coders):
            raise CorruptFrameError(f"{len(coders)} sections of {kind.name} expected, got more")
        _check_tensor(section, (n_rows, coders[section.layer].n_features), dtype)
        found[kind].append(section.payload)
    if len(found[kind]) != len(coders):
        raise CorruptFrameError(f"{len(coders)} sections of {kind.name} expected, got {len(found[kind])}")
    return found[kind]


def _sinks(
    kind: SectionKind, sections: Sequence[Section], shape: tuple[int, ...], dtype: np.dtype
) -> Shaped[np.ndarray, "..."]:
    """Sink tokens as they were; a block without them has no such section."""
    found = [section for section in sections if section.kind == kind]
    if len(found) != (0 not in shape):
        raise CorruptFrameError(f"sinks of shape {shape} expected, got {len(found)} sections of {kind.name}")
    if not found:
        return np.zeros(shape, dtype)
    _check_tensor(found[0], shape, dtype)
    exact.check_coding(found[0], Coding.LOSSLESS)
    if found[0].layer != ALL_LAYERS:
        raise CorruptFrameError(f"{kind.name} of layer {found[0].layer}, they are those of all layers")
    return lossless.decode(found[0].payload, dtype, shape)


def _check_tensor(section: Section, shape: tuple[int, ...], dtype: np.dtype) -> None:
    if (section.shape, section.dtype) != (shape, dtype):
        raise CorruptFrameError(
            f"{section.kind.name} of {dtype.name} {shape} expected, got {section.dtype.name} {section.shape}"
        )
