"""Memory is lent to our own user, within bounds, and comes back whatever the client does or fails to do."""

import gc
import os
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lenders import MIB, asked, connected, is_hung_up, lending, only_lease, say_mapped
from support import wait_until

from kvcached import lending as module
from kvcached.errors import InvalidRequestError, LeaseError
from kvcached.lending import MAX_CONNECTIONS, Slot
from kvcached_client.segments import HELLO, LENT, MAGIC, OFFSET, PAGE_BYTES, Leases, attach


def test_what_the_daemon_writes_the_client_reads_and_its_return_frees_the_slot(run_dir: Path) -> None:
    with lending(run_dir) as (lender, path):
        ours = attach(path, MIB)
        assert wait_until(lambda: lender.n_leases == 1)
        lease = lender.lease(ours.id)
        assert lease is not None
        slot = lease.take(100)
        assert slot is not None
        assert slot.fill({"a": np.arange(25, dtype=np.float32)})
        view = ours.block(slot.offset, 100).view(np.float32)
        assert (view == np.arange(25)).all()
        assert not view.flags.writeable
        assert lease.n_taken == 1
        part = view[3:5].reshape(1, 2)
        del view
        gc.collect()
        ours.give_back(0)  # of Put, and not taken: nothing happens
        assert lease.n_taken == 1
        del part
        assert wait_until(lambda: lease.n_taken == 0)
        ours.end()


def test_what_the_client_writes_is_copied_by_the_daemon(run_dir: Path) -> None:
    with lending(run_dir) as (lender, path):
        ours = attach(path, MIB)
        offset = ours.write({"a": np.arange(4, dtype=np.int16), "b": np.ones((2, 3), "<f4").T}, 64 + 24)
        assert offset == ours.get_bytes
        assert wait_until(lambda: lender.n_leases == 1)
        copy = lender.copied(ours.id, offset, 88)
        ours.memory[offset : offset + 88] = bytes(88)
        assert (copy[:8].view(np.int16) == np.arange(4)).all()
        assert (copy[64:].view("<f4") == 1).all()
        ours.end()


