"""When fetching pays: the rule against the times it stands for, and the speeds as they are measured and learnt."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_models import build, save
from support import DaemonProcess

from kvcached_client import Client
from kvcached_mlx import fresh_cache, model_spec
from kvcached_mlx.breakeven import BreakEven, measure

SLOW_PREFILL = BreakEven(prefill=1_000, restore=10_000)
FAST_PREFILL = BreakEven(prefill=10_000, restore=1_000)
WHERE = "a prefix is fetched where"


def test_what_gains_more_than_the_fetch_costs_is_fetched() -> None:
    assert SLOW_PREFILL.min_gain == 0.1
    assert SLOW_PREFILL.pays(0, 256)
    assert SLOW_PREFILL.pays(899, 1_000)
    assert not SLOW_PREFILL.pays(900, 1_000)  # computing 100 tokens takes as long as fetching 1,000


def test_where_computing_is_faster_nothing_is_fetched() -> None:
    assert not FAST_PREFILL.pays(0, 100_000)
    assert not BreakEven(prefill=1_000, restore=1_000).pays(0, 256)


@pytest.mark.parametrize("unmeasured", [BreakEven(), BreakEven(prefill=500), BreakEven(restore=500)], ids=str)
def test_without_both_speeds_every_gain_is_taken(unmeasured: BreakEven) -> None:
    assert unmeasured.pays(255, 256)
    assert not unmeasured.pays(256, 256)


@pytest.mark.parametrize("rule", [BreakEven(), SLOW_PREFILL, FAST_PREFILL], ids=str)
def test_what_is_at_hand_is_never_fetched(rule: BreakEven) -> None:
    assert not rule.pays(512, 512)
    assert not rule.pays(600, 512)
    assert not rule.pays(0, 0)


@given(st.integers(1, 10**5), st.integers(1, 10**5), st.integers(0, 10**6), st.integers(0, 10**6))
def test_the_rule_is_that_the_fetch_takes_less_time_than_computing_would(
    prefill: int, restore: int, n_local: int, n_held: int
) -> None:
    to_compute, to_fetch = (n_held - n_local) * restore, n_held * prefill  # seconds, times both speeds
    if abs(to_compute - to_fetch) > 1e-9 * to_fetch:  # where they are the same, rounding may decide
        assert BreakEven(prefill, restore).pays(n_local, n_held) == (0 <= to_fetch < to_compute)


def test_nobody_waits_longer_for_a_fetch_than_computing_would_take() -> None:
    assert SLOW_PREFILL.patience(1_000, 5_000) == 4.0
    assert SLOW_PREFILL.patience(0, 16) == 0.25  # as long as a daemon may take for anything
    assert BreakEven(restore=500).patience(0, 512) is None


def test_a_first_restore_is_believed_and_later_ones_are_averaged_in() -> None:
    rule = BreakEven(prefill=100)
    rule.restored(1_000, 2.0)
    assert rule.restore == 500
    rule.restored(1_500, 1.0)
    assert rule.restore == 1_000
    rule.restored(1_000, 0.0)  # a clock that did not move
    assert rule.restore > 1_000


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (BreakEven(), "prefill not measured, restore not measured yet: what the daemon holds is fetched"),
        (BreakEven(prefill=240), "prefill 240 tokens/s, restore not measured yet: what the daemon holds is fetched"),
        (
            SLOW_PREFILL,
            f"prefill 1,000 tokens/s, restore 10,000 tokens/s: {WHERE} more than 10.0% of it is not at hand",
        ),
        (FAST_PREFILL, "prefill 10,000 tokens/s, restore 1,000 tokens/s: computing is faster, nothing is fetched"),
        (
            BreakEven(restore=1_000),
            f"prefill not measured, restore 1,000 tokens/s: {WHERE} more than 0.0% of it is not at hand",
        ),
    ],
    ids=["nothing", "no restore", "slow prefill", "fast prefill", "no prefill"],
)
def test_the_rule_is_said_in_words(rule: BreakEven, text: str) -> None:
    assert str(rule) == text


def test_both_speeds_are_measured_and_nothing_is_left_behind(daemon: DaemonProcess, tmp_path: Path) -> None:
    model, config = build("llama")
    spec = model_spec(model, save(model, config, tmp_path), block_size=16)
    with daemon.client(spec, namespace="probe") as probe:
        rule = measure(model, lambda: fresh_cache(model), probe)
    assert rule.prefill > 0 < rule.restore
    status = daemon.status()
    assert status.counters['block_hits_total{fidelity="EXACT"}'] == 2
    assert status.store.n_blocks == 0


@pytest.mark.parametrize("architecture", ["mamba2", "gemma3_text"])
def test_models_that_keep_state_are_measured_too(architecture: str, daemon: DaemonProcess, tmp_path: Path) -> None:
    model, config = build(architecture)
    spec = model_spec(model, save(model, config, tmp_path), block_size=16)
    with daemon.client(spec) as probe:
        assert measure(model, lambda: fresh_cache(model), probe).restore > 0


def test_without_a_daemon_only_prefill_is_measured(run_dir: Path, tmp_path: Path) -> None:
    model: Any
    model, config = build("llama")
    spec = model_spec(model, save(model, config, tmp_path), block_size=16)
    with Client(spec, target=f"unix:{run_dir}/nobody.sock") as probe:
        rule = measure(model, lambda: fresh_cache(model), probe)
    assert rule.prefill > 0 == rule.restore


@given(st.integers(0, 10**5), st.integers(0, 10**5), st.integers(0, 10**6), st.integers(0, 10**6))
def test_the_least_that_pays_is_where_it_begins_to_pay(prefill: int, restore: int, n_local: int, n_held: int) -> None:
    rule = BreakEven(prefill, restore)
    assert rule.pays(n_local, n_held) == (n_held > rule.least(n_local))
