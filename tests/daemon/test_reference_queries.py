"""Queries in a Put: what will be read of the block. Checked like the block, counted like it, and never kept."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np
import pytest
from mistakes import MIB
from support import DaemonProcess, chain, data_of, header_of, put_parts, same_tensors, tiny_spec, wait_until

from kvcached_client import Block, Client, ModelSpec
from kvcached_client._proto import kvcached_pb2 as pb

SPEC = tiny_spec(weights="queries", block_size=16)  # 2 layers of 4 query heads and 8 dims
BLOCK_BYTES = 2 * 2 * 2 * 16 * 8 * 2
_serial = count()


@pytest.fixture
def client(shared_daemon: DaemonProcess) -> Iterator[Client]:
    with shared_daemon.client(SPEC) as client:
        client.match([])
        yield client


def fresh(client: Client, **tensors: np.ndarray) -> Block:
    seed = next(_serial)
    (block,) = chain(client, [1000 + seed, *range(client.spec.block_size - 1)], seed)
    return replace(block, tensors={**block.tensors, **tensors})


def queries(*shape: int, dtype: Any = np.float16) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape or (2, 4, 8, 8)).astype(dtype)


def test_queries_beside_a_block_are_not_part_of_it(client: Client) -> None:
    block = fresh(client)
    with_queries = replace(block, tensors={"queries": queries(), **block.tensors})
    (result,) = client.put([with_queries])
    assert (result.code, result.source_bytes) == ("OK", BLOCK_BYTES)
    (found,) = client.get([block.block_hash])
    assert found
    assert same_tensors(dict(found.tensors), dict(block.tensors))


REFUSED: dict[str, tuple[np.ndarray, str]] = {
    "layers": (queries(1, 4, 8, 8), "float16 (1, 4, 8, 8)"),
    "KV heads instead of query heads": (queries(2, 2, 8, 8), "float16 (2, 2, 8, 8)"),
    "none": (queries(2, 4, 0, 8), "float16 (2, 4, 0, 8)"),
    "too many": (queries(2, 4, 257, 8), "float16 (2, 4, 257, 8)"),
    "dims": (queries(2, 4, 8, 9), "float16 (2, 4, 8, 9)"),
    "too flat": (queries(4, 8, 8), "float16 (4, 8, 8)"),
    "too deep": (queries(1, 2, 4, 8, 8), "float16 (1, 2, 4, 8, 8)"),
    "another dtype": (queries(dtype=np.float32), "float32 (2, 4, 8, 8)"),
}


@pytest.mark.parametrize(("wrong", "came"), REFUSED.values(), ids=REFUSED.keys())
def test_queries_of_the_wrong_shape_are_refused_alone_with_what_was_expected(
    client: Client, wrong: np.ndarray, came: str
) -> None:
    bad, good = fresh(client, queries=wrong), fresh(client)
    refused, stored = client.put([bad, good], store_as="compacted-x8")
    assert (refused.code, stored.code) == ("INVALID_ARGUMENT", "OK")
    assert refused.message == f"queries of this model are float16 (2, 4, 1 to 256, 8), got {came}"


@pytest.mark.parametrize("name", ["lengths", "positions", "bias"])
def test_names_that_compacted_blocks_need_are_not_free_for_others(client: Client, name: str) -> None:
    (result,) = client.put([fresh(client, **{name: np.zeros(3, np.int32)})])
    assert result.code == "INVALID_ARGUMENT"
    assert result.message == f"{name!r} is a tensor of compacted blocks: call an opaque one otherwise"


def different_heads() -> ModelSpec:
    layers = (SPEC.layers[0], replace(SPEC.layers[1], n_query_heads=8))
    return replace(tiny_spec(weights="query heads differ", block_size=16), layers=layers)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (different_heads(), "no queries are taken of a model whose layers have [4, 8] query heads for 2 KV heads"),
        (tiny_spec(weights="no rows", opaque=True), "'queries' are of dense layers, and 'tiny' has none"),
    ],
    ids=["query heads differ", "no dense layers"],
)
def test_models_that_no_query_fits_are_refused_them(
    shared_daemon: DaemonProcess, spec: ModelSpec, message: str
) -> None:
    with shared_daemon.client(spec) as client:
        client.match([])
        (result,) = client.put([fresh(client, queries=queries())])
        assert (result.code, result.message) == ("INVALID_ARGUMENT", message)
        assert [r.code for r in client.put([fresh(client)])] == ["OK"]


def test_queries_have_a_bound_of_their_own_beside_that_of_blocks(shared_daemon: DaemonProcess) -> None:
    layer = replace(SPEC.layers[0], n_query_heads=64, n_kv_heads=2)
    spec = replace(tiny_spec(weights="many query heads", block_size=16), layers=(layer, layer))
    shared_daemon.call("SetConfig", pb.SetConfigRequest(values={"max_block_bytes": "1MiB"}))
    try:
        with shared_daemon.client(spec) as client:
            client.match([])
            fits, too_many = queries(2, 64, 128, 8), queries(2, 64, 129, 8)
            ballast = np.zeros(MIB - BLOCK_BYTES, np.uint8)  # the largest block there may be
            results = client.put([fresh(client, ballast=ballast, queries=fits), fresh(client, queries=too_many)])
    finally:
        shared_daemon.call("SetConfig", pb.SetConfigRequest(values={"max_block_bytes": "1GiB"}))
    assert [result.code for result in results] == ["OK", "INVALID_ARGUMENT"]
    assert results[1].message == "queries take at most a quarter of max_block_bytes, 262144 bytes, got 264192"


def test_queries_take_room_while_they_come_in_and_give_it_back(daemon: DaemonProcess) -> None:
    daemon.restart("--idle-seconds", "1")
    with daemon.client(SPEC) as client:
        client.match([])
        block = fresh(client, queries=queries(2, 4, 256, 8))
        header, seen = header_of(client, block), []

        def parts() -> Iterator[Any]:
            yield header
            wait_until(lambda: seen.append(daemon.status().pool.put_bytes) or seen[-1] > 0)
            yield from data_of(block)

        (result,) = put_parts(daemon.target, parts())
        assert result.code == "OK"
        assert seen[-1] == BLOCK_BYTES + 2 * 4 * 256 * 8 * 2
        assert wait_until(lambda: daemon.status().pool.put_bytes == 0)
