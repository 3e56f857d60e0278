"""What goes wrong with one item, for every way of placing: afterwards the mirror is complete and the drop empty."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from syncd import wishes
from syncd.demo.site import DropFile
from syncd.listing import BAD_LIST_AGAIN
from syncd.model import PullJob
from tests.small import HOUR, LEAST, METHODS, backfilling, failing, serving, settle, small, troubles, verdict, versions

pytestmark = pytest.mark.slow  # minutes in all: `make quick` leaves it out, `make test` does not

FAULTS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "504 before the work": ("gateway_timeout", {"when": "before", "seconds": 60.0}),
    "504, half written": ("gateway_timeout", {"when": "during", "seconds": 60.0}),
    "504, half written, the rest soon": ("gateway_timeout", {"when": "during", "seconds": 60.0, "late": 90.0}),
    "504, half written, the rest after 7 minutes": ("gateway_timeout", {"when": "during", "late": 420.0}),
    "504, half written, the rest after 50 minutes": ("gateway_timeout", {"when": "during", "late": 3000.0}),
    "504, half written, the rest after 20 hours": ("gateway_timeout", {"when": "during", "late": 72_000.0}),
    "504 after the work": ("gateway_timeout", {"when": "after", "seconds": 60.0}),
    "cut before the work": ("cut", {"when": "before"}),
    "cut, half written": ("cut", {"when": "during"}),
    "cut, half written, the rest later": ("cut", {"when": "during", "late": 200.0}),
    "cut after the work": ("cut", {"when": "after"}),
    "cut in the answer's body": ("cut", {"when": "body"}),
    "hangs for longer than a minute": ("hang", {"seconds": 100.0}),
    "zero bytes": ("zero_byte", {}),
    "no file after a 201": ("no_file", {}),
    "the file comes 3 s after the 201": ("late_file", {"late": 3.0}),
    "the file comes a minute after the 201": ("late_file", {"late": 60.0}),
    "the location header names another file": ("location", {"text": "drop.example.org/syncd/another.jpg"}),
    "the office cannot reach the site": ("site_error", {}),
    "500": ("status", {"status": 500}),
    "400 with words that nobody knows": ("status", {"status": 400, "text": "File not found"}),
    "a login page": ("html", {}),
}
# Answered with 201, but these files never come in time. The call stands: what a mount's answer named is fetched image
# by image, and thumbnails are settled by any answer (design.md section 7).
BAD_FILES = frozenset({"zero bytes", "no file after a 201", "the file comes a minute after the 201"})
WEB_PAGE = b"<!DOCTYPE html><html><body>Please log in</body></html>"
PNG = b"\x89PNG\r\n\x1a\n" + bytes(200) + b"\x00\x00\x00\x00IEND\xaeB`\x82"


def test_nothing_goes_wrong_without_a_fault(tmp_path: Path) -> None:
    world = backfilling(tmp_path, small())
    settle(world)
    assert len(world.placements()) == LEAST


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", FAULTS)
def test_one_fault_costs_one_more_placement_and_leaves_nothing_behind(tmp_path: Path, method: str, name: str) -> None:
    one = small()
    world = backfilling(tmp_path, one)
    kind, details = FAULTS[name]
    fault = world.office.faults.add(kind, **one.request(method), **details)  # type: ignore[arg-type]  # of the table
    bad_files = name in BAD_FILES
    settle(world, without_thumbnails=bad_files and method == "thumbnails")
    assert fault.fired == 1
    assert len(world.placements()) <= LEAST + (3 if bad_files and method == "mount-images" else 1)
    assert set(versions(world)) == {1}
    assert troubles(world) == {}


@pytest.mark.parametrize("name", FAULTS)
def test_document_of_unknown_name_survives_one_fault_too(tmp_path: Path, name: str) -> None:
    one = small(in_database=True)  # placed into a folder of its own: the listing does not tell its file's name
    world = backfilling(tmp_path, one)
    kind, details = FAULTS[name]
    fault = world.office.faults.add(kind, **one.request("document"), **details)  # type: ignore[arg-type]  # of the table
    settle(world)
    assert fault.fired == 1
    assert len(world.placements()) <= LEAST + 1
    assert set(versions(world)) == {1}


@pytest.mark.parametrize("method", METHODS)
def test_three_unanswered_placements_lose_nothing(tmp_path: Path, method: str) -> None:
    one = small()
    world = backfilling(tmp_path, one)
    details = {"when": "during", "late": 500.0, "times": 3}
    world.office.faults.add("gateway_timeout", **one.request(method), **details)
    settle(world, days=31.0 if method == "thumbnails" else 2.0)  # after three 504s thumbnails wait 30 days
    assert set(versions(world)) == {1}


def test_unanswered_name_is_emptied_again_after_ten_minutes_an_hour_and_a_day(tmp_path: Path) -> None:
    one = small()
    world = backfilling(tmp_path, one)
    world.office.faults.add("gateway_timeout", **one.request("document"))
    world.run()
    (name,) = {str(each.params["SftpAddress"]).partition("/")[2] for each in world.sent(DocNum=one.document)[:1]}
    asked_at = world.sent(DocNum=one.document)[0].at
    for age in (500.0, 3000.0, 80_000.0):  # a late write before each of the three looks
        world.run(seconds=asked_at + age - world.clock.now())
        world.site.files[name] = DropFile(b"late", world.clock.now())
        world.run(seconds={500.0: 200.0, 3000.0: 1000.0, 80_000.0: 7000.0}[age], tick=60.0)
        assert name not in world.site.files, age
    assert world.index.value("SELECT count(*) FROM attempt") == 0


def test_leftovers_of_ours_are_swept_from_the_drop_and_other_peoples_files_stay(tmp_path: Path) -> None:
    one = small()
    world = backfilling(tmp_path, one)
    long_ago = "syncd-main-20260301-" + "a" * 32
    others = ["syncd/letter.pdf", "syncd/syncd-other-20260301-" + "b" * 32 + ".jpg", "report.txt"]
    others += ["syncd/syncd-main-20261399-" + "0" * 32 + ".jpg"]  # of no day, and not ours
    for name in (f"syncd/{long_ago}.jpg", f"syncd/{long_ago}/inside.jpg", *others):
        world.site.files[name] = DropFile(b"x", world.clock.now())
    world.site.folders |= {"syncd", f"syncd/{long_ago}"}
    world.run()
    assert set(world.site.files) == set(others)


# --- what a pull meets


def test_file_that_grows_while_it_is_read_is_read_again(tmp_path: Path) -> None:
    one = small()
    world = backfilling(tmp_path, one)
    whole = one.practice.truth()[one.patient].documents[one.document]
    world.office.faults.add("partial", **one.request("document"))
    grown: list[bytes] = []

    def grow(job: PullJob) -> None:
        name = job.remote.decode()
        if whole.startswith(world.site.files[name].data) and not grown:
            world.site.files[name] = DropFile(whole, world.clock.now())
            grown.append(job.remote)

    world.drop.meddle = grow
    settle(world)
    assert grown
    assert len(world.placements()) == LEAST


def test_file_that_changes_at_every_read_is_failing_and_recovers(tmp_path: Path) -> None:
    one = small()
    world = backfilling(tmp_path, one)

    def touch(job: PullJob) -> None:
        found = world.site.files[job.remote.decode()]
        if found.data == whole:
            world.site.files[job.remote.decode()] = DropFile(whole, found.mtime + 1)

    whole = one.practice.truth()[one.patient].documents[one.document]
    world.drop.meddle = touch
    world.run(hours=0.5)
    assert failing(world) == {"changed_while_read": 1}
    world.check_safe()
    world.drop.meddle = None
    settle(world)
    assert set(versions(world)) == {1}


def test_web_page_under_an_image_name_is_never_archived(tmp_path: Path) -> None:
    one = small()
    one.practice.replace_bytes(one.document, bump=False, data=WEB_PAGE)
    world = serving(tmp_path, one)
    world.run(hours=2)
    assert failing(world) == {"web_page": 1}
    assert world.files(one.patient, "document", one.document) == []
    assert len(world.sent(DocNum=one.document)) <= 4  # with growing distance
    one.practice.replace_bytes(one.document)
    world.run(hours=2)
    world.check()
    assert failing(world) == {}


def test_another_known_type_than_the_name_says_is_archived_and_flagged(tmp_path: Path) -> None:
    one = small()
    one.practice.replace_bytes(one.document, bump=False, data=PNG)
    world = backfilling(tmp_path, one)
    settle(world)
    sql = "SELECT flags, media_type FROM version WHERE kind = 'document' AND num = ?"
    assert world.index.rows(sql, one.document) == [{"flags": '["other_type"]', "media_type": "image/png"}]


def test_missing_end_marker_after_a_201_is_archived_and_flagged(tmp_path: Path) -> None:
    one = small()
    cut = one.practice.truth()[one.patient].documents[one.document][:-30]
    one.practice.replace_bytes(one.document, bump=False, data=cut)
    world = backfilling(tmp_path, one)
    settle(world)
    sql = "SELECT flags FROM version WHERE kind = 'document' AND num = ?"
    assert world.index.rows(sql, one.document) == [{"flags": '["no_end_marker"]'}]


# --- what the office refuses


def test_one_refused_document_is_failing_and_holds_up_nothing(tmp_path: Path) -> None:
    one = small()
    world = backfilling(tmp_path, one)
    fault = world.office.faults.add("site_error", times=None, **one.request("document"))
    world.run(hours=0.5)
    assert failing(world) == {"refused": 1}
    assert troubles(world) == {}
    assert len(versions(world)) == LEAST  # all the rest: a letter, a mount and its three images, a sheet
    assert verdict(world) == 3  # its next try is due within the hour, but three were enough for a backfill
    world.office.faults.clear(fault)
    settle(world)
    assert failing(world) == {}


@pytest.mark.parametrize("status", [404, 409, 410, 422])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("text", ["The office cannot do that", "<html>"])
def test_item_that_is_answered_with_what_nobody_foresaw_holds_up_nothing(
    tmp_path: Path, method: str, status: int, text: str
) -> None:
    one = small()
    world = backfilling(tmp_path, one)
    fault = world.office.faults.add("status", times=None, status=status, text=text, **one.request(method))
    world.run(hours=0.5)
    owed = [row["method"] for row in world.index.rows("SELECT method FROM duty")]
    assert owed == [method] * (method != "thumbnails")
    assert troubles(world) == {}
    assert fault.fired <= 3
    world.office.faults.clear(fault)
    settle(world)
    assert failing(world) == {}


def test_document_refused_under_its_own_extension_is_asked_for_into_a_folder(tmp_path: Path) -> None:
    one = small()
    world = backfilling(tmp_path, one)
    words = {"status": 400, "text": "SftpAddress has an invalid file extension"}
    world.office.faults.add("status", times=1, **words, **one.request("document"))
    world.run(hours=0.5)
    addresses = [str(call.params["SftpAddress"]) for call in world.sent("/documents/DownloadSftp", DocNum=one.document)]
    assert [address.endswith("/") for address in addresses] == [False, True]
    settle(world)


def test_retry_of_a_damaged_file_heals_it_and_keeps_the_damaged_bytes_aside(tmp_path: Path) -> None:
    one = small()
    world = serving(tmp_path, one)
    world.run(hours=3)
    (content,) = world.media(one.patient, "document", one.document)
    (name,) = world.archive.glob(f"patients/{one.patient}/document-{one.document}/1-*[!n]")
    damaged = bytes([content[0] ^ 1]) + content[1:]
    name.chmod(0o600)
    name.write_bytes(damaged)
    wishes.make(world.index, "retry", [[one.patient, "document", one.document]], world.clock.now())
    world.run(hours=3)
    assert world.media(one.patient, "document", one.document) == [content]
    assert world.item(one.patient, "document", one.document)["current_version"] == 1
    aside = world.archive / "damaged" / name.relative_to(world.archive / "patients")
    assert aside.read_bytes() == damaged


def test_retry_of_a_damaged_sheet_archives_what_is_rendered_now_as_another_version(tmp_path: Path) -> None:
    one = small()
    world = serving(tmp_path, one)
    world.run(hours=3)
    (name,) = world.archive.glob(f"patients/{one.patient}/sheet-{one.sheet}/1-*.pdf")
    name.chmod(0o600)
    name.write_bytes(name.read_bytes()[:-9] + b"%%EOF rot")
    wishes.make(world.index, "retry", [[one.patient, "sheet", one.sheet]], world.clock.now())
    world.run(hours=3)
    assert world.item(one.patient, "sheet", one.sheet)["current_version"] == 2
    assert world.media(one.patient, "sheet", one.sheet)[-1].endswith(b"%%EOF\n")


def test_patients_folder_that_is_none_fails_its_own_items_and_no_others(tmp_path: Path) -> None:
    one = small()
    world = serving(tmp_path, one)
    world.run()
    folder = world.archive / "patients" / str(one.patient)
    folder.rename(tmp_path / "moved")
    folder.symlink_to(tmp_path / "moved")
    one.practice.replace_bytes(one.document)
    there = one.practice.add_document(one.patient, "png")
    with one.practice.as_of(world.clock.now() - 1200.0):
        later = one.practice.add_document(one.other, "png")
    world.run(hours=48)
    assert world.state(one.other, "document", later) == "archived"
    states = [world.state(one.patient, "document", number) for number in (one.document, there)]
    assert states == ["failing", "failing"]
    assert (failing(world), troubles(world)) == ({"io_error": 2}, {})
    assert len(world.sent("/documents/DownloadSftp", DocNum=there)) == 0  # nothing could be archived there
    folder.unlink()
    (tmp_path / "moved").rename(folder)
    world.run(hours=48)
    world.check()


def test_thumbnail_whose_folder_is_none_is_fetched_again_and_the_others_are_archived(tmp_path: Path) -> None:
    one = small()
    world = serving(tmp_path, one)
    world.run()
    folder = world.archive / "patients" / str(one.patient) / f"thumbnail-{one.document}"
    folder.rename(tmp_path / "moved")
    folder.symlink_to(tmp_path / "moved")
    one.practice.replace_bytes(one.document)
    with one.practice.as_of(world.clock.now() - 1200.0):
        later = one.practice.add_document(one.patient, "jpg")
    world.run(hours=5)
    assert world.state(one.patient, "thumbnail", later) == "archived"
    assert world.index.rows("SELECT num FROM item WHERE thumbnail_due = 1") == [{"num": one.document}]
    assert 2 <= len(world.sent("/documents/Thumbnails", PatNum=one.patient)) <= 4
    folder.unlink()
    (tmp_path / "moved").rename(folder)
    world.run(hours=60)
    world.check()


def test_document_without_its_file_waits_for_the_next_listing(tmp_path: Path) -> None:
    one = small()
    world = serving(tmp_path, one)
    world.run()
    with one.practice.as_of(world.clock.now() - 1200.0):
        late = one.practice.add_document(one.patient, "jpg", file_after=5 * HOUR)
    world.run(hours=3)
    world.check_safe()
    assert world.state(one.patient, "document", late) == "failing"
    world.run(hours=8)
    world.check()


# --- a list that cannot be read before what it names is placed


def test_list_that_cannot_be_read_keeps_nothing_else_waiting_and_is_not_asked_all_the_time(tmp_path: Path) -> None:
    one = small()
    world = serving(tmp_path, one)
    world.run()
    with one.practice.as_of(world.clock.now() - 1200.0):
        mine, theirs = one.practice.add_document(one.patient, "jpg"), one.practice.add_document(one.other, "jpg")
    world.run(hours=30, until=lambda: world.has(one.patient, "document", mine))
    world.clock.advance(2 * HOUR)  # the machine slept: what was listed is too old to place from
    world.office.faults.add("html", path="/documents", params={"PatNum": one.patient}, times=None)
    before = len(world.office.arrivals)
    world.run(hours=2)
    assert world.media(one.other, "document", theirs)
    assert len(world.sent("/documents", since=before, PatNum=one.patient)) <= 3 * (2 * HOUR / BAD_LIST_AGAIN + 1)
    assert world.state(one.patient, "document", mine) == "failing"
    world.office.faults.clear()
    world.run(hours=5)
    world.check()


# --- mounts that are too large for the gateway's 60 s


def test_large_mount_of_unknown_images_is_failing_under_its_own_name(tmp_path: Path) -> None:
    one = small()
    world = backfilling(tmp_path, one)
    world.office.faults.add("gateway_timeout", times=None, seconds=60.0, **one.request("mount-images"))
    world.run(hours=1)
    assert failing(world) == {"mount_too_large": 1}
    assert troubles(world) == {}
    world.check_safe()


def test_image_that_left_a_large_mount_is_not_fetched_as_one_of_it(tmp_path: Path) -> None:
    one = small()
    world = serving(tmp_path, one)
    world.run()
    world.office.faults.add("gateway_timeout", times=None, seconds=60.0, **one.request("mount-images"))
    left, *_ = [row["DocNum"] for row in one.practice.mount_images(one.mount)]
    with one.practice.as_of(world.clock.now() - 1200.0):
        one.practice.out_of_mount(left)
        one.practice.replace_bytes(left)
    one.practice.change_mount(one.mount)
    world.run(hours=3)
    assert len(world.media(one.patient, "document", left)) == 1
    assert len(world.media(one.patient, "mount-image", left)) == 1, "as it was while it was in the mount"
    world.check_safe()


def test_large_mount_of_known_images_is_fetched_image_by_image(tmp_path: Path) -> None:
    one = small()
    world = serving(tmp_path, one)
    world.run()
    world.office.faults.add("gateway_timeout", times=None, seconds=60.0, **one.request("mount-images"))
    images = [row["DocNum"] for row in one.practice.mount_images(one.mount)]
    for number in images:
        one.practice.replace_bytes(number)
    one.practice.change_mount(one.mount)
    before = len(world.office.arrivals)
    world.run(hours=3)
    world.check()
    assert {each.params.get("DocNum") for each in world.sent("/documents/DownloadSftp", before)} >= set(images)
    assert failing(world) == {}
    assert [len(world.media(one.patient, "mount-image", number)) for number in images] == [2, 2, 2]


def test_whose_an_image_is_was_asked_right_before_each_of_its_placements(tmp_path: Path) -> None:
    one = small()
    world = serving(tmp_path, one)
    world.run()
    world.office.faults.add("gateway_timeout", times=None, seconds=60.0, **one.request("mount-images"))
    images = [row["DocNum"] for row in one.practice.mount_images(one.mount)]
    first = {"path": "/documents/DownloadSftp", "params": {"DocNum": images[0]}}
    world.office.faults.add("gateway_timeout", seconds=60.0, **first)
    for number in images:
        one.practice.replace_bytes(number)
    one.practice.change_mount(one.mount)
    world.run(hours=6)
    world.check()
    paths = [(arrival.path, arrival.params.get("DocNum")) for arrival in world.office.arrivals]
    placed = [i for i, (path, number) in enumerate(paths) if path == "/documents/DownloadSftp" and number in images]
    assert len(placed) > len(images), "one of them was asked for twice"
    assert [paths[i - 1][0] for i in placed] == [f"/documents/{paths[i][1]}" for i in placed]


def test_image_that_was_scanned_into_a_large_mount_comes_a_day_later(tmp_path: Path) -> None:
    one = small()
    world = serving(tmp_path, one)
    world.run()
    world.office.faults.add("gateway_timeout", times=2, seconds=60.0, **one.request("mount-images"))
    with one.practice.as_of(world.clock.now() - 1200.0):
        scanned = one.practice.add_document(one.patient, "jpg")
        one.practice.move_into_mount(scanned, one.mount)
    one.practice.change_mount(one.mount)
    world.run(hours=8)
    assert not world.media(one.patient, "mount-image", scanned), "the images known were fetched one by one"
    world.run(hours=24)
    assert world.media(one.patient, "mount-image", scanned)
    world.check()
