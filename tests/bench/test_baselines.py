"""The codecs that ours is compared with do what their sources say, so that comparing is fair."""

import mlx.core as mx
import numpy as np
import pytest
from baselines import Affine, Pr418, lossless
from calibration import Calibration, calibrate, features, shannon_bits
from hypothesis import given
from hypothesis import strategies as st
from reference_model import ReferenceModel, windows
from under_test import Half

pytestmark = pytest.mark.slow  # runs the reference model, or fits to much data

MODEL = ReferenceModel()


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return calibrate(MODEL, n_windows=4, n_tokens=512)


@pytest.fixture(scope="module")
def block() -> tuple[Half, Half]:
    """The cache of held-out text, 256 tokens from position 0."""
    added = MODEL.run(windows("heldout", 1, 256)[0]).added
    return added.keys.astype(np.float16), added.values.astype(np.float16)


def error(back: Half, tensor: Half) -> float:
    return float(np.linalg.norm((back - tensor).astype(np.float32)) / np.linalg.norm(tensor.astype(np.float32)))


def test_lossless_is_lossless_and_counts_the_whole_frame(block: tuple[Half, Half]) -> None:
    coded = lossless(*block, 0)
    assert coded.keys.tobytes() == block[0].tobytes()
    assert coded.values.tobytes() == block[1].tobytes()
    assert 8 * (block[0].nbytes + block[1].nbytes) / 2 < coded.bits < 8 * (block[0].nbytes + block[1].nbytes)


@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_affine_is_what_mlx_does(bits: int, group_size: int, block: tuple[Half, Half]) -> None:
    keys = block[0]
    packed, scales, biases = mx.quantize(mx.array(keys), group_size, bits)
    theirs = np.array(mx.dequantize(packed, scales, biases, group_size, bits))
    ours = Affine(bits, group_size).back(keys)
    # mlx computes in float16 and may miss the nearest code: never better than ours, and never much worse.
    assert 0.8 < error(ours, keys) / error(theirs, keys) < 1.01
    assert error(ours, theirs) < 0.6 * error(theirs, keys)
    assert Affine(bits, group_size)(*block, 0).bits == 8 * 2 * (packed.nbytes + scales.nbytes + biases.nbytes)


def test_features_are_rows_of_tokens_and_come_back(calibration: Calibration, block: tuple[Half, Half]) -> None:
    keys = block[0]
    rows = calibration.key_features(keys, 77)
    assert rows.shape == (256, 6 * 2 * 64)
    assert error(calibration.keys_of(rows, 77), keys) < 1e-3
    assert np.array_equal(calibration.values_of(features(keys)), keys)
    unrotated = MODEL.rotate(keys[3, 1, 5:6], np.array([-82]))
    assert np.allclose(rows[5].reshape(6, 2, 64)[3, 1], unrotated[0], atol=1e-6)


def test_calibration_finds_the_directions_of_its_text(calibration: Calibration, block: tuple[Half, Half]) -> None:
    for rows, statistics in (
        (calibration.key_features(block[0], 0), calibration.keys),
        (features(block[1]), calibration.values),
    ):
        basis, variances = statistics.basis(slice(0, 768))
        assert np.allclose(basis.T @ basis, np.eye(768), atol=1e-4)
        assert (np.diff(variances) <= 0).all()
        energies = (((rows[4:] - statistics.mean) @ basis) ** 2).mean(0)
        assert energies[:128].sum() > 0.7 * energies.sum()


def test_pr418_keeps_sinks_and_window_of_each_block(calibration: Calibration, block: tuple[Half, Half]) -> None:
    coded = Pr418(calibration, n_components=16)(*block, 512)
    for back, tensor in ((coded.keys, block[0]), (coded.values, block[1])):
        assert np.array_equal(back[:, :, :4], tensor[:, :, :4])
        assert np.array_equal(back[:, :, -128:], tensor[:, :, -128:])
        assert error(back[:, :, 4:-128], tensor[:, :, 4:-128]) > 0.1
    exempt = 16 * 132 * 2 * 768
    assert coded.bits == coded.paper_bits + exempt
    assert coded.paper_values == 124 * 2 * 768


@pytest.mark.parametrize("window", [0, 128])
def test_more_components_of_pr418_cost_more_and_err_less(
    window: int, calibration: Calibration, block: tuple[Half, Half]
) -> None:
    coded = [Pr418(calibration, n, window)(*block, 0) for n in (4, 16, 32, 64)]
    bits, errors = [c.bits for c in coded], [error(c.keys, block[0]) for c in coded]
    assert bits == sorted(bits)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01


@given(st.floats(0.01, 1), st.integers(1, 50))
def test_a_flat_spectrum_needs_half_the_logarithm_of_signal_over_noise(share: float, n: int) -> None:
    assert shannon_bits(np.full(n, 3.0), 3.0 * share) == pytest.approx(-0.5 * np.log2(share), abs=1e-6)


def test_water_filling_spends_nothing_on_components_below_the_level() -> None:
    assert shannon_bits(np.array([16.0, 1.0]), 1.0) == pytest.approx(0.5 * 0.5 * np.log2(16))
