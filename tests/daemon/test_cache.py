"""The cache with a store that answers at moments a real disk only sometimes chooses."""

from collections.abc import Iterator
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import pytest
from support import chain, tiny_spec

from kvcached.block import BlockId, KVBlock
from kvcached.cache import Cache
from kvcached.config import Config
from kvcached.errors import QuotaExceededError
from kvcached.metrics import Metrics
from kvcached.pool import WorkerPool
from kvcached.store import Store
from kvcached_client import Block, Client
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
    store, pool = SwiftStore(tmp_path, quota_bytes=4 * MIB), WorkerPool(2, 64 * MIB)
    cache = Cache(store, pool, Metrics(), Config())
    cache.register(SPEC)
    yield cache
    assert store.check() == []
    store.close()


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
        answer = put(cache, chain(client, range(4), ballast=8 * MIB)[0])
    with pytest.raises(QuotaExceededError):
        answer.result(30)
    cache.pool.close()
    assert caplog.records == []
    assert cache.pool.puts.used_bytes == 0
