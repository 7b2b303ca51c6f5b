"""What calibration finds out for compaction, on made-up heads whose needs are known."""

from dataclasses import replace

import numpy as np
import pytest

from kvcached import codec
from kvcached.block import BlockId, Fingerprint, KVBlock, LayerSpec, ModelSpec
from kvcached.calibration import Calibration
from kvcached.codec.bundle import Bundle
from kvcached.codec.compactor import solve_budgets
from kvcached.matching import FRACTIONS, Matching

DIM, N_TOKENS, N_LAYERS, N_KV_HEADS = 8, 64, 2, 2
LAYER = LayerSpec(n_query_heads=2, n_kv_heads=N_KV_HEADS, key_dim=DIM, value_dim=DIM)
SPEC = ModelSpec(Fingerprint(weights="w"), "float32", N_TOKENS, (LAYER,) * N_LAYERS)
METRIC = np.broadcast_to(np.eye(DIM), (N_LAYERS, N_KV_HEADS, DIM, DIM)).copy()
ID = BlockId(bytes(32), "", bytes(32))
Sample = tuple[KVBlock, np.ndarray, np.ndarray]


def a_text(seed: int, n_blocks: int = 5) -> Sample:
    """Queries of head 0 of each layer each want one token, which is another one each time; those of head 1 want all."""
    rng, n = np.random.default_rng(seed), n_blocks * N_TOKENS
    shape = (N_LAYERS, N_KV_HEADS, n, DIM)
    keys, values = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    positions = np.arange(N_TOKENS, n, 2, dtype=np.int32)
    queries = np.zeros((N_LAYERS, 2, len(positions), DIM), np.float32)
    wanted = rng.integers(0, np.maximum(positions - 16, 1))
    queries[:, 0] = 8 * keys[:, 0, wanted]
    queries[:, 1] = 0.1 * rng.standard_normal((N_LAYERS, len(positions), DIM))
    return KVBlock.dense({"keys": keys, "values": values}, n, 0), queries, positions


def a_matching(n_texts: int = 2) -> Matching:
    matching = Matching(SPEC, seed=0, n_recomputed=8)
    for seed in range(n_texts):
        matching.add(*a_text(seed), METRIC)
    return matching


def budgets_by(by: str, ratio: float = 2.0, weights: np.ndarray | None = None) -> np.ndarray:
    curves = a_matching().curves(by, weights)
    return solve_budgets(curves, np.array(FRACTIONS, np.float32), N_TOKENS, ratio)


def test_curves_fall_to_nothing_where_all_tokens_are_kept() -> None:
    curves = a_matching().curves("curves")
    assert (curves[:, :, -1] == 0).all()
    assert (curves[:, :, 0] > curves[:, :, -2]).all()
    assert curves.max() == 1


def test_heads_that_want_another_token_each_time_keep_more_than_those_that_want_a_little_of_all() -> None:
    found = budgets_by("curves")
    assert (found[:, 0] > 2 * found[:, 1]).all()
    assert found.sum() == N_LAYERS * N_KV_HEADS * N_TOKENS / 2


def test_what_errors_weigh_shifts_budgets() -> None:
    weights = np.array([[1, 1], [1000, 1]], np.float32)
    found, plain = budgets_by("curves", 4.0, weights), budgets_by("curves", 4.0)
    assert found[1, 0] > plain[1, 0]
    assert found[0, 0] < plain[0, 0]


def test_by_entropy_heads_that_look_at_many_tokens_keep_more() -> None:
    found = budgets_by("entropy", 4.0)
    assert (found[:, 1] > found[:, 0]).all()


def test_uniform_budgets_are_all_alike() -> None:
    np.testing.assert_array_equal(budgets_by("uniform"), np.full((N_LAYERS, N_KV_HEADS), N_TOKENS // 2))


def test_the_reservoir_is_bounded_and_holds_queries_of_all_texts() -> None:
    reservoir = a_matching(4).reservoir
    assert reservoir is not None
    assert reservoir.shape == (N_LAYERS, 2, 256, DIM)
    for seed in range(4):
        plain = a_text(seed)[1]  # this model has no rotary positions
        assert any((plain[0, 0] == query).all(axis=1).any() for query in reservoir[0, 0])


def test_the_first_block_has_no_part_in_curves_for_its_sinks_are_kept_in_any_case() -> None:
    matching = Matching(SPEC, seed=0, n_recomputed=8)
    matching.add(*a_text(0, n_blocks=2), METRIC)  # of the second block no query comes late enough
    with pytest.raises(ValueError, match="no block had queries"):
        matching.curves("curves")


def a_bundle(by: str = "curves") -> Bundle:
    calibration = Calibration(SPEC, n_recomputed=8)
    calibration.set_output_metric(METRIC.astype(np.float32), np.ones((N_LAYERS, N_KV_HEADS), np.float32))
    for seed in range(6):
        calibration.add(a_text(seed)[0], "tune")
        block, queries, positions = a_text(100 + seed)
        calibration.add(block, "fit", queries, positions)
    return calibration.fit({"x8": 1.2, "x16": 1.5}, by)


def test_a_calibrated_model_compacts_and_its_frames_reach_about_what_was_asked_for() -> None:
    bundle = Bundle.unpack(a_bundle().pack())
    assert bundle.compaction is not None
    coder = bundle.compactor("x8", 2.0)
    sizes = []
    for seed in range(3):
        rows = slice(N_TOKENS, 2 * N_TOKENS)
        tensors = {name: array[:, :, rows] for name, array in a_text(500 + seed)[0].to_tensors().items()}
        small = codec.compact(KVBlock.dense(tensors, N_TOKENS, N_TOKENS), coder)
        frame = codec.encode(ID, small.block, coder=coder)
        back = codec.decode(ID, frame, 1 << 30, coder)
        np.testing.assert_array_equal(back.positions, small.block.positions)
        sizes.append(len(frame))
    source = 2 * N_LAYERS * N_KV_HEADS * N_TOKENS * DIM * 4
    assert 0.7 < source / np.mean(sizes) / 2.4 < 1.4


def test_the_same_texts_give_the_same_bundle() -> None:
    assert a_bundle().bundle_id == a_bundle().bundle_id
    assert a_bundle().bundle_id != a_bundle("uniform").bundle_id


def test_a_model_that_showed_no_queries_is_not_compacted() -> None:
    calibration = Calibration(SPEC, n_recomputed=8)
    for seed in range(4):
        calibration.add(a_text(seed)[0], "tune")
        calibration.add(a_text(100 + seed)[0], "fit")
    assert calibration.fit({"x8": 3.0}).compaction is None
    assert calibration.compaction_problem == "the model showed no queries"


def test_a_model_of_short_blocks_is_not_compacted() -> None:
    spec = replace(SPEC, block_size=16)
    calibration = Calibration(spec, n_recomputed=8)
    calibration.set_output_metric(METRIC.astype(np.float32))
    for seed in range(4):
        calibration.add(a_text(seed)[0], "tune")
        calibration.add(*_as_fit(a_text(100 + seed)))
    assert calibration.fit({"x8": 2.0}).compaction is None
    assert calibration.compaction_problem == "blocks of 16 tokens are too short"


def _as_fit(sample: Sample) -> tuple[KVBlock, str, np.ndarray, np.ndarray]:
    return sample[0], "fit", *sample[1:]
