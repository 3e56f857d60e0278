"""The reading queries on the index: what is archived, what is owed, what happened. Changes nothing, sends nothing.

Answers are dictionaries with the keys of `find --json` (design.md section 3), or facts for a report. Every version
that is handed out was compared with its row's checksum: a silently wrong row is a SiteError, never an answer.
"""

from __future__ import annotations

import datetime as dt
import json
import secrets
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final, cast

from syncd.diff import local_time
from syncd.errors import SiteError, UsageError
from syncd.index import FAILING_AFTER, Index
from syncd.model import KINDS, Item, Kind, ListName, Version
from syncd.naming import parse_id
from syncd.report import DAY, WEEK, Chore, Hold, Incident, StatusFacts, Trouble, iso
from syncd.schema import row_checksum

Row = dict[str, Any]
Condition = tuple[str, object]  # SQL with one mark, and the value for it
NEVER_READ_AFTER: Final = 24  # tries in vain, a quarter of an hour or more apart, of a list that was never read
FEW: Final = 2000  # versions: so many are drawn from as a whole
_OPEN: Final = (  # methods by name, and not "all but thumbnails": so the table's primary key finds an item's duties
    "d.why IN ('listed', 'backfill', 'repair', 'moved', 'retry')"
    " AND d.method IN ('document', 'mount', 'mount-image', 'mount-images', 'sheet')"
)
_ODD: Final = "vanished_at IS NOT NULL OR pending = 1 OR held_by IS NOT NULL"  # as the index item_odd has it
_TRIES: Final = (
    "(SELECT max(d.failures) FROM duty d WHERE d.pat_num = i.pat_num AND d.kind = i.kind AND d.num = i.num"
    f" AND {_OPEN})"
)
# The state of an item, in this order; `status_facts` counts by the same rules.
STATE: Final = (
    "CASE WHEN i.held_by > 0 THEN 'held' WHEN i.vanished_at IS NOT NULL THEN 'vanished'"
    f" WHEN i.pending = 1 THEN 'pending_at_source' WHEN {_TRIES} >= {FAILING_AFTER} THEN 'failing'"
    f" WHEN {_TRIES} IS NOT NULL OR i.current_version IS NULL OR (i.kind IN ('document', 'mount', 'sheet')"
    " AND i.archived_revision IS NOT i.revision) THEN 'owed' ELSE 'archived' END"
)
_ITEM: Final = (
    "i.pat_num, i.kind, i.num, i.mount_num, i.category, i.description, i.img_type, i.tooth_numbers, i.date_created,"
    " i.file_name, i.became, i.current_version, i.first_seen_at, i.revision AS listed_revision"
)
_VERSION: Final = (
    "v.seq, v.version, v.sidecar, v.revision, v.sha256, v.bytes, v.extension, v.media_type, v.path, v.listed_at,"
    " v.placed_at, v.archived_at, v.method, v.flags, v.source_revision, v.checksum"
)
_NEWEST_REVISION: Final = (  # a newer revision with equal bytes is one more sidecar of the same version
    "(SELECT n.revision FROM version n WHERE n.pat_num = v.pat_num AND n.kind = v.kind AND n.num = v.num"
    " AND n.version = v.version ORDER BY n.sidecar DESC LIMIT 1) AS newest_revision"
)
_FOUND: Final = f"SELECT {_ITEM}, {_VERSION}, {_NEWEST_REVISION}, {STATE} AS state"
_SAME_ITEM: Final = "v.pat_num = i.pat_num AND v.kind = i.kind AND v.num = i.num"


@dataclass(frozen=True, slots=True)
class Filters:
    """What `find` looks for; all that are given must hold.

    `name`: every word of it in last, first or preferred name; `category` and `text` (description): a part; in any
    case of letters. `born`: yyyy-mm-dd. `since` (included) and `until` (excluded): seconds since the epoch, of
    archived_at. `current`: only the newest version of each item.
    """

    patient: int | None = None
    num: int | None = None
    name: str | None = None
    born: str | None = None
    kind: Kind | None = None
    category: str | None = None
    text: str | None = None
    since: float | None = None
    until: float | None = None
    current: bool = False


