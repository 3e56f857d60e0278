"""What the story stands on: the doors of one lane, and the named states of everything outside.

A lane's trouble is a row of table `site`, so that status, the other lane and the next process see it: `api`,
`listings`, `sheets` and `roster` (answers that cannot be trusted), `placing`, `drop`, `archive`, `database`. While a
row stands, its lane waits until `next_try_at`, then tries once.
"""

from __future__ import annotations

import itertools
import json
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING

from syncd.audit import Entry, Head
from syncd.errors import SiteError, SyncdError, TransientError
from syncd.pacing import site_delay

if TYPE_CHECKING:
    from syncd.archive import Archive
    from syncd.audit import AuditLog
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
    "index_lost": "archive",
    "archive_missing": "archive",
    "archive_taken": "archive",
    "resources_exhausted": "archive",
    "archive_read_only": "archive",
    "archive_full": "archive",
    "state_full": "archive",
    "disk_error": "archive",
    "other_database": "database",
    "database_went_back": "database",
}
AUDIT_SLICE = 500  # entries of the audit log written with one fsync
SLOWLY = 900.0  # seconds: refused keys and logins are not tried more often than four times an hour
NEW_ARCHIVE = "a new archive needs an existing, empty folder: make [archive] path, or mount its disk"
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
    audit: AuditLog


def put_times_right(index: Index, now: float, went_back: bool) -> None:
    """After the machine's clock was set: what was to come by the old clock may lie years ahead by the new one.

    Waits end, or last as long as they may at most; what is missing has to stay missing for `vanish_after` anew. Where
    the clock went back a list may be older than it looks, so no list is younger than the hour from which is placed.
    """
    looks = "CASE state WHEN 'cleaning' THEN ?1 + 86400 ELSE ?1 + 300 END"
    with index.transaction():
        anew = "UPDATE item SET missing_since_at = ? WHERE missing_since_at IS NOT NULL AND vanished_at IS NULL"
        index.run(anew, now)
        if not went_back:
            return
        index.run("UPDATE item SET archived_at = ?1 WHERE thumbnail_due = 1 AND archived_at > ?1", now)
        index.run("UPDATE site SET next_try_at = ?1, since_at = min(since_at, ?1)", now)
        index.run("UPDATE guard SET ended_at = min(ended_at, ?1)", now)
        index.run("UPDATE list SET polled_at = ?1 - 3600 WHERE polled_at > ?1 - 3600", now)
        index.run("UPDATE list SET next_try_at = ?1 WHERE next_try_at > ?1", now)
        ages = "CASE kind WHEN 'document' THEN 180 * 86400 ELSE 90 * 86400 END"
        index.run(f"UPDATE item SET refetch_at = min(refetch_at, ?1 + {ages}) WHERE refetch_at > ?1 + 90 * 86400", now)  # noqa: S608 - our own text
        index.run("UPDATE put_back SET next_look_at = min(next_look_at, ?1)", now)
        index.run("UPDATE duty SET next_try_at = ?1 WHERE next_try_at > ?1", now)
        index.run(f"UPDATE attempt SET asked_at = min(asked_at, ?1), next_look_at = min(next_look_at, {looks})", now)  # noqa: S608 - our own text
        index.run("UPDATE patient SET thumbnails_after_at = min(thumbnails_after_at, ?1 + 2592000)", now)
        for key in ("roster_at", "drop_swept_at", "database_believed_at", "feed_off_until"):
            if index.meta_time(key) > now:
                index.remember(key, None)


def nothing_vanishes(index: Index) -> bool:
    """Whether the office's database went back: what it lacks may come again."""
    return index.value("SELECT 1 FROM site WHERE lane = 'database'") is not None


def claim_archive(doors: Doors) -> None:
    """See that the archive is this index's own; an empty folder becomes it, where the index knows none.

    Raises SiteError: index_lost (the archive has a history that this index knows nothing of), archive_missing (not
    mounted, or another one), archive_read_only, archive_full.
    """
    known, marker = doors.index.meta("archive_id"), doors.archive.marker_id()
    if known is None:
        known = _new_archive(doors, marker)
    doors.archive.check(known)


def _new_archive(doors: Doors, marker: str | None) -> str:
    """The id of an archive that is made here, or was by a start that ended before it could write that down."""
    intended = doors.index.meta("intended_archive_id")
    if marker is not None and marker != intended:
        raise SiteError("index_lost")
    if intended is None or marker is None:
        intended = uuid.uuid4().hex
        doors.index.remember("intended_archive_id", intended)
        try:
            doors.archive.create(intended)
        except SiteError as error:
            if error.reason != "archive_missing":
                raise
            raise SiteError("archive_missing", NEW_ARCHIVE) from error
    with doors.index.transaction():
        doors.index.remember("archive_id", intended)
        doors.index.remember("intended_archive_id", None)
    return intended


