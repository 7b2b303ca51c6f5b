"""The store against a dictionary: random operations, all invariants after every step."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule
from support import tiny_spec

from kvcached import layout
from kvcached.block import BlockId
from kvcached.errors import PreconditionError, QuotaExceededError
from kvcached.store import PIN_FOREVER, Store
from kvcached_client._proto import kvcached_pb2 as pb
from kvcached_client.hashing import ROOT, block_hash

QUOTA = 1 << 20
SPEC = tiny_spec()


class StoreMachine(RuleBasedStateMachine):
    """Puts chains, reads, touches, pins, deletes, and reopens the store, cleanly or not."""

    blocks = Bundle("blocks")

    def __init__(self) -> None:
        super().__init__()
        self.path = Path(tempfile.mkdtemp())
        self.now = 1_000_000.0
        self.model: dict[
            bytes, tuple[bytes, bytes]
        ] = {}  # block hash -> (parent hash, frame), as if nothing was evicted
        self.pinned: set[bytes] = set()
        self.n_evicted = 0
        self.open()

    def open(self) -> None:
        self.store = Store(self.path, quota_bytes=QUOTA, on_removed=self.removed, clock=lambda: self.now)
        self.store.put_model(SPEC).result()

    def removed(self, reason: str, n_blocks: int) -> None:
        self.n_evicted += n_blocks * (reason == "quota")

    def id(self, hash_: bytes) -> BlockId:
        return BlockId(SPEC.model_id, "", hash_)

    def depth(self, hash_: bytes) -> int:
        return 0 if hash_ == ROOT else 1 + self.depth(self.model[hash_][0])

    @initialize(target=blocks)
    def root(self) -> bytes:
        return ROOT

    @rule(target=blocks, parent=blocks, n_bytes=st.integers(1, 200_000), boundary=st.booleans())
    def put(self, parent: bytes, n_bytes: int, boundary: bool) -> bytes | object:
        self.now += 1
        hash_ = block_hash(parent, [len(self.model)])
        frame = os.urandom(n_bytes)
        index = self.depth(parent)
        entry = pb.Entry(parent_hash=parent, index=index, n_tokens=4, first_position=4 * index, source_bytes=n_bytes)
        entry.fidelity.kind = entry.lineage = pb.FIDELITY_KIND_EXACT
        entry.boundary = boundary
        future = self.store.put(self.id(hash_), entry, frame)
        parent_is_held = parent == ROOT or self.store.entry(self.id(parent)) is not None
        try:
            outcome, stored = future.result()
        except PreconditionError:
            assert not parent_is_held
            return multiple()
        except QuotaExceededError:
            self.check_that_nothing_more_could_leave(n_bytes, parent)
            return multiple()
        assert outcome == pb.OUTCOME_STORED
        assert stored.stored_bytes >= n_bytes
        self.model[hash_] = (parent, frame)
        return hash_

    def check_that_nothing_more_could_leave(self, n_bytes: int, parent: bytes) -> None:
        stay = {hash_ for kept in [*self.pinned, parent] for hash_ in self.lineage(kept)}
        held = {block_id.block_hash: self.store.entry(block_id) for block_id in self.store.block_ids()}
        evictable = sum(entry.stored_bytes for hash_, entry in held.items() if entry and hash_ not in stay)
        payload_bytes = layout.payload_bytes(n_bytes, self.store._page_bytes)
        assert evictable < self.store.missing_bytes(payload_bytes + layout.RECORD_BYTES)

    @rule(parent=blocks)
    def fill(self, parent: bytes) -> None:
        """More than the quota, so that blocks must leave, or are refused for a reason that `put` checks."""
        before = self.n_evicted, len(self.model)
        for _ in range(7):
            self.put(parent, 150_000, False)
        assert self.n_evicted > before[0] or len(self.model) < before[1] + 7

    @rule(block=blocks)
    def put_again_changes_nothing(self, block: bytes) -> None:
        if block != ROOT and self.store.entry(self.id(block)) is not None:
            parent, _ = self.model[block]
            index = self.depth(block) - 1
            entry = pb.Entry(parent_hash=parent, index=index, n_tokens=4, first_position=4 * index)
            entry.fidelity.kind = entry.lineage = pb.FIDELITY_KIND_CODED
            outcome, _ = self.store.put(self.id(block), entry, b"worse").result()
            assert outcome == pb.OUTCOME_ALREADY_HELD

    @rule(block=blocks)
    def get(self, block: bytes) -> None:
        found = self.store.frame(self.id(block))
        if found is not None:
            assert found[1] == self.model[block][1]
        else:
            assert block not in self.pinned

    @rule(block=blocks)
    def touch(self, block: bytes) -> None:
        self.now += 1
        self.store.touch([self.id(block)])

    @rule(block=blocks, pin=st.booleans())
    def pin(self, block: bytes, pin: bool) -> None:
        n_held = self.store.pin([self.id(block)], PIN_FOREVER if pin else 0).result()
        if pin and n_held and len(self.pinned) < 3:
            self.pinned.add(block)
        elif n_held:
            self.store.pin([self.id(block)], 0).result()
            self.pinned.discard(block)

    @rule(block=consumes(blocks))
    def delete(self, block: bytes) -> None:
        if block == ROOT:
            return
        was_held = self.store.entry(self.id(block)) is not None
        n_deleted = self.store.delete([self.id(block)], "deleted").result()
        assert (n_deleted > 0) == was_held
        descendants = {hash_ for hash_ in self.model if block in self.lineage(hash_)}
        assert not any(self.store.entry(self.id(d)) for d in descendants)
        self.pinned -= descendants

    def lineage(self, hash_: bytes) -> list[bytes]:
        found = []
        while hash_ != ROOT:
            found.append(hash_)
            hash_ = self.model[hash_][0]
        return found

    @rule()
    def reopen(self) -> None:
        before = self.store.totals()
        self.store.close()
        self.open()
        assert self.store.totals() == before
        assert self.store.set_aside == []

    @rule()
    def reopen_as_after_a_kill(self) -> None:
        """What is on disk while the store is open: all that was answered."""
        before = self.store.totals()
        copy = Path(tempfile.mkdtemp())
        shutil.copytree(self.path, copy, dirs_exist_ok=True)
        self.store.close()
        shutil.rmtree(self.path)
        self.path = copy
        self.open()
        assert self.store.totals() == before
        assert self.store.set_aside == []

    @invariant()
    def check(self) -> None:
        assert self.store.check() == []
        held = set(self.store.block_ids())
        assert held <= {self.id(hash_) for hash_ in self.model}
        assert {self.id(hash_) for hash_ in self.pinned} <= held
        usage = self.store.usage()
        assert usage.used_bytes <= QUOTA
        assert usage.file_bytes <= self.store._map_bytes

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.path)


TestStoreModel = StoreMachine.TestCase
TestStoreModel.settings = settings(max_examples=25, stateful_step_count=40, deadline=None)


class LongStoreMachine(StoreMachine):
    """The same for longer, so that quota and free list are exercised."""


TestStoreModelForLong = pytest.mark.slow(LongStoreMachine.TestCase)
TestStoreModelForLong.settings = settings(max_examples=30, stateful_step_count=200, deadline=None)
