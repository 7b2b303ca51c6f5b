"""The worker pool: threads that encode and decode, bounded in bytes, and one pipeline for each model.

Threads, because zstd and numpy release the GIL and blocks need not be copied. Gets go before puts, each in the order of
arrival. Puts reserve room before their bytes are received, and are refused when there is none; gets wait for it.
Locks: a model's own while its pipeline is built; a pipeline's while it builds a coder, and inside it one for all while
the kernels of the entropy coder are compiled; the pool's for everything else, held for moments only.
"""

import itertools
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from enum import IntEnum
from functools import cache
from typing import Any, TypeVar

from kvcached import codec
from kvcached.block import BlockId, Fidelity, FidelityKind, KVBlock, ModelSpec
from kvcached.codec import entropy
from kvcached.codec.bundle import Bundle, Coder
from kvcached.errors import OverloadedError, ShuttingDownError, UnsupportedFrameError

T = TypeVar("T")
_MAX_CODERS = 4  # of a model; each holds the bases of its bundle
_warming = threading.Lock()
_warm_once = cache(entropy.warm)


class Lane(IntEnum):
    """Who goes first."""

    GET = 0
    PUT = 1
    STOP = 2  # behind all work


class ByteBudget:
    """Bytes that may be under way. One block is let in even if it alone is larger than the limit."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self._changed = threading.Condition()

    def take(self, n_bytes: int, wait_seconds: float = 0.0) -> None:
        """Raises OverloadedError if there is no room in time."""

        def fits() -> bool:
            return not self.used_bytes or self.used_bytes + n_bytes <= self.limit_bytes

        with self._changed:
            if not self._changed.wait_for(fits, wait_seconds):
                raise OverloadedError(
                    f"{self.used_bytes} of {self.limit_bytes} bytes are under way, no room for {n_bytes}: try later"
                )
            self.used_bytes += n_bytes

    def give_back(self, n_bytes: int) -> None:
        with self._changed:
            self.used_bytes -= n_bytes
            self._changed.notify_all()


def warm_kernels() -> None:
    """Loads or compiles the kernels of the entropy coder, which takes seconds: once, however many ask."""
    with _warming:
        _warm_once()


def _no_bundle(_bundle_id: bytes) -> Bundle | None:
    return None


class Pipeline:
    """How blocks of one model become frames and back. Made once per model; used by all workers at once.

    bundle_of: a bundle by its id, None if it is not there.
    """

    def __init__(self, spec: ModelSpec, bundle_of: Callable[[bytes], Bundle | None] = _no_bundle) -> None:
        self.spec = spec
        self._bundle_of = bundle_of
        self._lock = threading.Lock()  # guards the coders, the last used last
        self._coders: OrderedDict[tuple[bytes, str], Coder] = OrderedDict()

    def encode(
        self, block_id: BlockId, block: KVBlock, lineage: FidelityKind, zstd_level: int, coder: Coder | None = None
    ) -> bytes:
        """See codec.encode."""
        return codec.encode(block_id, block, lineage=lineage, zstd_level=zstd_level, coder=coder)

    def decode(
        self, block_id: BlockId, frame: bytes, max_source_bytes: int, fidelity: Fidelity | None = None
    ) -> KVBlock:
        """See codec.decode. fidelity: of the frame, which names its coder; None: EXACT."""
        is_coded = fidelity is not None and fidelity.kind == FidelityKind.CODED
        coder = self.coder(fidelity.bundle_id, fidelity.profile) if fidelity and is_coded else None
        return codec.decode(block_id, frame, max_source_bytes, coder)

    def coder(self, bundle_id: bytes, profile: str) -> Coder:
        """A profile of a bundle, ready for use: built once, however many ask at the same time.

        Raises UnsupportedFrameError if the bundle is not there, or does not have the profile.
        """
        key = (bundle_id, profile)
        with self._lock:
            if key not in self._coders:
                self._coders[key] = self._build(bundle_id, profile)
            self._coders.move_to_end(key)
            if len(self._coders) > _MAX_CODERS:
                self._coders.popitem(last=False)
            return self._coders[key]

    def forget(self, bundle_id: bytes) -> None:
        """Lets go of the coders of a bundle."""
        with self._lock:
            for key in [key for key in self._coders if key[0] == bundle_id]:
                del self._coders[key]

    def _build(self, bundle_id: bytes, profile: str) -> Coder:
        bundle = self._bundle_of(bundle_id)
        if bundle is None or profile not in bundle.profiles:
            missing = f"profile {profile!r} of bundle {bundle_id.hex()}"
            raise UnsupportedFrameError(f"{missing} is needed, and not installed")
        warm_kernels()
        return bundle.coder(profile)


class WorkerPool:
    """Threads and what they share. See the module."""

    def __init__(self, n_workers: int, limit_bytes: int) -> None:
        self.puts, self.gets = ByteBudget(limit_bytes), ByteBudget(limit_bytes)
        self._lock = threading.Lock()
        self._jobs: queue.PriorityQueue[tuple[Lane, int, Future[Any] | None, Callable[[], Any]]] = queue.PriorityQueue()
        self._serial = itertools.count()
        self._closed = False
        self._pipelines: dict[bytes, Pipeline] = {}
        self._model_locks: dict[bytes, threading.Lock] = {}
        self._threads = [threading.Thread(target=self._work, name=f"worker-{i}", daemon=True) for i in range(n_workers)]
        for thread in self._threads:
            thread.start()

    @property
    def n_workers(self) -> int:
        return len(self._threads)

    @property
    def n_jobs(self) -> int:
        """Jobs that wait for a worker."""
        return self._jobs.qsize()

    def submit(self, lane: Lane, job: Callable[..., T], *args: Any) -> Future[T]:
        """Runs a job in a worker. Raises ShuttingDownError once the pool is closed."""
        future: Future[T] = Future()
        with self._lock:
            if self._closed:
                raise ShuttingDownError("the daemon is shutting down")
            self._jobs.put((lane, next(self._serial), future, lambda: job(*args)))
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
            while not self._jobs.empty():
                _, _, future, _ = self._jobs.get_nowait()
                if future is not None:
                    future.set_exception(ShuttingDownError("dropped: the daemon is shutting down"))
            for _ in self._threads:
                self._jobs.put((Lane.STOP, next(self._serial), None, lambda: None))
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while True:
            _, _, future, job = self._jobs.get()
            if future is None:
                return
            try:
                result = job()
            except BaseException as error:  # noqa: BLE001 - the future carries it to whoever asked
                future.set_exception(error)
            else:
                future.set_result(result)
            del future, job  # or this thread would keep the last block alive until the next
