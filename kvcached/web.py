"""What the daemon shows over HTTP, on this machine only: /metrics for Prometheus, /healthz and /readyz for supervisors.

    /metrics    all series, as Prometheus or OpenMetrics text, by the library
    /healthz    200 as long as the process answers
    /readyz     200 if blocks are taken and given, else 503; the body says why not

The cache does not depend on it: where the port is taken, the daemon serves without, and says so (see Daemon).
"""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterable
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import structlog
from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

log = structlog.get_logger()
HOST = "127.0.0.1"
_CONNECTION_SECONDS = 10.0  # then a connection is dropped, whether it is silent or slow
_MAX_CONNECTIONS = 32  # each is a thread and a file, of which the cache needs some too; more are turned away
Environ = dict[str, Any]
StartResponse = Callable[[str, list[tuple[str, str]]], object]


class Web:
    """An HTTP server in threads of its own.

    why_not_ready: why blocks are neither taken nor given now; empty if they are.
    """

    def __init__(self, port: int, registry: CollectorRegistry, why_not_ready: Callable[[], str]) -> None:
        """Raises OSError if the port is taken."""
        self._metrics = make_wsgi_app(registry)
        self._why_not_ready = why_not_ready
        self._server: WSGIServer = make_server(HOST, port, self._respond, _Server, _Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, name="web", daemon=True)

    @property
    def address(self) -> str:
        return f"http://{HOST}:{self._server.server_port}"

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        if self._thread.is_alive():
            self._server.shutdown()
        self._server.server_close()

    def _respond(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        path, method = environ["PATH_INFO"], environ["REQUEST_METHOD"]
        if path == "/metrics":
            metrics: Iterable[bytes] = self._metrics(environ, start_response)
            return metrics
        if path not in ("/healthz", "/readyz"):
            return _text(start_response, "404 Not Found", "here are /metrics, /healthz and /readyz")
        if method not in ("GET", "HEAD"):
            return _text(start_response, "405 Method Not Allowed", f"GET and HEAD are allowed, got {method}")
        reason = self._why_not_ready() if path == "/readyz" else ""
        return _text(start_response, "503 Service Unavailable" if reason else "200 OK", reason or "ok")


class _Server(ThreadingWSGIServer):
    """Bounded, and quiet: what goes wrong on a connection is its peer's business."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._room = threading.BoundedSemaphore(_MAX_CONNECTIONS)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._room.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        hang_up = threading.Timer(_CONNECTION_SECONDS, _hang_up, (request,))
        hang_up.daemon = True
        hang_up.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            hang_up.cancel()
            self._room.release()

    def handle_error(self, _request: Any, client_address: Any) -> None:
        log.debug("connection failed", peer=str(client_address), exc_info=True)


def _hang_up(request: socket.socket) -> None:
    with contextlib.suppress(OSError):
        request.shutdown(socket.SHUT_RDWR)


class _Handler(WSGIRequestHandler):
    timeout = _CONNECTION_SECONDS

    def log_message(self, *_: object) -> None:
        """Nothing: whoever scrapes us every few seconds is no event."""


def _text(start_response: StartResponse, status: str, text: str) -> list[bytes]:
    start_response(status, [("Content-Type", "text/plain; charset=utf-8"), ("Cache-Control", "no-store")])
    return [text.encode() + b"\n"]
