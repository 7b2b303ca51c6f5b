"""What the daemon holds and does: one set of numbers, for people (Status) and for Prometheus (gauges)."""

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvcached import __version__, wear
from kvcached.block import FidelityKind
from kvcached.cache import Cache
from kvcached.layout import Totals
from kvcached.lending import Lending
from kvcached.metrics import PREFIX
from kvcached_client._proto import kvcached_pb2 as pb

_MAX_ENGINES = 32
_MODEL_LABELS = ("model", "model_id", "fidelity")


class Status(Collector):
    """The state of one daemon. Thread-safe. web_address and web_problem are set by whoever serves HTTP."""

    def __init__(self, cache: Cache, lending: Lending) -> None:
        self.web_address = self.web_problem = ""
        self._cache, self._lending = cache, lending
        self._started = time.monotonic()
        self._lock = threading.Lock()  # guards the engines, latest last
        self._engines: OrderedDict[tuple[int, bytes, str], tuple[pb.Engine, float]] = OrderedDict()

    @property
    def uptime_seconds(self) -> float:
        return time.monotonic() - self._started

    def announce(self, engine: pb.Engine) -> None:
        """Remembers what an engine says of itself; the one that has been silent for longest is forgotten first."""
        key = (engine.pid, engine.model_id, engine.namespace)
        with self._lock:
            self._engines[key] = (engine, time.monotonic())
            self._engines.move_to_end(key)
            if len(self._engines) > _MAX_ENGINES:
                self._engines.popitem(last=False)

    def response(self) -> pb.StatusResponse:
        cache, totals = self._cache, self._cache.store.totals()
        return pb.StatusResponse(
            version=__version__,
            pid=os.getpid(),
            uptime_seconds=self.uptime_seconds,
            socket_path=str(cache.config.socket_path),
            store=self._store(totals),
            models=self._models(totals),
            pool=self._pool(),
            counters=cache.metrics.snapshot(),
            engines=self._announced(),
            web_address=self.web_address,
            web_problem=self.web_problem,
        )

    def _store(self, totals: dict[tuple[bytes, int], Totals]) -> pb.StoreStatus:
        store, usage = self._cache.store, self._cache.store.usage()
        return pb.StoreStatus(
            path=str(store.path),
            quota_bytes=store.quota_bytes,
            used_bytes=usage.used_bytes,
            file_bytes=usage.file_bytes,
            free_disk_bytes=usage.free_disk_bytes,
            set_aside=store.set_aside,
            **{name: sum(getattr(t, name) for t in totals.values()) for name in Totals._fields},
        )

    def _models(self, totals: dict[tuple[bytes, int], Totals]) -> list[pb.ModelStatus]:
        return [
            pb.ModelStatus(
                model_id=model_id,
                spec=spec.to_proto(),
                fidelities=[
                    pb.FidelityStatus(kind=pb.FidelityKind.Name(kind), **t._asdict())
                    for (owner, kind), t in totals.items()
                    if owner == model_id
                ],
                bundle_id=newest.bundle_id if (newest := self._cache.bundles.newest(spec)) else b"",
            )
            for model_id, spec in self._cache.models().items()
        ]

    def _pool(self) -> pb.PoolStatus:
        pool = self._cache.pool
        return pb.PoolStatus(
            n_workers=pool.n_workers,
            n_jobs=pool.n_jobs,
            put_bytes=pool.puts.used_bytes,
            get_bytes=pool.gets.used_bytes,
            limit_bytes=pool.puts.limit_bytes,
            device=pool.device.name,
        )

    def _announced(self) -> list[pb.Engine]:
        now, engines = time.monotonic(), []
        with self._lock:
            for engine, heard in reversed(self._engines.values()):
                shown = pb.Engine()
                shown.MergeFrom(engine)
                shown.seconds_since_announced = now - heard
                engines.append(shown)
        return engines

    # ---- for Prometheus

    def collect(self) -> Iterator[Metric]:
        totals = self._cache.store.totals()
        store, pool = self._store(totals), self._pool()
        yield _gauge("up_seconds", "Time since the daemon started", self.uptime_seconds)
        yield _gauge("quota_bytes", "What the store may take on disk", store.quota_bytes)
        yield _gauge("used_bytes", "Pages of the store's file that hold something", store.used_bytes)
        yield _gauge("file_bytes", "The store's file, with the pages it can reuse", store.file_bytes)
        yield _gauge("free_disk_bytes", "Free on the disk of the store", store.free_disk_bytes)
        yield _gauge("set_aside_stores", "Earlier stores that could not be trusted", len(store.set_aside))
        yield _gauge("bundles", "Bundles installed", len(self._cache.bundles.all()))
        yield _gauge("workers", "Threads that encode and decode; one more only decodes", pool.n_workers)
        yield _gauge("queue_jobs", "Jobs that wait for a worker", pool.n_jobs)
        yield _gauge("queue_limit_bytes", "Blocks that may be in memory, in each direction", pool.limit_bytes)
        queue_bytes = GaugeMetricFamily(f"{PREFIX}queue_bytes", "Blocks in memory, by direction", labels=["direction"])
        queue_bytes.add_metric(["put"], pool.put_bytes)
        queue_bytes.add_metric(["get"], pool.get_bytes)
        yield queue_bytes
        yield _gauge("leases", "Clients that share memory with the daemon", self._lending.n_leases)
        yield _gauge("segment_bytes", "Memory shared with clients", self._lending.used_bytes)
        if (written := wear.written_bytes()) is not None:
            what = "Bytes that the system wrote to disks for this process"
            yield CounterMetricFamily(f"{PREFIX}disk_written_bytes", what, value=written)
        yield from self._by_model(totals)

    def _by_model(self, totals: dict[tuple[bytes, int], Totals]) -> Iterator[Metric]:
        models = self._cache.models()
        for field, name, what in (
            ("n_blocks", "stored_blocks", "Blocks held"),
            ("n_tokens", "stored_tokens", "Tokens of the blocks held"),
            ("source_bytes", "source_bytes", "Bytes of the blocks held, as engines hold them"),
            ("stored_bytes", "stored_bytes", "Bytes of the blocks held, on disk, records included"),
        ):
            family = GaugeMetricFamily(PREFIX + name, f"{what}, by model and fidelity", labels=_MODEL_LABELS)
            for (model_id, kind), t in totals.items():
                model = models[model_id].name if model_id in models else ""
                family.add_metric([model, model_id.hex()[:16], FidelityKind(kind).name], getattr(t, field))
            yield family


def _gauge(name: str, description: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(PREFIX + name, description, value=value)
