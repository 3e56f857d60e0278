"""The words of status, health and plan: what an IT person is told, and when."""

from __future__ import annotations

import base64
import datetime as dt
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from syncd.config import parse
from syncd.errors import REASONS, SiteError
from syncd.report import (
    DAY,
    HOUR,
    LIVELY,
    SILENT,
    Budget,
    Chore,
    Hold,
    Incident,
    Report,
    Signs,
    StatusFacts,
    Surroundings,
    Trouble,
    absent,
    floor_seconds,
    health,
    human_bytes,
    human_duration,
    iso,
    nothing_known,
    plan,
    silent_parts,
    status,
)

NOW = 1_795_000_000.0
BOOTED_FOR = 50_000.0
SYNCED = StatusFacts(
    items=40,
    archived_items=40,
    archived_versions=50,
    archived_bytes=50_000_000,
    last_archived_at=NOW - 3 * HOUR,
    patients=10,
    lists=20,
    sweep_requests=20,
    oldest_polled_at=NOW - HOUR,
    last_listed_at=NOW - 60,
)
FIRST = replace(SYNCED, lists_never_polled=15, first_sweep_lacks=15, last_listed_at=NOW - 10)
AROUND = Surroundings("main", "0.1.0", Budget(1, 1, 1), holder="run, pid 812", requests_today=7, throttled_today=1)
CONTRACT = (
    "practice version state reason message who since next_try_at healthy owed thumbnails_due failing held vanished"
    " pending_at_source last_complete_sweep_at oldest_list_seconds eta_seconds requests_today throttled_today"
    " drop_leftovers archive_free_bytes incidents"
)


def trouble(reason: str, failures: int = 9, since: float = 60.0, lane: str = "api") -> Trouble:
    return Trouble(lane, reason, "", NOW - since, NOW + 300, failures)


def told(facts: StatusFacts = SYNCED, around: Surroundings = AROUND) -> Report:
    return status(facts, around, NOW)


def verdict(facts: StatusFacts, max_age: float | None = None, around: Surroundings = AROUND) -> tuple[bool, str]:
    return health(status(facts, around, NOW), facts, max_age, floor_seconds(facts, around.budget), NOW)


def test_status_has_every_key_of_the_contract() -> None:
    assert set(CONTRACT.split()) <= told().keys()


@pytest.mark.parametrize(("invalid", "says"), [(True, ("stopped", "config_invalid")), (False, ("unknown", "unknown"))])
def test_status_of_a_practice_that_cannot_be_asked_claims_nothing(invalid: bool, says: tuple[str, str]) -> None:
    said = nothing_known("west", "0.1.0", invalid, NOW)
    assert said.keys() == told().keys()
    assert (said["state"], said["reason"], said["who"], said["at"]) == (*says, "practice_it", iso(NOW))
    assert (said["owed"], said["holder"], said["healthy"], said["incidents"]) == (None, None, False, [])
    assert "-p west" in said["message"]


def test_nothing_owed_is_ok_and_has_no_eta() -> None:
    said = told()
    assert (said["state"], said["reason"], said["who"], said["eta_seconds"]) == ("ok", "ok", "nobody", None)
    assert said["last_complete_sweep_at"] == iso(NOW - HOUR)
    assert said["oldest_list_seconds"] == HOUR


HELD = Hold(7, "patient-101", "disappearances_held", 30, 40, 2, NOW - DAY)
EVERYTHING = replace(
    SYNCED,
    owed=5,
    owed_requests=5,
    failing={"timeout_60s": 2},
    held=30,
    holds=(HELD,),
    troubles=(trouble("throttled"),),
)


