"""The drop is left as it was found: what was staged for us is removed, also what comes late or was forgotten."""

from __future__ import annotations

import datetime as dt
import stat
from collections.abc import Sequence

from syncd.diff import DAY, HOUR
from syncd.errors import ItemError, TransientError
from syncd.model import Attempt, Seen
from syncd.naming import is_staging_name
from syncd.sites import Doors

LATE_LOOKS = (600.0, 3600.0, DAY)  # a name without an answer is emptied again at these ages: late writes happen
DEEPEST = 8  # folders within a folder of ours


class Cleaner:
    """The cleaning part of the pull lane."""

    def __init__(self, doors: Doors) -> None:
        self._doors = doors

    def names(self, folder: bytes) -> list[bytes] | None:
        """All names in a folder of the drop; none where it cannot be read; None where there is no such folder."""
        try:
            return self._doors.drop.names(folder)
        except ItemError:  # there, but not to be read: removing it will fail as well, and be tried again
            return []

    def clean(self, attempts: Sequence[Attempt], now: float) -> None:
        """Remove what was staged; names without an answer are emptied again later, for late writes happen."""
        again = [attempt for attempt in attempts if attempt.looks]
        if again and len(attempts) > 1:  # one of them may break the connection: after all others, and by itself
            for some in ([each for each in attempts if not each.looks], *([each] for each in again)):
                self.clean(some, now)
            return
        try:
            clean = self._removed(attempts)
        except TransientError:
            with self._doors.index.transaction():
                for attempt in attempts:
                    self._put_off(attempt, now)
            raise
        with self._doors.index.transaction():
            for attempt in attempts:
                self._cleaned(attempt, clean[attempt.id], now)

    def _removed(self, attempts: Sequence[Attempt]) -> dict[int, bool]:
        """By the attempt's id whether nothing of it is left."""
        files = [attempt for attempt in attempts if not attempt.staging.endswith("/")]
        gone = self._doors.drop.remove([attempt.staging.encode() for attempt in files]) if files else []
        clean = dict(zip((attempt.id for attempt in files), gone, strict=True))
        return clean | {each.id: self._emptied(each.staging.encode()) for each in attempts if each.id not in clean}

    def _put_off(self, attempt: Attempt, now: float) -> None:
        wait = min(60.0 * 4**attempt.looks, DAY)
        self._doors.index.set_attempt(attempt.id, "cleaning", now + wait, looks=min(attempt.looks + 1, 8))

    def _emptied(self, folder: bytes, depth: int = 0) -> bool:
        """Remove a folder of ours with all that the office wrote into it: a name with a slash made folders of it."""
        names = self.names(folder)
        if names is None:
            return True
        paths = [folder + name for name in names]
        kept = [path for path, removed in zip(paths, self._doors.drop.remove(paths), strict=True) if not removed]
        if depth < DEEPEST and all(self._emptied(path + b"/", depth + 1) for path in kept):
            remove = self._doors.drop.remove  # by its name where somebody put another thing in its place
            return remove([folder])[0] or remove([folder.rstrip(b"/")])[0]
        return False

    def _cleaned(self, attempt: Attempt, clean: bool, now: float) -> None:
        index = self._doors.index
        answered = attempt.placed_at is not None
        if not clean:
            self._put_off(attempt, now)
            self._doors.log.warning("drop_leftover", pat_num=attempt.pat_num, method=attempt.method)
            return
        later = () if answered else [at for at in LATE_LOOKS if attempt.asked_at + at > now]
        if later:
            index.set_attempt(attempt.id, "cleaning", attempt.asked_at + later[0], looks=0)
        else:
            index.forget_attempt(attempt.id)

    def sweep(self, now: float) -> int:
        """Once a day: remove names of ours that are older than a day and that no open attempt claims; how many.

        Where that breaks the connection it is tried again in an hour: all else goes on meanwhile.
        """
        try:
            stale = self._swept(now)
        except TransientError:
            self._doors.index.remember("drop_swept_at", str(now - DAY + HOUR))
            raise
        self._doors.index.remember("drop_swept_at", str(now))
        if stale:
            self._doors.log.info("drop_cleaned", count=stale)
        return stale

    def _swept(self, now: float) -> int:
        settings, index, drop = self._doors.settings, self._doors.index, self._doors.drop
        folder = settings.drop.folder.encode()
        if _open_to_others(*drop.look([b".", folder])):
            self._doors.log.warning("drop_open_to_others")
        claimed = {row["staging"].rstrip("/").encode() for row in index.rows("SELECT staging FROM attempt")}
        stale = 0
        for name in self.names(folder) or []:
            day = is_staging_name(name, settings.name)
            path = folder + b"/" + name
            if day is None or path in claimed or not _older_than_a_day(day, now):
                continue
            stale += drop.remove([path])[0] or self._emptied(path + b"/")
        return stale


def _open_to_others(login: Seen | None, folder: Seen | None) -> bool:
    """Whether other users of the site may enter both folders, and list or change the inner one."""
    return bool(login and folder and login.mode & folder.mode & stat.S_IXOTH and folder.mode & 0o006)


def _older_than_a_day(day: str, now: float) -> bool:
    return dt.datetime.strptime(day, "%Y%m%d").replace(tzinfo=dt.UTC).timestamp() < now - 2 * DAY
