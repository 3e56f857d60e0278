"""When syncd must not believe what it sees: mass disappearances, and another database behind the key."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from syncd import wishes
from syncd.demo.build import Past, build_practice
from syncd.demo.faults import Fault
from syncd.errors import EXIT_HELD
from syncd.schema import Row
from tests.small import serving, small, troubles, verdict
from tests.world import World

pytestmark = pytest.mark.slow  # minutes in all: `make quick` leaves it out, `make test` does not


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World.start(tmp_path, interval=30.0, nap=900.0)
    yield world
    world.stop()


def full_patient(world: World, sheets: int = 24) -> int:
    """A patient with so many sheets, all archived."""
    pat = world.practice.add_patient()
    for _ in range(sheets):
        world.practice.add_sheet(pat)
    world.run(hours=1)
    return pat


def emptied(world: World, pat: int) -> Fault:
    """From now on the patient's sheets are listed as none."""
    return world.office.faults.add("empty", path="/sheets", params={"PatNum": pat}, times=None)


def guards_held(world: World) -> list[Row]:
    return world.index.rows("SELECT * FROM guard WHERE state = 'held'")


def vanished(world: World) -> int:
    return int(world.index.value("SELECT count(*) FROM item WHERE vanished_at IS NOT NULL"))


def decide(world: World, verb: str) -> None:
    wishes.make(world.index, verb, f"guard-{guards_held(world)[0]['id']}", world.clock.now())
    world.run(seconds=60)


def pass_days(world: World, days: int) -> None:
    """So many days, of which the mirror works one hour each."""
    for _ in range(days):
        world.clock.advance(82_800)
        world.run(hours=1)


def reasons(world: World) -> set[str]:
    return {row["reason"] for row in world.index.rows("SELECT reason FROM site")}


# --- one patient


def test_list_that_is_suddenly_empty_is_held_and_nothing_vanishes(world: World) -> None:
    pat = full_patient(world, 80)
    emptied(world, pat)
    world.run(hours=1)
    assert [(row["scope"], row["items"], row["of_items"]) for row in guards_held(world)] == [(f"patient-{pat}", 80, 80)]
    assert world.state(pat, "sheet", 1) == "held"
    assert world.catalog().status_facts(world.clock.now()).held == 80
    pass_days(world, 4)
    assert vanished(world) == 0
    world.check_safe()


def test_hold_ends_by_itself_after_seven_listings_on_seven_days(world: World) -> None:
    pat = full_patient(world)
    emptied(world, pat)
    world.run(hours=1)
    pass_days(world, 5)
    assert guards_held(world)[0]["agreeing"] == 6
    assert vanished(world) == 0
    pass_days(world, 2)
    assert guards_held(world) == []
    assert vanished(world) == 24
    assert len(world.media(pat, "sheet", 1)) == 1
    assert world.state(pat, "sheet", 1) == "vanished"


def test_many_listings_on_one_day_count_once(world: World) -> None:
    pat = full_patient(world)
    emptied(world, pat)
    world.run(hours=30)
    assert len(world.sent("/sheets")) > 20
    assert guards_held(world)[0]["agreeing"] <= 2


def test_approved_disappearances_vanish_by_the_ordinary_rule(world: World) -> None:
    pat = full_patient(world)
    emptied(world, pat)
    world.run(hours=1)
    decide(world, "approve")
    assert vanished(world) == 0
    world.run(hours=26)
    assert vanished(world) == 24
    assert len(world.media(pat, "sheet", 1)) == 1


def test_rejected_disappearances_stay_as_long_as_the_list_lacks_them(world: World) -> None:
    pat = full_patient(world)
    emptied(world, pat)
    world.run(hours=1)
    decide(world, "reject")
    pass_days(world, 10)
    assert vanished(world) == 0
    assert world.state(pat, "sheet", 1) == "archived"
    facts = world.catalog().status_facts(world.clock.now())
    assert (facts.held, facts.holds) == (0, ())


def test_rejected_disappearances_that_return_are_ordinary_again(world: World) -> None:
    pat = full_patient(world)
    fault = emptied(world, pat)
    world.run(hours=1)
    decide(world, "reject")
    world.office.faults.clear(fault)
    world.run(hours=2)
    world.practice.delete_sheet(1)
    world.run(hours=28)
    assert world.state(pat, "sheet", 1) == "vanished"
    world.check()