def test_the_worst_state_is_named_first_and_the_next_one_appears_when_it_is_mended() -> None:
    facts = replace(EVERYTHING, troubles=(trouble("throttled"), trouble("archive_full", lane="pull")))
    around = replace(AROUND, paused_until=NOW + HOUR, holder=None)
    seen = [told(facts, around)]
    seen.append(told(facts, around := replace(around, paused_until=None)))
    seen.append(told(facts, around := replace(around, holder="run, pid 1")))
    seen.append(told(facts := replace(facts, troubles=(trouble("throttled"),)), around))
    seen.append(told(facts := replace(facts, troubles=()), around))
    seen.append(told(facts := replace(facts, holds=(), held=0), around))
    seen.append(told(facts := replace(facts, failing={}), around))
    seen.append(told(replace(facts, owed=0), around))
    assert [(said["state"], said["reason"]) for said in seen] == [
        ("paused", "paused"),
        ("stopped", "not_running"),
        ("blocked", "archive_full"),
        ("degraded", "throttled"),
        ("degraded", "disappearances_held"),
        ("degraded", "items_failing"),
        ("catching_up", "catching_up"),
        ("ok", "ok"),
    ]


@pytest.mark.parametrize("least", [{"failing": {"refused": 1}}, {"troubles": (trouble("hook_failing"),)}])
def test_lists_that_are_too_old_are_told_though_something_smaller_is_wrong(least: dict[str, Any]) -> None:
    assert told(replace(SYNCED, **least))["reason"] in ("items_failing", "hook_failing")
    said = told(replace(SYNCED, oldest_polled_at=NOW - 9 * DAY, **least))
    assert (said["state"], said["reason"], said["who"]) == ("degraded", "sweep_overdue", "practice_it")


def test_why_lists_are_too_old_comes_before_that_they_are() -> None:
    old = replace(SYNCED, oldest_polled_at=NOW - 9 * DAY, failing={"refused": 1})
    assert told(replace(old, lists_unreadable=1))["reason"] == "lists_unreadable"
    assert told(replace(old, lists_unreadable=1, held=1))["reason"] == "disappearances_held"


def test_lists_that_were_never_polled_are_work_even_when_nothing_is_owed() -> None:
    assert told(FIRST)["state"] == "catching_up"
    assert told(FIRST)["last_complete_sweep_at"] is None


def test_list_of_a_new_patient_is_work_and_does_not_undo_the_first_sweep() -> None:
    said = told(replace(SYNCED, lists_never_polled=2))
    assert (said["state"], said["last_complete_sweep_at"]) == ("catching_up", iso(NOW - HOUR))


def test_a_single_failed_request_is_no_block_but_the_second_is() -> None:
    blip = replace(SYNCED, troubles=(trouble("api_unreachable", failures=1),))
    assert told(blip)["state"] == "degraded"
    assert told(replace(SYNCED, troubles=(trouble("api_unreachable", failures=2),)))["state"] == "blocked"


@pytest.mark.parametrize("reason", ["archive_missing", "key_refused", "host_key_changed", "other_database"])
def test_what_somebody_must_mend_blocks_at_once(reason: str) -> None:
    said = told(replace(SYNCED, troubles=(trouble(reason, failures=1),)))
    assert (said["state"], said["reason"], said["who"]) == ("blocked", reason, REASONS[reason][0])


def test_the_archive_comes_before_the_database_before_the_key_before_the_site() -> None:
    order = ["archive_missing", "other_database", "key_refused", "econnector_down", "drop_refused"]
    order += ["placements_refused", "catching_up"]
    troubles = tuple(trouble(reason) for reason in reversed(order))
    for reason in order[:-1]:
        assert told(replace(SYNCED, troubles=troubles))["reason"] == reason
        troubles = tuple(each for each in troubles if each.reason != reason)


@pytest.mark.parametrize("reason", ["other_database", "database_went_back"])
def test_hold_on_the_database_is_named_by_what_it_is_and_not_as_disappearances(reason: str) -> None:
    hold = Hold(8, "database", reason, 9, 20, 0, NOW - HOUR)
    said = told(replace(SYNCED, held=30, holds=(HELD, hold), troubles=(trouble(reason, lane="database"),)))
    assert (said["state"], said["reason"], said["message"]) == ("blocked", reason, REASONS[reason][1])


def test_since_and_next_try_are_those_of_the_reason_that_is_named() -> None:
    facts = replace(SYNCED, troubles=(trouble("throttled", since=5), trouble("drop_refused", since=500)))
    said = told(facts)
    assert (said["since"], said["next_try_at"]) == (iso(NOW - 500), iso(NOW + 300))
    assert told(replace(SYNCED, holds=(HELD,)))["since"] == iso(NOW - DAY)
    assert told(around=replace(AROUND, holder=None))["since"] == iso(NOW - 60)
    assert told(around=replace(AROUND, paused_until=NOW + 9))["next_try_at"] == iso(NOW + 9)


