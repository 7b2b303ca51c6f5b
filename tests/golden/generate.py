"""Writes golden frames and bundles. Run by hand, once for each: `python tests/golden/generate.py [NAME...]`.

Files stay as they were written: later versions of the codec must read them, and nothing here replaces one. What a
format that was unknown says of a file in errors/ may become another error when a reader learns it: then the file stays,
its entry in the manifest changes, and a file of a format that is still unknown is added.
"""

import hashlib
import json
import struct
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import crc32c
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from golden import coded, compacted

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


class Golden(NamedTuple):
    """A file to write, the part of the manifest that lists it, and what makes both; files of names before are there."""

    part: str
    path: str
    make: Callable[[str, Path], tuple[bytes, dict[str, Any]]]


def make_good(name: str, _directory: Path) -> tuple[bytes, dict[str, Any]]:
    frame = good_frame(name)
    return frame, good_entry(name, frame)


def make_bad(name: str, _directory: Path) -> tuple[bytes, dict[str, Any]]:
    frame = bad_frame(name)
    return frame, {"sha256": sha256(frame), "error": BAD[name][0], **ids_of(name)}


def make_bundle(name: str, _directory: Path) -> tuple[bytes, dict[str, Any]]:
    file = coded.bundle_file(name)
    return file, coded.bundle_entry(file)


def make_bad_bundle(name: str, directory: Path) -> tuple[bytes, dict[str, Any]]:
    file = coded.bad_bundle(name, bundle_in(directory, "bundle-float16"))
    return file, {"sha256": sha256(file), "error": coded.BAD_BUNDLES[name][0]}


def make_coded(name: str, directory: Path) -> tuple[bytes, dict[str, Any]]:
    """And beside it the frame of what it decodes to."""
    bundle = bundle_in(directory, coded.FRAMES[name].bundle)
    frame = coded.frame(name, block_id(name), bundle)
    decoded = coded.decoded(name, block_id(name), frame, bundle)
    with (directory / "coded" / f"{name}.decoded.kvf").open("xb") as opened:
        opened.write(decoded)
    return frame, {**coded.frame_entry(name, frame, bundle), "decoded_sha256": sha256(decoded)}


def make_bad_coded(name: str, directory: Path) -> tuple[bytes, dict[str, Any]]:
    frame = coded.bad_frame(name, block_id(name), bundle_in(directory, "bundle-float16"))
    named = {"bundle": "bundle-float16", "profile": "x8", **ids_of(name)}
    return frame, {"sha256": sha256(frame), "error": coded.BAD_FRAMES[name][0], **named}


def make_compacting(name: str, _directory: Path) -> tuple[bytes, dict[str, Any]]:
    file = compacted.bundle_file(name)
    return file, coded.bundle_entry(file)


def make_bad_compacting(name: str, directory: Path) -> tuple[bytes, dict[str, Any]]:
    file = compacted.bad_bundle(name, bundle_in(directory, compacted.bad_bundle_of(name)))
    return file, {"sha256": sha256(file), "error": compacted.BAD_BUNDLES[name][0]}


def make_compacted(name: str, directory: Path) -> tuple[bytes, dict[str, Any]]:
    """And beside it the frame of what it decodes to."""
    bundle = bundle_in(directory, compacted.FRAMES[name].bundle)
    frame = compacted.frame(name, block_id(name), bundle)
    decoded = compacted.decoded(name, block_id(name), frame, bundle)
    with (directory / "compacted" / f"{name}.decoded.kvf").open("xb") as opened:
        opened.write(decoded)
    entry = compacted.frame_entry(name, block_id(name), frame, bundle)
    return frame, {**entry, "decoded_sha256": sha256(decoded)}


def make_bad_compacted(name: str, directory: Path) -> tuple[bytes, dict[str, Any]]:
    of = compacted.FRAMES[compacted.bad_frame_of(name)]
    frame = compacted.bad_frame(name, block_id(name), bundle_in(directory, of.bundle))
    named = {"bundle": of.bundle, "profile": of.profile, "am_ratio": of.am_ratio, **ids_of(name)}
    return frame, {"sha256": sha256(frame), "error": compacted.BAD_FRAMES[name][0], **named}


def bundle_in(directory: Path, name: str) -> bytes:
    return (directory / "bundles" / f"{name}.safetensors").read_bytes()


def ids_of(name: str) -> dict[str, str]:
    return {"model_id": block_id(name).model_id.hex(), "block_hash": block_id(name).block_hash.hex()}


# Bundles come before the frames that were coded with them.
FILES: dict[str, Golden] = {
    **{name: Golden("frames", f"{name}.kvf", make_good) for name in GOOD},
    **{name: Golden("errors", f"errors/{name}.kvf", make_bad) for name in BAD},
    **{name: Golden("bundles", f"bundles/{name}.safetensors", make_bundle) for name in coded.RECIPES},
    **{name: Golden("bundle_errors", f"errors/{name}.safetensors", make_bad_bundle) for name in coded.BAD_BUNDLES},
    **{name: Golden("coded", f"coded/{name}.kvf", make_coded) for name in coded.FRAMES},
    **{name: Golden("coded_errors", f"errors/{name}.kvf", make_bad_coded) for name in coded.BAD_FRAMES},
    **{name: Golden("bundles", f"bundles/{name}.safetensors", make_compacting) for name in compacted.RECIPES},
    **{
        name: Golden("bundle_errors", f"errors/{name}.safetensors", make_bad_compacting)
        for name in compacted.BAD_BUNDLES
    },
    **{name: Golden("compacted", f"compacted/{name}.kvf", make_compacted) for name in compacted.FRAMES},
    **{name: Golden("compacted_errors", f"errors/{name}.kvf", make_bad_compacted) for name in compacted.BAD_FRAMES},
}


def main(names: list[str], directory: Path = DIRECTORY) -> None:
    """Writes the files named, or all, and adds them to the manifest."""
    path = directory / "MANIFEST.json"
    manifest = json.loads(path.read_text()) if path.exists() else {}
    chosen = names or [*FILES]
    if unknown := set(chosen) - set(FILES):
        sys.exit(f"no such files: {', '.join(sorted(unknown))}")
    listed = {name for part in manifest.values() for name in part}
    if taken := [name for name in chosen if name in listed or (directory / FILES[name].path).exists()]:
        sys.exit(f"golden files are never written again: {', '.join(taken)}")
    for name in chosen:
        golden = FILES[name]
        (directory / golden.path).parent.mkdir(parents=True, exist_ok=True)
        data, entry = golden.make(name, directory)
        with (directory / golden.path).open("xb") as opened:
            opened.write(data)
        manifest.setdefault(golden.part, {})[name] = entry
    path.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
