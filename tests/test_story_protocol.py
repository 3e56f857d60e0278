"""The rules of placing and pulling that only show when two things happen at once (design.md section 7)."""

from __future__ import annotations

from pathlib import Path

import pytest

from syncd import wishes
from syncd.demo.site import DropFile
from syncd.errors import SiteError, SyncdError, TransientError, UnansweredError
from syncd.index import Index
from syncd.model import Item
from tests.small import HOUR, LEAST, Small, backfilling, serving, settle, small, troubles, versions
from tests.world import World

JPEG_OF_SOMEBODY = b"\xff\xd8\xff\xe0" + bytes(300) + b"\xff\xd9"  # properly ended, and nobody's document


def test_short_list_that_names_a_row_twice_records_nothing(tmp_path: Path) -> None:
    one = small()
    world = serving(tmp_path, one)
    world.office.faults.add("duplicated", path="/documents", params={"PatNum": one.other}, times=None)
    world.run(seconds=900)
    assert not world.has(one.other, "document", one.letter)
    world.office.faults.clear()
    world.run(hours=1)
    assert world.has(one.other, "document", one.letter)


def test_without_a_pace_on_disk_nothing_is_sent(tmp_path: Path) -> None:
    world = serving(tmp_path, small())
    pace = world.settings.state_path / "pace"
    pace.mkdir()
    world.run(hours=1)
    assert world.office.arrivals == []
    assert world.index.value("SELECT reason FROM site") == "disk_error"
    pace.rmdir()
    world.run(hours=3)
    world.check()


def test_bug_in_taking_an_answer_is_told_and_the_answer_is_not_kept_for_ever(tmp_path: Path) -> None:
    class BuggyStep:
        bulk, failures = False, list[SyncdError]()

        def ask(self) -> object:
            return None

        def take(self, answer: object, now: float) -> None:
            raise RuntimeError("a bug")

        def failed(self, error: SyncdError, now: float) -> None:
            self.failures.append(error)

        def abandon(self) -> None:
            pass

    world, step = serving(tmp_path, small()), BuggyStep()
    with pytest.raises(RuntimeError):
        world.lanes.api_lane._record(step, "an answer", world.clock.now())
    assert [type(error) for error in step.failures] == [UnansweredError]
    world.run(hours=3)
    world.check()


def test_nothing_that_the_list_lacks_meanwhile_is_placed_however_much_is_owed(tmp_path: Path) -> None:
    one = small(documents=70)
    world = World.start(tmp_path, practice=one.practice, interval=1.0)
    world.site.down = True
    world.run(hours=1)
    assert world.index.value("SELECT count(*) FROM duty WHERE pat_num = ?", one.patient) > 70
    world.office.faults.add("empty", path="/documents", params={"PatNum": one.patient}, times=None)
    world.run(seconds=900)
    world.site.down = False
    world.run(hours=1)
    placed = {arrival.params.get("DocNum") for arrival in world.placements()}
    assert placed == {one.letter, None}  # None: a sheet
    world.office.faults.clear()
    world.run(hours=6)
    world.check()


def test_no_two_placements_share_a_name(tmp_path: Path) -> None:
    world = backfilling(tmp_path, small(documents=5))
    world.drop.broken = TransientError("drop_unreachable")  # nothing is cleaned meanwhile
    world.run(hours=1)
    world.drop.broken = None
    settle(world)
    names = [str(arrival.params["SftpAddress"]) for arrival in world.placements()]
    assert len(set(names)) == len(names) >= LEAST + 5


def test_unanswered_placement_is_tried_again_after_five_minutes_at_the_earliest(tmp_path: Path) -> None:
    one = small()
    world = backfilling(tmp_path, one)
    world.office.faults.add("gateway_timeout", when="before", **one.request("document"))
    settle(world)
    first, second = world.sent("/documents/DownloadSftp", DocNum=one.document)
    assert second.at - first.at >= 300.0


