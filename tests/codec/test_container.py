"""The frame around the payloads: what was packed comes back, and bytes that lie get one of two answers."""

import struct
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from codec.frames import (
    BLOCK_HASH,
    MODEL_ID,
    PLENTY,
    RawSection,
    allocating_at_most,
    names,
    raw_frame,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.frame_reader import crc32c, read_frame

from kvcached.block import Fidelity, FidelityKind
from kvcached.codec import container
from kvcached.codec.container import Coding, Header, Section, SectionKind
from kvcached.errors import CorruptFrameError, UnsupportedFrameError
from kvcached_client.tensors import DTYPES

REFUSED = (CorruptFrameError, UnsupportedFrameError)
PLAIN = Header(MODEL_ID, BLOCK_HASH, n_layers=1, n_kv_heads=2, n_source_tokens=3, first_position=4)

u32 = st.integers(0, 2**32 - 1)
digests = st.binary(min_size=32, max_size=32)
kinds = st.sampled_from(FidelityKind)
ascii_names = st.text(st.characters(min_codepoint=1, max_codepoint=127), max_size=16)
headers = st.builds(
    Header,
    model_id=digests,
    block_hash=digests,
    n_layers=u32,
    n_kv_heads=u32,
    n_source_tokens=u32,
    first_position=st.integers(0, 2**64 - 1),
    fidelity=st.just(Fidelity())
    | st.builds(Fidelity, st.just(FidelityKind.CODED), ascii_names, st.just(0.0), digests.filter(any))
    | st.builds(Fidelity, st.just(FidelityKind.COMPACTED), ascii_names, st.floats(0, 1, width=32), st.just(b"")),
    lineage=kinds,
)
# The fields of sections, not sections: run-time type checks may not run in a strategy.
dtypes, dims, payloads = (
    st.sampled_from(list(DTYPES.values())),
    st.lists(st.integers(0, 9), max_size=8),
    st.binary(max_size=40),
)
opaque_sections = st.tuples(st.just(SectionKind.OPAQUE), dtypes, dims, payloads, st.integers(0, 65535), names)
dense_kinds = st.sampled_from([SectionKind.KEYS, SectionKind.VALUES])
dense_sections = st.tuples(dense_kinds, dtypes, dims, payloads, st.integers(0, 65535), st.just(""))
Fields = tuple[SectionKind, np.dtype, list[int], bytes, int, str]
several_sections = st.lists(opaque_sections | dense_sections, max_size=4)


def build(fields: Fields) -> Section:
    kind, dtype, shape, payload, layer, name = fields
    return Section(kind, Coding.LOSSLESS, dtype, tuple(shape), payload, layer, name)


def fields_of(section: Section) -> Fields:
    assert section.coding == Coding.LOSSLESS
    return (section.kind, section.dtype, list(section.shape), bytes(section.payload), section.layer, section.name)


def small_frame() -> bytes:
    """Two dense sections and an opaque one, all fields in use."""
    dense = [
        RawSection(kind, dtype=1, dims=(1, 1, 1), layer=0, name=b"", payload=struct.pack("<II", 1, 1) + b"ab")
        for kind in (1, 2)
    ]
    opaque = RawSection(dims=(2,), name="ö".encode(), payload=struct.pack("<I", 2) + b"cd")
    return raw_frame([*dense, opaque], n_layers=1, n_kv_heads=1, n_source_tokens=1, first_position=7, lineage=1)


def unpack_or_refuse(frame: bytes, max_source_bytes: int = PLENTY) -> bool:
    """Whether a frame is taken. Any error but the two fails the test."""
    try:
        container.unpack(frame, max_source_bytes)
    except REFUSED:
        return False
    return True


@given(headers, several_sections)
def test_unpack_is_the_inverse_of_pack(header: Header, sections: list[Fields]) -> None:
    unpacked, found = container.unpack(container.pack(header, [build(fields) for fields in sections]), 1 << 80)
    assert unpacked == header
    assert [fields_of(section) for section in found] == sections


@given(headers, several_sections)
def test_a_frame_may_be_a_view(header: Header, sections: list[Fields]) -> None:
    frame = b"before" + container.pack(header, [build(fields) for fields in sections]) + b"after"
    unpacked, found = container.unpack(memoryview(frame)[6:-5], 1 << 80)
    assert unpacked == header
    assert [fields_of(section) for section in found] == sections


def test_the_frame_is_laid_out_as_the_document_says() -> None:
    header = Header(MODEL_ID, BLOCK_HASH, 1, 1, 1, 7, lineage=FidelityKind.COMPACTED)
    dense = struct.pack("<II", 1, 1) + b"ab"
    sections = [
        Section(kind, Coding.LOSSLESS, DTYPES["float16"], (1, 1, 1), dense, layer=0)
        for kind in (SectionKind.KEYS, SectionKind.VALUES)
    ]
    opaque = struct.pack("<I", 2) + b"cd"
    sections.append(Section(SectionKind.OPAQUE, Coding.LOSSLESS, DTYPES["uint8"], (2,), opaque, name="ö"))
    assert container.pack(header, sections) == small_frame()
    assert len(small_frame()) == 168 + 2 * (20 + 12) + (20 + 4 + 2) + 4 + 2 * 10 + 6


def test_the_checksum_is_the_castagnoli_polynomial() -> None:
    assert crc32c(b"123456789") == 0xE3069283  # the check value of the catalogue of CRCs
    frame = container.pack(PLAIN, [])
    assert frame[168:] == struct.pack("<I", crc32c(frame[:168]))


@pytest.mark.parametrize("extra", [b"\0", bytes(4), small_frame()], ids=["byte", "word", "frame"])
def test_bytes_after_the_frame_are_corrupt(extra: bytes) -> None:
    with pytest.raises(CorruptFrameError):
        container.unpack(small_frame() + extra, PLENTY)


def test_bytes_after_the_last_payload_are_corrupt_even_when_frame_bytes_counts_them() -> None:
    extra = RawSection(payload=bytes(5), overrides={"payload_bytes": 4, "crc": crc32c(bytes(4))})
    with pytest.raises(CorruptFrameError):
        container.unpack(raw_frame([extra]), PLENTY)


def test_bytes_after_the_last_record_are_corrupt_even_when_records_bytes_counts_them() -> None:
    with pytest.raises(CorruptFrameError):
        container.unpack(raw_frame([RawSection()], n_sections=0), PLENTY)
    with pytest.raises(CorruptFrameError):
        container.unpack(raw_frame([RawSection(name=b"xy", overrides={"name_bytes": 1})]), PLENTY)


def test_a_frame_cut_anywhere_is_corrupt() -> None:
    frame = small_frame()
    for length in range(len(frame)):
        with pytest.raises(CorruptFrameError):
            container.unpack(frame[:length], PLENTY)


def test_a_frame_cut_anywhere_is_corrupt_even_when_frame_bytes_says_so() -> None:
    frame = small_frame()
    for length in range(168, len(frame)):
        cut = frame[:40] + struct.pack("<Q", length) + frame[48:length]
        records_end = min(168 + 90, length - 4)
        sealed = cut[:records_end] + struct.pack("<I", crc32c(cut[:records_end])) + cut[records_end + 4 :]
        with pytest.raises(CorruptFrameError):
            container.unpack(sealed, PLENTY)


def test_a_frame_with_any_bit_flipped_is_refused() -> None:
    frame = bytearray(small_frame())
    for at in range(len(frame)):
        # Bytes 8 to 11 are version and flags: a reader cannot tell damage there from a frame of tomorrow.
        expected = UnsupportedFrameError if 8 <= at < 12 else CorruptFrameError
        for bit in range(8):
            frame[at] ^= 1 << bit
            with pytest.raises(expected):
                container.unpack(bytes(frame), PLENTY)
            frame[at] ^= 1 << bit
    assert unpack_or_refuse(bytes(frame))


@given(st.integers(0, len(small_frame()) - 1), st.binary(min_size=1, max_size=30))
def test_a_frame_with_any_run_of_bytes_replaced_is_refused(at: int, run: bytes) -> None:
    frame = small_frame()
    damaged = (frame[:at] + run + frame[at + len(run) :])[: len(frame)]
    assert unpack_or_refuse(damaged) == (damaged == frame)


@pytest.mark.parametrize(
    "fields",
    [
        *({"version": n} for n in (0, 2, 256)),
        *({"flags": n} for n in (1, 0x8000)),
        *({"fidelity": n} for n in (0, 4)),
        *({"lineage": n} for n in (0, 4)),
    ],
    ids=str,
)
def test_a_frame_of_another_version_is_unsupported(fields: dict[str, int]) -> None:
    with pytest.raises(UnsupportedFrameError):
        container.unpack(raw_frame(**fields), PLENTY)


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": 0},
        {"kind": 11},
        {"kind": 17},
        {"coding": 0},
        {"coding": 3},
        {"dtype": 0},
        {"dtype": 14},
        {"dtype": 255},
    ],
    ids=str,
)
def test_a_section_of_another_version_is_unsupported(fields: dict[str, int]) -> None:
    with pytest.raises(UnsupportedFrameError):
        container.unpack(raw_frame([RawSection(**fields)]), PLENTY)  # type: ignore[arg-type]


