"""Every series the daemon exports, named in one place, after Prometheus' conventions."""

from prometheus_client import CollectorRegistry, Counter, Histogram, Info

from kvcached import __version__

PREFIX = "kvcached_"


class Metrics:
    """The counters of one daemon, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        Info("kvcached_build", "Version that is running", registry=self.registry).info({"version": __version__})
        self.match_tokens = self._counter("match_tokens", "Tokens asked for in Match")
        self.match_hit_tokens = self._counter("match_hit_tokens", "Tokens held of those asked for in Match")
        self.put_blocks = self._counter("put_blocks", "Blocks put, by outcome", "outcome")
        self.put_source_bytes = self._counter("put_source_bytes", "Bytes of stored blocks as engines hold them")
        self.put_stored_bytes = self._counter("put_stored_bytes", "Bytes of stored blocks on disk")
        self.get_blocks = self._counter("get_blocks", "Blocks asked for, by outcome", "outcome")
        self.get_source_bytes = self._counter("get_source_bytes", "Bytes of served blocks as engines hold them")
        self.evicted_blocks = self._counter("evicted_blocks", "Blocks that left to make room")
        self.corrupt_blocks = self._counter("corrupt_blocks", "Blocks whose bytes failed a check when read")
        self.rpc_requests = self._counter("rpc_requests", "Calls, by method and status", "method", "code")
        self.rpc_seconds = Histogram(
            "kvcached_rpc_duration_seconds", "Duration of calls, by method", ["method"], registry=self.registry
        )

    def _counter(self, name: str, description: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, description, labels, registry=self.registry)

    def snapshot(self) -> dict[str, float]:
        """All counters by name without the prefix, labels as Prometheus writes them."""
        counters = {}
        for family in self.registry.collect():
            for sample in family.samples:
                if family.type == "counter" and sample.name.endswith("_total"):
                    labels = ",".join(f'{name}="{value}"' for name, value in sample.labels.items())
                    name = sample.name.removeprefix(PREFIX)
                    counters[f"{name}{{{labels}}}" if labels else name] = sample.value
        return counters
