"""Shared memory and gRPC's streams carry the same blocks, and the one steps in for the other, whatever happens."""

import gc
import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bundles import install
from compacting import fresh as coded_chain
from compacting import fresh_spec as compacting_spec
from compacting import make_compacting
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    ROOT_DIR,
    DaemonProcess,
    attached,
    chain,
    data_of,
    hashes_of,
    header_of,
    n_moved,
    put_all,
    put_parts,
    same_tensors,
    tiny_spec,
    wait_until,
)

from kvcached_client import Block, Client, Connection, FidelityKind, Limits, ModelSpec, segments
from kvcached_client._proto import kvcached_pb2 as pb
from kvcached_client.segments import attach
from kvcached_client.tensors import DTYPES

_serial = itertools.count()
DTYPE_NAMES = sorted(DTYPES)


def fresh_spec(**fields: object) -> ModelSpec:
    return tiny_spec(weights=f"roads {next(_serial)}", **fields)  # type: ignore[arg-type]


def in_band(daemon: DaemonProcess, spec: ModelSpec) -> Client:
    return Client(spec, target=daemon.target, limits=Limits(segment_bytes=0))


def sharing(daemon: DaemonProcess, spec: ModelSpec) -> Client:
    client = daemon.client(spec)
    attached(client)
    return client


def same(block: Block, again: Block | None) -> bool:
    return again is not None and same_tensors(dict(block.tensors), dict(again.tensors))


def moved(daemon: DaemonProcess) -> dict[tuple[str, str], int]:
    return {(m, r): n_moved(daemon, m, r) for m in ("Put", "Get") for r in ("segment", "in-band")}


def gauges(daemon: DaemonProcess) -> tuple[int, int]:
    """Leases and bytes that the daemon lends, as its memory maps have it."""
    maps = [line for line in Path(f"/proc/{pid_of(daemon)}/maps").read_text().splitlines() if "memfd:kvcached" in line]
    sizes = [int(line.split()[0].split("-")[1], 16) - int(line.split()[0].split("-")[0], 16) for line in maps]
    return len(maps), sum(sizes)


def pid_of(daemon: DaemonProcess) -> int:
    assert daemon.process is not None
    return daemon.process.pid


linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")


# ---- the same blocks


@given(st.data())
@settings(max_examples=40)
def test_any_tensors_come_back_whichever_way_they_went_in_and_out(
    shared_daemon: DaemonProcess, data: st.DataObject
) -> None:
    spec, seed = fresh_spec(), data.draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    shapes = data.draw(st.lists(st.lists(st.integers(0, 5), max_size=4).map(tuple), max_size=4))
    opaque = {}
    for i, shape in enumerate(shapes):
        dtype = DTYPES[data.draw(st.sampled_from(DTYPE_NAMES))]
        raw = rng.integers(0, 2, int(np.prod(shape)) * dtype.itemsize, np.uint8)
        opaque[f"tensor {i}"] = raw.view(dtype).reshape(shape)
    dense_first = data.draw(st.booleans())
    with sharing(shared_daemon, spec) as ours, in_band(shared_daemon, spec) as theirs:
        (block,) = chain(ours, range(4), seed=seed)
        tensors = {**block.tensors, **opaque} if dense_first else {**opaque, **block.tensors}
        block = replace(block, tensors=tensors)
        put_all(*((ours if data.draw(st.booleans()) else theirs), [block]))
        for client in (ours, theirs):
            assert all(same(block, again) for again in client.get([block.block_hash]))


@pytest.mark.parametrize("store_as", ["exact", "x8", "compacted-x8"])
def test_what_a_frame_decodes_to_is_the_same_on_both_roads(shared_daemon: DaemonProcess, store_as: str) -> None:
    spec = compacting_spec()
    with sharing(shared_daemon, spec) as ours, in_band(shared_daemon, spec) as theirs:
        ours.match([])
        install(shared_daemon, make_compacting(spec))
        blocks = coded_chain(ours, 3)
        before = moved(shared_daemon)
        results = ours.put(blocks, store_as=store_as)
        kinds = {pb.FidelityKind.Name(result.fidelity.kind).removeprefix("FIDELITY_KIND_") for result in results}
        assert kinds == {{"exact": "EXACT", "x8": "CODED", "compacted-x8": "COMPACTED"}[store_as]}
        wanted = {"floor": FidelityKind.COMPACTED, "accepts_compacted": True}
        by_slot = ours.get(hashes_of(blocks), **wanted)  # type: ignore[arg-type]
        by_stream = theirs.get(hashes_of(blocks), **wanted)  # type: ignore[arg-type]
        for block, a, b in zip(blocks, by_slot, by_stream, strict=True):
            assert a is not None
            assert same(a, b)
            assert not a.tensors["keys"].flags.writeable
            assert store_as != "exact" or same(block, a)
        after = moved(shared_daemon)
    assert {key: after[key] - before[key] for key in after} == {
        ("Put", "segment"): 3,
        ("Put", "in-band"): 0,
        ("Get", "segment"): 3,
        ("Get", "in-band"): 3,
    }


