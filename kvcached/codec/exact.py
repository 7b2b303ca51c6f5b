"""Blocks to sections and back bit for bit: a section for the keys of each layer, its values, each opaque tensor."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Shaped

from kvcached.block import Allocate, KVBlock, fresh
from kvcached.codec import lossless
from kvcached.codec.container import Coding, Header, Section, SectionKind
from kvcached.errors import CorruptFrameError, UnsupportedFrameError
from kvcached_client.spec import DENSE_DTYPES

_DENSE = {"keys": SectionKind.KEYS, "values": SectionKind.VALUES}

Arrays = Mapping[str, Shaped[np.ndarray, "..."]]


def to_sections(block: KVBlock, zstd_level: int) -> Iterator[Section]:
    """The sections of a dense block. Inverse: `from_sections`. Raises ValueError for a compacted one."""
    if not block.is_dense:
        raise ValueError("a block that was compacted cannot be kept exactly")
    tensors = block.to_tensors()
    for name, kind in _DENSE.items():
        for layer, rows in enumerate(tensors.get(name, ())):
            yield section_of(kind, rows, zstd_level, layer=layer)
    yield from opaque_sections(block.opaque, zstd_level)


def from_sections(header: Header, sections: Sequence[Section], allocate: Allocate = fresh) -> KVBlock:
    """The block of sections. Raises CorruptFrameError for those that `to_sections` does not make."""
    layers: dict[SectionKind, list[Section]] = {kind: [] for kind in _DENSE.values()}
    for section in sections:
        if section.kind != SectionKind.OPAQUE:
            check_next(section, Coding.LOSSLESS, layers)
            layers[section.kind].append(section)
    _check_dense(header, layers)
    tensors = {name: _stacked(name, layers[kind], allocate) for name, kind in _DENSE.items() if layers[kind]}
    tensors |= opaque_of(sections, allocate)
    return KVBlock.dense(tensors, header.n_source_tokens, header.first_position)


def section_of(
    kind: SectionKind, array: Shaped[np.ndarray, "..."], zstd_level: int, *, layer: int = 0xFFFF, name: str = ""
) -> Section:
    """One tensor, exactly."""
    return Section(kind, Coding.LOSSLESS, array.dtype, array.shape, lossless.encode(array, zstd_level), layer, name)


def opaque_sections(opaque: Arrays, zstd_level: int) -> Iterator[Section]:
    """Inverse: `opaque_of`."""
    for name, array in opaque.items():
        yield section_of(SectionKind.OPAQUE, array, zstd_level, name=name)


def opaque_of(sections: Sequence[Section], allocate: Allocate = fresh) -> dict[str, Shaped[np.ndarray, "..."]]:
    """The opaque tensors among sections."""
    opaque: dict[str, Shaped[np.ndarray, ...]] = {}
    for section in sections:
        if section.kind == SectionKind.OPAQUE:
            if section.name in opaque or section.name in _DENSE:
                raise CorruptFrameError(f"two tensors are called {section.name!r}")
            check_coding(section, Coding.LOSSLESS)
            array = _allocated(section.name, section.shape, section.dtype, allocate)
            lossless.decode_into(section.payload, array, lossless.decompressor())
            opaque[section.name] = array
    return opaque


def _stacked(name: str, layers: Sequence[Section], allocate: Allocate) -> Shaped[np.ndarray, "n_layers ..."]:
    """The tensor of sections of one shape, each decoded where it is to lie."""
    whole, zstd = _allocated(name, (len(layers), *layers[0].shape), layers[0].dtype, allocate), lossless.decompressor()
    for section, layer in zip(layers, whole, strict=True):
        lossless.decode_into(section.payload, layer, zstd)
    return whole


def _allocated(name: str, shape: tuple[int, ...], dtype: np.dtype, allocate: Allocate) -> Shaped[np.ndarray, "..."]:
    try:
        return allocate(name, shape, dtype)
    except ValueError as error:  # a dim of 0 among others so large that NumPy cannot count what they span
        raise CorruptFrameError(f"no array has the shape {shape}: {error}") from None


def check_next(section: Section, coding: Coding, found: Mapping[SectionKind, Sequence[object]]) -> None:
    """That a section is of a kind that is collected, coded so, and the next in order.

    Raises:
        CorruptFrameError: it is not.
        UnsupportedFrameError: its coding is one that no frame of this version has there.
    """
    if section.kind not in found:
        raise CorruptFrameError(f"a section of {section.kind.name} does not belong into a frame of this fidelity")
    check_coding(section, coding)
    if section.layer != len(found[section.kind]):
        raise CorruptFrameError(f"{section.kind.name} {len(found[section.kind])} expected, got {section.layer}")


def check_coding(section: Section, coding: Coding) -> None:
    if section.coding != coding:
        raise UnsupportedFrameError(f"{section.kind.name} of coding {coding.name} expected, got {section.coding.name}")


def _check_dense(header: Header, layers: Mapping[SectionKind, Sequence[Section]]) -> None:
    """A frame that passed its checksums can still be one that no encoder writes: shapes are checked here."""
    heads = (header.n_kv_heads, header.n_source_tokens)
    for found in layers.values():
        kinds = {(section.dtype, section.shape) for section in found}
        # An empty layer has no bytes to bound its rows by.
        wrong = len(found) != header.n_layers or len(kinds) > 1
        if wrong or any(len(s.shape) != 3 or s.shape[:2] != heads or 0 in s.shape for s in found):
            raise CorruptFrameError(f"{header.n_layers} layers of (heads, tokens) {heads} expected, got {kinds}")
    dtypes = {section.dtype for found in layers.values() for section in found}
    if len(dtypes) > 1 or any(dtype.name not in DENSE_DTYPES for dtype in dtypes):
        raise CorruptFrameError(f"keys and values of one dtype of {', '.join(DENSE_DTYPES)} expected, got {dtypes}")
