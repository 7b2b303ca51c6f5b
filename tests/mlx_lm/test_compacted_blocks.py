"""Compacted blocks to caches, and what is read of such caches again."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from compacted_blocks import compacted, n_rows
from mlx_lm.models.cache import KVCache, RotatingKVCache
from mlx_models import build, prefill, save

from kvcached_client import Block, FidelityKind, ModelSpec, chain_hashes
from kvcached_mlx import UnsupportedCacheError, attention, fresh_cache, model_spec
from kvcached_mlx.blocks import dense_rows, from_blocks, to_blocks
from kvcached_mlx.compacted import CompactedKVCache, Head
from kvcached_mlx.tree import to_mlx

BLOCK = 16
TOKENS = [int(t) for t in np.random.default_rng(3).integers(0, 64, 5 * BLOCK)]
NEXT = [5, 6, 7]
CASES = [("llama", mx.float16), ("llama", mx.bfloat16), ("gemma3_text", mx.float32)]


def ready(architecture: str, dtype: Any, directory: Path) -> tuple[Any, ModelSpec, list[Block]]:
    """A model that takes compacted caches, and the blocks of its cache after TOKENS."""
    model, config = build(architecture, dtype)
    spec = model_spec(model, save(model, config, directory), block_size=BLOCK)
    attention.install(model)
    cache = fresh_cache(model)
    prefill(model, cache, TOKENS)
    return model, spec, to_blocks(spec, TOKENS, chain_hashes(TOKENS, BLOCK), cache)


def mixed(spec: ModelSpec, blocks: list[Block]) -> list[Block]:
    """The second and the fourth of five compacted."""
    return [compacted(spec, block) if block.index in (1, 3) else block for block in blocks]


def dense(spec: ModelSpec) -> list[int]:
    return [i for i, layer in enumerate(spec.layers) if not layer.opaque]


def made_by_hand(spec: ModelSpec, blocks: list[Block]) -> list[CompactedKVCache]:
    """Caches of the dense layers, put together row by row."""
    layers, n_heads = len(spec.dense_layers), spec.dense_layers[0].n_kv_heads
    caches = []
    for layer in range(layers):
        heads = []
        for head in range(n_heads):
            keys, values, bias = [], [], []
            for block in blocks:
                tensors = block.tensors
                if "lengths" in tensors:
                    start = int(tensors["lengths"].ravel()[: layer * n_heads + head].sum())
                    rows = slice(start, start + int(tensors["lengths"][layer, head]))
                    keys += list(tensors["keys"][rows])
                    values += list(tensors["values"][rows])
                    bias += list(tensors["bias"][rows])
                else:
                    keys += list(tensors["keys"][layer, head])
                    values += list(tensors["values"][layer, head])
                    bias += [np.float32(0)] * BLOCK
            heads.append(Head(to_mlx(np.stack(keys)), to_mlx(np.stack(values)), to_mlx(np.stack(bias))))
        caches.append(CompactedKVCache(heads, len(blocks) * BLOCK))
    return caches


@pytest.mark.parametrize(("architecture", "dtype"), CASES, ids=str)
def test_a_prefix_may_mix_compacted_and_dense_blocks(architecture: str, dtype: Any, tmp_path: Path) -> None:
    model, spec, blocks = ready(architecture, dtype, tmp_path)
    prefix = mixed(spec, blocks)
    assert n_rows(prefix) < 0.8 * n_rows(blocks)
    restored, by_hand = fresh_cache(model), fresh_cache(model)
    from_blocks(spec, prefix, restored)
    from_blocks(spec, blocks, by_hand)
    for i, entry in zip(dense(spec), made_by_hand(spec, prefix), strict=True):
        by_hand[i] = entry
    assert [type(entry) for entry in restored] == [type(entry) for entry in by_hand]
    assert restored[-1].offset == len(TOKENS)
    whole = fresh_cache(model)
    from_blocks(spec, blocks, whole)
    logits = [prefill(model, cache, NEXT) for cache in (restored, by_hand, whole)]
    assert mx.array_equal(logits[0], logits[1])
    assert float(mx.abs(logits[0] - logits[2]).max()) > 0  # of random keys, with random queries


def test_windows_stay_what_they_are(tmp_path: Path) -> None:
    model, spec, blocks = ready("gemma3_text", mx.float32, tmp_path)
    restored, exact = fresh_cache(model), fresh_cache(model)
    from_blocks(spec, mixed(spec, blocks), restored)
    from_blocks(spec, blocks, exact)
    windows = [i for i, layer in enumerate(spec.layers) if layer.opaque]
    assert 0 < len(windows) < len(spec.layers)
    for i in windows:
        assert type(restored[i]) is RotatingKVCache
        assert mx.array_equal(restored[i].keys, exact[i].keys)


def test_without_compacted_blocks_caches_are_plain(tmp_path: Path) -> None:
    model, spec, blocks = ready("llama", mx.float16, tmp_path)
    cache = fresh_cache(model)
    from_blocks(spec, blocks, cache)
    assert {type(entry) for entry in cache} == {KVCache}


def changed(block: Block, **tensors: np.ndarray) -> Block:
    return replace(block, tensors={**block.tensors, **tensors})


def test_rows_that_do_not_fit_the_model_are_refused(tmp_path: Path) -> None:
    model, spec, blocks = ready("llama", mx.float16, tmp_path)
    good = compacted(spec, blocks[0])
    lengths, bias = good.tensors["lengths"], good.tensors["bias"]
    infinite = bias.copy()
    infinite[3] = np.inf
    more = lengths.copy()
    more[0, 0] += 1
    swapped = lengths.copy()
    swapped[0, 0] -= 100
    swapped[0, 1] += 100
    cases = {
        "rows are expected": [changed(good, lengths=more), changed(good, bias=bias[1:])],
        "lengths are": [changed(good, lengths=lengths[1:]), changed(good, lengths=swapped)],
        "with a finite bias": [
            changed(good, bias=infinite),
            changed(good, keys=good.tensors["keys"].astype(np.float32)),
        ],
        "cannot reshape": [changed(good, values=good.tensors["values"][:, :-1])],
    }
    for message, bad in cases.items():
        for block in bad:
            cache = fresh_cache(model)
            with pytest.raises(UnsupportedCacheError, match=message):
                from_blocks(spec, [block], cache)
            assert {type(entry) for entry in cache} == {KVCache}


@pytest.mark.parametrize(("architecture", "dtype"), CASES, ids=str)
def test_only_what_was_computed_behind_the_prefix_is_read_again(architecture: str, dtype: Any, tmp_path: Path) -> None:
    model, spec, blocks = ready(architecture, dtype, tmp_path)
    cache = fresh_cache(model)
    from_blocks(spec, mixed(spec, blocks)[:4] if architecture == "llama" else mixed(spec, blocks), cache)
    n_restored = cache[-1].offset
    tokens = TOKENS[:n_restored] + [t ^ 1 for t in TOKENS[: 2 * BLOCK]]
    prefill(model, cache, tokens[n_restored:])
    hashes = chain_hashes(tokens, BLOCK)
    lineages = [FidelityKind.COMPACTED] * len(hashes)
    taken = to_blocks(spec, tokens, hashes, cache, lineages=lineages)
    assert [block.index for block in taken] == [n_restored // BLOCK, n_restored // BLOCK + 1]
    assert {block.lineage for block in taken} == {FidelityKind.COMPACTED}
    assert taken[0].parent_hash == hashes[n_restored // BLOCK - 1]
    assert taken[0].tensors["keys"].shape == spec.dense_shapes()["keys"]
    rows = dense_rows(spec, cache, n_restored, n_restored + BLOCK)
    assert all(np.array_equal(taken[0].tensors[name], rows[name]) for name in ("keys", "values"))
    with pytest.raises(UnsupportedCacheError, match=f"those before {n_restored} are compacted"):
        dense_rows(spec, cache, n_restored - 1, n_restored + BLOCK)
    with pytest.raises(UnsupportedCacheError, match="tokens, 3 were named"):
        to_blocks(spec, tokens[:3], [], cache)


def test_what_was_computed_behind_is_what_was_computed(tmp_path: Path) -> None:
    """A prefix of blocks with all their rows, packed: behind it the same rows are computed as behind the plain one."""
    model, spec, blocks = ready("llama", mx.float32, tmp_path)
    n = 3 * BLOCK
    cache = fresh_cache(model)
    cache[:] = made_by_hand(spec, blocks[:3])
    prefill(model, cache, TOKENS[n:])
    taken = to_blocks(spec, TOKENS, chain_hashes(TOKENS, BLOCK), cache)
    assert [block.index for block in taken] == [3, 4]
    for block in taken:
        for name, array in block.tensors.items():
            assert np.allclose(array, blocks[block.index].tensors[name], atol=1e-5)