class Catalog:
    """The readable side of one practice's index. `kinds`: what the practice wants mirrored."""

    def __init__(self, index: Index, practice: str = "", kinds: Iterable[Kind] = KINDS) -> None:
        self.index, self.practice, self.kinds = index, practice, frozenset(kinds)
        index.db.conn.create_function("folded", 1, lambda text: _folded(text or ""), deterministic=True)

    def find(self, filters: Filters) -> Iterator[Row]:
        """One row a version, and one without `path` for an item that has none yet; by patient, kind, number, version.

        Reads one patient at a time: memory stays flat, and a slow reader of the output holds no snapshot open.
        """
        wheres, values = _item_conditions(filters)
        mirrored = ", ".join(f"'{kind}'" for kind in sorted(self.kinds))
        sql = (
            f"{_FOUND} FROM item i LEFT JOIN version v ON {_SAME_ITEM} AND v.sidecar = 1 WHERE i.pat_num = ?"
            f" AND (v.seq IS NOT NULL OR i.kind IN ({mirrored})){wheres} ORDER BY i.kind, i.num, v.version"
        )
        for pat_num in self._patients(filters):
            for row in self.index.rows(sql, pat_num, *values):
                yield self._found(row)

    def _patients(self, filters: Filters) -> list[int]:
        words = _folded(filters.name or "").replace(",", " ").split()
        names = "instr(folded(last_name || ' ' || first_name || ' ' || preferred), ?) > 0"
        conditions: list[Condition] = [("pat_num = ?", filters.patient), *((names, word) for word in words)]
        where, values = _where([*conditions, ("substr(birthdate, 1, 10) = ?", filters.born)])
        sql = f"SELECT DISTINCT pat_num FROM item LEFT JOIN patient USING (pat_num) WHERE TRUE{where} ORDER BY pat_num"
        return [row["pat_num"] for row in self.index.rows(sql, *values)]

    def follow(self, after: int, limit: int = 1000) -> list[Row]:
        """The next versions with new bytes whose `seq` is above `after`, rising. UsageError for a seq of the future."""
        last = max(int(self.index.meta("last_seq") or 0), self.index.value("SELECT max(seq) FROM version") or 0)
        if not 0 <= after <= last:
            raise UsageError(f"no version has that seq yet: the last one is {last}")
        sql = f"{_FOUND} FROM version v JOIN item i ON {_SAME_ITEM} WHERE v.sidecar = 1 AND v.seq > ?"
        return [self._found(row) for row in self.index.rows(f"{sql} ORDER BY v.seq LIMIT ?", after, limit)]

    def _found(self, row: Row) -> Row:
        item = Item(row["pat_num"], row["kind"], row["num"])
        version = _version(row) if row["seq"] is not None else None
        found: Row = {"practice": self.practice, "id": item.id, "full_id": item.full_id, "pat_num": item.pat_num}
        found |= {name: row[name] for name in ("seq", "kind", "num", "version", "sha256", "bytes", "media_type")}
        found |= {"path": version.path if version else None, "archived_at": iso(row["archived_at"])}
        found |= {"current": version is not None and version.version == row["current_version"], "state": row["state"]}
        found |= {"revision": row["newest_revision"] if version else row["listed_revision"]}
        names = ("category", "description", "img_type", "tooth_numbers", "date_created", "file_name", "mount_num")
        return found | {name: row[name] for name in (*names, "became")}

    def resolve(self, text: str) -> Item:
        """The item that an ID means. UsageError when it is none, unknown, or seen under several patients."""
        pat_num, kind, num = parse_id(text)
        sql = "SELECT pat_num FROM item WHERE kind = ? AND num = ? AND pat_num = coalesce(?, pat_num) ORDER BY pat_num"
        items = [Item(row["pat_num"], kind, num) for row in self.index.rows(sql, kind, num, pat_num)]
        if not items:
            raise UsageError(f"{kind}-{num}: no such item is known")
        if len(items) > 1:
            ids = ", ".join(item.full_id for item in items)
            raise UsageError(f"{kind}-{num} was seen under several patients, name one: {ids}")
        return items[0]

    def show(self, item: Item) -> list[Row]:
        """The rows of one item, as `find` has them; one at least, unless the item is unknown."""
        return list(self.find(Filters(patient=item.pat_num, kind=item.kind, num=item.num)))

    def versions(self, item: Item) -> list[Version]:
        """Every sidecar, by (version, sidecar). `listing` is the item's newest one; mount_images is not told."""
        sql = (
            f"SELECT {_ITEM}, i.fields, {_VERSION} FROM version v JOIN item i ON {_SAME_ITEM}"
            " WHERE v.pat_num = ? AND v.kind = ? AND v.num = ? ORDER BY v.version, v.sidecar"
        )
        return [_version(row) for row in self.index.rows(sql, item.pat_num, item.kind, item.num)]

    def as_of(self, item: Item, at: float) -> int | None:
        """The number of the version that was the current one at that time; None: there was none yet."""
        there = [version for version in self.versions(item) if version.archived_at <= at]
        return max(there, key=lambda version: version.seq).version if there else None

    def history(self, item: Item) -> list[Row]:
        """What happened to an item, in order of time: dictionaries with `at`, `event` and what belongs to it."""
        events: list[tuple[float, Row]] = []
        for row in self.index.item_rows(item):
            events.append((row["first_seen_at"], {"event": "first_seen"}))
            if row["missing_since_at"] is not None:
                events.append((row["missing_since_at"], {"event": "missing", "held_by": row["held_by"]}))
            if row["vanished_at"] is not None:
                events.append((row["vanished_at"], {"event": "vanished", "became": row["became"]}))
        for v in self.versions(item):
            told: Row = {"event": "archived" if v.sidecar == 1 else "revised", "seq": v.seq, "version": v.version}
            told |= {"sidecar": v.sidecar, "revision": v.revision, "sha256": v.sha256, "bytes": v.bytes}
            events.append((v.archived_at, told | {"method": v.method, "flags": list(v.flags)}))
        sql = f"SELECT * FROM duty d WHERE pat_num = ? AND kind = ? AND num = ? AND {_OPEN}"
        for row in self.index.rows(sql, item.pat_num, item.kind, item.num):
            told = {name: row[name] for name in ("method", "why", "revision", "failures", "failure")}
            events.append((row["since_at"], {"event": "owed", **told, "next_try_at": iso(row["next_try_at"])}))
        events.sort(key=lambda each: each[0])
        return [{"at": iso(at)} | event for at, event in events]

    def failing(self) -> Iterator[Row]:
        """The items that were tried often enough, each with its failure class, tries, and when it is tried again."""
        for row in self.index.rows(f"{_open_items('max(d.failures) >= ?')} ORDER BY 1, 2, 3", FAILING_AFTER):
            item = Item(row["pat_num"], row["kind"], row["num"])
            told: Row = {"id": item.id, "full_id": item.full_id, "failure": row["failure"], "failures": row["failures"]}
            yield told | {"since_at": iso(row["since_at"]), "next_try_at": iso(row["next_try_at"])}

    def status_facts(self, now: float, page_rows: int = 100, days: float = 7, zone: dt.tzinfo = dt.UTC) -> StatusFacts:
        """The facts of a status. `page_rows`: what one page of a list holds; `days`: how old incidents may be."""
        return StatusFacts(
            **self._owed_facts(),
            **self._archived_facts(now),
            **self._list_facts(page_rows, now),
            **self._one(f"SELECT {_ODD_COUNTS} FROM item i WHERE {_ODD}", now - WEEK),
            **self._one(_THUMBNAILS, "thumbnail" in self.kinds),
            **self._one(_LEFTOVERS),
            roster_read_at=self.index.meta_time("roster_at") or None,
            feed_at=self.index.meta_time("feed_at") or None,
            feed_off_until=self.index.meta_time("feed_off_until") or None,
            delays=self._delays(now - DAY, zone),
            healed_this_week=self._healed_since(now - WEEK),
            chores=self._chores(zone),
            troubles=tuple(Trouble(**row) for row in self.index.rows("SELECT * FROM site ORDER BY since_at")),
            holds=tuple(Hold(**row) for row in self.index.rows(_HOLDS)),
            incidents=tuple(Incident(**row) for row in self.index.rows(_INCIDENTS, now - days * DAY)),
        )

    def _archived_facts(self, now: float) -> Row:
        """Totals, and of each of the last seven days; what a clock that was ahead archived counts as of today."""
        ends = [9e99, *(now - day * DAY for day in range(1, 8)), -9e99]
        days = [self._one(_ARCHIVED, end, start) for end, start in pairwise(ends)]
        names = ("versions", "items", "bytes")
        said: Row = {f"archived_{name}": sum(day[name] for day in days) for name in names}
        said["last_archived_at"] = next((day["last_at"] for day in days if day["versions"]), None)
        said["archived_this_week"] = sum(day["versions"] for day in days[:7])
        return said | {"grown": tuple(day["bytes"] for day in days[:7])}

    def _healed_since(self, since: float) -> int:
        days: dict[str, int] = json.loads(self.index.meta("healed") or "{}")
        return sum(count for day, count in days.items() if int(day) * DAY >= since)

    def _chores(self, zone: dt.tzinfo) -> dict[str, Chore]:
        """What is done again and again: when it was done, and is due."""
        at = {name: self.index.meta_time(name) or None for name in _CHORE_TIMES}
        failed, copied_at = self.index.meta("drill_failed"), at["index_copied_at"]
        copied_on = dt.datetime.fromtimestamp(copied_at or 0, zone).date()
        midnight = dt.datetime.combine(copied_on + dt.timedelta(days=1), dt.time(), zone).timestamp()
        return {
            "scrub": Chore(at["scrubbed_at"], at["scrub_due_at"]),
            "index_copy": Chore(copied_at, midnight if copied_at else None),
            "drill": Chore(at["drilled_at"], at["drill_due_at"], None if failed is None else failed == "no"),
        }

    def _delays(self, since: float, zone: dt.tzinfo) -> dict[str, list[float]]:
        """Seconds from a file's appearance in the practice to its archiving, by kind, of what was archived `since`.

        What was there before the mirror is none of it: a first sync says nothing of how fresh a mirror is.
        """
        begun = self.index.value("SELECT listed_at FROM version WHERE seq = (SELECT min(seq) FROM version)")
        if begun is None:
            return {}
        delays: dict[str, list[float]] = {}
        day_before = dt.datetime.fromtimestamp(begun, zone) - dt.timedelta(days=1)
        for row in self.index.rows(_APPEARED, since, f"{day_before:%Y-%m-%d}"):
            appeared = local_time(row["appeared"] or "", zone)
            if appeared is not None and appeared >= begun:
                delays.setdefault(row["kind"], []).append(max(0.0, row["archived_at"] - appeared))
        return delays

    def _one(self, sql: str, *values: object) -> Row:
        return self.index.rows(sql, *values)[0]

    def _owed_facts(self) -> Row:
        owed = requests = 0
        failing: dict[str, int] = {}
        sql = f"SELECT failures >= ? AS fails, failure, count(*) AS items, sum(calls) AS calls FROM ({_open_items()})"
        for row in self.index.rows(f"{sql} GROUP BY 1, CASE WHEN failures >= ? THEN failure END", *[FAILING_AFTER] * 2):
            if row["fails"]:
                failing[row["failure"] or "unknown"] = row["items"]
            else:
                owed, requests = row["items"], row["calls"]
        return {"owed": owed, "owed_requests": requests, "failing": failing}

    def _list_facts(self, page_rows: int, now: float) -> Row:
        names: list[ListName] = ["documents"] if self.kinds - {"sheet"} else []
        wanted = ", ".join(f"'{name}'" for name in (*names, *(["sheets"] if "sheet" in self.kinds else [])))
        sql = (
            "SELECT count(*) AS lists, coalesce(sum(l.rows / ? + 1), 0) AS sweep_requests,"
            " (SELECT count(*) FROM patient WHERE left_at IS NULL) AS patients,"
            " coalesce(sum(polled_at = 0), 0) AS lists_never_polled, coalesce(sum(l.rows), 0) AS items,"
            " min(nullif(polled_at, 0)) AS oldest_polled_at, max(nullif(polled_at, 0)) AS last_listed_at,"
            " coalesce(sum(failures > 0 AND (polled_at > 0 OR failures >= ?) AND polled_at < ?), 0) AS lists_unreadable"
            f" FROM list l WHERE l.name IN ({wanted}) AND l.pat_num NOT IN"
            " (SELECT pat_num FROM patient WHERE left_at IS NOT NULL)"
        )
        return self._one(sql, page_rows, NEVER_READ_AFTER, now - DAY)


