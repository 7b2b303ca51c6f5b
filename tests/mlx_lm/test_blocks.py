"""Every class of mlx-lm's caches through blocks and back, on the mlx-lm that is installed: exact or refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache
from mlx_models import CONFIGS, build, prefill, save
from support import same_tensors

from kvcached.codec import rope
from kvcached_client import ROOT, Block, LayerKind, ModelSpec, chain_hashes
from kvcached_mlx import UnsupportedCacheError, fresh_cache, model_spec
from kvcached_mlx.blocks import from_blocks, own, take, to_blocks
from kvcached_mlx.tree import to_mlx, to_numpy

BLOCK = 16
MANY_TOKENS = [int(t) for t in np.random.default_rng(3).integers(0, 64, 20 * BLOCK)]
TOKENS = MANY_TOKENS[: 5 * BLOCK]
NEXT = [5, 6, 7]


def spec_of(model: Any, config: dict[str, Any], directory: Path, **options: Any) -> ModelSpec:
    return model_spec(model, save(model, config, directory), block_size=BLOCK, **options)


def round_trip(
    model: Any, spec: ModelSpec, make_cache: Any, tokens: list[int] = TOKENS
) -> tuple[mx.array, mx.array, list[Block]]:
    """Logits of a continuation on the original cache and on the restored one, and the blocks between.

    It is restored twice: from blocks as they came, and from blocks whose memory went back.
    """
    cache = make_cache()
    prefill(model, cache, tokens)
    blocks = to_blocks(spec, tokens, chain_hashes(tokens, BLOCK), cache)
    restored, from_own = make_cache(), make_cache()
    from_blocks(spec, blocks, restored)
    lent = [{name: array.copy() for name, array in block.tensors.items()} for block in blocks]
    owned = [own(replace(b, tensors=tensors), for_mlx=True) for b, tensors in zip(blocks, lent, strict=True)]
    for tensors in lent:
        for array in tensors.values():
            array.reshape(-1).view(np.uint8)[...] = 0xA5
    from_blocks(spec, owned, from_own)
    logits = prefill(model, restored, NEXT)
    assert mx.array_equal(logits, prefill(model, from_own, NEXT))
    return prefill(model, cache, NEXT), logits, blocks


ONLY_FLOAT32 = ("gpt_oss", "llama4")  # mixtures of experts: mlx's CPU backend gathers in float32 alone
CASES = [
    (name, dtype)
    for name in CONFIGS
    for dtype in (mx.float16, mx.bfloat16, mx.float32)
    if dtype == mx.float32 or name not in ONLY_FLOAT32
]


@pytest.mark.parametrize(("architecture", "dtype"), CASES, ids=str)
def test_a_restored_cache_continues_exactly_as_the_original(architecture: str, dtype: Any, tmp_path: Path) -> None:
    model, config = build(architecture, dtype)
    spec = spec_of(model, config, tmp_path)
    assert spec.problems() == []
    original, restored, blocks = round_trip(model, spec, lambda: fresh_cache(model))
    assert mx.array_equal(original, restored)
    assert len(blocks) == len(TOKENS) // BLOCK


def test_a_chunked_cache_that_has_dropped_its_front_continues_exactly(tmp_path: Path) -> None:
    model, config = build("llama4", mx.float32)
    spec = spec_of(model, config, tmp_path)
    original, restored, _ = round_trip(model, spec, lambda: fresh_cache(model), MANY_TOKENS)
    assert mx.array_equal(original, restored)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_cache_continues_exactly_as_the_original(bits: int, tmp_path: Path) -> None:
    model, config = build("llama", overrides={"head_dim": 64})  # groups must divide it
    spec = spec_of(model, config, tmp_path, kv_bits=bits, kv_group_size=32)
    assert spec.kv_dtype == f"mlx-q{bits}-g32"
    original, restored, blocks = round_trip(model, spec, lambda: fresh_cache(model, bits, 32))
    assert mx.array_equal(original, restored)
    assert {array.dtype.name for array in blocks[0].tensors.values()} == {"uint32", "float16"}


@pytest.mark.parametrize(
    ("architecture", "kinds", "needs_boundary", "n_dense"),
    [
        ("llama", {LayerKind.ATTENTION}, False, 4),
        ("gemma3_text", {LayerKind.ATTENTION, LayerKind.SLIDING_WINDOW}, True, 2),
        ("gpt_oss", {LayerKind.ATTENTION, LayerKind.SLIDING_WINDOW}, True, 2),
        ("llama4", {LayerKind.ATTENTION, LayerKind.SLIDING_WINDOW}, True, 1),
        ("mamba2", {LayerKind.STATE}, True, 0),
        ("falcon_h1", {LayerKind.STATE}, True, 0),
        ("deepseek_v3", {LayerKind.LATENT}, False, 0),
    ],
)
def test_the_spec_says_what_each_layer_keeps(
    architecture: str, kinds: set[LayerKind], needs_boundary: bool, n_dense: int, tmp_path: Path
) -> None:
    spec = spec_of(*build(architecture, mx.float32), tmp_path)
    assert {layer.kind for layer in spec.layers} == kinds
    assert spec.needs_boundary == needs_boundary
    assert len(spec.dense_layers) == n_dense


def test_the_spec_of_the_reference_model_is_its_configuration(reference: Any) -> None:
    model, path = reference
    spec = model_spec(model, path)
    layer = spec.layers[0]
    assert (len(spec.layers), spec.kv_dtype, spec.block_size, spec.name) == (6, "float16", 256, "qwen3-5m")
    assert (layer.n_query_heads, layer.n_kv_heads, layer.key_dim, layer.value_dim) == (4, 2, 64, 64)
    assert (layer.rope.dims, layer.rope.theta, layer.rope.interleaved, layer.rope.scaling_json) == (64, 1e4, False, "")
    assert layer.softmax_scale == 64**-0.5
    assert not layer.opaque


def test_another_file_is_another_model(tmp_path: Path) -> None:
    model, config = build("llama")
    before = spec_of(model, config, tmp_path)
    for name, part in [("model.safetensors", "weights"), ("config.json", "config"), ("tokenizer.json", "tokenizer")]:
        path = tmp_path / name
        path.write_bytes(path.read_bytes() + b" ")  # in place, as a download over an old model does
        after = model_spec(model, tmp_path, block_size=BLOCK)
        assert getattr(after.fingerprint, part) != getattr(before.fingerprint, part)
        assert after.model_id != before.model_id
        before = after
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapters.safetensors").write_bytes(b"lora")
    assert model_spec(model, tmp_path, block_size=BLOCK, adapter_path=adapter).model_id != before.model_id


def test_a_theta_that_the_configuration_leaves_out_is_the_models_own(tmp_path: Path) -> None:
    model, config = build("llama")
    assert "rope_theta" not in config
    assert spec_of(model, config, tmp_path).layers[0].rope.theta == 1e4


def test_longrope_comes_with_the_lengths_that_it_depends_on(tmp_path: Path) -> None:
    factors = [1.0, 2.0, 3.0, 4.0]
    scaling = {"type": "longrope", "short_factor": factors, "long_factor": factors}
    lengths = {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096}
    spec = spec_of(*build("phi3", overrides={"rope_scaling": scaling, "rope_theta": 1e4, **lengths}), tmp_path)
    assert json.loads(spec.layers[0].rope.scaling_json) == scaling | lengths
    rows = np.ones((3, 8), np.float32)
    assert not np.array_equal(rope.apply(rows, np.arange(3, dtype=np.int32), spec.layers[0].rope), rows)


def test_a_model_without_weights_has_no_fingerprint(tmp_path: Path) -> None:
    model, config = build("llama")
    save(model, config, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no \*.safetensors"):
        model_spec(model, tmp_path)


def test_a_cache_that_is_longer_than_its_tokens_is_cut_into_full_blocks_only(tmp_path: Path) -> None:
    model, config = build("llama")
    spec = spec_of(model, config, tmp_path)
    cache = fresh_cache(model)
    tokens = TOKENS[: 2 * BLOCK + 5]
    prefill(model, cache, tokens)
    blocks = to_blocks(spec, tokens, chain_hashes(tokens, BLOCK), cache)
    assert [block.index for block in blocks] == [0, 1]
    assert blocks[0].parent_hash == ROOT
    assert blocks[1].parent_hash == blocks[0].block_hash
    assert blocks[1].tensors["keys"].shape == (4, 2, BLOCK, 16)
    expected = to_numpy(cache[3].keys[0, :, BLOCK : 2 * BLOCK])
    assert np.array_equal(blocks[1].tensors["keys"][3], expected)


def test_blocks_are_copied_one_by_one_from_a_cache_as_it_was(tmp_path: Path) -> None:
    model, config = build("llama")
    spec = spec_of(model, config, tmp_path)
    cache = fresh_cache(model)
    prefill(model, cache, TOKENS)
    hashes = chain_hashes(TOKENS, BLOCK)
    before = to_blocks(spec, TOKENS, hashes, cache)
    taken = take(spec, TOKENS, hashes, cache)
    assert not any(array.flags.owndata or array.flags.writeable for array in taken.rows.values())
    for entry in cache:
        entry.keys[...] = 0
        entry.values = mx.zeros_like(entry.values)
    prefill(model, cache, TOKENS)
    for index in (3, 4):
        block = taken.block(index)
        assert block.index == index
        assert same_tensors(block.tensors, before[index].tensors)
        assert all(array.flags.owndata for array in block.tensors.values())


class HomeMadeCache(KVCache):
    """A subclass may keep more than its parent: it is not taken for one."""


def refused(spec: ModelSpec, cache: list[Any], tokens: list[int]) -> str:
    with pytest.raises(UnsupportedCacheError) as caught:
        to_blocks(spec, tokens, chain_hashes(tokens, BLOCK), cache)
    return str(caught.value)


def test_caches_that_do_not_fit_are_refused_with_the_reason(tmp_path: Path) -> None:
    model, config = build("llama")
    spec = spec_of(model, config, tmp_path)
    cache = fresh_cache(model)
    assert "an empty KVCache" in refused(spec, cache, TOKENS)
    prefill(model, cache, TOKENS)
    assert "holds 80 tokens, 64 were named" in refused(spec, cache, TOKENS[: 4 * BLOCK])
    assert "a cache of 3 layers, the model has 4" in refused(spec, cache[:3], TOKENS)
    assert "holds 81 tokens" in refused(spec, [*cache[:3], longer(model)], TOKENS)
    home_made = HomeMadeCache()
    home_made.keys, home_made.values, home_made.offset = cache[0].keys, cache[0].values, cache[0].offset
    assert "HomeMadeCache; known are those of mlx-lm" in refused(spec, [home_made, *cache[1:]], TOKENS)
    assert "in mlx-q8-g32, the cache of the model in full precision" in refused(spec, quantised(8, 32), TOKENS)


def longer(model: Any) -> Any:
    cache = fresh_cache(model)
    prefill(model, cache, [*TOKENS, 1])
    return cache[3]


def quantised(bits: int | None, group_size: int = 64) -> list[Any]:
    model, _ = build("llama", overrides={"head_dim": 64})  # groups must divide it
    cache = fresh_cache(model, bits, group_size)
    prefill(model, cache, TOKENS)
    return cache


@pytest.mark.parametrize(
    ("bits", "group_size", "got"),
    [(8, 32, "mlx-q8-g32"), (4, 64, "mlx-q4-g64"), (None, 64, "full precision")],
    ids=["other bits", "other groups", "not quantised"],
)
def test_a_cache_quantised_in_another_way_is_another_models(
    bits: int | None, group_size: int, got: str, tmp_path: Path
) -> None:
    model, config = build("llama", overrides={"head_dim": 64})
    spec = spec_of(model, config, tmp_path, kv_bits=4, kv_group_size=32)
    message = f"layer 0 is kept in {got}, the cache of the model in mlx-q4-g32"
    assert message in refused(spec, quantised(bits, group_size), TOKENS)
    blocks = to_blocks(spec, TOKENS, chain_hashes(TOKENS, BLOCK), quantised(4, 32))
    with pytest.raises(UnsupportedCacheError, match=message):
        from_blocks(spec, blocks, fresh_cache(model, bits, group_size))


class ForeignCache:
    """Of an engine that knows nothing of mlx-lm's interface."""


