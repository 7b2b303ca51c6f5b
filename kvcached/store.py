"""Frames and what we know of them, in LMDB. One process, one writer thread; tools go through the daemon.

Every change to a block is one transaction: payload, entry, recency, children and totals together, so that a crash
leaves all or nothing. Reads never write: recency is noted in memory, and goes to disk with the next transaction.
Frames are copied out, for LMDB's bytes are only valid inside a transaction, and a pinned reader makes the file grow.

Invariants (see audit.py): every block's parent is there; recency holds each block once; totals equal sums; each payload
belongs to one entry; pages in use stay within the quota. A block is only ever removed with its descendants.
"""

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import lmdb

from kvcached import layout
from kvcached.audit import audit
from kvcached.block import BlockId, ModelSpec
from kvcached.errors import QuotaExceededError
from kvcached.eviction import choose
from kvcached.layout import RECORD_BYTES, Tables, Totals, block_key
from kvcached.records import Records
from kvcached.store_files import StoreFiles, StoreLock, UnsoundError
from kvcached.writer import GroupWriter
from kvcached_client._proto import kvcached_pb2 as pb

PIN_FOREVER = (1 << 63) - 1
_MIN_SLACK_BYTES = 16 << 20  # of the map above the quota: trees, free list, copies on write
_AHEAD = 128  # part of the quota that an eviction frees beyond what is needed, so that not every put evicts
_STEP_BYTES = 256 << 20  # evicted in one transaction at most, or what one block needs
_SMALL_BYTES = 1 << 20
_MAX_TOUCHED = 8192  # noted in memory before they are written for their own sake


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes of the store on its disk."""

    used_bytes: int  # pages that hold something
    file_bytes: int  # the file, with the pages it can reuse
    free_disk_bytes: int


class Store:
    """The store of one daemon. Thread-safe. Raises StoreError if another daemon holds it."""

    def __init__(
        self,
        path: Path,
        *,
        quota_bytes: int,
        free_floor_bytes: int = 0,
        holder: str = "",
        on_removed: Callable[[str, int], None] = lambda _reason, _n_blocks: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.path = path
        self.quota_bytes, self.free_floor_bytes = quota_bytes, free_floor_bytes
        self._lock = StoreLock(path, holder)
        self._files = StoreFiles(path)
        try:
            self._env, self._tables = self._open()
        except BaseException:
            self._lock.release()
            raise
        self._map_bytes: int = self._env.info()["map_size"]
        self._page_bytes: int = self._env.stat()["psize"]
        self._split_bytes = 2 * len(layout.TABLES) * self._page_bytes  # pages that trees may grow by in one transaction
        self._records = Records(self._tables, self._page_bytes, layout.ring_slots(quota_bytes), clock)
        self._on_removed = on_removed  # told why, and how many blocks; from the writer's thread
        self._state = threading.Lock()  # guards what was touched
        self._touched: dict[bytes, int] = {}
        self._writer = GroupWriter(self._env, self, self._write_touched)
        if self.usage().used_bytes > quota_bytes:  # it was larger when last open
            self.fit_quota().exception()

    # ---- opening and closing

    def _open(self) -> tuple[lmdb.Environment, Tables]:
        """Opens what is there if it is sound and ours; else moves it aside and starts empty."""
        try:
            return self._open_sound()
        except UnsoundError as error:
            self._files.set_aside(str(error))
            return self._files.open(self._needed_map_bytes())

    def _open_sound(self) -> tuple[lmdb.Environment, Tables]:
        """Opens what is there. Raises UnsoundError if that must not be used."""
        is_trusted = self._files.is_trusted()  # asked first: to open it is to change it
        if not is_trusted:
            self._files.verify()
        env, tables = self._files.open(self._needed_map_bytes())
        if not is_trusted:
            with env.begin(buffers=True) as txn:
                problems = audit(txn, tables)
            if problems:
                env.close()
                raise UnsoundError(problems)
        return env, tables

    def _needed_map_bytes(self) -> int:
        """A map for the quota, and for a file that was made under a larger one: files never shrink."""
        needed_bytes = max(self.quota_bytes, self._files.size())
        return max(needed_bytes * 5 // 4, needed_bytes + _MIN_SLACK_BYTES)

    def close(self) -> None:
        """Commits what is queued and the noted recency, and leaves the files marked clean."""
        if self._touched:
            self._writer.submit(_nothing)
        self._writer.close()
        self._env.close()
        if not (self._writer.has_failed or self._records.n_unreadable):
            self._files.mark_clean()  # else the next start looks closely
        self._lock.release()

    def replace_unless(self, can_decode: Callable[[pb.Entry], bool]) -> None:
        """From now on a put replaces what cannot be decoded, as if it were not held."""
        self._records.can_decode = can_decode

    @property
    def set_aside(self) -> list[str]:
        """Earlier stores that could not be trusted: where they are now, and why."""
        return self._files.all_set_aside()

    @property
    def max_quota_bytes(self) -> int:
        """How far the quota can be raised while the store is open."""
        return min(self._map_bytes * 4 // 5, self._map_bytes - _MIN_SLACK_BYTES)

    # ---- reading

    def chain(self, block_ids: Iterable[BlockId]) -> list[pb.Entry]:
        """Entries of the leading blocks that are held."""
        found = []
        with self._env.begin() as txn:
            for block_id in block_ids:
                if (entry := self._entry(txn, block_id)) is None:
                    break
                found.append(entry)
        return found

    def entry(self, block_id: BlockId) -> pb.Entry | None:
        with self._env.begin() as txn:
            return self._entry(txn, block_id)

    def no_worse(self, block_id: BlockId, entry: pb.Entry) -> pb.Entry | None:
        """What is held of a block, unless `entry` would improve on it: then there is nothing to encode."""
        with self._env.begin() as txn:
            return self._records.no_worse(txn, block_key(block_id), entry)

    def frame(self, block_id: BlockId) -> tuple[pb.Entry, bytes] | None:
        """Entry and frame of a block, copied."""
        with self._env.begin(buffers=True) as txn:
            entry = self._entry(txn, block_id)
            if entry is None:
                return None
            pieces = (txn.get(key, db=self._tables.payload) for key in layout.payload_keys(entry))
            return entry, b"".join(piece for piece in pieces if piece is not None)

    def models(self) -> dict[bytes, ModelSpec]:
        with self._env.begin() as txn:
            return self._records.models(txn)

    def totals(self) -> dict[tuple[bytes, int], Totals]:
        """By model id and fidelity kind."""
        with self._env.begin() as txn:
            rows = [
                (key, self._records.read(Totals.unpack, key, record)) for key, record in txn.cursor(self._tables.totals)
            ]
        return {(key[:-1], key[-1]): totals for key, totals in rows if totals and totals.n_blocks}

    def usage(self) -> Usage:
        disk = os.statvfs(self._files.db)
        with self._env.begin() as txn:
            used_bytes = self._tables.used_bytes(txn, self._page_bytes)
        return Usage(used_bytes, self._files.size(), disk.f_bavail * disk.f_frsize)

    def departures(self) -> list[pb.Departure]:
        """What left lately, in no order."""
        with self._env.begin() as txn:
            return self._records.departures(txn)

    def check(self) -> list[str]:
        """What is wrong with the store, in words; empty if every invariant holds. Reads all records, no payloads."""
        with self._env.begin(buffers=True) as txn:
            problems = audit(txn, self._tables)
        used_bytes = self.usage().used_bytes
        over = [f"{used_bytes} bytes are in use under a quota of {self.quota_bytes}"]
        return problems + over * (used_bytes > self.quota_bytes)

    def block_ids(self) -> Iterator[BlockId]:
        """All blocks, a page of them in each transaction."""
        return (block_id for block_id, _ in self._blocks())

    def blocks_of_bundle(self, bundle_id: bytes) -> list[BlockId]:
        """The blocks that cannot be read without a bundle. Reads all entries."""
        return [block_id for block_id, entry in self._blocks() if entry.fidelity.bundle_id == bundle_id]

    def n_blocks_by_bundle(self) -> Counter[bytes]:
        """How many blocks cannot be read without each bundle. Reads all entries."""
        return Counter(entry.fidelity.bundle_id for _, entry in self._blocks() if entry.fidelity.bundle_id)

    def _blocks(self) -> Iterator[tuple[BlockId, pb.Entry]]:
        start = b""
        while True:
            with self._env.begin() as txn:
                cursor = txn.cursor(self._tables.entries)
                page: list[tuple[bytes, bytes]] = []
                if cursor.set_range(start):
                    page = [item for item, _ in zip(cursor, range(1000), strict=False)]
            for key, record in page:
                model_id, block_hash = layout.split_key(key)
                if entry := self._records.read(pb.Entry.FromString, key, record):
                    yield BlockId(model_id, entry.namespace, block_hash), entry
            if not page:
                return
            start = page[-1][0] + b"\0"

    # ---- writing

    def put_model(self, spec: ModelSpec) -> Future[bool]:
        """Whether the model was known already. The future raises QuotaExceededError if there are too many."""
        key, record = spec.model_id, spec.to_proto().SerializeToString()
        return self._writer.submit(
            lambda txn: self._records.put_model(txn, key, record),
            n_bytes=len(record) + 2 * self._page_bytes,
            needs_room=lambda txn: txn.get(key, db=self._tables.models) is None,
        )

    def put(self, block_id: BlockId, entry: pb.Entry, frame: bytes) -> "Future[tuple[pb.Outcome, pb.Entry]]":
        """Stores a frame, evicting as needed. `entry` comes without sizes, times and payload id.

        The future raises PreconditionError for an unknown model or an absent parent, QuotaExceededError if there is no
        room. A block that is held at the same or a higher fidelity stays as it is.
        """
        entry.frame_bytes = len(frame)
        disk_bytes = layout.payload_bytes(len(frame), self._page_bytes)
        key = block_key(block_id)
        return self._writer.submit(
            lambda txn: self._records.put(txn, key, entry, frame),
            n_bytes=disk_bytes + RECORD_BYTES,
            needs_room=lambda txn: self._records.held_instead(txn, key, entry) is None,
            protects=layout.parent_key(key, entry),
        )

    def delete(self, block_ids: Sequence[BlockId], reason: str) -> Future[int]:
        """Removes blocks with their descendants; how many there were."""
        deleted = self._writer.submit(
            lambda txn: sum(self._records.delete_tree(txn, key, reason) for key in self._held_keys(txn, block_ids))
        )
        deleted.add_done_callback(lambda done: done.exception() or self._on_removed(reason, done.result()))
        return deleted

    def pin(self, block_ids: Sequence[BlockId], until: int) -> Future[int]:
        """Pins blocks until a time in microseconds (0: unpins them); how many are held."""
        return self._writer.submit(
            lambda txn: sum(self._records.pin(txn, key, until) for key in self._held_keys(txn, block_ids))
        )

    def touch(self, block_ids: Iterable[BlockId]) -> None:
        """Notes that blocks were used now."""
        with self._state:
            tick = self._records.tick()
            self._touched.update((block_key(block_id), tick) for block_id in block_ids)
            overdue = len(self._touched) > _MAX_TOUCHED
        if overdue:
            self._writer.submit(_nothing)

    def fit_quota(self) -> Future[None]:
        """Evicts down to the quota, after it was lowered."""
        self._records.ring_slots = layout.ring_slots(self.quota_bytes)
        return self._writer.submit(self._records.shorten_ring, n_bytes=1)

    # ---- inside transactions

    def _entry(self, txn: lmdb.Transaction, block_id: BlockId) -> pb.Entry | None:
        """A block is only shown to those who name its namespace, even if they know its hash."""
        entry = self._records.entry(txn, block_key(block_id))
        return entry if entry and entry.namespace == block_id.namespace else None

    def _held_keys(self, txn: lmdb.Transaction, block_ids: Sequence[BlockId]) -> list[bytes]:
        return [block_key(block_id) for block_id in block_ids if self._entry(txn, block_id)]

    def _write_touched(self, txn: lmdb.Transaction) -> Callable[[], None]:
        """Writes noted recency; what it returns forgets it, and is called when the transaction is on disk."""
        with self._state:
            touched = dict(self._touched)
        self._records.touch(txn, touched)

        def forget() -> None:
            with self._state:
                for key, tick in touched.items():
                    if self._touched.get(key) == tick:
                        del self._touched[key]

        return forget

    # ---- room

    def make_room(self, n_bytes: int, protected: bytes | None) -> None:
        """Evicts until `n_bytes` fit, and a little ahead, in transactions of its own.

        LMDB reuses the pages that a transaction frees in the next but one, so each eviction is followed by a turn that
        changes nothing: without it the file would grow with every block that takes another's place.
        """
        while (missing := self.missing_bytes(n_bytes)) > 0:
            reason = self._budget()[1]
            with self._env.begin(write=True) as txn:
                forget = self._write_touched(txn)
                ahead = self.quota_bytes // _AHEAD
                step = min(missing, max(n_bytes, _STEP_BYTES))
                victims = choose(self._records.candidates(txn), step + ahead, [protected] if protected else [])
                if sum(victim.n_bytes for victim in victims) < step:
                    txn.abort()
                    raise QuotaExceededError(
                        f"{missing} bytes short of room for {n_bytes}: the rest is pinned or in use"
                    )
                for victim in victims:
                    self._records.delete_tree(txn, victim.key, reason)
            forget()
            with self._env.begin(write=True) as txn:
                self._records.turn(txn)
            self._on_removed(reason, len(victims))

    def missing_bytes(self, n_bytes: int) -> int:
        """How much must be evicted before `n_bytes` fit: quota and free-space floor, whichever is tighter."""
        budget, _, usage = self._budget()
        if n_bytes + self._split_bytes > budget:
            raise QuotaExceededError(
                f"{n_bytes} bytes do not fit into {budget}: the quota is {self.quota_bytes} bytes, "
                f"{usage.free_disk_bytes} are free on the disk and {self.free_floor_bytes} of them are kept free"
            )
        return usage.used_bytes + n_bytes + self._split_bytes - budget

    def why_full(self) -> str:
        """Why nothing can be stored now, not even a small block; empty if it can."""
        try:
            self.missing_bytes(min(_SMALL_BYTES, self.quota_bytes // 2))
        except QuotaExceededError as error:
            return str(error)
        return self._writer.refusal

    def _budget(self) -> tuple[int, str, Usage]:
        """Bytes that may be in use, what limits them, and what is."""
        usage = self.usage()
        on_disk = usage.file_bytes + max(0, usage.free_disk_bytes - self.free_floor_bytes)
        return min(self.quota_bytes, on_disk), "quota" if self.quota_bytes <= on_disk else "free_floor", usage


def _nothing(_txn: lmdb.Transaction) -> None:
    """An operation for the sake of what every transaction does."""
