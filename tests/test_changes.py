"""The change feed's questions and answers; whether the office understands them is in test_story_hints.py."""

from __future__ import annotations

import pytest

from syncd import changes
from syncd.changes import PAGE, Change, Rounds, count_query, query, read, read_counts, shifted, stale
from syncd.errors import ListingError

NOW = "2026-03-10 09:00:00"


def row(source: int, num: int, stamp: str = NOW, pat_num: int = 101, mount_num: int = 0) -> dict[str, object]:
    return {"Source": source, "Num": num, "PatNum": pat_num, "Stamp": stamp.replace(" ", "T"), "MountNum": mount_num}


CLOCK = row(0, 0, pat_num=0)


def test_first_question_asks_only_what_time_it_is_there() -> None:
    assert "FROM" not in query(None)


def test_round_reads_documents_and_sheets_from_before_the_last_one() -> None:
    sql = query(NOW)
    assert "d.DateTStamp >= '2026-03-10 08:58:00'" in sql
    assert "DateTSheetEdited >= '2026-03-10 08:45:00'" in sql, "sheets are stamped by another clock"
    assert sql.count("SELECT") == 3


def test_no_question_asks_for_what_holds_whole_files() -> None:
    for sql in (query(None), query(NOW), query(NOW, (1, NOW, 7)), count_query()):
        assert "Note" not in sql
        assert "RawBase64" not in sql


def test_page_goes_on_behind_the_last_row_of_the_one_before() -> None:
    documents = query(NOW, (1, "2026-03-10 08:59:00", 7))
    assert (
        "(d.DateTStamp > '2026-03-10 08:59:00' OR (d.DateTStamp = '2026-03-10 08:59:00' AND d.DocNum > 7))" in documents
    )
    assert "NOW()" not in documents
    sheets = query(NOW, (2, "2026-03-10 08:59:00", 8))
    assert "document" not in sheets
    assert "SheetNum > 8" in sheets


def test_answer_tells_the_time_and_what_changed() -> None:
    page = read([CLOCK, row(1, 34), row(1, 35, mount_num=15), row(2, 45)], first=True)
    assert (page.server_time, page.more) == (NOW, None)
    assert [(each.num, each.mount_num, each.list_name) for each in page.changes] == [
        *((34, 0, "documents"), (35, 15, "documents"), (45, 0, "sheets"))
    ]


def test_numbers_may_come_as_text() -> None:
    assert read([{**row(1, 34), "Num": "34"}], first=False).changes == (Change(1, 34, 101, NOW, 0),)


def test_full_page_has_another_behind_it() -> None:
    rows = [row(1, num + 1) for num in range(PAGE)]
    assert read(rows, first=False).more == (1, NOW, PAGE)


@pytest.mark.parametrize(
    ("rows", "first"),
    [
        ([], True),
        ([row(1, 34)], True),
        ([CLOCK, row(1, 34)], False),
        ([CLOCK, CLOCK], True),
        ([{**row(1, 34), "Stamp": "0001-01-01"}], False),
        ([{**row(1, 34), "Stamp": None}], False),
        ([row(3, 34)], False),
        ([{**row(1, 34), "Num": -1}], False),
        ([{**row(1, 34), "Num": True}], False),
        ([{**row(1, 34), "PatNum": "1 OR 1"}], False),
        ([{}], False),
    ],
)
def test_answer_to_another_question_is_refused(rows: list[dict[str, object]], first: bool) -> None:
    with pytest.raises(ListingError):
        read(rows, first)


def test_row_is_news_once_until_its_stamp_changes() -> None:
    rounds = Rounds()
    one, later = Change(1, 34, 101, NOW, 0), Change(1, 34, 101, shifted(NOW, 5), 0)
    assert rounds.news([one, Change(2, 34, 101, NOW, 0)]) == [one, Change(2, 34, 101, NOW, 0)]
    assert rounds.news([one]) == []
    assert rounds.news([later]) == [later]


def test_what_no_later_round_can_tell_again_is_forgotten() -> None:
    rounds, one = Rounds(), Change(1, 34, 101, NOW, 0)
    rounds.news([one])
    rounds.forget(shifted(NOW, 900))
    assert rounds.news([one]) == []
    rounds.forget(shifted(NOW, 901))
    assert rounds.news([one]) == [one]


@pytest.mark.parametrize(
    ("since", "expected"),
    [(NOW, False), ("2026-03-09 09:00:00", False), ("2026-03-09 08:59:59", True), ("2026-03-10 09:00:01", True)],
)
def test_round_since_long_ago_or_since_a_time_that_comes_again_is_no_use(since: str, expected: bool) -> None:
    assert stale(since, NOW) is expected


def test_counts_are_by_patient() -> None:
    assert "PatNum > 7 " in count_query(7)
    rows: list[dict[str, object]] = [
        {"PatNum": 1, "Num": 2, "Total": 7},
        {"PatNum": 2, "Num": "3", "Total": "99"},
    ]
    assert read_counts(rows) == [(1, 2, 7), (2, 3, 99)]
    with pytest.raises(ListingError):
        read_counts(rows[::-1])


def test_limits_are_what_they_are_said_to_be() -> None:
    assert shifted("2026-03-01 00:00:30", -60) == "2026-02-28 23:59:30"
    assert changes.SHEET_OVERLAP >= changes.OVERLAP