def test_hold_ends_when_what_it_held_is_listed_again(world: World) -> None:
    pat = full_patient(world)
    fault = emptied(world, pat)
    world.run(hours=1)
    world.office.faults.clear(fault)
    world.run(hours=2)
    assert guards_held(world) == []
    assert world.state(pat, "sheet", 1) == "archived"
    world.check()


@pytest.mark.parametrize(("before", "after"), [(19, 0), (42, 22), (60, 40)])
def test_fewer_than_twenty_or_less_than_half_are_not_held(world: World, before: int, after: int) -> None:
    pat = full_patient(world, before)
    for num in range(1, before - after + 1):
        world.practice.delete_sheet(num)
    world.run(hours=27)
    assert guards_held(world) == []
    assert vanished(world) == before - after
    assert world.item(pat, "sheet", 1)["held_by"] is None


def test_new_and_changed_rows_are_archived_while_disappearances_are_held(world: World) -> None:
    pat = full_patient(world, 40)
    for num in range(1, 31):
        world.practice.delete_sheet(num)
    world.practice.edit_sheet(40)
    doc, sheet = world.practice.add_document(pat), world.practice.add_sheet(pat)
    world.run(hours=1)
    assert guards_held(world)
    assert world.state(pat, "sheet", sheet) == world.state(pat, "document", doc) == "archived"
    assert len(world.media(pat, "sheet", 40)) == 2


def test_merge_of_a_full_patient_holds_nothing_for_long(world: World) -> None:
    into = world.practice.add_patient()
    pat = full_patient(world, 30)
    world.practice.merge_patients(pat, into)
    world.run(hours=3)
    assert guards_held(world) == []
    assert world.state(pat, "sheet", 1) == "vanished"
    assert world.item(pat, "sheet", 1)["became"] == f"{into}/sheet-1"
    assert world.catalog().status_facts(world.clock.now()).held == 0
    world.check()


def test_merge_that_is_first_seen_at_its_source_holds_nothing_for_long(world: World) -> None:
    pat = full_patient(world, 30)
    into = world.practice.add_patient()
    world.practice.add_sheet(into)
    world.run(hours=1)
    world.practice.merge_patients(pat, into)
    world.run(hours=3)
    assert guards_held(world) == []
    assert world.state(pat, "sheet", 1) == "vanished"
    world.check()


# --- the whole practice


def many_patients(world: World, patients: int, sheets: int) -> None:
    for _ in range(patients):
        pat = world.practice.add_patient()
        for _ in range(sheets):
            world.practice.add_sheet(pat)
    world.run(hours=2)


def delete_sheets(world: World, numbers: range) -> None:
    for num in numbers:
        world.practice.delete_sheet(num)


def test_fifty_disappearances_in_a_day_are_held_whosoever_they_are(world: World) -> None:
    many_patients(world, 7, 18)
    delete_sheets(world, range(1, 81))
    world.run(hours=2)
    assert [row["scope"] for row in guards_held(world)] == ["all"]
    assert world.index.value("SELECT count(*) FROM item WHERE held_by IS NOT NULL") == 80
    pass_days(world, 3)
    assert vanished(world) == 0


def test_forty_nine_disappearances_in_a_day_are_believed(world: World) -> None:
    many_patients(world, 7, 18)
    delete_sheets(world, range(1, 50))
    world.run(hours=1)
    pass_days(world, 2)
    assert guards_held(world) == []
    assert vanished(world) == 49


def test_approved_disappearances_are_not_held_again_with_the_next_one(world: World) -> None:
    many_patients(world, 7, 18)
    delete_sheets(world, range(1, 61))
    world.run(hours=2)
    decide(world, "approve")
    delete_sheets(world, range(61, 63))
    world.run(hours=1)
    pass_days(world, 2)
    assert guards_held(world) == []
    assert vanished(world) == 62


