"""A status as people read it: the most urgent first, in 80 columns, and one true line for systemd."""

from __future__ import annotations

import datetime as dt
from dataclasses import replace
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from syncd.errors import REASONS
from syncd.faces import MOST_INCIDENTS, line, plan_text, text
from syncd.report import DAY, HOUR, Budget, Chore, Incident, StatusFacts, plan
from tests.test_report import AROUND, EVERYTHING, FIRST, NOW, SYNCED, told, trouble

CHICAGO = ZoneInfo("America/Chicago")
MANY = 9_999_999
BIG = replace(
    EVERYTHING,
    owed=MANY,
    owed_requests=MANY,
    archived_items=MANY,
    archived_versions=MANY,
    archived_this_week=MANY,
    vanished_this_week=MANY,
    healed_this_week=MANY,
    lists=MANY,
    patients=MANY,
    archived_bytes=99_000_000_000_000,
    grown=(999_999_999_999,) * 7,
    delays=dict.fromkeys(("document", "mount", "sheet"), [86_340.0] * 12_345),
    chores=dict.fromkeys(("scrub", "index_copy", "drill"), Chore(NOW - 30 * DAY, NOW + 30 * DAY, passed=False)),
    incidents=tuple(Incident("x", reason, NOW - 30 * DAY, NOW - DAY) for reason in REASONS),
)


def shown(facts: StatusFacts = SYNCED, **around: Any) -> str:
    """The report, in the practice's zone."""
    return text(told(facts, replace(AROUND, **around)), CHICAGO)


def test_report_says_state_reason_what_to_do_and_who_first() -> None:
    lines = shown(replace(EVERYTHING, troubles=(trouble("drop_refused"),))).splitlines()
    assert lines[:4] == [
        "main: BLOCKED (drop_refused)",
        "  the SFTP site refuses syncd's login",
        "  practice_it: put the right one in with `sudo syncd setup main --only sftp`;",
        "  next try Wed 05:11",
    ]
    assert "    timeout_60s: 2" in lines
    assert "    guard-7: 30 of 40 items (patient-101)" in lines
    held = replace(EVERYTHING.holds[0], scope="roster")
    assert "    guard-7: 30 of 40 patients (roster)" in shown(replace(EVERYTHING, holds=(held,))).splitlines()


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("econnector_down", "practice_it: start the eConnector service in the office; next try Wed 05:11"),
        ("throttled", "nobody: syncd waits as told; next try Wed 05:11"),
    ],
)
def test_who_must_act_is_told_with_what_to_do_and_the_next_try(reason: str, said: str) -> None:
    assert f"\n  {said}\n" in shown(replace(SYNCED, troubles=(trouble(reason),)))


def test_nobody_needs_to_act_while_all_is_well_and_a_pause_tells_its_end() -> None:
    assert "\n  nobody needs to act\n" in shown()
    assert "`syncd resume` ends it; until Wed 08:06\n" in shown(paused_until=NOW + 3 * HOUR)


def test_report_shows_its_own_time_with_the_offset_of_the_practice() -> None:
    assert f"as of {dt.datetime.fromtimestamp(NOW, CHICAGO).isoformat(' ', 'seconds')}" in shown()


def test_line_for_systemd_is_one_line_with_state_reason_and_who() -> None:
    blocked = replace(SYNCED, troubles=(trouble("key_refused"),), owed=9, owed_requests=9)
    assert line(told(blocked), CHICAGO) == (
        "BLOCKED (key_refused): Open Dental refuses the API keys; integrator: put the right ones in with"
        " `sudo syncd setup main --only keys`; next try Wed 05:11; 40 of 49 documents"
    )
    assert line(told()) == "OK (ok): everything that is listed is archived; nobody needs to act"


def test_what_is_owed_is_told_with_how_long_it_takes_and_when_it_is_ready() -> None:
    facts = replace(SYNCED, owed=8914, owed_requests=8914, archived_items=31_204)
    assert "31,204 of 40,118 documents; 2 h 28 min left; ready Wed 07:35\n" in shown(facts)
    assert "of about 160 documents" in shown(FIRST)
    month = replace(facts, owed_requests=20 * 86_400)
    assert "20 d left; ready 2026-12-08 05:06\n" in shown(month)


