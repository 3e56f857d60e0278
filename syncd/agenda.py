"""Which list to poll next. Pure and deterministic: times come in as seconds since the epoch, UTC.

Every list in turn, the one polled longest ago first, none again before `rest` seconds are over.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass

from syncd.model import ListKey, ListState


@dataclass(frozen=True, slots=True)
class Policy:
    """`rest`: seconds in which a list that was polled is not worth another request."""

    rest: float = 60.0

    @classmethod
    def for_interval(cls, seconds: float, patients: int, time_zone: str = "UTC") -> Policy:
        """The policy for one request every `seconds`, for a practice of so many patients in that zone."""
        del patients, time_zone  # a turn of every list asks for neither
        return cls(rest=60.0 * seconds)


class Agenda:
    """Hands out each list once until `polled` or `failed` says what became of it. O(log n) a decision."""

    def __init__(self, lists: Iterable[ListState], policy: Policy, now: float) -> None:
        self._policy = policy
        self._order = 0
        self._heap: list[tuple[float, int, ListKey]] = []
        self._current: dict[ListKey, int] = {}  # 0: handed out
        self._again: set[ListKey] = set()  # named while handed out
        for state in lists:
            self.add(state, now)

    def next(self, now: float) -> ListKey | None:
        """The list that is most worth a request, or None: nothing is worth one now."""
        while self._heap:
            due, order, key = self._heap[0]
            if self._current.get(key) != order:
                heapq.heappop(self._heap)
            elif due > now:
                return None
            else:
                heapq.heappop(self._heap)
                self._current[key] = 0
                return key
        return None

    def polled(self, key: ListKey, now: float, rows: int, newest: float | None) -> None:
        """A complete listing was read. `newest`: of rows new to us, else None."""
        del rows, newest  # what changed lately does not matter to a turn of every list
        self._put(key, 0.0 if key in self._again else now + self._policy.rest)
        self._again.discard(key)

    def failed(self, key: ListKey, now: float, until: float) -> None:
        """The list could not be read: not again before `until`."""
        self._put(key, max(now, until))
        self._again.discard(key)

    def named(self, key: ListKey, now: float) -> None:
        """Somebody says that this list changed: poll it next, and once more if it is being polled just now."""
        del now
        if self._current.get(key):
            self._put(key, 0.0)
        elif key in self._current:
            self._again.add(key)

    def add(self, state: ListState, now: float) -> None:
        """A list that is new to us; polled at 0 means never, so it comes before all others."""
        del now
        self._current.setdefault(state.key, 0)
        self._put(state.key, state.polled_at + self._policy.rest if state.polled_at else 0.0)

    def remove(self, pat_num: int) -> None:
        """The patient left: none of the patient's lists is handed out any more."""
        for key in [key for key in self._current if key[0] == pat_num]:
            del self._current[key]
            self._again.discard(key)

    def due_at(self) -> float | None:
        """When `next` will have something, if nothing else happens; None without lists."""
        while self._heap and self._current.get(self._heap[0][2]) != self._heap[0][1]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def _put(self, key: ListKey, due: float) -> None:
        if key not in self._current:
            return
        self._order += 1
        self._current[key] = self._order
        heapq.heappush(self._heap, (due, self._order, key))
