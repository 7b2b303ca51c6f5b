"""Bit allocation: within its budget, as good as trying everything, and not the same for every group."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcached.codec.allocate import UNIT, allocate

STEPS = 2.0 ** np.arange(-6, 3)


def spent(values: np.ndarray, chosen: np.ndarray) -> float:
    return float(values[np.arange(len(chosen)), chosen].sum())


def measured(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rates and distortions of uniform steps for each column of some data, each a part of the mean over all values."""
    rates, distortions = [], []
    for column in data.T:
        symbols = np.round(column[:, None] / STEPS)
        rates.append([entropy(symbols[:, i]) / data.shape[1] for i in range(len(STEPS))])
        distortions.append(np.square(symbols * STEPS - column[:, None]).mean(axis=0))
    return np.array(rates), np.array(distortions)


def entropy(symbols: np.ndarray) -> float:
    counts = np.unique(symbols, return_counts=True)[1]
    shares = counts / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


def decaying(n_rows: int = 400, n_components: int = 16) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((n_rows, n_components)) * 2.0 ** -np.arange(n_components)


points = st.integers(1, 4).flatmap(
    lambda n_points: st.lists(
        st.lists(st.tuples(st.integers(0, 12), st.integers(0, 100)), min_size=n_points, max_size=n_points),
        min_size=1,
        max_size=5,
    )
)


@given(points=points, budget=st.integers(0, 60))
def test_nothing_that_fits_the_budget_is_better(points: list[list[tuple[int, int]]], budget: int) -> None:
    rates = np.array([[rate for rate, _ in group] for group in points], np.float64) * UNIT
    distortions = np.array([[distortion for _, distortion in group] for group in points], np.float64)
    combinations = [np.array(c) for c in product(*[range(len(group)) for group in points])]
    affordable = [c for c in combinations if spent(rates, c) <= budget * UNIT]
    if not affordable:
        with pytest.raises(ValueError, match=r"below the .* of the cheapest points"):
            allocate(rates, distortions, budget * UNIT)
        return
    chosen = allocate(rates, distortions, budget * UNIT)
    assert spent(rates, chosen) <= budget * UNIT
    assert spent(distortions, chosen) == min(spent(distortions, c) for c in affordable)


def test_over_a_sweep_of_budgets_all_is_within_budget_and_distortion_falls() -> None:
    rates, distortions = measured(decaying())
    budgets = np.linspace(0.3, 6, 30)
    chosen = [allocate(rates, distortions, budget) for budget in budgets]
    assert all(spent(rates, c) <= budget for c, budget in zip(chosen, budgets, strict=True))
    errors = np.array([spent(distortions, c) for c in chosen])
    assert (np.diff(errors) <= 0).all()
    assert errors[-1] < errors[0] / 100


def test_on_a_decaying_spectrum_bits_go_where_the_variance_is() -> None:
    rates, distortions = measured(decaying())
    bits = rates[np.arange(16), allocate(rates, distortions, 1.0)] * 16
    assert bits[0] > 3
    assert (bits[-6:] < 0.05).all()
    assert (np.diff(bits) < 0.3).all()


def test_twice_as_many_tokens_get_the_same_bits_each() -> None:
    once = allocate(*measured(decaying()), 1.0)
    twice = allocate(*measured(np.concatenate([decaying(), decaying()])), 1.0)
    assert once.tolist() == twice.tolist()


def test_more_budget_than_all_can_use_buys_the_best_points() -> None:
    rates, distortions = measured(decaying())
    assert allocate(rates, distortions, 1e6).tolist() == distortions.argmin(axis=1).tolist()


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -1.0])
def test_rates_that_cannot_be_are_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match="must be finite, and rates not negative"):
        allocate(np.array([[wrong]]), np.array([[1.0]]), 1.0)
