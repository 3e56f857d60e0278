"""Mounts, the images inside them, and sheets: what has no usable stamp, and what goes in and out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from syncd.demo.build import Past
from syncd.demo.schema import NEVER
from syncd.listing import BAD_LIST_AGAIN
from tests.world import World

pytestmark = pytest.mark.slow  # minutes in all: `make quick` leaves it out, `make test` does not

DAY = 24.0


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """A daemon on an empty practice, one request in two minutes."""
    world = World.start(tmp_path, interval=120.0, nap=600.0)
    yield world
    world.stop()


def pass_days(world: World, days: float) -> None:
    """A silent stretch, in which the mirror is down but for its last three hours."""
    world.clock.advance(days * 86_400 - 3 * 3600)
    world.run(hours=3)


# --- mounts


def test_image_that_goes_into_a_mount_vanishes_as_that_image(world: World) -> None:
    pat = world.practice.add_patient()
    doc, mount = world.practice.add_document(pat), world.practice.add_mount(pat, 2)
    world.practice.add_document(pat)
    world.run(hours=2)
    world.practice.move_into_mount(doc, mount)
    world.run(hours=3)
    assert world.item(pat, "document", doc)["became"] == f"{pat}/mount-image-{doc}"
    assert world.state(pat, "document", doc) == "vanished"
    assert world.state(pat, "mount-image", doc) == "archived"
    assert world.item(pat, "mount-image", doc)["mount_num"] == mount
    assert len(world.media(pat, "document", doc)) == 1


def test_mount_that_took_an_image_in_has_its_composite_fetched_anew(world: World) -> None:
    pat = world.practice.add_patient()
    doc, mount = world.practice.add_document(pat), world.practice.add_mount(pat, 2)
    world.run(hours=2)
    world.practice.move_into_mount(doc, mount)
    world.run(hours=3)
    world.check()
    assert len(world.media(pat, "mount", mount)) == 2


def test_image_taken_out_of_a_mount_is_a_document_again(world: World) -> None:
    pat = world.practice.add_patient()
    mount = world.practice.add_mount(pat, 3)
    world.run(hours=2)
    doc = world.practice.mount_images(mount)[0]["DocNum"]
    world.practice.out_of_mount(doc)
    world.run(hours=4 * DAY)
    assert world.state(pat, "document", doc) == "archived"
    assert world.state(pat, "mount-image", doc) == "vanished"
    world.check()


def test_image_taken_out_of_an_old_mount_vanishes_there_within_days(world: World) -> None:
    pat = world.practice.add_patient()
    with world.practice.as_of(world.clock.now() - 400 * DAY * 3600):
        mount = world.practice.add_mount(pat, 3)
    world.run(hours=2)
    doc = world.practice.mount_images(mount)[0]["DocNum"]
    world.practice.out_of_mount(doc)
    world.run(hours=2 * DAY)
    assert world.state(pat, "mount-image", doc) == "vanished"
    world.check()


def test_image_that_went_into_a_mount_and_out_again_is_current_as_a_document(world: World) -> None:
    pat = world.practice.add_patient()
    doc, mount = world.practice.add_document(pat), world.practice.add_mount(pat, 2)
    world.run(hours=2)
    world.practice.move_into_mount(doc, mount)
    world.run(hours=3)
    world.practice.out_of_mount(doc)
    world.run(hours=5 * DAY)
    row = world.item(pat, "document", doc)
    assert (row["vanished_at"], row["missing_since_at"], row["became"]) == (None, None, None)
    assert world.state(pat, "mount-image", doc) == "vanished"
    world.check()


def test_changed_fields_of_a_mount_bring_composite_and_images_anew(world: World) -> None:
    pat = world.practice.add_patient()
    mount = world.practice.add_mount(pat, 2)
    world.run(hours=2)
    before = len(world.office.arrivals)
    world.practice.change_mount(mount, Note="retaken")
    world.run(hours=3)
    world.check()
    assert len(world.sent("/documents/DownloadSftp", since=before, MountNum=mount)) == 1
    assert len(world.sent("/documents/DownloadMount", since=before, MountNum=mount)) == 1
    assert len(world.media(pat, "mount", mount)) == 2


def test_changed_image_in_a_mount_is_found_by_the_mounts_age(world: World) -> None:
    pat = world.practice.add_patient()
    mount = world.practice.add_mount(pat, 2)
    world.run(hours=2)
    doc = world.practice.mount_images(mount)[0]["DocNum"]
    world.practice.replace_bytes(doc)
    world.run(hours=26)
    world.check()
    assert len(world.media(pat, "mount-image", doc)) == 2
    assert len(world.media(pat, "mount", mount)) == 2


def test_unchanged_mount_is_fetched_again_at_1_3_7_and_30_days_then_every_90(world: World) -> None:
    pat = world.practice.add_patient()
    mount = world.practice.add_mount(pat, 2)
    created = world.clock.now()
    world.run(hours=6)
    for days in (0.4, 0.4, 0.4, 1.5, 0.4, 3.5, 0.7, 20, 2.5, 1, 78, 13):
        pass_days(world, days)
    found = [(arrival.at - created) / 86_400 for arrival in world.sent("/documents/DownloadMount")]
    assert [round(day) for day in found[:5]] == [0, 1, 3, 7, 30]
    assert len(found) == 6
    assert 110 < found[5] < 122
    assert len(world.media(pat, "mount", mount)) == 1
    world.check()


def test_deleted_mount_vanishes_with_its_images_and_keeps_their_files(world: World) -> None:
    pat = world.practice.add_patient()
    mount, doc = world.practice.add_mount(pat, 2), world.practice.add_document(pat)
    world.run(hours=2)
    images = [row["DocNum"] for row in world.practice.mount_images(mount)]
    world.practice.delete_mount(mount)
    world.run(hours=30)
    world.check()
    assert world.state(pat, "mount", mount) == "vanished"
    assert {world.state(pat, "mount-image", num) for num in images} == {"vanished"}
    assert all(len(world.media(pat, "mount-image", num)) == 1 for num in images)
    assert world.state(pat, "document", doc) == "archived"


def test_image_deleted_from_a_mount_vanishes_after_two_answers_a_day_apart(world: World) -> None:
    pat = world.practice.add_patient()
    mount = world.practice.add_mount(pat, 3)
    world.run(hours=2)
    doc = world.practice.mount_images(mount)[0]["DocNum"]
    world.practice.delete_document(doc)
    world.practice.change_mount(mount)
    world.run(hours=4)
    assert world.item(pat, "mount-image", doc)["missing_since_at"] is not None
    assert world.state(pat, "mount-image", doc) == "archived"
    world.run(hours=26)
    assert world.state(pat, "mount-image", doc) == "vanished"
    assert len(world.media(pat, "mount-image", doc)) == 1
    world.check()


def test_empty_mount_is_fulfilled(world: World) -> None:
    pat = world.practice.add_patient()
    mount = world.practice.add_mount(pat, 0)
    world.run(hours=2)
    world.check()
    assert world.state(pat, "mount", mount) == "archived"
    assert len(world.sent("/documents/DownloadMount")) == 1


def test_mount_that_denies_its_known_images_has_failed_and_they_stay(world: World) -> None:
    pat = world.practice.add_patient()
    mount = world.practice.add_mount(pat, 2)
    world.run(hours=2)
    images = [row["DocNum"] for row in world.practice.mount_images(mount)]
    fault = world.office.faults.add(
        "status", path="/documents/DownloadMount", status=200, text='"No mount images could be downloaded."', times=None
    )
    denied = world.office.faults.add("status", path=f"/documents/{images[0]}", status=404, text="Document not found")
    world.practice.change_mount(mount)
    world.run(hours=60)
    assert denied.fired, "one answer alone"
    assert world.state(pat, "mount", mount) == "failing"
    assert {world.state(pat, "mount-image", num) for num in images} == {"archived"}
    assert {world.item(pat, "mount-image", num)["missing_since_at"] for num in images} == {None}
    world.office.faults.clear(fault)
    world.run(hours=30)
    world.check()


def test_mount_whose_images_are_in_another_mount_by_now_does_not_fail_for_long(tmp_path: Path) -> None:
    world = World.start(tmp_path, interval=5.0, sync={"change_feed": "off"})
    pat = world.practice.add_patient()
    old, new = world.practice.add_mount(pat, 2), world.practice.add_mount(pat, 1)
    world.run(hours=2)
    for row in world.practice.mount_images(old):
        world.practice.out_of_mount(row["DocNum"])
        world.practice.move_into_mount(row["DocNum"], new)
    world.run(hours=30)
    world.index.run("UPDATE item SET refetch_at = ? WHERE kind = 'mount' AND num = ?", world.clock.now(), old)
    world.run(hours=60)
    assert world.state(pat, "mount", old) == "archived"
    world.check()
    world.stop()


@pytest.mark.parametrize("gone", ["deleted", "taken out", "both"])
def test_mount_whose_last_images_are_gone_is_empty_in_the_end(world: World, gone: str) -> None:
    pat = world.practice.add_patient()
    mount = world.practice.add_mount(pat, 2)
    world.run(hours=2)
    images = [row["DocNum"] for row in world.practice.mount_images(mount)]
    for num in images:
        if gone == "deleted" or (gone == "both" and num == images[0]):
            world.practice.delete_document(num)
        else:
            world.practice.out_of_mount(num)
    world.practice.change_mount(mount)
    world.run(hours=12)
    assert {world.state(pat, "mount-image", num) for num in images} == {"archived"}
    world.run(hours=108)
    assert {world.state(pat, "mount-image", num) for num in images} == {"vanished"}
    assert world.state(pat, "mount", mount) == "archived"
    assert all(len(world.media(pat, "mount-image", num)) == 1 for num in images)
    world.check()


def test_mount_is_fetched_again_where_some_list_is_always_due(tmp_path: Path) -> None:
    world = World.start(tmp_path, 40, past=Past(documents=0, mounts=0, sheets=0), interval=60.0)
    mount = world.practice.add_mount(1, 2)
    world.run(hours=20)
    (image, _) = world.practice.mount_images(mount)
    world.practice.replace_bytes(image["DocNum"])  # which the mount's own row does not show
    polled = len(world.sent("/documents", PatNum=2))
    world.run(hours=20)
    assert len(world.sent("/documents/DownloadMount", MountNum=mount)) > 1
    assert len(world.sent("/documents", PatNum=2)) - polled >= 9, "and every list is polled nearly as often"
    world.check()
    world.stop()


def test_refetch_whose_list_cannot_be_read_takes_few_requests(tmp_path: Path) -> None:
    world = World.start(tmp_path, 40, past=Past(documents=0, mounts=0, sheets=0), interval=60.0)
    world.practice.add_mount(1, 2)
    world.run(hours=20)
    world.office.faults.add("html", path="/documents", params={"PatNum": 1}, times=None)
    before = len(world.office.arrivals)
    world.run(hours=20)
    tries = 3 * 20 * 3600 / BAD_LIST_AGAIN  # as any list that cannot be read
    assert len(world.sent("/documents", since=before, PatNum=1)) <= tries
    world.stop()


def test_images_of_a_mount_that_are_not_wanted_are_not_fetched_by_age_either(tmp_path: Path) -> None:
    world = World.start(tmp_path, interval=60.0, nap=600.0, sync={"kinds": ["mount"]})
    world.practice.add_mount(world.practice.add_patient(), 2)
    world.run(hours=26)
    assert len(world.sent("/documents/DownloadSftp")) == 2
    assert world.sent("/documents/DownloadMount") == []


def test_images_of_a_mount_are_fetched_by_age_also_where_its_own_picture_is_not_wanted(tmp_path: Path) -> None:
    world = World.start(tmp_path, interval=60.0, nap=3600.0, sync={"kinds": ["mount-image"]})
    pat = world.practice.add_patient()
    mount = world.practice.add_mount(pat, 2)
    image, *_ = [row["DocNum"] for row in world.practice.mount_images(mount)]
    world.run(hours=2)
    world.practice.replace_bytes(image)  # the mount's row does not tell
    world.run(hours=26)
    assert len(world.media(pat, "mount-image", image)) == 2
    world.run(hours=24 * 7)
    assert len(world.sent("/documents/DownloadMount")) == 4  # at once, and 1, 3 and 7 days after
    assert world.sent("/documents/DownloadSftp") == []
    world.office.faults.add("gateway_timeout", path="/documents/DownloadMount", times=2, seconds=60.0)
    world.run(hours=24 * 24)
    asked = len(world.sent("/documents/DownloadMount"))
    world.run(hours=24 * 91)
    assert len(world.sent("/documents/DownloadMount")) > asked, "too large once is not never again"
    world.check()
    world.stop()


def test_adopted_images_of_a_mount_are_fetched_by_age_too(tmp_path: Path) -> None:
    world = World.start(tmp_path, interval=60.0, nap=3600.0, sync={"kinds": ["mount-image"]})
    world.practice.add_mount(world.practice.add_patient(), 2)
    world.run(hours=2)
    for table in ("version", "item"):  # as an index that was put back from before
        world.index.run(f"DELETE FROM {table}")
    before = len(world.office.arrivals)
    world.run(hours=18)
    assert world.sent("/documents/DownloadMount", since=before) == [], "all of it is in the archive"
    assert world.index.value("SELECT count(*) FROM version") == 2
    world.run(hours=10)
    assert len(world.sent("/documents/DownloadMount", since=before)) == 1
    world.stop()


def test_missing_document_that_no_mount_took_in_is_looked_for_once_a_day(world: World) -> None:
    pat = world.practice.add_patient()
    world.practice.add_mount(pat, 1)
    doc = world.practice.add_document(pat, "txt")
    world.run(hours=2)
    world.practice.db.execute("UPDATE document SET MountItemNum = 9999 WHERE DocNum = ?", (doc,))
    before = len(world.office.arrivals)
    world.run(hours=72)
    assert 3 <= len(world.sent(f"/documents/{doc}", since=before)) <= 3 + 4  # and once a day as a known document
    assert 3 <= len(world.sent("/documents/DownloadMount", since=before)) <= 6
    assert world.log.events("item_vanished") == []


@pytest.mark.parametrize("status", [409, 500])
def test_missing_document_that_the_office_cannot_tell_of_is_asked_for_with_growing_distance(
    world: World, status: int
) -> None:
    pat = world.practice.add_patient()
    world.practice.add_mount(pat, 1)
    doc = world.practice.add_document(pat, "txt")
    world.run(hours=2)
    world.practice.delete_document(doc)
    fault = world.office.faults.add("status", path=f"/documents/{doc}", status=status, times=None)
    world.run(hours=20)
    assert 3 <= fault.fired <= 7
    assert world.log.events("item_vanished") == []
    world.office.faults.clear()
    world.run(hours=30)
    assert world.state(pat, "document", doc) == "vanished"


# --- sheets


def test_edited_sheet_becomes_a_second_version(world: World) -> None:
    pat = world.practice.add_patient()
    sheet = world.practice.add_sheet(pat)
    world.run(hours=2)
    world.practice.edit_sheet(sheet)
    world.run(hours=3)
    world.check()
    assert len(world.media(pat, "sheet", sheet)) == 2


def test_unchanged_sheet_is_never_fetched_again(world: World) -> None:
    pat = world.practice.add_patient()
    world.practice.add_sheet(pat)
    world.run(hours=2)
    pass_days(world, 400)
    assert len(world.sent("/sheets/DownloadSftp")) == 1
    world.check()


def test_deleted_sheet_vanishes_after_a_day_and_keeps_its_file(world: World) -> None:
    pat = world.practice.add_patient()
    sheet, other = world.practice.add_sheet(pat), world.practice.add_sheet(pat)
    world.run(hours=2)
    world.practice.delete_sheet(sheet)
    world.run(hours=23)
    assert world.state(pat, "sheet", sheet) == "archived"
    world.run(hours=6)
    assert world.state(pat, "sheet", sheet) == "vanished"
    assert world.state(pat, "sheet", other) == "archived"
    assert len(world.media(pat, "sheet", sheet)) == 1
    world.check()


def test_old_sheet_without_a_stamp_is_archived_once_and_anew_when_its_fields_change(world: World) -> None:
    pat = world.practice.add_patient()
    sheet = world.practice.add_sheet(pat, stamp=NEVER)
    world.run(hours=30)
    assert len(world.sent("/sheets/DownloadSftp")) == 1
    world.practice.update("sheet", sheet, {"InternalNote": "found in the cellar"})
    world.run(hours=3)
    assert len(world.media(pat, "sheet", sheet)) == 2
    world.check()


def test_stamp_of_a_sheet_that_goes_back_is_a_change(world: World) -> None:
    pat = world.practice.add_patient()
    world.practice.workstation_offset = 7200.0
    sheet = world.practice.add_sheet(pat)
    world.run(hours=1)
    world.practice.workstation_offset = -7200.0
    world.practice.edit_sheet(sheet)
    world.run(hours=3)
    assert len(world.media(pat, "sheet", sheet)) == 2
    world.check()
