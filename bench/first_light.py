"""First figures: put and get, Match with few and many blocks, restore against prefill and against mlx-lm's own files.

Everything is measured in one run against a baseline beside it; ratios travel between machines, absolutes do not.
`make bench` writes bench/results/first_light.json. Real daemon, socket and disk, and the reference model's own cache.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from demo import start_daemon
from engine import REFERENCE_MODEL, CountingModel, document, generate
from mlx_lm import load
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache, trim_prompt_cache
from rich.console import Console
from rich.progress import track
from rich.table import Table

from kvcached import codec
from kvcached.block import BlockId, KVBlock
from kvcached.store import Store
from kvcached_client import ROOT, Block, Client, Fingerprint, LayerSpec, ModelSpec, block_hash
from kvcached_client._proto import kvcached_pb2 as pb
from kvcached_mlx import PromptStore, fresh_cache, model_spec
from kvcached_mlx.blocks import to_blocks
from kvcached_mlx.tree import to_mlx, to_numpy

console = Console(stderr=True)
N_ROUNDS = 7
N_COPIES = 20  # of the document's cache, in put and get


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median and extremes."""
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}


def timed(function: Callable[[], Any], rounds: int = N_ROUNDS) -> list[float]:
    """Seconds of each of some calls."""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return seconds


@contextmanager
def daemon(directory: Path) -> Iterator[str]:
    """A daemon of its own, and its address."""
    process, target = start_daemon(directory)
    try:
        yield target
    finally:
        process.terminate()
        process.wait()


class Reference:
    """The reference model with a cache of whole blocks, prefilled once."""

    def __init__(self, n_tokens: int) -> None:
        loaded, tokenizer = load(str(REFERENCE_MODEL))
        self.model = CountingModel(loaded)
        self.spec = model_spec(self.model, REFERENCE_MODEL)
        self.prompt = document(tokenizer, n_tokens + 1)
        self.cache = fresh_cache(self.model)
        _, self.prefill_seconds, _ = generate(self.model, self.prompt, self.cache, 1)
        trim_prompt_cache(self.cache, self.cache[0].offset - n_tokens)
        self.source_bytes = 2 * len(self.cache) * self.cache[0].keys[..., :n_tokens, :].nbytes

    def blocks(self, client: Client, copy: int) -> list[Block]:
        """The cache as blocks of a prompt that differs from copy to copy."""
        tokens = [copy, *self.prompt[1:-1]]
        return to_blocks(self.spec, tokens, client.chain(tokens), self.cache)


def throughput(reference: Reference, directory: Path) -> dict[str, Any]:
    """Put and get over the socket, and the bare codec on one core beside them."""
    with daemon(directory) as target, Client(reference.spec, target=target) as client:
        copies = [reference.blocks(client, copy) for copy in range(N_COPIES)]
        one = copies[0]
        mb = sum(array.nbytes for block in one for array in block.tensors.values()) / 1e6
        dense = [KVBlock.dense(block.tensors, len(block.token_ids), block.first_position) for block in one]
        ids = [BlockId(reference.spec.model_id, "", block.block_hash) for block in one]
        frames = [codec.encode(block_id, block) for block_id, block in zip(ids, dense, strict=True)]
        encode, decode, put, get = [], [], [], []
        for blocks in track(copies, "put and get", console=console):
            encode += timed(lambda: [codec.encode(i, b) for i, b in zip(ids, dense, strict=True)], 1)
            decode += timed(lambda: [codec.decode(i, f, 1 << 30) for i, f in zip(ids, frames, strict=True)], 1)
            put += timed(lambda blocks=blocks: check_stored(client.put(blocks)), 1)
            get += timed(lambda blocks=blocks: check_found(client.get([b.block_hash for b in blocks])), 1)
    seconds = {"encode": encode, "decode": decode, "put": put, "get": get}
    rates = {name: mb / statistics.median(s) for name, s in seconds.items()}
    return {
        "block_bytes": int(1e6 * mb / len(one)),
        "blocks_per_call": len(one),
        **{f"{name}_mb_per_second": rate for name, rate in rates.items()},
        "put_over_bare_encode": rates["put"] / rates["encode"],
        "get_over_bare_decode": rates["get"] / rates["decode"],
    }


