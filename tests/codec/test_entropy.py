"""Symbols come back whatever they are, cost what they should, and bytes that lie are corrupt."""

import hashlib
import struct
import subprocess
import sys
from contextlib import suppress

import numpy as np
import pytest
from codec.frames import allocating_at_most
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvcached.codec import entropy, rans
from kvcached.errors import CorruptFrameError

N_ROWS, N_COMPONENTS = 256, 512
INT32 = np.iinfo(np.int32)
seeds = st.integers(0, 2**32 - 1)
row_counts = st.integers(0, 70)
scales = st.lists(st.integers(0, entropy.N_SCALES - 1), max_size=12).map(lambda scale: np.array(scale, np.uint8))
STEADY = np.full(8, 30, np.uint8)  # a mean magnitude of 1/2


def laplacian(seed: int, shape: tuple[int, ...], magnitude: object) -> np.ndarray:
    """Symbols of some mean magnitude, or of one for each component."""
    return np.rint(np.random.default_rng(seed).laplace(size=shape) * magnitude).astype(np.int32)


def of_scales(seed: int, n_rows: int, scale_index: np.ndarray) -> np.ndarray:
    """Symbols as the tables expect them, and a few that are anything."""
    rng = np.random.default_rng(seed)
    symbols = laplacian(seed, (n_rows, len(scale_index)), 2.0 ** (scale_index / 3 - 11))
    wild = rng.integers(INT32.min, INT32.max, symbols.shape, np.int32, endpoint=True)
    return np.where(rng.random(symbols.shape) < 0.02, wild, symbols)


def empirical_bits(symbols: np.ndarray) -> float:
    """Entropy in bits per symbol, each component by its own frequencies."""
    total = 0.0
    for column in symbols.T:
        p = np.unique(column, return_counts=True)[1] / len(column)
        total -= float(p @ np.log2(p))
    return total / symbols.shape[1]


@given(seeds, row_counts, scales)
@example(0, 0, STEADY)
@example(0, 70, np.zeros(0, np.uint8))
def test_decode_is_the_inverse_of_encode(seed: int, n_rows: int, scale_index: np.ndarray) -> None:
    symbols = of_scales(seed, n_rows, scale_index)
    restored = entropy.decode(entropy.encode(symbols, scale_index), n_rows, scale_index)
    assert restored.dtype == np.int32
    assert np.array_equal(restored, symbols)


@pytest.mark.parametrize("scale", range(entropy.N_SCALES))
def test_every_table_codes_every_symbol_that_it_reaches_and_escapes_the_others(scale: int) -> None:
    reach = int(entropy.tables().reaches[scale]) + 2 << int(entropy.tables().shifts[scale])
    beyond = [INT32.min, INT32.max, -(2**15), 2**15, *range(-reach, reach + 1)]
    symbols = np.zeros((20 * len(beyond), 1), np.int32)
    symbols[::20, 0] = beyond
    scale_index = np.array([scale], np.uint8)
    stream = entropy.encode(symbols, scale_index)
    assert len(stream) < symbols.nbytes
    assert np.array_equal(entropy.decode(stream, len(symbols), scale_index), symbols)


@settings(max_examples=25)
@given(seeds, row_counts, scales)
@example(1, 70, np.arange(64, dtype=np.uint8))
def test_plain_python_and_compiled_loops_agree_on_every_bit(seed: int, n_rows: int, scale_index: np.ndarray) -> None:
    symbols = of_scales(seed, n_rows, scale_index)
    compiled = entropy.encode(symbols, scale_index)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rans, "compiled", lambda: rans.PLAIN)
        plain = entropy.encode(symbols, scale_index)
        assert np.array_equal(entropy.decode(compiled, n_rows, scale_index), symbols)
    assert plain == compiled


def test_the_order_in_memory_changes_no_bit() -> None:
    symbols = laplacian(0, (64, 8), 1)
    assert entropy.encode(np.asfortranarray(symbols), STEADY) == entropy.encode(symbols, STEADY)


def test_the_tables_are_the_same_for_ever() -> None:
    """Frames on disk are coded with them: if this fails, the change is wrong, not the test."""
    table = entropy.tables()
    integers = b"".join(np.ascontiguousarray(part, "<i8").tobytes() for part in table[:3])
    assert hashlib.sha256(integers).hexdigest() == "97d290805cde2d266096976e184c6ee18f283c990861757a6a94da235fe81619"