def test_the_message_is_the_words_of_the_error_itself() -> None:
    detailed = replace(trouble("tls_failed"), detail=str(SiteError("tls_failed", "HTTP 401")))
    message, words = told(replace(SYNCED, troubles=(detailed,)))["message"], REASONS["tls_failed"][1]
    assert message == words.replace("here:", "here (HTTP 401):")
    assert told(replace(SYNCED, troubles=(trouble("tls_failed"),)))["message"] == words


CONFIG = """
[practice]
time_zone = "UTC"
[api]
min_interval = "1s"
share = 0.5
[drop]
host = "192.0.2.1"
username = "opendental"
password_file = "sftp_password"
folder = "syncd"
host_key = "KEY"
[archive]
path = "/srv/archive/main"
[backfill]
window = ["Sat-Sun"]
"""


def test_the_budget_is_the_mean_of_a_week_with_its_shares_and_windows() -> None:
    blob = b"".join(len(part).to_bytes(4) + part for part in (b"ssh-ed25519", bytes(32)))
    text_of_config = CONFIG.replace("KEY", f"ssh-ed25519 {base64.b64encode(blob).decode()}")
    budget = Budget.of(parse(text_of_config, name="main", folder=Path("/etc/syncd/main"), environ={}), NOW)
    assert budget.interval == 1.0
    assert budget.spacing == pytest.approx(168 / (45 / 2 + 123))  # open 45 h at half, the rest in full
    assert budget.bulk_spacing == pytest.approx(168 / (45 / 4 + 75 / 2 + 48))  # half of that but for the weekend


def test_eta_counts_requests_at_the_spacing_that_bulk_work_gets() -> None:
    facts = replace(SYNCED, owed=10, owed_requests=12, thumbnail_calls=3)
    budget = Budget(interval=1.0, spacing=1.2, bulk_spacing=1.6)
    assert told(facts, replace(AROUND, budget=budget))["eta_seconds"] == 15 * 1.6
    assert told(facts)["eta_seconds"] == 15


def test_eta_of_a_first_sync_grows_with_what_the_polled_lists_held() -> None:
    facts = replace(FIRST, items=40)  # on 5 lists: 8 each, so 120 more on 15 lists
    assert told(facts)["eta_seconds"] == 15 + 120
    assert replace(FIRST, items=0, lists_never_polled=20).files_to_come == 160  # a supposition, before any list


def test_eta_goes_through_opening_hours_and_windows_hour_by_hour() -> None:
    budget = Budget(1.0, 1.0, 2.0, bulk_hours=(10.0, 10.0, 1.0))  # slow for two hours, then ten times as fast
    assert budget.seconds_for(360) == HOUR
    assert budget.seconds_for(720 + 600) == 2 * HOUR + 600
    assert budget.seconds_for(720 + 3600 + 100) == 3 * HOUR + 200  # beyond what is known: the mean
    said = told(replace(SYNCED, owed=1320, owed_requests=1320), replace(AROUND, budget=budget))
    assert (said["eta_seconds"], said["ready_at"]) == (2 * HOUR + 600, iso(NOW + 2 * HOUR + 600))


def test_disk_is_full_when_the_middle_one_of_the_last_days_has_filled_it_down_to_the_reserve() -> None:
    grown = (900_000_000_000, 0, 0, 10**9, 10**9, 10**9, 10**9)  # a first sync among them, and a weekend
    around = replace(AROUND, free_bytes=15 * 10**9, reserve_bytes=5 * 10**9)
    said = told(replace(SYNCED, grown=grown), around)
    assert (said["archive_full_at"], said["grown_bytes_a_day"]) == (iso(NOW + 10 * DAY), 10**9)
    assert said["grown_bytes_this_week"] == sum(grown)
    assert told(replace(SYNCED, grown=grown), replace(around, free_bytes=10**9))["archive_full_at"] == iso(NOW)


