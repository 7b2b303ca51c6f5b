"""PromptStore: offload prompt caches of one loaded model to a daemon, and restore them. Fails open, never waits.

`offload` and `restore` belong to the thread that generates, for mlx arrays may be touched nowhere else; blocks are
copied there and sent from a background thread, through a queue bounded in bytes. What does not fit is dropped, counted
and logged.
"""

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kvcached_client import Block, Client, Match
from kvcached_client._proto import kvcached_pb2 as pb

from . import blocks
from .fingerprint import fresh_cache
from .tree import UnsupportedCacheError

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Counts:
    """Blocks since the start."""

    sent: int = 0
    held: int = 0  # of those sent, already with the daemon
    refused: int = 0
    dropped: int = 0


class PromptStore:
    """Prompt caches of one model in one daemon and namespace.

    make_cache gives an empty prompt cache of the classes that the client's spec describes.
    """

    def __init__(
        self,
        model: Any,
        client: Client,
        *,
        make_cache: Callable[[], list[Any]] | None = None,
        queue_bytes: int = 1 << 30,
    ) -> None:
        self.spec, self.client = client.spec, client
        self.counts = Counts()
        self._make_cache = make_cache or (lambda: fresh_cache(model))
        self._limit_bytes = queue_bytes
        self._state = threading.Condition()  # guards what follows, and the counts
        self._waiting_bytes = 0
        self._held: set[bytes] = set()  # blocks that the daemon has, as far as we know: not taken again
        self._queue: queue.SimpleQueue[list[Block] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._send_all, name="kvcached-sender", daemon=True)
        self._thread.start()

    # ---- in

    def restore(self, token_ids: Sequence[int]) -> tuple[list[Any], int]:
        """A prompt cache with the longest prefix that the daemon has, and its number of tokens.

        At least one token is left to feed. (empty cache, 0) for a miss, for whatever reason.
        """
        hashes = self.client.chain(token_ids[:-1])
        match = self.client.match(hashes)
        with self._state:
            self._held.difference_update(hashes[len(match.blocks) :])  # what has left there may be offloaded again
        n_blocks = self._usable(match)
        fetched: list[Block] = []
        for block in self.client.get(hashes[:n_blocks]) if n_blocks else ():
            if block is None:
                break
            fetched.append(block)
        if self.spec.needs_boundary and len(fetched) < n_blocks:
            fetched = []  # the state was in the last block
        cache = self._make_cache()
        if not fetched:
            return cache, 0
        try:
            blocks.from_blocks(self.spec, fetched, cache)
        except UnsupportedCacheError as error:
            log.warning("restored blocks do not fit, taken as a miss: %s", error)
            return self._make_cache(), 0
        with self._state:
            self._held.update(block.block_hash for block in fetched)
        return cache, len(fetched) * self.spec.block_size

    def _usable(self, match: Match) -> int:
        """How many blocks of a match can be used: all, or up to the last one with the state of all layers."""
        if not self.spec.needs_boundary:
            return len(match.blocks)
        return max((i + 1 for i, block in enumerate(match.blocks) if block.boundary), default=0)

    # ---- out

    def offload(self, token_ids: Sequence[int], cache: Sequence[Any]) -> int:
        """Takes the full blocks of a prompt cache that holds exactly `token_ids`; how many were queued.

        Blocks that the daemon is known to have are not taken again.
        """
        hashes = self.client.chain(token_ids)
        with self._state:
            held = set(self._held)
        try:
            taken = blocks.to_blocks(self.spec, token_ids, hashes, cache, wanted=lambda block: block not in held)
        except UnsupportedCacheError as error:
            log.warning("prompt cache of %d tokens not offloaded: %s", len(token_ids), error)
            return 0
        if not taken:
            return 0
        n_bytes = _n_bytes(taken)
        with self._state:
            if self._waiting_bytes and self._waiting_bytes + n_bytes > self._limit_bytes:
                self.counts.dropped += len(taken)
                log.warning("%d blocks dropped: %d bytes wait to be sent already", len(taken), self._waiting_bytes)
                return 0
            self._waiting_bytes += n_bytes
        self._queue.put(taken)
        return len(taken)

    def flush(self, timeout: float | None = None) -> bool:
        """Waits until everything offloaded was answered; whether that came in time."""
        with self._state:
            return self._state.wait_for(lambda: not self._waiting_bytes, timeout)

    def close(self, timeout: float | None = 30.0) -> None:
        """Sends what waits, and stops."""
        self.flush(timeout)
        self._queue.put(None)
        self._thread.join(timeout)

    def _send_all(self) -> None:
        while (taken := self._queue.get()) is not None:
            try:
                self._send(taken)
            except Exception:
                log.exception("sending failed")  # the thread must live: inference knows nothing of it
            finally:
                with self._state:
                    self._waiting_bytes -= _n_bytes(taken)
                    self._state.notify_all()

    def _send(self, taken: list[Block]) -> None:
        results = self.client.put(taken)
        answered = [result for result in results if result.code == "OK"]
        with self._state:
            self._held.update(result.block_hash for result in answered)
            self.counts.sent += len(answered)
            self.counts.held += sum(result.outcome == pb.OUTCOME_ALREADY_HELD for result in answered)
            self.counts.refused += len(results) - len(answered)
            if len(answered) < len(results):
                self._held.clear()  # perhaps a parent that we thought held has left
        for result in results:
            if result.code != "OK":
                log.warning("block %s refused: %s %s", result.block_hash.hex()[:16], result.code, result.message)
                break  # its descendants share its fate


def _n_bytes(taken: Sequence[Block]) -> int:
    return sum(array.nbytes for block in taken for array in block.tensors.values())
