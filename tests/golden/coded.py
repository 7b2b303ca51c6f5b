"""What golden bundles and golden CODED frames are made of; generate.py writes them."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from codec import recipes
from codec.recipes import HALVES, LINEAR, NONE, PARTIAL, Coding, Recipe, Text
from safetensors.numpy import load

from kvcached import codec
from kvcached.block import BlockId, FidelityKind, KVBlock
from kvcached.codec import container, entropy
from kvcached.codec.bundle import Bundle
from kvcached.codec.container import Header, Section, SectionKind

PLENTY = 1 << 30
CORRUPT, UNSUPPORTED = "CorruptFrameError", "UnsupportedFrameError"
CORRUPT_BUNDLE, UNSUPPORTED_BUNDLE = "CorruptBundleError", "UnsupportedBundleError"
HALF = recipes.model([HALVES, PARTIAL, NONE], "float16")
BRAIN = replace(recipes.model([LINEAR, PARTIAL, PARTIAL], "bfloat16", n_heads=1, key_dim=10), name="größe")
RECIPES = {
    "bundle-float16": Recipe(
        HALF,
        profiles={
            "near-lossless": Coding(0.01, 0.0),  # its scales are wide
            "x8": Coding(0.1, 0.2, 0.45, 0.02),
            "x16": Coding(0.5, 1.0),  # keeps nothing
        },
    ),
    "bundle-bfloat16": Recipe(
        BRAIN, seed=1, profiles={"x8": Coding(0.3, 0.1, 0.4, 0.05), "x32": Coding(0.5, 0.3, scale=0)}, rank=0.8
    ),
}


@dataclass(frozen=True)
class CodedFrame:
    """A block, and how it was coded."""

    bundle: str
    profile: str
    text: Text
    lineage: FidelityKind = FidelityKind.EXACT
    outliers: float = 0.0  # added to some numbers

    def block(self) -> KVBlock:
        block = self.text.block()
        for rows in (block.keys, block.values):
            limit = np.float32(65504)
            rows[::29] = np.clip(rows[::29].astype(np.float32) + self.outliers, -limit, limit).astype(rows.dtype)
        return block


FRAMES = {
    "coded-sinks": CodedFrame("bundle-float16", "x8", Text(HALF, 24, 0)),
    "coded-later": CodedFrame("bundle-float16", "x8", Text(HALF, 24, 4096, seed=1), FidelityKind.CODED),
    "coded-only-sinks": CodedFrame("bundle-float16", "x8", Text(HALF, 3, 0, seed=2)),
    "coded-wide-scales": CodedFrame("bundle-float16", "near-lossless", Text(HALF, 40, 16, seed=3)),
    "coded-nothing-kept": CodedFrame("bundle-float16", "x16", Text(HALF, 8, 2, seed=4)),
    "coded-saturates": CodedFrame("bundle-float16", "x8", Text(HALF, 24, 16, seed=5), outliers=65504),
    "coded-escapes-and-opaque": CodedFrame(
        "bundle-bfloat16", "x8", Text(BRAIN, 40, 2, seed=6, opaque=True), outliers=50
    ),
    "coded-raw": CodedFrame("bundle-bfloat16", "x32", Text(BRAIN, 16, 2**31 - 20, seed=7), FidelityKind.COMPACTED),
}


def bundle_file(name: str) -> bytes:
    """One of the two was measured."""
    bundle = RECIPES[name].bundle()
    if name == "bundle-bfloat16":
        bundle = bundle.with_measured({"x8": recipes.measured(), "x32": recipes.measured(kl=0.25)})
    return bundle.pack()


def bundle_entry(file: bytes) -> dict[str, Any]:
    return {"sha256": sha256(file), "id": Bundle.unpack(file).bundle_id.hex()}


def frame(name: str, block_id: BlockId, file: bytes) -> bytes:
    made = FRAMES[name]
    return codec.encode(block_id, made.block(), lineage=made.lineage, coder=Bundle.unpack(file).coder(made.profile))


def decoded(name: str, block_id: BlockId, data: bytes, file: bytes) -> bytes:
    """What it decodes to, to be compared within the tolerance, as an EXACT frame."""
    block = codec.decode(block_id, data, PLENTY, Bundle.unpack(file).coder(FRAMES[name].profile))
    return codec.encode(block_id, block)


def frame_entry(name: str, data: bytes, file: bytes) -> dict[str, Any]:
    header = container.unpack(data, PLENTY)[0]
    return {
        "sha256": sha256(data),
        "bundle": FRAMES[name].bundle,
        "profile": header.fidelity.profile,
        "model_id": header.model_id.hex(),
        "block_hash": header.block_hash.hex(),
        "lineage": header.lineage.name,
        "first_position": header.first_position,
        "n_source_tokens": header.n_source_tokens,
        "symbols": symbols_entry(symbols_of(data, Bundle.unpack(file))),
    }


def symbols_of(data: bytes, bundle: Bundle) -> dict[str, np.ndarray]:
    """The symbols of every plane, as the second reader names them."""
    header, sections = container.unpack(data, PLENTY)
    coder, found = bundle.coder(header.fidelity.profile), {}
    for side, kind, planes in (
        ("keys", SectionKind.KEY_PLANE, coder.keys),
        ("values", SectionKind.VALUE_PLANE, coder.values),
    ):
        for section in sections:
            if section.kind == kind:
                scales = planes[section.layer].tables.scales
                found[f"{side}.{section.layer}"] = entropy.decode(section.payload, section.shape[0], scales)
    return found


def symbols_entry(symbols: dict[str, np.ndarray]) -> dict[str, Any]:
    """SHA-256 over the symbols row by row, as little-endian int32."""
    return {
        plane: {"shape": list(array.shape), "sha256": sha256(np.ascontiguousarray(array, "<i4").tobytes())}
        for plane, array in symbols.items()
    }


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# ---- frames and bundles that both readers refuse

Change = Callable[[Header, list[Section]], tuple[Header, list[Section]]]


def changed(data: bytes, change: Change) -> bytes:
    """The frame with other sections or header, under right checksums."""
    return container.pack(*change(*container.unpack(data, PLENTY)))


def without(kind: SectionKind) -> Change:
    return lambda header, sections: (header, [section for section in sections if section.kind != kind])


def with_first_plane(**fields: Callable[[Any], Any]) -> Change:
    """The first plane of keys with fields that functions make of what they were."""

    def change(header: Header, sections: list[Section]) -> tuple[Header, list[Section]]:
        at = next(i for i, section in enumerate(sections) if section.kind == SectionKind.KEY_PLANE)
        new = {name: function(getattr(sections[at], name)) for name, function in fields.items()}
        return header, [*sections[:at], replace(sections[at], **new), *sections[at + 1 :]]

    return change


def with_exact_keys(header: Header, sections: list[Section]) -> tuple[Header, list[Section]]:
    return header, [replace(sections[0], kind=SectionKind.KEYS, layer=0), *sections]


def of_another_bundle(header: Header, sections: list[Section]) -> tuple[Header, list[Section]]:
    return replace(header, fidelity=replace(header.fidelity, bundle_id=bytes(31) + b"\1")), sections


BAD_FRAMES: dict[str, tuple[str, Change]] = {
    "coded-without-sinks": (CORRUPT, without(SectionKind.SINK_KEYS)),
    "coded-without-values": (CORRUPT, without(SectionKind.VALUE_PLANE)),
    "coded-of-other-shape": (CORRUPT, with_first_plane(shape=lambda shape: (shape[0] - 1, shape[1]))),
    "coded-out-of-order": (CORRUPT, with_first_plane(layer=lambda layer: layer + 1)),
    "coded-stream-cut": (CORRUPT, with_first_plane(payload=lambda payload: bytes(payload[:-2]))),
    "coded-stream-goes-on": (CORRUPT, with_first_plane(payload=lambda payload: bytes(payload) + b"\0\0")),
    "coded-with-exact-keys": (CORRUPT, with_exact_keys),
    "coded-of-another-bundle": (UNSUPPORTED, of_another_bundle),
}


def bad_frame(name: str, block_id: BlockId, file: bytes) -> bytes:
    return changed(frame("coded-sinks", block_id, file), BAD_FRAMES[name][1])


def with_infinite_step(content: dict[str, Any], tensors: dict[str, np.ndarray]) -> bytes:
    steps = tensors["x8.keys.0.steps"].copy()
    steps[0] = np.inf
    return recipes.sealed(content, {**tensors, "x8.keys.0.steps": steps})


def with_rope_of_tomorrow(content: dict[str, Any], tensors: dict[str, np.ndarray]) -> bytes:
    rope = content["model"]["layers"][0]["rope"]
    rope["scaling_json"] = '{"type":"of tomorrow"}'
    return recipes.sealed(content, tensors)


BAD_BUNDLES: dict[str, tuple[str, Callable[[dict[str, Any], dict[str, np.ndarray]], bytes]]] = {
    "bundle-with-infinite-step": (CORRUPT_BUNDLE, with_infinite_step),
    "bundle-with-white-space": (
        CORRUPT_BUNDLE,
        lambda content, tensors: recipes.sealed(content, tensors, recipes.canonical(content).decode() + " "),
    ),
    "bundle-without-a-tensor": (
        CORRUPT_BUNDLE,
        lambda content, tensors: recipes.sealed(content, {n: a for n, a in tensors.items() if n != "keys.0.mean"}),
    ),
    # A reader of format 1 says unsupported. Now that the format is known, what lacks is its compaction.
    "bundle-of-format-2": (
        CORRUPT_BUNDLE,
        lambda content, tensors: recipes.sealed(content | {"format": "kvcached bundle 2"}, tensors),
    ),
    "bundle-with-rope-of-tomorrow": (UNSUPPORTED_BUNDLE, with_rope_of_tomorrow),
}


def bad_bundle(name: str, file: bytes) -> bytes:
    content = recipes.content_of(file)
    checksum = content.pop("checksum")
    if name == "bundle-with-white-space":
        content["checksum"] = checksum
    return BAD_BUNDLES[name][1](content, load(file))
