"""kill -9 at random moments under load: what was acknowledged is there, bit for bit, and the store is sound."""

import random
import threading
import time
from pathlib import Path

import pytest
from support import DaemonProcess, chain, same_tensors, tiny_spec

from kvcached_client import Block
from kvcached_client._proto import kvcached_pb2 as pb

SPEC = tiny_spec(n_layers=4, block_size=16)
N_ROUNDS, N_CLIENTS = 20, 3


class Load:
    """Clients that put, match and get until told to stop, and remember what was acknowledged."""

    def __init__(self, daemon: DaemonProcess, acknowledged: dict[bytes, Block], seed: int, ballast: int = 0) -> None:
        self._daemon, self._acknowledged, self._ballast = daemon, acknowledged, ballast
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._work, args=(seed + i,)) for i in range(N_CLIENTS)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=60)
            assert not thread.is_alive()

    def _work(self, seed: int) -> None:
        rng = random.Random(seed)
        with self._daemon.client(SPEC) as client:
            while not self._stop.is_set():
                tokens = [rng.randrange(1000) for _ in range(SPEC.block_size * rng.randrange(1, 9))]
                blocks = chain(client, tokens, seed=rng.randrange(1 << 30), ballast=self._ballast)
                for block, result in zip(blocks, client.put(blocks), strict=True):
                    if result.code == "OK":
                        self._acknowledged[block.block_hash] = block
                if rng.random() < 0.3:
                    hashes = client.match([block.block_hash for block in blocks]).hashes
                    list(client.get(hashes))


@pytest.mark.slow
def test_no_acknowledged_block_is_lost_or_wrong_in_20_rounds_of_kill_9(run_dir: Path) -> None:
    daemon = DaemonProcess(run_dir, quota="1GiB")
    acknowledged: dict[bytes, Block] = {}
    rng = random.Random(0)
    daemon.start()
    for round_ in range(N_ROUNDS):
        n_before = len(acknowledged)
        load = Load(daemon, acknowledged, seed=100 * round_)
        while len(acknowledged) == n_before:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5))
        assert kill_and_check(daemon, load) >= len(acknowledged)
        assert lost_or_wrong(daemon, acknowledged) == []
    daemon.stop()


@pytest.mark.slow
def test_what_is_left_after_kill_9_amid_evictions_is_sound_and_right(run_dir: Path) -> None:
    """Blocks of several chunks under a quota that they exceed many times: every commit evicts."""
    daemon = DaemonProcess(run_dir, quota="8MiB")
    rng = random.Random(1)
    daemon.start()
    for round_ in range(N_ROUNDS // 2):
        acknowledged: dict[bytes, Block] = {}
        load = Load(daemon, acknowledged, seed=100 * round_, ballast=300_000)
        while daemon.status().counters['evicted_blocks_total{reason="quota"}'] == 0:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5))
        kill_and_check(daemon, load)
        with daemon.client(SPEC) as client:
            found = dict(zip(acknowledged, client.get(list(acknowledged)), strict=True))
        held = [hash_ for hash_, again in found.items() if again is not None]
        assert held
        assert all(same_tensors(dict(acknowledged[h].tensors), dict(found[h].tensors)) for h in held)
    daemon.stop()


def kill_and_check(daemon: DaemonProcess, load: Load) -> int:
    """Kills a daemon under load, and starts it on a store that must be sound; how many frames it then decoded."""
    daemon.kill()
    load.stop()
    daemon.start()
    report = daemon.call("Check", pb.CheckRequest(frames=True), timeout=60)
    assert list(report.problems) == []
    assert list(daemon.status().store.set_aside) == []
    n_decoded: int = report.n_frames_decoded
    return n_decoded


def lost_or_wrong(daemon: DaemonProcess, acknowledged: dict[bytes, Block]) -> list[str]:
    with daemon.client(SPEC) as client:
        found = client.get(list(acknowledged))
        return [
            block.block_hash.hex()
            for block, again in zip(acknowledged.values(), found, strict=True)
            if again is None or not same_tensors(dict(block.tensors), dict(again.tensors))
        ]
