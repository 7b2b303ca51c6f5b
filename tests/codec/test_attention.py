"""Attention with a bias against what it stands for: duplicated keys, absent keys, prefixes that are put together."""

import numpy as np
import pytest

from kvcached.codec import attention


def some(n: int, dim: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)


def test_a_bias_of_log_r_is_r_copies_of_a_key() -> None:
    queries, keys, values = some(7, 8, 0), some(5, 8, 1), some(5, 6, 2)
    copies = np.array([1, 2, 3, 1, 4])
    biased = attention.read(attention.logits(queries, keys, 0.3), values, np.log(copies).astype(np.float32))
    copied = attention.read(attention.logits(queries, keys.repeat(copies, 0), 0.3), values.repeat(copies, 0))
    np.testing.assert_allclose(biased.output, copied.output, atol=1e-6)
    np.testing.assert_allclose(biased.log_mass, copied.log_mass, atol=1e-6)


def test_what_is_read_of_a_prefix_is_what_is_read_of_its_blocks_by_their_masses() -> None:
    queries, keys, values = some(7, 8, 0), some(20, 8, 1), some(20, 6, 2)
    whole = attention.read(attention.logits(queries, keys, 1.0), values)
    parts = [
        attention.read(attention.logits(queries, keys[at : at + 5], 1.0), values[at : at + 5]) for at in (0, 5, 10, 15)
    ]
    masses = np.exp([part.log_mass for part in parts])
    joined = sum(mass[:, None] * part.output for mass, part in zip(masses, parts, strict=True)) / masses.sum(0)[:, None]
    np.testing.assert_allclose(joined, whole.output, rtol=1e-9)
    np.testing.assert_allclose(np.log(masses.sum(0)), whole.log_mass, rtol=1e-9)


def test_huge_logits_do_not_overflow() -> None:
    found = attention.read(attention.logits(1e4 * some(3, 8, 0), 1e4 * some(5, 8, 1), 1.0), some(5, 6, 2))
    assert np.isfinite(found.output).all()
    assert np.isfinite(found.log_mass).all()


def test_a_soft_cap_bounds_logits_and_leaves_small_ones_alone() -> None:
    large, small = some(4, 8, 0), 1e-3 * some(4, 8, 1)
    assert np.abs(attention.logits(100 * large, large, 1.0, soft_cap=30.0)).max() <= 30
    np.testing.assert_allclose(
        attention.logits(small, small, 1.0, soft_cap=30.0), attention.logits(small, small, 1.0), rtol=1e-6
    )


def test_errors_are_those_of_their_definitions() -> None:
    exact = attention.Read(np.zeros((2, 2)), np.zeros(2))
    other = attention.Read(np.array([[1.0, 0], [0, 2]]), np.log([1.5, 0.5]))
    assert attention.mass_error(other, exact) == pytest.approx(0.5)
    assert attention.output_error(other, exact, np.diag([3.0, 1.0])) == pytest.approx((3 + 4) / 2)
