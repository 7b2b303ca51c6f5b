"""Bytes at equal loss: interpolated within a sweep, never beyond it."""

import json

import numpy as np
import pytest
from loss import Loss
from measuring import Row, bytes_at_equal_kl


def row(bits: float, kl: float, seed: int = 0) -> Row:
    """A row whose KL varies between stretches as that of the same seed does."""
    pattern = np.random.default_rng(seed).uniform(0.5, 1.5, (4, 8))
    stretches = kl * pattern / pattern.mean()
    ones = np.ones((4, 6))
    loss = Loss(stretches, stretches, stretches, ones, ones, ones[:, :2], bits, 1, bits, 1)
    return Row("r", bits, 16 / bits, 16 / bits, 0, kl, 0, 0, None, None, None, {}, loss)


SWEEP = [row(8, 1e-4), row(4, 1e-2), row(2, 1)]


def test_bits_are_interpolated_against_the_logarithm_of_kl() -> None:
    assert bytes_at_equal_kl(row(3, 1e-3), SWEEP).value == pytest.approx(3 / 6)
    assert bytes_at_equal_kl(row(3, 1e-1), SWEEP).value == pytest.approx(3 / 3)
    assert bytes_at_equal_kl(row(1, 1e-2), SWEEP).value == pytest.approx(1 / 4)


def test_the_order_of_the_sweep_does_not_matter_and_beaten_rows_do_not_count() -> None:
    beaten = [row(9, 1e-3), row(5, 0.5)]
    assert bytes_at_equal_kl(row(3, 1e-3), [*beaten, *SWEEP[::-1]]).value == pytest.approx(0.5)


def test_a_ratio_of_codecs_that_vary_alike_has_a_narrow_interval() -> None:
    paired = bytes_at_equal_kl(row(3, 1e-3), SWEEP)
    unpaired = bytes_at_equal_kl(row(3, 1e-3, seed=1), SWEEP)
    assert paired.high - paired.low < 1e-6
    assert unpaired.high - unpaired.low > 1e-3


@pytest.mark.parametrize("kl", [1e-5, 2])
def test_nothing_is_extrapolated(kl: float) -> None:
    with pytest.raises(ValueError, match=r"the sweep goes from 0\.0001 to 1"):
        bytes_at_equal_kl(row(3, kl), SWEEP)


def test_a_row_is_json() -> None:
    content = json.loads(json.dumps(row(3, 1e-3).as_json()))
    assert content["bits_per_value"] == 3
    assert "loss" not in content
