"""PromptStore on a daemon that codes blocks: what is lossy says so, and what stands on it is never taken for exact."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from bundles import install, make_bundle
from mlx_models import build, prefill, save
from support import DaemonProcess

from kvcached.codec.bundle import PROFILES
from kvcached_client import Client, FidelityKind, ModelSpec
from kvcached_mlx import Policy, PromptStore, fresh_cache, model_spec

BLOCK = 16
RECOMPUTE = 12
TOKENS = [int(t) for t in np.random.default_rng(3).integers(0, 64, 7 * BLOCK + 3)]
PROMPT = TOKENS[: 5 * BLOCK + 3]
EXACT, CODED = FidelityKind.EXACT, FidelityKind.CODED
Open = Callable[..., PromptStore]


@pytest.fixture
def llama(tmp_path: Path, daemon: DaemonProcess) -> tuple[Any, ModelSpec]:
    """A model with a bundle that claims to have been measured, so that it is used."""
    model, config = build("llama")
    spec = model_spec(model, save(model, config, tmp_path), block_size=BLOCK)
    with daemon.client(spec) as client:
        client.match(client.chain(TOKENS))  # registers
    install(daemon, make_bundle(spec, measured=tuple(PROFILES)))
    return model, spec


@pytest.fixture
def opened(llama: tuple[Any, ModelSpec], daemon: DaemonProcess) -> Iterator[Open]:
    """Opens stores, each as another process would have it."""
    stores: list[PromptStore] = []

    def opened(store_as: str = "", floor: FidelityKind = CODED) -> PromptStore:
        model, spec = llama
        policy = Policy(floor=floor, recompute=RECOMPUTE, store_as=store_as)
        stores.append(PromptStore(model, Client(spec, target=daemon.target), policy=policy))
        return stores[-1]

    yield opened
    for store in stores:
        store.close()


def computed(model: Any, tokens: list[int]) -> list[Any]:
    cache = fresh_cache(model)
    prefill(model, cache, tokens)
    return cache


def offload(store: PromptStore, tokens: list[int], cache: list[Any]) -> int:
    """How many blocks the daemon was sent."""
    before = store.counts.sent
    store.offload(tokens, cache)
    assert store.flush(timeout=30)
    assert store.counts.refused == 0
    return store.counts.sent - before


def held(store: PromptStore, floor: FidelityKind) -> int:
    return len(store.client.match(store.client.chain(TOKENS), floor=floor).blocks)


def test_on_a_lossy_prefix_the_end_of_the_prompt_is_left_to_compute(llama: tuple[Any, ModelSpec], opened: Open) -> None:
    model, _ = llama
    exact = computed(model, PROMPT)
    offload(opened(), PROMPT, exact)
    cache, n_restored = opened().restore(PROMPT)
    assert n_restored == len(PROMPT) - RECOMPUTE
    assert cache[0].offset == n_restored
    difference = mx.abs(cache[2].keys[..., :n_restored, :] - exact[2].keys[..., :n_restored, :]).max(axis=(0, 1, 3))
    assert mx.all(difference[:4] == 0)  # sinks
    assert mx.any(difference[4:] > 0)
    prefill(model, cache, PROMPT[n_restored:])
    assert cache[0].offset == len(PROMPT)


def test_far_from_the_end_of_a_prompt_all_that_is_held_is_used(llama: tuple[Any, ModelSpec], opened: Open) -> None:
    model, _ = llama
    offload(opened(), PROMPT, computed(model, PROMPT))
    assert opened().restore(TOKENS)[1] == 5 * BLOCK


def test_whoever_wants_exact_blocks_is_given_no_others(llama: tuple[Any, ModelSpec], opened: Open) -> None:
    model, _ = llama
    offload(opened(), PROMPT, computed(model, PROMPT))
    assert opened(floor=EXACT).restore(PROMPT)[1] == 0


def test_what_was_computed_on_a_lossy_prefix_does_not_answer_for_the_exact_one_until_somebody_computes_that(
    llama: tuple[Any, ModelSpec], opened: Open
) -> None:
    model, _ = llama
    offload(opened("x16"), PROMPT, computed(model, PROMPT))
    second = opened("exact")
    cache, n_restored = second.restore(PROMPT)
    assert n_restored == len(PROMPT) - RECOMPUTE
    prefill(model, cache, TOKENS[n_restored:])
    # The fifth block is in part computed anew; the daemon has it as good as that. The first four were given by it.
    assert offload(second, TOKENS, cache) == 3
    assert (held(second, CODED), held(second, EXACT)) == (7, 0)
    hashes = second.client.chain(TOKENS)
    assert list(second.client.get(hashes[5:], floor=EXACT)) == [None, None]
    for block in second.client.get(hashes[5:], floor=CODED):
        assert block is not None
        assert (block.fidelity.kind, block.lineage) == (EXACT, CODED)
    third = opened("exact")
    exact = computed(model, TOKENS)
    assert offload(third, TOKENS, exact) == 7
    assert held(third, EXACT) == 7
    restored, n_restored = opened(floor=EXACT).restore([*TOKENS, 1])
    assert n_restored == 7 * BLOCK
    assert mx.array_equal(restored[3].values, exact[3].values[..., : 7 * BLOCK, :])


def test_a_lossy_block_is_not_put_back_even_where_it_was_lost(
    llama: tuple[Any, ModelSpec], opened: Open, daemon: DaemonProcess
) -> None:
    model, _ = llama
    offload(opened(), PROMPT, computed(model, PROMPT))
    second = opened()
    cache, n_restored = second.restore(TOKENS)
    assert n_restored == 5 * BLOCK
    second.client.delete(second.client.chain(TOKENS))
    assert second.offload(TOKENS[:n_restored], cache) == 0
    assert second.flush(timeout=30)
    assert daemon.status().store.n_blocks == 0


def test_a_cache_that_is_cut_within_a_lossy_block_and_goes_on_otherwise_is_not_exact(
    llama: tuple[Any, ModelSpec], opened: Open
) -> None:
    model, _ = llama
    offload(opened(), PROMPT, computed(model, PROMPT))
    second = opened("exact")
    cache, n_restored = second.restore(PROMPT)
    for entry in cache:
        entry.trim(n_restored - BLOCK // 2)
    other = PROMPT[: BLOCK // 2] + [t ^ 1 for t in TOKENS[BLOCK // 2 : 3 * BLOCK]]
    prefill(model, cache, other[BLOCK // 2 :])
    assert offload(second, other, cache) == 3
    (match,) = {b.lineage for b in second.client.match(second.client.chain(other), floor=CODED).blocks}
    assert match == CODED
    assert not second.client.match(second.client.chain(other)).blocks


def test_what_was_restored_exactly_goes_on_exactly(llama: tuple[Any, ModelSpec], opened: Open) -> None:
    model, _ = llama
    offload(opened("exact"), PROMPT, computed(model, PROMPT))
    second = opened("exact")
    cache, n_restored = second.restore(PROMPT)
    assert n_restored == 5 * BLOCK
    prefill(model, cache, TOKENS[n_restored:])
    assert offload(second, TOKENS, cache) == 2
    assert held(second, EXACT) == 7


def test_blocks_that_are_held_at_a_loss_are_not_put_again_unless_exactly(
    llama: tuple[Any, ModelSpec], opened: Open
) -> None:
    model, _ = llama
    cache = computed(model, PROMPT)
    assert offload(opened("x8"), PROMPT, cache) == 5
    assert offload(opened("x8"), PROMPT, cache) == 0
    assert offload(opened(), PROMPT, cache) == 0
    exact = opened("exact")
    assert offload(exact, PROMPT, cache) == 5
    assert held(exact, EXACT) == 5


def test_a_model_with_state_leaves_whole_blocks_to_compute(tmp_path: Path, daemon: DaemonProcess) -> None:
    model, config = build("gemma3_text")
    spec = model_spec(model, save(model, config, tmp_path), block_size=BLOCK)
    store = PromptStore(model, daemon.client(spec), policy=Policy(recompute=RECOMPUTE))
    store.restore(TOKENS)  # registers
    install(daemon, make_bundle(spec, measured=("x8",)))
    for n_blocks in (4, 5):
        offload(store, TOKENS[: n_blocks * BLOCK], computed(model, TOKENS[: n_blocks * BLOCK]))
    assert store.restore(TOKENS[: 5 * BLOCK + RECOMPUTE - 1])[1] == 4 * BLOCK
    assert store.restore(TOKENS[: 5 * BLOCK + RECOMPUTE])[1] == 5 * BLOCK
    store.close()
