"""Engines that take no compacted blocks, in one namespace with those that do, and with a daemon that compacts."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import install
from compacting import configure, make_compacting
from mlx_models import build, prefill, save
from support import DaemonProcess

from kvcached_client import Client, FidelityKind, ModelSpec
from kvcached_mlx import Policy, PromptStore, fresh_cache, model_spec

BLOCK = 64
PROMPT = [int(t) for t in np.random.default_rng(5).integers(0, 64, 3 * BLOCK + 20)]
COMPACTED = FidelityKind.COMPACTED
Open = Callable[..., PromptStore]


@pytest.fixture
def llama(tmp_path: Path, daemon: DaemonProcess) -> tuple[Any, ModelSpec]:
    """A model with a bundle that compacts, and claims to have been measured."""
    model, config = build("llama")
    spec = model_spec(model, save(model, config, tmp_path), block_size=BLOCK)
    with daemon.client(spec) as client:
        client.match(client.chain(PROMPT))  # registers
    install(daemon, make_compacting(spec))
    return model, spec


@pytest.fixture
def opened(llama: tuple[Any, ModelSpec], daemon: DaemonProcess) -> Iterator[Open]:
    """Opens stores, each as another process would have it."""
    stores: list[PromptStore] = []

    def opened(**policy: Any) -> PromptStore:
        model, spec = llama
        stores.append(PromptStore(model, Client(spec, target=daemon.target), policy=Policy(recompute=8, **policy)))
        return stores[-1]

    yield opened
    for store in stores:
        store.close()


def offload(store: PromptStore, model: Any) -> int:
    cache = fresh_cache(model)
    prefill(model, cache, PROMPT)
    n_taken = store.offload(PROMPT, cache)
    assert store.flush(timeout=30)
    assert store.counts.refused == 0
    return n_taken


def test_an_engine_that_takes_no_compacted_blocks_puts_better_ones_in_their_place(
    llama: tuple[Any, ModelSpec], opened: Open
) -> None:
    model, _ = llama
    assert offload(opened(floor=COMPACTED, store_as="compacted-x8"), model) == 3
    assert opened(floor=COMPACTED).restore(PROMPT)[1] == 3 * BLOCK
    plain = opened()
    assert plain.restore(PROMPT)[1] == 0
    assert offload(plain, model) == 3
    assert opened().restore(PROMPT)[1] == 3 * BLOCK
    assert offload(plain, model) == 0


@pytest.mark.parametrize("name", ["compacted-x8", "compacted-x16"])
def test_what_an_engine_put_it_can_restore_whatever_the_daemon_makes_of_blocks(
    llama: tuple[Any, ModelSpec], opened: Open, name: str
) -> None:
    model, _ = llama
    configure(opened().client, fidelity=name)
    assert offload(opened(), model) == 3
    assert opened().restore(PROMPT)[1] == 3 * BLOCK
    assert offload(opened(), model) == 0


@pytest.mark.parametrize("am_ratio", [-1.0, 0.5, 8.01, float("nan"), float("inf")])
def test_a_policy_with_a_ratio_that_is_none_is_refused_when_it_is_made(am_ratio: float) -> None:
    with pytest.raises(ValueError, match="am_ratio must be a number from 1 to 8"):
        Policy(floor=COMPACTED, store_as="compacted-x8", am_ratio=am_ratio)


def test_a_policy_that_compacts_and_restores_only_better_blocks_is_without_compaction(opened: Open) -> None:
    assert opened(floor=FidelityKind.CODED, store_as="compacted-x8").policy.store_as == "x8"
