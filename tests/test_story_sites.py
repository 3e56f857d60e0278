"""Trouble that concerns a whole site: the API, the drop, the archive. Each is a named state that probes slowly, holds
nothing against the items, and ends by itself when the trouble does.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from syncd import pulling, wishes
from syncd.demo.schema import ALL_PERMISSIONS, READ_ALL
from syncd.demo.site import DropFile
from syncd.errors import REASONS, SiteError, SyncdError, TransientError
from syncd.model import Item, Pulled, PullJob
from syncd.ports import Finished
from tests.small import HOUR, backfilling, failing, serving, settle, small, troubles, verdict, versions
from tests.world import World

pytestmark = pytest.mark.slow  # minutes in all: `make quick` leaves it out, `make test` does not

# fault of every request -> the state it is known by, and the most requests in two hours of it
OUTAGES: dict[str, tuple[dict[str, Any], str, int]] = {
    "econnector_down": ({"kind": "econnector_down"}, "econnector_down", 14),
    "two_econnectors": ({"kind": "two_econnectors"}, "econnector_twice", 14),
    "key_revoked": ({"kind": "key_revoked"}, "key_refused", 9),
    "500": ({"kind": "status", "status": 500}, "api_error", 24),
    "502 from the gateway": ({"kind": "status", "status": 502}, "api_error", 24),
    "404 of an unknown kind": ({"kind": "status", "status": 404}, "api_error", 24),
    "cut": ({"kind": "cut"}, "api_unreachable", 14),
    "hang": ({"kind": "hang", "seconds": 200.0}, "api_unreachable", 14),
    "redirect": ({"kind": "redirect"}, "api_error", 24),
}


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """A backfill of the small practice with eight more documents, that has not begun."""
    started = backfilling(tmp_path, small(documents=8))
    yield started
    started.stop()


def archived(world: World) -> int:
    return sum(versions(world))


@pytest.mark.parametrize("name", OUTAGES)
def test_outage_in_the_midst_of_a_backfill_is_named_probed_slowly_and_survived(world: World, name: str) -> None:
    details, reason, most = OUTAGES[name]
    world.run(until=lambda: archived(world) >= 3)
    sent = len(world.office.arrivals)
    world.office.faults.add(times=None, **details)
    world.run(hours=2)
    assert reason in troubles(world).values()
    assert len(world.office.arrivals) - sent <= most
    assert failing(world) == {}
    assert verdict(world) == REASONS[reason][2]
    world.check_safe()
    world.office.faults.clear()
    settle(world)
    assert troubles(world) == {}
    assert set(versions(world)) == {1}


def test_key_that_may_only_read_lists_everything_and_says_what_it_lacks(world: World) -> None:
    world.office.permissions = (READ_ALL,)
    world.run(hours=2)
    assert troubles(world) == {"placing": "key_cannot_download"}
    assert verdict(world) == 12
    assert world.index.value("SELECT count(*) FROM list WHERE polled_at > 0") == 4
    assert len(world.placements()) <= 9  # four an hour
    world.office.permissions = ALL_PERMISSIONS
    settle(world)
    assert troubles(world) == {}


@pytest.mark.parametrize(("seconds", "least"), [(1800.0, 1800.0), (1e9, 3600.0), (0.0, 5.0)])
def test_429_is_obeyed_and_capped_at_an_hour(world: World, seconds: float, least: float) -> None:
    world.run(until=lambda: archived(world) >= 3)
    sent = len(world.office.arrivals)
    world.office.faults.add("too_many", seconds=seconds)
    world.run(until=lambda: len(world.office.arrivals) >= sent + 2)
    first, second = world.office.arrivals[sent:]
    assert first.status == 429
    assert least <= second.at - first.at <= least + 300.0
    settle(world)
    assert set(versions(world)) == {1}


def test_429_without_retry_after_is_met_with_growing_pauses(world: World) -> None:
    world.office.throttle.retry_after = False
    world.office.faults.add("too_many", times=6)
    world.run(until=lambda: len(world.office.arrivals) >= 7)
    starts = [arrival.at for arrival in world.office.arrivals]
    pauses = [later - earlier for earlier, later in pairwise(starts)]
    assert pauses[0] >= 5.0
    assert all(later >= earlier for earlier, later in pairwise(pauses))
    assert world.log.events("throttled")
    settle(world)


# --- many alike refusals


@pytest.mark.parametrize(
    ("details", "reason"),
    [
        ({"kind": "site_error"}, "placements_refused"),
        ({"kind": "gateway_timeout", "when": "before", "seconds": 60.0}, "api_error"),
    ],
)
def test_alike_refusals_of_many_items_are_a_state_of_the_site(
    world: World, details: dict[str, Any], reason: str
) -> None:
    world.office.faults.add(path="/documents/DownloadSftp", times=None, **details)
    world.run(hours=3)
    assert troubles(world)["placing"] == reason
    assert failing(world) == {}
    assert len(world.placements()) <= 35
    assert world.index.value("SELECT count(*) FROM list WHERE polled_at > 0") == 4  # listing goes on
    world.office.faults.clear()
    settle(world, days=2.0)
    assert troubles(world) == {}
    assert failing(world) == {}


def five_bad_ones(world: World, details: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Two new patients: one with five documents that stay bad in the same way, one with twenty good ones."""
    theirs, others = world.practice.add_patient(), world.practice.add_patient()
    bad = [world.practice.add_document(theirs, "png") for _ in range(5)]
    good = [world.practice.add_document(others, "png") for _ in range(20)]
    for number in bad:
        world.office.faults.add(path="/documents/DownloadSftp", params={"DocNum": number}, times=None, **details)
    return bad, good


