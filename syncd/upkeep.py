"""What the pull lane does when it has nothing else to do: the day's copy of the index, the week's drill, the scrub.

The scheduler's marks come often; when each was done last is in the index, and over restarts.
"""

from __future__ import annotations

import datetime as dt
import shutil
from pathlib import Path
from typing import Final, Literal

from syncd import copies, repair, retrieve
from syncd.catalog import Catalog, drawn
from syncd.checker import Finding
from syncd.errors import SiteError, UsageError
from syncd.model import Item
from syncd.report import WEEK
from syncd.schema import Row
from syncd.scrub import Scrub
from syncd.sites import Doors, Sites

Mark = Literal["copy", "drill", "scrub"]
_ANY: Final = (  # what is known to be damaged proves nothing new
    "sidecar = 1 AND bytes < ? AND NOT EXISTS (SELECT 1 FROM damage d WHERE d.pat_num = v.pat_num AND d.kind = v.kind"
    " AND d.num = v.num)"
)


class Upkeep:
    """Turns without thread or sleep, like the lane that has it."""

    def __init__(self, doors: Doors, sites: Sites) -> None:
        self._doors, self._scrub = doors, Scrub(doors, sites)
        self._due = set[Mark]()

    def due(self, mark: Mark) -> None:
        """The scheduler says that something may be due."""
        self._due.add(mark)

    def turn(self, now: float) -> bool:
        """What is due, then a slice of the scrub; whether there is more to do at once."""
        marks, self._due = self._due, set()
        if "copy" in marks:
            copy_index(self._doors, now)
        if "scrub" in marks:
            self._scrub.due()
        if "drill" in marks and (damaged := drill(self._doors, now)) is not None:
            self._scrub.look_at(damaged)
        try:
            return self._scrub.turn(now)
        except SiteError:
            self._scrub.abandon()
            raise


def copy_index(doors: Doors, now: float) -> None:
    """The day's copy of the index, where it knows a version. A failure is told; the next mark tries again."""
    settings, index = doors.settings, doors.index
    day = dt.datetime.fromtimestamp(now, settings.zone).date().isoformat()
    if index.value("SELECT 1 FROM version LIMIT 1") is None:
        return
    try:
        if copies.make(index, settings.state_path / "copies", day):
            index.remember("index_copied_at", repr(now))
            doors.log.info("index_copied")
    except SiteError as error:
        doors.log.warning("index_copy_failed", reason=error.reason)


def drill(doors: Doors, now: float) -> Item | None:
    """Once a week: restore a random version as a person would, which compares it with what was archived.

    The item, where that failed: then it is damage. Where there is no room for the copy the next mark tries again.
    """
    index, folder = doors.index, doors.settings.state_path / "drill"
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed in its drill
    if now < index.meta_time("drill_due_at") <= now + WEEK:
        return None
    room = shutil.disk_usage(doors.settings.state_path).free // 10  # the index lives on that disk
    if not (rows := drawn(index, 1, _ANY, room)):
        return None
    row, item = rows[0], Item(rows[0]["pat_num"], rows[0]["kind"], rows[0]["num"])
    try:
        passed = _restores(doors, item, row, folder)
    except UsageError:
        return None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    with index.transaction():
        index.remember("drilled_at", repr(now))
        index.remember("drill_due_at", repr(now + WEEK))
        index.remember("drill_failed", "no" if passed else "yes")
    if passed:
        doors.log.info("drill_passed", item=item.full_id, version=row["version"])
        return None
    doors.log.error("drill_failed", item=item.full_id, version=row["version"])
    repair.note(index, doors.log, item, [Finding("damaged", row["path"], item, row["version"], row["seq"])], now)
    return item


def _restores(doors: Doors, item: Item, row: Row, folder: Path) -> bool:
    catalog, zone = Catalog(doors.index), doors.settings.zone
    try:
        done = retrieve.restore(catalog, doors.archive, item, folder, row["archived_at"], zone, name="drill")
        return done.path is not None
    except SiteError as error:
        if error.reason == "archive_missing":
            raise
        return False
