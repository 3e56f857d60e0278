"""What becomes of damage: written down, set aside, fetched again, and healed at its own place or told to be lost.

Rows of table `damage` say how far it is: `found`, `wanted` (a person asked for the repair), `queued` (set aside, to be
fetched again), `unhealable`. Bytes that are equal to the recorded digest heal the version where it was; other bytes
are a new version, and the old one is unhealable. Nothing is deleted: what is set aside lies in ARCHIVE/damaged.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import nullcontext, suppress
from dataclasses import replace
from typing import Final, cast

from syncd import checker
from syncd.archive import Archive
from syncd.catalog import Catalog
from syncd.checker import HARMLESS, OF_MEDIA, Finding
from syncd.diff import DAY, Owing
from syncd.errors import ItemError, SiteError
from syncd.index import Index
from syncd.logs import Log
from syncd.model import Item, Kind, Method
from syncd.sites import Sites

KEPT_DAYS: Final = 9
MOST_ALONE: Final = 20  # damaged items: beyond that a disk or a memory fails, and a person decides
_OF_ITEM: Final = "pat_num = ? AND kind = ? AND num = ?"
_OF_D: Final = f"d.pat_num = ? AND d.kind = ? AND d.num = ? AND d.code IN ({', '.join('?' * len(OF_MEDIA))})"
NO_ITEM: Final = Item(0, cast("Kind", ""), 0)
OUTCOMES: Final = ("healed", "queued", "unhealable")
LANE: Final = "verify"  # of table `site`
_DUE: Final = (  # somebody still fetches the item
    "EXISTS (SELECT 1 FROM duty d WHERE d.pat_num = damage.pat_num AND d.kind = damage.kind AND d.num = damage.num)"
    " OR damage.kind = 'thumbnail' AND EXISTS (SELECT 1 FROM item i WHERE i.pat_num = damage.pat_num AND"
    " i.kind = 'document' AND i.num = damage.num AND i.thumbnail_due = 1)"
)


def key(item: Item) -> tuple[int, str, int]:
    """An item as parameters of a query; a row that rotted may hold any bytes as its kind."""
    return item.pat_num, item.kind.encode(errors="replace").decode(), item.num


def note(index: Index, log: Log, item: Item, findings: Iterable[Finding], now: float) -> None:
    """Write down what a look at one item found; what was found before and is right again is forgotten."""
    bad = {found.path: found for found in findings if found.code not in HARMLESS}
    with index.transaction():
        known = index.rows(f"SELECT path, state FROM damage WHERE {_OF_ITEM}", *key(item))  # noqa: S608 - our own text
        before = {row["path"]: row["state"] for row in known}
        for path, state in before.items():
            if path not in bad and state != "queued":
                index.run("DELETE FROM damage WHERE path = ?", path)
                _healed(index, log, now, item=item.full_id)
        for path, found in bad.items():
            if path not in before:
                _put(index, found, "found", now)
                log.error("damage_found", item=item.full_id, version=found.version or 0, reason=found.code)


def _healed(index: Index, log: Log, now: float, **ids: object) -> None:
    """Tell it, and count it for the status: by day, of the last week and a little more."""
    days: dict[str, int] = json.loads(index.meta("healed") or "{}")
    days = {day: count for day, count in days.items() if abs(now / DAY - int(day)) < KEPT_DAYS}
    today = str(int(now // DAY))
    index.remember("healed", json.dumps(days | {today: days.get(today, 0) + 1}))
    log.info("version_healed", **ids)


def want(index: Index, item: Item, path: str, code: str, now: float) -> None:
    """A person asks the lock's holder to look at this again, and to repair it; NO_ITEM: a path that is no item's."""
    index.run(
        "INSERT INTO damage (path, pat_num, kind, num, code, state, found_at) VALUES (?, ?, ?, ?, ?, 'wanted', ?)"
        " ON CONFLICT DO UPDATE SET state = CASE state WHEN 'queued' THEN state ELSE 'wanted' END",
        *(path, *key(item), code, now),
    )


def take_up(index: Index, item: Item) -> bool:
    """Whether a person wants this item repaired; from now on it is in hand."""
    sql = f"UPDATE damage SET state = 'found' WHERE state = 'wanted' AND {_OF_ITEM}"  # noqa: S608 - our own text
    return index.run(sql, *key(item)) > 0


def few(index: Index) -> bool:
    """Whether so little is damaged that no disk or memory must be suspected."""
    return int(index.value("SELECT count(*) FROM damage WHERE state != 'unhealable'")) <= MOST_ALONE


def _put(index: Index, found: Finding, state: str, now: float, seen_at: float | None = None) -> None:
    item = cast("Item", found.item)
    index.run(
        "INSERT INTO damage VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET state = excluded.state,"
        " seq = coalesce(excluded.seq, seq), seen_at = excluded.seen_at",
        *(found.path, *key(item), found.seq, found.code, state, now, seen_at),
    )


def mend(
    index: Index, archive: Archive, log: Log, found: Finding, now: float, person: bool = True, actor: str = "daemon"
) -> str:
    """Repair one finding as far as that goes: `healed`, `queued` (fetched again), `unhealable`, or "" for nothing.

    `person`: somebody asked for it, and is told; else what cannot be healed stays a named state.
    """
    if found.code in HARMLESS or found.code in ("queued", "index_damaged"):
        return ""
    try:
        said = _mended(index, archive, found, now)
    except (ItemError, SiteError) as error:  # its disk does not let it be touched; one that is gone ends the repair
        if isinstance(error, SiteError) and error.reason == "archive_missing":
            raise
        said = "unhealable"
    if found.item is not None:
        _tell(index, log, found, said, now, now if person and said == "unhealable" else None, actor)
    return said


def _tell(index: Index, log: Log, found: Finding, outcome: str, now: float, seen_at: float | None, actor: str) -> None:
    item = cast("Item", found.item).full_id
    with index.transaction():
        if outcome == "healed":
            index.run("DELETE FROM damage WHERE path = ?", found.path)
        else:
            _put(index, found, outcome, now, seen_at)
        index.record("repair", now, actor, item=item, seq=found.seq, code=found.code, outcome=outcome)
    version = found.version or 0
    if outcome == "healed":
        _healed(index, log, now, item=item, version=version)
    elif outcome == "queued":
        log.warning("damage_set_aside", item=item, version=version, reason=found.code)
    else:
        log.warning("version_unhealable", item=item, version=version, reason=found.code)


def _mended(index: Index, archive: Archive, found: Finding, now: float) -> str:
    if found.code in ("wrong_mode", "unreadable") and _right_mode_mends(index, archive, found):
        return "healed"
    if found.item is None:
        return _mend_patient(index, archive, found.path)
    if found.path.startswith("index.db") or found.code == "unrecorded":
        return _mend_row(index, found, now)
    if found.path.endswith(".json"):
        return _mend_sidecar(index, archive, found.item, found.path)
    revision = fetchable(index, found.item, found.version)
    if revision is None:
        return "unhealable"
    _set_aside(archive, found.path)
    _owe(index, found.item, revision, now)
    return "queued"


def _right_mode_mends(index: Index, archive: Archive, found: Finding) -> bool:
    """Settle the mode; whether no more was lacking. Raises ItemError for a folder of no item that stays closed."""
    with suppress(ItemError) if found.code == "unreadable" else nullcontext():
        archive.settle_mode(found.path)
    if found.code == "wrong_mode":
        return True
    if found.item is None:
        archive.survey(found.path)
        return True
    again = checker.check_item(index, archive, found.item, checker.Tally())
    return all(each.path != found.path for each in again if each is not None)


def _set_aside(archive: Archive, path: str) -> None:
    folder, _, name = path.rpartition("/")
    if name in archive.survey(folder):
        archive.set_aside(path)


def fetchable(index: Index, item: Item, version: int | None) -> str | None:
    """The revision that is listed, where Open Dental may still have this version's bytes: it is the newest one.

    None for what vanished, is older than another version, or was never an item of this index.
    """
    source = Item(item.pat_num, "document", item.num) if item.kind == "thumbnail" else item
    newest = f"SELECT max(version) FROM version WHERE {_OF_ITEM}"  # noqa: S608 - our own text
    if version is None or index.value(newest, *key(item)) != version:
        return None
    revision: str | None = index.value(
        f"SELECT revision FROM item JOIN patient USING (pat_num) WHERE {_OF_ITEM} AND left_at IS NULL"  # noqa: S608
        " AND vanished_at IS NULL AND missing_since_at IS NULL AND pending = 0",
        *key(source),
    )
    return revision


def is_listed_so(index: Index, item: Item, version: int | None) -> bool:
    """Whether Open Dental lists the very revision that is archived as this version."""
    known = index.known_item(item)
    revision = fetchable(index, item, version)
    return (
        known is not None and revision is not None and (item.kind == "thumbnail" or known.archived_revision == revision)
    )


def _owe(index: Index, item: Item, revision: str, now: float) -> None:
    if item.kind != "thumbnail":
        index.owe(Owing(cast("Method", item.kind), item, revision, now), "repair", now)
        return
    with index.transaction():
        index.set_item(Item(item.pat_num, "document", item.num), "thumbnail_due = 1")
        sql = "UPDATE patient SET thumbnails_after_at = 0, thumbnails_failures = 0 WHERE pat_num = ?"
        index.run(sql, item.pat_num)


def _mend_patient(index: Index, archive: Archive, path: str) -> str:
    """patient.json says who it is, as the last roster did."""
    patient = index.patient(int(path.split("/")[1]))
    if patient is None or not patient.last_name:
        return "unhealable"
    if archive.read_patient(patient.pat_num) is not None:
        return "healed"  # meanwhile
    _set_aside(archive, path)
    archive.write_patient(patient)
    return "healed"


def _mend_row(index: Index, found: Finding, now: float) -> str:
    """The index is disposable: a sound sidecar says what its row should."""
    version = found.sidecar
    if version is None:
        return "unhealable"
    with index.transaction():
        index.run(
            f"DELETE FROM version WHERE seq IN (?, ?) OR ({_OF_ITEM} AND version = ? AND sidecar = ?)",  # noqa: S608
            *(found.seq, version.seq, *key(version.item), version.version, version.sidecar),
        )
        later = f"SELECT 1 FROM version WHERE {_OF_ITEM} AND seq > ?"  # noqa: S608 - our own text
        if index.value(later, *key(version.item), version.seq) is None:
            index.set_item(version.item, "current_seq = NULL")  # its item names the newest one, whatever it said
        index.put_version(version, now)
        index.remember("audit_unsure", f"seq-{version.seq}")  # the audit log may tell of it already
    return "healed"


def _mend_sidecar(index: Index, archive: Archive, item: Item, path: str) -> str:
    """Written again from the index, which knows the listing of the newest version only."""
    newest = max(Catalog(index).versions(item), key=lambda version: version.seq, default=None)
    known = index.known_item(item)
    named = item.kind in ("mount-image", "thumbnail")  # their listing is a number and a name
    if newest is None or newest.sidecar_path != path or known is None:
        return "unhealable"
    if not named and known.revision != newest.revision:
        return "unhealable"
    listing = {"DocNum": item.num, "FileName": newest.file_name} if named else newest.listing
    _set_aside(archive, path)
    archive.write_sidecar(replace(newest, listing=listing))
    return "healed"


# --- after it was fetched again


def settle(index: Index, archive: Archive, log: Log, item: Item, now: float) -> None:
    """The item was fetched: what has its bytes back is healed; what was set aside and has not is unhealable."""
    sql = f"SELECT d.path, d.state, d.seq, sha256, version FROM damage d JOIN version v USING (seq) WHERE {_OF_D}"  # noqa: S608
    for row in index.rows(sql, *key(item), *OF_MEDIA):
        if archive.digest(row["path"]) == row["sha256"]:
            with index.transaction():
                index.run("DELETE FROM damage WHERE path = ?", row["path"])
                index.run("UPDATE version SET checked_at = ? WHERE seq = ?", now, row["seq"])
                index.record("healed", now, item=item.full_id, seq=row["seq"])
            _healed(index, log, now, item=item.full_id, version=row["version"])
        elif row["state"] == "queued":
            index.run("UPDATE damage SET state = 'unhealable' WHERE path = ?", row["path"])
            index.record("unhealable", now, item=item.full_id, seq=row["seq"])
            log.error("version_unhealable", item=item.full_id, version=row["version"], reason="other_bytes")


def give_up(index: Index) -> int:
    """What was queued and is fetched by nobody any more (it vanished meanwhile) is unhealable; how many."""
    return index.run(f"UPDATE damage SET state = 'unhealable' WHERE state = 'queued' AND NOT ({_DUE})")  # noqa: S608


def tell(index: Index, sites: Sites, now: float) -> None:
    """Damage that nobody was told of is a named state of the mirror; it degrades it, it stops nothing."""
    open_damage = index.value("SELECT 1 FROM damage WHERE seen_at IS NULL") is not None
    if open_damage and sites.reason(LANE) is None:
        sites.failed(SiteError("archive_damaged"), now, lane=LANE)
    elif not open_damage:
        sites.works(LANE, now)


# --- the archive itself is older than the index


def look_for_lost(index: Index, archive: Archive, log: Log, now: float) -> int:
    """Look at once at what was recorded after the archive's own last number; how many items were looked at.

    No version is recorded before the archive knows its number: an archive that was put back from a backup lacks it.
    """
    last = index.value("SELECT max(seq) FROM version") or 0
    known = archive.last_seq()
    if last <= known:
        return 0
    rows = index.rows("SELECT DISTINCT pat_num, kind, num FROM version WHERE seq > ?", known)
    for item in (Item(row["pat_num"], row["kind"], row["num"]) for row in rows):
        note(index, log, item, filter(None, checker.check_item(index, archive, item, checker.Tally())), now)
    archive.note_seq(last)  # what it lacks is written down
    return len(rows)
