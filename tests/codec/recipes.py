"""Models, bundles for them and blocks to code, as small as they can be."""

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st
from safetensors.numpy import save

from kvcached.block import Fingerprint, KVBlock, LayerKind, LayerSpec, ModelSpec, RopeSpec
from kvcached.codec import entropy, klt
from kvcached.codec.bundle import Bundle, group_widths
from kvcached.codec.klt import Basis
from kvcached.codec.tables import SIDES, Profile, Tables, storable
from kvcached_client._proto import kvcached_pb2 as pb
from kvcached_client.spec import DENSE_DTYPES
from kvcached_client.tensors import DTYPES

HALVES = RopeSpec(8, 1e4)
PARTIAL = RopeSpec(4, 5e5, interleaved=True)
LINEAR = RopeSpec(8, 1e6, scaling_json='{"factor":4.0,"type":"linear"}')
NONE = RopeSpec()
STATE = LayerSpec(kind=LayerKind.STATE, opaque=True)


def model(
    ropes: Sequence[RopeSpec] = (HALVES, PARTIAL, NONE),
    kv_dtype: str = "float16",
    n_heads: int = 2,
    key_dim: int = 8,
    value_dim: int = 6,
) -> ModelSpec:
    """A dense layer for each of the rotary positions, and one opaque layer behind the first."""
    layers = [LayerSpec(n_kv_heads=n_heads, key_dim=key_dim, value_dim=value_dim, rope=rope) for rope in ropes]
    return ModelSpec(Fingerprint(weights="w"), kv_dtype, 16, (layers[0], STATE, *layers[1:]), name="small")


@dataclass(frozen=True)
class Coding:
    """How a profile is made: steps as parts of a component's deviation, and which share of components has none."""

    step: float = 0.25
    dropped: float = 0.25
    dead_zone: float = 0.5
    centroid: float = 0.0
    scale: int | None = None  # None: what fits the steps


@dataclass(frozen=True)
class Recipe:
    """What a bundle is made of. The bundle itself is made in the test, as blocks are: see codec.frames.Wire."""

    spec: ModelSpec
    layers_per_group: int = 2
    seed: int = 0
    profiles: Mapping[str, Coding] | None = None  # None: x8 and x32
    rank: float = 1.0  # of the number of features

    def bundle(self) -> Bundle:
        """Bases fitted to the same kind of rows that `Text.block` yields, features and components correlated."""
        rng = np.random.default_rng(self.seed)
        profiles = self.profiles or {"x8": Coding(0.1, 0.0), "x32": Coding(0.5, 0.5, 0.4, 0.05)}
        bases = {side: tuple(basis_of(rng, n, self.rank) for n in self._widths(side)) for side in SIDES}
        made = {
            name: Profile(
                4.0,
                coding.dead_zone,
                coding.centroid,
                *(tuple(tables_of(rng, basis, coding) for basis in bases[side]) for side in SIDES),
            )
            for name, coding in profiles.items()
        }
        return Bundle(self.spec, self.layers_per_group, bases["keys"], bases["values"], made)

    def _widths(self, side: str) -> list[int]:
        return group_widths(self.spec, self.layers_per_group, side)


def basis_of(rng: np.random.Generator, n_features: int, rank: float) -> Basis:
    mixed = rng.standard_normal((4 * n_features, n_features)) @ rng.standard_normal((n_features, n_features))
    rows = (mixed / np.sqrt(n_features) + 0.5).astype(np.float32)
    return storable(klt.fit(klt.Moments.of(rows), max(1, round(rank * n_features))))


def tables_of(rng: np.random.Generator, basis: Basis, coding: Coding) -> Tables:
    deviations = np.sqrt(np.maximum(basis.variances, np.float32(1e-3)))
    kept = rng.random(len(deviations)) >= coding.dropped
    steps = np.where(kept, deviations * np.float32(coding.step), np.float32(0))
    samples = np.rint(rng.laplace(size=(256, 1)) * 0.7 / coding.step).astype(np.int32)
    scale = entropy.choose_scale(samples)[0] if coding.scale is None else coding.scale
    return Tables(steps.astype(np.float32), np.full(len(steps), scale, np.uint8))


@dataclass(frozen=True)
class Text:
    """A piece of a text of a model."""

    spec: ModelSpec
    n_tokens: int = 12
    first_position: int = 16
    seed: int = 0
    scale: float = 1.0
    opaque: bool = False

    def block(self) -> KVBlock:
        rng = np.random.default_rng(self.seed)
        tensors = {}
        for name, shape in self.spec.dense_shapes().items():
            normal = rng.standard_normal((*shape[:2], self.n_tokens, shape[3])) * self.scale
            tensors[name] = normal.astype(DTYPES[self.spec.kv_dtype])
        if self.opaque:
            tensors |= {"state": np.arange(3, dtype=np.int8), "zustand/größe": rng.standard_normal((2, 3))}
        return KVBlock.dense(tensors, self.n_tokens, self.first_position)


SMALL = Recipe(model((HALVES, PARTIAL)), layers_per_group=1)


def measured(**fields: float) -> pb.Measured:
    right = {"bits_per_value": 1.5, "compression": 10.25, "kl": 0.001, "n_tokens": 1000, "n_documents": 7}
    return pb.Measured(**(right | fields), engine="test 1.0")  # type: ignore[arg-type]


ropes = st.lists(st.sampled_from([HALVES, PARTIAL, LINEAR, NONE]), min_size=1, max_size=4)
specs = st.builds(
    model, ropes, st.sampled_from(DENSE_DTYPES), st.integers(1, 3), st.sampled_from([8, 10]), st.integers(1, 9)
)
codings = st.builds(
    Coding,
    st.sampled_from([0.01, 0.1, 0.5, 2.0]),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.floats(0.25, 0.5),
    st.floats(0, 0.3),
    st.none() | st.integers(0, 63),
)


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Bundles of one profile, x8, groups of any size, bases of any rank."""
    spec = draw(specs)
    per_group = draw(st.integers(1, len(spec.dense_layers)))
    return Recipe(spec, per_group, draw(st.integers(0, 99)), {"x8": draw(codings)}, draw(st.sampled_from([0.2, 1.0])))


# ---- bundle files of any content, their checksums right


def file_of(header: object, body: bytes = b"") -> bytes:
    """A safetensors file of a header, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def content_of(file: bytes) -> dict[str, Any]:
    """The JSON of a bundle."""
    header = json.loads(file[8 : 8 + int.from_bytes(file[:8], "little")])
    return dict(json.loads(header["__metadata__"]["kvcached"]))


def sealed(content: Mapping[str, Any], tensors: Mapping[str, np.ndarray], text: str | None = None) -> bytes:
    """The file of any content and tensors. Its checksum is right if the content has one, and none is there already."""
    said = ("format", "model", "layers_per_group", "profiles", "compaction")
    named = {name: content[name] for name in said if name in content}
    digest = hashlib.sha256(canonical(named))
    for name, array in sorted(tensors.items()):
        digest.update(f"\n{name} {array.dtype.name} {array.shape}\n".encode() + array.tobytes())
    if "measured" in content:
        checksum = hashlib.sha256(digest.digest() + canonical(content["measured"])).hexdigest()
        content = {"checksum": checksum} | dict(content)
    return save(dict(tensors), {"kvcached": canonical(content).decode() if text is None else text})


def canonical(content: object) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
