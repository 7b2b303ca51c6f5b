"""The store on a real disk: quota, recency, faults."""

import os
import random
import resource
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from stores import MIB, SPEC, held, name, open_store, put
from support import tiny_spec

from kvcached.errors import PreconditionError, QuotaExceededError
from kvcached.store import PIN_FOREVER, Store
from kvcached_client._proto import kvcached_pb2 as pb
from kvcached_client.hashing import ROOT


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = open_store(tmp_path)
    yield store
    assert store.check() == []
    store.close()


def test_the_least_recently_used_chain_leaves_first_and_from_its_end(store: Store) -> None:
    frame = os.urandom(MIB)
    for path in [(1,), (1, 2), (3,), (3, 4)]:
        put(store, path, frame)
    store.touch([name(1), name(1, 2)])
    for token in range(10, 14):
        put(store, (token,), frame)
    assert held(store, (1,), (1, 2), (3,), (3, 4)) == [True, True, True, False]


def test_recency_survives_a_clean_restart(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    for token in range(1, 7):
        put(store, (token,), os.urandom(MIB))
    store.touch([name(1)])
    store.close()
    store = open_store(tmp_path)
    put(store, (7,), os.urandom(2 * MIB))
    assert held(store, (1,), (2,), (3,)) == [True, False, True]
    store.close()


def test_a_put_whose_room_is_pinned_is_refused_and_reads_go_on(store: Store) -> None:
    frame = os.urandom(3 * MIB)
    put(store, (1,), frame)
    put(store, (1, 2), frame)
    store.pin([name(1, 2)], PIN_FOREVER).result()
    with pytest.raises(QuotaExceededError, match="pinned"):
        put(store, (5,), frame)
    found = store.frame(name(1))
    assert found is not None
    assert found[1] == frame


def test_a_pin_ends_with_its_time(tmp_path: Path) -> None:
    now = [1000.0]
    store = open_store(tmp_path, clock=lambda: now[0])
    put(store, (1,), os.urandom(6 * MIB))
    store.pin([name(1)], int(2000e6)).result()
    with pytest.raises(QuotaExceededError):
        put(store, (2,), os.urandom(6 * MIB))
    now[0] = 2001.0
    assert put(store, (2,), os.urandom(6 * MIB)) == pb.OUTCOME_STORED
    store.close()


def test_a_frame_larger_than_the_quota_is_refused_and_evicts_nothing(store: Store) -> None:
    put(store, (1,), b"small")
    with pytest.raises(QuotaExceededError, match=r"do not fit into 8388608: the quota is 8388608 bytes"):
        put(store, (2,), bytes(9 * MIB))
    assert held(store, (1,)) == [True]


def test_a_chain_longer_than_the_quota_keeps_its_front(store: Store) -> None:
    frame = os.urandom(5 * MIB // 2)
    paths = [tuple(range(1, n + 1)) for n in range(1, 6)]
    for path in paths[:3]:
        put(store, path, frame)
    with pytest.raises(QuotaExceededError, match="pinned or in use"):
        put(store, paths[3], frame)
    with pytest.raises(PreconditionError, match=r"parent .* of block 4 is not held"):
        put(store, paths[4], frame)  # and it evicts nothing for a block that is refused anyway
    assert held(store, *paths) == [True, True, True, False, False]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"index": 7}, r"must be \(1, 4\) here, got \(7, 4\)"),
        ({"first_position": 9}, r"got \(1, 9\)"),
        ({"namespace": "other"}, r"parent .* is not held"),
    ],
)
def test_a_block_that_does_not_continue_its_parent_is_refused(
    store: Store, fields: dict[str, object], message: str
) -> None:
    put(store, (1,), b"parent")
    with pytest.raises(PreconditionError, match=message):
        put(store, (1, 2), b"child", **fields)


def test_blocks_of_an_unknown_model_are_refused(tmp_path: Path) -> None:
    store = Store(tmp_path, quota_bytes=8 * MIB)
    with pytest.raises(PreconditionError, match=f"model {SPEC.model_id.hex()} is not registered"):
        put(store, (1,), b"")
    store.close()


def test_a_better_block_replaces_a_worse_one_and_keeps_its_children(store: Store) -> None:
    coded, exact = pb.Fidelity(kind=pb.FIDELITY_KIND_CODED), pb.Fidelity(kind=pb.FIDELITY_KIND_EXACT)
    put(store, (1,), b"coded", fidelity=coded)
    put(store, (1, 2), b"child")
    assert put(store, (1,), b"exact", fidelity=exact) == pb.OUTCOME_REPLACED
    assert put(store, (1,), b"coded", fidelity=coded) == pb.OUTCOME_ALREADY_HELD
    assert put(store, (1,), b"with state", fidelity=exact, boundary=True) == pb.OUTCOME_REPLACED
    assert put(store, (1,), b"exact", fidelity=exact) == pb.OUTCOME_ALREADY_HELD
    found = store.frame(name(1))
    assert found is not None
    assert found[1] == b"with state"
    assert held(store, (1, 2)) == [True]


