"""mlx-lm's LRUPromptCache with a daemon behind it: what is evicted is offloaded, what is missed is restored.

Everything here runs on the thread that generates. Whatever goes wrong on our side leaves mlx-lm's own cache as it is.
"""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from mlx_lm.models.cache import LRUPromptCache, PromptTrie

from .compacted import cut
from .store import PromptStore

log = logging.getLogger(__name__)


class OffloadingPromptCache(LRUPromptCache):  # type: ignore[misc] # mlx_lm is untyped
    """The server's prompt cache.

    store_of: the PromptStore of a model key, None for a model whose cache is not offloaded.
    each_turn: offload after each answer too, not only what is evicted.
    """

    def __init__(
        self, store_of: Callable[[Any], PromptStore | None], *args: Any, each_turn: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._store_of, self._each_turn = store_of, each_turn
        self._trie = _WatchedTrie(self._evicted)
        self._deadline: float | None = None  # of a server that stops: until then it waits for room in the queue

    def fetch_nearest_cache(self, model: Any, tokens: list[int]) -> tuple[list[Any] | None, list[int]]:
        """mlx-lm's own nearest cache, or a longer one from the daemon; at least one token is left to feed."""
        # mlx-lm's key is a path, whose files may change between two loads; a store belongs to what they were.
        store = self._store_of(model)
        cache, rest = super().fetch_nearest_cache((model, store), tokens)
        if tokens and not rest:
            cache, rest = _without_last_token(cache, tokens)
        if store is None or not _is_text(tokens):
            return cache, rest
        try:
            restored, n_restored = store.restore(tokens, n_local=len(tokens) - len(rest))
        except Exception:
            log.exception("restoring failed, taken as a miss")
            return cache, rest
        return (restored, tokens[n_restored:]) if n_restored else (cache, rest)

    def insert_cache(
        self, model: Any, tokens: list[int], prompt_cache: list[Any], *, cache_type: str = "assistant"
    ) -> None:
        store = self._store_of(model)
        super().insert_cache((model, store), tokens, prompt_cache, cache_type=cache_type)
        if self._each_turn and cache_type == "assistant":
            self._offload(store, tokens, prompt_cache)

    def offload_all(self, deadline: float) -> None:
        """Offloads all that is held, and holds nothing any more. The last thing a server does, until `deadline`."""
        self._deadline = deadline
        self.trim_to(n_sequences=0)

    def _evicted(self, key: Any, tokens: list[int], prompt_cache: list[Any]) -> None:
        self._offload(key[1], tokens, prompt_cache)

    def _offload(self, store: PromptStore | None, tokens: list[int], prompt_cache: list[Any]) -> None:
        if store is None or not _is_text(tokens):
            return
        try:
            if self._deadline is not None:
                store.flush(max(self._deadline - time.monotonic(), 0.0))
            store.offload(tokens, prompt_cache)
        except Exception:
            log.exception("offloading failed")


class _WatchedTrie(PromptTrie):  # type: ignore[misc] # mlx_lm is untyped
    """Tells of entries that are popped to make room. Those replaced by a longer one leave by `pop_prefixes`."""

    def __init__(self, on_evicted: Callable[[Any, list[int], list[Any]], None]) -> None:
        super().__init__()
        self._on_evicted = on_evicted

    def pop(self, model: Any, tokens: list[int]) -> Any:
        entry = super().pop(model, tokens)
        self._on_evicted(model, tokens, entry.prompt_cache)
        return entry


def _without_last_token(cache: list[Any] | None, tokens: list[int]) -> tuple[list[Any] | None, list[int]]:
    """An exact hit, less its last token: the model must be fed something (mlx-lm forgets that)."""
    if cache is not None and len(tokens) > 1 and cut(cache, 1):
        return cache, tokens[-1:]
    return None, tokens


def _is_text(tokens: Sequence[int]) -> bool:
    """mlx-lm writes images into its keys as negative numbers."""
    return bool(tokens) and min(tokens) >= 0
