"""The records of blocks inside one write transaction: put, delete with descendants, pin, touch.

Each function checks before it changes anything, and leaves every invariant of the store as it found it: payload,
entry, recency, children and totals of a block are only ever written here, together.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import lmdb
import structlog
from google.protobuf.message import DecodeError

from kvcached import layout
from kvcached.block import ModelSpec
from kvcached.codec.bundle import PROFILES
from kvcached.errors import PreconditionError, QuotaExceededError
from kvcached.eviction import Candidate
from kvcached.layout import Tables, Totals
from kvcached_client._proto import kvcached_pb2 as pb
from kvcached_client.hashing import HASH_BYTES

log = structlog.get_logger()
T = TypeVar("T")
MAX_MODELS = 1024
_PROFILE_RANKS = {profile: rank for rank, profile in enumerate(reversed(list(PROFILES)), 1)}


class Records:
    """Reads and writes the records of one environment. Holds no transaction: each call is given one.

    A record that cannot be read counts as absent: a miss. `n_unreadable` says how many were met. `can_decode` is set by
    whoever knows what frames need.
    """

    def __init__(
        self, tables: Tables, page_bytes: int, ring_slots: int, clock: Callable[[], float] = time.time
    ) -> None:
        self._tables, self._page_bytes, self._clock = tables, page_bytes, clock
        self.ring_slots = ring_slots  # departures that are remembered
        self._ticking = threading.Lock()
        self._last_tick = 0
        self.n_unreadable = 0
        self.can_decode: Callable[[pb.Entry], bool] = lambda _entry: True

    def tick(self) -> int:
        """Now in microseconds, but later than ever before: clocks jump back when a machine wakes."""
        with self._ticking:
            self._last_tick = max(int(self._clock() * 1e6), self._last_tick + 1)
            return self._last_tick

    def read(self, parse: Callable[[bytes], T], key: bytes, record: bytes | memoryview) -> T | None:
        """A record, parsed; None if it cannot be."""
        try:
            return parse(bytes(record))
        except (DecodeError, ValueError) as error:
            self.n_unreadable += 1
            log.error("a record cannot be read, taken as absent", key=key.hex(), error=str(error))
            return None

    def entry(self, txn: lmdb.Transaction, key: bytes) -> pb.Entry | None:
        record = txn.get(key, db=self._tables.entries)
        return None if record is None else self.read(pb.Entry.FromString, key, record)

    def models(self, txn: lmdb.Transaction) -> dict[bytes, ModelSpec]:
        records = ((bytes(key), bytes(record)) for key, record in txn.cursor(self._tables.models))
        return {key: spec for key, record in records if (spec := self.read(_model_spec, key, record))}

    def put_model(self, txn: lmdb.Transaction, key: bytes, record: bytes) -> bool:
        """Whether the model was known already."""
        if txn.get(key, db=self._tables.models) is not None:
            return True
        if txn.stat(self._tables.models)["entries"] >= MAX_MODELS:
            raise QuotaExceededError(f"{MAX_MODELS} models are registered, and no more can be")
        txn.put(key, record, db=self._tables.models)
        return False

    def departures(self, txn: lmdb.Transaction) -> list[pb.Departure]:
        records = ((bytes(key), bytes(record)) for key, record in txn.cursor(self._tables.departed))
        return [departure for key, record in records if (departure := self.read(pb.Departure.FromString, key, record))]

    def shorten_ring(self, txn: lmdb.Transaction) -> None:
        """Forgets departures in slots that are no longer used."""
        cursor = txn.cursor(self._tables.departed)
        found = cursor.set_range(layout.ring_key(self.ring_slots))
        while found:
            found = cursor.delete()

    def put(self, txn: lmdb.Transaction, key: bytes, entry: pb.Entry, frame: bytes) -> "tuple[pb.Outcome, pb.Entry]":
        """See Store.put."""
        if held_instead := self.held_instead(txn, key, entry):
            return pb.OUTCOME_ALREADY_HELD, held_instead
        held = self.entry(txn, key)
        entry.created = entry.last_used = self.tick()
        if held:
            entry.pinned_until = held.pinned_until
            self._remove(txn, key, held)
        entry.payload_id = self._next_number(txn, b"next_payload_id")
        record_bytes = 4 * len(key) + len(entry.SerializeToString())  # entry, recency and child, page space aside
        entry.stored_bytes = layout.payload_bytes(len(frame), self._page_bytes) + record_bytes
        for chunk_key, chunk in layout.chunks(entry, frame):
            txn.put(chunk_key, chunk, db=self._tables.payload)
        if parent := layout.parent_key(key, entry):
            txn.put(parent, layout.split_key(key)[1], db=self._tables.children)
        self._write_entry(txn, key, entry)
        self._add_to_totals(txn, key, entry, 1)
        return (pb.OUTCOME_REPLACED if held else pb.OUTCOME_STORED), entry

    def held_instead(self, txn: lmdb.Transaction, key: bytes, entry: pb.Entry) -> pb.Entry | None:
        """What is held and no worse, so that `entry` need not be stored. Raises PreconditionError if it cannot be."""
        if txn.get(key[:HASH_BYTES], db=self._tables.models) is None:
            raise PreconditionError(f"model {key[:HASH_BYTES].hex()} is not registered")
        self._check_parent(txn, key, entry)
        return self.no_worse(txn, key, entry)

    def no_worse(self, txn: lmdb.Transaction, key: bytes, entry: pb.Entry) -> pb.Entry | None:
        """What is held of a block, unless `entry` would improve on it, or nobody can decode it."""
        held = self.entry(txn, key)
        return held if held and self.can_decode(held) and not improves(entry, held) else None

    def delete_tree(self, txn: lmdb.Transaction, root: bytes, reason: str) -> int:
        """Removes a block and its descendants, and notes why; how many there were."""
        pending, n_removed = [root], 0
        while pending:
            key = pending.pop()
            entry = self.entry(txn, key)
            if entry is None:
                continue
            pending += self._children(txn, key)
            self._remove(txn, key, entry)
            self._note_departure(txn, key, reason)
            n_removed += 1
        return n_removed

    def pin(self, txn: lmdb.Transaction, key: bytes, until: int) -> bool:
        """Whether the block is held, and now pinned until then (microseconds; 0: unpinned)."""
        entry = self.entry(txn, key)
        if entry is None:
            return False
        entry.pinned_until = until
        return txn.put(key, entry.SerializeToString(), db=self._tables.entries)

    def touch(self, txn: lmdb.Transaction, touched: Mapping[bytes, int]) -> None:
        """Writes down when blocks were last used."""
        for key, tick in touched.items():
            entry = self.entry(txn, key)
            if entry is not None and entry.last_used < tick:
                txn.delete(layout.recency_key(key, entry), db=self._tables.recency)
                entry.last_used = tick
                self._write_entry(txn, key, entry)

    def turn(self, txn: lmdb.Transaction) -> None:
        """Changes nothing but the number of the transaction."""
        self._next_number(txn, b"n_turns")

    def candidates(self, txn: lmdb.Transaction) -> Iterator[Candidate]:
        """All blocks, in the order of eviction."""
        now = int(self._clock() * 1e6)
        for recency, _ in txn.cursor(self._tables.recency):
            key = layout.key_of_recency(bytes(recency))
            entry = self.entry(txn, key)
            if entry is None or layout.recency_key(key, entry) != bytes(recency):
                continue  # its entry cannot be read, or was put anew after that
            parent = layout.parent_key(key, entry) or b""
            n_children = len(self._children(txn, key))
            yield Candidate(key, parent, entry.stored_bytes, n_children, entry.pinned_until > now)

    def _write_entry(self, txn: lmdb.Transaction, key: bytes, entry: pb.Entry) -> None:
        txn.put(key, entry.SerializeToString(), db=self._tables.entries)
        txn.put(layout.recency_key(key, entry), b"", db=self._tables.recency)

    def _remove(self, txn: lmdb.Transaction, key: bytes, entry: pb.Entry) -> None:
        """All of a block but the records of its children."""
        for chunk_key in layout.payload_keys(entry):
            txn.delete(chunk_key, db=self._tables.payload)
        if parent := layout.parent_key(key, entry):
            txn.delete(parent, layout.split_key(key)[1], db=self._tables.children)
        txn.delete(layout.recency_key(key, entry), db=self._tables.recency)
        txn.delete(key, db=self._tables.entries)
        self._add_to_totals(txn, key, entry, -1)

    def _check_parent(self, txn: lmdb.Transaction, key: bytes, entry: pb.Entry) -> None:
        parent_key = layout.parent_key(key, entry)
        if parent_key is None:
            expected = (0, entry.first_position)
        else:
            parent = self.entry(txn, parent_key)
            if parent is None or parent.namespace != entry.namespace:  # another tenant's is none of theirs
                raise PreconditionError(f"the parent {entry.parent_hash.hex()} of block {entry.index} is not held")
            expected = (parent.index + 1, parent.first_position + parent.n_tokens)
        if (entry.index, entry.first_position) != expected:
            got = (entry.index, entry.first_position)
            raise PreconditionError(f"(index, first position) must be {expected} here, got {got}")

    def _children(self, txn: lmdb.Transaction, key: bytes) -> list[bytes]:
        cursor = txn.cursor(self._tables.children)
        model_id = layout.split_key(key)[0]
        return [model_id + child for child in cursor.iternext_dup()] if cursor.set_key(key) else []

    def _note_departure(self, txn: lmdb.Transaction, key: bytes, reason: str) -> None:
        slot = self._next_number(txn, b"n_departures") % self.ring_slots
        model_id, block_hash = layout.split_key(key)
        departure = pb.Departure(model_id=model_id, block_hash=block_hash, reason=reason, time=int(self._clock() * 1e6))
        txn.put(layout.ring_key(slot), departure.SerializeToString(), db=self._tables.departed)

    def _next_number(self, txn: lmdb.Transaction, name: bytes) -> int:
        number = int.from_bytes(txn.get(name, default=b"", db=self._tables.sys), "big")
        txn.put(name, (number + 1).to_bytes(8, "big"), db=self._tables.sys)
        return number

    def _add_to_totals(self, txn: lmdb.Transaction, key: bytes, entry: pb.Entry, sign: int) -> None:
        totals_key = layout.totals_key(key, entry)
        totals = Totals.unpack(txn.get(totals_key, db=self._tables.totals)).plus(entry, sign)
        txn.put(totals_key, totals.pack(), db=self._tables.totals)


def _model_spec(record: bytes) -> ModelSpec:
    return ModelSpec.from_proto(pb.ModelSpec.FromString(record))


def improves(new: pb.Entry, held: pb.Entry) -> bool:
    """Whether `new` is better in one respect and worse in none: fidelity, lineage, boundary state."""
    if new.fidelity.kind == held.fidelity.kind:
        found, there = _within_kind(new.fidelity), _within_kind(held.fidelity)
    else:  # whatever they are worth among their own
        found, there = (new.fidelity.kind, 0.0), (held.fidelity.kind, 0.0)
    better, worse = (*found, new.lineage, new.boundary), (*there, held.lineage, held.boundary)
    return all(a >= b for a, b in zip(better, worse, strict=True)) and better != worse


def _within_kind(fidelity: pb.Fidelity) -> tuple[int, float]:
    """Higher is better, in each: the profile, whatever the bundle, and the ratio. An unknown profile is the worst."""
    return _PROFILE_RANKS.get(fidelity.profile, 0), -fidelity.am_ratio
