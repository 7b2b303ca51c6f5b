"""The client fails open: whatever becomes of the daemon, engines see misses and refusals, never an exception."""

import itertools
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from impostors import impostor
from support import DaemonProcess, chain, put_all, same_tensors, tiny_spec, wait_until

from kvcached_client import CircuitBreaker, Client, Limits, Match
from kvcached_client._proto import kvcached_pb2 as pb
from kvcached_client.protocol import write_chunk

SPEC = tiny_spec()
TOKENS = list(range(16))
# Generous where an answer is expected, and short where none will come.
HASTY = Limits(match_seconds=0.3, get_seconds=0.3, put_seconds=0.3)
NEVER_OPEN = 10**9


def patient_breaker() -> CircuitBreaker:
    """A breaker that stays out of the way."""
    return CircuitBreaker(n_failures=NEVER_OPEN)


def refused(results: list[pb.PutResult]) -> set[tuple[int, str]]:
    return {(result.outcome, result.code) for result in results}


UNAVAILABLE = {(pb.OUTCOME_REFUSED, "UNAVAILABLE")}


def test_without_a_daemon_everything_is_a_miss_or_refused(run_dir: Path) -> None:
    with Client(SPEC, target=f"unix:{run_dir / 'nobody.sock'}") as client:
        blocks = chain(client, TOKENS)
        assert client.match(client.chain(TOKENS)) == Match()
        assert list(client.get(client.chain(TOKENS))) == [None] * 4
        assert refused(client.put(blocks)) == UNAVAILABLE
        assert [r.block_hash for r in client.put(blocks)] == [b.block_hash for b in blocks]


def test_a_closed_client_misses_and_refuses(daemon: DaemonProcess, caplog: pytest.LogCaptureFixture) -> None:
    client = daemon.client(SPEC)
    blocks = put_all(client, chain(client, TOKENS))
    client.close()
    assert client.match(client.chain(TOKENS)) == Match()
    assert list(client.get(client.chain(TOKENS))) == [None] * 4
    results = client.put(blocks)
    assert refused(results) == UNAVAILABLE
    assert {result.message for result in results} == {"CANCELLED: this connection is closed"}
    assert client.delete(client.chain(TOKENS)) == 0
    assert not client.announce(pb.Engine(name="late"))
    assert "Match failed: CANCELLED: this connection is closed" in caplog.text
    client.close()


def test_a_client_closed_in_the_middle_of_a_get_makes_the_rest_a_miss(daemon: DaemonProcess) -> None:
    client = daemon.client(SPEC)
    hashes = [block.block_hash for block in put_all(client, chain(client, range(40), ballast=4 << 20))]
    items = client.get(hashes)
    assert next(items) is not None
    client.close()
    rest = list(items)
    assert len(rest) == 9
    assert rest[-1] is None


def test_a_daemon_killed_between_calls_is_a_miss_and_its_successor_a_hit(daemon: DaemonProcess) -> None:
    with Client(SPEC, target=daemon.target, breaker=patient_breaker()) as client:
        blocks = put_all(client, chain(client, TOKENS))
        daemon.kill()
        assert client.match(client.chain(TOKENS)) == Match()
        assert list(client.get(client.chain(TOKENS))) == [None] * 4
        assert refused(client.put(blocks)) == UNAVAILABLE
        daemon.start()
        assert wait_until(lambda: client.match(client.chain(TOKENS)).n_tokens == 16)
        assert all(client.get(client.chain(TOKENS)))


def test_a_daemon_killed_during_a_get_makes_the_rest_a_miss(daemon: DaemonProcess) -> None:
    with daemon.client(SPEC) as client:
        blocks = put_all(client, chain(client, range(40), ballast=4 << 20))
        items = client.get([b.block_hash for b in blocks])
        first = next(items)
        assert first is not None
        daemon.kill()
        rest = list(items)
        assert len(rest) == 9
        assert rest[-1] is None
        good = list(itertools.takewhile(lambda item: item is not None, rest))
        assert rest[len(good) :] == [None] * (9 - len(good))
        for block, again in zip(blocks[1:], good, strict=False):
            assert again is not None
            assert same_tensors(dict(block.tensors), dict(again.tensors))


