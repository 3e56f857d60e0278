"""Wishes: what a verb asks of whoever holds the lock, as rows of table `wish`; granted by the holder, or by the verb
itself where nobody holds it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from syncd import destroy, repair, upload
from syncd.errors import UsageError
from syncd.holding import end_guard
from syncd.index import Index
from syncd.logs import Log
from syncd.model import Item
from syncd.naming import parse_guard_id

LISTS = "lists"  # instead of a kind: all lists of that patient, for `retry`
NAMED = 50  # items that one line of the audit log names; of more it gives the count
METHODS_OF = {
    "document": ("document",),
    "mount": ("mount", "mount-images"),
    "mount-image": ("mount-image",),
    "sheet": ("sheet",),
}


def make(index: Index, verb: str, argument: object, now: float, actor: str = "daemon") -> int:
    """Write a wish down; its number. `actor`: who makes it, for the audit log."""
    with index.transaction():
        sql = "INSERT INTO wish (verb, argument, made_at, actor) VALUES (?, ?, ?, ?)"
        index.run(sql, verb, json.dumps(argument), now, actor)
        return int(index.value("SELECT max(id) FROM wish"))


def outcome(index: Index, wish: int) -> str | None:
    """What became of a wish; None while nobody took it up."""
    found: str | None = index.value("SELECT outcome FROM wish WHERE id = ? AND done_at IS NOT NULL", wish)
    return found


def grant_all(index: Index, log: Log, now: float) -> list[tuple[str, object]]:
    """Carry out every wish that waits; those just granted, as (verb, argument)."""
    granted = []
    answer = "UPDATE wish SET taken_at = ?, done_at = ?, outcome = ? WHERE id = ?"
    for row in index.rows("SELECT id, verb, argument, actor FROM wish WHERE done_at IS NULL ORDER BY id"):
        argument = json.loads(row["argument"])
        try:
            with index.transaction():  # granted and answered at once: a crash does not make it granted twice
                said = grant(index, log, row["verb"], argument, now, row["actor"])
                index.run(answer, now, now, said, row["id"])
            granted.append((row["verb"], argument))
        except UsageError as error:
            index.run(answer, now, now, f"refused: {error}", row["id"])
        log.info("wish_taken", verb=row["verb"])
    return granted


def grant(index: Index, log: Log, verb: str, argument: object, now: float, actor: str = "daemon") -> str:
    """Carry out one wish on the index; one line for the person who made it. Raises UsageError."""
    if verb == "backfill":
        index.record("backfill", now, actor, pat_nums=argument)
        return "lists are polled next"
    if verb == "retry":
        meant = argument if isinstance(argument, list) else []
        with index.transaction():
            count = _retry(index, meant, now)
            named = [told(each) for each in meant[:NAMED]]
            index.record("retry", now, actor, count=count, items=named or None, more=len(meant) > NAMED or None)
        return f"{count} to be tried again now"
    if verb == "repair":
        wanted = argument if isinstance(argument, list) else []
        for pat_num, kind, num, path, code in wanted:
            repair.want(index, Item(pat_num, kind, num), path, code, now)
        index.record("repair", now, actor, count=len(wanted))
        return f"{len(wanted)} to be looked at again and repaired"
    if verb in ("pause", "resume"):
        index.remember("paused_until", repr(argument) if isinstance(argument, float) else None)
        index.record(verb, now, actor)
        return "no requests are sent until then" if verb == "pause" else "requests are sent again"
    if verb in ("destroy", "put-back") and isinstance(argument, list):
        return _ordered(index, verb, argument, now, actor)
    if verb in ("approve", "reject"):
        return _decide(index, log, verb, str(argument), now, actor)
    raise UsageError(f"nobody knows the wish {verb}")


def _ordered(index: Index, verb: str, argument: list[Any], now: float, actor: str) -> str:
    """What a person ordered of one item; it is begun here, and goes on in the lanes."""
    item, rest = Item(*argument[:3]), argument[3]
    if verb == "destroy":
        return destroy.order(index, item, rest, now, actor)
    return upload.want(index, item, rest, now, actor)


def told(meant: Sequence[Any]) -> str:
    """What one part of a retry means, as people write it: `101/document-34`, or `patient-101`."""
    pat_num, kind, num = meant
    return f"patient-{pat_num}" if kind == LISTS else Item(pat_num, kind, num).full_id


def _retry(index: Index, meant: list[Any], now: float) -> int:
    """Try again now: everything that failed or waits, or these items and lists, whatever they wait for."""
    with index.transaction():
        if not meant:
            index.run("UPDATE site SET next_try_at = ?", now)
            index.run(
                "UPDATE patient SET thumbnails_after_at = 0, thumbnails_failures = 0 WHERE thumbnails_failures > 0"
            )
            index.run("UPDATE list SET failures = 0, next_try_at = 0 WHERE failures > 0")
            index.run("UPDATE put_back SET next_look_at = 0 WHERE state IN ('wanted', 'staged')")
            return index.run("UPDATE duty SET next_try_at = ?, failures = 0 WHERE busy = 0 AND failures > 0", now)
        for each in meant:
            if each[1] == LISTS:
                index.run("UPDATE list SET failures = 0, next_try_at = 0 WHERE pat_num = ?", each[0])
                continue
            item = Item(*each)
            sql = (
                "UPDATE duty SET next_try_at = ?, failures = 0 WHERE pat_num = ? AND kind = ? AND num = ? AND busy = 0"
            )
            if index.run(sql, now, item.pat_num, item.kind, item.num) == 0:
                _repair(index, item, now)
    return len(meant)


def _repair(index: Index, item: Item, now: float) -> None:
    """Fetch an archived item again, as if it had never been here; a thumbnail with all that are due of its patient."""
    source = Item(item.pat_num, "document", item.num) if item.kind == "thumbnail" else item
    known = index.known_item(source)
    if known is None or known.vanished:
        raise UsageError(f"{item.full_id} cannot be fetched again: it is not listed by Open Dental any more")
    if known.pending:
        raise UsageError(f"{item.full_id} cannot be fetched yet: its file is not in Open Dental, only its web address")
    if source != item:
        index.set_item(source, "thumbnail_due = 1")
        sql = "UPDATE patient SET thumbnails_after_at = 0, thumbnails_failures = 0 WHERE pat_num = ?"
        index.run(sql, item.pat_num)
    for method in METHODS_OF.get(item.kind, ()):
        index.run(
            "INSERT OR IGNORE INTO duty (method, pat_num, num, kind, revision, why, since_at, next_try_at)"
            " VALUES (?, ?, ?, ?, ?, 'repair', ?, ?)",
            *(method, item.pat_num, item.num, item.kind, known.revision, now, now),
        )


def _decide(index: Index, log: Log, verb: str, guard_id: str, now: float, actor: str) -> str:
    number = parse_guard_id(guard_id)
    found = index.rows("SELECT scope, reason FROM guard WHERE id = ? AND state = 'held'", number)
    if not found:
        raise UsageError(f"{guard_id} is not held: see `syncd held`")
    end_guard(index, log, number, "approved" if verb == "approve" else "rejected", now, actor)
    if found[0]["scope"] == "database" and verb == "approve":
        index.remember("database_approved", found[0]["reason"])
    return f"{guard_id} {'approved' if verb == 'approve' else 'rejected'}"
