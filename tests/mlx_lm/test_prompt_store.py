"""PromptStore with a real daemon: what is offloaded comes back, and what goes wrong costs nothing but speed."""

import gc
import logging
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_models import build, prefill, save
from support import DaemonProcess, wait_until

from kvcached_client import Block, Client, FidelityKind, ModelSpec
from kvcached_mlx import Policy, PromptStore, fresh_cache, model_spec

BLOCK = 16
TOKENS = [int(t) for t in np.random.default_rng(3).integers(0, 64, 5 * BLOCK + 3)]


@pytest.fixture
def llama(tmp_path: Path) -> tuple[Any, ModelSpec]:
    model, config = build("llama")
    return model, model_spec(model, save(model, config, tmp_path), block_size=BLOCK)


@pytest.fixture
def store(llama: tuple[Any, ModelSpec], daemon: DaemonProcess) -> Iterator[PromptStore]:
    model, spec = llama
    store = PromptStore(model, daemon.client(spec))
    yield store
    store.close()


def another(store: PromptStore, model: Any, target: str) -> PromptStore:
    """What another process would have."""
    return PromptStore(model, Client(store.spec, target=target))


def offloaded(store: PromptStore, model: Any, tokens: list[int]) -> list[Any]:
    cache = fresh_cache(model)
    prefill(model, cache, tokens)
    store.offload(tokens, cache)
    assert store.flush(timeout=30)
    return cache


def sent(store: PromptStore, tokens: list[int], cache: list[Any]) -> int:
    """How many blocks an offload sends."""
    before = store.counts.sent
    store.offload(tokens, cache)
    assert store.flush(timeout=30)
    return store.counts.sent - before


def test_a_prefix_is_restored_up_to_its_last_full_block(
    llama: tuple[Any, ModelSpec], store: PromptStore, daemon: DaemonProcess
) -> None:
    model, _ = llama
    cache = offloaded(store, model, TOKENS)
    restored, n_tokens = another(store, model, daemon.target).restore([*TOKENS, 9, 9])
    assert n_tokens == 5 * BLOCK
    rest = TOKENS[n_tokens:]
    assert mx.array_equal(prefill(model, restored, rest), prefill(model, fresh(model, TOKENS[:n_tokens]), rest))
    assert restored[0].offset == cache[0].offset


def fresh(model: Any, tokens: list[int]) -> list[Any]:
    cache = fresh_cache(model)
    prefill(model, cache, tokens)
    return cache


def test_a_prompt_equal_to_a_cached_prefix_leaves_a_token_to_feed(
    llama: tuple[Any, ModelSpec], store: PromptStore
) -> None:
    model, _ = llama
    offloaded(store, model, TOKENS)
    assert store.restore(TOKENS[: 5 * BLOCK])[1] == 4 * BLOCK
    assert store.restore(TOKENS[: 5 * BLOCK + 1])[1] == 5 * BLOCK
    assert store.restore([])[1] == 0
    assert store.restore(TOKENS[:1])[1] == 0


def test_what_was_restored_or_put_is_not_put_again(
    llama: tuple[Any, ModelSpec], store: PromptStore, daemon: DaemonProcess
) -> None:
    model, _ = llama
    cache = offloaded(store, model, TOKENS)
    assert sent(store, TOKENS, cache) == 0
    other = another(store, model, daemon.target)
    restored, n_tokens = other.restore(TOKENS)
    prefill(model, restored, TOKENS[n_tokens:])
    assert sent(other, TOKENS, restored) == 0


def test_what_the_daemon_lost_is_put_again(
    llama: tuple[Any, ModelSpec], store: PromptStore, daemon: DaemonProcess
) -> None:
    model, _ = llama
    cache = offloaded(store, model, TOKENS)
    daemon.stop()
    daemon.store.rename(daemon.directory / "gone")
    daemon.start()
    assert store.restore(TOKENS)[1] == 0
    assert sent(store, TOKENS, cache) == 5
    assert store.restore(TOKENS)[1] == 5 * BLOCK


