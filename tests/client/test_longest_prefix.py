"""Match and Get in one round trip: what comes, what does not, and daemons that are old, slow or wrong."""

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from impostors import impostor
from support import (
    DaemonProcess,
    chain,
    damage_frame,
    hashes_of,
    put_all,
    put_parts,
    same_tensors,
    tiny_spec,
    wait_until,
)

from kvcached_client import Block, Client, FidelityKind, LayerKind, LayerSpec, Limits
from kvcached_client._proto import kvcached_pb2 as pb
from kvcached_client.protocol import write_chunk

SPEC = tiny_spec()
TOKENS = list(range(16))
STATE = LayerSpec(kind=LayerKind.STATE, opaque=True)


def counters(daemon: DaemonProcess) -> dict[str, float]:
    return dict(daemon.status().counters)


def prefix(client: Client, hashes: list[bytes], **fields: Any) -> list[Block]:
    return list(client.get_longest_prefix(hashes, **fields))


def test_the_leading_blocks_that_are_held_come_and_no_others(daemon: DaemonProcess) -> None:
    with daemon.client(SPEC) as client:
        blocks = chain(client, TOKENS)
        put_all(client, blocks[:3])
        for n_asked in range(5):
            found = prefix(client, hashes_of(blocks[:n_asked]))
            assert [block.block_hash for block in found] == hashes_of(blocks[: min(n_asked, 3)])
        assert all(same_tensors(dict(a.tensors), dict(b.tensors)) for a, b in zip(blocks, found, strict=False))
        assert prefix(client, [b"\1" * 32, *hashes_of(blocks)]) == []


@pytest.mark.parametrize(("at_least", "n_found"), [(0, 3), (1, 3), (3, 3), (4, 0), (9, 0)])
def test_fewer_than_are_worth_it_do_not_come(daemon: DaemonProcess, at_least: int, n_found: int) -> None:
    with daemon.client(SPEC) as client:
        blocks = chain(client, TOKENS)
        put_all(client, blocks[:3])
        before = counters(daemon).get("get_source_bytes_total", 0)
        assert len(prefix(client, hashes_of(blocks), at_least=at_least)) == n_found
        assert (counters(daemon).get("get_source_bytes_total", 0) > before) == bool(n_found)


def test_it_is_one_call_and_counted_as_one_lookup(daemon: DaemonProcess) -> None:
    with daemon.client(SPEC) as client:
        put_all(client, blocks := chain(client, TOKENS)[:3])
        before = counters(daemon)
        assert len(prefix(client, client.chain(TOKENS))) == len(blocks)
        after = counters(daemon)
        grown = {name: after[name] - before.get(name, 0) for name in after if after[name] != before.get(name, 0)}
        assert grown["lookup_tokens_total"] == 16
        assert grown["lookup_hit_tokens_total"] == 12
        calls = {name: n for name, n in grown.items() if name.startswith("rpc_requests") and "Status" not in name}
        assert calls == {'rpc_requests_total{method="Get",code="OK"}': 1}


def test_a_block_below_the_floor_ends_the_prefix(daemon: DaemonProcess) -> None:
    with daemon.client(SPEC) as client:
        blocks = chain(client, TOKENS)
        lossy = [
            Block(b.block_hash, b.parent_hash, b.index, b.token_ids, b.tensors, b.first_position, lineage=lineage)
            for b, lineage in zip(blocks, [FidelityKind.EXACT] * 2 + [FidelityKind.CODED] * 2, strict=True)
        ]
        put_all(client, lossy)
        assert len(prefix(client, hashes_of(blocks))) == 2
        assert len(prefix(client, hashes_of(blocks), floor=FidelityKind.CODED)) == 4


def test_a_damaged_block_ends_the_prefix(daemon: DaemonProcess) -> None:
    with daemon.client(SPEC) as client:
        blocks = put_all(client, chain(client, TOKENS))
        damage_frame(daemon, blocks[2].block_hash)
        assert [b.block_hash for b in prefix(client, hashes_of(blocks))] == hashes_of(blocks[:2])
        assert all(client.get(hashes_of(blocks[:2])))


def test_of_a_model_with_state_the_prefix_ends_where_generation_can_go_on(daemon: DaemonProcess) -> None:
    spec = replace(SPEC, layers=(*SPEC.layers, STATE))
    with daemon.client(spec) as client:
        blocks = [
            Block(b.block_hash, b.parent_hash, b.index, b.token_ids, b.tensors, b.first_position, boundary=b.index == 1)
            for b in chain(client, TOKENS)
        ]
        put_all(client, blocks)
        assert [b.block_hash for b in prefix(client, hashes_of(blocks))] == hashes_of(blocks[:2])
        assert prefix(client, hashes_of(blocks), at_least=3) == []


