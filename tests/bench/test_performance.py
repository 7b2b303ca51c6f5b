"""The performance bench: what it writes, what it fills stores with, and that its clients do what they are timed for."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import perf_match
import pytest
from perf_base import interleaved, percentiles, ratio, spread
from perf_client import SPEC, Load
from perf_clients import CLIENT, summary
from perf_shapes import SHAPES
from perf_soak import growth
from performance import KEYS, is_met, report
from support import DaemonProcess
from tables import RESULTS

from kvcached.block import BlockId
from kvcached.store import Store


@pytest.mark.parametrize("n_blocks", [1, 1000, 2500])
def test_a_filled_store_is_sound_and_trusted_and_its_chains_match(n_blocks: int, tmp_path: Path) -> None:
    chains = perf_match.fill(tmp_path / "store", n_blocks)
    assert (tmp_path / "store/clean.json").exists()
    store = Store(tmp_path / "store", quota_bytes=perf_match.QUOTA_BYTES)
    assert store.check() == []
    assert sum(totals.n_blocks for totals in store.totals().values()) == n_blocks
    assert sum(map(len, chains)) == n_blocks
    spec = perf_match.SPEC
    for chain in chains:
        ids = [BlockId(spec.model_id, "", block_hash) for block_hash in chain]
        assert len(store.chain(ids)) == len(chain)
    store.close()


def test_the_recorded_run_has_every_promised_key_first() -> None:
    found = json.loads((RESULTS / "performance.quick.json").read_text())
    assert tuple(found)[: len(KEYS)] == KEYS
    assert found["command"] == "make bench-performance QUICK=1"
    unknown = {key for key in KEYS if found[key] is None}
    assert unknown <= {"shm_over_inband", "shm_over_memcpy"}
    assert (
        sum(part["part_seconds"] for part in found.values() if isinstance(part, dict) and "part_seconds" in part) < 300
    )


def test_a_report_says_what_was_not_measured() -> None:
    found: dict[str, Any] = {"clients": {"fairness": 1.5, "p99_get_seconds": 0.1, "clients": {"1": {}}}}
    result = report(found, "a command", is_quick=True)
    assert tuple(result)[: len(KEYS)] == KEYS
    assert (result["fairness"], result["rss_growth"], result["command"]) == (1.5, None, "a command")
    assert result["clients"] == {"clients": {"1": {}}}


@pytest.mark.parametrize(
    ("key", "value", "met"),
    [
        ("fairness", 2.0, True),
        ("fairness", 2.1, False),
        ("two_workers_over_one", 1.8, True),
        ("two_workers_over_one", 1.7, False),
        ("shm_over_inband", None, None),
        ("p99_get_seconds", 1.0, None),
    ],
)
def test_a_ratio_is_met_at_its_bound(key: str, value: float | None, met: bool | None) -> None:
    assert is_met(key, value) is met


def test_functions_are_timed_in_turn_behind_a_round_that_warms() -> None:
    calls: list[str] = []
    found = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert calls == ["a", "b"] * 4
    assert [len(each) for each in found.values()] == [3, 3]


def test_figures_are_medians_quartiles_and_percentiles() -> None:
    values = [float(n) for n in range(1, 102)]
    assert spread(values) == {"median": 51, "q1": 26, "q3": 76, "n": 101}
    assert percentiles(values)["p99"] == 100
    assert ratio([4, 1, 100], [2, 2, 2]) == 2
    assert growth([100, 100, 100, 500, 110, 110, 110, 110]) == pytest.approx(0.1)


def test_a_turn_of_a_client_puts_matches_and_gets_and_a_missing_daemon_is_an_error(daemon: DaemonProcess) -> None:
    with daemon.client(SPEC) as client:
        load = Load(client, 1)
        for _ in range(3):
            load.turn()
        assert daemon.status().store.n_blocks == 3
        assert {name: len(each) for name, each in load.seconds.items()} == {"put": 3, "match": 3, "get": 3}
        assert load.errors == 0
        daemon.stop()
        load.turn()
        assert load.errors == 3
        daemon.start()


def test_a_client_in_a_process_of_its_own_reports_what_it_did(daemon: DaemonProcess) -> None:
    command = [sys.executable, str(CLIENT), daemon.target, "7", "0.2"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        found = json.loads(process.communicate("go\n")[0])
    assert found["errors"] == 0
    assert daemon.status().store.n_blocks == 1 + len(found["seconds"]["put"])


def test_the_most_served_client_is_held_against_the_median() -> None:
    reports = [{"errors": 0, "seconds": {"get": [0.1] * n}} for n in (2, 4, 8)]
    found = summary(reports, 2.0)
    assert (found["max_over_median"], found["median_over_min"], found["turns_a_second"]) == (2.0, 2.0, 7.0)


def test_blocks_have_the_bytes_of_their_models_and_prefill_is_multiplication() -> None:
    sizes = {
        shape.name: sum(2 * a * b * c * d for a, b, c, d in shape.spec.dense_shapes().values()) for shape in SHAPES
    }
    assert sizes == {"7B": 14_680_064, "8B": 33_554_432, "70B": 83_886_080}
    assert SHAPES[0].prefill_seconds(1000) == pytest.approx(1.52)
