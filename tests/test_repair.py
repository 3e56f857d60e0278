"""Damage is set aside, fetched again and healed at its own place; what cannot be healed is told and left alone."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from syncd import repair, wishes
from syncd.archive import Archive
from syncd.checker import Finding, Tally
from syncd.errors import REASONS, SiteError
from syncd.model import Item
from syncd.repair import mend
from syncd.scrub import note, reindex, verify, wish_of
from tests.small import DAY, HOUR, Small, not_given, serving, small, troubles
from tests.world import World

pytestmark = pytest.mark.slow  # minutes in all: `make quick` leaves it out, `make test` does not

VERSIONS = "SELECT seq, pat_num, kind, num, version, sidecar, path, sha256, checksum FROM version ORDER BY seq"
ANY = ["document", "mount", "mount-image", "thumbnail"]


@pytest.fixture
def one() -> Small:
    return small()


@pytest.fixture
def world(tmp_path: Path, one: Small) -> Iterator[World]:
    world = serving(tmp_path, one)
    world.run()
    world.check()
    yield world
    world.stop()


def archive_of(world: World) -> Archive:
    return Archive(world.archive, 0)


def found(world: World) -> list[Finding]:
    return list(verify(world.index, archive_of(world), Tally(), world.clock.now()))


def codes(world: World) -> list[str]:
    return sorted(each.code for each in found(world))


def repaired(world: World) -> list[str]:
    """`verify --repair` where nobody holds the lock: what became of each finding."""
    every = found(world)
    note(world.index, world.log, every, world.clock.now(), whole=True)
    return [mend(world.index, archive_of(world), world.log, each, world.clock.now()) for each in every]


def path_of(world: World, kind: str, version: int = 1) -> Path:
    sql = "SELECT path FROM version WHERE kind = ? AND version = ? AND sidecar = 1 ORDER BY pat_num, num LIMIT 1"
    return Path(world.index.value(sql, kind, version))


def rot(world: World, path: Path, content: bytes = b"rotted") -> None:
    (world.archive / path).chmod(0o600)
    (world.archive / path).write_bytes(content)
    (world.archive / path).chmod(0o400)


def aside(world: World, path: Path) -> Path:
    return world.archive / "damaged" / path.relative_to("patients")


# --- set aside, fetched again, compared


@pytest.mark.parametrize("kind", ANY)
def test_equal_bytes_heal_a_rotted_version_at_its_own_place(world: World, kind: str) -> None:
    path, rows, seq = path_of(world, kind), world.index.rows(VERSIONS), world.index.meta("last_seq")
    content, sidecar = (world.archive / path).read_bytes(), (world.archive / path).with_suffix(".json").read_bytes()
    rot(world, path)
    assert codes(world) == ["damaged"]
    assert repaired(world) == ["queued"]
    assert aside(world, path).read_bytes() == b"rotted"
    assert aside(world, path).stat().st_mode & 0o777 == 0o400
    assert codes(world) == ["queued"]
    world.run()
    assert (world.archive / path).read_bytes() == content
    assert (world.archive / path).with_suffix(".json").read_bytes() == sidecar
    assert (world.index.rows(VERSIONS), world.index.meta("last_seq")) == (rows, seq)
    assert aside(world, path).read_bytes() == b"rotted"
    world.check()
    assert world.log.events("version_healed")
    assert world.index.rows("SELECT * FROM damage") == []


@pytest.mark.parametrize("kind", ANY)
def test_a_version_whose_file_and_sidecar_are_gone_comes_back(world: World, kind: str) -> None:
    path, rows = path_of(world, kind), world.index.rows(VERSIONS)
    content = (world.archive / path).read_bytes()
    for each in (path, path.with_suffix(".json")):
        (world.archive / each).unlink()
    assert codes(world) == ["bad_sidecar", "missing"]
    assert sorted(repaired(world)) == ["healed", "queued"]
    world.run()
    assert (world.archive / path).read_bytes() == content
    assert world.index.rows(VERSIONS) == rows
    assert codes(world) == []


def test_a_restored_older_archive_is_completed_without_new_versions(world: World, one: Small) -> None:
    path, rows = path_of(world, "document"), world.index.rows(VERSIONS)
    folder = (world.archive / path).parent
    for each in folder.iterdir():
        each.unlink()
    folder.rmdir()
    wishes.grant(world.index, world.log, "retry", [(1, "document", one.document)], world.clock.now())
    world.run()
    assert world.index.rows(VERSIONS) == rows
    world.check()


def test_other_bytes_are_a_new_version_and_the_old_one_is_unhealable(world: World, one: Small) -> None:
    path = path_of(world, "document")
    rot(world, path)
    one.practice.replace_bytes(one.document)
    assert repaired(world) == ["queued"]
    world.run(hours=24)
    assert len(world.media(1, "document", one.document)) == 1
    assert world.item(1, "document", one.document)["current_version"] == 2
    assert codes(world) == ["unhealable"]
    assert aside(world, path).read_bytes() == b"rotted"
    assert world.log.events("version_unhealable")[-1]["version"] == 1
    assert repaired(world) == ["unhealable"]  # told again each time, never again as new damage
    assert codes(world) == ["unhealable"]


def test_a_version_number_is_not_used_again_though_its_file_and_sidecar_are_gone(world: World, one: Small) -> None:
    path = world.archive / path_of(world, "document")
    path.unlink()
    path.with_suffix(".json").unlink()
    one.practice.replace_bytes(one.document)
    world.sweep()
    assert world.item(1, "document", one.document)["current_version"] == 2
    assert codes(world) == ["bad_sidecar", "missing"]


def test_a_sheet_is_rendered_anew_and_never_healed(world: World, one: Small) -> None:
    rot(world, path_of(world, "sheet"))
    assert repaired(world) == ["queued"]
    world.run()
    assert codes(world) == ["unhealable"]
    assert world.item(1, "sheet", one.sheet)["current_version"] == 2


def test_what_vanished_cannot_be_fetched_and_stays_where_it_is(world: World, one: Small) -> None:
    path = path_of(world, "document")
    one.practice.delete_document(one.document)
    world.run(hours=60)
    rot(world, path)
    sent = len(world.placements())
    assert repaired(world) == ["unhealable"]
    assert (world.archive / path).read_bytes() == b"rotted"
    world.run(hours=2)
    assert len(world.placements()) == sent
    assert codes(world) == ["unhealable"]


def test_an_older_version_cannot_be_fetched(world: World, one: Small) -> None:
    one.practice.replace_bytes(one.document)
    world.sweep()
    rot(world, path_of(world, "document"))
    assert repaired(world) == ["unhealable"]


def test_a_file_put_back_by_hand_is_right_again(world: World, one: Small) -> None:
    path = path_of(world, "document")
    content = (world.archive / path).read_bytes()
    one.practice.delete_document(one.document)
    world.run(hours=60)
    rot(world, path)
    assert repaired(world) == ["unhealable"]
    rot(world, path, content)
    assert repaired(world) == []
    assert world.index.rows("SELECT * FROM damage") == []


def test_what_vanishes_while_it_is_queued_is_given_up(world: World, one: Small) -> None:
    rot(world, path_of(world, "document"))
    assert repaired(world) == ["queued"]
    assert repair.give_up(world.index) == 0
    rot(world, path_of(world, "thumbnail"))
    assert repaired(world) == ["", "queued"]
    assert repair.give_up(world.index) == 0
    world.index.run("DELETE FROM duty")
    world.index.run("UPDATE item SET thumbnail_due = 0")
    assert repair.give_up(world.index) == 2
    assert codes(world) == ["unhealable", "unhealable"]


def test_a_file_that_rots_again_while_set_aside_ones_lie_there_is_set_aside_beside_them(world: World) -> None:
    path = path_of(world, "document")
    for number in range(2):
        rot(world, path, b"rotted %d" % number)
        assert repaired(world) == ["queued"]
        world.run()
    assert {each.read_bytes() for each in aside(world, path).parent.iterdir()} == {b"rotted 0", b"rotted 1"}
    world.check()


def test_rot_that_nobody_noticed_is_healed_by_the_next_fetch_of_the_same_bytes(world: World, one: Small) -> None:
    path, rows = path_of(world, "document"), world.index.rows(VERSIONS)
    rot(world, path)
    wishes.grant(world.index, world.log, "retry", [(1, "document", one.document)], world.clock.now())
    world.run()
    assert world.index.rows(VERSIONS) == rows
    assert aside(world, path).read_bytes() == b"rotted"
    world.check()


def test_a_part_of_the_archive_says_nothing_of_the_rest(world: World) -> None:
    rot(world, path_of(world, "document"))
    note(world.index, world.log, found(world), world.clock.now(), whole=True)
    note(world.index, world.log, [], world.clock.now(), whole=False)
    assert world.index.value("SELECT state FROM damage") == "found"


# --- sidecars, rows, modes


@pytest.mark.parametrize("kind", [*ANY, "sheet"])
@pytest.mark.parametrize("gone", [False, True])
def test_a_sidecar_is_written_again_from_the_index(world: World, kind: str, gone: bool) -> None:
    path = path_of(world, kind).with_suffix(".json")
    before = world.index.rows(VERSIONS)
    if gone:
        (world.archive / path).unlink()
    else:
        rot(world, path)
    assert codes(world) == ["bad_sidecar"]
    assert repaired(world) == ["healed"]
    assert codes(world) == []
    assert aside(world, path).exists() is not gone
    world.stop()
    reindex(world.settings, archive_of(world), world.clock.now())
    world.restart()
    assert world.index.rows(VERSIONS) == before


def test_an_older_sidecar_and_one_of_a_newer_listing_cannot_be_written_again(world: World, one: Small) -> None:
    one.practice.replace_bytes(one.document)
    world.sweep()
    path = path_of(world, "document").with_suffix(".json")
    rot(world, path)
    assert repaired(world) == ["unhealable"]
    assert (world.archive / path).read_bytes() == b"rotted"
    assert codes(world) == ["unhealable"]
    world.index.run("UPDATE item SET revision = 'newer' WHERE kind = 'sheet'")
    rot(world, path_of(world, "sheet").with_suffix(".json"))
    assert sorted(repaired(world)) == ["unhealable", "unhealable"]


@pytest.mark.parametrize(("column", "value"), [("sha256", "0" * 64), ("seq", 9000), ("num", 77), ("flags", '["x"]')])
def test_a_row_is_written_again_from_its_sidecar(world: World, column: str, value: object) -> None:
    before, path = world.index.rows(VERSIONS), path_of(world, "sheet")
    world.index.run(f"UPDATE version SET {column} = ? WHERE path = ?", value, str(path))
    assert "bad_row" in codes(world)
    repaired(world)
    repaired(world)
    assert codes(world) == []
    assert world.index.rows(VERSIONS) == before
    assert world.index.rows("SELECT * FROM damage") == []


def test_a_row_of_an_unreadable_kind_ends_no_walk_and_is_replaced(world: World) -> None:
    before, path = world.index.rows(VERSIONS), path_of(world, "sheet")
    world.index.run("UPDATE version SET kind = CAST(? AS TEXT) WHERE path = ?", b"sh\xefet", str(path))
    assert codes(world) == ["bad_row", "unrecorded"]
    repaired(world)
    assert codes(world) == []
    assert world.index.rows(VERSIONS) == before


def test_a_version_that_the_index_does_not_know_is_recorded(world: World) -> None:
    before = world.index.rows(VERSIONS)
    world.index.run("DELETE FROM version WHERE path = ?", str(path_of(world, "sheet")))
    assert repaired(world) == ["healed"]
    assert world.index.rows(VERSIONS) == before


@pytest.mark.parametrize(
    "harm",
    [
        "UPDATE item SET current_version = current_version + 2 WHERE kind = 'document'",
        "UPDATE item SET current_seq = 1 << 40, sha256 = 'ab' WHERE kind = 'document'",
        "DELETE FROM item WHERE kind = 'document'",
    ],
)
def test_an_item_names_its_newest_version_again(world: World, one: Small, harm: str) -> None:
    one.practice.replace_bytes(one.document)
    world.sweep()
    sql = "SELECT num, current_version, current_seq, sha256, bytes FROM item WHERE kind = 'document' ORDER BY num"
    before, rows = world.index.rows(sql), world.index.rows(VERSIONS)
    world.index.run(harm)
    assert repaired(world) == ["healed", "healed"]
    assert (world.index.rows(sql), world.index.rows(VERSIONS)) == (before, rows)
    old = world.index.value("SELECT min(seq) FROM version WHERE kind = 'document' AND num = ?", one.document)
    world.index.run("UPDATE version SET bytes = bytes + 1 WHERE seq = ?", old)
    assert repaired(world) == ["healed"]
    assert world.index.rows(sql) == before


def test_modes_and_the_patient_file_are_put_right(world: World, one: Small) -> None:
    folder, path = world.archive / "patients" / str(one.patient), path_of(world, "document")
    folder.chmod(0o755)
    (world.archive / path).chmod(0o644)
    rot(world, Path(f"patients/{one.patient}/patient.json"))
    assert repaired(world) == ["healed", "healed", "healed"]
    world.check()
    (folder / "patient.json").unlink()
    assert repaired(world) == ["healed"]
    assert json.loads((folder / "patient.json").read_text())["pat_num"] == one.patient
    world.index.run("DELETE FROM patient")
    rot(world, Path(f"patients/{one.patient}/patient.json"))
    assert repaired(world) == ["unhealable"]


def test_what_is_not_syncds_is_left_alone(world: World) -> None:
    (world.archive / "stray.txt").write_bytes(b"mine")
    assert repaired(world) == [""]
    assert (world.archive / "stray.txt").read_bytes() == b"mine"


@pytest.mark.parametrize("how", ["rotted", "gone", "foreign"])
def test_a_further_sidecar_that_is_lost_is_followed_and_its_item_goes_on(world: World, one: Small, how: str) -> None:
    path = path_of(world, "document")
    if how == "foreign":
        (world.archive / path.with_suffix(".7.json")).write_bytes(b"mine")
    one.practice.edit_document(one.document, Description="Renamed once")
    world.sweep()
    further = path.with_suffix(".2.json" if how != "foreign" else ".8.json")
    if how == "gone":
        (world.archive / further).unlink()
    elif how == "rotted":
        rot(world, further)
    one.practice.edit_document(one.document, Description="Renamed twice")
    world.sweep()
    assert world.state(one.patient, "document", one.document) == "archived"
    sql = "SELECT version, sidecar, revision FROM version WHERE kind = 'document' AND pat_num = ? ORDER BY seq"
    rows = world.index.rows(sql, one.patient)
    expected = [(1, 1), (1, 8), (1, 9)] if how == "foreign" else [(1, 1), (1, 2), (1, 3)]
    assert [(row["version"], row["sidecar"]) for row in rows] == expected
    item = world.item(one.patient, "document", one.document)
    assert item["revision"] == item["archived_revision"] == rows[-1]["revision"]
    assert not world.index.rows("SELECT 1 FROM duty")
    assert (codes(world), repaired(world)) == (["bad_sidecar"], ["unhealable"])  # its own listing nobody knows any more


# --- disks


def test_a_disk_that_lets_nothing_be_touched_is_no_end_of_the_repair(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    rot(world, path_of(world, "document"))

    def refuse(*_: object) -> None:
        raise SiteError("disk_error", errno.errorcode[errno.EIO])

    monkeypatch.setattr(Archive, "set_aside", refuse)
    assert repaired(world) == ["unhealable"]
    monkeypatch.undo()
    assert repaired(world) == ["queued"]


def as_a_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for anybody but root: what has no right to be read cannot be opened."""
    real = os.open

    def opened(*args: Any, **kwargs: Any) -> int:
        descriptor = real(*args, **kwargs)
        if not os.fstat(descriptor).st_mode & 0o400:
            os.close(descriptor)
            raise PermissionError(errno.EACCES, "planted")
        return descriptor

    monkeypatch.setattr(os, "open", opened)


