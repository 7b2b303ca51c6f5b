"""What coding a 7B-shaped block costs beyond its matrix products: whole frames against the bare products, on one core.

28 layers, 4 KV heads of 128, 256 tokens in bfloat16, from the middle of a text; 7 layers a group, so that each of the
8 planes is 256 x 3584. Coefficients are Laplacian with variances that fall as (i + 30)^-1.6, as in KVTC's reported
errors; one step for all, such that a frame is 16 times smaller than its block. Components below `KEPT_FROM` steps are
not kept: fewer are than reverse water-filling would keep (0.29 steps), which leaves smaller products to hide behind.

Each round times, in turn, the products of projection, encode, the products of reconstruction, decode. A ratio is the
median over rounds of what was timed side by side, so that other load on the machine weighs on both. A process of its
own does it, whose BLAS has one thread. `python bench/gemm_ratio.py --json FILE`.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from kvcached import codec
from kvcached.block import BlockId, Fingerprint, KVBlock, LayerSpec, ModelSpec, RopeSpec
from kvcached.codec import entropy, planes, quantize
from kvcached.codec.bundle import Bundle, Coder
from kvcached.codec.klt import Basis
from kvcached.codec.tables import Profile, Tables, storable
from kvcached_client.tensors import DTYPES

N_LAYERS, N_KV_HEADS, HEAD_DIM, N_TOKENS, LAYERS_PER_GROUP = 28, 4, 128, 256, 7
N_FEATURES, N_GROUPS = LAYERS_PER_GROUP * N_KV_HEADS * HEAD_DIM, N_LAYERS // LAYERS_PER_GROUP
FIRST_POSITION = 4096
TARGET, DEAD_ZONE, CENTROID, KEPT_FROM = 16.0, 0.33, 0.05, 0.4
DEVIATIONS = (np.arange(N_FEATURES) + 30.0) ** -0.8
N_ROUNDS = 9
ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS", "NUMBA_NUM_THREADS"), "1"
)

Rows = Float32[np.ndarray, "n_rows n_features"]


def measure() -> dict[str, Any]:
    """`decode_over_gemm`, `encode_over_gemm`, and what they were computed from; see `_measure`."""
    command = [sys.executable, __file__, "--json", "-"]
    done = subprocess.run(command, env={**os.environ, **ONE_THREAD}, stdout=subprocess.PIPE, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _measure() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    tables = _tables(rng)
    coder, block = _coder_and_block(tables, rng)
    block_id = BlockId(bytes(32), "", bytes(32))
    frame = codec.encode(block_id, block, coder=coder)
    split = planes.split(block, coder.spec, LAYERS_PER_GROUP)
    rows = (*split.keys, *split.values)
    bases = [plane.basis for plane in (*coder.keys, *coder.values)]
    n_kept = len(tables.steps)
    coefficients = np.empty((len(rows), N_TOKENS, n_kept), np.float32)
    back = np.empty((len(rows), N_TOKENS, N_FEATURES), np.float32)

    def project() -> None:
        for plane, basis, out in zip(rows, bases, coefficients, strict=True):
            np.matmul(plane, basis.forward, out=out)

    def reconstruct() -> None:
        for plane, basis, out in zip(coefficients, bases, back, strict=True):
            np.matmul(plane, basis.inverse, out=out)

    seconds = _rounds(
        {
            "project": project,
            "encode": lambda: codec.encode(block_id, block, coder=coder),
            "reconstruct": reconstruct,
            "decode": lambda: codec.decode(block_id, frame, block.nbytes, coder),
        }
    )
    return {
        "decode_over_gemm": float(np.median(seconds["decode"] / seconds["reconstruct"])),
        "encode_over_gemm": float(np.median(seconds["encode"] / seconds["project"])),
        **{f"{name}_ms": (1e3 * each).round(1).tolist() for name, each in seconds.items()},
        "n_kept": n_kept,
        "n_features": N_FEATURES,
        "compression": block.nbytes / len(frame),  # every byte counted
        "relative_error": _relative_error(codec.decode(block_id, frame, block.nbytes, coder), block),
    }


def _rounds(timed: dict[str, Callable[[], object]]) -> dict[str, np.ndarray]:
    """Seconds of each, in turn, after a round that only warms."""
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(1 + N_ROUNDS):
        for name, run in timed.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: np.array(each[1:]) for name, each in seconds.items()}


def _relative_error(decoded: KVBlock, block: KVBlock) -> float:
    """Of keys and values together, in the norm."""
    exact, back = (np.concatenate([b.keys, b.values]).astype(np.float32) for b in (block, decoded))
    return float(np.linalg.norm(back - exact) / np.linalg.norm(exact))


def _tables(rng: np.random.Generator) -> Tables:
    """The step that codes at the target, found on rows that are not those of the block; tables from yet others."""
    first, second = (np.asfortranarray(_coefficients(rng)) for _ in range(2))
    low, high = np.log(DEVIATIONS[-1]), np.log(DEVIATIONS[0])
    for _ in range(12):
        step = float(np.exp((low + high) / 2))
        steps = np.full(np.count_nonzero(DEVIATIONS / step >= KEPT_FROM), step, np.float32)
        calibrated, coded = (quantize.quantize(each[:, : len(steps)], steps, DEAD_ZONE) for each in (first, second))
        scales = entropy.choose_scale(calibrated)
        small = TARGET * len(entropy.encode(coded, scales)) <= 2 * N_TOKENS * N_FEATURES
        low, high = (low, np.log(step)) if small else (np.log(step), high)
    return Tables(steps, scales)


def _coder_and_block(tables: Tables, rng: np.random.Generator) -> tuple[Coder, KVBlock]:
    """All planes have one spectrum. Their bases are one basis with its features in another order: each has memory of
    its own, and only one decomposition is paid for."""
    directions = np.linalg.qr(rng.standard_normal((N_FEATURES, N_FEATURES), np.float32))[0]
    bases, features = [], []
    for _ in range(2 * N_GROUPS):
        own, mean = rng.permutation(directions), rng.standard_normal(N_FEATURES, np.float32) / 1000
        kept = np.ascontiguousarray(own[:, : len(tables.steps)])
        variances = np.square(DEVIATIONS[: len(tables.steps)]).astype(np.float32)
        bases.append(storable(Basis(mean, kept, np.ascontiguousarray(kept.T), variances)))
        features.append(_coefficients(rng) @ own.T + mean)
    layer = LayerSpec(n_kv_heads=N_KV_HEADS, key_dim=HEAD_DIM, value_dim=HEAD_DIM, rope=RopeSpec(HEAD_DIM, 1e6))
    spec = ModelSpec(Fingerprint(weights="synthetic"), "bfloat16", N_TOKENS, (layer,) * N_LAYERS)
    keys, values = tuple(bases[:N_GROUPS]), tuple(bases[N_GROUPS:])
    profile = Profile(TARGET, DEAD_ZONE, CENTROID, (tables,) * N_GROUPS, (tables,) * N_GROUPS)
    no_sinks = np.zeros((N_LAYERS, N_KV_HEADS, 0, HEAD_DIM), DTYPES["bfloat16"])
    whole = planes.Planes(
        tuple(features[:N_GROUPS]), tuple(features[N_GROUPS:]), no_sinks, no_sinks, first_position=FIRST_POSITION
    )
    block = planes.merge(whole, spec, {})
    return Bundle(spec, LAYERS_PER_GROUP, keys, values, {"x16": profile}).coder("x16"), block


def _coefficients(rng: np.random.Generator) -> Rows:
    deviations = (DEVIATIONS / np.sqrt(2)).astype(np.float32)
    return rng.laplace(size=(N_TOKENS, N_FEATURES)).astype(np.float32) * deviations


def main() -> None:
    """Prints or writes what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE", default="-", help="where to write; - prints")
    path = parser.parse_args().json
    # NumPy's BLAS reads how many threads it may use when it is loaded, so that this process must have been told.
    found = _measure() if os.environ.items() >= ONE_THREAD.items() else measure()
    text = json.dumps(found, indent=2) + "\n"
    if path == "-":
        print(text, end="")
    else:
        Path(path).write_text(text)


if __name__ == "__main__":
    main()
