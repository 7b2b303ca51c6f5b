"""What a loaded mlx-lm model is, as a ModelSpec: digests of its files, and what its cache really looks like.

Shapes and dtypes are read off a cache after one token, not guessed from the configuration, so that any architecture of
mlx-lm is described as it behaves.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import hf_repo_to_path

from kvcached_client import Fingerprint, LayerKind, LayerSpec, ModelSpec, RopeSpec
from kvcached_client.spec import DENSE_DTYPES

from . import tree

DEFAULT_BLOCK_SIZE = 256
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json")
_WINDOWED = {"RotatingKVCache": "max_size", "ChunkedKVCache": "chunk_size"}


def model_spec(
    model: Any,
    path: str | Path,
    *,
    adapter_path: str | Path | None = None,
    kv_bits: int | None = None,
    kv_group_size: int = 64,
    block_size: int = DEFAULT_BLOCK_SIZE,
) -> ModelSpec:
    """The spec of a model loaded from a directory. With kv_bits, of its cache as mlx-lm quantises it.

    Raises:
        UnsupportedCacheError: the model has a cache of an unknown class.
        FileNotFoundError: there are no weights at `path`.
    """
    directory = Path(path)
    config = json.loads((directory / "config.json").read_text())
    cache = _cache_after_one_token(model, kv_bits, kv_group_size)
    layers, kv_dtype = _dense_where_alike([_layer(model, config, i, entry) for i, entry in enumerate(cache)])
    return ModelSpec(
        fingerprint=fingerprint(directory, adapter_path),
        kv_dtype=tree.quantized_dtype(kv_bits, kv_group_size) if kv_bits else kv_dtype,
        block_size=block_size,
        layers=layers,
        name=directory.resolve().name,
    )


def model_directory(model: str) -> Path:
    """Where a model's files are, given a directory or the name of a repository that mlx-lm has downloaded."""
    return Path(model) if Path(model).is_dir() else Path(hf_repo_to_path(model))


def fresh_cache(model: Any, kv_bits: int | None = None, kv_group_size: int = 64) -> list[Any]:
    """An empty prompt cache of the classes that the spec describes."""
    cache: list[Any] = make_prompt_cache(model)
    if kv_bits is None:
        return cache
    return [c.to_quantized(kv_group_size, kv_bits) if type(c).__name__ == "KVCache" else c for c in cache]


def _cache_after_one_token(model: Any, kv_bits: int | None, kv_group_size: int) -> list[Any]:
    cache = fresh_cache(model, kv_bits, kv_group_size)
    model(mx.array([[0]]), cache=cache)
    mx.eval([list(arrays.values()) for entry in cache for arrays in tree.read(entry)])
    return cache


def _layer(model: Any, config: dict[str, Any], index: int, entry: Any) -> tuple[LayerSpec, str]:
    """One entry of the cache as a layer, opaque for now, and the dtype of its keys."""
    tokens, state = tree.read(entry)
    arrays = tokens | state
    attention = getattr(model.layers[index], "self_attn", None) if index < len(model.layers) else None
    text = {**config, **config.get("text_config", {})}
    keys, values = arrays.get("keys"), arrays.get("values")
    dtype = str((keys if keys is not None else next(iter(arrays.values()))).dtype).removeprefix("mlx.core.")
    kind = _layer_kind(entry, text, state)
    if keys is None or values is None:
        return LayerSpec(kind=kind, opaque=True), dtype
    layer = LayerSpec(
        kind=kind,
        n_query_heads=text.get("num_attention_heads", 0),
        n_kv_heads=keys.shape[1],
        key_dim=keys.shape[-1],
        value_dim=values.shape[-1],
        window=getattr(entry, _WINDOWED.get(type(entry).__name__, ""), 0),
        softmax_scale=float(getattr(attention, "scale", keys.shape[-1] ** -0.5)),
        soft_cap=float(text.get("attn_logit_softcapping") or 0),
        has_sinks=getattr(attention, "sinks", None) is not None,
        rope=_rope(text, getattr(attention, "rope", None)),
        opaque=True,
    )
    return layer, dtype