def test_a_cache_of_a_foreign_class_is_refused_by_its_name(tmp_path: Path) -> None:
    model, config = build("llama")
    spec = spec_of(model, config, tmp_path)
    cache = fresh_cache(model)
    prefill(model, cache, TOKENS)
    assert "ForeignCache; known are those of mlx-lm" in refused(spec, [ForeignCache(), *cache[1:]], TOKENS)
    with pytest.raises(UnsupportedCacheError, match="ForeignCache; known are those of mlx-lm"):
        from_blocks(spec, to_blocks(spec, TOKENS, chain_hashes(TOKENS, BLOCK), cache), [ForeignCache(), *cache[1:]])


def test_a_cache_of_another_dtype_is_refused(tmp_path: Path) -> None:
    spec = spec_of(*build("llama"), tmp_path)
    model, _ = build("llama", mx.bfloat16)
    cache = fresh_cache(model)
    prefill(model, cache, TOKENS)
    assert "bfloat16" in refused(spec, cache, TOKENS)


@pytest.mark.parametrize("architecture", ["gemma3_text", "mamba2", "falcon_h1"])
def test_state_that_is_not_at_the_end_of_a_block_is_refused(architecture: str, tmp_path: Path) -> None:
    model, config = build(architecture)
    spec = spec_of(model, config, tmp_path)
    cache = fresh_cache(model)
    tokens = TOKENS[:-3]
    prefill(model, cache, tokens)
    assert f"state after {len(tokens)} tokens is not at the end of a block of {BLOCK}" in refused(spec, cache, tokens)


