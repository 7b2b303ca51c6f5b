"""A float32 forward of the reference model in NumPy: some thousand tokens a second, with any prefix in its cache.

mlx on a CPU is too slow for sweeps over codecs, and hides what happens inside. This one takes the keys and values of a
prefix as they come out of a codec, runs the tokens after it, and returns everything that a measurement asks for. It is
the architecture Qwen3 (QK-norm, grouped queries, half-split rotary positions, tied embeddings) and nothing else; a test
compares it with mlx-lm.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int
from safetensors.numpy import load_file
from tokenizers import Tokenizer

DATA = Path(__file__).resolve().parent.parent / "tests/data/model"
REFERENCE_MODEL = DATA / "qwen3-5m"
BOS, EOS = 0, 1  # every sequence begins with BOS; EOS ends a document
_QUERIES_AT_ONCE = 256  # bounds the logits that are held, and spares most of what the causal mask would hide

Heads = Float32[np.ndarray, "_n_heads _n_tokens _head_dim"]
Rows = Float32[np.ndarray, "n_layers n_kv_heads n_tokens head_dim"]


@dataclass(frozen=True, slots=True, eq=False)
class Cache:
    """Keys (rotary positions applied) and values of the tokens so far, the first at position 0.

    bias: added to the logits of each key, -inf where a head has dropped the token; None: plain attention.
    """

    keys: Rows
    values: Rows
    bias: Float32[np.ndarray, "n_layers n_kv_heads n_tokens"] | None = None

    @property
    def n_tokens(self) -> int:
        return self.keys.shape[2]

    def first(self, n_tokens: int) -> "Cache":
        bias = None if self.bias is None else self.bias[:, :, :n_tokens]
        return Cache(self.keys[:, :, :n_tokens], self.values[:, :, :n_tokens], bias)

    def rounded(self) -> "Cache":
        """As an engine holds it: the model's dtype is float16."""
        return Cache(self.keys.astype(np.float16).astype(np.float32), self.values.astype(np.float16).astype(np.float32))


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """What the model did with a run of tokens: predictions, what it adds to its cache, and its attention."""

    logits: Float32[np.ndarray, "n_tokens n_vocabulary"]
    added: Cache
    queries: Float32[np.ndarray, "n_layers n_query_heads n_tokens head_dim"]  # rotary positions applied
    attention: Float32[np.ndarray, "n_layers n_tokens width"]  # after the output projection


class ReferenceModel:
    """The model's weights in float32, and its forward pass."""

    def __init__(self, directory: Path = REFERENCE_MODEL) -> None:
        config = json.loads((directory / "config.json").read_text())
        weights = {name: array.astype(np.float32) for name, array in load_file(directory / "model.safetensors").items()}
        self.n_layers: int = config["num_hidden_layers"]
        self.n_query_heads: int = config["num_attention_heads"]
        self.n_kv_heads: int = config["num_key_value_heads"]
        self.head_dim: int = config["head_dim"]
        self.rope_theta: float = config["rope_theta"]
        self._epsilon: float = config["rms_norm_eps"]
        self.embedding = weights["model.embed_tokens.weight"]
        self._final_norm = weights["model.norm.weight"]
        self._layers = [_layer_weights(weights, f"model.layers.{layer}.") for layer in range(self.n_layers)]

    def output_projection(self, layer: int) -> Float32[np.ndarray, "width n_query_heads*head_dim"]:
        """The matrix that takes the heads' outputs, side by side, back into the residual stream."""
        return self._layers[layer]["self_attn.o_proj"]

    def run(
        self,
        token_ids: Int[np.ndarray, " n_tokens"],
        cache: Cache | None = None,
        first_position: int | None = None,
        change: Callable[[int, Heads, Heads, Heads, Heads], Heads] | None = None,
    ) -> Trace:
        """The model on tokens that follow what `cache` holds (nothing by default).

        first_position: of these tokens, where the cache does not hold a row for each before them. change: of a layer,
        its queries, keys and values, what its heads read; gives what they are to have read.
        """
        cache = cache or self.empty_cache()
        start = cache.n_tokens if first_position is None else first_position
        positions = np.arange(start, start + len(token_ids))
        x = self.embedding[token_ids]
        keys, values, queries, attention = [], [], [], []
        for layer, w in enumerate(self._layers):
            q, k, v = self._project(self._norm(x, w["input_layernorm"]), w, positions)
            bias = None if cache.bias is None else np.pad(cache.bias[layer], ((0, 0), (0, len(x))))
            all_keys, all_values = (
                np.concatenate([cache.keys[layer], k], 1),
                np.concatenate([cache.values[layer], v], 1),
            )
            heads = attend(q, all_keys, all_values, bias)
            if change:
                heads = change(layer, q, all_keys, all_values, heads)
            attended = heads.transpose(1, 0, 2).reshape(len(x), -1) @ w["self_attn.o_proj"].T
            x = x + attended
            x = x + _mlp(self._norm(x, w["post_attention_layernorm"]), w)
            for items, item in zip((keys, values, queries, attention), (k, v, q, attended), strict=True):
                items.append(item)
        logits = self._norm(x, self._final_norm) @ self.embedding.T
        return Trace(logits, Cache(np.stack(keys), np.stack(values)), np.stack(queries), np.stack(attention))

    def empty_cache(self) -> Cache:
        none = np.zeros((self.n_layers, self.n_kv_heads, 0, self.head_dim), np.float32)
        return Cache(none, none)

    def rotate(
        self, rows: Float[np.ndarray, "... n_tokens head_dim"], positions: Int[np.ndarray, " n_tokens"]
    ) -> Float32[np.ndarray, "... n_tokens head_dim"]:
        """Rotary positions applied; at negative positions they are undone."""
        half = self.head_dim // 2
        frequencies = self.rope_theta ** (-np.arange(half) / half)
        angles = np.outer(positions, frequencies)
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        a, b = rows[..., :half].astype(np.float32), rows[..., half:].astype(np.float32)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def _norm(self, x: Any, weight: Any) -> Any:
        return x * (weight / np.sqrt(np.mean(x * x, -1, keepdims=True) + self._epsilon))

    def _project(self, x: Any, w: dict[str, Any], positions: Any) -> tuple[Any, Any, Any]:
        """Queries, keys and values of some tokens, each [heads, n_tokens, head_dim]."""
        q, k, v = (
            (x @ w[f"self_attn.{name}_proj"].T).reshape(len(x), -1, self.head_dim).transpose(1, 0, 2) for name in "qkv"
        )
        q, k = self._norm(q, w["self_attn.q_norm"]), self._norm(k, w["self_attn.k_norm"])
        return self.rotate(q, positions), self.rotate(k, positions), v


