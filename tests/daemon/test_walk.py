"""Every call of the protocol over a real socket: what it does, and what the status says of it afterwards."""

import itertools
import threading
from collections.abc import Callable
from dataclasses import replace

import grpc
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    DaemonProcess,
    chain,
    data_of,
    hashes_of,
    header_of,
    put_all,
    put_parts,
    same_tensors,
    tiny_spec,
    wait_until,
)

from kvcached_client import ROOT, Block, Client, FidelityKind, LayerKind, LayerSpec, block_hash
from kvcached_client._proto import kvcached_pb2 as pb
from kvcached_client.spec import ModelSpec
from kvcached_client.tensors import DTYPES

TOKENS = list(range(16))
_serial = itertools.count()


@pytest.fixture(scope="module", params=["segment", "in-band"])
def road(request: pytest.FixtureRequest) -> str:
    """Everything here is the same whether tensors go through shared memory or through gRPC."""
    return str(request.param)


def fresh_spec(kv_dtype: str = "float16", **fields: object) -> ModelSpec:
    """A model that no other test knows."""
    return tiny_spec(weights=f"walk {next(_serial)}", kv_dtype=kv_dtype, **fields)  # type: ignore[arg-type]


def put_one(client: Client, tensors: dict[str, np.ndarray], tokens: list[int] = TOKENS[:4], **fields: object) -> Block:
    block = Block(client.chain(tokens)[0], ROOT, 0, tokens, tensors, first_position=0)
    block = replace(block, **fields)  # type: ignore[arg-type]
    (result,) = client.put([block])
    assert result.code == "OK", result.message
    return block


def get_one(client: Client, block: Block) -> Block:
    (again,) = client.get([block.block_hash])
    assert again is not None
    return again


# ---- models


def test_a_model_is_registered_once_and_its_id_is_the_clients(shared_daemon: DaemonProcess) -> None:
    spec = fresh_spec()
    answers = [shared_daemon.call("RegisterModel", pb.RegisterModelRequest(spec=spec.to_proto())) for _ in range(2)]
    assert [a.already_known for a in answers] == [False, True]
    assert {a.model_id for a in answers} == {spec.model_id}


def test_the_daemon_remembers_models_across_restarts(daemon: DaemonProcess) -> None:
    spec = fresh_spec()
    daemon.call("RegisterModel", pb.RegisterModelRequest(spec=spec.to_proto()))
    daemon.restart()
    assert daemon.call("Match", pb.MatchRequest(model_id=spec.model_id)) == pb.MatchResponse()
    assert daemon.call("RegisterModel", pb.RegisterModelRequest(spec=spec.to_proto())).already_known
    (known,) = daemon.status().models
    assert ModelSpec.from_proto(known.spec) == spec


def test_models_do_not_meet(shared_daemon: DaemonProcess) -> None:
    with shared_daemon.client(fresh_spec()) as ours, shared_daemon.client(fresh_spec()) as others:
        blocks = put_all(ours, chain(ours, TOKENS))
        assert others.match(hashes_of(blocks)).n_tokens == 0
        assert list(others.get(hashes_of(blocks))) == [None] * 4
        other_blocks = put_all(others, chain(others, TOKENS, 50))
        assert hashes_of(other_blocks) == hashes_of(blocks)
        assert same_tensors(dict(get_one(ours, blocks[0]).tensors), dict(blocks[0].tensors))
        assert same_tensors(dict(get_one(others, blocks[0]).tensors), dict(other_blocks[0].tensors))


# ---- bits


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_every_bit_pattern_of_dense_tensors_comes_back(shared_daemon: DaemonProcess, dtype: str) -> None:
    """NaN with its payload, infinities, subnormals and negative zero among them."""
    spec = fresh_spec(dtype, block_size=512)
    rng = np.random.default_rng(0)
    tensors = {}
    for name, shape in spec.dense_shapes().items():
        raw = rng.integers(0, 256, int(np.prod(shape)) * DTYPES[dtype].itemsize, np.uint8)
        tensors[name] = raw.view(DTYPES[dtype]).reshape(shape)
        assert np.isnan(tensors[name].astype(np.float32)).any()
    special = np.array([np.nan, np.inf, -np.inf, -0.0], np.float32).astype(DTYPES[dtype])
    tensors["keys"].reshape(-1)[:4] = special
    with shared_daemon.client(spec) as client:
        block = put_one(client, tensors, list(range(512)))
        assert same_tensors(dict(get_one(client, block).tensors), tensors)


