"""Reference queries: those that the model asked, few, of later tokens, and gone with the cache."""

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from compacted_blocks import compacted
from mlx_models import build, prefill, save

from kvcached_client import Block, ModelSpec, chain_hashes
from kvcached_mlx import attention, capture, fresh_cache, model_spec, queries
from kvcached_mlx.blocks import from_blocks, to_blocks
from kvcached_mlx.queries import with_queries

BLOCK, CHUNK = 64, 96
TOKENS = [int(t) for t in np.random.default_rng(3).integers(0, 64, 6 * BLOCK + 20)]
STRIDE = 8


@pytest.fixture
def llama(tmp_path: Path) -> tuple[Any, ModelSpec]:
    model, config = build("llama")
    attention.install(model, sampling=True)
    return model, model_spec(model, save(model, config, tmp_path), block_size=BLOCK)


def computed(model: Any, tokens: list[int] = TOKENS) -> list[Any]:
    cache = fresh_cache(model)
    prefill(model, cache, tokens, CHUNK)
    return cache


def blocks_of(spec: ModelSpec, cache: list[Any], tokens: list[int] = TOKENS) -> list[Block]:
    return with_queries(spec, cache, to_blocks(spec, tokens, chain_hashes(tokens, BLOCK), cache))


def asked(model: Any, spec: ModelSpec, positions: list[int], tokens: list[int] = TOKENS) -> np.ndarray:
    """All queries of some tokens, as calibration takes them."""
    cache, found = fresh_cache(model), []
    for start in range(0, len(tokens), CHUNK):
        chunk = tokens[start : start + CHUNK]
        here = [p - start for p in positions if start <= p < start + len(chunk)]
        rows = capture.run(model, spec, cache, chunk, here or [0])
        assert rows is not None
        found.append(rows[:, :, : len(here)])
    return np.concatenate(found, axis=2)


def test_blocks_come_with_queries_that_were_asked_after_them(llama: tuple[Any, ModelSpec]) -> None:
    model, spec = llama
    blocks = blocks_of(spec, computed(model))
    for block in blocks[:5]:
        later = [p for p in range(0, len(TOKENS), STRIDE) if p >= block.first_position + BLOCK]
        found = block.tensors["queries"]
        assert found.shape == (4, 4, len(later), 16)
        assert found.dtype == np.float16
        assert np.array_equal(found.astype(np.float32), asked(model, spec, later))
    assert "queries" not in blocks[5].tensors  # two or three came after it


def test_of_many_queries_those_of_a_block_are_spread_evenly(
    llama: tuple[Any, ModelSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, spec = llama
    monkeypatch.setattr(queries, "_MOST", 10)
    first = blocks_of(spec, computed(model))[0].tensors["queries"]
    all_later = list(range(BLOCK, len(TOKENS), STRIDE))
    evenly = [all_later[i] for i in np.linspace(0, len(all_later) - 1, 10).astype(int)]
    assert np.array_equal(first.astype(np.float32), asked(model, spec, evenly))


def test_a_sample_is_bounded_and_all_layers_have_the_same(
    llama: tuple[Any, ModelSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, spec = llama
    monkeypatch.setattr(queries, "_MAX_BYTES", 20 * 4 * 16 * 2)  # twenty queries
    cache = computed(model)
    samples = [entry.kvcached_queries for entry in cache]
    assert samples[0].positions == list(range(0, len(TOKENS), 4 * STRIDE))
    assert all(sample.positions == samples[0].positions for sample in samples)
    assert all(sample.rows.nbytes <= 20 * 4 * 16 * 2 for sample in samples)
    found = blocks_of(spec, cache)[0].tensors["queries"]
    assert np.array_equal(found.astype(np.float32), asked(model, spec, samples[0].positions[2:]))


def test_a_copy_has_them_and_a_cache_that_is_gone_has_not(llama: tuple[Any, ModelSpec]) -> None:
    model, spec = llama
    cache = computed(model)
    again = copy.deepcopy(cache)
    sample = weakref.ref(cache[0].kvcached_queries)
    del cache
    gc.collect()
    assert sample() is None
    assert "queries" in blocks_of(spec, again)[0].tensors


def test_what_was_cut_off_was_not_asked(llama: tuple[Any, ModelSpec]) -> None:
    model, spec = llama
    cache = computed(model)
    n_left = 2 * BLOCK + 3
    for entry in cache:
        entry.trim(len(TOKENS) - n_left)
    assert "queries" not in blocks_of(spec, cache, TOKENS[:n_left])[1].tensors
    other = TOKENS[:n_left] + [t ^ 1 for t in TOKENS[n_left : 4 * BLOCK]]
    prefill(model, cache, other[n_left:], CHUNK)
    assert cache[0].kvcached_queries.positions == list(range(0, len(other), STRIDE))
    found = blocks_of(spec, cache, other)[1].tensors["queries"]
    later = list(range(2 * BLOCK, len(other), STRIDE))
    assert np.allclose(found.astype(np.float32), asked(model, spec, later, other), atol=0.02)  # in other chunks


def test_decoding_is_not_sampled(llama: tuple[Any, ModelSpec]) -> None:
    model, _ = llama
    cache = computed(model, TOKENS[:9])
    prefill(model, cache, TOKENS[9:40], chunk=1)
    assert cache[0].kvcached_queries.positions == [0, 8]


def test_behind_a_compacted_prefix_they_are_sampled_too(llama: tuple[Any, ModelSpec]) -> None:
    model, spec = llama
    blocks = [
        compacted(spec, block) for block in blocks_of(spec, computed(model, TOKENS[: 2 * BLOCK]), TOKENS[: 2 * BLOCK])
    ]
    cache = fresh_cache(model)
    from_blocks(spec, blocks, cache)
    prefill(model, cache, TOKENS[2 * BLOCK :], CHUNK)
    assert cache[0].kvcached_queries.positions == list(range(2 * BLOCK, len(TOKENS), STRIDE))
    assert [("queries" in block.tensors) for block in blocks_of(spec, cache)] == [True, True, True, False]


def test_unless_asked_for_nothing_is_sampled_and_windows_and_batches_never(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gemma, config = build("gemma3_text", mx.float32)
    attention.install(gemma)
    for module in attention.modules_of(gemma):  # another test may have asked, and that is for good
        monkeypatch.setattr(getattr(module, attention.NAME), "samples", False)
    spec = model_spec(gemma, save(gemma, config, tmp_path), block_size=BLOCK)
    attention.install(gemma)
    cache = fresh_cache(gemma)
    prefill(gemma, cache, TOKENS[: 2 * BLOCK], CHUNK)
    assert not any(hasattr(entry, "kvcached_queries") for entry in cache)
    assert blocks_of(spec, cache, TOKENS[: 2 * BLOCK])
    attention.install(gemma, sampling=True)
    cache = fresh_cache(gemma)
    prefill(gemma, cache, TOKENS[: 2 * BLOCK], CHUNK)
    assert [hasattr(entry, "kvcached_queries") for entry in cache] == [not layer.opaque for layer in spec.layers]
    cache = fresh_cache(gemma)
    gemma(mx.array([TOKENS[:CHUNK]] * 2), cache=cache)
    assert not any(hasattr(entry, "kvcached_queries") for entry in cache)
