"""Blocks with fewer tokens: who gets them, what they are when they come back, and which replaces which."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import install, make_bundle
from compacting import (
    SIZE,
    configure,
    counter,
    fresh,
    fresh_spec,
    get,
    here,
    make_compacting,
    put,
    put_fresh,
    stored_as,
)
from support import DaemonProcess, damage_frame, data_of, header_of, same_tensors, wait_until

from kvcached.codec.bundle import Bundle
from kvcached_client import Block, Client, Connection, FidelityKind, ModelSpec
from kvcached_client._proto import kvcached_pb2 as pb

COMPACTED, CODED, EXACT = FidelityKind.COMPACTED, FidelityKind.CODED, FidelityKind.EXACT


@pytest.fixture
def client(shared_daemon: DaemonProcess) -> Iterator[Client]:
    """A client of a model of its own, known to the daemon."""
    with shared_daemon.client(fresh_spec()) as client:
        client.match([])
        yield client
    names = {"fidelity": "auto", "namespace_fidelity": "", "am_ratio": "4", "namespace_am_ratio": ""}
    shared_daemon.call("SetConfig", pb.SetConfigRequest(values=names))


@pytest.fixture
def bundle(client: Client, shared_daemon: DaemonProcess) -> Bundle:
    """The client's model was calibrated, compaction included."""
    bundle = make_compacting(client.spec)
    install(shared_daemon, bundle)
    return bundle


# ---- what comes back, and to whom


@pytest.mark.parametrize("ratio", [1.5, 2, 4, 4.1, 8])
def test_a_block_comes_back_as_compaction_and_coding_left_it(client: Client, bundle: Bundle, ratio: float) -> None:
    blocks = fresh(client, 2)
    for block in blocks:
        assert stored_as(put(client, block, store_as="compacted-x8", am_ratio=ratio)) == f"compacted-x8@{ratio:g}"
    for block, found in zip(blocks, get(client, *blocks), strict=True):
        assert found
        assert (found.fidelity.kind, found.fidelity.bundle_id) == (COMPACTED, bundle.bundle_id)
        assert round(found.fidelity.am_ratio, 4) == ratio
        expected = here(bundle, client, block, float(np.float32(ratio)))
        assert same_tensors(dict(found.tensors), expected.to_tensors())
        assert found.tensors["lengths"].sum() == pytest.approx(4 * SIZE / ratio, abs=1)
        assert len(set(found.tensors["lengths"].flat)) > 1  # budgets are unequal
        assert found.first_position == block.first_position


@pytest.mark.usefixtures("bundle")
def test_callers_that_do_not_take_compacted_blocks_are_told_of_none(
    client: Client, shared_daemon: DaemonProcess
) -> None:
    compacted, plain = fresh(client, 2)
    put(client, compacted, store_as="compacted-x16")
    put(client, plain, store_as="x16")
    hashes = [compacted.block_hash, plain.block_hash]
    before = counter(shared_daemon, "block_misses", reason="below_floor")
    asked = [
        {"floor": COMPACTED, "accepts_compacted": False},
        {"floor": CODED, "accepts_compacted": True},
        {"floor": CODED, "accepts_compacted": False},
    ]
    for accepts in asked:
        assert client.match(hashes, **accepts).hashes == ()  # type: ignore[arg-type]
        assert [found is not None for found in get(client, compacted, plain, **accepts)] == [False, True]
    assert client.match(hashes).hashes == ()
    assert counter(shared_daemon, "block_misses", reason="below_floor") == before + 3
    match = client.match(hashes, floor=COMPACTED, accepts_compacted=True)
    assert [block.fidelity.kind for block in match.blocks] == [COMPACTED, CODED]
    assert [found is not None for found in get(client, compacted, plain)] == [True, True]


@pytest.mark.usefixtures("bundle")
def test_a_block_computed_on_a_compacted_prefix_is_below_the_floor_of_those_who_take_coded_ones(client: Client) -> None:
    (block,) = fresh(client)
    assert stored_as(put(client, block, store_as="exact", lineage=pb.FIDELITY_KIND_COMPACTED)) == "exact"
    assert get(client, block, floor=CODED) == [None]
    (found,) = get(client, block)
    assert found
    assert (found.fidelity.kind, found.lineage) == (EXACT, COMPACTED)


