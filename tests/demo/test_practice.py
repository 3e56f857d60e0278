import pytest

from syncd.demo.clock import SimulatedClock
from syncd.demo.files import identity, practice_of
from syncd.demo.practice import Practice
from tests.demo.conftest import Desk


def stamp(practice: Practice, doc_num: int) -> str:
    return str(practice.need("document", doc_num)["DateTStamp"])


def test_stamps_are_office_local_time_in_whole_seconds(desk: Desk) -> None:
    desk.clock.advance(0.9)
    doc = desk.practice.add_document(1)
    assert stamp(desk.practice, doc) == "2025-05-20 12:00:00"


def test_an_autumn_hour_happens_twice() -> None:
    clock = SimulatedClock(1_762_063_200.0)
    practice = Practice(clock)
    practice.add_patient()
    first = practice.add_document(1)
    clock.advance(3_600)
    second = practice.add_document(1)
    assert stamp(practice, first) == stamp(practice, second) == "2025-11-02 01:00:00"


def test_the_stamp_moves_only_if_a_column_really_changes(desk: Desk) -> None:
    doc = desk.practice.add_document(1, description="Pano")
    before = stamp(desk.practice, doc)
    desk.clock.advance(5)
    desk.practice.edit_document(doc, Description="Pano")
    assert stamp(desk.practice, doc) == before
    desk.practice.edit_document(doc, Description="Panoramic")
    assert stamp(desk.practice, doc) != before


def test_an_edit_leaves_the_bytes_and_a_quiet_replacement_leaves_the_stamp(desk: Desk) -> None:
    practice, doc = desk.practice, desk.practice.add_document(1)
    old_bytes, old_stamp = practice.truth()[1].documents[doc], stamp(practice, doc)
    desk.clock.advance(5)
    practice.replace_bytes(doc, bump=False)
    assert practice.truth()[1].documents[doc] != old_bytes
    assert stamp(practice, doc) == old_stamp
    new_bytes = practice.truth()[1].documents[doc]
    practice.edit_document(doc)
    assert practice.truth()[1].documents[doc] == new_bytes
    assert stamp(practice, doc) != old_stamp


def test_mounts_have_no_stamp(desk: Desk) -> None:
    mount = desk.practice.add_mount(1)
    row = next(row for row in desk.listed(1) if row["MountNum"] == mount)
    assert row["DateTStamp"] == row["filePath"] == row["PrintHeading"] == ""


def test_a_deleted_mount_takes_its_images_along(desk: Desk) -> None:
    mount = desk.practice.add_mount(1)
    desk.practice.delete_mount(mount)
    assert not desk.practice.truth()[1].mounts
    assert not desk.practice.truth()[1].mount_images
    assert desk.listed(1) == []


def test_numbers_of_documents_mounts_and_sheets_overlap(desk: Desk) -> None:
    practice = desk.practice
    assert practice.add_document(1) == practice.add_mount(1, images=0) == practice.add_sheet(1) == 1


def test_a_composite_changes_with_its_fields_and_its_images(desk: Desk) -> None:
    practice, mount = desk.practice, desk.practice.add_mount(1)
    seen = {practice.composite(mount).render()}
    practice.change_mount(mount)
    seen.add(practice.composite(mount).render())
    practice.replace_bytes(practice.mount_images(mount)[0]["DocNum"])
    seen.add(practice.composite(mount).render())
    assert len(seen) == 3
    assert practice.composite(mount).render() in seen


def test_a_moved_document_has_a_new_number_there_and_none_here(desk: Desk) -> None:
    practice, doc = desk.practice, desk.practice.add_document(1)
    content = practice.truth()[1].documents[doc]
    moved = practice.move_document(doc, 2)
    assert moved != doc
    assert not practice.truth()[1].documents
    assert practice.truth()[2].documents == {moved: content}


def test_a_merge_keeps_document_numbers_and_archives_the_source(desk: Desk) -> None:
    practice = desk.practice
    doc, mount, sheet = practice.add_document(1), practice.add_mount(1), practice.add_sheet(1)
    practice.add_document(2, file_name="same.jpg")
    practice.merge_patients(1, 2)
    truth = practice.truth()
    assert not truth[1].documents
    assert doc in truth[2].documents
    assert mount in truth[2].mounts
    assert sheet in truth[2].sheets
    assert desk.get("/patients/Simple", PatStatus="Archived")[0]["PatNum"] == 1


def test_an_image_that_goes_into_a_mount_leaves_the_listing_but_still_answers(desk: Desk) -> None:
    practice, doc, mount = desk.practice, desk.practice.add_document(1), desk.practice.add_mount(1, images=0)
    practice.move_into_mount(doc, mount)
    assert [row["MountNum"] for row in desk.listed(1)] == [mount]
    assert desk.ask("GET", f"/documents/{doc}").status == 200
    practice.out_of_mount(doc)
    assert doc in [row["DocNum"] for row in desk.listed(1)]


def test_deleted_sheets_are_flagged_and_leave_the_list(desk: Desk) -> None:
    sheet = desk.practice.add_sheet(1)
    desk.practice.delete_sheet(sheet)
    assert desk.get("/sheets", PatNum=1) == []
    assert desk.practice.need("sheet", sheet)["IsDeleted"] == 1


def test_opening_an_uploaded_row_makes_a_new_number(desk: Desk) -> None:
    practice = desk.practice
    raw = practice.add_raw_document(1, b"letter", ".txt")
    linked = practice.add_url_document(1, "https://example.org/x.jpg")
    assert practice.truth()[1].documents == {raw: b"letter"}
    assert practice.truth()[1].pending == {linked}
    opened = [practice.materialise(raw), practice.materialise(linked)]
    assert set(practice.truth()[1].documents) == set(opened)
    assert practice.truth()[1].documents[opened[0]] == b"letter"
    assert not practice.truth()[1].pending


def test_after_a_restore_numbers_are_given_again(desk: Desk) -> None:
    practice, kept = desk.practice, desk.practice.add_document(1)
    backup = practice.snapshot()
    lost = practice.add_document(1)
    practice.restore_from_backup(backup)
    assert set(practice.truth()[1].documents) == {kept}
    assert practice.add_document(2) == lost


def test_the_history_holds_every_version_of_every_file(desk: Desk) -> None:
    practice, doc = desk.practice, desk.practice.add_document(1)
    practice.replace_bytes(doc)
    practice.delete_document(doc)
    events = [event for event in practice.history if event.kind == "document"]
    assert [event.what for event in events] == ["appeared", "changed", "gone"]
    assert len({event.bytes for event in events}) == 2


@pytest.mark.parametrize("extension", ["jpg", "png", "gif", "tif", "pdf", "txt", "dcm"])
def test_every_file_says_whose_it_is(desk: Desk, extension: str) -> None:
    practice, doc = desk.practice, desk.practice.add_document(2, extension)
    content = practice.truth()[2].documents[doc]
    assert identity(content) == (2, "document", doc, "1")
    assert practice_of(content) == practice.name
    assert 400 < len(content) < 35_000


def test_a_sheet_is_rendered_anew_at_each_call_and_keeps_its_identity(desk: Desk) -> None:
    practice, sheet = desk.practice, desk.practice.add_sheet(1)
    first, second = practice.render_sheet(sheet), practice.render_sheet(sheet)
    assert first != second
    assert practice.truth()[1].sheets[sheet].identity in first
    assert identity(first) == identity(second)


def test_files_in_the_database_have_no_path() -> None:
    practice = Practice(SimulatedClock(0.0), in_database=True)
    practice.add_patient()
    assert practice.file_path(practice.need("document", practice.add_document(1))) == ""
