"""How the store lies in LMDB: every table, key and record, and how many bytes they take.

    sys        name                              -> format, next payload id, number of departures
    models     model_id:u8[32]                   -> ModelSpec (protobuf)
    entries    block key                         -> Entry (protobuf)
    children   parent's block key                -> block_hash*             (sorted duplicates; first blocks have none)
    recency    last_used:u64 ~index:u32 key      -> (empty)                 key order is the order of eviction
    payload    payload_id:u64 chunk:u16          -> a piece of the frame
    totals     model_id:u8[32] fidelity:u8       -> blocks, tokens, source and stored bytes (u64 each)
    departed   slot:u32                          -> Departure (protobuf)    a ring

    block key  := model_id:u8[32] block_hash:u8[32]        the namespace is salt in the hash

Integers in keys are big-endian, so that key order is number order; ~index puts the deeper of two equally old blocks
first. Frames are cut into chunks of 65,520 bytes, which fill whole pages of 4 and of 16 KiB: the file then stays at
1.0x of its content under churn, where whole values grew it to 1.9x and made puts 24x slower.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import lmdb

from kvcached.block import BlockId
from kvcached_client._proto import kvcached_pb2 as pb
from kvcached_client.hashing import HASH_BYTES, ROOT

FORMAT = b"kvcached store 1"
CHUNK_BYTES = 65_520
_MAX_RING_SLOTS, _QUOTA_PER_SLOT = 16_384, 8192  # about 1 % of a small quota
TABLES = ("sys", "models", "entries", "children", "recency", "payload", "totals", "departed")
_RECENCY = struct.Struct(">QI")
_PAYLOAD = struct.Struct(">QH")
_TOTALS = struct.Struct("<4Q")
_PAGE_HEADER_BYTES = 16
_MAX_INDEX = 0xFFFFFFFF
# What LMDB says of a file that is not a database, or not this one. All else it says of the machine.
OF_THE_FILE = (
    lmdb.InvalidError,
    lmdb.CorruptedError,
    lmdb.PageNotFoundError,
    lmdb.VersionMismatchError,
    lmdb.IncompatibleError,
    lmdb.NotFoundError,
)
# What a block costs beside its payload: entry, recency, child and departure records in B-tree leaves half full.
RECORD_BYTES = 2048


class Totals(NamedTuple):
    """Sums over the entries of one model at one fidelity."""

    n_blocks: int = 0
    n_tokens: int = 0
    source_bytes: int = 0
    stored_bytes: int = 0

    def plus(self, entry: pb.Entry, sign: int) -> "Totals":
        counts = (1, entry.n_tokens, entry.source_bytes, entry.stored_bytes)
        return Totals(*(total + sign * count for total, count in zip(self, counts, strict=True)))

    def pack(self) -> bytes:
        return _TOTALS.pack(*self)

    @classmethod
    def unpack(cls, record: bytes | memoryview | None) -> "Totals":
        """Raises ValueError for a record that is none."""
        if record and len(record) != _TOTALS.size:
            raise ValueError(f"totals take {_TOTALS.size} bytes, got {len(record)}")
        return cls(*_TOTALS.unpack(record)) if record else cls()


@dataclass(frozen=True, slots=True)
class Tables:
    """Handles of the tables of one environment."""

    sys: lmdb._Database
    models: lmdb._Database
    entries: lmdb._Database
    children: lmdb._Database
    recency: lmdb._Database
    payload: lmdb._Database
    totals: lmdb._Database
    departed: lmdb._Database

    @classmethod
    def open(cls, env: lmdb.Environment) -> "Tables":
        return cls(**{name: env.open_db(name.encode(), dupsort=name == "children") for name in TABLES})

    def used_bytes(self, txn: lmdb.Transaction, page_bytes: int) -> int:
        """Pages that hold something, trees included; all else in the file is free for reuse."""
        stats = [txn.stat(getattr(self, name)) for name in TABLES]
        return page_bytes * sum(s["branch_pages"] + s["leaf_pages"] + s["overflow_pages"] for s in stats)


def claim(env: lmdb.Environment) -> None:
    """Writes our format into an empty environment. Raises lmdb.Error if the environment is somebody else's."""
    with env.begin() as txn:
        names = [bytes(name) for name, _ in txn.cursor()]
        if names:
            found = txn.get(b"format", db=env.open_db(b"sys", txn=txn, create=False)) if b"sys" in names else None
            if found != FORMAT:
                raise lmdb.InvalidError(f"expected format {FORMAT!r}, got {found!r}")
            return
    with env.begin(write=True) as txn:
        txn.put(b"format", FORMAT, db=env.open_db(b"sys", txn=txn))


def block_key(block_id: BlockId) -> bytes:
    return block_id.model_id + block_id.block_hash


def parent_key(key: bytes, entry: pb.Entry) -> bytes | None:
    """The key of a block's parent; None for the first block of a chain."""
    return None if entry.parent_hash == ROOT else key[:HASH_BYTES] + entry.parent_hash


def split_key(key: bytes) -> tuple[bytes, bytes]:
    """Model id and block hash."""
    return key[:HASH_BYTES], key[HASH_BYTES:]


def recency_key(key: bytes, entry: pb.Entry) -> bytes:
    return _RECENCY.pack(entry.last_used, _MAX_INDEX - entry.index) + key


def key_of_recency(recency: bytes) -> bytes:
    return recency[_RECENCY.size :]


def totals_key(key: bytes, entry: pb.Entry) -> bytes:
    return key[:HASH_BYTES] + bytes([entry.fidelity.kind])


def payload_keys(entry: pb.Entry) -> Iterator[bytes]:
    """Keys of the chunks of an entry's frame, in order."""
    for chunk in range(-(-entry.frame_bytes // CHUNK_BYTES)):
        yield _PAYLOAD.pack(entry.payload_id, chunk)


def payload_id(key: bytes) -> int:
    number: int = _PAYLOAD.unpack(key)[0]
    return number


def ring_slots(quota_bytes: int) -> int:
    """How many departures are remembered."""
    return min(_MAX_RING_SLOTS, quota_bytes // _QUOTA_PER_SLOT)


def ring_key(slot: int) -> bytes:
    return slot.to_bytes(4, "big")


def chunks(entry: pb.Entry, frame: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """Keys and values under which a frame is stored."""
    view = memoryview(frame)
    for n, key in enumerate(payload_keys(entry)):
        yield key, view[n * CHUNK_BYTES : (n + 1) * CHUNK_BYTES]


def payload_bytes(frame_bytes: int, page_bytes: int) -> int:
    """What a frame takes on disk: whole pages for each chunk."""
    full, rest = divmod(frame_bytes, CHUNK_BYTES)
    sizes = [CHUNK_BYTES] * full + [rest] * bool(rest)
    return sum(-(-(size + _PAGE_HEADER_BYTES) // page_bytes) * page_bytes for size in sizes)
