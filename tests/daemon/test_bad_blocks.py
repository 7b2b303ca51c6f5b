"""Blocks that must not be put: each is refused with its status and with words that say what is wrong."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
from mistakes import (
    MIB,
    Change,
    fresh_chain,
    is_held,
    raw_stream,
    set_fields,
    set_tensor,
    set_tokens,
    whole,
)
from support import DaemonProcess, data_of, header_of, put_parts, same_tensors, wait_until

from kvcached_client import Block, Client, Connection, DaemonError, block_hash
from kvcached_client._proto import kvcached_pb2 as pb
from kvcached_client.protocol import Part, write_chunk


def put_error(daemon: DaemonProcess, parts: list[Part]) -> DaemonError:
    with pytest.raises(DaemonError) as raised:
        put_parts(daemon.target, parts)
    return raised.value


# ---- headers that contradict themselves or the model


def move_to(namespace: str) -> Change:
    """Another namespace, and the hash that goes with it."""

    def change(header: pb.Header) -> None:
        header.namespace = namespace
        header.block_hash = block_hash(header.parent_hash, header.token_ids, namespace)

    return change


REFUSALS: dict[str, tuple[Change, str, list[str]]] = {
    "unknown model": (set_fields(model_id=b"\1" * 32), "FAILED_PRECONDITION", ["unknown model 0101", "register"]),
    "no model": (set_fields(model_id=b""), "FAILED_PRECONDITION", ["unknown model (empty)"]),
    "partial block": (set_tokens(1, 2, 3), "INVALID_ARGUMENT", ["only full blocks of 4 tokens", "3 token ids"]),
    "wrong n_tokens": (set_fields(n_tokens=3), "INVALID_ARGUMENT", ["only full blocks of 4 tokens", "n_tokens 3"]),
    "no tokens": (set_tokens(), "INVALID_ARGUMENT", ["0 token ids"]),
    "tokens of another hash": (set_tokens(9, 9, 9, 9), "INVALID_ARGUMENT", ["hash does not match its token ids"]),
    "wrong hash": (set_fields(block_hash=b"\7" * 32), "INVALID_ARGUMENT", ["expected", "got 0707"]),
    "short parent": (set_fields(parent_hash=b"\7"), "INVALID_ARGUMENT", ["a parent hash has 32 bytes, got 1"]),
    "namespace of another hash": (set_fields(namespace="x"), "INVALID_ARGUMENT", ["does not match its token ids"]),
    "namespace too long": (move_to("é" * 128), "INVALID_ARGUMENT", ["a namespace has at most 255 bytes"]),
    "position": (set_fields(first_position=2**31 - 4), "INVALID_ARGUMENT", ["below 2**31", "got first_position"]),
    "wide position": (set_fields(first_position=2**64 - 4), "INVALID_ARGUMENT", ["positions must be below 2**31"]),
    "shape": (set_tensor(0, shape=[2, 2, 4, 9]), "INVALID_ARGUMENT", ["(2, 2, 4, 8)", "(2, 2, 4, 9)"]),
    "dtype": (set_tensor(1, dtype="bfloat16"), "INVALID_ARGUMENT", ["float16", "got", "bfloat16"]),
    "unknown dtype": (set_tensor(1, dtype="float9"), "INVALID_ARGUMENT", ["dtype of 'values'", "'float9'"]),
    "missing tensor": (lambda h: h.tensors.pop(), "INVALID_ARGUMENT", ["dense tensors of this model are", "values"]),
    "duplicate tensor": (set_tensor(1, name="keys"), "INVALID_ARGUMENT", ["unique", "'keys'"]),
    "nameless tensor": (lambda h: h.tensors.add(dtype="int8"), "INVALID_ARGUMENT", ["of 1 to 128 bytes"]),
    "too many dimensions": (
        lambda h: h.tensors.add(name="x", dtype="int8", shape=[1] * 9),
        "INVALID_ARGUMENT",
        ["'x' may have 8 dimensions"],
    ),
    "impossible dimensions": (
        lambda h: h.tensors.add(name="x", dtype="int8", shape=[0, 2**32 - 1, 2**32 - 1]),
        "INVALID_ARGUMENT",
        ["'x' may have"],
    ),
    "too many tensors": (
        lambda h: h.tensors.extend(pb.Tensor(name=str(n), dtype="int8", shape=[0]) for n in range(4096)),
        "INVALID_ARGUMENT",
        ["at most 4096 tensors"],
    ),
    "too large": (
        lambda h: (
            h.tensors.add(name="x", dtype="int8", shape=[1 << 31]),
            h.__setattr__("data_bytes", 512 + (1 << 31)),
        ),
        "INVALID_ARGUMENT",
        [f"a block of {512 + (1 << 31)} bytes", "max_block_bytes"],
    ),
    "size that is not the tensors'": (
        set_fields(data_bytes=99),
        "INVALID_ARGUMENT",
        ["take 512", "data_bytes says 99"],
    ),
    "not exact": (
        lambda h: h.fidelity.MergeFrom(pb.Fidelity(kind=pb.FIDELITY_KIND_CODED)),
        "INVALID_ARGUMENT",
        ["fidelity EXACT", "CODED"],
    ),
    "unknown fidelity": (
        lambda h: h.fidelity.MergeFrom(pb.Fidelity(kind=77)),  # type: ignore[arg-type]
        "INVALID_ARGUMENT",
        ["not a fidelity", "77"],
    ),
    "unknown lineage": (set_fields(lineage=77), "INVALID_ARGUMENT", ["not a fidelity", "77"]),
    "unknown floor": (set_fields(min_fidelity=77), "INVALID_ARGUMENT", ["not a fidelity", "77"]),
    "index": (set_fields(index=5), "FAILED_PRECONDITION", ["index", "must be (0, 0)", "got (5, 0)"]),
}


@pytest.mark.parametrize(("change", "code", "words"), REFUSALS.values(), ids=REFUSALS.keys())
def test_a_block_with_a_wrong_header_is_refused_alone_and_in_words(
    shared_daemon: DaemonProcess, client: Client, change: Change, code: str, words: list[str]
) -> None:
    """The blocks before and after it in the stream are stored, and the results come in the order of the headers."""
    (before,), (bad,), (after,) = (fresh_chain(client, 1) for _ in range(3))
    header = header_of(client, bad)
    change(header)
    # What is sent is what was declared, or, where that would be gigabytes, nothing more for this block.
    data = [bytes(header.data_bytes)] if header.data_bytes <= MIB else []
    tail = whole(client, after) if data else []
    first, refusal, *last = put_parts(shared_daemon.target, [*whole(client, before), header, *data, *tail])
    assert (refusal.outcome, refusal.code) == (pb.OUTCOME_REFUSED, code)
    assert refusal.block_hash == header.block_hash
    assert [word for word in words if word not in refusal.message] == [], refusal.message
    assert [r.code for r in [first, *last]] == ["OK"] * (2 if data else 1)
    assert is_held(client, before, bad, after) == [True, False, bool(data)]


def test_a_chain_with_a_gap_is_refused_behind_it(client: Client) -> None:
    blocks = fresh_chain(client, 4)
    results = client.put([blocks[0], *blocks[2:]])
    assert [r.code for r in results] == ["OK", "FAILED_PRECONDITION", "FAILED_PRECONDITION"]
    assert f"the parent {blocks[1].block_hash.hex()} of block 2 is not held" in results[1].message
    assert is_held(client, *blocks) == [True, False, False, False]


def test_a_child_is_refused_until_its_parent_is_put(client: Client) -> None:
    first, second = fresh_chain(client, 2)
    assert [[r.code for r in client.put([block])] for block in (second, first, second)] == [
        ["FAILED_PRECONDITION"],
        ["OK"],
        ["OK"],
    ]


def test_a_position_that_does_not_follow_is_refused(client: Client) -> None:
    first, second = fresh_chain(client, 2)
    results = client.put([first, replace(second, first_position=5)])
    assert [r.code for r in results] == ["OK", "FAILED_PRECONDITION"]
    assert "must be (1, 4) here, got (1, 5)" in results[1].message


def test_tensors_of_no_bytes_are_stored(client: Client) -> None:
    (block,) = fresh_chain(client, 1)
    tensors = {**block.tensors, "none": np.empty((3, 0), np.int32)}
    (result,) = client.put([replace(block, tensors=tensors)])
    assert result.code == "OK"
    (again,) = client.get([block.block_hash])
    assert again is not None
    assert same_tensors(dict(again.tensors), tensors)


# ---- streams that disagree with their headers


def more_data(client: Client, block: Block) -> list[Part]:
    return [*whole(client, block), b"one byte too many"]


def a_chunk_too_long(client: Client, block: Block) -> list[Part]:
    return [header_of(client, block), bytes(513)]


def a_header_too_soon(client: Client, block: Block) -> list[Part]:
    return [header_of(client, block), bytes(100), header_of(client, block)]


def the_end_too_soon(client: Client, block: Block) -> list[Part]:
    return [header_of(client, block), bytes(100)]


def data_without_header(_client: Client, _block: Block) -> list[Part]:
    return [b"data"]


LIES: list[tuple[Callable[[Client, Block], list[Part]], str]] = [
    (more_data, "expected a header, got 17 bytes of data"),
    (a_chunk_too_long, "512 bytes was declared; after 0 came 513 bytes of data"),
    (a_header_too_soon, "512 bytes was declared; after 100 came a header for"),
    (the_end_too_soon, "512 bytes was declared; after 100 came the end of the stream"),
    (data_without_header, "expected a header, got 4 bytes of data"),
]


@pytest.mark.parametrize(("lie", "message"), LIES, ids=lambda v: getattr(v, "__name__", None))
def test_a_stream_that_disagrees_with_its_headers_ends(
    shared_daemon: DaemonProcess, client: Client, lie: Callable[[Client, Block], list[Part]], message: str
) -> None:
    good, bad = fresh_chain(client, 2)
    error = put_error(shared_daemon, [*whole(client, good), *lie(client, bad)])
    assert error.code == "INVALID_ARGUMENT"
    assert message in error.message
    assert wait_until(lambda: is_held(client, good) == [True])
    assert is_held(client, bad) == [lie is more_data]
    assert shared_daemon.status().pool.put_bytes == 0


@pytest.mark.parametrize("data", [[bytes(600)], [bytes(40), pb.Header()]], ids=["longer", "header"])
def test_a_refused_block_that_disagrees_with_its_header_ends_the_stream_too(
    shared_daemon: DaemonProcess, client: Client, data: list[Part]
) -> None:
    header = header_of(client, fresh_chain(client, 1)[0])
    header.block_hash = bytes(32)
    error = put_error(shared_daemon, [header, *data])
    assert (error.code, "bytes of data expected, got" in error.message) == ("INVALID_ARGUMENT", True)


def test_after_a_refused_block_a_client_may_send_nothing_more(shared_daemon: DaemonProcess, client: Client) -> None:
    header = header_of(client, fresh_chain(client, 1)[0])
    header.block_hash = bytes(32)
    (result,) = put_parts(shared_daemon.target, [header])
    assert result.code == "INVALID_ARGUMENT"


def test_a_stream_that_is_cut_off_stores_nothing_of_its_last_block(
    shared_daemon: DaemonProcess, client: Client
) -> None:
    good, bad = fresh_chain(client, 2, ballast=3 * MIB)
    half_way = threading.Event()

    def parts() -> Iterator[Part]:
        yield from whole(client, good)
        yield header_of(client, bad)
        yield next(iter(data_of(bad)))
        half_way.wait(timeout=60)  # as a process that was suspended

    with Connection(shared_daemon.target) as connection:
        results = connection.put(parts(), timeout=60)
        assert next(results).code == "OK"
        assert wait_until(lambda: shared_daemon.status().pool.put_bytes == 3 * MIB + 512)
        results.close()  # type: ignore[attr-defined]
        half_way.set()
    assert wait_until(lambda: shared_daemon.status().pool.put_bytes == 0)
    assert is_held(client, good, bad) == [True, False]
    assert [r.code for r in client.put([bad])] == ["OK"]


def test_a_put_whose_time_is_up_gives_its_room_back(shared_daemon: DaemonProcess, client: Client) -> None:
    (block,) = fresh_chain(client, 1)

    def parts() -> Iterator[Part]:
        yield header_of(client, block)
        time.sleep(1.5)

    with pytest.raises(DaemonError, match="DEADLINE_EXCEEDED"):
        put_parts(shared_daemon.target, parts(), timeout=0.5)
    assert wait_until(lambda: shared_daemon.status().pool.put_bytes == 0)


def test_a_message_above_the_limit_is_refused(shared_daemon: DaemonProcess, client: Client) -> None:
    (block,) = fresh_chain(client, 1, ballast=8 * MIB)
    messages = [write_chunk(header_of(client, block)), write_chunk(bytes(8 * MIB))]
    code, details = raw_stream(shared_daemon, "Put", messages)
    assert code == "RESOURCE_EXHAUSTED"
    assert "larger than max" in details
    assert wait_until(lambda: shared_daemon.status().pool.put_bytes == 0)
    assert is_held(client, block) == [False]
