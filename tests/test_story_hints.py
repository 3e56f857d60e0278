"""Hints: what makes the mirror poll the right list soon; none is needed, none is believed without proof."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from syncd.demo.build import Past, build_practice
from syncd.demo.clock import SimulatedClock
from syncd.demo.schema import ALL_PERMISSIONS, APT_STATUSES
from syncd.demo.wire import Request, Response, json_response
from syncd.errors import TransientError
from tests.world import PLACEMENTS, START, Findings, World

pytestmark = pytest.mark.slow

FEED = "/queries/ShortQuery"
MINUTE, HOUR, DAY = 60.0, 3600.0, 86_400.0
FEW = Past(documents=2, mounts=0.0, sheets=1, raw=0.0, urls=0.0, old_sheets=0.0, odd_names=0.0, deleted=0.0)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """A daemon that has mirrored a practice whose lists are polled once an hour at least."""
    world = World.start(tmp_path, 60, past=FEW, interval=10.0, nap=30.0, hinted=True)
    world.run(hours=1.5)
    yield world
    world.stop()


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[World]:
    """One request a minute, for tests that take days."""
    world = World.start(tmp_path, 6, past=FEW, interval=60.0, hinted=True)
    world.run(hours=3)
    yield world
    world.stop()


def until_archived(world: World, pat_num: int, kind: str, num: int, versions: int = 1) -> float:
    """Seconds until so many versions of the item are archived."""
    since = world.clock.now()
    world.run(hours=30, until=lambda: len(world.media(pat_num, kind, num)) >= versions)
    return world.clock.now() - since


def test_change_feed_brings_new_documents_edits_and_sheets_within_minutes(world: World) -> None:
    document, sheet = world.practice.add_document(7), world.practice.add_sheet(8)
    assert until_archived(world, 7, "document", document) < 7 * MINUTE
    assert until_archived(world, 8, "sheet", sheet) < 7 * MINUTE
    assert world.clock.now() - (world.catalog().status_facts(world.clock.now()).feed_at or 0) < 7 * MINUTE
    world.practice.replace_bytes(document)
    assert until_archived(world, 7, "document", document, versions=2) < 7 * MINUTE


def test_change_feed_shows_what_changed_inside_a_mount(world: World) -> None:
    mount = world.practice.add_mount(9, 2)
    world.run(hours=2)
    image = world.practice.mount_images(mount)[0]["DocNum"]
    world.practice.replace_bytes(image)
    assert until_archived(world, 9, "mount-image", image, versions=2) < 7 * MINUTE


def test_image_that_changes_while_its_mount_is_fetched_is_fetched_too(tmp_path: Path) -> None:
    kinds = ["document", "mount-image"]
    world = World.start(tmp_path, 10, past=FEW, interval=10.0, nap=30.0, hinted=True, sync={"kinds": kinds})
    mount = world.practice.add_mount(9, 2)
    world.run(hours=3)
    one, other = (image["DocNum"] for image in world.practice.mount_images(mount))
    before = len(world.office.arrivals)
    world.practice.replace_bytes(one)
    world.drop.broken = TransientError("drop_unreachable")  # what the office writes cannot be read for a while
    world.run(until=lambda: world.sent("/documents/DownloadMount", since=before))
    world.practice.replace_bytes(other)
    world.run(seconds=10 * MINUTE)
    world.drop.broken = None
    world.run(hours=2)
    assert [len(world.media(9, "mount-image", image)) for image in (one, other)] == [2, 2]
    assert len(world.sent("/documents/DownloadMount", since=before)) == 2, "once more, not for ever"
    world.check()
    world.stop()


def test_change_feed_takes_a_small_part_of_the_requests(world: World) -> None:
    before = len(world.office.arrivals)
    world.run(hours=2)
    asked = len(world.sent(FEED, since=before))
    assert 2 * HOUR / 300 <= asked <= 0.06 * 2 * HOUR / 10.0


def test_change_feed_reads_more_rows_than_one_page_has(world: World) -> None:
    documents = [world.practice.add_document(10 + n % 50) for n in range(250)]
    world.run(seconds=10 * MINUTE)
    listed = world.index.value("SELECT count(*) FROM item WHERE kind = 'document' AND num >= ?", documents[0])
    assert listed >= 25, "the lists that it named are being polled"
    world.run(hours=2)
    world.check()


@pytest.mark.parametrize(("status", "times"), [(401, 1), (400, 1), (504, 3), (500, 3)])
def test_change_feed_that_is_refused_or_fails_rests_until_tomorrow(slow: World, status: int, times: int) -> None:
    before, nightly = len(slow.office.arrivals), 2
    slow.office.faults.add("status", path=FEED, status=status, text="no", times=times)
    slow.run(hours=23)
    assert len(slow.sent(FEED, since=before)) <= times + nightly
    warned = [line for line in slow.log.events("hint_off") if line["hint"] == "feed"]
    assert len(warned) == 1
    assert not slow.index.rows("SELECT * FROM site WHERE lane = 'api'"), "the API is well"
    assert (slow.catalog().status_facts(slow.clock.now()).feed_off_until or 0) > slow.clock.now()
    slow.restart()
    slow.run(hours=1)
    assert len(slow.sent(FEED, since=before)) <= times + nightly, "nor does a restart ask again"
    slow.run(hours=3)
    assert len(slow.sent(FEED, since=before)) > times + nightly


def test_change_feed_that_is_slow_rests_until_tomorrow(slow: World) -> None:
    before = len(slow.office.arrivals)
    slow.office.faults.add("slow", path=FEED, seconds=12.0, times=None)
    slow.run(hours=20)
    assert len(slow.sent(FEED, since=before)) <= 3 + 1
    assert len(slow.log.events("hint_off")) == 1


def test_key_without_the_permission_never_asks(tmp_path: Path) -> None:
    world = World.start(tmp_path, 5, past=FEW, interval=10.0, hinted=True)
    world.office.permissions = tuple(name for name in ALL_PERMISSIONS if "Queries" not in name)
    world.run(hours=8)
    assert not world.sent(FEED)
    assert not world.log.events("hint_off")
    world.check()


def test_change_feed_that_is_off_asks_for_no_permission(tmp_path: Path) -> None:
    off = {"change_feed": "off", "appointments": "off"}
    world = World.start(tmp_path, 5, past=FEW, interval=60.0, hinted=True, sync=off)
    world.run(hours=26)
    assert not world.sent("/securityperms")
    assert not world.sent("/appointments")
    assert not world.sent(FEED)
    world.check()


def test_nightly_count_finds_a_deletion_that_the_feed_cannot_show(world: World) -> None:
    world.clock.advance(_night(world) - 2 * HOUR - world.clock.now())  # the machine was asleep
    world.run(seconds=_night(world) - world.clock.now())
    (gone,) = world.index.rows("SELECT pat_num, kind, num FROM item WHERE kind = 'document' ORDER BY num DESC LIMIT 1")
    world.practice.delete_document(gone["num"])
    world.run(seconds=10 * MINUTE)  # its own turn comes later
    assert world.item(**gone)["missing_since_at"] is not None


def _night(world: World) -> float:
    """A minute to one o'clock."""
    local = datetime.fromtimestamp(world.clock.now(), world.settings.zone)
    return world.clock.now() + ((25 - local.hour) * 60 - local.minute - 1) * MINUTE


