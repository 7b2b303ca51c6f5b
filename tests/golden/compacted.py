"""What golden bundles that compact and golden COMPACTED frames are made of; generate.py writes them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from codec import recipes
from codec.compacting_recipes import CompactingRecipe, compact_text, compacting_model
from codec.recipes import LINEAR, NONE, PARTIAL, Coding, Text
from golden.coded import (
    CORRUPT,
    CORRUPT_BUNDLE,
    PLENTY,
    UNSUPPORTED,
    UNSUPPORTED_BUNDLE,
    Change,
    changed,
    of_another_bundle,
    sha256,
    symbols_entry,
    without,
)
from safetensors.numpy import load

from kvcached import codec
from kvcached.block import BlockId, FidelityKind, KVBlock
from kvcached.codec import container, entropy, exact, lossless, planes
from kvcached.codec.bundle import Bundle
from kvcached.codec.compactor import Compactor
from kvcached.codec.container import Coding as SectionCoding
from kvcached.codec.container import Header, Section, SectionKind
from kvcached.codec.tables import SIDES

N_TOKENS = 44  # the last byte of KEPT has bits beyond them
HALF = compacting_model(n_tokens=N_TOKENS)
BRAIN = compacting_model([LINEAR], "bfloat16", n_heads=2, n_query_heads=0, n_tokens=40, key_dim=10, value_dim=3)
TOGETHER = (6, 1)  # whole heads of two layers, in an order of their own
FULL = compacting_model([PARTIAL, NONE], "float32", n_heads=6, n_query_heads=6, n_tokens=40, key_dim=4, value_dim=3)
TWICE = ((2, 3), (9, 7))  # of which the first leads the second, and others
RECIPES = {
    # An anchor is missing. Head 3 is steep enough to be whole where it is coded by itself.
    "bundle-compacting": CompactingRecipe(
        HALF,
        {2: [TOGETHER], 8: ()},
        {"x8": Coding(0.1, 0.1, 0.45, 0.02), "x16": Coding(0.5, 0.5, 0.4, 0.05, scale=48)},
        steep=(1, 3, 6),
    ),
    "bundle-compacting-bfloat16": CompactingRecipe(
        BRAIN, {8: ()}, {"x16": Coding(0.5, 0.3, 0.4, 0.05, scale=0)}, seed=1, rank=0.8
    ),
    "bundle-compacting-float32": CompactingRecipe(
        FULL, {2: TWICE, 8: ()}, {"x8": Coding(0.05, 0.1, 0.5, 0.1)}, seed=32
    ),
}


@dataclass(frozen=True)
class CompactedFrame:
    """A block, and how it was compacted and coded."""

    bundle: str
    profile: str
    am_ratio: float
    text: Text
    lineage: FidelityKind = FidelityKind.EXACT

    def compactor(self, file: bytes) -> Compactor:
        return Bundle.unpack(file).compactor(self.profile, self.am_ratio)

    def block(self, file: bytes) -> KVBlock:
        return compact_text(self.compactor(file), self.text)


FRAMES = {
    "compacted-sinks": CompactedFrame("bundle-compacting", "x8", 2.0, Text(HALF, N_TOKENS, 0)),
    "compacted-later": CompactedFrame(
        "bundle-compacting", "x16", 1.5, Text(HALF, N_TOKENS, 4400, seed=1), FidelityKind.CODED
    ),
    "compacted-to-an-eighth": CompactedFrame("bundle-compacting", "x16", 8.0, Text(HALF, N_TOKENS, 2, seed=2)),
    "compacted-between-anchors": CompactedFrame("bundle-compacting", "x8", 3.0, Text(HALF, N_TOKENS, 44, seed=3)),
    "compacted-only-sinks": CompactedFrame("bundle-compacting", "x8", 2.0, Text(HALF, 3, 0, seed=4)),
    "compacted-led": CompactedFrame("bundle-compacting-float32", "x8", 2.0, Text(FULL, 40, 0, seed=6)),
    "compacted-raw-and-opaque": CompactedFrame(
        "bundle-compacting-bfloat16", "x16", 5.0, Text(BRAIN, 40, 2**30, seed=5, opaque=True), FidelityKind.COMPACTED
    ),
}


def bundle_file(name: str) -> bytes:
    return RECIPES[name].bundle().pack()


def frame(name: str, block_id: BlockId, file: bytes) -> bytes:
    made = FRAMES[name]
    return codec.encode(block_id, made.block(file), lineage=made.lineage, coder=made.compactor(file))


def decoded(name: str, block_id: BlockId, data: bytes, file: bytes) -> bytes:
    """What it decodes to, to be compared within the tolerance: its tensors as opaque ones of an EXACT frame."""
    block = codec.decode(block_id, data, PLENTY, FRAMES[name].compactor(file))
    rows = {f"kept/{side}": np.ascontiguousarray(getattr(block, side)) for side in ("keys", "values")}
    return codec.encode(block_id, KVBlock.dense(rows, block.n_source_tokens, block.first_position))


def frame_entry(name: str, block_id: BlockId, data: bytes, file: bytes) -> dict[str, Any]:
    """Rows are said by their integers alone: lengths, positions, and biases in sixteenths."""
    made, header = FRAMES[name], container.unpack(data, PLENTY)[0]
    block = codec.decode(block_id, data, PLENTY, made.compactor(file))
    return {
        "sha256": sha256(data),
        "bundle": made.bundle,
        "profile": header.fidelity.profile,
        "am_ratio": header.fidelity.am_ratio,
        "model_id": header.model_id.hex(),
        "block_hash": header.block_hash.hex(),
        "lineage": header.lineage.name,
        "first_position": header.first_position,
        "n_source_tokens": header.n_source_tokens,
        "lengths": block.lengths.reshape(-1).tolist(),
        "positions": block.positions.tolist(),
        "sixteenths": (16 * block.bias).astype(int).tolist(),
        "symbols": symbols_entry(symbols_of(data, made.compactor(file), block)),
    }


def symbols_of(data: bytes, compactor: Compactor, block: KVBlock) -> dict[str, np.ndarray]:
    """The symbols of keys and of values, as the second reader names them. block: what the frame decodes to."""
    n_coded = block.lengths.reshape(-1) - planes.n_sinks(block.first_position, block.n_source_tokens)
    payloads = {section.kind: section.payload for section in container.unpack(data, PLENTY)[1]}
    found = {}
    for side, kind in (("keys", SectionKind.KEY_ROWS), ("values", SectionKind.VALUE_ROWS)):
        coders = [(getattr(plane, side), n_coded[plane.heads[0]]) for plane in compactor.planes]
        scales = np.concatenate([np.repeat(coder.tables.scales, n) for coder, n in coders])
        found[side] = entropy.decode(payloads[kind], 1, scales)[0]
    return found


# ---- frames and bundles that both readers refuse


def with_section(kind: SectionKind, **fields: Callable[[Any], Any]) -> Change:
    """The section of a kind with fields that functions make of what they were."""

    def change(header: Header, sections: list[Section]) -> tuple[Header, list[Section]]:
        return header, [
            replace(s, **{name: function(getattr(s, name)) for name, function in fields.items()})
            if s.kind == kind
            else s
            for s in sections
        ]

    return change


def with_tensor(kind: SectionKind, function: Callable[[np.ndarray], np.ndarray]) -> Change:
    """The section of a kind with another tensor."""

    def change(header: Header, sections: list[Section]) -> tuple[Header, list[Section]]:
        made = [
            exact.section_of(kind, function(lossless.decode(s.payload, s.dtype, s.shape).copy()), 1)
            if s.kind == kind
            else s
            for s in sections
        ]
        return header, made

    return change


def with_kept(function: Callable[[np.ndarray], None]) -> Change:
    """KEPT after a function has changed its bits, [n_heads, 48], in place."""

    def change(kept: np.ndarray) -> np.ndarray:
        bits = np.unpackbits(kept, axis=1)
        function(bits)
        return np.packbits(bits, axis=1)

    return with_tensor(SectionKind.KEPT, change)


def move(bits: np.ndarray, head: int, token: int, to_head: int) -> None:
    """A head loses a token and another gains one, so that there are as many rows as before."""
    bits[head, token] = 0
    bits[to_head, np.flatnonzero(bits[to_head, :N_TOKENS] == 0)[0]] = 1


def without_tokens(bits: np.ndarray) -> None:
    for token in np.flatnonzero(bits[0]):
        move(bits, 0, int(token), 2)


def one_token_more(bits: np.ndarray) -> None:
    bits[0, np.flatnonzero(bits[0, :N_TOKENS] == 0)[0]] = 1


def with_bias(at: int, value: int) -> Change:
    def change(bias: np.ndarray) -> np.ndarray:
        bias[at] = value
        return bias

    return with_tensor(SectionKind.BIAS, change)


def with_a_plane(header: Header, sections: list[Section]) -> tuple[Header, list[Section]]:
    rows = next(section for section in sections if section.kind == SectionKind.KEY_ROWS)
    return header, [*sections, replace(rows, kind=SectionKind.KEY_PLANE, layer=0)]


def with_ratio(am_ratio: float) -> Change:
    return lambda header, sections: (replace(header, fidelity=replace(header.fidelity, am_ratio=am_ratio)), sections)


CUT: Callable[[Any], bytes] = lambda payload: bytes(payload)[:-2]  # noqa: E731
KEPT, BIAS, KEY_ROWS, VALUE_ROWS = SectionKind.KEPT, SectionKind.BIAS, SectionKind.KEY_ROWS, SectionKind.VALUE_ROWS
# Of compacted-later, whose heads 1 and 6 are coded side by side, but where it says "sink".
BAD_FRAMES: dict[str, tuple[str, Change]] = {
    "compacted-kept-cut": (CORRUPT, with_section(KEPT, payload=CUT)),
    "compacted-kept-of-a-head-less": (CORRUPT, with_tensor(KEPT, lambda kept: kept[:-1])),
    "compacted-kept-beyond-the-block": (CORRUPT, with_kept(lambda bits: bits[:, N_TOKENS:].fill(1))),
    "compacted-kept-one-more-than-rows": (CORRUPT, with_kept(one_token_more)),
    "compacted-head-without-tokens": (CORRUPT, with_kept(without_tokens)),
    "compacted-head-beside-others-not-whole": (CORRUPT, with_kept(lambda bits: move(bits, TOGETHER[0], 9, 0))),
    "compacted-sink-not-kept": (CORRUPT, with_kept(lambda bits: move(bits, 0, 3, 2))),
    "compacted-sinks-missing": (CORRUPT, without(SectionKind.SINK_VALUES)),
    "compacted-without-bias": (CORRUPT, without(BIAS)),
    "compacted-bias-beyond-48": (CORRUPT, with_bias(0, 49)),
    "compacted-bias-of-minus-128": (CORRUPT, with_bias(-1, -128)),
    "compacted-bias-not-finite": (CORRUPT, with_tensor(BIAS, lambda bias: np.full(bias.shape, np.nan, np.float32))),
    "compacted-bias-of-a-row-less": (CORRUPT, with_tensor(BIAS, lambda bias: bias[:-1])),
    "compacted-stream-cut": (CORRUPT, with_section(KEY_ROWS, payload=CUT)),
    "compacted-stream-goes-on": (CORRUPT, with_section(VALUE_ROWS, payload=lambda payload: bytes(payload) + b"\0\0")),
    "compacted-rows-of-a-layer": (CORRUPT, with_section(KEY_ROWS, layer=lambda _: 0)),
    "compacted-with-a-plane": (CORRUPT, with_a_plane),
    "compacted-rows-of-unknown-coding": (UNSUPPORTED, with_section(KEY_ROWS, coding=lambda _: SectionCoding.LOSSLESS)),
    "compacted-of-another-bundle": (UNSUPPORTED, of_another_bundle),
    "compacted-by-more-than-any-anchor": (UNSUPPORTED, with_ratio(9.0)),
    "compacted-by-no-number": (UNSUPPORTED, with_ratio(float("nan"))),
}


def bad_frame_of(name: str) -> str:
    """Which frame it is made of."""
    return "compacted-sinks" if "sink" in name else "compacted-later"


def bad_frame(name: str, block_id: BlockId, file: bytes) -> bytes:
    return changed(frame(bad_frame_of(name), block_id, file), BAD_FRAMES[name][1])


Content = dict[str, Any]
BadBundle = Callable[[Content, dict[str, np.ndarray]], bytes]


def with_content(function: Callable[[Content], None]) -> BadBundle:
    """Sealed after a function has changed the JSON in place."""

    def make(content: Content, tensors: dict[str, np.ndarray]) -> bytes:
        function(content)
        return recipes.sealed(content, tensors)

    return make


def with_array(name: str, function: Callable[[np.ndarray], Any]) -> BadBundle:
    """Sealed after a function has changed a tensor in place."""

    def make(content: Content, tensors: dict[str, np.ndarray]) -> bytes:
        changed = tensors[name].copy()
        function(changed)
        return recipes.sealed(content, {**tensors, name: changed})

    return make


def anchor(content: Content, ratio: int = 8) -> Content:
    found: Content = content["compaction"]["anchors"][str(ratio)]
    return found


def with_leader(plane: int, leader: Any) -> BadBundle:
    """Sealed with another leader of a plane, which has no predictors: all else is right."""

    def make(content: Content, tensors: dict[str, np.ndarray]) -> bytes:
        anchor(content, 2)["leaders"][plane] = leader
        gone = {f"compaction.2.{side}.{plane}.predictor" for side in SIDES}
        return recipes.sealed(content, {name: array for name, array in tensors.items() if name not in gone})

    return make


def with_predictor(name: str, function: Callable[[np.ndarray], np.ndarray]) -> BadBundle:
    """Sealed with what a function makes of a predictor, or of nothing if there is none."""

    def make(content: Content, tensors: dict[str, np.ndarray]) -> bytes:
        full = f"compaction.2.{name}.predictor"
        wrong = function(tensors.get(full, np.zeros((0, 0), np.float16)).copy())
        return recipes.sealed(content, {**tensors, full: wrong})

    return make


def without_the_last_anchor(content: Content, tensors: dict[str, np.ndarray]) -> bytes:
    content["compaction"]["anchors"] = {"4": anchor(content)}
    return recipes.sealed(content, {name.replace("compaction.8.", "compaction.4."): a for name, a in tensors.items()})


# Of planes of bundle-compacting-float32 with a leader, and of one without.
LED, LED_PAIR, UNLED = 4, 2, 5
BAD_BUNDLES: dict[str, tuple[str, BadBundle]] = {
    "bundle-of-format-3": (UNSUPPORTED_BUNDLE, with_content(lambda c: c.update(format="kvcached bundle 3"))),
    "bundle-of-format-1-with-compaction": (
        CORRUPT_BUNDLE,
        with_content(lambda content: content.update(format="kvcached bundle 1")),
    ),
    "bundle-without-the-last-anchor": (
        CORRUPT_BUNDLE,
        without_the_last_anchor,
    ),
    "bundle-with-a-head-twice": (CORRUPT_BUNDLE, with_content(lambda c: anchor(c).update(heads=[[0], [0]]))),
    "bundle-with-a-bound-below-0": (
        CORRUPT_BUNDLE,
        with_content(lambda content: anchor(content)["profiles"]["x16"].update(bound=-1.0)),
    ),
    "bundle-with-a-curve-of-no-number": (CORRUPT_BUNDLE, with_array("compaction.curves", lambda a: a.fill(np.nan))),
    "bundle-with-fractions-that-fall": (
        CORRUPT_BUNDLE,
        with_array("compaction.fractions", lambda a: a.__setitem__(slice(2), a[1::-1].copy())),
    ),
    "bundle-without-leaders": (CORRUPT_BUNDLE, with_content(lambda content: anchor(content).pop("leaders"))),
    "bundle-with-leaders-of-a-plane-less": (CORRUPT_BUNDLE, with_content(lambda c: anchor(c)["leaders"].pop())),
    "bundle-with-a-leader-that-is-led": (CORRUPT_BUNDLE, with_leader(LED, LED_PAIR)),
    "bundle-with-a-leader-of-itself": (CORRUPT_BUNDLE, with_leader(LED_PAIR, LED_PAIR)),
    "bundle-with-a-leader-of-one-head": (CORRUPT_BUNDLE, with_leader(LED, UNLED)),
    "bundle-with-a-leader-out-of-range": (CORRUPT_BUNDLE, with_leader(LED, 10)),
    "bundle-with-a-leader-below-0": (CORRUPT_BUNDLE, with_leader(LED, -9)),
    "bundle-with-a-leader-that-is-true": (CORRUPT_BUNDLE, with_leader(LED, True)),
    "bundle-with-a-predictor-of-another-shape": (CORRUPT_BUNDLE, with_predictor(f"keys.{LED}", lambda a: a[:-1])),
    "bundle-with-a-predictor-turned": (CORRUPT_BUNDLE, with_predictor(f"values.{LED}", lambda a: a.T.copy())),
    "bundle-with-a-predictor-of-float32": (
        CORRUPT_BUNDLE,
        with_predictor(f"keys.{LED}", lambda a: a.astype(np.float32)),
    ),
    "bundle-with-a-predictor-not-finite": (
        CORRUPT_BUNDLE,
        with_array(f"compaction.2.keys.{LED}.predictor", lambda a: a.__setitem__((-1, -1), np.inf)),
    ),
    "bundle-with-a-predictor-from-nothing": (
        CORRUPT_BUNDLE,
        with_predictor(f"keys.{UNLED}", lambda _: np.zeros((0, 4), np.float16)),
    ),
    "bundle-with-a-predictor-without-a-leader": (
        CORRUPT_BUNDLE,
        with_predictor(f"keys.{UNLED}", lambda _: np.zeros((14, 4), np.float16)),
    ),
}


def bad_bundle_of(name: str) -> str:
    """Which bundle it is made of."""
    of_prediction = "leader" in name or "predictor" in name
    return "bundle-compacting-float32" if of_prediction else "bundle-compacting-bfloat16"


def bad_bundle(name: str, file: bytes) -> bytes:
    content = recipes.content_of(file)
    del content["checksum"]
    return BAD_BUNDLES[name][1](content, load(file))
