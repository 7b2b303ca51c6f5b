"""The wire: messages to nouns and back, errors to statuses. No policy.

Handlers run in gRPC's threads; work happens in the pool and the store's writer. A Put stream has a second thread that
reads, so that results go out while blocks come in.
"""

import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from typing import Any

import grpc
import structlog
from google.protobuf.message import DecodeError

from kvcached import __version__, border
from kvcached.block import BlockId, KVBlock
from kvcached.cache import Cache, Fetch, Floor
from kvcached.config import describe, is_live
from kvcached.errors import InvalidRequestError, KvcachedError, OverloadedError
from kvcached.metrics import Metrics
from kvcached.store import PIN_FOREVER
from kvcached_client import protocol, tensors
from kvcached_client._proto import kvcached_pb2 as pb
from kvcached_client.protocol import CHUNK_BYTES, METHODS, Method, Part

log = structlog.get_logger()
_GET_WAIT_SECONDS = 30.0  # for room in memory, when the caller sets no deadline


class Service:
    """kvcached.v1.KvCache over one cache."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._started = time.monotonic()
        self._config_lock = threading.Lock()
        self._active = _Active()

    @property
    def is_idle(self) -> bool:
        """Whether no call is under way."""
        return self._active.n_calls == 0

    def handlers(self) -> grpc.GenericRpcHandler:
        """What a grpc.Server is given: every method of the protocol, by its name."""
        methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
        for name, method in METHODS.items():
            factory = grpc.stream_stream_rpc_method_handler if method.streaming else grpc.unary_unary_rpc_method_handler
            wrap = self._streaming if method.streaming else self._unary
            methods[name] = factory(wrap(method, getattr(self, name)), response_serializer=method.write_response)
        return grpc.method_handlers_generic_handler(protocol.SERVICE, methods)

    # ---- methods, by their names in the protocol

    def RegisterModel(self, request: pb.RegisterModelRequest, _: Any) -> pb.RegisterModelResponse:  # noqa: N802
        spec = border.model_spec(request.spec)
        return pb.RegisterModelResponse(already_known=self._cache.register(spec), model_id=spec.model_id)

    def Match(self, request: pb.MatchRequest, _: Any) -> pb.MatchResponse:  # noqa: N802
        spec = self._cache.model(request.model_id)
        entries = self._cache.match(spec, border.block_ids(request), _floor(request))
        blocks = [
            pb.HeldBlock(
                fidelity=entry.fidelity,
                lineage=entry.lineage,
                boundary=entry.boundary,
                n_tokens=entry.n_tokens,
                source_bytes=entry.source_bytes,
                stored_bytes=entry.stored_bytes,
            )
            for entry in entries
        ]
        return pb.MatchResponse(blocks=blocks)

    def Put(self, parts: Iterator[Part], _: Any) -> Iterator[pb.PutResult]:  # noqa: N802
        results: queue.SimpleQueue[Any] = queue.SimpleQueue()
        receiver = _Receiver(self._cache, parts)
        threading.Thread(target=receiver.run, args=(results.put,), name="put-receiver", daemon=True).start()
        while (item := results.get()) is not None:
            if isinstance(item, KvcachedError):
                raise item
            yield _put_result(*item)

    def Get(self, requests: Iterator[pb.GetRequest], context: grpc.ServicerContext) -> Iterator[Part]:  # noqa: N802
        pending: deque[Fetch] = deque()
        try:
            for request in requests:
                for block_id in self._block_ids(request):
                    while (fetch := self._fetch(block_id, request, pending, context)) is None:
                        yield from _send(pending.popleft())
                    pending.append(fetch)
                while pending:
                    yield from _send(pending.popleft())
        finally:
            for fetch in pending:
                fetch.release()

    def _fetch(
        self, block_id: BlockId, request: pb.GetRequest, pending: deque[Fetch], context: grpc.ServicerContext
    ) -> Fetch | None:
        """Starts to fetch a block; None if one of `pending` must be sent first.

        Enough are under way to keep all workers busy. Only a stream that has nothing to send may wait for room.
        """
        if len(pending) > self._cache.pool.n_workers:
            return None
        try:
            return self._cache.get(block_id, _floor(request), 0 if pending else _patience(context))
        except OverloadedError:
            if not pending:
                raise
            return None

    def Delete(self, request: pb.DeleteRequest, _: Any) -> pb.DeleteResponse:  # noqa: N802
        return pb.DeleteResponse(n_deleted=self._cache.delete(self._block_ids(request)))

    def Pin(self, request: pb.PinRequest, _: Any) -> pb.PinResponse:  # noqa: N802
        until = int((time.time() + request.ttl_seconds) * 1e6) if request.ttl_seconds else PIN_FOREVER
        n_pinned = self._cache.store.pin(self._block_ids(request), min(until, PIN_FOREVER)).result()
        return pb.PinResponse(n_pinned=n_pinned)

    def Unpin(self, request: pb.UnpinRequest, _: Any) -> pb.UnpinResponse:  # noqa: N802
        return pb.UnpinResponse(n_unpinned=self._cache.store.pin(self._block_ids(request), 0).result())

    def Check(self, request: pb.CheckRequest, _: Any) -> pb.CheckResponse:  # noqa: N802
        problems = list(self._cache.check(request.frames))
        n_blocks = sum(totals.n_blocks for totals in self._cache.store.totals().values())
        return pb.CheckResponse(
            problems=problems[:100], n_blocks=n_blocks, n_frames_decoded=n_blocks if request.frames else 0
        )

    def GetConfig(self, _request: pb.GetConfigRequest, _: Any) -> pb.GetConfigResponse:  # noqa: N802
        return pb.GetConfigResponse(settings=_settings(self._cache.config.items()))

    def SetConfig(self, request: pb.SetConfigRequest, _: Any) -> pb.SetConfigResponse:  # noqa: N802
        with self._config_lock:
            before = dict(self._cache.config.items())
            config = self._cache.reconfigure(self._cache.config.updated(dict(request.values)))
        changed = [(name, value) for name, value in config.items() if before[name] != value]
        log.info("settings changed", **dict(changed))
        return pb.SetConfigResponse(settings=_settings(changed))

    def Status(self, _request: pb.StatusRequest, _: Any) -> pb.StatusResponse:  # noqa: N802
        store, pool = self._cache.store, self._cache.pool
        totals, usage = store.totals(), store.usage()
        sums = {name: sum(getattr(t, name) for t in totals.values()) for name in _TOTALS}
        models = [
            pb.ModelStatus(
                model_id=model_id,
                spec=spec.to_proto(),
                fidelities=[
                    pb.FidelityStatus(kind=pb.FidelityKind.Name(kind), **t._asdict())
                    for (owner, kind), t in totals.items()
                    if owner == model_id
                ],
            )
            for model_id, spec in self._cache.models().items()
        ]
        return pb.StatusResponse(
            version=__version__,
            pid=os.getpid(),
            uptime_seconds=time.monotonic() - self._started,
            socket_path=str(self._cache.config.socket_path),
            store=pb.StoreStatus(
                path=str(store.path),
                quota_bytes=store.quota_bytes,
                used_bytes=usage.used_bytes,
                file_bytes=usage.file_bytes,
                free_disk_bytes=usage.free_disk_bytes,
                set_aside=store.set_aside,
                **sums,
            ),
            models=models,
            pool=pb.PoolStatus(
                n_workers=pool.n_workers,
                n_jobs=pool.n_jobs,
                put_bytes=pool.puts.used_bytes,
                get_bytes=pool.gets.used_bytes,
                limit_bytes=pool.puts.limit_bytes,
            ),
            counters=self._cache.metrics.snapshot(),
        )

    def _block_ids(self, request: border.NamesBlocks) -> list[BlockId]:
        """The blocks that a request names. Raises PreconditionError for an unknown model."""
        self._cache.model(request.model_id)
        return border.block_ids(request)

    # ---- errors to statuses, and the counting of calls

    def _unary(self, method: Method, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(request: bytes, context: grpc.ServicerContext) -> Any:
            with self._active, _Observed(self._cache.metrics, method.name, context):
                return function(_read(method, request), context)

        return call

    def _streaming(self, method: Method, function: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        def call(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[Any]:
            with self._active, _Observed(self._cache.metrics, method.name, context):
                yield from function((_read(method, request) for request in requests), context)

        return call


def _read(method: Method, request: bytes) -> Any:
    """A message from its bytes, here and not in gRPC, which would blame itself (INTERNAL) for what it cannot read."""
    try:
        return method.read_request(request)
    except DecodeError as error:
        raise InvalidRequestError(f"not a message of {method.name}: {error}") from None


_TOTALS = ("n_blocks", "n_tokens", "source_bytes", "stored_bytes")


class _Active:
    """Counts the calls that are under way."""

    def __init__(self) -> None:
        self.n_calls = 0
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            self.n_calls += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self.n_calls -= 1


class _Observed:
    """Around one call: an error becomes its status, the call is counted and timed."""

    def __init__(self, metrics: Metrics, name: str, context: grpc.ServicerContext) -> None:
        self._metrics, self._name, self._context = metrics, name, context
        self._start = time.monotonic()

    def __enter__(self) -> None:
        pass

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        code, message = "OK", ""
        if isinstance(error, KvcachedError):
            code, message = error.code, str(error)
        elif isinstance(error, GeneratorExit | grpc.RpcError | CancelledError):
            code = "CANCELLED"
        elif error is not None:
            code, message = "INTERNAL", "internal error, see the daemon's log"
            log.error("call failed", method=self._name, exc_info=error)
        self._metrics.rpc_requests.labels(self._name, code).inc()
        self._metrics.rpc_seconds.labels(self._name).observe(time.monotonic() - self._start)
        if error is not None and code != "CANCELLED":
            self._context.abort(grpc.StatusCode[code], message)


class _Receiver:
    """The reading side of a Put stream, in a thread of its own."""

    def __init__(self, cache: Cache, parts: Iterator[Part]) -> None:
        self._cache, self._parts = cache, parts

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
            self._cache.pool.puts.take(entry.source_bytes)
        except KvcachedError as error:
            self._cache.metrics.put_blocks.labels("refused").inc()
            self._skip(header.data_bytes)
            return error
        try:
            payload = protocol.read_payload(self._parts, header.data_bytes)
            arrays = tensors.views(header.tensors, payload)
            block = KVBlock.dense(arrays, header.n_tokens, header.first_position)
        except ValueError as error:
            self._cache.pool.puts.give_back(entry.source_bytes)
            raise InvalidRequestError(str(error)) from None
        except BaseException:
            self._cache.pool.puts.give_back(entry.source_bytes)
            raise
        return self._cache.put(block_id, entry, block)

    def _skip(self, n_bytes: int) -> None:
        """Reads past the data of a refused block."""
        while n_bytes > 0 and (part := next(self._parts, None)) is not None:
            if isinstance(part, pb.Header) or len(part) > n_bytes:
                raise InvalidRequestError(f"{n_bytes} bytes of data expected, got {protocol.describe_part(part)}")
            n_bytes -= len(part)


def _put_result(header: pb.Header, answer: "Future[tuple[pb.Outcome, pb.Entry]] | KvcachedError") -> pb.PutResult:
    try:
        if isinstance(answer, KvcachedError):
            raise answer
        outcome, entry = answer.result()
    except KvcachedError as error:
        log.info("block refused", block=header.block_hash.hex()[:16], request_id=header.request_id, reason=str(error))
        return pb.PutResult(
            block_hash=header.block_hash, outcome=pb.OUTCOME_REFUSED, code=error.code, message=str(error)
        )
    return pb.PutResult(
        block_hash=header.block_hash,
        outcome=outcome,
        code="OK",
        source_bytes=entry.source_bytes,
        stored_bytes=entry.stored_bytes,
        fidelity=entry.fidelity,
    )


def _send(fetch: Fetch) -> Iterator[Part]:
    """Header and data of one block, or the header of a miss."""
    try:
        yield from _block_parts(fetch.block_id, fetch.found.result())
    finally:
        fetch.release()


def _block_parts(block_id: BlockId, found: tuple[pb.Entry, KVBlock] | None) -> Iterator[Part]:
    header = pb.Header(model_id=block_id.model_id, namespace=block_id.namespace, block_hash=block_id.block_hash)
    if found is None:
        yield header
        return
    entry, block = found
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


def _floor(request: pb.MatchRequest | pb.GetRequest) -> Floor:
    return Floor(border.fidelity_kind(request.floor), request.accepts_compacted)


def _patience(context: grpc.ServicerContext) -> float:
    remaining = context.time_remaining()
    return _GET_WAIT_SECONDS if remaining is None else min(remaining, _GET_WAIT_SECONDS)


def _settings(items: list[tuple[str, str]]) -> list[pb.Setting]:
    return [pb.Setting(name=name, value=value, description=describe(name), live=is_live(name)) for name, value in items]
