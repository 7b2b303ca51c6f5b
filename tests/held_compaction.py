"""A daemon in this process whose workers compact when they are told to. Nothing here asserts."""

import threading
from pathlib import Path
from typing import Any
from unittest.mock import patch

from support import DaemonProcess

from kvcached import codec
from kvcached.config import Config
from kvcached.daemon import Daemon

compact = codec.compact


class HoldingDaemon(DaemonProcess):
    """Not in a process of its own: here compaction can be held, as long as it were if blocks were very large.

    events: "compacting" and "compacted" of each block, and whatever a test adds, in the order of what happened.
    """

    def __init__(self, directory: Path, n_workers: int) -> None:
        super().__init__(directory)
        self.events: list[str] = []
        self._n_workers, self._may_go_on = n_workers, threading.Event()
        self._started = threading.Semaphore(0)
        self._patch = patch.object(codec, "compact", self._compact)
        self._daemon: Daemon | None = None

    def start(self, timeout: float = 30.0) -> None:  # noqa: ARG002 - it takes no time
        config = Config(
            store_path=self.store, socket_path=self.socket, quota_bytes="64MiB", http_port=0, workers=self._n_workers
        )
        self._daemon = Daemon(config)
        self._patch.start()
        self._daemon.start()

    def stop(self) -> int:
        self.let_go()
        if self._daemon:
            self._daemon.stop()
        self._patch.stop()
        return 0

    def wait_for_compactions(self, n: int) -> bool:
        """Whether so many have begun, since the last time."""
        return all(self._started.acquire(timeout=30) for _ in range(n))

    def let_go(self) -> None:
        """Whatever is compacted from now on is not held."""
        self._may_go_on.set()

    def hold(self) -> None:
        self._may_go_on.clear()

    def _compact(self, *args: Any) -> Any:
        self.events.append("compacting")
        self._started.release()
        if not self._may_go_on.wait(60):
            raise RuntimeError("nobody let go of this compaction")
        self.events.append("compacted")
        return compact(*args)