def _layer_kind(entry: Any, config: dict[str, Any], state: tree.Arrays) -> LayerKind:
    if type(entry).__name__ in _WINDOWED:
        return LayerKind.SLIDING_WINDOW
    if state:
        return LayerKind.STATE
    return LayerKind.LATENT if config.get("kv_lora_rank") else LayerKind.ATTENTION


def _rope(config: dict[str, Any], rope: Any) -> RopeSpec:
    if rope is None:
        return RopeSpec()
    parameters = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or ({} if parameters.get("rope_type", "default") == "default" else parameters)
    if scaling.get("rope_type", scaling.get("type")) in ("longrope", "su"):  # which depends on them
        lengths = ("max_position_embeddings", "original_max_position_embeddings")
        scaling = {name: config[name] for name in lengths if name in config} | scaling
    return RopeSpec(
        dims=int(getattr(rope, "dims", 0) or getattr(rope, "dim", 0)),
        theta=float(config.get("rope_theta") or parameters.get("rope_theta") or getattr(rope, "base", 0) or 0),
        interleaved=bool(getattr(rope, "traditional", False)),
        scaling_json=json.dumps(scaling, sort_keys=True, separators=(",", ":")) if scaling else "",
    )


def _dense_where_alike(layers: list[tuple[LayerSpec, str]]) -> tuple[tuple[LayerSpec, ...], str]:
    """Plain attention layers of the commonest shape and dtype become dense: the codec works on them together.

    Returns all layers, and that dtype ("opaque" if there are none).
    """

    def alike(layer: LayerSpec, dtype: str) -> tuple[int, int, int, str] | None:
        plain = layer.kind == LayerKind.ATTENTION and layer.key_dim and dtype in DENSE_DTYPES
        return (layer.n_kv_heads, layer.key_dim, layer.value_dim, dtype) if plain else None

    shapes = [shape for shape in (alike(*pair) for pair in layers) if shape]
    if not shapes:
        return tuple(layer for layer, _ in layers), "opaque"
    commonest = max(sorted(set(shapes)), key=shapes.count)
    return tuple(replace(layer, opaque=alike(layer, dtype) != commonest) for layer, dtype in layers), commonest[-1]


# ---- digests


def fingerprint(directory: Path, adapter_path: str | Path | None = None) -> Fingerprint:
    """Digests of a model's files. Raises FileNotFoundError if there are no weights."""
    weights = sorted(directory.glob("*.safetensors"))
    if not weights:
        raise FileNotFoundError(f"no *.safetensors in {directory}")
    tokenizer = {path for pattern in _TOKENIZER_FILES for path in directory.glob(pattern)}
    adapter = sorted(Path(adapter_path).glob("adapter*")) if adapter_path else []
    return Fingerprint(
        config=_digest([directory / "config.json"]),
        weights=_digest(weights),
        adapter=_digest(adapter) if adapter else "",
        tokenizer=_digest(sorted(tokenizer)) if tokenizer else "",
    )


def _digest(paths: Iterable[Path]) -> str:
    """One digest over names and contents."""
    total = hashlib.sha256()
    for path in paths:
        total.update(f"{path.name} {_file_digest(path)}\n".encode())
    return total.hexdigest()


def _file_digest(path: Path) -> str:
    """SHA-256 of a file, remembered by what a change of the file would change: weights take seconds to read."""
    stat = path.stat()
    identity = [str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    note = _notes() / hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    try:
        if len(remembered := note.read_text()) == 64:
            return remembered
    except OSError:
        pass
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    try:
        note.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = note.with_suffix(f".{os.getpid()}")
        temporary.write_text(digest)
        temporary.replace(note)
    except OSError:
        pass  # a home that cannot be written only costs time
    return digest


def _notes() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "kvcached/digests"
