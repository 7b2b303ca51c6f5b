"""COMPACTED frames, right and wrong: both readers find the same, or refuse, and what a frame claims costs little."""

import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from codec.agreement import disagreements, packed, same_rows
from codec.compacting_recipes import (
    Compacting,
    CompactingRecipe,
    compact_text,
    compacting_model,
    compactings,
)
from codec.frames import BLOCK_ID, PLENTY, RawSection, allocating_at_most, raw_frame
from codec.recipes import LINEAR, PARTIAL, Coding, Text
from codec.test_bad_coded import NUMBERS, header_fields, raw_sections, wrong_section
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.bundle_reader import read_bundle
from reference.compacted_reader import read_compacted
from reference.frame_reader import BIAS, KEPT, KEY_ROWS, SINK_KEYS, SINK_VALUES, VALUE_ROWS, Corrupt, Unsupported

from kvcached import codec
from kvcached.block import BlockId, KVBlock
from kvcached.codec import lossless
from kvcached.codec.bundle import Bundle
from kvcached.codec.compactor import Compactor
from kvcached.errors import CorruptFrameError, UnsupportedFrameError

REFUSED = (CorruptFrameError, UnsupportedFrameError)
SPEC = compacting_model()
BUNDLE = CompactingRecipe(SPEC, {2: [(6, 1)], 8: ()}, steep=(1, 3, 6)).bundle()
FILE = BUNDLE.pack()
COMPACTOR = BUNDLE.compactor("x8", 2.0)
BLOCK = compact_text(COMPACTOR, Text(SPEC, 44, 1, opaque=True))
FRAME = codec.encode(BLOCK_ID, BLOCK, coder=COMPACTOR)
EXPECTED = 44 * 8 * 14 * 2  # bytes of keys and values of such a block before compaction


def fields_of(frame: bytes, am_ratio: float) -> dict[str, Any]:
    return header_fields(frame) | {"am_ratio": am_ratio}


SECTIONS, FIELDS = raw_sections(FRAME), fields_of(FRAME, 2.0)


def taken_or_refused(frame: bytes, compactor: Compactor = COMPACTOR, file: bytes = FILE) -> KVBlock | None:
    """Any error but the two fails the test, and so does an answer that the second reader does not share."""
    try:
        block = codec.decode(BLOCK_ID, frame, 2 * EXPECTED, compactor)
    except REFUSED:
        assert_second_reader_refuses(frame, file, compactor)
        return None
    second = read_compacted(frame, file)
    assert same_rows(block, second)
    assert disagreements(packed(block), second) == []
    return block


def assert_second_reader_refuses(frame: bytes, file: bytes, compactor: Compactor) -> None:
    """But for what the caller knows and the reader does not: which block is wanted, how compacted, and how large."""
    try:
        found = read_compacted(frame, file)
    except (Corrupt, Unsupported):
        return
    n_bytes = sum(array.nbytes for array in found["tensors"].values())
    wanted = BlockId(found["model_id"], "", found["block_hash"]) == BLOCK_ID
    same = (found["profile"], found["am_ratio"]) == (compactor.fidelity.profile, compactor.fidelity.am_ratio)
    assert not wanted or not same or n_bytes > EXPECTED


def index_of(kind: int) -> int:
    return [section.kind for section in SECTIONS].index(kind)


def frame_with(kind: int, **fields: Any) -> bytes:
    """The section of a kind with other fields."""
    sections = list(SECTIONS)
    sections[index_of(kind)] = replace(sections[index_of(kind)], **fields)
    return raw_frame(sections, **FIELDS)


def assert_corrupt(frame: bytes, n_bytes: int = 1 << 20) -> None:
    with allocating_at_most(n_bytes), pytest.raises(CorruptFrameError):
        codec.decode(BLOCK_ID, frame, 2 * EXPECTED, COMPACTOR)
    assert_second_reader_refuses(frame, FILE, COMPACTOR)


# ---- blocks of all kinds


