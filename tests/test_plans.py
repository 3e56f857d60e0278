"""No query of the running mirror reads a whole table that grows with the practice: SQLite's plans say so."""

from __future__ import annotations

import re
from typing import Final

import pytest

from syncd import wishes
from syncd.backfill import Look, Stop, Wanted
from syncd.errors import EXIT_OK
from syncd.index import Index
from tests.small import small
from tests.world import World

# Tables that stay small however large the practice is, and tables within a query.
FEW_ROWS: Final = ("attempt", "audit_entry", "damage", "guard", "incident", "meta", "site", "wish", "json_each")
LARGE_PARTS: Final = ("version_checked",)  # a partial index that has nearly all rows all the same
ALLOWED: Final = {  # a part of the statement: why it may read a whole table
    "SELECT pat_num, left_at, stamp, status": "the roster, whole, against the patients, whole: 4 times an hour",
    "SELECT count(*) FROM patient WHERE left_at": "when a roster lacks somebody: 4 times an hour at most",
    "SELECT count(*) AS lists": "a status: one row a list, 40 ms of 80,000",
    "SELECT count(*) AS lists, sum(polled_at": "the progress of a backfill, in a twentieth of the time at most",
    "FROM duty d JOIN patient p USING (pat_num) WHERE d.why IN": "a status counts what is owed",
    "SELECT coalesce(sum(due), 0)": "the same, and whose images are among it",
    "SELECT pat_num, name, polled_at": "the agenda is built of every list: at the start, or when very many arrived",
    "description_text_config": "FTS5's own settings: a row or two",
    "FROM put_back WHERE": "documents that were put back by hand: a handful in a practice's life",
    "AND failures > 0 LIMIT 1": "once, at the end of a backfill",
}


class Statements:
    """What a connection is asked, as one statement of each kind: values do not matter."""

    def __init__(self) -> None:
        self.of_kind: dict[str, str] = {}

    def watch(self, index: Index) -> None:
        index.db.conn.set_trace_callback(self._note)

    def _note(self, sql: str) -> None:
        if re.match(r"(SELECT|INSERT|UPDATE|DELETE)\b", sql):
            self.of_kind.setdefault(re.sub(r"'(?:[^']|'')*'|\b[0-9.e+]+\b", "?", sql), sql)


def scans(index: Index, sql: str) -> list[str]:
    """The steps of its plan that read a whole table, or a whole index of one."""
    rows = index.rows("SELECT name FROM sqlite_schema WHERE type = 'index' AND sql LIKE '%) WHERE %'")
    partial = {row["name"] for row in rows}.difference(LARGE_PARTS)
    found = []
    for row in index.rows(f"EXPLAIN QUERY PLAN {sql}"):
        step = re.match(r"SCAN (\S+)(?: USING (?:COVERING )?INDEX (\S+))?", row["detail"])
        if step and step[2] not in partial and not _is_small(step[1], sql):
            found.append(row["detail"])
    return found


def _is_small(name: str, sql: str) -> bool:
    """Whether the plan's name, or the table that the statement calls so, has few rows."""
    tables = {name, *re.findall(rf"(?:FROM|JOIN) (\w+) {re.escape(name)}\b", sql)}
    return name.startswith("(") or name == "CONSTANT" or not tables.isdisjoint(FEW_ROWS)


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory) -> tuple[Index, list[str]]:
    """A backfill, hours of the daemon with all that changes in a practice, and what people ask meanwhile."""
    one, statements, folder = small(documents=3), Statements(), tmp_path_factory.mktemp("world")
    world = World.start(folder, practice=one.practice, backfill=True, hinted=True, sync={"vanish_after": "1h"})
    watch(world, statements)
    world.run()
    wanted = Wanted(world.scope.since)
    look = Look(world.settings, world.index, world.clock, wanted, lambda: world.lanes.api_lane.requests)
    statements.watch(world.index)
    look.progress()
    assert look.verdict(Stop()) == EXIT_OK
    world.catalog().status_facts(world.clock.now())
    world.restart(backfill=False)
    watch(world, statements)
    with_mount = one.practice.add_mount(one.patient, 2)
    one.practice.add_document(one.other, "jpg")
    wishes.make(world.index, "backfill", None, world.clock.now())
    one.practice.edit_document(one.document)
    one.practice.delete_document(one.letter)
    world.run(hours=3)
    assert world.has(one.patient, "mount", with_mount)
    return world.index.sibling(), list(statements.of_kind.values())


def watch(world: World, statements: Statements) -> None:
    for lane in (world.lanes.api_lane.doors, world.lanes.pull_lane._doors):
        statements.watch(lane.index)


def test_no_query_of_the_lanes_or_of_a_status_reads_a_whole_table(lived: tuple[Index, list[str]]) -> None:
    index, statements = lived
    for words in ("thumbnail_due = 1 AND p.", "i.refetch_at <=", "FROM duty d WHERE why", "+why", "FROM attempt WHERE"):
        assert any(words in sql for sql in statements), f"the run is too poor: {words}"
    wrong = {}
    for sql in statements:
        if not any(part in sql for part in ALLOWED) and (found := scans(index, sql)):
            wrong[sql] = found
    assert not wrong, "\n".join(f"{found}: {sql}" for sql, found in wrong.items())


def test_every_whole_table_that_is_allowed_is_read(lived: tuple[Index, list[str]]) -> None:
    index, statements = lived
    scanning = [sql for sql in statements if scans(index, sql)]
    assert not [part for part in ALLOWED if not any(part in sql for sql in scanning)]
