"""What waits to be sent to the daemon, and the thread that sends it. Whoever offers something never waits.

Offers are views of caches as they were: a block is copied only here, when it is known that the daemon lacks it. What
waits is bounded in bytes; for what comes new the oldest is dropped, a prompt at a time, for no block is of use without
those before it. Copies beside it take as much as the client has in flight, or one block.
"""

import logging
import threading
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvcached_client import Block, Client, FidelityKind
from kvcached_client._proto import kvcached_pb2 as pb

from .blocks import Taken
from .policy import Policy
from .queries import Sampled

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Counts:
    """Blocks offloaded and tokens of prompts asked for, since the start."""

    sent: int = 0
    held: int = 0  # of those sent, already with the daemon
    refused: int = 0
    dropped: int = 0  # never sent, whether the daemon had them or not
    prompt_tokens: int = 0
    local_tokens: int = 0  # of those, at hand without the daemon
    restored_tokens: int = 0  # and restored; the rest was left to compute
    restored_bytes: int = 0  # that those took in memory, in their caches, before anything was computed behind them


@dataclass(frozen=True, slots=True, eq=False)
class Offer:
    """Blocks of a prompt cache, by their indices, to be sent unless the daemon has them."""

    taken: Taken
    indices: Sequence[int]
    queries: Sampled | None = None
    n_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "n_bytes", self.taken.nbytes + (self.queries.nbytes if self.queries else 0))

    def block(self, index: int) -> Block:
        """A copy."""
        block = self.taken.block(index)
        return self.queries.beside(block) if self.queries else block


class Sender:
    """A queue of offers and its thread. `changed` guards the counts too. when_idle: called when nothing waits."""

    def __init__(
        self, client: Client, policy: Policy, counts: Counts, limit_bytes: int, when_idle: Callable[[], None]
    ) -> None:
        self._client, self._policy, self._counts = client, policy, counts
        self._limit_bytes, self._when_idle = limit_bytes, when_idle
        self.changed = threading.Condition()  # guards what follows
        self.closed = False
        self._waiting: deque[Offer] = deque()
        self._sending: Offer | None = None
        self._is_woken = False
        self._thread = threading.Thread(target=self._run, name="kvcached-sender", daemon=True)
        self._thread.start()

    # ---- for the thread that generates

    def offer(self, offer: Offer) -> bool:
        """Whether an offer was taken; older ones are dropped for it. One is let in alone, however large."""
        with self.changed:
            sending_bytes = self._sending.n_bytes if self._sending else 0
            if self.closed:
                self._dropped(offer, "the store is closed")
                return False
            if sending_bytes and sending_bytes + offer.n_bytes > self._limit_bytes:
                self._dropped(offer, f"{sending_bytes} bytes are being sent already")
                return False
            while self._waiting and self.n_bytes + offer.n_bytes > self._limit_bytes:
                self._dropped(self._waiting.popleft(), "newer ones take their place")
            self._waiting.append(offer)
            self.changed.notify_all()
            return True

    @property
    def n_bytes(self) -> int:
        """Of what waits or is being sent."""
        under_way = [*self._waiting, *([self._sending] if self._sending else [])]
        return sum(offer.n_bytes for offer in under_way)

    def wake(self) -> None:
        """Has `when_idle` called soon."""
        with self.changed:
            self._is_woken = True
            self.changed.notify_all()

    def flush(self, timeout: float | None = None) -> bool:
        """Waits until all that was taken is answered; whether that came in time."""
        with self.changed:
            return self.changed.wait_for(lambda: not (self._waiting or self._sending), timeout)

    def close(self, timeout: float | None) -> None:
        """Sends what waits, as long as there is time, and stops."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()
        if self.flush(timeout):
            self._thread.join(timeout)
            return
        with self.changed:  # the thread is a daemon's: it ends with the process
            for offer in [*self._waiting, *([self._sending] if self._sending else [])]:
                self._dropped(offer, "nobody answered in time")
            self._waiting.clear()

    def _dropped(self, offer: Offer, reason: str) -> None:
        self._counts.dropped += len(offer.indices)
        log.warning("%d blocks dropped: %s", len(offer.indices), reason)

    # ---- the thread that sends

    def _run(self) -> None:
        while self._next():
            try:
                if self._sending:
                    self._send(self._sending)
                if not self._waiting:
                    self._when_idle()
            except Exception:
                log.exception("sending failed")  # the thread must live: inference knows nothing of it
            finally:
                with self.changed:
                    self._sending = None
                    self.changed.notify_all()

    def _next(self) -> bool:
        """Waits for something to do, and takes the oldest; False at the end."""
        with self.changed:
            self.changed.wait_for(lambda: self._waiting or self._is_woken or self.closed)
            has_work = bool(self._waiting) or self._is_woken
            self._sending = self._waiting.popleft() if self._waiting else None
            self._is_woken = False
            return has_work

    def _send(self, offer: Offer) -> None:
        """Copies what the daemon lacks and puts it, part by part; what follows a refused block shares its fate."""
        held, request_id = self._held(offer), uuid.uuid4().hex[:16]
        missing = [i for i in offer.indices if offer.taken.hashes[i] not in held or offer.taken.has_state(i)]
        n_at_once = max(1, self._client.limits.in_flight_bytes // offer.taken.block_bytes)
        for start in range(0, len(missing), n_at_once):
            part = missing[start : start + n_at_once]
            results = self._client.put([offer.block(i) for i in part], **self._wish(), request_id=request_id)
            if not self._count(results, n_behind=len(missing) - start - len(part)):
                return
        log.info("offloaded %d blocks, request %s", len(missing), request_id)

    def _held(self, offer: Offer) -> set[bytes]:
        """The blocks that need not be put."""
        hashes, lineages = offer.taken.hashes, offer.taken.lineages
        lowest = FidelityKind.COMPACTED
        match = self._client.match(hashes, floor=lowest, accepts_compacted=True, before_put=True)
        return self._policy.held(match, lineages)

    def _wish(self) -> dict[str, Any]:
        wish: dict[str, Any] = {"store_as": self._policy.store_as, "min_fidelity": self._policy.least_stored}
        if self._policy.compacts and self._policy.am_ratio:
            wish["am_ratio"] = self._policy.am_ratio
        return wish

    def _count(self, results: Sequence[pb.PutResult], n_behind: int) -> bool:
        """Whether all were accepted; if not, neither are the blocks that would have come behind them."""
        refused = [result for result in results if result.code != "OK"]
        with self.changed:
            self._counts.sent += len(results) - len(refused)
            self._counts.held += sum(result.outcome == pb.OUTCOME_ALREADY_HELD for result in results)
            self._counts.refused += len(refused) + (n_behind if refused else 0)
        for result in refused[:1]:
            log.warning("block %s refused: %s %s", result.block_hash.hex()[:16], result.code, result.message)
        return not refused
