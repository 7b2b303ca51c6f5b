"""Named arrays as one run of bytes, and back: the payload of a block on the wire.

    payload := tensor*      each tensor row-major and little-endian, starting at the next multiple of 64 bytes

The names, dtypes and shapes travel in the header. Reading makes views, not copies, and only after the layout was
checked against the number of bytes that are really there.
"""

from collections.abc import Iterable, Iterator, Mapping
from math import prod

import ml_dtypes
import numpy as np

from ._proto import kvcached_pb2 as pb
from .protocol import CHUNK_BYTES

ALIGNMENT = 64
MAX_TENSORS, MAX_NDIM, MAX_NAME_BYTES, MAX_VALUES = 4096, 8, 128, 1 << 48
_NUMPY = ("float16", "float32", "float64", "bool", *(f"{s}{b}" for s in ("int", "uint") for b in (8, 16, 32, 64)))
DTYPES: dict[str, np.dtype] = {name: np.dtype(name) for name in _NUMPY} | {"bfloat16": np.dtype(ml_dtypes.bfloat16)}

PACKED = ("lengths", "positions", "bias")  # beside keys and values, what a compacted block has and a dense one has not

Arrays = Mapping[str, np.ndarray]


def describe(arrays: Arrays) -> list[pb.Tensor]:
    """The header's list of tensors, in the order of the mapping. Raises ValueError for a dtype without a name."""
    for name, array in arrays.items():
        if array.dtype.name not in DTYPES:
            raise ValueError(f"tensor {name!r} has dtype {array.dtype}, expected one of {', '.join(DTYPES)}")
    return [pb.Tensor(name=name, dtype=array.dtype.name, shape=array.shape) for name, array in arrays.items()]


def problems(tensors: Iterable[pb.Tensor]) -> list[str]:
    """What is wrong with a list of tensors from the wire, in words; empty if `nbytes` and `views` may be called."""
    found: list[str] = []
    names: set[str] = set()
    for n, tensor in enumerate(tensors):
        if n >= MAX_TENSORS:
            return [*found, f"a block has at most {MAX_TENSORS} tensors"]
        if tensor.name in names or not 0 < len(tensor.name.encode()) <= MAX_NAME_BYTES:
            found.append(f"tensor names must be unique and of 1 to {MAX_NAME_BYTES} bytes, got {tensor.name[:128]!r}")
        if tensor.dtype not in DTYPES:
            found.append(f"dtype of {tensor.name!r} must be one of {', '.join(DTYPES)}, got {tensor.dtype[:64]!r}")
        if len(tensor.shape) > MAX_NDIM or prod(max(dim, 1) for dim in tensor.shape) > MAX_VALUES:
            shape = list(tensor.shape[: MAX_NDIM + 1])  # empty tensors too: numpy counts what their other dims span
            found.append(f"{tensor.name!r} may have {MAX_NDIM} dimensions and {MAX_VALUES} values, got {shape}")
        names.add(tensor.name)
    return found


def nbytes(tensors: Iterable[pb.Tensor]) -> int:
    """Bytes of the payload that `tensors` describe."""
    return max((offset + size for offset, size in _layout(tensors)), default=0)


def views(tensors: Iterable[pb.Tensor], payload: np.ndarray) -> dict[str, np.ndarray]:
    """Arrays over `payload` (uint8), without copying. Raises ValueError if it is not exactly of the size described."""
    listed = list(tensors)
    if payload.nbytes != nbytes(listed):
        raise ValueError(f"the tensors described take {nbytes(listed)} bytes, got {payload.nbytes}")
    return {
        tensor.name: payload[offset : offset + size].view(DTYPES[tensor.dtype]).reshape(tuple(tensor.shape))
        for tensor, (offset, size) in zip(listed, _layout(listed), strict=True)
    }


