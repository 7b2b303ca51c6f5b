"""Calibration on made-up caches whose structure is known: what it promises about bytes, errors, and bad input."""

from collections.abc import Mapping

import numpy as np
import pytest

from kvcached import codec, sensitivity, steps
from kvcached.block import BlockId, Fingerprint, KVBlock, LayerSpec, ModelSpec, RopeSpec
from kvcached.calibration import MIN_TUNE_ROWS, Calibration
from kvcached.codec import rope
from kvcached.codec.bundle import Bundle
from kvcached.errors import InvalidRequestError, UnsupportedRopeError

DIM, N_LAYERS, N_KV_HEADS, N_QUERY_HEADS, N_TOKENS = 16, 3, 2, 4, 512
ROPE = RopeSpec(DIM, 1e4)
BLOCK_ID = BlockId(bytes(32), "", bytes(32))
QUERIED = np.arange(160, N_TOKENS, 8, dtype=np.int32)


def model(**layer: object) -> ModelSpec:
    fields = {"n_query_heads": N_QUERY_HEADS, "n_kv_heads": N_KV_HEADS, "key_dim": DIM, "value_dim": DIM, "rope": ROPE}
    return ModelSpec(Fingerprint(weights="w"), "float16", 256, (LayerSpec(**(fields | layer)),) * N_LAYERS)


def text(seed: int, scale: float = 1.0) -> KVBlock:
    """A text whose keys and values lie, up to a little noise, in a few directions that all texts and layers share."""
    shape = (N_LAYERS, N_KV_HEADS, N_TOKENS, DIM)
    directions = np.random.default_rng(77).standard_normal((2, 12, N_LAYERS * N_KV_HEADS * DIM))
    rng = np.random.default_rng(seed)
    strengths = rng.laplace(size=(2, N_TOKENS, 12)) * 0.8 ** np.arange(12)
    rows = (strengths @ directions + 0.05 * rng.standard_normal((2, N_TOKENS, directions.shape[2]))).astype(np.float32)
    keys, values = rows.reshape(2, N_TOKENS, N_LAYERS, N_KV_HEADS, DIM).transpose(0, 2, 3, 1, 4) * np.float32(scale)
    keys = rope.apply(np.ascontiguousarray(keys), np.arange(N_TOKENS, dtype=np.int32), ROPE)
    assert keys.shape == shape
    return KVBlock.dense({"keys": keys.astype(np.float16), "values": values.astype(np.float16)}, N_TOKENS, 0)


def queries(seed: int, dims: slice = slice(None)) -> np.ndarray:
    """Queries that, without rotation, look at these dims alone."""
    looks = np.zeros((N_LAYERS, N_QUERY_HEADS, len(QUERIED), DIM), np.float32)
    looks[..., dims] = np.random.default_rng(seed).standard_normal(looks[..., dims].shape)
    return rope.apply(looks, QUERIED, ROPE)


def calibrated(*, dims: slice | None = None, seed: int = 0, n_texts: int = 4) -> Calibration:
    """dims: those that queries look at; None: no queries and no output metric."""
    calibration = Calibration(model(), seed=seed)
    if dims is not None:
        calibration.set_output_metric(np.broadcast_to(np.eye(DIM, dtype=np.float32), (N_LAYERS, N_KV_HEADS, DIM, DIM)))
    for index in range(n_texts):
        looked = {} if dims is None else {"queries": queries(index, dims), "query_positions": QUERIED}
        calibration.add(text(index), "fit", **looked)
    calibration.add(text(100), "tune")
    calibration.add(text(101), "tune")
    return calibration


def frames(bundle: Bundle, profile: str, block: KVBlock) -> list[tuple[KVBlock, bytes, KVBlock]]:
    """Blocks of a text: before, as a frame, and after."""
    found = []
    for start in range(0, N_TOKENS, bundle.spec.block_size):
        tokens = slice(start, start + bundle.spec.block_size)
        tensors = {name: tensor[:, :, tokens] for name, tensor in block.to_tensors().items()}
        before = KVBlock.dense(tensors, bundle.spec.block_size, start)
        frame = codec.encode(BLOCK_ID, before, coder=bundle.coder(profile))
        found.append((before, frame, codec.decode(BLOCK_ID, frame, 1 << 24, bundle.coder(profile))))
    return found


