"""Memory shared with a daemon of one's own user on the same machine: blocks in it need not go through gRPC.

Beside its gRPC socket a daemon has a second one. Who connects there, and asks for so many bytes, is handed a lease: an
id, and the descriptor of memory that the daemon made. The first part of it is for blocks of Get, whose slots the daemon
chooses; the rest for blocks of Put, whose slots the client chooses. The connection is the lease: when it ends, so does
the lease. All messages have a fixed size, integers are little-endian:

    client   "KVSEG" and 3 zero bytes, u64 bytes wanted
    daemon   "KVSEG" and 3 zero bytes, id (16 bytes), u64 size, u64 bytes for Get; with the descriptor
    client   u64: MAPPED, once; then the offset of each block of Get that it needs no more

Whatever fails here is no matter: blocks go in-band then, and after a pause somebody tries again.
"""

import logging
import mmap
import os
import socket
import struct
import sys
import threading
import time
import weakref
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from . import tensors
from .paths import segment_socket

log = logging.getLogger(__name__)
MAGIC = b"KVSEG\0\0\0"
HELLO, LENT, OFFSET = struct.Struct("<8sQ"), struct.Struct("<8s16sQQ"), struct.Struct("<Q")
MAPPED = (1 << 64) - 1
LEASE_ID_BYTES = 16
PAGE_BYTES = 16 << 10  # of every system that we know
MAX_SLOTS = 128  # of either part: as many offsets as a socket takes without waiting
_ATTACH_SECONDS = 5.0
_PAUSE_SECONDS = 30.0


class Slots:
    """Which bytes of a part of a segment are taken. The lowest that fit are taken first: memory that is warm."""

    def __init__(self, start: int, stop: int) -> None:
        self.start, self.stop = start, stop
        self._taken: dict[int, int] = {}  # where each begins: where it ends, by offset

    def __len__(self) -> int:
        return len(self._taken)

    def take(self, n_bytes: int) -> int | None:
        """An offset, a multiple of the page size; None if nothing is free."""
        if len(self._taken) >= MAX_SLOTS or n_bytes <= 0:
            return None
        offset = self.start
        for begin, end in sorted(self._taken.items()):
            if offset + n_bytes <= begin:
                break
            offset = end
        if offset + n_bytes > self.stop:
            return None
        self._taken[offset] = rounded(offset + n_bytes)
        return offset

    def give_back(self, offset: int) -> bool:
        """Whether it was taken."""
        return self._taken.pop(offset, None) is not None