# ---- slots


def test_few_slots_carry_a_long_prefix(daemon: DaemonProcess) -> None:
    with sharing(daemon, fresh_spec(block_size=256)) as client:
        blocks = put_all(client, chain(client, range(256 * 60)))
        for items in (client.get(hashes_of(blocks)), client.get_longest_prefix(hashes_of(blocks))):
            assert all(same(block, again) for block, again in zip(blocks, items, strict=True))
        assert n_moved(daemon, "Get", "segment") >= 60  # of 120, through 8 slots; where the client was slow, in-band


def test_a_caller_who_keeps_all_blocks_gets_the_rest_in_band_and_all_stay_as_they_are(daemon: DaemonProcess) -> None:
    client = sharing(daemon, fresh_spec(block_size=256))
    blocks = put_all(client, chain(client, range(256 * 60)))
    first, second = list(client.get(hashes_of(blocks))), list(client.get(hashes_of(blocks)))
    counts = moved(daemon)
    assert counts["Get", "segment"] >= 8
    assert counts["Get", "in-band"] >= 60
    del first[::2]
    third = list(client.get(hashes_of(blocks)))
    assert n_moved(daemon, "Get", "segment") > counts["Get", "segment"]
    daemon.stop()
    client.close()
    gc.collect()
    assert all(same(block, again) for block, again in zip(blocks[1::2], first, strict=True))
    assert all(same(block, again) for kept in (second, third) for block, again in zip(blocks, kept, strict=True))
    daemon.start()


def test_slots_come_back_from_misses_and_from_what_nobody_reads(daemon: DaemonProcess) -> None:
    with sharing(daemon, fresh_spec(block_size=256)) as client:
        blocks = put_all(client, chain(client, range(256 * 8)))
        for _ in range(5):
            items = client.get(hashes_of(blocks))
            assert same(blocks[0], next(items))
            items.close()  # type: ignore[attr-defined]
            attached(client)
        before = n_moved(daemon, "Get", "segment")
        hashes = [h for block in blocks for h in (block.block_hash, os.urandom(32))]
        got = list(client.get(hashes))
        assert [again is None for again in got] == [False, True] * 8
        assert n_moved(daemon, "Get", "segment") > before
    assert wait_until(lambda: gc.collect() >= 0 and gauges(daemon) == (0, 0)) or sys.platform != "linux"


def test_a_block_larger_than_what_was_lent_goes_in_band(shared_daemon: DaemonProcess) -> None:
    with sharing(shared_daemon, fresh_spec()) as client:
        before = moved(shared_daemon)
        (block,) = put_all(client, chain(client, range(4), ballast=3 << 20))
        assert all(same(block, again) for again in client.get([block.block_hash]))
        after = moved(shared_daemon)
        assert [after[key] - before[key] for key in sorted(after)] == [1, 0, 1, 0]


def test_many_threads_share_one_lease(shared_daemon: DaemonProcess) -> None:
    with sharing(shared_daemon, fresh_spec(block_size=256)) as client:
        chains = [chain(client, range(i, i + 256 * 5), seed=100 * i) for i in range(6)]
        wrong: list[bytes] = []

        def work(blocks: list[Block]) -> None:
            for _ in range(4):
                put_all(client, blocks)
                for block, again in zip(blocks, client.get(hashes_of(blocks)), strict=True):
                    if not same(block, again):
                        wrong.append(block.block_hash)

        threads = [threading.Thread(target=work, args=(blocks,)) for blocks in chains]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []


# ---- falling back, and coming back


