"""What the baselines are calibrated on: moments of keys and values over text that is disjoint from the held-out part.

Features are layers by KV heads by dimensions, side by side, of one token; keys are un-rotated. The covariance over all
of them holds that of every group of layers, and of every head.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float16, Float32, Float64
from reference_model import ReferenceModel, windows
from under_test import N_SINKS, SOURCE_BITS, Coded, Half

N_WINDOWS, N_TOKENS = 16, 2048  # 33k tokens
N_SAMPLES = 512  # rows kept for allocations that are measured and not derived

Features = Float32[np.ndarray, "n_tokens n_features"]


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Mean and covariance of rows, and some of the rows."""

    mean: Float64[np.ndarray, " n_features"]
    covariance: Float64[np.ndarray, "n_features n_features"]
    sample: Features

    def basis(self, features: slice) -> tuple[Float32[np.ndarray, "n n"], Float64[np.ndarray, " n"]]:
        """Principal components of some features, as columns, the largest first; and their variances."""
        variances, vectors = np.linalg.eigh(self.covariance[features, features])
        return np.ascontiguousarray(vectors[:, ::-1].astype(np.float32)), np.maximum(variances[::-1], 0)


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """Moments of keys and of values, and the model they came from."""

    model: ReferenceModel
    keys: Moments
    values: Moments

    @property
    def features_per_layer(self) -> int:
        return self.model.n_kv_heads * self.model.head_dim

    def key_features(self, keys: Float16[np.ndarray, "l h t d"], first_position: int) -> Features:
        """Rows of the keys of some tokens, un-rotated. Inverse: `keys_of`."""
        return features(self.model.rotate(keys, -(first_position + np.arange(keys.shape[2]))))

    def keys_of(self, rows: Features, first_position: int) -> Float16[np.ndarray, "l h t d"]:
        """Inverse of `key_features`, to float32's rounding and then the engine's dtype."""
        keys = self.values_of(rows)
        return self.model.rotate(keys, first_position + np.arange(len(rows))).astype(np.float16)

    def code(
        self,
        keys: Half,
        values: Half,
        first_position: int,
        code_keys: Callable[[Features], int],
        code_values: Callable[[Features], int],
    ) -> Coded:
        """A block whose rows go through coders, which change them in place and return their bytes.

        Sinks (absolute positions 0 to 3) stay exact at 16 bits.
        """
        n_tokens = keys.shape[2]
        n_sinks = max(0, min(N_SINKS - first_position, n_tokens))
        key_rows, value_rows = self.key_features(keys, first_position), features(values)
        bits = 8.0 * (code_keys(key_rows[n_sinks:]) + code_values(value_rows[n_sinks:]))
        back_keys, back_values = self.keys_of(key_rows, first_position), self.values_of(value_rows).astype(np.float16)
        back_keys[:, :, :n_sinks], back_values[:, :, :n_sinks] = keys[:, :, :n_sinks], values[:, :, :n_sinks]
        per_token = (keys.size + values.size) // n_tokens
        exempt = SOURCE_BITS * per_token * n_sinks
        return Coded(back_keys, back_values, bits + exempt, bits, per_token * (n_tokens - n_sinks))

    def values_of(self, rows: Features) -> Float32[np.ndarray, "l h t d"]:
        """Inverse of `features`."""
        model = self.model
        return rows.reshape(len(rows), model.n_layers, model.n_kv_heads, model.head_dim).transpose(1, 2, 0, 3)


def features(tensor: Float16[np.ndarray, "l h t d"] | Float32[np.ndarray, "l h t d"]) -> Features:
    """One row for each token."""
    return tensor.transpose(2, 0, 1, 3).reshape(tensor.shape[2], -1).astype(np.float32)


def calibrate(
    model: ReferenceModel, n_windows: int = N_WINDOWS, n_tokens: int = N_TOKENS, n_threads: int = 2
) -> Calibration:
    """Moments over the calibration text, without the sinks of each window."""
    positions = np.arange(n_tokens)

    def rows(token_ids: np.ndarray) -> tuple[Features, Features]:
        added = model.run(token_ids).added.rounded()
        return features(model.rotate(added.keys, -positions))[N_SINKS:], features(added.values)[N_SINKS:]

    with ThreadPoolExecutor(n_threads) as pool:
        keys, values = zip(*pool.map(rows, windows("calibration", n_windows, n_tokens)), strict=True)
    return Calibration(model, moments(np.concatenate(keys)), moments(np.concatenate(values)))


def moments(rows: Features, n_samples: int = N_SAMPLES) -> Moments:
    """Mean, covariance and a sample drawn by a fixed seed."""
    mean = rows.mean(0, dtype=np.float64)
    centred = (rows - mean).astype(np.float32)
    covariance = (centred.T @ centred).astype(np.float64) / len(rows)
    drawn = np.random.default_rng(0).choice(len(rows), min(n_samples, len(rows)), replace=False)
    return Moments(mean, covariance, rows[np.sort(drawn)])


def shannon_bits(variances: Float64[np.ndarray, " n"], distortion: float) -> float:
    """Bits per value of a Gaussian source of these variances at a mean squared error, by reverse water-filling."""
    water = _solve(lambda level: float(np.minimum(variances, level).mean()), distortion, float(variances.max()))
    return float(0.5 * np.log2(np.maximum(variances / water, 1)).mean())


def _solve(rising: Callable[[float], float], target: float, high: float) -> float:
    low = 0.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < target else (low, middle)
    return high
