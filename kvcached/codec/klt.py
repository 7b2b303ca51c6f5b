"""The calibrated basis: rows of a plane to coefficients and back (Karhunen-Loève transform, PCA). Pure.

KVTC (arXiv 2511.01815, section 3): x -> (x - mean) V, with V the leading eigenvectors of the calibration data's
covariance. Where an error in x matters through a metric M (a key's through the queries that read it, a value's through
the output projection), the basis is fitted in the space of A x with A = M^(1/2), so that the squared error of
coefficients is the weighted error of rows. Decoding costs the same.

    paper               here
    mu                  mean
    V                   forward  (with a metric: A V)
    V^T                 inverse  (with a metric: V^T A^-1)
    eigenvalues         variances
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Float64

Plane = Float32[np.ndarray, "n_rows n_features"]
Coefficients = Float32[np.ndarray, "n_rows n_components"]
Square = Float64[np.ndarray, "n_features n_features"]


@runtime_checkable
class Product(Protocol):
    """The two matrix products of the transform, in float32, on whatever computes them best. Thread-safe.

    `forward` and `inverse` are those of a basis that lives as long as the product does.
    """

    def project(self, rows: Plane, forward: Float32[np.ndarray, "n_features n_components"]) -> Coefficients:
        """rows @ forward, in memory component by component."""

    def reconstruct(self, coefficients: Coefficients, inverse: Float32[np.ndarray, "n_components n_features"]) -> Plane:
        """coefficients @ inverse, in memory row by row, writable."""


class OnCpu:
    """By NumPy's BLAS: Accelerate on a Mac."""

    def project(self, rows: Plane, forward: Float32[np.ndarray, "n_features n_components"]) -> Coefficients:
        by_component: Float32[np.ndarray, "n_components n_rows"] = forward.T @ rows.T
        return by_component.T

    def reconstruct(self, coefficients: Coefficients, inverse: Float32[np.ndarray, "n_components n_features"]) -> Plane:
        rows: Plane = coefficients @ inverse
        return rows


ON_CPU = OnCpu()


@dataclass(frozen=True, slots=True)
class Moments:
    """What is kept of calibration rows: count, sum and sum of outer products. Adding them is seeing both."""

    n_rows: int
    total: Float64[np.ndarray, " n_features"]
    outer: Square

    @classmethod
    def of(cls, rows: Plane) -> "Moments":
        """Raises ValueError for rows that are not finite."""
        exact = rows.astype(np.float64)
        if not np.isfinite(exact).all():
            raise ValueError("calibration rows must be finite")
        return cls(len(rows), exact.sum(axis=0), exact.T @ exact)

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.n_rows + other.n_rows, self.total + other.total, self.outer + other.outer)

    @property
    def mean(self) -> Float64[np.ndarray, " n_features"]:
        return self.total / self.n_rows

    @property
    def covariance(self) -> Square:
        return self.outer / self.n_rows - np.outer(self.mean, self.mean)


@dataclass(frozen=True, slots=True)
class Basis:
    """Orthonormal directions in the metric's space, the one with the largest variance first."""

    mean: Float32[np.ndarray, " n_features"]
    forward: Float32[np.ndarray, "n_features n_components"]
    inverse: Float32[np.ndarray, "n_components n_features"]
    variances: Float32[np.ndarray, " n_components"]


def fit(moments: Moments, rank: int, metric: Square | None = None) -> Basis:
    """The `rank` directions that keep the most weighted variance. The same moments give the same basis.

    metric: symmetric and positive definite, see `regularised`; None weighs all features alike.

    Raises:
        ValueError: no rows, a rank that is not 1 to n_features, or a metric that is not positive definite.
    """
    n_features = len(moments.total)
    if moments.n_rows < 1 or not 1 <= rank <= n_features:
        raise ValueError(f"rank must be 1 to {n_features} and rows at least 1, got {rank} and {moments.n_rows}")
    root, inverse_root = np.eye(n_features), np.eye(n_features)
    if metric is not None:
        weights, directions = np.linalg.eigh(metric)
        if weights[0] <= 0:
            raise ValueError(f"a metric must be positive definite, got an eigenvalue of {weights[0]}")
        root = (directions * np.sqrt(weights)) @ directions.T
        inverse_root = (directions / np.sqrt(weights)) @ directions.T
    variances, directions = np.linalg.eigh(root @ moments.covariance @ root)
    directions = _with_fixed_signs(directions[:, ::-1][:, :rank])
    return Basis(
        moments.mean.astype(np.float32),
        (root @ directions).astype(np.float32),
        (directions.T @ inverse_root).astype(np.float32),
        np.maximum(variances[::-1][:rank], 0).astype(np.float32),
    )


def regularised(metric: Square, ridge: float = 0.1) -> Square:
    """A measured metric (second moments of queries, W_o^T W_o) made fit for use: its square root, plus a ridge.

    Raw second moments weigh a few directions so heavily that at low rates all others are lost; their square root keeps
    the order and tames the range. Scaled to a mean weight of 1.

    Raises:
        ValueError: not symmetric, or all zero.
    """
    if not np.allclose(metric, metric.T, rtol=1e-6, atol=1e-9 * np.abs(metric).max(initial=0)):
        raise ValueError("a metric must be symmetric")
    weights, directions = np.linalg.eigh(metric)
    weights = np.sqrt(np.maximum(weights, 0))
    if not weights.mean() > 0:
        raise ValueError("a metric must not be zero")
    weights = (weights / weights.mean() + ridge) / (1 + ridge)
    result: Square = (directions * weights) @ directions.T
    return result


def project(rows: Plane, basis: Basis, product: Product = ON_CPU) -> Coefficients:
    """Coefficients of rows, in memory component by component. Inverse of `reconstruct` on the span of the basis."""
    return product.project(rows - basis.mean, basis.forward)


def reconstruct(coefficients: Coefficients, basis: Basis, product: Product = ON_CPU) -> Plane:
    """Rows of coefficients."""
    rows = product.reconstruct(coefficients, basis.inverse)
    rows += basis.mean
    return rows


def _with_fixed_signs(directions: np.ndarray) -> np.ndarray:
    """An eigenvector's sign is arbitrary: the largest entry of each is made positive."""
    largest = np.abs(directions).argmax(axis=0)
    return directions * np.where(directions[largest, np.arange(directions.shape[1])] < 0, -1.0, 1.0)