@pytest.mark.parametrize("architecture", ["gemma3_text", "mamba2", "falcon_h1"])
def test_a_model_with_state_is_restored_at_a_block_that_has_it(
    architecture: str, tmp_path: Path, daemon: DaemonProcess
) -> None:
    model, config = build(architecture)
    spec = model_spec(model, save(model, config, tmp_path), block_size=BLOCK)
    store = PromptStore(model, daemon.client(spec))
    offloaded(store, model, TOKENS[: 3 * BLOCK])
    offloaded(store, model, TOKENS[: 5 * BLOCK])
    other = another(store, model, daemon.target)
    rest = TOKENS[3 * BLOCK : 3 * BLOCK + 5]
    for prompt, expected in [(TOKENS, 5), (TOKENS[: 5 * BLOCK], 3), (TOKENS[: 3 * BLOCK], 0)]:
        assert other.restore(prompt)[1] == expected * BLOCK
    restored, _ = other.restore(TOKENS[: 4 * BLOCK])
    assert mx.array_equal(prefill(model, restored, rest), prefill(model, fresh(model, TOKENS[: 3 * BLOCK]), rest))


def test_a_quantised_cache_is_never_given_to_a_plain_one(tmp_path: Path, daemon: DaemonProcess) -> None:
    model, config = build("llama", overrides={"head_dim": 64})
    path = save(model, config, tmp_path)
    plain = model_spec(model, path, block_size=BLOCK)
    quantised = model_spec(model, path, block_size=BLOCK, kv_bits=8, kv_group_size=32)
    store = PromptStore(model, daemon.client(quantised), make_cache=lambda: fresh_cache(model, 8, 32))
    cache = fresh_cache(model, 8, 32)
    prefill(model, cache, TOKENS)
    assert store.offload(TOKENS, cache) == 5
    assert store.flush(timeout=30)
    restored, n_tokens = store.restore(TOKENS)
    assert n_tokens == 5 * BLOCK
    rest = TOKENS[n_tokens:]
    again = fresh_cache(model, 8, 32)
    prefill(model, again, TOKENS[:n_tokens])
    assert mx.array_equal(prefill(model, restored, rest), prefill(model, again, rest))
    assert PromptStore(model, daemon.client(plain)).restore(TOKENS)[1] == 0


def test_a_cache_that_cannot_be_stored_is_refused_with_a_logged_reason(
    llama: tuple[Any, ModelSpec], store: PromptStore, caplog: pytest.LogCaptureFixture
) -> None:
    model, _ = llama
    with caplog.at_level(logging.WARNING):
        assert store.offload(TOKENS[:-1], fresh(model, TOKENS)) == 0
    assert "prompt cache of 82 tokens not offloaded" in caplog.text
    assert "holds 83 tokens" in caplog.text


def test_without_a_daemon_everything_goes_on(llama: tuple[Any, ModelSpec], run_dir: Path) -> None:
    model, spec = llama
    store = PromptStore(model, Client(spec, target=f"unix:{run_dir}/nobody.sock"))
    cache, n_tokens = store.restore(TOKENS)
    assert (n_tokens, cache[0].offset) == (0, 0)
    prefill(model, cache, TOKENS)
    assert store.offload(TOKENS, cache) == 5
    assert store.flush(timeout=30)
    assert (store.counts.sent, store.counts.refused) == (0, 5)
    store.close()


def test_what_is_sent_is_the_cache_as_it_was_offloaded(llama: tuple[Any, ModelSpec], store: PromptStore) -> None:
    """The engine may overwrite or free its cache at once."""
    model, _ = llama
    cache = fresh_cache(model)
    prefill(model, cache, TOKENS)
    expected = fresh(model, TOKENS[: 5 * BLOCK])
    store.offload(TOKENS, cache)
    for entry in cache:
        entry.keys = mx.zeros_like(entry.keys)
        entry.values[...] = 0
    mx.eval([entry.values for entry in cache])
    assert store.flush(timeout=30)
    restored, n_tokens = store.restore(TOKENS)
    rest = TOKENS[n_tokens:]
    assert mx.array_equal(prefill(model, restored, rest), prefill(model, expected, rest))


