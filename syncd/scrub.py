"""The archive against the index: adopt what the index does not know, rebuild the index, re-hash what is archived.

The archive alone is enough: every sidecar says which listing its file came from. Nothing here sends a request. The
daemon hashes a part of the archive each day in the idle turns of a lane; what it finds damaged is set aside and fetched
again where Open Dental still lists it with the very revision that is archived, else only told.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import groupby
from pathlib import Path
from typing import Final, cast

from syncd import checker, copies, destroy, published, repair
from syncd.archive import Archive
from syncd.checker import Finding, Tally
from syncd.config import Settings
from syncd.diff import YOUNG_STAMP, local_time, refetch_at
from syncd.errors import ItemError, UsageError
from syncd.index import Index
from syncd.logs import Log
from syncd.model import WAS, Item, Kind, Tombstone, Version
from syncd.naming import archive_path_is_ours, parse_id
from syncd.publishing import again_at
from syncd.schema import Row
from syncd.sites import Doors, Sites

SLICE: Final = 8  # pieces of work in one turn, of 8 MB at most: nothing else waits much longer than half a second
NOTED: Final = 1000  # files found right that are noted in one transaction
ALONE: Final = frozenset({"damaged", "missing"})  # what the scrub repairs by itself
PERHAPS_SENT: Final = "the index is older than what became of it: look in Open Dental before you try again"
_KEY: Final = "pat_num, CAST(kind AS BLOB) AS kind, num"
_DAMAGE: Final = "FROM damage WHERE kind <> ''"  # of items
_END: Final = object()
_MOUNT: Final = (
    "INSERT OR IGNORE INTO item (pat_num, kind, num, revision, first_seen_at, fields)"
    " VALUES (?, 'mount', ?, '', ?, '{}')"
)
_OLDEST: Final = "WHERE sidecar = 1 ORDER BY checked_at, seq"
_OLDEST_SOUND: Final = (  # what is known to be damaged was looked at when the day's part began
    "WHERE sidecar = 1 AND NOT EXISTS (SELECT 1 FROM damage d WHERE d.pat_num = v.pat_num AND d.kind = v.kind"
    " AND d.num = v.num) ORDER BY checked_at, seq"
)


@dataclass(slots=True)
class Findings:
    """What was adopted. `foreign`: paths of all else, relative to the archive. `known`: versions in the index now."""

    versions: int = 0
    bytes: int = 0
    known: int = 0
    foreign: list[str] = field(default_factory=list)


def adopt_newer(doors: Doors, now: float) -> int:
    """Adopt the whole archive where it carries sequence numbers that this index never gave out; how many versions.

    That is an index from a backup: what it does not know would otherwise be fetched again.
    """
    if doors.archive.last_seq() <= int(doors.index.meta("last_seq") or 0):
        return 0
    _end_put_backs(doors.index, now)
    return adopt_all(doors.index, doors.archive, doors.settings, now).versions


def adopt_all(index: Index, archive: Archive, settings: Settings, now: float) -> Findings:
    """Record every version of the archive that the index does not know, patient by patient.

    What had vanished is in no sidecar: that comes from the archive's published copy.
    """
    findings, last = Findings(), 0
    tombstones: list[Tombstone] = []
    patients = [patient for patient in map(archive.read_patient, archive.patients()) if patient is not None]
    known = {row["pat_num"] for row in index.rows("SELECT pat_num FROM patient")}
    index.add_patients([patient for patient in patients if patient.pat_num not in known], settings.sync.patient_names)
    for _, versions in _by_patient(archive.walk(), findings, tombstones):
        with index.transaction():
            _list_as_archived(index, versions)
            for version in versions:
                if index.value("SELECT 1 FROM version WHERE seq = ?", version.seq) is None:
                    index.put_version(version, now)
                    findings.versions += 1
                    findings.bytes += version.bytes
                last = max(last, version.seq)
            index.remember("audit_unsure", str(last))  # the audit log may tell of them already
            _derive(index, versions, settings)
    with index.transaction():
        for tombstone in tombstones:
            destroy.learn(index, tombstone)
            last = max(last, tombstone.seq)
        _learn_vanished(index, archive)
        _look_again(index, archive, settings)
        _note_missing(index, archive, now)
        index.reserve_seqs(0, above=max(last, archive.last_seq()))
    return findings


def _learn_vanished(index: Index, archive: Archive) -> None:
    """What had vanished when the published copy was made, but for what the index knows to have come back since."""
    last, gone = published.vanished(archive.root)
    since = "SELECT 1 FROM version WHERE (pat_num, kind, num) = (?1, ?2, ?3) AND seq > ?4 UNION ALL"
    since += " SELECT 1 FROM absence WHERE (pat_num, kind, num) = (?1, ?2, ?3) AND back_at >= ?5"
    for item, at, became in gone:
        if index.value(since, *repair.key(item), last, at) is not None:
            continue
        told = "vanished_at = coalesce(vanished_at, ?), missing_since_at = ?, became = coalesce(became, ?)"
        index.set_item(item, f"{told}, thumbnail_due = 0, held_by = NULL", at, at, became)
        index.run("DELETE FROM duty WHERE (pat_num, kind, num) = (?, ?, ?)", *repair.key(item))


def _note_missing(index: Index, archive: Archive, now: float) -> None:
    """A file that the published copy knows, and of which the sidecar alone is left, was archived and is gone."""
    for seq, item, path in published.versions(archive.root):
        if index.value("SELECT 1 FROM version WHERE seq = ?", seq) is None and archive_path_is_ours(path):
            names: Collection[str] = ()
            with suppress(ItemError):  # as above: of what lies there nothing is known
                names = archive.survey(str(Path(path).parent))
            if Path(path).name not in names and Path(path).with_suffix(".json").name in names:
                sql = "INSERT OR IGNORE INTO damage VALUES (?, ?, ?, ?, NULL, 'missing', 'found', ?, NULL)"
                index.run(sql, path, *repair.key(item), now)


def _look_again(index: Index, archive: Archive, settings: Settings) -> None:
    """A second look at a young stamp that was to come when the last file was archived is still to come."""
    last = index.value("SELECT max(archived_at) FROM version") or 0.0
    sql = f"SELECT DISTINCT {_KEY} FROM version WHERE archived_at > ?"  # noqa: S608 - our own text
    for item in map(_item_of, index.rows(sql, last - YOUNG_STAMP)):
        with suppress(ItemError):  # a folder that the disk does not give: `verify` tells it, and all else goes on
            for newest in archive.read_item(item)[-1:]:
                index.set_item(item, "refetch_at = ?", again_at(newest, settings.zone, newest.archived_at))


def _list_as_archived(index: Index, versions: Sequence[Version]) -> None:
    """Items are as their newest sidecars list them, unless the index knows better: a new description needs no bytes.

    A mount of which only images were archived is known as well: once no list has it, they vanish with it.
    """
    for version in {version.item: version for version in sorted(versions, key=lambda each: each.seq)}.values():
        known = next(iter(index.item_rows(version.item)), None)
        if known is None or (known["revision"] == known["archived_revision"] and known["current_seq"] < version.seq):
            index.put_archived_item(version)
        if version.item.kind == "mount-image" and version.mount_num is not None:
            index.run(_MOUNT, version.item.pat_num, version.mount_num, version.first_seen_at)


def _by_patient(
    found: Iterable[Version | Tombstone | str], findings: Findings, tombstones: list[Tombstone]
) -> Iterator[tuple[int, list[Version]]]:
    def versions() -> Iterator[Version]:
        for each in found:
            if isinstance(each, Version):
                yield each
            elif isinstance(each, Tombstone):
                tombstones.append(each)
            else:
                findings.foreign.append(each)

    for pat_num, group in groupby(versions(), key=lambda version: version.item.pat_num):
        yield pat_num, list(group)


def _derive(index: Index, versions: Sequence[Version], settings: Settings) -> None:
    """What the index remembers beside the versions: whole mounts, due thumbnails, the next fetch by age."""
    versions = sorted(versions, key=lambda version: version.seq)  # a mount's images come folder by folder
    newest = {version.item: version for version in versions}
    have = {(v.item.num, v.mount_num, v.source_revision) for v in versions if v.item.kind == "mount-image"}
    for image in versions:
        named = image.mount_images
        if image.mount_num is None or not named:
            continue
        if all((num, image.mount_num, image.source_revision) in have for num in named):
            mount = Item(image.item.pat_num, "mount", image.mount_num)
            index.set_item(mount, "images_revision = ?", image.source_revision)
    for version in versions:
        _link(index, version)
    for item, version in newest.items():
        created_at = local_time(str(version.listing.get("DateCreated") or ""), settings.zone)
        again = refetch_at(item.kind, item.num, created_at, None, version.archived_at)
        index.set_item(item, "refetch_at = coalesce(refetch_at, ?)", None if version.method == "note" else again)
        if "thumbnail" in settings.sync.kinds:
            index.owe_thumbnail(item)


def _link(index: Index, version: Version) -> None:
    """A document that was put back into Open Dental says in its sidecars which one it was before."""
    for flag in version.flags:
        if flag.startswith(WAS):
            pat_num, kind, num = parse_id(flag.removeprefix(WAS))
            old = Item(pat_num or version.item.pat_num, kind, num)
            columns = "(pat_num, kind, num, seq, fields, state, actor, made_at, became)"
            told = "SELECT ?1, ?2, ?3, ?4, '{}', 'done', 'daemon', ?5, ?6 WHERE NOT EXISTS (SELECT 1 FROM put_back"
            values = (*repair.key(old), version.seq, version.first_seen_at, version.item.num)
            index.run(f"INSERT INTO put_back {columns} {told} WHERE pat_num = ?1 AND became = ?6)", *values)
            index.set_item(old, "became = coalesce(became, ?)", version.item.full_id)


def _end_put_backs(index: Index, now: float) -> None:
    """What an older index has under way may have been sent since then: it is never sent a second time."""
    with index.transaction():
        for row in index.rows("SELECT * FROM put_back WHERE state NOT IN ('done', 'refused', 'lost')"):
            sql = "UPDATE put_back SET state = 'lost', outcome = ?, fields = '{}' WHERE id = ?"
            index.run(sql, PERHAPS_SENT, row["id"])
            item, entry = Item(row["pat_num"], row["kind"], row["num"]), f"put-back-{row['id']}-{row['made_at']:.0f}"
            told = {"item": item.full_id, "seq": row["seq"], "outcome": "lost"}
            index.record("put_back_ended", now, row["actor"], entry, **told)
            index.remember("audit_unsure", entry)  # the audit log may tell how it really ended
        sql = "UPDATE wish SET done_at = ?, outcome = ? WHERE verb = 'put-back' AND done_at IS NULL"
        index.run(sql, now, f"refused: {PERHAPS_SENT}")


def reindex(settings: Settings, archive: Archive, now: float) -> Findings:
    """Rebuild index.db from its newest sound copy and the archive, or from the archive alone; without one request.

    The old file stays beside it as `index.db.before-reindex`. The caller holds the lock. Raises UsageError where there
    is no archive to read. A copy keeps what only the index knew: what vanished, and when.
    """
    marker = archive.marker_id()
    if marker is None:
        raise UsageError("there is no archive at [archive] path: nothing to rebuild the index from")
    path = settings.state_path / "index.db"
    fresh = path.with_name("index.db.new")
    for leftover in _files(fresh):
        leftover.unlink(missing_ok=True)
    copy = next((each for each in copies.found(settings.state_path / "copies") if copies.is_sound(each, marker)), None)
    if copy is not None:
        shutil.copyfile(copy, fresh)
    index = Index(fresh)
    try:
        index.remember("archive_id", marker)
        index.run("DELETE FROM wish WHERE done_at IS NULL")  # of the copy's day: granted or refused long ago
        _end_put_backs(index, now)
        findings = adopt_all(index, archive, settings, now)
        findings.known = index.value("SELECT count(*) FROM version")
        index.value("PRAGMA wal_checkpoint(TRUNCATE)")  # not inside a transaction: there it is refused
    finally:
        index.close()
    for old in _files(path):
        if old.exists():
            old.replace(old.with_name(old.name.replace("index.db", "index.db.before-reindex", 1)))
    fresh.replace(path)
    return findings


def _files(path: Path) -> tuple[Path, Path, Path]:
    return path, path.with_name(path.name + "-wal"), path.with_name(path.name + "-shm")


# --- verify


def share_of(total: int, part: Fraction) -> int:
    """How many of `total` files a subset checks, at least one where there is any."""
    return min(total, -(-total * part.numerator // part.denominator))


def verify(
    index: Index, archive: Archive, tally: Tally, now: float, part: Fraction = Fraction(1), alone: bool = True
) -> Iterator[Finding]:
    """Check everything, or so large a part of the files, those that were checked longest ago. A stream of findings.

    `alone`: the caller holds the lock, so when a file was right is noted. SiteError archive_missing ends it.
    """
    walk = checker.check(index, archive, tally, alone)
    if alone:
        _put_right(index, now)
    if part != 1:
        count = share_of(index.value("SELECT count(*) FROM version WHERE sidecar = 1"), part)
        walk = _oldest(index, archive, tally, count, alone)
    for found in walk:
        if found is not None:
            yield found
        if alone and len(tally.right) >= NOTED:
            _note_right(index, tally, now)
    if alone:
        _note_right(index, tally, now)


def _oldest(index: Index, archive: Archive, tally: Tally, count: int, alone: bool) -> checker.Walk:
    items = [_item_of(row) for row in index.rows(f"SELECT {_KEY} FROM version {_OLDEST} LIMIT ?", count)]  # noqa: S608
    for item in dict.fromkeys(items):
        yield from checker.check_item(index, archive, item, tally, alone)


def note(index: Index, log: Log, found: Iterable[Finding], now: float, whole: bool) -> None:
    """Write down what a walk found; `whole`: it looked at everything, so what it did not find is right again."""
    by_item: dict[Item, list[Finding]] = {}
    if whole:
        by_item = {_item_of(row): [] for row in index.rows(f"SELECT DISTINCT {_KEY} {_DAMAGE}")}
    for each in found:
        if each.item is not None:
            by_item.setdefault(each.item, []).append(each)
    for item, of_item in by_item.items():
        repair.note(index, log, item, of_item, now)


def wish_of(found: Iterable[Finding]) -> list[tuple[int, str, int, str, str]]:
    """What the lock's holder is asked to repair, as the wish `repair` takes it."""
    wrong = [each for each in found if each.code not in checker.HARMLESS]
    return [(*repair.key(each.item or repair.NO_ITEM), each.path, each.code) for each in wrong]


