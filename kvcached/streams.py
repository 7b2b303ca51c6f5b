"""The two streams of the protocol: blocks coming in for Put, blocks going out for Get. No policy.

A Put is read in a thread of its own, so that results go out while blocks come in; a caller who does not take results is
not read from. Room in memory is reserved before a block's data is received, and before a block is decoded; what is
refused is read past. A caller who keeps an open stream waiting for too long is hung up on: streams hold threads, and a
block that was announced holds memory.
"""

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Hashable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

import grpc
import numpy as np
import structlog

from kvcached import border
from kvcached.block import Allocate, BlockId, KVBlock, fresh
from kvcached.cache import Cache, Fetch
from kvcached.encoding import Wish
from kvcached.errors import InvalidRequestError, KvcachedError, OverloadedError
from kvcached.lending import Lease, Lending, Slot
from kvcached.metrics import Metrics
from kvcached_client import protocol, tensors
from kvcached_client._proto import kvcached_pb2 as pb
from kvcached_client.hashing import HASH_BYTES
from kvcached_client.protocol import CHUNK_BYTES, Part

log = structlog.get_logger()
T = TypeVar("T")
_MAX_WAITING_RESULTS = 64  # of one Put
_SLOT_SECONDS, _SLOT_SECONDS_PER_BYTE = 0.002, 2e-9  # to wait for a slot: about what the stream would take
_MAX_VAIN_WAITS = 5


class Listener(Iterator[T]):
    """The messages of a stream, and since when the caller has kept us waiting for the next one."""

    def __init__(self, messages: Iterator[T], hang_up: Callable[[], Any]) -> None:
        self._messages, self.hang_up = messages, hang_up
        self.waits_since: float | None = None

    def __next__(self) -> T:
        self.waits_since = time.monotonic()
        try:
            return next(self._messages)
        finally:
            self.waits_since = None


class IdleWatch:
    """One thread that hangs up on callers who say nothing for `limit_seconds()`."""

    def __init__(self, limit_seconds: Callable[[], float]) -> None:
        self._limit_seconds = limit_seconds
        self._listeners: set[Listener[Any]] = set()
        self._lock = threading.Lock()
        threading.Thread(target=self._run, name="idle-watch", daemon=True).start()

    def enter(self, listener: Listener[Any], max_streams: int) -> None:
        """Raises OverloadedError if too many streams are open."""
        with self._lock:
            if len(self._listeners) >= max_streams:
                raise OverloadedError(f"{max_streams} streams are open, and no more are served: try later")
            self._listeners.add(listener)

    def leave(self, listener: Listener[Any]) -> None:
        with self._lock:
            self._listeners.discard(listener)

    def _run(self) -> None:
        while True:
            limit = self._limit_seconds()
            time.sleep(min(limit / 4, 5.0))
            with self._lock:
                listeners = list(self._listeners)
            for listener in listeners:
                since = listener.waits_since
                if since is not None and time.monotonic() - since > limit:
                    log.info("stream ended: nothing came", seconds=round(limit, 3))
                    listener.hang_up()


class Outbox:
    """What one thread hands to another, so much at a time; once closed, whatever comes is dropped."""

    def __init__(self) -> None:
        self._items: queue.Queue[Any] = queue.Queue(_MAX_WAITING_RESULTS)
        self._closed = threading.Event()
        self.take = self._items.get

    def put(self, item: Any) -> None:
        while not self._closed.is_set():
            try:
                self._items.put(item, timeout=0.5)
            except queue.Full:
                continue
            return

    def close(self) -> None:
        self._closed.set()


