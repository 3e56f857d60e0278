"""`put-back`: an archived document goes back into Open Dental, once, with all that can be told of it; nothing else
ever writes there.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from syncd import copies, scrub, upload, wishes
from syncd.archive import Archive
from syncd.errors import UsageError
from syncd.index import Index
from syncd.model import Item
from syncd.schema import Row
from syncd.scrub import reindex
from tests.small import DAY, Small, small
from tests.world import START, World

UPLOAD = "/documents/UploadSftp"
FIELDS: Row = {
    "Description": "Left bitewing",
    "DateCreated": "2025-11-05 08:16:46",
    "DocCategory": 190,
    "ToothNumbers": "14,15,16",
    "ProvNum": 2,
    "PrintHeading": 1,
}


class Gone:
    """A practice that deleted a document which the mirror has."""

    def __init__(self, folder: Path, *, allow: bool = True, prefixed: str = "mounts") -> None:
        self.one: Small = small()
        self.office = self.one.practice
        with self.office.as_of(START - 40 * DAY):
            self.num = self.office.add_document(self.one.patient, "jpg", ImgType=2, **FIELDS)
        api = {"allow_upload": allow}
        self.world = World.start(folder, practice=self.office, api=api, sync={"vanish_after": "1h"}, interval=60.0)
        self.world.office.list_names, self.world.office.prefixed = True, prefixed
        self.world.run()
        self.item = Item(self.one.patient, "document", self.num)
        (self.bytes,) = self.world.media(self.one.patient, "document", self.num)

    def order(self) -> None:
        planned = upload.plan(self.world.catalog(), Archive(self.world.archive, 0), self.item)
        argument = [self.item.pat_num, self.item.kind, self.item.num, planned["seq"]]
        wishes.make(self.world.index, "put-back", argument, self.world.clock.now(), "uid-1")

    @property
    def row(self) -> Row:
        found = upload.latest(self.world.index, self.item)
        assert found is not None
        return found

    def put_back(self) -> Row:
        self.order()
        self.world.run(until=lambda: upload.ended(self.world.index, self.item, clean=True))
        return self.row


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """An unanswered upload is given up within minutes, not after a day."""
    monkeypatch.setattr(upload, "LOOKS", (60.0, 300.0))


@pytest.fixture
def gone(tmp_path: Path) -> Iterator[Gone]:
    made = Gone(tmp_path)
    made.office.delete_document(made.num)
    yield made
    made.world.stop()


@pytest.mark.parametrize("prefixed", ["mounts", "all"])
def test_a_deleted_document_is_back_with_all_its_fields_and_its_bytes(tmp_path: Path, prefixed: str) -> None:
    gone = Gone(tmp_path, prefixed=prefixed)
    gone.office.delete_document(gone.num)
    row = gone.put_back()
    assert (row["state"], row["outcome"]) == ("done", f"it is 1/document-{row['became']} now")
    there = gone.office.need("document", row["became"])
    assert {name: there[name] for name in FIELDS} == FIELDS
    assert (there["ImgType"], there["PatNum"]) == (2, gone.one.patient)
    spec = gone.office.spec(row["became"])
    assert spec is not None
    assert spec.render() == gone.bytes
    gone.world.check_drop()
    assert len(gone.world.sent(UPLOAD)) == 1
    with pytest.raises(UsageError, match=f"is in Open Dental as 1/document-{row['became']}"):
        gone.order()
    gone.world.stop()


def test_the_new_number_is_mirrored_as_the_same_lineage(gone: Gone) -> None:
    became = Item(gone.one.patient, "document", gone.put_back()["became"])
    gone.world.run(hours=3)
    assert gone.world.media(became.pat_num, "document", became.num) == [gone.bytes]
    old = gone.world.item(gone.item.pat_num, "document", gone.num)
    assert (old["vanished_at"] is not None, old["became"]) == (True, became.full_id)
    for item, other in ((gone.item, became), (became, gone.item)):
        events = gone.world.catalog().history(item)
        assert {event.get("item") for event in events} == {None, other.full_id}
        assert [event["became"] for event in events if event["event"] == "put_back"] == [became.full_id]
    told = [facts for facts in gone.world.audit_facts() if facts["verb"].startswith("put_back")]
    assert [(facts["verb"], facts["item"]) for facts in told] == [
        ("put_back", gone.item.full_id),
        ("put_back_ended", gone.item.full_id),
    ]
    assert told[1]["became"] == became.full_id
    gone.world.check_audit()


def test_an_index_made_of_the_archive_alone_knows_the_lineage(gone: Gone) -> None:
    became = Item(gone.one.patient, "document", gone.put_back()["became"])
    gone.world.run(hours=2)
    gone.world.stop()
    for copy in (gone.world.settings.state_path / "copies").glob("*"):
        copy.unlink()
    reindex(gone.world.settings, Archive(gone.world.archive, 0), gone.world.clock.now())
    gone.world.restart()
    assert gone.world.item(gone.item.pat_num, "document", gone.num)["became"] == became.full_id
    assert {e.get("item") for e in gone.world.catalog().history(became)} == {None, gone.item.full_id}


def test_it_is_refused_while_the_practice_has_the_document(tmp_path: Path) -> None:
    held = Gone(tmp_path)
    row = held.put_back()
    assert (row["state"], row["outcome"]) == ("refused", f"Open Dental has it, of patient-{held.one.patient}")
    assert not held.world.sent(UPLOAD)
    assert not any("UploadSftp" in arrival.path for arrival in held.world.office.arrivals)
    held.world.check_drop()
    held.world.stop()


def test_an_older_office_is_believed_by_its_listing(tmp_path: Path) -> None:
    held = Gone(tmp_path)
    held.world.office.faults.add("status", path=f"/documents/{held.num}", status=400, text="is not a valid method")
    row = held.put_back()
    assert (row["state"], row["outcome"]) == ("refused", "Open Dental lists it")
    held.world.stop()


def test_nothing_is_sent_where_the_configuration_does_not_allow_it(tmp_path: Path) -> None:
    gone = Gone(tmp_path, allow=False)
    gone.office.delete_document(gone.num)
    row = gone.put_back()
    assert (row["state"], row["outcome"]) == ("refused", upload.NOT_ALLOWED)
    assert not gone.world.sent(UPLOAD)
    gone.world.stop()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.usefixtures("soon")
def test_an_upload_without_an_answer_is_never_sent_twice(gone: Gone, when: str) -> None:
    gone.world.office.faults.add("gateway_timeout", path=UPLOAD, when=when, seconds=60.0)
    row = gone.put_back()
    assert len(gone.world.sent(UPLOAD)) == 1
    assert (row["state"], row["outcome"] == upload.LOST) == (("done", False) if when == "after" else ("lost", True))
    made = gone.office.rows("SELECT DocNum FROM document WHERE Description = 'Left bitewing'")
    assert [each["DocNum"] for each in made] == ([row["became"]] if when == "after" else [])
    gone.world.check_drop()
    if when == "after":
        assert upload.flags_of(gone.world.index, Item(gone.one.patient, "document", row["became"]))


@pytest.mark.parametrize("how", ["reindex", "backup"])
@pytest.mark.parametrize("state", ["waiting", "wanted"])
def test_an_order_in_an_older_index_is_never_sent_a_second_time(gone: Gone, how: str, state: str) -> None:
    world = gone.world
    gone.order()
    if state == "wanted":
        wishes.grant_all(world.index, world.log, world.clock.now())
    copies.make(world.index, world.settings.state_path / "copies", "2026-03-10")
    world.run(until=lambda: upload.ended(world.index, gone.item, clean=True))
    became = gone.row["became"]
    world.run(hours=3)
    world.stop()
    (world.settings.state_path / "index.db").unlink()
    if how == "reindex":
        reindex(world.settings, Archive(world.archive, 0), world.clock.now())
    else:
        (copy,) = copies.found(world.settings.state_path / "copies")
        shutil.copy(copy, world.settings.state_path / "index.db")
    world.restart()
    world.run(hours=3)
    ended = [("lost", None, scrub.PERHAPS_SENT)] if state == "wanted" else []
    told = world.index.rows("SELECT state, became, outcome FROM put_back ORDER BY id")
    assert [tuple(row.values()) for row in told] == [*ended, ("done", became, None)]
    assert len(world.sent(UPLOAD)) == 1
    world.check_audit()


def test_nothing_is_sent_before_the_archive_shows_how_old_the_index_is(gone: Gone) -> None:
    world = gone.world
    gone.order()
    world.run(until=lambda: gone.row["state"] == "staged" if upload.latest(world.index, gone.item) else None)
    world.stop()
    world.archive.rename(world.archive.with_name("away"))
    world.restart()
    world.run(hours=1)
    assert (gone.row["state"], world.sent(UPLOAD)) == ("staged", [])
    world.archive.with_name("away").rename(world.archive)
    world.run(until=lambda: upload.ended(world.index, gone.item, clean=True))
    assert (gone.row["state"], len(world.sent(UPLOAD))) == ("done", 1)


@pytest.mark.usefixtures("soon")
def test_a_crash_while_it_is_sent_does_not_send_it_twice(gone: Gone) -> None:
    gone.order()
    gone.world.run(until=lambda: gone.row["state"] == "staged" if upload.latest(gone.world.index, gone.item) else None)
    gone.world.index.run("UPDATE put_back SET state = 'asked'")
    gone.world.restart()
    gone.world.run(until=lambda: upload.ended(gone.world.index, gone.item))
    assert (gone.row["state"], gone.world.sent(UPLOAD)) == ("lost", [])


def test_a_site_that_syncd_may_not_write_to_is_told(gone: Gone) -> None:
    gone.world.drop.refusing = True
    row = gone.put_back()
    assert (row["state"], "does not let syncd write" in row["outcome"]) == ("refused", True)


@pytest.mark.parametrize("request_of", ["its number", "its list", "the upload"])
def test_a_put_back_that_fails_keeps_nothing_else_waiting_and_goes_on(gone: Gone, request_of: str) -> None:
    one, faults = gone.one, gone.world.office.faults
    match request_of:
        case "its number":
            fault = faults.add("status", path=f"/documents/{gone.num}", status=500, times=None)
        case "its list":
            params = {"PatNum": one.patient}
            fault = faults.add("status", path="/documents", params=params, status=500, times=None)
        case _:  # as a gateway answers: it was not sent
            fault = faults.add("status", path=UPLOAD, status=404, text="<html>", times=None)
    gone.order()
    gone.world.run(hours=0.5)
    with one.practice.as_of(gone.world.clock.now() - 600.0):
        new = one.practice.add_document(one.other)
    gone.world.run(hours=20)
    assert gone.world.media(one.other, "document", new)
    assert gone.row["state"] in ("wanted", "staged")
    most = {"its number": 7 + 7, "its list": 20 * 4 + 7}  # which the mirror itself asks for, too
    assert 3 <= fault.fired <= most.get(request_of, 7)
    faults.clear()
    wishes.make(gone.world.index, "retry", [], gone.world.clock.now())
    gone.world.run(hours=1)
    assert gone.row["state"] == "done"
    assert len(gone.world.sent(UPLOAD)) == 1 + (fault.fired if request_of == "the upload" else 0)


def test_an_office_that_refuses_the_upload_is_told_and_not_asked_again(gone: Gone) -> None:
    gone.world.office.faults.add("status", path=UPLOAD, status=400, text="DocCategory is invalid")
    row = gone.put_back()
    gone.world.run(hours=2)
    assert (row["state"], len(gone.world.sent(UPLOAD))) == ("refused", 1)


@pytest.mark.parametrize("kind", ["mount", "mount-image", "sheet", "thumbnail"])
def test_other_kinds_are_refused_with_the_reason(gone: Gone, kind: str) -> None:
    (row, *_) = gone.world.index.rows("SELECT * FROM item WHERE kind = ? AND current_seq IS NOT NULL", kind)
    with pytest.raises(UsageError, match=upload.WHY_NOT[kind][:20]):
        upload.plan(gone.world.catalog(), Archive(gone.world.archive, 0), Item(row["pat_num"], row["kind"], row["num"]))


@pytest.mark.parametrize(
    ("sql", "says"),
    [
        ("UPDATE patient SET left_at = 7", "not in Open Dental any more"),
        ("UPDATE item SET became = '2/document-2' WHERE num = ?", "is in Open Dental as 2/document-2"),
        ("DELETE FROM version WHERE num = ?", "has no archived file"),
    ],
)
def test_what_cannot_be_put_back_is_refused_before_a_request(gone: Gone, sql: str, says: str) -> None:
    gone.world.index.run(sql, *[gone.num] * sql.count("?"))
    with pytest.raises(UsageError, match=says):
        upload.plan(gone.world.catalog(), Archive(gone.world.archive, 0), gone.item)


def test_a_merged_patient_gets_nothing_back(gone: Gone) -> None:
    gone.world.run(hours=3)
    gone.office.merge_patients(gone.one.patient, gone.one.other)
    gone.world.run(hours=3)
    with pytest.raises(UsageError, match="merged"):
        upload.plan(gone.world.catalog(), Archive(gone.world.archive, 0), gone.item)


def test_what_is_not_known_is_named(gone: Gone) -> None:
    gone.world.index.run("UPDATE item SET fields = json_remove(fields, '$.ImgType')")
    sidecars = list((gone.world.archive / f"patients/{gone.one.patient}/{gone.item.id}").glob("*.json"))
    for path in sidecars:  # its own listing is gone, too: the index's counts
        path.chmod(0o600)
        path.write_text("rotten")
    planned = upload.plan(gone.world.catalog(), Archive(gone.world.archive, 0), gone.item)
    assert planned["unknown"] == ["ImgType"]
    assert planned["fields"] == FIELDS | {"PrintHeading": "true"}


@pytest.mark.parametrize("allow", [True, False])
def test_the_mirror_itself_never_calls_a_method_that_writes(tmp_path: Path, allow: bool) -> None:
    mirror = Gone(tmp_path, allow=allow)
    mirror.office.delete_document(mirror.num)
    mirror.office.add_document(mirror.one.patient)
    mirror.office.edit_sheet(mirror.one.sheet)
    mirror.world.run(hours=2)
    methods = {(arrival.method, arrival.path) for arrival in mirror.world.office.arrivals}
    writing = {(m, p) for m, p in methods if m not in ("GET", "POST") or p.endswith(("Upload", UPLOAD, "SetByUrl"))}
    assert writing <= {("PUT", "/queries/ShortQuery")}
    assert ("POST", "/documents/DownloadSftp") in methods
    mirror.world.stop()


def test_texts_stay_in_the_index_only_while_they_are_needed(gone: Gone) -> None:
    gone.put_back()
    index: Index = gone.world.index
    assert json.loads(index.value("SELECT fields FROM put_back")) == {}
    assert "bitewing" not in str(index.rows("SELECT argument, outcome FROM wish"))
