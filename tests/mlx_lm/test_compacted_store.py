"""PromptStore on a daemon that compacts: what is asked for, what is used, what is put again, and by whom it can be."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from compacting import counter
from compacting_engines import BLOCK, RECOMPUTE, TOKENS, calibrated, classes, computed, held, kinds, offload
from mlx_lm.models.cache import KVCache
from mlx_models import prefill
from support import DaemonProcess

from kvcached_client import Client, FidelityKind, ModelSpec
from kvcached_client._proto import kvcached_pb2 as pb
from kvcached_mlx import Policy, PromptStore
from kvcached_mlx.blocks import to_blocks
from kvcached_mlx.compacted import CompactedKVCache
from kvcached_mlx.prompt_cache import OffloadingPromptCache

PROMPT = TOKENS[: 5 * BLOCK + 3]
EXACT, CODED, COMPACTED = FidelityKind.EXACT, FidelityKind.CODED, FidelityKind.COMPACTED
Open = Callable[..., PromptStore]
Stored = Callable[..., None]
_serial = itertools.count()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, shared_daemon: DaemonProcess) -> tuple[Any, ModelSpec]:
    """A model that the daemon can compact."""
    return calibrated("llama", tmp_path_factory.mktemp("llama"), shared_daemon)


@pytest.fixture
def namespace() -> str:
    """A test's own: all have the daemon and the model in common."""
    return f"test {next(_serial)}"


@pytest.fixture
def opened(llama: tuple[Any, ModelSpec], shared_daemon: DaemonProcess, namespace: str) -> Iterator[Open]:
    """Opens stores, each as another process would have it."""
    stores: list[PromptStore] = []

    def opened(floor: FidelityKind = COMPACTED, store_as: str = "compacted-x8", am_ratio: float = 0) -> PromptStore:
        model, spec = llama
        policy = Policy(floor=floor, recompute=RECOMPUTE, store_as=store_as, am_ratio=am_ratio)
        stores.append(PromptStore(model, shared_daemon.client(spec, namespace), policy=policy))
        return stores[-1]

    yield opened
    for store in stores:
        store.close()


@pytest.fixture
def stored(llama: tuple[Any, ModelSpec], shared_daemon: DaemonProcess, namespace: str) -> Stored:
    """Puts the blocks of a prompt, each at the fidelity that is named for it."""

    def stored(*store_as: str) -> None:
        model, spec = llama
        with shared_daemon.client(spec, namespace) as client:
            blocks = to_blocks(spec, PROMPT, client.chain(PROMPT), computed(model, PROMPT))
            for block, name in zip(blocks, store_as, strict=True):
                (result,) = client.put([block], store_as=name)
                assert result.outcome == pb.OUTCOME_STORED
                expected = COMPACTED if name.startswith("compacted") else EXACT if name == "exact" else CODED
                assert result.fidelity.kind == expected

    return stored


# ---- who takes them


def test_a_prefix_is_restored_compacted_less_the_blocks_at_the_end_of_the_prompt(
    llama: tuple[Any, ModelSpec], opened: Open
) -> None:
    model, _ = llama
    assert offload(opened(), PROMPT, computed(model, PROMPT)) == 5
    store = opened()
    assert kinds(store) == [COMPACTED] * 5
    for prompt, n_blocks in [
        (PROMPT, 4),  # of the fifth block, tokens would have to be computed anew: it is left out whole
        (TOKENS[: 4 * BLOCK + RECOMPUTE], 4),
        (TOKENS[: 4 * BLOCK + RECOMPUTE - 1], 3),
        (TOKENS, 5),
        (TOKENS[: BLOCK + 3], 0),
    ]:
        cache, n_restored = store.restore(prompt)
        assert n_restored == n_blocks * BLOCK
        assert classes(cache) == {CompactedKVCache if n_blocks else KVCache}
        assert cache[0].offset == n_restored if n_blocks else cache[0].empty()
    cache, n_restored = store.restore(TOKENS)
    assert mx.all(mx.isfinite(prefill(model, cache, TOKENS[n_restored:])))
    assert cache[0].offset == len(TOKENS)


def test_what_restored_caches_take_in_memory_is_counted(llama: tuple[Any, ModelSpec], opened: Open) -> None:
    model, spec = llama
    offload(opened(), PROMPT, computed(model, PROMPT))
    store = opened()
    cache, n_restored = store.restore(TOKENS)
    n_bytes = sum(entry.nbytes for entry in cache)
    assert (store.counts.restored_tokens, store.counts.restored_bytes) == (n_restored, n_bytes)
    dense = sum(2 * int(np.prod(shape)) for shape in spec.dense_shapes().values()) * n_restored // BLOCK
    assert dense == sum(2 * entry.keys[..., :n_restored, :].nbytes for entry in computed(model, TOKENS))
    assert n_bytes <= dense / 3.5
    assert store.restore(TOKENS[:BLOCK])[1] == 0
    assert store.counts.restored_bytes == n_bytes


