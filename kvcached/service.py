"""The wire: messages to nouns and back, errors to statuses. No policy.

Handlers run in gRPC's threads; work happens in the pool and the store's writer. Streams: streams.py.
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import CancelledError
from functools import partial
from typing import Any

import grpc
import structlog
from google.protobuf.message import DecodeError

from kvcached import border
from kvcached.block import BlockId
from kvcached.bundle_service import BundleService
from kvcached.cache import Cache, Floor
from kvcached.calibrating import Calibrating
from kvcached.config import describe, is_live
from kvcached.errors import InvalidRequestError, KvcachedError, OverloadedError
from kvcached.lending import Lending
from kvcached.metrics import Metrics
from kvcached.status import Status
from kvcached.store import PIN_FOREVER
from kvcached.streams import IdleWatch, Listener, Outbox, Outgoing, PutReceiver, Road, miss, put_result
from kvcached_client import protocol
from kvcached_client._proto import kvcached_pb2 as pb
from kvcached_client.protocol import METHODS, Method, Part

log = structlog.get_logger()
MAX_CALLS = 64  # served at once, each in a thread; more wait, four times as many at most
_MAX_STREAMS = 48  # of those, which are as long as their callers like: health and status must get through
_GET_WAIT_SECONDS = 30.0  # for room in memory, when the caller sets no deadline
_HANDLERS: dict[tuple[bool, bool], Callable[..., Any]] = {  # by (sends_stream, answers_stream)
    (False, False): grpc.unary_unary_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}


class Service:
    """kvcached.v1.KvCache over one cache."""

    def __init__(self, cache: Cache, status: Status, lending: Lending) -> None:
        self._cache, self._status, self._lending = cache, status, lending
        self._bundles, self._calibrating = BundleService(cache), Calibrating(cache)
        self._config_lock = threading.Lock()
        self._active = _Active()
        self._idle = IdleWatch(lambda: cache.config.idle_seconds)

    @property
    def is_idle(self) -> bool:
        """Whether no call is under way."""
        return self._active.n_calls == 0

    def handlers(self) -> grpc.GenericRpcHandler:
        """What a grpc.Server is given: every method of the protocol, by its name."""
        methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
        for name, method in METHODS.items():
            if not hasattr(self, name):  # answered by gRPC: UNIMPLEMENTED
                continue
            answers_once = self._gathering if method.sends_stream else self._unary
            wrap = self._streaming if method.answers_stream else answers_once
            methods[name] = _HANDLERS[method.sends_stream, method.answers_stream](
                wrap(method, getattr(self, name)), response_serializer=method.write_response
            )
        return grpc.method_handlers_generic_handler(protocol.SERVICE, methods)

    # ---- methods, by their names in the protocol

    def RegisterModel(self, request: pb.RegisterModelRequest, _: Any) -> pb.RegisterModelResponse:  # noqa: N802
        spec = border.model_spec(request.spec)
        return pb.RegisterModelResponse(already_known=self._cache.register(spec), model_id=spec.model_id)

    def Match(self, request: pb.MatchRequest, _: Any) -> pb.MatchResponse:  # noqa: N802
        spec = self._cache.model(request.model_id)
        block_ids = border.block_ids(request)
        entries = self._cache.match(spec, block_ids, _floor(request), is_lookup=not request.before_put)
        log.info("match", request_id=border.printable(request.request_id), asked=len(block_ids), held=len(entries))
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

    def Put(self, parts: Iterator[Part], context: grpc.ServicerContext) -> Iterator[pb.PutResult]:  # noqa: N802
        results, receiver = Outbox(), PutReceiver(self._cache, self._lending, parts, _client(context))
        threading.Thread(target=receiver.run, args=(results.put,), name="put-receiver", daemon=True).start()
        try:
            with _Told("put") as told:
                while (item := results.take()) is not None:
                    if isinstance(item, KvcachedError):
                        raise item
                    result = put_result(*item)
                    told.request_id = item[0].request_id
                    told.counts[pb.Outcome.Name(result.outcome).removeprefix("OUTCOME_").lower()] += 1
                    yield result
        finally:
            results.close()

    def Get(self, requests: Iterator[pb.GetRequest], context: grpc.ServicerContext) -> Iterator[Part]:  # noqa: N802
        for request in requests:
            pending: deque[Outgoing] = deque()
            try:
                with _Told("get", request.request_id) as told:
                    yield from self._answer(request, pending, told, context)
            finally:
                for outgoing in pending:
                    outgoing.abandon()

    def _answer(
        self, request: pb.GetRequest, pending: deque[Outgoing], told: "_Told", context: grpc.ServicerContext
    ) -> Iterator[Part]:
        """What one request of a Get stream asks for, in order, several blocks under way at once."""
        asked = self._block_ids(request)
        wanted = self._leading(asked, request) if request.longest_prefix else asked
        road = Road(self._lending.lease(request.lease), self._cache.metrics)
        for block_id in wanted:
            while (outgoing := self._fetch(block_id, request, road, pending, context)) is None:
                if not (yield from pending.popleft().parts(told.counts)) and request.longest_prefix:
                    return
            pending.append(outgoing)
        while pending:
            if not (yield from pending.popleft().parts(told.counts)) and request.longest_prefix:
                return
        if len(wanted) < len(asked):
            yield miss(asked[len(wanted)])

    def _leading(self, asked: list[BlockId], request: pb.GetRequest) -> list[BlockId]:
        """The blocks to send of those that are held; none if they are too few."""
        spec = self._cache.model(request.model_id)
        held = self._cache.match(spec, asked, _floor(request))
        while spec.needs_boundary and held and not held[-1].boundary:  # nothing could be generated from there
            held.pop()
        return asked[: len(held) if len(held) >= request.at_least else 0]

    def _fetch(
        self,
        block_id: BlockId,
        request: pb.GetRequest,
        road: Road,
        pending: deque[Outgoing],
        context: grpc.ServicerContext,
    ) -> Outgoing | None:
        """Starts to fetch a block; None if one of `pending` must be sent first.

        Enough are under way to keep all workers busy. Only a stream that has nothing to send may wait for room.
        """
        if len(pending) > self._cache.pool.n_workers:
            return None
        patience = 0 if pending else _patience(context)
        get = partial(self._cache.get, block_id, _floor(request), patience, client=_client(context))
        try:
            return road.fetch(lambda memory_for: get(memory_for=memory_for), may_wait=not pending)
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

    def Calibrate(self, requests: Iterator[pb.CalibrateRequest], context: grpc.ServicerContext) -> pb.CalibrateResponse:  # noqa: N802
        bundle = self._calibrating.fitted(requests, context.is_active)
        return pb.CalibrateResponse(bundle=self._bundles.status(self._cache.bundles.install(bundle)))

    def InstallBundle(self, pieces: Iterator[pb.InstallBundleRequest], _: Any) -> pb.InstallBundleResponse:  # noqa: N802
        return self._bundles.install(pieces)

    def AttachMeasurements(self, request: pb.AttachMeasurementsRequest, _: Any) -> pb.AttachMeasurementsResponse:  # noqa: N802
        return self._bundles.attach(request)

    def ListBundles(self, _request: pb.ListBundlesRequest, _: Any) -> pb.ListBundlesResponse:  # noqa: N802
        return self._bundles.all()

    def RemoveBundle(self, request: pb.RemoveBundleRequest, _: Any) -> pb.RemoveBundleResponse:  # noqa: N802
        return self._bundles.remove(request)

    def Announce(self, request: pb.AnnounceRequest, _: Any) -> pb.AnnounceResponse:  # noqa: N802
        self._status.announce(border.engine(request.engine))
        return pb.AnnounceResponse()

    def Status(self, _request: pb.StatusRequest, _: Any) -> pb.StatusResponse:  # noqa: N802
        return self._status.response()

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

    def _gathering(self, method: Method, function: Callable[..., Any]) -> Callable[..., Any]:
        """A stream of requests, one response."""

        def call(requests: Iterator[bytes], context: grpc.ServicerContext) -> Any:
            with self._active, _Observed(self._cache.metrics, method.name, context):
                listener = Listener((_read(method, request) for request in requests), context.cancel)
                self._idle.enter(listener, _MAX_STREAMS)
                try:
                    return function(listener, context)
                finally:
                    self._idle.leave(listener)

        return call

    def _streaming(self, method: Method, function: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        def call(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[Any]:
            with self._active, _Observed(self._cache.metrics, method.name, context):
                listener = Listener((_read(method, request) for request in requests), context.cancel)
                self._idle.enter(listener, _MAX_STREAMS)
                try:
                    yield from function(listener, context)
                finally:
                    self._idle.leave(listener)

        return call


def _read(method: Method, request: bytes) -> Any:
    """A message from its bytes, here and not in gRPC, which would blame itself (INTERNAL) for what it cannot read."""
    try:
        return method.read_request(request)
    except DecodeError as error:
        raise InvalidRequestError(f"not a message of {method.name}: {error}") from None


class _Told:
    """Around the answer to a stream's request: one line in the log, with what became of its blocks."""

    def __init__(self, event: str, request_id: str = "") -> None:
        self.request_id, self.counts = request_id, Counter[str]()
        self._event, self._start = event, time.monotonic()

    def __enter__(self) -> "_Told":
        return self

    def __exit__(self, *_: object) -> None:
        seconds = round(time.monotonic() - self._start, 6)
        log.info(self._event, request_id=border.printable(self.request_id), seconds=seconds, **self.counts)


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
        self._metrics.rpc_seconds.labels(self._name, code).observe(time.monotonic() - self._start)
        if error is not None and not isinstance(error, GeneratorExit | grpc.RpcError):  # those gRPC knows of
            self._context.abort(grpc.StatusCode[code], border.brief(message))


def _floor(request: pb.MatchRequest | pb.GetRequest) -> Floor:
    return Floor(border.fidelity_kind(request.floor), request.accepts_compacted)


def _client(context: grpc.ServicerContext) -> Hashable:
    """Who takes turns: the connection, by what it calls itself; else the call. Peers of a socket all look the same."""
    named = (value for key, value in context.invocation_metadata() if key == protocol.CLIENT_KEY)
    return next(named, id(context))


def _patience(context: grpc.ServicerContext) -> float:
    remaining = context.time_remaining()
    return _GET_WAIT_SECONDS if remaining is None else min(remaining, _GET_WAIT_SECONDS)


def _settings(items: list[tuple[str, str]]) -> list[pb.Setting]:
    return [pb.Setting(name=name, value=value, description=describe(name), live=is_live(name)) for name, value in items]
