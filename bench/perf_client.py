"""One of many clients of a daemon: puts, matches and gets for a while, in a process of its own. Prints JSON.

    perf_client.py TARGET NUMBER SECONDS

Says "ready" when it is, and begins at a line on its standard input. In each turn it puts a block that nobody has, asks
for one that it put before, and gets it.
"""

import json
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from kvcached_client import ROOT, Block, Client, Fingerprint, LayerSpec, ModelSpec

SPEC = ModelSpec(
    Fingerprint(weights="clients"), "float16", 64, (LayerSpec(n_kv_heads=2, key_dim=64, value_dim=64),) * 6
)
_REMEMBERED = 50  # blocks that may be asked for: fewer than the smallest store holds


class Load:
    """What one client does, and how long each call took. errors: calls that failed, or gave something else."""

    def __init__(self, client: Client, number: int) -> None:
        self._client, self._rng = client, np.random.default_rng(number)
        self._number, self._n_made = number, 0
        self._hashes: deque[bytes] = deque(maxlen=_REMEMBERED)
        self.seconds: dict[str, list[float]] = {"put": [], "match": [], "get": []}
        self.errors = 0

    def turn(self) -> None:
        block = self._new_block()
        results = self._timed("put", lambda: self._client.put([block]))
        self.errors += results[0].code != "OK"
        self._hashes.append(block.block_hash)
        asked = self._hashes[self._rng.integers(len(self._hashes))]
        self.errors += len(self._timed("match", lambda: self._client.match([asked])).blocks) != 1
        found = self._timed("get", lambda: list(self._client.get([asked])))
        self.errors += found[0] is None

    def _timed(self, name: str, call: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        answer = call()
        self.seconds[name].append(time.perf_counter() - start)
        return answer

    def _new_block(self) -> Block:
        self._n_made += 1
        token_ids = [self._number, self._n_made, *range(SPEC.block_size - 2)]
        tensors = {
            name: self._rng.standard_normal(shape, np.float32).astype(np.float16)
            for name, shape in SPEC.dense_shapes().items()
        }
        return Block(self._client.chain(token_ids)[0], ROOT, 0, token_ids, tensors, 0)


def main(target: str, number: int, seconds: float) -> None:
    with Client(SPEC, target=target) as client:
        load = Load(client, number)
        load.turn()
        print("ready", flush=True)
        sys.stdin.readline()
        load.seconds = {name: [] for name in load.seconds}
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            load.turn()
    print(json.dumps({"seconds": load.seconds, "errors": load.errors}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