def _put_right(index: Index, now: float) -> None:
    """What a clock that was ahead checked, or a flipped bit, would not be checked again before then."""
    index.run("UPDATE version SET checked_at = ?1 WHERE sidecar = 1 AND checked_at > ?1", now)


def _note_right(index: Index, tally: Tally, now: float) -> None:
    sql = "UPDATE version SET checked_at = ? WHERE seq IN (SELECT value FROM json_each(?))"
    index.run(sql, now, json.dumps(tally.right))
    tally.right.clear()


def _item_of(row: Row) -> Item:
    return Item(row["pat_num"], cast("Kind", checker.text_of(row["kind"])), row["num"])


class Scrub:
    """A part of the archive each day, the oldest checked first, in slices of a lane's idle turns.

    How much of the day's part is left is in the index: a restart goes on with it. The scheduler only calls `due`.
    """

    def __init__(self, doors: Doors, sites: Sites) -> None:
        self._doors, self._sites = doors, sites
        self._due = False
        self._again: list[Item] = []  # what was damaged before: looked at first
        self._item: Item | None = None
        self._walk: checker.Walk = iter(())
        self._found: list[Finding] = []
        self._tally = Tally()

    def due(self) -> None:
        """The scheduler's mark: the day's part may be due."""
        self._due = True

    def look_at(self, item: Item) -> None:
        """Before anything else: something is wrong with it."""
        self._again.append(item)

    def turn(self, now: float) -> bool:
        """One slice; whether there is more to do at once."""
        repair.tell(self._doors.index, self._sites, now)
        if self._due:
            self._due = False
            self._begin(now)
        if self._mend_others(now):
            return True
        for _ in range(SLICE):
            if self._item is None and not self._next():
                return False
            found = next(self._walk, _END)
            if found is _END:
                self._finish(now)
            elif isinstance(found, Finding):
                self._found.append(found)
        return True

    def _mend_others(self, now: float) -> bool:
        """What a person wants repaired and is no item's: modes of folders, and who a patient is; whether any was."""
        index = self._doors.index
        rows = index.rows("SELECT path, code FROM damage WHERE kind = '' LIMIT ?", SLICE)
        for row in rows:
            repair.mend(index, self._doors.archive, self._doors.log, Finding(row["code"], row["path"]), now)
            index.run("DELETE FROM damage WHERE path = ?", row["path"])  # if it is wrong yet, the next look tells it
        return bool(rows)

    def abandon(self) -> None:
        """The item in hand is looked at from its start again: its archive was away."""
        self._item, self._found, self._tally = None, [], Tally()

    def _begin(self, now: float) -> None:
        """Start the day's part if its time has come: every `every` seconds on the whole, however late a mark was."""
        index, settings = self._doors.index, self._doors.settings.verify
        due_at = index.meta_time("scrub_due_at")
        if now < due_at <= now + settings.every:
            return
        first = due_at == 0  # everything was hashed when it was archived
        on_time = due_at <= now < due_at + settings.every
        total = 0 if first else index.value("SELECT count(*) FROM version WHERE sidecar = 1")
        with index.transaction():
            repair.give_up(index)
            _put_right(index, now)
            index.remember("scrub_due_at", repr((due_at if on_time else now) + settings.every))
            index.remember("scrub_left", str(share_of(total, settings.subset)))
        self._again = [_item_of(row) for row in index.rows(f"SELECT DISTINCT {_KEY} {_DAMAGE} LIMIT 1000")]

    def _next(self) -> bool:
        """Take the next item in hand: what a person asked for, what was damaged, what was checked longest ago."""
        index = self._doors.index
        rows = index.rows(f"SELECT {_KEY} {_DAMAGE} AND state = 'wanted' LIMIT 1")
        if not rows and not self._again and int(index.meta("scrub_left") or 0) > 0:
            rows = index.rows(f"SELECT {_KEY} FROM version v {_OLDEST_SOUND} LIMIT 1")  # noqa: S608
        if not rows and not self._again:
            return False
        self._item = _item_of(rows[0]) if rows else self._again.pop()
        self._walk = checker.check_item(index, self._doors.archive, self._item, self._tally)
        return True

    def _finish(self, now: float) -> None:
        """Write down what the look at one item found, then repair what may be repaired."""
        index, item, found, tally = self._doors.index, cast("Item", self._item), self._found, self._tally
        self.abandon()
        with index.transaction():
            wanted = repair.take_up(index, item)
            left = int(index.meta("scrub_left") or 0)
            index.remember("scrub_left", str(max(0, left - max(1, tally.versions))))
            _note_right(index, tally, now)
            repair.note(index, self._doors.log, item, found, now)
        alone = not wanted and repair.few(index)
        for each in found:
            if wanted or (alone and each.code in ALONE and repair.is_listed_so(index, item, each.version)):
                repair.mend(index, self._doors.archive, self._doors.log, each, now, person=wanted)
        if 0 < left <= max(1, tally.versions):
            index.remember("scrubbed_at", repr(now))
            self._doors.log.info("archive_scrubbed")
