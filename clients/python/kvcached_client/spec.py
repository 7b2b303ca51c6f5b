"""What identifies a model, and what a block is worth: ModelSpec and Fidelity, and their protobuf twins.

Two models whose specs differ never share a block. Field names and meanings are those of proto/kvcached/v1, which is
their manual; a field added later gets a default, and a field at its default is left out of the canonical encoding, so
that ids stay what they are.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from enum import IntEnum
from functools import cached_property
from math import isfinite
from typing import Any, cast

from ._proto import kvcached_pb2 as pb

DENSE_DTYPES = ("float16", "bfloat16", "float32")


class LayerKind(IntEnum):
    """What a layer keeps of the past. On disk and wire: never renumber."""

    ATTENTION = 1
    SLIDING_WINDOW = 2
    STATE = 3
    LATENT = 4


class FidelityKind(IntEnum):
    """Higher is better. On disk and wire: never renumber."""

    COMPACTED = 1
    CODED = 2
    EXACT = 3


@dataclass(frozen=True, slots=True)
class Fidelity:
    """How faithful a stored block is to what the engine handed over."""

    kind: FidelityKind = FidelityKind.EXACT
    profile: str = ""
    am_ratio: float = 0.0
    bundle_id: bytes = b""

    def to_proto(self) -> pb.Fidelity:
        return pb.Fidelity(
            kind=kind_to_proto(self.kind), profile=self.profile, am_ratio=self.am_ratio, bundle_id=self.bundle_id
        )

    @classmethod
    def from_proto(cls, message: pb.Fidelity) -> "Fidelity":
        return cls(kind_from_proto(message.kind), message.profile, message.am_ratio, message.bundle_id)


def kind_to_proto(kind: FidelityKind) -> pb.FidelityKind:
    return cast(pb.FidelityKind, int(kind))


def kind_from_proto(value: int) -> FidelityKind:
    """Unspecified means EXACT, the only answer that cannot disappoint. Raises ValueError for an unknown number."""
    return FidelityKind(value) if value else FidelityKind.EXACT


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Digests of what a model is made of, kept apart so that a miss can be explained."""

    config: str = ""
    weights: str = ""
    adapter: str = ""
    tokenizer: str = ""


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary positions of a layer. dims == 0: none. scaling_json: the model's rope_scaling as canonical JSON."""

    dims: int = 0
    theta: float = 0.0
    interleaved: bool = False
    scaling_json: str = ""


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One layer of a model. A layer that is not `opaque` is dense: its cache is rows the codec understands."""

    kind: LayerKind = LayerKind.ATTENTION
    n_query_heads: int = 0
    n_kv_heads: int = 0
    key_dim: int = 0
    value_dim: int = 0
    window: int = 0
    softmax_scale: float = 0.0
    soft_cap: float = 0.0
    has_sinks: bool = False
    rope: RopeSpec = field(default_factory=RopeSpec)
    opaque: bool = False


@dataclass(frozen=True)
class ModelSpec:
    """Everything that changes the keys and values a model yields for given tokens; `name` alone is for people."""

    fingerprint: Fingerprint
    kv_dtype: str
    block_size: int
    layers: tuple[LayerSpec, ...]
    name: str = ""

    @cached_property
    def model_id(self) -> bytes:
        """Names the model in every call; made of all fields but the name."""
        return hashlib.sha256(b"kvcached/model/1\n" + self.canonical()).digest()

    def canonical(self) -> bytes:
        """Canonical JSON of all but the name: sorted keys, no white space, defaults left out."""
        content = _canonical(replace(self, name=""))
        return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()

    @property
    def dense_layers(self) -> tuple[LayerSpec, ...]:
        return tuple(layer for layer in self.layers if not layer.opaque)

    @property
    def needs_boundary(self) -> bool:
        """Whether generation can only go on where the state of some layer was kept (see Header.boundary)."""
        return any(layer.kind in (LayerKind.SLIDING_WINDOW, LayerKind.STATE) for layer in self.layers)

    def dense_shapes(self) -> dict[str, tuple[int, int, int, int]]:
        """Shapes of the tensors "keys" and "values" of one block; empty for a model without dense layers."""
        dense = self.dense_layers
        if not dense:
            return {}
        heads = (len(dense), dense[0].n_kv_heads, self.block_size)
        return {"keys": (*heads, dense[0].key_dim), "values": (*heads, dense[0].value_dim)}

    def problems(self) -> list[str]:
        """What is wrong with this spec, in words; empty if it can be registered."""
        return _spec_problems(self)

    def to_proto(self) -> pb.ModelSpec:
        layers = []
        for layer in self.layers:
            content = {f.name: getattr(layer, f.name) for f in fields(layer) if f.name not in ("kind", "rope")}
            kind = cast(pb.LayerKind, int(layer.kind))
            layers.append(pb.LayerSpec(kind=kind, rope=pb.RopeSpec(**asdict(layer.rope)), **content))
        return pb.ModelSpec(
            fingerprint=pb.Fingerprint(**asdict(self.fingerprint)),
            kv_dtype=self.kv_dtype,
            block_size=self.block_size,
            layers=layers,
            name=self.name,
        )

    @classmethod
    def from_proto(cls, message: pb.ModelSpec) -> "ModelSpec":
        """Raises ValueError where a number names no kind."""
        layers = tuple(
            _copy_fields(LayerSpec, layer, kind=LayerKind(layer.kind), rope=_copy_fields(RopeSpec, layer.rope))
            for layer in message.layers
        )
        fingerprint = _copy_fields(Fingerprint, message.fingerprint)
        return cls(fingerprint, message.kv_dtype, message.block_size, layers, message.name)


def _copy_fields(cls: Any, message: Any, **given: Any) -> Any:
    return cls(**{f.name: getattr(message, f.name) for f in fields(cls) if f.name not in given}, **given)


def _canonical(value: Any) -> Any:
    """Dataclasses as dicts without what is zero, empty or false, which is what every default here is."""
    if is_dataclass(value):
        # A theta of 10000 and one of 10000.0 are the same model.
        items = ((f.name, f.type, _canonical(getattr(value, f.name))) for f in fields(value))
        return {name: float(item) if kind is float else item for name, kind, item in items if item}
    if isinstance(value, tuple):
        return [_canonical(element) for element in value]
    return int(value) if isinstance(value, IntEnum) else value


# A model beyond these is a mistake or an attack; the largest public models stay far below.
MAX_LAYERS, MAX_HEADS, MAX_DIM, MAX_BLOCK_SIZE = 1024, 1024, 16384, 65536


def _spec_problems(spec: ModelSpec) -> list[str]:
    problems = []
    if not 1 <= spec.block_size <= MAX_BLOCK_SIZE:
        problems.append(f"block_size must be 1 to {MAX_BLOCK_SIZE}, got {spec.block_size}")
    if not 1 <= len(spec.layers) <= MAX_LAYERS:
        problems.append(f"a model must have 1 to {MAX_LAYERS} layers, got {len(spec.layers)}")
    if not spec.fingerprint.weights:
        problems.append("fingerprint.weights must not be empty: blocks of different weights would meet")
    numbers = [n for layer in spec.layers for n in (layer.softmax_scale, layer.soft_cap, layer.rope.theta)]
    if not all(map(isfinite, numbers)):
        problems.append("softmax_scale, soft_cap and theta must be finite")
    dense = spec.dense_layers
    if dense:
        problems += _dense_problems(spec.kv_dtype, dense)
    return problems


def _dense_problems(kv_dtype: str, dense: tuple[LayerSpec, ...]) -> list[str]:
    problems = []
    if kv_dtype not in DENSE_DTYPES:
        problems.append(f"kv_dtype of dense layers must be one of {', '.join(DENSE_DTYPES)}, got {kv_dtype!r}")
    if any(layer.kind != LayerKind.ATTENTION for layer in dense):
        problems.append("only layers of kind ATTENTION can be dense, the others must be opaque")
    shapes = {(layer.n_kv_heads, layer.key_dim, layer.value_dim) for layer in dense}
    if len(shapes) > 1:
        problems.append(f"dense layers must agree on (n_kv_heads, key_dim, value_dim), got {sorted(shapes)}")
    for heads, *dims in shapes:
        if not (1 <= heads <= MAX_HEADS and all(1 <= dim <= MAX_DIM for dim in dims)):
            problems.append(f"n_kv_heads must be 1 to {MAX_HEADS} and dims 1 to {MAX_DIM}, got {heads} and {dims}")
    return problems
