"""The stages of our codec as a codec under test: planes of a group of layers, calibrated basis, uniform steps, rANS.

One step for all components of the keys and another for the values: with an entropy coder behind it, a common step is
optimal where errors weigh alike, and small components vanish by themselves. Tables are chosen on calibration rows;
every byte that the coder writes counts. No metric yet, so the two steps stand in a fixed ratio: an error in a key costs
more than one in a value.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
from calibration import Calibration, Features, Moments
from jaxtyping import UInt8
from under_test import Coded, Half

from kvcached.codec import entropy, klt, quantize

KEY_STEP = 1 / 4  # of the values' step: near the ratio of their standard deviations on calibration text, 0.31


@dataclass(frozen=True, slots=True, eq=False)
class _Plane:
    """Keys or values of a group of layers: where its features lie, and how they are coded."""

    where: slice
    basis: klt.Basis
    scales: UInt8[np.ndarray, " n_components"]


class Tables:
    """Bases of all groups of layers, from which the codec of every step follows."""

    def __init__(self, calibration: Calibration, layers_per_group: int) -> None:
        self.calibration = calibration
        width = layers_per_group * calibration.features_per_layer
        starts = range(0, len(calibration.keys.mean), width)
        parts = [slice(start, start + width) for start in starts]
        self._keys = [(part, _basis(calibration.keys, part)) for part in parts]
        self._values = [(part, _basis(calibration.values, part)) for part in parts]

    def codec(self, step: float) -> "Ours":
        """The codec with `step` for values."""
        keys = [_plane(self.calibration.keys, *each, step * KEY_STEP) for each in self._keys]
        values = [_plane(self.calibration.values, *each, step) for each in self._values]
        return Ours(self.calibration, keys, values, step)


@dataclass(frozen=True, slots=True, eq=False)
class Ours:
    """Sinks (absolute positions 0 to 3) stay exact at 16 bits."""

    calibration: Calibration
    keys: list[_Plane]
    values: list[_Plane]
    step: float

    def __call__(self, keys: Half, values: Half, first_position: int) -> Coded:
        code_keys = partial(_code_rows, self.keys, self.step * KEY_STEP)
        code_values = partial(_code_rows, self.values, self.step)
        return self.calibration.code(keys, values, first_position, code_keys, code_values)


def _basis(statistics: Moments, where: slice) -> klt.Basis:
    mean, covariance = statistics.mean[where], statistics.covariance[where, where]
    return klt.fit(klt.Moments(1, mean, covariance + np.outer(mean, mean)), len(mean))


def _plane(statistics: Moments, where: slice, basis: klt.Basis, step: float) -> _Plane:
    symbols = _symbols(statistics.sample[:, where], basis, step)
    return _Plane(where, basis, entropy.choose_scale(symbols))


def _symbols(rows: Features, basis: klt.Basis, step: float) -> np.ndarray:
    coefficients = np.asfortranarray(klt.project(rows, basis))
    return quantize.quantize(coefficients, np.full(coefficients.shape[1], step, np.float32))


def _code_rows(planes: list[_Plane], step: float, rows: Features) -> int:
    """Codes rows in place, through the bytes; how many there were."""
    n_bytes = 0
    for plane in planes:
        stream = entropy.encode(_symbols(rows[:, plane.where], plane.basis, step), plane.scales)
        symbols = entropy.decode(stream, len(rows), plane.scales)
        coefficients = quantize.dequantize(symbols, np.full(symbols.shape[1], step, np.float32))
        rows[:, plane.where] = klt.reconstruct(np.ascontiguousarray(coefficients), plane.basis)
        n_bytes += len(stream)
    return n_bytes
