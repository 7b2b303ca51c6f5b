"""Writes golden frames, all or those named. Run by hand, once for each: `python tests/golden/generate.py [NAME...]`.

Frames stay as they were written: later versions of the codec must read them, and nothing here replaces one.
"""

import hashlib
import json
import struct
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import crc32c
import numpy as np

from kvcached import codec
from kvcached.block import BlockId, FidelityKind, KVBlock
from kvcached.codec import container
from kvcached.codec.container import Header, Section, SectionKind
from kvcached_client.tensors import DTYPES

DIRECTORY = Path(__file__).resolve().parent / "v1"
N_TOKENS, PLENTY = 8, 1 << 30
Tensors = dict[str, np.ndarray]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def block_id(name: str) -> BlockId:
    return BlockId(hashlib.sha256(b"golden model").digest(), "", hashlib.sha256(name.encode()).digest())


def dense(dtype: str, rng: np.random.Generator, key_dim: int = 8, value_dim: int = 8) -> Tensors:
    shapes = {"keys": (2, 2, N_TOKENS, key_dim), "values": (2, 2, N_TOKENS, value_dim)}
    return {name: rng.standard_normal(shape).astype(DTYPES[dtype]) for name, shape in shapes.items()}


def random_bytes(dtype: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    n_bytes = int(np.prod(shape)) * DTYPES[dtype].itemsize
    return rng.integers(0, 2 if dtype == "bool" else 256, n_bytes, np.uint8).view(DTYPES[dtype]).reshape(shape)


def opaque_of_every_dtype(rng: np.random.Generator) -> Tensors:
    shapes = [(), (3,), (0, 4), (2, 3, 2)]
    return {f"state/{name}": random_bytes(name, shapes[i % 4], rng) for i, name in enumerate(sorted(DTYPES))}


def nan_and_infinity(rng: np.random.Generator) -> Tensors:
    tensors = dense("float32", rng)
    bits = tensors["keys"].reshape(-1).view(np.uint32)
    bits[:8] = [0x7FC00000, 0xFFC00001, 0x7F800001, 0xFFFFFFFF, 0x7F800000, 0xFF800000, 0x80000000, 0x00000001]
    return tensors


def compressible(_rng: np.random.Generator) -> Tensors:
    ramp = np.arange(2 * 2 * N_TOKENS * 64, dtype=np.float32).reshape(2, 2, N_TOKENS, 64) // 64
    return {"keys": ramp.astype(np.float16), "values": np.zeros((2, 2, N_TOKENS, 64), np.float16)}


GOOD: dict[str, Callable[[np.random.Generator], Tensors]] = {
    "float16": lambda rng: dense("float16", rng),
    "bfloat16": lambda rng: dense("bfloat16", rng),
    "float32": lambda rng: dense("float32", rng),
    "two-head-dims": lambda rng: dense("bfloat16", rng, key_dim=12, value_dim=5),
    "opaque-of-every-dtype": lambda rng: {**dense("float16", rng), **opaque_of_every_dtype(rng)},
    "no-dense-layers": lambda rng: {"zustand/größe": rng.standard_normal((4, 6))},
    "incompressible": lambda rng: {n: random_bytes("bfloat16", (2, 2, N_TOKENS, 16), rng) for n in ("keys", "values")},
    "compressible": compressible,
    "nan-and-infinity": nan_and_infinity,
}


def good_frame(name: str) -> bytes:
    """Position and lineage differ from frame to frame."""
    number = list(GOOD).index(name)
    tensors = GOOD[name](np.random.default_rng(number))
    block = KVBlock.dense(tensors, N_TOKENS, first_position=number * N_TOKENS)
    return codec.encode(block_id(name), block, lineage=FidelityKind(3 - number % 3), zstd_level=1 + number % 5)


def good_entry(name: str, frame: bytes) -> dict[str, Any]:
    header = container.unpack(frame, PLENTY)[0]
    tensors = codec.decode(block_id(name), frame, PLENTY).to_tensors()
    return {
        "sha256": sha256(frame),
        "model_id": header.model_id.hex(),
        "block_hash": header.block_hash.hex(),
        "lineage": header.lineage.name,
        "first_position": header.first_position,
        "n_source_tokens": header.n_source_tokens,
        "tensors": {
            tensor: {"dtype": array.dtype.name, "shape": array.shape, "sha256": sha256(array.tobytes())}
            for tensor, array in tensors.items()
        },
    }


def sealed(frame: bytes, changes: Mapping[int, bytes]) -> bytes:
    """The frame with other bytes at some offsets of its header and records, under a right checksum."""
    changed = bytearray(frame)
    for at, data in changes.items():
        changed[at : at + len(data)] = data
    (records_bytes,) = struct.unpack_from("<I", changed, 48)
    end = 168 + records_bytes
    struct.pack_into("<I", changed, end, crc32c.crc32c(changed[:end]))
    return bytes(changed)


def flipped(frame: bytes, at: int) -> bytes:
    changed = bytearray(frame)
    changed[at] ^= 0x10
    return bytes(changed)


def repacked(frame: bytes, change: Callable[[Header, list[Section]], list[Section]]) -> bytes:
    header, sections = container.unpack(frame, PLENTY)
    return container.pack(header, change(header, sections))


def with_a_bomb(_header: Header, sections: list[Section]) -> list[Section]:
    """The first plane of the first section is a zstd frame that says it holds a tebibyte."""
    claim = bytes.fromhex("28b52ffd e0") + struct.pack("<Q", 1 << 40) + b"\x01\x00\x00"
    payload = struct.pack("<II", len(claim), 0) + claim
    return [replace(sections[0], payload=payload), *sections[1:]]


def out_of_order(_header: Header, sections: list[Section]) -> list[Section]:
    assert [s.kind for s in sections] == [SectionKind.KEYS] * 2 + [SectionKind.VALUES] * 2
    return [sections[1], sections[0], *sections[2:]]


CORRUPT, UNSUPPORTED = "CorruptFrameError", "UnsupportedFrameError"
FIRST_RECORD = 168
BAD: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "cut": (CORRUPT, lambda frame: frame[:-1]),
    "one-byte-too-many": (CORRUPT, lambda frame: sealed(frame, {40: struct.pack("<Q", len(frame) + 1)}) + b"\0"),
    "newline-translated": (CORRUPT, lambda frame: frame.replace(b"\r\n", b"\n", 1)),
    "flipped-bit-in-header": (CORRUPT, lambda frame: flipped(frame, 32)),
    "flipped-bit-in-payload": (CORRUPT, lambda frame: flipped(frame, -1)),
    "missing-layer": (CORRUPT, lambda frame: repacked(frame, lambda _, sections: sections[:-1])),
    "layers-out-of-order": (CORRUPT, lambda frame: repacked(frame, out_of_order)),
    "decompression-bomb": (CORRUPT, lambda frame: repacked(frame, with_a_bomb)),
    "version-2": (UNSUPPORTED, lambda frame: sealed(frame, {8: struct.pack("<H", 2)})),
    "unknown-flag": (UNSUPPORTED, lambda frame: sealed(frame, {10: struct.pack("<H", 1)})),
    "unknown-fidelity": (UNSUPPORTED, lambda frame: sealed(frame, {12: b"\4"})),
    "unknown-coding": (UNSUPPORTED, lambda frame: sealed(frame, {FIRST_RECORD + 1: b"\2"})),
    "unknown-dtype": (UNSUPPORTED, lambda frame: sealed(frame, {FIRST_RECORD + 2: b"\x0e"})),
}


