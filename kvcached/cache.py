"""put, get, match: the whole policy, one screen each.

Joins the pool (which encodes and decodes) and the store (which keeps). Knows nothing of messages: the border has
checked what comes in. Futures carry answers, so that a stream can have many blocks under way.
"""

import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, wait
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile

import structlog

from kvcached.block import Allocate, BlockId, Fidelity, FidelityKind, KVBlock, ModelSpec, fresh
from kvcached.bundles import Bundles
from kvcached.config import Config
from kvcached.encoding import Encoding, Queries, Wish
from kvcached.errors import (
    CorruptFrameError,
    KvcachedError,
    PreconditionError,
    QuotaExceededError,
    UnsupportedFrameError,
)
from kvcached.metrics import Metrics
from kvcached.pool import Lane, Pipeline, WorkerPool, warm_kernels
from kvcached.records import improves
from kvcached.store import Store
from kvcached_client._proto import kvcached_pb2 as pb

log = structlog.get_logger()
_LATE_SECONDS = 60.0
Stored = tuple[pb.Outcome, pb.Entry]


@dataclass(frozen=True, slots=True)
class Floor:
    """The least that a caller accepts, of a block's own fidelity and of what its prefix was computed on."""

    kind: FidelityKind = FidelityKind.EXACT
    accepts_compacted: bool = False

    def accepts(self, entry: pb.Entry) -> bool:
        if entry.fidelity.kind == pb.FIDELITY_KIND_COMPACTED and not self.accepts_compacted:
            return False
        return min(entry.fidelity.kind, entry.lineage) >= self.kind


@dataclass(slots=True, eq=False)
class _Claim:
    """A put under way. `n_bytes`: the room it takes in memory, of `client`. `done`: the answer.

    waiting: children that are encoded and wait for this commit to be queued before theirs; None once nobody must wait.
    """

    entry: pb.Entry
    n_bytes: int
    client: Hashable
    done: "Future[Stored]" = field(default_factory=Future)
    encoded: "Future[bytes]" = field(default_factory=Future)
    waiting: "list[tuple[BlockId, _Claim]] | None" = field(default_factory=list)


@dataclass(frozen=True, slots=True, eq=False)
class Fetch:
    """A block on its way out. The room it takes in memory is given back once, by `release` when it was sent."""

    block_id: BlockId
    found: "Future[tuple[pb.Entry, KVBlock] | None]"
    release: Callable[[], None]

    def abandon(self) -> None:
        """For one that is not going to be sent: nor is it decoded, unless that has begun."""
        self.found.cancel()
        release = self.release  # a callback that knew of its own future would keep its block alive
        self.found.add_done_callback(lambda _: release())  # its memory is written to until then


