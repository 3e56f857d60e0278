"""The archive alone is enough: an index rebuilt from it is the one that was lost; damage and foreign files are told."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from syncd import copies, published
from syncd.archive import Archive, Publication
from syncd.checker import Tally
from syncd.config import Settings
from syncd.demo.practice import Practice
from syncd.errors import SiteError, UsageError
from syncd.index import Index
from syncd.model import Item, Version
from syncd.schema import Row
from syncd.scrub import adopt_all, adopt_newer, reindex, share_of, verify
from syncd.sites import Doors
from tests.small import DAY, Small, not_given, serving, small
from tests.world import START, World, make_settings

VERSIONS = "SELECT * FROM version ORDER BY seq"
# What only listings tell comes back with the first listing; what is archived must come back from the archive.
ARCHIVED = (
    "SELECT pat_num, kind, num, mount_num, archived_revision, images_revision, current_version, current_seq, sha256,"
    " bytes, media_type, archived_at, thumbnail_due, file_name FROM item ORDER BY pat_num, kind, num"
)


@pytest.fixture
def one() -> Small:
    return small(documents=2)


@pytest.fixture
def world(tmp_path: Path, one: Small) -> Iterator[World]:
    """A mirror with a history: a second version, an edited row with equal bytes, images that came and went."""
    world = serving(tmp_path, one)
    world.run()
    practice: Practice = one.practice
    practice.replace_bytes(one.document)
    practice.edit_document(one.letter, Description="Renamed")
    practice.edit_sheet(one.sheet)
    practice.change_mount(one.mount, Description="Renamed")
    practice.out_of_mount(int(practice.mount_images(one.mount)[0]["DocNum"]))
    world.sweep()
    world.run(hours=0.6)
    world.check()
    yield world
    world.stop()


def versions(index: Index) -> list[Row]:
    """The version rows, without the time of the last check."""
    return [{name: value for name, value in row.items() if name != "checked_at"} for row in index.rows(VERSIONS)]


def rebuilt(world: World) -> Index:
    """The index after a reindex while nothing runs."""
    world.stop()
    reindex(world.settings, open_archive(world), world.clock.now())
    return Index(world.settings.state_path / "index.db")


def open_archive(world: World) -> Archive:
    return Archive(world.archive, world.settings.archive.reserve)


# --- reindex


def test_index_rebuilt_from_the_archive_has_exactly_the_same_versions_and_items(world: World) -> None:
    before, items = versions(world.index), world.index.rows(ARCHIVED)
    marker, last = world.index.meta("archive_id"), int(world.index.meta("last_seq") or 0)
    assert len(before) > 10
    assert {row["sidecar"] for row in before} == {1, 2}
    assert max(row["version"] for row in before) == 2
    index = rebuilt(world)
    assert versions(index) == before
    assert index.rows(ARCHIVED) == items
    assert index.meta("archive_id") == marker
    assert list(index.reserve_seqs(1, above=0)) == [last + 1]
    index.close()


def test_mirror_goes_on_after_a_reindex_without_fetching_anything_again(world: World, one: Small) -> None:
    before = versions(world.index)
    rebuilt(world).close()
    sent = len(world.office.arrivals)
    world.restart()
    world.run()
    assert world.placements(since=sent) == []
    assert versions(world.index) == before
    one.practice.replace_bytes(one.letter)
    world.sweep()
    world.check_safe()
    assert len(world.media(one.other, "document", one.letter)) == 2
    assert versions(world.index)[-1]["seq"] > before[-1]["seq"]


def test_patients_are_known_again_with_their_names(world: World, one: Small) -> None:
    columns = "SELECT pat_num, status, last_name, first_name, preferred, birthdate FROM patient ORDER BY pat_num"
    before = world.index.rows(columns)
    index = rebuilt(world)
    assert index.rows(columns) == before
    assert index.meta("roster_at") is None  # the archive's patients are no roster
    index.close()


def test_the_index_that_was_there_is_kept_beside_the_new_one(world: World) -> None:
    state = world.settings.state_path
    world.index.remember("mark", "old")
    index = rebuilt(world)
    assert index.meta("mark") is None
    index.close()
    old = Index(state / "index.db.before-reindex")
    assert old.meta("mark") == "old"
    old.close()
    assert not list(state.glob("index.db.new*"))
    assert {path.stat().st_mode & 0o777 for path in state.glob("index.db*")} == {0o600}


def test_an_index_that_nobody_can_read_is_no_hindrance(world: World) -> None:
    before = versions(world.index)
    world.stop()
    path = world.settings.state_path / "index.db"
    path.write_bytes(b"noise" * 1000)
    with pytest.raises(SiteError):
        Index(path)
    index = rebuilt(world)
    assert versions(index) == before
    index.close()


def test_leftovers_of_an_interrupted_reindex_do_not_matter(world: World) -> None:
    state, before = world.settings.state_path, versions(world.index)
    for name in ("index.db.new", "index.db.new-wal"):
        (state / name).write_bytes(b"half")
    index = rebuilt(world)
    assert versions(index) == before
    index.close()


def test_without_an_archive_nothing_is_rebuilt_and_the_index_stays(tmp_path: Path) -> None:
    settings = make_settings(tmp_path, 30.0, {})
    settings.state_path.mkdir(parents=True, exist_ok=True)
    index = Index(settings.state_path / "index.db")
    index.remember("mark", "here")
    with pytest.raises(UsageError, match="archive"):
        reindex(settings, Archive(tmp_path / "nowhere", 0), START)
    assert index.meta("mark") == "here"
    assert [path.name for path in settings.state_path.glob("index.db.*")] == []
    index.close()


# --- adopting


def test_no_version_is_recorded_before_the_archive_knows_its_number(tmp_path: Path, one: Small) -> None:
    world = serving(tmp_path, one)

    def last() -> int:
        return int(world.index.value("SELECT max(seq) FROM version") or 0)

    for before in (0, 1, 2, 3):
        world.run(until=lambda: last() > before)  # noqa: B023 - called at once
        assert open_archive(world).last_seq() >= last()


def test_index_put_back_from_an_older_copy_is_noticed_and_made_whole_without_requests(
    tmp_path: Path, one: Small
) -> None:
    world = serving(tmp_path / "mirror", one)
    world.run()
    world.stop()
    path = world.settings.state_path / "index.db"
    shutil.copy(path, tmp_path / "backup.db")
    world.restart()
    one.practice.replace_bytes(one.document)
    new = one.practice.add_document(one.other, "png")
    world.sweep()
    world.run(hours=1)
    before, sent = versions(world.index), len(world.office.arrivals)
    world.stop()
    for each in path.parent.glob("index.db*"):
        each.unlink()
    shutil.copy(tmp_path / "backup.db", path)
    world.restart()
    assert versions(world.index) == before  # adopted before the first turn
    world.run()
    assert [each for each in world.placements(since=sent) if each.path != "/documents/Thumbnails"] == []
    assert world.state(one.other, "document", new) == "archived"
    one.practice.replace_bytes(one.letter)
    world.sweep()
    world.check()
    assert versions(world.index)[-1]["seq"] > before[-1]["seq"]
    world.stop()


def test_an_index_that_knows_every_number_is_not_compared_with_the_archive(world: World) -> None:
    doors: Doors = world.lanes.pull_lane._doors
    item = Item(world.index.value("SELECT min(pat_num) FROM item"), "document", 9999)
    folder = world.archive / "patients" / str(item.pat_num) / item.id
    folder.mkdir()
    (folder / "1-0123456789ab.jpg").write_bytes(b"foreign")
    assert adopt_newer(doors, world.clock.now()) == 0


def test_adopting_again_changes_nothing(world: World) -> None:
    before, items, last = versions(world.index), world.index.rows(ARCHIVED), world.index.meta("last_seq")
    found = adopt_all(world.index, open_archive(world), world.settings, world.clock.now())
    assert (found.versions, found.bytes, found.foreign) == (0, 0, [])
    assert versions(world.index) == before
    assert world.index.rows(ARCHIVED) == items
    assert world.index.meta("last_seq") == last


def test_foreign_files_are_told_and_left_where_they_are(world: World, one: Small) -> None:
    folder = world.archive / "patients" / str(one.patient)
    planted = {
        "stray.txt",
        "patients/notes",
        f"patients/{one.patient}/letter.pdf",
        f"patients/{one.patient}/document-{one.document}/7-0123456789ab.jpg",
    }
    for name in planted:
        (world.archive / name).write_bytes(b"mine")
    sidecar = next((folder / f"document-{one.document}").glob("1-*.json"))
    sidecar.chmod(0o600)
    sidecar.write_text("{}")
    found = adopt_all(world.index, open_archive(world), world.settings, world.clock.now())
    orphans = {str(sidecar.relative_to(world.archive)), str(sidecar.with_suffix(".jpg").relative_to(world.archive))}
    assert set(found.foreign) == planted | orphans
    assert all((world.archive / name).read_bytes() == b"mine" for name in planted)


@pytest.mark.parametrize("known_by", ["a copy", "the published copy"])
def test_folder_that_the_disk_does_not_give_ends_no_reindex_that_knows_what_was_there(
    world: World, monkeypatch: pytest.MonkeyPatch, known_by: str
) -> None:
    last = "SELECT pat_num, kind, num FROM version ORDER BY archived_at DESC LIMIT 1"  # its second look is to come
    item, total = Item(**world.index.rows(last)[0]), len(versions(world.index))
    there = len([row for row in versions(world.index) if Item(row["pat_num"], row["kind"], row["num"]) == item])
    if known_by == "a copy":
        copies.make(world.index, world.settings.state_path / "copies", "2026-03-10")
    else:
        published.publish(world.index, open_archive(world), world.settings, world.clock.now())
    world.stop()
    not_given(monkeypatch, world.archive / "patients" / str(item.pat_num) / item.id)
    found = reindex(world.settings, open_archive(world), world.clock.now())
    assert found.known == total - (0 if known_by == "a copy" else there)


@pytest.mark.parametrize("of", ["sidecar", "media", "item", "patient", "patient.json"])
def test_what_the_disk_does_not_give_is_told_and_all_else_is_in_the_index(
    world: World, one: Small, monkeypatch: pytest.MonkeyPatch, of: str
) -> None:
    patient = world.archive / "patients" / str(one.patient)
    item = patient / f"document-{one.document}"
    sidecar = next(item.glob("2-*.json"))
    bad = {"sidecar": sidecar, "media": sidecar.with_suffix(".jpg"), "item": item, "patient": patient}.get(
        of, patient / "patient.json"
    )
    total = len(versions(world.index))
    lacking = {"sidecar": 1, "item": 2, "media": 0, "patient.json": 0}.get(
        of, world.index.value("SELECT count(*) FROM version WHERE pat_num = ?", one.patient)
    )
    world.stop()
    not_given(monkeypatch, bad)
    found = reindex(world.settings, open_archive(world), world.clock.now())
    assert found.known == total - lacking
    told = {bad, bad.with_suffix(".jpg")} if of == "sidecar" else {bad}
    assert set(found.foreign) == {str(path.relative_to(world.archive)) for path in told if of != "media"}


# --- what follows from the versions


@pytest.fixture
def bare(tmp_path: Path) -> Iterator[Bare]:
    settings = make_settings(tmp_path, 30.0, {})
    settings.archive.path.mkdir(parents=True)
    archive = Archive(settings.archive.path, 0)
    archive.create("a" * 32)
    index = Index(tmp_path / "index.db")
    yield Bare(settings, archive, index)
    index.close()


class Bare:
    """An archive that the test fills itself, and an index that knows nothing of it."""

    def __init__(self, settings: Settings, archive: Archive, index: Index) -> None:
        self.settings, self.archive, self.index, self.seq = settings, archive, index, 0

    def publish(self, item: Item, content: bytes, version: int = 1, sidecar: int = 1, **changes: Any) -> Version:
        self.seq += 1
        source = self.archive.new_incoming()
        sha256 = self.archive.write_incoming(source, content)
        told: dict[str, Any] = {"revision": "r1", "extension": "jpg", "media_type": "image/jpeg", "method": "x"}
        told |= dict.fromkeys(("listed_at", "placed_at", "archived_at", "first_seen_at"), START)
        told |= {"file_name": "scan.jpg", "mount_num": None} | changes
        made = Version(self.seq, item, version=version, sidecar=sidecar, sha256=sha256, bytes=len(content), **told)
        publication = Publication(made, source if sidecar == 1 else None)
        assert self.archive.publish([publication]) == [None]
        source.unlink(missing_ok=True)
        return made

    def image(self, num: int, content: bytes, mount_revision: str, named: tuple[int, ...], **changes: Any) -> Version:
        told: dict[str, Any] = {
            "mount_num": 15,
            "source_revision": mount_revision,
            "mount_images": named,
            "revision": mount_revision,
        }
        return self.publish(Item(101, "mount-image", num), content, **told, **changes)

    def adopt(self) -> None:
        adopt_all(self.index, self.archive, self.settings, START)

    def images_revision(self) -> str | None:
        known = self.index.known_item(Item(101, "mount", 15))
        assert known is not None
        return known.images_revision


def test_only_a_mount_whose_every_image_is_archived_is_whole(bare: Bare) -> None:
    bare.publish(Item(101, "mount", 15), b"composite")
    bare.image(440, b"one", "m1", (440, 441))
    bare.adopt()
    assert bare.images_revision() is None
    bare.image(441, b"two", "m1", (440, 441))
    bare.adopt()
    assert bare.images_revision() == "m1"


def test_the_newest_whole_revision_of_a_mount_counts_whatever_the_order_of_its_folders(bare: Bare) -> None:
    bare.publish(Item(101, "mount", 15), b"composite")
    for number in (440, 441, 99):  # the folder of 99 is walked after those of 440 and 441
        bare.image(number, b"%d" % number, "m1", (440, 441, 99))
    for number in (440, 441):  # 99 was taken out
        bare.image(number, b"new %d" % number, "m2", (440, 441), version=2)
    bare.image(440, b"newest", "m3", (440, 442), version=3)  # 442 never arrived
    bare.adopt()
    assert bare.images_revision() == "m2"


def test_an_item_is_as_its_newest_sidecar_lists_it_also_where_the_archive_grew(bare: Bare) -> None:
    item, told = Item(101, "document", 34), "SELECT description, revision, archived_revision FROM item"
    bare.publish(item, b"image", listing={"Description": "Pano"})
    bare.publish(item, b"image", sidecar=2, revision="r2", listing={"Description": "Panorex"})
    bare.adopt()
    assert bare.index.rows(told) == [{"description": "Panorex", "revision": "r2", "archived_revision": "r2"}]
    bare.publish(item, b"image", sidecar=3, revision="r3", listing={"Description": "Renamed"})
    bare.adopt()
    assert bare.index.rows(told) == [{"description": "Renamed", "revision": "r3", "archived_revision": "r3"}]
    bare.index.set_item(item, "revision = 'r5', description = 'Listed since'")
    bare.publish(item, b"image", sidecar=4, revision="r4", listing={"Description": "Late"})
    bare.adopt()
    assert bare.index.rows(told)[0] == {"description": "Listed since", "revision": "r5", "archived_revision": "r4"}


def test_thumbnail_is_due_where_the_newest_image_has_none(bare: Bare) -> None:
    first = bare.publish(Item(101, "document", 34), b"image")
    bare.publish(Item(101, "document", 35), b"letter", extension="pdf", media_type="application/pdf")
    settled = bare.publish(Item(101, "document", 36), b"settled")
    bare.publish(Item(101, "thumbnail", 34), b"small", source_revision=first.sha256)
    bare.publish(Item(101, "thumbnail", 36), b"small", source_revision=settled.sha256)
    bare.publish(Item(101, "document", 34), b"newer image", version=2, revision="r2")
    bare.adopt()
    assert bare.index.rows("SELECT num FROM item WHERE thumbnail_due = 1") == [{"num": 34}]


def test_thumbnails_that_nobody_wants_are_not_due(bare: Bare) -> None:
    sync = bare.settings.sync.model_copy(update={"kinds": frozenset({"document"})})
    bare.settings = bare.settings.model_copy(update={"sync": sync})
    bare.publish(Item(101, "document", 34), b"image")
    bare.adopt()
    assert bare.index.value("SELECT thumbnail_due FROM item") == 0


def test_what_has_no_stamp_is_fetched_again_by_age_after_a_rebuild(bare: Bare) -> None:
    created = {"DateCreated": "2026-03-10 08:00:00"}  # an hour before START, in the practice's zone
    bare.publish(Item(101, "mount", 15), b"composite", listing=created)
    bare.publish(Item(101, "sheet", 45), b"sheet", extension="pdf", media_type="application/pdf")
    bare.publish(Item(101, "document", 34), b"image")
    bare.adopt()
    due = {row["kind"]: row["refetch_at"] for row in bare.index.rows("SELECT kind, refetch_at FROM item")}
    assert due["mount"] == START - 3600 + DAY
    assert due["sheet"] is None
    assert START + 180 * DAY <= due["document"] < START + 187 * DAY


@pytest.mark.parametrize(("later", "due"), [(599.0, START + 600), (600.0, START + 180 * DAY)])
def test_a_second_look_that_was_to_come_when_the_last_file_was_archived_is_still_to_come(
    bare: Bare, later: float, due: float
) -> None:
    young = {"DateTStamp": "2026-03-10 08:59:50", "serverDateTime": "2026-03-10 09:00:00"}
    bare.publish(Item(101, "document", 34), b"image", listing=young)
    bare.publish(Item(101, "document", 35), b"other", archived_at=START + later)
    bare.adopt()
    assert due <= bare.index.value("SELECT refetch_at FROM item WHERE num = 34") <= due + 7 * DAY * (later // 600)


def test_what_came_with_its_listing_is_not_fetched_by_age(bare: Bare) -> None:
    bare.publish(Item(101, "document", 34), b"image", method="note")
    bare.publish(Item(101, "document", 35), b"other", archived_at=START + DAY)
    bare.adopt()
    assert bare.index.value("SELECT refetch_at FROM item WHERE num = 34") is None


def test_numbers_given_out_later_lie_above_all_that_the_archive_ever_carried(bare: Bare) -> None:
    bare.seq = 40
    bare.publish(Item(101, "document", 34), b"image")
    bare.adopt()
    assert list(bare.index.reserve_seqs(1, above=0)) == [42]
    bare.archive.note_seq(90)  # reserved, and then the crash came
    bare.adopt()
    assert list(bare.index.reserve_seqs(1, above=0)) == [91]


# --- verify


def checked(world: World, part: Fraction = Fraction(1), alone: bool = True, later: float = 1.0) -> list[str]:
    """What `verify` finds, as "code path"."""
    found = verify(world.index, open_archive(world), Tally(), world.clock.now() + later, part, alone)
    return [f"{each.code} {each.path}" for each in found]


def flip(path: Path, bit: int = 0) -> None:
    """One bit in the midst of a file, whatever its mode."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1 << bit
    path.chmod(0o600)
    path.write_bytes(content)
    path.chmod(0o400)