def test_without_a_lender_everything_goes_in_band(run_dir: Path) -> None:
    daemon = DaemonProcess(run_dir, "--segment-bytes", "0")
    daemon.start()
    assert not daemon.socket.with_name(daemon.socket.name + ".memory").exists()
    with daemon.client(fresh_spec()) as client:
        assert client._leases.wait(10) is None
        blocks = put_all(client, chain(client, range(16)))
        assert all(same(block, again) for block, again in zip(blocks, client.get(hashes_of(blocks)), strict=True))
    assert moved(daemon) == {
        ("Put", "segment"): 0,
        ("Put", "in-band"): 4,
        ("Get", "segment"): 0,
        ("Get", "in-band"): 4,
    }
    assert daemon.stop() == 0


def test_a_client_that_finds_no_room_goes_in_band(run_dir: Path) -> None:
    daemon = DaemonProcess(run_dir, "--segment-bytes", "1MiB")
    daemon.start()
    with sharing(daemon, fresh_spec()) as first, daemon.client(first.spec) as second:
        assert second._leases.wait(10) is None
        blocks = put_all(second, chain(second, range(16)))
        for client in (first, second):
            assert all(same(block, again) for block, again in zip(blocks, client.get(hashes_of(blocks)), strict=True))
    assert n_moved(daemon, "Get", "segment") == 4
    assert n_moved(daemon, "Get", "in-band") == 4
    assert daemon.stop() == 0


def test_after_a_restart_nothing_is_lost_and_memory_is_shared_again(daemon: DaemonProcess) -> None:
    with sharing(daemon, fresh_spec()) as client:
        blocks = put_all(client, chain(client, range(16)))
        held = next(client.get(hashes_of(blocks[:1])))
        daemon.restart()
        assert same(blocks[0], held)
        assert all(same(block, again) for block, again in zip(blocks, client.get(hashes_of(blocks)), strict=True))
        attached(client)
        assert all(same(block, again) for block, again in zip(blocks, client.get(hashes_of(blocks)), strict=True))
        assert n_moved(daemon, "Get", "segment") == 4


def test_a_put_into_a_lease_that_has_ended_is_put_again_in_band(daemon: DaemonProcess) -> None:
    with sharing(daemon, fresh_spec()) as client:
        lease = attached(client)
        lease.id = os.urandom(16)  # as if the daemon had another opinion
        blocks = put_all(client, chain(client, range(40)))
        assert n_moved(daemon, "Put", "in-band") == 10
        assert daemon.status().counters['refused_blocks_total{code="ABORTED"}'] >= 1
        assert client._leases._lease is not lease
        attached(client)
        assert all(same(block, again) for block, again in zip(blocks, client.get(hashes_of(blocks)), strict=True))
        assert n_moved(daemon, "Get", "segment") == 10


def test_a_daemon_that_is_stopped_ends_all_leases_and_leaves_no_socket(daemon: DaemonProcess) -> None:
    clients = [sharing(daemon, fresh_spec()) for _ in range(3)]
    assert daemon.stop() == 0
    assert list(daemon.socket.parent.iterdir()) == []
    for client in clients:
        assert wait_until(lambda client=client: not client._leases._lease.is_alive)  # type: ignore[union-attr, misc]
        client.close()
    daemon.start()


def test_a_daemon_that_was_killed_leaves_nothing_in_the_way_of_the_next(daemon: DaemonProcess) -> None:
    with sharing(daemon, fresh_spec()) as client:
        daemon.kill()
        daemon.start()
        blocks = put_all(client, chain(client, range(16)))
        attached(client)
        assert all(same(block, again) for block, again in zip(blocks, client.get(hashes_of(blocks)), strict=True))
        assert n_moved(daemon, "Get", "segment") == 4


# ---- hostile callers


@pytest.fixture
def lent(shared_daemon: DaemonProcess) -> Iterator[Client]:
    with sharing(shared_daemon, fresh_spec()) as client:
        client.match([])
        yield client


