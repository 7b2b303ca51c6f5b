"""What the daemon shows over HTTP, on this machine only: /metrics for Prometheus, /healthz and /readyz for supervisors.

    /metrics    all series, as Prometheus or OpenMetrics text, by the library
    /healthz    200 as long as the process answers
    /readyz     200 if blocks are taken and given, else 503; the body says why not

The cache does not depend on it: where the port is taken, the daemon serves without, and says so (see Daemon).
"""

import threading
from collections.abc import Callable, Iterable
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

HOST = "127.0.0.1"
_CONNECTION_SECONDS = 10.0  # then a silent connection is dropped
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
        self._server: WSGIServer = make_server(HOST, port, self._respond, ThreadingWSGIServer, _Handler)
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


class _Handler(WSGIRequestHandler):
    timeout = _CONNECTION_SECONDS

    def log_message(self, *_: object) -> None:
        """Nothing: whoever scrapes us every few seconds is no event."""


def _text(start_response: StartResponse, status: str, text: str) -> list[bytes]:
    start_response(status, [("Content-Type", "text/plain; charset=utf-8"), ("Cache-Control", "no-store")])
    return [text.encode() + b"\n"]
