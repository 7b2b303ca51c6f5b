"""32 threads race to code blocks of two models with nothing compiled: run with an empty NUMBA_CACHE_DIR, a directory.

Prints as JSON how many pipelines and coders there were, how often bundles were read, and which kernels were compiled.
"""

import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from bundles import low_rank_tensors, make_bundle
from numba.core import event
from support import tiny_spec

from kvcached.block import BlockId, Fidelity, FidelityKind, KVBlock, ModelSpec
from kvcached.bundles import Bundles
from kvcached.pool import Pipeline, WorkerPool

N_THREADS = 32
SPECS = [tiny_spec(weights=weights, block_size=16) for weights in ("one", "other")]


def main(directory: Path) -> None:
    made = [make_bundle(spec) for spec in SPECS]
    for bundle in made:
        Bundles(directory).install(bundle)
    cold = Bundles(directory)
    pool, start, asked = WorkerPool(1, 1), threading.Barrier(N_THREADS), []

    def build(spec: ModelSpec) -> Pipeline:
        return Pipeline(spec, lambda bundle_id: asked.append(bundle_id) or cold.get(bundle_id))

    def work(n: int) -> tuple[int, int, float]:
        spec, fidelity = SPECS[n % 2], Fidelity(FidelityKind.CODED, "x8", bundle_id=made[n % 2].bundle_id)
        block_id = BlockId(spec.model_id, "", bytes(32))
        block = KVBlock.dense(low_rank_tensors(spec, n), spec.block_size, spec.block_size)
        start.wait(60)
        pipeline = pool.pipeline(spec, build)
        coder = pipeline.coder(fidelity.bundle_id, fidelity.profile)
        frame = pipeline.encode(block_id, block, FidelityKind.EXACT, 1, coder)
        again = pipeline.decode(block_id, frame, block.nbytes, fidelity)
        return id(pipeline), id(coder), float(np.abs(again.keys.astype(float) - block.keys.astype(float)).max())

    with event.install_recorder("numba:compile") as compiled, ThreadPoolExecutor(N_THREADS) as threads:
        pipelines, coders, errors = zip(*threads.map(work, range(N_THREADS)), strict=True)
    pool.close()
    kernels = [e.data["dispatcher"].py_func.__name__ for _, e in compiled.buffer if e.is_start]
    counts = {"n_pipelines": len(set(pipelines)), "n_coders": len(set(coders)), "n_asked": len(asked)}
    print(json.dumps({**counts, "kernels": sorted(kernels), "worst_error": max(errors)}))


main(Path(sys.argv[1]))
