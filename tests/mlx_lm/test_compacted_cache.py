"""CompactedKVCache in the attention of real models: what its rows and biases mean, and that it cannot be misused."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import load
from mlx_lm.generate import BatchGenerator
from mlx_lm.models import qwen3
from mlx_lm.models.cache import (
    KVCache,
    LRUPromptCache,
    RotatingKVCache,
    can_trim_prompt_cache,
    trim_prompt_cache,
)
from mlx_models import build, prefill
from support import REFERENCE_MODEL

from kvcached_mlx import attention, compacted, fresh_cache
from kvcached_mlx.compacted import CompactedKVCache, Head, cut

N, AFTER = 192, 24  # tokens of the prefix, and behind it
TOKENS = [int(t) for t in np.random.default_rng(5).integers(2, 2048, N + AFTER)]
RNG = np.random.default_rng


@pytest.fixture(scope="module")
def model() -> Any:
    """The reference model in float32, so that differences are of what is computed and not of rounding."""
    model, _ = load(str(REFERENCE_MODEL))
    model.set_dtype(mx.float32)
    attention.install(model)
    return model


@pytest.fixture(scope="module")
def exact(model: Any) -> list[Any]:
    cache = fresh_cache(model)
    prefill(model, cache, TOKENS[:N], chunk=64)
    return cache


def rows(entry: Any) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values [n_heads, N, dim] of a plain cache."""
    keys, values = (np.array(array[0, :, :N]) for array in (entry.keys, entry.values))
    return keys, values


def compacted_like(exact: list[Any], keep: Callable[[int, int], tuple[np.ndarray, np.ndarray]]) -> list[Any]:
    """keep: for a layer and head the indices of the rows to keep, and their bias."""
    made = []
    for layer, entry in enumerate(exact):
        keys, values = rows(entry)
        heads = []
        for head in range(len(keys)):
            kept, bias = keep(layer, head)
            heads.append(Head(mx.array(keys[head][kept]), mx.array(values[head][kept]), mx.array(bias)))
        made.append(CompactedKVCache(heads, N))
    return made


def everything(_layer: int, _head: int) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(N), np.zeros(N, np.float32)


def ragged(layer: int, head: int) -> tuple[np.ndarray, np.ndarray]:
    """Very unequal heads, without bias; the first token is always kept."""
    n = [20, 150][(layer + head) % 2]
    kept = np.sort(RNG(layer * 10 + head).choice(np.arange(1, N), n, replace=False))
    return np.concatenate([[0], kept]), np.zeros(n + 1, np.float32)


def after(model: Any, cache: list[Any], chunk: int = AFTER) -> np.ndarray:
    """Logits of the tokens that follow."""
    logits = [model(mx.array([TOKENS[i : min(i + chunk, N + AFTER)]]), cache=cache) for i in range(N, N + AFTER, chunk)]
    return np.array(mx.concatenate(logits, axis=1)[0].astype(mx.float32))


def furthest(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max())


class Rows(KVCache):
    """Rows at will, in a plain cache with a logical offset, as an independent reference."""

    def __init__(self, keys: np.ndarray, values: np.ndarray, hidden: np.ndarray | None = None) -> None:
        """keys, values: [n_heads, n_rows, dim]; hidden: bool [n_heads, n_rows], rows that no query sees."""
        super().__init__()
        self.keys, self.values = mx.array(keys[None]), mx.array(values[None])
        self.offset, self._hidden = N, hidden

    def update_and_fetch(self, keys: Any, values: Any) -> tuple[Any, Any]:
        self.keys = mx.concatenate([self.keys, keys], axis=2)
        self.values = mx.concatenate([self.values, values], axis=2)
        self.offset += keys.shape[2]
        return self.keys, self.values

    def make_mask(self, n: int, **_: Any) -> Any:
        if self._hidden is None:
            return "causal" if n > 1 else None
        n_heads = len(self._hidden)
        n_new = self.offset - N + n
        later = np.arange(n_new) > np.arange(n_new - n, n_new)[:, None]
        hidden = [np.repeat(self._hidden[:, None], n, axis=1), np.repeat(later[None], n_heads, axis=0)]
        by_query_head = np.repeat(np.concatenate(hidden, axis=-1), 2, axis=0)
        return mx.array(np.where(by_query_head[None], -np.inf, 0).astype(np.float32))


