"""Clocks for the simulated practice: the real one, and one that moves only when it is told to."""

import heapq
import itertools
import threading
import time
from collections.abc import Callable
from typing import Protocol


class Clock(Protocol):
    """What the simulated practice needs of time."""

    def now(self) -> float:
        """Seconds since the epoch, UTC."""
        ...

    def sleep(self, seconds: float) -> None:
        """Let that many seconds pass."""
        ...

    def call_later(self, seconds: float, action: Callable[[], None]) -> None:
        """Run `action` once, that many seconds from now."""
        ...


class RealClock:
    """The machine's clock; later calls run in daemon threads."""

    def now(self) -> float:
        """Seconds since the epoch, UTC."""
        return time.time()

    def steady(self) -> float:
        """Seconds that never jump, shared by all processes since boot."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def sleep(self, seconds: float) -> None:
        """Block the calling thread for that many seconds."""
        time.sleep(max(0.0, seconds))

    def call_later(self, seconds: float, action: Callable[[], None]) -> None:
        """Run `action` in a thread of its own, that many seconds from now."""
        timer = threading.Timer(seconds, action)
        timer.daemon = True
        timer.start()


class SimulatedClock:
    """Stands still until somebody sleeps or advances it, so that years pass in seconds. Thread-safe.

    `start`: seconds since the epoch, UTC. Later calls run in the thread that moves the clock past them, at their own
    time.
    """

    def __init__(self, start: float) -> None:
        self._now = start
        self._skew = 0.0
        self._lock = threading.RLock()
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def now(self) -> float:
        """Seconds since the epoch, UTC."""
        with self._lock:
            return self._now

    def steady(self) -> float:
        """Seconds that passed by sleeping and advancing; `set` does not move them."""
        with self._lock:
            return self._now - self._skew

    def sleep(self, seconds: float) -> None:
        """Move the clock forward by that many seconds; returns at once."""
        self.advance(max(0.0, seconds))

    def advance(self, seconds: float) -> None:
        """Move the clock forward by `seconds` (not negative), running the later calls that fall due on the way."""
        if seconds < 0:
            raise ValueError("a simulated clock does not go back; use set()")
        with self._lock:
            end = self._now + seconds
            while self._due and self._due[0][0] <= end:
                at, _, action = heapq.heappop(self._due)
                self._now = max(self._now, at)
                action()
            self._now = max(self._now, end)

    def set(self, now: float) -> None:
        """Put the clock to `now` (seconds since the epoch), also backwards, as a wrong clock that is corrected."""
        with self._lock:
            self._skew += now - self._now
            self._due = [(at + now - self._now, order, action) for at, order, action in self._due]
            self._now = now

    def call_later(self, seconds: float, action: Callable[[], None]) -> None:
        """Run `action` once, when the clock has moved on by that many seconds."""
        with self._lock:
            heapq.heappush(self._due, (self._now + seconds, next(self._order), action))