def test_verify_finds_a_flipped_bit_and_a_missing_file_and_notes_what_was_right(world: World, one: Small) -> None:
    rows = world.index.rows(
        "SELECT seq, num, path FROM version WHERE sidecar = 1 AND kind = 'document' AND version = 1"
    )
    paths = {row["num"]: row["path"] for row in rows}
    flip(world.archive / paths[one.document])
    (world.archive / paths[one.letter]).unlink()
    assert sorted(checked(world)) == [f"damaged {paths[one.document]}", f"missing {paths[one.letter]}"]
    sql = "SELECT path FROM version WHERE sidecar = 1 AND checked_at < ?"
    unchecked = {row["path"] for row in world.index.rows(sql, world.clock.now() + 1)}
    assert unchecked == {paths[one.document], paths[one.letter]}


def test_verify_of_a_whole_archive_finds_nothing(world: World) -> None:
    tally = Tally()
    assert list(verify(world.index, open_archive(world), tally, world.clock.now())) == []
    row = world.index.rows("SELECT count(*) AS n, sum(bytes) AS bytes FROM version WHERE sidecar = 1")[0]
    assert (tally.versions, tally.bytes) == (row["n"], row["bytes"])


def test_verify_beside_the_daemon_writes_nothing(world: World) -> None:
    before = world.index.rows(VERSIONS)
    assert checked(world, alone=False) == []
    assert world.index.rows(VERSIONS) == before


