"""What calibration takes from a running model: queries as attention gets them, and how its output is read."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import llama, qwen3
from mlx_models import build, prefill, save

from kvcached_client import ModelSpec
from kvcached_mlx import capture, fresh_cache, model_spec

BLOCK = 16
TOKENS = [int(t) for t in np.random.default_rng(3).integers(0, 64, 2 * BLOCK + 5)]


@pytest.fixture
def spec_of(tmp_path: Path) -> Any:
    def spec_of(architecture: str, **overrides: Any) -> tuple[Any, ModelSpec]:
        model, config = build(architecture, overrides=overrides)
        return model, model_spec(model, save(model, config, tmp_path), block_size=BLOCK)

    return spec_of


def expected_queries(attention: Any, inputs: Any, offset: int) -> Any:
    """As llama's attention makes them."""
    queries = attention.q_proj(inputs).reshape(1, inputs.shape[1], attention.n_heads, -1).transpose(0, 2, 1, 3)
    return attention.rope(queries, offset=offset)


def test_queries_are_those_that_attention_is_given_rotated_and_in_the_order_of_layers(
    spec_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, spec = spec_of("llama")
    inputs: dict[int, list[Any]] = {}
    attend = llama.Attention.__call__

    def noting(self: Any, x: Any, mask: Any = None, cache: Any = None) -> Any:
        inputs.setdefault(id(self), []).append((x, cache.offset))
        return attend(self, x, mask, cache)

    monkeypatch.setattr(llama.Attention, "__call__", noting)
    cache = fresh_cache(model)
    sampled = [0, 3, 15]
    capture.run(model, spec, cache, TOKENS[:BLOCK], sampled)
    found = capture.run(model, spec, cache, TOKENS[BLOCK : 2 * BLOCK], sampled)
    assert found is not None
    assert (found.shape, found.dtype) == ((4, 4, 3, 16), np.float32)
    for layer, queries in zip(model.layers, found, strict=True):
        x, offset = inputs[id(layer.self_attn)][1]
        assert offset == BLOCK
        expected = np.array(expected_queries(layer.self_attn, x, offset).astype(mx.float32))[0]
        np.testing.assert_array_equal(queries, expected[:, sampled])


def test_a_model_that_is_watched_computes_what_it_always_does(spec_of: Any) -> None:
    model, spec = spec_of("llama")
    watched, plain = fresh_cache(model), fresh_cache(model)
    capture.run(model, spec, watched, TOKENS[:BLOCK], [1])
    prefill(model, plain, TOKENS[:BLOCK], chunk=BLOCK)
    rest = TOKENS[BLOCK:]
    assert mx.array_equal(prefill(model, watched, rest), prefill(model, plain, rest))


def test_attention_is_as_it_was_afterwards_whatever_happens(spec_of: Any) -> None:
    model, spec = spec_of("qwen3", rope_theta=1e4, max_position_embeddings=512, tie_word_embeddings=True)
    before = qwen3.scaled_dot_product_attention
    capture.run(model, spec, fresh_cache(model), TOKENS, [0])
    assert qwen3.scaled_dot_product_attention is before
    with capture.queries_seen(model, [], [0]):
        assert qwen3.scaled_dot_product_attention is not before
    with pytest.raises(AttributeError):
        capture.run(model, spec, [None] * 4, TOKENS, [0])  # no caches
    assert qwen3.scaled_dot_product_attention is before


def test_of_a_mixed_model_the_dense_layers_show_their_queries(spec_of: Any) -> None:
    model, spec = spec_of("gemma3_text")
    n_dense = len(spec.dense_layers)
    assert 0 < n_dense < len(spec.layers)
    found = capture.run(model, spec, fresh_cache(model), TOKENS[:BLOCK], [0, 1])
    assert found is not None
    assert found.shape == (n_dense, 4, 2, 16)


def test_a_model_that_attends_in_a_way_of_its_own_shows_no_queries(
    spec_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, spec = spec_of("llama")
    monkeypatch.delattr(llama, "scaled_dot_product_attention")

    def attend(self: Any, x: Any, _mask: Any = None, cache: Any = None) -> Any:
        heads = self.k_proj(x).reshape(1, x.shape[1], self.n_kv_heads, -1).transpose(0, 2, 1, 3)
        cache.update_and_fetch(heads, heads)
        return x

    monkeypatch.setattr(llama.Attention, "__call__", attend)
    cache = fresh_cache(model)
    assert capture.run(model, spec, cache, TOKENS[:BLOCK], [0]) is None
    assert cache[0].offset == BLOCK


def test_the_output_metric_is_how_far_an_error_of_a_value_gets(spec_of: Any) -> None:
    """An error e in the values of a KV head is added by each of its query heads through its part of the projection."""
    model, spec = spec_of("llama")
    metric = capture.output_metric(model, spec)
    assert metric is not None
    assert (metric.shape, metric.dtype) == ((4, 2, 16, 16), np.float32)
    rng = np.random.default_rng(0)
    for i, layer in enumerate(model.layers):
        for kv_head in range(2):
            error = rng.standard_normal(16).astype(np.float32)
            total = 0.0
            for head in (2 * kv_head, 2 * kv_head + 1):
                mixed = np.zeros((4, 16), np.float32)
                mixed[head] = error
                added = np.array(layer.self_attn.o_proj(mx.array(mixed.reshape(1, -1))).astype(mx.float32))
                total += float((added**2).sum())
            assert error @ metric[i, kv_head] @ error == pytest.approx(total, rel=1e-2)


def test_the_metric_of_a_quantised_projection_is_that_of_its_dequantised_weights(spec_of: Any) -> None:
    model, spec = spec_of("llama")
    nn.quantize(model, group_size=32, bits=8)
    metric = capture.output_metric(model, spec)
    assert metric is not None
    projection = model.layers[1].self_attn.o_proj
    assert isinstance(projection, nn.QuantizedLinear)
    columns = np.array(projection(mx.eye(64))).T.reshape(32, 4, 16)  # what each input does
    expected = sum(columns[:, head].T @ columns[:, head] for head in (0, 1))
    np.testing.assert_allclose(metric[1, 0], expected, rtol=1e-2, atol=1e-4)


def test_a_projection_that_is_not_plain_has_no_metric(spec_of: Any) -> None:
    model, spec = spec_of("llama")

    class Adapted(nn.Linear):
        pass

    model.layers[2].self_attn.o_proj = Adapted(64, 32)
    assert capture.output_metric(model, spec) is None
