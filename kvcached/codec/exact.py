"""Blocks to sections and back bit for bit: a section for the keys of each layer, its values, each opaque tensor."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Shaped

from kvcached.block import KVBlock
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


def from_sections(header: Header, sections: Sequence[Section]) -> KVBlock:
    """The block of sections. Raises CorruptFrameError for those that `to_sections` does not make."""
    layers: dict[SectionKind, list[Shaped[np.ndarray, ...]]] = {kind: [] for kind in _DENSE.values()}
    for section in sections:
        if section.kind != SectionKind.OPAQUE:
            check_next(section, Coding.LOSSLESS, layers)
            layers[section.kind].append(lossless.decode(section.payload, section.dtype, section.shape))
    return _dense_block(header, layers[SectionKind.KEYS], layers[SectionKind.VALUES], opaque_of(sections))


def section_of(
    kind: SectionKind, array: Shaped[np.ndarray, "..."], zstd_level: int, *, layer: int = 0xFFFF, name: str = ""
) -> Section:
    """One tensor, exactly."""
    return Section(kind, Coding.LOSSLESS, array.dtype, array.shape, lossless.encode(array, zstd_level), layer, name)


def opaque_sections(opaque: Arrays, zstd_level: int) -> Iterator[Section]:
    """Inverse: `opaque_of`."""
    for name, array in opaque.items():
        yield section_of(SectionKind.OPAQUE, array, zstd_level, name=name)


def opaque_of(sections: Sequence[Section]) -> dict[str, Shaped[np.ndarray, "..."]]:
    """The opaque tensors among sections."""
    opaque: dict[str, Shaped[np.ndarray, ...]] = {}
    for section in sections:
        if section.kind == SectionKind.OPAQUE:
            if section.name in opaque or section.name in _DENSE:
                raise CorruptFrameError(f"two tensors are called {section.name!r}")
            check_coding(section, Coding.LOSSLESS)
            opaque[section.name] = lossless.decode(section.payload, section.dtype, section.shape)
    return opaque


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


def _dense_block(
    header: Header,
    keys: list[Shaped[np.ndarray, "..."]],
    values: list[Shaped[np.ndarray, "..."]],
    opaque: dict[str, Shaped[np.ndarray, "..."]],
) -> KVBlock:
    """A frame that passed its checksums can still be one that no encoder writes: shapes are checked here."""
    heads = (header.n_kv_heads, header.n_source_tokens)
    for arrays in (keys, values):
        kinds = {(array.dtype, array.shape) for array in arrays}
        # An empty layer has no bytes to bound its rows by.
        if len(arrays) != header.n_layers or len(kinds) > 1 or any(a.shape[:-1] != heads or not a.size for a in arrays):
            raise CorruptFrameError(f"{header.n_layers} layers of (heads, tokens) {heads} expected, got {kinds}")
    dtypes = {array.dtype.name for array in (*keys, *values)}
    if len(dtypes) > 1 or not dtypes <= set(DENSE_DTYPES):
        raise CorruptFrameError(f"keys and values of one dtype of {', '.join(DENSE_DTYPES)} expected, got {dtypes}")
    if not keys:
        return KVBlock.dense(opaque, header.n_source_tokens, header.first_position)
    tensors = {"keys": np.stack(keys), "values": np.stack(values), **opaque}
    return KVBlock.dense(tensors, header.n_source_tokens, header.first_position)