@pytest.mark.usefixtures("bundle")
def test_opaque_tensors_beside_compacted_ones_come_back_bit_for_bit(client: Client) -> None:
    (block,) = fresh(client)
    state = np.array([np.nan, 1, -0.0], np.float32)
    block = replace(block, tensors={**block.tensors, "state.3": state}, boundary=True)
    assert stored_as(put(client, block, store_as="compacted-x8")) == "compacted-x8@4"
    (found,) = get(client, block)
    assert found
    assert found.boundary
    assert found.tensors["state.3"].tobytes() == state.tobytes()
    assert "bias" in found.tensors


# ---- which fidelity


@pytest.mark.usefixtures("bundle")
def test_the_put_beats_the_namespace_and_that_the_setting(client: Client) -> None:
    configure(client, fidelity="compacted-x8")
    assert stored_as(put_fresh(client)) == "compacted-x8@4"
    configure(client, am_ratio="3")
    assert stored_as(put_fresh(client)) == "compacted-x8@3"
    configure(client, namespace_am_ratio="=2, other=6")
    assert stored_as(put_fresh(client)) == "compacted-x8@2"
    with Client(client.spec, namespace="other", target=client._connection.target) as other:
        assert stored_as(put_fresh(other)) == "compacted-x8@6"
    assert stored_as(put_fresh(client, store_as="compacted-x16")) == "compacted-x16@2"
    assert stored_as(put_fresh(client, store_as="compacted-x16", am_ratio=5)) == "compacted-x16@5"
    configure(client, namespace_fidelity="=compacted-x16")
    assert stored_as(put_fresh(client)) == "compacted-x16@2"
    assert stored_as(put_fresh(client, store_as="x32")) == "x32"
    assert stored_as(put_fresh(client, store_as="exact")) == "exact"


@pytest.mark.usefixtures("bundle")
def test_nothing_is_compacted_unless_somebody_says_so(client: Client) -> None:
    assert stored_as(put_fresh(client)) == "x8"


@pytest.mark.usefixtures("bundle")
@pytest.mark.parametrize("name", ["x8", "x16"])
def test_a_ratio_of_1_is_the_identity_and_coded(client: Client, shared_daemon: DaemonProcess, name: str) -> None:
    before = shared_daemon.status().counters
    plain, identity = fresh(client, 2)
    assert stored_as(put(client, plain, store_as=name)) == name
    assert stored_as(put(client, identity, store_as=f"compacted-{name}", am_ratio=1)) == name
    assert stored_as(put_fresh(client, store_as=f"compacted-{name}", am_ratio=1.001)) == name  # all tokens stay
    configure(client, am_ratio="1")
    result = put_fresh(client, store_as=f"compacted-{name}")
    assert (stored_as(result), result.fidelity.am_ratio) == (name, 0)
    after = shared_daemon.status().counters
    assert {n for n in after if n.startswith(("coded_fallback", "compacted")) and after[n] != before.get(n, 0)} == set()


@pytest.mark.usefixtures("bundle")
@pytest.mark.parametrize(
    ("minimum", "expected"), [(0, "compacted-x16@4"), (1, "compacted-x16@4"), (2, "x16"), (3, "exact")]
)
def test_a_put_can_say_the_least_that_it_accepts(client: Client, minimum: int, expected: str) -> None:
    assert stored_as(put_fresh(client, store_as="compacted-x16", min_fidelity=minimum)) == expected


# ---- better and worse


@pytest.mark.usefixtures("bundle")
def test_a_lower_ratio_a_better_profile_and_a_better_kind_replace_and_never_the_other_way(client: Client) -> None:
    (block,) = fresh(client)
    better_and_better = [
        {"store_as": "compacted-x16", "am_ratio": 8},
        {"store_as": "compacted-x16", "am_ratio": 4.1},
        {"store_as": "compacted-x8", "am_ratio": 4.1},
        {"store_as": "compacted-x8", "am_ratio": 2},
        {"store_as": "x32"},
        {"store_as": "x16"},
        {"store_as": "exact"},
    ]
    outcomes = []
    for n, wish in enumerate(better_and_better):
        result = put(client, block, **wish)
        outcomes.append(result.outcome)
        held = stored_as(result)
        for worse in better_and_better[: n + 1]:
            again = put(client, block, **worse)
            assert (again.outcome, stored_as(again)) == (pb.OUTCOME_ALREADY_HELD, held)
    assert outcomes == [pb.OUTCOME_STORED, *[pb.OUTCOME_REPLACED] * 6]


