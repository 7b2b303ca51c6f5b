"""Which models can go on from compacted blocks: found out by two forward passes, and said."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models import base, llama
from mlx_models import build, prefill, save

from kvcached_mlx import attention, fresh_cache, model_spec
from kvcached_mlx.compacted import CompactedKVCache

GEMMA2 = {"attn_logit_softcapping": 50.0}
PLAMO2 = {"mamba_num_heads": 4, "mamba_d_state": 8, "hidden_size_per_head": 16, "num_hidden_layers": 2}


def reason(architecture: str, directory: Path, dtype: Any = mx.float32, overrides: dict[str, Any] | None = None) -> str:
    model, config = build(architecture, dtype, overrides)
    spec = model_spec(model, save(model, config, directory), block_size=16)
    return attention.supports(model, spec, lambda: fresh_cache(model))


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3_text"])
def test_plain_attention_is_supported_beside_windows_too(architecture: str, dtype: Any, tmp_path: Path) -> None:
    overrides = {"max_position_embeddings": 4096, "rope_theta": 10000.0, "tie_word_embeddings": True}
    assert reason(architecture, tmp_path, dtype, overrides) == ""


def test_llama4_is_supported_with_its_chunked_layers_left_alone(tmp_path: Path) -> None:
    assert reason("llama4", tmp_path) == ""


REFUSED = [
    ("deepseek_v3", {}, "no layer keeps plain keys and values"),  # latent attention
    ("mamba2", {}, "no layer keeps plain keys and values"),
    ("falcon_h1", {}, "no layer keeps plain keys and values"),  # state and attention in each of its layers
    ("gpt_oss", {}, "learned sinks"),
    ("gemma2", GEMMA2, "caps logits"),
    ("gemma2", {}, "does not go through mlx-lm's function alone: ValueError"),  # a cap that only its code tells of
    ("plamo2", PLAMO2, "does not go through mlx-lm's function alone: TypeError"),  # calls mlx's own
]


@pytest.mark.parametrize(("architecture", "overrides", "expected"), REFUSED, ids=str)
def test_what_is_not_plain_attention_is_refused(
    architecture: str, overrides: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    assert expected in reason(architecture, tmp_path, overrides=overrides)


def by_another_name(*args: Any, **kwargs: Any) -> Any:
    return base.scaled_dot_product_attention(*args, **kwargs)


def at_once(queries: Any, _keys: Any, _values: Any, **_: Any) -> Any:
    return queries


@pytest.mark.parametrize("other", [by_another_name, at_once])
def test_a_model_whose_attention_bypasses_ours_is_refused(
    other: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama, attention.NAME, other)
    # As if the model had bound it elsewhere: our name in its module is another function than the one it calls.
    monkeypatch.setattr(attention, "modules_of", lambda _model: [])
    assert "does not go through mlx-lm's function" in reason("llama", tmp_path)


def test_a_model_that_touches_keys_after_the_cache_took_them_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def repeating(queries: Any, keys: Any, values: Any, **kwargs: Any) -> Any:
        return base.scaled_dot_product_attention(queries, mx.repeat(keys, 2, axis=1), mx.repeat(values, 2, 1), **kwargs)

    monkeypatch.setattr(llama, attention.NAME, repeating)
    monkeypatch.setattr(attention, "install", lambda _model: None)
    assert "does not go through mlx-lm's function alone: TypeError" in reason("llama", tmp_path)


def test_the_probe_leaves_a_model_as_it_was(tmp_path: Path) -> None:
    model, config = build("gemma3_text")
    spec = model_spec(model, save(model, config, tmp_path), block_size=16)
    tokens = list(range(40))
    before = prefill(model, fresh_cache(model), tokens)
    assert attention.supports(model, spec, lambda: fresh_cache(model)) == ""
    assert mx.array_equal(before, prefill(model, fresh_cache(model), tokens))
    assert not any(isinstance(entry, CompactedKVCache) for entry in fresh_cache(model))