@pytest.mark.parametrize("last", [1, 80], ids=["of another patient", "of the same patient"])
def test_what_was_approved_of_one_patient_is_not_held_again_with_the_next_that_goes(world: World, last: int) -> None:
    many_patients(world, 1, 18)
    pat = full_patient(world, 80)
    delete_sheets(world, range(19, 80))
    world.run(hours=1)
    assert [(row["scope"], row["items"]) for row in guards_held(world)] == [(f"patient-{pat}", 61)]
    decide(world, "approve")
    world.practice.delete_sheet(last)
    world.run(hours=2)
    assert guards_held(world) == []
    pass_days(world, 2)
    assert (guards_held(world), vanished(world)) == ([], 62)


def test_approval_for_one_patient_lets_nobody_else_s_go(world: World) -> None:
    many_patients(world, 7, 18)
    pat = full_patient(world, 80)
    delete_sheets(world, range(127, 190))
    world.run(hours=1)
    assert [row["scope"] for row in guards_held(world)] == [f"patient-{pat}"]
    delete_sheets(world, range(1, 40))
    decide(world, "approve")
    world.run(hours=2)
    delete_sheets(world, range(40, 61))
    world.run(hours=2)
    assert [(row["scope"], row["items"]) for row in guards_held(world)] == [("all", 60)]


# --- the roster


def small_practice(world: World, patients: int = 40) -> list[int]:
    """So many patients without anything, all read, and then a document for the last of them."""
    numbers = [world.practice.add_patient() for _ in range(patients)]
    world.run(hours=1)
    return numbers


def truncated(world: World, rows: int = 4) -> Fault:
    """From now on the roster ends after so many patients, and looks complete."""
    return world.office.faults.add("truncated", path="/patients/Simple", size=rows, times=None)


def gone(world: World) -> list[int]:
    return [row["pat_num"] for row in world.index.rows("SELECT pat_num FROM patient WHERE left_at IS NOT NULL")]


def archives_what_is_new(world: World, pat: int) -> bool:
    doc = world.practice.add_document(pat, "txt")
    world.run(hours=26)
    return bool(world.has(pat, "document", doc)) and world.state(pat, "document", doc) == "archived"


@pytest.fixture
def roster(tmp_path: Path) -> Iterator[World]:
    world = World.start(tmp_path, interval=10.0, nap=900.0)
    yield world
    world.stop()


def test_who_joins_a_hold_late_is_held_for_as_many_days(roster: World) -> None:
    small_practice(roster, 80)
    first = truncated(roster, 30)
    pass_days(roster, 5)
    roster.office.faults.clear(first)
    truncated(roster, 5)
    pass_days(roster, 5)
    assert (len(guards_held(roster)), gone(roster)) == (1, [])
    pass_days(roster, 4)
    assert len(gone(roster)) == 75


def test_roster_that_suddenly_lacks_nearly_everybody_is_held_and_all_are_mirrored_on(roster: World) -> None:
    patients = small_practice(roster)
    truncated(roster)
    roster.run(hours=1)
    assert [(row["scope"], row["items"], row["of_items"]) for row in guards_held(roster)] == [("roster", 36, 40)]
    assert gone(roster) == []
    assert archives_what_is_new(roster, patients[-1])
    facts = roster.catalog().status_facts(roster.clock.now())
    assert [hold.scope for hold in facts.holds] == ["roster"]
    assert len(roster.log.events("guard_held")) == 1
    roster.restart()
    assert archives_what_is_new(roster, patients[-2])
    roster.check()


def test_new_patients_and_new_names_of_a_held_roster_are_taken(roster: World) -> None:
    patients = small_practice(roster)
    roster.practice.update("patient", patients[0], {"LName": "Neumann"})
    for pat in patients[5:]:
        roster.practice.set_patient_status(pat, "Deleted")
    new = roster.practice.add_patient()
    assert archives_what_is_new(roster, new)
    assert [row["items"] for row in guards_held(roster)] == [35]
    assert roster.index.value("SELECT last_name FROM patient WHERE pat_num = ?", patients[0]) == "Neumann"


