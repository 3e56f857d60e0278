"""A complete listing against the index: what is new, changed, missing; what is owed; what may vanish. Pure.

All actions are computed here first; the story then carries them out. Nothing here orders stamps: a revision differs or
it does not.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from syncd.model import FieldValue, Item, Kind, Listed, Method

HOUR = 3600.0
DAY = 24 * HOUR
ROW_BEFORE_FILE = 3.0  # a row can be there seconds before its file (facts.md)
YOUNG_STAMP = 600.0  # several edits fit into one second: such a version is fetched once more later
MOUNT_AGES = (1 * DAY, 3 * DAY, 7 * DAY, 30 * DAY)
MOUNT_EVERY = 90 * DAY
DOCUMENT_EVERY = 180 * DAY
VENDOR_CAP = 100  # rows in any answer without a Limit (api-implementation.txt)

# Fields that make the revision of a row without a usable stamp. Never serverDateTime (moves by itself) and never
# docCategory (a name that is edited elsewhere for all rows at once): design.md section 5.
DIGESTED: Mapping[str, tuple[str, ...]] = {
    "document": ("Description", "Note", "DateCreated", "DocCategory", "ToothNumbers", "ProvNum", "filePath"),
    "mount": ("Description", "Note", "DateCreated", "DocCategory", "ToothNumbers", "ProvNum"),
    "mount-image": ("mountRevision", "FileName"),
    "sheet": ("SheetType", "DateTimeSheet", "InternalNote", "Description", "SheetDefNum", "DocNum", "ClinicNum"),
    "thumbnail": ("sourceRevision", "FileName"),
}
NO_STAMP = ("", "0001-01-01 00:00:00")


def revision(kind: Kind, stamp: str, fields: Mapping[str, FieldValue]) -> str:
    """The opaque string that differs when the row was edited: its stamp, or a digest of named fields without one.

    Stamps of very old sheets are `0001-01-01 00:00:00` (facts.md) and count as none.
    """
    if stamp not in NO_STAMP:
        return stamp
    named = json.dumps([fields.get(name) for name in DIGESTED[kind]], ensure_ascii=True)
    return "digest:" + hashlib.sha256(named.encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Known:
    """What the index says of one listed item."""

    item: Item
    revision: str
    archived_revision: str | None
    images_revision: str | None
    date_created: str
    pending: bool
    missing_since_at: float | None
    vanished: bool
    held_by: int | None
    not_found: bool


@dataclass(frozen=True, slots=True)
class Owing:
    """One request that a row makes necessary. `not_before`: seconds since the epoch."""

    method: Method
    item: Item
    revision: str
    not_before: float


@dataclass(frozen=True, slots=True)
class Difference:
    """Everything one complete listing changes. Rows that say nothing new appear nowhere."""

    changed: tuple[Listed, ...]
    owing: tuple[Owing, ...]
    uploads: tuple[Listed, ...]
    back: tuple[Item, ...]
    newly_missing: tuple[Known, ...]
    still_missing: tuple[Known, ...]

    @property
    def nothing(self) -> bool:
        """No action at all: the ordinary case."""
        return not (self.changed or self.owing or self.uploads or self.back or self.newly_missing or self.still_missing)


def compare(known: Mapping[Item, Known], rows: Sequence[Listed], kinds: Collection[Kind], now: float) -> Difference:
    """Compare one complete listing (its rows, in any order) with what the index knows of that list.

    `kinds`: what this practice wants mirrored. Items of other kinds are never owed.
    """
    changed: list[Listed] = []
    owing: list[Owing] = []
    uploads: list[Listed] = []
    back: list[Item] = []
    for row in rows:
        before = known.get(row.item)
        if before is None or before.revision != row.revision or before.pending != is_pending(row):
            changed.append(row)
        if before is not None and (before.missing_since_at is not None or before.vanished):
            back.append(row.item)
        if row.upload is not None and row.upload.content is not None:
            if before is None or before.archived_revision != row.revision:
                uploads.append(row)
        elif not is_pending(row):
            owing.extend(_owing(row, before, kinds, now))
    listed = {row.item for row in rows}
    missing = [k for k in known.values() if k.item not in listed and not k.vanished]
    return Difference(
        changed=tuple(changed),
        owing=tuple(owing),
        uploads=tuple(row for row in uploads if "document" in kinds),
        back=tuple(back),
        newly_missing=tuple(k for k in missing if k.missing_since_at is None),
        still_missing=tuple(k for k in missing if k.missing_since_at is not None),
    )


def is_pending(row: Listed) -> bool:
    """Its bytes are not in the practice yet: a URL that somebody's click will download, never ours to follow."""
    return row.upload is not None and row.upload.content is None and not row.upload.bad


