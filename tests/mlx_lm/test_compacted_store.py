"""PromptStore where blocks come back compacted: what is asked for, what is used, and what is put again."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from compacted_blocks import Compacting
from mlx_lm.models.cache import KVCache
from mlx_models import build, prefill, save
from support import DaemonProcess

from kvcached_client import Client, FidelityKind, ModelSpec
from kvcached_mlx import Policy, PromptStore, fresh_cache, model_spec
from kvcached_mlx.compacted import CompactedKVCache
from kvcached_mlx.prompt_cache import OffloadingPromptCache

BLOCK, RECOMPUTE = 16, 12
TOKENS = [int(t) for t in np.random.default_rng(3).integers(0, 64, 7 * BLOCK + 3)]
PROMPT = TOKENS[: 5 * BLOCK + 3]
EXACT, CODED, COMPACTED = FidelityKind.EXACT, FidelityKind.CODED, FidelityKind.COMPACTED
Open = Callable[..., PromptStore]


@pytest.fixture
def llama(tmp_path: Path) -> tuple[Any, ModelSpec]:
    model, config = build("llama")
    return model, model_spec(model, save(model, config, tmp_path), block_size=BLOCK)


@pytest.fixture
def opened(llama: tuple[Any, ModelSpec], daemon: DaemonProcess) -> Iterator[Open]:
    """Opens stores, each as another process would have it."""
    stores: list[PromptStore] = []

    def opened(floor: FidelityKind = COMPACTED, which: Callable[[int], bool] = lambda _: True) -> PromptStore:
        model, spec = llama
        client = Compacting(spec, target=daemon.target)
        client.which = which  # type: ignore[method-assign]
        stores.append(PromptStore(model, client, policy=Policy(floor=floor, recompute=RECOMPUTE)))
        return stores[-1]

    yield opened
    for store in stores:
        store.close()


def computed(model: Any, tokens: list[int]) -> list[Any]:
    cache = fresh_cache(model)
    prefill(model, cache, tokens)
    return cache


def offload(store: PromptStore, tokens: list[int], cache: list[Any]) -> int:
    n_taken = store.offload(tokens, cache)
    assert store.flush(timeout=30)
    assert store.counts.refused == 0
    return n_taken


def test_a_prefix_is_restored_compacted_less_the_blocks_at_the_end_of_the_prompt(
    llama: tuple[Any, ModelSpec], opened: Open
) -> None:
    model, _ = llama
    offload(opened(), PROMPT, computed(model, PROMPT))
    store = opened()
    for prompt, n_blocks in [
        (PROMPT, 4),  # of the fifth block, tokens would have to be computed anew: it is left out whole
        (TOKENS[: 4 * BLOCK + RECOMPUTE], 4),
        (TOKENS[: 4 * BLOCK + RECOMPUTE - 1], 3),
        (TOKENS, 5),
        (TOKENS[: BLOCK + 3], 0),
    ]:
        cache, n_restored = store.restore(prompt)
        assert n_restored == n_blocks * BLOCK
        assert {type(entry) for entry in cache} == {CompactedKVCache if n_blocks else KVCache}
        assert cache[0].offset == n_restored if n_blocks else cache[0].empty()
    cache, n_restored = store.restore(TOKENS)
    plain = computed(model, TOKENS[:n_restored])
    assert sum(entry.nbytes for entry in cache) < 0.5 * 5 / 16 * sum(entry.nbytes for entry in plain)  # of 256 rows
    assert mx.all(mx.isfinite(prefill(model, cache, TOKENS[n_restored:])))
    assert cache[0].offset == len(TOKENS)
    assert isinstance(store.client, Compacting)
    assert set(store.client.asked) == {("match", True), ("get", True)}


def test_behind_compacted_blocks_exact_ones_are_cut_by_whole_blocks_too(
    llama: tuple[Any, ModelSpec], opened: Open
) -> None:
    model, _ = llama
    offload(opened(), PROMPT, computed(model, PROMPT))
    assert opened(which=lambda index: index < 2).restore(PROMPT)[1] == 4 * BLOCK
    assert opened(which=lambda index: index == 4).restore(PROMPT)[1] == 4 * BLOCK
    assert opened(which=lambda _index: False).restore(PROMPT)[1] == 5 * BLOCK


def test_what_is_computed_on_a_compacted_prefix_is_put_as_that_and_what_was_given_is_not_put(
    llama: tuple[Any, ModelSpec], opened: Open
) -> None:
    model, _ = llama
    offload(opened(), PROMPT, computed(model, PROMPT))
    second = opened(which=lambda index: index < 4)
    cache, n_restored = second.restore(PROMPT)
    assert n_restored == 4 * BLOCK
    prefill(model, cache, TOKENS[n_restored:])
    # The fifth block is held exactly, computed on an exact prefix: ours is no better.
    assert offload(second, TOKENS, cache) == 2
    hashes = second.client.chain(TOKENS)
    plain = opened()
    held = Client.match(plain.client, hashes, floor=COMPACTED, accepts_compacted=True)
    assert [block.lineage for block in held.blocks] == [EXACT] * 5 + [COMPACTED] * 2
    assert len(Client.match(plain.client, hashes, floor=CODED).blocks) == 5
    # Of what the daemon has lost since, only the exact tail is offered; it is refused, for its parents are gone.
    second.client.delete(hashes)
    assert second.offload(TOKENS, cache) == 3
    assert second.flush(timeout=30)
    assert second.counts.refused == 3
    assert not Client.match(plain.client, hashes, floor=COMPACTED, accepts_compacted=True).blocks


def test_a_copy_that_goes_on_is_offloaded_like_the_first(llama: tuple[Any, ModelSpec], opened: Open) -> None:
    model, _ = llama
    offload(opened(), PROMPT, computed(model, PROMPT))
    store = opened()
    server_cache = OffloadingPromptCache(lambda _key: store)
    cache, rest = server_cache.fetch_nearest_cache("model", TOKENS)
    assert len(rest) == len(TOKENS) - 5 * BLOCK
    prefill(model, cache, rest)
    server_cache.insert_cache("model", TOKENS, cache)
    again, rest = server_cache.fetch_nearest_cache("model", TOKENS)
    assert again is not None
    assert (rest, again[0].offset) == (TOKENS[-1:], len(TOKENS) - 1)  # the exact tail can be cut
    more, rest = server_cache.fetch_nearest_cache("model", [*TOKENS, *TOKENS[:20]])
    assert more is not None
    assert (rest, more[0].n_exact) == (TOKENS[:20], len(TOKENS) - 5 * BLOCK)
    shorter, rest = server_cache.fetch_nearest_cache("model", TOKENS[: 4 * BLOCK])
    assert shorter is not None
    assert (len(rest), shorter[0].offset) == (BLOCK, 3 * BLOCK)  # restored: mlx-lm's own could not be cut
    prefill(model, more, TOKENS[:20])
    assert offload(store, [*TOKENS, *TOKENS[:20]], more) == 3


@pytest.mark.parametrize("floor", [EXACT, CODED])
def test_whoever_does_not_accept_compacted_blocks_never_says_so(
    floor: FidelityKind, llama: tuple[Any, ModelSpec], opened: Open
) -> None:
    model, _ = llama
    offload(opened(), PROMPT, computed(model, PROMPT))
    store = opened(floor)
    cache, n_restored = store.restore(PROMPT)
    assert n_restored == 5 * BLOCK
    assert {type(entry) for entry in cache} == {KVCache}
    assert isinstance(store.client, Compacting)
    assert set(store.client.asked) == {("match", False), ("get", False)}


def test_a_model_that_cannot_go_on_from_compacted_blocks_is_served_profiles_alone_and_the_log_says_why(
    tmp_path: Path, daemon: DaemonProcess, caplog: pytest.LogCaptureFixture
) -> None:
    model, config = build("gpt_oss", mx.float32)
    spec = model_spec(model, save(model, config, tmp_path), block_size=BLOCK)
    client = Compacting(spec, target=daemon.target)
    policy = Policy(floor=COMPACTED, store_as="compacted-x16", am_ratio=4.0)
    with caplog.at_level(logging.WARNING):
        store = PromptStore(model, client, policy=policy)
    assert store.policy == Policy(floor=CODED, store_as="x16")
    (record,) = (record for record in caplog.records if record.name == "kvcached_mlx.store")
    assert "nothing is compacted, and nothing compacted is restored: its attention has learned sinks" in record.message
    tokens = TOKENS[: 5 * BLOCK]
    offload(store, tokens, computed(model, tokens))
    assert store.restore(TOKENS)[1] == 5 * BLOCK
    assert set(client.asked) == {("match", False), ("get", False)}
    assert client.wished == [("x16", 0.0)]
    store.close()


def test_what_is_to_be_compacted_is_sent_with_its_ratio_and_queries(
    llama: tuple[Any, ModelSpec], daemon: DaemonProcess
) -> None:
    model, spec = llama
    for store_as, ratio in [("compacted-x8", 2.5), ("x8", 0.0)]:
        client = Compacting(spec, target=daemon.target)
        policy = Policy(floor=COMPACTED, store_as=store_as, am_ratio=ratio)
        store = PromptStore(model, client, policy=policy)
        assert offload(store, TOKENS, computed(model, TOKENS)) == 7
        store.close()
        store.client.delete(client.chain(TOKENS))
        assert client.wished == [(store_as, ratio)]
        # Every eighth token is sampled; after the last four blocks there are too few.
        assert client.n_queries == ([13, 11, 9, 0, 0, 0, 0] if ratio else [0] * 7)


def test_what_would_not_be_restored_is_not_compacted(
    llama: tuple[Any, ModelSpec], daemon: DaemonProcess, caplog: pytest.LogCaptureFixture
) -> None:
    model, spec = llama
    for floor in (CODED, EXACT):
        caplog.clear()
        policy = Policy(floor=floor, store_as="compacted-x8", am_ratio=2.0)
        store = PromptStore(model, Client(spec, target=daemon.target), policy=policy)
        assert store.policy == Policy(floor=floor, store_as="x8")
        assert "compacted-x8 is below the floor of what is restored" in caplog.text
        store.close()


def test_a_list_with_compacted_entries_in_other_places_is_not_of_this_model(
    llama: tuple[Any, ModelSpec], opened: Open, caplog: pytest.LogCaptureFixture
) -> None:
    model, _ = llama
    offload(opened(), PROMPT, computed(model, PROMPT))
    store = opened()
    cache, n_restored = store.restore(TOKENS)
    prefill(model, cache, TOKENS[n_restored:])
    plain = computed(model, TOKENS)
    assert store.offload(TOKENS, [*cache[:-1], plain[-1]]) == 0
    assert store.offload(TOKENS, cache[:-1]) == 0
    assert caplog.text.count("not of the classes of this model") == 2
    assert store.offload(TOKENS, cache) == 2
