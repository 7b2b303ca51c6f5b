"""The store on a real disk: quota, recency, faults, and files that are not what they should be."""

import json
import os
import random
import resource
import threading
from collections.abc import Iterator
from pathlib import Path

import lmdb
import pytest
from support import tiny_spec

from kvcached.block import BlockId
from kvcached.errors import PreconditionError, QuotaExceededError, StoreError
from kvcached.store import PIN_FOREVER, Store
from kvcached_client._proto import kvcached_pb2 as pb
from kvcached_client.hashing import ROOT, block_hash

SPEC = tiny_spec()
MIB = 1 << 20


def open_store(path: Path, **settings: object) -> Store:
    store = Store(path, **{"quota_bytes": 8 * MIB, **settings})  # type: ignore[arg-type]
    store.put_model(SPEC).result()
    return store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = open_store(tmp_path)
    yield store
    assert store.check() == []
    store.close()


def name(*path: int) -> BlockId:
    """The block at the end of a chain of one-token blocks."""
    parent = ROOT
    for token in path:
        parent = block_hash(parent, [token])
    return BlockId(SPEC.model_id, "", parent)


def put(store: Store, path: tuple[int, ...], frame: bytes, **fields: object) -> pb.Outcome:
    index = len(path) - 1
    entry = pb.Entry(parent_hash=name(*path[:-1]).block_hash, index=index, n_tokens=4, first_position=4 * index)
    entry.fidelity.kind = entry.lineage = pb.FIDELITY_KIND_EXACT
    entry.MergeFrom(pb.Entry(**fields))  # type: ignore[arg-type]
    return store.put(name(*path), entry, frame).result()[0]


def held(store: Store, *paths: tuple[int, ...]) -> list[bool]:
    return [store.entry(name(*path)) is not None for path in paths]


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


def test_a_second_store_in_the_same_place_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    store = open_store(tmp_path, holder="socket /run/x.sock")
    with pytest.raises(StoreError, match=rf"held by kvcached, pid {os.getpid()}, socket /run/x.sock"):
        Store(tmp_path, quota_bytes=MIB)
    store.close()
    open_store(tmp_path).close()


