"""Codecs to compare with: mlx's quantised cache, oMLX's PR #418, our lossless frames; the paper's is in paper_codec.

All are given what helps them where their sources leave it open, so that what is measured against them holds: bundles,
bases and codebooks are calibrated beforehand and cost nothing, and nothing pays for headers but our own frames.
"""

import time
from dataclasses import dataclass

import numpy as np
import zstandard
from calibration import Calibration, Features, Moments, features
from under_test import N_SINKS, SOURCE_BITS, Coded, Half

from kvcached import codec
from kvcached.block import BlockId, KVBlock


def lossless(keys: Half, values: Half, first_position: int) -> Coded:
    """Our exact frames, zstd level 1; every byte of the frame counts."""
    block_id = BlockId(bytes(32), "", bytes(32))
    block = KVBlock.dense({"keys": keys, "values": values}, keys.shape[2], first_position)
    start = time.perf_counter()
    frame = codec.encode(block_id, block)
    encoded = time.perf_counter()
    back = codec.decode(block_id, frame, 2 * (keys.nbytes + values.nbytes)).to_tensors()
    seconds = (encoded - start, time.perf_counter() - encoded)
    bits = 8.0 * len(frame)
    return Coded(back["keys"], back["values"], bits, bits, keys.size + values.size, seconds)


# --- mlx ---


@dataclass(frozen=True)
class Affine:
    """mlx's quantised KV cache: groups of neighbouring dimensions, each with a 16-bit scale and a 16-bit bias."""

    bits: int
    group_size: int = 64

    def __call__(self, keys: Half, values: Half, first_position: int) -> Coded:  # noqa: ARG002
        bits = (keys.size + values.size) * (self.bits + 32 / self.group_size)
        return Coded(self.back(keys), self.back(values), bits, bits, keys.size + values.size)

    def back(self, tensor: Half) -> Half:
        """As mx.dequantize(*mx.quantize(tensor)): the extreme that lies farther from 0 is met exactly."""
        groups = tensor.reshape(-1, self.group_size).astype(np.float32)
        low, high = groups.min(1, keepdims=True), groups.max(1, keepdims=True)
        from_low = np.abs(low) > np.abs(high)
        edge = np.where(from_low, low, high)
        scale = np.maximum((high - low) / (2**self.bits - 1), 1e-7) * np.where(from_low, 1, -1)
        steps = np.rint(edge / scale)
        whole = steps != 0
        scale = np.where(whole, edge / np.where(whole, steps, 1), scale).astype(np.float16)
        bias = np.where(whole, edge, 0).astype(np.float16)
        symbols = np.clip(np.rint((groups - bias) / scale), 0, 2**self.bits - 1)
        return (symbols * scale + bias).astype(np.float16).reshape(tensor.shape)


# --- PR #418 ---


@dataclass(frozen=True)
class Pr418:
    """oMLX's PR #418, its transform coder alone (github.com/jundot/omlx/pull/418, omlx/compression/kvtc.py).

    One basis per layer for all of its heads, the first `n_components` of head_dim, 8 bits for each (its allocator gives
    every component its maximum), a byte per index in zstd level 3; the first 4 and the last 128 tokens of *each block*
    stay as they are. `window` = 0 is what it might have meant: sinks at absolute positions, no window inside blocks.
    Its rotary positions are undone at the right places and applied again, which it did not; codebooks are uniform over
    what each component spans in the block, and cost nothing here, while its own lie in every blob.
    """

    calibration: Calibration
    n_components: int = 64
    window: int = 128

    def __call__(self, keys: Half, values: Half, first_position: int) -> Coded:
        n_tokens = keys.shape[2]
        n_sinks = N_SINKS if self.window else max(0, min(N_SINKS - first_position, n_tokens))
        body = slice(n_sinks, max(n_sinks, n_tokens - self.window))
        key_rows, values_rows = self.calibration.key_features(keys, first_position), features(values)
        bits = 0.0
        for rows, statistics in ((key_rows, self.calibration.keys), (values_rows, self.calibration.values)):
            bits += self._code(rows[body], statistics)
        back_keys, back_values = keys.copy(), values.copy()
        back_keys[:, :, body] = self.calibration.keys_of(key_rows, first_position)[:, :, body]
        back_values[:, :, body] = self.calibration.values_of(values_rows).astype(np.float16)[:, :, body]
        per_token = (keys.size + values.size) // n_tokens
        n_body = body.stop - body.start
        exempt = SOURCE_BITS * per_token * (n_tokens - n_body)
        return Coded(back_keys, back_values, bits + exempt, bits, per_token * n_body)

    def _code(self, rows: Features, statistics: Moments) -> float:
        """Codes rows in place; the bits."""
        model = self.calibration.model
        streams = []
        for layer in range(model.n_layers):
            mean, basis = _layer_basis(statistics, layer, model.n_kv_heads, model.head_dim)
            kept = basis[:, : self.n_components]
            start = layer * self.calibration.features_per_layer
            part = rows[:, start : start + self.calibration.features_per_layer].reshape(-1, model.head_dim)
            coefficients = (part - mean) @ kept
            low, high = coefficients.min(0), coefficients.max(0)
            step = np.maximum(high - low, 1e-12) / 255
            symbols = np.rint((coefficients - low) / step).astype(np.uint8)
            streams.append(np.ascontiguousarray(symbols.T).tobytes())
            back = (symbols * step + low) @ kept.T + mean
            rows[:, start : start + self.calibration.features_per_layer] = back.reshape(len(rows), -1)
        return 8.0 * len(zstandard.ZstdCompressor(level=3).compress(b"".join(streams)))


def _layer_basis(statistics: Moments, layer: int, n_heads: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and principal components of a layer's rows when its heads are poured together."""
    heads = [slice(start, start + dim) for start in range(layer * n_heads * dim, (layer + 1) * n_heads * dim, dim)]
    mean = np.mean([statistics.mean[head] for head in heads], axis=0)
    second = np.mean([_second_moment(statistics, head) for head in heads], axis=0) - np.outer(mean, mean)
    return mean.astype(np.float32), np.linalg.eigh(second)[1][:, ::-1].astype(np.float32)


def _second_moment(statistics: Moments, head: slice) -> np.ndarray:
    return statistics.covariance[head, head] + np.outer(statistics.mean[head], statistics.mean[head])
