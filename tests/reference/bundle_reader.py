"""A second reader of bundle files, written from docs/format.md alone: slow, and obviously right.

Like frame_reader it shares no code with kvcached, nor with the library that kvcached reads safetensors with.
"""

import hashlib
import json
import math
import struct
from typing import Any

import numpy as np
from reference.frame_reader import Corrupt, Unsupported

Fields = dict[str, Any]

FORMAT = "kvcached bundle 1"
MAX_FILE_BYTES, MAX_HEADER_BYTES = 2 * 1024**3, 4 * 1024**2
PROFILES = ("near-lossless", "x8", "x16", "x32")
KV_DTYPES = ("float16", "bfloat16", "float32")
ATTENTION = 1
# Type and bounds of every field of a model. A float is a float even where it is whole.
FINGERPRINT: Fields = {"config": str, "weights": str, "adapter": str, "tokenizer": str}
ROPE: Fields = {"dims": int, "theta": float, "interleaved": bool, "scaling_json": str}
LAYER: Fields = {
    **dict.fromkeys(("kind", "n_query_heads", "n_kv_heads", "key_dim", "value_dim", "window"), int),
    "softmax_scale": float,
    "soft_cap": float,
    "has_sinks": bool,
    "rope": ROPE,
    "opaque": bool,
}
MODEL: Fields = {"fingerprint": FINGERPRINT, "kv_dtype": str, "block_size": int, "layers": [LAYER], "name": str}
PROFILE: Fields = {"target_compression": (1, 1e6), "dead_zone": (0, 0.5), "centroid": (0, 0.5)}
MEASURED: Fields = {
    **dict.fromkeys(("bits_per_value", "compression", "kl", "kl_low", "kl_high", "perplexity_delta"), float),
    **dict.fromkeys(("perplexity_delta_low", "perplexity_delta_high"), float),
    **dict.fromkeys(("attention_error_mean", "attention_error_worst"), float),
    "n_tokens": int,
    "n_documents": int,
    "engine": str,
}
MAX_OF = {"n_tokens": 2**64 - 1}


def read_bundle(data: bytes) -> Fields:
    """The fields of the file's JSON, and "id", "tensors" by name, "dense" (layers), "groups" (lists of them)."""
    header, content = _read_json(data)
    model = content["model"]
    _check_fields(model, MODEL, "model")
    dense = _dense_layers(model)
    for layer in dense:
        frequencies(layer)
    per_group = content["layers_per_group"]
    if type(per_group) is not int or not 1 <= per_group <= len(dense):
        raise Corrupt("layers_per_group is not 1 to the number of layers")
    groups = [dense[start : start + per_group] for start in range(0, len(dense), per_group)]
    _check_profiles(content["profiles"])
    _check_measured(content)
    tensors = _read_tensors(data, header)
    _check_tensors(tensors, groups, content["profiles"])
    identity = _identity(content, tensors)
    if content["checksum"] != hashlib.sha256(identity + canonical(content["measured"])).hexdigest():
        raise Corrupt("the checksum does not match")
    return {**content, "id": identity, "tensors": tensors, "dense": dense, "groups": groups}


def canonical(content: Any) -> bytes:
    try:
        return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise Corrupt("JSON that cannot be canonical") from error


def n_features(side: str, layers: list[Fields]) -> int:
    dim = layers[0]["key_dim" if side == "keys" else "value_dim"]
    return len(layers) * layers[0]["n_kv_heads"] * dim