class PutReceiver:
    """The reading side of a Put stream, in a thread of its own."""

    def __init__(self, cache: Cache, lending: Lending, parts: Iterator[Part], client: Hashable = None) -> None:
        self._cache, self._lending, self._parts, self._client = cache, lending, parts, client

    def run(self, emit: Callable[[Any], None]) -> None:
        """Emits (header, future or error) for each block; an error of the stream; None at the end, always."""
        try:
            for part in self._parts:
                if not isinstance(part, pb.Header):
                    raise InvalidRequestError(f"expected a header, got {len(part)} bytes of data")
                emit((part, self._block(part)))
        except KvcachedError as error:
            emit(error)
        except grpc.RpcError as error:  # the caller is gone
            log.debug("put stream ended early", error=str(error))
        except Exception:
            log.exception("receiving failed")
            emit(KvcachedError("internal error, see the daemon's log"))
        finally:
            emit(None)

    def _block(self, header: pb.Header) -> "Future[tuple[pb.Outcome, pb.Entry]] | KvcachedError":
        """Admits a block, receives it and puts it. Raises InvalidRequestError if the stream cannot go on."""
        try:
            spec = self._cache.model(header.model_id)
            block_id, entry = border.entry_of(header, spec, self._cache.config.max_block_bytes)
            wish = Wish(border.store_as(header), header.store_as_bundle, border.am_ratio(header))
            entry.fidelity.CopyFrom(self._cache.choose(spec, entry, wish).to_proto())
            n_bytes = entry.source_bytes + border.queries_bytes(header)
            self._cache.pool.puts.take(n_bytes, client=self._client)
            payload = self._copied(header, n_bytes)
        except KvcachedError as error:
            self._cache.count_refused(error)
            self._skip(0 if header.HasField("slot") else header.data_bytes)
            return error
        try:
            if payload is None:
                payload = protocol.read_payload(self._parts, header.data_bytes)
            arrays = tensors.views(header.tensors, payload)
            queries = arrays.pop(border.QUERIES, None)
            block = KVBlock.dense(arrays, header.n_tokens, header.first_position)
        except ValueError as error:
            self._cache.pool.puts.give_back(n_bytes, self._client)
            raise InvalidRequestError(str(error)) from None
        except BaseException:
            self._cache.pool.puts.give_back(n_bytes, self._client)
            raise
        self._cache.metrics.moved_blocks.labels("Put", _road(header.HasField("slot"))).inc()
        return self._cache.put(block_id, entry, block, queries, self._client)

    def _copied(self, header: pb.Header, n_bytes: int) -> np.ndarray | None:
        """The data of a block that lies in a slot; None if it is in the stream. What is refused gives its room back."""
        if not header.HasField("slot"):
            return None
        try:
            return self._lending.copied(header.lease, header.slot, header.data_bytes)
        except BaseException:
            self._cache.pool.puts.give_back(n_bytes, self._client)
            raise

    def _skip(self, n_bytes: int) -> None:
        """Reads past the data of a refused block."""
        while n_bytes > 0 and (part := next(self._parts, None)) is not None:
            if isinstance(part, pb.Header) or len(part) > n_bytes:
                raise InvalidRequestError(f"{n_bytes} bytes of data expected, got {protocol.describe_part(part)}")
            n_bytes -= len(part)


def put_result(header: pb.Header, answer: "Future[tuple[pb.Outcome, pb.Entry]] | KvcachedError") -> pb.PutResult:
    try:
        if isinstance(answer, KvcachedError):
            raise answer
        outcome, entry = answer.result()
    except KvcachedError as error:
        request_id = border.printable(header.request_id)
        reason = border.brief(str(error))
        log.info("block refused", block=header.block_hash[:8].hex(), request_id=request_id, reason=reason)
        return pb.PutResult(
            block_hash=header.block_hash[:HASH_BYTES],
            outcome=pb.OUTCOME_REFUSED,
            code=error.code,
            message=border.brief(str(error)),
        )
    return pb.PutResult(
        block_hash=header.block_hash,
        outcome=outcome,
        code="OK",
        source_bytes=entry.source_bytes,
        stored_bytes=entry.stored_bytes,
        fidelity=entry.fidelity,
    )


