"""The worker pool: threads that encode and decode, bounded in bytes, and one pipeline for each model.

Threads, because zstd and numpy release the GIL and blocks need not be copied. Gets go before puts; among either,
clients take turns, so that one with a thousand jobs delays another by one of them. One more thread serves gets alone,
for whoever generates waits for them, and compacting a block takes long. Puts reserve room before their bytes are
received, and are refused when there is none; gets wait for it. The last eighth of it is for clients that have none.
Locks: a model's own while its pipeline is built; a pipeline's while it builds a coder, and inside it one for all while
the kernels of the entropy coder are compiled; the pool's for everything else, held for moments only.
"""

import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from enum import IntEnum
from functools import cache
from typing import Any, Generic, TypeVar

from kvcached import codec
from kvcached.block import Allocate, BlockId, Fidelity, FidelityKind, KVBlock, ModelSpec, fresh
from kvcached.codec import entropy
from kvcached.codec.bundle import Bundle, Coder
from kvcached.codec.compactor import Compactor
from kvcached.devices import CPU, Device
from kvcached.errors import OverloadedError, ShuttingDownError, UnsupportedFrameError

T = TypeVar("T")
_MAX_CODERS = 4  # of a model, and as many that compact; each holds the bases of its bundle
_warming = threading.Lock()
_warm_once = cache(entropy.warm)


class Lane(IntEnum):
    """Who goes first."""

    GET = 0
    PUT = 1


class Turns(Generic[T]):
    """What waits, by client: they take turns, each in its own order. Not safe for concurrent calls."""

    def __init__(self) -> None:
        self._of: OrderedDict[Hashable, deque[T]] = OrderedDict()  # whose turn it is, first

    def __len__(self) -> int:
        return sum(map(len, self._of.values()))

    def add(self, client: Hashable, item: T) -> None:
        self._of.setdefault(client, deque()).append(item)

    def take(self) -> T:
        """Raises KeyError if nothing waits."""
        client, items = self._of.popitem(last=False)
        item = items.popleft()
        if items:
            self._of[client] = items
        return item