def test_new_patient_is_met_before_the_next_roster(world: World) -> None:
    world.lanes.api_lane.lists.roster_not_before = world.clock.now() + DAY
    patient = world.practice.add_patient()
    document = world.practice.add_document(patient)
    assert until_archived(world, patient, "document", document) < 10 * MINUTE


@pytest.mark.parametrize("zone", ["America/Chicago", "Asia/Kolkata"])
def test_patient_with_an_appointment_is_polled_often_around_it_in_whatever_zone_that_is(
    tmp_path: Path, zone: str
) -> None:
    off, practice = {"change_feed": "off"}, build_practice(60, 1, SimulatedClock(START), time_zone=zone, past=FEW)
    world = World.start(tmp_path, practice=practice, interval=10.0, nap=30.0, hinted=True, sync=off)
    world.run(hours=1.5)
    world.practice.add_appointment(45, world.clock.now() + HOUR)
    before = len(world.office.arrivals)
    world.run(hours=2)
    expected, others = (len(world.sent("/documents", since=before, PatNum=pat_num)) for pat_num in (45, 46))
    assert expected >= 2 * others + 2
    world.check()


def test_filter_that_is_ignored_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World.start(tmp_path, 5, past=FEW, interval=10.0, nap=30.0, hinted=True)
    world.practice.add_appointment(3, START + HOUR)
    handle = world.office.handle

    def deaf(request: Request) -> Response:
        query = {name: value for name, value in request.query.items() if not name.startswith("date")}
        return handle(replace(request, query=query) if request.path.endswith("/appointments") else request)

    monkeypatch.setattr(world.office, "handle", deaf)
    world.run(hours=6)
    asked = world.sent("/appointments")
    assert asked
    assert all(arrival.params.get("Offset") in ("0", 0) for arrival in asked)
    assert "today" in {line["hint"] for line in world.log.events("hint_off")}
    world.check()


