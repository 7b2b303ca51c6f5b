"""Loss is none where nothing is lost, grows with the damage, and its intervals are paired."""

import numpy as np
import pytest
from loss import HeldOut, Loss, interval, resampled, resamples
from reference_model import ReferenceModel, log_softmax, windows
from under_test import Coded, Course, Half, keep

pytestmark = pytest.mark.slow  # runs the reference model, or fits to much data

COURSE = Course(n_prefix=256, block_size=64, n_recomputed=32, n_continued=128)
MODEL = ReferenceModel()


@pytest.fixture(scope="module")
def held_out() -> HeldOut:
    return HeldOut(MODEL, 2, COURSE)


class Noise:
    """A codec that adds noise of a fixed size, and remembers what it was asked."""

    def __init__(self, size: float) -> None:
        self.size, self.positions = size, []

    def __call__(self, keys: Half, values: Half, first_position: int) -> Coded:
        self.positions.append(first_position)
        rng = np.random.default_rng(first_position)
        noisy = [(x + self.size * rng.standard_normal(x.shape)).astype(np.float16) for x in (keys, values)]
        return Coded(noisy[0], noisy[1], 100.0, 60.0, 7)


def test_a_codec_that_loses_nothing_costs_nothing(held_out: HeldOut) -> None:
    loss = held_out.loss(keep)
    assert loss.mean_kl() == (0, 0, 0)
    assert loss.perplexity_delta() == (0, 0, 0)
    assert loss.attention_error() == ((0, 0, 0), (0, 0, 0))
    assert loss.bits == 16 * loss.n_values == 16 * 2 * 2 * 6 * 2 * 64 * 256


def test_loss_grows_with_the_damage(held_out: HeldOut) -> None:
    losses = [held_out.loss(Noise(size)) for size in (0.03, 0.1, 0.3, 1)]
    kls = [loss.mean_kl() for loss in losses]
    assert 0 < kls[0].value < kls[1].value < kls[2].value < kls[3].value
    assert all(kl.low <= kl.value <= kl.high for kl in kls)
    assert losses[3].perplexity_delta().value > 0.05
    mean, worst = losses[2].attention_error()
    assert 0.01 < mean.value < worst.value < 1


def test_bits_are_summed_over_blocks_and_documents(held_out: HeldOut) -> None:
    codec = Noise(0.1)
    loss = held_out.loss(codec)
    assert sorted(codec.positions) == [0, 0, 64, 64, 128, 128, 192, 192]
    assert (loss.bits, loss.paper_bits, loss.paper_values) == (800, 480, 56)


def test_rows_that_the_engine_computes_anew_do_not_count(held_out: HeldOut) -> None:
    def forget_the_end(keys: Half, values: Half, first_position: int) -> Coded:
        kept = first_position + np.arange(64) < COURSE.n_prefix - COURSE.n_recomputed
        return Coded(keys * kept[:, None], values * kept[:, None], 1, 1, 1)

    assert held_out.loss(forget_the_end).mean_kl().value == 0


def test_kl_is_that_of_the_next_token_distributions() -> None:
    course = Course(n_prefix=128, block_size=64, n_recomputed=0, n_continued=64)
    text = windows("heldout", 1, 193)[0]
    prefix = MODEL.run(text[:128]).added.rounded()
    p = log_softmax(MODEL.run(text[128:-1], prefix).logits)
    zeros = np.zeros_like(prefix.values)
    q = log_softmax(MODEL.run(text[128:-1], type(prefix)(prefix.keys, zeros)).logits)
    by_hand = (np.exp(p) * (p - q)).sum(-1).mean()

    def forget_values(keys: Half, values: Half, first_position: int) -> Coded:  # noqa: ARG001
        return Coded(keys, 0 * values, 1, 1, 1)

    loss = HeldOut(MODEL, 1, course).loss(forget_values)
    assert loss.mean_kl().value == pytest.approx(by_hand, rel=1e-3)
    surprise = -q[np.arange(64), text[129:]].mean()
    assert loss.surprise.mean() == pytest.approx(surprise, rel=1e-4)


def test_resamples_are_weights_and_always_the_same() -> None:
    weights = resamples(5, 8)
    assert np.allclose(weights.sum((1, 2)), 1)
    assert (weights.sum(2).max(1) > 0.2).any(), "documents are drawn with replacement"
    resamples.cache_clear()
    assert np.array_equal(weights, resamples(5, 8))


def test_the_interval_of_a_mean_is_as_wide_as_theory_says() -> None:
    figure = np.random.default_rng(3).standard_normal((100, 8))
    found = interval(figure.mean(), resampled(figure))
    expected = 2 * 1.96 * np.hypot(1, 1) / np.sqrt(800)  # both stages draw: twice the variance
    assert found.high - found.low == pytest.approx(expected, rel=0.2)
    assert found.low < figure.mean() < found.high


def test_perplexity_delta_is_a_part_of_the_exact_caches() -> None:
    exact, lossy = np.full((1, 2), 2.0), np.full((1, 2), 2.0 + np.log(1.01))
    loss = Loss(exact, lossy, exact, np.ones((1, 3)), np.ones((1, 3)), np.ones((1, 2)), 1.0, 1, 1.0, 1)
    assert loss.perplexity_delta().value == pytest.approx(0.01)