def settle_audit(index: Index, audit: AuditLog, now: float) -> int:
    """Move what waits in table `audit_entry` to the audit log; how many entries. Not inside a transaction.

    Whoever does it holds the log from the reading of the entries until they are out of the index: so each is written
    once, whatever crashes. Raises SiteError log_unwritable or disk_error; then they wait for the next time.
    """
    if index.value("SELECT 1 FROM audit_entry LIMIT 1") is None:
        return 0
    while (unsure := index.meta("audit_unsure")) is not None:
        _forget_told(index, audit)
        index.run("DELETE FROM meta WHERE key = 'audit_unsure' AND value = ?", unsure)
    moved, sure = 0, "NOT EXISTS (SELECT 1 FROM meta WHERE key = 'audit_unsure')"  # in one look with the entries
    with audit.appending() as appender:
        while rows := index.rows(f"SELECT * FROM audit_entry WHERE {sure} ORDER BY id LIMIT ?", AUDIT_SLICE):  # noqa: S608 - our own text
            entries = [Entry(r["entry"], r["at"], r["actor"], r["verb"], json.loads(r["facts"])) for r in rows]
            head = appender.append(entries, audit_head(index), now)
            with index.transaction():
                index.remember("audit_head", str(head))
                index.run("DELETE FROM audit_entry WHERE id <= ?", rows[-1]["id"])
            moved += len(rows)
    return moved


def audit_head(index: Index) -> Head | None:
    """The last line of the audit log that this index knows of; None when it knows of none."""
    return Head.parse(index.meta("audit_head"))


def _forget_told(index: Index, audit: AuditLog) -> None:
    """After versions were taken over from the archive: those that the audit log tells of are not told again."""
    told = (str(facts.get("entry")) for facts in audit.facts())
    while names := list(itertools.islice(told, AUDIT_SLICE)):
        index.run(f"DELETE FROM audit_entry WHERE entry IN ({', '.join('?' * len(names))})", *names)  # noqa: S608 - marks only


def tell_audit_head(audit: AuditLog, log: Log) -> None:
    """The audit log's last line into the journal, where who writes the chain anew cannot change it."""
    try:
        head = audit.head()
        log.info("audit_head", n=head.n, hash=head.hash)
    except SiteError as error:
        log.warning("state_changed", lane="audit", reason=error.reason)


class Sites:
    """The named states, in the index. One object a lane; all of them share the table, which each reads once a turn."""

    def __init__(self, index: Index, log: Log) -> None:
        self._index = index
        self._log = log
        self._seen: dict[str, tuple[str, float]] | None = None

    def look_again(self) -> None:
        """Another turn begins: see what others wrote."""
        self._seen = None

    def wait_until(self, *lanes: str) -> float:
        """Seconds since the epoch before which one of these lanes shall not try; 0 when none is in trouble."""
        return max((next_try_at for lane, (_, next_try_at) in self._troubles().items() if lane in lanes), default=0.0)

    def reason(self, lane: str) -> str | None:
        """The code of the lane's trouble, or None."""
        return self._troubles().get(lane, (None,))[0]

    def _troubles(self) -> dict[str, tuple[str, float]]:
        if self._seen is None:
            rows = self._index.rows("SELECT lane, reason, next_try_at FROM site")
            self._seen = {row["lane"]: (row["reason"], row["next_try_at"]) for row in rows}
        return self._seen

    def failed(self, error: SyncdError, now: float, lane: str | None = None) -> None:
        """Take down a lane for this error, or keep it down with growing distance."""
        if not isinstance(error, (SiteError, TransientError)):
            return
        lane = lane or LANE_OF.get(error.reason, "api")
        failures = 1 + int(self._index.value("SELECT failures FROM site WHERE lane = ?", lane) or 0)
        wait = SLOWLY if error.reason in REFUSED else site_delay(failures)
        wait = max(wait, getattr(error, "retry_after", None) or 0.0)
        before = self.reason(lane)
        self._seen = None
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
            self._seen = None
            with self._index.transaction():
                self._index.run("DELETE FROM site WHERE lane = ?", lane)
                self._close(lane, now)
            self._log.info("state_changed", lane=lane, reason="ok")

    def _close(self, lane: str, now: float) -> None:
        self._index.run("UPDATE incident SET until_at = ? WHERE lane = ? AND until_at IS NULL", now, lane)
