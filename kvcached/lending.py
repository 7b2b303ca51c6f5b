"""Memory lent to clients of our own user, over a socket beside gRPC's: the daemon's end of kvcached_client.segments.

One connection is one lease: its end, however it comes about, gives the memory and all its slots back. Bounded: bytes of
all leases, connections, how long a client may take to ask and to map. Nothing is ever parsed out of shared memory, and
no size or offset is believed: the daemon has its own numbers. What a client has not returned it may still read; what
it puts is copied before anybody looks at it.
"""

import mmap
import os
import secrets
import socket
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from math import prod
from pathlib import Path

import numpy as np
import structlog

from kvcached import segments, sockets
from kvcached.block import fresh
from kvcached.errors import InvalidRequestError, KvcachedError, LeaseError
from kvcached_client import tensors
from kvcached_client.segments import (
    HELLO,
    LEASE_ID_BYTES,
    LENT,
    MAGIC,
    MAPPED,
    OFFSET,
    PAGE_BYTES,
    Slots,
    peer_uid,
    receive,
    rounded,
)

log = structlog.get_logger()
MAX_CONNECTIONS = 64
_HELLO_SECONDS = 2.0  # to ask
_MAP_SECONDS = 10.0  # to map what was lent


class Lease:
    """Memory that one client has too. Thread-safe."""

    def __init__(self, memory: mmap.mmap) -> None:
        self.id = secrets.token_bytes(LEASE_ID_BYTES)
        self.get_bytes = len(memory) // 2 // PAGE_BYTES * PAGE_BYTES
        self._memory = memory
        self._gets = Slots(0, self.get_bytes)
        self._changed = threading.Condition()
        self._ended = False

    @property
    def n_taken(self) -> int:
        """Slots of Get that are being filled or read."""
        return len(self._gets)

    def take(self, n_bytes: int, wait_seconds: float = 0.0) -> "Slot | None":
        """A slot of Get; None if none is free in time, or ever."""
        if n_bytes > self.get_bytes:
            return None
        with self._changed:
            found: list[int] = []

            def try_once() -> bool:
                offset = None if self._ended else self._gets.take(n_bytes)
                found.extend(() if offset is None else (offset,))
                return self._ended or bool(found)

            self._changed.wait_for(try_once, wait_seconds)
        return Slot(self, found[0], self._bytes(found[0], n_bytes)) if found else None

    def give_back(self, offset: int) -> bool:
        """Whether a slot of Get was taken."""
        with self._changed:
            self._changed.notify_all()
            return self._gets.give_back(offset)

    def copied(self, offset: int, n_bytes: int) -> np.ndarray:
        """What a client says that it wrote into a slot of Put, in memory that it cannot reach.

        Raises InvalidRequestError for bytes that are not in the part for Put.
        """
        if offset < self.get_bytes or offset + n_bytes > len(self._memory):
            raise InvalidRequestError(
                f"a slot for Put lies in bytes {self.get_bytes} to {len(self._memory)} of its lease, "
                f"got {n_bytes} bytes at {offset}"
            )
        return self._bytes(offset, n_bytes).copy()

    def end(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _bytes(self, offset: int, n_bytes: int) -> np.ndarray:
        return np.frombuffer(self._memory, np.uint8, n_bytes, offset)


class Slot:
    """Bytes of a lease that are filled for a client, and are the client's once it was told of them."""

    def __init__(self, lease: Lease, offset: int, payload: np.ndarray) -> None:
        self._lease, self.offset, self._payload = lease, offset, payload
        self._end = 0

    def allocate(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An Allocate: where the next tensor lies on the wire, if they are asked for in their order there."""
        offset = self._end + -self._end % tensors.ALIGNMENT
        n_bytes = prod(shape) * dtype.itemsize
        if not 0 < n_bytes <= self._payload.nbytes - offset:
            return fresh(name, shape, dtype)
        self._end = offset + n_bytes
        return self._payload[offset : self._end].view(dtype).reshape(shape)

    def fill(self, arrays: tensors.Arrays) -> bool:
        """Copies into the slot, as on the wire, what does not lie there yet. False if it is too small."""
        described = tensors.describe(arrays)
        if (n_bytes := tensors.nbytes(described)) > self._payload.nbytes:
            return False
        places = tensors.views(described, self._payload[:n_bytes])
        astray = {name: array for name, array in arrays.items() if not _is_at(array, places[name])}
        for name, array in astray.items():  # what lies at another's place would be written over
            astray[name] = array.copy() if np.may_share_memory(array, self._payload) else array
        for name, array in astray.items():
            np.copyto(places[name], array)
        return True

    def give_back(self) -> None:
        """It is not going to be told."""
        self._lease.give_back(self.offset)


class Lending:
    """All leases of a daemon. limit_bytes: of all together; 0: nothing is lent, and there is no socket."""

    def __init__(self, limit_bytes: int, uid: Callable[[socket.socket], int] = peer_uid) -> None:
        self._limit_bytes, self._uid = limit_bytes, uid
        self._lock = threading.Lock()  # guards what follows
        self._sizes: dict[bytes, int] = {}  # of what is mapped; whoever unmaps takes no lock
        self._leases: dict[bytes, Lease] = {}
        self._connections: set[socket.socket] = set()
        self._listener: socket.socket | None = None
        self._path: Path | None = None

    @property
    def used_bytes(self) -> int:
        """Bytes that are mapped here: of leases, and of those that ended while a slot was being filled."""
        return sum(list(self._sizes.values()))

    @property
    def n_leases(self) -> int:
        return len(self._leases)

    def lease(self, lease_id: bytes) -> Lease | None:
        return self._leases.get(lease_id)

    def copied(self, lease_id: bytes, offset: int, n_bytes: int) -> np.ndarray:
        """See Lease.copied. Raises LeaseError for a lease that is not."""
        if lease := self._leases.get(lease_id):
            return lease.copied(offset, n_bytes)
        raise LeaseError("the lease has ended: attach again, and send the block's data in the stream")

    def start(self, path: Path | None) -> None:
        """Listens. Where that cannot be, blocks go in-band, and the log says why."""
        if not self._limit_bytes:
            return
        try:
            if path is None:
                raise InvalidRequestError("the path of its socket would be too long")
            sockets.prepare(path)
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._listener, self._path = listener, path
            listener.bind(str(path))
            path.chmod(0o600)
            listener.listen()
        except (KvcachedError, OSError) as error:
            log.warning("no shared memory is lent", reason=str(error))
            return
        threading.Thread(target=self._accept, args=(listener,), name="lending", daemon=True).start()

    def stop(self) -> None:
        """Ends all leases."""
        if self._listener:
            _close(self._listener)
        if self._path:
            self._path.unlink(missing_ok=True)
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                if listener.fileno() < 0:
                    return
                threading.Event().wait(0.1)  # no descriptors left: others will close theirs
                continue
            with self._lock:
                is_one_too_many = len(self._connections) >= MAX_CONNECTIONS
                if not is_one_too_many:
                    self._connections.add(connection)
            try:
                if is_one_too_many:
                    raise RuntimeError("too many connections")
                threading.Thread(target=self._serve, args=(connection,), name="lease", daemon=True).start()
            except RuntimeError as error:  # or the system has no thread left
                log.warning("nothing lent", reason=str(error))
                self._hang_up(connection)

    def _serve(self, connection: socket.socket) -> None:
        """One connection, from beginning to end."""
        try:
            if (uid := self._uid(connection)) != os.geteuid():
                raise InvalidRequestError(f"memory is lent to user {os.geteuid()}, not to {uid}")
            self._lend(connection)
        except (KvcachedError, OSError, ValueError) as error:
            log.info("nothing lent, or a lease ended early", reason=str(error))
        except Exception:
            log.exception("lending failed")
        finally:
            self._hang_up(connection)

    def _hang_up(self, connection: socket.socket) -> None:
        with self._lock:
            self._connections.discard(connection)
        connection.close()

    def _lend(self, connection: socket.socket) -> None:
        connection.settimeout(_HELLO_SECONDS)
        hello = receive(connection, HELLO.size)
        if len(hello) != HELLO.size or HELLO.unpack(hello)[0] != MAGIC:
            raise InvalidRequestError(f"not a request for a lease: {hello.hex() or 'nothing'}")
        memory, fd = self._created(HELLO.unpack(hello)[1])
        lease, size = Lease(memory), len(memory)
        del memory  # from here on it is the lease's, and goes with it
        with self._known(lease):  # before the client is told: it may name the lease as soon as it is
            try:
                connection.settimeout(_MAP_SECONDS)
                answer = LENT.pack(MAGIC, lease.id, size, lease.get_bytes)
                socket.send_fds(connection, [answer], [fd])
                if receive(connection, OFFSET.size) != OFFSET.pack(MAPPED):
                    raise InvalidRequestError("the memory was not mapped")
            finally:
                os.close(fd)  # not before the client has it: macOS drops descriptors whose sender closed them
            connection.settimeout(None)
            log.info("memory lent", size=size, n_leases=self.n_leases)
            self._take_back(connection, lease)

    @contextmanager
    def _known(self, lease: Lease) -> Iterator[None]:
        with self._lock:
            self._leases[lease.id] = lease
        try:
            yield
        finally:
            with self._lock:
                del self._leases[lease.id]
            lease.end()

    def _created(self, n_bytes: int) -> tuple[mmap.mmap, int]:
        """Memory for a new lease, and its descriptor. Raises InvalidRequestError if there is no room for it."""
        if n_bytes < 2 * PAGE_BYTES:
            raise InvalidRequestError(f"at least {2 * PAGE_BYTES} bytes are lent, asked for were {n_bytes}")
        size, key = rounded(n_bytes), secrets.token_bytes(LEASE_ID_BYTES)
        with self._lock:
            if (used := self.used_bytes) + size > self._limit_bytes:
                raise InvalidRequestError(f"{used} of {self._limit_bytes} bytes are lent, no room for {size}")
            self._sizes[key] = size
        try:
            fd = segments.create(size)
            try:
                memory = segments.share(fd)
            except BaseException:
                os.close(fd)
                raise
        except BaseException:
            del self._sizes[key]
            raise
        weakref.finalize(memory, self._sizes.pop, key)
        return memory, fd

    def _take_back(self, connection: socket.socket, lease: Lease) -> None:
        """Slots that come back, until the connection ends or says what cannot be."""
        while len(message := receive(connection, OFFSET.size)) == OFFSET.size:
            (offset,) = OFFSET.unpack(message)
            if not lease.give_back(offset):
                raise InvalidRequestError(f"a slot at {offset} was returned that was not lent")


def _is_at(array: np.ndarray, place: np.ndarray) -> bool:
    """Whether an array of the same shape and dtype is the very memory."""
    addresses = [a.__array_interface__["data"][0] for a in (array, place)]
    return not array.nbytes or (array.flags.c_contiguous and addresses[0] == addresses[1])


def _close(listener: socket.socket) -> None:
    """Also wakes the thread that accepts."""
    with suppress(OSError):
        listener.shutdown(socket.SHUT_RDWR)
    listener.close()
