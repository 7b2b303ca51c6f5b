"""The thread that generates never waits for the daemon: told by the order of events and by threads, not by a clock."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_models import build, prefill, save
from support import DaemonProcess

from kvcached_client import Client, Limits, ModelSpec, chain_hashes
from kvcached_mlx import PromptStore, fresh_cache, model_spec
from kvcached_mlx.blocks import take, to_blocks

BLOCK = 16
TOKENS = [int(t) for t in np.random.default_rng(3).integers(0, 64, 5 * BLOCK + 3)]


@pytest.fixture(params=[mx.float16, mx.bfloat16], ids=["float16", "bfloat16"])
def llama(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, ModelSpec]:
    model, config = build("llama", request.param)
    return model, model_spec(model, save(model, config, tmp_path), block_size=BLOCK)


class HeldClient(Client):
    """A client whose puts wait for `gate`; notes every call with its thread."""

    def __init__(self, spec: ModelSpec, target: str, limits: Limits | None = None) -> None:
        super().__init__(spec, target=target, limits=limits)
        self.gate, self.is_putting = threading.Event(), threading.Event()
        self.calls: list[tuple[str, str]] = []
        self.put_sizes: list[int] = []

    def match(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append(("match", threading.current_thread().name))
        return super().match(*args, **kwargs)

    def announce(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append(("announce", threading.current_thread().name))
        return super().announce(*args, **kwargs)

    def put(self, blocks: Any, **kwargs: Any) -> Any:
        self.calls.append(("put", threading.current_thread().name))
        self.put_sizes.append(len(blocks))
        self.is_putting.set()
        assert self.gate.wait(60)
        return super().put(blocks, **kwargs)


@pytest.fixture
def client(llama: tuple[Any, ModelSpec], daemon: DaemonProcess) -> Iterator[HeldClient]:
    client = HeldClient(llama[1], daemon.target)
    yield client
    client.gate.set()


def computed(model: Any, tokens: list[int]) -> list[Any]:
    cache = fresh_cache(model)
    prefill(model, cache, tokens)
    return cache


def prompt(number: int) -> list[int]:
    """One that shares no block with others."""
    return [t ^ number for t in TOKENS]


def bytes_of(model: Any) -> int:
    """That an offload of such a prompt is counted with."""
    return sum(array[:, :, : 5 * BLOCK].nbytes for entry in computed(model, TOKENS) for array in entry.state[:2])


@pytest.fixture
def opened(llama: tuple[Any, ModelSpec], client: HeldClient) -> Iterator[Callable[[int], PromptStore]]:
    """A store with room for so many prompts, while the first is being sent."""
    stores = []

    def make(n_prompts: int) -> PromptStore:
        store = PromptStore(llama[0], client, queue_bytes=n_prompts * bytes_of(llama[0]))
        stores.append(store)
        assert store.offload(prompt(0), computed(llama[0], prompt(0))) == 5
        assert client.is_putting.wait(30)
        return store

    yield make
    client.gate.set()
    for store in stores:
        store.close()


def n_held(store: PromptStore, number: int) -> int:
    return len(store.client.match(store.client.chain(prompt(number))).blocks)


def test_nothing_is_asked_on_the_thread_that_offloads(client: HeldClient, opened: Callable[[int], PromptStore]) -> None:
    client.gate.set()
    store = opened(2)
    assert store.flush(timeout=60)
    assert {call for call, _ in client.calls} >= {"match", "put"}
    assert {thread for _, thread in client.calls} == {"kvcached-sender"}
    assert n_held(store, 0) == 5


def test_while_a_daemon_hangs_an_engine_offloads_and_generates(
    llama: tuple[Any, ModelSpec], client: HeldClient, opened: Callable[[int], PromptStore]
) -> None:
    model, store = llama[0], opened(3)
    cache, events = computed(model, prompt(1)), []
    assert store.offload(prompt(1), cache) == 5
    events.append("offloaded")
    prefill(model, cache, TOKENS)
    events.append("generated")
    assert store.counts.sent == 0
    client.gate.set()
    assert store.flush(timeout=60)
    assert (events, store.counts.sent, store.counts.dropped) == (["offloaded", "generated"], 10, 0)
    restored, n_tokens = store.restore([*prompt(1), 1])
    assert n_tokens == 5 * BLOCK
    expected, rest = computed(model, prompt(1)[:n_tokens]), prompt(1)[n_tokens:]
    assert mx.array_equal(prefill(model, restored, rest), prefill(model, expected, rest))


def test_the_oldest_that_waits_is_dropped_and_counted(
    llama: tuple[Any, ModelSpec], client: HeldClient, opened: Callable[[int], PromptStore]
) -> None:
    model, store = llama[0], opened(3)
    for number in (1, 2, 3, 4):
        assert store.offload(prompt(number), computed(model, prompt(number))) == 5
    assert store.counts.dropped == 10
    client.gate.set()
    assert store.flush(timeout=60)
    assert [n_held(store, number) for number in range(5)] == [5, 0, 0, 5, 5]
    assert (store.counts.sent, store.counts.dropped) == (15, 10)


def test_what_waits_never_takes_more_bytes_than_it_may(
    llama: tuple[Any, ModelSpec], client: HeldClient, opened: Callable[[int], PromptStore]
) -> None:
    model, store = llama[0], opened(2)
    sender, n_bytes = store._sender, bytes_of(model)
    assert sender.n_bytes == n_bytes
    for number in range(1, 6):
        shorter = prompt(number)[: BLOCK * number]
        store.offload(shorter, computed(model, shorter))
        assert n_bytes < sender.n_bytes <= 2 * n_bytes
    client.gate.set()
    assert store.flush(timeout=60)
    assert sender.n_bytes == 0


def test_what_does_not_fit_beside_what_is_being_sent_is_dropped_and_nothing_else_for_it(
    llama: tuple[Any, ModelSpec], client: HeldClient, opened: Callable[[int], PromptStore]
) -> None:
    model, store = llama[0], opened(2)
    assert store.offload(prompt(1)[:BLOCK], computed(model, prompt(1)[:BLOCK])) == 1
    longer = prompt(2) * 2
    assert store.offload(longer, computed(model, longer)) == 0
    assert store.counts.dropped == 10
    client.gate.set()
    assert store.flush(timeout=60)
    assert store.counts.sent == 6


def test_one_prompt_is_let_in_however_large(llama: tuple[Any, ModelSpec], client: HeldClient) -> None:
    client.gate.set()
    store = PromptStore(llama[0], client, queue_bytes=1)
    assert store.offload(TOKENS, computed(llama[0], TOKENS)) == 5
    assert store.flush(timeout=60)
    assert (store.counts.sent, store.counts.dropped) == (5, 0)
    store.close()


def test_a_long_prompt_is_sent_in_parts_of_what_may_be_in_flight(
    llama: tuple[Any, ModelSpec], daemon: DaemonProcess
) -> None:
    model, spec = llama
    client = HeldClient(spec, daemon.target, Limits(in_flight_bytes=2 * bytes_of(model) // 5))
    client.gate.set()
    store = PromptStore(model, client)
    store.offload(TOKENS, computed(model, TOKENS))
    assert store.flush(timeout=60)
    assert client.put_sizes == [2, 2, 1]
    assert n_held(store, 0) == 5
    store.close()


def test_nothing_is_sent_behind_a_refused_block_and_all_of_it_is_counted(
    llama: tuple[Any, ModelSpec], run_dir: Path
) -> None:
    model, spec = llama
    client = HeldClient(spec, f"unix:{run_dir}/nobody.sock", Limits(in_flight_bytes=1))
    client.gate.set()
    store = PromptStore(model, client)
    store.offload(TOKENS, computed(model, TOKENS))
    assert store.flush(timeout=60)
    assert client.put_sizes == [1]
    assert (store.counts.sent, store.counts.refused) == (0, 5)
    store.close()


def test_closing_in_front_of_a_daemon_that_hangs_drops_what_waits_and_counts_it(
    llama: tuple[Any, ModelSpec], client: HeldClient, opened: Callable[[int], PromptStore]
) -> None:
    model, store = llama[0], opened(3)
    store.offload(prompt(1), computed(model, prompt(1)))
    store.close(timeout=0.05)
    assert store.counts.dropped == 10
    client.gate.set()
    assert store.flush(timeout=60)
    assert n_held(store, 1) == 0


def test_views_keep_a_cache_as_it_was_while_others_read_and_the_engine_goes_on(llama: tuple[Any, ModelSpec]) -> None:
    """Many rounds: a thread reads what was taken while the engine writes to the cache that it was taken from."""
    model, spec = llama
    cache, tokens = computed(model, TOKENS[: 2 * BLOCK]), TOKENS[: 2 * BLOCK]
    for turn in range(12):
        hashes = chain_hashes(tokens, BLOCK)
        expected = to_blocks(spec, tokens, hashes, cache)
        taken, found = take(spec, tokens, hashes, cache), []
        reader = threading.Thread(target=lambda taken=taken, found=found: found.extend(map(taken.block, taken.indices)))
        reader.start()
        more = [(7 * turn + i) % 64 for i in range(5)]
        prefill(model, cache, more, chunk=1)
        tokens = tokens + more
        reader.join(30)
        assert len(found) == len(hashes)
        for a, b in zip(found, expected, strict=True):
            assert all(a.tensors[name].tobytes() == b.tensors[name].tobytes() for name in b.tensors)
