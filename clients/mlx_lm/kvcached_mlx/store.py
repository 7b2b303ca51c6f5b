"""PromptStore: offload prompt caches of one loaded model to a daemon, and restore them. Fails open, never waits.

`offload` and `restore` belong to the thread that generates, for mlx arrays may be touched nowhere else. Offloading asks
nobody and copies nothing: it takes views, which the background thread of sending.py reads, copies and sends. The engine
may go on, write or forget its cache: mlx writes elsewhere what somebody else still holds.
"""

import logging
import os
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_lm.models.cache import can_trim_prompt_cache

from kvcached_client import Block, Client, ModelSpec
from kvcached_client._proto import kvcached_pb2 as pb

from . import attention, blocks, queries
from .breakeven import BreakEven
from .compacted import CompactedKVCache, cut
from .fingerprint import fresh_cache
from .lineage import Lineage
from .policy import Policy, held_of
from .sending import Counts, Offer, Sender
from .tree import UnsupportedCacheError

log = logging.getLogger(__name__)


class PromptStore:
    """Prompt caches of one model in one daemon and namespace.

    make_cache: gives an empty prompt cache of the classes that the client's spec describes.
    policy: how much may be lost. What a model cannot take of it is left out: `self.policy` is what holds.
    break_even: decides whether a held prefix is worth fetching; learns from each restore.
    name: of this engine, for the daemon's status.
    """

    def __init__(
        self,
        model: Any,
        client: Client,
        *,
        make_cache: Callable[[], list[Any]] | None = None,
        policy: Policy | None = None,
        break_even: BreakEven | None = None,
        queue_bytes: int = 1 << 30,
        name: str = "mlx-lm",
    ) -> None:
        self.spec, self.client = client.spec, client
        self.counts = Counts()
        self.break_even = break_even or BreakEven()
        self._make_cache = make_cache or (lambda: fresh_cache(model))
        self.policy = _feasible(policy or Policy(), model, self.spec, self._make_cache)
        self._name, self._lineage = name, Lineage(self.spec.block_size)
        empty = self._make_cache()
        self._classes = [type(entry) for entry in empty]
        self._can_cut = can_trim_prompt_cache(empty) and not self.spec.needs_boundary
        self._sender = Sender(client, self.policy, self.counts, queue_bytes, self.announce)

    # ---- in

    def restore(self, token_ids: Sequence[int], *, n_local: int = 0) -> tuple[list[Any], int]:
        """A prompt cache with the longest prefix that the daemon has, and its number of tokens.

        At least one token is left to feed, and of a prefix that is not exact so many as the policy says. (empty cache,
        0) for a miss, for whatever reason: nothing longer than the `n_local` tokens that the caller has anyway is held,
        or computing the rest is faster than fetching it all.
        """
        cache, n_tokens, n_bytes = self._make_cache(), 0, 0
        if self._sender.closed:
            return cache, n_tokens
        try:
            fetched = self._fetch(token_ids, n_local)
            if fetched:
                start = time.perf_counter()
                blocks.from_blocks(self.spec, fetched.blocks, cache)
                if not cut(cache, len(fetched.blocks) * self.spec.block_size - fetched.n_tokens):
                    raise UnsupportedCacheError("the cache that they make cannot be cut")
                n_tokens = fetched.n_tokens
                self._lineage.restored(token_ids, fetched.blocks, n_tokens)
                n_bytes = sum(entry.nbytes for entry in cache)
                log.info("restored cache: %d tokens in %d active bytes", n_tokens, n_bytes)
                self.break_even.restored(n_tokens, fetched.seconds + time.perf_counter() - start)
        except UnsupportedCacheError as error:
            log.warning("restored blocks do not fit, taken as a miss: %s", error)
            cache, n_tokens, n_bytes = self._make_cache(), 0, 0
        with self._sender.changed:
            self.counts.prompt_tokens += len(token_ids)
            self.counts.local_tokens += 0 if n_tokens else n_local
            self.counts.restored_tokens += n_tokens
            self.counts.restored_bytes += n_bytes
        self._sender.wake()
        return cache, n_tokens

    def _fetch(self, token_ids: Sequence[int], n_local: int) -> "_Fetched | None":
        """The blocks to make a cache of; None if there are none, or if they do not pay."""
        hashes, size = self.client.chain(token_ids[:-1]), self.spec.block_size
        paying = max(self.break_even.least(n_local), self.policy.min_tokens - 1)
        if len(hashes) * size <= paying:
            return None
        start, request_id = time.perf_counter(), uuid.uuid4().hex[:16]
        came = self.client.get_longest_prefix(
            hashes,
            at_least=int(paying // size) + 1,
            floor=self.policy.floor,
            accepts_compacted=self.policy.accepts_compacted,
            request_id=request_id,
            timeout=self.break_even.patience(n_local, len(hashes) * size),
        )
        fetched = [blocks.own(block, for_mlx=not self.policy.accepts_compacted) for block in came]
        n_blocks, n_tokens = self._usable(fetched, len(token_ids))
        if n_tokens <= n_local or n_tokens < self.policy.min_tokens:
            return None
        seconds = time.perf_counter() - start
        log.info("restored %d tokens in %.3f s, request %s", n_tokens, seconds, request_id)
        return _Fetched(fetched[:n_blocks], n_tokens, seconds)

    def _usable(self, held: Iterable[pb.HeldBlock | Block], n_prompt: int) -> tuple[int, int]:
        return self.policy.usable([held_of(block) for block in held], n_prompt, self.spec, self._can_cut)

    # ---- out

    def offload(self, token_ids: Sequence[int], cache: Sequence[Any]) -> int:
        """Takes the full blocks of a prompt cache that holds exactly `token_ids`; how many were queued.

        Blocks that the daemon gave us at a loss are not taken, and those that it has are not sent.
        """
        if not self._is_ours(cache):
            log.warning("prompt cache of %d tokens not offloaded: not of the classes of this model", len(token_ids))
            return 0
        hashes = self.client.chain(token_ids)
        try:
            taken = blocks.take(self.spec, token_ids, hashes, cache, self._lineage.of(token_ids, hashes))
        except UnsupportedCacheError as error:
            log.warning("prompt cache of %d tokens not offloaded: %s", len(token_ids), error)
            return 0
        indices = [i for i in taken.indices if not self._lineage.was_given(hashes[i])]
        sampled = queries.sampled(self.spec, cache) if self.policy.compacts else None
        return len(indices) if indices and self._sender.offer(Offer(taken, indices, sampled)) else 0

    def _is_ours(self, cache: Sequence[Any]) -> bool:
        """Whether a prompt cache is of the classes of this model, dense layers perhaps restored compacted."""
        compacted = [isinstance(entry, CompactedKVCache) for entry in cache]
        if any(compacted) and compacted != [not layer.opaque for layer in self.spec.layers]:
            return False
        pairs = zip(cache, self._classes, strict=False)
        return len(cache) == len(self._classes) and all(
            ours or type(entry) is expected for ours, (entry, expected) in zip(compacted, pairs, strict=True)
        )

    def flush(self, timeout: float | None = None) -> bool:
        """Waits until everything offloaded was answered; whether that came in time."""
        return self._sender.flush(timeout)

    def close(self, timeout: float | None = 30.0) -> None:
        """Sends what waits, and stops: from now on everything is dropped, and a miss."""
        self._sender.close(timeout)

    def announce(self) -> None:
        """Tells the daemon who this is and how it goes, for `kvcachedctl status`."""
        with self._sender.changed:
            counts = self.counts
            engine = pb.Engine(
                name=self._name,
                pid=os.getpid(),
                prefill_tokens_per_second=self.break_even.prefill,
                restore_tokens_per_second=self.break_even.restore,
                prompt_tokens=counts.prompt_tokens,
                local_tokens=counts.local_tokens,
                restored_tokens=counts.restored_tokens,
                dropped_blocks=counts.dropped,
            )
        self.client.announce(engine)


@dataclass(frozen=True, slots=True)
class _Fetched:
    """Consecutive blocks, how many of their tokens to keep, and the seconds that they took to come."""

    blocks: list[Block]
    n_tokens: int
    seconds: float


def _feasible(policy: Policy, model: Any, spec: ModelSpec, make_cache: Callable[[], list[Any]]) -> Policy:
    """A policy that does not ask for compaction where a model cannot go on from it, or where its floor is higher."""
    if not (policy.accepts_compacted or policy.compacts):
        return policy
    reason = f"{policy.store_as} is below the floor of what is restored"
    if policy.accepts_compacted:
        reason = attention.supports(model, spec, make_cache)
    if not reason:
        attention.install(model, sampling=policy.compacts)
        return policy
    log.warning("nothing is compacted, and nothing compacted is restored: %s", reason)
    return policy.without_compaction()