def states(world: World, numbers: Sequence[int]) -> set[str]:
    sql = "SELECT pat_num FROM item WHERE kind = 'document' AND num = ?"
    return {world.state(world.index.value(sql, number), "document", number) for number in numbers}


STAYS_BAD = [
    {"kind": "status", "status": 400, "text": "Image could not be read"},
    {"kind": "gateway_timeout", "when": "before", "seconds": 60.0},
]


def test_sheets_that_work_do_not_end_the_state_in_which_no_document_does(tmp_path: Path) -> None:
    world = World.start(tmp_path, interval=60.0)
    patient = world.practice.add_patient()
    world.run(hours=1)
    world.office.faults.add("site_error", path="/documents/DownloadSftp", times=None)
    for _ in range(8):
        world.practice.add_document(patient, "png")
    world.run(hours=3)
    for _ in range(3):
        sheet = world.practice.add_sheet(patient)
        world.run(hours=1)
        assert world.state(patient, "sheet", sheet) == "archived"
        assert troubles(world) == {"placing": "placements_refused"}
    assert len(world.log.events("state_changed")) == 1
    world.office.faults.clear()
    settle(world, days=2.0)
    assert troubles(world) == {}


@pytest.mark.parametrize("which", [0, -1])
@pytest.mark.parametrize("details", STAYS_BAD)
@pytest.mark.parametrize("backfill", [True, False])
def test_document_that_stays_bad_after_an_outage_of_all_keeps_no_others_waiting(
    tmp_path: Path, backfill: bool, details: dict[str, Any], which: int
) -> None:
    world = World.start(tmp_path, interval=60.0, backfill=backfill)
    patient = world.practice.add_patient()
    numbers = [world.practice.add_document(patient, "png") for _ in range(8)]
    outage = world.office.faults.add(path="/documents/DownloadSftp", times=None, **details)
    world.run(hours=3)
    assert troubles(world).keys() == {"placing"}
    bad = numbers.pop(which)
    world.office.faults.add(path="/documents/DownloadSftp", params={"DocNum": bad}, times=None, **details)
    world.office.faults.clear(outage)
    world.run(hours=3)
    assert (states(world, numbers), troubles(world)) == ({"archived"}, {})
    world.run(hours=6)
    assert states(world, [bad]) == {"failing"}


