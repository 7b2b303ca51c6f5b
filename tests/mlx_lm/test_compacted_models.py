"""Which models' blocks a daemon compacts, and which it keeps at a better fidelity, whoever asks for what."""

import logging
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from compacting_engines import BLOCK, RECOMPUTE, TOKENS, calibrated, classes, computed, kinds, offload
from support import DaemonProcess

from kvcached_client import FidelityKind
from kvcached_client._proto import kvcached_pb2 as pb
from kvcached_mlx import Policy, PromptStore, fresh_cache
from kvcached_mlx.compacted import CompactedKVCache

EXACT, CODED, COMPACTED = FidelityKind.EXACT, FidelityKind.CODED, FidelityKind.COMPACTED
PLAMO2 = {"mamba_num_heads": 4, "mamba_d_state": 8, "hidden_size_per_head": 16, "num_hidden_layers": 2}
REFUSED = [
    ("gpt_oss", {}, CODED, "learned sinks"),
    ("plamo2", PLAMO2, CODED, "does not go through mlx-lm's function"),  # it calls mlx's own
    ("deepseek_v3", {}, EXACT, "no layer keeps plain keys and values"),
    ("mamba2", {}, EXACT, "no layer keeps plain keys and values"),
]


@pytest.mark.parametrize(("architecture", "overrides", "kind", "reason"), REFUSED, ids=[case[0] for case in REFUSED])
def test_a_model_that_cannot_go_on_from_compacted_blocks_has_none_whoever_asks_for_them(
    architecture: str,
    overrides: dict[str, Any],
    kind: FidelityKind,
    reason: str,
    tmp_path: Path,
    shared_daemon: DaemonProcess,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, spec = calibrated(architecture, tmp_path, shared_daemon, **overrides)
    tokens = TOKENS[: 5 * BLOCK]
    shared_daemon.call("SetConfig", pb.SetConfigRequest(values={"namespace_fidelity": "settings=compacted-x8"}))
    for namespace, store_as in (("settings", ""), ("put", "compacted-x16")):
        caplog.clear()
        client = shared_daemon.client(spec, namespace)
        with caplog.at_level(logging.WARNING):
            store = PromptStore(model, client, policy=Policy(floor=COMPACTED, store_as=store_as))
        (record,) = (record for record in caplog.records if record.name == "kvcached_mlx.store")
        assert "nothing is compacted, and nothing compacted is restored: " in record.message
        assert reason in record.message
        assert store.policy == Policy(floor=CODED, store_as=store_as.removeprefix("compacted-"))
        offload(store, tokens, computed(model, tokens))
        assert set(kinds(store, tokens)) == {kind}
        cache, n_restored = store.restore(TOKENS)
        assert (n_restored, classes(cache)) == (5 * BLOCK, classes(fresh_cache(model)))
        store.close()


def test_beside_layers_with_windows_plain_layers_are_compacted_and_windows_are_not(
    tmp_path: Path, shared_daemon: DaemonProcess
) -> None:
    model, spec = calibrated("gemma3_text", tmp_path, shared_daemon)
    tokens = TOKENS[: 5 * BLOCK]
    client = shared_daemon.client(spec)
    store = PromptStore(model, client, policy=Policy(floor=COMPACTED, recompute=RECOMPUTE, store_as="compacted-x8"))
    exact = computed(model, tokens)
    offload(store, tokens, exact)
    assert kinds(store, tokens) == [COMPACTED] * 5
    cache, n_restored = store.restore(TOKENS)
    assert n_restored == 5 * BLOCK
    for restored, plain, layer in zip(cache, exact, spec.layers, strict=True):
        assert type(restored) is (type(plain) if layer.opaque else CompactedKVCache)
        if layer.opaque:
            assert all(mx.array_equal(a, b) for a, b in zip(restored.state, plain.state, strict=True))
    store.close()
