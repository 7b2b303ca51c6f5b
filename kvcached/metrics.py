"""Every counter and histogram of the daemon, named in one place, after Prometheus' conventions.

What can be read off the store and the pool is not counted here: `status.Gauges` exports it when somebody looks.
"""

from prometheus_client import CollectorRegistry, Counter, Histogram, Info, ProcessCollector

from kvcached import __version__

PREFIX = "kvcached_"
# Calls and codecs of a local service: a no-op call takes half a millisecond, a chain of large blocks seconds.
_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """The counters of one daemon, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        Info("kvcached_build", "Version that is running", registry=self.registry).info({"version": __version__})
        self.lookup_tokens = self._counter("lookup_tokens", "Tokens of full blocks asked for in Match")
        self.lookup_hit_tokens = self._counter("lookup_hit_tokens", "Tokens held of those asked for in Match")
        self.put_blocks = self._counter("put_blocks", "Blocks put, by outcome", "outcome")
        self.refused_blocks = self._counter("refused_blocks", "Blocks put and refused, by status", "code")
        self.put_source_bytes = self._counter("put_source_bytes", "Bytes of stored blocks as engines hold them")
        self.put_stored_bytes = self._counter("put_stored_bytes", "Bytes of stored blocks on disk, records included")
        self.block_hits = self._counter("block_hits", "Blocks asked for in Get and sent, by fidelity", "fidelity")
        self.block_misses = self._counter("block_misses", "Blocks asked for in Get and not sent, by reason", "reason")
        self.get_source_bytes = self._counter("get_source_bytes", "Bytes of sent blocks as engines hold them")
        what = "Blocks received in Put and sent in Get, by where their tensors were: in the stream or in shared memory"
        self.moved_blocks = self._counter("moved_blocks", what, "method", "road")
        self.evicted_blocks = self._counter("evicted_blocks", "Blocks that left, descendants too, by reason", "reason")
        self.corrupt_blocks = self._counter("corrupt_blocks", "Blocks whose bytes failed a check when read")
        what = "Blocks that were to be coded and are stored exactly, by reason"
        self.exact_fallback_blocks = self._counter("exact_fallback_blocks", what, "reason")
        what = "Blocks that were to be compacted and are kept at a better fidelity, by reason"
        self.coded_fallback_blocks = self._counter("coded_fallback_blocks", what, "reason")
        what = "Blocks compacted, by whose queries said what is read of them"
        self.compacted_blocks = self._counter("compacted_blocks", what, "queries")
        self.compaction_source_rows = self._counter("compaction_source_rows", "Tokens of KV heads before compaction")
        self.compaction_kept_rows = self._counter("compaction_kept_rows", "Tokens of KV heads left by compaction")
        self.rpc_requests = self._counter("rpc_requests", "Calls, by method and status", "method", "code")
        self.rpc_seconds = self._histogram("rpc_duration", "Duration of calls, by method and status", "method", "code")
        self.encode_seconds = self._histogram("encode_duration", "Time to encode a block", "fidelity")
        self.compaction_seconds = self._histogram("compaction_duration", "Time to compact a block, part of encoding it")
        self.decode_seconds = self._histogram("decode_duration", "Time to read and decode a block", "fidelity")

    def _counter(self, name: str, description: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, description, labels, registry=self.registry)

    def _histogram(self, name: str, description: str, *labels: str) -> Histogram:
        return Histogram(f"{PREFIX}{name}_seconds", description, labels, registry=self.registry, buckets=_BUCKETS)

    def snapshot(self) -> dict[str, float]:
        """All counters by name without the prefix, labels as Prometheus writes them."""
        counters = {}
        for family in self.registry.collect():
            for sample in family.samples:
                if family.type == "counter" and sample.name.startswith(PREFIX) and sample.name.endswith("_total"):
                    labels = ",".join(f'{name}="{value}"' for name, value in sample.labels.items())
                    name = sample.name.removeprefix(PREFIX)
                    counters[f"{name}{{{labels}}}" if labels else name] = sample.value
        return counters
