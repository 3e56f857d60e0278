"""Destroying by order (`syncd destroy`): the one thing that removes archived bytes, and all that is told of them.

An order is a row of table `tombstone`, written before anything is removed, for all that the number can be; whoever
holds the lock carries it out, and begins again after any crash: tombstone into the archive, files away, rows away,
copies of the index made anew, done. Ids, digests, who, when and the ticket stay, here and in the archive; by them the
number is never listed, fetched or recorded again under that patient. Backups and exports are beyond its reach.
"""

from __future__ import annotations

import datetime as dt
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from syncd import copies
from syncd.archive import Archive
from syncd.errors import ItemError, UsageError
from syncd.index import Index
from syncd.model import DESTROYED, KIND_OF, TOMBSTONE, Item, Tombstone, kin
from syncd.schema import Row

if TYPE_CHECKING:
    from syncd.config import Settings
    from syncd.logs import Log

BEYOND: Final = "backups, exports and the office's own copy are beyond syncd's reach"
_TICKET: Final = re.compile(r"[A-Za-z0-9_./:+ -]{1,100}")  # what the audit log writes as it is
_OF_ITEM: Final = "pat_num = ? AND kind = ? AND num = ?"
_TOLD: Final = (  # what a row of table item tells beside the item's ids
    *("mount_num", "archived_revision", "images_revision", "missing_since_at", "held_by", "refetch_at", "sha256"),
    *("current_version", "current_seq", "bytes", "media_type", "archived_at", "date_created", "stamp", "category"),
    *("description", "img_type", "tooth_numbers", "file_name"),
)


def scope(index: Index, item: Item) -> list[Item]:
    """All that is destroyed with an item: whatever its number can be; of a mount, its images with their thumbnails."""
    sql = "SELECT num FROM item WHERE pat_num = ? AND kind = 'mount-image' AND mount_num = ? ORDER BY num"
    images = index.rows(sql, item.pat_num, item.num) if item.kind == "mount" else []
    inside = [each for row in images for each in kin(Item(item.pat_num, "mount-image", row["num"]))]
    return [*kin(item), *inside]


def doomed(index: Index, item: Item) -> Row:
    """What an order would remove: ids, files, bytes; and `equal`: full ids of what has the same bytes and stays."""
    items = scope(index, item)
    known = [each for each in items if index.item_rows(each)]
    rows = [row for each in known for row in index.rows(f"SELECT * FROM version WHERE {_OF_ITEM}", *_key(each))]  # noqa: S608 - our own text
    digests = json.dumps(sorted({row["sha256"] for row in rows}))
    sql = "SELECT DISTINCT pat_num, kind, num FROM version WHERE kind <> 'thumbnail' AND sha256 IN"
    sql += " (SELECT value FROM json_each(?))"
    same = [Item(row["pat_num"], row["kind"], row["num"]) for row in index.rows(sql, digests)]
    media = [row for row in rows if row["sidecar"] == 1]
    said = {"files": len(media), "bytes": sum(row["bytes"] for row in media), "paths": [row["path"] for row in media]}
    equal = [each.full_id for each in sorted(same) if each not in items]
    return {"items": [each.full_id for each in known], **said, "equal": equal}


def order(index: Index, item: Item, ticket: str, now: float, actor: str, above: int = 0) -> str:
    """Write an order down, durably; it is carried out by `finish`. `above`: the last seq that the archive knows.

    Raises UsageError: the item is unknown or destroyed already, or the ticket has other than plain characters.
    """
    if not _TICKET.fullmatch(ticket):
        raise UsageError("--ticket: up to 100 of letters, digits, blanks and _ . / : + -, and no name of a patient")
    if index.is_destroyed(item) or not index.item_rows(item):
        raise UsageError(f"{item.full_id} " + ("is destroyed already" if index.is_destroyed(item) else "is not known"))
    told = doomed(index, item)
    with index.transaction():
        (seq,) = index.reserve_seqs(1, above)
        for each in scope(index, item):
            sql = f"SELECT DISTINCT sha256 FROM version WHERE {_OF_ITEM} ORDER BY seq"  # noqa: S608 - our own text
            digests = tuple(row["sha256"] for row in index.rows(sql, *_key(each)))
            _put(index, Tombstone(each, seq, now, actor, ticket, digests))
        index.record("destroy", now, actor, item=item.full_id, items=told["items"], ticket=ticket, count=told["files"])
    return f"{item.full_id}: {told['files']} files are destroyed; {BEYOND}"


