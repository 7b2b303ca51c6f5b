"""Streams of requests with one answer: made on the thread that calls, bounded, and never hanging."""

import threading
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from impostors import impostor
from support import chain, same_tensors, tiny_spec

from kvcached_client import Client, Connection, DaemonError
from kvcached_client._proto import kvcached_pb2 as pb
from kvcached_client.protocol import CHUNK_BYTES
from kvcached_client.tensors import calibrate_requests, views

START = pb.CalibrateStart(model_id=b"m" * 32, seed=7)


def sample(n_tokens: int) -> dict[str, np.ndarray]:
    return {
        "keys": np.arange(n_tokens * 6, dtype=np.float16).reshape(1, 2, n_tokens, 3),
        "queries": np.ones((1, 4, 2, 3), np.float32),
    }


def test_a_stream_is_a_start_then_headers_each_with_its_data_in_chunks() -> None:
    arrays = [sample(5), sample(CHUNK_BYTES // 8)]
    headers = [pb.CalibrateHeader(part=pb.CALIBRATION_PART_FIT, first_position=n, n_tokens=5) for n in (0, 5)]
    requests = list(calibrate_requests(START, zip(headers, arrays, strict=True)))
    assert requests[0].start == START
    kinds = "".join(request.WhichOneof("part")[0] for request in requests)
    assert kinds.startswith("shd")
    assert all(len(request.data) <= CHUNK_BYTES for request in requests)
    for n, expected in enumerate(arrays):
        at = [i for i, kind in enumerate(kinds) if kind == "h"][n]
        header = requests[at].header
        data = b"".join(r.data for r in requests[at + 1 : at + 1 + len(kinds[at + 1 :].partition("h")[0])])
        assert (header.part, header.first_position) == (pb.CALIBRATION_PART_FIT, 5 * n)
        assert len(data) == header.data_bytes
        assert same_tensors(views(header.tensors, np.frombuffer(data, np.uint8)), expected)


def test_while_the_next_sample_is_made_the_last_bytes_of_the_one_before_trickle_in() -> None:
    arrays = {"keys": np.arange(6, dtype=np.uint8)}
    header = pb.CalibrateHeader(part=pb.CALIBRATION_PART_TUNE)
    samples = [None, (header, arrays), *[None] * 8, (header, arrays), None]
    requests = list(calibrate_requests(START, samples))
    assert [request.WhichOneof("part") for request in requests[:2]] == ["start", "header"]
    said = [request.data if request.data else request.WhichOneof("part") for request in requests[2:]]
    assert said == [b"\0", b"\1", b"\2", b"\3", b"\4", b"\5", "header", b"\0", bytes(range(1, 6))]


def test_requests_are_made_on_the_thread_that_calls_and_answered_once() -> None:
    received: list[pb.CalibrateRequest] = []

    def answer(requests: Iterator[bytes], _context: Any) -> bytes:
        received.extend(map(pb.CalibrateRequest.FromString, requests))
        return pb.CalibrateResponse(bundle=pb.BundleStatus(bundle_id=b"b")).SerializeToString()

    made_on = set()

    def requests() -> Iterator[pb.CalibrateRequest]:
        for n in range(100):
            made_on.add(threading.current_thread())
            yield pb.CalibrateRequest(data=bytes([n]))

    with impostor(Calibrate=answer) as target, Connection(target) as connection:
        assert connection.calibrate(requests(), 30).bundle.bundle_id == b"b"
    assert made_on == {threading.current_thread()}
    assert [request.data for request in received] == [bytes([n]) for n in range(100)]


def test_a_refusal_ends_the_making_of_requests() -> None:
    def refuse(_requests: Iterator[bytes], context: Any) -> bytes:
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, "not these")
        return b""

    made = 0

    def endless() -> Iterator[pb.InstallBundleRequest]:
        nonlocal made
        while True:
            made += 1
            yield pb.InstallBundleRequest(data=b"x")

    refused = pytest.raises(DaemonError, match="INVALID_ARGUMENT: not these")
    with impostor(InstallBundle=refuse) as target, Connection(target) as connection, refused:
        connection.install_bundle(endless(), 30)
    assert made < 100_000


def test_what_the_maker_of_requests_raises_reaches_the_caller_and_ends_the_call() -> None:
    begun, over = threading.Event(), threading.Event()

    def answer(requests: Iterator[bytes], _context: Any) -> bytes:
        try:
            for _ in requests:
                begun.set()
        finally:
            over.set()
        return b""

    def failing() -> Iterator[pb.CalibrateRequest]:
        yield pb.CalibrateRequest(start=START)
        begun.wait(10)
        raise RuntimeError("the model broke")

    with impostor(Calibrate=answer) as target, Connection(target) as connection:
        with pytest.raises(RuntimeError, match="the model broke"):
            connection.calibrate(failing(), 30)
        assert over.wait(10)


def test_nobody_there_and_nobody_answering_in_time_are_daemon_errors() -> None:
    release = threading.Event()

    def hang(_requests: Iterator[bytes], _context: Any) -> bytes:
        release.wait(20)
        return b""

    with impostor(Calibrate=hang) as target, Connection(target) as connection:
        with pytest.raises(DaemonError, match="DEADLINE_EXCEEDED"):
            connection.calibrate([pb.CalibrateRequest(start=START)], 0.2)
        release.set()
    with Connection(target) as connection, pytest.raises(DaemonError, match="UNAVAILABLE"):
        connection.calibrate([pb.CalibrateRequest(start=START)], 5)


def test_a_put_says_how_to_store_its_blocks() -> None:
    headers: list[pb.Header] = []

    def put(requests: Iterator[bytes], _context: Any) -> Iterator[bytes]:
        for request in requests:
            chunk = pb.Chunk.FromString(request)
            if chunk.WhichOneof("part") == "header":
                headers.append(chunk.header)
                yield pb.PutResult(code="OK").SerializeToString()

    with impostor(Put=put) as target, Client(tiny_spec(), target=target) as client:
        blocks = chain(client, range(8))
        client.put(blocks)
        client.put(blocks, store_as="x8", store_as_bundle=b"b" * 32)
    said = [(header.store_as, header.store_as_bundle) for header in headers]
    assert said == [("", b"")] * 2 + [("x8", b"b" * 32)] * 2
