"""Byte planes: every bit comes back, and a payload that `encode` did not make is corrupt."""

import struct

import numpy as np
import pytest
import zstandard
from codec.frames import allocating_at_most, arrays, filled, seeds, shapes, special_floats, zstd_claim
from hypothesis import given
from hypothesis import strategies as st

from kvcached.codec import lossless
from kvcached.errors import CorruptFrameError
from kvcached_client.tensors import DTYPES

UINT8, UINT16 = DTYPES["uint8"], DTYPES["uint16"]
FLOATS = [name for name in DTYPES if "float" in name]
levels = st.integers(1, 5)


def identical(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def payload_of(*planes: bytes, sizes: tuple[int, ...] = ()) -> bytes:
    """Planes behind a table that says their lengths, or `sizes`."""
    table = sizes or tuple(len(plane) for plane in planes)
    return struct.pack(f"<{len(table)}I", *table) + b"".join(planes)


@given(arrays(), levels)
def test_decode_is_the_inverse_of_encode(array: np.ndarray, level: int) -> None:
    assert identical(lossless.decode(lossless.encode(array, level), array.dtype, array.shape), array)


@pytest.mark.parametrize("name", DTYPES)
@given(shapes, seeds, levels)
def test_every_dtype_comes_back_in_every_shape(name: str, shape: tuple[int, ...], seed: int, level: int) -> None:
    array = filled(DTYPES[name], shape, seed)
    assert identical(lossless.decode(lossless.encode(array, level), array.dtype, array.shape), array)


@pytest.mark.parametrize("level", range(1, 6))
@pytest.mark.parametrize("name", DTYPES)
def test_planes_that_repeat_shrink_and_come_back(name: str, level: int) -> None:
    array = filled(DTYPES[name], (64, 9), seed=1, n_values=2)
    payload = lossless.encode(array, level)
    assert len(payload) < array.nbytes / 2
    assert identical(lossless.decode(payload, array.dtype, array.shape), array)


@pytest.mark.parametrize("level", range(1, 6))
@pytest.mark.parametrize("repeats", [1, 100])
@pytest.mark.parametrize("name", FLOATS)
def test_nan_payloads_infinities_and_negative_zeros_keep_their_bits(name: str, repeats: int, level: int) -> None:
    array = np.tile(special_floats(DTYPES[name]), repeats)
    with np.errstate(invalid="ignore"):  # signalling NaNs are among them
        assert np.isnan(array).sum() == 6 * repeats
    assert identical(lossless.decode(lossless.encode(array, level), array.dtype, array.shape), array)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 5), (0,) * 8, (1,) * 8])
@pytest.mark.parametrize("name", DTYPES)
def test_scalars_and_empty_tensors_come_back(name: str, shape: tuple[int, ...]) -> None:
    array = filled(DTYPES[name], shape, seed=2)
    assert identical(lossless.decode(lossless.encode(array, 1), array.dtype, shape), array)


def test_tensors_that_are_not_contiguous_come_back() -> None:
    base = filled(DTYPES["float32"], (6, 7, 8), seed=3)
    for view in (base.T, base[::2, 1:, ::-1], base[:, :1], np.broadcast_to(base[0, 0, 0], (3, 4))):
        assert identical(lossless.decode(lossless.encode(view, 1), view.dtype, view.shape), view)


def test_a_payload_may_be_a_view() -> None:
    array = filled(DTYPES["bfloat16"], (5, 40), seed=4, n_values=2)
    payload = b"before" + lossless.encode(array, 1) + b"after"
    assert identical(lossless.decode(memoryview(payload)[6:-5], array.dtype, array.shape), array)


def test_encoding_is_deterministic() -> None:
    array = filled(DTYPES["float16"], (50, 20), seed=5, n_values=7)
    assert lossless.encode(array, 3) == lossless.encode(array.copy(), 3)


def test_a_plane_that_does_not_shrink_is_stored_as_it_is() -> None:
    array = filled(UINT16, (100,), seed=6)
    low, high = array.tobytes()[::2], array.tobytes()[1::2]
    assert lossless.encode(array, 5) == payload_of(low, high)


@pytest.mark.parametrize("n_values", [1, 2, 256])
@pytest.mark.parametrize("name", ["uint8", "bfloat16", "float64"])
def test_a_payload_cut_anywhere_is_corrupt(name: str, n_values: int) -> None:
    array = filled(DTYPES[name], (3, 10), seed=7, n_values=n_values)
    payload = lossless.encode(array, 1)
    for length in range(len(payload)):
        with pytest.raises(CorruptFrameError):
            lossless.decode(payload[:length], array.dtype, array.shape)


def test_bytes_after_the_last_plane_are_corrupt() -> None:
    array = filled(UINT16, (3, 10), seed=8)
    with pytest.raises(CorruptFrameError):
        lossless.decode(lossless.encode(array, 1) + b"\0", array.dtype, array.shape)


