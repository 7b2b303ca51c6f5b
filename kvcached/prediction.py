"""Heads that keep few tokens, predicted from heads that keep all: fitted to a few blocks. Pure.

What a model keeps of a token in one head says much of what it keeps in another. Heads that keep every token are coded
first, keys and values; at the tokens that another head keeps, its rows are then known but for what a linear map of
those misses, and only that is coded. The map is a ridge regression on rows as they are decoded, so that it trusts no
detail that coding takes away; planes for which it does not help on blocks that it was not fitted to go without.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64, Int64

from kvcached import steps
from kvcached.codec import klt, quantize
from kvcached.codec.klt import Basis
from kvcached.codec.tables import SIDES, storable

RIDGES = (0.001, 0.01, 0.1, 1.0)  # of the mean diagonal
_WORTH = 0.9  # of the error without prediction: with more left than that a plane goes without

Rows = Float32[np.ndarray, "_n_rows _n_features"]
Predictor = Float32[np.ndarray, "_n_leading _n_features"]
Metric = Float64[np.ndarray, "_n_features _n_features"]


@dataclass(frozen=True, slots=True, eq=False)
class PlaneSample:
    """Rows of a plane in a few blocks. every: of all their tokens, block after block; kept: those that compaction left.

    tokens: which of `every` the kept ones are. weight: what a squared error weighs against those of other planes.
    """

    every: Rows
    kept: Rows
    tokens: Int64[np.ndarray, " n_kept"]
    metric: Metric
    weight: float

    def coefficients(self, basis: Basis, expected: Rows | float = 0.0) -> steps.Sample:
        return steps.Sample(klt.project(self.kept - expected, basis), self.weight)


@dataclass(frozen=True, slots=True, eq=False)
class Led:
    """What predicts what, with the bases and the sample of what is left to code. By side, plane by plane."""

    leaders: Mapping[int, int]
    predictors: Mapping[tuple[str, int], Predictor]
    bases: Mapping[str, tuple[Basis, ...]]
    samples: Sequence[steps.Sample]  # keys, then values


def fit(
    planes: Mapping[str, Sequence[PlaneSample]],
    bases: Mapping[str, Sequence[Basis]],
    coarse: steps.Choice,
    leaders: Mapping[int, int],
    n_tokens: int,
) -> Led:
    """Predictors for those planes that have a leader, where they help.

    coarse: steps without prediction, to decode leaders with. n_tokens: of a block.
    """
    n_planes = len(planes["keys"])
    choice = {"keys": coarse.steps[:n_planes], "values": coarse.steps[n_planes:]}
    decoded = {
        side: [_decoded(one.every, *how) for one, *how in zip(planes[side], bases[side], choice[side], strict=True)]
        for side in SIDES
    }
    second = np.arange(len(planes["keys"][0].every)) // n_tokens % 2 == 1
    predictors: dict[tuple[str, int], Predictor] = {}
    of_rest: dict[str, list[Basis]] = {side: list(bases[side]) for side in SIDES}
    samples = []
    for side in SIDES:
        for i, sample in enumerate(planes[side]):
            known = [decoded[s][leaders[i]] for s in SIDES if i in leaders]
            known += [decoded["keys"][i]] if side == "values" else []
            expected: Rows | float = 0.0
            if known:
                leading = np.concatenate(known, axis=1)
                found = _predictor(leading, sample, second)
                if found is not None:
                    predictors[side, i] = found
                    of_all = leading @ found
                    moments = klt.Moments.of(sample.every - of_all)
                    of_rest[side][i] = storable(klt.fit(moments, moments.outer.shape[0], sample.metric))
                    expected = of_all[sample.tokens]
            samples.append(sample.coefficients(of_rest[side][i], expected))
    return Led(leaders, predictors, {side: tuple(each) for side, each in of_rest.items()}, samples)


def _decoded(rows: Rows, basis: Basis, of_steps: Float32[np.ndarray, " n"]) -> Rows:
    symbols = quantize.quantize(klt.project(rows, basis), of_steps, steps.DEAD_ZONE)
    found: Rows = klt.reconstruct(quantize.dequantize(symbols, of_steps, steps.CENTROID), basis)
    return found


def _predictor(leading: Rows, sample: PlaneSample, second: np.ndarray) -> Predictor | None:
    """The map with the ridge that is best on every second block, fitted to the others; None if none is worth it."""
    left = {}
    for ridge in RIDGES:
        missed = sample.every[second] - leading[second] @ _ridge(leading[~second], sample.every[~second], ridge)
        left[ridge] = _weighted_variance(missed, sample.metric)
    best = min(left, key=lambda ridge: left[ridge])
    if left[best] > _WORTH * _weighted_variance(sample.every[second], sample.metric):
        return None
    return _ridge(leading, sample.every, best).astype(np.float16).astype(np.float32)


def _ridge(leading: Rows, rows: Rows, ridge: float) -> Predictor:
    x, y = (each.astype(np.float64) - each.mean(axis=0, dtype=np.float64) for each in (leading, rows))
    gram = x.T @ x
    pull = ridge * max(float(np.trace(gram)) / len(gram), 1e-300)
    found: Predictor = np.linalg.solve(gram + pull * np.eye(len(gram)), x.T @ y).astype(np.float32)
    return found


def _weighted_variance(rows: Rows, metric: Metric) -> float:
    centred = rows.astype(np.float64) - rows.mean(axis=0, dtype=np.float64)
    return float(np.einsum("nf,fg,ng->", centred, metric, centred, optimize=True)) / max(len(rows), 1)
