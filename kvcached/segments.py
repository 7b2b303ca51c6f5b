"""Memory that the daemon makes, owns and shares by descriptor: no names, nothing to sweep after a crash.

Nobody may change its size once it is made: who maps memory that then shrinks is killed by SIGBUS. On Linux a memfd with
seals. On macOS an object of shm_open, unlinked at once; it can be sized only once.
"""

import fcntl
import mmap
import os
import secrets
import sys
from importlib import import_module
from typing import Any

from kvcached_client.segments import PAGE_BYTES, mapped, rounded

MAX_NAME_BYTES = 31  # of shm_open on macOS, the slash included


def create(n_bytes: int, platform: str = sys.platform) -> int:
    """A descriptor of memory, `n_bytes` of it or up to a page more, all zero. Raises OSError."""
    return _memfd(rounded(n_bytes)) if platform == "linux" else _posix(rounded(n_bytes), import_module("_posixshmem"))


def share(fd: int) -> mmap.mmap:
    """All of it, mapped here, with its pages there already."""
    return mapped(fd, os.fstat(fd).st_size // PAGE_BYTES * PAGE_BYTES)


def _memfd(n_bytes: int) -> int:
    fd = os.memfd_create("kvcached", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, n_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _posix(n_bytes: int, shm: Any) -> int:
    """shm: shm_open and shm_unlink, as CPython's _posixshmem has them (which knows no resource tracker)."""
    name = f"/kvcached-{secrets.token_hex(8)}"
    if len(name) > MAX_NAME_BYTES:
        raise ValueError(f"a name of at most {MAX_NAME_BYTES} bytes is possible, got {name}")
    fd: int = shm.shm_open(name, os.O_CREAT | os.O_EXCL | os.O_RDWR, mode=0o600)
    try:
        shm.shm_unlink(name)
        os.ftruncate(fd, n_bytes)
    except BaseException:
        os.close(fd)
        raise
    return fd