@pytest.mark.parametrize("of", ["file", "item", "patient", "published"])
def test_a_mode_that_lets_nothing_be_opened_is_mended(world: World, monkeypatch: pytest.MonkeyPatch, of: str) -> None:
    path = path_of(world, "document")
    (world.archive / "published").mkdir(mode=0o700, exist_ok=True)
    bad = {"file": path, "item": path.parent, "patient": path.parents[1]}.get(of, Path("published"))
    as_a_user(monkeypatch)
    (world.archive / bad).chmod(0o000)
    assert {"unreadable", "wrong_mode"} == set(codes(world))
    assert set(repaired(world)) == {"healed"}
    assert (codes(world), troubles(world)) == ([], {})
    assert (world.archive / path).exists()


@pytest.mark.parametrize("of", ["file", "item", "patient", "published"])
def test_what_the_disk_does_not_give_at_all_is_no_end_of_the_repair_and_stays_where_it_is(
    world: World, monkeypatch: pytest.MonkeyPatch, of: str
) -> None:
    path = path_of(world, "mount")
    (world.archive / "published").mkdir(mode=0o700, exist_ok=True)
    bad = {"file": path, "item": path.parent, "patient": path.parents[1]}.get(of, Path("published"))
    not_given(monkeypatch, world.archive / bad)
    assert set(repaired(world)) == ({"queued"} if of == "file" else {"unhealable"})
    assert (world.archive / (aside(world, bad) if of == "file" else bad)).exists()
    world.index.run("DELETE FROM version WHERE kind = 'mount'")  # an index that does not know it moves it no more
    repaired(world)
    assert of == "file" or (world.archive / bad).exists()


