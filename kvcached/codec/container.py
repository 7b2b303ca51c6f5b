"""The frame: one block as self-describing bytes. docs/format.md is the law; this is its summary.

    frame   := header record* crc32c:u32 payload*          the crc covers header and records
    header  := magic:u8[8] version:u16 flags:u16 fidelity:u8 lineage:u8 reserved:u16
               n_layers:u32 n_kv_heads:u32 n_source_tokens:u32 n_sections:u32 first_position:u64
               frame_bytes:u64 records_bytes:u32 am_ratio:f32 profile:u8[16]
               model_id:u8[32] block_hash:u8[32] bundle_id:u8[32]
    record  := kind:u8 coding:u8 dtype:u8 n_dims:u8 layer:u16 name_bytes:u16 payload_bytes:u64 crc32c:u32
               dims:u32[n_dims] name:u8[name_bytes]        the crc covers the section's payload

Little-endian, no padding, nothing after the last payload. A reader takes what it knows (else UnsupportedFrameError)
and what adds up (else CorruptFrameError), and allocates nothing before the crc over header and records was checked.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from math import prod

import crc32c
import numpy as np

from kvcached.block import Fidelity, FidelityKind
from kvcached.errors import CorruptFrameError, UnsupportedFrameError
from kvcached_client.tensors import DTYPES

MAGIC = b"\x89KVF\r\n\x1a\n"  # as PNG's: shows damage by text-mode copies and 7-bit channels
VERSION = 1
MAX_SECTIONS, MAX_RECORDS_BYTES, MAX_DIMS = 1 << 16, 16 << 20, 8
ALL_LAYERS = 0xFFFF
_HEADER = struct.Struct("<8sHHBBHIIIIQQIf16s32s32s32s")
_RECORD = struct.Struct("<BBBBHHQI")
_CRC = struct.Struct("<I")
# On disk. Never renumber.
_DTYPE_NUMBERS = {
    "float16": 1,
    "bfloat16": 2,
    "float32": 3,
    "float64": 4,
    "int8": 5,
    "int16": 6,
    "int32": 7,
    "int64": 8,
    "uint8": 9,
    "uint16": 10,
    "uint32": 11,
    "uint64": 12,
    "bool": 13,
}
_DTYPE_NAMES = {number: name for name, number in _DTYPE_NUMBERS.items()}


class SectionKind(IntEnum):
    """What a section holds. On disk: never renumber."""

    KEYS = 1  # of one layer, [n_kv_heads n_tokens key_dim]
    VALUES = 2
    SINK_KEYS = 3  # of all layers, [n_layers n_kv_heads n_sinks key_dim]
    SINK_VALUES = 4
    KEY_PLANE = 5  # of a group of layers, [n_tokens n_features]: tokens after the sinks, keys without rotary positions
    VALUE_PLANE = 6
    KEPT = 7  # of a compacted block, [n_heads, bytes]: a bit for each token of each head, the first in the highest bit
    BIAS = 8  # [n_rows] of int8, of the rows of heads that are not whole, without sinks
    KEY_ROWS = 9  # [n_rows key_dim], of all heads, without sinks
    VALUE_ROWS = 10
    OPAQUE = 16  # a named tensor


class Coding(IntEnum):
    """How a section's payload became bytes. On disk: never renumber."""

    LOSSLESS = 1  # byte planes, codec/lossless.py
    TRANSFORM = 2  # symbols of coefficients, codec/entropy.py, by a profile of the frame's bundle


@dataclass(frozen=True, slots=True)
class Header:
    """What a frame says of its block. `fidelity.bundle_id` is empty where no bundle was used."""

    model_id: bytes
    block_hash: bytes
    n_layers: int
    n_kv_heads: int
    n_source_tokens: int
    first_position: int
    fidelity: Fidelity = field(default_factory=Fidelity)
    lineage: FidelityKind = FidelityKind.EXACT


@dataclass(frozen=True, slots=True, eq=False)
class Section:
    """One coded tensor: `payload` becomes an array of `shape` and `dtype` by `coding`.

    layer: of keys and values, their dense layer; of planes, their group of layers.
    """

    kind: SectionKind
    coding: Coding
    dtype: np.dtype
    shape: tuple[int, ...]
    payload: bytes | memoryview
    layer: int = ALL_LAYERS
    name: str = ""


def pack(header: Header, sections: Sequence[Section]) -> bytes:
    """The frame of a block. Inverse: `unpack`."""
    records = b"".join(map(_pack_record, sections))
    head_bytes = _HEADER.size + len(records) + _CRC.size
    head = _pack_header(header, len(sections), len(records), head_bytes + sum(len(s.payload) for s in sections))
    crc = _CRC.pack(crc32c.crc32c(records, crc32c.crc32c(head)))
    return b"".join((head, records, crc, *(s.payload for s in sections)))


def unpack(frame: bytes | memoryview, max_source_bytes: int) -> tuple[Header, list[Section]]:
    """Header and sections of a frame; payloads are views, already checked against their checksums.

    Raises:
        CorruptFrameError: the bytes are not a frame, are damaged, or would decode to more than `max_source_bytes`.
        UnsupportedFrameError: a version, fidelity or coding that this reader does not know.
    """
    view = memoryview(frame)
    header, n_sections, records_bytes = _unpack_header(view)
    start = _HEADER.size + records_bytes + _CRC.size
    sections = list(_unpack_records(view[_HEADER.size : start - _CRC.size], n_sections, view[start:]))
    source_bytes = sum(prod(s.shape) * s.dtype.itemsize for s in sections)
    if source_bytes > max_source_bytes:
        raise CorruptFrameError(f"a frame of {source_bytes} source bytes, at most {max_source_bytes} are expected")
    return header, sections


