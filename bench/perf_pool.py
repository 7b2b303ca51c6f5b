"""The worker pool alone, one worker against two: blocks of a 7B model decoded, exact and coded. Prints JSON.

Jobs go through the lane of puts, which the extra thread for gets does not serve. Beside them the same work in one and
in two processes: what this machine gives at best, for whatever Python or memory take from it. BLAS has one thread.
"""

import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
from gemm_ratio import _coder_and_block, _tables
from perf_base import interleaved, ratio, spread

from kvcached import codec
from kvcached.block import BlockId
from kvcached.pool import Lane, WorkerPool

_BLOCK_ID = BlockId(bytes(32), "", bytes(32))
N_JOBS = 2  # in a round
_decode: dict[str, Callable[[], object]] = {}  # inherited by processes


def measure(rounds: int) -> dict[str, Any]:
    """`two_workers_over_one` of coded blocks, and what stands beside it."""
    _prepare()
    pools = {n: WorkerPool(n, 1 << 30) for n in (1, 2)}
    with _processes(1) as one, _processes(2) as two:
        functions: dict[str, Callable[[], object]] = {}
        for kind in _decode:
            for n, pool in pools.items():
                functions[f"{kind}, {n} workers"] = lambda kind=kind, pool=pool: _in_pool(pool, kind)
            for n, processes in ((1, one), (2, two)):
                functions[f"{kind}, {n} processes"] = lambda kind=kind, p=processes: list(p.map(_run, [kind] * N_JOBS))
        seconds = interleaved(functions, rounds)
    for pool in pools.values():
        pool.close()
    scaling = {
        f"{kind}_{of}": ratio(seconds[f"{kind}, 1 {of}"], seconds[f"{kind}, 2 {of}"])
        for kind in _decode
        for of in ("workers", "processes")
    }
    return {
        "two_workers_over_one": scaling["coded_workers"],
        "two_over_one": scaling,
        "seconds": {name: spread(each) for name, each in seconds.items()},
    }


def _prepare() -> None:
    rng = np.random.default_rng(0)
    coder, block = _coder_and_block(_tables(rng), rng)
    coded, exact = codec.encode(_BLOCK_ID, block, coder=coder), codec.encode(_BLOCK_ID, block)
    _decode["coded"] = lambda: codec.decode(_BLOCK_ID, coded, block.nbytes, coder)
    _decode["exact"] = lambda: codec.decode(_BLOCK_ID, exact, block.nbytes)
    for decode in _decode.values():
        decode()


def _run(kind: str) -> None:
    _decode[kind]()


def _in_pool(pool: WorkerPool, kind: str) -> None:
    for future in [pool.submit(Lane.PUT, _run, kind) for _ in range(N_JOBS)]:
        future.result()


def _processes(n: int) -> ProcessPoolExecutor:
    pool = ProcessPoolExecutor(n, mp_context=multiprocessing.get_context("fork"))
    list(pool.map(time.sleep, [0.2] * n))  # started
    return pool


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]))))
