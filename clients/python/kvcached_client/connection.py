"""Calls to a daemon that raise when they fail: for tools. Engines use `Client`, which never does."""

import queue
import threading
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import grpc
import grpc.experimental

from . import protocol
from ._proto import kvcached_pb2 as pb
from .paths import check_target, default_target
from .protocol import METHODS, Part

_REQUESTS_AHEAD = 8  # of a stream, made and not sent yet: of at most a chunk each


class DaemonError(Exception):
    """A call failed. `code` is the name of the gRPC status, e.g. "RESOURCE_EXHAUSTED"."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message

    @property
    def is_outage(self) -> bool:
        """Nobody there, too slow, or broken; as opposed to an answer that we do not like."""
        return self.code in ("UNAVAILABLE", "DEADLINE_EXCEEDED", "INTERNAL", "UNKNOWN", "UNIMPLEMENTED")


class Connection:
    """A channel to one daemon. Thread-safe; connects when first used, and again after a loss.

    Raises:
        ValueError: the target is a socket whose path is too long; gRPC would only say so at every call.
    """

    def __init__(self, target: str | None = None) -> None:
        self.target = check_target(target or default_target())
        # A local daemon is there at once or not at all; gRPC's default back-off (up to 2 minutes) outlasts restarts.
        backoff = (("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 1000))
        # What Get answers is read on the thread that asks, and not handed over by one of gRPC's.
        single = ((grpc.experimental.ChannelOptions.SingleThreadedUnaryStream, 1),)
        self._channel = grpc.insecure_channel(self.target, options=[*protocol.CHANNEL_OPTIONS, *backoff, *single])
        self._calls = {m.name: self._bind(m) for m in METHODS.values()}
        self._names = ((protocol.CLIENT_KEY, uuid.uuid4().hex),)  # whoever has many calls under way is still one
        self._closed = False

    def _bind(self, method: protocol.Method) -> Any:
        factories: dict[tuple[bool, bool], Any] = {
            (False, False): self._channel.unary_unary,
            (True, False): self._channel.stream_unary,
            (True, True): self._channel.stream_stream,
            (False, True): self._channel.unary_stream,
        }
        sends_stream = method.sends_stream and method.name != "Get"  # of which we send one request: a thread less
        return factories[sends_stream, method.answers_stream](method.path, method.write_request, method.read_response)

    def call(self, name: str, request: Any, timeout: float = 10.0) -> Any:
        """One request, one response. Raises DaemonError."""
        with self._raising_daemon_errors():
            return self._calls[name](request, timeout=timeout, metadata=self._names)

    def put(self, parts: Iterable[Part], timeout: float) -> Iterator[pb.PutResult]:
        """Results as they come. Raises DaemonError; results yielded before are good."""
        return self._stream("Put", iter(parts), timeout)

    def get(self, request: pb.GetRequest, timeout: float, first_timeout: float | None = None) -> Iterator[Part]:
        """Headers and data as they come, the first within a time of its own. Raises DaemonError."""
        return self._stream("Get", request, timeout, first_timeout)

    def calibrate(self, parts: Iterable[pb.CalibrateRequest], timeout: float) -> pb.CalibrateResponse:
        """Calibrates a model; see `tensors.calibrate_requests`. Raises DaemonError, and whatever `parts` raises."""
        response: pb.CalibrateResponse = self._gather("Calibrate", parts, timeout)
        return response

    def install_bundle(self, pieces: Iterable[pb.InstallBundleRequest], timeout: float) -> pb.InstallBundleResponse:
        """Installs a bundle from its bytes. Raises DaemonError, and whatever `pieces` raises."""
        response: pb.InstallBundleResponse = self._gather("InstallBundle", pieces, timeout)
        return response

    def _gather(self, name: str, requests: Iterable[Any], timeout: float) -> Any:
        """A stream of requests, and the one response. Requests are made on the thread that calls: gRPC would make them
        on one of its own, where an engine's arrays may not be touched, and would hide what goes wrong there.
        """
        ahead: queue.Queue[Any] = queue.Queue(_REQUESTS_AHEAD)
        with self._raising_daemon_errors():
            call = self._calls[name].future(iter(ahead.get, None), timeout=timeout, metadata=self._names)
            try:
                for request in requests:
                    if not _hand_over(request, ahead, call):
                        break
                _hand_over(None, ahead, call)
                return call.result()
            except grpc.FutureCancelledError:  # by the other side, or by `close`
                raise DaemonError("CANCELLED", "the call was cancelled") from None
            finally:
                call.cancel()
                _end(ahead)

    def _stream(self, name: str, asked: Any, timeout: float, first_timeout: float | None = None) -> Iterator[Any]:
        with self._raising_daemon_errors():
            call = self._calls[name](asked, timeout=timeout, metadata=self._names)
            try:
                if first_timeout is not None and first_timeout < timeout:
                    yield _first(call, first_timeout)
                yield from call
            finally:
                call.cancel()  # a consumer that left early must not keep the daemon at work

    @contextmanager
    def _raising_daemon_errors(self) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            raise _daemon_error(error) from None
        except ValueError:  # all that gRPC says of a channel that is closed
            if not self._closed:
                raise
            raise DaemonError("CANCELLED", "this connection is closed") from None

    def is_serving(self, timeout: float = 1.0) -> bool:
        """Whether a daemon answers at all."""
        try:
            self.call("Status", pb.StatusRequest(), timeout)
        except DaemonError:
            return False
        return True

    def close(self) -> None:
        """From now on every call fails; so do those under way."""
        self._closed = True
        self._channel.close()

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _first(call: Any, timeout: float) -> Any:
    """The first message of a stream, which gRPC has no deadline for."""
    too_late = threading.Event()

    def give_up() -> None:
        too_late.set()
        call.cancel()

    timer = threading.Timer(timeout, give_up)
    timer.daemon = True
    timer.start()
    try:
        return next(call)
    except StopIteration:
        raise DaemonError("INTERNAL", "the stream ended without an answer") from None
    except grpc.RpcError:
        if too_late.is_set():
            raise DaemonError("DEADLINE_EXCEEDED", f"nothing came within {timeout:g} s") from None
        raise
    finally:
        timer.cancel()


def _hand_over(request: Any, ahead: "queue.Queue[Any]", call: Any) -> bool:
    """Whether a call that still goes on has taken a request; waits while too many are on their way."""
    while not call.done():
        with suppress(queue.Full):
            ahead.put(request, timeout=0.1)
            return True
    return False


def _end(ahead: "queue.Queue[Any]") -> None:
    """Lets go of gRPC's thread, which waits for requests of a call that is over."""
    while True:
        try:
            ahead.put_nowait(None)
        except queue.Full:
            with suppress(queue.Empty):
                ahead.get_nowait()
        else:
            return


def _daemon_error(error: grpc.RpcError) -> DaemonError:
    code = error.code() if isinstance(error, grpc.Call) else grpc.StatusCode.UNKNOWN
    details = error.details() if isinstance(error, grpc.Call) else str(error)
    return DaemonError((code or grpc.StatusCode.UNKNOWN).name, details or "")