def test_hold_of_a_roster_ends_when_it_has_them_again(roster: World) -> None:
    patients = small_practice(roster)
    fault = truncated(roster)
    roster.run(hours=1)
    roster.office.faults.clear(fault)
    roster.run(hours=1)
    assert guards_held(roster) == []
    assert [row["state"] for row in roster.index.rows("SELECT state FROM guard")] == ["over"]
    assert gone(roster) == []
    truncated(roster)
    roster.run(hours=1)
    assert [row["items"] for row in guards_held(roster)] == [36], "a second time is as good as the first"
    assert archives_what_is_new(roster, patients[-1])


def test_approved_patients_leave_and_are_not_held_again_with_the_next_ones(roster: World) -> None:
    patients = small_practice(roster)
    truncated(roster)
    roster.run(hours=1)
    decide(roster, "approve")
    roster.run(hours=1)
    assert gone(roster) == patients[4:]
    since = len(roster.office.arrivals)
    roster.run(hours=30)
    assert guards_held(roster) == []
    polled = {int(str(arrival.params["PatNum"])) for arrival in roster.sent("/documents", since=since)}
    assert polled == set(patients[:4])


def test_approval_lets_nobody_leave_who_is_back_or_was_not_meant(roster: World) -> None:
    patients = small_practice(roster, 80)
    fault = truncated(roster, 50)
    roster.run(hours=0.5)
    assert guards_held(roster) == []  # 30 of 80: neither fifty nor more than half
    assert len(gone(roster)) == 30
    roster.office.faults.clear(fault)
    roster.run(hours=0.5)
    assert gone(roster) == []
    fault = truncated(roster, 20)
    roster.run(hours=0.5)
    roster.office.faults.clear(fault)
    truncated(roster, 30)
    decide(roster, "approve")
    roster.run(hours=0.5)
    assert gone(roster) == patients[30:]
    roster.office.faults.clear()
    roster.run(hours=0.5)
    truncated(roster, 20)
    roster.run(hours=0.5)
    assert (gone(roster), len(guards_held(roster))) == ([], 1), "an approval is for once"


def test_rejected_patients_stay_as_long_as_the_roster_lacks_them(roster: World) -> None:
    patients = small_practice(roster)
    fault = truncated(roster)
    roster.run(hours=1)
    decide(roster, "reject")
    pass_days(roster, 10)
    assert (gone(roster), guards_held(roster)) == ([], [])
    assert archives_what_is_new(roster, patients[-1])
    roster.office.faults.clear(fault)
    roster.run(hours=1)
    roster.practice.set_patient_status(patients[-1], "Deleted")
    roster.run(hours=1)
    assert gone(roster) == patients[-1:], "who was back is ordinary again"


def test_hold_of_a_roster_ends_by_itself_after_seven_rosters_on_seven_days(roster: World) -> None:
    patients = small_practice(roster)
    truncated(roster)
    roster.run(hours=1)
    pass_days(roster, 5)
    assert (guards_held(roster)[0]["agreeing"], gone(roster)) == (6, [])
    pass_days(roster, 2)
    assert (guards_held(roster), gone(roster)) == ([], patients[4:])


def test_one_who_leaves_while_a_roster_is_held_is_held_with_the_rest(roster: World) -> None:
    patients = small_practice(roster)
    truncated(roster, 5)
    roster.run(hours=1)
    roster.office.faults.clear()
    truncated(roster, 4)
    roster.run(hours=1)
    assert ([row["items"] for row in guards_held(roster)], gone(roster)) == ([36], [])
    decide(roster, "approve")
    roster.run(hours=1)
    assert gone(roster) == patients[4:]


def test_backfill_with_a_held_roster_ends_as_held(tmp_path: Path) -> None:
    world = World.start(tmp_path, interval=1.0, backfill=True)
    small_practice(world)
    truncated(world)
    world.restart()
    world.run()
    assert verdict(world) == EXIT_HELD
    world.stop()


def test_patients_who_are_not_wanted_any_more_leave_without_a_question(tmp_path: Path) -> None:
    world = World.start(tmp_path, interval=10.0)
    small_practice(world)
    world.stop()
    again = World.start(tmp_path, practice=world.practice, interval=10.0, sync={"patients": [1, 2]})
    again.run(hours=1)
    assert guards_held(again) == []
    assert len(gone(again)) == 38
    again.stop()


# --- whose database is it


OTHER = Past(documents=8, mounts=0, sheets=2, deleted=0.0, raw=0, urls=0)


