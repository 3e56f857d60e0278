"""The index: one SQLite file that knows what is listed, archived, owed and under way. Only the story writes it.

WAL with `synchronous=FULL`: what was committed survives a power cut. One connection a thread; every write runs in
`transaction()` (BEGIN IMMEDIATE), because a deferred transaction that reads first fails at once where another writes.
A statement that fails for the disk's sake becomes a SiteError.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

from sqlite_utils import Database

from syncd import schema
from syncd.diff import NO_STAMP, Difference, Known, Owing, is_pending
from syncd.errors import SyncdError
from syncd.model import DESTROYED, KIND_OF, Attempt, Duty, Item, Listed, ListKey, ListName, ListState, Patient, Version
from syncd.naming import is_image
from syncd.schema import DISK, KNOWN, PUT_ITEM, PUT_PATIENT, BeforeMigrating, DiskErrors, Row

_LIST_KINDS: Mapping[str, tuple[str, ...]] = {"documents": ("document", "mount"), "sheets": ("sheet",)}
LONGEST_BREAK = 7 * 86_400.0  # seconds that requests may be paused
FAILING_AFTER = 3  # tries; then an item is `failing`, not `owed`


class Index:
    """The door to index.db. Not for several threads: `sibling()` opens another connection to the same file.

    `before_migrating`: is given what an earlier syncd left: a connection to it, and the number of its schema.
    `looks`: it only looks; no file changes, nor is one made beside it.
    """

    def __init__(
        self, path: Path, before_migrating: BeforeMigrating | None = None, lock: Lock | None = None, looks: bool = False
    ) -> None:
        self.path = path
        self._writing = lock or Lock()  # siblings take turns here: SQLite's own wait sleeps in long steps
        with DiskErrors(sqlite3.DatabaseError, OSError):
            connection = schema.connect(path, looks)
        self.db, self._durable = Database(connection), True
        try:
            with DISK:
                self.db.execute("PRAGMA synchronous=FULL")
                self.db.execute("PRAGMA foreign_keys=ON")
                self.db.execute("PRAGMA secure_delete=ON")  # as Debian's SQLite: what is destroyed leaves no bytes
                if lock is None and not looks:  # a sibling's file was looked at when the first one was opened
                    self.db.enable_wal()
                older = lock is None and schema.is_older(self.db, before_migrating)
                if looks:
                    return
                with self.transaction():
                    if older:
                        schema.migrations.apply(self.db)
                    # Where opening for writing fails SQLite opens for reading, for good, and only a write shows it.
                    self.db.conn.execute("DELETE FROM meta WHERE FALSE")
        except SyncdError:
            connection.close()
            raise

    def sibling(self) -> Index:
        """Another connection, for another thread."""
        return Index(self.path, lock=self._writing)

    def close(self) -> None:
        """Close the connection; what is not committed is gone."""
        self.db.conn.close()

    @contextmanager
    def transaction(self, durable: bool = True) -> Iterator[None]:
        """All or nothing, durable when it returns. Nested calls join the outer one.

        Not `durable`: the disk is not waited for. A power cut may take it back, whole, with what followed it.
        """
        if self.db.conn.in_transaction:
            yield
            return
        with self._writing, DISK:
            if durable != self._durable:
                self.db.conn.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
                self._durable = durable
            self.db.conn.execute("BEGIN IMMEDIATE")
            try:
                yield
                self.db.conn.commit()
            except BaseException:
                self.db.conn.rollback()
                raise

    def rows(self, sql: str, *parameters: object) -> list[Row]:
        """All rows of a query, as dictionaries."""
        with DISK:  # not db.query(): its savepoint stays open after a page that cannot be read
            cursor = self.db.conn.execute(sql, parameters)
            names = [column[0] for column in cursor.description]
            return [dict(zip(names, row, strict=True)) for row in cursor]

    def value(self, sql: str, *parameters: object) -> Any:
        """The first column of the first row, or None."""
        with DISK:
            row = self.db.conn.execute(sql, parameters).fetchone()
        return row[0] if row else None

    def run(self, sql: str, *parameters: object) -> int:
        """One statement; the number of rows it changed."""
        with self.transaction():
            return self.db.conn.execute(sql, parameters).rowcount

    def touch(self, sql: str, *parameters: object) -> None:
        """One statement that a power cut may take back: what it says is seen, or done, once more."""
        with self.transaction(durable=False):
            self.db.conn.execute(sql, parameters)

    # --- what is remembered under a name

    def meta(self, key: str) -> str | None:
        """A remembered value."""
        value: str | None = self.value("SELECT value FROM meta WHERE key = ?", key)
        return value

    def remember(self, key: str, value: str | None) -> None:
        """Remember a value, or forget it with None."""
        if value is None:
            self.run("DELETE FROM meta WHERE key = ?", key)
        else:
            self.run("INSERT INTO meta VALUES (?, ?) ON CONFLICT DO UPDATE SET value = excluded.value", key, value)

    def meta_time(self, key: str) -> float:
        """A remembered time, 0 when there is none."""
        return float(self.meta(key) or 0)

    def record(self, verb: str, at: float, actor: str = "daemon", entry: str | None = None, **facts: object) -> None:
        """Owe the audit log a line, in the transaction of what it tells of. Facts are ids, digests and counts only.

        `entry`: its name, where the same thing must not be told twice; else one is drawn.
        """
        self.run(
            "INSERT OR IGNORE INTO audit_entry (entry, at, actor, verb, facts)"
            " VALUES (coalesce(?, lower(hex(randomblob(8)))), ?, ?, ?, ?)",
            *(entry, at, actor, verb, json.dumps({name: fact for name, fact in facts.items() if fact is not None})),
        )

    def paused_until(self, now: float) -> float | None:
        """Until when a person wants no request to be sent; None: not now. It ends by itself, whatever a clock did."""
        until = self.meta_time("paused_until")
        return until if now < until <= now + LONGEST_BREAK else None

    def reserve_seqs(self, count: int, above: int) -> range:
        """`count` new sequence numbers, committed before anything carries them: rising, never used again.

        `above`: the last one that the archive knows of, which is higher where an old index was put back.
        """
        with self.transaction():
            last = max(int(self.meta("last_seq") or 0), above)
            self.remember("last_seq", str(last + count))
        return range(last + 1, last + count + 1)

    # --- the roster and the lists

    def apply_roster(
        self, patients: Iterable[Patient], at: float, names: bool, only: frozenset[int] | None, leaving: bool = True
    ) -> Row:
        """Take over one complete roster. Answers {new, back, left, renamed}: lists of PatNum.

        `names`: whether names and birthdates are kept. `only`: the patients this practice wants mirrored. `leaving`:
        whether who is not named has left.
        """
        patients = list(patients)
        sql = "SELECT pat_num, left_at, stamp, status, last_name, first_name, preferred, birthdate FROM patient"
        sql += " WHERE ?1 IS NULL" if leaving else " WHERE pat_num IN (SELECT value FROM json_each(?1))"
        with DISK:
            found = self.db.conn.execute(sql, (None if leaving else json.dumps([p.pat_num for p in patients]),))
            before = {pat_num: told for pat_num, *told in found}
        new, back, renamed, seen = [], [], [], set()
        with self.transaction():
            for p in patients:
                if only is not None and p.pat_num not in only:
                    continue
                seen.add(p.pat_num)
                if p.pat_num not in before:
                    new.append(p.pat_num)
                elif before[p.pat_num][0] is not None:
                    back.append(p.pat_num)
                told = (p.last_name, p.first_name, p.preferred, p.birthdate) if names else ("", "", "", "")
                said = [p.status, *told]
                if before.get(p.pat_num) != [None, p.stamp, *said]:
                    self.db.conn.execute(PUT_PATIENT, (p.pat_num, p.stamp, *said, at))
                if p.pat_num in before and before[p.pat_num][2:] != said:
                    renamed.append(p.pat_num)
                for name in _LIST_KINDS if p.pat_num in (*new[-1:], *back[-1:]) else ():
                    self.db.conn.execute("INSERT OR IGNORE INTO list (pat_num, name) VALUES (?, ?)", (p.pat_num, name))
            left = [n for n, told in before.items() if leaving and told[0] is None and n not in seen]
            for pat_num in left:
                self.db.conn.execute("UPDATE patient SET left_at = ? WHERE pat_num = ?", (at, pat_num))
            if leaving:
                self.remember("roster_at", str(at))
        return {"new": new, "back": back, "left": left, "renamed": renamed}

    def add_patients(self, patients: Iterable[Patient], names: bool) -> None:
        """Patients whom the archive knows; the next roster says whether they are still there."""
        with self.transaction():
            if self.value("SELECT 1 FROM patient WHERE left_at IS NULL") is None:
                self.remember("roster_at", None)
            self.apply_roster(patients, 0.0, names, None, leaving=False)

    def lists(self, only: Iterable[int] | None = None) -> list[ListState]:
        """Every list of a patient who is in the roster. `only`: of these patients."""
        sql = "SELECT pat_num, name, polled_at, l.rows, newest FROM list l JOIN patient p USING (pat_num) WHERE"
        sql += " p.left_at IS NULL AND "
        sql += "?1 IS NULL" if only is None else "pat_num IN (SELECT value FROM json_each(?1))"
        whose = None if only is None else json.dumps(sorted(only))
        with DISK:
            found = self.db.conn.execute(f"{sql} ORDER BY polled_at, pat_num, name", (whose,))
            return [ListState((pat_num, name), *told) for pat_num, name, *told in found]

    def polled_at(self, pat_num: int, name: ListName) -> float:
        """When the list was last read completely; 0 for never."""
        return float(self.value("SELECT polled_at FROM list WHERE pat_num = ? AND name = ?", pat_num, name) or 0)

    def list_failed(self, key: ListKey, until: float) -> int:
        """Note that a list could not be read; the number of failures in a row."""
        self.run("UPDATE list SET failures = failures + 1, next_try_at = ? WHERE pat_num = ? AND name = ?", until, *key)
        return int(self.value("SELECT failures FROM list WHERE pat_num = ? AND name = ?", *key) or 0)

    # --- listings

    def known(self, pat_num: int, name: ListName) -> dict[Item, Known]:
        """What the index says of one list, vanished items included."""
        kinds = _LIST_KINDS[name]
        marks = ", ".join("?" * len(kinds))
        return self._known(f"kind IN ({marks}) AND pat_num = ?", *kinds, pat_num)

    def _known(self, where: str, *values: object) -> dict[Item, Known]:
        with DISK:
            rows = self.db.conn.execute(f"{KNOWN} WHERE {where}", values)
            return {known.item: known for known in map(schema.known_of, rows)}

    def known_item(self, item: Item) -> Known | None:
        """What the index says of one item."""
        return self._known("pat_num = ? AND kind = ? AND num = ?", item.pat_num, item.kind, item.num).get(item)

    def item_rows(self, item: Item) -> list[Row]:
        """The item's row, in a list of one or none."""
        key = (item.pat_num, item.kind, item.num)
        return self.rows("SELECT * FROM item WHERE pat_num = ? AND kind = ? AND num = ?", *key)

    def apply_listing(
        self, key: ListKey, difference: Difference, rows: int, newest: float | None, began: float, now: float
    ) -> None:
        """Take over one complete listing; the guards were asked before, held items carry their guard already.

        It is as old as its first page. One that says nothing new is not waited for: at worst it is read once more.
        """
        with self.transaction(durable=not difference.nothing):
            for row in difference.changed:
                self._put_item(row, now)
            for item in difference.back:
                self._put_back(item, now)
            why = "listed" if difference.owing and self.polled_at(*key) else "backfill"
            for owing in difference.owing:
                self.owe(owing, why, now)
            for row in difference.changed:
                for sql in schema.OTHER_REVISION:
                    self.db.conn.execute(sql, (row.revision, row.item.pat_num, row.item.kind, row.item.num))
            for known in difference.newly_missing:
                self._update(known.item, "missing_since_at = ?", now)
            self.db.conn.execute(
                "UPDATE list SET polled_at = ?, rows = ?, newest = coalesce(?, newest), failures = 0, next_try_at = 0"
                " WHERE pat_num = ? AND name = ?",
                (began, rows, newest, *key),
            )

    def _put_back(self, item: Item, now: float) -> None:
        """It is listed again; the images that vanished with their mount are back with it."""
        if item.kind == "mount":
            sql = "SELECT num FROM item WHERE pat_num = ? AND mount_num = ? AND kind = 'mount-image' AND vanished_at ="
            sql += " (SELECT vanished_at FROM item WHERE pat_num = ? AND kind = 'mount' AND num = ?)"
            for row in self.rows(sql, *(item.pat_num, item.num) * 2):
                self.is_back(Item(item.pat_num, "mount-image", row["num"]), now)
        self.is_back(item, now)
        self._update(item, "held_by = NULL, not_found = 0")

    def is_back(self, item: Item, now: float) -> None:
        """An item is there, perhaps again: then its absence is over, and stays known."""
        sql = "INSERT OR REPLACE INTO absence SELECT pat_num, kind, num, vanished_at, ?, became FROM item"
        where = "WHERE (pat_num, kind, num) = (?, ?, ?) AND vanished_at IS NOT NULL"
        self.run(f"{sql} {where}", now, item.pat_num, item.kind, item.num)
        self.set_item(item, "missing_since_at = NULL, vanished_at = NULL, became = NULL")

    def _put_item(self, row: Listed, now: float) -> None:
        item, fields = row.item, row.fields
        category = fields.get("docCategory") if item.kind != "sheet" else fields.get("SheetType")
        told = (
            *(row.revision, int(is_pending(row)), row.date_created, row.stamp, category, fields.get("Description")),
            *(fields.get("ImgType"), fields.get("ToothNumbers"), row.file_name, json.dumps(dict(fields))),
        )
        self.db.conn.execute(PUT_ITEM, (*told, item.pat_num, item.kind, item.num, now))

    def _update(self, item: Item, assignments: str, *values: object) -> None:
        self.db.conn.execute(
            f"UPDATE item SET {assignments} WHERE pat_num = ? AND kind = ? AND num = ?",
            (*values, item.pat_num, item.kind, item.num),
        )

    def listed(self, item: Item, server_time: str = "") -> Listed | None:
        """The row as last listed, out of the index."""
        for r in self.item_rows(item):
            told = (r["revision"], r["stamp"] or "", r["date_created"] or "", server_time, r["file_name"])
            return Listed(item, *told, fields=json.loads(r["fields"]))
        return None

    def elsewhere(self, item: Item, date_created: str) -> list[Item]:
        """The same number and DateCreated under other patients, not vanished there: the item moved."""
        if date_created in NO_STAMP:
            return []
        sql = "SELECT pat_num FROM item WHERE kind = ? AND num = ? AND pat_num != ? AND date_created = ?"
        rows = self.rows(f"{sql} AND vanished_at IS NULL", item.kind, item.num, item.pat_num, date_created)
        return [Item(r["pat_num"], item.kind, item.num) for r in rows]

    def reused(self, item: Item) -> bool:
        """Whether the number was ever seen under another patient, and not destroyed there."""
        sql = "SELECT 1 FROM item WHERE kind = ? AND num = ? AND pat_num != ? AND became IS NOT ?"
        return self.value(sql, item.kind, item.num, item.pat_num, DESTROYED) is not None

    def vanish(self, item: Item, now: float, became: str | None = None) -> list[Item]:
        """Mark an item vanished, with its images if it is a mount; its files stay. Answers all that vanished."""
        gone = [item]
        if item.kind == "mount":
            sql = "SELECT num FROM item WHERE pat_num = ? AND mount_num = ? AND vanished_at IS NULL"
            gone += [Item(item.pat_num, "mount-image", r["num"]) for r in self.rows(sql, item.pat_num, item.num)]
        with self.transaction():
            for each in gone:
                with_mount = became if became is None or each is item else f"{became.partition('/')[0]}/{each.id}"
                if (known := self.known_item(each)) is not None and not known.vanished:
                    self.record("vanished", now, item=each.full_id, became=with_mount)
                assignments = "vanished_at = ?, became = coalesce(?, became), thumbnail_due = 0, held_by = NULL"
                self._update(each, assignments, now, with_mount)
                sql = "DELETE FROM duty WHERE pat_num = ? AND kind = ? AND num = ?"
                self.db.conn.execute(sql, (each.pat_num, each.kind, each.num))
        return gone

    def put_unlisted(self, item: Item, mount_num: int, revision: str, now: float) -> None:
        """An image that only its mount's answer named, before its bytes are here."""
        self.run(
            "INSERT OR IGNORE INTO item (pat_num, kind, num, mount_num, revision, first_seen_at, fields)"
            " VALUES (?, ?, ?, ?, ?, ?, '{}')",
            *(item.pat_num, item.kind, item.num, mount_num, revision, now),
        )

    def is_destroyed(self, item: Item) -> bool:
        """Whether an order destroyed it: nothing of it is listed, fetched or recorded again."""
        sql = "SELECT 1 FROM tombstone WHERE (pat_num, kind, num) = (?, ?, ?)"
        return self.value(sql, item.pat_num, item.kind, item.num) is not None

    def patient(self, pat_num: int) -> Patient | None:
        """What the last roster told of a patient."""
        columns = "pat_num, status, stamp, last_name, first_name, preferred, birthdate"
        found = self.rows(f"SELECT {columns} FROM patient WHERE pat_num = ?", pat_num)
        return Patient(**found[0]) if found else None

    def set_item(self, item: Item, assignments: str, *values: object) -> None:
        """Change columns of one item."""
        with self.transaction():
            self._update(item, assignments, *values)

    # --- what is owed a request

    def owe(self, owing: Owing, why: str, now: float) -> None:
        """A request is owed. A newer revision starts the tries anew; a stronger reason replaces a weaker one."""
        values = (owing.method, owing.item.pat_num, owing.item.num, KIND_OF[owing.method], owing.revision, why, now)
        anew = "revision != excluded.revision OR excluded.why IN ('repair', 'retry')"
        same = "(why, excluded.why, revision) = ('backfill', 'listed', excluded.revision)"
        with self.transaction():
            self.db.conn.execute(
                "INSERT INTO duty (method, pat_num, num, kind, revision, why, since_at, next_try_at) VALUES"
                f" (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET why = CASE WHEN {same} OR excluded.why ="
                " 'refetch' THEN why ELSE excluded.why END, revision = excluded.revision, next_try_at = CASE WHEN"
                f" {anew} THEN excluded.next_try_at ELSE next_try_at END, failures = CASE WHEN {anew} THEN 0 ELSE"
                " failures END, busy = CASE WHEN busy AND excluded.why = 'moved' THEN 2 ELSE busy END",
                (*values, owing.not_before),
            )

    def next_duty(
        self, now: float, whys: Sequence[str], prefer: int | None, only: frozenset[int] | None = None
    ) -> Duty | None:
        """The duty that is due longest; of `prefer`'s (a PatNum) first. `only`: of these patients."""
        here = "EXISTS (SELECT 1 FROM patient p WHERE p.pat_num = d.pat_num AND p.left_at IS NULL)"
        due = f"busy = 0 AND next_try_at <= ? AND {here}"
        if prefer is not None and (only is None or prefer in only):
            whose = f"d.pat_num = ? AND +why IN ({', '.join('?' * len(whys))})"
            sql = f"SELECT * FROM duty d WHERE {whose} AND {due} ORDER BY kind LIMIT 1"
            found = self.rows(sql, prefer, *whys, now)  # +why: the patient's few rows, not all that are due
            if found:
                return schema.duty_of(found[0])
        scope = f" AND d.pat_num IN ({', '.join(map(str, sorted(only)))})" if only is not None else ""
        oldest = f"SELECT * FROM (SELECT * FROM duty d WHERE why = ? AND {due}{scope} ORDER BY next_try_at LIMIT 1)"
        sql = " UNION ALL ".join([oldest] * len(whys))  # one by one: each follows its index
        found = self.rows(sql, *(each for why in whys for each in (why, now))) if whys else []
        return schema.duty_of(min(found, key=lambda row: row["next_try_at"])) if found else None

    def owe_thumbnail(self, document: Item) -> None:
        """Due where a document's newest bytes are an image's, and not those that the newest thumbnail was made of."""
        made = "SELECT 1 FROM item t JOIN version v ON v.seq = t.current_seq WHERE t.pat_num = item.pat_num"
        made += " AND t.kind = 'thumbnail' AND t.num = item.num AND v.source_revision = item.sha256"
        if document.kind != "document":
            return
        due = any(is_image(row["media_type"] or "") for row in self.item_rows(document))
        self.set_item(document, f"thumbnail_due = ? AND NOT EXISTS ({made})", int(due))

    def duty_failed(self, duty: Duty, failure: str, next_try_at: float) -> int:
        """Count a failed try; the number of tries that failed in a row."""
        self.run(
            "UPDATE duty SET failures = failures + 1, failure = ?, next_try_at = ?, busy = 0"
            " WHERE pat_num = ? AND method = ? AND num = ?",
            *(failure, next_try_at, duty.pat_num, duty.method, duty.num),
        )
        return duty.failures + 1

    def put_off(self, duty: Duty, until: float) -> None:
        """Not to be tried before `until`; no failure."""
        sql = "UPDATE duty SET next_try_at = ? WHERE pat_num = ? AND method = ? AND num = ?"
        self.run(sql, until, duty.pat_num, duty.method, duty.num)

    def duty_done(self, method: str, pat_num: int, num: int, revision: str | None = None) -> None:
        """The duty is fulfilled, unless it was owed anew in the meantime, for a newer revision or news of the mount."""
        with self.transaction():
            key = (pat_num, method, num)
            sql = "DELETE FROM duty WHERE pat_num = ? AND method = ? AND num = ? AND revision = coalesce(?, revision)"
            sql += " AND busy < 2"
            self.db.conn.execute(sql, (*key, revision or None))
            self.db.conn.execute("UPDATE duty SET busy = 0 WHERE pat_num = ? AND method = ? AND num = ?", key)

    def duty(self, method: str, pat_num: int, num: int) -> Duty | None:
        """One duty."""
        found = self.rows("SELECT * FROM duty WHERE pat_num = ? AND method = ? AND num = ?", pat_num, method, num)
        return schema.duty_of(found[0]) if found else None

    # --- placements

    def journal(self, attempt: Attempt) -> int:
        """Write down a placement before it is asked for; its id."""
        with self.transaction():
            cursor = self.db.conn.execute(
                "INSERT INTO attempt (method, pat_num, num, revision, staging, state, asked_at, listed_at, why, listed)"
                " VALUES (?, ?, ?, ?, ?, 'asked', ?, ?, ?, ?)",
                (
                    *(attempt.method, attempt.pat_num, attempt.num, attempt.revision, attempt.staging),
                    *(attempt.asked_at, attempt.listed_at, attempt.why, json.dumps(attempt.listed)),
                ),
            )
            key = (attempt.pat_num, attempt.method, attempt.num)
            self.db.conn.execute("UPDATE duty SET busy = 1 WHERE pat_num = ? AND method = ? AND num = ?", key)
        return int(cursor.lastrowid or 0)

    def set_attempt(self, attempt_id: int, state: str, next_look_at: float, **columns: object) -> None:
        """Move a placement on; further columns by name."""
        named = "".join(f", {name} = ?" for name in columns)
        self.run(
            f"UPDATE attempt SET state = ?, next_look_at = ?{named} WHERE id = ?",
            *(state, next_look_at, *columns.values(), attempt_id),
        )

    def forget_attempt(self, attempt_id: int) -> None:
        """Nothing of it is on the drop any more. One that a power cut brings back is looked for once more."""
        self.touch("DELETE FROM attempt WHERE id = ?", attempt_id)

    def attempts(self, state: str, now: float | None = None, limit: int = 1000) -> list[Attempt]:
        """Placements in one state, those whose next look is due, oldest first."""
        due = now if now is not None else float("inf")
        sql = "SELECT * FROM attempt WHERE state = ? AND next_look_at <= ? ORDER BY next_look_at, id LIMIT ?"
        return [schema.attempt_of(row) for row in self.rows(sql, state, due, limit)]

    # --- what was archived

    def put_version(self, version: Version, now: float) -> None:
        """Record one sidecar and make it the item's newest, unless it was destroyed. Its file is durable already."""
        item = version.item
        if self.is_destroyed(item):
            return
        with self.transaction():
            cursor = self.db.conn.execute(schema.PUT_VERSION, schema.version_values(version, now))
            if cursor.rowcount:
                facts = {name: getattr(version, name) for name in ("seq", "version", "sidecar", "sha256")}
                self.record("stored", now, entry=f"seq-{version.seq}", item=item.full_id, **facts)
            if not self.item_rows(item):
                self.put_archived_item(version)
            self.db.conn.execute(schema.IS_NEWEST, schema.newest_values(version))

    def put_archived_item(self, version: Version) -> None:
        """The item as the listing in a sidecar has it."""
        listing = version.listing
        stamp = str(listing.get("DateTStamp") or listing.get("DateTSheetEdited") or "")
        created = str(listing.get("DateCreated") or listing.get("DateTimeSheet") or "")
        row = Listed(version.item, version.revision, stamp, created, "", version.file_name, listing)
        self._put_item(row, version.first_seen_at)