def test_behind_compacted_blocks_others_are_cut_by_whole_blocks_too(stored: Stored, opened: Open) -> None:
    stored("compacted-x8", "compacted-x16", "exact", "x8", "exact")
    cache, n_restored = opened().restore(PROMPT)
    assert (n_restored, classes(cache)) == (4 * BLOCK, {CompactedKVCache})
    rows = sum(group.keys.shape[0] * group.keys.shape[2] for entry in cache for group in entry._groups)
    assert 2.5 / 4 <= rows / (8 * n_restored) <= (2.5 / 4) * 17 / 16  # two of four blocks at a quarter


def test_a_compacted_block_at_the_end_is_left_out_and_without_any_nothing_changes(
    stored: Stored, opened: Open, llama: tuple[Any, ModelSpec], shared_daemon: DaemonProcess
) -> None:
    stored("exact", "exact", "exact", "exact", "compacted-x8")
    cache, n_restored = opened().restore(PROMPT)
    assert (n_restored, classes(cache)) == (4 * BLOCK, {KVCache})
    with shared_daemon.client(llama[1], "exact") as client:
        store = PromptStore(llama[0], client, policy=Policy(floor=COMPACTED, recompute=RECOMPUTE, store_as="exact"))
        offload(store, PROMPT, computed(llama[0], PROMPT))
        cache, n_restored = store.restore(PROMPT)
        assert (n_restored, classes(cache)) == (5 * BLOCK, {KVCache})
        store.close()


@pytest.mark.parametrize(("floor", "store_as", "kind"), [(CODED, "", CODED), (EXACT, "exact", EXACT)], ids=str)
def test_to_whoever_does_not_take_them_compacted_blocks_are_a_miss_until_they_are_put_better(
    floor: FidelityKind,
    store_as: str,
    kind: FidelityKind,
    llama: tuple[Any, ModelSpec],
    opened: Open,
    shared_daemon: DaemonProcess,
    namespace: str,
) -> None:
    model, _ = llama
    compacting = {"namespace_fidelity": f"{namespace}=compacted-x8"}
    shared_daemon.call("SetConfig", pb.SetConfigRequest(values=compacting))
    takes, does_not = opened(store_as=""), opened(floor, store_as)
    assert offload(takes, PROMPT, computed(model, PROMPT)) == 5
    assert kinds(takes) == [COMPACTED] * 5
    assert does_not.restore(PROMPT)[1] == 0
    assert offload(does_not, PROMPT, computed(model, PROMPT)) == 5
    assert kinds(takes) == [kind] * 5
    for store in (does_not, takes):
        cache, n_restored = store.restore(TOKENS)
        assert (n_restored, classes(cache)) == (5 * BLOCK, {KVCache})
    # What is held is as good as what any of them would put.
    assert [offload(store, PROMPT, computed(model, PROMPT)) for store in (takes, does_not)] == [0, 0]


def test_at_a_ratio_of_1_caches_are_restored_as_from_the_profile_alone(
    llama: tuple[Any, ModelSpec], opened: Open, shared_daemon: DaemonProcess
) -> None:
    model, spec = llama
    cache = computed(model, PROMPT)
    identity = opened(am_ratio=1.0)
    offload(identity, PROMPT, cache)
    assert [(block.fidelity.kind, block.fidelity.profile) for block in held(identity)] == [(CODED, "x8")] * 5
    with shared_daemon.client(spec, "profile alone") as client:
        alone = PromptStore(model, client, policy=Policy(recompute=RECOMPUTE, store_as="x8"))
        offload(alone, PROMPT, cache)
        (ours, n_ours), (theirs, n_theirs) = (store.restore(PROMPT) for store in (identity, alone))
        assert n_ours == n_theirs == len(PROMPT) - RECOMPUTE
        assert classes(ours) == classes(theirs) == {KVCache}
        for one, other in zip(ours, theirs, strict=True):
            assert mx.array_equal(one.state[0], other.state[0])
            assert mx.array_equal(one.state[1], other.state[1])
        alone.close()


# ---- what is put again


def test_what_is_computed_on_a_compacted_prefix_is_put_as_that_and_what_was_given_is_not_put(
    llama: tuple[Any, ModelSpec], opened: Open, stored: Stored
) -> None:
    model, _ = llama
    stored(*["compacted-x8"] * 4, "exact")
    second = opened(store_as="")
    cache, n_restored = second.restore(PROMPT)
    assert n_restored == 4 * BLOCK
    prefill(model, cache, TOKENS[n_restored:])
    # The fifth block is held exactly, computed on an exact prefix: ours is no better.
    assert offload(second, TOKENS, cache) == 2
    assert [block.lineage for block in held(second)] == [EXACT] * 5 + [COMPACTED] * 2
    assert kinds(second) == [COMPACTED] * 4 + [EXACT] + [CODED] * 2
    assert opened(floor=CODED, store_as="").restore(TOKENS)[1] == 0
    # Of what the daemon has lost since, only the exact tail is offered; it is refused, for its parents are gone.
    second.client.delete(second.client.chain(TOKENS))
    assert second.offload(TOKENS, cache) == 3
    assert second.flush(timeout=60)
    assert second.counts.refused == 3
    assert not held(second)