@pytest.mark.parametrize(("grown", "free"), [((), 10**12), ((0,) * 7, 10**12), ((1,) * 7, 10**12), ((9,) * 7, None)])
def test_no_growth_no_disk_or_ten_years_ahead_tell_no_day(grown: tuple[int, ...], free: int | None) -> None:
    assert told(replace(SYNCED, grown=grown), replace(AROUND, free_bytes=free))["archive_full_at"] is None


def test_chores_have_their_keys_before_they_were_ever_done() -> None:
    chores = {"drill": Chore(NOW - DAY, NOW + 6 * DAY, passed=False)}
    said = told(replace(SYNCED, chores=chores))
    assert (said["drill_last_at"], said["drill_next_at"]) == (iso(NOW - DAY), iso(NOW + 6 * DAY))
    assert (said["drill_passed"], told()["drill_passed"]) == (False, None)
    assert said["scrub_last_at"] is said["index_copy_next_at"] is None


def test_messages_name_the_practice_where_a_command_needs_it() -> None:
    said = told(replace(SYNCED, troubles=(trouble("key_refused"),)))
    assert "`sudo syncd setup main --only keys`" in said["message"]


@pytest.mark.parametrize("reason", sorted(REASONS))
def test_every_reason_says_what_is_wrong_and_what_to_do(reason: str) -> None:
    who, message, _ = REASONS[reason]
    what, colon, to_do = message.partition(": ")
    assert 15 < len(what) < 80
    assert bool(colon) is (who != "nobody" or reason == "throttled")
    assert len(to_do) > 15 or not colon


@pytest.mark.parametrize("around", [replace(AROUND, holder=None), replace(AROUND, paused_until=NOW + 1)])
def test_nobody_at_work_gives_no_eta(around: Surroundings) -> None:
    assert told(replace(SYNCED, owed=10, owed_requests=10), around)["eta_seconds"] is None


def test_guards_and_incidents_are_told_with_their_numbers() -> None:
    incidents = (Incident("api", "throttled", NOW - 90, NOW - 30), Incident("pull", "drop_refused", NOW - 60, None))
    said = told(replace(SYNCED, holds=(HELD,), incidents=incidents))
    assert (
        said["guards"][0] | {"id": "guard-7", "items": 30, "of_items": 40, "agreeing_listings": 2} == said["guards"][0]
    )
    assert [each["lasted_seconds"] for each in said["incidents"]] == [60, 60]
    assert [each["until_at"] for each in said["incidents"]] == [iso(NOW - 30), None]


def test_the_floor_is_a_day_or_three_sweeps() -> None:
    assert floor_seconds(SYNCED, Budget(1, 1, 1)) == DAY
    assert floor_seconds(replace(SYNCED, sweep_requests=40_000), Budget(1, 2, 2)) == 3 * 40_000 * 2


def test_health_ends_at_1_3_times_the_floor_and_prints_the_limit() -> None:
    assert verdict(replace(SYNCED, oldest_polled_at=NOW - 1.29 * DAY))[0]
    healthy, line = verdict(replace(SYNCED, oldest_polled_at=NOW - 1.31 * DAY))
    assert not healthy
    assert "1 d 7 h" in line
    assert "\n" not in line


def test_a_maximum_age_that_is_asked_for_replaces_the_default() -> None:
    assert verdict(SYNCED, HOUR)[0]
    assert not verdict(SYNCED, HOUR - 1)[0]


def test_a_mirror_that_is_not_running_says_so_and_turns_unhealthy_by_age() -> None:
    stopped = replace(AROUND, holder=None)
    assert verdict(SYNCED, around=stopped) == (True, verdict(SYNCED)[1] + "; syncd is not running")
    assert not verdict(replace(SYNCED, oldest_polled_at=NOW - 2 * DAY), around=stopped)[0]


