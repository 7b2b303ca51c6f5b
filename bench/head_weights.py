"""What an error in each head costs the reference model: next-token KL per squared error, measured by making one.

A head is made to forget what is looked at least in each block of a prefix: what those tokens gave is replaced by their
mean, much as compaction does it. One run of the model for each head and text; `kvcached_mlx` does the same with mlx.
"""

import numpy as np
from jaxtyping import Float32, Int
from reference_model import Cache, Heads, ReferenceModel, log_softmax, windows

KEPT, BLOCK = 16, 256  # tokens of each block that are not forgotten; tokens of a block
N_PREFIX, N_CONTINUED, N_NEAR = 1024, 384, 128  # the last: tokens after the prefix that are not counted


def head_weights(model: ReferenceModel, n_windows: int = 4) -> Float32[np.ndarray, "n_layers n_kv_heads"]:
    """On calibration text."""
    kl, error = np.zeros((2, model.n_layers, model.n_kv_heads))
    for token_ids in windows("calibration", n_windows, N_PREFIX + N_CONTINUED):
        prefix = model.run(token_ids[:N_PREFIX]).added
        exact = log_softmax(model.run(token_ids[N_PREFIX:], prefix).logits[N_NEAR:])
        for layer, head in np.ndindex(*kl.shape):
            forgetful = _Forgetful(model, layer, head)
            found = log_softmax(_continued(model, token_ids, prefix, forgetful)[N_NEAR:])
            kl[layer, head] += (np.exp(exact) * (exact - found)).sum(-1).mean()
            error[layer, head] += forgetful.error
    weights: Float32[np.ndarray, "n_layers n_kv_heads"] = (kl / error).astype(np.float32)
    return weights


def _continued(
    model: ReferenceModel, token_ids: Int[np.ndarray, " n"], prefix: Cache, forgetful: "_Forgetful"
) -> Float32[np.ndarray, "n v"]:
    return model.run(token_ids[N_PREFIX:], prefix, change=forgetful).logits


class _Forgetful:
    """A KV head that forgets. error: mean squared, of what it adds to the residual stream."""

    def __init__(self, model: ReferenceModel, layer: int, head: int) -> None:
        self._model, self._layer, self._head = model, layer, head
        self.error = 0.0

    def __call__(self, layer: int, queries: Heads, keys: Heads, values: Heads, heads: Heads) -> Heads:
        if layer != self._layer:
            return heads
        n_group = self._model.n_query_heads // self._model.n_kv_heads
        group = slice(self._head * n_group, (self._head + 1) * n_group)
        changed = heads.copy()
        weights = _weights(queries[group], keys[self._head])
        changed[group] += _forgotten(weights, values[self._head])
        apart = (changed - heads).transpose(1, 0, 2).reshape(heads.shape[1], -1) @ self._model.output_projection(
            layer
        ).T
        self.error = float(np.square(apart[N_NEAR:]).sum(1).mean())
        return changed


def _weights(
    queries: Heads, keys: Float32[np.ndarray, "n_tokens head_dim"]
) -> Float32[np.ndarray, "g n_queries n_tokens"]:
    """Causal attention of the last tokens."""
    scores = queries @ keys.T / np.float32(np.sqrt(keys.shape[1]))
    n_queries, n_tokens = scores.shape[1:]
    scores[:, np.arange(n_tokens) > (n_tokens - n_queries + np.arange(n_queries))[:, None]] = -np.inf
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    weights: Float32[np.ndarray, "g n_queries n_tokens"] = scores / scores.sum(-1, keepdims=True)
    return weights


def _forgotten(
    weights: Float32[np.ndarray, "g n_queries n_tokens"], values: Float32[np.ndarray, "n_tokens head_dim"]
) -> Heads:
    """By how much outputs change."""
    changes = np.zeros((*weights.shape[:2], values.shape[1]), np.float32)
    looked_at = np.square(weights[:, N_NEAR:]).mean((0, 1))
    for start in range(0, N_PREFIX, BLOCK):
        dropped = start + np.argsort(-looked_at[start : start + BLOCK])[KEPT:]
        mass = weights[:, :, dropped].sum(-1, keepdims=True)
        given = weights[:, :, dropped] @ values[dropped]
        mean = given[:, N_NEAR:].sum((0, 1)) / max(float(mass[:, N_NEAR:].sum()), 1e-30)
        changes += mass * mean - given
    return changes
