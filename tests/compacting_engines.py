"""Tiny models whose prompts a daemon compacts, and what it then holds of them. Nothing here asserts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from bundles import install
from compacting import make_compacting
from mlx_models import build, prefill, save
from support import DaemonProcess

from kvcached_client import FidelityKind, ModelSpec
from kvcached_client._proto import kvcached_pb2 as pb
from kvcached_mlx import PromptStore, fresh_cache, model_spec

BLOCK, RECOMPUTE = 64, 48
TOKENS = [int(t) for t in np.random.default_rng(3).integers(0, 64, 7 * BLOCK + 3)]


def calibrated(architecture: str, directory: Path, daemon: DaemonProcess, **overrides: Any) -> tuple[Any, ModelSpec]:
    """A model of which the daemon knows how to compact what can be."""
    dtype = mx.float32 if architecture == "gpt_oss" else mx.float16  # mlx cannot compute it in half precision on CPUs
    model, config = build(architecture, dtype, overrides)
    spec = model_spec(model, save(model, config, directory), block_size=BLOCK)
    with daemon.client(spec) as client:
        client.match([])  # registers
    if spec.dense_layers:
        install(daemon, make_compacting(spec))
    return model, spec


def computed(model: Any, tokens: list[int]) -> list[Any]:
    cache = fresh_cache(model)
    prefill(model, cache, tokens)
    return cache


def offload(store: PromptStore, tokens: list[int], cache: list[Any]) -> int:
    """How many blocks the daemon was sent and took. Raises RuntimeError if there was one that it did not take."""
    before = store.counts.sent
    store.offload(tokens, cache)
    if not store.flush(timeout=60) or store.counts.refused:
        raise RuntimeError(f"not stored: {store.counts}")
    return store.counts.sent - before


def held(store: PromptStore, tokens: Sequence[int] = TOKENS) -> list[pb.HeldBlock]:
    hashes = store.client.chain(tokens)
    return list(store.client.match(hashes, floor=FidelityKind.COMPACTED, accepts_compacted=True).blocks)


def kinds(store: PromptStore, tokens: Sequence[int] = TOKENS) -> list[int]:
    return [block.fidelity.kind for block in held(store, tokens)]


def classes(cache: list[Any]) -> set[type]:
    return {type(entry) for entry in cache}