@pytest.fixture
def swapped(tmp_path: Path) -> Iterator[World]:
    """The key leads to another practice's database from the next start on."""
    world = World.start(tmp_path, 3, past=OTHER, interval=30.0, nap=900.0)
    world.run(hours=3)
    world.check()
    world.swap_practice(build_practice(3, 77, world.clock, past=OTHER, name="other"))
    world.restart()
    yield world
    world.stop()


def contents(world: World) -> list[Row]:
    return world.index.rows("SELECT * FROM item") + world.index.rows("SELECT * FROM version")


def test_other_database_stops_everything(swapped: World) -> None:
    before, sent = contents(swapped), len(swapped.office.arrivals)
    swapped.run(hours=48)
    assert contents(swapped) == before
    assert reasons(swapped) == {"other_database"}
    assert {arrival.path.rstrip("0123456789") for arrival in swapped.office.arrivals[sent:]} == {"/documents/"}
    assert [row["scope"] for row in guards_held(swapped)] == ["database"]
    swapped.check_safe()


@pytest.mark.parametrize("restarted", [False, True])
def test_archive_s_trouble_begins_and_ends_while_another_database_is_there(swapped: World, restarted: bool) -> None:
    swapped.run(hours=1)
    before, away = contents(swapped), swapped.archive.with_name("away")
    swapped.archive.rename(away)
    if restarted:
        (away / "incoming" / ("0" * 32)).write_bytes(b"of a pull that ended with its process")
        swapped.restart()
    swapped.run(hours=0.25)
    assert reasons(swapped) == {"other_database", "archive_missing"}
    away.rename(swapped.archive)
    swapped.run(hours=1)
    assert reasons(swapped) == {"other_database"}
    assert contents(swapped) == before
    assert not list((swapped.archive / "incoming").iterdir())  # a start on the archive that came back was whole


@pytest.mark.parametrize(("kind", "details"), [("status", {"status": 500}), ("status", {"status": 409}), ("html", {})])
def test_one_row_that_no_office_can_show_does_not_stop_the_mirror(
    tmp_path: Path, kind: Any, details: dict[str, Any]
) -> None:
    one = small(documents=3)
    world = serving(tmp_path, one)
    world.run()
    world.office.faults.add(kind, path=f"/documents/{one.document}", times=None, **details)
    with one.practice.as_of(world.clock.now() - 1200.0):
        new = one.practice.add_document(one.other)
    world.restart()
    world.run(hours=20)
    assert len(world.media(one.other, "document", new)) == 1
    assert world.log.events("identity_checked")[-1]["count"] == 4
    assert troubles(world) == {}


@pytest.mark.parametrize(("kind", "details"), [("status", {"status": 409}), ("html", {})])
def test_office_that_shows_no_row_is_named_and_asked_on_slowly_and_nothing_is_done_before(
    tmp_path: Path, kind: Any, details: dict[str, Any]
) -> None:
    one = small()
    world = serving(tmp_path, one)
    world.run()
    for number in (one.document, one.letter):
        world.office.faults.add(kind, path=f"/documents/{number}", times=None, **details)
    world.restart()
    before = len(world.office.arrivals)
    world.run(hours=2)
    asked = world.office.arrivals[before:]
    assert 2 <= len(asked) <= 24
    assert troubles(world) == {"listings": "bad_answers"}
    assert {arrival.path for arrival in asked} <= {f"/documents/{number}" for number in (one.document, one.letter)}
    world.office.faults.clear()
    world.run(hours=1)
    assert world.log.events("identity_checked")[-1]["count"] > 0
    assert troubles(world) == {}
    world.check()


def test_few_answers_of_many_prove_no_identity(tmp_path: Path) -> None:
    one = small(documents=4)
    world = serving(tmp_path, one)
    world.run()
    known = [row["num"] for row in world.index.rows("SELECT num FROM item WHERE kind = 'document'")]
    for number in known[2:]:
        world.office.faults.add("html", path=f"/documents/{number}", times=None)
    world.restart()
    before = len(world.office.arrivals)
    world.run(hours=1)
    asked = {arrival.path for arrival in world.office.arrivals[before:]}
    assert {f"/documents/{number}" for number in known} >= asked > {f"/documents/{known[0]}"}
    world.office.faults.clear()
    world.run(hours=1)
    world.check()