@given(st.sampled_from(["float16", "bfloat16", "float32"]), st.integers(0, 2**32 - 1), st.booleans())
@settings(max_examples=15)
def test_any_tensors_come_back(shared_daemon: DaemonProcess, dtype: str, seed: int, smooth: bool) -> None:
    spec = fresh_spec(dtype)
    rng = np.random.default_rng(seed)
    make: Callable[..., np.ndarray] = (lambda shape: np.full(shape, rng.random())) if smooth else rng.standard_normal
    tensors = {name: make(shape).astype(DTYPES[dtype]) for name, shape in spec.dense_shapes().items()}
    with shared_daemon.client(spec) as client:
        assert same_tensors(dict(get_one(client, put_one(client, tensors)).tensors), tensors)


def opaque_tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    return {
        "layer 0 state": rng.standard_normal((2, 3, 5)).astype(np.float32),
        "layer 1 q8": rng.integers(0, 2**32, (4, 7), np.uint32),
        "layer 1 scales": rng.standard_normal((4, 1)).astype(ml_dtypes.bfloat16),
        "offset": np.array(17, np.int64),
        "none": np.empty((0, 4), np.float16),
        "mask": np.array([True, False]),
    }


def test_opaque_tensors_travel_beside_dense_ones(shared_daemon: DaemonProcess) -> None:
    with shared_daemon.client(fresh_spec()) as client:
        tensors = {**chain(client, TOKENS[:4])[0].tensors, **opaque_tensors()}
        again = get_one(client, put_one(client, tensors, boundary=True))
        assert same_tensors(dict(again.tensors), tensors)
        assert list(again.tensors) == list(tensors)
        assert again.boundary


def test_a_model_without_dense_layers_keeps_opaque_tensors_alone(shared_daemon: DaemonProcess) -> None:
    spec = replace(
        fresh_spec(), kv_dtype="mlx-q8-g64", layers=(LayerSpec(kind=LayerKind.STATE, opaque=True),) * 2, block_size=4
    )
    with shared_daemon.client(spec) as client:
        again = get_one(client, put_one(client, opaque_tensors()))
        assert same_tensors(dict(again.tensors), opaque_tensors())
        assert not again.boundary


def test_a_block_with_boundary_state_replaces_one_without(shared_daemon: DaemonProcess) -> None:
    with shared_daemon.client(fresh_spec()) as client:
        dense = dict(chain(client, TOKENS[:4])[0].tensors)
        block = put_one(client, dense)
        assert [b.boundary for b in client.match([block.block_hash]).blocks] == [False]
        (result,) = client.put([replace(block, tensors={**dense, **opaque_tensors()}, boundary=True)])
        assert result.outcome == pb.OUTCOME_REPLACED
        assert [b.boundary for b in client.match([block.block_hash]).blocks] == [True]
        assert same_tensors(dict(get_one(client, block).tensors), {**dense, **opaque_tensors()})
        (result,) = client.put([block])
        assert result.outcome == pb.OUTCOME_ALREADY_HELD


def test_a_block_tells_where_it_belongs(shared_daemon: DaemonProcess) -> None:
    with shared_daemon.client(fresh_spec()) as client:
        blocks = [replace(b, first_position=b.first_position + 1000) for b in chain(client, TOKENS)]
        client.put(blocks)
        for block, again in zip(blocks, client.get(hashes_of(blocks)), strict=True):
            assert again is not None
            where = (block.parent_hash, block.index, block.first_position)
            assert (again.parent_hash, again.index, again.first_position) == where
            assert again.token_ids == ()


# ---- namespaces