def test_a_daemon_killed_during_a_put_leaves_what_it_answered(daemon: DaemonProcess) -> None:
    with Client(SPEC, target=daemon.target, limits=Limits(in_flight_bytes=1 << 20)) as client:
        blocks = chain(client, range(80), ballast=1 << 20)
        killer = threading.Thread(
            target=lambda: (wait_until(lambda: daemon.status().store.n_blocks >= 2), daemon.kill())
        )
        killer.start()
        results = client.put(blocks)
        killer.join()
        assert [r.block_hash for r in results] == [b.block_hash for b in blocks]
        n_good = sum(r.code == "OK" for r in results)
        assert {r.code for r in results[n_good:]} <= {"UNAVAILABLE"}
    daemon.start()
    with daemon.client(SPEC) as client:
        assert all(client.get([b.block_hash for b in blocks[:n_good]]))


def test_a_stopped_daemon_is_a_miss_within_the_deadline_and_works_when_continued(daemon: DaemonProcess) -> None:
    assert daemon.process is not None
    with (
        daemon.client(SPEC) as patient,
        Client(SPEC, target=daemon.target, limits=HASTY, breaker=patient_breaker()) as client,
    ):
        blocks = put_all(patient, chain(patient, TOKENS))
        assert client.match(client.chain(TOKENS)).n_tokens == 16
        daemon.process.send_signal(signal.SIGSTOP)
        os.waitpid(daemon.process.pid, os.WUNTRACED)  # until all of its threads have stopped
        try:
            start = time.monotonic()
            assert client.match(client.chain(TOKENS)) == Match()
            assert list(client.get(client.chain(TOKENS))) == [None] * 4
            assert refused(client.put(blocks)) == UNAVAILABLE
            assert time.monotonic() - start < 20
        finally:
            daemon.process.send_signal(signal.SIGCONT)
        assert wait_until(lambda: client.match(client.chain(TOKENS)).n_tokens == 16)
        assert all(patient.get(client.chain(TOKENS)))


@contextmanager
def rude_server(answer: bytes | None, *, unix: Path | None = None) -> Iterator[str]:
    """Accepts connections, answers each with some bytes, and hangs up; with None, says nothing and stays."""
    kept: list[socket.socket] = []
    listener = socket.socket(socket.AF_UNIX if unix else socket.AF_INET)
    listener.bind(str(unix) if unix else ("127.0.0.1", 0))
    listener.listen()

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            kept.append(connection)
            if answer is not None:
                with connection:
                    connection.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"unix:{unix}" if unix else f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()
        for connection in kept:
            connection.close()


@pytest.mark.parametrize("transport", ["tcp", "unix"])
@pytest.mark.parametrize("answer", [b"\0garbage\xff" * 100, b"HTTP/1.1 400 Bad Request\r\n\r\n", b"", None])
def test_a_server_that_speaks_something_else_is_a_miss(run_dir: Path, answer: bytes | None, transport: str) -> None:
    unix = run_dir / "rude.sock" if transport == "unix" else None
    with (
        rude_server(answer, unix=unix) as target,
        Client(SPEC, target=target, limits=HASTY, breaker=patient_breaker()) as client,
    ):
        assert client.match(client.chain(TOKENS)) == Match()
        assert list(client.get(client.chain(TOKENS))) == [None] * 4
        assert refused(client.put(chain(client, TOKENS))) == UNAVAILABLE


def header(**fields: Any) -> bytes:
    return write_chunk(pb.Header(**fields))


HASHES = tuple(bytes([n]) * 32 for n in range(1, 4))
FLOATS = [pb.Tensor(name="x", dtype="float32", shape=[2])]
WRONG_GETS: dict[str, list[bytes]] = {
    "nothing": [],
    "data first": [write_chunk(b"data")],
    "another block": [header(block_hash=b"\7" * 32, found=True)],
    "no chunk": [b"\xff\xff\xff"],
    "too little data": [header(block_hash=HASHES[0], found=True, tensors=FLOATS, data_bytes=8), write_chunk(b"123")],
    "too much data": [header(block_hash=HASHES[0], found=True, tensors=FLOATS, data_bytes=8), write_chunk(bytes(99))],
    "wrong size": [header(block_hash=HASHES[0], found=True, tensors=FLOATS, data_bytes=9), write_chunk(bytes(9))],
    "absurd size": [
        header(
            block_hash=HASHES[0],
            found=True,
            tensors=[pb.Tensor(name="x", dtype="int8", shape=[1 << 31, 1 << 10])],
            data_bytes=1 << 41,
        )
    ],
    "wrong dtype": [header(block_hash=HASHES[0], found=True, tensors=[pb.Tensor(name="x", dtype="float9", shape=[0])])],
    "impossible shape": [
        header(
            block_hash=HASHES[0],
            found=True,
            tensors=[pb.Tensor(name="x", dtype="int8", shape=[0, 2**32 - 1, 2**32 - 1, 2**32 - 1])],
        )
    ],
    "unknown fidelity": [header(block_hash=HASHES[0], found=True, lineage=77)],
}


