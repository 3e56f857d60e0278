"""The budget: never closer than the interval, waits that are obeyed and bounded, windows of the week."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import UTC, datetime
from email.utils import format_datetime
from itertools import pairwise
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from freezegun import freeze_time
from hypothesis import given
from hypothesis import strategies as st

from syncd import pacing
from syncd.config import Settings, parse, parse_window
from syncd.pacing import Pace

CHICAGO = ZoneInfo("America/Chicago")
WINDOWS = [parse_window("Mon-Fri 18:00-07:00"), parse_window("Sat-Sun")]
TEXT = """
[practice]
time_zone = "America/Chicago"
[api]
min_interval = "1s"
share = 0.5
share_closed = 0.8
[drop]
host = "sftp.example.org"
username = "x"
known_hosts_file = "known_hosts"
[archive]
path = "/srv/archive"
"""


def settings(window: str = "") -> Settings:
    text = f"{TEXT}[backfill]\nwindow = {window}" if window else TEXT
    return parse(text, name="main", folder=Path("/etc/syncd/main"), environ={})


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=CHICAGO)


@pytest.mark.parametrize(
    ("local", "seconds"),
    [
        ("2026-11-20 08:00", 2.0),  # a Friday
        ("2026-11-20 16:59", 2.0),
        ("2026-11-20 17:00", 1.25),
        ("2026-11-20 07:59", 1.25),
        ("2026-11-21 10:00", 1.25),
    ],
)
def test_share_counts_in_opening_hours_of_the_practice(local: str, seconds: float) -> None:
    assert pacing.spacing(settings(), at(local).timestamp(), bulk=False) == seconds
    assert pacing.spacing(settings(), at(local).timestamp(), bulk=True) == seconds


def test_bulk_work_outside_the_window_gets_half_of_the_share() -> None:
    nightly = settings('["Mon-Fri 18:00-07:00"]')
    assert pacing.spacing(nightly, at("2026-11-20 10:00").timestamp(), bulk=True) == 4.0
    assert pacing.spacing(nightly, at("2026-11-20 10:00").timestamp(), bulk=False) == 2.0
    assert pacing.spacing(nightly, at("2026-11-20 19:00").timestamp(), bulk=True) == 1.25


@freeze_time("2026-11-20 16:00:00")  # UTC; 10:00 in Chicago
def test_opening_hours_are_local_wherever_the_machine_thinks_it_is() -> None:
    assert pacing.spacing(settings(), datetime.now(UTC).timestamp(), bulk=False) == 2.0


def test_unthrottled_plans_reckon_with_the_offices_own_time() -> None:
    service = parse(
        TEXT.replace('[api]\nmin_interval = "1s"', '[api]\nmode = "service"'),
        name="main",
        folder=Path("/etc/syncd/main"),
        environ={},
    )
    night = at("2026-11-20 19:00").timestamp()
    assert pacing.spacing(service, night, bulk=False) == pytest.approx(0.0125)
    assert pacing.expected_spacing(service, night, bulk=False) == pytest.approx(0.0625)
    assert pacing.expected_spacing(settings(), night, bulk=False) == pacing.spacing(settings(), night, bulk=False)


def answers(manners: pacing.Manners, seconds: float, many: int, since: float = 0.0, share: float = 1.0) -> list[float]:
    return [manners.rest("document", seconds, share, since + place * seconds) for place in range(many)]


def test_an_office_that_answers_as_usual_is_asked_without_a_rest() -> None:
    manners = pacing.Manners()
    assert set(answers(manners, 0.04, 100) + answers(manners, 0.1, 200)) == {0.0}
    assert {manners.rest("mount", 3.0, 1.0, 0.0) for _ in range(50)} == {0.0}  # another kind, another usual


def test_share_of_an_unthrottled_office_is_of_its_time() -> None:
    assert answers(pacing.Manners(), 0.04, 3, share=0.5) == [0.04] * 3
    assert answers(pacing.Manners(), 0.5, 2, share=0.25) == [1.5] * 2


def test_an_office_that_slows_down_is_left_time_for_its_own_work() -> None:
    manners = pacing.Manners()
    answers(manners, 0.05, 100)
    rests = answers(manners, 1.0, 100, since=5.0)
    assert rests[0] == 0.0, "one slow answer is no sign"
    assert rests == sorted(rests)
    assert 0.6 < rests[-1] <= 1.0
    assert answers(manners, 0.05, 200, since=105.0)[-1] == 0.0, "it is as quick as it was: so are we"


def test_what_stays_slow_becomes_usual_within_hours() -> None:
    manners = pacing.Manners()
    answers(manners, 0.1, 100)
    assert answers(manners, 1.0, 100, since=10.0)[-1] > 0.5
    later = [answers(manners, 1.0, 100, since=3600.0 * hour)[-1] for hour in range(1, 7)]
    assert later == sorted(later, reverse=True)
    assert later[-1] == 0.0


def test_rest_of_a_slow_office_is_bounded() -> None:
    manners = pacing.Manners()
    answers(manners, 0.3, 100)
    assert answers(manners, 60.0, 100, since=30.0)[-1] == pacing.LONGEST_REST


def test_rest_counts_from_the_answer() -> None:
    pace = pacing.started(Pace(), 500.0, "2026-11-20")
    assert pacing.next_start(pacing.answered(pace, 501.0, good=True, rest=0.5), 1.0, 501.0) == 501.5
    assert pacing.next_start(pacing.answered(pace, 540.0, good=True, rest=0.5), 1.0, 540.0) == 550.0


def test_first_request_starts_at_once_and_the_next_after_the_spacing() -> None:
    assert pacing.next_start(Pace(), 1.0, 500.0) <= 500.0
    pace = pacing.started(Pace(), 500.0, "2026-11-20")
    assert pacing.next_start(pace, 1.0, 500.2) == 501.0


def test_normal_answer_leaves_no_pause_and_a_slow_one_a_quarter() -> None:
    pace = pacing.started(Pace(), 500.0, "2026-11-20")
    assert pacing.next_start(pacing.answered(pace, 510.0, good=True), 1.0, 510.0) == 501.0
    assert pacing.next_start(pacing.answered(pace, 540.0, good=True), 1.0, 540.0) == 550.0


def test_waits_after_429_double_to_a_quarter_of_an_hour_and_end_with_a_good_answer() -> None:
    pace, waits, steady = Pace(), [], 1000.0
    for _ in range(10):
        pace = pacing.throttled(pacing.started(pace, steady, "2026-11-20"), steady + 0.1, None)
        waits.append(round(pacing.next_start(pace, 1.0, steady + 0.1) - steady - 0.1, 6))
        steady = pace.not_before
    assert waits == [5, 10, 20, 40, 80, 160, 320, 640, 900, 900]
    assert pace.throttled_today == 10
    bad = pacing.answered(pacing.started(pace, steady, "2026-11-20"), steady, good=False)
    assert bad.throttles_in_a_row == 10
    assert pacing.answered(bad, steady, good=True).throttles_in_a_row == 0


@pytest.mark.parametrize(("retry_after", "wait"), [(None, 5), (2.0, 5), (60.0, 60), (1e9, 3600)])
def test_retry_after_is_obeyed_when_longer_up_to_an_hour(retry_after: float | None, wait: float) -> None:
    pace = pacing.throttled(pacing.started(Pace(), 100.0, "2026-11-20"), 100.0, retry_after)
    assert pacing.next_start(pace, 1.0, 100.0) == 100.0 + wait


def test_after_a_reboot_the_spacing_counts_from_boot_and_a_pause_is_still_kept() -> None:
    before = pacing.started(Pace(), 1e6, "2026-11-20")
    assert pacing.next_start(before, 5.0, 2.0) == 5.0
    assert pacing.next_start(before, 5.0, 30.0) == 5.0
    assert pacing.next_start(pacing.throttled(before, 1e6, 600.0), 5.0, 30.0) == 600.0


@given(
    last=st.floats(0, 1e12),
    not_before=st.floats(0, 1e18),
    spacing=st.floats(0.001, 100),
    steady=st.floats(0, 1e9),
)
def test_no_record_whatever_it_holds_stops_requests_for_more_than_an_hour_and_a_minute(
    last: float, not_before: float, spacing: float, steady: float
) -> None:
    pace = Pace(last_start=last, not_before=not_before)
    waited = steady
    for _ in range(2):  # the second: a start before the reboot may look like one after it once that time has come
        earliest = pacing.next_start(pace, spacing, waited)
        assert earliest <= waited + 3660.001
        waited = max(earliest, waited)
    assert pacing.next_start(pace, spacing, waited) <= waited


@given(st.lists(st.tuples(st.floats(0, 30), st.sampled_from(["good", "bad", "throttled"])), max_size=30))
def test_starts_are_never_closer_than_the_spacing(answers: list[tuple[float, str]]) -> None:
    pace, steady, starts = Pace(), 10.0, list[float]()
    for duration, answer in answers:
        steady = max(steady, pacing.next_start(pace, 1.1, steady))
        starts.append(steady)
        pace = pacing.started(pace, steady, "2026-11-20")
        steady += duration
        throttled = answer == "throttled"
        pace = pacing.throttled(pace, steady, None) if throttled else pacing.answered(pace, steady, answer == "good")
    assert all(later - earlier >= 1.1 - 1e-9 for earlier, later in pairwise(starts))


def test_counts_begin_anew_each_day() -> None:
    pace = pacing.throttled(pacing.started(Pace(), 1.0, "2026-11-20"), 1.0, None)
    pace = pacing.started(pace, 2.0, "2026-11-20")
    assert (pace.requests_today, pace.throttled_today) == (2, 1)
    pace = pacing.started(pace, 3.0, "2026-11-21")
    assert (pace.requests_today, pace.throttled_today) == (1, 0)


def test_record_survives_json() -> None:
    pace = replace(Pace(), last_start=1.5, not_before=2.5, throttles_in_a_row=2, day="2026-11-20", requests_today=7)
    assert Pace.from_json(pace.to_json()) == pace


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\0\0\0",
        "[]",
        "{}",
        "null",
        Pace().to_json().replace('"day": ""', '"day": 5'),
        replace(Pace(), last_start=math.nan).to_json(),
        replace(Pace(), not_before=-1.0).to_json(),
        "[" * 100_000,
    ],
)
def test_damaged_record_is_a_fresh_one(text: str) -> None:
    assert Pace.from_json(text) == Pace()


NOW = datetime(2026, 11, 20, 12, 0, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("", None),
        ("soon", None),
        ("-5", None),
        ("7", 7.0),
        (" 1.5 ", 1.5),
        ("9" * 400, 3600.0),
        (format_datetime(NOW.replace(minute=1), usegmt=True), 60.0),
        ("Fri, 20 Nov 2026 12:01:00 -0000", 60.0),
        ("Fri, 20 Nov 2020 12:01:00 GMT", 0.0),
        ("Fri, 20 Nov 9999 12:01:00 GMT", 3600.0),
        ("Fri, 99 Nov 2026 12:01:00 GMT", None),
    ],
)
def test_retry_after_is_seconds_or_a_date(value: str | None, seconds: float | None) -> None:
    assert pacing.parse_retry_after(value, NOW.timestamp()) == seconds


@given(st.text())
def test_any_retry_after_is_none_or_at_most_an_hour(value: str) -> None:
    wait = pacing.parse_retry_after(value, NOW.timestamp())
    assert wait is None or 0 <= wait <= 3600


@pytest.mark.parametrize(
    ("local", "inside"),
    [
        ("2026-11-20 17:59", False),  # a Friday
        ("2026-11-20 18:00", True),
        ("2026-11-21 06:59", True),
        ("2026-11-21 12:00", True),
        ("2026-11-22 23:59", True),
        ("2026-11-23 06:00", False),  # Monday: Sunday's night has no window of its own
        ("2026-11-24 06:59", True),
        ("2026-11-24 07:00", False),
    ],
)
def test_window_over_midnight_belongs_to_the_day_it_starts_on(local: str, inside: bool) -> None:
    assert pacing.in_window(WINDOWS, at(local)) is inside


def test_whole_week_is_always_inside_and_no_window_never_is() -> None:
    hours = [at(f"2026-11-{day} {hour:02}:30") for day in range(20, 27) for hour in range(24)]
    assert all(pacing.in_window([parse_window("Mon-Sun 00:00-24:00")], hour) for hour in hours)
    assert not any(pacing.in_window([], hour) for hour in hours)


def test_items_are_retried_with_growing_distance_and_never_never() -> None:
    assert [pacing.retry_delay(n) for n in (0, 1, 2, 3, 4, 5, 6, 99)] == [
        5,
        5,
        30,
        3600,
        14_400,
        43_200,
        86_400,
        86_400,
    ]


def test_sites_are_probed_every_quarter_of_an_hour_at_last() -> None:
    assert [pacing.site_delay(n) for n in (0, 1, 2, 3, 4, 99)] == [15, 15, 60, 300, 900, 900]