def test_exact_tensors_on_a_lossy_prefix_do_not_replace_exact_ones(store: Store) -> None:
    put(store, (1,), b"exact")
    entry = pb.Entry(parent_hash=ROOT, n_tokens=4, lineage=pb.FIDELITY_KIND_CODED)
    entry.fidelity.kind = pb.FIDELITY_KIND_EXACT
    assert store.put(name(1), entry, b"on lossy").result()[0] == pb.OUTCOME_ALREADY_HELD


def test_lowering_the_quota_evicts_down_to_it(store: Store) -> None:
    for token in range(6):
        put(store, (token,), os.urandom(MIB))
    store.quota_bytes = 3 * MIB
    store.fit_quota().result()
    assert store.usage().used_bytes <= 3 * MIB
    assert held(store, *[(t,) for t in range(6)]) == [False] * 4 + [True] * 2


def test_the_free_space_floor_is_a_quota_too(store: Store) -> None:
    for token in range(4):
        put(store, (token,), os.urandom(MIB))
    file_bytes = store.usage().file_bytes
    store.free_floor_bytes = 1 << 60  # from now on the file may not grow, only reuse
    for token in range(4, 8):
        put(store, (token,), os.urandom(MIB))
    assert held(store, (0,), (7,)) == [False, True]
    assert (
        store.usage().file_bytes < file_bytes + MIB + 100_000
    )  # pages freed by one transaction are the next one's but one
    with pytest.raises(QuotaExceededError, match=f"{1 << 60} of them are kept free"):
        put(store, (9,), os.urandom(6 * MIB))


def test_a_disk_that_refuses_to_grow_refuses_puts_while_reads_and_deletes_go_on(store: Store, tmp_path: Path) -> None:
    put(store, (1,), b"kept" * 100_000)
    put(store, (9,), bytes(100_000))
    store.delete([name(9)], "deleted").result()  # a file in use has free pages; deleting needs a few
    store.pin([name(1)], 0).result()  # and LMDB reuses them in the next transaction but one
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (tmp_path / "db/data.mdb").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))  # writes beyond fail, as on a full disk
    try:
        with pytest.raises(QuotaExceededError, match="could not write to"):
            put(store, (2,), os.urandom(3 * MIB))
        assert store.frame(name(1)) is not None
        assert store.check() == []
        assert store.delete([name(1)], "deleted").result() == 1
        assert put(store, (3,), b"small") == pb.OUTCOME_STORED
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_left_is_remembered_with_its_reason(store: Store) -> None:
    for token in range(9):
        put(store, (token,), os.urandom(MIB))
    put(store, (8, 1), b"child")
    store.delete([name(8)], "deleted").result()
    reasons = {d.block_hash: d.reason for d in store.departures()}
    assert reasons[name(0).block_hash] == "quota"
    assert reasons[name(8).block_hash] == reasons[name(8, 1).block_hash] == "deleted"


def test_many_threads_put_read_and_delete_at_once(store: Store) -> None:
    frames = {n: bytes([n]) * (10_000 * n + 1) for n in range(40)}
    wrong = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(60):
            n = rng.randrange(40)
            action = rng.random()
            if action < 0.5:
                put(store, (n,), frames[n])
            elif action < 0.9:
                found = store.frame(name(n))
                if found is not None and found[1] != frames[n]:
                    wrong.append(n)
            else:
                store.delete([name(n)], "deleted").result()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_full_map_refuses_puts_while_reads_go_on(store: Store) -> None:
    put(store, (1,), b"kept" * 100_000)
    store._env.set_mapsize(store.usage().file_bytes + MIB)
    with pytest.raises(QuotaExceededError, match="MDB_MAP_FULL"):
        put(store, (2,), os.urandom(2 * MIB))
    assert store.frame(name(1)) is not None
    assert put(store, (3,), b"small") == pb.OUTCOME_STORED


def test_refusals_that_are_kept_hold_no_reader_of_the_database(store: Store) -> None:
    kept = []
    for token in range(400):  # LMDB has 256 reader slots here
        with pytest.raises(PreconditionError) as refused:
            put(store, (token, token), b"no parent")
        kept.append(refused.value)
    assert len(store.frame(name(1)) or ()) == 0


def test_departures_are_remembered_within_a_small_part_of_the_quota(tmp_path: Path) -> None:
    store = open_store(tmp_path, quota_bytes=MIB)
    for token in range(300):
        put(store, (token,), b"")
        store.delete([name(token)], "deleted").result()
    assert len(store.departures()) == 128
    assert store.usage().used_bytes < MIB // 4
    store.close()
    store = open_store(tmp_path, quota_bytes=4 * MIB)
    for token in range(300):
        put(store, (token,), b"")
        store.delete([name(token)], "deleted").result()
    assert len(store.departures()) > 128
    store.quota_bytes = MIB
    store.fit_quota().result()
    assert len(store.departures()) == 128
    store.close()


def test_models_beyond_a_limit_are_refused(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvcached.records.MAX_MODELS", 3)
    for n in (1, 2):
        assert store.put_model(tiny_spec(weights=f"w{n}")).result() is False
    with pytest.raises(QuotaExceededError, match="3 models are registered"):
        store.put_model(tiny_spec(weights="w3")).result()
    assert store.put_model(SPEC).result() is True
