"""The KVTC paper's pipeline: PCA over layers, groups of components as none, int2, int4 or fp8, and DEFLATE.

arXiv 2511.01815, section 3 and appendix B. Each token pays a 16-bit shift and a 16-bit scale for each group, inside the
budget. Allocations are exact for every budget, on errors measured with calibration text; one calibration serves all
ratios.

The paper's letters: p features, r components, CR the budget as a ratio to 16 bits a value.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import ml_dtypes
import numpy as np
from calibration import Calibration, Features, Moments
from jaxtyping import Float16, Float32, Float64
from numpy.lib.stride_tricks import sliding_window_view
from under_test import SOURCE_BITS, Coded, Half

GROUP_SIZES = (1, 16, 64, 256, 1024)
TYPES = ("none", "int2", "int4", "fp8")
BITS = {"none": 0, "int2": 2, "int4": 4, "fp8": 8}
OVERHEAD_BITS = 32  # of a token and group that is not "none": shift and scale
_FP8_MAX = 448.0  # float8_e4m3fn
_AT_ONCE = 1 << 20  # values that are quantised at once: they stay in the cache
_LEAST_RATIO = 2.0  # of the allocations that are tabulated


class Group(NamedTuple):
    """Components that share a type, and for each token a shift and a scale."""

    start: int
    size: int
    type: str

    @property
    def bits(self) -> int:
        """Of each token, before DEFLATE."""
        return self.size * BITS[self.type] + OVERHEAD_BITS * (self.type != "none")


class ErrorTable(NamedTuple):
    """Squared error per token of every group that may be chosen; starts lie `grain` apart, infinite where none may."""

    errors: Float64[np.ndarray, "n_starts n_sizes n_types"]
    sizes: tuple[int, ...]
    grain: int


class Allocations:
    """The paper's dynamic program: for every budget of bits per token the groups of least measured error.

    best_error[i, b] is the least error of the first i grains of components with b units of bits; `_chosen` points back.
    """

    def __init__(self, errors: ErrorTable, most_bits: int) -> None:
        self._options = [
            (size // errors.grain, Group(0, size, kind), errors.errors[:, i, j])
            for i, size in enumerate(errors.sizes)
            for j, kind in enumerate(TYPES)
        ]
        self._unit = int(np.gcd.reduce([group.bits for _, group, _ in self._options]))
        n_grains, n_units = len(errors.errors), most_bits // self._unit + 1
        self._grain = errors.grain
        best_error = np.full((n_grains + 1, n_units), np.inf)
        best_error[0] = 0
        self._chosen = np.zeros((n_grains + 1, n_units), np.uint8)
        for end in range(1, n_grains + 1):
            for option, (n_steps, group, error) in enumerate(self._options):
                units = group.bits // self._unit
                if n_steps <= end and units < n_units and error[end - n_steps] < np.inf:
                    reached = best_error[end - n_steps, : n_units - units] + error[end - n_steps]
                    better = reached < best_error[end, units:]
                    best_error[end, units:][better] = reached[better]
                    self._chosen[end, units:][better] = option

    def within(self, bits_per_token: float) -> list[Group]:
        """The groups of least error that spend at most `bits_per_token` (DEFLATE saves some of it later)."""
        at, unit = len(self._chosen) - 1, min(int(bits_per_token // self._unit), self._chosen.shape[1] - 1)
        groups = []
        while at:
            n_steps, group, _ = self._options[self._chosen[at, unit]]
            at -= n_steps
            unit -= group.bits // self._unit
            groups.append(group._replace(start=at * self._grain))
        return groups[::-1]


def error_table(coefficients: Features, sizes: Sequence[int] = GROUP_SIZES, grain: int = 1) -> ErrorTable:
    """Measures groups on real coefficients, by quantising them. Starts lie a quarter of the group's size apart."""
    n_tokens, n_components = coefficients.shape
    sizes = tuple(size for size in sizes if size <= n_components)
    errors = np.full((n_components // grain, len(sizes), len(TYPES)), np.inf)
    for i, size in enumerate(sizes):
        apart = max(grain, size // 4)
        spans = sliding_window_view(coefficients, size, axis=1)[:, ::apart]
        n_at_once = max(1, _AT_ONCE // (n_tokens * size))
        for first in range(0, spans.shape[1], n_at_once):
            some = np.ascontiguousarray(spans[:, first : first + n_at_once])
            starts = np.arange(first, first + some.shape[1]) * apart // grain
            for j, kind in enumerate(TYPES):
                error = ((quantise(some, kind).back - some) ** 2).sum((0, 2), dtype=np.float64)
                errors[starts, i, j] = error / n_tokens
    return ErrorTable(errors, sizes, grain)


class Quantised(NamedTuple):
    """Groups of values as codes with a shift and a scale each, and what comes back."""

    codes: np.ndarray
    parameters: Float16[np.ndarray, "... 2"]
    back: Float32[np.ndarray, "..."]


def quantise(groups: Float32[np.ndarray, "... size"], kind: str) -> Quantised:
    """Each group (last axis) with its own 16-bit shift and scale; "none" comes back as 0."""
    if kind == "none":
        none = np.zeros((*groups.shape[:-1], 0), np.float16)
        return Quantised(none.astype(np.uint8), none, np.zeros_like(groups))
    low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    if kind == "fp8":
        shift, span = (low + high) / 2, (high - low) / (2 * _FP8_MAX)
    else:
        shift, span = low, (high - low) / (2 ** BITS[kind] - 1)
    parameters = np.concatenate([shift, np.maximum(span, 6e-8)], -1).astype(np.float16)
    shift, scale = parameters[..., :1].astype(np.float32), parameters[..., 1:].astype(np.float32)
    codes = (groups - shift) / scale
    if kind == "fp8":
        codes = np.clip(codes, -_FP8_MAX, _FP8_MAX).astype(ml_dtypes.float8_e4m3fn)
        return Quantised(codes.view(np.uint8), parameters, codes.astype(np.float32) * scale + shift)
    np.rint(codes, out=codes)
    np.clip(codes, 0, 2 ** BITS[kind] - 1, out=codes)
    return Quantised(codes.astype(np.uint8), parameters, codes * scale + shift)


def code(coefficients: Features, groups: Sequence[Group]) -> tuple[Features, int]:
    """Coefficients there and back, and the bytes of the DEFLATE stream of their codes and parameters."""
    back = np.zeros_like(coefficients)
    codes, parameters = [], []
    for group in groups:
        where = slice(group.start, group.start + group.size)
        coded = quantise(coefficients[:, where], group.type)
        back[:, where] = coded.back
        if group.type != "none":
            codes.append(_packed(coded.codes.T, BITS[group.type]))
            parameters.append(np.ascontiguousarray(coded.parameters.T).tobytes())
    return back, _deflated(b"".join(codes)) + _deflated(b"".join(parameters))


def _packed(codes: np.ndarray, bits: int) -> bytes:
    """Codes side by side in bytes, 8 / bits in each."""
    flat = np.ascontiguousarray(codes).reshape(-1)
    per_byte = 8 // bits
    lanes = np.concatenate([flat, np.zeros(-len(flat) % per_byte, np.uint8)]).reshape(-1, per_byte)
    return bytes((lanes << (bits * np.arange(per_byte, dtype=np.uint8))).sum(1, dtype=np.uint8))


def _deflated(stream: bytes) -> int:
    return min(len(stream), len(zlib.compress(stream, 6)))


@dataclass(frozen=True, slots=True, eq=False)
class _Plane:
    """Keys or values of a group of layers: where its features lie, its basis, and the allocation."""

    where: slice
    mean: Float32[np.ndarray, " n"]
    basis: Float32[np.ndarray, "n n"]
    groups: list[Group]


class PaperTables:
    """Bases and allocations, from which every ratio's codec follows (one calibration for all of them)."""

    def __init__(self, calibration: Calibration, layers_per_group: int) -> None:
        self.calibration = calibration
        width = layers_per_group * calibration.features_per_layer
        starts = range(0, len(calibration.keys.mean), width)
        self._keys = [_Table(calibration.keys, slice(start, start + width)) for start in starts]
        self._values = [_Table(calibration.values, slice(start, start + width)) for start in starts]

    def codec(self, ratio: float) -> "Paper":
        """The pipeline at a nominal ratio: 16 bits over a value's budget before DEFLATE; keys and values alike."""
        keys, values = [t.plane(ratio) for t in self._keys], [t.plane(ratio) for t in self._values]
        return Paper(self.calibration, keys, values)


class _Table:
    """Basis and allocations of the keys or values of a group of layers."""

    def __init__(self, statistics: Moments, where: slice) -> None:
        self._where, self._mean = where, statistics.mean[where].astype(np.float32)
        self._basis, _ = statistics.basis(where)
        errors = error_table((statistics.sample[:, where] - self._mean) @ self._basis)
        self._allocations = Allocations(errors, int(SOURCE_BITS / _LEAST_RATIO * len(self._basis)))

    def plane(self, ratio: float) -> _Plane:
        groups = self._allocations.within(SOURCE_BITS / ratio * len(self._basis))
        return _Plane(self._where, self._mean, self._basis, groups)


@dataclass(frozen=True, slots=True, eq=False)
class Paper:
    """The pipeline at one ratio. Sinks (absolute positions 0 to 3) stay exact at 16 bits; the paper's own pay 8."""

    calibration: Calibration
    keys: list[_Plane]
    values: list[_Plane]

    def __call__(self, keys: Half, values: Half, first_position: int) -> Coded:
        code_keys, code_values = partial(_code_rows, self.keys), partial(_code_rows, self.values)
        return self.calibration.code(keys, values, first_position, code_keys, code_values)


def _code_rows(planes: list[_Plane], rows: Features) -> int:
    """Codes rows in place; the bytes."""
    n_bytes = 0
    for plane in planes:
        coefficients, coded = code((rows[:, plane.where] - plane.mean) @ plane.basis, plane.groups)
        rows[:, plane.where] = coefficients @ plane.basis.T + plane.mean
        n_bytes += coded
    return n_bytes
