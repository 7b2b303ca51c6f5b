"""Blocks to frames and back, and frames with right checksums that no encoder writes."""

from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
import pytest
from codec.frames import (
    BLOCK_ID,
    DENSE_DTYPES,
    PLENTY,
    RawSection,
    Wire,
    allocating_at_most,
    filled,
    raw_frame,
    special_floats,
    tensors_of,
    wires,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.frame_reader import Corrupt, Unsupported, read_frame
from support import dense_tensors, same_tensors, tiny_spec

from kvcached import codec
from kvcached.block import BlockId, FidelityKind, KVBlock
from kvcached.codec import container, lossless
from kvcached.codec.container import Coding, Header, Section, SectionKind
from kvcached.errors import CorruptFrameError, UnsupportedFrameError
from kvcached_client.tensors import DTYPES

KEYS, VALUES, OPAQUE = SectionKind.KEYS, SectionKind.VALUES, SectionKind.OPAQUE
DTYPE_NAMES = {1: "float16", 2: "bfloat16", 3: "float32", 4: "float64", 5: "int8", 9: "uint8"}
HEADS, TOKENS, DIM = 2, 3, 5


def small_block(seed: int = 0) -> KVBlock:
    return KVBlock.dense(dense_tensors(tiny_spec(), seed), n_tokens=4, first_position=8)


def identical(a: KVBlock, b: KVBlock) -> bool:
    """In every bit of every field."""
    rows = ("keys", "values", "positions", "bias", "lengths")
    return (
        same_tensors({name: getattr(a, name) for name in rows}, {name: getattr(b, name) for name in rows})
        and same_tensors(dict(a.opaque), dict(b.opaque))
        and (a.first_position, a.n_source_tokens) == (b.first_position, b.n_source_tokens)
    )


def round_trip(block: KVBlock, zstd_level: int = 1) -> KVBlock:
    return codec.decode(BLOCK_ID, codec.encode(BLOCK_ID, block, zstd_level=zstd_level), block.nbytes)


@given(wires(), st.integers(1, 5))
def test_decode_is_the_inverse_of_encode(wire: Wire, zstd_level: int) -> None:
    block = wire.block()
    assert identical(round_trip(block, zstd_level), block)


@pytest.mark.parametrize("dtype", DENSE_DTYPES)
@pytest.mark.parametrize("dims", [(8, 8), (1, 16), (16, 1), (192, 128)])
def test_dense_blocks_of_every_dtype_and_head_dims_come_back(dtype: str, dims: tuple[int, int]) -> None:
    keys, values = (filled(DTYPES[dtype], (3, 2, 16, dim), seed=dim) for dim in dims)
    block = KVBlock.dense({"keys": keys, "values": values}, n_tokens=16, first_position=32)
    decoded = round_trip(block)
    assert identical(decoded, block)
    assert same_tensors(decoded.to_tensors(), {"keys": keys, "values": values})


@pytest.mark.parametrize("dtype", DENSE_DTYPES)
def test_nan_and_infinity_come_back_bit_for_bit(dtype: str) -> None:
    rows = np.broadcast_to(special_floats(DTYPES[dtype]), (2, 2, 4, 12)).copy()
    block = KVBlock.dense({"keys": rows, "values": rows[..., ::-1].copy()}, n_tokens=4, first_position=0)
    assert identical(round_trip(block), block)


def test_opaque_tensors_of_every_dtype_come_back_beside_dense_ones() -> None:
    opaque = {
        f"layer/{i}/{name}": filled(dtype, (3, 0, 2)[i % 2 :], i) for i, (name, dtype) in enumerate(DTYPES.items())
    }
    block = KVBlock.dense({**dense_tensors(tiny_spec(), seed=1), **opaque, "größe": np.array(7, np.int64)}, 4, 0)
    assert identical(round_trip(block), block)


def test_a_block_without_dense_layers_comes_back() -> None:
    block = KVBlock.dense({"state": filled(DTYPES["float32"], (4, 4), seed=2)}, n_tokens=64, first_position=128)
    assert identical(round_trip(block), block)


@pytest.mark.parametrize("lineage", FidelityKind)
def test_the_frame_says_what_its_prefix_was_worth(lineage: FidelityKind) -> None:
    frame = codec.encode(BLOCK_ID, small_block(), lineage=lineage)
    assert container.unpack(frame, PLENTY)[0].lineage == lineage
    assert identical(codec.decode(BLOCK_ID, frame, PLENTY), small_block())


def test_the_lineage_is_exact_unless_told() -> None:
    assert container.unpack(codec.encode(BLOCK_ID, small_block()), PLENTY)[0].lineage == FidelityKind.EXACT


@given(wires(), st.integers(1, 5))
def test_encoding_is_deterministic(wire: Wire, zstd_level: int) -> None:
    copies = Wire({name: array.copy() for name, array in wire.tensors.items()}, wire.n_tokens, wire.first_position)
    frames = {codec.encode(BLOCK_ID, w.block(), zstd_level=zstd_level) for w in (wire, wire, copies)}
    assert len(frames) == 1


def test_the_zstd_level_reaches_dense_and_opaque_tensors() -> None:
    rows = np.tile(np.arange(3000, dtype=np.float32) % 700, 4).reshape(1, 1, 4, 3000)
    for tensors in ({"keys": rows, "values": rows}, {"state": rows}):
        block = KVBlock.dense(tensors, n_tokens=4, first_position=0)
        assert len({codec.encode(BLOCK_ID, block, zstd_level=level) for level in (1, 5)}) == 2


def test_a_decoded_block_does_not_change_with_the_buffer_it_was_read_from() -> None:
    buffer = bytearray(codec.encode(BLOCK_ID, small_block()))
    decoded = codec.decode(BLOCK_ID, memoryview(buffer), PLENTY)
    buffer[:] = bytes(len(buffer))
    assert identical(decoded, small_block())


@pytest.mark.parametrize(
    "other",
    [BlockId(BLOCK_ID.model_id, "", bytes(32)), BlockId(bytes(32), "", BLOCK_ID.block_hash)],
    ids=["block", "model"],
)
def test_the_frame_of_another_block_or_model_is_refused(other: BlockId) -> None:
    frame = codec.encode(BLOCK_ID, small_block())
    with pytest.raises(CorruptFrameError):
        codec.decode(other, frame, PLENTY)


def test_a_frame_of_more_source_bytes_than_expected_is_corrupt() -> None:
    block = small_block()
    frame = codec.encode(BLOCK_ID, block)
    assert identical(codec.decode(BLOCK_ID, frame, block.nbytes), block)
    with pytest.raises(CorruptFrameError):
        codec.decode(BLOCK_ID, frame, block.nbytes - 1)


@given(wires(), st.data())
def test_a_damaged_frame_is_refused(wire: Wire, data: st.DataObject) -> None:
    frame = bytearray(codec.encode(BLOCK_ID, wire.block()))
    at = data.draw(st.integers(0, len(frame) - 1))
    frame[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises((CorruptFrameError, UnsupportedFrameError)):
        codec.decode(BLOCK_ID, bytes(frame), PLENTY)
    with pytest.raises((Corrupt, Unsupported)):
        read_frame(bytes(frame))


@pytest.mark.parametrize("fidelity", [FidelityKind.CODED, FidelityKind.COMPACTED])
def test_a_frame_that_is_not_exact_is_unsupported(fidelity: FidelityKind) -> None:
    with pytest.raises(UnsupportedFrameError):
        codec.decode(BLOCK_ID, raw_frame(fidelity=fidelity), PLENTY)


@given(wires(), st.sampled_from(FidelityKind), st.integers(1, 5))
def test_the_second_reader_agrees_on_every_field_and_array(wire: Wire, lineage: FidelityKind, zstd_level: int) -> None:
    frame = codec.encode(BLOCK_ID, wire.block(), lineage=lineage, zstd_level=zstd_level)
    second = read_frame(frame)
    decoded = codec.decode(BLOCK_ID, frame, PLENTY)
    n_layers, n_kv_heads = decoded.lengths.shape
    sections = second.pop("sections")
    assert second.pop("records_bytes") < len(frame)
    assert second == {
        "magic": b"\x89KVF\r\n\x1a\n",
        "version": 1,
        "flags": 0,
        "fidelity": FidelityKind.EXACT,
        "lineage": lineage,
        "reserved": 0,
        "n_layers": n_layers,
        "n_kv_heads": n_kv_heads,
        "n_source_tokens": decoded.n_source_tokens,
        "n_sections": len(sections),
        "first_position": decoded.first_position,
        "frame_bytes": len(frame),
        "am_ratio": 0.0,
        "profile": "",
        "model_id": BLOCK_ID.model_id,
        "block_hash": BLOCK_ID.block_hash,
        "bundle_id": bytes(32),
    }
    assert same_tensors(tensors_of(sections), decoded.to_tensors())


def dense(
    kind: SectionKind, layer: int, shape: tuple[int, ...] = (HEADS, TOKENS, DIM), dtype: str = "float16"
) -> Section:
    rows = filled(DTYPES[dtype], shape, seed=layer)
    return Section(kind, Coding.LOSSLESS, rows.dtype, shape, lossless.encode(rows, 1), layer)


def opaque(name: str, shape: tuple[int, ...] = (2,)) -> Section:
    array = filled(DTYPES["int32"], shape, seed=9)
    return Section(OPAQUE, Coding.LOSSLESS, array.dtype, shape, lossless.encode(array, 1), name=name)


def two_layers() -> list[Section]:
    return [dense(kind, layer) for kind in (KEYS, VALUES) for layer in (0, 1)]


def decode_sections(sections: list[Section], **changes: Any) -> KVBlock:
    """A frame with right checksums of two layers, read."""
    header = Header(BLOCK_ID.model_id, BLOCK_ID.block_hash, 2, HEADS, TOKENS, first_position=0)
    return codec.decode(BLOCK_ID, container.pack(replace(header, **changes), sections), PLENTY)


def test_sections_as_described_are_a_block() -> None:
    block = decode_sections([*two_layers(), opaque("state")])
    assert block.lengths.tolist() == [[TOKENS] * HEADS] * 2
    assert set(block.opaque) == {"state"}


@pytest.mark.parametrize("missing", range(4))
def test_a_missing_layer_is_corrupt(missing: int) -> None:
    sections = two_layers()
    del sections[missing]
    with pytest.raises(CorruptFrameError):
        decode_sections(sections)


@pytest.mark.parametrize("n_layers", [0, 1, 3, 65_536, 2**32 - 1])
def test_another_number_of_layers_than_the_header_says_is_corrupt(n_layers: int) -> None:
    with allocating_at_most(1 << 17), pytest.raises(CorruptFrameError):
        decode_sections(two_layers(), n_layers=n_layers)


@pytest.mark.parametrize("layers", [(1, 0), (0, 0), (1, 1), (1, 2), (0, 65_535)])
@pytest.mark.parametrize("kind", [KEYS, VALUES])
def test_layers_out_of_order_are_corrupt(kind: SectionKind, layers: tuple[int, int]) -> None:
    other = VALUES if kind == KEYS else KEYS
    sections = [*(dense(kind, layer) for layer in layers), dense(other, 0), dense(other, 1)]
    with pytest.raises(CorruptFrameError):
        decode_sections(sections)


@pytest.mark.parametrize(
    "shape",
    [
        *((), (DIM,), (TOKENS, DIM), (HEADS, TOKENS), (HEADS, TOKENS, DIM, 1), (1, HEADS, TOKENS, DIM)),
        *((HEADS + 1, TOKENS, DIM), (HEADS, TOKENS - 1, DIM), (TOKENS, HEADS, DIM), (HEADS, TOKENS, DIM + 1)),
        *((0, TOKENS, DIM), (HEADS, 0, DIM), (HEADS, TOKENS, 0)),
    ],
    ids=str,
)
@pytest.mark.parametrize("place", range(4))
def test_a_layer_of_another_shape_is_corrupt(place: int, shape: tuple[int, ...]) -> None:
    sections = two_layers()
    sections[place] = dense(sections[place].kind, sections[place].layer, shape)
    with pytest.raises(CorruptFrameError):
        decode_sections(sections)


@pytest.mark.parametrize(
    "fields", [{"n_kv_heads": 3}, {"n_source_tokens": 4}, {"n_kv_heads": 3, "n_source_tokens": 2}], ids=str
)
def test_a_header_of_another_shape_is_corrupt(fields: dict[str, int]) -> None:
    with pytest.raises(CorruptFrameError):
        decode_sections(two_layers(), **fields)


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int16"])
def test_a_layer_of_another_dtype_is_corrupt(dtype: str, place: int) -> None:
    sections = two_layers()
    sections[place] = dense(sections[place].kind, sections[place].layer, dtype=dtype)
    with pytest.raises(CorruptFrameError):
        decode_sections(sections)


@pytest.mark.parametrize(("keys", "values"), [("float16", "bfloat16"), ("float32", "float16")])
def test_keys_and_values_of_different_dtypes_are_corrupt(keys: str, values: str) -> None:
    sections = [dense(kind, layer, dtype=dtype) for kind, dtype in ((KEYS, keys), (VALUES, values)) for layer in (0, 1)]
    with pytest.raises(CorruptFrameError):
        decode_sections(sections)


@pytest.mark.parametrize("dtype", sorted(set(DTYPES) - set(DENSE_DTYPES)))
def test_keys_and_values_that_no_model_has_are_corrupt(dtype: str) -> None:
    with pytest.raises(CorruptFrameError):
        decode_sections([dense(kind, layer, dtype=dtype) for kind in (KEYS, VALUES) for layer in (0, 1)])


def test_two_opaque_tensors_of_one_name_are_corrupt() -> None:
    with pytest.raises(CorruptFrameError):
        decode_sections([*two_layers(), opaque("state"), opaque("other"), opaque("state")])


@pytest.mark.parametrize("name", ["keys", "values"])
@pytest.mark.parametrize("shape", [(), (2,), (2, HEADS, TOKENS, DIM)], ids=str)
def test_an_opaque_tensor_called_as_a_dense_one_is_corrupt(shape: tuple[int, ...], name: str) -> None:
    with pytest.raises(CorruptFrameError):
        decode_sections([*two_layers(), opaque(name, shape)])
    with pytest.raises(CorruptFrameError):
        decode_sections([opaque(name, shape)], n_layers=0, n_kv_heads=0)


@pytest.mark.parametrize("first_position", [2**31 - TOKENS, 2**31, 2**32, 2**63, 2**64 - 1])
def test_positions_that_no_block_can_have_are_corrupt(first_position: int) -> None:
    with pytest.raises(CorruptFrameError):
        decode_sections(two_layers(), first_position=first_position)
    with pytest.raises(CorruptFrameError):
        decode_sections([opaque("state")], n_layers=0, n_kv_heads=0, first_position=first_position)


def test_the_last_positions_that_a_block_can_have_are_read() -> None:
    first = 2**31 - 1 - TOKENS
    assert decode_sections(two_layers(), first_position=first).positions[:TOKENS].tolist() == [
        first,
        first + 1,
        first + 2,
    ]


def test_tokens_without_dense_layers_cost_nothing() -> None:
    with allocating_at_most(1 << 17):
        block = decode_sections([opaque("state")], n_layers=0, n_kv_heads=0, n_source_tokens=1 << 24)
    assert block.n_source_tokens == 1 << 24


@pytest.mark.parametrize(
    "shape", [(1, 1 << 24, 0), (1 << 12, 1 << 12, 0), (2**32 - 1, 1, 0), (0, 1 << 24, DIM), (0, 2**32 - 1, 1)], ids=str
)
def test_dense_layers_of_nothing_are_corrupt_and_cost_nothing(shape: tuple[int, int, int]) -> None:
    sections = [dense(kind, layer, shape) for kind in (KEYS, VALUES) for layer in (0, 1)]
    with allocating_at_most(1 << 17), pytest.raises(CorruptFrameError):
        decode_sections(sections, n_kv_heads=shape[0], n_source_tokens=shape[1])


def test_a_dense_layer_that_is_a_bomb_is_corrupt_and_costs_nothing() -> None:
    huge = (HEADS, TOKENS, 2**32 - 1)
    sections = [replace(section, shape=huge) for section in two_layers()]
    with allocating_at_most(1 << 17), pytest.raises(CorruptFrameError):
        decode_sections(sections)


few, sizes = st.integers(0, 3), st.sampled_from([1, 2, 3])
small_or_huge = few | st.sampled_from([1 << 16, 1 << 24, 2**31 - 1, 2**32 - 1])
section_lies = st.one_of(
    st.fixed_dictionaries({"kind": st.sampled_from([1, 2, 16])}),
    st.fixed_dictionaries({"dtype": st.sampled_from(sorted(DTYPE_NAMES))}),
    st.fixed_dictionaries({"dims": st.lists(few, max_size=4) | st.lists(small_or_huge, max_size=8)}),
    st.fixed_dictionaries({"layer": few | st.just(65_535)}),
    st.fixed_dictionaries({"name": st.sampled_from([b"", b"a", b"b", b"keys", b"values"])}),
)
header_lies = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("n_layers", "n_kv_heads", "n_source_tokens"), small_or_huge),
        "first_position": small_or_huge | st.integers(2**32, 2**64 - 1),
        "fidelity": st.integers(1, 3),
    },
)


