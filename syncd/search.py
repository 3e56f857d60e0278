"""What `find` looks for, as SQL on the index: filters, the states of an item, and whose documents have to be asked."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from syncd.index import FAILING_AFTER
from syncd.model import Kind
from syncd.naming import folded

Condition = tuple[str, object]  # SQL with one mark, and the value for it
OPEN: Final = (  # methods by name, and not "all but thumbnails": so the table's primary key finds an item's duties
    "d.why IN ('listed', 'backfill', 'repair', 'moved', 'retry')"
    " AND d.method IN ('document', 'mount', 'mount-image', 'mount-images', 'sheet')"
)
ODD: Final = "vanished_at IS NOT NULL OR pending = 1 OR held_by IS NOT NULL"  # as the index item_odd has it
_TRIES: Final = (
    f"(SELECT max(d.failures) FROM duty d WHERE d.pat_num = i.pat_num AND d.kind = i.kind AND d.num = i.num AND {OPEN})"
)
# The state of an item, in this order; `status_facts` counts by the same rules.
STATE: Final = (
    "CASE WHEN i.held_by > 0 THEN 'held' WHEN i.vanished_at IS NOT NULL THEN 'vanished'"
    f" WHEN i.pending = 1 THEN 'pending_at_source' WHEN {_TRIES} >= {FAILING_AFTER} THEN 'failing'"
    f" WHEN {_TRIES} IS NOT NULL OR i.current_version IS NULL OR (i.kind IN ('document', 'mount', 'sheet')"
    " AND i.archived_revision IS NOT i.revision) THEN 'owed' ELSE 'archived' END"
)
STATES: Final = ("archived", "vanished", "owed", "failing", "pending_at_source", "held")
_NAMED: Final = (  # MATERIALIZED is for CTEs only; LIMIT -1 has each name folded once, and not for each word
    "(SELECT pat_num, birthdate, folded(last_name || ' ' || first_name || ' ' || preferred) AS name FROM patient"
    " LIMIT -1)"
)
_TEETH: Final = "',' || replace(upper(i.tooth_numbers), ' ', '') || ','"
_TRIGRAMS: Final = 50
MANY: Final = 50_000
_STATE_INDEX: Final = {  # where a state that is rare is found without asking everybody
    **dict.fromkeys(("vanished", "held", "pending_at_source"), f"item WHERE {ODD}"),
    "failing": f"duty WHERE failures >= {FAILING_AFTER}",
}


@dataclass(frozen=True, slots=True)
class Filters:
    """What `find` looks for; all that are given must hold.

    `name`: every word of it in last, first or preferred name; `category` and `text` (description): a part; in any
    case of letters, without accents. `born` and `dated` (the document's own date): yyyy, yyyy-mm or yyyy-mm-dd.
    `tooth`: 1 to 32, A to T. `since` (included) and `until` (excluded): seconds since the epoch, of archived_at.
    `current`: only the newest version of each item.
    """

    patient: int | None = None
    num: int | None = None
    name: str | None = None
    born: str | None = None
    kind: Kind | None = None
    category: str | None = None
    text: str | None = None
    dated: str | None = None
    tooth: str | None = None
    state: str | None = None
    since: float | None = None
    until: float | None = None
    current: bool = False


def where_all(conditions: Iterable[Condition]) -> tuple[str, list[object]]:
    """The conditions whose value is not None, as SQL behind a WHERE, and their values."""
    given = [(sql, value) for sql, value in conditions if value is not None]
    return "".join(f" AND {sql}" for sql, _ in given), [value for _, value in given]


def whose(filters: Filters) -> tuple[str, list[object]]:
    """A query for the patients who can have what is looked for, and its values; empty: everybody has to be asked."""
    words = folded(filters.name or "").replace(",", " ").split()
    named: list[Condition] = [("instr(name, ?) > 0", word) for word in words]
    where, values = where_all([("pat_num = ?", filters.patient), ("instr(birthdate, ?) = 1", filters.born), *named])
    sql = f"SELECT pat_num FROM {_NAMED} WHERE TRUE{where}" if where else ""
    if filters.patient is not None and len(values) == 1:
        return "SELECT ? AS pat_num, 1 AS rows", values  # also one whom no roster names any more
    text, state = folded(filters.text or ""), _STATE_INDEX.get(filters.state or "")
    if text and filters.patient is None:
        matching, texts = _texts(text)
        of_those = f" AND +pat_num IN ({sql})" if sql else ""  # +: never each text with each patient
        sql, values = f"SELECT pat_num FROM described WHERE description IN ({matching}){of_those}", [*texts, *values]
    elif not sql and filters.since is not None:
        sql, values = "SELECT pat_num FROM version WHERE archived_at >= ?", [filters.since]
    elif not sql and state:
        sql = f"SELECT pat_num FROM {state}"
    # Materialized: else a whole table is read, in the order that is asked for.
    found = f"WITH found AS MATERIALIZED ({sql} LIMIT {MANY})"
    counted = "SELECT DISTINCT pat_num, (SELECT count(*) FROM found) AS rows FROM found ORDER BY pat_num"
    return (f"{found} {counted}", values) if sql else ("", [])


def _texts(text: str) -> tuple[str, list[object]]:
    """A query for the descriptions that hold a folded text, and its values.

    Trigrams only narrow: a few are enough. They are quoted, so nothing in a text is syntax; NUL is never in one.
    """
    trigrams = dict.fromkeys(text[start : start + 3] for start in range(min(len(text) - 2, _TRIGRAMS)))
    if not trigrams:
        return "SELECT id FROM description WHERE instr(folded, ?) > 0", [text]
    match = " ".join('"{}"'.format(each.replace('"', '""')) for each in trigrams)
    sql = "SELECT id FROM description_text JOIN description d ON d.id = description_text.rowid"
    return f"{sql} WHERE description_text MATCH ? AND instr(d.folded, ?) > 0", [match, text]


def item_conditions(filters: Filters) -> tuple[str, list[object]]:
    """What a search says of an item or a version."""
    category, text = (folded(part or "") or None for part in (filters.category, filters.text))
    tooth = f",{filters.tooth.upper()}," if filters.tooth else None
    conditions: list[Condition] = [("i.kind = ?", filters.kind), ("i.num = ?", filters.num)]
    conditions += [("instr(folded(i.category), ?) > 0", category), ("instr(folded(i.description), ?) > 0", text)]
    conditions += [("instr(i.date_created, ?) = 1", filters.dated), (f"instr({_TEETH}, ?) > 0", tooth)]
    conditions += [("v.archived_at >= ?", filters.since), ("v.archived_at < ?", filters.until)]
    where, values = where_all([*conditions, (f"({STATE}) = ?", filters.state)])
    return f"{where} AND v.version = i.current_version" if filters.current else where, values
