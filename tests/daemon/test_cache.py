"""The cache with a store that answers at moments a real disk only sometimes chooses."""

import gc
import sys
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bundles import make_bundle
from compacting import make_compacting
from support import chain, tiny_spec, wait_until

from kvcached import codec
from kvcached.block import BlockId, Fidelity, KVBlock
from kvcached.cache import Cache, Fetch
from kvcached.config import Config
from kvcached.encoding import Wish
from kvcached.errors import PreconditionError, QuotaExceededError, UnsupportedFrameError
from kvcached.metrics import Metrics
from kvcached.pool import Pipeline, WorkerPool
from kvcached.store import Store
from kvcached_client import Block, Client, RopeSpec
from kvcached_client._proto import kvcached_pb2 as pb

SPEC = tiny_spec()
MIB = 1 << 20


class SwiftStore(Store):
    """Every put is over before `put` returns: what happens when the writer is faster than the worker that waits."""

    def put(self, *args: Any, **kwargs: Any) -> "Future[Any]":
        future = super().put(*args, **kwargs)
        wait([future], 30)
        return future


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    store, pool = SwiftStore(tmp_path, quota_bytes=32 * MIB), WorkerPool(2, 64 * MIB)
    cache = Cache(store, pool, Metrics(), Config())
    cache.register(SPEC)
    yield cache
    assert store.check() == []
    store.close()