def test_subsets_check_every_file_once_before_any_twice(world: World) -> None:
    total, seen = world.index.value("SELECT count(*) FROM version WHERE sidecar = 1"), 0
    for day in range(1, 6):
        assert checked(world, Fraction(1, 5), later=day) == []
        sql = "SELECT count(*) FROM version WHERE sidecar = 1 AND checked_at = ?"
        seen += world.index.value(sql, world.clock.now() + day)
    assert seen >= total
    assert world.index.value("SELECT min(checked_at) FROM version WHERE sidecar = 1") > world.clock.now()


def test_what_a_clock_that_was_ahead_checked_is_right_and_checked_in_its_turn(world: World) -> None:
    total = world.index.value("SELECT count(*) FROM version WHERE sidecar = 1")
    seq = world.index.value("SELECT max(seq) FROM version WHERE sidecar = 1")
    world.index.run("UPDATE version SET checked_at = ? WHERE seq = ?", world.clock.now() + 9000 * DAY, seq)
    assert checked(world, alone=False) == []
    for day in range(1, total + 2):
        assert checked(world, Fraction(1, total), later=day) == []
    assert world.index.value("SELECT checked_at FROM version WHERE seq = ?", seq) > world.clock.now()
    assert world.index.value("SELECT max(checked_at) FROM version") < world.clock.now() + DAY


