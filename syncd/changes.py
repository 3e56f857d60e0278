"""The practice-wide change feed: what to ask ShortQuery next, and which rows are news. Pure.

A round reads every document and sheet stamped since the last round, by the database's own clock and in its own local
time; moments are the vendor's texts, `2026-03-10 09:00:00`, and never turned into times. A round overlaps the one
before, since rows are stamped before they can be seen and sheets by another clock (facts.md). The feed is a hint, never
a proof: it names lists to poll.
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from syncd.errors import ListingError
from syncd.model import ListName

OVERLAP: Final = 120  # seconds: documents are stamped by the database itself
SHEET_OVERLAP: Final = 900  # sheets by a workstation (facts.md)
PAGE: Final = 100  # rows of any answer of ShortQuery (api, Queries)
LONGEST_GAP: Final = 86_400  # after that the sweep has seen what the feed missed
_MOMENT: Final = re.compile(r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d")

Source = Literal[0, 1, 2]  # the clock, `document`, `sheet`
Place = tuple[int, str, int]  # (source, stamp, number): where a page ended
Row = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Change:
    """A row of `document` (1) or `sheet` (2) as it is now. `mount_num`: 0 for what is in no mount."""

    source: int
    num: int
    pat_num: int
    stamp: str
    mount_num: int

    @property
    def list_name(self) -> ListName:
        """The list that shows it; an image inside a mount is in none."""
        return "documents" if self.source == 1 else "sheets"


@dataclass(frozen=True, slots=True)
class ChangePage:
    """One answer. `server_time`: None on a later page, which does not tell it. `more`: where the next one starts."""

    server_time: str | None
    changes: tuple[Change, ...]
    more: Place | None


def query(server_time: str | None, after: Place | None = None) -> str:
    """The SELECT of one page. `server_time`: when the last round was asked, by the database; None: only what it is now.

    The first page's first row is the database's clock. Never Note or RawBase64, which hold whole files.
    """
    clock = "SELECT 0 AS Source, 0 AS Num, 0 AS PatNum, NOW() AS Stamp, 0 AS MountNum"
    if server_time is None:
        return clock
    documents = (
        "SELECT 1 AS Source, d.DocNum AS Num, d.PatNum AS PatNum, d.DateTStamp AS Stamp, COALESCE(i.MountNum, 0) AS"
        " MountNum FROM document d LEFT JOIN mountitem i ON i.MountItemNum = d.MountItemNum WHERE "
    )
    sheets = "SELECT 2 AS Source, SheetNum AS Num, PatNum, DateTSheetEdited AS Stamp, 0 AS MountNum FROM sheet WHERE "
    arms = [] if after else [clock]
    if after is None or after[0] == 1:
        arms.append(documents + _since("d.DateTStamp", "d.DocNum", server_time, 1, after))
    arms.append(sheets + _since("DateTSheetEdited", "SheetNum", server_time, 2, after))
    return f"{' UNION ALL '.join(arms)} ORDER BY Source, Stamp, Num LIMIT {PAGE}"


def count_query(after: int = 0) -> str:
    """How many documents outside mounts each patient has, and the sum of their numbers; patients behind `after`."""
    counts = "SELECT PatNum, COUNT(*) AS Num, SUM(DocNum) AS Total FROM document WHERE MountItemNum = 0"
    return f"{counts} AND PatNum > {after} GROUP BY PatNum ORDER BY PatNum LIMIT {PAGE}"


def read_counts(rows: Sequence[Row]) -> list[tuple[int, int, int]]:
    """An answer to `count_query`: (PatNum, number, sum). Raises ListingError."""
    found = [(_whole(row.get("PatNum")), _whole(row.get("Num")), _whole(row.get("Total"))) for row in rows]
    if found != sorted(found):
        raise ListingError("the counts of documents are not by patient")
    return found


def _since(stamp: str, num: str, server_time: str, source: Source, after: Place | None) -> str:
    if after and after[0] == source:
        return f"({stamp} > '{after[1]}' OR ({stamp} = '{after[1]}' AND {num} > {after[2]}))"
    return f"{stamp} >= '{shifted(server_time, -(OVERLAP if source == 1 else SHEET_OVERLAP))}'"


def read(rows: Sequence[Row], first: bool) -> ChangePage:
    """An answer of ShortQuery. Raises ListingError where it is not one to `query`."""
    found = [_change(row) for row in rows]
    clock = [each.stamp for each in found if each.source == 0]
    if len(clock) != int(first):
        raise ListingError("the change feed does not tell the database's time once")
    changes = tuple(each for each in found if each.source)
    last = found[-1] if len(found) >= PAGE else None
    return ChangePage(clock[0] if first else None, changes, (last.source, last.stamp, last.num) if last else None)


def _change(row: Row) -> Change:
    numbers = [_whole(row.get(name)) for name in ("Source", "Num", "PatNum", "MountNum")]
    source, num, pat_num, mount_num = numbers
    stamp = row.get("Stamp")
    if not isinstance(stamp, str) or not _MOMENT.fullmatch(stamp) or not 0 <= source <= 2:  # noqa: PLR2004 - sources
        raise ListingError("a row of the change feed cannot be read")
    return Change(source, num, pat_num, stamp.replace("T", " "), mount_num)


def _whole(value: object) -> int:
    if isinstance(value, str) and re.fullmatch("[0-9]{1,18}", value):
        value = int(value)
    if type(value) is not int or value < 0:
        raise ListingError("a number of the change feed is not a whole number")
    return value


def shifted(moment: str, seconds: int) -> str:
    """A local moment so many seconds later, without a thought of time zones: a limit in a query, never a time."""
    return (dt.datetime.fromisoformat(moment) + dt.timedelta(seconds=seconds)).isoformat(" ", "seconds")


def stale(server_time: str, now: str) -> bool:
    """Whether a round since `server_time` is no use: the clock went back (an hour each autumn), or long ago."""
    return now < server_time or shifted(now, -LONGEST_GAP) > server_time


@dataclass(slots=True)
class Rounds:
    """Which rows of overlapping rounds are news: each row once, until its stamp changes again."""

    _seen: dict[tuple[int, int], str] = field(default_factory=dict)

    def news(self, changes: Sequence[Change]) -> list[Change]:
        """Those that were not told before."""
        fresh = [each for each in changes if self._seen.get((each.source, each.num)) != each.stamp]
        self._seen.update({(each.source, each.num): each.stamp for each in fresh})
        return fresh

    def forget(self, server_time: str) -> None:
        """A round was read to its end: what no later one can tell again is dropped."""
        oldest = shifted(server_time, -SHEET_OVERLAP)
        self._seen = {key: stamp for key, stamp in self._seen.items() if stamp >= oldest}