# ---- what rows and biases mean


def test_a_prefix_that_lost_nothing_is_the_plain_cache(model: Any, exact: list[Any]) -> None:
    identity = compacted_like(exact, everything)
    assert furthest(after(model, identity), after(model, copy.deepcopy(exact))) < 1e-4
    assert identity[0].offset == N + AFTER


def test_a_bias_of_log_r_is_r_copies_of_a_key_through_the_whole_model(model: Any, exact: list[Any]) -> None:
    copies = RNG(1).integers(1, 5, N)

    def weighted(layer: int, head: int) -> tuple[np.ndarray, np.ndarray]:
        return np.arange(N), np.log(np.roll(copies, 7 * layer + 3 * head)).astype(np.float32)

    def repeated(layer: int, array: np.ndarray) -> np.ndarray:
        by_head = (np.repeat(a, np.roll(copies, 7 * layer + 3 * head), axis=0) for head, a in enumerate(array))
        return np.stack(list(by_head))

    duplicated: list[Any] = []
    for layer, entry in enumerate(exact):
        duplicated.append(Rows(*(repeated(layer, array) for array in rows(entry))))
    cache = compacted_like(exact, weighted)
    expected = after(model, duplicated)
    assert furthest(after(model, cache), expected) / np.abs(expected).max() < 1e-5
    unbiased = after(model, compacted_like(exact, everything))
    assert furthest(unbiased, expected) > 0.01


def test_heads_that_lost_rows_are_heads_that_do_not_see_them(model: Any, exact: list[Any]) -> None:
    def alike(_layer: int, head: int) -> tuple[np.ndarray, np.ndarray]:  # mlx-lm's masks are those of all layers
        return ragged(0, head)

    hidden = np.ones((2, N), bool)
    for head in range(2):
        hidden[head, alike(0, head)[0]] = False
    masked: list[Any] = [Rows(*rows(entry), hidden) for entry in exact]
    cache = compacted_like(exact, alike)
    assert [entry.n_groups for entry in cache] == [2] * 6
    expected = after(model, masked)
    assert furthest(after(model, cache), expected) / np.abs(expected).max() < 1e-5
    assert furthest(expected, after(model, copy.deepcopy(exact))) > 0.01


def test_token_by_token_is_as_in_one_chunk(model: Any, exact: list[Any]) -> None:
    one, many = (compacted_like(exact, ragged) for _ in range(2))
    assert furthest(after(model, one), after(model, many, chunk=1)) < 1e-4


