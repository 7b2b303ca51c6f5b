"""Exact tensors to bytes and back: byte planes, each through zstd.

    payload := n_bytes:u32[itemsize]  plane*      one plane for each byte of an element, least significant first

A plane as long as the tensor has elements is raw; a shorter one is a zstd frame. Splitting floats by byte puts signs
and exponents, which repeat, apart from mantissas, which do not. Rotating the sign away and ordering by channel were
measured on real caches and gain nothing (docs/decisions/0002-lossless.md).
"""

from math import prod

import numpy as np
import zstandard
from jaxtyping import Shaped

from kvcached.errors import CorruptFrameError


def encode(array: Shaped[np.ndarray, "..."], level: int) -> bytes:
    """The payload of a tensor of any shape and dtype; `level` is zstd's."""
    planes = np.ascontiguousarray(array).reshape(-1).view(np.uint8).reshape(array.size, array.itemsize).T
    streams = [_compress(np.ascontiguousarray(plane).data, level) for plane in planes]
    sizes = np.array([len(stream) for stream in streams], "<u4")
    return b"".join((sizes.data, *streams))


def decode(payload: bytes | memoryview, dtype: np.dtype, shape: tuple[int, ...]) -> Shaped[np.ndarray, "..."]:
    """Inverse of `encode`. Allocates what dtype and shape say: the caller has bounded them.

    Raises:
        CorruptFrameError: the payload is not what `encode` makes of such a tensor.
    """
    n_values, n_planes = prod(shape), dtype.itemsize
    if len(payload) < 4 * n_planes:
        raise CorruptFrameError(f"a tensor of {n_planes} byte planes needs {4 * n_planes} bytes, got {len(payload)}")
    sizes = np.frombuffer(payload[: 4 * n_planes], "<u4").astype(np.int64)
    if int(sizes.sum()) + 4 * n_planes != len(payload):
        raise CorruptFrameError(f"byte planes of {sizes.tolist()} bytes do not fill a payload of {len(payload)}")
    planes = np.empty((n_values, n_planes), np.uint8)
    start = 4 * n_planes
    for i, size in enumerate(sizes.tolist()):
        planes[:, i] = np.frombuffer(_decompress(payload[start : start + size], n_values), np.uint8)
        start += size
    try:
        return planes.reshape(-1).view(dtype).reshape(shape)
    except ValueError as error:  # a dim of 0 among others so large that NumPy cannot count what they span
        raise CorruptFrameError(f"no array has the shape {shape}: {error}") from None


def _compress(plane: memoryview, level: int) -> bytes | memoryview:
    stream = zstandard.ZstdCompressor(level=level).compress(plane)
    return stream if len(stream) < len(plane) else plane


def _decompress(stream: bytes | memoryview, n_bytes: int) -> bytes | memoryview:
    if len(stream) == n_bytes:
        return stream
    try:
        # The frame's own claim is checked before it is believed: zstd allocates what the frame says.
        claimed = zstandard.frame_content_size(stream)
        if claimed != n_bytes:
            raise CorruptFrameError(f"a byte plane should hold {n_bytes} bytes, its zstd frame says {claimed}")
        return zstandard.ZstdDecompressor().decompress(stream, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CorruptFrameError(f"a byte plane is no zstd frame: {error}") from None