def test_a_consumer_that_has_enough_ends_the_call_and_the_client_goes_on(daemon: DaemonProcess) -> None:
    with daemon.client(SPEC) as client:
        blocks = put_all(client, chain(client, list(range(400)), ballast=100_000))
        items = client.get_longest_prefix(hashes_of(blocks))
        assert next(items).block_hash == blocks[0].block_hash
        items.close()  # type: ignore[attr-defined]
        assert len(prefix(client, hashes_of(blocks))) == 100


@pytest.mark.parametrize("segment_bytes", [0, Limits().segment_bytes], ids=["in-band", "as it comes"])
@pytest.mark.parametrize("call", ["get", "get_longest_prefix"])
def test_what_a_consumer_who_left_did_not_take_is_not_decoded(
    daemon: DaemonProcess, call: str, segment_bytes: int
) -> None:
    with Client(SPEC, target=daemon.target, limits=Limits(segment_bytes=segment_bytes)) as client:
        blocks = put_all(client, chain(client, list(range(400)), ballast=100_000))
        items = getattr(client, call)(hashes_of(blocks))
        assert next(items).block_hash == blocks[0].block_hash
        items.close()
        assert wait_until(lambda: (pool := daemon.status().pool).n_jobs == pool.get_bytes == 0)
        n_decoded = counters(daemon)['block_hits_total{fidelity="EXACT"}']
        assert 1 <= n_decoded < len(blocks) / 2  # some were under way


# ---- daemons that are not as they should be


def header(**fields: Any) -> bytes:
    return write_chunk(pb.Header(found=True, **fields))


def test_an_older_daemon_that_answers_every_hash_is_read_to_its_first_miss() -> None:
    hashes = [bytes([n]) * 32 for n in range(4)]

    def get(_requests: Any, _context: Any) -> Iterator[bytes]:
        for n, block_hash in enumerate(hashes):
            yield write_chunk(pb.Header(block_hash=block_hash, found=n != 1))
        ended.wait(30)

    ended = threading.Event()
    with impostor(Get=get) as target, Client(SPEC, target=target) as client:
        assert [block.block_hash for block in prefix(client, hashes)] == hashes[:1]
        ended.set()


def test_a_daemon_that_says_nothing_costs_what_a_match_may_and_counts_as_down() -> None:
    silent = threading.Event()

    def get(_requests: Any, _context: Any) -> Iterator[bytes]:
        silent.wait(30)
        return iter(())

    limits = Limits(match_seconds=0.2, get_seconds=600.0)
    with impostor(Get=get) as target, Client(SPEC, target=target, limits=limits) as client:
        for _ in range(5):
            assert prefix(client, [b"\1" * 32]) == []
        assert client._breaker.is_open
        silent.set()


def test_a_first_block_in_time_lets_the_others_take_longer() -> None:
    hashes = [bytes([n]) * 32 for n in range(2)]

    def get(_requests: Any, _context: Any) -> Iterator[bytes]:
        yield header(block_hash=hashes[0])
        time.sleep(0.5)
        yield header(block_hash=hashes[1])

    limits = Limits(match_seconds=0.25)
    with impostor(Get=get) as target, Client(SPEC, target=target, limits=limits) as client:
        assert len(prefix(client, hashes)) == 2


@pytest.mark.parametrize("answers", [[], [b"\xff\xff"], [header(block_hash=b"\2" * 32)]], ids=["none", "junk", "other"])
def test_a_wrong_answer_is_a_miss(answers: list[bytes]) -> None:
    with impostor(Get=lambda _requests, _context: iter(answers)) as target, Client(SPEC, target=target) as client:
        assert prefix(client, [b"\1" * 32]) == []


def test_without_a_daemon_nothing_comes(run_dir: Any) -> None:
    with Client(SPEC, target=f"unix:{run_dir}/nobody.sock") as client:
        assert prefix(client, [b"\1" * 32]) == []


def test_hashes_that_are_none_are_refused_with_a_reason_and_the_client_gets_nothing(daemon: DaemonProcess) -> None:
    with daemon.client(SPEC) as client:
        assert prefix(client, [b"short"]) == []
        assert put_parts(daemon.target, []) == []
