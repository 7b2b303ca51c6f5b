"""Budgets from curves: exact totals, and the best there is, found by trying all."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcached.codec import budgets

FRACTIONS = np.array([0.25, 0.5, 0.75, 1.0])


def error_of(curves: np.ndarray, tokens: np.ndarray, n_tokens: int) -> float:
    """What curves, straight between their points, promise for some budgets."""
    heads = curves.reshape(-1, curves.shape[-1])
    return sum(float(np.interp(t / n_tokens, FRACTIONS, c)) for t, c in zip(tokens.reshape(-1), heads, strict=True))


@given(st.integers(0, 1000), st.integers(3, 12))
def test_no_other_budgets_with_the_same_total_lose_less(seed: int, total: int) -> None:
    falls = np.sort(np.random.default_rng(seed).random((1, 3, 3)), axis=2)  # ever smaller: a convex curve
    curves = np.concatenate([np.cumsum(falls, axis=2)[..., ::-1], np.zeros((1, 3, 1))], axis=2)
    found = budgets.solve(curves, FRACTIONS, 4, total, 1)
    every = [np.array(t) for t in product(range(1, 5), repeat=3) if sum(t) == total]
    assert found.sum() == total
    assert error_of(curves, found, 4) == pytest.approx(min(error_of(curves, t, 4) for t in every))


@given(
    st.integers(0, 10**6),
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    st.integers(4, 256),
    st.integers(1, 4),
    st.floats(0, 1),
)
def test_the_total_is_met_and_no_head_is_below_the_least_or_above_all(
    seed: int, shape: tuple[int, int], n_tokens: int, least: int, level: float
) -> None:
    curves = np.random.default_rng(seed).random((*shape, 4))  # neither falling nor convex
    n_heads = shape[0] * shape[1]
    total = round(n_heads * (least + level * (n_tokens - least)))
    found = budgets.solve(curves, FRACTIONS, n_tokens, total, least)
    assert found.sum() == total
    assert found.min() >= least
    assert found.max() <= n_tokens


def test_heads_that_lose_much_get_the_tokens_of_those_that_lose_nothing() -> None:
    curves = np.array([[[9.0, 6, 3, 0], [0, 0, 0, 0]]])
    np.testing.assert_array_equal(budgets.solve(curves, FRACTIONS, 100, 104, 4), [[100, 4]])


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"total": 7}, "2 heads of 4 to 100 tokens cannot have 7 together"),
        ({"total": 201}, "cannot have 201 together"),
        ({"curves": np.full((1, 2, 4), np.nan)}, "curves of error must be finite"),
        ({"curves": np.full((1, 2, 4), -1.0)}, "curves of error must be finite"),
        ({"fractions": np.array([0.5, 0.25, 0.75, 1])}, "fractions must ascend"),
        ({"fractions": np.array([0.0, 0.25, 0.75, 1])}, "fractions must ascend"),
        ({"fractions": np.array([0.1, 0.25, 0.5, 0.75])}, "fractions must ascend"),
    ],
)
def test_what_cannot_be_solved_is_refused_with_what_was_expected(changed: dict[str, object], expected: str) -> None:
    asked = {"curves": np.ones((1, 2, 4)), "fractions": FRACTIONS, "n_tokens": 100, "total": 100, "least": 4}
    with pytest.raises(ValueError, match=expected):
        budgets.solve(**{**asked, **changed})


def test_heads_with_equal_curves_share_evenly() -> None:
    curves = np.broadcast_to([3.0, 2, 1, 0], (2, 3, 4))
    np.testing.assert_array_equal(np.sort(budgets.solve(curves, FRACTIONS, 100, 152, 4).ravel()), [25] * 4 + [26] * 2)


def test_heads_that_keep_all_in_any_case_leave_the_rest_to_the_others() -> None:
    whole = np.array([[True, False, False]])
    found = budgets.solve(np.ones((1, 3, 4)), FRACTIONS, 100, 120, 4, whole)
    np.testing.assert_array_equal(found, [[100, 10, 10]])
    with pytest.raises(ValueError, match="cannot have 107 together"):
        budgets.solve(np.ones((1, 3, 4)), FRACTIONS, 100, 107, 4, whole)
