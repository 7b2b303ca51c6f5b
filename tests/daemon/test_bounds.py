"""What callers can make the daemon hold: threads, memory, long messages. It stays usable for everyone else."""

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import grpc
import pytest
from mistakes import MIB, SPEC, failing, fresh_chain, whole
from support import DaemonProcess, header_of, put_parts, wait_until

from kvcached_client import Client, Connection, Fingerprint
from kvcached_client._proto import kvcached_pb2 as pb
from kvcached_client.protocol import SERVICE, write_chunk

LONG = "n" * 100_000


@contextlib.contextmanager
def idle_streams(daemon: DaemonProcess, method: str, first: list[bytes], n_streams: int) -> Iterator[list[Any]]:
    """Open streams on which nothing comes any more after the first messages."""
    release = threading.Event()

    def messages() -> Iterator[bytes]:
        yield from first
        release.wait(60)

    with grpc.insecure_channel(daemon.target) as channel:
        yield [channel.stream_stream(f"/{SERVICE}/{method}")(messages(), timeout=60) for _ in range(n_streams)]
        release.set()


def test_a_caller_who_announces_a_block_and_sends_nothing_is_hung_up_on(daemon: DaemonProcess) -> None:
    daemon.restart("--idle-seconds", "1")
    with daemon.client(SPEC) as client:
        client.match([])
        (block,) = fresh_chain(client, 1, ballast=8 * MIB)
        with idle_streams(daemon, "Put", [write_chunk(header_of(client, block))], 1) as (call,):
            assert wait_until(lambda: daemon.status().pool.put_bytes > 8 * MIB)
            assert call.code() == grpc.StatusCode.CANCELLED
        assert wait_until(lambda: daemon.status().pool.put_bytes == 0)
        assert [result.code for result in client.put([block])] == ["OK"]
    assert "nothing came" in daemon.log.read_text()


@pytest.mark.parametrize("method", ["Put", "Get"])
def test_streams_that_idle_leave_room_for_everyone_else(daemon: DaemonProcess, method: str) -> None:
    daemon.restart("--idle-seconds", "3")
    with daemon.client(SPEC) as client:
        (block,) = fresh_chain(client, 1)
        with idle_streams(daemon, method, [], 100) as calls:
            assert wait_until(lambda: sum(call.done() for call in calls) >= 52)
            refused = [call for call in calls if call.done()]
            assert {call.code() for call in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
            assert {call.details() for call in refused} == {"48 streams are open, and no more are served: try later"}
            with Connection(daemon.target) as connection:
                assert connection.is_serving()
            assert daemon.status().pid
            assert wait_until(lambda: all(call.done() for call in calls))
            assert [result.code for result in client.put([block])] == ["OK"]


def test_a_caller_who_takes_no_results_is_not_read_from(shared_daemon: DaemonProcess, client: Client) -> None:
    # Refused at once, in many words, so that few results fill what gRPC itself buffers.
    header = pb.Header(model_id=client.model_id, block_hash=bytes(32), namespace="n" * 2000)
    n_headers, sent = 10_000, [0]

    def messages() -> Iterator[bytes]:
        for _ in range(n_headers):
            sent[0] += 1
            yield write_chunk(header)

    def has_stalled() -> bool:
        before = sent[0]
        time.sleep(0.5)
        return sent[0] == before > 0

    with grpc.insecure_channel(shared_daemon.target) as channel:
        results = channel.stream_stream(f"/{SERVICE}/Put")(messages(), timeout=120)
        assert wait_until(has_stalled)
        assert sent[0] < n_headers
        assert sum(1 for _ in results) == n_headers


def test_what_a_caller_said_is_quoted_in_part_only(shared_daemon: DaemonProcess, client: Client) -> None:
    requests: list[tuple[str, Any, str]] = [
        ("Match", pb.MatchRequest(model_id=client.model_id, namespace=LONG), "INVALID_ARGUMENT: a namespace has"),
        ("Match", pb.MatchRequest(model_id=LONG.encode()), "FAILED_PRECONDITION: unknown model"),
        ("SetConfig", pb.SetConfigRequest(values={LONG: "1"}), "INVALID_ARGUMENT: nnn"),
        ("SetConfig", pb.SetConfigRequest(values={"zstd_level": LONG}), "INVALID_ARGUMENT: zstd_level"),
        ("RegisterModel", pb.RegisterModelRequest(spec=replace(SPEC, kv_dtype=LONG).to_proto()), "INVALID_ARGUMENT"),
    ]
    for method, request, expected in requests:
        message = failing(shared_daemon, method, request)
        assert message.startswith(expected)
        assert message.endswith("characters)")
        assert len(message) < 1200


@pytest.mark.parametrize("name", ["block_hash", "parent_hash"])
def test_a_block_with_an_endless_hash_is_refused_alone(shared_daemon: DaemonProcess, client: Client, name: str) -> None:
    bad, good = fresh_chain(client, 1)[0], fresh_chain(client, 1)[0]
    header, data = whole(client, bad)[0], whole(client, bad)[1:]
    setattr(header, name, bytes(3 * MIB))
    refused, stored = put_parts(shared_daemon.target, [header, *data, *whole(client, good)])
    assert (refused.code, stored.code) == ("INVALID_ARGUMENT", "OK")
    assert refused.message == f"a {name.replace('_', ' ')} has 32 bytes, got {3 * MIB}"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (replace(SPEC, name="m" * 129), "a model's name has at most 128 bytes, got 'mmm"),
        (replace(SPEC, fingerprint=Fingerprint(weights="w" * 300_000)), "at most 262144 bytes, got 300"),
    ],
    ids=["name", "fingerprint"],
)
def test_a_model_that_takes_too_much_room_is_refused(shared_daemon: DaemonProcess, spec: Any, message: str) -> None:
    assert message in failing(shared_daemon, "RegisterModel", pb.RegisterModelRequest(spec=spec.to_proto()))
