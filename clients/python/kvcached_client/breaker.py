"""A circuit breaker: after a few failures in a row, stop asking for a while, so that a dead daemon costs nothing."""

import threading
import time
from collections.abc import Callable


class CircuitBreaker:
    """Closed: calls pass. Open: they do not, until a pause is over; then one call tries, and decides.

    The pause doubles from `pause_seconds` up to `max_pause_seconds` with each failed try. Thread-safe.
    """

    def __init__(
        self,
        *,
        n_failures: int = 3,
        pause_seconds: float = 1.0,
        max_pause_seconds: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._n_failures, self._first_pause, self._max_pause = n_failures, pause_seconds, max_pause_seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._failures = 0
        self._pause = pause_seconds
        self._next_try = 0.0  # while open

    @property
    def is_open(self) -> bool:
        return self._failures >= self._n_failures

    def allows(self) -> bool:
        """Whether a call may be made now. Whoever is let through while the circuit is open holds the only try."""
        with self._lock:
            if not self.is_open:
                return True
            if self._clock() < self._next_try:
                return False
            self._next_try = self._clock() + self._pause
            return True

    def succeeded(self) -> None:
        with self._lock:
            self._failures, self._pause = 0, self._first_pause

    def failed(self) -> None:
        with self._lock:
            self._failures += 1
            if self.is_open:
                self._next_try = self._clock() + self._pause
                self._pause = min(2 * self._pause, self._max_pause)
