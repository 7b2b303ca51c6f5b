"""Calls to a daemon that raise when they fail: for tools. Engines use `Client`, which never does."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from . import protocol
from ._proto import kvcached_pb2 as pb
from .paths import check_target, default_target
from .protocol import METHODS, Part


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
        self._channel = grpc.insecure_channel(self.target, options=[*protocol.CHANNEL_OPTIONS, *backoff])
        self._calls = {m.name: self._bind(m) for m in METHODS.values()}
        self._closed = False

    def _bind(self, method: protocol.Method) -> Any:
        factory = self._channel.stream_stream if method.streaming else self._channel.unary_unary
        return factory(method.path, method.write_request, method.read_response)

    def call(self, name: str, request: Any, timeout: float = 10.0) -> Any:
        """One request, one response. Raises DaemonError."""
        with self._raising_daemon_errors():
            return self._calls[name](request, timeout=timeout)

    def put(self, parts: Iterable[Part], timeout: float) -> Iterator[pb.PutResult]:
        """Results as they come. Raises DaemonError; results yielded before are good."""
        return self._stream("Put", iter(parts), timeout)

    def get(self, request: pb.GetRequest, timeout: float) -> Iterator[Part]:
        """Headers and data as they come. Raises DaemonError."""
        return self._stream("Get", iter([request]), timeout)

    def _stream(self, name: str, requests: Iterator[Any], timeout: float) -> Iterator[Any]:
        with self._raising_daemon_errors():
            call = self._calls[name](requests, timeout=timeout)
            try:
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


def _daemon_error(error: grpc.RpcError) -> DaemonError:
    code = error.code() if isinstance(error, grpc.Call) else grpc.StatusCode.UNKNOWN
    details = error.details() if isinstance(error, grpc.Call) else str(error)
    return DaemonError((code or grpc.StatusCode.UNKNOWN).name, details or "")
