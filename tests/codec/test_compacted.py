"""Frames of compacted blocks: what comes back, what is refused, and what no reader takes."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from codec.frames import BLOCK_ID, PLENTY
from codec.recipes import Recipe
from compactions import make_compaction, with_compaction
from hypothesis import given
from hypothesis import strategies as st

from kvcached import codec
from kvcached.block import Fidelity, FidelityKind, Fingerprint, KVBlock, LayerSpec, ModelSpec, RopeSpec
from kvcached.codec import compaction, container, exact, lossless, planes
from kvcached.codec.bundle import Bundle
from kvcached.codec.compactor import Compactor
from kvcached.codec.container import Coding, Section, SectionKind
from kvcached.errors import CorruptBundleError, CorruptFrameError, UnsupportedFrameError

N_TOKENS = 64
ROPES = (RopeSpec(8, 1e4), RopeSpec(4, 5e5, interleaved=True))
LAYERS = tuple(LayerSpec(n_query_heads=16, n_kv_heads=8, key_dim=8, value_dim=6, rope=rope) for rope in ROPES)
SPEC = ModelSpec(Fingerprint(weights="w"), "float16", N_TOKENS, LAYERS)


def a_bundle(**how: float) -> Bundle:
    return with_compaction(Recipe(SPEC, layers_per_group=1).bundle(), **how)


BUNDLE = a_bundle()
COMPACTOR = BUNDLE.compactor("x8", 4.0)


def a_block(first_position: int = 256, seed: int = 0, **opaque: np.ndarray) -> KVBlock:
    rng = np.random.default_rng(seed)
    tensors = {side: rng.standard_normal(shape).astype(np.float16) for side, shape in SPEC.dense_shapes().items()}
    return KVBlock.dense({**tensors, **opaque}, N_TOKENS, first_position)


def compacted(first_position: int = 256, coder: Compactor = COMPACTOR, **opaque: np.ndarray) -> KVBlock:
    return codec.compact(a_block(first_position, **opaque), coder).block


def frame_of(block: KVBlock, coder: Compactor = COMPACTOR) -> bytes:
    return codec.encode(BLOCK_ID, block, coder=coder)


def decoded(frame: bytes, coder: Compactor = COMPACTOR) -> KVBlock:
    return codec.decode(BLOCK_ID, frame, PLENTY, coder)


@pytest.mark.parametrize("first_position", [0, 2, 4, 64, 1 << 20])
@pytest.mark.parametrize("ratio", [1.5, 2.0, 3.0, 4.0, 8.0])
def test_a_compacted_block_comes_back_to_within_its_steps(first_position: int, ratio: float) -> None:
    coder = BUNDLE.compactor("x8", ratio)
    block = compacted(first_position, coder, state=np.arange(5))
    back = decoded(frame_of(block, coder), coder)
    for name in ("positions", "bias", "lengths"):
        np.testing.assert_array_equal(getattr(back, name), getattr(block, name))
    for side in ("keys", "values"):
        found, exact = (getattr(b, side).astype(np.float32) for b in (back, block))
        np.testing.assert_allclose(found, exact, atol=0.01)
    assert (back.first_position, back.n_source_tokens) == (first_position, N_TOKENS)
    np.testing.assert_array_equal(back.opaque["state"], np.arange(5))
    assert back.lengths.sum() == round(16 * N_TOKENS / ratio)


def test_sinks_come_back_bit_for_bit() -> None:
    block = compacted(0)
    back = decoded(frame_of(block))
    for rows in compaction.rows_of_heads(block):
        sinks = slice(rows.start, rows.start + planes.N_SINKS)
        for side in ("keys", "values"):
            np.testing.assert_array_equal(getattr(back, side)[sinks], getattr(block, side)[sinks])


def test_without_its_biases_a_block_reads_otherwise() -> None:
    block, queries = a_block(), codec.reservoir(a_block(), COMPACTOR)
    back = decoded(frame_of(compacted()))
    metric = COMPACTOR.output_metric
    mass, _ = compaction.errors(back, block, SPEC, queries, metric)
    bare, _ = compaction.errors(replace(back, bias=np.zeros_like(back.bias)), block, SPEC, queries, metric)
    assert bare > 1.1 * mass


def test_what_is_fitted_is_fitted_to_keys_as_they_come_back() -> None:
    coarse = a_bundle(step=1.5).compactor("x8", 4.0)
    block, queries = a_block(), codec.reservoir(a_block(), coarse)
    picked = compaction.pick(block, SPEC, coarse.budgets, queries)
    unaware = compaction.fit(picked, block, SPEC, queries, picked.keys.astype(np.float32))
    aware = codec.compact(block, coarse).block
    loss = [
        compaction.errors(decoded(frame_of(b, coarse), coarse), block, SPEC, queries, coarse.output_metric)[0]
        for b in (aware, unaware)
    ]
    assert loss[0] < loss[1]


def test_the_same_block_gives_the_same_frame() -> None:
    assert frame_of(compacted()) == frame_of(compacted())


def test_errors_are_those_on_queries_that_were_not_fitted_to() -> None:
    queries = np.random.default_rng(5).standard_normal((2, 16, 16, 8)).astype(np.float32)
    other = queries.copy()
    other[:, :, ::4] *= 3  # every fourth is held out
    a, b = (codec.compact(a_block(), COMPACTOR, each) for each in (queries, other))
    np.testing.assert_array_equal(a.block.values, b.block.values)
    assert a.output_error != b.output_error


def test_a_block_that_loses_more_than_the_profile_allows_is_not_compacted() -> None:
    strict = a_bundle(bound=1e-6).compactor("x8", 4.0)
    with pytest.raises(codec.LossError, match=r"an output error of .*, the profile allows 1e-06"):
        codec.compact(a_block(), strict)


def test_one_query_is_enough() -> None:
    queries = np.ones((2, 16, 1, 8), np.float32)
    assert np.isfinite(codec.compact(a_block(), COMPACTOR, queries).block.values.astype(np.float32)).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_block_or_queries_that_are_not_finite_are_not_compacted(value: float) -> None:
    block = a_block()
    block.values[3, 2] = value
    with pytest.raises(ValueError, match="values to compact must be finite"):
        codec.compact(block, COMPACTOR)
    queries = np.full((2, 16, 3, 8), value, np.float32)
    with pytest.raises(ValueError, match="queries to compact must be finite"):
        codec.compact(a_block(), COMPACTOR, queries)


def test_blocks_that_are_too_short_for_a_ratio_have_no_compactor() -> None:
    spec = replace(SPEC, block_size=16)
    with pytest.raises(ValueError, match="16 heads of 4 to 16 tokens cannot have 32 together"):
        make_compaction(spec).compactor(spec, Fidelity(FidelityKind.COMPACTED, "x8", 8.0))


def test_a_bundle_without_compaction_has_no_compactor() -> None:
    with pytest.raises(KeyError, match="nothing on compaction"):
        replace(BUNDLE, compaction=None).compactor("x8", 4.0)


def test_heads_that_are_whole_at_an_anchor_are_whole_below_it() -> None:
    for ratio in (1.1, 2.0, 2.5, 4.0):
        assert (BUNDLE.compactor("x8", ratio).budgets.reshape(-1)[:2] == N_TOKENS).all()


def test_a_bundle_that_compacts_goes_through_its_file() -> None:
    back = Bundle.unpack(BUNDLE.pack())
    assert back.bundle_id == BUNDLE.bundle_id
    assert back.outline.compacts
    assert back.bundle_id != replace(BUNDLE, compaction=None).bundle_id
    assert frame_of(compacted(), back.compactor("x8", 4.0)) == frame_of(compacted())


def test_frames_need_the_compactor_that_made_them() -> None:
    frame = frame_of(compacted())
    for other in (None, BUNDLE.compactor("x16", 4.0), BUNDLE.compactor("x8", 2.0), BUNDLE.coder("x8")):
        with pytest.raises(UnsupportedFrameError, match="cannot be read without it"):
            codec.decode(BLOCK_ID, frame, PLENTY, other)


# ---- frames that pass their checksums and are none


KINDS = [
    kind for kind in SectionKind if kind.name in ("KEPT", "BIAS", "KEY_ROWS", "VALUE_ROWS", "SINK_KEYS", "SINK_VALUES")
]


def sections_of(frame: bytes) -> list[Section]:
    return container.unpack(frame, PLENTY)[1]


def repacked(change: Callable[[list[Section]], Sequence[Section]], first_position: int = 256) -> bytes:
    frame = frame_of(compacted(first_position))
    return container.pack(container.unpack(frame, PLENTY)[0], list(change(sections_of(frame))))


def without(kind: SectionKind) -> Callable[[list[Section]], Sequence[Section]]:
    return lambda sections: [s for s in sections if s.kind != kind]


def with_tensor(
    kind: SectionKind, change: Callable[[np.ndarray], np.ndarray]
) -> Callable[[list[Section]], Sequence[Section]]:
    def changed(sections: list[Section]) -> Sequence[Section]:
        return [
            exact.section_of(kind, change(lossless.decode(s.payload, s.dtype, s.shape).copy()), 1)
            if s.kind == kind
            else s
            for s in sections
        ]

    return changed


def _set(index: tuple[int, ...], value: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array[index] = value
        return array

    return change


def _moved(head: int, token: int) -> Callable[[np.ndarray], np.ndarray]:
    """A head loses a token that head 5 gains: as many rows as before."""

    def change(array: np.ndarray) -> np.ndarray:
        bits = np.unpackbits(array, axis=1)
        bits[head, token] = 0
        bits[5, np.argmin(bits[5])] = 1
        return np.packbits(bits, axis=1)

    return change


def with_rows(**changes: object) -> Callable[[list[Section]], Sequence[Section]]:
    return lambda sections: [replace(s, **changes) if s.kind == SectionKind.KEY_ROWS else s for s in sections]


def shortened(sections: list[Section]) -> Sequence[Section]:
    rows = next(s for s in sections if s.kind == SectionKind.KEY_ROWS)
    return with_rows(payload=bytes(rows.payload)[:-2])(sections)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        *((without(kind), f"{kind.name} of .* expected, got none") for kind in KINDS),
        (lambda s: [*s, s[0]], "one section of KEPT expected, got more"),
        (with_tensor(SectionKind.KEPT, _moved(0, 9)), "where it is coded beside others all tokens"),
        (with_tensor(SectionKind.KEPT, _moved(3, 0)), "a head keeps one token at least, sinks"),
        (with_tensor(SectionKind.KEPT, _set((3, slice(None)), 255)), "KEY_ROWS of .* rows, as KEPT says, expected"),
        (with_tensor(SectionKind.KEPT, lambda a: a[:, :-1]), "KEPT of uint8"),
        (with_tensor(SectionKind.BIAS, _set((0,), 49)), "a bias of more than 48 steps"),
        (with_tensor(SectionKind.BIAS, _set((0,), -128)), "a bias of more than 48 steps"),
        (with_tensor(SectionKind.BIAS, lambda a: a[:-1]), "BIAS of int8"),
        (shortened, "symbols"),
        (with_rows(layer=0), "all layers expected"),
        (lambda s: [*s, replace(s[0], kind=SectionKind.KEY_PLANE)], "KEY_PLANE does not belong"),
    ],
)  # fmt: skip
def test_a_frame_that_no_encoder_writes_is_corrupt(
    change: Callable[[list[Section]], Sequence[Section]], expected: str
) -> None:
    with pytest.raises(CorruptFrameError, match=expected):
        decoded(repacked(change, first_position=0))


def test_sinks_do_not_belong_into_a_later_block() -> None:
    sinks = [s for s in sections_of(frame_of(compacted(0))) if s.kind == SectionKind.SINK_KEYS]
    with pytest.raises(CorruptFrameError, match="SINK_KEYS does not belong"):
        decoded(repacked(lambda sections: [*sections, *sinks]))


def test_rows_in_another_coding_are_of_another_version() -> None:
    with pytest.raises(UnsupportedFrameError, match="KEY_ROWS of coding TRANSFORM expected"):
        decoded(repacked(with_rows(coding=Coding.LOSSLESS)))


@given(st.data())
def test_any_damage_behind_the_checksums_gives_a_block_or_one_of_two_errors(data: st.DataObject) -> None:
    sections = sections_of(frame_of(compacted(0)))
    index = data.draw(st.integers(0, len(sections) - 1))
    payload = bytearray(sections[index].payload)
    for at in data.draw(st.lists(st.integers(0, len(payload) - 1), max_size=4)):
        payload[at] = data.draw(st.integers(0, 255))
    sections[index] = replace(sections[index], payload=bytes(payload))
    frame = container.pack(container.unpack(frame_of(compacted(0)), PLENTY)[0], sections)
    try:
        block = decoded(frame)
    except (CorruptFrameError, UnsupportedFrameError):
        return
    assert len(block.keys) == len(block.values) == len(block.bias) == block.lengths.sum()


@pytest.mark.parametrize(
    "change",
    [
        {"fractions": np.array([0.5, 0.25, 0.5, 0.75, 1.0], np.float32)},
        {"curves": np.full((2, 8, 5), -1, np.float32)},
        {"queries": np.ones((2, 15, 24, 8), np.float32)},
        {"output_metric": np.ones((2, 8, 5, 5), np.float32)},
        {"anchors": {}},
        {"anchors": {4: make_compaction(SPEC).anchors[4]}},
        {"anchors": {8: replace(make_compaction(SPEC).anchors[8], heads=(*[(h,) for h in range(15)], (14,)))}},
        {"anchors": {8: replace(make_compaction(SPEC).anchors[8], bounds={"x8": np.nan, "x16": 1.0})}},
    ],
)
def test_a_bundle_whose_compaction_makes_no_sense_is_refused(change: dict[str, object]) -> None:
    bad = replace(BUNDLE, compaction=replace(make_compaction(SPEC), **change))
    with pytest.raises((CorruptBundleError, ValueError)):
        Bundle.unpack(bad.pack())