def test_many_files_are_noted_before_the_end(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("syncd.scrub.NOTED", 1)
    assert checked(world) == []
    sql = "SELECT count(*) FROM version WHERE sidecar = 1 AND checked_at <= ?"
    assert world.index.value(sql, world.clock.now()) == 0


def test_verify_does_not_take_an_absent_archive_for_damage(world: World) -> None:
    archive = open_archive(world)
    world.archive.rename(world.archive.with_name("unmounted"))
    with pytest.raises(SiteError) as told:
        list(verify(world.index, archive, Tally(), world.clock.now()))
    assert told.value.reason == "archive_missing"


@pytest.mark.parametrize(
    ("total", "part", "checked"),
    [(0, "1/30", 0), (1, "1/30", 1), (30, "1/30", 1), (31, "1/30", 2), (90, "1/30", 3), (7, "1/1", 7), (10, "2/3", 7)],
)
def test_a_subset_is_never_empty_and_thirty_of_thirty_parts_are_all(total: int, part: str, checked: int) -> None:
    assert share_of(total, Fraction(part)) == checked


def test_only_the_flag_of_a_document_that_was_put_back_says_what_it_was(bare: Bare) -> None:
    document = Item(101, "document", 35)
    bare.publish(document, b"scan", flags=("other_type", "was:document-34"))
    bare.adopt()
    known = bare.index.rows("SELECT pat_num, kind, num, became FROM put_back")
    assert known == [{"pat_num": 101, "kind": "document", "num": 34, "became": 35}]
