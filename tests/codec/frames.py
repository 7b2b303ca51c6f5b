"""What the tests of the codec share: arrays and blocks of all kinds, frames from raw fields, a watch on memory."""

import resource
import struct
import sys
import tracemalloc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import crc32c
import numpy as np
from hypothesis import strategies as st

from kvcached.block import BlockId, KVBlock
from kvcached_client.spec import DENSE_DTYPES
from kvcached_client.tensors import DTYPES

MODEL_ID, BLOCK_HASH = bytes(range(32)), bytes(range(100, 132))
BLOCK_ID = BlockId(MODEL_ID, "", BLOCK_HASH)
PLENTY = 1 << 30

_HEADER = struct.Struct("<8sHHBBHIIIIQQIf16s32s32s32s")
_DEFAULTS: dict[str, Any] = {
    "magic": b"\x89KVF\r\n\x1a\n",
    "version": 1,
    "flags": 0,
    "fidelity": 3,
    "lineage": 3,
    "reserved": 0,
    "n_layers": 0,
    "n_kv_heads": 0,
    "n_source_tokens": 4,
    "n_sections": None,  # None: what is right
    "first_position": 0,
    "frame_bytes": None,
    "records_bytes": None,
    "am_ratio": 0.0,
    "profile": b"",
    "model_id": MODEL_ID,
    "block_hash": BLOCK_HASH,
    "bundle_id": bytes(32),
}


@dataclass(frozen=True)
class RawSection:
    """The fields of one record and its payload, right or wrong. None: what is right."""

    kind: int = 16
    coding: int = 1
    dtype: int = 9
    dims: Sequence[int] = (0,)
    layer: int = 0xFFFF
    name: bytes = b"x"
    payload: bytes = bytes(4)
    overrides: Mapping[str, int] = field(default_factory=dict)

    def record(self) -> bytes:
        right = {
            "n_dims": len(self.dims),
            "name_bytes": len(self.name),
            "payload_bytes": len(self.payload),
            "crc": crc32c.crc32c(self.payload),
        }
        f = {**right, **self.overrides}
        fixed = struct.pack("<BBBBHH", self.kind, self.coding, self.dtype, f["n_dims"], self.layer, f["name_bytes"])
        sizes = struct.pack("<QI", f["payload_bytes"], f["crc"])
        return fixed + sizes + struct.pack(f"<{len(self.dims)}I", *self.dims) + self.name


def raw_frame(sections: Sequence[RawSection] = (), **fields: Any) -> bytes:
    """A frame whose checksums are right, whatever its fields say."""
    records = b"".join(section.record() for section in sections)
    payloads = b"".join(section.payload for section in sections)
    right = {
        "n_sections": len(sections),
        "frame_bytes": _HEADER.size + len(records) + 4 + len(payloads),
        "records_bytes": len(records),
    }
    values = {**_DEFAULTS, **right, **{name: value for name, value in fields.items() if value is not None}}
    head = _HEADER.pack(*values.values()) + records
    return head + struct.pack("<I", crc32c.crc32c(head)) + payloads


def zstd_claim(n_bytes: int, blocks: bytes = b"\x01\x00\x00") -> bytes:
    """A zstd frame that says it holds `n_bytes`, and holds `blocks`: one last block of nothing unless told."""
    return bytes.fromhex("28b52ffd e0") + struct.pack("<Q", n_bytes) + blocks


@contextmanager
def allocating_at_most(n_bytes: int) -> Iterator[None]:
    """Asserts it of Python's and NumPy's memory; far beyond, the system refuses, so that a bomb harms one test only."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux":
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limit = used + n_bytes + (256 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit if soft == resource.RLIM_INFINITY else min(limit, soft), hard))
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert peak <= n_bytes, f"{peak} bytes were allocated, at most {n_bytes} are fair"


def filled(dtype: np.dtype, shape: tuple[int, ...], seed: int, n_values: int = 256) -> np.ndarray:
    """An array of random bytes below `n_values`: any bit pattern, NaN payloads included, unless fewer are asked for."""
    n_values = min(n_values, 2) if dtype == np.bool_ else n_values
    n_bytes = prod(shape) * dtype.itemsize
    return np.random.default_rng(seed).integers(0, n_values, n_bytes, np.uint8).view(dtype).reshape(shape)


def special_floats(dtype: np.dtype) -> np.ndarray:
    """Zeros and infinities of both signs, and NaNs that are quiet, signalling, negative and with payload bits."""
    bits = np.dtype(f"uint{8 * dtype.itemsize}")
    infinity = int(np.array([np.inf], dtype).view(bits)[0])
    sign = 1 << (8 * dtype.itemsize - 1)
    patterns = [0, 1, infinity, infinity + 1, infinity + 5, sign - 1]
    return np.array(patterns + [sign | pattern for pattern in patterns], bits).view(dtype)


seeds = st.integers(0, 2**32 - 1)
shapes = st.lists(st.integers(0, 4), max_size=8).map(tuple).filter(lambda shape: prod(shape) <= 4096)


def arrays(
    dtypes: st.SearchStrategy[np.dtype] | None = None, shape: st.SearchStrategy[tuple[int, ...]] = shapes
) -> st.SearchStrategy[np.ndarray]:
    """Arrays of any dtype, some of them compressible."""
    dtypes = dtypes if dtypes is not None else st.sampled_from(list(DTYPES.values()))
    return st.builds(filled, dtypes, shape, seeds, st.sampled_from([1, 2, 256]))


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
opaque_tensors = st.dictionaries(names.filter(lambda name: name not in ("keys", "values")), arrays(), max_size=3)


@dataclass(frozen=True)
class Wire:
    """What KVBlock.dense takes. The block itself is built in the test: run-time type checks may not run in a strategy,
    because they draw random numbers of their own."""

    tensors: Mapping[str, np.ndarray]
    n_tokens: int
    first_position: int

    def block(self) -> KVBlock:
        return KVBlock.dense(self.tensors, self.n_tokens, self.first_position)


@st.composite
def wires(draw: st.DrawFn) -> Wire:
    """Dense blocks, with and without opaque tensors, and blocks of opaque tensors alone."""
    n_layers, n_heads, n_tokens = draw(st.integers(0, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 5))
    tensors = {}
    if n_layers:
        dtype = DTYPES[draw(st.sampled_from(DENSE_DTYPES))]
        for name in ("keys", "values"):
            shape = (n_layers, n_heads, n_tokens, draw(st.integers(1, 9)))
            tensors[name] = draw(arrays(st.just(dtype), st.just(shape)))
    tensors |= draw(opaque_tensors)
    return Wire(tensors, n_tokens, draw(st.integers(0, 2**31 - 6)))


def tensors_of(sections: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """The named tensors of what the second reader found."""
    tensors = {}
    for kind, name in ((1, "keys"), (2, "values")):
        layers = [section["array"] for section in sections if section["kind"] == kind]
        if layers:
            tensors[name] = np.stack(layers)
    return tensors | {section["name"]: section["array"] for section in sections if section["kind"] == 16}
