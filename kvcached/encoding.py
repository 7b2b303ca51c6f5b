"""How a block becomes a frame: as wished where that can be, and else at the next better fidelity.

What cannot be compacted, or would lose more than its profile allows, is coded with the same profile; what cannot be
coded is kept exactly. Each fall is counted, and told once for each model.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import structlog
from jaxtyping import BFloat16, Float16, Float32

from kvcached import codec
from kvcached.block import BlockId, Fidelity, FidelityKind, KVBlock, ModelSpec
from kvcached.bundles import Bundles, Installed
from kvcached.codec.bundle import DEFAULT_PROFILE
from kvcached.codec.compactor import COMPACTED_PROFILES
from kvcached.config import Config
from kvcached.errors import CorruptFrameError, PreconditionError, UnsupportedFrameError, UnsupportedRopeError
from kvcached.metrics import Metrics
from kvcached.pool import Pipeline, WorkerPool
from kvcached_client._proto import kvcached_pb2 as pb

log = structlog.get_logger()
# Names of compacted fidelities, beside those of the profiles that code what is left.
COMPACTED: Mapping[str, str] = {f"compacted-{profile}": profile for profile in COMPACTED_PROFILES}
# Why a block falls to a better fidelity; the first that fits.
_REASONS: Mapping[type[Exception], str] = {
    codec.LossError: "loss",
    ValueError: "values",
    CorruptFrameError: "values",  # compaction decodes the keys that it coded
    RuntimeError: "values",  # a fit of scipy's that does not end
    UnsupportedRopeError: "rope",
    UnsupportedFrameError: "bundle",
}
_FALLS = tuple(_REASONS)
_CODED, _EXACT = "block that was to be compacted is coded", "block stored exactly"

Queries32 = Float32[np.ndarray, "n_layers n_query_heads n_queries key_dim"]
Queries = (
    Float16[np.ndarray, "n_layers n_query_heads n_queries key_dim"]
    | BFloat16[np.ndarray, "n_layers n_query_heads n_queries key_dim"]
    | Queries32
)


@dataclass(frozen=True, slots=True)
class Wish:
    """What a put says of how it is to be stored. Empty: as the settings say, with the model's current bundle."""

    fidelity: str = ""  # "exact", a profile, or the name of a compacted one
    bundle_id: bytes = b""
    am_ratio: float = 0.0  # 0: as the settings say


