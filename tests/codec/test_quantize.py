"""Uniform steps: how far off, which way, and what is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from kvcached.codec.quantize import dequantize, quantize

N_COMPONENTS = 5
steps_of_all_sizes = arrays.arrays(np.float32, N_COMPONENTS, elements=st.floats(2.0**-10, 2.0**10, width=32))
coefficients_of_all_sizes = arrays.arrays(
    np.float32, st.tuples(st.integers(0, 8), st.just(N_COMPONENTS)), elements=st.floats(-1024, 1024, width=32)
)
fractions = st.floats(0, 0.5)


@given(coefficients_of_all_sizes, steps_of_all_sizes)
def test_plain_rounding_errs_by_half_a_step_at_most(coefficients: np.ndarray, steps: np.ndarray) -> None:
    restored = dequantize(quantize(coefficients, steps), steps)
    rounding = np.abs(coefficients) * 2.0**-23  # of float32
    assert (np.abs(restored.astype(np.float64) - coefficients) <= steps / 2 + rounding).all()


@given(coefficients_of_all_sizes, steps_of_all_sizes, fractions)
def test_a_dead_zone_errs_by_less_than_a_step_and_towards_zero(
    coefficients: np.ndarray, steps: np.ndarray, dead_zone: float
) -> None:
    symbols = quantize(coefficients, steps, dead_zone).astype(np.float64)
    scaled = np.abs(coefficients / steps.astype(np.float64))
    assert (np.abs(symbols) <= scaled + dead_zone).all()
    assert (np.abs(symbols) > scaled + dead_zone - 1 - 1e-9).all()
    assert (symbols * coefficients >= 0).all()


@given(coefficients_of_all_sizes, steps_of_all_sizes, st.floats(0, 0.49))
def test_what_was_restored_is_quantised_to_the_same_symbols(
    coefficients: np.ndarray, steps: np.ndarray, centroid: float
) -> None:
    symbols = quantize(coefficients, steps)
    assert np.array_equal(quantize(dequantize(symbols, steps, centroid), steps), symbols)


@given(coefficients_of_all_sizes, steps_of_all_sizes, fractions)
def test_larger_coefficients_have_no_smaller_symbols(
    coefficients: np.ndarray, steps: np.ndarray, dead_zone: float
) -> None:
    symbols = quantize(np.sort(coefficients, axis=0), steps, dead_zone)
    assert (np.diff(symbols, axis=0) >= 0).all()


@given(coefficients_of_all_sizes, steps_of_all_sizes, fractions, fractions)
def test_signs_are_treated_alike(
    coefficients: np.ndarray, steps: np.ndarray, dead_zone: float, centroid: float
) -> None:
    symbols = quantize(coefficients, steps, dead_zone)
    assert np.array_equal(quantize(-coefficients, steps, dead_zone), -symbols)
    assert np.array_equal(dequantize(-symbols, steps, centroid), -dequantize(symbols, steps, centroid))


def test_rounding_and_reconstruction_are_what_they_say() -> None:
    steps = np.array([2], np.float32)
    coefficients = np.array([[0.9], [1.0], [1.5], [-2.9], [-3.1]], np.float32)
    assert quantize(coefficients, steps).ravel().tolist() == [0, 1, 1, -1, -2]
    assert quantize(coefficients, steps, 0.25).ravel().tolist() == [0, 0, 1, -1, -1]
    symbols = np.array([[0], [1], [-3]], np.int32)
    assert dequantize(symbols, steps, 0.25).ravel().tolist() == [0, 1.5, -5.5]


def test_a_centroid_lowers_the_error_of_laplacian_coefficients() -> None:
    coefficients = np.random.default_rng(0).laplace(size=(4096, 1)).astype(np.float32)
    steps = np.array([2], np.float32)
    symbols = quantize(coefficients, steps)
    plain, moved = (np.mean((dequantize(symbols, steps, c) - coefficients) ** 2) for c in (0.0, 0.15))
    assert moved < 0.95 * plain


def test_each_component_of_many_is_treated_as_if_it_were_alone() -> None:
    rng = np.random.default_rng(0)
    coefficients, steps = rng.laplace(size=(7, 200)).astype(np.float32), rng.uniform(0.01, 1, 200).astype(np.float32)
    symbols = quantize(coefficients, steps, 0.4)
    restored = dequantize(symbols, steps, 0.1)
    for component in range(200):
        alone, step = np.s_[:, component : component + 1], steps[component : component + 1]
        assert np.array_equal(symbols[alone], quantize(coefficients[alone], step, 0.4))
        assert np.array_equal(restored[alone], dequantize(symbols[alone], step, 0.1))


def test_a_coefficient_too_large_is_refused_wherever_it_stands() -> None:
    for component in (0, 63, 64, 199):
        coefficients = np.zeros((2, 200), np.float32)
        coefficients[1, component] = -3e9
        with pytest.raises(ValueError, match="3e\\+09 steps is beyond int32"):
            quantize(coefficients, np.ones(200, np.float32))


def test_a_step_of_zero_is_not_coded() -> None:
    coefficients = np.full((3, 2), 1e20, np.float32)
    steps = np.array([0, 1e20], np.float32)
    symbols = quantize(coefficients, steps)
    assert symbols.tolist() == [[0, 1]] * 3
    assert dequantize(symbols + 7, steps)[:, 0].tolist() == [0, 0, 0]


@pytest.mark.parametrize("order", ["C", "F"])
def test_the_order_in_memory_stays(order: str) -> None:
    coefficients = np.asarray(np.ones((3, 4), np.float32), order=order)  # type: ignore[call-overload]
    symbols = quantize(coefficients, np.ones(4, np.float32))
    restored = dequantize(symbols, np.ones(4, np.float32), 0.1)
    assert symbols.strides == restored.strides == coefficients.strides


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("step", [0, 1])
def test_coefficients_that_are_not_finite_are_refused(value: float, step: float) -> None:
    with pytest.raises(ValueError, match="not all finite"):
        quantize(np.array([[1, value]], np.float32), np.full(2, step, np.float32))


def test_symbols_beyond_int32_are_refused() -> None:
    steps = np.ones(1, np.float32)
    largest = np.nextafter(np.float32(2**31), np.float32(0))
    assert quantize(np.array([[-largest]], np.float32), steps).item() == -int(largest)
    for sign in (-1, 1):
        with pytest.raises(ValueError, match="beyond int32"):
            quantize(np.array([[sign * 2.0**31]], np.float32), steps)


@pytest.mark.parametrize("step", [-1, np.nan, np.inf, 2.0**97])
def test_steps_that_make_no_sense_are_refused(step: float) -> None:
    steps = np.array([step], np.float32)
    with pytest.raises(ValueError, match="a step is"):
        quantize(np.zeros((1, 1), np.float32), steps)
    with pytest.raises(ValueError, match="a step is"):
        dequantize(np.zeros((1, 1), np.int32), steps)


@pytest.mark.parametrize("fraction", [-0.1, 0.6, np.nan])
def test_offsets_that_make_no_sense_are_refused(fraction: float) -> None:
    steps = np.ones(1, np.float32)
    with pytest.raises(ValueError, match="dead_zone is a part of a step"):
        quantize(np.zeros((1, 1), np.float32), steps, fraction)
    with pytest.raises(ValueError, match="centroid is a part of a step"):
        dequantize(np.zeros((1, 1), np.int32), steps, fraction)


def test_the_largest_symbols_and_steps_stay_finite() -> None:
    extremes = np.array([[-(2**31)], [2**31 - 1]], np.int32)
    assert np.isfinite(dequantize(extremes, np.array([2.0**96], np.float32))).all()
