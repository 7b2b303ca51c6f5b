"""Opening a store: files that are not what they should be, quotas that changed, and what check() finds."""

import json
import os
from pathlib import Path

import lmdb
import pytest
from stores import MIB, held, name, open_store, put

from kvcached.errors import PreconditionError, StoreError
from kvcached.store import Store
from kvcached_client._proto import kvcached_pb2 as pb


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


def test_a_close_on_a_full_disk_loses_nothing_but_the_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    store = open_store(tmp_path)
    put(store, (1,), b"kept")
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        store.close()
    assert not (tmp_path / "clean.json").exists()
    store = open_store(tmp_path)
    assert held(store, (1,)) == [True]
    store.close()
