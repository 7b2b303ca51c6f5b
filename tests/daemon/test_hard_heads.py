"""Heads that compaction finds hard cost a model its compaction at most, never its calibration."""

import numpy as np
import pytest
from test_matching import DIM, METRIC, N_KV_HEADS, N_LAYERS, N_TOKENS, SPEC, Sample, a_text

from kvcached.block import KVBlock
from kvcached.calibration import Calibration
from kvcached.codec.bundle import Bundle
from kvcached.matching import Matching


def sharper(sample: Sample, times: float) -> Sample:
    block, queries, positions = sample
    return block, (queries * np.float32(times)).astype(np.float32), positions


def growing(seed: int) -> Sample:
    """Queries of two kinds read two crowds of tokens with opposite values, and sixteen others that are kept of them.

    Of those one is read a little more by the one kind: to make up for the crowds its value would have to be huge.
    """
    rng, n = np.random.default_rng(seed), 5 * N_TOKENS
    keys, values = np.zeros((2, N_LAYERS, N_KV_HEADS, n, DIM), np.float32)
    values += 0.01 * rng.standard_normal(values.shape).astype(np.float32)
    kind, unit = np.arange(n) % N_TOKENS, np.float32(DIM**0.5)
    for crowd, sign in ((kind < 24, 1), ((kind >= 24) & (kind < 48), -1)):
        keys[..., crowd, 0], values[..., crowd, 0] = 3 * sign * unit, sign
    keys[..., kind >= 48, 1], keys[..., kind == 48, 0] = 3 * unit, 0.3 * unit
    positions = np.arange(N_TOKENS, n, 2, dtype=np.int32)
    queries = np.zeros((N_LAYERS, 2, len(positions), DIM), np.float32)
    queries[..., 0], queries[..., 1] = rng.choice([-1, 1], len(positions)), 1
    return KVBlock.dense({"keys": keys, "values": values}, n, 0), queries, positions


def fitted(*samples: Sample) -> tuple[Calibration, Bundle]:
    calibration = Calibration(SPEC, n_recomputed=8)
    calibration.set_output_metric(METRIC.astype(np.float32), np.ones((N_LAYERS, N_KV_HEADS), np.float32))
    for seed, sample in enumerate(samples):
        calibration.add(a_text(seed)[0], "tune")
        calibration.add(sample[0], "fit", *sample[1:])
    return calibration, calibration.fit({"x8": 1.2, "x16": 1.5})


@pytest.mark.parametrize("times", [1, 10, 1000])
def test_heads_that_read_one_token_and_nothing_else_have_curves_like_any_other(times: float) -> None:
    matching = Matching(SPEC, seed=0, n_recomputed=8)
    matching.add(*sharper(a_text(0), times), METRIC)
    curves = matching.curves("curves")
    assert np.isfinite(curves).all()
    assert (curves[:, 0, 0] > 0).all()
    assert curves[:, :, -1].max() == 0


def test_a_model_with_sharp_heads_is_calibrated_and_compacts() -> None:
    _, bundle = fitted(*(sharper(a_text(100 + seed), 100) for seed in range(6)))
    assert bundle.compaction is not None
    assert Bundle.unpack(bundle.pack()).compaction is not None


def test_queries_larger_than_a_bundle_can_hold_cost_the_compaction_and_not_the_calibration() -> None:
    calibration, bundle = fitted(*(sharper(a_text(100 + seed), 1e5) for seed in range(6)))
    assert bundle.compaction is None
    assert calibration.compaction_problem == "queries are larger than float16 can hold"
    assert Bundle.unpack(bundle.pack()).bundle_id == bundle.bundle_id


def test_blocks_whose_values_would_grow_beyond_use_are_left_out_of_the_curves() -> None:
    matching, plain = (Matching(SPEC, seed=0, n_recomputed=8) for _ in range(2))
    for one in (matching, plain):
        one.add(*a_text(0), METRIC)
    matching.add(*growing(1), METRIC)
    assert matching.problem.startswith("fitted values grow to ")
    assert len(matching.blocks) == len(plain.blocks)
    np.testing.assert_array_equal(matching.curves("curves"), plain.curves("curves"))


def test_a_model_of_which_no_block_can_be_compacted_is_calibrated_all_the_same() -> None:
    calibration, bundle = fitted(*(growing(seed) for seed in range(6)))
    assert set(bundle.profiles) == {"x8", "x16"}
    assert bundle.compaction is None
    assert calibration.compaction_problem.startswith("fitted values grow to ")