def test_an_archive_that_is_gone_ends_the_repair(world: World) -> None:
    rot(world, path_of(world, "document"))
    (every,) = found(world)
    world.archive.rename(world.folder / "unmounted")
    with pytest.raises(SiteError, match="not mounted"):
        mend(world.index, archive_of(world), world.log, every, world.clock.now())


# --- by the daemon


def scrubbed(world: World) -> None:
    """A day passes, and the scheduler's mark comes."""
    world.lanes.pull_lane.due("scrub")
    world.run(hours=24.5)
    world.lanes.pull_lane.due("scrub")
    world.run(hours=1)


@pytest.fixture
def daily(tmp_path: Path, one: Small) -> Iterator[World]:
    """A mirror that hashes everything each day."""
    world = World.start(tmp_path, practice=one.practice, verify={"every": "24h", "subset": "1/1"})
    world.run()
    yield world
    world.stop()


def test_the_scrub_hashes_everything_and_says_so(daily: World) -> None:
    before = daily.clock.now()
    scrubbed(daily)
    assert daily.index.value("SELECT min(checked_at) FROM version WHERE sidecar = 1") > before
    assert len(daily.log.events("archive_scrubbed")) == 1
    daily.lanes.pull_lane.due("scrub")
    daily.run(hours=1)
    assert len(daily.log.events("archive_scrubbed")) == 1  # a mark that comes too early changes nothing