@pytest.mark.parametrize("crash", [False, True], ids=["504", "crash"])
def test_five_minutes_begin_when_a_placement_is_sent_not_when_it_was_prepared(tmp_path: Path, crash: bool) -> None:
    one = small()
    world = backfilling(tmp_path, one)
    world.office.faults.add("too_many", seconds=1800.0, **one.request("document"))
    world.office.faults.add("gateway_timeout", when="before", skip=1, **one.request("document"))
    world.run(until=lambda: len(world.sent("/documents/DownloadSftp", DocNum=one.document)) == 2, tick=1.0)
    if crash:  # before the answer was recorded
        world.index.run("UPDATE attempt SET state = 'asked' WHERE num = ?", one.document)
        world.restart(since=world.scope.since)
    settle(world)
    _, unanswered, again = world.sent("/documents/DownloadSftp", DocNum=one.document)
    assert again.at - unanswered.at >= 300.0


def test_cut_while_an_unanswered_file_is_pulled_is_no_reason_to_place_it_anew(tmp_path: Path) -> None:
    one = small()
    world = backfilling(tmp_path, one)
    world.office.faults.add("gateway_timeout", when="after", **one.request("document"))
    world.run(until=lambda: world.index.value("SELECT seen_size FROM attempt WHERE state = 'unanswered'"))
    world.drop.bad = frozenset([one.practice.truth()[one.patient].documents[one.document]])
    world.run(until=lambda: world.index.value("SELECT looks FROM attempt WHERE state = 'unanswered' AND looks > 1"))
    world.drop.bad = frozenset()
    settle(world)
    assert len(world.sent("/documents/DownloadSftp", DocNum=one.document)) == 1


def test_unanswered_file_that_changed_between_two_looks_is_never_used(tmp_path: Path) -> None:
    one = small()
    world = backfilling(tmp_path, one)
    world.office.faults.add("gateway_timeout", when="after", **one.request("document"))
    world.run(until=lambda: world.index.value("SELECT seen_size FROM attempt WHERE state = 'unanswered'"))
    name = str(world.sent(DocNum=one.document)[0].params["SftpAddress"]).partition("/")[2]
    world.site.files[name] = DropFile(JPEG_OF_SOMEBODY, world.clock.now() + 10)
    settle(world)
    assert len(world.sent("/documents/DownloadSftp", DocNum=one.document)) == 2
    assert world.media(one.patient, "document", one.document) == [
        one.practice.truth()[one.patient].documents[one.document]
    ]


def test_revision_recorded_is_the_one_seen_before_placing(tmp_path: Path) -> None:
    one = small()
    world = World.start(tmp_path, practice=one.practice, interval=1.0)
    world.office.faults.add("late_file", seconds=20.0, **one.request("document"))  # placed, and not pulled yet
    world.run(until=lambda: world.sent("/documents/DownloadSftp", DocNum=one.document), tick=0.5)
    before = world.item(one.patient, "document", one.document)["revision"]
    one.practice.replace_bytes(one.document)
    world.lanes.api_lane.agenda.named((one.patient, "documents"), world.clock.now())
    world.run(seconds=16, tick=0.5)
    assert world.item(one.patient, "document", one.document)["revision"] != before
    assert not world.media(one.patient, "document", one.document)
    world.run(hours=1)
    world.check()
    versions_of_it = world.catalog().versions(Item(one.patient, "document", one.document))
    assert versions_of_it[0].revision == before
    assert versions_of_it[-1].revision == world.item(one.patient, "document", one.document)["revision"] != before


def test_list_whose_upload_could_not_be_archived_does_not_count_as_polled(tmp_path: Path) -> None:
    one = small()
    upload = one.practice.add_raw_document(one.patient, b"a scan from the phone", ".txt")
    world = backfilling(tmp_path, one)
    world.run(until=lambda: world.sent("/patients/Simple"))
    aside = world.archive.rename(tmp_path / "unmounted")
    world.run(seconds=30)
    assert world.sent("/documents", PatNum=one.patient)
    assert world.index.polled_at(one.patient, "documents") == 0
    aside.rename(world.archive)
    settle(world)
    assert world.media(one.patient, "document", upload) == [b"a scan from the phone"]


