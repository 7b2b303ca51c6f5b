"""The calibrated basis against linear algebra done differently, and against data that it never saw."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcached.codec.klt import Moments, fit, project, reconstruct, regularised


def correlated(n_rows: int, n_features: int, seed: int = 0) -> np.ndarray:
    """Rows with a mean and a spectrum that decays, in directions that are the same for all seeds."""
    directions = np.linalg.qr(np.random.default_rng(99).standard_normal((n_features, n_features)))[0]
    scales = 2.0 ** -np.arange(n_features)
    rows = np.random.default_rng(seed).standard_normal((n_rows, n_features)) * scales @ directions.T + 3
    return rows.astype(np.float32)


def some_metric(n_features: int) -> np.ndarray:
    root = np.random.default_rng(5).standard_normal((n_features, n_features))
    return regularised(root @ root.T)


@pytest.mark.parametrize("weighted", [False, True])
def test_all_components_give_the_rows_back(weighted: bool) -> None:
    rows = correlated(500, 12)
    basis = fit(Moments.of(rows), 12, some_metric(12) if weighted else None)
    np.testing.assert_allclose(reconstruct(project(rows, basis), basis), rows, atol=2e-5)


def test_components_are_uncorrelated_and_their_variances_fall() -> None:
    rows = correlated(2000, 8)
    basis = fit(Moments.of(rows), 8)
    covariance = np.cov(project(rows, basis).T, bias=True)
    np.testing.assert_allclose(covariance, np.diag(basis.variances), atol=1e-5)
    assert (np.diff(basis.variances) < 0).all()


def test_the_error_of_what_is_left_out_is_the_variance_left_out() -> None:
    rows = correlated(2000, 8)
    moments = Moments.of(rows)
    for rank in range(1, 8):
        basis = fit(moments, rank)
        error = np.square(rows - reconstruct(project(rows, basis), basis)).sum(axis=1).mean()
        np.testing.assert_allclose(error, fit(moments, 8).variances[rank:].sum(), rtol=1e-3, atol=1e-6)


def test_with_a_metric_the_error_of_coefficients_is_the_weighted_error_of_rows() -> None:
    rows, metric = correlated(300, 10), some_metric(10)
    basis = fit(Moments.of(rows), 10, metric)
    coefficients = project(rows, basis)
    noisy = coefficients + np.random.default_rng(1).standard_normal(coefficients.shape).astype(np.float32) * 0.1
    delta = reconstruct(noisy, basis) - reconstruct(coefficients, basis)
    weighted = np.einsum("ri,ij,rj->r", delta, metric, delta)
    np.testing.assert_allclose(weighted, np.square(noisy - coefficients).sum(axis=1), rtol=1e-3)


def test_a_metric_lowers_the_weighted_error_of_rows_that_were_not_calibrated_on() -> None:
    metric = some_metric(10)
    moments, unseen = Moments.of(correlated(2000, 10)), correlated(500, 10, seed=7)

    def weighted_error(metric_of_basis: np.ndarray | None) -> float:
        basis = fit(moments, 3, metric_of_basis)
        delta = unseen - reconstruct(project(unseen, basis), basis)
        return float(np.einsum("ri,ij,rj->", delta, metric, delta))

    assert weighted_error(metric) < weighted_error(None)


@given(split=st.integers(1, 99))
def test_moments_of_parts_add_up_to_those_of_the_whole(split: int) -> None:
    rows = correlated(100, 6)
    parts = Moments.of(rows[:split]) + Moments.of(rows[split:])
    whole = Moments.of(rows)
    assert parts.n_rows == whole.n_rows
    np.testing.assert_allclose(parts.covariance, whole.covariance, atol=1e-10)


def test_the_same_rows_give_the_same_basis_bit_for_bit() -> None:
    first, second = (fit(Moments.of(correlated(200, 9)), 5, some_metric(9)) for _ in range(2))
    assert first.forward.tobytes() == second.forward.tobytes()


def test_a_regularised_metric_keeps_the_order_of_directions_and_tames_their_range() -> None:
    raw = np.diag([1e6, 1.0, 1e-6, 0.0])
    weights = np.diag(regularised(raw))
    assert (np.diff(weights) <= 0).all()
    assert weights[-1] > 0
    assert weights[0] / weights[-1] < 100
    np.testing.assert_allclose(weights.mean(), 1)


@pytest.mark.parametrize("rank", [0, 7, -1])
def test_a_rank_that_cannot_be_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank must be 1 to 6 .* got {rank}"):
        fit(Moments.of(correlated(10, 6)), rank)


def test_what_cannot_be_calibrated_on_is_refused() -> None:
    with pytest.raises(ValueError, match="must be finite"):
        Moments.of(np.array([[np.nan]], np.float32))
    with pytest.raises(ValueError, match="positive definite"):
        fit(Moments.of(correlated(10, 2)), 1, -np.eye(2))
    with pytest.raises(ValueError, match="symmetric"):
        regularised(np.array([[1.0, 2.0], [0.0, 1.0]]))
    with pytest.raises(ValueError, match="not be zero"):
        regularised(np.zeros((3, 3)))