def without_offset(world: World, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the office answers each page with the first one."""
    handle = world.office.handle

    def deaf(request: Request) -> Response:
        query = {name: value for name, value in request.query.items() if name != "Offset"}
        return handle(replace(request, query=query) if request.path.endswith(path) else request)

    monkeypatch.setattr(world.office, "handle", deaf)


def test_appointments_whose_pages_do_not_advance_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World.start(tmp_path, 6, past=FEW, interval=60.0, hinted=True)
    for n in range(100):
        world.practice.add_appointment(1 + n % 6, START + HOUR + n * MINUTE)
    without_offset(world, "/appointments", monkeypatch)
    world.run(hours=8)
    off = [line["hint"] for line in world.log.events("hint_off")]
    assert off == ["today"]
    assert len(world.sent("/appointments")) <= 2 + 3 * 2
    assert world.index.value("SELECT count(*) FROM appointment_day WHERE day = '2026-03-10'") == 0
    world.check()


def test_changed_patients_whose_pages_do_not_advance_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World.start(tmp_path, 110, past=replace(FEW, documents=0, sheets=0), interval=60.0, hinted=True)
    world.practice.db.execute("UPDATE patient SET DateTStamp = '2026-03-10 08:00:00'")  # an aging run
    world.run(hours=1)
    before = len(world.office.arrivals)
    without_offset(world, "/patients/Simple", monkeypatch)
    world.run(hours=3, until=lambda: world.log.events("hint_off"))
    assert [line["hint"] for line in world.log.events("hint_off")] == ["patients"]
    asked = [each for each in world.sent("/patients/Simple", since=before) if "DateTStamp" in each.params]
    assert len(asked) <= 3 * 2


def test_pages_without_an_end_are_left_at_a_hundred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World.start(tmp_path, 200, past=replace(FEW, documents=0, sheets=0), interval=10.0, hinted=True)
    world.practice.db.execute("UPDATE patient SET DateTStamp = '2026-03-10 08:00:00'")
    handle, asked = world.office.handle, Counter[str]()

    def endless(request: Request) -> Response:
        query, offset = request.query, int(request.query.get("Offset", "0"))
        if request.path.endswith("/appointments") and not query["dateStart"].startswith("18"):
            asked["appointments"] = max(asked["appointments"], offset)
            numbers = range(offset, offset + 100)
            return json_response([{"PatNum": 1, "AptDateTime": f"2026-03-10 {n}"} for n in numbers])
        if "DateTStamp" in query:
            asked["patients"] = max(asked["patients"], offset)
            request = replace(request, query={**query, "Offset": str(offset % 200)})
        return handle(request)

    world.run(hours=0.2)
    monkeypatch.setattr(world.office, "handle", endless)
    world.run(hours=4)
    assert asked == {"appointments": 9900, "patients": 9900}
    assert {line["hint"] for line in world.log.events("hint_off")} == {"patients", "today"}


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize(
    ("path", "params", "hints"),
    [
        ("/appointments", {}, ["today", "week"]),
        ("/securityperms", {}, ["permissions"]),
        ("/patients/Simple", {"DateTStamp": "2999-01-01 00:00:00"}, ["patients"]),
    ],
)
def test_hint_that_the_key_may_not_have_rests_until_tomorrow_and_stops_nothing(
    tmp_path: Path, path: str, params: dict[str, object], hints: list[str], status: int
) -> None:
    world = World.start(tmp_path, 6, past=FEW, interval=60.0, hinted=True)
    fault = world.office.faults.add("status", path=path, params=params, status=status, text="no", times=None)
    world.run(hours=20)
    assert fault.fired == len(hints)
    assert [line["hint"] for line in world.log.events("hint_off")] == hints
    assert world.index.rows("SELECT * FROM incident WHERE lane = 'api'") == []
    world.check()


def test_every_hint_that_fails_costs_freshness_only(tmp_path: Path) -> None:
    world = World.start(tmp_path, 6, past=FEW, interval=60.0, hinted=True)
    for path in (FEED, "/securityperms", "/appointments"):
        world.office.faults.add("html", path=path, times=None)
    world.run(hours=3)
    document = world.practice.add_document(3)
    world.run(hours=26)
    assert len(world.media(3, "document", document)) == 1
    world.check()


# --- the first sync and the news share the slots

MANY = replace(FEW, documents=30)
AT_NIGHT, ALWAYS = "Mon-Sun 20:00-06:00", "Mon-Sun 00:00-24:00"


def first_sync(tmp_path: Path, window: str, feed: str = "auto") -> World:
    """A daemon two hours into its first sync, at 11 o'clock of a Tuesday."""
    sync = {"change_feed": feed}
    world = World.start(tmp_path, 20, past=MANY, interval=30.0, nap=30.0, hinted=True, window=window, sync=sync)
    world.run(hours=2)
    assert world.catalog().status_facts(world.clock.now()).lists_never_polled > 5
    return world


@pytest.mark.long
def test_news_do_not_wait_for_the_first_sync(tmp_path: Path) -> None:
    world = first_sync(tmp_path, AT_NIGHT)
    known = world.index.value("SELECT min(pat_num) FROM list WHERE name = 'documents' AND polled_at > 0")
    document, patient = world.practice.add_document(known), world.practice.add_patient()
    assert until_archived(world, known, "document", document) < 15 * MINUTE
    newest = world.practice.add_document(patient)
    assert until_archived(world, patient, "document", newest) < 45 * MINUTE
    assert world.catalog().status_facts(world.clock.now()).lists_never_polled, "the first sync goes on meanwhile"
    world.run()
    assert world.findings() == Findings()


@pytest.mark.parametrize(("window", "least", "most"), [(AT_NIGHT, 0.3, 0.65), (ALWAYS, 0.9, 1.0)])
def test_bulk_work_takes_turns_by_day_and_goes_first_in_its_window(
    tmp_path: Path, window: str, least: float, most: float
) -> None:
    world = first_sync(tmp_path, window, feed="off")
    since = world.clock.now()
    for pat_num in range(1, 21):  # everybody is expected: each list that was read once is worth reading again and again
        world.lanes.api_lane.agenda.appointment(pat_num, since, since)
    before = len(world.office.arrivals)
    world.run(hours=1)
    placements = [each for each in world.office.arrivals[before:] if each.path in PLACEMENTS]
    polls = world.sent("/documents", since=before) + world.sent("/sheets", since=before)
    assert least <= len(placements) / (len(placements) + len(polls)) <= most
    world.stop()


def test_status_measures_how_fresh_the_archive_is(world: World) -> None:
    assert _freshness(world) == {}, "what was there before the mirror says nothing of it"
    new = {pat_num: world.practice.add_document(pat_num) for pat_num in (7, 8, 9)}
    took = [until_archived(world, pat_num, "document", document) for pat_num, document in new.items()]
    world.practice.edit_sheet(world.index.value("SELECT min(num) FROM item WHERE kind = 'sheet'"))
    world.run(hours=1)
    measured = _freshness(world)
    assert {kind: len(delays) for kind, delays in measured.items()} == {"document": 3, "sheet": 1}
    assert max(measured["document"]) == pytest.approx(sum(took), abs=2.0)
    assert sum(took) < 7 * MINUTE
    world.clock.advance(DAY)
    assert _freshness(world) == {}


def _freshness(world: World) -> dict[str, list[float]]:
    facts = world.catalog().status_facts(world.clock.now(), zone=world.settings.zone)
    return {kind: list(delays) for kind, delays in facts.delays.items()}


def expected(world: World, day: str) -> list[int]:
    return [pat_num for _, pat_num in world.catalog().day(day)[1]]


def test_appointments_of_a_day_are_kept_as_they_were_last_told(tmp_path: Path) -> None:
    world = World.start(tmp_path, 6, past=FEW, interval=60.0, hinted=True)
    noon = datetime.fromtimestamp(world.clock.now(), world.settings.zone).replace(hour=12)
    tomorrow, in_a_week = (noon + timedelta(days=days) for days in (1, 7))
    number = world.practice.add_appointment(3, tomorrow.timestamp())
    world.practice.add_appointment(2, tomorrow.timestamp() - HOUR)
    world.practice.add_appointment(4, in_a_week.timestamp())
    world.practice.add_appointment(5, tomorrow.timestamp(), AptStatus=APT_STATUSES.index("Broken"))
    world.run(hours=2)
    day = tomorrow.date().isoformat()
    seen_at, starts = world.catalog().day(day)
    assert starts == [(tomorrow.timestamp() - HOUR, 2), (tomorrow.timestamp(), 3)]
    assert seen_at is not None
    assert world.clock.now() - seen_at < HOUR
    assert expected(world, in_a_week.date().isoformat()) == [4]
    world.practice.delete("appointment", number)
    world.run(hours=1)
    assert expected(world, day) == [2]
    assert world.catalog().day("2001-01-01") == (None, [])


def test_days_long_past_are_forgotten(slow: World) -> None:
    slow.index.run("INSERT INTO appointment_day VALUES ('2001-01-01', 1.0)")
    slow.index.run("INSERT INTO appointment VALUES ('2001-01-01', 1.0, 3)")
    slow.run(hours=2)
    assert slow.catalog().day("2001-01-01") == (None, [])
    assert slow.index.value("SELECT count(*) FROM appointment") == 0
