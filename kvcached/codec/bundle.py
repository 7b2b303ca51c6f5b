"""The bundle: what calibration yields for one model, as safetensors. Made once, named by its content in every frame.

    file      := safetensors with the tensors below and one metadata key, "kvcached": canonical JSON
    JSON      := format, model (a ModelSpec), layers_per_group, checksum, measured {name: ...},
                 profiles {name: target_compression, dead_zone, centroid}, compaction (compactor.py), if there is one
    tensors   := {side}.{group}.mean f32[f]  .variances f32[r]  .forward f16[f r]  .inverse f16[r f]
                 {profile}.{side}.{group}.steps f32[r]  .scales u8[r]               side: keys, values

The bundle id is SHA-256 over all of it but `measured`, so that what a bundle loses can be measured with the bundle and
said in it; `checksum` is over id and `measured`. A bundle has one file only: a reader takes no other way to write it.
docs/format.md is the law.
"""

import hashlib
import json
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from google.protobuf import json_format
from safetensors import SafetensorError
from safetensors.numpy import load, save

from kvcached.block import Fidelity, FidelityKind, ModelSpec
from kvcached.codec import rope
from kvcached.codec.compactor import Compaction, Compactor
from kvcached.codec.klt import ON_CPU, Basis, Product
from kvcached.codec.tables import (
    SIDES,
    PlaneCoder,
    Profile,
    Tensors,
    basis_tensors,
    plane_coder,
    profile_numbers,
    profile_tensors,
    read_basis,
    read_profile,
)
from kvcached.errors import CorruptBundleError, PreconditionError, UnsupportedBundleError, UnsupportedRopeError
from kvcached_client._proto import kvcached_pb2 as pb

FORMAT, COMPACTING_FORMAT = "kvcached bundle 1", "kvcached bundle 2"  # the latter says how to compact, too
MAX_BYTES = 2 << 30
# Every profile, the best first, with the compression to reach, every byte of a frame counted. A name says the least:
# x8 aims higher because the loss allows it (docs/quality.md).
PROFILES: Mapping[str, float] = {"near-lossless": 4.0, "x8": 11.0, "x16": 16.0, "x32": 32.0}
DEFAULT_PROFILE = "x8"
_MAX_HEADER_BYTES = 4 << 20  # as Python objects some thirty times that
HEAD_BYTES = 8 + _MAX_HEADER_BYTES  # of a file at most, before its tensors
_MAX_QUOTED = 200  # characters of a spec in a message
_MEASURED_NUMBERS = tuple(f.name for f in pb.Measured.DESCRIPTOR.fields if f.name != "engine")


@dataclass(frozen=True, slots=True, eq=False)
class Coder:
    """A profile of a bundle, ready for use: what encode and decode take."""

    spec: ModelSpec
    fidelity: Fidelity
    layers_per_group: int
    dead_zone: float
    centroid: float
    keys: tuple[PlaneCoder, ...]
    values: tuple[PlaneCoder, ...]
    product: Product = ON_CPU


@dataclass(frozen=True, slots=True)
class Outline:
    """What a bundle says of itself beside its tensors. profiles: name and compression to reach, the best first."""

    spec: ModelSpec
    layers_per_group: int
    profiles: Mapping[str, float]
    measured: Mapping[str, pb.Measured]
    compacts: bool = False

    @classmethod
    def unpack(cls, beginning: bytes) -> "Outline":
        """Of the first HEAD_BYTES of a file, and quick: `Bundle.unpack`, which raises alike, checks what is said."""
        content, _ = _read_content(beginning)
        try:
            described = content["profiles"]
            targets = {n: float(described[n]["target_compression"]) for n in PROFILES if n in described}
            measured = {name: _measured(name, m, targets) for name, m in content["measured"].items()}
            return cls(*_model(content), targets, measured, content["format"] == COMPACTING_FORMAT)
        except _NO_BUNDLE as error:
            raise CorruptBundleError(f"not a bundle: {str(error)[:_MAX_QUOTED]}") from None


