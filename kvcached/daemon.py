"""The daemon: builds everything from settings, serves until told to stop, and leaves cleanly.

A foreground process that never forks (launchd and systemd want it so). SIGTERM and SIGINT: health says NOT_SERVING, no
new calls are taken, those under way may finish within drain_seconds, the store is closed, exit code 0. Exit code 1: it
could not start, and says why; 2: wrong usage.
"""

import os
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import grpc
import structlog
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health import HealthServicer
from grpc_health.v1.health_pb2 import DESCRIPTOR as HEALTH_DESCRIPTOR
from grpc_health.v1.health_pb2 import HealthCheckResponse
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry

from kvcached import __version__, devices, logs, sockets
from kvcached.cache import Cache
from kvcached.calibrating import is_fitting
from kvcached.config import Config, describe, load
from kvcached.errors import KvcachedError
from kvcached.lending import Lending
from kvcached.metrics import Metrics
from kvcached.pool import Lane, WorkerPool
from kvcached.service import MAX_CALLS, Service
from kvcached.status import Status
from kvcached.store import Store
from kvcached.web import Web
from kvcached_client import protocol
from kvcached_client.paths import segment_socket

log = structlog.get_logger()
HTTP_HEALTH = "kvcached.http"  # a service name of the health protocol


class Daemon:
    """Everything that one process serves, built in order and taken down in the opposite one."""

    def __init__(self, config: Config) -> None:
        """Raises KvcachedError if it cannot be built; nothing is left behind then."""
        self.config = config
        self.metrics = Metrics()
        self.store = Store(
            config.store_path,
            quota_bytes=config.quota_bytes,
            free_floor_bytes=config.free_floor_bytes,
            holder=f"socket {config.socket_path}",
            on_removed=lambda reason, n_blocks: self.metrics.evicted_blocks.labels(reason).inc(n_blocks),
        )
        try:
            sockets.prepare(config.socket_path)
        except KvcachedError:
            self.store.close()
            raise
        self.pool = WorkerPool(config.workers, config.queue_bytes, devices.choose(config.device))
        self.health = HealthServicer()
        cache = Cache(self.store, self.pool, self.metrics, config)
        self.pool.submit(Lane.GET, cache.warm)
        self._lending = Lending(config.segment_bytes)
        self.status = Status(cache, self._lending)
        self._service = Service(cache, self.status, self._lending)
        self._server = self._build_server()
        self._web = self._build_web() if config.http_port else None
        self._is_serving = False

    def _build_server(self) -> grpc.Server:
        executor = ThreadPoolExecutor(MAX_CALLS, thread_name_prefix="call")
        # Without so_reuseport=0 two daemons could share one TCP port, each with half of the calls.
        options = [*protocol.CHANNEL_OPTIONS, ("grpc.so_reuseport", 0)]
        server = grpc.server(executor, options=options, maximum_concurrent_rpcs=4 * MAX_CALLS)
        server.add_generic_rpc_handlers((self._service.handlers(),))
        health_pb2_grpc.add_HealthServicer_to_server(self.health, server)
        health_name = HEALTH_DESCRIPTOR.services_by_name["Health"].full_name
        reflection.enable_server_reflection((protocol.SERVICE, health_name, reflection.SERVICE_NAME), server)
        return server

    def _build_web(self) -> Web | None:
        """The cache serves without it where the port is taken: health, status and log say so."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self.metrics.registry)
        registry.register(self.status)
        try:
            web = Web(self.config.http_port, registry, self._why_not_ready)
        except OSError as error:
            self.status.web_problem = f"no metrics: http_port {self.config.http_port} cannot be used: {error}"
            log.error("serving without HTTP", reason=self.status.web_problem)
            return None
        self.status.web_address = web.address
        return web

    def _why_not_ready(self) -> str:
        if not self._is_serving:
            return "the daemon is starting or stopping"
        reason = self.store.why_full()
        return f"nothing can be stored: {reason}" if reason else ""

    def start(self) -> None:
        """Listens and serves."""
        path = self.config.socket_path
        try:
            self._server.add_insecure_port(f"unix:{path}")
            path.chmod(0o600)
            if self.config.listen:
                self._server.add_insecure_port(self.config.listen)
        except (RuntimeError, OSError) as error:
            self.stop()
            raise KvcachedError(f"cannot listen on {path} {self.config.listen}: {error}") from None
        self._lending.start(segment_socket(f"unix:{path}"))
        self._server.start()
        for name in ("", protocol.SERVICE):
            self.health.set(name, HealthCheckResponse.SERVING)
        self._is_serving = True
        if self._web:
            self._web.start()
        if self.config.http_port:
            self.health.set(HTTP_HEALTH, HealthCheckResponse.SERVING if self._web else HealthCheckResponse.NOT_SERVING)

    def stop(self) -> None:
        """Drains and closes; returns when all is on disk."""
        self._is_serving = False
        self.health.enter_graceful_shutdown()
        stopped = self._server.stop(grace=self.config.drain_seconds)
        was_idle = False
        while not stopped.wait(0.05):
            if was_idle and self._service.is_idle:  # answers are out; watchers of health would stay
                self._server.stop(grace=None)
            was_idle = self._service.is_idle
        self._lending.stop()
        self.pool.close()
        if self._web:
            self._web.stop()
        self.config.socket_path.unlink(missing_ok=True)  # before the store is let go: the next daemon may bind at once
        self.store.close()


def serve(config: Config) -> None:
    """Runs a daemon until SIGTERM or SIGINT. Raises KvcachedError if it cannot start."""
    # Blocked in every thread and waited for: a handler that sets an event can deadlock with the wait it interrupts.
    stop_signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals)
    daemon = Daemon(config)
    for moved in daemon.store.set_aside:
        log.warning("a store that could not be trusted was moved aside", moved=moved)
    daemon.start()
    log.info(
        "serving",
        version=__version__,
        socket=str(config.socket_path),
        store=str(config.store_path),
        http=daemon.status.web_address,
    )
    signal.sigwait(stop_signals)
    log.info("stopping", drain_seconds=config.drain_seconds)
    daemon.stop()
    log.info("stopped")


def _with_settings(command: Callable[..., Any]) -> Callable[..., Any]:
    """A flag for each setting; its validator is the setting's, not click's."""
    for name in reversed(Config.model_fields):
        command = click.option(f"--{name.replace('_', '-')}", name, help=describe(name))(command)
    return command


@click.command(help="The kvcached daemon: a persistent, shared, compressed KV cache for language models.")
@click.version_option(__version__)
@click.option("--config", "file", type=click.Path(path_type=Path), help="configuration file (TOML)")
@_with_settings
def main(file: Path | None, **flags: str | None) -> None:
    try:
        config = load({name: value for name, value in flags.items() if value is not None}, file=file)
    except KvcachedError as error:
        raise click.UsageError(str(error)) from None
    os.umask(0o077)
    try:
        logs.configure(config)
        serve(config)
    except KvcachedError as error:
        log.error("cannot start", reason=str(error))
        sys.exit(1)
    if is_fitting():  # OpenBLAS, when unloaded, may wait for ever for what it computes
        os._exit(0)