def drawn(index: Index, count: int, where: str, *values: object) -> list[Row]:
    """Up to `count` versions of different items at random, of those that `where` holds of; where few are, of all.

    Found by random numbers: a large table is not read as a whole.
    """
    first, last = (index.value(f"SELECT {end}(seq) FROM version") or 0 for end in ("min", "max"))
    sql = f"SELECT * FROM version v WHERE seq >= ? AND {where} ORDER BY seq LIMIT ?"
    if last - first < FEW:
        found = index.rows(sql, first, *values, FEW)
        secrets.SystemRandom().shuffle(found)
    else:
        starts = (first + secrets.randbelow(last - first) for _ in range(4 * count))
        found = [row for start in starts for row in index.rows(sql, start, *values, 1)]
    return list({(row["pat_num"], row["kind"], row["num"]): row for row in found}.values())[:count]


_CHORE_TIMES: Final = ("scrubbed_at", "scrub_due_at", "index_copied_at", "drilled_at", "drill_due_at")
_ARCHIVED: Final = (  # as one day of many: its index has every column
    "SELECT count(*) AS versions, coalesce(sum(version = 1), 0) AS items, coalesce(sum(bytes), 0) AS bytes,"
    " max(archived_at) AS last_at FROM version WHERE archived_at <= ? AND archived_at > ? AND sidecar = 1"
)
_ODD_COUNTS: Final = (
    "coalesce(sum(held_by > 0), 0) AS held, coalesce(sum(held_by IS NULL AND vanished_at IS NOT NULL), 0) AS"
    " vanished, coalesce(sum(held_by IS NULL AND vanished_at IS NULL AND pending = 1), 0) AS pending_at_source,"
    " coalesce(sum(held_by IS NULL AND vanished_at >= ?), 0) AS vanished_this_week"
)
_HOLDS: Final = (
    "SELECT id AS guard, scope, reason, items, of_items, agreeing, made_at FROM guard WHERE state = 'held' ORDER BY id"
)
_THUMBNAILS: Final = (  # a call is also to come where an image is owed; its name is all that is known of it
    "SELECT coalesce(sum(due), 0) AS thumbnails_due, count(DISTINCT pat_num) AS thumbnail_calls FROM (SELECT pat_num,"
    " 1 AS due FROM item WHERE thumbnail_due = 1 UNION ALL SELECT d.pat_num, 0 FROM duty d JOIN item i USING (pat_num,"
    f" kind, num) WHERE ? AND {_OPEN} AND d.method = 'document' AND d.failures < {FAILING_AFTER} AND lower(substr("
    "i.file_name, -4)) IN ('.jpg', 'jpeg', '.png', '.gif', '.bmp', '.tif', 'tiff')) JOIN patient USING (pat_num)"
    " WHERE left_at IS NULL"
)
_LEFTOVERS: Final = (  # files that could not be removed from the drop when last tried
    "SELECT count(*) AS drop_leftovers FROM attempt WHERE state = 'cleaning' AND looks > 0"
)
_APPEARED: Final = (  # each revision once: neither a repair nor a second look at the same one is news. What is older
    # than the mirror is only left out early: a first sync's day has a hundred thousand of them
    "SELECT v.kind, v.archived_at, CASE v.kind WHEN 'mount' THEN (SELECT i.date_created FROM item i WHERE i.pat_num ="
    " v.pat_num AND i.kind = v.kind AND i.num = v.num) ELSE v.revision END AS appeared FROM version v WHERE"
    " v.archived_at >= ? AND v.kind IN ('document', 'mount', 'sheet') AND appeared >= ? AND NOT EXISTS"
    " (SELECT 1 FROM version e WHERE e.pat_num = v.pat_num AND e.kind = v.kind AND e.num = v.num AND e.seq < v.seq"
    " AND (e.revision = v.revision OR v.kind = 'mount'))"
)
_INCIDENTS: Final = (
    "SELECT lane, reason, since_at, until_at FROM incident WHERE coalesce(until_at, 9e99) >= ? ORDER BY since_at"
)