def compression(bundle: Bundle, profile: str, block: KVBlock) -> float:
    stored = frames(bundle, profile, block)
    return sum(before.nbytes for before, _, _ in stored) / sum(len(frame) for _, frame, _ in stored)


def key_errors(bundle: Bundle, profile: str, block: KVBlock) -> np.ndarray:
    """Mean squared errors of unrotated keys, by dim."""
    errors = []
    for before, _, after in frames(bundle, profile, block):
        positions = np.arange(before.first_position, before.first_position + before.n_source_tokens, dtype=np.int32)
        both = [rope.remove(b.to_tensors()["keys"].astype(np.float32), positions, ROPE) for b in (before, after)]
        errors.append(np.square(both[0] - both[1]))
    return np.concatenate(errors, axis=2).mean(axis=(0, 1, 2))


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return calibrated(dims=slice(None)).fit({"x8": 8, "x16": 12, "near-lossless": 4})


def test_the_same_blocks_and_seed_give_the_same_bundle() -> None:
    packed = [calibrated(dims=slice(None), seed=seed).fit({"x16": 12}).pack() for seed in (0, 0, 1)]
    assert packed[0] == packed[1] != packed[2]


def test_a_bundle_survives_its_file(bundle: Bundle) -> None:
    again = Bundle.unpack(bundle.pack())
    assert again.bundle_id == bundle.bundle_id
    (_, frame, _), *_ = frames(bundle, "x8", text(100))
    assert codec.encode(BLOCK_ID, frames(again, "x8", text(100))[0][0], coder=again.coder("x8")) == frame


@pytest.mark.parametrize(("profile", "target"), [("near-lossless", 4), ("x8", 8), ("x16", 12)])
def test_text_like_the_tune_text_reaches_the_target_in_whole_frames(bundle: Bundle, profile: str, target: int) -> None:
    assert target <= compression(bundle, profile, text(100)) < 1.35 * target
    assert compression(bundle, profile, text(555)) > 0.97 * target


def test_errors_rise_with_compression(bundle: Bundle) -> None:
    errors = [key_errors(bundle, name, text(200)).sum() for name in ("near-lossless", "x8", "x16")]
    assert errors == sorted(errors)
    assert errors[0] < errors[2] / 4


def test_every_component_with_a_step_carries_something(bundle: Bundle) -> None:
    """Taking any one of them out changes what a block decodes to."""
    profile = bundle.profiles["x8"]
    for tables, basis in zip((*profile.keys, *profile.values), (*bundle.keys, *bundle.values), strict=True):
        assert ((tables.steps > 0) <= (np.abs(basis.inverse).max(axis=1) > 0)).all()
        assert 0 < (tables.steps > 0).sum() <= len(basis.mean)


def test_components_that_no_profile_codes_are_left_out(bundle: Bundle) -> None:
    for side in ("keys", "values"):
        for group, basis in enumerate(getattr(bundle, side)):
            coded = np.any([getattr(profile, side)[group].steps > 0 for profile in bundle.profiles.values()], axis=0)
            assert coded.all()
            assert basis.forward.shape[1] == len(coded)


def test_errors_of_keys_are_small_where_queries_look() -> None:
    """The rotation of these two dims is so slow that keys at any distance are met by nearly the same query."""
    seen = np.isin(np.arange(DIM), (6, 7))
    looked = calibrated(dims=slice(6, 8)).fit({"x8": 10})
    plain = calibrated().fit({"x8": 10})
    errors, plain_errors = (key_errors(b, "x8", text(300)) for b in (looked, plain))
    assert errors[seen].mean() / errors[~seen].mean() < 0.3 * plain_errors[seen].mean() / plain_errors[~seen].mean()