@pytest.mark.parametrize("details", STAYS_BAD)
@pytest.mark.parametrize("backfill", [True, False])
def test_five_documents_that_stay_bad_alike_become_failing_and_the_mirror_goes_on(
    tmp_path: Path, details: dict[str, Any], backfill: bool
) -> None:
    world = World.start(tmp_path, interval=10.0, backfill=backfill)
    bad, good = five_bad_ones(world, details)
    world.run(hours=6)
    assert (states(world, bad), states(world, good)) == ({"failing"}, {"archived"})
    assert troubles(world) == {}
    assert sum(failing(world).values()) == 5
    world.office.faults.clear()
    settle(world, days=2.0)


@pytest.mark.parametrize("details", STAYS_BAD)
def test_new_documents_do_not_wait_for_five_that_stay_bad_whatever_comes_between(
    tmp_path: Path, details: dict[str, Any]
) -> None:
    world = World.start(tmp_path, interval=10.0)
    patient = world.practice.add_patient()
    world.run(hours=1)  # what is new of a patient who is known comes before what a first look at a list brought
    bad, good = five_bad_ones(world, details)
    more = [world.practice.add_document(patient, "png") for _ in range(5)]
    for number in more:
        world.office.faults.add(path="/documents/DownloadSftp", params={"DocNum": number}, times=None, **details)
    world.run(hours=12)
    assert (states(world, [*bad, *more]), states(world, good)) == ({"failing"}, {"archived"})
    world.restart()  # which remembers whose own trouble it is
    world.run(hours=30)
    wishes.make(world.index, "retry", [], world.clock.now())
    later = world.practice.add_document(patient, "png")
    world.run(hours=6)
    assert (states(world, [*bad, *more]), states(world, [later])) == ({"failing"}, {"archived"})
    assert troubles(world) == {}
    since = world.log.events("state_changed")
    assert sum(line["reason"] != "ok" for line in since) <= 2


def test_five_patients_whose_lists_stay_bad_hold_up_no_others_again_and_again(tmp_path: Path) -> None:
    world = World.start(tmp_path, interval=10.0)
    patients = [world.practice.add_patient() for _ in range(12)]
    for pat in patients[:5]:
        world.office.faults.add("html", path="/documents", params={"PatNum": pat}, times=None)
    world.run(hours=24)
    assert sum(line["reason"] == "bad_answers" for line in world.log.events("state_changed")) <= 1
    assert troubles(world) == {}
    world.office.faults.add("html", path="/documents", times=None)
    world.run(hours=24)
    assert troubles(world) == {"listings": "bad_answers"}, "all alike is a state of the site, after it as before"
    world.office.faults.clear()
    world.run(hours=24)
    assert troubles(world) == {}
    world.check()


# --- the drop


@pytest.mark.parametrize(
    ("broken", "most"),
    [
        (TransientError("drop_unreachable"), 14),
        (SiteError("host_key_changed"), 9),
        (SiteError("drop_refused"), 9),
    ],
)
def test_drop_that_cannot_be_used_is_named_and_tried_slowly(
    world: World, broken: SiteError | TransientError, most: int
) -> None:
    world.run(until=lambda: archived(world) >= 3)
    calls = world.drop.calls
    world.drop.broken = broken
    world.run(hours=2)
    assert troubles(world) == {"drop": broken.reason}
    assert world.drop.calls - calls <= most
    assert verdict(world) == REASONS[broken.reason][2]
    world.drop.broken = None
    settle(world)
    assert troubles(world) == {}
    assert set(versions(world)) == {1}


def test_site_that_nobody_reaches_loses_nothing(world: World) -> None:
    world.run(until=lambda: archived(world) >= 3)
    world.site.down = True  # neither the office nor syncd
    world.run(hours=5)
    assert set(troubles(world).values()) & {"drop_unreachable", "placements_refused"}
    assert failing(world) == {}
    world.check_safe()
    world.site.down = False
    settle(world, days=2.0)
    assert troubles(world) == {}


