"""PromptStore: offload prompt caches of one loaded model to a daemon, and restore them. Fails open, never waits.

`offload` and `restore` belong to the thread that generates, for mlx arrays may be touched nowhere else; blocks are
copied there and sent from a background thread, through a queue bounded in bytes. What does not fit is dropped, counted
and logged.
"""

import logging
import os
import queue
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kvcached_client import Block, Client, Match
from kvcached_client._proto import kvcached_pb2 as pb

from . import blocks
from .breakeven import BreakEven
from .fingerprint import fresh_cache
from .tree import UnsupportedCacheError

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Counts:
    """Blocks offloaded and tokens of prompts asked for, since the start."""

    sent: int = 0
    held: int = 0  # of those sent, already with the daemon
    refused: int = 0
    dropped: int = 0
    prompt_tokens: int = 0
    local_tokens: int = 0  # of those, at hand without the daemon
    restored_tokens: int = 0  # and restored; the rest was left to compute


class PromptStore:
    """Prompt caches of one model in one daemon and namespace.

    make_cache: gives an empty prompt cache of the classes that the client's spec describes.
    break_even: decides whether a held prefix is worth fetching; learns from each restore.
    min_tokens: shorter prefixes are not restored.
    name: of this engine, for the daemon's status.
    """

    def __init__(
        self,
        model: Any,
        client: Client,
        *,
        make_cache: Callable[[], list[Any]] | None = None,
        break_even: BreakEven | None = None,
        min_tokens: int = 0,
        queue_bytes: int = 1 << 30,
        name: str = "mlx-lm",
    ) -> None:
        self.spec, self.client = client.spec, client
        self.counts = Counts()
        self.break_even = break_even or BreakEven()
        self._name, self._min_tokens = name, min_tokens
        self._make_cache = make_cache or (lambda: fresh_cache(model))
        self._classes = [type(entry) for entry in self._make_cache()]
        self._limit_bytes = queue_bytes
        self._state = threading.Condition()  # guards what follows, and the counts
        self._waiting_bytes = 0
        self._closed = False
        self._on_their_way: set[bytes] = set()  # blocks that wait to be sent, or were and are not answered
        self._queue: queue.SimpleQueue[list[Block] | None] = queue.SimpleQueue()  # an empty list: only announce
        self._thread = threading.Thread(target=self._send_all, name="kvcached-sender", daemon=True)
        self._thread.start()

    # ---- in

    def restore(self, token_ids: Sequence[int], *, n_local: int = 0) -> tuple[list[Any], int]:
        """A prompt cache with the longest prefix that the daemon has, and its number of tokens.

        At least one token is left to feed. (empty cache, 0) for a miss, for whatever reason: nothing longer than the
        `n_local` tokens that the caller has anyway is held, or computing the rest is faster than fetching it all.
        """
        cache, n_tokens = self._make_cache(), 0
        if self._closed:
            return cache, n_tokens
        hashes = self.client.chain(token_ids[:-1])
        if len(hashes) * self.spec.block_size > n_local:
            fetched = self._fetch(hashes, n_local)
            try:
                if fetched:
                    start = time.perf_counter()
                    blocks.from_blocks(self.spec, fetched.blocks, cache)
                    n_tokens = len(fetched.blocks) * self.spec.block_size
                    self.break_even.restored(n_tokens, fetched.seconds + time.perf_counter() - start)
            except UnsupportedCacheError as error:
                log.warning("restored blocks do not fit, taken as a miss: %s", error)
                cache, n_tokens = self._make_cache(), 0
        with self._state:
            self.counts.prompt_tokens += len(token_ids)
            self.counts.local_tokens += 0 if n_tokens else n_local
            self.counts.restored_tokens += n_tokens
        self._queue.put([])
        return cache, n_tokens

    def _fetch(self, hashes: Sequence[bytes], n_local: int) -> "_Fetched | None":
        """The blocks to make a cache of; None if there are none, or if they do not pay."""
        start, request_id = time.perf_counter(), uuid.uuid4().hex[:16]
        match = self.client.match(hashes, request_id=request_id)
        n_blocks = self._usable(match)
        n_held = n_blocks * self.spec.block_size
        if n_held < self._min_tokens or not self.break_even.pays(n_local, n_held):
            return None
        timeout = self.break_even.patience(n_local, n_held)
        fetched: list[Block] = []
        for block in self.client.get(hashes[:n_blocks], request_id=request_id, timeout=timeout):
            if block is None:
                break
            fetched.append(block)
        n_fetched = len(fetched) * self.spec.block_size
        is_cut = len(fetched) < n_blocks and self.spec.needs_boundary  # the state was in the last block
        if is_cut or n_fetched <= n_local or n_fetched < self._min_tokens:
            return None
        seconds = time.perf_counter() - start
        log.info("restored %d tokens in %.3f s, request %s", n_fetched, seconds, request_id)
        return _Fetched(fetched, seconds)

    def _usable(self, match: Match) -> int:
        """How many blocks of a match can be used: all, or up to the last one with the state of all layers."""
        if not self.spec.needs_boundary:
            return len(match.blocks)
        return max((i + 1 for i, block in enumerate(match.blocks) if block.boundary), default=0)

    # ---- out

    def offload(self, token_ids: Sequence[int], cache: Sequence[Any]) -> int:
        """Takes the full blocks of a prompt cache that holds exactly `token_ids`; how many were queued.

        Blocks that the daemon has, or that are on their way, are not taken again.
        """
        if [type(entry) for entry in cache] != self._classes:
            log.warning("prompt cache of %d tokens not offloaded: not of the classes of this model", len(token_ids))
            return 0
        hashes = self.client.chain(token_ids)
        held = set(self.client.match(hashes, before_put=True).hashes)
        with self._state:
            held |= self._on_their_way
        try:
            taken = blocks.to_blocks(self.spec, token_ids, hashes, cache, wanted=lambda block: block not in held)
        except UnsupportedCacheError as error:
            log.warning("prompt cache of %d tokens not offloaded: %s", len(token_ids), error)
            return 0
        if not taken:
            return 0
        n_bytes = _n_bytes(taken)
        with self._state:
            if reason := self._no_room(n_bytes):
                self.counts.dropped += len(taken)
                log.warning("%d blocks dropped: %s", len(taken), reason)
                return 0
            self._waiting_bytes += n_bytes
            self._on_their_way.update(block.block_hash for block in taken)
            self._queue.put(taken)
        return len(taken)

    def _no_room(self, n_bytes: int) -> str:
        """Why nothing of this size can be queued; empty if it can."""
        if self._closed:
            return "the store is closed"
        too_much = self._waiting_bytes and self._waiting_bytes + n_bytes > self._limit_bytes
        return f"{self._waiting_bytes} bytes wait to be sent already" if too_much else ""

    def flush(self, timeout: float | None = None) -> bool:
        """Waits until everything offloaded was answered; whether that came in time."""
        with self._state:
            return self._state.wait_for(lambda: not self._waiting_bytes, timeout)

    def close(self, timeout: float | None = 30.0) -> None:
        """Sends what waits, and stops: from now on everything is dropped, and a miss."""
        with self._state:
            self._closed = True
        if not self.flush(timeout):
            with self._state:
                self.counts.dropped += len(self._on_their_way)
                log.warning("%d blocks dropped: nobody answered in time", len(self._on_their_way))
            return  # the thread is a daemon's: it ends with the process
        self._queue.put(None)
        self._thread.join(timeout)

    def _send_all(self) -> None:
        while (taken := self._queue.get()) is not None:
            try:
                if taken:
                    self._send(taken)
                if self._queue.empty():
                    self.announce()
            except Exception:
                log.exception("sending failed")  # the thread must live: inference knows nothing of it
            finally:
                with self._state:
                    self._on_their_way.difference_update(block.block_hash for block in taken)
                    self._waiting_bytes -= _n_bytes(taken)
                    self._state.notify_all()

    def _send(self, taken: list[Block]) -> None:
        request_id = uuid.uuid4().hex[:16]
        results = self.client.put(taken, request_id=request_id)
        answered = [result for result in results if result.code == "OK"]
        with self._state:
            self.counts.sent += len(answered)
            self.counts.held += sum(result.outcome == pb.OUTCOME_ALREADY_HELD for result in answered)
            self.counts.refused += len(results) - len(answered)
        log.info("offloaded %d of %d blocks, request %s", len(answered), len(results), request_id)
        for result in results:
            if result.code != "OK":
                log.warning("block %s refused: %s %s", result.block_hash.hex()[:16], result.code, result.message)
                break  # its descendants share its fate

    def announce(self) -> None:
        """Tells the daemon who this is and how it goes, for `kvcachedctl status`."""
        with self._state:
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
    """Consecutive blocks, and the seconds that they took to come."""

    blocks: list[Block]
    seconds: float


def _n_bytes(taken: Sequence[Block]) -> int:
    return sum(array.nbytes for block in taken for array in block.tensors.values())
