"""The store's invariants, checked over one transaction: the product can check itself.

Reads every record but no payload: about a second for 10^5 blocks. Holds no lock; while it runs, pages that others free
are not reused.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import lmdb
from google.protobuf.message import DecodeError

from kvcached import layout
from kvcached.layout import Tables, Totals
from kvcached_client._proto import kvcached_pb2 as pb

_MAX_PROBLEMS = 100
T = TypeVar("T")
Entries = Mapping[bytes, pb.Entry]


def audit(txn: lmdb.Transaction, tables: Tables) -> list[str]:
    """What is wrong, in words, at most 100 of them; empty if every invariant holds. txn: begun with buffers=True."""

    def rows(table: lmdb._Database) -> Iterator[tuple[bytes, bytes | memoryview]]:
        return ((bytes(key), value) for key, value in txn.cursor(table))

    problems: list[str] = []
    entries = _parsed(rows(tables.entries), pb.Entry.FromString, problems)
    models = _parsed(rows(tables.models), pb.ModelSpec.FromString, problems)
    problems += [
        *_chain_problems(entries, set(models)),
        *_recency_problems(entries, {key for key, _ in rows(tables.recency)}),
        *_children_problems(entries, {(key, bytes(child)) for key, child in rows(tables.children)}),
        *_payload_problems(entries, {key: len(value) for key, value in rows(tables.payload)}),
        *_totals_problems(entries, {key: bytes(record) for key, record in rows(tables.totals)}),
    ]
    return problems[:_MAX_PROBLEMS]


def _parsed(
    rows: Iterator[tuple[bytes, bytes | memoryview]], parse: Callable[[bytes], T], problems: list[str]
) -> dict[bytes, T]:
    """The records that can be read; of the others, a problem."""
    found = {}
    for key, record in rows:
        try:
            found[key] = parse(bytes(record))
        except (DecodeError, ValueError) as error:
            problems.append(f"the record {key.hex()} cannot be read: {error}")
    return found


def _chain_problems(entries: Entries, models: set[bytes]) -> Iterator[str]:
    for key, entry in entries.items():
        model_id, block_hash = layout.split_key(key)
        if model_id not in models:
            yield f"block {block_hash.hex()} is of the unknown model {model_id.hex()}"
        parent_key = layout.parent_key(key, entry)
        parent = entries.get(parent_key) if parent_key else None
        if parent_key and parent is None:
            yield f"block {block_hash.hex()} has lost its parent {entry.parent_hash.hex()}"
        expected = (parent.index + 1, parent.first_position + parent.n_tokens) if parent else (0, entry.first_position)
        if (entry.index, entry.first_position) != expected and not (parent_key and parent is None):
            yield f"block {block_hash.hex()} is at {(entry.index, entry.first_position)}, expected {expected}"


def _recency_problems(entries: Entries, recency: set[bytes]) -> Iterator[str]:
    expected = {layout.recency_key(key, entry) for key, entry in entries.items()}
    yield from _differences("recency record", expected, recency)


def _children_problems(entries: Entries, children: set[tuple[bytes, bytes]]) -> Iterator[str]:
    pairs = ((layout.parent_key(key, entry), layout.split_key(key)[1]) for key, entry in entries.items())
    expected = {parent + child for parent, child in pairs if parent}
    yield from _differences("child record", expected, {parent + child for parent, child in children})


def _payload_problems(entries: Entries, sizes: Mapping[bytes, int]) -> Iterator[str]:
    owners = Counter(key for entry in entries.values() for key in layout.payload_keys(entry))
    yield from (f"payload chunk {key.hex()} belongs to {n} blocks" for key, n in owners.items() if n > 1)
    yield from _differences("payload chunk", set(owners), set(sizes))
    for key, entry in entries.items():
        n_bytes = sum(sizes.get(chunk, 0) for chunk in layout.payload_keys(entry))
        if n_bytes != entry.frame_bytes:
            yield f"block {layout.split_key(key)[1].hex()} has {n_bytes} of {entry.frame_bytes} payload bytes"


def _totals_problems(entries: Entries, records: Mapping[bytes, bytes]) -> Iterator[str]:
    sums: dict[bytes, Totals] = {}
    for key, entry in entries.items():
        totals_key = layout.totals_key(key, entry)
        sums[totals_key] = sums.get(totals_key, Totals()).plus(entry, 1)
    for key in sums.keys() | records.keys():
        total = sums.get(key, Totals())
        if records.get(key, Totals().pack()) != total.pack():
            yield f"the totals of {key.hex()} are not what the entries add up to: {total}"


def _differences(what: str, expected: set[bytes], found: set[bytes]) -> Iterator[str]:
    yield from (f"a {what} is missing: {key.hex()}" for key in expected - found)
    yield from (f"a {what} is left over: {key.hex()}" for key in found - expected)
