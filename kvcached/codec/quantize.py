"""Coefficients to integer symbols and back: uniform steps, one per component.

`dead_zone` is the offset in rounding: 0.5 rounds to the nearest, less leans towards zero, where symbols are cheap.
`centroid` moves what is restored towards zero, in steps: within an interval small magnitudes are more frequent than
large ones, so that the mean of what fell into it lies below its middle. A step of 0 means that a component is not
coded: its symbols and values are 0.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float32, Int32

_SYMBOL_LIMIT = 1 << 31
_MAX_STEP = 2.0**96  # times any symbol is still a float32
_AT_ONCE = 64


def quantize(
    coefficients: Float32[np.ndarray, "n_rows n_components"],
    steps: Float32[np.ndarray, "n_components"],
    dead_zone: float = 0.5,
) -> Int32[np.ndarray, "n_rows n_components"]:
    """sign(c) * floor(|c| / step + dead_zone), in the memory order of the coefficients.

    Raises:
        ValueError: a coefficient that is not finite, a symbol beyond int32, a step or dead zone that makes no sense.
    """
    _check(steps, "dead_zone", dead_zone)
    if not np.isfinite(coefficients).all():
        raise ValueError("coefficients are not all finite")
    divisors = np.where(steps > 0, steps, np.inf).astype(np.float64)  # a quotient rounded to float32 would err
    symbols = np.empty_like(coefficients, np.int32)
    for part in _parts(len(steps)):
        scaled = coefficients[:, part] / divisors[part]
        scaled += np.copysign(dead_zone, scaled)
        if scaled.size and not max(scaled.max(), -scaled.min()) < _SYMBOL_LIMIT:
            raise ValueError(f"a coefficient of {np.abs(scaled).max():.3g} steps is beyond int32: too small a step")
        symbols[:, part] = scaled  # towards zero
    return symbols


def dequantize(
    symbols: Int32[np.ndarray, "n_rows n_components"],
    steps: Float32[np.ndarray, "n_components"],
    centroid: float = 0.0,
) -> Float32[np.ndarray, "n_rows n_components"]:
    """sign(s) * (|s| - centroid) * step, in the memory order of the symbols; 0 stays 0.

    Raises:
        ValueError: a step or centroid that makes no sense.
    """
    _check(steps, "centroid", centroid)
    restored = np.empty_like(symbols, np.float32)
    for part in _parts(len(steps)):
        values = symbols[:, part].astype(np.float32)
        values -= np.float32(centroid) * np.clip(values, -1, 1)  # of integers, the sign
        np.multiply(values, steps[part], out=restored[:, part])
    return restored


def _parts(n_components: int) -> Iterator[slice]:
    """Some components at a time: what is computed on stays in the cache of a core."""
    for start in range(0, n_components, _AT_ONCE):
        yield slice(start, start + _AT_ONCE)


def _check(steps: Float32[np.ndarray, "n_components"], name: str, fraction: float) -> None:
    if not 0 <= fraction <= 0.5:
        raise ValueError(f"{name} is a part of a step from 0 to 0.5, got {fraction}")
    if not ((steps >= 0) & (steps <= _MAX_STEP)).all():  # catches NaN too
        raise ValueError("a step is 0 (not coded) or above, and at most 2^96")