def test_reserved_bits_are_ignored() -> None:
    assert unpack_or_refuse(raw_frame(reserved=0xFFFF))


def test_a_name_that_is_not_utf8_is_corrupt() -> None:
    for name in (b"\xff", b"\xc3", b"\xed\xa0\x80"):
        with pytest.raises(CorruptFrameError):
            container.unpack(raw_frame([RawSection(name=name)]), PLENTY)


@pytest.mark.parametrize("kind", [1, 2])
def test_a_name_on_keys_or_values_is_corrupt(kind: int) -> None:
    section = RawSection(kind, dtype=1, dims=(1, 4, 0), layer=0, name=b"x")
    with pytest.raises(CorruptFrameError):
        container.unpack(raw_frame([section]), PLENTY)


@pytest.mark.parametrize("profile", [b"\xff", b"a\0b", b"\0a", b"caf\xe9"])
def test_a_profile_that_is_not_ascii_with_zeros_behind_is_corrupt(profile: bytes) -> None:
    with pytest.raises(CorruptFrameError):
        container.unpack(raw_frame(fidelity=2, profile=profile), PLENTY)


@pytest.mark.parametrize(
    "fields",
    [{"profile": b"p"}, {"am_ratio": 0.5}, {"am_ratio": float("nan")}, {"fidelity": 2, "am_ratio": 0.5}],
    ids=str,
)
def test_a_field_that_its_fidelity_does_not_have_is_corrupt(fields: dict[str, Any]) -> None:
    with pytest.raises(CorruptFrameError):
        container.unpack(raw_frame(**fields), PLENTY)