def test_a_stream_is_the_same_for_ever() -> None:
    rows, scale_index = np.arange(256, dtype=np.int64)[:, None], np.array([0, 5, 24, 30, 36, 41, 42, 48, 63], np.uint8)
    symbols = ((rows * rows * 7 % 31 % 9 - 4) * np.array([0, 0, 0, 1, 1, 3, 5, 20, 900])).astype(np.int32)
    stream = entropy.encode(symbols, scale_index)
    assert struct.unpack_from("<I", stream, 1)[0] < symbols.size / 4  # it is coded, and some escape
    assert np.array_equal(entropy.decode(stream, 256, scale_index), symbols)
    assert hashlib.sha256(stream).hexdigest() == "508c4a47c5d25383066201af16bda68425e198b8e948f507909ade351aa3689b"


def test_tables_fill_all_slots_and_widen_with_their_index() -> None:
    table = entropy.tables()
    used = np.arange(table.frequencies.shape[1]) <= 2 * table.reaches[:, None] + 1
    assert (table.frequencies.sum(axis=1) == 4096).all()
    assert np.array_equal(table.frequencies > 0, used)
    index = np.arange(table.frequencies.shape[1])
    magnitude = np.abs(index - table.reaches[:, None]) * (used & (index <= 2 * table.reaches[:, None]))
    mean = (table.frequencies * magnitude).sum(axis=1) / 4096 * 2.0**table.shifts
    target = 2.0 ** (np.arange(entropy.N_SCALES) / 3 - 11)
    assert (np.abs(mean / target - 1)[12:] < 0.04).all()
    assert (np.diff(mean) >= 0).all()


def test_every_slot_names_the_symbol_whose_interval_it_is_in() -> None:
    table = entropy.tables()
    for scale in range(entropy.N_SCALES):
        index = (table.slots[scale] & 0xFF).astype(np.int64)
        frequency, offset = (table.slots[scale] >> 20) + 1, table.slots[scale] >> 8 & 0xFFF
        assert np.array_equal(np.bincount(index, minlength=128), table.frequencies[scale])
        assert np.array_equal(table.frequencies[scale][index], frequency)
        assert np.array_equal(table.starts[scale][index] + offset, np.arange(4096))