@pytest.fixture
def held_back(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """The first block of a chain is not encoded before this event is set."""
    event, encode = threading.Event(), cache._encode

    def wait_and_encode(block_id: BlockId, block: KVBlock, *args: Any) -> bytes:
        if block.first_position == 0:
            assert event.wait(30)
        return encode(block_id, block, *args)

    monkeypatch.setattr(cache, "_encode", wait_and_encode)
    return event


def put(cache: Cache, block: Block) -> "Future[Any]":
    kv = KVBlock.dense(block.tensors, SPEC.block_size, block.first_position)
    entry = pb.Entry(
        parent_hash=block.parent_hash,
        index=block.index,
        n_tokens=SPEC.block_size,
        first_position=block.first_position,
        source_bytes=kv.nbytes,
    )
    entry.fidelity.kind = entry.lineage = pb.FIDELITY_KIND_EXACT
    cache.pool.puts.take(entry.source_bytes)
    return cache.put(BlockId(SPEC.model_id, "", block.block_hash), entry, kv)


def test_commits_that_are_over_at_once_are_answered_once(cache: Cache, caplog: pytest.LogCaptureFixture) -> None:
    with Client(SPEC) as client:
        answers = [put(cache, block) for block in chain(client, range(64))]
    assert [answer.result(30)[0] for answer in answers] == [pb.OUTCOME_STORED] * 16
    cache.pool.close()  # all callbacks have run
    assert caplog.records == []  # where one fails, that is all there is to see
    assert cache.pool.puts.used_bytes == 0


def test_commits_that_fail_at_once_are_answered_once(cache: Cache, caplog: pytest.LogCaptureFixture) -> None:
    with Client(SPEC) as client:
        answer = put(cache, chain(client, range(4), ballast=40 * MIB)[0])
    with pytest.raises(QuotaExceededError):
        answer.result(30)
    cache.pool.close()
    assert caplog.records == []
    assert cache.pool.puts.used_bytes == 0


@pytest.mark.parametrize("gap", [False, True], ids=["whole", "behind a block that is refused"])
def test_a_chain_longer_than_the_stack_is_committed_when_its_first_block_is(
    cache: Cache, held_back: threading.Event, gap: bool, caplog: pytest.LogCaptureFixture
) -> None:
    n_blocks = sys.getrecursionlimit() * 5 // 4
    with Client(SPEC) as client:
        blocks = chain(client, range(4 * n_blocks))
    if gap:
        blocks[0] = replace(blocks[0], index=1)  # there is no parent at which this could be
    answers = [put(cache, block) for block in blocks]
    assert wait_until(lambda: cache.pool.n_jobs == 0)
    held_back.set()
    if gap:
        assert all(isinstance(answer.exception(60), PreconditionError) for answer in answers)
    else:
        assert [answer.result(60)[0] for answer in answers] == [pb.OUTCOME_STORED] * n_blocks
    cache.pool.close()
    assert caplog.records == []
    assert cache.pool.puts.used_bytes == 0


def test_a_put_with_a_wrong_index_does_not_answer_for_a_right_one_of_the_same_block(
    cache: Cache, held_back: threading.Event
) -> None:
    with Client(SPEC) as client:
        first, second = chain(client, range(8))
    wrong = put(cache, replace(first, index=1))
    right, child = put(cache, first), put(cache, second)
    held_back.set()
    with pytest.raises(PreconditionError, match="must be"):
        wrong.result(30)
    assert right.result(30)[0] == child.result(30)[0] == pb.OUTCOME_STORED
    cache.pool.close()


def test_a_put_that_fails_for_an_unknown_reason_is_answered_and_lets_go_of_its_room(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Client(SPEC) as client:
        (block,) = chain(client, range(4))
    with monkeypatch.context() as patched:
        patched.setattr(cache.store, "no_worse", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            put(cache, block).result(30)
    assert cache.pool.puts.used_bytes == 0
    assert put(cache, block).result(30)[0] == pb.OUTCOME_STORED
    cache.pool.close()


def test_a_bundle_that_is_removed_leaves_nothing_in_memory(cache: Cache) -> None:
    bundle = make_bundle(SPEC)
    cache.bundles.install(bundle)
    pipeline = cache._pipeline(SPEC)
    pipeline.coder(bundle.bundle_id, "x8")
    assert cache.remove_bundle(bundle.bundle_id, with_blocks=False) == 0
    with pytest.raises(UnsupportedFrameError):
        pipeline.coder(bundle.bundle_id, "x8")
    cache.pool.close()


def test_the_record_of_a_compacted_block_says_what_it_loses_and_no_other_does(cache: Cache) -> None:
    spec = tiny_spec(block_size=64)
    cache.register(spec)
    bundle = make_compacting(spec)
    cache.bundles.install(bundle)
    with Client(spec) as client:
        blocks = chain(client, range(128))
    entries = []
    for block, wish in zip(blocks, (Wish("compacted-x8", am_ratio=3), Wish("x8")), strict=True):
        entry = pb.Entry(
            n_tokens=64, parent_hash=block.parent_hash, index=block.index, first_position=block.first_position
        )
        entry.lineage = pb.FIDELITY_KIND_EXACT
        entry.fidelity.CopyFrom(cache.choose(spec, entry, wish).to_proto())
        block_id = BlockId(spec.model_id, "", block.block_hash)
        cache.put(block_id, entry, KVBlock.dense(block.tensors, 64, block.first_position)).result(30)
        entries.append(cache.store.entry(block_id))
    cache.pool.close()
    compacted, coded = entries
    assert compacted.fidelity.kind == pb.FIDELITY_KIND_COMPACTED
    fidelity = Fidelity.from_proto(compacted.fidelity)
    kv = KVBlock.dense(blocks[0].tensors, 64, 0)
    expected = codec.compact(kv, Pipeline(spec, lambda _: bundle).compactor(fidelity))
    assert compacted.output_error == pytest.approx(expected.output_error, rel=1e-6)
    assert compacted.mass_error == pytest.approx(expected.mass_error, rel=1e-6)
    assert (coded.fidelity.kind, coded.output_error, coded.mass_error) == (pb.FIDELITY_KIND_CODED, 0, 0)


def test_rotary_positions_that_cannot_be_removed_mean_exact_storage(cache: Cache) -> None:
    rope = RopeSpec(dims=8, theta=1e4, scaling_json='{"type":"of tomorrow"}')
    spec = replace(SPEC, layers=tuple(replace(layer, rope=rope) for layer in SPEC.layers), block_size=16)
    bundle = replace(make_bundle(replace(SPEC, block_size=16), measured=["x8"]), spec=spec)
    cache.register(spec)
    cache.bundles.install(bundle)
    with Client(spec) as client:
        (block,) = chain(client, range(16))
    entry = pb.Entry(n_tokens=16, parent_hash=block.parent_hash, lineage=pb.FIDELITY_KIND_EXACT)
    entry.fidelity.CopyFrom(cache.choose(spec, entry, Wish()).to_proto())
    assert entry.fidelity.profile == "x8"
    kv = KVBlock.dense(block.tensors, 16, 0)
    stored = cache.put(BlockId(spec.model_id, "", block.block_hash), entry, kv).result(30)[1]
    assert stored.fidelity.kind == pb.FIDELITY_KIND_EXACT
    assert cache.metrics.snapshot()['exact_fallback_blocks_total{reason="rope"}'] == 1
    cache.pool.close()


@pytest.mark.parametrize("is_done", [True, False])
def test_a_fetch_that_was_abandoned_gives_its_room_back_once_and_keeps_no_block_alive(is_done: bool) -> None:
    released: list[bool] = []
    found: Future[Any] = Future()
    found.set_running_or_notify_cancel()
    fetch = Fetch(BlockId(bytes(32), "", bytes(32)), found, lambda: released.append(True))
    gc.disable()  # what only the collector finds stays for as long as it likes
    try:
        if is_done:
            found.set_result(None)
        fetch.abandon()
        if not is_done:
            assert released == []
            found.set_result(None)
        assert released == [True]
        left = weakref.ref(found)
        del fetch, found
        assert left() is None
    finally:
        gc.enable()
