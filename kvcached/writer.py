"""The one thread that writes: operations from many threads, committed in groups.

An operation is a function of a write transaction. It checks before it changes anything: a KvcachedError that it raises
is its own answer, and the others of its group are not disturbed. Whatever else goes wrong (map full, disk full, damage)
aborts the transaction, and the operations are tried again one by one. An answered operation is on disk. The thread
outlives whatever an operation does.
"""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import lmdb
import structlog

from kvcached.errors import KvcachedError, QuotaExceededError, ShuttingDownError, StoreError
from kvcached.layout import OF_THE_FILE

log = structlog.get_logger()
T = TypeVar("T")
MAX_GROUP = 16  # blocks in one commit: while one commit runs, the next group gathers by itself


@dataclass(frozen=True, slots=True, eq=False)
class _Operation:
    run: Callable[[lmdb.Transaction], Any]
    n_bytes: int  # that it may add to the file; 0: it runs when the store is full too
    needs_room: Callable[[lmdb.Transaction], bool]  # whether it will, or a KvcachedError: nobody leaves in vain
    protects: bytes | None  # a key that must not be evicted to make room for it
    future: Future[Any]


class Room(Protocol):
    """How the writer gets room for what it writes."""

    def missing_bytes(self, n_bytes: int) -> int:
        """How much must be freed before `n_bytes` fit; QuotaExceededError if they never will."""

    def make_room(self, n_bytes: int, protected: bytes | None) -> None:
        """Frees it, in transactions of its own; QuotaExceededError if that cannot be done."""


class GroupWriter:
    """A queue of operations and the thread that commits them. See the module.

    before_commit(txn) runs in every transaction, last; what it returns is called when the transaction is on disk.
    """

    def __init__(
        self, env: lmdb.Environment, room: Room, before_commit: Callable[[lmdb.Transaction], Callable[[], None]]
    ) -> None:
        self._env, self._room, self._before_commit = env, room, before_commit
        self._queue: queue.SimpleQueue[_Operation | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._drained = False
        self.refusal = ""  # what the disk said to the latest write that it refused, until one succeeds
        self.has_failed = False  # in a way that no disk explains: what is stored is to be doubted
        self._thread = threading.Thread(target=self._loop, name="store-writer", daemon=True)
        self._thread.start()

    def submit(
        self,
        run: Callable[[lmdb.Transaction], T],
        *,
        n_bytes: int = 0,
        needs_room: Callable[[lmdb.Transaction], bool] = lambda _txn: True,
        protects: bytes | None = None,
    ) -> Future[T]:
        """Queues an operation; the future answers when it is committed."""
        future: Future[T] = Future()
        with self._lock:
            if self._closed:
                future.set_exception(ShuttingDownError("the store is closed"))
            else:
                self._queue.put(_Operation(run, n_bytes, needs_room, protects, future))
        return future

    def close(self) -> None:
        """Commits what is queued, then stops."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._queue.put(None)
        self._thread.join()

    def _loop(self) -> None:
        while group := self._next_group():
            self._write(group)

    def _next_group(self) -> list[_Operation]:
        """What is queued, waiting for the first; empty once closed and drained."""
        group: list[_Operation] = []
        while not self._drained and len(group) < MAX_GROUP:
            try:
                operation = self._queue.get(block=not group)
            except queue.Empty:
                break
            if operation is None:
                self._drained = True
            else:
                group.append(operation)
        return group

    def _write(self, group: list[_Operation]) -> None:
        try:
            n_bytes = sum(operation.n_bytes for operation in group)
            if n_bytes and self._room.missing_bytes(n_bytes) > 0:
                raise QuotaExceededError("no room for the whole group")
            answers = self._commit(group)
        except Exception:  # noqa: BLE001 - each is tried again, and told what was wrong with it
            for operation in group:
                self._write_alone(operation)
            return
        for operation, answer in zip(group, answers, strict=True):
            _answer(operation.future, answer)

    def _write_alone(self, operation: _Operation) -> None:
        """Makes room first. A full map although there should be room is met with more room, once."""
        for spare_bytes in (0, 2 * operation.n_bytes):
            try:
                with self._env.begin() as txn:
                    needs_room = operation.n_bytes > 0 and operation.needs_room(txn)
                if needs_room:
                    self._room.make_room(operation.n_bytes + spare_bytes, operation.protects)
                (answer,) = self._commit([operation])
            except Exception as error:  # noqa: BLE001 - an operation that is never answered is a hang
                answer = self._translate(error)
                if isinstance(error, lmdb.MapFullError):
                    continue
            break
        _answer(operation.future, answer)

    def _commit(self, group: list[_Operation]) -> list[Any]:
        answers: list[Any] = []
        with self._env.begin(write=True) as txn:
            for operation in group:
                try:
                    answers.append(operation.run(txn))
                except KvcachedError as error:
                    answers.append(error)
            after_commit = self._before_commit(txn)
        after_commit()
        if any(operation.n_bytes for operation in group):
            self.refusal = ""
        return answers

    def _translate(self, error: Exception) -> KvcachedError:
        if isinstance(error, KvcachedError):
            return error
        if isinstance(error, lmdb.Error | OSError) and not isinstance(error, OF_THE_FILE):
            # A full disk is an I/O error of many kinds, and a full map is what it is; neither is for ever.
            self.refusal = f"could not write to {self._env.path()}: {error}"
            return QuotaExceededError(self.refusal)
        self.has_failed = True
        log.error("writing failed", path=self._env.path(), exc_info=error)
        return StoreError(f"could not write to {self._env.path()}: {error!r}")


def _answer(future: Future[Any], answer: Any) -> None:
    if isinstance(answer, Exception):
        # Frames in the traceback hold transactions, and with them LMDB's reader slots, for as long as the answer lives.
        answer.__traceback__ = answer.__context__ = None
        future.set_exception(answer)
    else:
        future.set_result(answer)