def packed_problems(arrays: Arrays, kv_dtype: str, dense: Mapping[str, tuple[int, ...]], first: int) -> list[str]:
    """What is wrong with the tensors of a compacted block, in words; empty if heads may be cut from its rows.

    dense: shapes of the same model's keys and values, [n_layers, n_kv_heads, n_tokens, dim]; first: position of the
    first token.
    """
    n_layers, n_kv_heads, n_tokens, _ = dense["keys"]
    lengths = arrays.get("lengths", np.empty(0, np.int32))
    n_rows = int(lengths.sum(dtype=np.int64)) if np.issubdtype(lengths.dtype, np.integer) else -1
    expected = {"lengths": ("int32", (n_layers, n_kv_heads)), "positions": ("int32", (n_rows,))}
    expected |= {"bias": ("float32", (n_rows,))}
    expected |= {name: (kv_dtype, (n_rows, shape[-1])) for name, shape in dense.items()}
    got = {name: (arrays[name].dtype.name, arrays[name].shape) for name in expected if name in arrays}
    if got != expected:
        return [f"tensors of a compacted block of this model are {expected}, got {got}"]
    found = []
    if not ((lengths >= 1) & (lengths <= n_tokens)).all():
        found.append(f"heads have 1 to {n_tokens} rows, got {lengths.min()} to {lengths.max()}")
    positions = arrays["positions"].astype(np.int64) - first
    if not ((positions >= 0) & (positions < n_tokens)).all():
        found.append(f"positions are those of {n_tokens} tokens from {first} on, got others")
    if not np.isfinite(arrays["bias"]).all():
        found.append("biases must be finite, got NaN or infinity")
    return found


def pieces(arrays: Arrays, max_bytes: int) -> Iterator[memoryview | bytes]:
    """The payload of `arrays` in pieces of at most `max_bytes`, views where one is contiguous and little-endian."""
    end = 0
    for array in arrays.values():
        if array.nbytes == 0:
            continue
        if padding := -end % ALIGNMENT:
            yield bytes(padding)
        # dtype.name says nothing of the byte order: what is described is an array of DTYPES
        data = np.ascontiguousarray(array, DTYPES[array.dtype.name]).reshape(-1).view(np.uint8).data
        for start in range(0, len(data), max_bytes):
            yield data[start : start + max_bytes]
        end += padding + len(data)


def calibrate_requests(
    start: pb.CalibrateStart, samples: Iterable[tuple[pb.CalibrateHeader, Arrays] | None]
) -> Iterator[pb.CalibrateRequest]:
    """A Calibrate stream: `start`, then for each sample its header, completed from its arrays, and their data.

    The data is in pieces of at most CHUNK_BYTES, the last of which is held back until the next sample is there. A None
    among the samples sends a byte of it: a daemon hangs up on a stream on which nothing comes for too long. Raises
    ValueError for a dtype without a name.
    """
    yield pb.CalibrateRequest(start=start)
    held = b""
    for sample in samples:
        if sample is None:
            if len(held) > 1:
                yield pb.CalibrateRequest(data=held[:1])
                held = held[1:]
            continue
        if held:
            yield pb.CalibrateRequest(data=held)
        header, arrays = sample
        described = describe(arrays)
        whole = pb.CalibrateHeader(tensors=described, data_bytes=nbytes(described))
        whole.MergeFrom(header)
        yield pb.CalibrateRequest(header=whole)
        held = b""
        for piece in pieces(arrays, CHUNK_BYTES):
            if held:
                yield pb.CalibrateRequest(data=held)
            held = bytes(piece)
    if held:
        yield pb.CalibrateRequest(data=held)


def _layout(tensors: Iterable[pb.Tensor]) -> Iterator[tuple[int, int]]:
    """Offset and size of each tensor."""
    end = 0
    for tensor in tensors:
        size = prod(tensor.shape) * DTYPES[tensor.dtype].itemsize
        offset = end + (-end % ALIGNMENT if size else 0)
        yield offset, size
        end = offset + size
