"""The bundle: what calibration yields for one model, as safetensors. Made once, named by its content in every frame.

    file      := safetensors with the tensors below and one metadata key, "kvcached": canonical JSON
    JSON      := format, model (a ModelSpec), layers_per_group, checksum, measured {name: ...},
                 profiles {name: target_compression, dead_zone, centroid}
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
from jaxtyping import Float32, Shaped, UInt8
from safetensors import SafetensorError
from safetensors.numpy import load, save

from kvcached.block import Fidelity, FidelityKind, ModelSpec
from kvcached.codec import rope
from kvcached.codec.klt import Basis
from kvcached.errors import CorruptBundleError, PreconditionError, UnsupportedBundleError, UnsupportedRopeError
from kvcached_client._proto import kvcached_pb2 as pb

FORMAT = "kvcached bundle 1"
MAX_BYTES = 2 << 30
SIDES = ("keys", "values")
# Every profile, the best first, with the compression to reach, every byte of a frame counted. A name says the least:
# x8 aims higher because the loss allows it (docs/quality.md).
PROFILES: Mapping[str, float] = {"near-lossless": 4.0, "x8": 11.0, "x16": 16.0, "x32": 32.0}
DEFAULT_PROFILE = "x8"
_MAX_HEADER_BYTES = 4 << 20  # as Python objects some thirty times that
HEAD_BYTES = 8 + _MAX_HEADER_BYTES  # of a file at most, before its tensors
_MAX_QUOTED = 200  # characters of a spec in a message
_MAX_STEP, _N_SCALES = 2.0**96, 64
_MEASURED_NUMBERS = tuple(f.name for f in pb.Measured.DESCRIPTOR.fields if f.name != "engine")

Tensors = dict[str, Shaped[np.ndarray, "..."]]


@dataclass(frozen=True, slots=True, eq=False)
class Tables:
    """How a profile codes each component of a plane: its step (0: not at all), and the scale index of its table."""

    steps: Float32[np.ndarray, " n_components"]
    scales: UInt8[np.ndarray, " n_components"]


@dataclass(frozen=True, slots=True, eq=False)
class Profile:
    """One trade of bytes for loss: tables for the planes of every group of layers, and how coefficients are rounded."""

    target_compression: float
    dead_zone: float
    centroid: float
    keys: tuple[Tables, ...]
    values: tuple[Tables, ...]


@dataclass(frozen=True, slots=True, eq=False)
class PlaneCoder:
    """What codes one plane: the components that a profile keeps, and nothing of the others."""

    basis: Basis
    tables: Tables
    n_features: int


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


@dataclass(frozen=True, slots=True)
class Outline:
    """What a bundle says of itself beside its tensors. profiles: name and compression to reach, the best first."""

    spec: ModelSpec
    layers_per_group: int
    profiles: Mapping[str, float]
    measured: Mapping[str, pb.Measured]

    @classmethod
    def unpack(cls, beginning: bytes) -> "Outline":
        """Of the first HEAD_BYTES of a file, and quick: `Bundle.unpack`, which raises alike, checks what is said."""
        content, _ = _read_content(beginning)
        try:
            described = content["profiles"]
            targets = {n: float(described[n]["target_compression"]) for n in PROFILES if n in described}
            measured = {name: _measured(name, m, targets) for name, m in content["measured"].items()}
            return cls(*_model(content), targets, measured)
        except _NO_BUNDLE as error:
            raise CorruptBundleError(f"not a bundle: {str(error)[:_MAX_QUOTED]}") from None


@dataclass(frozen=True, eq=False)
class Bundle:
    """Bases for each group of consecutive dense layers, keys and values apart, and the profiles that use them.

    measured: what each profile was measured to lose, messages of the protocol by name of the profile.
    """

    spec: ModelSpec
    layers_per_group: int
    keys: tuple[Basis, ...]
    values: tuple[Basis, ...]
    profiles: Mapping[str, Profile]
    measured: Mapping[str, pb.Measured] = field(default_factory=dict)

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
        return Outline(self.spec, self.layers_per_group, targets, dict(self.measured))

    def coder(self, profile: str) -> Coder:
        """A profile, ready for use. Raises KeyError for one that the bundle does not have."""
        tables = self.profiles[profile]
        return Coder(
            spec=self.spec,
            fidelity=Fidelity(FidelityKind.CODED, profile, bundle_id=self.bundle_id),
            layers_per_group=self.layers_per_group,
            dead_zone=tables.dead_zone,
            centroid=tables.centroid,
            keys=tuple(map(_plane_coder, self.keys, tables.keys)),
            values=tuple(map(_plane_coder, self.values, tables.values)),
        )

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
        numbers = ("target_compression", "dead_zone", "centroid")
        return {
            "format": FORMAT,
            "model": model,
            "layers_per_group": int(self.layers_per_group),
            "profiles": {name: {n: float(getattr(p, n)) for n in numbers} for name, p in self.profiles.items()},
        }

    def _tensors(self) -> Tensors:
        tensors: Tensors = {}
        for side in SIDES:
            for group, basis in enumerate(getattr(self, side)):
                at = f"{side}.{group}"
                tensors |= {f"{at}.mean": basis.mean, f"{at}.variances": basis.variances}
                tensors |= {f"{at}.{name}": getattr(basis, name).astype(np.float16) for name in ("forward", "inverse")}
                for name, profile in self.profiles.items():
                    tables: Tables = getattr(profile, side)[group]
                    tensors |= {f"{name}.{at}.steps": tables.steps, f"{name}.{at}.scales": tables.scales}
        return {name: np.ascontiguousarray(array) for name, array in tensors.items()}  # save takes memory as it lies


def storable(basis: Basis) -> Basis:
    """A basis as a bundle keeps it, its matrices rounded to float16: steps and tables are chosen for this one.

    Raises:
        ValueError: it holds numbers that are not finite, or that float16 does not hold.
    """
    with np.errstate(over="ignore"):
        forward, inverse = (matrix.astype(np.float16).astype(np.float32) for matrix in (basis.forward, basis.inverse))
    if not all(np.isfinite(numbers).all() for numbers in (basis.mean, forward, inverse, basis.variances)):
        raise ValueError("a basis must be of finite numbers, its matrices of such that float16 can hold")
    return Basis(basis.mean, forward, inverse, basis.variances)


def group_widths(spec: ModelSpec, layers_per_group: int, side: str) -> list[int]:
    """Features of the planes of each group of layers."""
    n_layers, n_kv_heads, _, dim = spec.dense_shapes()[side]
    starts = range(0, n_layers, layers_per_group)
    return [min(layers_per_group, n_layers - start) * n_kv_heads * dim for start in starts]


def _plane_coder(basis: Basis, tables: Tables) -> PlaneCoder:
    kept = tables.steps > 0
    if kept.all():
        return PlaneCoder(basis, tables, len(basis.mean))
    part = Basis(
        basis.mean,
        np.ascontiguousarray(basis.forward[:, kept]),
        np.ascontiguousarray(basis.inverse[kept]),
        basis.variances[kept],
    )
    return PlaneCoder(part, Tables(tables.steps[kept], tables.scales[kept]), len(basis.mean))


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
    *(SafetensorError, json_format.Error, ValueError, KeyError, TypeError),
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
    if found != FORMAT:
        raise UnsupportedBundleError(f"expected format {FORMAT!r}, got {found[:40]!r}")
    return content, text


def _build(content: Mapping[str, Any], tensors: Tensors) -> Bundle:
    """Raises UnsupportedBundleError, or one of _NO_BUNDLE."""
    spec, layers_per_group = _model(content)
    widths = {side: group_widths(spec, layers_per_group, side) for side in SIDES}
    bases = {side: tuple(_basis(tensors, f"{side}.{i}", w) for i, w in enumerate(widths[side])) for side in SIDES}
    ranks = {side: [len(basis.variances) for basis in bases[side]] for side in SIDES}
    described = content["profiles"]
    if unknown := set(described) - set(PROFILES):
        raise ValueError(f"profiles are {', '.join(PROFILES)}, got {sorted(unknown)[:3]!s}")
    profiles = {name: _profile(tensors, name, described[name], ranks) for name in PROFILES if name in described}
    measured = {name: _measured(name, m, profiles) for name, m in content["measured"].items()}
    return Bundle(spec, layers_per_group, bases["keys"], bases["values"], profiles, measured)


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


def _basis(tensors: Tensors, at: str, n_features: int) -> Basis:
    rank = len(tensors[f"{at}.variances"])
    if not 1 <= rank <= n_features:
        raise ValueError(f"{at} must have 1 to {n_features} components, got {rank}")
    variances = _tensor(tensors, f"{at}.variances", np.float32, rank)
    if variances.min() < 0:
        raise ValueError(f"{at} has a variance below 0")
    return Basis(
        _tensor(tensors, f"{at}.mean", np.float32, n_features),
        _tensor(tensors, f"{at}.forward", np.float16, n_features, rank).astype(np.float32),
        _tensor(tensors, f"{at}.inverse", np.float16, rank, n_features).astype(np.float32),
        variances,
    )


def _profile(tensors: Tensors, name: str, content: Mapping[str, Any], ranks: Mapping[str, list[int]]) -> Profile:
    target, dead_zone, centroid = (float(content[key]) for key in ("target_compression", "dead_zone", "centroid"))
    if not (1 <= target <= 1e6 and 0 <= dead_zone <= 0.5 and 0 <= centroid <= 0.5):
        raise ValueError(f"{name} has a target of {target}, a dead zone of {dead_zone}, a centroid of {centroid}")
    keys, values = (
        tuple(_tables(tensors, f"{name}.{side}.{group}", rank) for group, rank in enumerate(ranks[side]))
        for side in SIDES
    )
    return Profile(target, dead_zone, centroid, keys, values)


def _tables(tensors: Tensors, at: str, rank: int) -> Tables:
    steps = _tensor(tensors, f"{at}.steps", np.float32, rank)
    scales = _tensor(tensors, f"{at}.scales", np.uint8, rank)
    if not ((steps >= 0) & (steps <= _MAX_STEP)).all() or scales.max(initial=0) >= _N_SCALES:
        raise ValueError(f"{at} has a step that is none, or a scale index of {_N_SCALES} or more")
    return Tables(steps, scales)


def _tensor(tensors: Tensors, name: str, dtype: type, *shape: int) -> Any:
    array = tensors[name]
    if array.dtype != dtype or array.shape != shape or not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite {np.dtype(dtype).name} {shape}, got {array.dtype.name} {array.shape}")
    return array


def _measured(name: str, content: dict[str, Any], profiles: Container[str]) -> pb.Measured:
    message = json_format.ParseDict(content, pb.Measured())
    if name not in profiles or not all(np.isfinite(getattr(message, number)) for number in _MEASURED_NUMBERS):
        raise ValueError(f"measurements of {str(name)[:40]!r} are not of this bundle, or not finite")
    return message