def check_stored(results: list[pb.PutResult]) -> None:
    if any(result.code != "OK" for result in results):
        sys.exit(f"a put failed: {results}")


def check_found(blocks: Iterator[Block | None]) -> None:
    if any(block is None for block in blocks):
        sys.exit("a get missed")


def match_latency(n_blocks: int, directory: Path) -> dict[str, Any]:
    """Match for a chain of 64 blocks in a store of `n_blocks`, and an empty Match as the price of a call."""
    layer = LayerSpec(n_kv_heads=1, key_dim=8, value_dim=8)
    spec = ModelSpec(Fingerprint(weights="bench"), "float16", 16, (layer,), name="bench")
    chains = fill(directory / "store", spec, n_blocks, chain_length=64)
    rng = np.random.default_rng(0)
    with daemon(directory) as target, Client(spec, target=target) as client:
        hits = []
        for index in rng.integers(0, len(chains), 300):
            start = time.perf_counter()
            n_held = len(client.match(chains[index]).blocks)
            hits.append(time.perf_counter() - start)
            if n_held != len(chains[index]):
                sys.exit(f"{n_held} of {len(chains[index])} blocks matched")
        request = pb.MatchRequest(model_id=spec.model_id)
        calls = timed(lambda: client._connection.call("Match", request), 300)
    return {
        "n_blocks": n_blocks,
        "chain_blocks": 64,
        "p50_ms": 1e3 * statistics.median(hits),
        "p99_ms": 1e3 * statistics.quantiles(hits, n=100)[98],
        "empty_call_p50_ms": 1e3 * statistics.median(calls),
        "p50_over_empty_call": statistics.median(hits) / statistics.median(calls),
    }


