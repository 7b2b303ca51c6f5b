"""Made-up heads of which some follow from others, predicted: what that saves, and when it is not done."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
from codec.recipes import Recipe

from kvcached import anchors, codec, prediction, steps
from kvcached.block import BlockId, Fingerprint, KVBlock, LayerSpec, ModelSpec
from kvcached.codec import klt, planes
from kvcached.codec.bundle import Bundle
from kvcached.codec.compactor import Compaction, Compactor
from kvcached.codec.tables import SIDES, storable
from kvcached.prediction import PlaneSample, Predicted

DIM, N_TOKENS, N_LAYERS, N_KV_HEADS = 8, 256, 2, 4
LAYER = LayerSpec(n_query_heads=4, n_kv_heads=N_KV_HEADS, key_dim=DIM, value_dim=DIM)
SPEC = ModelSpec(Fingerprint(weights="w"), "float32", N_TOKENS, (LAYER,) * N_LAYERS)
WHOLE = (1, 6)  # heads, over both layers
NOISE, RATIO, TARGETS = 0.02, 2.0, {"x8": 7.0, "x16": 8.0}
ID = BlockId(bytes(32), "", bytes(32))


def a_block(seed: int) -> KVBlock:
    """Rows of all heads follow, but for noise, from those of two, keys and values together."""
    rng, mixing = np.random.default_rng(seed), np.random.default_rng(0)
    n_heads, known = N_LAYERS * N_KV_HEADS, rng.standard_normal((N_TOKENS, len(WHOLE) * 2 * DIM))
    rows = np.empty((2, n_heads, N_TOKENS, DIM))
    for place in np.ndindex(2, n_heads):
        mixed = known @ mixing.standard_normal((known.shape[1], DIM)) / known.shape[1] ** 0.5
        rows[place] = mixed + NOISE * rng.standard_normal((N_TOKENS, DIM))
    rows[:, WHOLE] = known.reshape(N_TOKENS, 2, len(WHOLE), DIM).transpose(1, 2, 0, 3)
    tensors = rows.astype(np.float32).reshape(2, N_LAYERS, N_KV_HEADS, N_TOKENS, DIM)
    return KVBlock.dense(dict(zip(SIDES, tensors, strict=True)), N_TOKENS, N_TOKENS)


def statistics(blocks: Sequence[KVBlock], side: str) -> anchors.GroupStatistics:
    """Of one group of all layers, in which all errors weigh alike."""
    rows = np.concatenate([getattr(planes.split(block, SPEC, N_LAYERS), side)[0] for block in blocks])
    return anchors.GroupStatistics([klt.Moments.of(rows)], [np.eye(rows.shape[1])], [1.0])


def fitted(n_blocks: int = 6) -> Compaction:
    """Two heads lose so much that they keep all tokens; the others lead to nothing."""
    curves = np.outer(np.ones(N_LAYERS * N_KV_HEADS), [7, 3, 1, 0.0])
    curves[list(WHOLE)] *= 1000
    queries = np.random.default_rng(1).standard_normal((N_LAYERS, 4, 24, DIM)).astype(np.float16)
    outline = Compaction(
        np.array([0.125, 0.25, 0.5, 1.0], np.float32),
        curves.reshape(N_LAYERS, N_KV_HEADS, -1).astype(np.float32),
        queries.astype(np.float32),
        np.broadcast_to(np.eye(DIM, dtype=np.float32), (N_LAYERS, N_KV_HEADS, DIM, DIM)).copy(),
        {},
    )
    blocks = [a_block(seed) for seed in range(n_blocks)]
    fitting = anchors.Fitting(SPEC, N_LAYERS, blocks, {side: statistics(blocks, side) for side in SIDES})
    return anchors.fit(outline, fitting, TARGETS)


def compactor_of(compaction: Compaction, profile: str) -> Compactor:
    """As whoever reads the bundle's file has it."""
    bundle = replace(Recipe(SPEC, N_LAYERS).bundle(), compaction=compaction)
    return Bundle.unpack(bundle.pack()).compactor(profile, RATIO)


def nothing_predicted(
    planes: Mapping[str, Sequence[PlaneSample]], _coarse: steps.Choice, leaders: Sequence[int | None], _n_tokens: int
) -> dict[tuple[str, int], Predicted]:
    return {
        (side, i): Predicted(None, planes[side][i].basis, planes[side][i].sample)
        for side in SIDES
        for i in range(len(leaders))
    }


