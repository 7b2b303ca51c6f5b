"""Exact tensors to bytes and back: byte planes, each through zstd.

    payload := n_bytes:u32[itemsize]  plane*      one plane for each byte of an element, least significant first

A plane as long as the tensor has elements is raw; a shorter one is a zstd frame. Splitting floats by byte puts signs
and exponents, which repeat, apart from mantissas, which do not. Rotating the sign away and ordering by channel were
measured on real caches and gain nothing (docs/decisions/0002-lossless.md).
"""

from collections.abc import Iterator

import numpy as np
import zstandard
from jaxtyping import Shaped, UInt8

from kvcached.block import fresh
from kvcached.errors import CorruptFrameError

BytePlane = UInt8[np.ndarray, " n_values"]


def encode(array: Shaped[np.ndarray, "..."], level: int) -> bytes:
    """The payload of a tensor of any shape and dtype; `level` is zstd's."""
    zstd = zstandard.ZstdCompressor(level=level)
    streams = [_compress(plane.data, zstd) for plane in _split(array)]
    sizes = np.array([len(stream) for stream in streams], "<u4")
    return b"".join((sizes.data, *streams))


def decode(payload: bytes | memoryview, dtype: np.dtype, shape: tuple[int, ...]) -> Shaped[np.ndarray, "..."]:
    """Inverse of `encode`. Allocates what dtype and shape say: the caller has bounded them.

    Raises:
        CorruptFrameError: the payload is not what `encode` makes of such a tensor.
    """
    sizes = _plane_sizes(payload, dtype.itemsize)
    try:
        array = fresh("", shape, dtype)
    except ValueError as error:  # a dim of 0 among others so large that NumPy cannot count what they span
        raise CorruptFrameError(f"no array has the shape {shape}: {error}") from None
    _join(_planes(payload, sizes, array.size, decompressor()), array)
    return array


def decode_into(
    payload: bytes | memoryview, array: Shaped[np.ndarray, "..."], zstd: zstandard.ZstdDecompressor
) -> None:
    """Inverse of `encode`, into a C-contiguous array; what it holds is undefined if this raises.

    zstd: from `decompressor`.

    Raises:
        CorruptFrameError: the payload is not what `encode` makes of such a tensor.
        ValueError: the array is not C-contiguous.
    """
    if not array.flags.c_contiguous:  # of another one reshape makes a copy, and nothing would arrive
        raise ValueError(f"tensors are decoded into C-contiguous arrays, got strides {array.strides}")
    _join(_planes(payload, _plane_sizes(payload, array.itemsize), array.size, zstd), array)


def decompressor() -> zstandard.ZstdDecompressor:
    """What `decode_into` works with: made once for many tensors, and used by one thread at a time."""
    return zstandard.ZstdDecompressor()


# Elements of two bytes, which are nearly all, are taken apart and put together as integers, four times as fast.


def _split(array: Shaped[np.ndarray, "..."]) -> list[BytePlane]:
    flat = np.ascontiguousarray(array).reshape(-1)
    if array.itemsize == 2:
        numbers = flat.view(np.uint16)
        return [numbers.astype(np.uint8), (numbers >> 8).astype(np.uint8)]
    return [np.ascontiguousarray(plane) for plane in flat.view(np.uint8).reshape(array.size, array.itemsize).T]


def _join(planes: Iterator[BytePlane], array: Shaped[np.ndarray, "..."]) -> None:
    """Inverse of `_split`."""
    flat = array.reshape(-1)
    if array.itemsize == 2:
        numbers, low, high = flat.view(np.uint16), *planes
        np.left_shift(high, 8, out=numbers, dtype=np.uint16)
        np.bitwise_or(numbers, low, out=numbers)
        return
    parts = flat.view(np.uint8).reshape(array.size, array.itemsize)
    for i, plane in enumerate(planes):
        parts[:, i] = plane


def _plane_sizes(payload: bytes | memoryview, n_planes: int) -> list[int]:
    if len(payload) < 4 * n_planes:
        raise CorruptFrameError(f"a tensor of {n_planes} byte planes needs {4 * n_planes} bytes, got {len(payload)}")
    sizes: list[int] = np.frombuffer(payload, "<u4", n_planes).tolist()
    if sum(sizes) + 4 * n_planes != len(payload):
        raise CorruptFrameError(f"byte planes of {sizes} bytes do not fill a payload of {len(payload)}")
    return sizes


def _planes(
    payload: bytes | memoryview, sizes: list[int], n_values: int, zstd: zstandard.ZstdDecompressor
) -> Iterator[BytePlane]:
    view, start = memoryview(payload), 4 * len(sizes)
    for size in sizes:
        yield np.frombuffer(_decompress(view[start : start + size], n_values, zstd), np.uint8)
        start += size


def _compress(plane: memoryview, zstd: zstandard.ZstdCompressor) -> bytes | memoryview:
    stream = zstd.compress(plane)
    return stream if len(stream) < len(plane) else plane


def _decompress(stream: memoryview, n_bytes: int, zstd: zstandard.ZstdDecompressor) -> bytes | memoryview:
    if len(stream) == n_bytes:
        return stream
    try:
        # The frame's own claim is checked before it is believed: zstd allocates what the frame says.
        claimed = zstandard.frame_content_size(stream)
        if claimed != n_bytes:
            raise CorruptFrameError(f"a byte plane should hold {n_bytes} bytes, its zstd frame says {claimed}")
        return zstd.decompress(stream, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CorruptFrameError(f"a byte plane is no zstd frame: {error}") from None
