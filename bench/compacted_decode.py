"""How fast the reference model decodes behind a compacted prefix, beside a plain one, and what both hold.

A prefix of six blocks; of the compacted one each head keeps another share of the tokens, a quarter of all together.
Which tokens those are changes no speed: they are drawn at random, without a fit. Rounds alternate, the fastest counts.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm import load

from kvcached_mlx import attention, fresh_cache
from kvcached_mlx.compacted import CompactedKVCache, Head

MODEL = Path(__file__).resolve().parent.parent / "tests/data/model/qwen3-5m"
RESULT = Path(__file__).with_name("results") / "compacted_decode.json"
N_PREFIX, N_DECODED, N_ROUNDS, RATIO = 1536, 48, 5, 4


def prefilled(model: Any) -> list[Any]:
    cache = fresh_cache(model)
    tokens = np.random.default_rng(0).integers(2, 2048, N_PREFIX).tolist()
    for start in range(0, N_PREFIX, 256):
        mx.eval(model(mx.array([tokens[start : start + 256]]), cache=cache))
    return cache


def compacted(plain: list[Any]) -> tuple[list[Any], float]:
    """A quarter of the rows of a plain cache, in shares that differ by a factor of up to about ten; that ratio."""
    rng = np.random.default_rng(1)
    n_heads = plain[0].keys.shape[1]
    share = rng.lognormal(sigma=0.7, size=(len(plain), n_heads))
    lengths = np.clip(share / share.sum() * len(plain) * n_heads * N_PREFIX / RATIO, 64, N_PREFIX).astype(int)
    made = []
    for entry, of_heads in zip(plain, lengths, strict=True):
        heads = []
        for head, n in enumerate(of_heads):
            kept = mx.array(np.sort(rng.permutation(N_PREFIX)[:n]))
            heads.append(Head(entry.keys[0, head][kept], entry.values[0, head][kept], mx.zeros(int(n))))
        made.append(CompactedKVCache(heads, N_PREFIX))
    mx.eval([entry.state for entry in made])
    return made, float(lengths.size * N_PREFIX / lengths.sum())


def seconds(model: Any, cache: list[Any]) -> float:
    """Of decoding N_DECODED tokens, which are cut off again."""
    start = time.perf_counter()
    token = mx.array([[7]])
    for _ in range(N_DECODED):
        token = mx.argmax(model(token, cache=cache)[:, -1:], axis=-1)
        mx.eval(token)
    taken = time.perf_counter() - start
    for entry in cache:
        entry.trim(N_DECODED)
    return taken


def measure() -> dict[str, Any]:
    model, _ = load(str(MODEL))
    attention.install(model)
    plain = prefilled(model)
    small, rows_ratio = compacted(plain)
    nbytes = [sum(entry.nbytes for entry in cache) for cache in (plain, small)]
    fastest = [float("inf")] * 2
    for _ in range(N_ROUNDS):
        for i, cache in enumerate((plain, small)):
            fastest[i] = min(fastest[i], seconds(model, cache))
    speeds = [N_DECODED / taken for taken in fastest]
    return {
        "plain_tokens_per_second": round(speeds[0], 1),
        "compacted_tokens_per_second": round(speeds[1], 1),
        "ratio": round(speeds[1] / speeds[0], 3),
        "nbytes_ratio": round(nbytes[0] / nbytes[1], 3),
        "rows_ratio": round(rows_ratio, 3),
        "calls_per_layer": [entry.n_groups for entry in small],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=RESULT)
    path = parser.parse_args().json
    found = {"command": "python bench/compacted_decode.py", **measure()}
    path.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
