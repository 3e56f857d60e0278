"""The reading queries on the index: what is archived, what is owed, what happened. Changes nothing, sends nothing.

Answers are dictionaries with the keys of `find --json` (design.md section 3), or facts for a report. Every version
that is handed out was compared with its row's checksum: a silently wrong row is a SiteError, never an answer.
"""

from __future__ import annotations

import datetime as dt
import json
import secrets
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any, Final, cast

from syncd.diff import local_time
from syncd.errors import SiteError, UsageError
from syncd.index import FAILING_AFTER, Index
from syncd.model import DESTROYED, KINDS, Item, Kind, Version, lists_of
from syncd.naming import parse_id
from syncd.report import DAY, WEEK, Chore, Hold, Incident, StatusFacts, Trouble, iso
from syncd.schema import row_checksum
from syncd.search import MANY, ODD, OPEN, STATE, Filters, item_conditions, whose

Row = dict[str, Any]
NEVER_READ_AFTER: Final = 24  # tries in vain, a quarter of an hour or more apart, of a list that was never read
FEW: Final = 2000  # versions: so many are drawn from as a whole
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
_OF_ITEM: Final = "pat_num = ? AND kind = ? AND num = ?"
_SAME_ITEM: Final = "v.pat_num = i.pat_num AND v.kind = i.kind AND v.num = i.num"


