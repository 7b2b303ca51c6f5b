"""Stores for tests, and blocks in them named by their tokens. Nothing here asserts."""

from pathlib import Path

from support import tiny_spec

from kvcached.block import BlockId
from kvcached.store import Store
from kvcached_client._proto import kvcached_pb2 as pb
from kvcached_client.hashing import ROOT, block_hash

SPEC = tiny_spec()
MIB = 1 << 20


def open_store(path: Path, **settings: object) -> Store:
    store = Store(path, **{"quota_bytes": 8 * MIB, **settings})  # type: ignore[arg-type]
    store.put_model(SPEC).result()
    return store


def name(*path: int) -> BlockId:
    """The block at the end of a chain of one-token blocks."""
    parent = ROOT
    for token in path:
        parent = block_hash(parent, [token])
    return BlockId(SPEC.model_id, "", parent)


def put(store: Store, path: tuple[int, ...], frame: bytes, **fields: object) -> pb.Outcome:
    index = len(path) - 1
    entry = pb.Entry(parent_hash=name(*path[:-1]).block_hash, index=index, n_tokens=4, first_position=4 * index)
    entry.fidelity.kind = entry.lineage = pb.FIDELITY_KIND_EXACT
    entry.MergeFrom(pb.Entry(**fields))  # type: ignore[arg-type]
    return store.put(name(*path), entry, frame).result()[0]


def held(store: Store, *paths: tuple[int, ...]) -> list[bool]:
    return [store.entry(name(*path)) is not None for path in paths]
