"""What the story stands on: the doors of one lane, and the named states of everything outside.

A lane's trouble is a row of table `site`, so that status, the other lane and the next process see it: `api`,
`listings` and `roster` (answers that cannot be trusted), `placing`, `drop`, `archive`, `database`. While a row stands,
its lane waits until `next_try_at`, then tries once.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING

from syncd.errors import SiteError, SyncdError, TransientError
from syncd.pacing import site_delay

if TYPE_CHECKING:
    from syncd.archive import Archive
    from syncd.config import Settings
    from syncd.index import Index
    from syncd.logs import Log
    from syncd.ports import Api, Clock, Drop

LANE_OF = {
    "key_cannot_download": "placing",
    "placements_refused": "placing",
    "drop_unreachable": "drop",
    "drop_refused": "drop",
    "host_key_changed": "drop",
    "archive_missing": "archive",
    "archive_read_only": "archive",
    "archive_full": "archive",
    "disk_error": "archive",
    "other_database": "database",
    "database_went_back": "database",
}
SLOWLY = 900.0  # seconds: refused keys and logins are not tried more often than four times an hour
REFUSED = frozenset({"key_refused", "key_cannot_download", "drop_refused", "host_key_changed"})


@dataclass(frozen=True, slots=True)
class Doors:
    """Everything outside that one lane may touch, each on its own connection."""

    settings: Settings
    index: Index
    archive: Archive
    api: Api
    drop: Drop
    clock: Clock
    log: Log


def claim_archive(doors: Doors) -> None:
    """See that the archive is this index's own; an empty folder becomes it, where the index knows none.

    Raises SiteError: archive_missing (not mounted, or another one), archive_read_only, archive_full.
    """
    known, marker = doors.index.meta("archive_id"), doors.archive.marker_id()
    if known is None:
        if marker is not None:
            raise SiteError("archive_missing", "this index does not know it: run `syncd reindex` to take it over")
        known = uuid.uuid4().hex
        doors.archive.create(known)
        doors.index.remember("archive_id", known)
    doors.archive.check(known)


class Sites:
    """The named states, in the index. One object a lane; all of them share the table."""

    def __init__(self, index: Index, log: Log) -> None:
        self._index = index
        self._log = log

    def wait_until(self, *lanes: str) -> float:
        """Seconds since the epoch before which one of these lanes shall not try; 0 when none is in trouble."""
        marks = ", ".join("?" * len(lanes))
        return float(self._index.value(f"SELECT max(next_try_at) FROM site WHERE lane IN ({marks})", *lanes) or 0)  # noqa: S608 - marks only

    def reason(self, lane: str) -> str | None:
        """The code of the lane's trouble, or None."""
        found: str | None = self._index.value("SELECT reason FROM site WHERE lane = ?", lane)
        return found

    def failed(self, error: SyncdError, now: float, lane: str | None = None) -> None:
        """Take down a lane for this error, or keep it down with growing distance."""
        if not isinstance(error, (SiteError, TransientError)):
            return
        lane = lane or LANE_OF.get(error.reason, "api")
        failures = 1 + int(self._index.value("SELECT failures FROM site WHERE lane = ?", lane) or 0)
        wait = SLOWLY if error.reason in REFUSED else site_delay(failures)
        before = self.reason(lane)
        with self._index.transaction():
            self._index.run(
                "INSERT INTO site VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET reason = excluded.reason,"
                " detail = excluded.detail, next_try_at = excluded.next_try_at, failures = excluded.failures",
                *(lane, error.reason, str(error), now, now + wait, failures),
            )
            if before != error.reason:
                self._close(lane, now)
                self._index.run(
                    "INSERT INTO incident (lane, reason, since_at) VALUES (?, ?, ?)", lane, error.reason, now
                )
        if before != error.reason:
            self._log.warning("state_changed", lane=lane, reason=error.reason, next_try_at=now + wait)

    def works(self, lane: str, now: float) -> None:
        """The lane did its work: its trouble, if any, is over."""
        before = self.reason(lane)
        if before is not None:
            with self._index.transaction():
                self._index.run("DELETE FROM site WHERE lane = ?", lane)
                self._close(lane, now)
            self._log.info("state_changed", lane=lane, reason="ok")

    def _close(self, lane: str, now: float) -> None:
        self._index.run("UPDATE incident SET until_at = ? WHERE lane = ? AND until_at IS NULL", now, lane)
