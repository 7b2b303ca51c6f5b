"""Where the daemon listens unless told otherwise: the one thing that it and its clients must guess alike."""

import os
import sys
from pathlib import Path

# sizeof(sun_path) - 1. The kernel refuses longer paths with a message that names neither path nor limit.
MAX_SOCKET_PATH_BYTES = 103 if sys.platform == "darwin" else 107


def default_socket() -> Path:
    """$KVCACHED_SOCKET_PATH, else a short path of the user's own that survives no reboot."""
    if named := os.environ.get("KVCACHED_SOCKET_PATH"):
        return Path(named)
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/kvcached/run/kvcached.sock"
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return (Path(runtime) / "kvcached" if runtime else Path.home() / ".cache/kvcached/run") / "kvcached.sock"


def default_target() -> str:
    """The gRPC target of `default_socket`."""
    return f"unix:{default_socket()}"


def check_target(target: str) -> str:
    """The target again. Raises ValueError for a socket path that is longer than the system can take."""
    scheme, _, path = target.partition(":")
    size = len(os.fsencode(path.removeprefix("//")))
    if scheme == "unix" and size > MAX_SOCKET_PATH_BYTES:
        raise ValueError(f"the socket path of {target} has {size} bytes, at most {MAX_SOCKET_PATH_BYTES} are possible")
    return target


def segment_socket(target: str) -> Path | None:
    """Where the daemon at a gRPC target lends shared memory: beside its socket. None: on no other machine, say."""
    scheme, _, path = target.partition(":")
    beside = Path(path.removeprefix("//") + ".memory")
    return beside if scheme == "unix" and len(os.fsencode(beside)) <= MAX_SOCKET_PATH_BYTES else None