def is_open(index: Index, item: Item) -> bool:
    """Whether an order to destroy the item is still under way."""
    sql = f"SELECT 1 FROM tombstone WHERE {_OF_ITEM} AND done_at IS NULL"  # noqa: S608 - our own text
    return index.value(sql, *_key(item)) is not None


def learn(index: Index, tombstone: Tombstone) -> None:
    """A tombstone that the archive tells of: an index that was put back, or made anew, forgets the item again."""
    with index.transaction():
        columns = "(pat_num, kind, num, revision, first_seen_at, fields) VALUES (?, ?, ?, '', ?, '{}')"
        index.run(f"INSERT OR IGNORE INTO item {columns}", *_key(tombstone.item), tombstone.at)
        for item in kin(tombstone.item):
            digests = tombstone.digests if item == tombstone.item else ()
            told = (tombstone.seq, tombstone.at, tombstone.actor, tombstone.ticket, digests)
            _put(index, Tombstone(item, *told))
            _forget(index, item)


def finish(index: Index, archive: Archive, log: Log, settings: Settings, now: float) -> bool:
    """Carry out every open order, whatever of it was done before; whether there was one. The caller holds the lock.

    Raises ItemError where the disk does not let something go: that order stays open, the others are done.
    """
    rows = index.rows("SELECT * FROM tombstone WHERE done_at IS NULL ORDER BY seq, kind, num")
    if not rows:
        return False
    with archive.publishing:  # nothing of the item is half published
        archive.note_seq(max(archive.last_seq(), *(row["seq"] for row in rows)))
        stuck = [row for row in rows if not _removed(index, archive, log, _tombstone(row))]
    rows = [row for row in rows if row not in stuck]
    if rows and not _end(index, archive, log, settings, rows, now):
        return True
    if stuck:
        raise ItemError("io_error", "files that are to be destroyed are still there")
    return True


def _removed(index: Index, archive: Archive, log: Log, tombstone: Tombstone) -> bool:
    """Remove what archive and index have of an item; whether nothing of syncd's is left."""
    item = tombstone.item
    try:
        there = index.item_rows(item) or archive.survey(str(Path(tombstone.path).parent))
        foreign = archive.bury(tombstone) if there else 0
    except ItemError as error:
        log.warning("item_not_destroyed", item=item.full_id, seq=tombstone.seq, failure=error.failure)
        return False
    if foreign:
        log.warning("foreign_left", item=item.full_id, seq=tombstone.seq, count=foreign)
    _forget(index, item)
    return True