def test_a_service_that_stopped_is_unhealthy_after_a_quarter_of_an_hour_whatever_the_age() -> None:
    stopped = replace(AROUND, holder=None)
    assert verdict(replace(SYNCED, troubles=absent(NOW - SILENT)), around=stopped)[0], "it is only restarted"
    gone = replace(SYNCED, troubles=absent(NOW - SILENT - 60))
    healthy, line = verdict(gone, around=stopped)
    assert not healthy
    assert line.startswith("unhealthy: not_running for 16 min: no syncd holds the lock")
    assert not verdict(gone, 9 * DAY, stopped)[0], "also of somebody who allows a great age"
    assert told(gone, stopped)["since"] == iso(NOW - SILENT - 60)
    assert (told(gone, stopped)["state"], told(gone, stopped)["healthy"]) == ("stopped", False)
    assert verdict(gone, around=replace(stopped, paused_until=NOW + HOUR))[0]


def test_a_pause_is_healthy_whatever_the_age_and_says_so() -> None:
    healthy, line = verdict(replace(SYNCED, oldest_polled_at=1.0), around=replace(AROUND, paused_until=NOW + HOUR))
    assert healthy
    assert "paused until" in line


def test_a_block_is_unhealthy_once_it_lasts() -> None:
    healthy, line = verdict(replace(SYNCED, troubles=(trouble("archive_missing", since=LIVELY - 1),)))
    assert healthy
    assert "archive_missing: the archive is not mounted" in line, "it says no less than of smaller trouble"
    healthy, line = verdict(replace(SYNCED, troubles=(trouble("archive_missing", since=LIVELY + 1),)))
    assert not healthy
    assert "archive_missing" in line


@pytest.mark.parametrize(("scope", "healthy"), [("all", False), ("roster", False), ("patient-101", True)])
def test_a_hold_of_everybody_is_unhealthy_once_it_lasts(scope: str, healthy: bool) -> None:
    assert verdict(replace(SYNCED, holds=(replace(HELD, scope=scope, made_at=NOW - LIVELY + 1),)))[0]
    lasting = replace(SYNCED, holds=(replace(HELD, scope=scope, made_at=NOW - LIVELY - 1),))
    assert verdict(lasting)[0] is healthy
    assert (told(lasting)["state"], told(lasting)["who"]) == ("degraded", "practice_it")


def test_a_first_sync_is_healthy_while_it_shows_life() -> None:
    assert verdict(FIRST) == (True, "healthy: first sync, 5 of 20 lists read")
    assert verdict(replace(FIRST, last_listed_at=None, last_archived_at=NOW - LIVELY))[0]
    assert not verdict(replace(FIRST, last_listed_at=NOW - LIVELY - 1))[0]


def test_a_first_sync_that_was_told_to_wait_is_healthy_until_the_wait_is_over() -> None:
    silent = replace(FIRST, last_listed_at=NOW - DAY, last_archived_at=None, troubles=(trouble("throttled"),))
    assert verdict(silent)[0]
    over = replace(trouble("throttled"), next_try_at=NOW - 1)
    assert not verdict(replace(silent, troubles=(over,)))[0]


def test_an_index_without_a_roster_is_not_healthy() -> None:
    assert not verdict(StatusFacts())[0]


def test_a_few_new_patients_do_not_turn_an_old_mirror_into_a_first_sync() -> None:
    old = replace(SYNCED, lists=2000, lists_never_polled=2, oldest_polled_at=NOW - 9 * DAY)
    assert not verdict(old)[0]


MANY = 9_999_999
BIG = replace(
    EVERYTHING,
    owed=MANY,
    owed_requests=MANY,
    archived_items=MANY,
    archived_versions=MANY,
    lists=MANY,
    patients=MANY,
    archived_bytes=99_000_000_000_000,
    delays=dict.fromkeys(("document", "mount", "sheet"), [86_340.0] * 12_345),
    incidents=(Incident("placing", "placements_refused", NOW - 3 * DAY - 5 * HOUR, None),),
)


def test_status_tells_how_fresh_the_last_day_was_by_kind() -> None:
    status_ = told(replace(SYNCED, delays={"sheet": [7200.0], "document": [*range(100, 0, -1)]}))
    assert status_["freshness"] == {
        "document": {"files": 100, "median_seconds": 50, "p95_seconds": 95, "oldest_seconds": 100},
        "sheet": {"files": 1, "median_seconds": 7200.0, "p95_seconds": 7200.0, "oldest_seconds": 7200.0},
    }
    assert told(SYNCED)["freshness"] == {}