def _open_items(having: str = "TRUE") -> str:
    """Items with open duties, of patients who are in the roster, that nothing else speaks for. One row an item.

    `failure` and the times are those of the duty that failed most: SQLite takes bare columns from the row of max().
    """
    return (
        "SELECT d.pat_num, d.kind, d.num, max(d.failures) AS failures, d.failure, d.since_at, d.next_try_at,"
        f" count(*) AS calls FROM duty d JOIN patient p USING (pat_num) WHERE {_OPEN} AND p.left_at IS NULL AND"
        f" (d.pat_num, d.kind, d.num) NOT IN (SELECT pat_num, kind, num FROM item WHERE {_ODD})"
        f" GROUP BY d.pat_num, d.kind, d.num HAVING {having}"
    )


def _where(conditions: Iterable[Condition]) -> tuple[str, list[object]]:
    """The conditions whose value is not None, as SQL behind a WHERE, and their values."""
    given = [(sql, value) for sql, value in conditions if value is not None]
    return "".join(f" AND {sql}" for sql, _ in given), [value for _, value in given]


def _folded(text: str) -> str:
    """For searching: without case and accents, as somebody in a hurry types it."""
    return "".join(each for each in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(each))


def _item_conditions(filters: Filters) -> tuple[str, list[object]]:
    """What a search says of an item or a version."""
    category, text = (_folded(part or "") or None for part in (filters.category, filters.text))
    conditions: list[Condition] = [("i.kind = ?", filters.kind), ("i.num = ?", filters.num)]
    conditions += [("instr(folded(i.category), ?) > 0", category), ("instr(folded(i.description), ?) > 0", text)]
    conditions += [("v.archived_at >= ?", filters.since), ("v.archived_at < ?", filters.until)]
    where, values = _where(conditions)
    return f"{where} AND v.version = i.current_version" if filters.current else where, values


def _version(row: Row) -> Version:
    """A row of table version, with its item's. SiteError disk_error when its checksum or path is wrong."""
    names = ("seq", "mount_num", "version", "sidecar", "revision", "sha256", "bytes", "extension", "media_type")
    times = ("listed_at", "placed_at", "archived_at", "first_seen_at", "file_name", "method", "source_revision")
    version = Version(
        item=Item(row["pat_num"], cast("Kind", row["kind"]), row["num"]),
        flags=tuple(json.loads(row["flags"])),
        listing=json.loads(row.get("fields") or "{}"),
        **{name: row[name] for name in (*names, *times)},
    )
    if row_checksum(version) != row["checksum"] or version.path != row["path"]:
        raise SiteError("disk_error", f"index.db: the row of seq {version.seq} is damaged; see `syncd reindex`")
    return version