class Cache:
    """The policy of one daemon. Thread-safe."""

    def __init__(self, store: Store, pool: WorkerPool, metrics: Metrics, config: Config) -> None:
        self.store, self.pool, self.metrics, self.config = store, pool, metrics, config
        self.bundles = Bundles(store.path / "bundles")
        store.replace_unless(self._has_bundle)
        self._models = store.models()
        self._encoding = Encoding(self.bundles, pool, metrics)
        self._lock = threading.Lock()  # guards the claims
        self._claims: dict[BlockId, _Claim] = {}

    # ---- models

    def register(self, spec: ModelSpec) -> bool:
        """Whether the model was known already."""
        known = spec.model_id in self._models
        if not known:
            self.store.put_model(spec).result()
            self._models[spec.model_id] = spec
            log.info("model registered", model=spec.name, model_id=spec.model_id.hex())
        return known

    def model(self, model_id: bytes) -> ModelSpec:
        """Raises PreconditionError if the model is not registered."""
        if spec := self._models.get(model_id):
            return spec
        raise PreconditionError(f"unknown model {model_id.hex() or '(empty)'}: register it first")

    def models(self) -> dict[bytes, ModelSpec]:
        return dict(self._models)

    # ---- fidelity

    def choose(self, spec: ModelSpec, entry: pb.Entry, wish: Wish) -> Fidelity:
        """See Encoding.choose."""
        return self._encoding.choose(spec, entry, wish, self.config)

    def warm(self) -> None:
        """Does what the first block that is coded would wait for: compiles kernels, reads and checks bundles."""
        if self.bundles.all():
            warm_kernels()
        for spec in self.models().values():
            self.bundles.current(spec)

    def _has_bundle(self, entry: pb.Entry) -> bool:
        """Whether what is needed to decode a block is there."""
        bundle_id = entry.fidelity.bundle_id
        return not bundle_id or self.bundles.installed(bundle_id) is not None

    def remove_bundle(self, bundle_id: bytes, with_blocks: bool) -> int:
        """Removes a bundle, or what a lost one left; how many blocks were deleted, descendants included.

        Raises PreconditionError if there is none, or blocks need it and may not go.
        """
        needing = self.store.blocks_of_bundle(bundle_id) if bundle_id else []
        if not needing and not self.bundles.installed(bundle_id):
            raise PreconditionError(f"unknown bundle {bundle_id.hex() or '(empty)'}")
        if needing and not with_blocks:
            raise PreconditionError(f"{len(needing)} blocks cannot be read without bundle {bundle_id.hex()}")
        n_deleted = self.delete(needing)
        self.bundles.remove(bundle_id)
        self.pool.forget(bundle_id)
        with self._lock:  # what is being coded with it, and committed too late
            late = [c.done for c in self._claims.values() if c.entry.fidelity.bundle_id == bundle_id]
        wait(late, _LATE_SECONDS)
        return n_deleted + self.delete(self.store.blocks_of_bundle(bundle_id))

    # ---- the three walks

    def match(
        self, spec: ModelSpec, block_ids: Sequence[BlockId], floor: Floor, *, is_lookup: bool = True
    ) -> list[pb.Entry]:
        """Entries of the leading blocks that are held and good enough; counted if it is a lookup."""
        held = self.store.chain(block_ids)
        entries = list(takewhile(lambda entry: floor.accepts(entry) and self._has_bundle(entry), held))
        self.store.touch(block_ids[: len(entries)])
        if is_lookup:
            self.metrics.lookup_tokens.inc(len(block_ids) * spec.block_size)
            self.metrics.lookup_hit_tokens.inc(len(entries) * spec.block_size)
        return entries

    def put(
        self,
        block_id: BlockId,
        entry: pb.Entry,
        block: KVBlock,
        queries: Queries | None = None,
        client: Hashable = None,
    ) -> "Future[Stored]":
        """Encodes and commits a block; queries: what to compact it with, see Encoding.frame.

        Room was reserved in `pool.puts`, by `client`, for its source bytes and its queries, and is given back when it
        is done.
        Of several puts of one block at once, one is encoded, unless a later one is better. A block whose parent is
        still under way is committed behind it. The future raises KvcachedError.
        """
        claim = _Claim(entry, entry.source_bytes + (0 if queries is None else queries.nbytes), client)
        claim.done.add_done_callback(lambda done: self._put_done(block_id, claim, done))
        with self._lock:
            other = self._claims.get(block_id)
            parent = self._claims.get(BlockId(block_id.model_id, block_id.namespace, entry.parent_hash))
            joins = other is not None and _same_place(entry, other.entry) and not improves(entry, other.entry)
            if not joins:
                self._claims[block_id] = claim
        if other and joins:
            other.done.add_done_callback(lambda done: _answer(claim, done.exception() or _held(done.result())))
            return claim.done
        try:
            if held := self.store.no_worse(block_id, entry):
                return self._answer_early(claim, (pb.OUTCOME_ALREADY_HELD, held))
            claim.encoded = self.pool.submit(Lane.PUT, self._encode, block_id, block, entry, queries, client=client)
        except Exception as error:  # noqa: BLE001 - a claim that is never answered is a hang
            return self._answer_early(claim, error)
        claim.encoded.add_done_callback(lambda _: self._commit_behind(parent, block_id, claim))
        return claim.done

    def _commit_behind(self, parent: _Claim | None, block_id: BlockId, claim: _Claim) -> None:
        """Commits an encoded block as soon as its parent's commit is queued."""
        with self._lock:
            if parent and parent.waiting is not None:
                parent.waiting.append((block_id, claim))
                return
        self._commit_all([(block_id, claim)])

    def _commit_all(self, ready: list[tuple[BlockId, _Claim]]) -> None:
        """Queues commits, and those of the children that waited for them. A loop, for chains are longer than stacks."""
        while ready:
            block_id, claim = ready.pop()
            try:
                stored = self.store.put(block_id, claim.entry, claim.encoded.result())
                stored.add_done_callback(partial(_answer_as, claim))
            except (Exception, CancelledError) as error:  # noqa: BLE001 - a claim that is never answered is a hang
                _answer(claim, error)
            ready += self._let_go(claim)

    def _let_go(self, claim: _Claim) -> list[tuple[BlockId, _Claim]]:
        """Those who waited for a claim; nobody does from now on."""
        with self._lock:
            waiting, claim.waiting = claim.waiting or [], None
        return waiting

    def _answer_early(self, claim: _Claim, answer: Stored | BaseException) -> "Future[Stored]":
        """Answers a claim that has nothing to commit."""
        _answer(claim, answer)
        self._commit_all(self._let_go(claim))
        return claim.done

    def get(
        self,
        block_id: BlockId,
        floor: Floor,
        wait_seconds: float,
        memory_for: Callable[[pb.Entry], Allocate] = lambda _entry: fresh,
        client: Hashable = None,
    ) -> Fetch:
        """Starts to fetch a block for a client. Raises OverloadedError if there is no room for it in time.

        memory_for: asked at once, unless it is a miss, where the tensors of a block are to be decoded.
        A miss is a block that is absent, below the floor, or damaged (then it is gone).
        """
        entry = self.store.entry(block_id)
        if entry is None or not floor.accepts(entry):
            self.metrics.block_misses.labels("below_floor" if entry else "absent").inc()
            miss: Future[tuple[pb.Entry, KVBlock] | None] = Future()
            miss.set_result(None)
            return Fetch(block_id, miss, lambda: None)
        n_bytes = entry.source_bytes
        self.pool.gets.take(n_bytes, wait_seconds, client)
        self.store.touch([block_id])
        try:
            found = self.pool.submit(Lane.GET, self._read, block_id, memory_for(entry), client=client)
            return Fetch(block_id, found, lambda: self.pool.gets.give_back(n_bytes, client))
        except BaseException:
            self.pool.gets.give_back(n_bytes, client)
            raise

    # ---- administration

    def delete(self, block_ids: Sequence[BlockId]) -> int:
        return self.store.delete(block_ids, "deleted").result()

    def reconfigure(self, config: Config) -> Config:
        """Applies settings that may change while running. Raises PreconditionError for a quota beyond the open file."""
        if config.quota_bytes > self.store.max_quota_bytes:
            raise PreconditionError(f"quota_bytes above {self.store.max_quota_bytes} needs a restart")
        self.config = config
        self.store.free_floor_bytes = config.free_floor_bytes
        self.store.quota_bytes = config.quota_bytes
        self.pool.puts.limit_bytes = self.pool.gets.limit_bytes = config.queue_bytes
        try:
            self.store.fit_quota().result()
        except QuotaExceededError as error:  # what is pinned stays; nothing new comes in until it fits
            log.warning("the store is larger than its new quota", reason=str(error))
        return config

    def check(self, frames: bool) -> Iterator[str]:
        """Problems of the store; with `frames`, every block is decoded too, and bad ones are reported, not removed."""
        yield from self.store.check()
        for block_id in self.store.block_ids() if frames else ():
            try:
                self.pool.submit(Lane.GET, self._decode, block_id).result()
            except KvcachedError as error:
                yield f"block {block_id}: {error}"

    def _put_done(self, block_id: BlockId, claim: _Claim, done: "Future[Stored]") -> None:
        with self._lock:
            if self._claims.get(block_id) is claim:
                del self._claims[block_id]
        self.pool.puts.give_back(claim.n_bytes, claim.client)
        if error := done.exception():
            self.count_refused(error)
            return
        outcome, stored = done.result()
        self.metrics.put_blocks.labels(pb.Outcome.Name(outcome).removeprefix("OUTCOME_").lower()).inc()
        if outcome in (pb.OUTCOME_STORED, pb.OUTCOME_REPLACED):
            self.metrics.put_source_bytes.inc(stored.source_bytes)
            self.metrics.put_stored_bytes.inc(stored.stored_bytes)

    def count_refused(self, error: BaseException) -> None:
        self.metrics.put_blocks.labels("refused").inc()
        self.metrics.refused_blocks.labels(error.code if isinstance(error, KvcachedError) else "INTERNAL").inc()

    def _read(self, block_id: BlockId, allocate: Allocate) -> tuple[pb.Entry, KVBlock] | None:
        """In a worker: the block, or None if it left in the meantime or cannot be read."""
        start, found, reason = time.perf_counter(), None, "absent"
        try:
            found = self._decode(block_id, allocate)
        except CorruptFrameError as error:
            log.error("corrupt block, removed with its descendants", block=str(block_id), error=str(error))
            self.metrics.corrupt_blocks.inc()
            self.store.delete([block_id], "corrupt")
            reason = "corrupt"
        except UnsupportedFrameError as error:
            log.warning("block that cannot be decoded, left alone", block=str(block_id), error=str(error))
            reason = "unsupported"
        if not found:
            self.metrics.block_misses.labels(reason).inc()
            return None
        entry, fidelity = found[0], FidelityKind(found[0].fidelity.kind).name
        self.metrics.decode_seconds.labels(fidelity).observe(time.perf_counter() - start)
        self.metrics.block_hits.labels(fidelity).inc()
        self.metrics.get_source_bytes.inc(entry.source_bytes)
        return found

    def _encode(self, block_id: BlockId, block: KVBlock, entry: pb.Entry, queries: Queries | None) -> bytes:
        spec = self.model(block_id.model_id)
        return self._encoding.frame(spec, block_id, block, entry, queries, self.config.zstd_level)

    def _decode(self, block_id: BlockId, allocate: Allocate = fresh) -> tuple[pb.Entry, KVBlock] | None:
        found = self.store.frame(block_id)
        if found is None:
            return None
        entry, frame = found
        pipeline = self._pipeline(self.model(block_id.model_id))
        fidelity = Fidelity.from_proto(entry.fidelity)
        return entry, pipeline.decode(block_id, frame, entry.source_bytes, fidelity, allocate)

    def _pipeline(self, spec: ModelSpec) -> Pipeline:
        return self._encoding.pipeline(spec)


def _answer(claim: _Claim, answer: Stored | BaseException) -> None:
    if isinstance(answer, BaseException):
        claim.done.set_exception(answer)
    else:
        claim.done.set_result(answer)


def _answer_as(claim: _Claim, stored: "Future[Stored]") -> None:
    _answer(claim, stored.exception() or stored.result())


def _same_place(a: pb.Entry, b: pb.Entry) -> bool:
    """Whether two puts of one block say the same of where it is: a wrong one must not answer for a right one."""
    return (a.index, a.first_position, a.n_tokens) == (b.index, b.first_position, b.n_tokens)


def _held(stored: Stored) -> Stored:
    """The answer to a put that joined another one of the same block."""
    return pb.OUTCOME_ALREADY_HELD, stored[1]