@pytest.mark.parametrize(
    ("feed_at", "off_until", "said"),
    [
        (None, None, "off"),
        (NOW - 60, None, "on"),
        (NOW - 2 * HOUR, NOW - HOUR, "off"),
        (NOW - 60, NOW + HOUR, "resting"),
    ],
)
def test_status_tells_whether_the_change_feed_is_on(feed_at: float | None, off_until: float | None, said: str) -> None:
    status_ = told(replace(SYNCED, feed_at=feed_at, feed_off_until=off_until))
    assert status_["change_feed"] == said


def test_plan_scales_with_the_tier_and_ends_with_the_configured_one() -> None:
    planned = plan(replace(SYNCED, owed=17_280, owed_requests=17_280, sweep_requests=1000), Budget(2, 2, 2))
    tiers = {tier["tier"]: tier for tier in planned["tiers"]}
    assert tiers["free, 5 s"]["days_to_finish"] == 1.0
    assert tiers["free, 5 s"]["sweep_seconds"] == 5000
    assert planned["tiers"][-1]["days_to_finish"] == 0.4
    assert planned["expected_bytes"] == 17_280 * 1_000_000
    assert not planned["estimated"]


def test_plan_before_the_first_sweep_says_that_it_is_an_estimate() -> None:
    planned = plan(FIRST, Budget(1, 1, 1))
    assert planned["estimated"]
    assert plan(StatusFacts(), Budget(1, 1, 1))["requests_to_come"] == 0


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1500, "1.5 kB"),
        (999_950, "1.0 MB"),
        (5e9, "5.0 GB"),
        (123e9, "123 GB"),
        (9e15, "9,000 TB"),
    ],
)
def test_bytes_for_people(count: float, shown: str) -> None:
    assert human_bytes(count) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0 s"),
        (59.9, "59 s"),
        (60, "1 min"),
        (3600, "1 h"),
        (3900, "1 h 5 min"),
        (86_400, "1 d"),
        (100_000, "1 d 3 h"),
    ],
)
def test_durations_for_people(seconds: float, shown: str) -> None:
    assert human_duration(seconds) == shown


@given(st.floats(0, 1e9), st.floats(0.01, 1e6))
def test_a_longer_duration_never_reads_as_a_shorter_one(seconds: float, more: float) -> None:
    units = {"s": 1, "min": 60, "h": 3600, "d": 86_400}

    def value(shown: str) -> int:
        words = shown.split()
        return sum(int(number) * units[unit] for number, unit in zip(words[::2], words[1::2], strict=True))

    assert value(human_duration(seconds)) <= value(human_duration(seconds + more))
    assert value(human_duration(seconds)) <= seconds


@given(st.floats(0, 4e9))
def test_a_time_for_programs_reads_back_to_the_millisecond(at: float) -> None:
    written = iso(at)
    assert written is not None
    assert written.endswith("Z")
    assert abs(dt.datetime.fromisoformat(written).timestamp() - at) < 0.002


# --- who gives no sign of life


def told_silent(signs: Signs | None) -> list[tuple[str, str, float]]:
    return [(each.lane, each.reason, NOW - each.since_at) for each in silent_parts(signs, BOOTED_FOR, NOW)]


def test_process_that_is_silent_is_told_once_and_not_each_of_its_parts() -> None:
    long_ago = BOOTED_FOR - SILENT - 1
    assert told_silent(Signs(long_ago, {"api": (long_ago, "")})) == [("process", "not_responding", SILENT + 1)]


def test_each_silent_part_is_told_with_its_own_reason() -> None:
    live, silent = BOOTED_FOR - SILENT, BOOTED_FOR - SILENT - 60
    parts = {"api": (live, ""), "pull": (silent, "disk_error"), "scheduler": (silent, ""), "clock": (silent, "")}
    assert told_silent(Signs(BOOTED_FOR, {**parts, "log": (silent, "")})) == [
        ("pull", "disk_error", SILENT + 60),
        ("scheduler", "lane_stuck", SILENT + 60),
        ("clock", "clock_stuck", SILENT + 60),
        ("log", "log_unwritable", SILENT + 60),
    ]


def test_verb_that_gives_no_signs_is_not_silent() -> None:
    assert told_silent(None) == []
