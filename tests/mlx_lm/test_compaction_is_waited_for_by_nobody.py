"""An engine whose blocks are being compacted goes on: told by the order of events, never by a clock."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from compacting_engines import BLOCK, RECOMPUTE, TOKENS, calibrated, computed, kinds, offload
from held_compaction import HoldingDaemon
from mlx_models import prefill

from kvcached_client import FidelityKind
from kvcached_mlx import Policy, PromptStore

COMPACTED = FidelityKind.COMPACTED
PROMPT = TOKENS[: 5 * BLOCK + 3]


@pytest.fixture
def holding(run_dir: Path) -> Iterator[HoldingDaemon]:
    """With a single worker."""
    daemon = HoldingDaemon(run_dir, n_workers=1)
    daemon.start()
    yield daemon
    daemon.stop()


def test_an_engine_generates_restores_and_offloads_while_its_blocks_are_being_compacted(
    holding: HoldingDaemon, tmp_path: Path
) -> None:
    """Told by the order of events: nothing that the engine does waits for the compaction that is held."""
    daemon = holding
    model, spec = calibrated("llama", tmp_path, daemon)
    client = daemon.client(spec)
    store = PromptStore(model, client, policy=Policy(floor=COMPACTED, recompute=RECOMPUTE, store_as="compacted-x8"))
    others = TOKENS[BLOCK:]  # another conversation, held already
    daemon.let_go()
    offload(store, others, computed(model, others))
    assert daemon.wait_for_compactions(6)
    daemon.hold()
    daemon.events.clear()
    cache = computed(model, PROMPT)
    assert store.offload(PROMPT, cache) == 5
    assert daemon.wait_for_compactions(1)
    prefill(model, cache, TOKENS[len(PROMPT) :])
    daemon.events.append("generated")
    assert store.restore(others)[1] == 5 * BLOCK
    daemon.events.append("restored")
    assert store.offload(TOKENS, cache) == 7  # of which it asks the daemon later
    daemon.events.append("offloaded")
    assert store.counts.sent == 6
    daemon.let_go()
    assert store.flush(timeout=60)
    assert daemon.events[:4] == ["compacting", "generated", "restored", "offloaded"]
    assert daemon.events.count("compacted") == 7
    assert kinds(store) == [COMPACTED] * 7
    store.close()
