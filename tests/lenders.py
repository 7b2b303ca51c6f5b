"""Lenders of memory in this process, and clients of theirs by hand. Nothing here asserts."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvcached.lending import Lease as Lent
from kvcached.lending import Lending
from kvcached_client.segments import HELLO, LENT, MAGIC, MAPPED, OFFSET

MIB = 1 << 20


@contextmanager
def lending(directory: Path, limit_bytes: int = 8 * MIB, **fields: Any) -> Iterator[tuple[Lending, Path]]:
    """A lender, and the path of its socket."""
    directory.chmod(0o700)
    path, lender = directory / "m", Lending(limit_bytes, **fields)
    lender.start(path)
    try:
        yield lender, path
    finally:
        lender.stop()


def connected(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(10)
    connection.connect(str(path))
    return connection


def asked(path: Path, n_bytes: int = MIB) -> tuple[socket.socket, bytes, int]:
    """A connection on which memory was asked for and lent, and not mapped yet; the lease's id, and the descriptor."""
    connection = connected(path)
    connection.sendall(HELLO.pack(MAGIC, n_bytes))
    answer, fds, _, _ = socket.recv_fds(connection, LENT.size, 4)
    return connection, LENT.unpack(answer)[1], fds[0]


def say_mapped(connection: socket.socket) -> None:
    connection.sendall(OFFSET.pack(MAPPED))


def is_hung_up(connection: socket.socket) -> bool:
    """Whether the other end closes the connection, within the time that this end waits."""
    try:
        while connection.recv(4096):
            pass
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False
    return True


def only_lease(lender: Lending) -> Lent:
    (lease,) = lender._leases.values()
    return lease