def test_a_closed_store_drops_and_misses(
    llama: tuple[Any, ModelSpec], store: PromptStore, caplog: pytest.LogCaptureFixture
) -> None:
    model, _ = llama
    offloaded(store, model, TOKENS)
    store.close()
    other = [t ^ 1 for t in TOKENS]
    assert store.offload(other, fresh(model, other)) == 0
    assert "5 blocks dropped: the store is closed" in caplog.text
    assert (store.counts.sent, store.counts.dropped) == (5, 5)
    assert store.flush(timeout=30)
    restored, n_tokens = store.restore(TOKENS)
    assert (restored[0].offset, n_tokens) == (0, 0)
    store.close()


def test_what_was_taken_before_closing_is_sent(
    llama: tuple[Any, ModelSpec], store: PromptStore, daemon: DaemonProcess
) -> None:
    model, _ = llama
    store.offload(TOKENS, fresh(model, TOKENS))
    store.close()
    assert store.counts.sent == 5
    assert another(store, model, daemon.target).restore(TOKENS)[1] == 5 * BLOCK


def test_what_the_daemon_has_lost_is_offloaded_again(
    llama: tuple[Any, ModelSpec], store: PromptStore, daemon: DaemonProcess
) -> None:
    model, _ = llama
    cache = offloaded(store, model, TOKENS)
    assert sent(store, TOKENS, cache) == 0
    assert store.client.delete(store.client.chain(TOKENS)[2:]) == 3
    assert sent(store, TOKENS, cache) == 3
    assert daemon.status().store.n_blocks == 5
    assert daemon.status().counters["lookup_tokens_total"] == 0  # nobody looked anything up


def test_a_restore_is_one_call(llama: tuple[Any, ModelSpec], store: PromptStore, daemon: DaemonProcess) -> None:
    model, _ = llama
    offloaded(store, model, TOKENS)
    other = another(store, model, daemon.target)

    def calls() -> dict[str, float]:
        counters = daemon.status().counters
        return {method: _calls(counters, method) for method in ("Match", "Get")}

    before = calls()
    for n_local, n_restored in [(0, 5 * BLOCK), (5 * BLOCK - 1, 5 * BLOCK), (5 * BLOCK, 0)]:
        assert other.restore(TOKENS, n_local=n_local)[1] == n_restored
    after = {"Match": before["Match"], "Get": before["Get"] + 2}  # none where nothing can be gained
    assert wait_until(lambda: calls() == after), calls()  # counted when the call ends, which nobody waits for


def _calls(counters: Mapping[str, float], method: str) -> float:
    return sum(n for name, n in counters.items() if name.startswith(f'rpc_requests_total{{method="{method}"'))


@pytest.mark.parametrize("accepts_compacted", [False, True])
def test_the_memory_of_a_block_is_let_go_of_before_the_next_one_but_one_comes(
    llama: tuple[Any, ModelSpec], store: PromptStore, daemon: DaemonProcess, accepts_compacted: bool
) -> None:
    """The daemon has few slots, and wants each back for another block of the same prefix."""
    model, _ = llama
    offloaded(store, model, TOKENS)
    held: list[int] = []

    class Watching(Client):
        def get_longest_prefix(self, hashes: Any, **kwargs: Any) -> Iterator[Block]:
            came: list[weakref.ref[np.ndarray]] = []
            for block in super().get_longest_prefix(hashes, **kwargs):
                tensors = {name: array.copy() for name, array in block.tensors.items()}
                came += map(weakref.ref, tensors.values())
                yield replace(block, tensors=tensors)
                del block, tensors
                gc.collect()
                held.append(sum(array() is not None for array in came))

    other = PromptStore(model, Watching(store.spec, target=daemon.target), policy=Policy(floor=FidelityKind.CODED))
    if accepts_compacted:
        other.policy = Policy(floor=FidelityKind.COMPACTED)
    cache, n_tokens = other.restore(TOKENS)
    assert n_tokens == 5 * BLOCK
    assert cache[0].offset == n_tokens
    assert len(held) == 5
    assert max(held) <= 2  # the tensors of the block that was asked for last