class Road:
    """Where the blocks of one request of a Get are decoded: in slots of the caller's lease, while some are free."""

    def __init__(self, lease: Lease | None, metrics: Metrics) -> None:
        self._lease, self._metrics = lease, metrics
        self._n_vain = 0

    def fetch(self, start: Callable[[Callable[[pb.Entry], Allocate]], Fetch], *, may_wait: bool) -> "Outgoing":
        """A block on its way; start: fetches into memory that it asks for.

        Raises OverloadedError, if the caller may not wait, where a slot will be free once others were sent.
        """
        slots: list[Slot] = []

        def memory_for(entry: pb.Entry) -> Allocate:
            if slot := self._slot(entry.source_bytes, may_wait):
                slots.append(slot)
            return slot.allocate if slot else fresh

        try:
            return Outgoing(start(memory_for), slots, self._metrics)
        except BaseException:
            for slot in slots:
                slot.give_back()
            raise

    def _slot(self, n_bytes: int, may_wait: bool) -> Slot | None:
        if self._lease is None or not 0 < n_bytes <= self._lease.get_bytes:
            return None
        patience = 0.0
        if self._n_vain < _MAX_VAIN_WAITS:  # or the caller keeps what it gets: each wait in vain halves the next
            patience = (_SLOT_SECONDS + _SLOT_SECONDS_PER_BYTE * n_bytes) / (1 << self._n_vain)
        slot = self._lease.take(n_bytes, patience if may_wait else 0.0)
        if slot is None and patience and not may_wait:
            raise OverloadedError("all slots are in use: send what is ready")
        self._n_vain += slot is None
        return slot


class Outgoing:
    """A block that is fetched, and the slot, if any, that it lies in; to be released once, sent or not."""

    def __init__(self, fetch: Fetch, slots: list[Slot], metrics: Metrics) -> None:
        self._fetch, self._slots, self._metrics = fetch, slots, metrics

    def parts(self, counts: Counter[str]) -> Generator[Part, None, bool]:
        """Header and data of one block, or the header of a miss; counted as "sent" or "missed". Whether it was sent."""
        try:
            found = self._fetch.found.result()
            counts["sent" if found else "missed"] += 1
            if not found:
                yield miss(self._fetch.block_id)
                return False
            entry, arrays = found[0], found[1].to_tensors()
            slot = next((slot for slot in self._slots if slot.fill(arrays)), None)
            self._metrics.moved_blocks.labels("Get", _road(slot is not None)).inc()
            if slot:
                self._slots.clear()  # from the header on it is the caller's
            yield from _block_parts(self._fetch.block_id, entry, arrays, slot)
            return True
        finally:
            self._fetch.release()
            self._return_slots()

    def abandon(self) -> None:
        """For one that is not going to be sent: see Fetch."""
        self._fetch.abandon()
        self._return_slots()

    def _return_slots(self) -> None:
        for slot in self._slots:  # not before the worker is done with it
            self._fetch.found.add_done_callback(lambda _, slot=slot: slot.give_back())  # type: ignore[misc]


def _road(is_segment: bool) -> str:
    return "segment" if is_segment else "in-band"


def miss(block_id: BlockId) -> pb.Header:
    """The header of a block that is not to be had."""
    return pb.Header(model_id=block_id.model_id, namespace=block_id.namespace, block_hash=block_id.block_hash)


def _block_parts(block_id: BlockId, entry: pb.Entry, arrays: tensors.Arrays, slot: Slot | None) -> Iterator[Part]:
    header = miss(block_id)
    described = tensors.describe(arrays)
    header.MergeFrom(
        pb.Header(
            found=True,
            parent_hash=entry.parent_hash,
            index=entry.index,
            n_tokens=entry.n_tokens,
            first_position=entry.first_position,
            fidelity=entry.fidelity,
            lineage=entry.lineage,
            boundary=entry.boundary,
            tensors=described,
            data_bytes=tensors.nbytes(described),
        )
    )
    if slot:
        header.slot = slot.offset
        yield header
        return
    yield header
    yield from tensors.pieces(arrays, CHUNK_BYTES)