def fill(path: Path, spec: ModelSpec, n_blocks: int, chain_length: int) -> list[list[bytes]]:
    """A store with that many small blocks, written without a daemon; the hashes of its chains."""
    store = Store(path, quota_bytes=4 << 30)
    store.put_model(spec).result()
    chains = []
    tensors = {"keys": np.zeros((1, 1, 16, 8), np.float16), "values": np.zeros((1, 1, 16, 8), np.float16)}
    for chain in track(range(-(-n_blocks // chain_length)), f"a store of {n_blocks} blocks", console=console):
        parent, hashes, pending = ROOT, [], []
        for index in range(min(chain_length, n_blocks - chain * chain_length)):
            block_id = BlockId(spec.model_id, "", block_hash(parent, [chain] * 16))
            entry = pb.Entry(parent_hash=parent, index=index, n_tokens=16, first_position=16 * index, source_bytes=512)
            entry.fidelity.kind = entry.lineage = pb.FIDELITY_KIND_EXACT
            frame = codec.encode(block_id, KVBlock.dense(tensors, 16, 16 * index))
            pending.append(store.put(block_id, entry, frame))
            parent = block_id.block_hash
            hashes.append(parent)
        for future in pending:
            future.result()
        chains.append(hashes)
    store.close()
    return chains


def restore(reference: Reference, directory: Path) -> dict[str, Any]:
    """Restoring a cache against computing it, and against mlx-lm's own prompt-cache file."""
    n_tokens = reference.cache[0].offset
    prompt = reference.prompt
    file = directory / "prompt.safetensors"
    with daemon(directory) as target:
        store = PromptStore(reference.model, Client(reference.spec, target=target))
        store.offload(prompt[:-1], reference.cache)
        if not store.flush(60) or store.counts.refused:
            sys.exit("offloading failed")
        prefill = timed(lambda: prefill_once(reference), 3)
        exact, _ = store.restore(prompt)  # its buffers are as long as what they hold: mlx-lm saves whole buffers
        restored, loaded, saved = [], [], []
        for _ in track(range(N_ROUNDS), "restore and load", console=console):
            restored += timed(lambda: check_restored(store.restore(prompt), n_tokens), 1)
            saved += timed(lambda: save_prompt_cache(str(file), exact), 1)
            loaded += timed(lambda: mx.eval([entry.state for entry in load_prompt_cache(str(file))]), 1)
        status = store.client._connection.call("Status", pb.StatusRequest()).store
        store.close()
    return {
        "tokens": n_tokens,
        "source_bytes": reference.source_bytes,
        "prefill_seconds": spread(prefill),
        "restore_seconds": spread(restored),
        "restore_over_prefill": statistics.median(restored) / statistics.median(prefill),
        "stored_bytes": status.stored_bytes,
        "compression": status.source_bytes / status.stored_bytes,
        "mlx_file_bytes": file.stat().st_size,
        "stored_over_mlx_file": status.stored_bytes / file.stat().st_size,
        "mlx_load_seconds": spread(loaded),
        "restore_over_mlx_load": statistics.median(restored) / statistics.median(loaded),
        "mlx_save_seconds": spread(saved),
    }


def prefill_once(reference: Reference) -> None:
    generate(reference.model, reference.prompt, fresh_cache(reference.model), 1)


def check_restored(restored: tuple[list[Any], int], n_tokens: int) -> None:
    if restored[1] != n_tokens:
        sys.exit(f"{restored[1]} of {n_tokens} tokens restored")


def lossless(reference: Reference) -> dict[str, float]:
    """Compression of the same cache in each dtype, every byte of the frames counted."""
    client = Client(reference.spec, target="unix:/nonexistent")
    blocks = reference.blocks(client, 0)
    found = {}
    for dtype, array_type in [("float16", mx.float16), ("bfloat16", mx.bfloat16), ("float32", mx.float32)]:
        source = stored = 0
        for block in blocks:
            arrays = {name: to_numpy(to_mlx(array).astype(array_type)) for name, array in block.tensors.items()}
            dense = KVBlock.dense(arrays, len(block.token_ids), block.first_position)
            source += dense.nbytes
            stored += len(codec.encode(BlockId(reference.spec.model_id, "", block.block_hash), dense))
        found[dtype] = source / stored
    return found


def machine() -> dict[str, Any]:
    return {"platform": platform.platform(), "cores": os.cpu_count(), "python": platform.python_version()}


def print_report(report: dict[str, Any]) -> None:
    table = Table("what", "value", "against")
    rates, restored = report["throughput"], report["restore"]
    for name, bare in (("put", "encode"), ("get", "decode")):
        against = f"{rates[f'{name}_over_bare_{bare}']:.2f} of the bare codec on one core"
        table.add_row(name, f"{rates[f'{name}_mb_per_second']:.0f} MB/s", against)
    for match in report["match"]:
        against = f"{match['p50_over_empty_call']:.2f}x an empty call"
        table.add_row(f"match, {match['n_blocks']:,} blocks", f"{match['p50_ms']:.2f} ms", against)
    seconds = restored["restore_seconds"]["median"]
    table.add_row("restore", f"{1e3 * seconds:.0f} ms", f"{restored['restore_over_prefill']:.4f} of prefill")
    table.add_row("", "", f"{restored['restore_over_mlx_load']:.2f} of mlx-lm's load")
    against = f"{restored['stored_over_mlx_file']:.3f} of mlx-lm's file"
    table.add_row("on disk", f"{restored['stored_bytes']:,} bytes", against)
    for dtype, ratio in report["lossless_compression"].items():
        table.add_row(f"lossless {dtype}", f"{ratio:.3f}x", "")
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--tokens", type=int, default=1536)
    arguments = parser.parse_args()
    reference = Reference(arguments.tokens)
    report: dict[str, Any] = {"command": "make bench", "machine": machine()}
    with tempfile.TemporaryDirectory(prefix="kvb") as name:
        base = Path(name)
        report["throughput"] = throughput(reference, base / "t")
        report["match"] = [match_latency(n_blocks, base / str(n_blocks)) for n_blocks in (1_000, 100_000)]
        (base / "r").mkdir()
        report["restore"] = restore(reference, base / "r")
    report["lossless_compression"] = lossless(reference)
    print_report(report)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
