"""Heads that keep few tokens, predicted from heads that keep all: fitted to a few blocks. Pure.

What a model keeps of a token in one head says much of what it keeps in another. Heads that keep every token are coded
first, keys and values; at the tokens that another head keeps, its rows are then known but for what a linear map of
those misses, and only that is coded. The map is a ridge regression on rows as they are decoded, so that it trusts no
detail that coding takes away; planes for which it does not help on blocks that it was not fitted to go without.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

from kvcached import steps
from kvcached.codec import klt, quantize
from kvcached.codec.compactor import Predictor
from kvcached.codec.klt import Basis
from kvcached.codec.tables import SIDES, storable

RIDGES = (0.001, 0.01, 0.1, 1.0)  # of the mean diagonal
_WORTH = 0.9  # of the error without prediction: with more left than that a plane goes without

Rows = Float32[np.ndarray, "_n_rows _n_features"]
Metric = Float64[np.ndarray, "_n_features _n_features"]


@dataclass(frozen=True, slots=True, eq=False)
class PlaneSample:
    """Rows of a plane in a few blocks. every: of all their tokens, block after block; kept: those that compaction left.

    tokens: which of `every` the kept ones are. basis: of all rows. weight: what a squared error weighs against those of
    other planes.
    """

    every: Rows
    kept: Rows
    tokens: Int64[np.ndarray, " n_kept"]
    basis: Basis
    metric: Metric
    weight: float

    @property
    def sample(self) -> steps.Sample:
        """What there is to code without prediction."""
        return steps.Sample(klt.project(self.kept, self.basis), self.weight)

    def decoded(self, of_steps: Float32[np.ndarray, " n"]) -> Rows:
        """All rows as they are decoded without prediction."""
        symbols = quantize.quantize(klt.project(self.every, self.basis), of_steps, steps.DEAD_ZONE)
        return klt.reconstruct(quantize.dequantize(symbols, of_steps, steps.CENTROID), self.basis)


@dataclass(frozen=True, slots=True, eq=False)
class Predicted:
    """A plane with its predictor, None if it goes without; the basis and the sample of what is left to code."""

    predictor: Predictor | None
    basis: Basis
    sample: steps.Sample


def fit(
    planes: Mapping[str, Sequence[PlaneSample]],
    coarse: steps.Choice,
    leaders: Sequence[int | None],
    n_tokens: int,
) -> dict[tuple[str, int], Predicted]:
    """Every plane of each side, predicted where that helps; values from the plane's own keys, too.

    coarse: steps of the planes, keys then values, that rows are decoded with. n_tokens: of a block.
    """
    places = list(product(SIDES, range(len(leaders))))
    decoded = {(side, i): planes[side][i].decoded(s) for (side, i), s in zip(places, coarse.steps, strict=True)}
    found = {}
    for side, i in places:
        leader = leaders[i]
        known = [] if leader is None else [decoded[s, leader] for s in SIDES]
        known += [decoded["keys", i]] if side == "values" else []
        found[side, i] = _predicted(planes[side][i], known, n_tokens)
    return found


def _predicted(plane: PlaneSample, known: Sequence[Rows], n_tokens: int) -> Predicted:
    predictor = _predictor(np.concatenate(known, axis=1), plane, n_tokens) if known else None
    if predictor is None:
        return Predicted(None, plane.basis, plane.sample)
    expected = np.concatenate(known, axis=1) @ predictor
    moments = klt.Moments.of(plane.every - expected)
    basis = storable(klt.fit(moments, moments.outer.shape[0], plane.metric))
    left = klt.project(plane.kept - expected[plane.tokens], basis)
    return Predicted(predictor, basis, steps.Sample(left, plane.weight))


def _predictor(known: Rows, plane: PlaneSample, n_tokens: int) -> Predictor | None:
    """The map with the ridge that is best on every second block, fitted to the others; None if none is worth it."""
    second: Bool[np.ndarray, " n"] = np.arange(len(known)) // n_tokens % 2 == 1
    if not second.any():
        return None
    left = {}
    for ridge in RIDGES:
        predictor = _ridge(known[~second], plane.every[~second], ridge)
        if np.isfinite(predictor).all():
            left[ridge] = _weighted_variance(plane.every[second] - known[second] @ predictor, plane.metric)
    best = min(left, key=lambda ridge: left[ridge], default=None)
    if best is None or not left[best] <= _WORTH * _weighted_variance(plane.every[second], plane.metric):
        return None
    found = _ridge(known, plane.every, best)
    return found if np.isfinite(found).all() else None


def _ridge(known: Rows, rows: Rows, ridge: float) -> Predictor:
    """As bundles hold it, in float16: what that does not hold is infinite."""
    x, y = (each - each.mean(axis=0) for each in (known.astype(np.float64), rows.astype(np.float64)))
    gram = x.T @ x
    pull = ridge * max(float(np.trace(gram)) / len(gram), np.finfo(np.float64).tiny)
    found = np.linalg.solve(gram + pull * np.eye(len(gram)), x.T @ y)
    with np.errstate(over="ignore"):
        halves: Predictor = found.astype(np.float16).astype(np.float32)
    return halves


def _weighted_variance(rows: Rows, metric: Metric) -> float:
    centred = rows.astype(np.float64) - rows.mean(axis=0, dtype=np.float64)
    return float(np.einsum("nf,fg,ng->", centred, metric, centred, optimize=True)) / max(len(rows), 1)
