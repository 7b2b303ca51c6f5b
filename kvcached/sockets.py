"""The unix socket: in a directory of ours that nobody else may enter, and never taken from a living daemon.

gRPC itself would create the socket world-readable, unlink whatever is at the path, and take over a living daemon's.
"""

import os
import socket
import stat
from pathlib import Path

from kvcached.errors import InvalidRequestError, StoreError
from kvcached_client.paths import MAX_SOCKET_PATH_BYTES


def prepare(path: Path) -> None:
    """Makes the place for a socket: a directory of mode 0700, and nothing at `path`. Removes a dead daemon's socket.

    Raises:
        InvalidRequestError: the path is too long, names something that is not a socket or not ours, or lies in a
            directory that others may enter.
        StoreError: a daemon answers there.
    """
    size = len(os.fsencode(path))
    if size > MAX_SOCKET_PATH_BYTES:
        raise InvalidRequestError(
            f"the socket path {path} has {size} bytes, at most {MAX_SOCKET_PATH_BYTES} are possible: set socket_path"
        )
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_owner(path.parent)
        mode = stat.S_IMODE(path.parent.stat().st_mode)
        if mode & 0o077:  # not ours to change: it may be /tmp, or a home
            raise InvalidRequestError(
                f"the directory {path.parent} of the socket is open to others (mode {mode:04o}): "
                "set socket_path to a place in a directory of its own"
            )
        if not os.path.lexists(path):
            return
        _check_owner(path)
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise InvalidRequestError(f"{path} exists and is not a socket: move it away, or set socket_path")
        if answers(path):
            raise StoreError(f"another daemon answers on {path}")
        path.unlink()
    except OSError as error:
        raise InvalidRequestError(f"the socket {path} cannot be made: {error}") from None


def answers(path: Path) -> bool:
    """Whether somebody accepts connections on a socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:  # a full backlog, a hung daemon: somebody is there
            return True
        return True


def _check_owner(path: Path) -> None:
    owner = path.lstat().st_uid
    if owner != os.geteuid():
        raise InvalidRequestError(f"{path} belongs to user {owner}, not to {os.geteuid()} who runs this daemon")