def test_changed_password_is_a_state_and_not_a_failure_of_documents(world: World) -> None:
    world.site.password = "another"
    world.drop.broken = SiteError("drop_refused")
    world.run(hours=3)
    assert "drop_refused" in troubles(world).values() or "placements_refused" in troubles(world).values()
    assert failing(world) == {}
    assert world.site.refused <= 30  # an account is not locked by us
    world.site.password, world.drop.broken = "drop-password", None
    settle(world, days=2.0)


# --- the archive


def test_unmounted_archive_is_named_and_nothing_is_written_into_its_mount_point(world: World) -> None:
    world.run(until=lambda: archived(world) >= 3)
    away = world.archive.with_name("disk")
    world.archive.rename(away)
    world.archive.mkdir()
    world.run(hours=2)
    assert troubles(world) == {"archive": "archive_missing"}
    assert verdict(world) == 13
    assert list(world.archive.iterdir()) == []
    world.archive.rmdir()
    away.rename(world.archive)
    settle(world)
    assert troubles(world) == {}
    assert set(versions(world)) == {1}


def test_another_archive_in_its_place_is_left_alone(world: World, tmp_path: Path) -> None:
    world.run(until=lambda: archived(world) >= 3)
    other = backfilling(tmp_path / "other", small())
    other.run(until=lambda: archived(other) >= 2)
    other.stop()
    away = world.archive.with_name("disk")
    world.archive.rename(away)
    other.archive.rename(world.archive)
    before = {path: path.stat().st_mtime_ns for path in world.archive.rglob("*") if path.name != "incoming"}
    world.run(hours=1)
    assert troubles(world) == {"archive": "archive_missing"}
    assert {p: p.stat().st_mtime_ns for p in world.archive.rglob("*") if p.name != "incoming"} == before
    world.archive.rename(other.archive)
    away.rename(world.archive)
    settle(world)