def with_payload(section: RawSection) -> RawSection:
    """The section with zeros for a payload that fits its shape, unless that would be large."""
    name, n_values = DTYPE_NAMES[section.dtype], prod(section.dims)
    payload = lossless.encode(np.zeros(n_values, DTYPES[name]), 1) if n_values <= 4096 else bytes(40)
    return replace(section, payload=payload)


@st.composite
def almost_right_frames(draw: st.DrawFn) -> tuple[list[RawSection], dict[str, int]]:
    """Sections without payloads, and header of a block, with a few lies: what random fields never come near."""
    n_layers, heads, tokens, dtype = draw(st.integers(0, 2)), draw(sizes), draw(sizes), draw(sizes)
    shapes = {kind: (heads, tokens, draw(sizes)) for kind in (1, 2)}
    layers = [(kind, layer) for kind in (1, 2) for layer in range(n_layers)]
    sections = [RawSection(kind, 1, dtype, shapes[kind], layer, b"") for kind, layer in layers]
    sections += [RawSection(name=name) for name in draw(st.sampled_from([[], [b"a"], [b"a", b"b"]]))]
    for index in draw(st.lists(st.integers(0, 5), max_size=2)):
        if index < len(sections):
            sections[index] = replace(sections[index], **draw(section_lies))
    if not draw(st.integers(0, 5)):
        sections = draw(st.permutations(sections))[: draw(st.integers(0, 6))]
    right = {"n_layers": n_layers, "n_kv_heads": heads, "n_source_tokens": tokens}
    return sections, {**right, **(draw(header_lies) if not draw(st.integers(0, 3)) else {})}


@settings(max_examples=500)
@given(almost_right_frames())
def test_a_frame_of_wrong_fields_and_right_checksums_is_a_block_or_refused_and_costs_little(
    fields: tuple[list[RawSection], dict[str, int]],
) -> None:
    frame = raw_frame([with_payload(section) for section in fields[0]], **fields[1])
    with allocating_at_most(1 << 18):
        try:
            block = codec.decode(BLOCK_ID, frame, 1 << 14)
        except (CorruptFrameError, UnsupportedFrameError):
            return
    assert block.is_dense
    assert same_tensors(tensors_of(read_frame(frame)["sections"]), block.to_tensors())


@given(st.binary(max_size=400))
def test_random_bytes_are_refused_by_both_readers(data: bytes) -> None:
    with pytest.raises((CorruptFrameError, UnsupportedFrameError)):
        codec.decode(BLOCK_ID, data, PLENTY)
    with pytest.raises((Corrupt, Unsupported)):
        read_frame(data)
