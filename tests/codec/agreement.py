"""Whether the second readers of coded frames find what the codec finds, to the tolerance. Nothing here asserts."""

from typing import Any

import numpy as np

from kvcached.block import KVBlock


def disagreements(tensors: dict[str, np.ndarray], second: dict[str, Any]) -> list[str]:
    """Names of tensors that are not what a second reader found: see read_coded and read_compacted."""
    missing = tensors.keys() ^ second["tensors"].keys()
    return sorted(missing | {name for name in tensors.keys() - missing if not _same(name, tensors[name], second)})


def packed(block: KVBlock) -> dict[str, np.ndarray]:
    """Tensors of a block, keys and values as rows, whether it was compacted or not."""
    return {"keys": block.keys, "values": block.values, **block.opaque}


def same_rows(block: KVBlock, second: dict[str, Any]) -> bool:
    """Whether both readers found the same tokens of each head, with the same biases."""
    return all(
        np.array_equal(getattr(block, name).reshape(-1), second[name]) for name in ("lengths", "positions", "bias")
    )


def _same(name: str, array: np.ndarray, second: dict[str, Any]) -> bool:
    other = second["tensors"][name]
    if (array.dtype, array.shape) != (other.dtype, other.shape):
        return False
    if name not in second["exact"]:
        return array.tobytes() == other.tobytes()
    bits = np.dtype(f"u{array.itemsize}")  # of sinks, which may be NaN
    same_bits = np.ascontiguousarray(array).view(bits) == np.ascontiguousarray(other).view(bits)
    with np.errstate(invalid="ignore"):  # infinity less infinity, likewise
        distance = np.abs(array.astype(np.float64) - second["exact"][name])
    return bool((same_bits | (distance <= second["tolerance"][name])).all())
