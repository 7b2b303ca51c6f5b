"""What an error in each head costs a model: next-token KL per squared error, measured by making one.

A head is made to forget what is looked at least in each block of a prefix: what those tokens gave is replaced by their
mean, much as compaction does it. One run of the model over the rest of the text for each KV head. Compaction's budgets
are solved from errors times this: without it, heads whose errors the model does not mind would keep too much.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

from . import capture
from .loss import log_softmax
from .road import Engine

_KEPT_SHARE = 1 / 16  # of the tokens of a block
_CONTINUED_SHARE = 1 / 5  # of a text, after a prefix of whole blocks
_NEAR_SHARE = 1 / 4  # of the continuation, at its beginning: not counted


class Weighing:
    """Of the dense layers of a model, on some texts. output_metric: as `capture.output_metric` gives it."""

    def __init__(self, engine: Engine, texts: Sequence[Sequence[int]], output_metric: np.ndarray) -> None:
        self._engine, self._metric = engine, output_metric
        block = engine.spec.block_size
        lengths = [int(len(text) * (1 - _CONTINUED_SHARE)) // block * block for text in texts]
        self._texts = [(text, length) for text, length in zip(texts, lengths, strict=True) if length]
        self._kl, self._error = np.zeros((2, *output_metric.shape[:2]))
        self.n_runs = len(self._texts) * self._kl.size

    def run(self) -> Iterator[int]:
        """Runs the model, over and over; yields how often it has."""
        done = 0
        for text, n_prefix in self._texts:
            cache = self._engine.make_cache()
            for _ in self._engine.prefill(text[:n_prefix], cache):
                pass
            if not can_trim_prompt_cache(cache):
                return
            n_near = int((len(text) - n_prefix) * _NEAR_SHARE)
            exact = self._continued(text[n_prefix:], cache)[n_near:]
            for layer, head in np.ndindex(*self._kl.shape):
                forgetful = _Forgetful(self._engine, layer, head, self._metric[layer, head], n_prefix, n_near)
                with capture.attention_changed(self._engine.model, cache, forgetful):
                    found = self._continued(text[n_prefix:], cache)[n_near:]
                self._kl[layer, head] += (np.exp(exact) * (exact - found)).sum(-1).mean()
                self._error[layer, head] += forgetful.error
                done += 1
                yield done

    def weights(self) -> np.ndarray | None:
        """float32 [n_dense_layers, n_kv_heads], mean 1; None if nothing could be measured."""
        if not (self._error > 0).all() or not (self._kl > 0).all():
            return None
        found = self._kl / self._error
        weights: np.ndarray = (found / found.mean()).astype(np.float32)
        return weights

    def _continued(self, token_ids: Sequence[int], cache: list[Any]) -> np.ndarray:
        """Logarithms of next-token probabilities; the cache is as before."""
        logits = self._engine.model(mx.array([list(token_ids)]), cache=cache)[0].astype(mx.float32)
        mx.eval(logits)
        trim_prompt_cache(cache, len(token_ids))
        return log_softmax(np.array(logits))


class _Forgetful:
    """A KV head that forgets. error: mean squared, of what it adds to the residual stream."""

    def __init__(self, engine: Engine, layer: int, head: int, metric: np.ndarray, n_prefix: int, n_near: int) -> None:
        spec = engine.spec
        dense = [i for i, kind in enumerate(spec.layers) if not kind.opaque]
        self._entry, self._head, self._kind = dense[layer], head, spec.layers[dense[layer]]
        self._block, self._n_prefix, self._n_near = spec.block_size, n_prefix, n_near
        self._n_group = self._kind.n_query_heads // self._kind.n_kv_heads
        self._metric = metric / self._n_group
        self.error = 0.0

    def __call__(self, entry: int, read: Any, queries: Any, keys: Any, values: Any) -> Any:
        if entry != self._entry:
            return read
        group = slice(self._head * self._n_group, (self._head + 1) * self._n_group)
        weights = self._weights(queries[0, group], keys[0, self._head])
        change = self._forgotten(weights, np.array(values[0, self._head].astype(mx.float32)))
        counted = change[:, self._n_near :]
        self.error = float(np.einsum("gqi,ij,gqj->q", counted, self._metric, counted).mean())
        changed = np.array(read.astype(mx.float32))
        changed[0, group] += change
        return mx.array(changed).astype(read.dtype)

    def _weights(self, queries: Any, keys: Any) -> np.ndarray:
        """Causal attention of the last tokens, [group, n_queries, n_tokens]."""
        scale = self._kind.softmax_scale or self._kind.key_dim**-0.5
        scores = (queries.astype(mx.float32) * scale) @ keys.astype(mx.float32).T
        n_queries, n_tokens = scores.shape[1:]
        hidden = mx.arange(n_tokens)[None] > (n_tokens - n_queries + mx.arange(n_queries))[:, None]
        return np.array(mx.softmax(mx.where(hidden, -mx.inf, scores), axis=-1))

    def _forgotten(self, weights: np.ndarray, values: np.ndarray) -> np.ndarray:
        """By how much outputs change."""
        changes = np.zeros((*weights.shape[:2], values.shape[1]), np.float32)
        looked_at = np.square(weights[:, self._n_near :]).mean((0, 1))
        n_kept = max(1, int(self._block * _KEPT_SHARE))
        for start in range(0, self._n_prefix, self._block):
            dropped = start + np.argsort(-looked_at[start : start + self._block])[n_kept:]
            mass = weights[:, :, dropped].sum(-1, keepdims=True)
            given = weights[:, :, dropped] @ values[dropped]
            whole = max(float(mass[:, self._n_near :].sum()), 1e-30)
            changes += mass * (given[:, self._n_near :].sum((0, 1)) / whole) - given
        return changes
