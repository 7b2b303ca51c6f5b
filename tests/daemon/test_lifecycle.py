"""Starting, stopping, and everything that can be in the way of either."""

import os
import socket
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import lmdb
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from support import DaemonProcess, chain, damage_frame, data_of, header_of, same_tensors, tiny_spec, wait_until

from kvcached_client import Connection, DaemonError
from kvcached_client._proto import kvcached_pb2 as pb
from kvcached_client.paths import MAX_SOCKET_PATH_BYTES
from kvcached_client.protocol import Part

SPEC = tiny_spec()
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


def refusal(daemon: DaemonProcess, *flags: str) -> tuple[int, str]:
    """Exit code and log of a daemon that cannot start."""
    process = daemon.launch(*flags)
    code = process.wait(timeout=60)
    return code, daemon.log.read_text()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# ---- stopping


def test_sigterm_tells_health_watchers_exits_0_and_removes_the_socket(daemon: DaemonProcess) -> None:
    with grpc.insecure_channel(daemon.target) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "kvcached.v1.KvCache"):
            assert health.Check(health_pb2.HealthCheckRequest(service=service), timeout=10).status == SERVING
        with pytest.raises(grpc.RpcError) as caught:
            health.Check(health_pb2.HealthCheckRequest(service="other"), timeout=10)
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND
        watch = health.Watch(health_pb2.HealthCheckRequest(service="kvcached.v1.KvCache"), timeout=60)
        assert next(watch).status == SERVING
        seen = []
        watcher = threading.Thread(target=lambda: seen.append(next(watch).status))
        watcher.start()
        assert daemon.stop() == 0
        watcher.join(30)
        assert seen == [NOT_SERVING]
    assert not daemon.socket.exists()


def test_what_was_answered_survives_a_stop(daemon: DaemonProcess) -> None:
    with daemon.client(SPEC) as client:
        blocks = chain(client, list(range(40)))
        assert {result.code for result in client.put(blocks)} == {"OK"}
        assert daemon.stop() == 0
        daemon.start()
        found = list(client.get([block.block_hash for block in blocks]))
    for block, again in zip(blocks, found, strict=True):
        assert again is not None
        assert same_tensors(dict(block.tensors), dict(again.tensors))