@dataclass(frozen=True, eq=False)
class Bundle:
    """Bases for each group of consecutive dense layers, keys and values apart, and the profiles that use them.

    measured: what each profile was measured to lose, messages of the protocol by name of the profile.
    compaction: what it takes to compact blocks; None where nobody measured it.
    """

    spec: ModelSpec
    layers_per_group: int
    keys: tuple[Basis, ...]
    values: tuple[Basis, ...]
    profiles: Mapping[str, Profile]
    measured: Mapping[str, pb.Measured] = field(default_factory=dict)
    compaction: Compaction | None = None

    @cached_property
    def bundle_id(self) -> bytes:
        """SHA-256 over everything but the measurements."""
        digest = hashlib.sha256(_canonical(self._description()))
        for name, array in sorted(self._tensors().items()):
            digest.update(f"\n{name} {array.dtype.name} {array.shape}\n".encode())
            digest.update(array.data)
        return digest.digest()

    @property
    def outline(self) -> Outline:
        targets = {n: self.profiles[n].target_compression for n in PROFILES if n in self.profiles}
        return Outline(self.spec, self.layers_per_group, targets, dict(self.measured), self.compaction is not None)

    def coder(self, profile: str) -> Coder:
        """A profile, ready for use. Raises KeyError for one that the bundle does not have."""
        tables = self.profiles[profile]
        return Coder(
            spec=self.spec,
            fidelity=Fidelity(FidelityKind.CODED, profile, bundle_id=self.bundle_id),
            layers_per_group=self.layers_per_group,
            dead_zone=tables.dead_zone,
            centroid=tables.centroid,
            keys=tuple(map(plane_coder, self.keys, tables.keys)),
            values=tuple(map(plane_coder, self.values, tables.values)),
        )

    def compactor(self, profile: str, am_ratio: float) -> Compactor:
        """Compaction to a ratio above 1 on top of a profile. Raises KeyError if the bundle has not what it takes.

        Raises ValueError if the model's blocks have too few tokens for the ratio.
        """
        if not self.compaction:
            raise KeyError("the bundle has nothing on compaction")
        as_frames_hold_it = float(np.float32(am_ratio))
        fidelity = Fidelity(FidelityKind.COMPACTED, profile, as_frames_hold_it, self.bundle_id)
        return self.compaction.compactor(self.spec, fidelity)

    def with_measured(self, measured: Mapping[str, pb.Measured]) -> "Bundle":
        """The same bundle, which says what its profiles lose. Raises ValueError for one that it does not have."""
        if unknown := sorted(set(measured) - set(self.profiles)):
            raise ValueError(f"the bundle has profiles {', '.join(self.profiles)}, got measurements of {unknown}")
        return replace(self, measured={**self.measured, **measured})

    def check_fits(self, spec: ModelSpec) -> None:
        """Raises PreconditionError, naming both sides, unless the bundle was made for this model.

        Block size, tokenizer and the model's name do not matter: keys and values do not depend on them.
        """
        if problems := list(_mismatches(self.spec, spec)):
            raise PreconditionError(f"the bundle is of another model: {'; '.join(problems)}")

    def pack(self) -> bytes:
        """The file. Inverse: `unpack`."""
        return save(self._tensors(), {"kvcached": self._content().decode()})

    @classmethod
    def unpack(cls, data: bytes) -> "Bundle":
        """The bundle of a file.

        Raises:
            CorruptBundleError: the bytes are not what `pack` makes.
            UnsupportedBundleError: they were made by a later version.
        """
        content, text = _read_content(data)
        try:
            tensors = load(data)
            bundle = _build(content, tensors)
            if extra := set(tensors) - set(bundle._tensors()):
                raise ValueError(f"it has tensors that no bundle has: {sorted(extra)[:3]!s}")
            if bundle._content() != text.encode():
                raise ValueError("its checksum does not match, or its JSON is not canonical")
        except _NO_BUNDLE as error:
            missing = "it lacks " if isinstance(error, KeyError) else ""
            raise CorruptBundleError(f"not a bundle: {missing}{str(error)[:_MAX_QUOTED]}") from None
        return bundle

    def _content(self) -> bytes:
        """The JSON of the file."""
        measured = {name: _set_fields(message) for name, message in self.measured.items()}
        checksum = hashlib.sha256(self.bundle_id + _canonical(measured)).hexdigest()
        return _canonical(self._description() | {"measured": measured, "checksum": checksum})

    def _description(self) -> dict[str, Any]:
        """All that is not tensors, without the measurements."""
        # Not protobuf's JSON: what another version of that library might write would be another id.
        model = json.loads(self.spec.canonical()) | ({"name": self.spec.name} if self.spec.name else {})
        described = {
            "format": COMPACTING_FORMAT if self.compaction else FORMAT,
            "model": model,
            "layers_per_group": int(self.layers_per_group),
            "profiles": {name: profile_numbers(profile) for name, profile in self.profiles.items()},
        }
        return described | ({"compaction": self.compaction.described()} if self.compaction else {})

    def _tensors(self) -> Tensors:
        tensors: Tensors = {}
        for side in SIDES:
            for group, basis in enumerate(getattr(self, side)):
                tensors |= basis_tensors(f"{side}.{group}", basis)
        for name, profile in self.profiles.items():
            tensors |= profile_tensors(name, profile)
        if self.compaction:
            tensors |= self.compaction.tensors()
        return {name: np.ascontiguousarray(array) for name, array in tensors.items()}  # save takes memory as it lies