class ByteBudget:
    """Bytes that may be under way. One block is let in even if it alone is larger than the limit.

    A client that has bytes under way leaves an eighth of the limit to those that have none: however much one sends,
    another gets in. None is a client without a name, to whom this does not apply.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self._of: Counter[Hashable] = Counter()
        self._changed = threading.Condition()

    def take(self, n_bytes: int, wait_seconds: float = 0.0, client: Hashable = None) -> None:
        """Raises OverloadedError if there is no room in time."""

        def fits() -> bool:
            reserved_bytes = self.limit_bytes // 8 if self._of[client] else 0
            return not self.used_bytes or self.used_bytes + n_bytes <= self.limit_bytes - reserved_bytes

        with self._changed:
            if not self._changed.wait_for(fits, wait_seconds):
                raise OverloadedError(
                    f"{self.used_bytes} of {self.limit_bytes} bytes are under way, no room for {n_bytes}: try later"
                )
            self.used_bytes += n_bytes
            if client is not None:
                self._of[client] += n_bytes

    def give_back(self, n_bytes: int, client: Hashable = None) -> None:
        with self._changed:
            self.used_bytes -= n_bytes
            if client is not None:
                self._of[client] -= n_bytes
                self._of += Counter()  # forgets who has none
            self._changed.notify_all()


def warm_kernels() -> None:
    """Loads or compiles the kernels of the entropy coder, which takes seconds: once, however many ask."""
    with _warming:
        _warm_once()


def _no_bundle(_bundle_id: bytes) -> Bundle | None:
    return None


class Pipeline:
    """How blocks of one model become frames and back. Made once per model; used by all workers at once.

    bundle_of: a bundle by its id, None if it is not there. device: on which planes are transformed; the rows of single
    heads, of which compacted blocks are made, are too small to be sent anywhere.
    """

    def __init__(
        self, spec: ModelSpec, bundle_of: Callable[[bytes], Bundle | None] = _no_bundle, device: Device = CPU
    ) -> None:
        self.spec = spec
        self._bundle_of, self._device = bundle_of, device
        self._lock = threading.Lock()  # guards the coders and compactors, the last used last
        self._coders: OrderedDict[Fidelity, Coder] = OrderedDict()
        self._compactors: OrderedDict[Fidelity, Compactor] = OrderedDict()

    def encode(
        self,
        block_id: BlockId,
        block: KVBlock,
        lineage: FidelityKind,
        zstd_level: int,
        coder: Coder | Compactor | None = None,
    ) -> bytes:
        """See codec.encode."""
        return codec.encode(block_id, block, lineage=lineage, zstd_level=zstd_level, coder=coder)

    def decode(
        self,
        block_id: BlockId,
        frame: bytes,
        max_source_bytes: int,
        fidelity: Fidelity | None = None,
        allocate: Allocate = fresh,
    ) -> KVBlock:
        """See codec.decode. fidelity: of the frame, which names its coder; None: EXACT."""
        coder: Coder | Compactor | None = None
        if fidelity and fidelity.kind == FidelityKind.CODED:
            coder = self.coder(fidelity.bundle_id, fidelity.profile)
        elif fidelity and fidelity.kind == FidelityKind.COMPACTED:
            coder = self.compactor(fidelity)
        return codec.decode(block_id, frame, max_source_bytes, coder, allocate)

    def coder(self, bundle_id: bytes, profile: str) -> Coder:
        """A profile of a bundle, ready for use: built once, however many ask at the same time.

        Raises UnsupportedFrameError if the bundle is not there, or does not have the profile.
        """
        fidelity = Fidelity(FidelityKind.CODED, profile, bundle_id=bundle_id)
        return self._ready(
            self._coders, fidelity, lambda bundle: replace(bundle.coder(profile), product=self._device.product())
        )

    def compactor(self, fidelity: Fidelity) -> Compactor:
        """The same, for a fidelity that is COMPACTED, and for blocks of this model's size.

        Raises UnsupportedFrameError also if those have too few tokens for the ratio.
        """

        def build(bundle: Bundle) -> Compactor:
            if not bundle.compaction:
                raise KeyError("compaction")
            return bundle.compaction.compactor(self.spec, fidelity)

        return self._ready(self._compactors, fidelity, build)

    def forget(self, bundle_id: bytes) -> None:
        """Lets go of the coders of a bundle."""
        kept: tuple[OrderedDict[Fidelity, Any], ...] = (self._coders, self._compactors)
        with self._lock:
            for made in kept:
                for fidelity in [fidelity for fidelity in made if fidelity.bundle_id == bundle_id]:
                    del made[fidelity]

    def _ready(self, made: OrderedDict[Fidelity, T], fidelity: Fidelity, build: Callable[[Bundle], T]) -> T:
        with self._lock:
            if fidelity not in made:
                made[fidelity] = self._build(fidelity, build)
            made.move_to_end(fidelity)
            if len(made) > _MAX_CODERS:
                made.popitem(last=False)
            return made[fidelity]

    def _build(self, fidelity: Fidelity, build: Callable[[Bundle], T]) -> T:
        bundle = self._bundle_of(fidelity.bundle_id)
        missing = UnsupportedFrameError(
            f"profile {fidelity.profile!r} of bundle {fidelity.bundle_id.hex()} is needed, and not installed"
        )
        if bundle is None:
            raise missing
        warm_kernels()
        try:
            return build(bundle)
        except KeyError:
            raise missing from None
        except ValueError as error:
            raise UnsupportedFrameError(f"no block of {self.spec.name!r} is compacted so: {error}") from None


class WorkerPool:
    """Threads and what they share. See the module."""

    def __init__(self, n_workers: int, limit_bytes: int, device: Device = CPU) -> None:
        self.puts, self.gets, self.device = ByteBudget(limit_bytes), ByteBudget(limit_bytes), device
        self.n_workers = n_workers
        self._lock = threading.Lock()  # guards what follows
        self._work_came, self._get_came = threading.Condition(self._lock), threading.Condition(self._lock)
        self._waiting: dict[Lane, Turns[tuple[Future[Any], Callable[[], Any]]]] = {lane: Turns() for lane in Lane}
        self._closed = False
        self._pipelines: dict[bytes, Pipeline] = {}
        self._model_locks: dict[bytes, threading.Lock] = {}
        loops = {f"worker-{i}": (tuple(Lane), self._work_came) for i in range(n_workers)}
        loops["worker-gets"] = ((Lane.GET,), self._get_came)
        self._threads = [
            threading.Thread(target=self._work, args=of_thread, name=name, daemon=True)
            for name, of_thread in loops.items()
        ]
        for thread in self._threads:
            thread.start()

    @property
    def n_jobs(self) -> int:
        """Jobs that wait for a worker."""
        return sum(map(len, self._waiting.values()))

    def submit(self, lane: Lane, job: Callable[..., T], *args: Any, client: Hashable = None) -> Future[T]:
        """Runs a job in a worker, in the turn of a client. Raises ShuttingDownError once the pool is closed."""
        future: Future[T] = Future()
        with self._lock:
            if self._closed:
                raise ShuttingDownError("the daemon is shutting down")
            self._waiting[lane].add(client, (future, lambda: job(*args)))
            self._work_came.notify()  # one of each kind: all who wake want the interpreter at once
            if lane == Lane.GET:
                self._get_came.notify()
        return future

    def pipeline(self, spec: ModelSpec, build: Callable[[ModelSpec], Pipeline] = Pipeline) -> Pipeline:
        """The pipeline of a model: built once, however many ask at the same time; a failed build is tried again."""
        model_id = spec.model_id
        with self._lock:
            model_lock = self._model_locks.setdefault(model_id, threading.Lock())
        with model_lock:
            if model_id not in self._pipelines:
                self._pipelines[model_id] = build(spec)
            return self._pipelines[model_id]

    def forget(self, bundle_id: bytes) -> None:
        """Lets go of what was built from a bundle."""
        for pipeline in list(self._pipelines.values()):
            pipeline.forget(bundle_id)

    def close(self) -> None:
        """Finishes the jobs that run, drops those that wait."""
        with self._lock:
            self._closed = True
            dropped = [waiting.take()[0] for waiting in self._waiting.values() for _ in range(len(waiting))]
            self._work_came.notify_all()
            self._get_came.notify_all()
        for future in dropped:
            if future.set_running_or_notify_cancel():
                future.set_exception(ShuttingDownError("dropped: the daemon is shutting down"))
        for thread in self._threads:
            thread.join()

    def _next(self, lanes: Sequence[Lane], came: threading.Condition) -> tuple[Future[Any], Callable[[], Any]] | None:
        """Waits for the next job of some lanes, the first lane first; None at the end."""
        with came:
            came.wait_for(lambda: self._closed or any(self._waiting[lane] for lane in lanes))
            return next((self._waiting[lane].take() for lane in lanes if self._waiting[lane]), None)

    def _work(self, lanes: Sequence[Lane], came: threading.Condition) -> None:
        while (found := self._next(lanes, came)) is not None:
            future, job = found
            if not future.set_running_or_notify_cancel():  # nobody wants it any more
                continue
            try:
                result = job()
            except BaseException as error:  # noqa: BLE001 - the future carries it to whoever asked
                future.set_exception(error)
            else:
                future.set_result(result)
                del result
            del found, future, job  # or this thread would keep the last block alive until the next