def test_a_layer_whose_output_matters_little_gets_larger_errors() -> None:
    calibration = Calibration(model())
    weights = np.array([1.0, 1.0, 1e-4], np.float32)[:, None, None, None]
    calibration.set_output_metric(
        np.eye(DIM, dtype=np.float32) * np.broadcast_to(weights, (N_LAYERS, N_KV_HEADS, 1, 1))
    )
    for index in range(4):
        calibration.add(text(index), "fit", queries(index), QUERIED)
    calibration.add(text(100), "tune")
    stored = frames(calibration.fit({"x8": 10}), "x8", text(300))
    errors = np.mean(
        [np.square(b.to_tensors()["values"].astype(np.float32) - a.to_tensors()["values"]) for b, _, a in stored],
        axis=(0, 2, 3, 4),
    )
    assert errors[2] > 2 * errors[:2].max()


def test_sensitivity_is_the_error_of_attention_to_first_order() -> None:
    """Against attention computed with noisy keys, and with noisy values."""
    rng = np.random.default_rng(5)
    layer, positions = model().layers[0], np.arange(40, 60, dtype=np.int32)
    keys, values = (rng.standard_normal((1, 60, DIM)).astype(np.float32) for _ in range(2))
    looks = rng.standard_normal((1, 20, DIM)).astype(np.float32)
    spread = rng.standard_normal((DIM, DIM))
    metric, output = spread @ spread.T, np.diag(np.linspace(0.1, 2, DIM))
    seen = sensitivity.Text(keys, values, 0, 0, 0)
    key_metric, value_weight = sensitivity.of_head(seen, 0, looks, positions, layer, output, np.random.default_rng(0))
    exact = _read(keys[0], values[0], looks[0], positions)
    noise = np.linalg.cholesky(metric) * 1e-3
    found = np.zeros(2)
    for _ in range(400):
        delta = (rng.standard_normal((60, DIM)) @ noise.T).astype(np.float32)
        turned = rope.apply(delta[None], np.arange(60, dtype=np.int32), ROPE)[0]
        for side, read in enumerate(
            (
                _read(keys[0] + turned, values[0], looks[0], positions),
                _read(keys[0], values[0] + delta, looks[0], positions),
            )
        ):
            found[side] += np.einsum("qi,ij,qj->", read - exact, output, read - exact) / 400
    expected = np.array([np.sum(key_metric * metric), value_weight * np.sum(output * metric)]) * 1e-6
    np.testing.assert_allclose(found, expected, rtol=0.15)


def _read(keys: np.ndarray, values: np.ndarray, looks: np.ndarray, positions: np.ndarray) -> np.ndarray:
    scores = looks.astype(np.float64) @ keys.T.astype(np.float64) / DIM**0.5
    scores[np.arange(len(keys)) > positions[:, None]] = -np.inf
    weights = np.exp(scores)
    return weights / weights.sum(axis=1, keepdims=True) @ values


