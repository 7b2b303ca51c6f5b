"""Our codec under test: what comes back is near, sinks are exact, and coarser steps are fewer bytes and more error."""

import numpy as np
import pytest
from calibration import Calibration, calibrate
from ours import Tables
from reference_model import ReferenceModel, windows
from under_test import Half

pytestmark = pytest.mark.slow  # runs the reference model


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return calibrate(ReferenceModel(), n_windows=4, n_tokens=512)


@pytest.fixture(scope="module")
def block(calibration: Calibration) -> tuple[Half, Half]:
    """The first block of a text that was not calibrated on."""
    added = calibration.model.run(windows("heldout", 1, 257)[0][:256]).added
    return added.keys.astype(np.float16), added.values.astype(np.float16)


def test_coarser_steps_are_fewer_bytes_and_more_error(calibration: Calibration, block: tuple[Half, Half]) -> None:
    coded = [Tables(calibration, 6).codec(step)(*block, 0) for step in (0.5, 1.0, 2.0, 4.0)]
    errors = [np.square(c.keys.astype(np.float64) - block[0]).sum() for c in coded]
    assert (np.diff([c.bits for c in coded]) < 0).all()
    assert (np.diff(errors) > 0).all()
    assert errors[-1] < 0.2 * np.square(block[0].astype(np.float64)).sum()


def test_sinks_are_exact_and_counted_at_16_bits(calibration: Calibration, block: tuple[Half, Half]) -> None:
    first, later = (Tables(calibration, 6).codec(3.0)(*block, position) for position in (0, 256))
    assert np.array_equal(first.keys[:, :, :4], block[0][:, :, :4])
    assert np.array_equal(first.values[:, :, :4], block[1][:, :, :4])
    assert not np.array_equal(first.keys[:, :, 4:], block[0][:, :, 4:])
    assert not np.array_equal(later.keys[:, :, :4], block[0][:, :, :4])
    assert first.bits - first.paper_bits == 16 * 4 * (block[0].size + block[1].size) / 256
    assert later.bits == later.paper_bits
