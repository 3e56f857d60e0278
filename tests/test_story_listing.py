"""Reading lists: pages, answers that cannot be trusted, patients who come and go, names, thumbnails."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from syncd import wishes
from syncd.demo.build import Past
from syncd.demo.practice import Practice
from syncd.demo.site import DropFile
from syncd.demo.wire import Request, Response
from syncd.model import PullJob
from syncd.naming import archive_path_is_ours
from tests.small import verdict
from tests.world import World

pytestmark = pytest.mark.slow  # minutes in all: `make quick` leaves it out, `make test` does not

HOSTILE = [
    "../../../etc/cron.d/x.jpg",
    "..\\..\\windows\\x.jpg",
    "first\nsecond.jpg",
    "\x1b[2Jterminal.jpg",
    "x" * 300 + ".jpg",
    "Zähne und Kröne, März (2).jpg",
    "Зубы 牙齿.jpg",
    "CON.jpg",
    "no extension",
    "report.exe",
    "a;rm -rf $HOME`id`.jpg",
]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World.start(tmp_path, interval=90.0, nap=600.0)
    yield world
    world.stop()


@pytest.fixture
def lists_only(tmp_path: Path) -> Iterator[World]:
    """Lists are read and nothing of them can be placed."""
    world = World.start(tmp_path, interval=30.0, nap=600.0)
    world.index.run("INSERT INTO site VALUES ('placing', 'placements_refused', '', 0, 9e12, 1)")
    yield world
    world.stop()


def known(world: World, kind: str = "document") -> set[int]:
    return {row["num"] for row in world.index.rows("SELECT num FROM item WHERE kind = ?", kind)}


def offsets(world: World, path: str = "/documents") -> list[int]:
    return [int(str(arrival.params["Offset"])) for arrival in world.sent(path)]


def until_asked(world: World, path: str, times: int = 1) -> None:
    world.run(until=lambda: len(world.sent(path)) >= times)


# --- pages


@pytest.mark.parametrize(
    ("rows", "asked"), [(0, [0]), (99, [0]), (100, [0, 99]), (101, [0, 99]), (199, [0, 99, 198]), (200, [0, 99, 198])]
)
@pytest.mark.parametrize("kind", ["document", "sheet"])
def test_list_of_any_length_is_read_whole(lists_only: World, kind: str, rows: int, asked: list[int]) -> None:
    pat = lists_only.practice.add_patient()
    add = lists_only.practice.add_document if kind == "document" else lists_only.practice.add_sheet
    numbers = {add(pat) for _ in range(rows)}
    lists_only.run(seconds=600)
    assert known(lists_only, kind) == numbers
    assert offsets(lists_only, f"/{kind}s")[: len(asked)] == asked
    assert lists_only.index.value("SELECT rows FROM list WHERE name = ?", f"{kind}s") == rows


@pytest.mark.parametrize(
    ("kinds", "polled"),
    [
        (["sheet"], {"/sheets"}),
        (["document"], {"/documents"}),
        (["mount"], {"/documents"}),
        (["mount-image"], {"/documents"}),
        (["thumbnail"], {"/documents"}),
        (["document", "sheet"], {"/documents", "/sheets"}),
    ],
)
@pytest.mark.parametrize("backfill", [True, False])
def test_only_lists_that_a_wanted_kind_comes_from_are_polled_and_waited_for(
    tmp_path: Path, kinds: list[str], polled: set[str], backfill: bool
) -> None:
    world = World.start(tmp_path, 4, interval=2.0, backfill=backfill, sync={"kinds": kinds})
    world.run(hours=30)
    assert {arrival.path for arrival in world.office.arrivals} & {"/documents", "/sheets"} == polled
    facts = world.catalog().status_facts(world.clock.now())
    assert (facts.lists, facts.lists_never_polled) == (4 * len(polled), 0)
    assert facts.last_complete_sweep_at is not None
    assert world.catalog().person(1)["listed_at"] is not None
    assert verdict(world) == 0
    world.check_safe()
    assert kinds == ["thumbnail"] or not world.findings().lacking, "they are made with their documents"
    world.stop()


@pytest.mark.parametrize("patients", [99, 100, 101, 200])
def test_roster_of_any_length_is_read_whole(tmp_path: Path, patients: int) -> None:
    world = World.start(tmp_path, patients, past=Past(documents=0, mounts=0, sheets=0, deleted=0.0), interval=30.0)
    world.run(until=lambda: world.index.meta_time("roster_at"))
    assert world.index.value("SELECT count(*) FROM patient") == patients


@pytest.mark.parametrize("change", ["insert", "delete"])
def test_rows_that_shift_between_two_pages_start_the_list_over(lists_only: World, change: str) -> None:
    practice, pat = lists_only.practice, lists_only.practice.add_patient()
    lists_only.office.order = "iso"
    numbers = {practice.add_document(pat) for _ in range(150)}
    until_asked(lists_only, "/documents")
    if change == "insert":
        numbers.add(practice.add_document(pat, DateCreated="2001-01-01 00:00:00"))
    else:
        numbers.discard(first := min(numbers))
        practice.delete_document(first)
    lists_only.run(seconds=600)
    assert offsets(lists_only)[:4] == [0, 99, 0, 99]
    assert known(lists_only) == numbers


def test_row_edited_between_two_pages_starts_the_list_over(lists_only: World) -> None:
    pat = lists_only.practice.add_patient()
    numbers = [lists_only.practice.add_sheet(pat) for _ in range(120)]
    until_asked(lists_only, "/sheets")
    lists_only.practice.edit_sheet(numbers[99], InternalNote="changed")
    lists_only.run(seconds=600)
    assert offsets(lists_only, "/sheets")[:4] == [0, 99, 0, 99]
    assert known(lists_only, "sheet") == set(numbers)


def test_listing_of_several_pages_is_as_old_as_its_first_page(lists_only: World) -> None:
    pat = lists_only.practice.add_patient()
    for _ in range(120):
        lists_only.practice.add_sheet(pat)
    lists_only.run(until=lambda: lists_only.index.polled_at(pat, "sheets"))
    first, last = (arrival.at for arrival in lists_only.sent("/sheets"))
    assert first <= lists_only.index.polled_at(pat, "sheets") < last


@pytest.mark.parametrize(("minutes", "asked"), [(5, [0, 99]), (120, [0, 99, 0, 99])])
def test_listing_that_is_broken_off_for_long_starts_over(lists_only: World, minutes: int, asked: list[int]) -> None:
    pat = lists_only.practice.add_patient()
    for _ in range(120):
        lists_only.practice.add_sheet(pat)
    until_asked(lists_only, "/sheets")
    until = lists_only.clock.now() + 60.0 * minutes
    wishes.make(lists_only.index, "pause", until, lists_only.clock.now())
    lists_only.run(until=lambda: lists_only.index.polled_at(pat, "sheets"))
    assert offsets(lists_only, "/sheets") == asked
    assert lists_only.index.polled_at(pat, "sheets") >= lists_only.sent("/sheets")[-2].at
    assert lists_only.log.events("listing_refused") == []


@pytest.mark.parametrize("fault", ["shifted", "duplicated", "foreign_row", "html", "wrong_shape"])
@pytest.mark.parametrize("path", ["/documents", "/sheets"])
def test_page_that_cannot_be_trusted_records_nothing(lists_only: World, fault: str, path: str) -> None:
    pat, other = lists_only.practice.add_patient(), lists_only.practice.add_patient()
    for _ in range(120):
        lists_only.practice.add_document(pat)
        lists_only.practice.add_sheet(pat)
    lists_only.practice.add_document(other)
    lists_only.practice.add_sheet(other)
    lists_only.office.faults.add(fault, path=path, params={"PatNum": pat}, times=None)  # type: ignore[arg-type] # by name
    lists_only.run(seconds=900)
    name = path[1:]
    sql = "SELECT count(*) FROM item WHERE pat_num = ? AND kind = ?"
    assert lists_only.index.value(sql, pat, name[:-1]) == 0
    assert lists_only.index.polled_at(pat, name) == 0  # type: ignore[arg-type] # a list by name
    assert lists_only.index.polled_at(other, name) > 0  # type: ignore[arg-type] # a list by name
    assert lists_only.log.events("listing_refused")
    lists_only.office.faults.clear()
    lists_only.run(hours=1)
    assert lists_only.index.value(sql, pat, name[:-1]) == 120


def test_page_is_asked_for_three_times_and_then_left_for_a_quarter_of_an_hour(lists_only: World) -> None:
    lists_only.practice.add_document(lists_only.practice.add_patient())
    lists_only.office.faults.add("html", path="/documents", times=None)
    lists_only.run(seconds=600)
    assert len(lists_only.sent("/documents")) == 3
    lists_only.run(seconds=900)
    assert len(lists_only.sent("/documents")) == 6


def test_five_lists_of_bad_answers_are_a_state_of_the_site(tmp_path: Path) -> None:
    world = World.start(tmp_path, 6, past=Past(documents=1, mounts=0, sheets=0, deleted=0.0), interval=5.0)
    world.office.faults.add("html", path="/documents", times=None)
    world.office.faults.add("html", path="/sheets", times=None)
    world.run(seconds=600)
    assert {row["reason"] for row in world.index.rows("SELECT reason FROM site")} == {"bad_answers"}
    world.office.faults.clear()
    world.run(hours=1)
    assert world.index.rows("SELECT reason FROM site") == []
    world.check()


def test_list_that_was_cut_short_once_makes_nothing_vanish(world: World) -> None:
    pat = world.practice.add_patient()
    for _ in range(10):
        world.practice.add_sheet(pat)
    world.run(hours=2)
    fault = world.office.faults.add("truncated", path="/sheets", size=5)
    world.run(until=lambda: fault.fired)
    world.run(seconds=10)
    assert world.index.value("SELECT count(*) FROM item WHERE missing_since_at IS NOT NULL") == 5
    world.run(hours=2)
    assert world.index.value("SELECT count(*) FROM item WHERE missing_since_at IS NOT NULL") == 0
    world.check()


def test_list_that_is_cut_short_every_other_time_makes_nothing_vanish(world: World) -> None:
    pat = world.practice.add_patient()
    for _ in range(10):
        world.practice.add_sheet(pat)
    world.run(hours=2)
    world.office.faults.add("truncated", path="/sheets", size=5, probability=0.5, times=None)
    world.run(hours=60)
    assert world.log.events("item_vanished") == []


def test_answer_over_the_cap_is_asked_again_with_smaller_limits(tmp_path: Path) -> None:
    world = World.start(tmp_path, interval=30.0, size_cap=40_000)
    pat = world.practice.add_patient()
    files = {world.practice.add_raw_document(pat, bytes([65 + n]) * 12_000, ".txt"): n for n in range(5)}
    world.run(seconds=1200)
    world.check()
    limits = [arrival.params["Limit"] for arrival in world.sent("/documents")]
    assert limits[:6] == ["100", "10", "2", "4", "2", "4"]
    assert {num: world.media(pat, "document", num) for num in files} == {
        num: [bytes([65 + n]) * 12_000] for num, n in files.items()
    }


def test_one_large_row_does_not_cost_a_request_for_each_of_the_others(tmp_path: Path) -> None:
    world = World.start(tmp_path, interval=30.0, size_cap=40_000)
    pat = world.practice.add_patient()
    large = world.practice.add_raw_document(pat, b"x" * 24_000, ".txt")
    for _ in range(80):
        world.practice.add_document(pat)
    world.run(until=lambda: world.has(pat, "document", large))
    assert len(world.sent("/documents")) < 12


def test_list_that_takes_more_than_an_hour_is_a_bad_list_and_not_all_that_is_read(tmp_path: Path) -> None:
    world = World.start(tmp_path, interval=60.0, size_cap=40_000)
    pat, other = world.practice.add_patient(), world.practice.add_patient()
    for _ in range(70):
        world.practice.add_raw_document(pat, b"x" * 12_000, ".txt")
    doc = world.practice.add_document(other)
    world.run(hours=12)
    assert world.state(other, "document", doc) == "archived"
    assert world.index.value("SELECT failures FROM list WHERE pat_num = ? AND name = 'documents'", pat) > 0


def test_row_over_the_cap_by_itself_fails_the_list_and_not_the_mirror(tmp_path: Path) -> None:
    world = World.start(tmp_path, interval=30.0, size_cap=40_000)
    pat, other = world.practice.add_patient(), world.practice.add_patient()
    world.practice.add_raw_document(pat, b"x" * 50_000, ".txt")
    doc = world.practice.add_document(other)
    world.run(hours=1)
    assert world.state(other, "document", doc) == "archived"
    assert world.index.rows("SELECT * FROM site") == []
    assert world.index.value("SELECT failures FROM list WHERE pat_num = ? AND name = 'documents'", pat) > 0


@pytest.mark.parametrize("switch", ["list_names", "iso", "all prefixed", "bare_errors", "path in location", "old"])
def test_every_form_of_an_answer_gives_the_same_mirror(tmp_path: Path, switch: str) -> None:
    world = World.start(tmp_path, 2, past=Past(documents=3, mounts=1, sheets=2, deleted=0.0), interval=5.0)
    office = world.office
    match switch:
        case "list_names":
            office.list_names = True
        case "iso":
            office.order = "iso"
        case "all prefixed":
            office.prefixed = "all"
        case "bare_errors":
            office.bare_errors = True
        case "path in location":
            office.location = "{path}"
        case "old":
            text = "'documents/1' is not a valid method."
            office.faults.add("status", path="/documents/[0-9]*", status=400, text=text, times=None)
    world.run(hours=3)
    world.check()


def test_office_without_the_single_get_lets_two_listings_decide(world: World) -> None:
    pat = world.practice.add_patient()
    doc, _ = world.practice.add_document(pat), world.practice.add_document(pat)
    world.run(hours=2)
    world.office.faults.add("status", path="/documents/[0-9]*", status=400, text="is not a valid method.", times=None)
    world.practice.delete_document(doc)
    world.run(hours=30)
    assert world.state(pat, "document", doc) == "vanished"
    world.check()


# --- patients who come and go


def test_list_that_answers_patient_not_found_concludes_nothing(world: World) -> None:
    pat = world.practice.add_patient()
    doc = world.practice.add_document(pat)
    world.run(hours=2)
    fault = world.office.faults.add(
        "status", path="/documents", params={"PatNum": pat}, status=404, text="Patient not found", times=None
    )
    world.run(hours=60)
    assert world.state(pat, "document", doc) == "archived"
    assert world.index.rows("SELECT * FROM site") == []
    assert 40 <= fault.fired <= 61
    world.office.faults.clear()
    world.run(hours=2)
    world.check()


def test_patient_who_leaves_the_roster_keeps_everything_and_is_not_polled(world: World) -> None:
    pat, other = world.practice.add_patient(), world.practice.add_patient()
    doc = world.practice.add_document(pat)
    world.practice.add_document(other)
    world.run(hours=2)
    world.practice.set_patient_status(pat, "Deleted")
    world.run(hours=1)
    before = len(world.office.arrivals)
    world.run(hours=50)
    assert world.sent("/documents", since=before, PatNum=pat) == []
    assert world.sent("/documents", since=before, PatNum=other)
    assert world.state(pat, "document", doc) == "archived"
    assert len(world.log.events("patient_left")) == 1
    world.check_safe()


def test_patient_who_returns_to_the_roster_is_polled_again(world: World) -> None:
    pat = world.practice.add_patient()
    world.practice.add_patient()
    world.practice.add_document(pat)
    world.run(hours=2)
    world.practice.set_patient_status(pat, "Deleted")
    world.run(hours=1)
    doc = world.practice.add_document(pat)
    world.practice.set_patient_status(pat, "Patient")
    world.run(hours=2)
    assert world.state(pat, "document", doc) == "archived"
    world.check()


def test_new_patient_is_found_within_the_quarter_hour(world: World) -> None:
    world.practice.add_patient()
    world.run(hours=1)
    pat = world.practice.add_patient()
    doc = world.practice.add_document(pat)
    world.run(seconds=1200)
    assert world.state(pat, "document", doc) == "archived"


@pytest.mark.parametrize("fault", ["empty", "html", "wrong_shape"])
def test_bad_roster_lets_nobody_leave(world: World, fault: str) -> None:
    pat = world.practice.add_patient()
    doc = world.practice.add_document(pat)
    world.run(hours=2)
    world.office.faults.add(fault, path="/patients/Simple", times=None)  # type: ignore[arg-type] # by name
    world.run(hours=3)
    assert world.index.value("SELECT count(*) FROM patient WHERE left_at IS NULL") == 1
    reasons = {row["reason"] for row in world.index.rows("SELECT reason FROM incident")}
    assert reasons == {"bad_answers"}
    world.office.faults.clear()
    world.practice.replace_bytes(doc)
    world.run(hours=2)
    world.check()
    assert world.index.rows("SELECT * FROM site") == []


# --- names


def test_files_in_the_database_are_placed_into_a_folder_and_keep_their_extension(tmp_path: Path) -> None:
    world = World.start(tmp_path, interval=30.0, in_database=True)
    pat = world.practice.add_patient()
    docs = {world.practice.add_document(pat, extension): extension for extension in ("jpg", "png", "pdf", "tif", "txt")}
    world.run(hours=2)
    world.check()
    assert all(str(arrival.params["SftpAddress"]).endswith("/") for arrival in world.sent("/documents/DownloadSftp"))
    for doc, extension in docs.items():
        assert [name.split(".")[-1] for name in world.files(pat, "document", doc)] == [
            extension,
            "json",
        ] or extension > "json"
        assert any(name.endswith(f".{extension}") for name in world.files(pat, "document", doc))
    names = {row["file_name"] for row in world.index.rows("SELECT file_name FROM item WHERE kind = 'document'")}
    assert len(names - {None}) in (0, 5)


@pytest.mark.parametrize("in_database", [False, True], ids=["folder", "database"])
def test_hostile_file_name_is_never_a_path(tmp_path: Path, in_database: bool) -> None:
    world = World.start(tmp_path, interval=10.0, in_database=in_database)
    pat = world.practice.add_patient()
    docs = {}
    for name in HOSTILE:
        extension = name.rpartition(".")[2] if "." in name else "jpg"
        docs[name] = world.practice.add_document(pat, extension, file_name=name)
    other = world.practice.add_document(pat)
    world.run(hours=2)
    world.check_safe()
    paths = [str(path.relative_to(world.archive)) for path in world.archive.rglob("*") if path.is_file()]
    assert [path for path in paths if not archive_path_is_ours(path)] == []
    assert world.state(pat, "document", other) == "archived"
    told = json.dumps(world.log.lines)
    assert [name for name in HOSTILE if name in told or json.dumps(name) in told] == []
    assert all(len(str(arrival.params["SftpAddress"])) < 120 for arrival in world.placements())
    for name, doc in docs.items():
        as_a_path = "/" in name or len(name) > 255  # what an office with files in its database cannot write at all
        expected = "failing" if in_database and as_a_path else "archived"
        assert world.state(pat, "document", doc) == expected, name


def test_hostile_file_name_outside_the_database_is_archived(tmp_path: Path) -> None:
    world = World.start(tmp_path, interval=10.0)
    pat = world.practice.add_patient()
    names = [name for name in HOSTILE if "/" not in name and "\\" not in name]
    docs = [world.practice.add_document(pat, "jpg", file_name=name) for name in names]
    world.run(hours=2)
    assert [world.state(pat, "document", doc) for doc in docs] == ["archived"] * len(names)
    world.check()


def test_two_images_of_one_name_in_a_mount_are_fetched_singly_and_not_mixed_up(world: World) -> None:
    pat = world.practice.add_patient()
    mount = world.practice.add_mount(pat, 3)
    images = [row["DocNum"] for row in world.practice.mount_images(mount)]
    world.practice.db.execute("UPDATE document SET FileName = 'IMG_0001.jpg' WHERE DocNum IN (?, ?)", images[:2])
    world.run(hours=2)
    world.check()
    singly = {int(str(arrival.params.get("DocNum", 0))) for arrival in world.sent("/documents/DownloadSftp")}
    assert singly - {0} == set(images[:2])
    assert all(world.item(pat, "mount-image", num)["mount_num"] == mount for num in images)


@pytest.mark.parametrize(
    ("again", "thumbnails"),
    [("in the same words", [1, 1]), ("under another's name", [0, 0]), ("under a name of its own", [0, 1])],
)
@pytest.mark.parametrize("path", ["/documents/DownloadMount", "/documents/Thumbnails"])
def test_number_that_an_answer_names_twice_gets_one_version_of_what_is_surely_its_own(
    world: World, path: str, again: str, thumbnails: list[int]
) -> None:
    pat = world.practice.add_patient()
    mount = world.practice.add_mount(pat, 2)
    documents = [world.practice.add_document(pat) for _ in range(2)]
    kind = "mount-image" if path == "/documents/DownloadMount" else "thumbnail"
    numbers = [r["DocNum"] for r in world.practice.mount_images(mount)] if kind == "mount-image" else documents
    handle = world.office.handle

    def twice(request: Request) -> Response:
        answer = handle(request)
        if request.path != path or answer.status != 201:
            return answer
        rows = json.loads(answer.body)
        name = {"in the same words": rows[0]["FileName"], "under another's name": rows[1]["FileName"]}
        rows.append({**rows[0], "FileName": name.get(again, "copy.jpg")})
        folder = str(world.office.arrivals[-1].params["SftpAddress"]).partition("/")[2]
        if again == "under a name of its own":
            world.site.files[f"{folder}copy.jpg"] = world.site.files[f"{folder}{rows[1]['FileName']}"]
        return replace(answer, body=json.dumps(rows).encode())

    world.office.handle = twice  # type: ignore[method-assign] # the office's own mistake
    world.run(hours=6)
    world.check_safe()
    world.check_drop()
    found = [len(world.media(pat, kind, number)) for number in numbers]
    assert found == ([1, 1] if kind == "mount-image" else thumbnails)


# --- thumbnails


def test_thumbnails_are_asked_for_once_after_fifteen_quiet_minutes(world: World) -> None:
    pat = world.practice.add_patient()
    for _ in range(3):
        world.practice.add_document(pat)
    world.run(hours=1)
    world.check()
    last = max(row["archived_at"] for row in world.index.rows("SELECT archived_at FROM item WHERE kind = 'document'"))
    calls = world.sent("/documents/Thumbnails")
    assert len(calls) == 1
    assert 900 <= calls[0].at - last <= 1800
    world.run(hours=48)
    assert len(world.sent("/documents/Thumbnails")) == 1


def test_new_image_makes_the_quiet_time_begin_anew(tmp_path: Path) -> None:
    world = World.start(tmp_path, interval=5.0)
    pat = world.practice.add_patient()
    for _ in range(4):
        world.practice.add_document(pat)
        world.run(seconds=600)
    assert world.sent("/documents/Thumbnails") == []
    world.run(hours=2)
    assert len(world.sent("/documents/Thumbnails")) == 1
    world.check()


def test_backfill_asks_for_thumbnails_right_after_the_patients_last_placement(tmp_path: Path) -> None:
    world = World.start(tmp_path, 3, past=Past(documents=4, deleted=0.0), backfill=True, interval=5.0)
    world.run()
    world.check()
    assert len(world.sent("/documents/Thumbnails")) <= 3
    assert max(arrival.at for arrival in world.office.arrivals) - world.scope.since < 600


@pytest.mark.parametrize("outage", [False, True], ids=["quiet for long", "unsent for long"])
def test_thumbnails_are_asked_for_from_a_listing_of_the_last_hour(world: World, outage: bool) -> None:
    pat = world.practice.add_patient()
    world.practice.add_document(pat)
    world.run(until=lambda: world.index.value("SELECT 1 FROM item WHERE thumbnail_due = 1"))
    if outage:
        world.office.faults.add("too_many", path="/documents/Thumbnails", seconds=3600.0)
        world.run(until=lambda: world.sent("/documents/Thumbnails"))
    world.clock.advance(3 * 3600.0)
    world.run(until=lambda: world.index.value("SELECT 1 FROM item WHERE kind = 'thumbnail'"))
    asked = world.sent("/documents/Thumbnails")[-1].at
    assert asked - max(arrival.at for arrival in world.sent("/documents", PatNum=pat) if arrival.at < asked) < 3600
    world.check()


def test_patient_whose_list_cannot_be_read_keeps_no_others_thumbnails_waiting(world: World) -> None:
    pats = [world.practice.add_patient() for _ in range(2)]
    docs = [world.practice.add_document(pat) for pat in pats]
    world.run(until=lambda: len(world.index.rows("SELECT 1 FROM item WHERE thumbnail_due = 1")) == len(pats))
    fault = world.office.faults.add("html", path="/documents", params={"PatNum": pats[0]}, times=None)
    world.clock.advance(3 * 3600.0)
    world.run(hours=3)
    assert [len(world.media(pat, "thumbnail", doc)) for pat, doc in zip(pats, docs, strict=True)] == [0, 1]
    assert len(world.sent("/documents", PatNum=pats[0])) < 3 * 4 * 4, "asked for in its time, as any list is"
    world.run(hours=72)
    world.office.faults.clear(fault)
    world.run(hours=6)
    assert len(world.media(pats[0], "thumbnail", docs[0])) == 1, "no call failed: nothing is put off for a month"
    world.check()


def test_edit_without_new_bytes_makes_no_thumbnail_due(world: World) -> None:
    pat = world.practice.add_patient()
    doc = world.practice.add_document(pat)
    world.run(hours=2)
    world.practice.edit_document(doc)
    world.run(hours=3)
    assert len(world.sent("/documents/Thumbnails")) == 1


def test_image_that_was_in_a_mount_at_the_only_thumbnails_call_is_asked_for_once_it_is_back(world: World) -> None:
    pat = world.practice.add_patient()
    mount = world.practice.add_mount(pat, 1)
    world.run(hours=2)
    doc = world.practice.add_document(pat)
    while not world.index.value("SELECT 1 FROM item WHERE thumbnail_due = 1"):
        world.run(seconds=60)
    world.practice.move_into_mount(doc, mount)
    world.run(hours=2)
    assert world.index.value("SELECT count(*) FROM item WHERE kind = 'thumbnail'") == 0
    world.practice.out_of_mount(doc)
    world.run(hours=30)
    world.check()


def test_answer_that_names_nobodys_thumbnails_settles_nothing(world: World) -> None:
    pat = world.practice.add_patient()
    doc = world.practice.add_document(pat, "jpg")
    world.run(until=lambda: world.media(pat, "document", doc))
    ours = world.practice
    other = Practice(world.clock, "America/Chicago", seed=99, name="other")
    other.next_numbers["document"] = 1000
    with other.as_of(world.clock.now() - 3600.0):
        while other.add_patient() < pat:
            pass
        other.add_document(pat, "jpg")
    world.swap_practice(other)  # the key leads to another database for a while, and no list tells
    world.office.faults.add("html", path="/documents", times=None)
    world.run(until=lambda: world.sent("/documents/Thumbnails", PatNum=pat))
    world.run(seconds=300)
    world.swap_practice(ours)
    world.office.faults.clear()
    world.run(hours=30)
    assert len(world.media(pat, "thumbnail", doc)) == 1


@pytest.mark.parametrize("for_ever", [False, True], ids=["once", "for ever"])
def test_thumbnail_whose_file_was_not_read_is_asked_for_again(world: World, for_ever: bool) -> None:
    pat = world.practice.add_patient()
    doc, other = world.practice.add_document(pat, "jpg"), world.practice.add_document(pat, "jpg")
    world.run(until=lambda: len(world.index.rows("SELECT 1 FROM item WHERE thumbnail_due = 1")) == 2)

    def rewrite(job: PullJob) -> None:
        """Somebody writes to the thumbnail of one of them whenever it is read, for as long as the first call counts."""
        name = os.fsdecode(job.remote)
        first = len(world.sent("/documents/Thumbnails")) == 1
        if (first or for_ever) and name.endswith(f"{doc}.jpg"):
            world.site.files[name] = DropFile(world.site.files[name].data, world.site.files[name].mtime + 1)

    world.drop.meddle = rewrite
    world.run(hours=30)
    assert len(world.media(pat, "thumbnail", other)) == 1
    assert len(world.media(pat, "thumbnail", doc)) == (0 if for_ever else 1)
    assert len(world.sent("/documents/Thumbnails")) == (3 if for_ever else 2)
    assert world.catalog().status_facts(world.clock.now()).thumbnails_due == int(for_ever)


def test_new_bytes_make_a_new_thumbnail(world: World) -> None:
    pat = world.practice.add_patient()
    doc, other = world.practice.add_document(pat), world.practice.add_document(pat)
    world.run(hours=2)
    world.practice.replace_bytes(doc)
    world.run(hours=3)
    world.check()
    assert len(world.media(pat, "thumbnail", doc)) == 2
    assert len(world.media(pat, "thumbnail", other)) == 1
    assert len(world.sent("/documents/Thumbnails")) == 2


def test_answered_call_settles_images_that_it_did_not_name(world: World) -> None:
    pat = world.practice.add_patient()
    world.practice.add_document(pat, "bmp", data=b"BM" + bytes(60))
    world.run(hours=4)
    assert len(world.sent("/documents/Thumbnails")) == 1
    assert world.catalog().status_facts(world.clock.now()).thumbnails_due == 0
    world.check()


def test_paper_makes_no_thumbnail_due(world: World) -> None:
    world.practice.add_document(world.practice.add_patient(), "pdf")
    world.run(hours=2)
    assert world.sent("/documents/Thumbnails") == []


def test_thumbnails_unanswered_three_times_are_asked_for_again_in_thirty_days(world: World) -> None:
    pat = world.practice.add_patient()
    world.practice.add_document(pat)
    fault = world.office.faults.add("gateway_timeout", path="/documents/Thumbnails", seconds=60.0, times=None)
    world.run(hours=30)
    assert len(world.sent("/documents/Thumbnails")) == 3
    facts = world.catalog().status_facts(world.clock.now())
    assert (facts.owed, facts.failing, facts.thumbnails_due) == (0, {}, 1)
    world.clock.advance(28 * 86_400)
    world.run(hours=6)
    assert len(world.sent("/documents/Thumbnails")) == 3
    world.office.faults.clear(fault)
    world.clock.advance(2 * 86_400)
    world.run(hours=3)
    assert len(world.sent("/documents/Thumbnails")) == 4
    world.check()


def test_outage_of_an_evening_does_not_keep_thumbnails_away_for_a_month(world: World) -> None:
    world.practice.add_document(world.practice.add_patient())
    fault = world.office.faults.add("gateway_timeout", path="/documents/Thumbnails", seconds=60.0, times=None)
    world.run(hours=12)
    assert len(world.sent("/documents/Thumbnails")) == 2
    world.office.faults.clear(fault)
    world.run(hours=14)
    assert world.catalog().status_facts(world.clock.now()).thumbnails_due == 0
    world.check()


def test_thumbnail_of_a_vanished_image_is_not_due(world: World) -> None:
    pat = world.practice.add_patient()
    doc = world.practice.add_document(pat)
    world.office.faults.add("gateway_timeout", path="/documents/Thumbnails", times=3)
    world.run(hours=3)
    world.practice.delete_document(doc)
    world.run(hours=30)
    assert world.state(pat, "document", doc) == "vanished"
    assert world.catalog().status_facts(world.clock.now()).thumbnails_due == 0


# --- answers that lie about what is known already


def known_sheets(world: World, pat_nums: list[int]) -> None:
    for pat in pat_nums:
        for _ in range(120):
            world.practice.add_sheet(pat)
    world.run(hours=1)
    assert len(known(world, "sheet")) == 120 * len(pat_nums)


def missing(world: World) -> int:
    return int(world.index.value("SELECT count(*) FROM item WHERE missing_since_at IS NOT NULL"))


@pytest.mark.parametrize("fault", ["shifted", "duplicated", "foreign_row", "html", "wrong_shape"])
def test_pages_that_cannot_be_trusted_for_days_make_nothing_missing(lists_only: World, fault: str) -> None:
    known_sheets(lists_only, [lists_only.practice.add_patient()])
    lists_only.office.faults.add(fault, path="/sheets", times=None)  # type: ignore[arg-type] # by name
    lists_only.run(hours=60)
    assert missing(lists_only) == 0
    assert lists_only.log.events("listing_refused")
    lists_only.office.faults.clear()
    lists_only.run(hours=1)
    assert missing(lists_only) == 0


def test_answers_of_two_patients_that_are_swapped_record_and_miss_nothing(lists_only: World) -> None:
    one, other = lists_only.practice.add_patient(), lists_only.practice.add_patient()
    known_sheets(lists_only, [one, other])
    handle, swapped = lists_only.office.handle, {str(one): str(other), str(other): str(one)}

    def crosswise(request: Request) -> Response:
        asked = request.query.get("PatNum", "")
        return handle(replace(request, query={**request.query, **({"PatNum": swapped[asked]} if asked else {})}))

    before = lists_only.index.rows("SELECT pat_num, kind, num, revision FROM item")
    lists_only.office.handle = crosswise  # type: ignore[method-assign] # the office's own mistake
    lists_only.run(hours=60)
    assert lists_only.index.rows("SELECT pat_num, kind, num, revision FROM item") == before
    assert missing(lists_only) == 0


def test_lists_that_are_cut_short_a_day_apart_with_the_truth_between_make_nothing_vanish(world: World) -> None:
    pat = world.practice.add_patient()
    for _ in range(10):
        world.practice.add_sheet(pat)
    world.run(hours=2)
    for _ in range(4):
        fault = world.office.faults.add("truncated", path="/sheets", size=3)
        world.run(until=lambda fault=fault: fault.fired)  # type: ignore[misc] # bound at once
        world.run(hours=26)
    assert world.log.events("item_vanished") == []
    world.check()


def test_lists_that_end_at_different_rows_agree_only_on_what_both_lack(world: World) -> None:
    pat = world.practice.add_patient()
    sheets = [world.practice.add_sheet(pat) for _ in range(8)]
    world.run(hours=2)
    world.office.faults.add("truncated", path="/sheets", size=6, times=None)
    world.run(hours=20)
    world.office.faults.clear()
    world.office.faults.add("truncated", path="/sheets", size=4, times=None)  # two more, 20 hours later
    world.run(hours=8)
    gone = [num for num in sheets if world.state(pat, "sheet", num) == "vanished"]
    assert len(gone) == 2