def frequencies(layer: Fields) -> list[float]:
    """θ of each pair of features of a dense layer."""
    rope = layer.get("rope", {})
    dims, theta = rope.get("dims", 0), rope.get("theta", 0.0)
    if dims == 0:
        return []
    if dims % 2 or dims > layer["key_dim"] or not theta > 1:
        raise Unsupported("rotary positions that do not fit the layer")
    plain = [theta ** (-2 * i / dims) for i in range(dims // 2)]
    scaling = parsed(rope.get("scaling_json") or "{}", Unsupported)
    kind = isinstance(scaling, dict) and (scaling.get("type") or scaling.get("rope_type", "default"))
    if kind == "default":
        return plain
    if kind != "linear":
        raise Unsupported(f"rotary scaling {kind}")
    factor = scaling.get("factor")
    if type(factor) not in (int, float) or not (math.isfinite(factor) and factor > 0):
        raise Unsupported("a linear scaling without factor")
    if max(plain) / factor >= 1e6:
        raise Unsupported("angles that no model has")
    return [t / factor for t in plain]


def parsed(text: str, refusal: type[Exception] = Corrupt) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise refusal("no JSON") from error


# ---- safetensors, and the JSON in it


def _read_json(data: bytes) -> tuple[Fields, Fields]:
    if len(data) > MAX_FILE_BYTES or len(data) < 10:
        raise Corrupt("no size of a bundle")
    (n,) = struct.unpack_from("<Q", data)
    if n > MAX_HEADER_BYTES or 8 + n > len(data):
        raise Corrupt("no size of a header")
    try:
        header = parsed(data[8 : 8 + n].decode("utf-8"))
    except UnicodeDecodeError as error:
        raise Corrupt("a header that is not UTF-8") from error
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or set(metadata) != {"kvcached"} or not isinstance(metadata["kvcached"], str):
        raise Corrupt("not the one metadata key kvcached")
    content = parsed(metadata["kvcached"])
    if not isinstance(content, dict) or not isinstance(content.get("format"), str):
        raise Corrupt("no format")
    if content["format"] != FORMAT:
        raise Unsupported("another format")
    if set(content) != {"format", "model", "layers_per_group", "profiles", "measured", "checksum"}:
        raise Corrupt("other fields than those of a bundle")
    if canonical(content) != metadata["kvcached"].encode("utf-8", "surrogatepass"):
        raise Corrupt("JSON that is not canonical")
    del header["__metadata__"]
    return header, content


def _read_tensors(data: bytes, header: Fields) -> dict[str, np.ndarray]:
    """Every tensor, all together filling the file without gaps."""
    (n,) = struct.unpack_from("<Q", data)
    body = data[8 + n :]
    tensors, spans = {}, []
    for name, entry in header.items():
        try:
            dtype = {"F32": "<f4", "F16": "<f2", "U8": "u1"}[entry["dtype"]]
            start, end = entry["data_offsets"]
            tensors[name] = np.frombuffer(body[start:end], dtype).reshape(entry["shape"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise Corrupt("a tensor that is none of a bundle") from error
        if not all(type(number) is int for number in (start, end, *entry["shape"])) or len(entry) != 3:
            raise Corrupt("a tensor described in another way")
        spans.append((start, end))
    edges = [0, *(edge for span in sorted(spans) for edge in span), len(body)]
    if edges[::2] != edges[1::2]:
        raise Corrupt("tensors with gaps, or overlapping")
    return tensors


# ---- what the fields must be


def _check_fields(value: Any, kind: Any, path: str) -> None:
    """That a value is of a kind: a type, a list of a kind, or fields of kinds, those at their default left out."""
    if isinstance(kind, dict):
        if not isinstance(value, dict) or set(value) - set(kind):
            raise Corrupt(f"{path} is not what it should be")
        for name, part in value.items():
            _check_fields(part, kind[name], name)
            if not part:
                raise Corrupt(f"{name} is there although it is at its default")
    elif isinstance(kind, list):
        if not isinstance(value, list):
            raise Corrupt(f"{path} is no list")
        for part in value:
            _check_fields(part, kind[0], path)
    elif type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise Corrupt(f"{path} is no {kind.__name__}")
    elif kind is int and not 0 <= value <= MAX_OF.get(path, 2**32 - 1):
        raise Corrupt(f"{path} is out of range")


def _dense_layers(model: Fields) -> list[Fields]:
    layers = model.get("layers", [])
    if not 1 <= len(layers) <= 1024 or not 1 <= model.get("block_size", 0) <= 65536:
        raise Corrupt("no number of layers, or no block size")
    if "weights" not in model.get("fingerprint", {}) or any(layer.get("kind") not in (1, 2, 3, 4) for layer in layers):
        raise Corrupt("a model without weights, or a layer without a kind")
    dense = [layer for layer in layers if not layer.get("opaque")]
    shapes = {tuple(layer.get(name, 0) for name in ("n_kv_heads", "key_dim", "value_dim")) for layer in dense}
    if len(shapes) != 1 or any(layer["kind"] != ATTENTION for layer in dense):
        raise Corrupt("no dense layers, or such that do not agree")
    ((heads, *dims),) = shapes
    if not 1 <= heads <= 1024 or not all(1 <= dim <= 16384 for dim in dims):
        raise Corrupt("heads or dims out of range")
    if model.get("kv_dtype") not in KV_DTYPES:
        raise Corrupt("no KV dtype of dense layers")
    return dense


def _check_profiles(profiles: Any) -> None:
    if not isinstance(profiles, dict) or set(profiles) - set(PROFILES):
        raise Corrupt("profiles that no bundle has")
    for profile in profiles.values():
        if not isinstance(profile, dict) or set(profile) != set(PROFILE):
            raise Corrupt("a profile with other fields")
        for name, (low, high) in PROFILE.items():
            if type(profile[name]) is not float or not low <= profile[name] <= high:
                raise Corrupt(f"{name} is out of range")


def _check_measured(content: Fields) -> None:
    measured = content["measured"]
    if not isinstance(measured, dict) or set(measured) - set(content["profiles"]):
        raise Corrupt("measurements of no profile")
    for fields in measured.values():
        _check_fields(fields, MEASURED, "measured")


def _check_tensors(tensors: dict[str, np.ndarray], groups: list[list[Fields]], profiles: Fields) -> None:
    expected: dict[str, tuple[str, tuple[int, ...]]] = {}
    for side in ("keys", "values"):
        for group, layers in enumerate(groups):
            at, width = f"{side}.{group}", n_features(side, layers)
            rank = tensors[f"{at}.variances"].size if f"{at}.variances" in tensors else 0
            if not 1 <= rank <= width:
                raise Corrupt("a basis of no component, or of too many")
            expected |= {f"{at}.mean": ("float32", (width,)), f"{at}.variances": ("float32", (rank,))}
            expected |= {f"{at}.forward": ("float16", (width, rank)), f"{at}.inverse": ("float16", (rank, width))}
            for name in profiles:
                expected |= {f"{name}.{at}.steps": ("float32", (rank,)), f"{name}.{at}.scales": ("uint8", (rank,))}
    if {name: (array.dtype.name, array.shape) for name, array in tensors.items()} != expected:
        raise Corrupt("not the tensors of this bundle")
    for name, array in tensors.items():
        largest = {"steps": 2.0**96, "scales": 63}.get(name.rpartition(".")[2], np.inf)
        smallest = -np.inf if name.endswith(("mean", "forward", "inverse")) else 0
        if not (np.isfinite(array) & (array >= smallest) & (array <= largest)).all():
            raise Corrupt(f"{name} has a number that it cannot have")


def _identity(content: Fields, tensors: dict[str, np.ndarray]) -> bytes:
    named = {name: content[name] for name in ("format", "model", "layers_per_group", "profiles")}
    digest = hashlib.sha256(canonical(named))
    for name in sorted(tensors):
        array = tensors[name]
        shape = f"({array.shape[0]},)" if array.ndim == 1 else f"({array.shape[0]}, {array.shape[1]})"
        digest.update(f"\n{name} {array.dtype.name} {shape}\n".encode() + array.tobytes())
    return digest.digest()
