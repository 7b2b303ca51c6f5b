"""Coefficients to integer symbols and back: uniform steps, one per component.

`dead_zone` is the offset in rounding: 0.5 rounds to the nearest, less leans towards zero, where symbols are cheap.
`centroid` moves what is restored towards zero, in steps: within an interval small magnitudes are more frequent than
large ones, so that the mean of what fell into it lies below its middle. A step of 0 means that a component is not
coded: its symbols and values are 0.
"""

import numpy as np
from jaxtyping import Float32, Int32

_MAX_SYMBOL = (1 << 31) - 1
_MAX_STEP = 2.0**96  # times any symbol is still a float32


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
    coded = steps > 0
    scaled = coefficients / np.where(coded, steps, np.float32(1)).astype(np.float64)
    magnitudes = np.floor(np.abs(scaled) + dead_zone)
    magnitudes *= coded
    if magnitudes.size and magnitudes.max() > _MAX_SYMBOL:
        raise ValueError(f"a coefficient of {magnitudes.max():.3g} steps is beyond int32: the steps are too small")
    return np.copysign(magnitudes, scaled).astype(np.int32)


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
    values = symbols.astype(np.float32)
    if centroid:
        values -= np.float32(centroid) * np.sign(values)
    values *= steps
    return values


def _check(steps: Float32[np.ndarray, "n_components"], name: str, fraction: float) -> None:
    if not 0 <= fraction <= 0.5:
        raise ValueError(f"{name} is a part of a step from 0 to 0.5, got {fraction}")
    if not ((steps >= 0) & (steps <= _MAX_STEP)).all():  # catches NaN too
        raise ValueError("a step is 0 (not coded) or above, and at most 2^96")