@pytest.mark.parametrize("reason", ["archive_full", "archive_read_only"])
def test_archive_that_cannot_take_more_is_named_and_goes_on_later(
    world: World, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    world.run(until=lambda: archived(world) >= 3)
    held = archived(world)
    real = os.statvfs

    def told(folder: int) -> os.statvfs_result:  # what the kernel says of the disk
        values = list(real(folder))
        if reason == "archive_full":
            values[4] = 0
        else:
            values[8] |= os.ST_RDONLY
        return os.statvfs_result(values)

    monkeypatch.setattr(os, "statvfs", told)
    world.run(hours=2)
    assert troubles(world) == {"archive": reason}
    assert verdict(world) == 13
    assert archived(world) == held
    monkeypatch.setattr(os, "statvfs", real)
    settle(world)
    assert troubles(world) == {}


def not_done(*_: object, **__: object) -> None:
    """A call that the disk does not carry out."""
    raise OSError(errno.EIO, "planted")


def with_new_bytes(folder: Path) -> World:
    """A mirror at rest, of which two documents have changed."""
    one = small()
    world = serving(folder, one)
    world.run()
    for document in (one.document, one.letter):
        one.practice.replace_bytes(document)
    return world


@pytest.mark.parametrize("call", ["link", "fsync"])
def test_batch_that_cannot_be_recorded_leaves_nothing_in_incoming(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    one = small()
    world = serving(tmp_path, one)
    world.run()
    one.practice.replace_bytes(one.document)
    late = one.practice.add_raw_document(one.other, b"a scan from the phone", ".txt")
    with one.practice.as_of(world.clock.now() - HOUR):
        for _ in range(3):
            one.practice.add_document(one.other, "png")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, not_done)
        for _ in range(8):
            world.run(hours=0.5)
            assert not any((world.archive / "incoming").iterdir())
        assert troubles(world) == {"archive": "disk_error"}
    world.run(hours=3)
    assert world.media(one.other, "document", late) == [b"a scan from the phone"]
    world.check()


def pulling_one_by_one(
    world: World, monkeypatch: pytest.MonkeyPatch, seconds: float = 0.0, waiting: int = 2
) -> Callable[[float], float]:
    """So many placements wait; the turn that pulls: the drop tells of one file after the other, each so much later."""
    lane, pull = world.lanes.pull_lane, world.drop._pull
    turn, placed = lane.turn, "SELECT count(*) FROM attempt WHERE state = 'placed'"
    with monkeypatch.context() as patch:
        patch.setattr(lane, "turn", lambda now: now + 1.0)
        world.run(until=lambda: world.index.value(placed) == waiting)

    def one_by_one(jobs: Sequence[PullJob], finished: Finished) -> list[Pulled | SyncdError]:
        queue, outcomes = list(jobs), list[Pulled | SyncdError]()
        for job in queue:
            outcomes += pull([job])
            world.clock.advance(seconds)
            queue += finished([(job, outcomes[-1])])
        return outcomes

    monkeypatch.setattr(world.drop, "pull", one_by_one)
    return turn


def test_what_was_pulled_beside_what_cannot_be_recorded_is_thrown_away_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files of a placement that is not whole yet lie in `incoming` when another one's cannot be recorded."""
    world = with_new_bytes(tmp_path)
    turn = pulling_one_by_one(world, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", not_done)
        turn(world.clock.now())
        assert troubles(world) == {"archive": "disk_error"}
        assert not any((world.archive / "incoming").iterdir())
    monkeypatch.undo()
    world.run(hours=3)
    world.check()


def test_each_version_bears_the_time_when_its_file_came_whatever_else_is_on_its_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = with_new_bytes(tmp_path)
    pulling_one_by_one(world, monkeypatch, seconds=600.0)(begun := world.clock.now())
    newest = "SELECT archived_at FROM version WHERE kind = 'document' AND version = 2 ORDER BY seq"
    assert [row["archived_at"] - begun for row in world.index.rows(newest)] == [600.0, 1200.0]


@pytest.mark.parametrize("hidden", [False, True])
def test_what_was_linked_before_the_record_failed_is_not_lost_and_holds_up_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hidden: bool
) -> None:
    one = small()
    world = serving(tmp_path, one)
    world.run()
    one.practice.replace_bytes(one.document)
    lane, link = world.lanes.pull_lane._doors.index.db.conn, os.link

    def linked(*args: Any, **named: Any) -> None:
        link(*args, **named)
        lane.execute("PRAGMA query_only = ON")

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", linked)
        with pytest.raises(SiteError, match="SQLITE_READONLY"):  # nor can the trouble be written down
            world.run(hours=1)
    assert len(world.media(one.patient, "document", one.document)) == 2
    assert not any((world.archive / "incoming").iterdir())
    assert len(world.catalog().versions(Item(one.patient, "document", one.document))) == 1
    lane.execute("PRAGMA query_only = OFF")
    if hidden:  # its folder cannot be read when it is to be recorded
        folder = world.archive / "patients" / str(one.patient) / f"document-{one.document}"
        folder.rename(tmp_path / "moved")
        folder.symlink_to(tmp_path / "moved")
        with one.practice.as_of(world.clock.now() - HOUR):
            later = one.practice.add_document(one.other, "png")
        world.run(hours=1)
        assert world.state(one.other, "document", later) == "archived"
        folder.unlink()
        (tmp_path / "moved").rename(folder)
    world.run(hours=30)
    assert len(world.media(one.patient, "document", one.document)) == 2
    world.check()


def test_daemon_without_an_archive_starts_waits_and_catches_up(tmp_path: Path) -> None:
    one = small()
    world = serving(tmp_path, one)
    world.run()
    away = world.archive.with_name("disk")
    world.archive.rename(away)
    world.archive.mkdir()
    world.restart()
    with one.practice.as_of(world.clock.now() - HOUR):
        one.practice.add_document(one.patient, "jpg")
    world.run(hours=3)
    assert troubles(world) == {"archive": "archive_missing"}
    world.archive.rmdir()
    away.rename(world.archive)
    world.run(hours=3)
    world.check()


# --- answers that cannot be trusted


@pytest.mark.parametrize(
    "details",
    [
        {"kind": "html"},
        {"kind": "wrong_shape"},
        {"kind": "foreign_row"},
        {"kind": "duplicated"},
        {"kind": "cut", "when": "body"},
    ],
)
def test_untrustworthy_listings_change_nothing_and_have_a_name(tmp_path: Path, details: dict[str, Any]) -> None:
    one = small()
    world = serving(tmp_path, one)
    world.run()
    before = world.index.rows("SELECT * FROM item"), versions(world)
    for path in ("/documents", "/sheets", "/patients/Simple"):
        world.office.faults.add(path=path, method="GET", times=None, **details)
    world.run(hours=3)
    assert (world.index.rows("SELECT * FROM item"), versions(world)) == before
    assert set(troubles(world).values()) & {"bad_answers", "api_unreachable", "api_error"}
    world.office.faults.clear()
    world.run(hours=3)
    world.check()
    assert troubles(world) == {}


def test_states_end_up_as_incidents_with_a_beginning_and_an_end(world: World) -> None:
    world.run(until=lambda: archived(world) >= 3)
    world.office.faults.add("econnector_down", times=None)
    world.run(hours=1)
    world.office.faults.clear()
    world.run(hours=1)
    (incident,) = world.catalog().status_facts(world.clock.now()).incidents
    assert incident.reason == "econnector_down"
    assert incident.until_at is not None
    assert 0 < incident.until_at - incident.since_at <= 1.5 * HOUR


def test_late_files_of_an_unreachable_site_are_removed_when_it_is_back(world: World) -> None:
    world.run(until=lambda: archived(world) >= 3)
    world.office.faults.add("gateway_timeout", path="/documents/DownloadSftp", when="after")
    world.run(until=lambda: world.log.events("placement_unanswered"))
    world.drop.broken = TransientError("drop_unreachable")
    world.run(hours=30)
    world.drop.broken = None
    world.site.files["syncd/somebody-elses.pdf"] = DropFile(b"x", world.clock.now())
    world.run(hours=2)
    assert set(world.site.files) == {"syncd/somebody-elses.pdf"}
    del world.site.files["syncd/somebody-elses.pdf"]
    settle(world)


def test_file_whose_reading_breaks_the_connection_holds_up_no_other(world: World) -> None:
    world.drop.poison = "*"
    world.run(hours=0.3)
    assert set(world.site.files) == {world.drop.poison}
    assert archived(world) >= 5
    world.drop.poison = ""
    settle(world)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_files_that_break_the_connection_for_ever_are_failing_until_they_can_be_read(
    tmp_path: Path, count: int
) -> None:
    one = small(documents=8)
    world = backfilling(tmp_path, one)
    documents = one.practice.truth()[one.patient].documents
    world.drop.bad = frozenset([documents[number] for number in sorted(documents)][:count])
    world.run(hours=36)
    assert failing(world) == {"unreadable_on_drop": count}
    assert world.drop.bad.isdisjoint(file.data for file in world.site.files.values())
    world.drop.bad = frozenset()
    settle(world, days=3)
    world.stop()


def test_all_else_has_its_turn_though_there_is_always_something_to_pull(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulling, "IN_HAND", 2)
    monkeypatch.setattr(pulling, "MANY", 4)
    world.run(until=lambda: archived(world) >= 1)
    turn = pulling_one_by_one(world, monkeypatch, waiting=7)
    world.lanes.pull_lane.due("copy")
    turn(world.clock.now())
    assert world.index.value("SELECT count(*) FROM attempt WHERE state = 'placed'") == 3
    assert list((world.folder / "state" / "copies").iterdir())
    monkeypatch.undo()
    settle(world)


def test_pause_ends_by_itself(tmp_path: Path) -> None:
    one = small()
    world = serving(tmp_path, one)
    wishes.make(world.index, "pause", world.clock.now() + 2 * HOUR, world.clock.now())
    world.run(seconds=5)
    before, until = len(world.office.arrivals), world.clock.now() + 2 * HOUR
    world.run(hours=1.9)
    assert len(world.office.arrivals) == before
    world.run(hours=3)
    assert min(arrival.at for arrival in world.office.arrivals[before:]) >= until - 5
    world.check()