def test_namespaces_do_not_see_one_another_even_if_the_hash_is_known(shared_daemon: DaemonProcess) -> None:
    spec = fresh_spec()
    with shared_daemon.client(spec, "alice") as alice, shared_daemon.client(spec, "bob") as bob:
        blocks = put_all(alice, chain(alice, TOKENS))
        stolen = hashes_of(blocks)
        assert bob.match(bob.chain(TOKENS)).n_tokens == 0
        assert bob.match(stolen).n_tokens == 0
        assert list(bob.get(stolen)) == [None] * 4
        names = {"model_id": spec.model_id, "namespace": "bob", "block_hashes": stolen}
        assert shared_daemon.call("Delete", pb.DeleteRequest(**names)).n_deleted == 0
        assert shared_daemon.call("Pin", pb.PinRequest(**names)).n_pinned == 0
        assert shared_daemon.call("Unpin", pb.UnpinRequest(**names)).n_unpinned == 0
        assert alice.match(stolen).n_tokens == 16


def test_a_chain_cannot_be_continued_from_another_namespace(shared_daemon: DaemonProcess) -> None:
    spec = fresh_spec()
    with shared_daemon.client(spec, "alice") as alice, shared_daemon.client(spec, "bob") as bob:
        parent = put_all(alice, chain(alice, TOKENS[:4]))[0]
        tensors = chain(bob, TOKENS[:4])[0].tensors
        child_hash = block_hash(parent.block_hash, TOKENS[4:8], "bob")
        (result,) = bob.put([Block(child_hash, parent.block_hash, 1, TOKENS[4:8], tensors, first_position=4)])
        assert (result.outcome, result.code) == (pb.OUTCOME_REFUSED, "FAILED_PRECONDITION")
        assert "alice" not in result.message


# ---- match, lineage, floor


def test_match_counts_leading_blocks_only(shared_daemon: DaemonProcess) -> None:
    with shared_daemon.client(fresh_spec()) as client:
        hashes = hashes_of(put_all(client, chain(client, TOKENS)))
        assert len(client.match([*hashes[:2], b"\7" * 32, hashes[2]]).blocks) == 2
        assert len(client.match([b"\7" * 32, *hashes]).blocks) == 0
        (held,) = client.match(hashes[:1]).blocks
        assert (held.fidelity.kind, held.lineage, held.n_tokens) == (pb.FIDELITY_KIND_EXACT, pb.FIDELITY_KIND_EXACT, 4)
        assert held.source_bytes == 2 * 2 * 2 * 4 * 8 * 2
        assert held.stored_bytes > 0


def test_a_block_computed_on_a_coded_prefix_is_below_an_exact_floor(shared_daemon: DaemonProcess) -> None:
    with shared_daemon.client(fresh_spec()) as client:
        first, second = put_all(client, chain(client, TOKENS[:8]))
        tail = chain(client, TOKENS)[2]
        client.put([replace(tail, lineage=FidelityKind.CODED)])
        hashes = [*hashes_of([first, second]), tail.block_hash]
        assert len(client.match(hashes).blocks) == 2
        assert [b is not None for b in client.get(hashes)] == [True, True, False]
        for floor in (FidelityKind.CODED, FidelityKind.COMPACTED):
            assert len(client.match(hashes, floor=floor).blocks) == 3
            *_, last = client.get(hashes, floor=floor)
            assert last is not None
            assert last.lineage == FidelityKind.CODED
            assert same_tensors(dict(last.tensors), dict(tail.tensors))
        (result,) = client.put([tail])
        assert result.outcome == pb.OUTCOME_REPLACED
        assert len(client.match(hashes).blocks) == 3


def test_a_floor_that_is_not_named_is_exact(shared_daemon: DaemonProcess) -> None:
    with shared_daemon.client(fresh_spec()) as client:
        (exact,) = chain(client, TOKENS[:4])
        (block,) = put_all(client, [replace(exact, lineage=FidelityKind.CODED)])
        names = {"model_id": client.model_id, "block_hashes": [block.block_hash]}
        assert len(shared_daemon.call("Match", pb.MatchRequest(**names)).blocks) == 0
        request = pb.MatchRequest(**names, floor=pb.FIDELITY_KIND_CODED)
        assert len(shared_daemon.call("Match", request).blocks) == 1