def bad_frame(name: str) -> bytes:
    tensors = dense("float16", np.random.default_rng(100))
    return BAD[name][1](codec.encode(block_id(name), KVBlock.dense(tensors, N_TOKENS, first_position=16)))


def main(names: list[str], directory: Path = DIRECTORY) -> None:
    """Writes the frames named, or all, and adds them to the manifest."""
    path = directory / "MANIFEST.json"
    manifest = json.loads(path.read_text()) if path.exists() else {"frames": {}, "errors": {}}
    chosen = names or [*GOOD, *BAD]
    if unknown := set(chosen) - {*GOOD, *BAD}:
        sys.exit(f"no such frames: {', '.join(sorted(unknown))}")
    files = {n: directory / f"{n}.kvf" if n in GOOD else directory / "errors" / f"{n}.kvf" for n in chosen}
    taken = [n for n, file in files.items() if file.exists() or n in manifest["frames"] or n in manifest["errors"]]
    if taken:
        sys.exit(f"golden frames are never written again: {', '.join(taken)}")
    (directory / "errors").mkdir(parents=True, exist_ok=True)
    for name, file in files.items():
        frame = good_frame(name) if name in GOOD else bad_frame(name)
        with file.open("xb") as opened:
            opened.write(frame)
        if name in GOOD:
            manifest["frames"][name] = good_entry(name, frame)
        else:
            ids = {"model_id": block_id(name).model_id.hex(), "block_hash": block_id(name).block_hash.hex()}
            manifest["errors"][name] = {"sha256": sha256(frame), "error": BAD[name][0], **ids}
    path.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