def test_sections_are_bounded() -> None:
    assert len(container.unpack(raw_frame([RawSection(name=b"")] * 65_536), PLENTY)[1]) == 65_536
    with pytest.raises(CorruptFrameError):
        container.unpack(raw_frame([RawSection(name=b"")] * 65_537), PLENTY)


def test_bytes_of_records_are_bounded() -> None:
    section = RawSection(name=b"x" * 65_512)
    assert len(section.record()) * 256 == 16 << 20
    assert unpack_or_refuse(raw_frame([section] * 256))
    with pytest.raises(CorruptFrameError):
        container.unpack(raw_frame([*[section] * 255, replace(section, name=b"x" * 65_513)]), PLENTY)


def test_dims_are_bounded() -> None:
    assert unpack_or_refuse(raw_frame([RawSection(dims=(1,) * 8)]))
    for n_dims in (9, 255):
        with pytest.raises(CorruptFrameError):
            container.unpack(raw_frame([RawSection(dims=(1,) * n_dims)]), PLENTY)


def test_source_bytes_are_bounded_over_all_sections() -> None:
    frame = raw_frame([RawSection(dims=(3, 5)), RawSection(dtype=4, dims=(2,)), RawSection(dims=(0, 9))])
    assert unpack_or_refuse(frame, 3 * 5 + 2 * 8)
    with pytest.raises(CorruptFrameError):
        container.unpack(frame, 3 * 5 + 2 * 8 - 1)


def test_shapes_beyond_all_memory_are_corrupt_and_cost_nothing() -> None:
    frame = raw_frame([RawSection(dtype=4, dims=(2**32 - 1,) * 8)] * 3)
    with allocating_at_most(1 << 16), pytest.raises(CorruptFrameError):
        container.unpack(frame, PLENTY)


@pytest.mark.parametrize(
    "overrides",
    [
        {"crc": 1},
        *({"payload_bytes": n} for n in (3, 5, 2**63, 2**64 - 1)),
        *({"name_bytes": n} for n in (0, 2, 65_535)),
        *({"n_dims": n} for n in (0, 2, 8)),
    ],
    ids=str,
)
def test_a_record_that_lies_of_its_sizes_is_corrupt(overrides: dict[str, int]) -> None:
    with pytest.raises(CorruptFrameError):
        container.unpack(raw_frame([RawSection(overrides=overrides)]), PLENTY)


