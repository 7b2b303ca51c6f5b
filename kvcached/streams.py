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
import structlog

from kvcached import border
from kvcached.block import BlockId, KVBlock
from kvcached.cache import Cache, Fetch
from kvcached.encoding import Wish
from kvcached.errors import InvalidRequestError, KvcachedError, OverloadedError
from kvcached_client import protocol, tensors
from kvcached_client._proto import kvcached_pb2 as pb
from kvcached_client.hashing import HASH_BYTES
from kvcached_client.protocol import CHUNK_BYTES, Part

log = structlog.get_logger()
T = TypeVar("T")
_MAX_WAITING_RESULTS = 64  # of one Put


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

    def __init__(self, cache: Cache, parts: Iterator[Part], client: Hashable = None) -> None:
        self._cache, self._parts, self._client = cache, parts, client

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
        except KvcachedError as error:
            self._cache.count_refused(error)
            self._skip(header.data_bytes)
            return error
        try:
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
        return self._cache.put(block_id, entry, block, queries, self._client)

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


def send_fetched(fetch: Fetch, counts: Counter[str]) -> Generator[Part, None, bool]:
    """Header and data of one block, or the header of a miss; counted as "sent" or "missed". Whether it was sent."""
    try:
        found = fetch.found.result()
        counts["sent" if found else "missed"] += 1
        if found:
            yield from _block_parts(fetch.block_id, *found)
        else:
            yield miss(fetch.block_id)
        return found is not None
    finally:
        fetch.release()


def miss(block_id: BlockId) -> pb.Header:
    """The header of a block that is not to be had."""
    return pb.Header(model_id=block_id.model_id, namespace=block_id.namespace, block_hash=block_id.block_hash)


def _block_parts(block_id: BlockId, entry: pb.Entry, block: KVBlock) -> Iterator[Part]:
    header = miss(block_id)
    arrays = block.to_tensors()
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
    yield header
    yield from tensors.pieces(arrays, CHUNK_BYTES)