@pytest.mark.parametrize("messages", WRONG_GETS.values(), ids=WRONG_GETS.keys())
def test_a_get_that_is_answered_wrongly_is_a_miss(messages: list[bytes]) -> None:
    with impostor(Get=lambda _requests, _context: iter(messages)) as target, Client(SPEC, target=target) as client:
        assert list(client.get(HASHES)) == [None] * 3


RESULT = pb.PutResult(outcome=pb.OUTCOME_STORED, code="OK").SerializeToString()


@pytest.mark.parametrize("answers", [[], [RESULT], [b"\xff\xff"], [RESULT] * 9], ids=["none", "few", "junk", "many"])
def test_a_put_that_is_answered_wrongly_has_one_result_for_each_block(answers: list[bytes]) -> None:
    def put(_requests: Any, _context: Any) -> Iterator[bytes]:
        return iter(answers)

    with impostor(Put=put) as target, Client(SPEC, target=target) as client:
        blocks = chain(client, TOKENS)
        results = client.put(blocks)
        assert len(results) == len(blocks)
        assert all(r.code in ("OK", "UNAVAILABLE") for r in results)


@pytest.mark.parametrize(
    "response",
    [b"\xff\xff", pb.MatchResponse(blocks=[pb.HeldBlock(n_tokens=4)] * 9).SerializeToString()],
    ids=["junk", "more than asked"],
)
def test_a_match_that_is_answered_wrongly_never_claims_more_than_was_asked(response: bytes) -> None:
    with impostor(Match=lambda _request, _context: response) as target, Client(SPEC, target=target) as client:
        match = client.match(HASHES)
        assert len(match.blocks) == len(match.hashes) <= 3
        assert match.n_tokens <= 12


# ---- the circuit breaker, and daemons that forget


class Counting:
    """How often somebody knocked."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, _request: bytes, context: Any) -> bytes:
        self.calls += 1
        context.abort(grpc.StatusCode.UNAVAILABLE, "not now")
        return b""


def test_after_failures_in_a_row_nobody_is_asked_until_the_pause_is_over() -> None:
    now, knocks = [0.0], Counting()
    breaker = CircuitBreaker(n_failures=3, pause_seconds=10.0, clock=lambda: now[0])
    with impostor(Match=knocks) as target, Client(SPEC, target=target, breaker=breaker) as client:
        for _ in range(20):
            assert client.match(HASHES) == Match()
        assert knocks.calls == 3
        assert list(client.get(HASHES)) == [None] * 3
        (result,) = client.put(chain(client, TOKENS[:4]))
        assert "circuit breaker is open" in result.message
        now[0] += 11
        client.match(HASHES)
        client.match(HASHES)
        assert knocks.calls == 4


def test_refusals_do_not_open_the_circuit(daemon: DaemonProcess) -> None:
    breaker = CircuitBreaker(n_failures=1)
    with Client(SPEC, target=daemon.target, breaker=breaker) as client:
        for _ in range(3):
            assert client.match([b"short"]) == Match()
            assert list(client.get([b"short"])) == [None]
        orphan = chain(client, TOKENS)[2]
        assert refused(client.put([orphan])) == {(pb.OUTCOME_REFUSED, "FAILED_PRECONDITION")}
        assert not breaker.is_open


@pytest.mark.parametrize("first_call", ["match", "get", "put"])
def test_a_client_registers_its_model_again_with_a_daemon_that_lost_its_store(
    daemon: DaemonProcess, first_call: str
) -> None:
    with Client(SPEC, target=daemon.target, breaker=patient_breaker()) as client:
        blocks = put_all(client, chain(client, TOKENS))
        daemon.stop()
        daemon.store.rename(daemon.directory / "old")
        daemon.start()
        hashes = client.chain(TOKENS)
        calls: dict[str, Callable[[], Any]] = {
            "match": lambda: client.match(hashes).n_tokens,
            "get": lambda: list(client.get(hashes)),
            "put": lambda: refused(client.put(blocks)),
        }
        nothing = {"match": 0, "get": [None] * 4, "put": {(pb.OUTCOME_REFUSED, "FAILED_PRECONDITION")}}
        assert calls[first_call]() == nothing[first_call]
        assert wait_until(lambda: all(r.code == "OK" for r in client.put(blocks)))
        assert all(client.get(hashes))
