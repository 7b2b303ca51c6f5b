"""The server's prompt cache: what reaches the daemon and when, what comes back, and that mlx-lm's own always answers.

Where a daemon would add nothing, a store that records what it is asked stands in for it.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_models import build, prefill, save
from support import DaemonProcess

from kvcached_client import ModelSpec
from kvcached_mlx import PromptStore, fresh_cache, model_spec
from kvcached_mlx.prompt_cache import OffloadingPromptCache

BLOCK = 16
KEY = ("path", None, None)  # mlx-lm's, of a loaded model
FIRST = [int(t) for t in np.random.default_rng(3).integers(0, 64, 3 * BLOCK + 2)]
SECOND = [int(t) for t in np.random.default_rng(4).integers(0, 64, 2 * BLOCK + 5)]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ModelSpec]:
    model, config = build("llama")
    return model, model_spec(model, save(model, config, tmp_path_factory.mktemp("llama")), block_size=BLOCK)


@pytest.fixture
def store(llama: tuple[Any, ModelSpec], daemon: DaemonProcess) -> Iterator[PromptStore]:
    model, spec = llama
    with daemon.client(spec) as client:
        store = PromptStore(model, client)
        yield store
        store.close()


class Recorder:
    """A store that holds nothing and remembers what it was asked."""

    def __init__(self) -> None:
        self.offloaded: list[list[int]] = []
        self.asked: list[tuple[int, int]] = []  # tokens of the prompt, and how many were at hand
        self.waited: list[float] = []

    def restore(self, tokens: list[int], *, n_local: int) -> tuple[list[Any], int]:
        self.asked.append((len(tokens), n_local))
        return [], 0

    def offload(self, tokens: list[int], _cache: list[Any]) -> int:
        self.offloaded.append(tokens)
        return 1

    def flush(self, timeout: float) -> bool:
        self.waited.append(timeout)
        return True


class Broken(Recorder):
    """A store in which nothing works."""

    def restore(self, *_: Any, **__: Any) -> tuple[list[Any], int]:
        raise RuntimeError("restore is broken")

    def offload(self, *_: Any) -> int:
        raise RuntimeError("offload is broken")


def behind(store: Any, max_size: int = 1, **options: Any) -> OffloadingPromptCache:
    return OffloadingPromptCache(lambda _key: store, max_size, **options)


def computed(model: Any, tokens: list[int]) -> list[Any]:
    cache = fresh_cache(model)
    prefill(model, cache, tokens)
    return cache


def continues_alike(model: Any, cache: list[Any], rest: list[int], tokens: list[int]) -> bool:
    """Whether feeding the rest gives what computing the prompt in the same pieces gives."""
    expected = computed(model, tokens[: len(tokens) - len(rest)])
    return bool(mx.array_equal(prefill(model, cache, rest), prefill(model, expected, rest)))


# ---- with a daemon


def test_what_is_evicted_comes_back_from_the_daemon(llama: tuple[Any, ModelSpec], store: PromptStore) -> None:
    model, _ = llama
    cache = behind(store)
    cache.insert_cache(KEY, FIRST, computed(model, FIRST))
    assert store.counts.sent == 0
    cache.insert_cache(KEY, SECOND, computed(model, SECOND))  # evicts the first
    assert store.flush(timeout=30)
    assert store.counts.sent == 3
    prompt = [*FIRST, 1, 2, 3]
    restored, rest = cache.fetch_nearest_cache(KEY, prompt)
    assert restored is not None
    assert rest == prompt[3 * BLOCK :]
    assert continues_alike(model, restored, rest, prompt)


def test_a_longer_prefix_at_hand_is_taken_before_the_daemons(llama: tuple[Any, ModelSpec], store: PromptStore) -> None:
    model, _ = llama
    store.offload(FIRST, computed(model, FIRST))
    assert store.flush(timeout=30)
    cache = behind(store)
    cache.insert_cache(KEY, FIRST, computed(model, FIRST))
    local, rest = cache.fetch_nearest_cache(KEY, [*FIRST, 1, 2, 3])
    assert local is not None
    assert (local[0].offset, rest) == (len(FIRST), [1, 2, 3])
    assert (store.counts.local_tokens, store.counts.restored_tokens) == (len(FIRST), 0)


def test_a_prompt_that_the_daemon_holds_to_its_last_token_leaves_a_block_to_feed(
    llama: tuple[Any, ModelSpec], store: PromptStore
) -> None:
    """At least one token must be fed, and only whole blocks are held."""
    model, _ = llama
    prompt = FIRST[: 3 * BLOCK]
    store.offload(prompt, computed(model, prompt))
    assert store.flush(timeout=30)
    restored, rest = behind(store).fetch_nearest_cache(KEY, prompt)
    assert restored is not None
    assert rest == prompt[2 * BLOCK :]
    assert continues_alike(model, restored, rest, prompt)


# ---- what is offloaded


def test_an_entry_that_a_longer_one_replaces_is_not_offloaded(llama: tuple[Any, ModelSpec]) -> None:
    """The longer one holds all of it."""
    model, _ = llama
    store = Recorder()
    cache = behind(store)
    longer = [*FIRST, 1, 2, 3]
    cache.insert_cache(KEY, FIRST, computed(model, FIRST))
    cache.insert_cache(KEY, longer, computed(model, longer))
    assert (len(cache), store.offloaded) == (1, [])
    cache.insert_cache(KEY, SECOND, computed(model, SECOND))
    assert store.offloaded == [longer]


def test_each_answer_is_offloaded_where_that_is_wanted(llama: tuple[Any, ModelSpec]) -> None:
    model, _ = llama
    store = Recorder()
    cache = behind(store, max_size=9, each_turn=True)
    cache.insert_cache(KEY, FIRST, computed(model, FIRST), cache_type="user")  # a prompt, whose answer is to come
    assert store.offloaded == []
    cache.insert_cache(KEY, SECOND, computed(model, SECOND))
    assert store.offloaded == [SECOND]


def test_at_the_end_everything_is_offloaded_until_the_deadline(llama: tuple[Any, ModelSpec]) -> None:
    model, _ = llama
    store = Recorder()
    cache = behind(store, max_size=9)
    for tokens in (FIRST, SECOND):
        cache.insert_cache(KEY, tokens, computed(model, tokens))
    cache.offload_all(time.monotonic() + 1000)
    assert sorted(store.offloaded) == sorted([FIRST, SECOND])
    assert len(cache) == 0
    first, second = store.waited  # for room in the queue
    assert 0 < second <= first <= 1000


def test_after_the_deadline_nobody_waits_for_room_any_more(llama: tuple[Any, ModelSpec]) -> None:
    model, _ = llama
    store = Recorder()
    cache = behind(store, max_size=9)
    for tokens in (FIRST, SECOND):
        cache.insert_cache(KEY, tokens, computed(model, tokens))
    cache.offload_all(time.monotonic() - 1)
    assert store.waited == [0.0, 0.0]
    assert len(cache) == 0


# ---- what is asked, and what mlx-lm's own cache answers


def test_the_daemon_is_asked_with_what_is_at_hand(llama: tuple[Any, ModelSpec]) -> None:
    model, _ = llama
    store = Recorder()
    cache = behind(store)
    assert cache.fetch_nearest_cache(KEY, FIRST) == (None, FIRST)
    cache.insert_cache(KEY, FIRST, computed(model, FIRST))
    local, rest = cache.fetch_nearest_cache(KEY, [*FIRST, 1, 2])
    assert local is not None
    assert (local[0].offset, rest) == (len(FIRST), [1, 2])
    assert store.asked == [(len(FIRST), 0), (len(FIRST) + 2, len(FIRST))]


@pytest.mark.parametrize("n_cached", [len(FIRST), len(FIRST) + 4], ids=["exactly", "and more"])
def test_a_prompt_at_hand_to_its_last_token_leaves_exactly_one_to_feed(
    n_cached: int, llama: tuple[Any, ModelSpec]
) -> None:
    model, _ = llama
    cache = behind(Recorder())
    cached = [*FIRST, 1, 2, 3, 4][:n_cached]
    cache.insert_cache(KEY, cached, computed(model, cached))
    local, rest = cache.fetch_nearest_cache(KEY, FIRST)
    assert local is not None
    assert (local[0].offset, rest) == (len(FIRST) - 1, FIRST[-1:])
    again, _ = cache.fetch_nearest_cache(KEY, cached)
    assert again is not None
    assert again[0].offset == n_cached - 1  # what was trimmed was a copy


def test_a_state_at_hand_to_the_last_token_is_computed_again(tmp_path: Path) -> None:
    """It cannot be trimmed, and the model must be fed something."""
    model, config = build("mamba2")
    model_spec(model, save(model, config, tmp_path), block_size=BLOCK)
    store = Recorder()
    cache = behind(store)
    cache.insert_cache(KEY, FIRST, computed(model, FIRST))
    assert cache.fetch_nearest_cache(KEY, FIRST) == (None, FIRST)
    assert store.asked == [(len(FIRST), 0)]


@pytest.mark.parametrize("tokens", [[], [5]], ids=["empty", "one token"])
def test_prompts_of_next_to_nothing_are_left_to_feed(tokens: list[int], llama: tuple[Any, ModelSpec]) -> None:
    model, _ = llama
    cache = behind(Recorder())
    assert cache.fetch_nearest_cache(KEY, tokens) == (None, tokens)
    cache.insert_cache(KEY, [5], computed(model, [5]))
    assert cache.fetch_nearest_cache(KEY, tokens) == (None, tokens)


def test_prompts_with_images_are_left_alone(llama: tuple[Any, ModelSpec]) -> None:
    """mlx-lm writes images into its keys as negative numbers, which name no token."""
    model, _ = llama
    store = Recorder()
    cache = behind(store, each_turn=True)
    with_image = [-7, *FIRST]
    cache.insert_cache(KEY, with_image, computed(model, FIRST))
    local, rest = cache.fetch_nearest_cache(KEY, [*with_image, 1, 2])
    assert local is not None
    assert rest == [1, 2]
    cache.offload_all(time.monotonic() + 1)
    assert (store.asked, store.offloaded) == ([], [])


def test_a_model_without_a_store_has_mlx_lms_cache(llama: tuple[Any, ModelSpec]) -> None:
    model, _ = llama
    cache = behind(None, each_turn=True)
    cache.insert_cache(KEY, FIRST, computed(model, FIRST))
    local, rest = cache.fetch_nearest_cache(KEY, [*FIRST, 1])
    assert local is not None
    assert rest == [1]
    cache.insert_cache(KEY, SECOND, computed(model, SECOND))
    assert cache.fetch_nearest_cache(KEY, [*FIRST, 1])[1] == [*FIRST, 1]
    cache.offload_all(time.monotonic() + 1)
    assert len(cache) == 0


def test_with_a_store_that_fails_mlx_lms_cache_answers(
    llama: tuple[Any, ModelSpec], caplog: pytest.LogCaptureFixture
) -> None:
    model, _ = llama
    cache = behind(Broken(), each_turn=True)
    cache.insert_cache(KEY, FIRST, computed(model, FIRST))
    cache.insert_cache(KEY, SECOND, computed(model, SECOND))  # evicts
    local, rest = cache.fetch_nearest_cache(KEY, [*SECOND, 1])
    assert local is not None
    assert (local[0].offset, rest) == (len(SECOND), [1])
    assert cache.fetch_nearest_cache(KEY, FIRST) == (None, FIRST)
    cache.offload_all(time.monotonic() + 1)
    assert len(cache) == 0
    assert "restore is broken" in caplog.text
    assert "offload is broken" in caplog.text


def test_a_model_that_was_loaded_anew_from_other_files_does_not_meet_its_old_cache(
    llama: tuple[Any, ModelSpec],
) -> None:
    """mlx-lm's key is a path; the store is another one."""
    model, _ = llama
    before, after = Recorder(), Recorder()
    current: list[Any] = [before]
    cache = OffloadingPromptCache(lambda _key: current[0], 1)
    cache.insert_cache(KEY, FIRST, computed(model, FIRST))
    current[0] = after
    assert cache.fetch_nearest_cache(KEY, [*FIRST, 1]) == (None, [*FIRST, 1])
    cache.insert_cache(KEY, SECOND, computed(model, SECOND))
    assert (before.offloaded, after.offloaded) == ([FIRST], [])
