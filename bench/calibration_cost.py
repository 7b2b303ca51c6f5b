"""What it takes to calibrate a 7B-shaped model, reckoned from what one group of its layers takes here.

A model of 28 layers, 4 KV heads of 128 and 28 query heads is four groups of 7 layers. One group goes through the
daemon's own calibration on random rows of a decaying spectrum: seconds per token of fit text, seconds to fit four
profiles, bytes at the peak. The rest is multiplication; the model's own prefill is not in it.
"""

import argparse
import json
import os
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np

from kvcached.block import Fingerprint, KVBlock, LayerSpec, ModelSpec, RopeSpec
from kvcached.calibration import Calibration
from kvcached.codec.bundle import PROFILES
from kvcached_client.tensors import DTYPES

N_GROUPS, LAYERS, KV_HEADS, QUERY_HEADS, DIM = 4, 7, 4, 28, 128
FIT_TOKENS = 28_672  # of the 32,768 that `kvcachedctl calibrate` runs by default, the rest tunes
N_MEASURED, N_TUNE, TEXT = 8192, 4096, 2048
N_QUERIES = 512  # of a text of 2,048 tokens


def spec() -> ModelSpec:
    layer = LayerSpec(
        n_query_heads=QUERY_HEADS,
        n_kv_heads=KV_HEADS,
        key_dim=DIM,
        value_dim=DIM,
        softmax_scale=DIM**-0.5,
        rope=RopeSpec(DIM, 1e6),
    )
    return ModelSpec(Fingerprint(weights="7B-shaped"), "bfloat16", 256, (layer,) * LAYERS, "7B-shaped")


def texts(model: ModelSpec, n_tokens: int, seed: int) -> list[KVBlock]:
    """Rows of which each next direction varies less, as real ones do."""
    rng = np.random.default_rng(seed)
    decay = (np.arange(LAYERS * KV_HEADS * DIM) + 30.0) ** -0.8
    found = []
    for start in range(0, n_tokens, TEXT):
        tensors = {}
        for name, shape in model.dense_shapes().items():
            rows = (rng.standard_normal((TEXT, len(decay))) * decay * 20).astype(np.float32)
            rows = rows.reshape(TEXT, shape[0], shape[1], shape[3]).transpose(1, 2, 0, 3)
            tensors[name] = rows.astype(DTYPES[model.kv_dtype])
        found.append(KVBlock.dense(tensors, TEXT, start))
    return found


def measure() -> dict[str, Any]:
    model = spec()
    rng = np.random.default_rng(0)
    calibration = Calibration(model, LAYERS)
    heads = rng.standard_normal((LAYERS, KV_HEADS, DIM, DIM)).astype(np.float32)
    calibration.set_output_metric(heads @ heads.swapaxes(-1, -2))
    fit_texts, tune_texts = texts(model, N_MEASURED, 0), texts(model, N_TUNE, 1)
    before = _peak_bytes()
    start = time.perf_counter()
    for text in fit_texts:
        queries = rng.standard_normal((LAYERS, QUERY_HEADS, N_QUERIES, DIM)).astype(np.float32)
        positions = np.sort(rng.choice(np.arange(136, TEXT), N_QUERIES, replace=False)) + text.first_position
        calibration.add(text, "fit", queries, positions.astype(np.int32))
    added = time.perf_counter() - start
    for text in tune_texts:
        calibration.add(text, "tune")
    start = time.perf_counter()
    bundle = calibration.fit(PROFILES)
    fitted = time.perf_counter() - start
    return {
        "command": "make bench",
        "cpu_count": os.cpu_count(),
        "add_seconds_per_1000_tokens": 1000 * added / N_MEASURED,
        "fit_seconds": fitted,
        "peak_bytes": _peak_bytes() - before,
        "bundle_bytes": len(bundle.pack()),
        "n_groups": N_GROUPS,
        "fit_tokens": FIT_TOKENS,
        "total_seconds": N_GROUPS * (added / N_MEASURED * FIT_TOKENS + fitted),
        "total_peak_bytes": N_GROUPS * (_peak_bytes() - before),
    }


def _peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the results there")
    arguments = parser.parse_args()
    result = measure()
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