def test_sigterm_under_load_drains_and_leaves_a_sound_store(daemon: DaemonProcess) -> None:
    stop, answered = threading.Event(), []

    def load(seed: int) -> None:
        with daemon.client(SPEC) as client:
            while not stop.is_set():
                blocks = chain(client, [seed + len(answered)] * 20, ballast=200_000)
                answered.extend(result.block_hash for result in client.put(blocks) if result.code == "OK")

    threads = [threading.Thread(target=load, args=(1000 * i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    while len(answered) < 10:
        time.sleep(0.01)
    assert daemon.stop() == 0
    stop.set()
    for thread in threads:
        thread.join(60)
    daemon.start()
    with Connection(daemon.target) as connection:
        report = connection.call("Check", pb.CheckRequest(frames=True))
    assert list(report.problems) == []
    assert list(daemon.status().store.set_aside) == []


def test_a_stream_that_idles_does_not_keep_the_daemon_beyond_its_drain_time(run_dir: Path) -> None:
    daemon = DaemonProcess(run_dir, "--drain-seconds", "0.5")
    daemon.start()
    release = threading.Event()
    ended = []

    def one_block_and_then_nothing() -> Iterator[Part]:
        with daemon.client(SPEC) as client:
            client.match([bytes(32)])  # registers the model
            (block,) = chain(client, [1, 2, 3, 4])
            yield header_of(client, block)
            yield from data_of(block)
        release.wait(60)

    def consume() -> None:
        with Connection(daemon.target) as connection:
            try:
                ended.extend(result.code for result in connection.put(one_block_and_then_nothing(), timeout=60))
            except DaemonError as error:
                ended.append(error.code)

    thread = threading.Thread(target=consume)
    thread.start()
    assert wait_until(lambda: ended == ["OK"])  # the result comes while the stream is open
    assert daemon.stop() == 0
    release.set()
    thread.join(30)
    assert len(ended) == 2


# ---- starting


def test_the_socket_and_the_store_are_for_their_owner_only(daemon: DaemonProcess) -> None:
    assert mode(daemon.socket) == 0o600
    assert mode(daemon.socket.parent) == 0o700
    assert mode(daemon.store) == 0o700
    assert {mode(path) & 0o077 for path in daemon.store.rglob("*")} == {0}


def test_reflection_names_the_service(daemon: DaemonProcess) -> None:
    with grpc.insecure_channel(daemon.target) as channel:
        assert "kvcached.v1.KvCache" in ProtoReflectionDescriptorDatabase(channel).get_services()


def test_a_second_daemon_on_the_same_store_is_refused_and_told_who_holds_it(daemon: DaemonProcess) -> None:
    assert daemon.process
    code, log = refusal(daemon, "--socket-path", str(daemon.directory / "other/k.sock"))
    assert code == 1
    assert f"is held by kvcached, pid {daemon.process.pid}, socket {daemon.socket}" in log
    assert daemon.status().pid == daemon.process.pid


def test_a_second_daemon_on_the_same_socket_is_refused_and_the_first_unharmed(daemon: DaemonProcess) -> None:
    code, log = refusal(daemon, "--store-path", str(daemon.directory / "other"))
    assert code == 1
    assert f"another daemon answers on {daemon.socket}" in log
    assert daemon.process
    assert daemon.status().pid == daemon.process.pid


def test_the_socket_of_a_killed_daemon_is_replaced(daemon: DaemonProcess) -> None:
    daemon.kill()
    assert daemon.socket.exists()
    daemon.start()
    assert daemon.status().store.n_blocks == 0


def test_a_file_in_the_place_of_the_socket_is_left_alone(run_dir: Path) -> None:
    daemon = DaemonProcess(run_dir)
    daemon.socket.parent.mkdir(mode=0o700)
    daemon.socket.write_text("precious")
    code, log = refusal(daemon)
    assert code == 1
    assert f"{daemon.socket} exists and is not a socket" in log
    assert daemon.socket.read_text() == "precious"


def test_a_socket_path_that_is_too_long_is_refused_with_the_limit(run_dir: Path) -> None:
    path = run_dir / ("x" * MAX_SOCKET_PATH_BYTES) / "k.sock"
    code, log = refusal(DaemonProcess(run_dir), "--socket-path", str(path))
    assert code == 1
    assert f"at most {MAX_SOCKET_PATH_BYTES} are possible: set socket_path" in log


def test_a_directory_that_is_open_to_others_is_refused_and_left_alone(run_dir: Path) -> None:
    daemon = DaemonProcess(run_dir)
    daemon.socket.parent.mkdir(mode=0o755)
    daemon.socket.parent.chmod(0o755)
    code, log = refusal(daemon)
    assert code == 1
    assert f"{daemon.socket.parent} of the socket is open to others (mode 0755)" in log
    assert mode(daemon.socket.parent) == 0o755


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory to somebody else")
def test_a_directory_of_somebody_else_is_refused(run_dir: Path) -> None:
    daemon = DaemonProcess(run_dir)
    daemon.socket.parent.mkdir(mode=0o700)
    os.chown(daemon.socket.parent, 12345, 12345)
    code, log = refusal(daemon)
    assert code == 1
    assert "belongs to user 12345, not to 0 who runs this daemon" in log


def test_tcp_is_off_unless_it_is_asked_for(run_dir: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    daemon = DaemonProcess(run_dir)
    daemon.start()
    assert daemon.process
    assert psutil.Process(daemon.process.pid).net_connections("inet") == []
    daemon.stop()
    daemon = DaemonProcess(run_dir, "--listen", address)
    daemon.start()
    with Connection(address) as connection:
        assert connection.call("Status", pb.StatusRequest()).pid == daemon.process.pid  # type: ignore[union-attr]
    daemon.stop()


def test_an_address_in_use_is_refused(daemon: DaemonProcess) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        other = DaemonProcess(daemon.directory / "o")
        other.directory.mkdir()
        code, log = refusal(other, "--listen", address)
    assert code == 1
    assert f"cannot listen on {other.socket} {address}" in log
    assert not other.socket.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--quota-bytes", "3"], "quota_bytes (flag): Input should be greater than or equal to 1048576, got '3'"),
        (["--workers", "none"], "workers (flag)"),
        (["--config", "/nonexistent/kvcached.toml"], "/nonexistent/kvcached.toml cannot be read"),
        (["--nonsense"], "No such option"),
        (["--quota-bytes", "9" * 30], "quota_bytes (flag)"),
    ],
)
def test_wrong_usage_exits_2_and_says_what_is_wrong(run_dir: Path, flags: list[str], message: str) -> None:
    code, log = refusal(DaemonProcess(run_dir), *flags)
    assert code == 2
    assert message in log


def test_a_store_path_that_cannot_be_is_told_without_a_traceback(run_dir: Path) -> None:
    (run_dir / "store").write_text("a file")
    code, log = refusal(DaemonProcess(run_dir))
    assert code == 1
    assert f"the store {run_dir / 'store'} cannot be made or opened" in log
    assert "Traceback" not in log


# ---- files that are not what they should be


@pytest.mark.parametrize("content", ["garbage", "truncated", "foreign"])
def test_a_store_that_cannot_be_trusted_is_moved_aside_and_reported(run_dir: Path, content: str) -> None:
    daemon = DaemonProcess(run_dir)
    data = daemon.store / "db/data.mdb"
    data.parent.mkdir(parents=True)
    with lmdb.open(str(data.parent)) as env, env.begin(write=True) as txn:
        txn.put(b"somebody", b"else's")
    if content == "garbage":
        data.write_bytes(os.urandom(100_000))
    elif content == "truncated":
        os.truncate(data, 5000)
    daemon.start()
    (moved,) = daemon.status().store.set_aside
    assert str(daemon.store / "set-aside-") in moved
    assert "moved aside" in daemon.log.read_text()
    with daemon.client(SPEC) as client:
        assert client.put(chain(client, [1, 2, 3, 4]))[0].code == "OK"
    for _ in range(3):  # no loop: the next starts find what this one made
        daemon.kill()
        daemon.start()
    assert len(daemon.status().store.set_aside) == 1
    assert daemon.status().store.n_blocks == 1
    daemon.stop()


def test_a_payload_that_was_damaged_on_disk_is_a_miss_counted_and_removed(daemon: DaemonProcess) -> None:
    with daemon.client(SPEC) as client:
        blocks = chain(client, list(range(16)))
        assert {result.code for result in client.put(blocks)} == {"OK"}
        daemon.stop()
        damage_frame(daemon, blocks[1].block_hash)
        daemon.start()
        hashes = [block.block_hash for block in blocks]
        found = list(client.get(hashes))
        assert wait_until(
            lambda: daemon.status().store.n_blocks == 1
        )  # removed behind the answer, with its descendants
        assert [block is not None for block in client.get(hashes)] == [True, False, False, False]
        for block, again in zip(blocks, found, strict=True):
            assert again is None or same_tensors(dict(block.tensors), dict(again.tensors))
        assert found[1] is None
        assert daemon.status().counters["corrupt_blocks_total"] == 1
        assert {result.code for result in client.put(blocks)} == {"OK"}
        assert None not in list(client.get(hashes))
