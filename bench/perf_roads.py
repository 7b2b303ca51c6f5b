"""Both roads of a block to its client, through shared memory and in the stream, against copying its bytes.

raw: blocks that the daemon has decoded in memory, so that they cost it a copy and nothing but the road is timed; exact:
7B-shaped blocks of random numbers, decoded. The client takes views, and reads a byte of each page of them.
"""

from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from perf_base import Scale, checked, interleaved, ratio, running, spread
from perf_shapes import SHAPES, random_chain

from kvcached_client import Block, Client, Limits

SHAPE = SHAPES[0]  # 14.7 MB a block
N_RAW, N_EXACT = 16, 4
_PAGE = 4096
_DAEMON = Path(__file__).with_name("perf_raw_daemon.py")


def measure(scale: Scale, directory: Path) -> dict[str, Any]:
    """Ratios of speeds."""
    with running(directory / "raw", "--quota-bytes", "2GiB", program=[str(_DAEMON)]) as (target, _):
        seconds = _raw(target, scale.rounds)
    with running(directory / "exact", "--quota-bytes", "2GiB") as (target, _):
        seconds |= _exact(target, scale.rounds)
    return {
        "shm_over_inband": ratio(seconds["raw_inband"], seconds["raw_shm"]),
        "shm_over_memcpy": ratio(seconds["memcpy"], seconds["raw_shm"]),
        "inband_over_memcpy": ratio(seconds["memcpy"], seconds["raw_inband"]),
        "exact_decoded_shm_over_inband": ratio(seconds["exact_inband"], seconds["exact_shm"]),
        "raw_bytes": N_RAW * _block_bytes(),
        "seconds": {name: spread(each) for name, each in seconds.items()},
    }


def _block_bytes() -> int:
    shapes = SHAPE.spec.dense_shapes().values()
    return sum(2 * prod(shape) for shape in shapes)


def _roads(target: str) -> dict[str, Client]:
    shared = Client(SHAPE.spec, target=target)
    checked(shared._leases.wait(30.0) is not None, "no memory was lent")
    return {"inband": Client(SHAPE.spec, target=target, limits=Limits(segment_bytes=0)), "shm": shared}


def _raw(target: str, rounds: int) -> dict[str, list[float]]:
    roads = _roads(target)
    source = np.random.default_rng(0).integers(0, 256, N_RAW * _block_bytes(), np.uint8)
    copied = np.zeros_like(source)
    baseline = {"memcpy": lambda: np.copyto(copied, source)}
    return _timed("raw", roads, random_chain(roads["inband"], N_RAW), rounds, baseline)


def _exact(target: str, rounds: int) -> dict[str, list[float]]:
    roads = _roads(target)
    return _timed("exact", roads, random_chain(roads["inband"], N_EXACT), rounds, {})


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