def _pack_header(header: Header, n_sections: int, records_bytes: int, frame_bytes: int) -> bytes:
    fidelity = header.fidelity
    return _HEADER.pack(
        MAGIC,
        VERSION,
        0,
        fidelity.kind,
        header.lineage,
        0,
        header.n_layers,
        header.n_kv_heads,
        header.n_source_tokens,
        n_sections,
        header.first_position,
        frame_bytes,
        records_bytes,
        fidelity.am_ratio,
        fidelity.profile.encode("ascii"),
        header.model_id,
        header.block_hash,
        fidelity.bundle_id or bytes(32),
    )


def _unpack_header(view: memoryview) -> tuple[Header, int, int]:
    """Header, number of sections, bytes of their records; the whole head has passed its checksum."""
    if len(view) < _HEADER.size or bytes(view[:8]) != MAGIC:
        raise CorruptFrameError(f"not a frame: {len(view)} bytes that begin with {bytes(view[:8])!r}")
    version, flags = struct.unpack_from("<8xHH", view)
    if (version, flags) != (VERSION, 0):
        raise UnsupportedFrameError(
            f"frame version {version}, flags {flags:#x}; this reads version {VERSION} without flags"
        )
    fields = _HEADER.unpack_from(view)[3:]
    kind, lineage, _, n_layers, n_kv_heads, n_tokens, n_sections, first_position, *rest = fields
    frame_bytes, records_bytes, am_ratio, profile, model_id, block_hash, bundle_id = rest
    if frame_bytes != len(view):
        raise CorruptFrameError(f"a frame of {frame_bytes} bytes has {len(view)}")
    head_bytes = _HEADER.size + records_bytes
    if n_sections > MAX_SECTIONS or records_bytes > MAX_RECORDS_BYTES or head_bytes + _CRC.size > len(view):
        raise CorruptFrameError(f"{n_sections} sections in {records_bytes} bytes of records are more than fit")
    (crc,) = _CRC.unpack_from(view, head_bytes)
    if crc32c.crc32c(view[:head_bytes]) != crc:
        raise CorruptFrameError("the checksum over header and records does not match")
    try:
        fidelity_kind, lineage_kind = FidelityKind(kind), FidelityKind(lineage)
    except ValueError as error:
        raise UnsupportedFrameError(f"fidelity or lineage of another version: {error}") from None
    fidelity = _unpack_fidelity(fidelity_kind, profile.rstrip(b"\0"), am_ratio, bundle_id)
    return (
        Header(model_id, block_hash, n_layers, n_kv_heads, n_tokens, first_position, fidelity, lineage_kind),
        n_sections,
        records_bytes,
    )


def _unpack_fidelity(kind: FidelityKind, profile: bytes, am_ratio: float, bundle_id: bytes) -> Fidelity:
    if not profile.isascii() or b"\0" in profile or (profile and kind == FidelityKind.EXACT):
        raise CorruptFrameError(f"a frame of fidelity {kind.name} cannot have the profile {profile!r}")
    if am_ratio != 0 and kind != FidelityKind.COMPACTED:
        raise CorruptFrameError(f"a frame of fidelity {kind.name} cannot have am_ratio {am_ratio}")
    return Fidelity(kind, profile.decode("ascii"), am_ratio, bundle_id if any(bundle_id) else b"")


def _pack_record(section: Section) -> bytes:
    name = section.name.encode()
    fixed = _RECORD.pack(
        section.kind,
        section.coding,
        _DTYPE_NUMBERS[section.dtype.name],
        len(section.shape),
        section.layer,
        len(name),
        len(section.payload),
        crc32c.crc32c(section.payload),
    )
    return fixed + struct.pack(f"<{len(section.shape)}I", *section.shape) + name


def _unpack_records(records: memoryview, n_sections: int, payloads: memoryview) -> Iterator[Section]:
    at = start = 0
    for i in range(n_sections):
        if at + _RECORD.size > len(records):
            raise CorruptFrameError(f"the record of section {i} is cut off")
        kind, coding, dtype, n_dims, layer, name_bytes, payload_bytes, crc = _RECORD.unpack_from(records, at)
        at += _RECORD.size
        if n_dims > MAX_DIMS or at + 4 * n_dims + name_bytes > len(records):
            raise CorruptFrameError(f"section {i} has {n_dims} dimensions and a name of {name_bytes} bytes")
        shape = struct.unpack_from(f"<{n_dims}I", records, at)
        name = bytes(records[at + 4 * n_dims : at + 4 * n_dims + name_bytes])
        at += 4 * n_dims + name_bytes
        payload = payloads[start : start + payload_bytes]
        start += payload_bytes
        if len(payload) != payload_bytes or crc32c.crc32c(payload) != crc:
            raise CorruptFrameError(f"the payload of section {i} is cut off, or does not match its checksum")
        try:
            section_kind, section_coding, section_dtype = SectionKind(kind), Coding(coding), DTYPES[_DTYPE_NAMES[dtype]]
        except (ValueError, KeyError) as error:
            raise UnsupportedFrameError(
                f"section {i} has a kind, coding or dtype of another version: {error}"
            ) from None
        text = _unpack_name(section_kind, name)
        yield Section(section_kind, section_coding, section_dtype, shape, payload, layer, text)
    if at != len(records) or start != len(payloads):
        raise CorruptFrameError(f"{len(records) - at + len(payloads) - start} bytes belong to no section")


def _unpack_name(kind: SectionKind, name: bytes) -> str:
    if name and kind != SectionKind.OPAQUE:
        raise CorruptFrameError(f"a section of {kind.name} has the name {name!r}, only opaque tensors have one")
    try:
        return name.decode()
    except UnicodeDecodeError as error:
        raise CorruptFrameError(f"the name of a section is not UTF-8: {error}") from None
