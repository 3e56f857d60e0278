"""[hook]: a program of the user's is called for each newly archived version, in the order of `seq`, at least once.

What it was told is in the index, and so is what it has to be told: nothing waits in memory, and a restart goes on where
the last process was. A call that fails is made again, with growing distance, and the versions behind it wait; where the
one behind it passes and this one has failed again and again, this one is passed over. A version that is recorded late,
after a crash, is told late.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from syncd import notifier
from syncd.catalog import Catalog, Row
from syncd.errors import SiteError
from syncd.index import Index
from syncd.sites import Doors, Sites

PATIENCE: Final = 10.0  # seconds that a call may take
AT_ONCE: Final = 20  # versions told before that is written down: so many are told again after a crash, at most
TRIES: Final = 3
LATE: Final = 1000  # numbers below the last one that are waited for
IDLE: Final = 1.0
_KEY: Final = "hook"
_TOLD: Final = (  # ids and digests: nothing that names a person
    *("practice", "id", "full_id", "seq", "kind", "num", "pat_num", "mount_num", "version", "current", "path"),
    *("sha256", "bytes", "media_type", "revision", "archived_at", "state"),
)


@dataclass(frozen=True, slots=True)
class Told:
    """How far the program was told: up to `seq`, but for numbers that were given out and are not recorded (yet)."""

    seq: int
    missing: tuple[int, ...] = ()

    def remember(self, index: Index) -> None:
        """Write it down."""
        index.remember(_KEY, json.dumps({"seq": self.seq, "missing": self.missing}))

    @classmethod
    def remembered(cls, index: Index) -> Told | None:
        """What was written down; None while there is no hook."""
        text = index.meta(_KEY)
        return None if text is None else cls(**json.loads(text))


def begin(index: Index, sites: Sites, wanted: bool, now: float) -> None:
    """At start: a hook that is new hears of what is archived from now on; one that is gone leaves nothing."""
    told = Told.remembered(index)
    if wanted and told is None:
        Told(index.value("SELECT max(seq) FROM version") or 0).remember(index)
    elif told is not None and not wanted:
        index.remember(_KEY, None)
        sites.works("hook", now)


class Hook:
    """Turns without thread or sleep, like a lane."""

    def __init__(self, doors: Doors, sites: Sites, command: Sequence[str]) -> None:
        self._index, self._log, self._sites, self._command = doors.index, doors.log, sites, command
        self._archive = str(doors.settings.archive.path)
        self._catalog = Catalog(doors.index, doors.settings.name)
        self._failed: tuple[int, int] = (0, 0)  # a seq, and how often its call failed in a row

    def turn(self, now: float, over: Callable[[], bool] = lambda: False) -> float:
        """Tell of some versions; seconds since the epoch of the next turn. `over`: the process ends, as does a call."""
        self._sites.look_again()
        if (until := self._sites.wait_until("hook")) > now:
            return until
        told = Told.remembered(self._index) or Told(0)
        rows, count, problem = [*self._late(told), *self._catalog.follow(told.seq, limit=AT_ONCE)], 0, ""
        for row in rows:
            problem = "" if over() else self._call(row, over)
            if problem or over():
                break
            count += 1
        if problem and not over() and self._is_alone(rows[count:], problem, over):
            count, problem = count + 2, ""
        if count:
            self._after(told, [row["seq"] for row in rows[:count]]).remember(self._index)
        if problem and not over():
            self._sites.failed(SiteError("hook_failing", problem), now, lane="hook")
        elif count:
            self._sites.works("hook", now)
        return now if count else now + IDLE

    def _call(self, row: Row, over: Callable[[], bool]) -> str:
        told = {"schema_version": 1, "archive": self._archive} | {name: row[name] for name in _TOLD}
        return notifier.run_command(self._command, told, PATIENCE, "\n", over)

    def _is_alone(self, rows: Sequence[Row], problem: str, over: Callable[[], bool]) -> bool:
        """Whether it is the first of these versions that the program cannot take: the second one passes."""
        seq, (failing, times) = rows[0]["seq"], self._failed
        self._failed = (seq, times + 1 if seq == failing else 1)
        if self._failed[1] < TRIES or len(rows) == 1 or self._call(rows[1], over):
            return False
        row = rows[0]
        self._log.warning("hook_gave_up", item=row["full_id"], version=row["version"], seq=seq, failure=problem)
        return True

    def _late(self, told: Told) -> list[Row]:
        """Versions with a lower number than was told already: published before a crash, recorded only now."""
        sql = "SELECT seq FROM version WHERE sidecar = 1 AND seq IN (SELECT value FROM json_each(?)) ORDER BY seq"
        late = self._index.rows(sql, json.dumps(told.missing))
        return [row for each in late for row in self._catalog.follow(each["seq"] - 1, limit=1)]

    def _after(self, told: Told, done: Sequence[int]) -> Told:
        last = max(told.seq, *done)
        since = max(told.seq, last - LATE)
        rows = self._index.rows("SELECT seq FROM version WHERE seq > ? AND seq <= ?", since, last)
        new = set(range(since + 1, last + 1)).difference(row["seq"] for row in rows)
        return Told(last, tuple(sorted(new.union(told.missing).difference(done)))[-LATE:])