def test_a_chunk_whose_mask_would_be_large_is_attended_in_parts(
    model: Any, exact: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = mx.array([TOKENS[:150]])
    whole, parts = (compacted_like(exact, ragged) for _ in range(2))
    expected = model(tokens, cache=whole)
    monkeypatch.setattr(compacted, "_MASK_VALUES", 1)
    assert furthest(np.array(model(tokens, cache=parts)), np.array(expected)) < 1e-4


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", [(7, 7, 7, 7), (3, 90, 30, 31), (0, 64, 64, 1)], ids=str)
def test_ragged_heads_are_as_in_numpy(lengths: tuple[int, ...], dtype: Any) -> None:
    rng, dim, n_new = RNG(3), 32, 5
    heads = [
        Head(*(rng.standard_normal((n, dim)) for _ in range(2)), bias=rng.uniform(-3, 3, n))  # type: ignore[misc]
        for n in lengths
    ]
    cache = CompactedKVCache(
        [Head(mx.array(h.keys).astype(dtype), mx.array(h.values).astype(dtype), mx.array(h.bias)) for h in heads], 100
    )
    keys, values, queries = (rng.standard_normal((1, n, n_new, dim)) for n in (4, 4, 8))
    cache.update_and_fetch(mx.array(keys).astype(dtype), mx.array(values).astype(dtype))
    found = np.array(cache.attend(mx.array(queries).astype(dtype), 0.25).astype(mx.float32))
    assert found.shape == (1, 8, n_new, dim)
    for query_head in range(8):
        head = query_head // 2
        all_keys = np.concatenate([heads[head].keys, keys[0, head]])
        all_values = np.concatenate([heads[head].values, values[0, head]])
        logits = queries[0, query_head] @ all_keys.T * 0.25
        logits[:, : lengths[head]] += heads[head].bias
        logits[:, lengths[head] :][np.triu_indices(n_new, 1)] = -np.inf
        weights = np.exp(logits - logits.max(1, keepdims=True))
        expected = weights / weights.sum(1, keepdims=True) @ all_values
        assert furthest(found[0, query_head], expected) < {mx.float32: 1e-5, mx.float16: 2e-2, mx.bfloat16: 1e-1}[dtype]


# ---- memory


def random_layer(lengths: Sequence[int], n_tokens: int, dim: int) -> CompactedKVCache:
    arrays = [[mx.zeros((n, dim), mx.float16) for _ in range(2)] for n in lengths]
    return CompactedKVCache([Head(*pair, mx.zeros(len(pair[0]))) for pair in arrays], n_tokens)


@pytest.mark.parametrize("n_heads", [2, 4, 8, 32])
@pytest.mark.parametrize("dim", [64, 128])
def test_a_prefix_of_a_quarter_of_the_rows_takes_little_more_than_a_quarter_of_the_memory(
    n_heads: int, dim: int
) -> None:
    n_tokens = 2048
    for seed in range(20):
        share = RNG(seed).lognormal(sigma=1, size=n_heads)
        lengths = np.clip(share / share.mean() * n_tokens / 4, 0.03 * n_tokens, n_tokens)
        lengths = np.floor(lengths * (n_tokens / 4 * n_heads) / lengths.sum()).astype(int)
        cache = random_layer([int(n) for n in lengths], n_tokens, dim)
        dense = n_heads * n_tokens * dim * 2 * 2
        assert lengths.sum() / n_tokens / n_heads > 0.249
        assert cache.nbytes <= dense / 3.5
        assert cache.n_groups <= n_heads


def test_heads_of_like_length_are_served_together() -> None:
    assert random_layer([100] * 8, 256, 64).n_groups == 1
    assert random_layer([100, 256, 101, 255, 102, 250, 99, 256], 256, 64).n_groups == 2
    assert random_layer([8, 256], 256, 64).n_groups == 2


def test_memory_is_counted_as_it_is_held(model: Any, exact: list[Any]) -> None:
    cache = compacted_like(exact, ragged)
    assert cache[0].nbytes == sum(array.nbytes for array in cache[0].state)
    before = cache[0].nbytes
    after(model, cache)
    room = 2 * 256 * (64 + 64 + 1) * 4  # two heads, a step of 256 tokens, float32
    assert cache[0].nbytes == before + room
    assert (cache[0].size(), cache[0].n_exact, cache[0].empty()) == (N + AFTER, AFTER, False)


# ---- what cannot be done with it


def test_the_compacted_part_cannot_be_cut_nor_can_a_little_of_it(model: Any, exact: list[Any]) -> None:
    cache = compacted_like(exact, ragged)
    expected = after(model, cache)
    assert not can_trim_prompt_cache(cache)
    assert trim_prompt_cache(cache, 1) == 0
    assert [entry.trim(AFTER + 1) for entry in cache] == [0] * 6
    assert not cut(cache, AFTER + 1)
    assert cache[0].offset == N + AFTER
    assert cut(cache, AFTER)
    assert cache[0].offset == N
    assert furthest(after(model, cache), expected) < 1e-4  # what was cut is written over


def test_a_cut_of_mixed_layers_is_a_cut_of_all_or_of_none() -> None:
    window, layer = RotatingKVCache(max_size=8), random_layer([4, 4], 16, 8)
    for _ in range(2):
        window.update_and_fetch(mx.zeros((1, 2, 8, 8)), mx.zeros((1, 2, 8, 8)))
    layer.update_and_fetch(mx.zeros((1, 2, 8, 8), mx.float16), mx.zeros((1, 2, 8, 8), mx.float16))
    assert cut([layer, window], 0)
    assert not cut([layer, window], 1)
    assert layer.offset == 24
    assert cut([layer], 1)
    assert layer.offset == 23


@pytest.mark.parametrize("which", ["CP", "PC", "CC", "C"])
def test_mlx_lm_makes_no_batch_with_a_compacted_prefix(model: Any, exact: list[Any], which: str) -> None:
    caches = [compacted_like(exact, ragged) if kind == "C" else copy.deepcopy(exact) for kind in which]
    generator = BatchGenerator(model, prefill_step_size=AFTER)
    generator.insert([TOKENS[N:]] * len(caches), [4] * len(caches), caches=caches)
    with pytest.raises((ValueError, AttributeError), match="got one with a compacted prefix"):
        generator.next()
    generator.close()


def test_no_compacted_prefix_joins_a_batch_that_goes_on(model: Any, exact: list[Any]) -> None:
    generator = BatchGenerator(model, prefill_step_size=AFTER)
    generator.insert([TOKENS[N:]], [4], caches=[copy.deepcopy(exact)])
    while not generator.next()[1]:  # until it generates
        pass
    generator.insert([TOKENS[N:]], [4], caches=[compacted_like(exact, ragged)])
    with pytest.raises(ValueError, match="got one with a compacted prefix"):
        generator.next()
    generator.close()


def test_tokens_of_several_sequences_at_once_are_refused(exact: list[Any]) -> None:
    (cache, *_) = compacted_like(exact, ragged)
    with pytest.raises(ValueError, match="one sequence of 2 heads is expected, got"):
        cache.update_and_fetch(mx.zeros((2, 2, 1, 64)), mx.zeros((2, 2, 1, 64)))


def test_a_copy_goes_its_own_way(model: Any, exact: list[Any]) -> None:
    held = LRUPromptCache()
    held.insert_cache("model", TOKENS[:N], compacted_like(exact, ragged))
    first, rest = held.fetch_nearest_cache("model", TOKENS)
    assert rest == TOKENS[N:]
    expected = after(model, first)
    assert first[0].n_exact == AFTER
    second, rest = held.fetch_nearest_cache("model", TOKENS)
    assert (second[0].n_exact, rest) == (0, TOKENS[N:])
    assert furthest(after(model, second), expected) == 0


def test_mlx_lm_never_takes_it_for_a_shorter_prompt(model: Any, exact: list[Any]) -> None:
    held = LRUPromptCache()
    cache = compacted_like(exact, ragged)
    after(model, cache)
    held.insert_cache("model", TOKENS, cache)
    assert held.fetch_nearest_cache("model", TOKENS[:100]) == (None, TOKENS[:100])


def test_keys_that_a_model_would_change_behind_our_back_are_an_error(exact: list[Any]) -> None:
    (cache, *_) = compacted_like(exact, ragged)
    new = mx.zeros((1, 2, 1, 64))
    keys, values = cache.update_and_fetch(new, new)
    with pytest.raises(TypeError):
        mx.repeat(keys, 2, axis=1)
    with pytest.raises(TypeError):
        mx.fast.scaled_dot_product_attention(new, keys, values, scale=1.0)
    with pytest.raises(ValueError, match="were changed"):
        qwen3.scaled_dot_product_attention(new, new, values, cache=cache, scale=1.0, mask=None)
    with pytest.raises(ValueError, match="neither sinks nor a mask"):
        qwen3.scaled_dot_product_attention(new, keys, values, cache=cache, scale=1.0, mask=mx.zeros((1, 1)))
    with pytest.raises(ValueError, match="made of blocks only"):
        cache.state = []


def test_attention_of_every_other_cache_is_what_it_was() -> None:
    model, _ = build("gemma3_text")
    tokens = TOKENS[:40]
    module, plain = attention.modules_of(model)[0], None
    results = []
    for installed in (False, True):
        if installed:
            attention.install(model)
            plain = getattr(module, attention.NAME)
            attention.install(model)
            assert getattr(module, attention.NAME) is plain
        cache = fresh_cache(model)
        results.append([prefill(model, cache, [t % 64 for t in tokens]), cache[0].keys, cache[1].keys])
    assert all(mx.array_equal(a, b) for a, b in zip(*results, strict=True))