def group_widths(spec: ModelSpec, layers_per_group: int, side: str) -> list[int]:
    """Features of the planes of each group of layers."""
    n_layers, n_kv_heads, _, dim = spec.dense_shapes()[side]
    starts = range(0, n_layers, layers_per_group)
    return [min(layers_per_group, n_layers - start) * n_kv_heads * dim for start in starts]


def _set_fields(message: pb.Measured) -> dict[str, Any]:
    return {field.name: value for field, value in message.ListFields() if value}


def _canonical(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _mismatches(ours: ModelSpec, theirs: ModelSpec) -> Iterator[str]:
    sides: Mapping[str, Callable[[ModelSpec], Any]] = {
        "weights": lambda s: s.fingerprint.weights,
        "adapter": lambda s: s.fingerprint.adapter,
        "dtype": lambda s: s.kv_dtype,
        "layers": lambda s: len(s.dense_layers),
        "(KV heads, key dim, value dim)": lambda s: {(n.n_kv_heads, n.key_dim, n.value_dim) for n in s.dense_layers},
    }
    for name, of in sides.items():
        if of(ours) != of(theirs):
            yield f"{name}: bundle {str(of(ours))[:_MAX_QUOTED]}, model {str(of(theirs))[:_MAX_QUOTED]}"
    for number, (a, b) in enumerate(zip(ours.dense_layers, theirs.dense_layers, strict=False)):
        if a.rope != b.rope:  # the first layer that differs says enough
            named = f"bundle {str(a.rope)[:_MAX_QUOTED]}, model {str(b.rope)[:_MAX_QUOTED]}"
            yield f"rotary positions: {named} (dense layer {number})"
            return


# What content that is no bundle's makes of the code that reads it. Nesting ends in a RecursionError, huge numbers in an
# OverflowError, and a type where another is expected in most of the others.
_NO_BUNDLE = (
    *(SafetensorError, json_format.Error, ValueError, KeyError, IndexError, TypeError),
    *(AttributeError, RecursionError, OverflowError),
)


def _read_content(data: bytes) -> tuple[dict[str, Any], str]:
    """The JSON of a file, of a format that we know; and its text."""
    if len(data) > MAX_BYTES:
        raise CorruptBundleError(f"a bundle has at most {MAX_BYTES} bytes, got {len(data)}")
    n_bytes = int.from_bytes(data[:8], "little")
    if not 2 <= n_bytes <= min(_MAX_HEADER_BYTES, len(data) - 8):
        raise CorruptBundleError(f"not a safetensors file: a header of {n_bytes} bytes in {len(data)}")
    try:
        header = json.loads(data[8 : 8 + n_bytes].decode())
        (text,) = header["__metadata__"].values()
        content = json.loads(header["__metadata__"]["kvcached"])
        found = content["format"]
        if not isinstance(found, str):
            raise TypeError("format is no string")
    except _NO_BUNDLE as error:
        raise CorruptBundleError(
            f"not a bundle: no JSON of one under its only metadata key, kvcached: {type(error).__name__}"
        ) from None
    if found not in (FORMAT, COMPACTING_FORMAT):
        raise UnsupportedBundleError(f"expected format {FORMAT!r} or {COMPACTING_FORMAT!r}, got {found[:40]!r}")
    return content, text


def _build(content: Mapping[str, Any], tensors: Tensors) -> Bundle:
    """Raises UnsupportedBundleError, or one of _NO_BUNDLE."""
    spec, layers_per_group = _model(content)
    widths = {side: group_widths(spec, layers_per_group, side) for side in SIDES}
    bases = {side: tuple(read_basis(tensors, f"{side}.{i}", w) for i, w in enumerate(widths[side])) for side in SIDES}
    ranks = {side: [len(basis.variances) for basis in bases[side]] for side in SIDES}
    described = content["profiles"]
    if unknown := set(described) - set(PROFILES):
        raise ValueError(f"profiles are {', '.join(PROFILES)}, got {sorted(unknown)[:3]!s}")
    profiles = {name: read_profile(tensors, name, described[name], ranks) for name in PROFILES if name in described}
    measured = {name: _measured(name, m, profiles) for name, m in content["measured"].items()}
    compaction = (
        Compaction.read(content["compaction"], tensors, spec) if content["format"] == COMPACTING_FORMAT else None
    )
    return Bundle(spec, layers_per_group, bases["keys"], bases["values"], profiles, measured, compaction)


def _model(content: Mapping[str, Any]) -> tuple[ModelSpec, int]:
    """The model of a bundle, and its layers per group. Raises UnsupportedBundleError, or one of _NO_BUNDLE."""
    spec = ModelSpec.from_proto(json_format.ParseDict(content["model"], pb.ModelSpec()))
    problems = spec.problems() or ([] if spec.dense_layers else ["it has no dense layers"])
    if problems:
        raise ValueError(f"its model is none: {'; '.join(problems)}")
    _check_rope(spec)
    layers_per_group = int(content["layers_per_group"])
    if not 1 <= layers_per_group <= len(spec.dense_layers):
        raise ValueError(f"layers_per_group must be 1 to {len(spec.dense_layers)}, got {layers_per_group}")
    return spec, layers_per_group


def _check_rope(spec: ModelSpec) -> None:
    """No block is coded with rotary positions that cannot be removed, so such a bundle is of another version."""
    row, positions = np.zeros((1, spec.dense_layers[0].key_dim), np.float32), np.zeros(1, np.int32)
    try:
        for kind in {layer.rope for layer in spec.dense_layers}:
            rope.apply(row, positions, kind)
    except UnsupportedRopeError as error:
        raise UnsupportedBundleError(f"a bundle with rotary positions of another version: {error}") from None


def _measured(name: str, content: dict[str, Any], profiles: Container[str]) -> pb.Measured:
    message = json_format.ParseDict(content, pb.Measured())
    if name not in profiles or not all(np.isfinite(getattr(message, number)) for number in _MEASURED_NUMBERS):
        raise ValueError(f"measurements of {str(name)[:40]!r} are not of this bundle, or not finite")
    return message