def test_requests_may_follow_one_another_on_one_get_stream(shared_daemon: DaemonProcess) -> None:
    with shared_daemon.client(fresh_spec()) as client:
        blocks = put_all(client, chain(client, TOKENS))
        channel = grpc.insecure_channel(shared_daemon.target)
        method = channel.stream_stream("/kvcached.v1.KvCache/Get", pb.GetRequest.SerializeToString, pb.Chunk.FromString)
        requests = [pb.GetRequest(model_id=client.model_id, block_hashes=[h]) for h in hashes_of(blocks)]
        chunks = list(method(iter(requests), timeout=30))
        headers = [c.header for c in chunks if c.WhichOneof("part") == "header"]
        assert [h.block_hash for h in headers] == hashes_of(blocks)
        assert sum(len(c.data) for c in chunks) == sum(h.data_bytes for h in headers)
        channel.close()


# ---- put


def test_32_puts_of_one_block_at_once_encode_it_once_and_all_are_answered(daemon: DaemonProcess) -> None:
    spec = tiny_spec(weights="heavy")
    results: list[pb.PutResult] = []
    with daemon.client(spec) as client:
        (block,) = chain(client, TOKENS[:4], ballast=8 << 20)  # long enough under way for all to meet
        client.match([block.block_hash])
        barrier = threading.Barrier(32)

        def put() -> None:
            barrier.wait()
            results.extend(client.put([block]))

        threads = [threading.Thread(target=put) for _ in range(32)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [r.code for r in results] == ["OK"] * 32
        assert {r.outcome for r in results} <= {pb.OUTCOME_STORED, pb.OUTCOME_ALREADY_HELD}
        status = daemon.status()
        assert status.counters['put_blocks_total{outcome="stored"}'] == 1
        assert status.counters["put_source_bytes_total"] == (8 << 20) + 512
        assert status.store.n_blocks == 1
        assert status.pool.put_bytes == 0
        assert same_tensors(dict(get_one(client, block).tensors), dict(block.tensors))


def test_a_whole_chain_in_one_stream_is_committed_in_order(shared_daemon: DaemonProcess) -> None:
    with shared_daemon.client(fresh_spec()) as client:
        blocks = chain(client, range(400))
        client.match([])  # registers the model
        results = put_parts(shared_daemon.target, (p for b in blocks for p in (header_of(client, b), *data_of(b))))
        assert [r.block_hash for r in results] == hashes_of(blocks)
        assert {r.outcome for r in results} == {pb.OUTCOME_STORED}
        assert all(r.source_bytes == 512 and r.stored_bytes > 0 for r in results)
        assert client.match(client.chain(range(400))).n_tokens == 400


def test_a_block_that_is_held_already_is_said_to_be(shared_daemon: DaemonProcess) -> None:
    with shared_daemon.client(fresh_spec()) as client:
        blocks = put_all(client, chain(client, TOKENS))
        assert [r.outcome for r in client.put(blocks)] == [pb.OUTCOME_ALREADY_HELD] * 4


def test_a_better_copy_is_not_lost_because_a_worse_one_is_under_way(daemon: DaemonProcess) -> None:
    spec = tiny_spec(weights="race")
    with daemon.client(spec) as client, daemon.client(spec) as other:
        (exact,) = chain(client, TOKENS[:4], ballast=16 << 20)
        other.match([exact.block_hash])  # both are registered before the race
        coded = replace(exact, lineage=FidelityKind.CODED)
        thread = threading.Thread(target=other.put, args=([coded],))
        thread.start()
        assert wait_until(lambda: daemon.status().pool.put_bytes > 0)
        (result,) = client.put([exact])
        thread.join()
        assert result.code == "OK"
        assert len(client.match([exact.block_hash]).blocks) == 1
