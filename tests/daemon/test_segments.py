"""Memory that is shared: nobody can change its size, and macOS's way of making it is driven here too."""

import errno
import os
import socket
import struct
import sys
import tempfile
from typing import Any

import numpy as np
import pytest

from kvcached import segments
from kvcached_client.segments import MAX_SLOTS, PAGE_BYTES, Slots, mapped, peer_uid

linux = pytest.mark.skipif(sys.platform != "linux", reason="memfd is Linux's")


class PosixShm:
    """shm_open and shm_unlink of another system, over ordinary memory; remembers what it was asked."""

    def __init__(self, unlink_fails: bool = False) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.fd = -1
        self._unlink_fails = unlink_fails

    def shm_open(self, name: str, flags: int, mode: int) -> int:
        self.calls.append(("open", name, flags, mode))
        with tempfile.TemporaryFile() as file:
            self.fd = os.dup(file.fileno())
        return self.fd

    def shm_unlink(self, name: str) -> None:
        self.calls.append(("unlink", name, os.fstat(self.fd).st_size))
        if self._unlink_fails:
            raise OSError(errno.EACCES, "no")


def test_memory_is_zero_and_what_one_writes_another_reads() -> None:
    fd = segments.create(3 * PAGE_BYTES)
    ours, theirs = segments.share(fd), mapped(fd, 3 * PAGE_BYTES)
    os.close(fd)
    assert len(ours) == 3 * PAGE_BYTES
    assert theirs[:] == bytes(3 * PAGE_BYTES)
    np.frombuffer(ours, np.uint8)[-4:] = 7
    assert bytes(theirs[-4:]) == b"\7\7\7\7"


@pytest.mark.parametrize(("wanted", "size"), [(1, 1), (PAGE_BYTES, 1), (PAGE_BYTES + 1, 2)])
def test_sizes_are_rounded_to_the_largest_page_there_is(wanted: int, size: int) -> None:
    fd = segments.create(wanted)
    assert os.fstat(fd).st_size == size * PAGE_BYTES
    os.close(fd)


@linux
@pytest.mark.parametrize("n_bytes", [0, PAGE_BYTES - 1, 3 * PAGE_BYTES])
def test_nobody_can_change_its_size(n_bytes: int) -> None:
    fd = segments.create(2 * PAGE_BYTES)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, n_bytes)
    assert os.fstat(fd).st_size == 2 * PAGE_BYTES
    os.close(fd)


@linux
def test_nobody_can_take_the_seals_off_or_add_some() -> None:
    import fcntl

    fd = segments.create(PAGE_BYTES)
    with pytest.raises(PermissionError):
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    os.close(fd)


def test_on_macos_the_name_is_short_and_gone_before_the_memory_has_a_size() -> None:
    shm = PosixShm()
    fd = segments._posix(2 * PAGE_BYTES, shm)
    (_, name, flags, mode), unlinked = shm.calls
    assert name.startswith("/")
    assert len(name) <= 31
    assert flags == os.O_CREAT | os.O_EXCL | os.O_RDWR
    assert mode == 0o600
    assert unlinked == ("unlink", name, 0)
    assert os.fstat(fd).st_size == 2 * PAGE_BYTES
    os.close(fd)


def test_on_macos_two_segments_have_two_names() -> None:
    shm = PosixShm()
    for _ in range(2):
        os.close(segments._posix(PAGE_BYTES, shm))
    assert shm.calls[0][1] != shm.calls[2][1]


def test_a_segment_that_cannot_be_made_leaves_no_descriptor() -> None:
    shm = PosixShm(unlink_fails=True)
    with pytest.raises(OSError, match="no"):
        segments._posix(PAGE_BYTES, shm)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(shm.fd)


def test_the_systems_own_shm_open_serves_too() -> None:
    fd = segments.create(PAGE_BYTES + 5, platform="darwin")
    memory = segments.share(fd)
    os.close(fd)
    assert len(memory) == 2 * PAGE_BYTES
    memory[:3] = b"abc"
    assert memory[:3] == b"abc"


def test_memory_that_is_smaller_than_was_said_is_not_mapped() -> None:
    fd = segments.create(PAGE_BYTES)
    with pytest.raises(ValueError, match="there are"):
        mapped(fd, PAGE_BYTES + 1)
    os.close(fd)


def test_what_cannot_be_mapped_is_an_error() -> None:
    read_end, write_end = os.pipe()
    for open_fd in (read_end, write_end):
        with pytest.raises((OSError, ValueError)):
            mapped(open_fd, PAGE_BYTES)
        os.close(open_fd)


# ---- who is at the other end


def test_the_peer_of_a_socket_pair_is_us() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert peer_uid(ours) == os.geteuid()


class MacSocket:
    """Answers as macOS does for LOCAL_PEERCRED."""

    def __init__(self, version: int, uid: int) -> None:
        self._answer = struct.pack("=IIhh16I", version, uid, 1, 0, *range(16))

    def getsockopt(self, level: int, option: int, size: int) -> bytes:
        assert (level, option, size) == (0, 1, 76)
        return self._answer


def test_on_macos_the_peer_is_read_from_xucred() -> None:
    assert peer_uid(MacSocket(0, 501), "darwin") == 501  # type: ignore[arg-type]
    with pytest.raises(OSError, match="version"):
        peer_uid(MacSocket(1, 501), "darwin")  # type: ignore[arg-type]


# ---- slots


def test_slots_lie_in_their_part_and_never_on_one_another() -> None:
    slots, taken = Slots(PAGE_BYTES, 6 * PAGE_BYTES), []
    while (offset := slots.take(PAGE_BYTES + 1)) is not None:
        taken.append(offset)
    assert taken == [PAGE_BYTES, 3 * PAGE_BYTES]
    assert slots.take(PAGE_BYTES) == 5 * PAGE_BYTES
    assert slots.take(1) is None


def test_the_lowest_slot_that_fits_is_taken_first() -> None:
    slots = Slots(0, 8 * PAGE_BYTES)
    offsets = [slots.take(n * PAGE_BYTES) for n in (1, 2, 1, 2)]
    assert offsets == [0, PAGE_BYTES, 3 * PAGE_BYTES, 4 * PAGE_BYTES]
    assert slots.give_back(PAGE_BYTES)
    assert slots.give_back(0)
    assert slots.take(3 * PAGE_BYTES) == 0
    assert slots.take(3 * PAGE_BYTES) is None
    assert slots.take(2 * PAGE_BYTES) == 6 * PAGE_BYTES


@pytest.mark.parametrize("offset", [1, PAGE_BYTES, -1, 1 << 63])
def test_what_was_not_taken_does_not_come_back(offset: int) -> None:
    slots = Slots(0, 8 * PAGE_BYTES)
    assert slots.take(5) == 0
    assert not slots.give_back(offset)
    assert slots.give_back(0)
    assert not slots.give_back(0)


@pytest.mark.parametrize("n_bytes", [0, -1, 3 * PAGE_BYTES])
def test_no_slot_is_empty_or_larger_than_there_is(n_bytes: int) -> None:
    assert Slots(0, 2 * PAGE_BYTES).take(n_bytes) is None


def test_no_more_slots_are_out_than_returns_fit_into_a_socket() -> None:
    slots = Slots(0, 4 * MAX_SLOTS * PAGE_BYTES)
    assert sum(slots.take(1) is not None for _ in range(2 * MAX_SLOTS)) == MAX_SLOTS
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        for _ in range(MAX_SLOTS):
            assert ours.send(bytes(8)) == 8