@pytest.mark.parametrize("clean", [True, False], ids=["after a clean close", "after a crash"])
@pytest.mark.parametrize("damage", ["garbage", "truncated", "empty", "garbled page", "text"])
def test_a_damaged_file_is_moved_aside_and_the_store_starts_empty(tmp_path: Path, damage: str, clean: bool) -> None:
    store = open_store(tmp_path)
    for token in range(20):
        put(store, (token,), os.urandom(100_000))
    store.close()
    if not clean:
        (tmp_path / "clean.json").unlink()
    data = tmp_path / "db/data.mdb"
    content = bytearray(data.read_bytes())
    if damage == "garbage":
        content = bytearray(os.urandom(len(content)))
    elif damage == "truncated":
        del content[len(content) // 2 :]
    elif damage == "empty":
        content = bytearray()
    elif damage == "text":
        content = bytearray(b"not a database\n")
    else:
        env = lmdb.open(str(tmp_path / "db"), max_dbs=8, readonly=True, lock=False)
        page, page_bytes = env.info()["last_pgno"], env.stat()["psize"]
        env.close()
        for number in range(2, page + 1):  # every tree page; overflow pages are payload, which has its own checksums
            at = number * page_bytes
            if content[at + 10] & 0x03:  # P_BRANCH or P_LEAF
                content[at : at + page_bytes] = os.urandom(page_bytes)
    data.write_bytes(content)
    store = open_store(tmp_path)
    assert store.totals() == {}
    assert len(store.set_aside) == 1
    assert put(store, (1,), b"works") == pb.OUTCOME_STORED
    assert store.check() == []
    store.close()
    kept = next(tmp_path.glob("set-aside-*/data.mdb"))
    assert kept.read_bytes() == bytes(content)


@pytest.mark.parametrize("table", [None, b"sys", b"other"])
def test_a_foreign_database_is_moved_aside_untouched(tmp_path: Path, table: bytes | None) -> None:
    with lmdb.open(str(tmp_path / "db"), max_dbs=4) as env:
        handle = env.open_db(table) if table else None
        with env.begin(write=True, db=handle) as txn:
            txn.put(b"sys" if not table else b"format", b"precious")
    store = open_store(tmp_path)
    assert "not a store of kvcached" in store.set_aside[0]
    store.close()
    with lmdb.open(str(next(tmp_path.glob("set-aside-*"))), max_dbs=4) as env:
        handle = env.open_db(table) if table else None
        with env.begin(db=handle) as txn:
            assert txn.get(b"sys" if not table else b"format") == b"precious"


def test_a_clean_store_is_opened_without_an_audit_and_a_crashed_one_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    audits = []
    monkeypatch.setattr("kvcached.store_files.verify", lambda path: audits.append(path) or [])
    open_store(tmp_path).close()
    open_store(tmp_path).close()
    assert audits == []
    (tmp_path / "clean.json").write_text(json.dumps({"size": 1}))
    open_store(tmp_path).close()
    assert audits == [str(tmp_path / "db/data.mdb")]


def test_a_store_reopened_under_a_smaller_quota_evicts_down_to_it_and_goes_on(tmp_path: Path) -> None:
    store = open_store(tmp_path, quota_bytes=64 * MIB)
    for token in range(30):
        put(store, (token,), os.urandom(MIB))
    store.close()
    store = open_store(tmp_path, quota_bytes=4 * MIB)
    assert store.usage().used_bytes <= 4 * MIB
    assert held(store, (0,), (29,)) == [False, True]
    for token in range(40, 50):
        assert put(store, (token,), os.urandom(MIB)) == pb.OUTCOME_STORED
    assert store.check() == []
    store.close()


def test_a_store_that_cannot_be_mapped_now_is_an_error_and_stays_where_it_is(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    put(store, (1,), b"kept")
    store.close()
    with pytest.raises(StoreError, match="cannot be opened with a map of"):
        Store(tmp_path, quota_bytes=1 << 60)
    store = open_store(tmp_path)  # and the lock was let go
    assert held(store, (1,)) == [True]
    assert store.set_aside == []
    store.close()


def test_a_place_where_no_store_can_be_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    for path in (tmp_path / "file", tmp_path / "file/store"):
        with pytest.raises(StoreError, match=f"the store {path} cannot be made or opened"):
            Store(path, quota_bytes=MIB)


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


@pytest.mark.parametrize("table", ["entries", "models", "departed", "totals"])
def test_records_that_cannot_be_read_cost_blocks_and_a_new_start_not_the_service(tmp_path: Path, table: str) -> None:
    store = open_store(tmp_path)
    put(store, (0,), b"x")
    store.delete([name(0)], "deleted").result()
    for token in range(1, 7):
        put(store, (token,), os.urandom(MIB))
    with store._env.begin(write=True) as txn:
        key = next(iter(txn.cursor(getattr(store._tables, table))))[0]
        txn.put(key, b"\xff" * 7, db=getattr(store._tables, table))
    store.chain([name(token) for token in range(1, 7)])
    store.departures()
    store.models()
    for token in range(10, 20):  # evicts them all
        try:
            put(store, (token,), os.urandom(MIB))
        except (StoreError, PreconditionError):
            assert table in ("totals", "models")
    assert held(store, (6,)) == [table == "totals"]  # without which nothing can be counted, in or out
    assert store.check() != [] or table == "departed"
    store.close()
    store = open_store(tmp_path)
    assert put(store, (99,), b"works") == pb.OUTCOME_STORED
    assert store.check() == []
    store.close()


def damage_entry(store: Store) -> None:
    with store._env.begin(write=True) as txn:
        key, record = next(iter(txn.cursor(store._tables.entries)))
        entry = pb.Entry.FromString(bytes(record))
        entry.last_used += 1
        entry.stored_bytes += 1
        txn.put(key, entry.SerializeToString(), db=store._tables.entries)


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ("recency", "a recency record is missing"),
        ("payload", "a payload chunk is missing"),
        ("children", "a child record is missing"),
        ("models", "is of the unknown model"),
        ("totals", "the entries add up to"),
        ("entries", "is left over"),
        (None, "a recency record is left over"),
    ],
)
def test_check_finds_each_kind_of_damage(tmp_path: Path, table: str | None, expected: str) -> None:
    store = open_store(tmp_path)
    put(store, (1,), b"frame" * 50_000)
    put(store, (1, 2), b"frame" * 50_000)
    assert store.check() == []
    if table is None:
        damage_entry(store)
    else:
        with store._env.begin(write=True) as txn:
            cursor = txn.cursor(getattr(store._tables, table))
            cursor.first()
            cursor.delete()
    assert any(expected in problem for problem in store.check())
    store.close()
