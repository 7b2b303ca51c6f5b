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

PLAIN, COMPACTING = FORMATS = ("kvcached bundle 1", "kvcached bundle 2")
MAX_FILE_BYTES, MAX_HEADER_BYTES = 2 * 1024**3, 4 * 1024**2
PROFILES, COMPACTED_PROFILES = ("near-lossless", "x8", "x16", "x32"), ("x8", "x16")
ANCHORS = ("2", "4", "8")
MAX_FRACTIONS, MAX_QUERIES = 64, 4096
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
COMPACTED_PROFILE: Fields = {**PROFILE, "bound": (0, 1.7976931348623157e308)}  # any finite number
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
    _check_profiles(content["profiles"], PROFILES, PROFILE)
    _check_measured(content)
    _check_anchors(content, dense)
    tensors = _read_tensors(data, header)
    _check_shapes(tensors, _expected_tensors(tensors, groups, content))
    _check_numbers(tensors)
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
    if content["format"] not in FORMATS:
        raise Unsupported("another format")
    fields = {"format", "model", "layers_per_group", "profiles", "measured", "checksum"}
    if set(content) != fields | ({"compaction"} if content["format"] == COMPACTING else set()):
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


def _check_profiles(profiles: Any, names: tuple[str, ...], fields: Fields) -> None:
    if not isinstance(profiles, dict) or set(profiles) - set(names):
        raise Corrupt("profiles that no bundle has")
    for profile in profiles.values():
        if not isinstance(profile, dict) or set(profile) != set(fields):
            raise Corrupt("a profile with other fields")
        for name, (low, high) in fields.items():
            if type(profile[name]) is not float or not low <= profile[name] <= high:
                raise Corrupt(f"{name} is out of range")


def _check_measured(content: Fields) -> None:
    measured = content["measured"]
    if not isinstance(measured, dict) or set(measured) - set(content["profiles"]):
        raise Corrupt("measurements of no profile")
    for fields in measured.values():
        _check_fields(fields, MEASURED, "measured")


def _check_anchors(content: Fields, dense: list[Fields]) -> None:
    if content["format"] == PLAIN:
        return
    compaction = content["compaction"]
    if not isinstance(compaction, dict) or set(compaction) != {"anchors"}:
        raise Corrupt("compaction of other fields")
    anchors = compaction["anchors"]
    if not isinstance(anchors, dict) or set(anchors) - set(ANCHORS) or ANCHORS[-1] not in anchors:
        raise Corrupt("anchors that no bundle has")
    for anchor in anchors.values():
        if not isinstance(anchor, dict) or set(anchor) != {"heads", "leaders", "profiles"} or not anchor["profiles"]:
            raise Corrupt("an anchor of other fields, or without profiles")
        _check_profiles(anchor["profiles"], COMPACTED_PROFILES, COMPACTED_PROFILE)
        _check_heads(anchor["heads"], len(dense) * dense[0]["n_kv_heads"])
        _check_leaders(anchor["leaders"], anchor["heads"])


def _check_heads(planes: Any, n_heads: int) -> None:
    if not isinstance(planes, list) or not all(isinstance(plane, list) and plane for plane in planes):
        raise Corrupt("no lists of heads")
    heads = [head for plane in planes for head in plane]
    if not all(type(head) is int for head in heads) or len(heads) != n_heads or sorted(heads) != list(range(n_heads)):
        raise Corrupt("not all heads, each once")


def _check_leaders(leaders: Any, planes: list[list[int]]) -> None:
    if not isinstance(leaders, list) or len(leaders) != len(planes):
        raise Corrupt("not an entry in leaders for each plane")
    for leader in leaders:
        if leader is None:
            continue
        if type(leader) is not int or not 0 <= leader < len(planes):
            raise Corrupt("a leader that is no plane")
        if len(planes[leader]) == 1 or leaders[leader] is not None:
            raise Corrupt("a leader of one head, or with a leader itself")


Shapes = dict[str, tuple[str, tuple[int, ...]]]  # dtype and shape of tensors by name


def _expected_tensors(tensors: dict[str, np.ndarray], groups: list[list[Fields]], content: Fields) -> Shapes:
    expected: Shapes = {}
    for side in ("keys", "values"):
        for group, layers in enumerate(groups):
            expected |= _of_plane(tensors, "", content["profiles"], f"{side}.{group}", n_features(side, layers))
    if content["format"] == COMPACTING:
        dense = [layer for layers in groups for layer in layers]
        expected |= _of_compaction(tensors, dense)
        for ratio, anchor in content["compaction"]["anchors"].items():
            expected |= _of_anchor(tensors, f"compaction.{ratio}.", anchor, dense[0])
    return expected


