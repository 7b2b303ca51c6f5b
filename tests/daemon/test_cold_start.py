"""Nothing compiled, nothing loaded, and everybody wants to code at once: each thing is made once."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from bundles import install, low_rank_chain, make_bundle
from support import ROOT_DIR, DaemonProcess, tiny_spec, wait_until

from kvcached.codec.bundle import PROFILES
from kvcached_client import FidelityKind

SPEC = tiny_spec(weights="cold", block_size=16)
N_CLIENTS = 32


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where compiled kernels will be; nothing is there."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "kernels"))
    return tmp_path / "kernels"


@pytest.fixture
def cold_daemon(kernels: Path, daemon: DaemonProcess) -> Iterator[DaemonProcess]:
    assert not list(kernels.rglob("*.nbc"))
    return daemon


def compiled(kernels: Path) -> list[str]:
    return sorted(path.name.split("-")[0].removeprefix("rans.") for path in kernels.rglob("rans.*.nbc"))


def test_32_threads_that_race_on_two_cold_bundles_and_cold_kernels_make_each_thing_once(
    kernels: Path, tmp_path: Path
) -> None:
    command = [sys.executable, str(ROOT_DIR / "tests/cold_start.py"), str(tmp_path / "bundles")]
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(kernels)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert (found["n_pipelines"], found["n_coders"], found["n_asked"]) == (2, 2, 2)
    assert [name for name in found["kernels"] if name in ("encode", "decode")] == ["decode", "encode"]
    assert found["worst_error"] < 2
    assert compiled(kernels) == ["decode", "encode"]


def test_32_clients_that_put_and_get_at_once_are_all_served_by_a_cold_daemon(
    cold_daemon: DaemonProcess, kernels: Path
) -> None:
    start = threading.Barrier(N_CLIENTS)
    with cold_daemon.client(SPEC) as client:
        client.match([])
    install(cold_daemon, make_bundle(SPEC, measured=list(PROFILES)))
    assert compiled(kernels) == []

    def work(n: int) -> tuple[list[str], int]:
        with cold_daemon.client(SPEC) as client:
            blocks = low_rank_chain(client, [n % 8, *range(31)])  # each by four clients
            start.wait(60)
            results = client.put(blocks)
            found = client.get([b.block_hash for b in blocks], floor=FidelityKind.CODED)
            return [r.fidelity.profile for r in results], sum(b is not None for b in found)

    with ThreadPoolExecutor(N_CLIENTS) as threads:
        assert list(threads.map(work, range(N_CLIENTS))) == [(["x8", "x8"], 2)] * N_CLIENTS
    assert compiled(kernels) == ["decode", "encode"]
    assert cold_daemon.status().counters['put_blocks_total{outcome="stored"}'] == 16


def test_a_daemon_with_a_bundle_warms_its_kernels_before_anybody_asks(
    cold_daemon: DaemonProcess, kernels: Path
) -> None:
    with cold_daemon.client(SPEC) as client:
        client.match([])
    cold_daemon.restart()
    assert compiled(kernels) == []
    install(cold_daemon, make_bundle(SPEC))
    cold_daemon.restart()
    assert wait_until(lambda: compiled(kernels) == ["decode", "encode"], timeout=60)


@pytest.mark.parametrize("module", ["kvcached.ctl", "kvcached_client", "kvcached.daemon"])
def test_what_does_not_code_does_not_import_the_compiler(module: str) -> None:
    program = f"import sys, {module}; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0