def bytes_and_error(small: KVBlock, coder: Compactor) -> tuple[int, float]:
    """Of the frame of a compacted block, and the mean squared error of what it decodes to."""
    frame = codec.encode(ID, small, coder=coder)
    back = codec.decode(ID, frame, 1 << 30, coder)
    lost = [np.square(getattr(back, side).astype(np.float64) - getattr(small, side)).mean() for side in SIDES]
    return len(frame), float(np.mean(lost))


@pytest.fixture(scope="module")
def predicted() -> Compaction:
    return fitted()


@pytest.fixture(scope="module")
def bare() -> Compaction:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(prediction, "fit", nothing_predicted)
        return fitted()


def test_prediction_takes_fewer_bytes_for_a_smaller_error_of_the_same_block(
    predicted: Compaction, bare: Compaction
) -> None:
    coders = {"with": compactor_of(predicted, "x16"), "without": compactor_of(bare, "x8")}
    assert [set(plane.predictors) for plane in coders["with"].planes if plane.leader is not None] == [{*SIDES}] * 6
    assert not any(plane.predictors for plane in coders["without"].planes)
    for seed in range(100, 104):
        small = codec.compact(a_block(seed), coders["without"]).block
        n_bytes, error = zip(*(bytes_and_error(small, coder) for coder in coders.values()), strict=True)
        assert n_bytes[0] < 0.85 * n_bytes[1]
        assert error[0] < error[1]


@pytest.mark.parametrize("profile", TARGETS)
def test_at_the_same_compression_prediction_halves_the_error(
    profile: str, predicted: Compaction, bare: Compaction
) -> None:
    coders = [compactor_of(compaction, profile) for compaction in (predicted, bare)]
    small = codec.compact(a_block(104), coders[1]).block
    n_bytes, error = zip(*(bytes_and_error(small, coder) for coder in coders), strict=True)
    assert n_bytes[0] <= n_bytes[1]
    assert error[0] < 0.5 * error[1]


def samples(known: np.ndarray, led: np.ndarray) -> dict[str, list[PlaneSample]]:
    """A plane that leads, [n_rows, 2 DIM], and one of one head, for keys and values the same."""
    found = []
    for rows in (known.astype(np.float32), led.astype(np.float32)):
        tokens = np.arange(0, len(rows), 4)
        basis = storable(klt.fit(klt.Moments.of(rows), rows.shape[1]))
        found.append(PlaneSample(rows, rows[tokens], tokens, basis, np.eye(rows.shape[1]), 1.0))
    return dict.fromkeys(SIDES, found)


def fit(made: dict[str, list[PlaneSample]], n_tokens: int = N_TOKENS) -> dict[tuple[str, int], Predicted]:
    coarse = steps.choose([one.sample for side in SIDES for one in made[side]], 4.0, None)
    return prediction.fit(made, coarse, [None, 0], n_tokens)


def test_a_head_that_follows_from_others_is_predicted_and_little_is_left_to_code() -> None:
    rng = np.random.default_rng(0)
    known = rng.standard_normal((4 * N_TOKENS, 2 * DIM))
    led = known @ rng.standard_normal((2 * DIM, DIM)) / 4
    found = fit(samples(known, led))
    for side, n_known in (("keys", 4 * DIM), ("values", 5 * DIM)):
        one = found[side, 1]
        assert one.predictor is not None
        assert one.predictor.shape == (n_known, DIM)
        assert np.square(one.sample.coefficients).mean() < 0.1 * np.square(led).mean()
    assert found["keys", 0].predictor is None  # nothing is known


def test_heads_that_have_nothing_in_common_with_others_go_without() -> None:
    rng = np.random.default_rng(1)
    made = samples(rng.standard_normal((4 * N_TOKENS, 2 * DIM)), rng.standard_normal((4 * N_TOKENS, DIM)))
    found = fit({"keys": made["keys"], "values": samples(*rng.standard_normal((2, 4 * N_TOKENS, 2 * DIM)))["values"]})
    assert found["keys", 1].predictor is None
    assert found["keys", 1].basis is made["keys"][1].basis


def test_a_map_of_numbers_larger_than_a_bundle_can_hold_is_not_taken() -> None:
    rng = np.random.default_rng(3)
    known = rng.standard_normal((4 * N_TOKENS, 2 * DIM))
    found = fit(samples(1e-6 * known, known[:, :DIM]))
    assert found["keys", 1].predictor is None
    assert found["values", 1].predictor is not None  # from its own keys, which are the same


def test_a_predictor_is_not_taken_from_one_block_alone() -> None:
    rng = np.random.default_rng(2)
    known = rng.standard_normal((N_TOKENS, 2 * DIM))
    found = fit(samples(known, known[:, :DIM]))
    assert all(one.predictor is None for one in found.values())