@pytest.mark.parametrize(
    "fields",
    [
        *({"n_sections": n} for n in (0, 2, 65_536, 65_537, 2**32 - 1)),
        *({"frame_bytes": n} for n in (0, 1, 172, 2**63, 2**64 - 1)),
        *({"records_bytes": n} for n in (0, 24, 26, 27, 16 << 20, 2**32 - 1)),
        *({"magic": magic} for magic in (b"\x89KVF\r\n\x1a\r", b"\x09KVF\r\n\x1a\n", bytes(8))),
    ],
    ids=str,
)
def test_a_header_that_lies_of_its_sizes_is_corrupt_and_costs_nothing(fields: dict[str, Any]) -> None:
    frame = raw_frame([RawSection()], **fields)
    with allocating_at_most(1 << 16), pytest.raises(CorruptFrameError):
        container.unpack(frame, PLENTY)


@given(st.binary(max_size=400))
def test_random_bytes_are_no_frame(data: bytes) -> None:
    assert not unpack_or_refuse(data)


@given(st.binary(max_size=400))
def test_random_bytes_behind_a_magic_are_no_frame(data: bytes) -> None:
    assert not unpack_or_refuse(b"\x89KVF\r\n\x1a\n\x01\0\0\0" + data)


def bits(n: int) -> st.SearchStrategy[int]:
    """Numbers of `n` bits, small and extreme ones more often."""
    return st.integers(0, 9) | st.integers(0, 2**n - 1) | st.sampled_from([2 ** (n - 1) - 1, 2 ** (n - 1), 2**n - 1])


def mostly(value: int, n_bits: int) -> st.SearchStrategy[int]:
    """What is right in most frames, so that the checks behind this one are reached."""
    return st.sampled_from([value] * 15) | bits(n_bits)


lying_records = st.fixed_dictionaries(
    {}, optional={"n_dims": bits(8), "name_bytes": bits(16), "payload_bytes": bits(64), "crc": bits(32)}
)
lying_sections = st.builds(
    RawSection,
    kind=st.sampled_from([1, 2, 16, 16]) | bits(8),
    coding=mostly(1, 8),
    dtype=st.integers(1, 13) | bits(8),
    dims=st.lists(bits(32), max_size=10),
    layer=bits(16),
    name=st.binary(max_size=8),
    payload=st.binary(max_size=40),
    overrides=st.just({}) | lying_records,
)
lying_fields = st.fixed_dictionaries(
    {},
    optional={
        "version": mostly(1, 16),
        "flags": mostly(0, 16),
        "fidelity": mostly(3, 8),
        "lineage": mostly(3, 8),
        "reserved": bits(16),
        "n_layers": bits(32),
        "n_kv_heads": bits(32),
        "n_source_tokens": bits(32),
        "n_sections": st.none() | bits(32),
        "first_position": bits(64),
        "frame_bytes": st.none() | bits(64),
        "records_bytes": st.none() | bits(32),
        "am_ratio": st.just(0.0) | st.floats(width=32),
        "profile": st.just(b"") | st.binary(max_size=16),
        "bundle_id": st.binary(max_size=32),
    },
)


@settings(max_examples=500)
@given(st.lists(lying_sections, max_size=4), lying_fields, bits(40))
def test_a_frame_of_random_fields_and_right_checksums_is_taken_or_refused_and_costs_little(
    sections: list[RawSection], fields: dict[str, Any], max_source_bytes: int
) -> None:
    frame = raw_frame(sections, **fields)
    with allocating_at_most(1 << 17):
        unpack_or_refuse(frame, max_source_bytes)


@given(headers, st.lists(opaque_sections, max_size=4))
def test_the_second_reader_finds_the_same_header_and_records(header: Header, sections: list[Fields]) -> None:
    header = replace(header, n_layers=0)
    empty = [
        (kind, dtype, [0, *shape[1:]], bytes(4 * dtype.itemsize), *rest) for kind, dtype, shape, _, *rest in sections
    ]
    found = read_frame(container.pack(header, [build(fields) for fields in empty]))
    for name in ("model_id", "block_hash", "n_layers", "n_kv_heads", "n_source_tokens", "first_position", "lineage"):
        assert found[name] == getattr(header, name)
    f = header.fidelity
    assert (found["fidelity"], found["profile"], found["am_ratio"]) == (f.kind, f.profile, f.am_ratio)
    assert found["bundle_id"] == (f.bundle_id or bytes(32))
    records = [(s["kind"], s["dtype"], list(s["shape"]), s["layer"], s["name"]) for s in found["sections"]]
    assert records == [(kind, dtype.name, shape, *rest) for kind, dtype, shape, _, *rest in empty]
