"""The restore drill: once a week a random version is restored as a person would, and is sound, or damage."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from syncd.report import WEEK
from tests.small import DAY, HOUR, Small, serving, small, troubles
from tests.world import World


@pytest.fixture
def one() -> Small:
    return small()


@pytest.fixture
def world(tmp_path: Path, one: Small) -> Iterator[World]:
    started = World.start(tmp_path, practice=one.practice, interval=300.0, sync={"kinds": ["document"]})
    started.run()
    started.log.lines.clear()
    yield started
    started.stop()


def marked(world: World, hours: float = 0.2) -> None:
    """The scheduler's mark comes."""
    world.lanes.pull_lane.due("drill")
    world.run(hours=hours)


def files(world: World) -> list[Path]:
    return [path for path in world.archive.glob("patients/*/*/*") if path.suffix != ".json"]


def chores(world: World) -> tuple[float | None, bool | None]:
    drill = world.catalog().status_facts(world.clock.now()).chores["drill"]
    return drill.done_at, drill.passed


def test_a_version_is_restored_once_a_week_however_often_the_mark_comes(world: World) -> None:
    before = world.clock.now()
    for _ in range(15):
        marked(world, hours=24)
    assert len(world.log.events("drill_passed")) == 3
    done_at, passed = chores(world)
    assert (done_at is not None and done_at - before >= 2 * WEEK, passed) == (True, True)
    assert troubles(world) == {}


def test_nothing_of_it_is_left_and_what_a_killed_one_left_is_removed(world: World) -> None:
    left = world.settings.state_path / "drill"
    left.mkdir()
    (left / "copy.jpg").write_bytes(b"of a process that was killed")
    marked(world)
    assert world.log.events("drill_passed")
    assert not left.exists()
    left.mkdir()
    marked(world)  # days before the next one
    assert not left.exists()


def test_its_copy_has_a_name_that_tells_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    names, link = list[str](), os.link

    def seen(source: Path, target: Path, **options: bool) -> None:
        names.append(Path(target).name)
        link(source, target, **options)

    monkeypatch.setattr(os, "link", seen)
    marked(world)
    assert names == ["drill"]


def test_what_would_crowd_the_disk_of_the_index_is_not_copied_there(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = shutil.disk_usage(world.archive)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    marked(world)
    assert world.log.events("drill_passed") == []


def test_a_version_that_cannot_be_restored_is_damage_and_is_fetched_again(world: World) -> None:
    was = {path: path.read_bytes() for path in files(world)}
    for path, content in was.items():
        path.chmod(0o600)
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    world.lanes.pull_lane.due("drill")
    world.lanes.pull_lane.turn(world.clock.now())
    (line,) = world.log.events("drill_failed")
    assert troubles(world) == {"verify": "archive_damaged"}
    assert chores(world)[1] is False
    world.run(hours=2)
    pat_num, _, item = str(line["item"]).partition("/")
    healed = list((world.archive / "patients" / pat_num / item).glob(f"{line['version']}-*"))
    assert [path.read_bytes() == was[path] for path in healed if path.suffix != ".json"] == [True]
    assert troubles(world) == {}
    facts = world.catalog().status_facts(world.clock.now())
    assert facts.healed_this_week == 1
    world.clock.advance(9 * DAY)
    assert world.catalog().status_facts(world.clock.now()).healed_this_week == 0


def test_a_copy_that_finds_no_room_is_no_verdict_and_the_next_mark_tries_again(world: World) -> None:
    where = world.settings.state_path / "drill"
    world.settings.state_path.chmod(0o700)
    where.symlink_to("/proc/nowhere")  # neither a folder nor a place for one
    marked(world)
    assert chores(world) == (None, None)
    assert not world.log.events("drill_failed")
    where.unlink()
    marked(world)
    assert chores(world)[1] is True


def test_an_archive_that_is_not_there_is_no_verdict_either(world: World) -> None:
    away = world.archive.with_name("disk")
    world.archive.rename(away)
    marked(world)
    assert troubles(world) == {"archive": "archive_missing"}
    assert chores(world) == (None, None)
    away.rename(world.archive)
    marked(world, hours=1)
    assert chores(world)[1] is True


def test_a_row_that_is_silently_wrong_fails_the_drill(world: World) -> None:
    with sqlite3.connect(world.index.path) as db:
        db.execute("UPDATE version SET sha256 = ?", ("0" * 64,))
    marked(world)
    assert world.log.events("drill_failed")


def test_nothing_archived_or_all_of_it_damaged_is_no_drill(tmp_path: Path, one: Small) -> None:
    world = serving(tmp_path, one)
    world.lanes.pull_lane.due("drill")
    world.lanes.pull_lane.turn(world.clock.now())
    assert chores(world) == (None, None)
    world.stop()


def test_status_counts_what_was_archived_and_vanished_this_week(world: World, one: Small) -> None:
    facts = world.catalog().status_facts(world.clock.now())
    assert facts.archived_this_week == facts.archived_versions == 2
    assert facts.grown == (facts.archived_bytes, 0, 0, 0, 0, 0, 0)
    one.practice.delete_document(one.letter)
    world.run(hours=40)
    facts = world.catalog().status_facts(world.clock.now())
    assert (facts.vanished, facts.vanished_this_week, facts.grown[0]) == (1, 1, 0)
    world.run(hours=8 * DAY / HOUR)
    facts = world.catalog().status_facts(world.clock.now())
    assert (facts.vanished, facts.vanished_this_week, facts.archived_this_week) == (1, 0, 0)