def _end(index: Index, archive: Archive, log: Log, settings: Settings, rows: list[Row], now: float) -> bool:
    """Nothing in the copies tells of them, either; False: somebody reads, and the end comes later."""
    index.run("INSERT INTO description_text (description_text) VALUES ('optimize')")  # drops what its pages keep
    archive.withdraw_published()
    copies.renew(index, settings.state_path, dt.datetime.fromtimestamp(now, settings.zone).date().isoformat())
    if index.value("PRAGMA wal_checkpoint(TRUNCATE)"):  # somebody reads: its log still holds what was deleted
        return False
    with index.transaction():
        index.remember("audit_unsure", f"destroyed-{rows[-1]['seq']}")  # an index that was put back tells it again
        known = [tombstone for tombstone in map(_tombstone, rows) if index.item_rows(tombstone.item)]
        for row in rows:  # and none that was ordered meanwhile
            sql = f"UPDATE tombstone SET done_at = ? WHERE {_OF_ITEM}"  # noqa: S608 - our own text
            index.run(sql, now, row["pat_num"], row["kind"], row["num"])
        for tombstone in known:
            facts = {"item": tombstone.item.full_id, "ticket": tombstone.ticket, "count": len(tombstone.digests)}
            name = f"destroyed-{tombstone.seq}-{tombstone.item.full_id}"
            index.record("destroyed", tombstone.at, tombstone.actor, name, **facts)
    for tombstone in known:
        log.info("item_destroyed", item=tombstone.item.full_id, seq=tombstone.seq)
    return True


def look_again(index: Index, archive: Archive) -> None:
    """At start: where an archive that was put back from a backup has the files again, the order is open again."""
    for tombstone in map(_tombstone, index.rows("SELECT * FROM tombstone WHERE done_at IS NOT NULL")):
        try:
            entries = archive.survey(str(Path(tombstone.path).parent))
        except ItemError:  # nothing can be told of it
            continue
        there = {name for name, entry in entries.items() if entry.kind != "folder"}
        if there and (there != {TOMBSTONE} or archive.read_tombstone(tombstone.item) is None):
            index.run(f"UPDATE tombstone SET done_at = NULL WHERE {_OF_ITEM}", *_key(tombstone.item))  # noqa: S608


def _put(index: Index, tombstone: Tombstone) -> None:
    told = (tombstone.seq, tombstone.at, tombstone.actor, tombstone.ticket, json.dumps(tombstone.digests))
    sql = "INSERT INTO tombstone VALUES (?, ?, ?, ?, ?, ?, ?, ?, NULL) ON CONFLICT DO UPDATE SET digests ="
    index.run(f"{sql} excluded.digests, seq = excluded.seq WHERE digests = '[]'", *_key(tombstone.item), *told)


def _forget(index: Index, item: Item) -> None:
    """Remove all that the index tells of an item but its ids; also what a request in flight would bring with it."""
    key = _key(item)
    with index.transaction():
        for table in ("version", "duty", "damage", "absence"):
            index.run(f"DELETE FROM {table} WHERE {_OF_ITEM}", *key)  # noqa: S608 - our own names
        index.run(f"UPDATE put_back SET fields = '{{}}' WHERE {_OF_ITEM}", *key)  # noqa: S608 - our own text
        cleared = ", ".join(f"{name} = NULL" for name in _TOLD)
        at = index.value(f"SELECT at FROM tombstone WHERE {_OF_ITEM}", *key)  # noqa: S608 - our own text
        cleared += ", revision = '', fields = '{}', pending = 0, not_found = 0, thumbnail_due = 0"
        index.set_item(item, f"{cleared}, vanished_at = ?, became = ?", at, DESTROYED)
        for row in index.rows("SELECT id, method, num, listed, names FROM attempt WHERE pat_num = ?", item.pat_num):
            own = (KIND_OF[row["method"]], row["num"]) == (item.kind, item.num)
            names = [named for named in json.loads(row["names"]) if named[0] != item.num]
            sql = "UPDATE attempt SET listed = ?, names = ? WHERE id = ?"
            index.run(sql, "{}" if own else row["listed"], json.dumps(names), row["id"])


def _key(item: Item) -> tuple[int, str, int]:
    return item.pat_num, item.kind, item.num


def _tombstone(row: Mapping[str, object]) -> Tombstone:
    item = Item(row["pat_num"], row["kind"], row["num"])  # type: ignore[arg-type]  # a row of table tombstone
    told = {name: row[name] for name in ("seq", "at", "actor", "ticket")}
    return Tombstone(item, digests=tuple(json.loads(str(row["digests"]))), **told)  # type: ignore[arg-type]
