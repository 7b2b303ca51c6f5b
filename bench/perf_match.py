"""Match over a chain of 1,000 blocks in stores of different sizes, and how long a daemon takes to start on them.

Stores are written directly (`fill`), many entries in a transaction: what a daemon would have written, but for frames of
a few bytes, which Match never reads.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
from demo import start_daemon
from perf_base import Scale, checked, console, interleaved, percentiles, ratio, running, spread
from rich.progress import track

from kvcached import layout
from kvcached.layout import Tables, Totals
from kvcached.store import Store
from kvcached.store_files import StoreFiles
from kvcached_client import ROOT, Client, Fingerprint, LayerSpec, ModelSpec
from kvcached_client._proto import kvcached_pb2 as pb

CHAIN = 1000  # blocks
QUOTA_BYTES = 8 << 30
_FRAME = bytes(64)
_PER_TRANSACTION = 20_000
Record = tuple[bytes, pb.Entry]
SPEC = ModelSpec(Fingerprint(weights="bench"), "float16", 16, (LayerSpec(n_kv_heads=1, key_dim=8, value_dim=8),))


def fill(path: Path, n_blocks: int) -> list[list[bytes]]:
    """A sound store of that many blocks; the hashes of its chains, the last of which may be shorter."""
    store = Store(path, quota_bytes=QUOTA_BYTES)
    store.put_model(SPEC).result()
    page_bytes = store._page_bytes
    store.close()
    hashes = np.random.default_rng(n_blocks).bytes(32 * n_blocks)
    chains = [
        [hashes[32 * i : 32 * (i + 1)] for i in range(start, min(start + CHAIN, n_blocks))]
        for start in range(0, n_blocks, CHAIN)
    ]
    files = StoreFiles(path)
    env, tables = files.open(QUOTA_BYTES * 5 // 4)
    records = _records(chains, page_bytes)
    n_parts = -(-n_blocks // _PER_TRANSACTION)
    for _ in track(range(n_parts), f"a store of {n_blocks:,} blocks", console=console):
        with env.begin(write=True) as txn:
            _write(txn, tables, list(islice(records, _PER_TRANSACTION)))
    env.close()
    files.mark_clean()
    return chains


def _records(chains: Sequence[Sequence[bytes]], page_bytes: int) -> Iterator[Record]:
    tick, number = int(time.time() * 1e6), 0
    stored_bytes = layout.payload_bytes(len(_FRAME), page_bytes) + 512
    exact = pb.Fidelity(kind=pb.FIDELITY_KIND_EXACT)
    for chain in chains:
        for index, block_hash in enumerate(chain):
            entry = pb.Entry(
                parent_hash=chain[index - 1] if index else ROOT,
                index=index,
                n_tokens=SPEC.block_size,
                first_position=index * SPEC.block_size,
                fidelity=exact,
                lineage=pb.FIDELITY_KIND_EXACT,
                source_bytes=512,
                stored_bytes=stored_bytes,
                frame_bytes=len(_FRAME),
                created=tick + number,
                last_used=tick + number,
                payload_id=number,
            )
            number += 1
            yield SPEC.model_id + block_hash, entry


def _write(txn: lmdb.Transaction, tables: Tables, records: Sequence[Record]) -> None:
    """Sorted where keys are in no order, as trees like it."""
    by_key = sorted((key, entry.SerializeToString()) for key, entry in records)
    children = [(parent, key[32:]) for key, entry in records if (parent := layout.parent_key(key, entry))]
    recency = [(layout.recency_key(key, entry), b"") for key, entry in records]
    payload = [(chunk, _FRAME) for _, entry in records for chunk in layout.payload_keys(entry)]
    cursors = {name: txn.cursor(getattr(tables, name)) for name in ("entries", "children", "recency", "payload")}
    cursors["entries"].putmulti(by_key)
    cursors["children"].putmulti(sorted(children))
    cursors["recency"].putmulti(recency)
    cursors["payload"].putmulti(payload)
    totals_key = layout.totals_key(*records[0])
    totals = Totals.unpack(txn.get(totals_key, db=tables.totals))
    for _, entry in records:
        totals = totals.plus(entry, 1)
    txn.put(totals_key, totals.pack(), db=tables.totals)
    n_payloads = records[-1][1].payload_id + 1
    txn.put(b"next_payload_id", n_payloads.to_bytes(8, "big"), db=tables.sys)


def measure(scale: Scale, directory: Path) -> dict[str, Any]:
    """`match_1e6_over_1e3` of the largest store over the smallest; `start_seconds` of none and of the largest."""
    chains = {n: fill(directory / str(n) / "store", n) for n in scale.match_blocks}
    quota = ("--quota-bytes", str(QUOTA_BYTES))
    directories = {0: directory / "empty", max(chains): directory / str(max(chains))}
    starts = _starts(directories, quota, scale.starts)
    with ExitStack() as stack:
        clients = {}
        for n in chains:
            target, _ = stack.enter_context(running(directory / str(n), *quota))
            clients[n] = stack.enter_context(Client(SPEC, target=target))
        rng = np.random.default_rng(0)
        functions = {str(n): lambda n=n: _match(clients[n], chains[n][rng.integers(len(chains[n]))]) for n in chains}
        seconds = interleaved(functions, scale.match_rounds, f"Match of {CHAIN:,} blocks")
    least, most = (seconds[str(n)] for n in (min(chains), max(chains)))
    return {
        "match_1e6_over_1e3": ratio(most, least),
        "match_blocks": [min(chains), max(chains)],
        "match_seconds": {name: spread(each) | percentiles(each) for name, each in seconds.items()},
        "start_seconds": {str(n): spread(each) for n, each in starts.items()},
    }


def _match(client: Client, chain: Sequence[bytes]) -> None:
    checked(len(client.match(chain).blocks) == len(chain), "a block of a filled store is not there")


def _starts(directories: dict[int, Path], flags: tuple[str, ...], n_starts: int) -> dict[int, list[float]]:
    """From a new process to its first answer."""
    seconds: dict[int, list[float]] = {n: [] for n in directories}
    for _ in range(n_starts):
        for n, directory in directories.items():
            start = time.perf_counter()
            process, _ = start_daemon(directory, *flags)
            seconds[n].append(time.perf_counter() - start)
            process.terminate()
            process.wait()
    return seconds