def test_other_database_ends_when_the_right_one_is_back(tmp_path: Path) -> None:
    world = World.start(tmp_path, 3, past=OTHER, interval=10.0)
    world.run(hours=3)
    right = world.practice
    world.swap_practice(build_practice(3, 77, world.clock, past=OTHER, name="other"))
    world.restart()
    world.run(hours=2)
    world.swap_practice(right)
    doc = right.add_document(1)
    world.run(hours=2)
    assert reasons(world) == set()
    assert guards_held(world) == []
    assert world.state(1, "document", doc) == "archived"
    world.check()


def test_other_database_is_worked_with_once_approved(swapped: World) -> None:
    swapped.run(hours=2)
    decide(swapped, "approve")
    swapped.run(hours=4)
    assert reasons(swapped) == set()
    swapped.check()


def test_other_database_is_found_at_the_daily_comparison(tmp_path: Path) -> None:
    world = World.start(tmp_path, 3, past=OTHER, interval=10.0)
    world.run(hours=3)
    for _ in range(3):
        world.clock.advance(3600)
    world.swap_practice(build_practice(3, 77, world.clock, past=OTHER, name="other"))
    world.clock.advance(21 * 3600)
    world.lanes.api_lane.identity.compare_soon()
    world.run(hours=1)
    assert reasons(world) == {"other_database"}


@pytest.fixture
def restored(tmp_path: Path) -> Iterator[World]:
    """The practice was restored from a backup that lacks a third of its documents."""
    world = World.start(tmp_path, interval=30.0, nap=900.0)
    pat = world.practice.add_patient()
    for _ in range(20):
        world.practice.add_document(pat, "txt")
    backup = world.practice.snapshot()
    for _ in range(10):
        world.practice.add_document(pat, "txt")
    world.run(hours=2)
    world.practice.restore_from_backup(backup)
    yield world
    world.stop()


@pytest.mark.parametrize("restart", [True, False], ids=["found at start", "found at the daily comparison"])
def test_nothing_vanishes_from_a_database_that_went_back(restored: World, restart: bool) -> None:
    if restart:
        restored.restart()
    restored.run(hours=25)
    assert reasons(restored) == {"database_went_back"}
    pass_days(restored, 5)
    assert vanished(restored) == 0
    assert reasons(restored) == {"database_went_back"}


def test_no_image_and_nothing_that_was_not_found_vanishes_from_a_database_that_went_back(world: World) -> None:
    pat = world.practice.add_patient()
    mount = world.practice.add_mount(pat, 2)
    for _ in range(20):
        world.practice.add_document(pat, "txt")
    backup = world.practice.snapshot()
    for _ in range(10):
        world.practice.add_document(pat, "txt")
    image = world.practice.add_document(pat)
    world.practice.move_into_mount(image, mount)
    world.run(hours=2)
    lost = world.practice.add_document(pat, "txt")
    world.office.faults.add(
        "status", path="/documents/DownloadSftp", params={"DocNum": lost}, status=404, text="Document not found"
    )
    world.run(until=lambda: world.has(pat, "document", lost) and world.item(pat, "document", lost)["not_found"])
    world.practice.restore_from_backup(backup)
    world.restart()
    world.run(hours=27)
    pass_days(world, 5)
    assert reasons(world) == {"database_went_back"}
    assert world.sent(f"/documents/{lost}"), "it was asked for by its number"
    assert world.item(pat, "mount-image", image)["missing_since_at"] is not None
    assert vanished(world) == 0
    decide(world, "approve")
    world.run(hours=75)
    assert vanished(world) == 12
    world.check()


def test_database_that_went_back_is_mirrored_on(restored: World) -> None:
    restored.restart()
    restored.run(hours=1)
    restored.clock.advance(3600)
    doc = restored.practice.add_document(1, "txt", DateCreated="2026-03-11 10:00:00")
    restored.run(hours=3)
    assert restored.media(1, "document", doc)[-1] == restored.practice.truth()[1].documents[doc]