@given(st.sampled_from([1, 2, 256]), st.lists(st.integers(0, 2**32 - 1), min_size=4, max_size=4))
def test_a_length_table_of_other_numbers_is_corrupt(n_values: int, sizes: list[int]) -> None:
    array = filled(DTYPES["float32"], (2, 30), seed=9, n_values=n_values)
    payload = lossless.encode(array, 1)
    wrong = struct.pack("<4I", *sizes) + payload[16:]
    if wrong != payload:
        with pytest.raises(CorruptFrameError):
            lossless.decode(wrong, array.dtype, array.shape)


@given(st.sampled_from([1, 256]), st.integers(0, 3), st.integers(0, 3), st.integers(1, 60))
def test_a_length_table_that_moves_bytes_between_planes_is_corrupt(
    n_values: int, giver: int, taker: int, n_bytes: int
) -> None:
    array = filled(DTYPES["float32"], (2, 30), seed=10, n_values=n_values)
    payload = lossless.encode(array, 1)
    sizes = list(struct.unpack_from("<4I", payload))
    moved = min(n_bytes, sizes[giver])
    sizes[giver] -= moved
    sizes[taker] += moved
    wrong = struct.pack("<4I", *sizes) + payload[16:]
    if giver != taker:
        with pytest.raises(CorruptFrameError):
            lossless.decode(wrong, array.dtype, array.shape)


def test_length_tables_whose_sum_wraps_around_are_corrupt() -> None:
    planes = bytes(8)
    for sizes in ((2**32 - 1, 9), (2**31, 2**31 + 8), (2**32 - 4, 12)):
        with pytest.raises(CorruptFrameError):
            lossless.decode(payload_of(planes, sizes=sizes), UINT16, (4,))


@pytest.mark.parametrize("claimed", [0, 99, 101, 2**20, 2**40, 2**63, 2**64 - 2, 2**64 - 1])
def test_a_plane_that_claims_another_size_is_corrupt_before_it_is_allocated(claimed: int) -> None:
    payload = payload_of(zstd_claim(claimed))
    with allocating_at_most(1 << 16), pytest.raises(CorruptFrameError):
        lossless.decode(payload, UINT8, (100,))


def test_a_real_decompression_bomb_is_corrupt_and_stays_packed() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(64 << 20))
    assert len(bomb) < 10_000
    with allocating_at_most(1 << 20), pytest.raises(CorruptFrameError):
        lossless.decode(payload_of(bomb), UINT8, (100_000,))


def test_a_plane_that_claims_the_right_size_and_holds_more_or_less_is_corrupt() -> None:
    nothing = b"\x01\x00\x00"
    repeats_a_byte_131072_times = (1 | 1 << 1 | 131072 << 3).to_bytes(3, "little") + b"\0"
    for blocks in (nothing, repeats_a_byte_131072_times, b""):
        with allocating_at_most(1 << 16), pytest.raises(CorruptFrameError):
            lossless.decode(payload_of(zstd_claim(100, blocks)), UINT8, (100,))


def test_a_plane_that_does_not_say_its_size_is_corrupt() -> None:
    stream = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(100))
    with pytest.raises(CorruptFrameError):
        lossless.decode(payload_of(stream), UINT8, (100,))


@pytest.mark.parametrize(
    "extra", [b"\0", zstd_claim(0), zstandard.ZstdCompressor().compress(bytes(100))], ids=["byte", "empty", "frame"]
)
def test_a_plane_with_bytes_after_its_zstd_frame_is_corrupt(extra: bytes) -> None:
    stream = zstandard.ZstdCompressor().compress(bytes(100))
    with pytest.raises(CorruptFrameError):
        lossless.decode(payload_of(stream + extra), UINT8, (100,))


def test_a_plane_that_needs_a_dictionary_is_corrupt() -> None:
    dictionary = zstandard.ZstdCompressionDict(bytes(range(200)), dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    stream = zstandard.ZstdCompressor(dict_data=dictionary).compress(bytes(range(150)))
    with pytest.raises(CorruptFrameError):
        lossless.decode(payload_of(stream), UINT8, (150,))


@pytest.mark.parametrize("shape", [(0, 2**32 - 1, 2**32 - 1, 2**32 - 1), (2**32 - 1,) * 7 + (0,)])
def test_an_empty_tensor_of_a_shape_that_no_array_can_have_is_corrupt(shape: tuple[int, ...]) -> None:
    with pytest.raises(CorruptFrameError):
        lossless.decode(payload_of(b"", b""), UINT16, shape)


@given(st.binary(max_size=64), st.sampled_from(list(DTYPES.values())), shapes)
def test_random_bytes_are_a_tensor_or_corrupt(payload: bytes, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    try:
        array = lossless.decode(payload, dtype, shape)
    except CorruptFrameError:
        return
    assert (array.dtype, array.shape) == (dtype, shape)


@given(st.data(), st.sampled_from([1, 2, 256]))
def test_a_damaged_payload_is_a_tensor_or_corrupt(data: st.DataObject, n_values: int) -> None:
    payload = bytearray(lossless.encode(filled(UINT16, (50,), seed=11, n_values=n_values), 1))
    payload[data.draw(st.integers(0, len(payload) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        array = lossless.decode(bytes(payload), UINT16, (50,))
    except CorruptFrameError:
        return
    assert (array.dtype, array.shape) == (UINT16, (50,))