def test_only_the_last_block_carries_state(tmp_path: Path) -> None:
    model, config = build("gemma3_text")
    spec = spec_of(model, config, tmp_path)
    _, _, blocks = round_trip(model, spec, lambda: fresh_cache(model))
    assert [block.boundary for block in blocks] == [False] * 4 + [True]
    assert not any(name.startswith("state.") for block in blocks[:-1] for name in block.tensors)


def test_blocks_that_miss_a_tensor_are_refused(tmp_path: Path) -> None:
    model, config = build("gemma3_text")
    spec = spec_of(model, config, tmp_path)
    _, _, blocks = round_trip(model, spec, lambda: fresh_cache(model))
    with pytest.raises(UnsupportedCacheError, match="do not make a cache of this model"):
        from_blocks(spec, blocks[:-1], fresh_cache(model))
    with pytest.raises(UnsupportedCacheError, match="a window after 80 tokens, expected 32"):
        from_blocks(spec, [blocks[0], blocks[-1]], fresh_cache(model))


def test_a_block_that_mlx_has_no_arrays_for_is_refused() -> None:
    block = Block(bytes(32), ROOT, 0, (), {"x": np.array([None])}, 0)
    with pytest.raises(UnsupportedCacheError, match="none of mlx's"):
        own(block, for_mlx=True)


