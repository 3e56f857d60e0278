"""A week in a practice: everything that staff do to documents, mounts and sheets, and what the mirror makes of it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from syncd import wishes
from syncd.demo.build import Past
from syncd.demo.practice import Practice
from syncd.demo.schema import NEVER
from syncd.model import KINDS, Item
from syncd.search import Filters
from tests.world import World

pytestmark = pytest.mark.slow  # minutes in all: `make quick` leaves it out, `make test` does not

DAY = 24.0
FULL = Past(documents=6, mounts=1.5, sheets=3, raw=0.02, urls=0.02, old_sheets=0.1, odd_names=0.1, deleted=0.0)


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


def sidecars(world: World, pat_num: int, kind: str, num: int) -> list[str]:
    return [name for name in world.files(pat_num, kind, num) if name.endswith(".json")]


# --- the first mirroring


@pytest.mark.parametrize("backfill", [True, False], ids=["backfill", "daemon"])
def test_lanes_mirror_every_kind_of_a_practice(tmp_path: Path, backfill: bool) -> None:
    world = World.start(tmp_path, 4, past=FULL, backfill=backfill, interval=5.0, latency=0.5)
    world.run()
    if not backfill:
        world.run(hours=1)
    world.check()
    assert {row["kind"] for row in world.index.rows("SELECT DISTINCT kind FROM version")} == set(KINDS)


@pytest.mark.parametrize("backfill", [True, False], ids=["backfill", "daemon"])
def test_second_sweep_of_an_unchanged_practice_places_nothing(tmp_path: Path, backfill: bool) -> None:
    world = World.start(tmp_path, 3, past=FULL, backfill=backfill, interval=5.0)
    world.run()
    if not backfill:
        world.run(hours=1)
    world.restart()
    before = len(world.office.arrivals)
    if backfill:
        world.run(hours=1)
    else:
        world.sweep()
    assert world.placements(since=before) == []
    assert len(world.sent("/documents", since=before)) >= 3
    world.check()


def test_backfill_spends_at_most_one_request_in_a_hundred_more_than_the_least(tmp_path: Path) -> None:
    world = World.start(tmp_path, 8, past=Past(documents=5, deleted=0.0), backfill=True, interval=5.0)
    world.run()
    world.check()
    rows = world.index.rows("SELECT rows FROM list")
    kinds = world.index.rows("SELECT kind, count(*) AS items FROM item WHERE pending = 0 GROUP BY kind")
    uploads = world.index.value("SELECT count(*) FROM version WHERE method = 'note'")
    with_mount = sum(1 for row in kinds for _ in range(row["items"]) if row["kind"] == "mount")
    each = sum(row["items"] for row in kinds if row["kind"] in ("document", "mount", "sheet"))
    with_image = world.index.value("SELECT count(DISTINCT pat_num) FROM item WHERE kind = 'thumbnail'")
    least = 1 + sum(row["rows"] // 100 + 1 for row in rows) + each - uploads + with_mount + with_image
    assert len(world.office.arrivals) <= 1.01 * least


def test_backfill_of_chosen_patients_asks_for_no_other(tmp_path: Path) -> None:
    world = World.start(tmp_path, 3, backfill=True, interval=5.0, sync={"patients": [2]})
    world.run()
    assert {arrival.params["PatNum"] for arrival in world.sent("/documents")} == {"2"}
    assert world.index.rows("SELECT pat_num FROM patient") == [{"pat_num": 2}]


def test_unwanted_kinds_are_never_fetched(tmp_path: Path) -> None:
    kinds = {"kinds": ["document", "sheet"]}
    world = World.start(tmp_path, 3, past=FULL, backfill=True, interval=5.0, sync=kinds)
    world.run()
    world.check()
    assert world.sent("/documents/DownloadMount") == world.sent("/documents/Thumbnails") == []
    assert {row["kind"] for row in world.index.rows("SELECT DISTINCT kind FROM version")} == {"document", "sheet"}


def test_names_of_patients_go_into_the_archive_and_nowhere_else(world: World) -> None:
    pat = world.practice.add_patient("Lovelace", "Ada")
    world.practice.add_document(pat)
    world.run()
    written = json.loads((world.archive / f"patients/{pat}/patient.json").read_text())
    assert (written["last_name"], written["first_name"]) == ("Lovelace", "Ada")
    assert "Lovelace" not in json.dumps(world.log.lines)


def test_a_patient_with_an_uploaded_row_only_has_a_name_in_the_archive(world: World) -> None:
    pat = world.practice.add_patient("Lovelace", "Ada")
    world.practice.add_raw_document(pat, b"a letter", ".txt")
    world.run()
    assert json.loads((world.archive / f"patients/{pat}/patient.json").read_text())["last_name"] == "Lovelace"


@pytest.mark.parametrize("away", [False, True])
def test_a_name_that_changed_is_renewed_in_the_archive_of_whoever_is_there(world: World, away: bool) -> None:
    ada, nobody = world.practice.add_patient("Byron", "Ada"), world.practice.add_patient("Byron", "George")
    world.practice.add_document(ada)
    world.run()
    if away:
        world.archive.rename(world.archive.with_name("away"))
        world.run(hours=0.2)
    for pat in (ada, nobody):
        world.practice.update("patient", pat, {"LName": "Lovelace"})
    world.run(hours=2)
    if away:
        world.archive.with_name("away").rename(world.archive)
        world.run(hours=2)
    assert world.index.value("SELECT count(*) FROM patient WHERE last_name = 'Lovelace'") == 2
    assert json.loads((world.archive / f"patients/{ada}/patient.json").read_text())["last_name"] == "Lovelace"
    assert not (world.archive / f"patients/{nobody}").exists()


# --- documents


def test_new_document_is_archived(world: World) -> None:
    pat = world.practice.add_patient()
    world.sweep()
    doc = world.practice.add_document(pat)
    world.sweep()
    world.run(hours=1)
    world.check()
    assert world.state(pat, "document", doc) == "archived"


def test_edit_without_new_bytes_becomes_a_second_sidecar(world: World) -> None:
    pat = world.practice.add_patient()
    doc = world.practice.add_document(pat)
    world.sweep()
    world.clock.advance(3600)
    world.practice.edit_document(doc, Description="moved to another category")
    world.sweep()
    world.check()
    names = sidecars(world, pat, "document", doc)
    assert len(names) == 2
    assert names[0].startswith("1-")
    assert names[0].endswith(".2.json")
    assert len(world.media(pat, "document", doc)) == 1


def test_new_bytes_become_a_second_version_and_the_first_stays(world: World) -> None:
    pat = world.practice.add_patient()
    doc = world.practice.add_document(pat)
    world.sweep()
    first = world.media(pat, "document", doc)
    world.clock.advance(3600)
    world.practice.replace_bytes(doc)
    world.sweep()
    world.run(hours=1)
    world.check()
    assert world.media(pat, "document", doc)[:1] == first
    assert len(world.media(pat, "document", doc)) == 2


def test_bytes_that_return_to_an_older_version_become_a_third(world: World) -> None:
    pat = world.practice.add_patient()
    doc = world.practice.add_document(pat, "txt", data=b"first words\r\n")
    world.sweep()
    for words in (b"second words\r\n", b"first words\r\n"):
        world.clock.advance(3600)
        world.practice.replace_bytes(doc, data=words)
        world.sweep()
    world.check()
    assert world.media(pat, "document", doc) == [b"first words\r\n", b"second words\r\n", b"first words\r\n"]


def test_bytes_changed_without_a_stamp_are_found_after_180_days(world: World) -> None:
    pat = world.practice.add_patient()
    doc = world.practice.add_document(pat)
    world.run(hours=2)
    world.practice.replace_bytes(doc, bump=False)
    pass_days(world, 178)
    assert len(world.media(pat, "document", doc)) == 1
    pass_days(world, 10)
    assert len(world.media(pat, "document", doc)) == 2
    assert world.index.value("SELECT count(*) FROM duty") == 0
    world.check()


def test_second_edit_within_the_stamps_second_is_found_by_a_second_look(world: World) -> None:
    pat = world.practice.add_patient()
    doc = world.practice.add_document(pat)
    world.run(until=world.placements)
    world.practice.replace_bytes(doc, bump=False)
    world.run(seconds=500)
    assert len(world.media(pat, "document", doc)) == 1
    world.run(hours=2)
    assert len(world.media(pat, "document", doc)) == 2
    world.check()


def test_second_look_is_never_owed(world: World) -> None:
    pat = world.practice.add_patient()
    world.practice.add_document(pat)
    world.run(until=lambda: world.index.value("SELECT count(*) FROM version"))
    world.run(seconds=30)
    facts = world.catalog().status_facts(world.clock.now())
    assert (facts.owed, facts.failing) == (0, {})


def test_deleted_document_vanishes_after_a_day_and_keeps_its_file(world: World) -> None:
    pat = world.practice.add_patient()
    doc = world.practice.add_document(pat)
    world.practice.add_document(pat)
    world.run(hours=3)
    world.practice.delete_document(doc)
    deleted_at = world.clock.now()
    world.run(hours=23)
    assert world.state(pat, "document", doc) == "archived"
    world.run(hours=6)
    row = world.item(pat, "document", doc)
    assert row["vanished_at"] - row["missing_since_at"] >= 86_400
    assert row["missing_since_at"] > deleted_at
    assert world.state(pat, "document", doc) == "vanished"
    assert len(world.media(pat, "document", doc)) == 1
    world.check()


def test_document_that_is_still_there_by_number_does_not_vanish(world: World) -> None:
    pat = world.practice.add_patient()
    doc, other = world.practice.add_document(pat), world.practice.add_document(pat)
    world.run(hours=1)
    fault = world.office.faults.add("truncated", path="/documents", size=1, times=None)
    world.run(hours=72)
    assert {world.state(pat, "document", doc), world.state(pat, "document", other)} == {"archived"}
    world.office.faults.clear(fault)
    world.sweep()
    world.check()


def test_document_that_returns_is_current_again(world: World) -> None:
    pat = world.practice.add_patient()
    doc = world.practice.add_document(pat)
    backup = world.practice.snapshot()
    world.run(hours=1)
    world.practice.delete_document(doc)
    world.run(hours=30)
    assert world.state(pat, "document", doc) == "vanished"
    world.practice.restore_from_backup(backup)
    world.run(hours=3)
    assert world.state(pat, "document", doc) == "archived"
    world.check()


def test_document_moved_with_its_number_is_marked_at_once(world: World) -> None:
    here, there = world.practice.add_patient(), world.practice.add_patient()
    doc = world.practice.add_document(here)
    world.run(hours=1)
    world.practice.move_document(doc, there, keep_number=True)
    world.sweep()
    world.run(hours=1)
    world.check()
    assert world.item(here, "document", doc)["became"] == f"{there}/document-{doc}"
    assert world.state(here, "document", doc) == "vanished"
    assert world.media(here, "document", doc) == world.media(there, "document", doc)


def test_document_moved_under_a_new_number_is_fetched_there_and_vanishes_here(world: World) -> None:
    here, there = world.practice.add_patient(), world.practice.add_patient()
    doc = world.practice.add_document(here)
    world.run(hours=1)
    moved = world.practice.move_document(doc, there)
    world.run(hours=30)
    world.check()
    assert world.state(here, "document", doc) == "vanished"
    assert world.state(there, "document", moved) == "archived"


def test_moved_document_is_placed_anew_and_never_copied(world: World) -> None:
    here, there = world.practice.add_patient(), world.practice.add_patient()
    doc = world.practice.add_document(here)
    world.run(hours=1)
    before = len(world.office.arrivals)
    world.practice.move_document(doc, there, keep_number=True)
    world.clock.advance(3600)
    world.sweep()
    assert [arrival.params["DocNum"] for arrival in world.sent("/documents/DownloadSftp", since=before)] == [doc]


def test_merge_files_everything_under_the_other_patient(tmp_path: Path) -> None:
    world = World.start(tmp_path, 2, past=FULL, seed=3, interval=20.0)
    world.practice.add_mount(1, 2)
    world.run(hours=3)
    world.check()
    old = {row["kind"]: row["n"] for row in world.index.rows("SELECT kind, count(*) AS n FROM item GROUP BY kind")}
    source, into = (row["PatNum"] for row in world.practice.rows("SELECT PatNum FROM patient ORDER BY PatNum"))
    world.practice.merge_patients(source, into)
    world.run(hours=6)
    world.check()
    left = world.index.rows("SELECT kind, num, became FROM item WHERE pat_num = ? AND vanished_at IS NULL", source)
    assert {row["kind"] for row in left} <= {"thumbnail"}
    assert old.keys() == set(KINDS)
    moved = world.index.rows("SELECT kind, num, became FROM item WHERE pat_num = ? AND became IS NOT NULL", source)
    assert {row["kind"] for row in moved} >= {"document", "mount", "sheet"}
    assert all(row["became"] == f"{into}/{row['kind']}-{row['num']}" for row in moved)
    assert world.index.rows("SELECT * FROM guard WHERE state = 'held'") == []


# --- uploads


def test_uploaded_row_is_archived_from_its_note_without_a_placement(world: World) -> None:
    pat = world.practice.add_patient()
    doc = world.practice.add_raw_document(pat, b"a letter from another program\r\n", ".txt")
    world.run(hours=2)
    world.check()
    assert world.placements() == []
    assert world.media(pat, "document", doc) == [b"a letter from another program\r\n"]
    kept = (world.archive / f"patients/{pat}/document-{doc}" / sidecars(world, pat, "document", doc)[0]).read_text()
    assert "YSBsZXR0ZXI" not in kept + json.dumps(world.item(pat, "document", doc))


def test_materialised_upload_is_a_new_document_and_the_old_one_vanishes(world: World) -> None:
    pat = world.practice.add_patient()
    doc = world.practice.add_raw_document(pat, b"a letter\r\n", ".txt")
    world.run(hours=2)
    opened = world.practice.materialise(doc)
    world.run(hours=30)
    world.check()
    assert world.state(pat, "document", doc) == "vanished"
    assert world.media(pat, "document", opened) == [b"a letter\r\n"]


def test_linked_upload_is_pending_and_its_address_is_never_followed(world: World) -> None:
    pat = world.practice.add_patient()
    doc = world.practice.add_url_document(pat, "https://files.example.org/scan.jpg")
    world.run(hours=2)
    facts = world.catalog().status_facts(world.clock.now())
    assert (facts.owed, facts.pending_at_source) == (0, 1)
    assert world.state(pat, "document", doc) == "pending_at_source"
    assert world.placements() == []
    assert "example.org/scan" not in json.dumps(world.index.rows("SELECT * FROM item"))
    opened = world.practice.materialise(doc)
    world.run(hours=30)
    world.check()
    assert world.state(pat, "document", doc) == "vanished"
    assert world.state(pat, "document", opened) == "archived"


# --- a row before its file


def test_row_younger_than_three_seconds_is_not_placed_yet(tmp_path: Path) -> None:
    world = World.start(tmp_path, interval=0.2)
    pat = world.practice.add_patient()
    world.run(until=lambda: world.sent("/sheets"), tick=0.1)
    added_at = world.clock.now()
    world.practice.add_document(pat, file_after=2.0)
    world.lanes.api_lane.agenda.named((pat, "documents"), added_at)
    world.run(until=world.placements, tick=0.1)
    assert [arrival.status for arrival in world.placements()] == [201]
    listed = [arrival.at for arrival in world.sent("/documents") if arrival.at < added_at + 3]
    assert listed
    assert world.placements()[0].at - int(added_at) >= 3.0
    world.run(hours=0.5)
    world.check()


def test_row_whose_file_comes_late_is_tried_again(world: World) -> None:
    pat = world.practice.add_patient()
    doc = world.practice.add_document(pat, file_after=3000.0)
    world.run(hours=8)
    world.check()
    assert world.state(pat, "document", doc) == "archived"
    assert len(world.sent("/documents/DownloadSftp")) > 1


@pytest.mark.parametrize("stamp", ["2031-01-01 00:00:00", "yesterday", "0001-01-01 00:00:00", ""])
def test_future_and_unreadable_stamps_are_placed_at_once(world: World, stamp: str) -> None:
    pat = world.practice.add_patient()
    doc = world.practice.add_document(pat)
    world.practice.db.execute("UPDATE document SET DateTStamp = ? WHERE DocNum = ?", (stamp, doc))
    world.sweep()
    world.check()
    assert len(world.placements()) == len(world.sent("/documents/DownloadSftp", DocNum=doc)) + 1


# --- all of it together


def staff(practice: Practice, rng: random.Random) -> None:
    """One thing that somebody in the office does."""
    patients = [row["PatNum"] for row in practice.rows("SELECT PatNum FROM patient WHERE PatStatus = 0")]
    pat, other = rng.sample(patients, 2)
    documents = practice.rows("SELECT DocNum FROM document WHERE PatNum = ? AND MountItemNum = 0 AND Note = ''", pat)
    uploads = practice.rows("SELECT DocNum FROM document WHERE Note LIKE '\\_%' ESCAPE '\\'")
    mounts = practice.rows("SELECT MountNum FROM mount WHERE PatNum = ?", pat)
    sheets = practice.rows("SELECT SheetNum FROM sheet WHERE PatNum = ? AND IsDeleted = 0", pat)
    doc, mount = (int(next(iter(rng.choice(rows).values()))) if rows else 0 for rows in (documents, mounts))
    images = practice.mount_images(mount) if mount else []
    actions: list[tuple[object, Callable[[], object]]] = [
        (True, lambda: practice.add_document(pat, rng.choice(("jpg", "png", "pdf", "txt")))),
        (True, lambda: practice.add_sheet(pat)),
        (True, lambda: practice.add_raw_document(pat, rng.randbytes(40), ".txt")),
        (len(mounts) < 2, lambda: practice.add_mount(pat, rng.randint(1, 4))),
        (doc, lambda: practice.edit_document(doc)),
        (doc, lambda: practice.replace_bytes(doc)),
        (doc, lambda: practice.delete_document(doc)),
        (doc, lambda: practice.move_document(doc, other, keep_number=rng.random() < 0.5)),
        (doc and mount, lambda: practice.move_into_mount(doc, mount)),
        (mount, lambda: practice.change_mount(mount)),
        (mount and rng.random() < 0.3, lambda: practice.delete_mount(mount)),
        (len(images) > 1, lambda: practice.out_of_mount(images[-1]["DocNum"])),
        (len(images) > 1, lambda: practice.replace_bytes(images[0]["DocNum"])),
        (sheets, lambda: practice.edit_sheet(sheets[0]["SheetNum"])),
        (sheets, lambda: practice.delete_sheet(sheets[-1]["SheetNum"])),
        (uploads, lambda: practice.materialise(uploads[0]["DocNum"])),
        (len(patients) > 3 and rng.random() < 0.2, lambda: practice.merge_patients(pat, other)),
    ]
    rng.choice([action for possible, action in actions if possible])()


@pytest.mark.parametrize("seed", [1, 2])
def test_a_busy_week_is_mirrored(tmp_path: Path, seed: int) -> None:
    world = World.start(tmp_path, 5, past=Past(documents=2, mounts=0), seed=seed, interval=120.0, nap=1800.0)
    rng = random.Random(seed)
    for hour in range(60):
        staff(world.practice, rng)
        world.run(hours=2 * rng.random())
        if hour % 12 == 0:
            world.check_safe()
    for _ in range(10):
        for row in world.index.rows("SELECT id FROM guard WHERE state = 'held'"):  # so much is moved here in a day
            wishes.make(world.index, "approve", f"guard-{row['id']}", world.clock.now())
        pass_days(world, 1.2)
    world.check()
    assert world.catalog().status_facts(world.clock.now()).owed == 0


def test_catalogue_agrees_with_the_practice(tmp_path: Path) -> None:
    world = World.start(tmp_path, 3, past=FULL, interval=5.0)
    world.run(hours=2)
    world.check()
    found = {(row["pat_num"], row["kind"], row["num"]): row for row in world.catalog().find(Filters())}
    truth = world.practice.truth()
    archived = {key for key, row in found.items() if row["state"] == "archived"}
    assert archived == {
        (pat_num, kind, num)
        for pat_num, patient in truth.items()
        for kind, numbers in (
            ("document", patient.documents),
            ("mount", patient.mounts),
            ("mount-image", patient.mount_images),
            ("sheet", patient.sheets),
            ("thumbnail", patient.thumbnails),
        )
        for num in numbers
    }
    for pat_num, patient in truth.items():
        for num, content in patient.documents.items():
            row = found[pat_num, "document", num]
            assert (row["bytes"], row["revision"]) == (len(content), patient.stamps[num])
            assert (world.archive / row["path"]).read_bytes() == content
        for num, (mount_num, _) in patient.mount_images.items():
            assert found[pat_num, "mount-image", num]["mount_num"] == mount_num
        for num, sheet in patient.sheets.items():
            assert sheet.stamp in (found[pat_num, "sheet", num]["revision"], NEVER)


def test_versions_are_numbered_by_a_sequence_that_rises_and_never_repeats(tmp_path: Path) -> None:
    world = World.start(tmp_path, 2, past=FULL, interval=5.0)
    world.run(hours=2)
    rows = world.index.rows("SELECT seq, archived_at FROM version ORDER BY seq")
    assert [row["archived_at"] for row in rows] == sorted(row["archived_at"] for row in rows)
    in_sidecars = [json.loads(path.read_text())["seq"] for path in world.archive.glob("patients/*/*/*.json")]
    assert sorted(in_sidecars) == [row["seq"] for row in rows]


def test_history_of_an_item_tells_what_happened(world: World) -> None:
    pat = world.practice.add_patient()
    doc = world.practice.add_document(pat)
    world.run(hours=2)
    world.practice.replace_bytes(doc)
    world.run(hours=3)
    world.practice.edit_document(doc)
    world.run(hours=3)
    world.practice.delete_document(doc)
    world.run(hours=30)
    events = [row["event"] for row in world.catalog().history(Item(pat, "document", doc))]
    assert events == ["first_seen", "archived", "archived", "revised", "missing", "vanished"]