def test_the_end_of_a_connection_gives_everything_back(run_dir: Path) -> None:
    with lending(run_dir) as (lender, path):
        ours = attach(path, MIB)
        assert wait_until(lambda: lender.n_leases == 1)
        lease = only_lease(lender)
        assert lease.take(5) is not None
        assert lender.used_bytes == MIB
        ours.end()
        assert wait_until(lambda: lender.n_leases == 0)
        assert lender.lease(ours.id) is None
        assert lease.take(5) is None
        del lease
        assert wait_until(lambda: gc.collect() >= 0 and lender.used_bytes == 0)
        with pytest.raises(LeaseError):
            lender.copied(ours.id, MIB // 2, 1)


def test_memory_that_a_worker_still_fills_is_counted_until_it_is_done(run_dir: Path) -> None:
    with lending(run_dir, 2 * MIB) as (lender, path):
        ours = attach(path, 2 * MIB)
        assert wait_until(lambda: lender.n_leases == 1)
        slot = only_lease(lender).take(1000)
        assert slot is not None
        ours.end()
        assert wait_until(lambda: lender.n_leases == 0)
        place = slot.allocate("a", (1000,), np.dtype(np.uint8))
        assert lender.used_bytes == 2 * MIB
        place[:] = 1  # and nobody is killed by it
        slot.give_back()
        del slot, place
        assert wait_until(lambda: gc.collect() >= 0 and lender.used_bytes == 0)


# ---- bounds


def test_no_more_is_lent_than_the_limit_however_many_ask(run_dir: Path) -> None:
    with lending(run_dir, 3 * MIB) as (lender, path):
        leases = [attach(path, MIB) for _ in range(3)]
        for n_bytes in (PAGE_BYTES * 2, MIB, 1 << 40, (1 << 64) - 1):
            with pytest.raises(ValueError, match="got 0"):
                attach(path, n_bytes)
        leases.pop().end()
        assert wait_until(lambda: gc.collect() >= 0 and lender.used_bytes == 2 * MIB)
        leases.append(attach(path, MIB))
        for lease in leases:
            lease.end()


@pytest.mark.parametrize("n_bytes", [0, 1, 2 * PAGE_BYTES - 1])
def test_less_than_a_page_for_either_part_is_not_lent(run_dir: Path, n_bytes: int) -> None:
    with lending(run_dir) as (lender, path):
        with pytest.raises(ValueError, match="got 0"):
            attach(path, n_bytes)
        assert lender.used_bytes == 0


def test_those_who_say_nothing_are_dropped_and_others_served_meanwhile(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_HELLO_SECONDS", 0.3)
    monkeypatch.setattr(module, "_MAP_SECONDS", 0.3)
    with lending(run_dir) as (lender, path):
        silent, slow = connected(path), connected(path)
        slow.send(HELLO.pack(MAGIC, MIB)[:5])
        never_maps, _, fd = asked(path)
        os.close(fd)
        attach(path, MIB).end()
        for connection in (silent, slow, never_maps):
            assert is_hung_up(connection)
            connection.close()
        assert wait_until(lambda: gc.collect() >= 0 and lender.used_bytes == 0)
        assert lender.n_leases == 0


def test_the_number_of_connections_is_bounded(run_dir: Path) -> None:
    with lending(run_dir, 128 * MIB) as (lender, path):
        leases = [attach(path, 2 * PAGE_BYTES) for _ in range(MAX_CONNECTIONS)]
        with pytest.raises((OSError, ValueError)):
            attach(path, 2 * PAGE_BYTES)
        leases.pop().end()
        assert wait_until(lambda: len(lender._connections) < MAX_CONNECTIONS)
        attach(path, 2 * PAGE_BYTES).end()
        for lease in leases:
            lease.end()


def test_other_users_are_lent_nothing(run_dir: Path) -> None:
    with lending(run_dir, uid=lambda _connection: os.geteuid() + 1) as (lender, path):
        connection = connected(path)
        assert is_hung_up(connection)
        connection.close()
        assert lender.used_bytes == 0


def test_the_socket_is_for_its_user_alone(run_dir: Path) -> None:
    with lending(run_dir) as (_, path):
        assert path.stat().st_mode & 0o777 == 0o600
    assert not path.exists()


@pytest.mark.parametrize("kind", ["no path", "open directory", "a file", "a living socket"])
def test_where_its_socket_cannot_be_nothing_is_lent_and_nothing_breaks(run_dir: Path, kind: str) -> None:
    path: Path | None = run_dir / "m"
    with socket.socket(socket.AF_UNIX) as other:
        if kind == "no path":
            path = None
        elif kind == "open directory":
            run_dir.chmod(0o755)
        elif kind == "a file":
            (run_dir / "m").write_text("mine")
        else:
            other.bind(str(path))
            other.listen()
        lender = module.Lending(MIB)
        lender.start(path)
        lender.stop()
    assert kind != "a file" or (run_dir / "m").read_text() == "mine"
    assert kind != "a living socket" or (run_dir / "m").exists()
    assert lender.used_bytes == 0


def test_with_a_limit_of_0_there_is_no_socket(run_dir: Path) -> None:
    with lending(run_dir, 0) as (_, path):
        assert not path.exists()


def test_the_end_of_the_lender_ends_all_leases(run_dir: Path) -> None:
    with lending(run_dir) as (lender, path):
        leases = [attach(path, MIB) for _ in range(3)]
        assert wait_until(lambda: lender.n_leases == 3)
    assert wait_until(lambda: lender.n_leases == 0)
    assert all(wait_until(lambda lease=lease: not lease.is_alive) for lease in leases)
    assert bytes(leases[0].memory[:4]) == bytes(4)  # what a client has mapped it may still read
    for lease in leases:
        lease.end()


# ---- what clients say


@pytest.mark.parametrize("message", [bytes(8), OFFSET.pack(1), OFFSET.pack(PAGE_BYTES), b"\xff" * 8, b"\xff" * 4096])
def test_a_slot_returned_that_was_not_lent_ends_the_lease(run_dir: Path, message: bytes) -> None:
    with lending(run_dir) as (lender, path):
        connection, _, fd = asked(path)
        os.close(fd)
        say_mapped(connection)
        connection.sendall(message)
        assert is_hung_up(connection)
        connection.close()
        assert wait_until(lambda: lender.n_leases == 0)


def test_a_slot_returned_twice_ends_the_lease_and_once_it_does_not(run_dir: Path) -> None:
    with lending(run_dir) as (lender, path):
        connection, _, fd = asked(path)
        os.close(fd)
        say_mapped(connection)
        assert wait_until(lambda: lender.n_leases == 1)
        lease = only_lease(lender)
        assert lease.take(1) is not None
        for piece in (b"\0" * 3, b"\0" * 5):  # in pieces
            connection.sendall(piece)
        assert wait_until(lambda: lease.n_taken == 0)
        assert lender.n_leases == 1
        connection.sendall(bytes(8))
        assert is_hung_up(connection)
        connection.close()


def test_slots_never_returned_are_gone_and_nothing_else_is(run_dir: Path) -> None:
    with lending(run_dir) as (lender, path):
        greedy, other = attach(path, 4 * PAGE_BYTES), attach(path, 4 * PAGE_BYTES)
        assert wait_until(lambda: lender.n_leases == 2)
        lease = lender.lease(greedy.id)
        assert lease is not None
        slots = [lease.take(PAGE_BYTES) for _ in range(3)]
        assert [slot is None for slot in slots] == [False, False, True]
        assert lease.take(1, wait_seconds=0.05) is None
        others = lender.lease(other.id)
        assert others is not None
        assert others.take(2 * PAGE_BYTES) is not None
        greedy.end()
        other.end()


def test_whoever_waits_for_a_slot_is_given_the_one_that_comes_back(run_dir: Path) -> None:
    with lending(run_dir) as (lender, path):
        ours = attach(path, 4 * PAGE_BYTES)
        assert wait_until(lambda: lender.n_leases == 1)
        lease, got = only_lease(lender), []
        assert lease.take(2 * PAGE_BYTES) is not None
        waiting = threading.Thread(target=lambda: got.append(lease.take(1, wait_seconds=30)))
        waiting.start()
        ours.connection.send(OFFSET.pack(0))
        waiting.join(30)
        assert isinstance(got[0], Slot)
        waiting = threading.Thread(target=lambda: got.append(lease.take(2 * PAGE_BYTES, wait_seconds=30)))
        waiting.start()
        ours.end()  # and whoever waits when the lease ends waits no longer
        waiting.join(30)
        assert got[1] is None


@pytest.mark.parametrize(
    ("offset", "n_bytes"),
    [
        (0, 10),  # of Get
        (MIB // 2 - 1, 10),
        (MIB, 1),
        (MIB - 9, 10),
        (MIB // 2, MIB // 2 + 1),
        ((1 << 64) - 1, 10),
        ((1 << 64) - 10, 10),
    ],
)
def test_bytes_that_are_not_in_the_part_for_put_are_not_read(run_dir: Path, offset: int, n_bytes: int) -> None:
    with lending(run_dir) as (lender, path):
        ours = attach(path, MIB)
        assert wait_until(lambda: lender.n_leases == 1)
        with pytest.raises(InvalidRequestError, match="a slot for Put lies in"):
            lender.copied(ours.id, offset, n_bytes)
        assert lender.copied(ours.id, MIB - 10, 10).nbytes == 10
        ours.end()


@given(st.binary(max_size=64), st.booleans(), st.integers(1, 7))
@settings(max_examples=60)
def test_any_bytes_are_survived_and_leave_nothing(
    tmp_path_factory: pytest.TempPathFactory, message: bytes, after_hello: bool, size: int
) -> None:
    with lending(tmp_path_factory.mktemp("k")) as (lender, path):
        connection = connected(path)
        try:
            if after_hello:
                connection.sendall(HELLO.pack(MAGIC, MIB))
            for i in range(0, len(message), size):
                connection.sendall(message[i : i + size])
            connection.shutdown(socket.SHUT_WR)
            is_hung_up(connection)
        except OSError:  # hung up on before all was said
            pass
        connection.close()
        attach(path, 2 * PAGE_BYTES).end()
        assert wait_until(lambda: gc.collect() >= 0 and lender.used_bytes == 0 and not lender._connections)


# ---- what lenders say


def impostor(path: Path, answer: bytes, fds: list[int]) -> threading.Thread:
    """Answers one client so, and then nothing."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen()

    def serve() -> None:
        with listener, listener.accept()[0] as connection:
            connection.recv(HELLO.size)
            if answer:
                socket.send_fds(connection, [answer], fds)
            connection.settimeout(0.3)
            is_hung_up(connection)

    thread = threading.Thread(target=serve)
    thread.start()
    return thread


def n_descriptors() -> int:
    return sum(1 for _ in Path("/dev/fd").iterdir())


GOOD = LENT.pack(MAGIC, bytes(16), 4 * PAGE_BYTES, 2 * PAGE_BYTES)


@pytest.mark.parametrize(
    ("answer", "n_fds"),
    [
        (b"", 0),
        (GOOD, 0),
        (GOOD, 2),
        (GOOD[:20], 1),
        (b"other.." + GOOD[7:], 1),
        (LENT.pack(MAGIC, bytes(16), 8 * PAGE_BYTES, 2 * PAGE_BYTES), 1),  # more than there is
        (LENT.pack(MAGIC, bytes(16), 4 * PAGE_BYTES, 5 * PAGE_BYTES), 1),
        (LENT.pack(MAGIC, bytes(16), 0, 0), 1),
        (LENT.pack(MAGIC, bytes(16), (1 << 64) - 1, 1), 1),
    ],
)
def test_a_client_takes_no_lease_that_it_cannot_use(run_dir: Path, answer: bytes, n_fds: int) -> None:
    before = n_descriptors()
    fds = [module.segments.create(4 * PAGE_BYTES) for _ in range(n_fds)]
    thread = impostor(run_dir / "m", answer, fds)
    with pytest.raises((OSError, ValueError)):
        attach(run_dir / "m", 4 * PAGE_BYTES, timeout=0.2)
    thread.join()
    for fd in fds:
        os.close(fd)
    assert n_descriptors() == before


def test_a_descriptor_that_cannot_be_mapped_is_no_lease(run_dir: Path) -> None:
    read_end, write_end = os.pipe()
    thread = impostor(run_dir / "m", GOOD, [read_end])
    with pytest.raises((OSError, ValueError)):
        attach(run_dir / "m", 4 * PAGE_BYTES)
    thread.join()
    os.close(read_end)
    os.close(write_end)


def test_a_client_that_was_lent_nothing_does_not_ask_again_at_once_and_says_so_once(
    run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    leases = Leases(f"unix:{run_dir}/s", MIB)
    for _ in range(3):
        assert leases.wait(10) is None
    assert [record.message.startswith("blocks go in-band") for record in caplog.records] == [True]
    leases._next_try = 0
    assert leases.wait(10) is None
    assert len(caplog.records) == 1
    leases.close()


def test_where_no_thread_can_be_started_blocks_go_in_band(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_thread(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with lending(run_dir) as (lender, path):
        leases = Leases(f"unix:{str(path).removesuffix('m')}", MIB)
        leases._path = path
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", no_thread)
            assert leases.wait(10) is None
        leases._next_try = 0
        assert leases.wait(10) is not None
        leases.close()
        assert wait_until(lambda: lender.n_leases == 0)


@pytest.mark.parametrize("target", ["127.0.0.1:1234", "dns:///host:1", f"unix:/{'x' * 100}"])
def test_who_is_not_on_this_machine_asks_nobody(target: str) -> None:
    leases = Leases(target, MIB)
    assert leases.wait(1) is None
    assert leases._attaching is None


def test_a_client_that_was_closed_has_no_lease_and_gets_none(run_dir: Path) -> None:
    with lending(run_dir) as (lender, path):
        leases = Leases(f"unix:{str(path).removesuffix('m')}", MIB)
        leases._path = path
        assert leases.wait(10) is not None
        assert leases.current() is not None
        leases.close()
        assert leases.current() is None
        assert wait_until(lambda: lender.n_leases == 0)


def test_offsets_of_a_daemon_are_not_believed(run_dir: Path) -> None:
    with lending(run_dir) as (_, path):
        ours = attach(path, MIB)
        for offset, n_bytes in ((MIB // 2 - 1, 2), (MIB, 1), (1 << 63, 1), (0, 0), (0, MIB)):
            with pytest.raises(ValueError, match="not in the"):
                ours.block(offset, n_bytes)
        ours.end()


def test_a_fork_returns_nothing_and_has_no_lease(run_dir: Path) -> None:
    with lending(run_dir) as (lender, path):
        ours = attach(path, MIB)
        assert wait_until(lambda: lender.n_leases == 1)
        lease = only_lease(lender)
        slot = lease.take(64)
        assert slot is not None
        view = ours.block(slot.offset, 64)
        ours.pid += 1  # as in a fork, which must not end what is its parent's
        assert not ours.is_alive
        del view
        gc.collect()
        other = connected(path)
        other.close()
        assert lease.n_taken == 1
        assert lender.n_leases == 1
        ours.end()