def rounded(n_bytes: int) -> int:
    """The next multiple of the page size."""
    return -(-n_bytes // PAGE_BYTES) * PAGE_BYTES


def mapped(fd: int, n_bytes: int) -> mmap.mmap:
    """Memory that others share, each page of it touched. Raises OSError or ValueError if it is smaller, or no memory.

    A first touch costs more than many copies. NumPy does it without the GIL, as MAP_POPULATE would not.
    """
    if os.fstat(fd).st_size < n_bytes:  # or what reads beyond its end would be killed
        raise ValueError(f"{n_bytes} bytes to be mapped, there are {os.fstat(fd).st_size}")
    memory = mmap.mmap(fd, n_bytes, mmap.MAP_SHARED)
    np.frombuffer(memory, np.uint8)[:: mmap.PAGESIZE].max()
    return memory


def peer_uid(connection: socket.socket, platform: str = sys.platform) -> int:
    """The user at the other end of a unix socket. Raises OSError where the system does not say."""
    if platform == "darwin":  # LOCAL_PEERCRED of SOL_LOCAL: struct xucred begins with its version and the uid
        credentials = connection.getsockopt(0, 1, 76)
        version, uid = struct.unpack("=II", credentials[:8])
        if version != 0:
            raise OSError(f"xucred of version 0 expected, got {version}")
        return int(uid)
    _pid, uid, _gid = struct.unpack("=3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(uid)


def receive(connection: socket.socket, n_bytes: int) -> bytes:
    """So many bytes; fewer at the end of the stream. Raises OSError."""
    got = b""
    while len(got) < n_bytes and (more := connection.recv(n_bytes - len(got))):
        got += more
    return got


@dataclass(eq=False)
class Lease:
    """The client's end of a lease. Thread-safe."""

    id: bytes
    connection: socket.socket  # that never waits
    memory: mmap.mmap
    get_bytes: int
    pid: int = field(default_factory=os.getpid)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._puts = Slots(self.get_bytes, len(self.memory))
        weakref.finalize(self, self.connection.close)

    @property
    def is_alive(self) -> bool:
        """Whether the daemon still holds it, and this is the process that it was lent to. Nothing is ever sent here."""
        try:
            self.connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return self.pid == os.getpid()
        except OSError:
            pass
        return False

    def block(self, offset: int, n_bytes: int) -> np.ndarray:
        """What lies in a slot of Get, read-only; the slot goes back when the last view of it dies.

        Raises ValueError for bytes that are not in the part for Get.
        """
        if n_bytes <= 0 or offset + n_bytes > self.get_bytes:
            raise ValueError(f"a slot of {n_bytes} bytes at {offset} is not in the {self.get_bytes} bytes for Get")
        # NumPy lets views of views keep the first array alive that is over something else than an array: this one.
        view = np.frombuffer(memoryview(self.memory)[offset : offset + n_bytes], np.uint8)
        view.flags.writeable = False
        weakref.finalize(view, self._return, offset).atexit = False
        return view

    def write(self, arrays: tensors.Arrays, n_bytes: int) -> int | None:
        """Copies the tensors of a block into a slot of Put; its offset, or None if no slot is free."""
        with self._lock:
            offset = self._puts.take(n_bytes)
        if offset is None:
            return None
        payload = np.frombuffer(self.memory, np.uint8, n_bytes, offset)
        try:
            for name, view in tensors.views(tensors.describe(arrays), payload).items():
                np.copyto(view, arrays[name])
        except BaseException:
            self.give_back(offset)
            raise
        return offset

    def give_back(self, offset: int) -> None:
        """A slot of Put may be used again: the daemon has read it."""
        with self._lock:
            self._puts.give_back(offset)

    def _return(self, offset: int) -> None:
        """Runs wherever an array dies: takes no lock, and waits for nothing."""
        if self.pid != os.getpid():  # a fork of ours: the views that count are not here
            return
        try:
            self.connection.send(OFFSET.pack(offset))
        except OSError:
            self.end()

    def end(self) -> None:
        """The daemon takes all slots back. What lies in them stays readable here."""
        if self.pid != os.getpid():
            self.connection.close()  # and no more: the connection is our parent's
            return
        with suppress(OSError):  # closed when nobody has it: while a thread sends, its number must not be another's
            self.connection.shutdown(socket.SHUT_RDWR)


class Leases:
    """The lease of one client: asked for in a thread of its own, so that no call waits for it; one at a time."""

    def __init__(self, target: str, n_bytes: int) -> None:
        self._path, self._n_bytes = segment_socket(target) if n_bytes else None, n_bytes
        self._lock = threading.Lock()
        self._lease: Lease | None = None
        self._attaching: threading.Thread | None = None
        self._next_try = 0.0
        self._told = False

    def current(self) -> Lease | None:
        """The lease, if there is one by now."""
        if self._path is None:
            return None
        with self._lock:
            if self._lease and not self._lease.is_alive:
                self._lease.end()
                self._lease = None
            if self._lease is None and self._attaching is None and time.monotonic() >= self._next_try:
                self._attaching = self._started(self._path)
            return self._lease

    def _started(self, path: Path) -> threading.Thread | None:
        """A try to attach; None if the system has no thread left."""
        thread = threading.Thread(target=self._attach, args=(path,), name="kvcached-attach", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            self._next_try = time.monotonic() + _PAUSE_SECONDS
            return None
        return thread

    def wait(self, seconds: float) -> Lease | None:
        """The same, once a try that is under way or due is over."""
        lease = self.current()
        if lease is None and (attaching := self._attaching):
            attaching.join(seconds)
            lease = self._lease
        return lease

    def drop(self, lease: Lease | None) -> None:
        """Nobody can say any more who owns which of its slots: the daemon takes all back, and we ask for another."""
        if lease is not None:
            lease.end()
            with self._lock:
                if self._lease is lease:
                    self._lease = None

    def close(self) -> None:
        with self._lock:
            self._path = None
        self.drop(self._lease)

    def _attach(self, path: Path) -> None:
        lease = None
        try:
            lease = attach(path, self._n_bytes)
        except (OSError, ValueError, struct.error) as error:
            self._next_try = time.monotonic() + _PAUSE_SECONDS
            if not self._told:
                log.info("blocks go in-band, no shared memory from %s: %s", path, error)
            self._told = True
        with self._lock:
            self._attaching = None
            if lease and self._path is None:  # closed meanwhile
                lease.end()
            elif lease:
                self._lease, self._told = lease, False


def attach(path: Path, n_bytes: int, timeout: float = _ATTACH_SECONDS) -> Lease:
    """A lease of at most so many bytes from the daemon at `path`. Raises OSError or ValueError if there is none."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(timeout)
        connection.connect(str(path))
        if (uid := peer_uid(connection)) != os.geteuid():
            raise ValueError(f"it is of user {uid}, not of {os.geteuid()}")
        connection.sendall(HELLO.pack(MAGIC, n_bytes))
        lease = _received(connection)
        connection.sendall(OFFSET.pack(MAPPED))
        connection.setblocking(False)
        return lease
    except BaseException:
        connection.close()
        raise


def _received(connection: socket.socket) -> Lease:
    """The daemon's answer. Room for more descriptors than come: on macOS those that do not fit would leak."""
    not_inherited = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
    answer, fds, _flags, _address = socket.recv_fds(connection, LENT.size, 4, not_inherited)
    try:
        answer += receive(connection, LENT.size - len(answer))
        if len(answer) != LENT.size or len(fds) != 1:
            raise ValueError(
                f"an answer of {LENT.size} bytes with a descriptor expected, got {len(answer)}, {len(fds)}"
            )
        magic, lease_id, size, get_bytes = LENT.unpack(answer)
        if magic != MAGIC or not 0 < get_bytes <= size:
            raise ValueError(f"not an answer that we know: {magic!r}, {get_bytes} of {size} bytes for Get")
        return Lease(lease_id, connection, mapped(fds[0], size), get_bytes)
    finally:
        for fd in fds:
            os.close(fd)