def _owing(row: Listed, before: Known | None, kinds: Collection[Kind], now: float) -> Iterable[Owing]:
    item, methods = row.item, list[Method]()
    if item.kind in kinds and (before is None or before.archived_revision != row.revision):
        methods.append("mount" if item.kind == "mount" else "sheet" if item.kind == "sheet" else "document")
    wants_images = item.kind == "mount" and "mount-image" in kinds
    if wants_images and (before is None or before.images_revision != row.revision):
        methods.append("mount-images")
    if not methods:
        return ()
    at = now + settle_wait(row.stamp, row.server_time)
    return [Owing(method, item, row.revision, at) for method in methods]


def stamp_age(stamp: str, server_time: str) -> float | None:
    """Seconds from a stamp to the server's own time, both in office-local time; None where either is unreadable.

    The only place where a stamp is read as a time (design.md section 7, row before file).
    """
    try:
        return (dt.datetime.fromisoformat(server_time) - dt.datetime.fromisoformat(stamp)).total_seconds()
    except (ValueError, TypeError):
        return None


def local_time(text: str, zone: dt.tzinfo) -> float | None:
    """An office-local time as seconds since the epoch, or None where it is unreadable. A hint, never a proof."""
    try:
        return dt.datetime.fromisoformat(text).replace(tzinfo=zone).timestamp()
    except (ValueError, OverflowError):
        return None


def settle_wait(stamp: str, server_time: str) -> float:
    """Seconds to wait before a row's file is placed; unreadable and future stamps pass at once."""
    age = stamp_age(stamp, server_time)
    return ROW_BEFORE_FILE - age if age is not None and 0 <= age < ROW_BEFORE_FILE else 0.0


def refetch_at(
    kind: Kind, num: int, created_at: float | None, stamp_age_then: float | None, now: float
) -> float | None:
    """When an archived item is fetched again in an idle slot, or None for never.

    `created_at`: DateCreated as seconds since the epoch. `stamp_age_then`: seconds between stamp and placement.
    Mounts have no stamp: 1, 3, 7 and 30 days from creation, then every 90 days, spread by number. A DateCreated of
    the far future does not put it off.
    """
    if kind == "document":
        if stamp_age_then is not None and 0 <= stamp_age_then < YOUNG_STAMP:
            return now + YOUNG_STAMP
        return now + DOCUMENT_EVERY + spread(num, 7 * DAY)
    if kind != "mount":
        return None
    for age in MOUNT_AGES if created_at is not None else ():
        if (created_at or 0.0) + age > now:
            return min((created_at or 0.0) + age, now + MOUNT_EVERY)
    return now + MOUNT_EVERY * 0.9 + spread(num, MOUNT_EVERY * 0.1)


def spread(num: int, width: float) -> float:
    """A fixed point in [0, width) for a number, so that what was archived together is not fetched again together."""
    return (num * 2654435761 % 2**32) / 2**32 * width


def ripe(known: Known, now: float, vanish_after: float) -> bool:
    """Whether a second complete listing that lacks the item decides: far enough from the first, and not held.

    An item that never had a version and whose placement answered "not found" is decided by the next listing at once.
    """
    if known.held_by is not None or known.missing_since_at is None:
        return False
    if known.not_found and known.archived_revision is None:
        return True
    return now - known.missing_since_at >= vanish_after


def same_row(left: Listed, right: Listed) -> bool:
    """Whether the overlapping row of two pages is unchanged; serverDateTime moves by itself."""
    return left.item == right.item and _still(left) == _still(right) and left.upload == right.upload


def _still(row: Listed) -> dict[str, FieldValue]:
    return {name: value for name, value in row.fields.items() if name != "serverDateTime"}


def last_page(rows: int, limit: int) -> bool:
    """Whether a page of `rows` ends the listing when `limit` was sent.

    Exactly 100 rows are never the end: an office that caps every answer at 100 answers so to a larger Limit.
    """
    return rows < limit and rows != VENDOR_CAP
