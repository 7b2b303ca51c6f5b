"""Tiny random models of mlx-lm's architectures, one for each way of keeping the past."""

import importlib
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

_SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "vocab_size": 64,
}
_LLAMA4_TEXT = _SMALL | {
    "attention_bias": False,
    "attention_chunk_size": 256,  # mlx-lm 0.31 only gets multiples of its step right
    "interleave_moe_layer_step": 2,
    "intermediate_size_mlp": 64,
    "max_position_embeddings": 4096,
    "model_type": "llama4",
    "num_experts_per_tok": 1,
    "num_local_experts": 2,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "use_qk_norm": True,
}
_MAMBA2 = {
    "num_heads": 4,
    "head_dim": 16,
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "state_size": 8,
    "num_hidden_layers": 2,
    "layer_norm_epsilon": 1e-5,
    "conv_kernel": 4,
    "n_groups": 1,
    "use_bias": False,
    "use_conv_bias": True,
    "tie_word_embeddings": True,
    "time_step_limit": (0.0, 1e6),
    "time_step_rank": "auto",
}
_FALCON = _SMALL | {
    "num_hidden_layers": 2,
    "mamba_d_head": 16,
    "mamba_d_ssm": 64,
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_expand": 2,
}
_DEEPSEEK = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "qk_nope_head_dim": 16,
    "rope_scaling": None,
}
_GPT_OSS = _SMALL | {
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "sliding_window": 24,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _SMALL,
    "gemma3_text": _SMALL | {"sliding_window": 24, "sliding_window_pattern": 2},
    "gpt_oss": _GPT_OSS,
    "llama4": {"text_config": _LLAMA4_TEXT},
    "mamba2": _MAMBA2,
    "falcon_h1": _FALCON,
    "deepseek_v3": _DEEPSEEK,
}


def build(
    architecture: str, dtype: Any = mx.float16, overrides: dict[str, Any] | None = None
) -> tuple[Any, dict[str, Any]]:
    """A model with random weights, and its configuration."""
    mx.random.seed(7)
    module = importlib.import_module(f"mlx_lm.models.{architecture}")
    config = {"model_type": architecture, **CONFIGS.get(architecture, _SMALL), **(overrides or {})}
    model = module.Model(module.ModelArgs.from_dict(config))
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    return model, config


def save(model: Any, config: dict[str, Any], directory: Path) -> Path:
    """Writes what a fingerprint is made of."""
    mx.save_safetensors(str(directory / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text("{}")
    return directory


def prefill(model: Any, cache: list[Any], token_ids: list[int], chunk: int = 16) -> mx.array:
    """Feeds tokens in chunks; the logits of the last."""
    logits = None
    for start in range(0, len(token_ids), chunk):
        logits = model(mx.array([token_ids[start : start + chunk]]), cache=cache)
        mx.eval(logits)
    assert logits is not None
    return logits[:, -1]