@settings(max_examples=60, deadline=None)
@given(compactings())
def test_both_readers_find_the_same_in_any_compacted_block(made: Compacting) -> None:
    bundle = made.recipe.bundle()
    file, compactor = bundle.pack(), bundle.compactor(made.profile, made.ratio)
    assert Bundle.unpack(file).bundle_id == read_bundle(file)["id"] == bundle.bundle_id
    block = compact_text(compactor, made.text)
    frame = codec.encode(BLOCK_ID, block, coder=compactor)
    found, second = codec.decode(BLOCK_ID, frame, PLENTY, compactor), read_compacted(frame, file)
    assert same_rows(block, second)
    assert same_rows(found, second)
    assert disagreements(packed(found), second) == []


def test_a_ratio_a_little_above_an_anchor_takes_that_anchor_and_above_all_there_is_none() -> None:
    ratio = float(np.float32(8.000001))
    frame = codec.encode(
        BLOCK_ID, BLOCK, coder=replace(COMPACTOR, fidelity=replace(COMPACTOR.fidelity, am_ratio=ratio))
    )
    at_8 = BUNDLE.compactor("x8", ratio)
    assert ratio > 8
    assert [plane.heads for plane in at_8.planes] == [(head,) for head in range(8)]
    with pytest.raises(CorruptFrameError):  # it was coded with the planes of another
        codec.decode(BLOCK_ID, frame, PLENTY, at_8)
    with pytest.raises(Corrupt):
        read_compacted(frame, FILE)


# ---- one thing wrong


def test_the_tests_start_from_a_frame_that_is_taken() -> None:
    assert raw_frame(SECTIONS, **FIELDS) == FRAME
    assert [section.kind for section in SECTIONS] == [7, 8, 3, 9, 4, 10, 16, 16]
    assert taken_or_refused(FRAME) is not None


def test_sections_may_come_in_any_order() -> None:
    found = taken_or_refused(raw_frame(SECTIONS[::-1], **FIELDS))
    assert found is not None
    assert found.keys.tobytes() == codec.decode(BLOCK_ID, FRAME, PLENTY, COMPACTOR).keys.tobytes()


@pytest.mark.parametrize("missing", range(6))
def test_a_missing_section_is_corrupt(missing: int) -> None:
    assert_corrupt(raw_frame(SECTIONS[:missing] + SECTIONS[missing + 1 :], **FIELDS))


@pytest.mark.parametrize("twice", range(8))
def test_a_section_that_is_there_twice_is_corrupt(twice: int) -> None:
    assert_corrupt(raw_frame([*SECTIONS, SECTIONS[twice]], **FIELDS))


