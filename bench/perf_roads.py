"""Both roads of a block to its client, through shared memory and in the stream, against copying its bytes.

raw: bytes that no coder makes smaller, so that nothing but the road is timed; exact: a 7B-shaped block, decoded. The
client takes views, and reads a byte of each page of them.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from perf_base import Scale, checked, interleaved, ratio, running, spread
from perf_shapes import SHAPES, random_chain

from kvcached_client import ROOT, Block, Client, Fingerprint, LayerSpec, Limits, ModelSpec

RAW_BYTES, N_RAW = 14_700_000, 4
_PAGE = 4096
RAW_SPEC = ModelSpec(Fingerprint(weights="raw"), "float16", 16, (LayerSpec(n_kv_heads=1, key_dim=8, value_dim=8),))


def has_shared_memory() -> bool:
    return "segment_bytes" in Limits.__dataclass_fields__


def measure(scale: Scale, directory: Path) -> dict[str, Any]:
    """Ratios of speeds; those of the shared-memory road are None where there is none."""
    with running(directory, "--quota-bytes", "2GiB") as (target, _):
        seconds = _raw(target, scale.rounds) | _exact(target, scale.rounds)
    shared = has_shared_memory()
    return {
        "shm_over_inband": ratio(seconds["raw_inband"], seconds["raw_shm"]) if shared else None,
        "shm_over_memcpy": ratio(seconds["memcpy"], seconds["raw_shm"]) if shared else None,
        "inband_over_memcpy": ratio(seconds["memcpy"], seconds["raw_inband"]),
        "exact_decoded_shm_over_inband": ratio(seconds["exact_inband"], seconds["exact_shm"]) if shared else None,
        "raw_bytes": N_RAW * RAW_BYTES,
        "seconds": {name: spread(each) for name, each in seconds.items()},
    }


def _roads(spec: ModelSpec, target: str) -> dict[str, Client]:
    inband = Limits(**({"segment_bytes": 0} if has_shared_memory() else {}))
    roads = {"inband": Client(spec, target=target, limits=inband)}
    return roads | ({"shm": Client(spec, target=target)} if has_shared_memory() else {})


def _raw(target: str, rounds: int) -> dict[str, list[float]]:
    roads = _roads(RAW_SPEC, target)
    rng = np.random.default_rng(0)
    chain = _raw_chain(roads["inband"], rng)
    source = rng.integers(0, 256, N_RAW * RAW_BYTES, np.uint8)
    copied = np.zeros_like(source)
    baseline = {"memcpy": lambda: np.copyto(copied, source)}
    return _timed("raw", roads, chain, rounds, baseline)


def _exact(target: str, rounds: int) -> dict[str, list[float]]:
    roads = _roads(SHAPES[0].spec, target)
    return _timed("exact", roads, random_chain(roads["inband"], N_RAW), rounds, {})


def _timed(
    what: str, roads: dict[str, Client], chain: list[Block], rounds: int, also: dict[str, Callable[[], object]]
) -> dict[str, list[float]]:
    stored = roads["inband"].put(chain, store_as="exact")
    checked(all(result.code == "OK" for result in stored), "a put failed")
    hashes = [block.block_hash for block in chain]
    gets = {f"{what}_{name}": lambda client=client: _get(client, hashes) for name, client in roads.items()}
    seconds = interleaved(also | gets, rounds, f"{what} blocks by all roads")
    for client in roads.values():
        client.close()
    return seconds


def _get(client: Client, hashes: Sequence[bytes]) -> int:
    total = 0
    for block in client.get(hashes):
        checked(block is not None, "a get missed")
        assert block
        total += sum(int(array.view(np.uint8).reshape(-1)[::_PAGE].sum()) for array in block.tensors.values())
        del block
    return total


def _raw_chain(client: Client, rng: np.random.Generator) -> list[Block]:
    parent, chain, size = ROOT, [], client.spec.block_size
    tokens = list(range(N_RAW * size))
    for index, block_hash in enumerate(client.chain(tokens)):
        tensors = {name: np.zeros(shape, np.float16) for name, shape in client.spec.dense_shapes().items()}
        tensors["raw"] = rng.integers(0, 256, RAW_BYTES, np.uint8)
        own = tokens[index * size : (index + 1) * size]
        chain.append(Block(block_hash, parent, index, own, tensors, index * size))
        parent = block_hash
    return chain
