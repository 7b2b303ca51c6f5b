"""From a target compression to the numbers of a profile: steps, tables, rounding, chosen on rows that were kept for it.

In the metric's unit one step for all components is optimal behind an entropy coder. It is searched for first; an exact
dynamic program then gives runs of components a finer or coarser step, or none, where what was *measured* of them says
that this pays; at last all steps are scaled so that the measured bytes meet the budget.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64, Int32, UInt8

from kvcached.codec import allocate, entropy, quantize

FACTORS = (0.0, 0.5, 0.7, 1.0, 1.4, 2.0)  # of the common step; 0: not coded
# Rounding to the nearest, restored where it was rounded to. Leaning towards zero and centroids lower the squared error
# of the sample, but what they do to one token they do to all: next-token KL was higher (docs/decisions, 5).
DEAD_ZONE, CENTROID = 0.5, 0.0
_MAX_RUNS = 256
_SEARCH_ROWS = 1024  # on which the common step is looked for
_TRIALS, _SLACK = 12, 1e-3  # of the search for a step: trials at most, share of the budget that may stay unspent
_SMALLEST = 1e-12

Steps = list[Float32[np.ndarray, " n_components"]]


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """Coefficients of a plane's rows, and what a squared error in them weighs against those of other planes."""

    coefficients: Float32[np.ndarray, "n_rows n_components"]
    weight: float

    def first(self, n_rows: int) -> "Sample":
        return Sample(self.coefficients[:n_rows], self.weight)


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """What a profile is made of, plane by plane, and what it was measured to take and to lose on the sample."""

    steps: Steps
    scales: list[UInt8[np.ndarray, " n_components"]]
    bits_per_value: float
    distortion: float  # weighted, of a row


def choose(samples: Sequence[Sample], budget: float, block_size: int | None) -> Choice:
    """The steps that lose least within a budget.

    budget: bits per value of the rows, in streams of `block_size` rows of a plane. None: all rows of all planes are one
    stream, and all components have the same step in the metric's unit: planes may have too few rows to tell more.

    Raises:
        ValueError: the budget is below what streams without content take.
    """
    if block_size is None:
        return _measured(samples, _common(samples, budget, block_size), block_size)
    few = [sample.first(_SEARCH_ROWS) for sample in samples]
    common = _common(few, budget, block_size)
    varied = [step * factor for step, factor in zip(common, _factors(few, common, budget), strict=True)]
    return _measured(samples, _within(samples, varied, budget, block_size), block_size)


def _common(samples: Sequence[Sample], budget: float, block_size: int | None) -> Steps:
    """One step in the metric's unit for all components, as small as the budget allows."""
    flat = [np.full(s.coefficients.shape[1], s.weight**-0.5, np.float32) for s in samples]
    largest = max(float(np.abs(s.coefficients).max(initial=0)) * s.weight**0.5 for s in samples)
    all_zero = 4 * max(largest, 1e-30)
    if _bits(samples, _scaled(flat, all_zero), block_size) > budget:
        raise ValueError(f"a budget of {budget:.4g} bits per value is below what streams of nothing take")
    return _within(samples, _scaled(flat, all_zero), budget, block_size, grain=4.0)


def _within(
    samples: Sequence[Sample], steps: Steps, budget: float, block_size: int | None, grain: float = 1.1
) -> Steps:
    """The steps, all scaled by the one factor with which they just keep to the budget; looked for from 1, by `grain`.

    Bits fall nearly evenly with the logarithm of the factor, so that few trials between two bounds are enough.
    """

    def bits(factor: float) -> float:
        return _bits(samples, _scaled(steps, factor), block_size)

    low = high = 1.0
    low_bits = high_bits = bits(1.0)
    while high_bits > budget:
        low, low_bits, high = high, high_bits, high * grain
        high_bits = bits(high)
    while low_bits <= budget and low > _SMALLEST:
        high, high_bits, low = low, low_bits, low / grain
        low_bits = bits(low)
    for _ in range(_TRIALS):
        if high_bits >= budget * (1 - _SLACK) or low_bits <= budget:
            break
        share = (low_bits - budget * (1 - _SLACK / 2)) / (low_bits - high_bits)
        middle = low * (high / low) ** min(max(share, 0.05), 0.95)
        middle_bits = bits(middle)
        if middle_bits > budget:
            low, low_bits = middle, middle_bits
        else:
            high, high_bits = middle, middle_bits
    return _scaled(steps, high)


def _scaled(steps: Steps, factor: float) -> Steps:
    return [step * np.float32(factor) for step in steps]


def _symbols(sample: Sample, steps: Float32[np.ndarray, " n"]) -> Int32[np.ndarray, "n_rows n"]:
    return quantize.quantize(np.asfortranarray(sample.coefficients), steps, DEAD_ZONE)