def test_reciprocals_divide_exactly() -> None:
    table = entropy.tables()
    for frequency, reciprocal in {
        (int(f), int(r)) for f, r in zip(table.frequencies.flat, table.reciprocals.flat, strict=True) if f
    }:
        quotients = np.random.default_rng(frequency).integers(1, (2**31 - 1) // frequency, 1000, endpoint=True)
        for x in (quotients * frequency, quotients * frequency - 1, np.array([0, 2**31 - 1])):
            assert np.array_equal(x * (reciprocal >> 6) >> (reciprocal & 63), x // frequency)


@pytest.mark.parametrize(("top", "decay"), [(3, 60), (8, 150), (100, 150)])
def test_blocks_cost_at_most_5_percent_more_than_their_pooled_entropy(top: float, decay: float) -> None:
    """Scales are fixed on blocks other than those that are coded."""
    magnitude = top * np.exp(-np.arange(N_COMPONENTS) / decay)
    blocks = laplacian(0, (48, N_ROWS, N_COMPONENTS), magnitude)
    scale_index = entropy.choose_scale(blocks[:24].reshape(-1, N_COMPONENTS))
    coded = blocks[24:]
    n_bytes = sum(len(entropy.encode(block, scale_index)) for block in coded)
    assert 8 * n_bytes / coded.size < 1.05 * empirical_bits(coded.reshape(-1, N_COMPONENTS))


@given(seeds, st.floats(0.001, 1000))
def test_no_other_scale_codes_a_component_in_fewer_bytes(seed: int, magnitude: float) -> None:
    symbols = laplacian(seed, (2048, 1), magnitude)
    chosen = entropy.choose_scale(symbols)
    size = len(entropy.encode(symbols, chosen))
    for other in range(entropy.N_SCALES):
        # Final states and the width of escapes vary by some bytes.
        assert size <= len(entropy.encode(symbols, np.array([other], np.uint8))) * 1.01 + 16


@given(seeds, st.sampled_from([1, 2, 4]))
def test_noise_costs_no_more_than_its_own_bytes_and_a_header(seed: int, width: int) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, 64 * 8 * width, np.uint8).view(f"<i{width}")
    symbols = noise.astype(np.int32).reshape(64, 8)
    for scale in (0, 30, 63):
        scale_index = np.full(8, scale, np.uint8)
        stream = entropy.encode(symbols, scale_index)
        assert len(stream) <= noise.nbytes + 5
        assert np.array_equal(entropy.decode(stream, 64, scale_index), symbols)


def test_zeros_cost_next_to_nothing() -> None:
    zeros = np.zeros((N_ROWS, N_COMPONENTS), np.int32)
    scale_index = entropy.choose_scale(zeros)
    assert scale_index.tolist() == [0] * N_COMPONENTS
    assert len(entropy.encode(zeros, scale_index)) < 200


def decoded_or_corrupt(stream: bytes, n_rows: int, scale_index: np.ndarray) -> None:
    """The law for whatever bytes: symbols of the shape that was asked for, or the one error."""
    with suppress(CorruptFrameError):
        assert entropy.decode(stream, n_rows, scale_index).shape == (n_rows, len(scale_index))


@given(st.binary(max_size=600), row_counts, scales)
def test_random_bytes_give_symbols_or_corrupt(stream: bytes, n_rows: int, scale_index: np.ndarray) -> None:
    decoded_or_corrupt(stream, n_rows, scale_index)


@given(st.binary(min_size=128, max_size=600), st.integers(0, 20), row_counts, scales)
def test_random_states_and_words_give_symbols_or_corrupt(
    coded: bytes, n_escapes: int, n_rows: int, scale_index: np.ndarray
) -> None:
    states = (np.frombuffer(coded[:128], "<u4") & 0x7FFFFFFF | 1 << 15).astype("<u4").tobytes()
    stream = struct.pack("<BI", 1, n_escapes) + bytes(n_escapes) + states + coded[128:]
    decoded_or_corrupt(stream, n_rows, scale_index)


STREAM = entropy.encode(laplacian(0, (64, 8), 1), STEADY)


@given(st.integers(0, 8 * len(STREAM) - 1))
def test_a_flipped_bit_gives_symbols_or_corrupt(bit: int) -> None:
    damaged = bytearray(STREAM)
    damaged[bit // 8] ^= 1 << bit % 8
    decoded_or_corrupt(bytes(damaged), 64, STEADY)


@given(st.integers(0, len(STREAM) - 1))
def test_a_stream_that_was_cut_or_grew_is_corrupt(length: int) -> None:
    for stream in (STREAM[:length], STREAM + bytes(length + 1)):
        with pytest.raises(CorruptFrameError):
            entropy.decode(stream, 64, STEADY)


@pytest.mark.parametrize(("n_rows", "n_components"), [(63, 8), (65, 8), (64, 7), (64, 9)])
def test_a_stream_of_another_shape_is_corrupt(n_rows: int, n_components: int) -> None:
    with pytest.raises(CorruptFrameError):
        entropy.decode(STREAM, n_rows, STEADY[:1].repeat(n_components))


@pytest.mark.parametrize("state", [0, 2**15 - 1, 2**31, 2**32 - 1])
def test_a_state_that_coding_cannot_leave_is_corrupt(state: int) -> None:
    at = 5 + STREAM[0] * struct.unpack_from("<I", STREAM, 1)[0]
    with pytest.raises(CorruptFrameError, match="none that coding leaves"):
        entropy.decode(STREAM[:at] + struct.pack("<I", state) + STREAM[at + 4 :], 64, STEADY)


def test_a_header_that_claims_much_costs_no_memory() -> None:
    claims = struct.pack("<BI", 4, 2**32 - 1) + bytes(1000)
    with allocating_at_most(1 << 20), pytest.raises(CorruptFrameError, match="4294967295 escapes"):
        entropy.decode(claims, 64, STEADY)


def test_a_long_stream_of_few_symbols_is_refused_before_it_is_copied() -> None:
    stream = struct.pack("<BI", 1, 0) + bytes(8 << 20)
    with allocating_at_most(1 << 20), pytest.raises(CorruptFrameError, match="512 symbols take"):
        entropy.decode(stream, 64, STEADY)


def test_scales_beyond_the_family_are_refused() -> None:
    beyond = np.array([64], np.uint8)
    with pytest.raises(ValueError, match="below 64, got 64"):
        entropy.encode(np.zeros((1, 1), np.int32), beyond)
    with pytest.raises(ValueError, match="below 64, got 64"):
        entropy.decode(bytes(200), 1, beyond)


def test_importing_the_coder_does_not_import_the_compiler() -> None:
    program = "import sys, kvcached.codec.entropy as e; e.tables(); print('numba' in sys.modules); e.warm()"
    program += "; print('numba' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert run.stdout.split() == ["False", "True"]
