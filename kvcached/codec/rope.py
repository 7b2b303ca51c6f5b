"""Rotary positions, on and off: a rotated key is a key times its position, and only without it do keys look alike.

A pair of features (a, b) of a row at position m becomes s·(a cos mθ - b sin mθ, b cos mθ + a sin mθ), one θ per pair
(RoFormer, arXiv 2104.09864, eq. 34). Scalings change the θ and s, as mlx-lm does it; `remove` is the inverse for any
θ and s, so that a scaling that an engine means otherwise costs compression, never correctness.
"""

import json
from collections.abc import Callable, Mapping
from math import ceil, floor, isfinite, log, pi, sqrt
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, Int32

from kvcached.block import RopeSpec
from kvcached.errors import UnsupportedRopeError

Rows = Float32[np.ndarray, "*heads n_rows dim"]
Positions = Int32[np.ndarray, " n_rows"]
Frequencies = Float64[np.ndarray, " n_pairs"]

_MAX_FREQUENCY, _MAX_SCALE = 1e6, 1e3  # far beyond any model, far within what float32 and float64 can hold


def apply(x: Rows, positions: Positions, rope: RopeSpec) -> Rows:
    """Rotates each row to its own position, as the engine does. Angles are float64, products float32.

    Raises:
        UnsupportedRopeError: the layout or scaling is unknown, incomplete, or does not fit the rows.
    """
    return rotation(positions, rope, x.shape[-1])(x)


def remove(x: Rows, positions: Positions, rope: RopeSpec) -> Rows:
    """Inverse of `apply`, to float32 rounding. Raises the same."""
    return rotation(positions, rope, x.shape[-1], inverse=True)(x)


def rotation(positions: Positions, rope: RopeSpec, dim: int, *, inverse: bool = False) -> Callable[[Rows], Rows]:
    """`apply` for rows at these positions, or `remove`: angles, which all heads and layers share, are computed once.

    Raises what `apply` does.
    """
    if not rope.dims:
        return np.copy
    frequencies, scale = _frequencies(rope, dim)
    angles = positions[:, None] * (-frequencies if inverse else frequencies)
    scale = 1 / scale if inverse else scale
    cos, sin = (np.cos(angles) * scale).astype(np.float32), (np.sin(angles) * scale).astype(np.float32)
    half, dims = rope.dims // 2, rope.dims
    first, second = (slice(0, dims, 2), slice(1, dims, 2)) if rope.interleaved else (slice(half), slice(half, dims))

    def turn(x: Rows) -> Rows:
        turned = np.empty(x.shape, np.float32)
        turned[..., dims:] = x[..., dims:]
        a, b = x[..., first], x[..., second]
        np.subtract(a * cos, b * sin, out=turned[..., first])
        np.add(b * cos, a * sin, out=turned[..., second])
        return turned

    return turn


# ---- one angle per position for each pair (θ), and the factor s on the vectors


def _frequencies(rope: RopeSpec, dim: int) -> tuple[Frequencies, float]:
    if rope.dims % 2 or not 0 < rope.dims <= dim:
        raise UnsupportedRopeError(f"rotary dims must be even and at most the {dim} of a row, got {rope.dims}")
    if not (isfinite(rope.theta) and rope.theta > 1):
        raise UnsupportedRopeError(f"rotary theta must be finite and above 1, got {rope.theta}")
    scaling = _parse(rope.scaling_json)
    kind = scaling.get("type") or scaling.get("rope_type", "default")
    if not isinstance(kind, str) or kind not in _SCALINGS:
        raise UnsupportedRopeError(f"rotary scaling must be one of {', '.join(_SCALINGS)}, got {str(kind)[:40]!r}")
    plain = rope.theta ** (-np.arange(0, rope.dims, 2, dtype=np.float64) / rope.dims)
    try:
        with np.errstate(over="raise", divide="raise", invalid="raise"):
            frequencies, scale = _SCALINGS[kind](plain, rope, scaling)
    except (ArithmeticError, ValueError) as error:
        raise UnsupportedRopeError(f"rotary scaling {kind} has numbers that make no angles: {error}") from None
    if not (frequencies.max() < _MAX_FREQUENCY and 1 / _MAX_SCALE < scale < _MAX_SCALE):
        raise UnsupportedRopeError(f"rotary scaling {kind} makes angles or factors that no model has")
    return frequencies, scale