@pytest.mark.usefixtures("bundle")
def test_better_in_one_respect_and_worse_in_another_replaces_nothing(client: Client) -> None:
    (block,) = fresh(client)
    assert put(client, block, store_as="compacted-x16", am_ratio=2).outcome == pb.OUTCOME_STORED
    result = put(client, block, store_as="compacted-x8", am_ratio=4)
    assert (result.outcome, stored_as(result)) == (pb.OUTCOME_ALREADY_HELD, "compacted-x16@2")


@pytest.mark.usefixtures("bundle")
def test_of_many_puts_of_one_block_at_once_the_best_is_held(client: Client, shared_daemon: DaemonProcess) -> None:
    (block,) = fresh(client)
    wishes = [("compacted-x16", 8.0), ("compacted-x8", 4.0), ("x16", 0.0), ("compacted-x16", 2.0), ("x8", 0.0)]

    def one(wish: tuple[str, float]) -> str:
        return put(client, block, store_as=wish[0], am_ratio=wish[1]).code

    with ThreadPoolExecutor(20) as threads:
        assert set(threads.map(one, wishes * 4)) == {"OK"}
    (found,) = get(client, block)
    assert found
    assert (found.fidelity.kind, found.fidelity.profile) == (CODED, "x8")
    assert list(shared_daemon.call("Check", pb.CheckRequest()).problems) == []
    assert wait_until(lambda: shared_daemon.status().pool.put_bytes == 0)


# ---- what the daemon says of them


@pytest.mark.usefixtures("bundle")
def test_compacted_blocks_are_counted_as_such(client: Client, shared_daemon: DaemonProcess) -> None:
    names = ("compaction_source_rows", "compaction_kept_rows")
    before = [counter(shared_daemon, name) for name in names]
    hits = counter(shared_daemon, "block_hits", fidelity="COMPACTED")
    (block,) = fresh(client)
    put(client, block, store_as="compacted-x8")
    (found,) = get(client, block)
    assert found
    rows = [counter(shared_daemon, name) - n for name, n in zip(names, before, strict=True)]
    assert rows == [4 * SIZE, found.tensors["lengths"].sum()]
    assert counter(shared_daemon, "block_hits", fidelity="COMPACTED") == hits + 1
    (model,) = [m for m in shared_daemon.status().models if m.model_id == client.model_id]
    assert [(f.kind, f.n_blocks) for f in model.fidelities] == [(COMPACTED, 1)]


def test_bundles_say_whether_they_compact(client: Client, shared_daemon: DaemonProcess) -> None:
    compacts, does_not = make_compacting(client.spec), make_bundle(client.spec, seed=1, measured=["x8"])
    assert install(shared_daemon, compacts).compacts
    assert not install(shared_daemon, does_not).compacts
    listed = {b.bundle_id: b.compacts for b in shared_daemon.call("ListBundles", pb.ListBundlesRequest()).bundles}
    assert (listed[compacts.bundle_id], listed[does_not.bundle_id]) == (True, False)


def test_ctl_shows_what_compacts_and_what_is_compacted(client: Client, shared_daemon: DaemonProcess) -> None:
    bundle = make_compacting(client.spec)
    install(shared_daemon, bundle)
    assert stored_as(put_fresh(client, store_as="compacted-x8")) == "compacted-x8@4"
    (line,) = [x for x in ctl(shared_daemon, "bundles").splitlines() if x.startswith(bundle.bundle_id.hex()[:12])]
    assert line.endswith("1 blocks in use, compacts, current")
    (row,) = [x for x in ctl(shared_daemon, "status").splitlines() if client.model_id.hex()[:12] in x]
    assert [cell.strip() for cell in row.split("│")[3:6]] == ["COMPACTED", "1", "64"]


def ctl(daemon: DaemonProcess, command: str) -> str:
    program = str(Path(sys.executable).with_name("kvcachedctl"))
    result = subprocess.run(
        [program, "--target", daemon.target, command], capture_output=True, text=True, timeout=60, check=True
    )
    return result.stdout


# ---- disk


@pytest.fixture
def filled(daemon: DaemonProcess) -> tuple[DaemonProcess, ModelSpec, Bundle, list[Block]]:
    """A daemon of its own that holds compacted blocks."""
    spec = fresh_spec()
    bundle = make_compacting(spec)
    with daemon.client(spec) as client:
        client.match([])
        install(daemon, bundle)
        blocks = fresh(client, 3)
        results = client.put(blocks, store_as="compacted-x8", am_ratio=3)
        assert [stored_as(result) for result in results] == ["compacted-x8@3"] * 3
    return daemon, spec, bundle, blocks