def test_new_patient_is_polled_though_the_disk_failed_right_after_the_roster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = small()
    world = serving(tmp_path, one)
    world.run(hours=1)
    new, remember, failed = one.practice.add_patient(), Index.remember, list[str]()

    def fail_once(index: Index, key: str, value: str | None) -> None:  # as a disk that is full for a moment
        if key == "roster_rows" and not failed:
            failed.append(key)
            raise SiteError("disk_error")
        remember(index, key, value)

    monkeypatch.setattr(Index, "remember", fail_once)
    world.run(hours=3)
    assert failed
    assert world.index.polled_at(new, "documents") > 0


def mirrored_image(world: World, one: Small) -> int:
    world.run(hours=3)
    return int(world.index.value("SELECT min(num) FROM item WHERE kind = 'mount-image' AND pat_num = ?", one.patient))


def test_archived_image_does_not_vanish_for_one_answer_that_denies_it(tmp_path: Path) -> None:
    one = small()
    world = serving(tmp_path, one)
    image = mirrored_image(world, one)
    world.office.faults.add("status", path=f"/documents/{image}", status=404, text="Document not found")
    wishes.make(world.index, "retry", [[one.patient, "mount-image", image]], world.clock.now())
    world.run(hours=1)
    assert world.sent(f"/documents/{image}")
    assert world.state(one.patient, "mount-image", image) == "archived"


def test_owner_of_an_image_is_asked_for_before_each_placement(tmp_path: Path) -> None:
    one = small()
    world = serving(tmp_path, one)
    image = mirrored_image(world, one)
    for times in (1, 2):
        before = len(world.office.arrivals)
        wishes.make(world.index, "retry", [[one.patient, "mount-image", image]], world.clock.now())
        world.run(hours=1)
        assert len(world.sent("/documents/DownloadSftp", since=before, DocNum=image)) == 1
        assert len(world.sent(f"/documents/{image}")) == times


@pytest.mark.parametrize("status", [500, 403])
def test_image_whose_owner_the_office_cannot_tell_keeps_nothing_else_waiting(tmp_path: Path, status: int) -> None:
    one = small()
    world = serving(tmp_path, one)
    image = mirrored_image(world, one)
    world.office.faults.add("status", path=f"/documents/{image}", status=status, times=None)
    before = len(world.office.arrivals)
    wishes.make(world.index, "retry", [[one.patient, "mount-image", image]], world.clock.now())
    world.run(hours=0.5)
    with one.practice.as_of(world.clock.now() - 600.0):
        new = one.practice.add_document(one.other)
    world.run(hours=20)
    assert world.media(one.other, "document", new)
    assert 3 <= len(world.sent(f"/documents/{image}", since=before)) <= 6
    world.office.faults.clear()
    world.run(hours=24)
    assert troubles(world) == {}
    world.check()


def test_nothing_is_placed_from_a_listing_older_than_an_hour(tmp_path: Path) -> None:
    one = small(documents=4)
    world = backfilling(tmp_path, one)
    world.office.faults.add("gateway_timeout", when="before", path="/documents/DownloadSftp", times=3)
    world.run(until=lambda: world.sent("/documents/DownloadSftp"))
    world.drop.broken = TransientError("drop_unreachable")
    world.run(hours=3)
    world.drop.broken = None
    settle(world)
    for arrival in world.sent("/documents/DownloadSftp"):
        listings = [each.at for each in world.sent("/documents") if 0 < arrival.at - each.at <= HOUR]
        assert listings, f"placed at {arrival.at} from an older listing"
    assert set(versions(world)) == {1}
