"""While blocks are being compacted everybody else is served: told by the order of events, never by a clock."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from bundles import install
from compacting import fresh, fresh_spec, get, make_compacting, put, put_fresh, stored_as
from held_compaction import HoldingDaemon
from support import wait_until

from kvcached_client import Block, Client, FidelityKind
from kvcached_client._proto import kvcached_pb2 as pb

N_WORKERS = 2


@pytest.fixture
def daemon(run_dir: Path) -> Iterator[HoldingDaemon]:
    daemon = HoldingDaemon(run_dir, N_WORKERS)
    daemon.start()
    yield daemon
    daemon.stop()


@pytest.fixture
def client(daemon: HoldingDaemon) -> Iterator[Client]:
    with daemon.client(fresh_spec()) as client:
        client.match([])
        install(daemon, make_compacting(client.spec))
        yield client


@pytest.fixture
def held(daemon: HoldingDaemon, client: Client) -> list[Block]:
    """A compacted block and a coded one, which the daemon has."""
    daemon.let_go()
    compacted, coded = fresh(client), fresh(client)
    results = [put(client, compacted[0], store_as="compacted-x8"), put(client, coded[0], store_as="x8")]
    assert [stored_as(result) for result in results] == ["compacted-x8@4", "x8"]
    daemon.wait_for_compactions(1)
    daemon.hold()
    daemon.events.clear()
    return [*compacted, *coded]


def putting(daemon: HoldingDaemon, client: Client, n_blocks: int) -> threading.Thread:
    """Puts blocks that are to be compacted, in a thread; their answers are events."""

    def put_all() -> None:
        for result in client.put(fresh(client, n_blocks), store_as="compacted-x8"):
            daemon.events.append(stored_as(result))

    thread = threading.Thread(target=put_all)
    thread.start()
    return thread


def test_beside_a_compaction_others_match_get_and_put(daemon: HoldingDaemon, client: Client, held: list[Block]) -> None:
    thread = putting(daemon, client, 1)
    assert daemon.wait_for_compactions(1)
    for block in held:
        match = client.match([block.block_hash], floor=FidelityKind.COMPACTED, accepts_compacted=True)
        daemon.events.append(f"matched {len(match.blocks)}")
    daemon.events += ["missed" if found is None else "got" for found in get(client, *held)]
    daemon.events += [stored_as(put_fresh(client, store_as=name)) for name in ("x8", "exact")]
    daemon.let_go()
    thread.join(60)
    others = ["matched 1", "matched 1", "got", "got", "x8", "exact"]
    assert daemon.events == ["compacting", *others, "compacted", "compacted-x8@4"]


def test_where_all_workers_compact_gets_are_answered_and_puts_are_taken(
    daemon: HoldingDaemon, client: Client, held: list[Block]
) -> None:
    threads = [putting(daemon, client, 1) for _ in range(N_WORKERS)]
    assert daemon.wait_for_compactions(N_WORKERS)
    late = putting(daemon, client, 2)
    assert wait_until(lambda: daemon.status().pool.n_jobs == 2)
    daemon.events += ["missed" if found is None else "got" for found in get(client, *held)]
    report = daemon.call("Check", pb.CheckRequest(frames=True))
    daemon.events.append(f"checked {report.n_frames_decoded}")
    daemon.let_go()
    for thread in [*threads, late]:
        thread.join(60)
    assert daemon.events[:5] == ["compacting"] * N_WORKERS + ["got", "got", "checked 2"]
    assert daemon.events.count("compacted") == daemon.events.count("compacted-x8@4") == N_WORKERS + 2