def test_the_scrub_repairs_by_itself_what_is_listed_as_it_was(daily: World) -> None:
    path = path_of(daily, "document")
    content = (daily.archive / path).read_bytes()
    rot(daily, path)
    scrubbed(daily)
    daily.run()
    assert (daily.archive / path).read_bytes() == content
    assert troubles(daily) == {}
    daily.check()
    assert [line["reason"] for line in daily.log.events("damage_found")] == ["damaged"]


def test_the_scrub_only_tells_what_it_cannot_fetch_until_a_person_was_told(daily: World, one: Small) -> None:
    path = path_of(daily, "document")
    one.practice.delete_document(one.document)
    daily.run(hours=60)
    rot(daily, path)
    scrubbed(daily)
    assert troubles(daily) == {"verify": "archive_damaged"}
    assert REASONS["archive_damaged"][2] == 4
    assert (daily.archive / path).read_bytes() == b"rotted"
    wishes.grant(daily.index, daily.log, "repair", wish_of(found(daily)), daily.clock.now())
    daily.run(hours=1)
    assert troubles(daily) == {}
    assert codes(daily) == ["unhealable"]


def test_a_person_may_ask_the_daemon_for_the_repair(daily: World) -> None:
    path = path_of(daily, "document")
    rot(daily, path)
    rot(daily, path_of(daily, "sheet").with_suffix(".json"))
    argument = wish_of(found(daily))
    assert wishes.grant(daily.index, daily.log, "repair", argument, daily.clock.now()).startswith("2 ")
    assert wishes.grant(daily.index, daily.log, "repair", None, daily.clock.now()).startswith("0 ")
    daily.run(hours=1)
    daily.run()
    daily.check()


