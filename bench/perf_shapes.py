"""Blocks as models of 7, 8 and 70 billion parameters have them, and how long those would take to compute them.

What is restored is measured; prefill of such models is reckoned, not measured: 2 x parameters x tokens, at an assumed
10 TFLOP/s, the upper end of what is assumed for Apple's GPUs, so that prefill looks as good as it can.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from perf_base import Scale, checked, interleaved, running, spread

from kvcached_client import ROOT, Block, Client, Fingerprint, LayerSpec, ModelSpec, RopeSpec
from kvcached_client.tensors import DTYPES

PREFILL_FLOPS = 10e12  # a second, assumed
PREFILL_SOURCE = "assumed: 10 TFLOP/s, the upper end for Apple GPUs in the design's notes on papers; not measured here"
N_TOKENS, BLOCK_TOKENS = 1536, 256


@dataclass(frozen=True, slots=True)
class Shape:
    """A model by what counts here."""

    name: str
    parameters: float
    n_layers: int
    n_kv_heads: int
    n_blocks: int  # put and restored in a round

    @property
    def spec(self) -> ModelSpec:
        layer = LayerSpec(n_kv_heads=self.n_kv_heads, key_dim=128, value_dim=128, rope=RopeSpec(128, 1e6))
        return ModelSpec(Fingerprint(weights=self.name), "bfloat16", BLOCK_TOKENS, (layer,) * self.n_layers, self.name)

    def prefill_seconds(self, n_tokens: int) -> float:
        return 2 * self.parameters * n_tokens / PREFILL_FLOPS


SHAPES = (Shape("7B", 7.6e9, 28, 4, 4), Shape("8B", 8.0e9, 32, 8, 2), Shape("70B", 70.6e9, 80, 8, 1))


def random_chain(client: Client, n_blocks: int, seed: int = 0) -> list[Block]:
    """Consecutive blocks of numbers at random, of the model of a client."""
    rng, parent, chain = np.random.default_rng(seed), ROOT, []
    size = client.spec.block_size
    token_ids = [seed, *range(n_blocks * size - 1)]
    for index, block_hash in enumerate(client.chain(token_ids)):
        tensors = {
            name: rng.standard_normal(shape, np.float32).astype(DTYPES[client.spec.kv_dtype])
            for name, shape in client.spec.dense_shapes().items()
        }
        own = token_ids[index * size : (index + 1) * size]
        chain.append(Block(block_hash, parent, index, own, tensors, index * size))
        parent = block_hash
    return chain


def measure(scale: Scale, directory: Path) -> dict[str, Any]:
    """By shape: seconds to restore 1,536 tokens, exactly, and to compute them."""
    with running(directory, "--quota-bytes", "4GiB", "--queue-bytes", "1GiB") as (target, _):
        return {"prefill": PREFILL_SOURCE, "tokens": N_TOKENS} | {
            shape.name: _measure(shape, target, scale.rounds) for shape in SHAPES
        }


def _measure(shape: Shape, target: str, rounds: int) -> dict[str, Any]:
    with Client(shape.spec, target=target) as client:
        chain = random_chain(client, shape.n_blocks)
        hashes = [block.block_hash for block in chain]
        _put(client, chain)
        restored = interleaved({"get": lambda: _get(client, hashes)}, min(rounds, 7), f"{shape.name}-shaped blocks")
    n_bytes = sum(array.nbytes for array in chain[0].tensors.values())
    seconds = [N_TOKENS / BLOCK_TOKENS * each / shape.n_blocks for each in restored["get"]]
    prefill = shape.prefill_seconds(N_TOKENS)
    return {
        "block_bytes": n_bytes,
        "mb_a_second": N_TOKENS / BLOCK_TOKENS * n_bytes / 1e6 / float(np.median(seconds)),
        "restore_seconds": spread(seconds),
        "prefill_seconds": prefill,
        "prefill_over_restore": prefill / float(np.median(seconds)),
    }


def _put(client: Client, chain: list[Block]) -> None:
    checked(all(result.code == "OK" for result in client.put(chain)), "a put failed")


def _get(client: Client, hashes: list[bytes]) -> None:
    checked(all(block is not None for block in client.get(hashes)), "a get missed")