def test_space_tells_what_is_to_come_and_the_days_until_the_disk_is_full() -> None:
    growing = replace(SYNCED, grown=(10**9,) * 7)
    room: dict[str, Any] = {"free_bytes": 65 * 10**9, "reserve_bytes": 0}
    assert "space:            65.0 GB free; full in 65 days at 1.0 GB a day\n" in shown(growing, **room)
    assert "space:            65.0 GB free\n" in shown(**room)
    assert "65.0 GB free, what is to come needs 2.0 MB" in shown(replace(SYNCED, owed=2), **room)
    assert "space:            unknown\n" in shown()


def test_chores_tell_when_they_were_done_and_are_due() -> None:
    chores = {"scrub": Chore(NOW - DAY, NOW), "drill": Chore(NOW - 2 * DAY, NOW + 5 * DAY, passed=True)}
    said = shown(replace(SYNCED, chores=chores))
    assert "last check:       Tue 05:06; next Wed 05:06\n" in said
    assert "copy of index:    never\n" in said
    assert "restore drill:    passed Mon 05:06; next Mon 05:06\n" in said
    failed = {"drill": replace(chores["drill"], passed=False)}
    assert "restore drill:    FAILED Mon 05:06" in shown(replace(SYNCED, chores=failed))


def test_week_has_a_line_for_each_incident_with_its_span_and_who() -> None:
    incidents = (
        Incident("api", "econnector_down", NOW - 26 * HOUR, NOW - 25 * HOUR),
        Incident("api", "throttled", NOW - 20 * HOUR, NOW - 90),
        Incident("drop", "drop_refused", NOW - 60, None),
    )
    week = replace(SYNCED, incidents=incidents, archived_this_week=7, vanished_this_week=2, healed_this_week=1)
    said = shown(replace(week, grown=(1000,) * 7))
    assert "this week:\n  7 archived, 2 vanished, 1 healed; grown by 7.0 kB\n" in said
    assert "  Tue 03:06-04:06  the office's eConnector is not running (1 h), practice_it\n" in said
    assert "  Tue 09:06-Wed 05:05  Open Dental asked for fewer requests (19 h 58 min),\n    nobody\n" in said
    assert "  Wed 05:05-now  the SFTP site refuses syncd's login (1 min), practice_it\n" in said
    assert "  no incidents\n" in shown()


def test_of_very_many_incidents_the_last_ones_are_shown() -> None:
    many = tuple(Incident("api", "api_error", NOW - HOUR + n, NOW - HOUR + n + 0.5) for n in range(MOST_INCIDENTS + 5))
    said = shown(replace(SYNCED, incidents=many))
    assert "  5 earlier incidents\n" in said
    assert said.count("server errors (0 s)") == MOST_INCIDENTS


@pytest.mark.parametrize("facts", [SYNCED, FIRST, StatusFacts(), BIG])
@pytest.mark.parametrize("reason", sorted(REASONS))
def test_no_line_for_people_is_longer_than_80_columns(facts: StatusFacts, reason: str) -> None:
    around = replace(AROUND, free_bytes=999_999_999_999, reserve_bytes=10**9)
    said = told(replace(facts, troubles=(trouble(reason, since=DAY),)), around)
    lines = (text(said) + plan_text(plan(facts, Budget(1.1, 2.2, 2.2)))).splitlines()
    assert max(map(len, lines)) <= 80
    assert "\n" not in line(said)


def test_report_tells_how_fresh_the_last_day_was_by_kind() -> None:
    said = shown(replace(SYNCED, delays={"document": [*range(100, 0, -1)]}))
    words = "new documents: 100 in a day, half of them within 50 s, 95 % within 1 min, all within 1 min"
    assert words in " ".join(said.split())


def test_report_tells_when_a_resting_change_feed_is_read_again() -> None:
    assert "change feed:      on\n" in shown(replace(SYNCED, feed_at=NOW - 60))
    resting = replace(SYNCED, feed_at=NOW - 60, feed_off_until=NOW + HOUR)
    assert "change feed:      refused or failing; again Wed 06:06\n" in shown(resting)


def test_plan_says_that_it_is_an_estimate_before_the_first_sweep() -> None:
    assert "estimate" in plan_text(plan(FIRST, Budget(1, 1, 1)))
    assert "estimate" not in plan_text(plan(SYNCED, Budget(1, 1, 1)))


def test_plan_of_a_practice_that_was_never_listed_claims_no_time() -> None:
    said = plan_text(plan(StatusFacts(), Budget(1, 1, 1)))
    assert "backfill" in said
    assert "0 s" not in said