def test_a_person_may_ask_the_daemon_to_repair_what_is_no_items(daily: World, one: Small) -> None:
    person, other = (Path(f"patients/{pat_num}/patient.json") for pat_num in (one.patient, one.other))
    for name in ("patients", person.parent, path_of(daily, "document").parent):
        (daily.archive / name).chmod(0o755)
    before = [(daily.archive / each).read_bytes() for each in (person, other)]
    for each in (person, other):
        rot(daily, each)
    rot(daily, path_of(daily, "sheet").with_suffix(".json"))
    argument = wish_of(found(daily))
    rot(daily, other, before[1])  # meanwhile
    wishes.grant(daily.index, daily.log, "repair", argument, daily.clock.now())
    daily.run(hours=0.1)
    assert codes(daily) == []
    assert [(daily.archive / each).read_bytes() for each in (person, other)] == before
    assert [aside(daily, each).exists() for each in (person, other)] == [True, False]
    assert daily.index.rows("SELECT * FROM damage") == []
    assert {line["item"] for line in daily.log.events("version_healed")} == {f"{one.patient}/sheet-{one.sheet}"}


def test_a_mode_that_was_changed_hides_no_bytes_that_were(world: World) -> None:
    path = path_of(world, "document")
    content = (world.archive / path).read_bytes()
    rot(world, path)
    (world.archive / path).chmod(0o644)
    note(world.index, world.log, found(world), world.clock.now(), whole=True)
    assert world.index.rows("SELECT code FROM damage") == [{"code": "damaged"}]
    assert repaired(world) == ["healed", "queued"]
    assert world.index.rows("SELECT code, state FROM damage") == [{"code": "damaged", "state": "queued"}]
    assert aside(world, path).stat().st_mode & 0o777 == 0o400
    world.run()
    assert (world.archive / path).read_bytes() == content
    assert (codes(world), world.index.rows("SELECT * FROM damage")) == ([], [])