def _parse(scaling_json: str) -> Mapping[str, Any]:
    try:
        scaling = json.loads(scaling_json or "{}")
    except (ValueError, RecursionError) as error:
        raise UnsupportedRopeError(f"rotary scaling must be JSON: {error}") from None
    if not isinstance(scaling, dict):
        raise UnsupportedRopeError(f"rotary scaling must be a JSON object, got a {type(scaling).__name__}")
    return scaling


def _number(scaling: Mapping[str, Any], name: str, default: float | None = None) -> float:
    value = scaling.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        raise UnsupportedRopeError(f"rotary scaling needs a number {name}, got {str(value)[:40]!r}")
    return float(value)


def _positive(scaling: Mapping[str, Any], name: str, default: float | None = None) -> float:
    value = _number(scaling, name, default)
    if value <= 0:
        raise UnsupportedRopeError(f"rotary scaling needs a positive {name}, got {value}")
    return value


def _default(plain: Frequencies, _rope: RopeSpec, _scaling: Mapping[str, Any]) -> tuple[Frequencies, float]:
    return plain, 1.0


def _linear(plain: Frequencies, _rope: RopeSpec, scaling: Mapping[str, Any]) -> tuple[Frequencies, float]:
    """Positions divided by `factor` (arXiv 2306.15595)."""
    return plain / _positive(scaling, "factor"), 1.0


def _llama3(plain: Frequencies, _rope: RopeSpec, scaling: Mapping[str, Any]) -> tuple[Frequencies, float]:
    """Long waves stretched by `factor`, short ones as they are, a ramp between; Llama 3.1's own code."""
    factor, original = _positive(scaling, "factor"), _positive(scaling, "original_max_position_embeddings", 8192.0)
    low, high = _number(scaling, "low_freq_factor", 1.0), _number(scaling, "high_freq_factor", 4.0)
    if low >= high:
        raise UnsupportedRopeError(f"rotary scaling needs low_freq_factor below high_freq_factor, got {low} and {high}")
    n_waves = original * plain / (2 * pi)  # in the original context
    ramp = np.clip((n_waves - low) / (high - low), 0, 1)
    return plain * ((1 - ramp) / factor + ramp), 1.0


def _yarn(plain: Frequencies, rope: RopeSpec, scaling: Mapping[str, Any]) -> tuple[Frequencies, float]:
    """YaRN (arXiv 2309.00071, section 3.2: alpha = beta_slow, beta = beta_fast), with DeepSeek's two factors on s."""
    factor, original = _positive(scaling, "factor"), _positive(scaling, "original_max_position_embeddings", 4096.0)

    def pair_of(n_waves: float) -> float:
        return rope.dims * log(original / (n_waves * 2 * pi)) / (2 * log(rope.theta))

    low = max(floor(pair_of(_positive(scaling, "beta_fast", 32.0))), 0)
    high = min(ceil(pair_of(_positive(scaling, "beta_slow", 1.0))), rope.dims - 1)
    stretched = np.clip((np.arange(len(plain)) - low) / (high - low or 0.001), 0, 1)
    ratio = 0.1 * log(factor) if factor > 1 else 0.0
    mscale, mscale_all_dim = _number(scaling, "mscale", 1.0), _number(scaling, "mscale_all_dim", 0.0)
    return plain * (stretched / factor + 1 - stretched), (ratio * mscale + 1) / (ratio * mscale_all_dim + 1)


def _longrope(plain: Frequencies, _rope: RopeSpec, scaling: Mapping[str, Any]) -> tuple[Frequencies, float]:
    """LongRoPE (arXiv 2402.13753): a divisor for each pair. As in mlx-lm always the long ones, at every length."""
    factors = scaling.get("long_factor")
    listed = factors if isinstance(factors, list) else [factors] * len(plain)
    if len(listed) != len(plain):
        raise UnsupportedRopeError(f"rotary scaling needs {len(plain)} numbers in long_factor, got {len(listed)}")
    divisors = [_positive({"long_factor": factor}, "long_factor") for factor in listed]
    return plain / np.array(divisors), _longrope_scale(scaling)


def _longrope_scale(scaling: Mapping[str, Any]) -> float:
    if scaling.get("long_mscale"):
        return _number(scaling, "long_mscale")
    original = _positive(scaling, "original_max_position_embeddings")
    stretch = _positive(scaling, "max_position_embeddings") / original
    return sqrt(1 + log(stretch) / log(original)) if stretch > 1 else 1.0


_Scaling = Callable[[Frequencies, RopeSpec, Mapping[str, Any]], tuple[Frequencies, float]]
_SCALINGS: Mapping[str, _Scaling] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "su": _longrope,
}