KINDS = (KEPT, BIAS, SINK_KEYS, SINK_VALUES, KEY_ROWS, VALUE_ROWS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fields", [{"layer": 0}, {"layer": 65_534}, {"dtype": 2}, {"dtype": 3}, {"name": b"x"}])
def test_a_section_of_another_layer_or_dtype_or_with_a_name_is_corrupt(kind: int, fields: dict[str, Any]) -> None:
    assert_corrupt(frame_with(kind, **fields))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dims", [(), (0,), (1, 1, 1), (2**32 - 1, 1), (2**32 - 1, 0), (0, 2**32 - 1)])
def test_a_section_of_another_shape_is_corrupt_and_costs_nothing(kind: int, dims: Sequence[int]) -> None:
    assert_corrupt(frame_with(kind, dims=dims))


@pytest.mark.parametrize(
    "fields",
    [
        *({"n_layers": n} for n in (0, 1, 3, 2**32 - 1)),
        *({"n_kv_heads": n} for n in (0, 1, 5, 2**32 - 1)),
        *({"n_source_tokens": n} for n in (0, 40, 41, 49, 2**32 - 1)),
        *({"first_position": n} for n in (0, 2, 4, 2**31 - 44, 2**31, 2**64 - 1)),
    ],
    ids=str,
)
def test_a_header_that_does_not_fit_the_sections_or_the_model_is_corrupt(fields: dict[str, Any]) -> None:
    assert_corrupt(raw_frame(SECTIONS, **FIELDS | fields))


@pytest.mark.parametrize("am_ratio", [0.0, -2.0, 0.5, 3.0, 8.5, 1e30, np.inf, np.nan])
def test_a_frame_of_another_ratio_is_unsupported(am_ratio: float) -> None:
    frame = raw_frame(SECTIONS, **FIELDS | {"am_ratio": am_ratio})
    with pytest.raises(UnsupportedFrameError):
        codec.decode(BLOCK_ID, frame, PLENTY, COMPACTOR)
    with pytest.raises((Corrupt, Unsupported)):  # at 3 there is an anchor, of other planes
        read_compacted(frame, FILE)


@pytest.mark.parametrize("n_tokens", [1 << 16, 1 << 28])
def test_tokens_that_cost_a_frame_nothing_cost_its_reader_nothing(n_tokens: int) -> None:
    """KEPT takes a small part of the 16 MiB that are expected; its rows would take hundreds of times as much."""
    bits = np.full((8, n_tokens // 8), 255, np.uint8)
    small = lossless.encode(bits[:, : min(n_tokens, 1 << 20) // 8], 1)
    sections = list(SECTIONS)
    sections[index_of(KEPT)] = replace(SECTIONS[0], dims=bits.shape, payload=small)
    frame = raw_frame(sections, **FIELDS | {"n_source_tokens": n_tokens})
    assert len(frame) < 8192
    with allocating_at_most(1 << 20), pytest.raises(CorruptFrameError):
        codec.decode(BLOCK_ID, frame, 16 << 20, COMPACTOR)


@pytest.mark.parametrize("kind", [KEPT, BIAS, SINK_KEYS, SINK_VALUES])
def test_a_decompression_bomb_is_corrupt_and_costs_nothing(kind: int) -> None:
    claim = bytes.fromhex("28b52ffd e0") + (1 << 40).to_bytes(8, "little") + b"\x01\x00\x00"
    n_planes = 1 if kind in (KEPT, BIAS) else 2
    assert_corrupt(frame_with(kind, payload=len(claim).to_bytes(4, "little") + bytes(4 * (n_planes - 1)) + claim))


@pytest.mark.parametrize("kind", [KEY_ROWS, VALUE_ROWS])
@pytest.mark.parametrize(
    "payload", [b"", b"\x01", b"\x01\xff\xff\xff\xff", b"\x03\0\0\0\0", bytes(133), b"\x01\0\0\0\0" + bytes(1 << 20)]
)
def test_a_stream_that_lies_is_corrupt_and_costs_nothing(kind: int, payload: bytes) -> None:
    assert_corrupt(frame_with(kind, payload=payload), 3 << 20)


# ---- fuzz: a frame made wrong by a few random changes, under right checksums


def a_target(recipe: CompactingRecipe, profile: str, ratio: float, text: Text) -> tuple[Compactor, bytes, bytes]:
    bundle = recipe.bundle()
    compactor = bundle.compactor(profile, ratio)
    return compactor, bundle.pack(), codec.encode(BLOCK_ID, compact_text(compactor, text), coder=compactor)


def targets() -> list[tuple[Compactor, bytes, bytes]]:
    """Frames to begin with: whole heads beside others, once led; heads alone, streams that escape all, nothing kept."""
    made = [(COMPACTOR, FILE, FRAME)]
    for n, (coding, ratio, first) in enumerate(
        [(Coding(0.02, 0.3), 8.0, 0), (Coding(1.0, 0.0, scale=0), 4.0, 1 << 20), (Coding(dropped=1.0), 1.5, 64)]
    ):
        spec = compacting_model([LINEAR, PARTIAL], "bfloat16", n_heads=2, n_query_heads=0, n_tokens=40)
        recipe = CompactingRecipe(spec, {8: ()}, {"x16": coding}, steep=(2,), seed=n)
        made.append(a_target(recipe, "x16", ratio, Text(spec, 40, first, seed=n)))
    spec = compacting_model([PARTIAL, LINEAR], n_heads=3, n_query_heads=0, n_tokens=40)
    recipe = CompactingRecipe(spec, {2: [(4, 2), (0, 1)], 8: ()}, seed=3)
    return [*made, a_target(recipe, "x8", 1.25, Text(spec, 40, 0, seed=3))]


TARGETS = targets()


def mutated(seed: int) -> tuple[Compactor, bytes, bytes]:
    """A frame with one or two things wrong. The same for ever for a seed and a target."""
    rng = np.random.default_rng(seed)
    compactor, file, frame = TARGETS[seed % len(TARGETS)]
    sections, fields = raw_sections(frame), fields_of(frame, compactor.fidelity.am_ratio)
    for _ in range(rng.integers(1, 3)):
        kind = rng.integers(10)
        if kind == 0:
            sizes = ["n_layers", "n_kv_heads", "n_source_tokens", "first_position"]
            name = str(rng.choice([*sizes, "lineage", "fidelity"]))
            fields[name] = int(rng.choice(NUMBERS)) % (2**32 if name in sizes else 256)
        elif kind == 1:
            sections = [sections[i] for i in rng.permutation(len(sections))[: rng.integers(1, len(sections) + 1)]]
        elif kind == 2:
            sections.append(sections[rng.integers(len(sections))])
        else:
            at = int(rng.integers(len(sections)))
            wrong = wrong_bits if sections[at].kind in (KEPT, BIAS) and kind < 7 else wrong_section
            sections[at] = wrong(rng, sections[at])
    return compactor, file, raw_frame(sections, **fields)


def wrong_bits(rng: np.random.Generator, section: RawSection) -> RawSection:
    """Other tokens, or other biases, under a payload that is right."""
    dtype = np.dtype(np.uint8 if section.kind == KEPT else np.int8)
    try:
        array = lossless.decode(section.payload, dtype, tuple(section.dims)).copy()
    except CorruptFrameError:  # it is wrong already
        return section
    if array.size:
        bits = array.reshape(-1).view(np.uint8)
        bits[rng.integers(len(bits))] ^= 1 << int(rng.integers(8))
    return replace(section, payload=lossless.encode(array, 1))


def assert_lawful(seed: int) -> bool:
    """Whether the frame of a seed is taken."""
    compactor, file, frame = mutated(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with allocating_at_most(1 << 19), suppress(*REFUSED):
            codec.decode(BLOCK_ID, frame, 2 * EXPECTED, compactor)
    return taken_or_refused(frame, compactor, file) is not None


def test_frames_with_a_few_things_wrong_are_taken_or_refused_by_both_readers_and_cost_little() -> None:
    taken = sum(assert_lawful(seed) for seed in range(300))
    assert 15 < taken < 285  # both happen: the changes are neither too small nor too coarse


@pytest.mark.slow
def test_many_frames_with_a_few_things_wrong_are_taken_or_refused_by_both_readers_and_cost_little() -> None:
    for seed in range(300, 3000):
        assert_lawful(seed)


@given(st.sampled_from([KEY_ROWS, VALUE_ROWS, KEPT, BIAS]), st.binary(max_size=300))
def test_random_payloads_are_taken_or_refused_by_both_readers(kind: int, payload: bytes) -> None:
    taken_or_refused(frame_with(kind, payload=payload))


@given(st.integers(0, len(FRAME) - 1), st.integers(1, 255))
def test_a_damaged_frame_is_refused_or_the_same_block(at: int, change: int) -> None:
    damaged = FRAME[:at] + bytes([FRAME[at] ^ change]) + FRAME[at + 1 :]
    with pytest.raises(REFUSED):
        codec.decode(BLOCK_ID, damaged, PLENTY, COMPACTOR)
    with pytest.raises((Corrupt, Unsupported)):
        read_compacted(damaged, FILE)