def test_much_damage_at_once_is_only_told(daily: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repair, "MOST_ALONE", 1)
    for kind in ("document", "mount"):
        rot(daily, path_of(daily, kind))
    scrubbed(daily)
    daily.run(hours=1)
    assert troubles(daily) == {"verify": "archive_damaged"}
    assert daily.index.value("SELECT count(*) FROM damage WHERE state = 'found'") >= 1


def test_the_scrub_goes_on_where_a_restart_left_it(daily: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("syncd.scrub.SLICE", 1)
    daily.lanes.pull_lane.due("scrub")
    daily.run(hours=25)
    daily.lanes.pull_lane.due("scrub")
    total = int(daily.index.value("SELECT count(*) FROM version WHERE sidecar = 1"))
    daily.run(until=lambda: 0 < int(daily.index.meta("scrub_left") or 0) < total, hours=2)
    daily.restart()
    daily.run(hours=1)
    assert daily.index.meta("scrub_left") == "0"
    assert len(daily.log.events("archive_scrubbed")) == 1


def test_the_scrub_waits_for_an_archive_that_is_away(daily: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("syncd.scrub.SLICE", 1)
    daily.lanes.pull_lane.due("scrub")
    daily.run(hours=25)
    daily.lanes.pull_lane.due("scrub")
    daily.run(until=lambda: int(daily.index.meta("scrub_left") or 0) > 1, hours=2)
    daily.archive.rename(daily.folder / "unmounted")
    daily.run(hours=1)
    assert troubles(daily) == {"archive": "archive_missing"}
    (daily.folder / "unmounted").rename(daily.archive)
    daily.run(hours=2)
    assert daily.index.meta("scrub_left") == "0"
    assert daily.log.events("damage_found") == []


@pytest.mark.parametrize("change", ["description", "bytes"])
def test_one_file_that_the_disk_does_not_give_is_told_and_the_mirror_goes_on(
    daily: World, one: Small, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    path = path_of(daily, "document")
    content = (daily.archive / path).read_bytes()
    not_given(monkeypatch, daily.archive / path)
    scrubbed(daily)
    assert codes(daily) == ["unreadable"]
    assert troubles(daily) == {"verify": "archive_damaged"}
    if change == "description":
        one.practice.edit_document(one.document, Description="Renamed")
    else:
        one.practice.replace_bytes(one.document)
    later = one.practice.add_document(one.other, "png")
    daily.run(hours=6)
    states = [daily.state(one.patient, "document", one.document), daily.state(one.other, "document", later)]
    assert states == ["archived", "archived"]
    assert not any((daily.archive / "incoming").iterdir())
    if change == "description":  # the same bytes came again: they are in its place
        assert (daily.archive / path).read_bytes() == content
        assert (aside(daily, path).exists(), codes(daily), troubles(daily)) == (True, [], {})
    else:
        assert (codes(daily), troubles(daily)) == (["unreadable"], {"verify": "archive_damaged"})


def test_a_file_that_cannot_even_be_set_aside_is_followed_by_a_version_of_its_own(
    daily: World, one: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, rename = path_of(daily, "document"), os.rename
    not_given(monkeypatch, daily.archive / path)

    def renamed(name: Any, *args: Any, **kwargs: Any) -> None:
        if name == path.name:
            raise OSError(errno.EIO, "planted")
        rename(name, *args, **kwargs)

    monkeypatch.setattr(os, "rename", renamed)
    one.practice.edit_document(one.document, Description="Renamed")
    daily.run(hours=6)
    assert daily.item(one.patient, "document", one.document)["current_version"] == 2
    assert daily.state(one.patient, "document", one.document) == "archived"
    assert troubles(daily) == {}


def test_one_folder_that_the_disk_does_not_give_is_told_and_the_mirror_goes_on(
    daily: World, one: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = path_of(daily, "document").parent
    with monkeypatch.context() as patch:
        not_given(patch, daily.archive / folder)
        one.practice.replace_bytes(one.document)
        scrubbed(daily)
        later = one.practice.add_document(one.other, "png")
        daily.run(hours=6)
        assert [f"{each.code} {each.path}" for each in found(daily)] == [f"unreadable {folder}"]
        assert troubles(daily) == {"verify": "archive_damaged"}
        assert daily.state(one.other, "document", later) == "archived"
        assert daily.index.meta("scrub_left") == "0"
        assert daily.state(one.patient, "document", one.document) != "archived"
    scrubbed(daily)
    daily.run()
    assert (codes(daily), troubles(daily)) == ([], {})
    daily.check()


def test_a_clock_that_went_back_holds_up_no_scrub(daily: World) -> None:
    daily.index.remember("scrub_due_at", repr(daily.clock.now() + 400 * DAY))
    daily.index.run("UPDATE version SET checked_at = ?", daily.clock.now() + 400 * DAY)
    daily.lanes.pull_lane.due("scrub")
    daily.run(hours=1)
    assert len(daily.log.events("archive_scrubbed")) == 1
    assert daily.index.value("SELECT max(checked_at) FROM version WHERE sidecar = 1") <= daily.clock.now()


def test_a_late_mark_does_not_make_the_next_one_late(daily: World) -> None:
    daily.lanes.pull_lane.due("scrub")
    daily.run(hours=1)
    first = daily.index.meta_time("scrub_due_at")
    daily.run(hours=24.9)
    daily.lanes.pull_lane.due("scrub")
    daily.run(hours=0.2)
    assert daily.index.meta_time("scrub_due_at") == first + DAY
    assert HOUR < daily.index.meta_time("scrub_due_at") - daily.clock.now() < DAY


def test_a_repair_of_what_was_never_an_item_is_refused_softly(world: World) -> None:
    ghost = Finding("missing", "patients/9/document-9/1-0123456789ab.jpg", Item(9, "document", 9), 1, 1)
    assert mend(world.index, archive_of(world), world.log, ghost, world.clock.now()) == "unhealable"
    assert not repair.is_listed_so(world.index, Item(9, "document", 9), 1)
