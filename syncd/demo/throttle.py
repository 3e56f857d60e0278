"""The vendor's throttle: start to start per customer key, with a short queue in front of the 429."""

import threading

from syncd.demo.clock import Clock


class Throttle:
    """Spaces requests by `interval` seconds from start to start; 0 is not throttled.

    Up to `queue` early requests wait for their turn (a slow 200); one more is refused with 429, and with
    `Retry-After` when `retry_after` is set. `tolerance`: seconds that a request may be early without being held.
    """

    def __init__(
        self, clock: Clock, interval: float = 0.0, *, queue: int = 2, retry_after: bool = True, tolerance: float = 0.0
    ) -> None:
        self.clock = clock
        self.interval = interval
        self.queue = queue
        self.retry_after = retry_after
        self.tolerance = tolerance
        self.refused = 0
        self._lock = threading.Lock()
        self._free_from = 0.0
        self._waiting = 0

    def enter(self) -> float | None:
        """Wait for the turn. Returns the seconds waited, or None when the request is refused."""
        if self.interval <= 0:
            return 0.0
        with self._lock:
            now = self.clock.now()
            wait = self._free_from - now
            if wait <= self.tolerance:
                self._free_from = now + self.interval
                return 0.0
            if self._waiting >= self.queue:
                self.refused += 1
                return None
            self._waiting += 1
            self._free_from += self.interval
        self.clock.sleep(wait)
        with self._lock:
            self._waiting -= 1
        return wait

    def seconds_left(self) -> float:
        """Seconds until a request would be in time."""
        with self._lock:
            return max(0.0, self._free_from - self.clock.now())