def _bits(samples: Sequence[Sample], steps: Steps, block_size: int | None) -> float:
    """Bits per value of streams with the tables that suit them best."""
    if block_size is None:
        return 8 * _one_stream_bytes(samples, steps) / _n_values(samples)
    n_bytes = 0
    for sample, plane_steps in zip(samples, steps, strict=True):
        symbols = _symbols(sample, plane_steps)[:, plane_steps > 0]
        n_bytes += _stream_bytes(symbols, entropy.choose_scale(symbols), block_size)
    return 8 * n_bytes / _n_values(samples)


def _n_values(samples: Sequence[Sample]) -> int:
    return sum(sample.coefficients.size for sample in samples)


def _stream_bytes(symbols: Int32[np.ndarray, "n_rows n"], scales: UInt8[np.ndarray, " n"], block_size: int) -> int:
    starts = range(0, len(symbols), block_size)
    return sum(len(entropy.encode(symbols[start : start + block_size], scales)) for start in starts)


def _one_stream_bytes(samples: Sequence[Sample], steps: Steps) -> int:
    symbols = [_symbols(sample, plane_steps) for sample, plane_steps in zip(samples, steps, strict=True)]
    scales = [np.repeat(entropy.choose_scale(plane), len(plane)) for plane in symbols]
    flat = np.concatenate([plane.T.reshape(-1) for plane in symbols])
    return len(entropy.encode(flat[None], np.concatenate(scales)))


def _factors(samples: Sequence[Sample], common: Steps, budget: float) -> list[Float32[np.ndarray, " n_components"]]:
    """For each component the factor on its step that the dynamic program gives to its run of components."""
    run = -(-sum(map(len, common)) // _MAX_RUNS)
    points = [_points(sample, steps, run) for sample, steps in zip(samples, common, strict=True)]
    rates, distortions = (np.concatenate([point[i] for point in points]) for i in (0, 1))
    chosen = allocate.allocate(8 * rates / _n_values(samples), distortions, budget)
    factors, at = [], 0
    for steps, (plane_rates, _) in zip(common, points, strict=True):
        of_runs = np.array(FACTORS, np.float32)[chosen[at : at + len(plane_rates)]]
        factors.append(np.repeat(of_runs, run)[: len(steps)])
        at += len(plane_rates)
    return factors


def _points(
    sample: Sample, steps: Float32[np.ndarray, " n"], run: int
) -> tuple[Float64[np.ndarray, "n_runs n_factors"], Float64[np.ndarray, "n_runs n_factors"]]:
    """Measured bytes and weighted squared errors of each run of components with each factor on its steps."""
    starts = range(0, len(steps), run)
    rates, distortions = np.zeros((len(starts), len(FACTORS))), np.zeros((len(starts), len(FACTORS)))
    nothing = len(entropy.encode(np.zeros((len(sample.coefficients), 1), np.int32), np.zeros(1, np.uint8)))
    for point, factor in enumerate(FACTORS):
        scaled = steps * np.float32(factor)
        symbols = _symbols(sample, scaled)
        distortions[:, point] = np.add.reduceat(_loss(sample, symbols, scaled), starts)
        if factor:
            scales = entropy.choose_scale(symbols)
            runs = [slice(start, start + run) for start in starts]
            whole = [len(entropy.encode(symbols[:, part], scales[part])) for part in runs]
            rates[:, point] = np.maximum(np.array(whole) - nothing, 0)
    return rates, distortions


def _loss(
    sample: Sample, symbols: Int32[np.ndarray, "n_rows n"], steps: Float32[np.ndarray, " n"]
) -> Float64[np.ndarray, " n"]:
    """Of each component: the weighted squared errors, with the part that follows the coefficients counted twice.

    Errors that are independent from token to token average out in attention. What rounding takes off small
    coefficients it takes off all of them: without the second term the allocation lowered the squared error, and
    raised next-token KL by a tenth.
    """
    exact = sample.coefficients.astype(np.float64)
    errors = exact - quantize.dequantize(symbols, steps)
    followed = np.square((errors * exact).sum(axis=0)) / np.maximum(np.square(exact).sum(axis=0), 1e-300)
    lost: Float64[np.ndarray, " n"] = sample.weight * (np.square(errors).sum(axis=0) + followed)
    return lost


def _measured(samples: Sequence[Sample], steps: Steps, block_size: int | None) -> Choice:
    symbols = [_symbols(sample, plane_steps) for sample, plane_steps in zip(samples, steps, strict=True)]
    # A component whose symbols are all 0 need not be coded: it comes back the same.
    steps = [np.where(s.any(axis=0), plane_steps, np.float32(0)) for s, plane_steps in zip(symbols, steps, strict=True)]
    scales = [entropy.choose_scale(plane) for plane in symbols]
    lost = sum(float(_loss(*each).sum()) for each in zip(samples, symbols, steps, strict=True))
    return Choice(
        steps,
        scales,
        _bits(samples, steps, block_size),
        lost / max(1, len(samples[0].coefficients)),
    )
