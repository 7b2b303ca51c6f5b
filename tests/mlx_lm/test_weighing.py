"""What errors of heads weigh, as a running model shows it."""

from pathlib import Path

import numpy as np
import pytest
from mlx_models import build, save

from kvcached_mlx import capture, fresh_cache, model_spec
from kvcached_mlx.loss import Engine
from kvcached_mlx.weighing import Weighing

BLOCK = 16


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    model, config = build("llama")
    spec = model_spec(model, save(model, config, tmp_path), block_size=BLOCK)
    return Engine(model, None, spec, lambda: fresh_cache(model))


def texts(n: int, length: int = 6 * BLOCK) -> list[list[int]]:
    return np.random.default_rng(3).integers(0, 64, (n, length)).tolist()


def weighed(engine: Engine, metric: np.ndarray | None = None, n: int = 1) -> Weighing:
    found = capture.output_metric(engine.model, engine.spec)
    weighing = Weighing(engine, texts(n), found if metric is None else metric)
    assert list(weighing.run()) == list(range(1, weighing.n_runs + 1))
    return weighing


def test_every_head_has_a_weight_and_their_mean_is_1(engine: Engine) -> None:
    weights = weighed(engine, n=2).weights()
    assert weights is not None
    n_layers, n_kv_heads, _, _ = engine.spec.dense_shapes()["keys"]
    assert (weights.shape, weights.dtype) == ((n_layers, n_kv_heads), np.float32)
    assert (weights > 0).all()
    assert weights.mean() == pytest.approx(1)
    assert weights.max() > 1.2 * weights.min()


def test_a_weight_is_kl_over_error_so_that_a_larger_metric_makes_it_smaller(engine: Engine) -> None:
    metric = capture.output_metric(engine.model, engine.spec)
    assert metric is not None
    plain = weighed(engine, metric).weights()
    larger = metric.copy()
    larger[0, 0] *= 10
    changed = weighed(engine, larger).weights()
    assert plain is not None
    assert changed is not None
    np.testing.assert_allclose(changed[0, 0] / changed[1, 0], plain[0, 0] / plain[1, 0] / 10, rtol=1e-4)


def test_the_model_is_as_before(engine: Engine) -> None:
    cache = engine.make_cache()
    before = [np.array(chunk) for chunk in engine.prefill(texts(1)[0], cache)]
    weighed(engine)
    after = [np.array(chunk) for chunk in engine.prefill(texts(1)[0], engine.make_cache())]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_texts_too_short_for_a_block_weigh_nothing(engine: Engine) -> None:
    metric = capture.output_metric(engine.model, engine.spec)
    weighing = Weighing(engine, texts(2, length=12), metric)
    assert list(weighing.run()) == []
    assert weighing.weights() is None