def test_a_copy_that_goes_on_is_offloaded_like_the_first(llama: tuple[Any, ModelSpec], opened: Open) -> None:
    model, _ = llama
    offload(opened(), PROMPT, computed(model, PROMPT))
    store = opened(store_as="")
    server_cache = OffloadingPromptCache(lambda _key: store)
    cache, rest = server_cache.fetch_nearest_cache("model", TOKENS)
    assert len(rest) == len(TOKENS) - 5 * BLOCK
    prefill(model, cache, rest)
    server_cache.insert_cache("model", TOKENS, cache)
    again, rest = server_cache.fetch_nearest_cache("model", TOKENS)
    assert again is not None
    assert (rest, again[0].offset) == (TOKENS[-1:], len(TOKENS) - 1)  # the exact tail can be cut
    more, rest = server_cache.fetch_nearest_cache("model", [*TOKENS, *TOKENS[: BLOCK + 4]])
    assert more is not None
    assert (rest, more[0].n_exact) == (TOKENS[: BLOCK + 4], len(TOKENS) - 5 * BLOCK)
    shorter, rest = server_cache.fetch_nearest_cache("model", TOKENS[: 4 * BLOCK])
    assert shorter is not None
    assert (len(rest), shorter[0].offset) == (BLOCK, 3 * BLOCK)  # restored: mlx-lm's own could not be cut
    prefill(model, more, TOKENS[: BLOCK + 4])
    assert offload(store, [*TOKENS, *TOKENS[: BLOCK + 4]], more) == 3


def test_what_is_put_to_be_compacted_comes_with_its_ratio_and_queries(
    llama: tuple[Any, ModelSpec], opened: Open, shared_daemon: DaemonProcess
) -> None:
    model, _ = llama
    before = [counter(shared_daemon, "compacted_blocks", queries=source) for source in ("engine", "bundle")]
    store = opened(store_as="compacted-x16", am_ratio=2.5)
    assert offload(store, TOKENS, computed(model, TOKENS)) == 7
    found = {(block.fidelity.profile, block.fidelity.am_ratio) for block in held(store)}
    assert (kinds(store), found) == ([COMPACTED] * 7, {("x16", 2.5)})
    after = [counter(shared_daemon, "compacted_blocks", queries=source) for source in ("engine", "bundle")]
    # Every eighth token is sampled; after the last block there are too few.
    assert [b - a for a, b in zip(before, after, strict=True)] == [6, 1]


@pytest.mark.parametrize("weight", [0.0, np.nan, np.inf], ids=["all equal", "not a number", "infinite"])
def test_in_place_of_queries_that_say_nothing_the_bundles_are_used_and_that_is_counted(
    llama: tuple[Any, ModelSpec], opened: Open, shared_daemon: DaemonProcess, weight: float
) -> None:
    model, _ = llama
    store, sources = opened(), ("engine", "unusable", "bundle")
    before = [counter(shared_daemon, "compacted_blocks", queries=source) for source in sources]
    asking = [layer.self_attn.q_proj for layer in model.layers[0 if weight == 0 else -1 :]]
    weights = [projection.weight for projection in asking]
    for projection in asking:  # of the last layer none but the queries can be what no number is
        projection.weight = mx.full(projection.weight.shape, weight, projection.weight.dtype)
    cache = computed(model, TOKENS)
    for projection, right in zip(asking, weights, strict=True):
        projection.weight = right
    assert offload(store, TOKENS, cache) == 7
    assert kinds(store) == [COMPACTED] * 7
    after = [counter(shared_daemon, "compacted_blocks", queries=source) for source in sources]
    assert [b - a for a, b in zip(before, after, strict=True)] == [0, 6, 1]
    restored, n_restored = store.restore([*TOKENS, 1])
    assert n_restored == 6 * BLOCK
    assert mx.all(mx.isfinite(prefill(model, restored, TOKENS[n_restored:])))


def test_what_would_not_be_restored_is_not_compacted(
    llama: tuple[Any, ModelSpec], shared_daemon: DaemonProcess, caplog: pytest.LogCaptureFixture
) -> None:
    model, spec = llama
    for floor in (CODED, EXACT):
        caplog.clear()
        policy = Policy(floor=floor, store_as="compacted-x8", am_ratio=2.0)
        store = PromptStore(model, Client(spec, target=shared_daemon.target), policy=policy)
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