@pytest.mark.parametrize("for_mlx", [False, True])
def test_a_compacted_block_stays_numpys_in_memory_of_its_own(for_mlx: bool) -> None:
    block = Block(bytes(32), ROOT, 0, (), {"keys": np.ones((3, 2)), "lengths": np.ones((1, 1), np.int32)}, 0)
    kept = own(block, for_mlx=for_mlx).tensors
    assert same_tensors(dict(kept), dict(block.tensors))
    assert not any(np.shares_memory(kept[name], array) for name, array in block.tensors.items())


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32, mx.uint32, mx.int64, mx.bool_], ids=str)
def test_arrays_of_every_dtype_keep_their_bits(dtype: Any) -> None:
    array = (mx.arange(32).reshape(1, 2, 16) % 3).astype(dtype)
    copy = to_numpy(array)
    again = to_mlx(copy)
    assert again.dtype == dtype
    assert mx.array_equal(again, array)


def test_nan_and_infinity_keep_their_bits() -> None:
    bits = np.array([0x7F80, 0xFF80, 0x7FC1, 0xFFFF, 0x8000], np.uint16)
    array = mx.array(bits).view(mx.bfloat16)
    assert np.array_equal(to_numpy(to_mlx(to_numpy(array))).view(np.uint16), bits)
