"""Holds in the index: what a guard keeps from going until somebody approves, enough listings agree, or it is back."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence

from syncd import guards
from syncd.index import Index
from syncd.logs import Log
from syncd.model import Item


def hold(
    index: Index, log: Log, scope: str, count: int, of_all: int, now: float, reason: str = "disappearances_held"
) -> int:
    """The guard that holds so many more of this scope: the one that does already, or a new one."""
    with index.transaction():
        guard = index.value("SELECT id FROM guard WHERE scope = ? AND state = 'held'", scope)
        if guard is None:
            index.run(
                "INSERT INTO guard (scope, reason, made_at, items, of_items) VALUES (?, ?, ?, 0, ?)",
                *(scope, reason, now, of_all),
            )
            guard = index.value("SELECT max(id) FROM guard")
        index.run("UPDATE guard SET items = items + ? WHERE id = ?", count, guard)
        if count >= guards.PATIENT_LEAST:  # who comes that late was seen to be missing on no day before
            index.run("UPDATE guard SET agreeing = 0, agreed_day = NULL WHERE id = ?", guard)
        index.record("guard_held", now, guard=f"guard-{guard}", scope=scope, count=count)
    log.warning("guard_held", guard=f"guard-{guard}", count=count, rows=of_all)
    return int(guard)


def hold_items(index: Index, log: Log, scope: str, items: Sequence[Item], of_items: int, now: float) -> None:
    """Hold these items, which are missing of so many."""
    guard = hold(index, log, scope, len(items), of_items, now)
    for item in items:
        index.set_item(item, "held_by = ?", guard)


def agree(index: Index, log: Log, guard: int, now: float) -> None:
    """One more complete listing that lacks what is held; seven on seven days end the hold."""
    day = dt.datetime.fromtimestamp(now, dt.UTC).date().isoformat()
    sql = "UPDATE guard SET agreeing = agreeing + 1, agreed_day = ? WHERE id = ? AND agreed_day IS NOT ?"
    if index.run(sql, day, guard, day) and (
        index.value("SELECT agreeing FROM guard WHERE id = ?", guard) >= guards.AGREEING_LISTINGS
    ):
        end_guard(index, log, guard, "agreed", now)


def release(index: Index, log: Log, now: float) -> None:
    """End the holds that hold nothing any more: all of it is listed again, or was found elsewhere."""
    for row in index.rows(
        "SELECT id FROM guard g WHERE state = 'held' AND scope NOT IN ('database', 'roster')"
        " AND NOT EXISTS (SELECT 1 FROM item WHERE held_by = g.id)"
    ):
        end_guard(index, log, row["id"], "over", now)


def end_guard(index: Index, log: Log, guard: int, state: str, now: float, actor: str = "daemon") -> None:
    """End a hold: `approved`, `agreed` or `over`: the ordinary rule goes on; `rejected`: kept until seen again.

    A rejected guard's items carry its number negated: never held again, never vanished while the listing lacks them.
    """
    with index.transaction():
        index.run("UPDATE guard SET state = ?, ended_at = ? WHERE id = ?", state, now, guard)
        index.run("UPDATE item SET held_by = ? WHERE held_by = ?", -guard if state == "rejected" else None, guard)
        index.record("guard_ended", now, actor, guard=f"guard-{guard}", state=state)
    log.info("guard_ended", guard=f"guard-{guard}", state=state)