def found_in(daemon: DaemonProcess, spec: ModelSpec, blocks: list[Block]) -> list[dict[str, np.ndarray] | None]:
    with daemon.client(spec) as client:
        return [found and dict(found.tensors) for found in get(client, *blocks)]


def test_compacted_blocks_are_read_after_a_restart_and_the_store_is_sound(
    filled: tuple[DaemonProcess, ModelSpec, Bundle, list[Block]],
) -> None:
    daemon, spec, _, blocks = filled
    before = found_in(daemon, spec, blocks)
    daemon.restart()
    after = found_in(daemon, spec, blocks)
    assert all(a and b and same_tensors(a, b) for a, b in zip(before, after, strict=True))
    report = daemon.call("Check", pb.CheckRequest(frames=True))
    assert (list(report.problems), report.n_frames_decoded) == ([], 3)


def test_a_damaged_compacted_block_is_a_miss_and_leaves(
    filled: tuple[DaemonProcess, ModelSpec, Bundle, list[Block]],
) -> None:
    daemon, spec, _, blocks = filled
    daemon.stop()
    damage_frame(daemon, blocks[2].block_hash)
    daemon.start()
    assert [found is not None for found in found_in(daemon, spec, blocks)] == [True, True, False]
    assert wait_until(lambda: daemon.status().store.n_blocks == 2)  # the writer drops it after the miss


def test_without_their_bundle_compacted_blocks_are_misses_and_with_it_again_hits(
    filled: tuple[DaemonProcess, ModelSpec, Bundle, list[Block]],
) -> None:
    daemon, spec, bundle, blocks = filled
    (file,) = (daemon.store / "bundles").glob("*.safetensors")
    daemon.stop()
    file.rename(daemon.directory / "kept")
    daemon.start()
    assert found_in(daemon, spec, blocks) == [None] * 3
    with daemon.client(spec) as client:
        hashes = [block.block_hash for block in blocks]
        assert client.match(hashes, floor=COMPACTED, accepts_compacted=True).hashes == ()
    problems = daemon.call("Check", pb.CheckRequest(frames=True)).problems
    assert len(problems) == 3
    assert all("profile 'x8' of bundle" in problem for problem in problems)
    install(daemon, bundle)
    assert all(found_in(daemon, spec, blocks))


def test_a_bundle_is_removed_with_the_compacted_blocks_that_need_it(
    filled: tuple[DaemonProcess, ModelSpec, Bundle, list[Block]],
) -> None:
    daemon, spec, bundle, blocks = filled
    answer = daemon.call("RemoveBundle", pb.RemoveBundleRequest(bundle_id=bundle.bundle_id, with_blocks=True))
    assert answer.n_deleted == 3
    assert found_in(daemon, spec, blocks) == [None] * 3
    assert daemon.status().store.n_blocks == 0


# ---- who waits for whom


def test_a_get_goes_before_blocks_that_wait_to_be_compacted(run_dir: Path) -> None:
    """With one worker; told by the order in which answers come, not by how long they take."""
    daemon = DaemonProcess(run_dir, "--workers", "1")
    daemon.start()
    spec, events = fresh_spec(block_size=1024, n_layers=8), []
    with daemon.client(spec) as client, Connection(daemon.target) as connection:
        client.match([])
        install(daemon, make_compacting(spec))
        held, *others = fresh(client, 12)
        assert stored_as(put(client, held, store_as="compacted-x8")) == "compacted-x8@4"

        def parts() -> Iterator[Any]:
            for block in others:
                header = header_of(client, block)
                header.store_as = "compacted-x8"
                yield header
                yield from data_of(block)

        def put_others() -> None:
            events.extend(stored_as(result) for result in connection.put(parts(), 120))

        putting = threading.Thread(target=put_others)
        putting.start()
        assert wait_until(lambda: daemon.status().pool.n_jobs >= len(others) - 2)
        (found,) = get(client, held)
        events.append("got" if found else "missed")
        putting.join(120)
    daemon.stop()
    assert events.count("compacted-x8@4") == len(others)
    assert "got" in events
    assert events.index("got") < len(others) // 2