class Encoding:
    """Chooses how blocks are stored, and stores them so. Thread-safe."""

    def __init__(self, bundles: Bundles, pool: WorkerPool, metrics: Metrics) -> None:
        self._bundles, self._pool, self._metrics = bundles, pool, metrics
        self._told: set[tuple[bytes, str]] = set()  # models, and what the log has of them

    def choose(self, spec: ModelSpec, entry: pb.Entry, wish: Wish, config: Config) -> Fidelity:
        """How a block is to be stored. What has no bundle, or a bundle without the profile, is stored exactly.

        A ratio of 1 is the identity, and coded. Raises PreconditionError if the wish names a bundle that is not there,
        or of another model.
        """
        name = wish.fidelity or config.fidelity_of(entry.namespace)
        bundle = self._bundle(spec, wish.bundle_id)
        if bundle is None or entry.min_fidelity == pb.FIDELITY_KIND_EXACT:
            return Fidelity()
        says = bundle.outline
        # A loss that nobody measured is nobody's default.
        profile, known = (
            (DEFAULT_PROFILE, says.measured) if name == "auto" else (COMPACTED.get(name, name), says.profiles)
        )
        if profile not in known:
            return Fidelity()
        coded = Fidelity(FidelityKind.CODED, profile, bundle_id=bundle.bundle_id)
        ratio = float(np.float32(wish.am_ratio or config.am_ratio_of(entry.namespace)))  # as messages hold it
        if name not in COMPACTED or ratio <= 1 or entry.min_fidelity == pb.FIDELITY_KIND_CODED:
            return coded
        if not says.compacts:
            self._note_coded(
                spec, UnsupportedFrameError(f"bundle {bundle.bundle_id.hex()} has nothing to compact with")
            )
            return coded
        return replace(coded, kind=FidelityKind.COMPACTED, am_ratio=ratio)

    def _bundle(self, spec: ModelSpec, bundle_id: bytes) -> Installed | None:
        if not bundle_id:
            return self._bundles.newest(spec)
        if bundle := self._bundles.installed(bundle_id):
            bundle.check_fits(spec)
            return bundle
        raise PreconditionError(f"unknown bundle {bundle_id.hex()}: install it first")

    def pipeline(self, spec: ModelSpec) -> Pipeline:
        return self._pool.pipeline(spec, lambda spec: Pipeline(spec, self._bundles.get, self._pool.device))

    def frame(
        self,
        spec: ModelSpec,
        block_id: BlockId,
        block: KVBlock,
        entry: pb.Entry,
        queries: Queries | None,
        zstd_level: int,
    ) -> bytes:
        """In a worker: the frame of a block. The entry, which says what it is to be, then says what it is.

        queries: of every query head, from after the block, rotary positions applied; None: there are none.
        """
        start, pipeline = time.perf_counter(), self.pipeline(spec)
        encode = partial(pipeline.encode, block_id, lineage=FidelityKind(entry.lineage), zstd_level=zstd_level)
        frame = None
        if entry.fidelity.kind == pb.FIDELITY_KIND_COMPACTED:
            frame = self._compacted(pipeline, encode, block, entry, queries)
        if entry.fidelity.kind == pb.FIDELITY_KIND_CODED:
            frame = self._coded(pipeline, encode, block, entry)
        frame = frame or encode(block)
        fidelity = FidelityKind(entry.fidelity.kind).name
        self._metrics.encode_seconds.labels(fidelity).observe(time.perf_counter() - start)
        return frame

    def _compacted(
        self, pipeline: Pipeline, encode: "partial[bytes]", block: KVBlock, entry: pb.Entry, queries: Queries | None
    ) -> bytes | None:
        """The frame, compacted; None if it cannot be, and then the entry says CODED."""
        start, asked = time.perf_counter(), Fidelity.from_proto(entry.fidelity)
        usable, source = _usable(queries)
        try:
            compactor = pipeline.compactor(asked)
            compacted = codec.compact(block, compactor, usable)
            if compacted.block.is_dense:  # a ratio so near to 1 that all tokens stay
                return self._as_coded(entry)
            self._metrics.compaction_seconds.observe(time.perf_counter() - start)
            frame = encode(compacted.block, coder=compactor)
        except _FALLS as error:
            self._note_coded(pipeline.spec, error)
            return self._as_coded(entry)
        entry.mass_error, entry.output_error = compacted.mass_error, compacted.output_error
        self._metrics.compacted_blocks.labels(source).inc()
        self._metrics.compaction_source_rows.inc(block.lengths.sum())
        self._metrics.compaction_kept_rows.inc(compacted.block.lengths.sum())
        return frame

    @staticmethod
    def _as_coded(entry: pb.Entry) -> None:
        entry.fidelity.kind, entry.fidelity.am_ratio = pb.FIDELITY_KIND_CODED, 0.0

    def _coded(self, pipeline: Pipeline, encode: "partial[bytes]", block: KVBlock, entry: pb.Entry) -> bytes | None:
        """The frame, coded; None if it cannot be, and then the entry says EXACT."""
        try:
            return encode(block, coder=pipeline.coder(entry.fidelity.bundle_id, entry.fidelity.profile))
        except _FALLS as error:
            self._metrics.exact_fallback_blocks.labels(_reason(error)).inc()
            self._tell(pipeline.spec, _EXACT, error)
            entry.fidelity.CopyFrom(Fidelity().to_proto())
            return None

    def _note_coded(self, spec: ModelSpec, error: Exception) -> None:
        self._metrics.coded_fallback_blocks.labels(_reason(error)).inc()
        self._tell(spec, _CODED, error)

    def _tell(self, spec: ModelSpec, what: str, error: Exception) -> None:
        if (spec.model_id, what) not in self._told:
            self._told.add((spec.model_id, what))
            log.warning(f"{what}, this is told once", model=spec.name, reason=_reason(error), error=str(error))


def _reason(error: Exception) -> str:
    return next(reason for kind, reason in _REASONS.items() if isinstance(error, kind))


def _usable(queries: Queries | None) -> tuple[Queries32 | None, str]:
    """Queries to compact with, None for the bundle's own; and the label of where they are from.

    Those that are not finite, or of which each head has the same one over and over, say nothing of what will be read.
    """
    if queries is None:
        return None, "bundle"
    numbers = queries.astype(np.float32)
    if not np.isfinite(numbers).all() or (numbers == numbers[:, :, :1]).all():
        return None, "unusable"
    return numbers, "engine"
