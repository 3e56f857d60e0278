"""One thing that stays bad keeps nothing else waiting, no backfill from ending, and no state outlives its trouble."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from syncd import upload, wishes
from syncd.errors import TransientError
from tests.small import DAY, HOUR, backfilling, serving, small, troubles, verdict
from tests.test_put_back import Gone
from tests.test_story_sites import states
from tests.world import World, make_settings

pytestmark = pytest.mark.slow  # minutes in all: `make quick` leaves it out, `make test` does not

YEAR = 365 * DAY
PLACE = "/documents/DownloadSftp"
DENIED: dict[str, Any] = {"kind": "status", "status": 401, "text": "You do not have permission"}
ALONE: list[dict[str, Any]] = [
    DENIED,
    {"kind": "status", "status": 403, "text": "denied"},
    {"kind": "status", "status": 400, "text": "The eConnector could not read the image"},
    {"kind": "too_many", "seconds": 60.0},
]


def three(folder: Path, **more: Any) -> tuple[World, list[int]]:
    world = World.start(folder, interval=60.0, **more)
    patients = [world.practice.add_patient() for _ in range(3)]
    world.run(hours=4)
    return world, patients


@pytest.mark.parametrize("details", ALONE)
def test_document_that_is_answered_as_a_whole_site_would_keeps_no_others_waiting(
    tmp_path: Path, details: dict[str, Any]
) -> None:
    world, patients = three(tmp_path)
    bad, *good = [world.practice.add_document(patient, "png") for patient in patients for _ in range(3)]
    world.office.faults.add(path=PLACE, params={"DocNum": bad}, times=None, **details)
    world.run(hours=24)
    assert states(world, good) == {"archived"}
    world.run(hours=48)
    assert states(world, [bad]) == {"failing"}


@pytest.mark.parametrize("path", ["/documents", "/sheets", "/patients/Simple"])
def test_list_that_is_refused_with_401_keeps_no_other_lists_waiting(tmp_path: Path, path: str) -> None:
    world, patients = three(tmp_path)
    params = {"PatNum": patients[0]} if path == "/documents" else {}
    world.office.faults.add("status", path=path, method="GET", params=params, times=None, status=401, text="no")
    world.run(hours=6)
    number = world.practice.add_document(patients[1], "png")
    world.run(hours=24)
    assert world.has(patients[1], "document", number)
    assert states(world, [number]) == {"archived"}


@pytest.mark.parametrize("status", [401, 500])
def test_probe_that_is_refused_keeps_the_mirror_down_no_longer_than_the_outage(tmp_path: Path, status: int) -> None:
    world, patients = three(tmp_path)
    world.office.faults.add("status", path="/preferences", times=None, status=status, text="no permission")
    outage = world.office.faults.add("econnector_down", times=None)
    world.run(seconds=600)
    world.office.faults.clear(outage)
    number = world.practice.add_document(patients[1], "png")
    world.run(hours=6)
    assert world.has(patients[1], "document", number), troubles(world)


def test_query_that_alone_is_throttled_is_left_alone_and_all_else_goes_on(tmp_path: Path) -> None:
    world, patients = three(tmp_path, hinted=True)
    world.office.faults.add("too_many", path="/queries/ShortQuery", times=None, seconds=60.0)
    world.run(hours=1)
    number = world.practice.add_document(patients[1], "png")
    world.run(hours=24)
    assert world.has(patients[1], "document", number), troubles(world)


def lately_gone(tmp_path: Path) -> Gone:
    """An archived document that was deleted in Open Dental, which is known."""
    gone = Gone(tmp_path)
    gone.office.delete_document(gone.num)
    gone.world.run(hours=3)
    return gone


def test_put_back_whose_writing_breaks_the_connection_holds_up_no_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = lately_gone(tmp_path)
    world = gone.world

    def put(path: bytes, source: object) -> None:
        raise TransientError("drop_unreachable")

    monkeypatch.setattr(world.drop, "put", put)
    gone.order()
    world.run(hours=2)
    with gone.office.as_of(world.clock.now() - HOUR):
        number = gone.office.add_document(gone.one.other, "png")
    world.run(hours=24)
    assert world.state(gone.one.other, "document", number) == "archived"


def test_staged_file_that_the_site_does_not_let_go_makes_no_lane_spin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = lately_gone(tmp_path)
    gone.order()
    monkeypatch.setattr(gone.world.drop, "remove", lambda paths: [False for _ in paths])
    gone.world.run(
        until=lambda: upload.latest(gone.world.index, gone.item) and upload.ended(gone.world.index, gone.item)
    )
    lane, now = gone.world.lanes.pull_lane, gone.world.clock.now()
    assert max(lane.turn(now) for _ in range(50)) > now, "an idle turn at last, in which the scrub has its turn"


@pytest.mark.parametrize("call", ["remove", "names"])
def test_name_whose_removal_or_listing_breaks_the_connection_holds_up_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    one = small()
    world = serving(tmp_path, one)
    real, bad = getattr(world.drop, call), {b"syncd"} if call == "names" else set()

    def breaks(asked: Any) -> Any:
        paths = {asked} if call == "names" else set(asked)
        if call == "remove" and not bad:
            bad.update(list(paths)[:1])
        if bad & paths:
            raise TransientError("drop_unreachable")
        return real(asked)

    monkeypatch.setattr(world.drop, call, breaks)
    world.run(hours=30)
    with one.practice.as_of(world.clock.now() - HOUR):
        number = one.practice.add_document(one.patient, "png")
    world.run(hours=24)
    assert world.state(one.patient, "document", number) == "archived", troubles(world)


@pytest.mark.parametrize("restarted", [False, True])
def test_list_that_failed_while_the_clock_was_ahead_delays_no_document_for_years(
    tmp_path: Path, restarted: bool
) -> None:
    one = small()
    world = serving(tmp_path, one)
    world.run(hours=3)
    number = one.practice.add_document(one.patient, "png")
    world.office.faults.add("status", path=PLACE, params={"DocNum": number}, times=None, status=400, text="unread")
    world.run(hours=2, until=lambda: world.has(one.patient, "document", number))
    world.clock.set(world.clock.now() + YEAR)
    if restarted:
        world.restart()
    for path in ("/documents", "/sheets"):
        world.office.faults.add("foreign_row", path=path, times=None)
    world.run(hours=3)
    world.office.faults.clear()
    world.clock.set(world.clock.now() - YEAR)
    if restarted:
        world.restart()
    world.run(hours=72)
    assert world.state(one.patient, "document", number) == "archived"


def test_put_back_does_not_wait_for_the_year_that_the_clock_was_ahead(tmp_path: Path) -> None:
    gone = lately_gone(tmp_path)
    world = gone.world
    world.clock.set(world.clock.now() + YEAR)
    world.office.faults.add("foreign_row", path="/documents", times=None)
    gone.order()
    world.run(hours=12)
    world.office.faults.clear()
    world.clock.set(world.clock.now() - YEAR)
    world.run(hours=48)
    assert gone.row["state"] == "done"


def test_backfill_ends_though_a_document_was_deleted_during_an_outage(tmp_path: Path) -> None:
    one = small(documents=2)
    world = backfilling(tmp_path, one)
    world.run(until=lambda: world.index.value("SELECT count(*) FROM duty") >= 3)
    world.office.faults.add("econnector_down", times=None)
    world.run(hours=3)
    world.office.faults.clear()
    one.practice.delete_document(world.index.value("SELECT num FROM duty WHERE method = 'document' AND busy = 0"))
    world.restart(backfill=True, since=world.scope.since)
    world.run(hours=12, until=lambda: verdict(world) is not None)
    assert verdict(world) == 3
    assert world.index.value("SELECT count(*) FROM item WHERE thumbnail_due = 1") == 0, "the others' thumbnails came"


def test_backfill_ends_though_the_list_before_the_thumbnails_cannot_be_read(tmp_path: Path) -> None:
    one = small()
    world = backfilling(tmp_path, one)
    world.run(until=lambda: world.index.value("SELECT 1 FROM item WHERE thumbnail_due = 1"))
    world.office.faults.add("econnector_down", times=None)
    world.run(hours=3)
    world.office.faults.clear()
    world.office.faults.add("foreign_row", path="/documents", params={"PatNum": one.patient}, times=None)
    world.restart(backfill=True, since=world.scope.since)
    world.run(hours=24, until=lambda: verdict(world) is not None)
    assert verdict(world) == 3


def test_backfill_ends_where_thumbnails_are_not_wanted_any_more(tmp_path: Path) -> None:
    one = small()
    world = serving(tmp_path, one)
    world.run(until=lambda: world.index.value("SELECT 1 FROM item WHERE thumbnail_due = 1"))
    kinds = {"kinds": ["document", "mount", "mount-image", "sheet"]}
    world.settings = make_settings(tmp_path, 60.0, {"practice": {"time_zone": "America/Chicago"}, "sync": kinds})
    world.restart(backfill=True)
    world.run(hours=24, until=lambda: verdict(world) is not None)
    assert verdict(world) == 0


def test_backfill_ends_though_many_lists_cannot_be_read(tmp_path: Path) -> None:
    world = World.start(tmp_path, interval=60.0, backfill=True)
    for n in range(12):
        patient = world.practice.add_patient()
        world.practice.add_document(patient, "pdf")
        if n % 2:
            world.office.faults.add("foreign_row", path="/documents", params={"PatNum": patient}, times=None)
    world.run(hours=48, until=lambda: verdict(world) is not None)
    assert verdict(world) == 3


def test_thumbnails_come_beside_documents_of_a_rejected_guard(tmp_path: Path) -> None:
    world = World.start(tmp_path, interval=10.0)
    patient = world.practice.add_patient()
    world.practice.add_document(patient, "png")
    world.run(hours=3)
    world.drop.broken = TransientError("drop_unreachable")
    numbers = [world.practice.add_document(patient, "png") for _ in range(25)]
    world.run(hours=2)
    for number in numbers:
        world.practice.delete_document(number)
    world.run(hours=6)
    guard = world.index.value("SELECT id FROM guard WHERE state = 'held'")
    wishes.make(world.index, "reject", f"guard-{guard}", world.clock.now())
    world.drop.broken = None
    world.run(hours=2)
    new = world.practice.add_document(patient, "png")
    world.run(hours=48)
    assert len(world.media(patient, "thumbnail", new)) == 1


def test_order_to_destroy_that_cannot_end_holds_up_nothing_else(tmp_path: Path) -> None:
    one = small()
    world = serving(tmp_path, one)
    world.run()
    world.lanes.pull_lane.due("copy")
    world.run(hours=1)

    (world.settings.state_path / "copies" / "index.new").mkdir()  # no copy without what is destroyed can be made
    wishes.make(world.index, "destroy", [one.other, "document", one.letter, "T1"], world.clock.now())
    world.run(hours=1)
    with one.practice.as_of(world.clock.now() - HOUR):
        number = one.practice.add_document(one.patient, "png")
    world.run(hours=24)
    assert world.state(one.patient, "document", number) == "archived", troubles(world)
    assert troubles(world) == {"destroy": "disk_error"}


def test_refusal_of_placements_is_over_once_nothing_is_left_to_place(tmp_path: Path) -> None:
    world, (patient, *_) = three(tmp_path)
    world.office.faults.add("site_error", path=PLACE, times=None)
    numbers = [world.practice.add_document(patient, "png") for _ in range(8)]
    world.run(hours=3)
    assert troubles(world) == {"placing": "placements_refused"}
    world.office.faults.clear()
    for number in numbers:
        world.practice.delete_document(number)
    world.run(hours=72)
    world.practice.add_sheet(patient)
    world.run(hours=24)
    assert states(world, numbers) == {"vanished"}
    assert troubles(world) == {}


def test_put_back_that_is_refused_says_nothing_of_downloads(tmp_path: Path) -> None:
    gone = lately_gone(tmp_path)
    gone.world.office.faults.add(path="/documents/UploadSftp", **DENIED)
    gone.order()
    gone.world.run(hours=24)
    assert (gone.row["state"], troubles(gone.world)) == ("refused", {})


def test_trouble_with_sheets_is_over_where_they_are_not_wanted_any_more(tmp_path: Path) -> None:
    world = World.start(tmp_path, interval=60.0)
    for _ in range(6):
        world.practice.add_sheet(world.practice.add_patient())
    world.office.faults.add("html", path="/sheets", times=None)
    world.run(hours=6)
    assert troubles(world) == {"sheets": "bad_answers"}
    zone, kinds = {"time_zone": world.practice.zone.key}, {"kinds": ["document", "thumbnail"]}
    world.settings = make_settings(tmp_path, 60.0, {"practice": zone, "sync": kinds})
    world.restart()
    world.run(hours=24)
    assert troubles(world) == {}


def test_unanswered_put_back_is_lost_after_a_day_though_its_list_cannot_be_read(tmp_path: Path) -> None:
    gone = lately_gone(tmp_path)
    world = gone.world
    world.office.faults.add("gateway_timeout", path="/documents/UploadSftp", when="before", seconds=60)
    world.office.faults.add("foreign_row", path="/documents", params={"PatNum": gone.one.patient}, times=None, skip=1)
    gone.order()
    world.run(hours=24 * 4)
    assert gone.row["state"] == "lost"


def test_file_of_a_put_back_leaves_the_drop_as_soon_as_that_has_ended(tmp_path: Path) -> None:
    gone = lately_gone(tmp_path)
    world = gone.world
    world.office.faults.add("gateway_timeout", path="/documents/UploadSftp", when="after", seconds=60)
    gone.order()
    world.run(until=lambda: upload.latest(world.index, gone.item) and upload.ended(world.index, gone.item))
    assert gone.row["state"] == "done"
    world.run(seconds=120)
    world.check_drop()


def test_retry_of_a_list_that_failed_reads_it_now(tmp_path: Path) -> None:
    one = small()
    world = serving(tmp_path, one)
    world.run(hours=3)
    mine = {"PatNum": one.patient}
    world.office.faults.add(
        "status", path="/documents", method="GET", params=mine, times=None, status=404, text="Patient not found"
    )
    world.run(hours=30, until=lambda: world.index.value("SELECT max(failures) FROM list"))
    world.office.faults.clear()
    before = len(world.office.arrivals)
    wishes.make(world.index, "retry", [[one.patient, "lists", 0]], world.clock.now())
    world.run(hours=0.25)
    assert world.sent("/documents", since=before, **mine)


def test_one_lost_answer_at_the_start_costs_no_day_without_the_feed(tmp_path: Path) -> None:
    world = World.start(tmp_path, interval=60.0, hinted=True)
    world.practice.add_patient()
    world.office.faults.add("status", path="/securityperms", status=500)
    world.run(hours=6)
    assert world.sent("/queries/ShortQuery")


def test_feed_that_failed_while_the_clock_was_ahead_is_not_off_for_years(tmp_path: Path) -> None:
    world, _ = three(tmp_path, hinted=True)
    world.clock.set(world.clock.now() + YEAR)
    world.office.faults.add("status", path="/queries/ShortQuery", status=500, times=3)
    world.run(hours=2)
    world.clock.set(world.clock.now() - YEAR)
    world.run(hours=48)
    before = len(world.office.arrivals)
    world.run(hours=24)
    assert len(world.sent("/queries/ShortQuery", since=before)) > 20


def test_mount_archived_while_the_clock_was_ahead_is_fetched_again_in_its_time(tmp_path: Path) -> None:
    one = small()
    world = serving(tmp_path, one)
    world.run()
    world.clock.set(world.clock.now() + YEAR)
    with one.practice.as_of(world.clock.now() - YEAR - 10 * DAY):
        mount = one.practice.add_mount(one.patient, 2)
    world.run(hours=30)
    world.clock.set(world.clock.now() - YEAR)
    world.run(hours=2)
    assert world.item(one.patient, "mount", mount)["refetch_at"] <= world.clock.now() + 91 * DAY


def test_images_behind_one_that_breaks_the_connection_are_archived(tmp_path: Path) -> None:
    world, (patient, *_) = three(tmp_path)
    with world.practice.as_of(world.clock.now() - 40 * DAY):
        mount = world.practice.add_mount(patient, 5)
    images = [row["DocNum"] for row in world.practice.mount_images(mount)]
    spec = world.practice.spec(images[0])
    assert spec is not None
    world.drop.bad = frozenset([spec.render()])
    world.run(hours=24 * 10)
    assert [len(world.media(patient, "mount-image", number)) for number in images] == [0, 1, 1, 1, 1]


def test_documents_that_fail_for_ever_leave_requests_for_the_lists(tmp_path: Path) -> None:
    world = World.start(tmp_path, interval=600.0, nap=3600.0)
    patient, other = world.practice.add_patient(), world.practice.add_patient()
    with world.practice.as_of(world.clock.now() - 40 * DAY):
        for _ in range(160):  # more than a day has requests
            world.practice.add_document(patient, "txt")
    world.office.faults.add("status", path=PLACE, times=None, status=404, text="Document not found")
    world.run(hours=24 * 8)
    sheet = world.practice.add_sheet(other)
    world.run(hours=24 * 3)
    assert world.state(other, "sheet", sheet) == "archived"