def test_the_allocation_never_loses_more_than_one_common_step(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    samples = [
        steps.Sample((rng.laplace(size=(1024, 24)) * 0.7 ** np.arange(24)).astype(np.float32), weight)
        for weight in (1.0, 5.0)
    ]
    best = steps.choose(samples, 2.0, 256)
    monkeypatch.setattr(steps, "FACTORS", (1.0,))
    common = steps.choose(samples, 2.0, 256)
    assert best.bits_per_value <= 2.0
    assert common.bits_per_value <= 2.0
    assert best.distortion <= common.distortion


# ---- bad input


@pytest.mark.parametrize(("n_texts", "n_tune", "words"), [(0, 512, "fit 0 of"), (4, 100, "tune 96 of 256")])
def test_too_little_text_is_refused_with_counts(n_texts: int, n_tune: int, words: str) -> None:
    calibration = Calibration(model())
    for index in range(n_texts):
        calibration.add(text(index), "fit")
    tensors = {name: tensor[:, :, :n_tune] for name, tensor in text(100).to_tensors().items()}
    calibration.add(KVBlock.dense(tensors, n_tune, 0), "tune")
    with pytest.raises(InvalidRequestError, match=words):
        calibration.fit({"x8": 8})


def test_a_block_that_is_not_finite_is_refused_and_leaves_no_trace() -> None:
    calibration, block = calibrated(), text(0)
    block.values[40, 3] = np.nan
    before = calibration.n_rows
    for part in ("fit", "tune"):
        with pytest.raises(InvalidRequestError, match="finite"):
            calibration.add(block, part)
    assert calibration.n_rows == before
    assert calibration.fit({"x16": 12}).pack() == calibrated().fit({"x16": 12}).pack()


def test_queries_that_do_not_fit_are_refused() -> None:
    calibration = calibrated(dims=slice(None))
    good = queries(0)
    bad: list[Mapping[str, np.ndarray]] = [
        {"queries": good},
        {"query_positions": QUERIED},
        {"queries": good[:, :3], "query_positions": QUERIED},
        {"queries": good, "query_positions": QUERIED + N_TOKENS},
        {"queries": good * np.float32(np.nan), "query_positions": QUERIED},
    ]
    for given in bad:
        with pytest.raises(InvalidRequestError, match="queries are"):
            calibration.add(text(0), "fit", **given)
    with pytest.raises(InvalidRequestError, match="output metric"):
        calibrated().add(text(0), "fit", good, QUERIED)


def test_queries_that_only_see_what_is_computed_anew_are_refused() -> None:
    calibration = calibrated()
    calibration.set_output_metric(np.ones((N_LAYERS, N_KV_HEADS, DIM, DIM), np.float32))
    calibration.add(text(0), "fit", queries(0)[:, :, :1], np.array([131], np.int32))
    with pytest.raises(InvalidRequestError, match="no query read a token at least 128 before it"):
        calibration.fit({"x8": 8})
    calibration.add(text(0), "fit", queries(0)[:, :, :1], np.array([132], np.int32))
    calibration.fit({"x8": 8})


def test_an_output_metric_of_another_shape_or_without_numbers_is_refused() -> None:
    good = np.ones((N_LAYERS, N_KV_HEADS, DIM, DIM), np.float32)
    for bad in (good[1:], good * np.float32(np.inf), good * 0):
        with pytest.raises(InvalidRequestError, match="output metric"):
            Calibration(model()).set_output_metric(bad)


def test_a_compression_that_cannot_be_reached_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="x32 cannot reach a compression of 1000"):
        calibrated().fit({"x32": 1000})


def test_a_model_that_cannot_be_coded_is_refused_before_any_text() -> None:
    with pytest.raises(InvalidRequestError, match="dense layers"):
        Calibration(model(opaque=True))
    with pytest.raises(UnsupportedRopeError):
        Calibration(model(rope=RopeSpec(DIM, 1e4, scaling_json='{"type":"dynamic"}')))


@pytest.mark.parametrize(("n_layers", "expected"), [(6, 6), (28, 7), (32, 8), (36, 8), (1, 1), (31, 8)])
def test_layers_are_grouped_evenly(n_layers: int, expected: int) -> None:
    layer = LayerSpec(n_query_heads=2, n_kv_heads=1, key_dim=4, value_dim=4, rope=RopeSpec(4, 1e4))
    assert (
        Calibration(ModelSpec(Fingerprint(weights="w"), "float16", 256, (layer,) * n_layers)).layers_per_group
        == expected
    )


def test_the_sample_of_rows_is_bounded_and_drawn_from_all_blocks() -> None:
    calibration = calibrated()
    for index in range(10):
        calibration.add(text(400 + index), "tune")
    assert calibration.n_rows["tune"] == 12 * (N_TOKENS - 4)
    rows = calibration._sample.rows["keys"]
    assert MIN_TUNE_ROWS <= len(rows) <= 4096