def _of_anchor(tensors: dict[str, np.ndarray], prefix: str, anchor: Fields, layer: Fields) -> Shapes:
    """Those of all planes. A predictor may be there or not, where anything is known to predict from."""
    expected: Shapes = {}
    keys, values = ([len(heads) * layer[dim] for heads in anchor["heads"]] for dim in ("key_dim", "value_dim"))
    for number, leader in enumerate(anchor["leaders"]):
        of_leader = 0 if leader is None else keys[leader] + values[leader]
        for side, width, known in (
            ("keys", keys[number], of_leader),
            ("values", values[number], of_leader + keys[number]),
        ):
            expected |= _of_plane(tensors, prefix, anchor["profiles"], f"{side}.{number}", width)
            predictor = f"{prefix}{side}.{number}.predictor"
            if known and predictor in tensors:
                expected[predictor] = ("float16", (known, width))
    return expected


def _of_plane(tensors: dict[str, np.ndarray], prefix: str, profiles: Fields, at: str, width: int) -> Shapes:
    """Basis and tables of a plane; how many components there are is up to the bundle."""
    basis = f"{prefix}{at}"
    rank = tensors[f"{basis}.variances"].size if f"{basis}.variances" in tensors else 0
    if not 1 <= rank <= width:
        raise Corrupt("a basis of no component, or of too many")
    expected: Shapes = {f"{basis}.mean": ("float32", (width,)), f"{basis}.variances": ("float32", (rank,))}
    expected |= {f"{basis}.forward": ("float16", (width, rank)), f"{basis}.inverse": ("float16", (rank, width))}
    for name in profiles:
        tables = f"{prefix}{name}.{at}"
        expected |= {f"{tables}.steps": ("float32", (rank,)), f"{tables}.scales": ("uint8", (rank,))}
    return expected


def _of_compaction(tensors: dict[str, np.ndarray], dense: list[Fields]) -> Shapes:
    """Those of no plane; how many fractions and queries there are is up to the bundle."""
    heads, key_dim, value_dim = (dense[0][name] for name in ("n_kv_heads", "key_dim", "value_dim"))
    nothing = np.zeros((0, 0, 0, 0))
    n = tensors.get("compaction.fractions", nothing).size
    queries = tensors.get("compaction.queries", nothing)
    m = queries.shape[2] if queries.ndim == 4 else 0
    if not 1 <= n <= MAX_FRACTIONS or not 1 <= m <= MAX_QUERIES:
        raise Corrupt("no fractions or queries, or too many")
    return {
        "compaction.fractions": ("float32", (n,)),
        "compaction.curves": ("float32", (len(dense), heads, n)),
        "compaction.queries": ("float16", (len(dense), dense[0].get("n_query_heads", heads), m, key_dim)),
        "compaction.output_metric": ("float32", (len(dense), heads, value_dim, value_dim)),
    }


def _check_shapes(tensors: dict[str, np.ndarray], expected: Shapes) -> None:
    if {name: (array.dtype.name, array.shape) for name, array in tensors.items()} != expected:
        raise Corrupt("not the tensors of this bundle")


def _check_numbers(tensors: dict[str, np.ndarray]) -> None:
    for name, array in tensors.items():
        kind = name.rpartition(".")[2]
        largest = {"steps": 2.0**96, "scales": 63}.get(kind, np.inf)
        smallest = 0 if kind in ("variances", "steps", "scales", "curves") else -np.inf
        if not (np.isfinite(array) & (array >= smallest) & (array <= largest)).all():
            raise Corrupt(f"{name} has a number that it cannot have")
    fractions = tensors.get("compaction.fractions", np.ones(1)).tolist()
    if not all(a < b for a, b in zip([0, *fractions], fractions, strict=False)) or fractions[-1] != 1:
        raise Corrupt("fractions that do not ascend from above 0 to 1")


def _identity(content: Fields, tensors: dict[str, np.ndarray]) -> bytes:
    said = ("format", "model", "layers_per_group", "profiles", "compaction")
    named = {name: content[name] for name in said if name in content}
    digest = hashlib.sha256(canonical(named))
    for name in sorted(tensors):
        array = tensors[name]
        shape = f"({array.shape[0]},)" if array.ndim == 1 else f"({', '.join(map(str, array.shape))})"
        digest.update(f"\n{name} {array.dtype.name} {shape}\n".encode() + array.tobytes())
    return digest.digest()