def test_backfill_of_a_database_that_went_back_goes_on_and_ends_as_held(restored: World) -> None:
    restored.restart()
    restored.run(hours=1)
    restored.clock.advance(3600)
    restored.practice.add_document(1, "txt", DateCreated="2026-03-11 10:00:00")
    restored.scope.since = restored.clock.now()
    assert verdict(restored) is None, "a list was not polled yet"
    restored.run(hours=3)
    assert verdict(restored) == EXIT_HELD
    assert restored.index.value("SELECT count(*) FROM duty WHERE why = 'listed'") == 0


def test_database_that_went_back_is_believed_once_approved(restored: World) -> None:
    restored.restart()
    restored.run(hours=1)
    decide(restored, "approve")
    restored.run(hours=50)
    assert reasons(restored) == set()
    assert vanished(restored) == 10
    restored.check()


def test_database_that_was_approved_is_not_asked_about_again_while_its_gaps_are_marked(restored: World) -> None:
    restored.restart()
    restored.run(hours=1)
    decide(restored, "approve")
    restored.run(hours=1)  # the comparison that was approved
    restored.restart()  # which compares again, and finds the same gaps
    restored.run(hours=1)
    assert (reasons(restored), guards_held(restored), vanished(restored)) == (set(), [], 0)


def test_approval_of_a_database_that_went_back_lets_no_other_database_through(restored: World) -> None:
    restored.restart()
    restored.run(hours=1)
    decide(restored, "approve")
    before = contents(restored)
    restored.swap_practice(build_practice(3, 77, restored.clock, past=OTHER, name="other"))
    restored.run(hours=2)
    assert reasons(restored) == {"other_database"}
    assert [row["reason"] for row in guards_held(restored)] == ["other_database"]
    assert contents(restored) == before


def test_approval_of_another_database_does_not_let_disappearances_through(restored: World) -> None:
    right = restored.practice
    restored.swap_practice(build_practice(3, 77, restored.clock, past=OTHER, name="other"))
    restored.restart()
    restored.run(hours=2)
    decide(restored, "approve")
    restored.swap_practice(right)  # the right one, but put back from a backup
    restored.run(hours=2)
    assert reasons(restored) == {"database_went_back"}
    assert [row["reason"] for row in guards_held(restored)] == ["database_went_back"]


def test_two_missing_documents_of_twenty_are_ordinary(world: World) -> None:
    pat = world.practice.add_patient()
    for _ in range(20):
        world.practice.add_document(pat, "txt")
    world.run(hours=1)
    world.practice.delete_document(1)
    world.practice.delete_document(2)
    world.restart()
    world.run(hours=27)
    assert reasons(world) == set()
    assert vanished(world) == 2


# --- numbers that come again


def test_number_reused_after_a_restore_becomes_a_version_of_its_own(world: World) -> None:
    pat = world.practice.add_patient()
    world.practice.add_document(pat)
    backup = world.practice.snapshot()
    world.clock.advance(3600)
    lost = world.practice.add_document(pat)
    world.run(hours=2)
    world.practice.restore_from_backup(backup)
    world.clock.advance(3600)
    again = world.practice.add_document(pat, "png")
    assert again == lost
    world.run(hours=3)
    world.check()
    assert len(world.media(pat, "document", again)) == 2


def test_number_reused_for_another_patient_is_reported_and_never_mixed_up(world: World) -> None:
    here, there = world.practice.add_patient(), world.practice.add_patient()
    world.practice.add_document(here)
    backup = world.practice.snapshot()
    world.clock.advance(3600)
    lost = world.practice.add_document(here)
    world.run(hours=2)
    world.practice.restore_from_backup(backup)
    world.clock.advance(3600)
    again = world.practice.add_document(there)
    assert again == lost
    world.run(hours=30)
    world.check()
    assert [line["item"] for line in world.log.events("number_reused")] == [f"{there}/document-{again}"]
    assert world.item(here, "document", lost)["became"] is None
    assert world.state(here, "document", lost) == "vanished"
    assert world.media(here, "document", lost) != world.media(there, "document", again)