def slot_put(daemon: DaemonProcess, client: Client, slot: int, lease: bytes, *more: bytes) -> pb.PutResult:
    header = header_of(client, chain(client, range(4))[0])
    header.slot, header.lease = slot, lease
    (result,) = put_parts(daemon.target, [header, *more])
    return result


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_another_user_who_reaches_the_socket_is_lent_nothing(
    daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, name = daemon.socket.parent, Path(daemon.socket.name + ".memory")
    monkeypatch.chdir(directory)
    directory.chmod(0o755)  # as the daemon never leaves it
    name.chmod(0o777)
    attach(name, 1 << 20).end()
    monkeypatch.setattr(segments, "peer_uid", lambda _: os.geteuid())  # a client that asks whomever it finds
    os.seteuid(65534)
    try:
        with pytest.raises((OSError, ValueError), match=r"got 0|Broken pipe|reset"):
            attach(name, 1 << 20)
    finally:
        os.seteuid(0)
    assert wait_until(lambda: "not to 65534" in daemon.log.read_text())


@pytest.mark.parametrize("slot", [0, 1, (1 << 19) - 1, (1 << 20) - 1, 1 << 20, 1 << 40, (1 << 64) - 1])
def test_a_put_from_outside_the_part_for_put_is_refused_by_itself(
    shared_daemon: DaemonProcess, lent: Client, slot: int
) -> None:
    result = slot_put(shared_daemon, lent, slot, attached(lent).id)
    assert (result.outcome, result.code) == (pb.OUTCOME_REFUSED, "INVALID_ARGUMENT")
    assert shared_daemon.status().pool.put_bytes == 0
    assert attached(lent).is_alive


@pytest.mark.parametrize("lease", [b"", b"x", bytes(16), b"y" * 1000])
def test_a_lease_that_is_not_is_refused_in_put_and_ignored_in_get(
    shared_daemon: DaemonProcess, lent: Client, lease: bytes
) -> None:
    result = slot_put(shared_daemon, lent, 1 << 19, lease)
    assert (result.outcome, result.code) == (pb.OUTCOME_REFUSED, "ABORTED")
    assert shared_daemon.status().pool.put_bytes == 0
    (block,) = put_all(lent, chain(lent, range(4)))
    request = pb.GetRequest(model_id=lent.model_id, block_hashes=[block.block_hash], lease=lease)
    with Connection(shared_daemon.target) as connection:
        header, *data = connection.get(request, 10)
    assert isinstance(header, pb.Header)
    assert not header.HasField("slot")
    assert b"".join(data) == b"".join(data_of(block))  # type: ignore[arg-type]


def test_two_blocks_in_one_slot_harm_nobody_else(shared_daemon: DaemonProcess, lent: Client) -> None:
    lease = attached(lent)
    blocks = chain(lent, range(12))
    slot = lease.write(blocks[0].tensors, 512)
    assert slot is not None
    headers = [header_of(lent, block) for block in blocks]
    for i, header in enumerate(headers):
        header.slot, header.lease = slot + 8 * i, lease.id
    results = put_parts(shared_daemon.target, headers)
    assert [result.code for result in results] == ["OK"] * 3
    assert same(blocks[0], next(lent.get([blocks[0].block_hash])))


def test_data_after_a_block_in_a_slot_ends_the_stream(shared_daemon: DaemonProcess, lent: Client) -> None:
    slot = attached(lent).write(chain(lent, range(4))[0].tensors, 512)
    assert slot is not None
    with pytest.raises(Exception, match="expected a header, got 5 bytes"):
        slot_put(shared_daemon, lent, slot, attached(lent).id, b"12345")


def test_a_block_in_a_slot_that_nobody_lent_is_a_miss(lent: Client) -> None:
    (block,) = put_all(lent, chain(lent, range(4)))
    lease = attached(lent)
    lease.get_bytes = 0  # a client that knows of nothing lent for Get
    assert list(lent.get([block.block_hash])) == [None]
    assert not lease.is_alive
    assert same(block, next(lent.get([block.block_hash])))


# ---- clients that are killed


@linux
@pytest.mark.slow
def test_a_client_killed_100_times_while_it_holds_slots_leaves_none_taken_and_no_memory(daemon: DaemonProcess) -> None:
    spec = tiny_spec(weights="killed")
    with in_band(daemon, spec) as client:
        put_all(client, chain(client, range(40)))
    n_fds = len(list(Path(f"/proc/{pid_of(daemon)}/fd").iterdir()))
    command = [sys.executable, str(ROOT_DIR / "tests/slot_holder.py"), daemon.target, "killed", "40"]
    n_at_once = 4
    for _ in range(100 // n_at_once):
        holders = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(n_at_once)]
        for holder in holders:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "11\n"
        assert gauges(daemon)[0] == n_at_once
        for holder in holders:
            holder.kill()
            holder.communicate()
        assert wait_until(lambda: gauges(daemon) == (0, 0))
    assert n_moved(daemon, "Get", "segment") >= 100 * 10
    assert wait_until(lambda: len(list(Path(f"/proc/{pid_of(daemon)}/fd").iterdir())) <= n_fds + 2)
    with sharing(daemon, spec) as client:
        before = n_moved(daemon, "Get", "segment")
        assert all(block is not None for block in client.get(client.chain(range(40))))
        assert n_moved(daemon, "Get", "segment") > before
