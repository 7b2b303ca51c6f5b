"""The files of a store: who holds them, whether they can be trusted, and where they go if not.

    <store>/daemon.lock      flock of the daemon that holds the store, with its pid and socket
    <store>/db/              the LMDB environment
    <store>/clean.json       what the data file looked like at the last clean close; removed while open
    <store>/set-aside-*/     environments that could not be trusted, each with a file REASON

LMDB maps its file: a truncated one is SIGBUS and a garbled page can abort the process, so nothing is opened on faith.
A data file that is not as a clean close left it is audited by py-lmdb's verifier, which reads bytes and never maps
them; then its records are (audit.py). A file that fails is moved aside, never deleted, and the store starts empty: it
is a cache. Only what a file says can do that; a disk, a permission or memory that fails us is an error.
"""

import fcntl
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import lmdb
import structlog
from lmdb.verify import VerifyError, verify

from kvcached import layout
from kvcached.errors import StoreError
from kvcached.layout import Tables

log = structlog.get_logger()
_MAX_PROBLEMS_TOLD = 3


class UnsoundError(Exception):
    """Files that must not be used, and why."""

    def __init__(self, problems: list[str]) -> None:
        n_more = len(problems) - _MAX_PROBLEMS_TOLD
        super().__init__("; ".join(problems[:_MAX_PROBLEMS_TOLD] + [f"and {n_more} more"] * (n_more > 0)))


class StoreLock:
    """Exclusive possession of a store, until released or the process ends, however it ends."""

    def __init__(self, store: Path, note: str) -> None:
        """Raises StoreError, naming the holder, if another process has it."""
        path = store / "daemon.lock"
        try:
            store.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StoreError(f"the store {store} cannot be made or opened: {error}") from None
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = path.read_text().strip() or "another process"
            os.close(self._fd)
            raise StoreError(f"the store {store} is held by {holder}") from None
        os.ftruncate(self._fd, 0)
        os.write(self._fd, f"kvcached, pid {os.getpid()}, {note}\n".encode())

    def release(self) -> None:
        os.close(self._fd)


@dataclass(frozen=True, slots=True)
class StoreFiles:
    """Paths of one store. The caller holds its lock."""

    store: Path

    @property
    def db(self) -> Path:
        return self.store / "db"

    @property
    def data(self) -> Path:
        return self.db / "data.mdb"

    @property
    def _clean(self) -> Path:
        return self.store / "clean.json"

    def is_trusted(self) -> bool:
        """Whether there is no data file, or it is as the last clean close left it."""
        return not self.data.exists() or self._is_as_left()

    def verify(self) -> None:
        """Reads every page without mapping any. Raises UnsoundError."""
        try:
            problems: list[str] = verify(str(self.data))  # type: ignore[no-untyped-call]
        except VerifyError as error:
            raise UnsoundError([str(error)]) from None
        except OSError as error:
            raise StoreError(f"the store {self.store} cannot be read: {error}") from None
        if problems:
            raise UnsoundError(problems)

    def set_aside(self, reason: str) -> Path:
        """Moves the environment away. Returns where it is now."""
        target = self.store / time.strftime("set-aside-%Y%m%dT%H%M%S")
        while target.exists():
            target = target.with_name(target.name + "+")
        self.db.rename(target)
        (target / "REASON").write_text(reason + "\n")
        return target

    def all_set_aside(self) -> list[str]:
        """What was moved away and is still there: path and reason."""
        found = sorted(self.store.glob("set-aside-*"))
        return [f"{path}: {(path / 'REASON').read_text().strip()}" for path in found if (path / "REASON").exists()]

    def open(self, map_bytes: int) -> tuple[lmdb.Environment, Tables]:
        """Opens the environment, from now on not clean, with the settings that were measured to be durable.

        metasync=False may lose the last commit in a power cut, never the database; sync=False and writemap can.

        Raises:
            UnsoundError: it is not a store of ours.
            StoreError: it cannot be opened now.
        """
        env = None
        try:
            self._clean.unlink(missing_ok=True)
            self.db.mkdir(mode=0o700, parents=True, exist_ok=True)
            (self.db / "lock.mdb").unlink(missing_ok=True)  # readers of a dead daemon; we hold the store's own lock
            env = lmdb.open(
                str(self.db),
                map_size=map_bytes,
                max_dbs=len(layout.TABLES),
                max_readers=256,
                metasync=False,
                mode=0o600,
            )
            layout.claim(env)
            return env, Tables.open(env)
        except (lmdb.Error, OSError) as error:
            if env:
                env.close()
            if isinstance(error, layout.OF_THE_FILE):
                raise UnsoundError([f"not a store of kvcached, or of another version: {error}"]) from None
            raise StoreError(
                f"the store {self.store} cannot be opened with a map of {map_bytes} bytes: {error}"
            ) from None

    def mark_clean(self) -> None:
        """To be called when the environment is closed. Where that fails, the next start looks closely."""
        try:
            self._clean.write_text(json.dumps(self._signature()))
        except OSError as error:
            log.warning("the store could not be marked as closed cleanly", store=str(self.store), reason=str(error))

    def size(self) -> int:
        """Bytes of the data file; 0 if there is none."""
        return self.data.stat().st_size if self.data.exists() else 0

    def _is_as_left(self) -> bool:
        try:
            return bool(json.loads(self._clean.read_text()) == self._signature())
        except (OSError, ValueError):
            return False

    def _signature(self) -> dict[str, int]:
        stat = self.data.stat()
        return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "inode": stat.st_ino}