class Catalog:
    """The readable side of one practice's index. `kinds`: what the practice wants mirrored."""

    def __init__(self, index: Index, practice: str = "", kinds: Iterable[Kind] = KINDS) -> None:
        self.index, self.practice, self.kinds = index, practice, frozenset(kinds)

    def find(self, filters: Filters) -> Iterator[Row]:
        """One row a version, and one without `path` for an item that has none yet; by patient, kind, number, version.

        Reads one patient at a time: memory stays flat, and a slow reader of the output holds no snapshot open.
        """
        wheres, values = item_conditions(filters)
        mirrored = ", ".join(f"'{kind}'" for kind in sorted(self.kinds))
        sql = (
            f"{_FOUND} FROM item i LEFT JOIN version v ON {_SAME_ITEM} AND v.sidecar = 1 WHERE i.pat_num = ?"
            f" AND (v.seq IS NOT NULL OR i.kind IN ({mirrored})){wheres} ORDER BY i.kind, i.num, v.version"
        )
        for pat_num in self._patients(filters):
            for row in self.index.rows(sql, pat_num, *values):
                yield self._found(row)

    def _patients(self, filters: Filters) -> Iterator[int]:
        """Whose items have to be looked at, rising: by the index that what is given can use.

        Where none can, or very many are found, it is everybody, one by one: the first rows then come as soon.
        """
        sql, values = whose(filters)
        found = self.index.rows(sql, *values) if sql else []
        if sql and (not found or found[0]["rows"] < MANY):
            yield from (row["pat_num"] for row in found)
            return
        pat_num = -1
        while (pat_num := self.index.value("SELECT min(pat_num) FROM item WHERE pat_num > ?", pat_num)) is not None:
            yield pat_num

    def last_seq(self) -> int:
        """The last sequence number that this index gave out, or adopted with a whole archive; not of single rows."""
        return int(self.index.meta("last_seq") or 0)

    def follow(self, after: int, noted: int = 0, *, limit: int = 1000) -> list[Row]:
        """The next versions with new bytes whose `seq` is above `after`, rising. UsageError for a seq of the future.

        `noted`: the archive's last_seq, read before. Where the index knows less, it was put back from a copy: until the
        whole archive is adopted, which is in no order of seq, nothing is answered, lest anything be passed over.
        """
        last = self.last_seq()
        if not 0 <= after <= max(last, noted):
            raise UsageError(f"no version has that seq yet: the last one is {last}")
        sql = f"{_FOUND} FROM version v JOIN item i ON {_SAME_ITEM} WHERE v.sidecar = 1 AND v.seq > ?"
        rows = self.index.rows(f"{sql} ORDER BY v.seq LIMIT ?", after, limit) if noted <= last else []
        return [self._found(row) for row in rows]

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
        everything = Catalog(self.index, self.practice)  # also of a kind that is not mirrored any more
        return list(everything.find(Filters(patient=item.pat_num, kind=item.kind, num=item.num)))

    def person(self, pat_num: int) -> Row:
        """Name, birthdate (yyyy-mm-dd or empty), and `listed_at`: since when each list was read at least once more.

        `listed_at` is None where a list was never read, as in a bare archive; names are empty where they are not kept.
        """
        (row,) = self.index.rows(_PERSON, json.dumps(lists_of(self.kinds)), pat_num)
        return row | {"birthdate": "" if (row["birthdate"] or "").startswith("0001") else row["birthdate"] or ""}

    def day(self, day: str) -> tuple[float | None, list[tuple[float, int]]]:
        """When the appointments of a day (yyyy-mm-dd) were last seen, None for never; each start and its PatNum."""
        seen_at = self.index.value("SELECT seen_at FROM appointment_day WHERE day = ?", day)
        rows = self.index.rows("SELECT starts_at, pat_num FROM appointment WHERE day = ? ORDER BY 1, 2", day)
        return seen_at, [(row["starts_at"], row["pat_num"]) for row in rows]

    def everybody(self) -> list[int]:
        """Every patient of whom an item is known."""
        return list(self._patients(Filters()))

    def knows(self, pat_num: int) -> bool:
        """Whether an item of this patient is known."""
        return self.index.value("SELECT 1 FROM item WHERE pat_num = ? LIMIT 1", pat_num) is not None

    def versions(self, item: Item) -> list[Version]:
        """Every sidecar, by (version, sidecar). `listing` is the item's newest one; mount_images is not told."""
        sql = (
            f"SELECT {_ITEM}, i.fields, {_VERSION} FROM version v JOIN item i ON {_SAME_ITEM}"
            " WHERE v.pat_num = ? AND v.kind = ? AND v.num = ? ORDER BY v.version, v.sidecar"
        )
        return [_version(row) for row in self.index.rows(sql, item.pat_num, item.kind, item.num)]

    def as_of(self, item: Item, at: float | None = None, number: int | None = None) -> Version | None:
        """The sidecar that was the newest one at that time, or of that version; None: there was none yet."""
        there = (each for each in self.versions(item) if each.version == (number or each.version))
        return max((v for v in there if at is None or v.archived_at <= at), key=lambda v: v.seq, default=None)

    def state_of(self, pat_num: int, at: float) -> list[Version]:
        """What a patient had at that time, thumbnails left out: of each item the sidecar that was its newest then.

        An item counts from its first archived version until it vanished (so it is nobody's twice after a move), and
        again from its return.
        """
        sql = (
            f"SELECT {_ITEM}, i.fields, {_VERSION} FROM item i JOIN version v ON v.seq = (SELECT max(w.seq) FROM"
            " version w WHERE w.pat_num = i.pat_num AND w.kind = i.kind AND w.num = i.num AND w.archived_at <= ?1)"
            " WHERE i.pat_num = ?2 AND i.kind <> 'thumbnail' AND coalesce(i.vanished_at, 9e99) > ?1 AND NOT EXISTS"
            " (SELECT 1 FROM absence a WHERE a.pat_num = i.pat_num AND a.kind = i.kind AND a.num = i.num"
            " AND a.vanished_at <= ?1 AND a.back_at > ?1) ORDER BY i.kind, i.num"
        )
        return [_version(row) for row in self.index.rows(sql, at, pat_num)]

    def destroyed(self, pat_num: int, after: float = 0.0) -> list[Row]:
        """The tombstones of what was archived of a patient and destroyed later than that, oldest first."""
        sql = "SELECT * FROM tombstone WHERE pat_num = ? AND at > ? AND digests <> '[]' ORDER BY seq, kind, num"
        return self.index.rows(sql, pat_num, after)

    def history(self, item: Item) -> list[Row]:
        """What happened to an item, in order of time: dictionaries with `at`, `event` and what belongs to it.

        Of one that was put back into Open Dental, and of what it became, each tells both; `item` names the other.
        """
        events = self._events(item)
        for other in self._lineage(item):
            events += [(at, event | {"item": other.full_id}) for at, event in self._events(other)]
        events.sort(key=lambda each: each[0])
        return [{"at": iso(at)} | event for at, event in events]

    def _lineage(self, item: Item) -> list[Item]:
        """The other numbers of a document that was put back, perhaps again and again."""
        found, new = [item], [item]
        sql = "SELECT * FROM put_back WHERE state = 'done' AND pat_num = ?1 AND kind = ?2 AND (num = ?3 OR became = ?3)"
        while new:
            rows = [row for each in new for row in self.index.rows(sql, each.pat_num, each.kind, each.num)]
            kin = [Item(row["pat_num"], row["kind"], num) for row in rows for num in (row["num"], row["became"])]
            new = [each for each in dict.fromkeys(kin) if each not in found]
            found += new
        return found[1:]

    def _events(self, item: Item) -> list[tuple[float, Row]]:
        events: list[tuple[float, Row]] = []
        told: Row
        for row in self.index.item_rows(item):
            events.append((row["first_seen_at"], {"event": "first_seen"}))
            if row["missing_since_at"] is not None:
                events.append((row["missing_since_at"], {"event": "missing", "held_by": row["held_by"]}))
            if row["vanished_at"] is not None and row["became"] != DESTROYED:
                events.append((row["vanished_at"], {"event": "vanished", "became": row["became"]}))
        for row in self.index.rows(f"SELECT * FROM absence WHERE {_OF_ITEM}", item.pat_num, item.kind, item.num):
            events.append((row["vanished_at"], {"event": "vanished", "became": row["became"]}))
            events.append((row["back_at"], {"event": "returned"}))
        for row in self.destroyed(item.pat_num):
            if (row["kind"], row["num"]) == (item.kind, item.num):
                told = {name: row[name] for name in ("seq", "actor", "ticket")}
                events.append((row["at"], {"event": "destroyed", **told, "digests": json.loads(row["digests"])}))
        for v in self.versions(item):
            told = {"event": "archived" if v.sidecar == 1 else "revised", "seq": v.seq, "version": v.version}
            told |= {"sidecar": v.sidecar, "revision": v.revision, "sha256": v.sha256, "bytes": v.bytes}
            events.append((v.archived_at, told | {"method": v.method, "flags": list(v.flags)}))
        sql = f"SELECT * FROM duty d WHERE pat_num = ? AND kind = ? AND num = ? AND {OPEN}"
        for row in self.index.rows(sql, item.pat_num, item.kind, item.num):
            told = {name: row[name] for name in ("method", "why", "revision", "failures", "failure")}
            events.append((row["since_at"], {"event": "owed", **told, "next_try_at": iso(row["next_try_at"])}))
        for row in self.index.rows(f"SELECT * FROM put_back WHERE {_OF_ITEM}", item.pat_num, item.kind, item.num):
            became = row["became"] and Item(item.pat_num, item.kind, row["became"]).full_id
            told = {"state": row["state"], "became": became, "outcome": row["outcome"], "actor": row["actor"]}
            events.append((row["made_at"], {"event": "put_back", **told}))
        return events

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
            **self._one(f"SELECT {_ODD_COUNTS} FROM item i WHERE {ODD}", now - WEEK),
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
        wanted = ", ".join(f"'{name}'" for name in lists_of(self.kinds))
        sql = (
            "SELECT count(*) AS lists, coalesce(sum(l.rows / ? + 1), 0) AS sweep_requests,"
            " (SELECT count(*) FROM patient WHERE left_at IS NULL) AS patients,"
            " coalesce(sum(polled_at = 0), 0) AS lists_never_polled, coalesce(sum(l.rows), 0) AS items,"
            " coalesce(sum(polled_at = 0 AND (SELECT roster_at FROM patient p WHERE p.pat_num = l.pat_num) <="
            " (SELECT min(roster_at) FROM patient WHERE left_at IS NULL)), 0) AS first_sweep_lacks,"
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


_PERSON: Final = (
    "SELECT last_name, first_name, preferred, substr(birthdate, 1, 10) AS birthdate, (SELECT nullif(min(polled_at), 0)"
    " FROM list l WHERE l.pat_num = asked.pat_num AND l.name IN (SELECT value FROM json_each(?))) AS listed_at"
    " FROM (SELECT ? AS pat_num) asked LEFT JOIN patient USING (pat_num)"
)
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
    f" kind, num) WHERE ? AND {OPEN} AND d.method = 'document' AND d.failures < {FAILING_AFTER} AND lower(substr("
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
        f" count(*) AS calls FROM duty d JOIN patient p USING (pat_num) WHERE {OPEN} AND p.left_at IS NULL AND"
        f" (d.pat_num, d.kind, d.num) NOT IN (SELECT pat_num, kind, num FROM item WHERE {ODD})"
        f" GROUP BY d.pat_num, d.kind, d.num HAVING {having}"
    )


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