def attend(
    queries: Float32[np.ndarray, "n_query_heads n_queries head_dim"],
    keys: Float32[np.ndarray, "n_kv_heads n_tokens head_dim"],
    values: Float32[np.ndarray, "n_kv_heads n_tokens head_dim"],
    bias: Float32[np.ndarray, "n_kv_heads n_tokens"] | None = None,
) -> Float32[np.ndarray, "n_query_heads n_queries head_dim"]:
    """Causal attention; the queries are those of the last tokens. bias: added to the logits of each key."""
    _, n_queries, head_dim = queries.shape
    n_kv_heads, n_tokens, _ = keys.shape
    grouped = (queries / np.float32(np.sqrt(head_dim))).reshape(n_kv_heads, -1, n_queries, head_dim)
    output = np.empty_like(grouped)
    for start in range(0, n_queries, _QUERIES_AT_ONCE):
        some = grouped[:, :, start : start + _QUERIES_AT_ONCE]
        n_some = some.shape[2]
        seen = n_tokens - n_queries + start + n_some
        scores = some.reshape(n_kv_heads, -1, head_dim) @ keys[:, :seen].transpose(0, 2, 1)
        scores = scores.reshape(n_kv_heads, -1, n_some, seen)
        if bias is not None:
            scores += bias[:, None, None, :seen]
        scores[..., seen - n_some :] += np.triu(np.full((n_some, n_some), -np.inf, np.float32), 1)
        scores -= scores.max(-1, keepdims=True)
        np.exp(scores, out=scores)
        total = scores.sum(-1, keepdims=True)
        mixed = scores.reshape(n_kv_heads, -1, seen) @ values[:, :seen]
        output[:, :, start : start + n_some] = mixed.reshape(some.shape) / total
    return output.reshape(queries.shape)


def log_softmax(logits: Float32[np.ndarray, "... n"]) -> Float32[np.ndarray, "... n"]:
    """Logarithms of the probabilities."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@cache
def tokenizer() -> Tokenizer:
    """The reference model's. Call encode with add_special_tokens=False: windows begin with BOS by themselves."""
    return Tokenizer.from_file(str(REFERENCE_MODEL / "tokenizer.json"))


def windows(part: str, n_windows: int, n_tokens: int) -> list[Int[np.ndarray, " n_tokens"]]:
    """Disjoint stretches of a part's text ("calibration" or "heldout"), spread over it, each opened by BOS.

    Documents follow on each other with EOS between them, as in training; the longest come first.

    Raises:
        ValueError: the part has not as much text.
    """
    stream = _stream(part)
    n_whole = len(stream) // (n_tokens - 1)
    if n_windows > n_whole:
        raise ValueError(f"the {part} text has {n_whole} windows of {n_tokens} tokens, {n_windows} are wanted")
    chosen = np.arange(n_windows) * n_whole // n_windows
    starts: Sequence[int] = (chosen * (n_tokens - 1)).tolist()
    return [np.concatenate([[BOS], stream[start : start + n_tokens - 1]]) for start in starts]


@cache
def _stream(part: str) -> Int[np.ndarray, " n_tokens"]:
    texts = [json.loads(line)["text"] for line in (DATA / f"text/{part}.jsonl").read_text().splitlines()]
    documents = [e.ids for e in tokenizer().encode_batch(texts, add_special_tokens=False)]
    documents.sort(key=len, reverse=True)
    return np.concatenate([[*document, EOS] for document in documents])


def _layer_weights(weights: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {
        name.removeprefix(prefix).removesuffix(".weight"): array
        for name, array in weights.items()
        if name.startswith(prefix)
    }


def _mlp(x: Any, w: dict[str, Any]) -> Any:
    gate = x @ w["mlp.gate_proj"].T
    return (gate / (1 + np.exp(-gate)) * (x @ w["mlp.up_proj"].T)) @ w["mlp.down_proj"].T
