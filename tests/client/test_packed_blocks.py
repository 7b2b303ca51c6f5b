"""Compacted blocks as a client gets them: rows that can be trusted, or a miss."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from impostors import impostor
from support import same_tensors, tiny_spec

from kvcached_client import Client, FidelityKind
from kvcached_client._proto import kvcached_pb2 as pb
from kvcached_client.protocol import CHUNK_BYTES, write_chunk
from kvcached_client.tensors import describe, nbytes, pieces

SPEC = tiny_spec()  # 2 layers, 2 KV heads, 8 dims, blocks of 4
HASH = b"h" * 32
FIRST = 8  # position
LENGTHS = np.array([[1, 4], [2, 1]], np.int32)
Arrays = dict[str, np.ndarray]


def packed() -> Arrays:
    rng = np.random.default_rng(0)
    return {
        "keys": rng.standard_normal((8, 8)).astype(np.float16),
        "values": rng.standard_normal((8, 8)).astype(np.float16),
        "lengths": LENGTHS.copy(),
        "positions": np.array([8, 8, 9, 10, 11, 8, 10, 11], np.int32),
        "bias": np.linspace(-1, 1, 8, dtype=np.float32),
    }


def answer(arrays: Arrays) -> Callable[..., Iterator[bytes]]:
    """What a daemon sends of a compacted block, whatever it is."""
    described = describe(arrays)
    header = pb.Header(
        block_hash=HASH,
        found=True,
        n_tokens=4,
        first_position=FIRST,
        fidelity=pb.Fidelity(kind=pb.FIDELITY_KIND_COMPACTED, profile="x8", am_ratio=2, bundle_id=bytes(32)),
        lineage=pb.FIDELITY_KIND_EXACT,
        tensors=described,
        data_bytes=nbytes(described),
    )
    messages = [write_chunk(part) for part in (header, *pieces(arrays, CHUNK_BYTES))]
    return lambda _requests, _context: iter(messages)


def get(arrays: Arrays, **accepts: Any) -> Any:
    with impostor(Get=answer(arrays)) as target, Client(SPEC, target=target) as client:
        (found,) = client.get([HASH], floor=FidelityKind.COMPACTED, **accepts)
    return found


def test_rows_of_a_compacted_block_come_as_they_were_sent() -> None:
    arrays = packed() | {"state.0": np.arange(3, dtype=np.float32)}
    found = get(arrays, accepts_compacted=True)
    assert (found.fidelity.kind, found.fidelity.am_ratio) == (FidelityKind.COMPACTED, 2)
    assert same_tensors(dict(found.tensors), arrays)


def test_a_compacted_block_that_nobody_asked_for_is_a_miss() -> None:
    assert get(packed(), accepts_compacted=False) is None


def changed(name: str, array: np.ndarray) -> Arrays:
    return packed() | {name: array}


def without(name: str) -> Arrays:
    return {key: array for key, array in packed().items() if key != name}


def moved(position: int) -> Arrays:
    arrays = packed()
    arrays["positions"][3] = position
    return arrays


MALFORMED: dict[str, Arrays] = {
    "lengths that sum to more rows": changed("lengths", np.array([[2, 4], [2, 1]], np.int32)),
    "lengths that sum to fewer rows": changed("lengths", np.array([[1, 3], [2, 1]], np.int32)),
    "lengths below 0 that sum up": changed("lengths", np.array([[-1, 4], [4, 1]], np.int32)),
    "a head of no rows": changed("lengths", np.array([[0, 4], [3, 1]], np.int32)),
    "a head of more rows than tokens": changed("lengths", np.array([[1, 5], [1, 1]], np.int32)),
    "lengths that overflow": changed("lengths", np.full((2, 2), 2**31 - 1, np.int32)),
    "lengths of other heads": changed("lengths", np.array([1, 4, 2, 1], np.int32)),
    "lengths that are no integers": changed("lengths", LENGTHS.astype(np.float32)),
    "wide lengths": changed("lengths", LENGTHS.astype(np.int64)),
    "no lengths": without("lengths"),
    "no bias": without("bias"),
    "no positions": without("positions"),
    "no values": without("values"),
    "fewer biases": changed("bias", np.zeros(7, np.float32)),
    "fewer values": changed("values", np.zeros((7, 8), np.float16)),
    "keys of another dim": changed("keys", np.zeros((8, 9), np.float16)),
    "keys of another dtype": changed("keys", np.zeros((8, 8), np.float32)),
    "a bias that is no number": changed("bias", np.array([0, 0, 0, np.nan, 0, 0, 0, 0], np.float32)),
    "a position before the block": moved(FIRST - 1),
    "a position after the block": moved(FIRST + 4),
    "a position that overflows": moved(-(2**31)),
    "a dense block": {name: np.zeros((2, 2, 4, 8), np.float16) for name in ("keys", "values")},
}


@pytest.mark.parametrize("arrays", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_compacted_block_is_a_miss(arrays: Arrays, caplog: pytest.LogCaptureFixture) -> None:
    assert get(arrays, accepts_compacted=True) is None
    assert "is compacted and malformed: " in caplog.text