def test_number_of_a_missing_mount_is_not_asked_for_it_may_be_another_patients(world: World) -> None:
    here, there = world.practice.add_patient(), world.practice.add_patient()
    backup = world.practice.snapshot()
    mount = world.practice.add_mount(here, 2)
    world.run(hours=2)
    world.practice.restore_from_backup(backup)
    world.clock.advance(7200)
    assert world.practice.add_mount(there, 2) == mount
    world.run(hours=1)
    wishes.make(world.index, "retry", [[here, "mount", mount]], world.clock.now())  # a request would name no patient
    world.run(hours=6)
    world.check_safe()
    assert len(world.media(here, "mount", mount)) == 1
    assert world.media(there, "mount", mount) == [world.practice.truth()[there].mounts[mount]]


def test_placement_that_had_to_wait_for_more_than_an_hour_is_made_from_a_new_listing(world: World) -> None:
    pat = world.practice.add_patient()
    world.run(hours=1)
    doc = world.practice.add_document(pat)
    world.office.faults.add("too_many", path="/documents/DownloadSftp", seconds=3600.0, times=3)
    world.run(hours=6)
    world.check()
    placed = [arrival.at for arrival in world.sent("/documents/DownloadSftp", DocNum=doc) if arrival.status == 201]
    listed = [arrival.at for arrival in world.sent("/documents", PatNum=pat)]
    assert placed[0] - max(at for at in listed if at < placed[0]) <= 3600


def test_hold_on_the_database_names_what_is_true_of_it_now(restored: World) -> None:
    right = restored.practice
    restored.swap_practice(build_practice(3, 77, restored.clock, past=OTHER, name="other"))
    restored.restart()
    restored.run(hours=2)
    assert [row["reason"] for row in guards_held(restored)] == ["other_database"]
    restored.swap_practice(right)  # the right one, but put back from a backup
    restored.run(hours=2)
    assert reasons(restored) == {"database_went_back"}
    assert [row["reason"] for row in guards_held(restored)] == ["database_went_back"]


# --- what goes back to where it was


def test_sheet_that_went_back_with_its_database_is_current_as_it_is_now(world: World) -> None:
    pat = world.practice.add_patient()
    sheet = world.practice.add_sheet(pat)
    world.run(hours=2)
    backup = world.practice.snapshot()
    world.practice.edit_sheet(sheet)
    world.run(hours=2)
    world.practice.restore_from_backup(backup)
    world.run(hours=2)
    world.check()
    assert len(world.media(pat, "sheet", sheet)) == 3  # a sheet is rendered anew


def test_mount_that_gets_its_old_name_back_is_fetched_as_it_is_now(world: World) -> None:
    pat = world.practice.add_patient()
    mount = world.practice.add_mount(pat, 2, "first")
    world.run(hours=2)
    world.practice.change_mount(mount, Description="second")
    world.run(hours=2)
    for image in world.practice.mount_images(mount):
        world.practice.replace_bytes(image["DocNum"])  # the mount's row does not tell
    world.practice.change_mount(mount, Description="first")
    world.run(hours=2)
    world.check()


def test_document_that_moves_there_and_back_keeps_its_versions_under_both(world: World) -> None:
    here, there = world.practice.add_patient(), world.practice.add_patient()
    doc = world.practice.add_document(here)
    world.run(hours=2)
    for to in (there, here, there):
        world.clock.advance(3600)
        world.practice.move_document(doc, to, keep_number=True)
        world.run(hours=2)
        world.check()
    assert (world.state(here, "document", doc), world.state(there, "document", doc)) == ("vanished", "archived")
    assert {len(world.media(pat, "document", doc)) for pat in (here, there)} == {1}


def test_image_that_was_in_a_mount_between_two_listings_is_not_kept_there(world: World) -> None:
    pat = world.practice.add_patient()
    mount, doc = world.practice.add_mount(pat, 2), world.practice.add_document(pat)
    world.run(hours=2)
    world.practice.move_into_mount(doc, mount)
    wishes.make(world.index, "retry", [[pat, "mount", mount]], world.clock.now())  # fetched before the list is read
    world.run(until=lambda: world.has(pat, "mount-image", doc))
    world.practice.out_of_mount(doc)
    world.run(hours=3)
    world.check()
    assert world.item(pat, "mount-image", doc)["missing_since_at"] is not None
