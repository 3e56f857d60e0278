"""Daily copies of the index: consistent, seven kept, used by `reindex` before the sidecars; a bad one never is."""

from __future__ import annotations

import contextlib
import copy
import datetime as dt
import errno
import os
import re
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlite_utils import Database

from syncd import copies, schema, wiring
from syncd.archive import Archive
from syncd.call import Call, index_if_any
from syncd.errors import ConfigError, SiteError, UsageError
from syncd.index import Index
from syncd.schema import Row
from syncd.scrub import reindex
from syncd.service import Lock, SystemClock
from tests.small import SCHEMA, Small, serving, small, troubles
from tests.world import World

pytestmark = pytest.mark.slow  # minutes in all: `make quick` leaves it out, `make test` does not

VERSIONS = "SELECT seq, pat_num, kind, num, version, sidecar, path, sha256, checksum FROM version ORDER BY seq"


@pytest.fixture
def one() -> Small:
    return small()


@pytest.fixture
def world(tmp_path: Path, one: Small) -> Iterator[World]:
    world = serving(tmp_path, one)
    world.run()
    yield world
    world.stop()


def folder(world: World) -> Path:
    return world.settings.state_path / "copies"


def marked(world: World) -> list[str]:
    """The scheduler's mark comes; the names of the copies after it, newest first."""
    world.lanes.pull_lane.due("copy")
    world.run(hours=0.2)
    return [path.name for path in copies.found(folder(world))]


def rebuilt(world: World) -> list[Row]:
    """The versions after a reindex."""
    world.stop()
    reindex(world.settings, Archive(world.archive, 0), world.clock.now())
    world.restart()
    return world.index.rows(VERSIONS)


def test_a_copy_is_made_once_a_day_and_seven_are_kept(world: World) -> None:
    day = dt.datetime.fromtimestamp(world.clock.now(), world.settings.zone).date()
    names = [f"index-{day + dt.timedelta(days=number)}.db" for number in range(9)]
    for number in range(9):
        assert marked(world)[0] == names[number]
        marked(world)
        world.run(hours=24 - 0.4)
    assert [path.name for path in copies.found(folder(world))] == names[:1:-1]
    assert {path.stat().st_mode & 0o777 for path in folder(world).iterdir()} == {0o600}
    assert folder(world).stat().st_mode & 0o777 == 0o700
    assert len(world.log.events("index_copied")) == 9
    chore = world.catalog().status_facts(world.clock.now(), zone=world.settings.zone).chores["index_copy"]
    local = [dt.datetime.fromtimestamp(at or 0, world.settings.zone) for at in (chore.done_at, chore.due_at)]
    assert local[1].isoformat()[:16] == f"{local[0].date() + dt.timedelta(days=1)}T00:00"


def test_a_copy_is_the_index_of_that_moment(world: World) -> None:
    (name,) = marked(world)
    with sqlite3.connect(folder(world) / name) as db:
        assert db.execute("SELECT count(*) FROM version").fetchone()[0] == len(world.index.rows(VERSIONS))
    assert copies.is_sound(folder(world) / name, str(world.index.meta("archive_id")))
    assert [path.name for path in folder(world).iterdir()] == [name]


def test_nothing_is_copied_before_anything_is_archived(tmp_path: Path, one: Small) -> None:
    world = serving(tmp_path, one)
    world.lanes.pull_lane.due("copy")
    world.lanes.pull_lane.turn(world.clock.now())
    assert not folder(world).exists()
    world.stop()


def test_a_copy_that_the_disk_has_no_room_for_is_told_as_that(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no room")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SiteError, match="OSError") as told:
        copies.make(world.index, folder(world), "2026-11-21")
    assert told.value.reason == "state_full"


def test_a_copy_that_cannot_be_made_is_told_and_stops_nothing(world: World, one: Small) -> None:
    folder(world).write_bytes(b"a file in its place")
    world.lanes.pull_lane.due("copy")
    world.run(hours=0.2)
    assert [line["reason"] for line in world.log.events("index_copy_failed")] == ["disk_error"]
    assert troubles(world) == {}
    one.practice.replace_bytes(one.document)
    world.sweep()
    world.check()


def test_a_damaged_index_is_not_copied(world: World) -> None:
    world.index.value("PRAGMA wal_checkpoint(TRUNCATE)")
    root, size = (
        world.index.value(sql) for sql in ("SELECT rootpage FROM sqlite_schema WHERE name = 'item'", "PRAGMA page_size")
    )
    with world.index.path.open("r+b") as file:
        file.seek((root - 1) * size)
        file.write(b"\xff" * size)
    fresh = Index(world.index.path)
    folder(world).mkdir()
    with pytest.raises(SiteError):
        copies.make(fresh, folder(world), "2026-03-10")
    assert list(folder(world).iterdir()) == []
    fresh.close()


def test_a_copy_that_a_wrong_clock_dated_in_the_future_is_not_the_newest(world: World, one: Small) -> None:
    for year in range(2031, 2031 + copies.KEPT):
        copies.make(world.index, folder(world), f"{year}-01-01")
    one.practice.delete_document(one.letter)
    world.run(hours=60)
    assert copies.make(world.index, folder(world), "2026-03-12")
    assert not copies.make(world.index, folder(world), "2026-03-12")
    assert copies.make(world.index, folder(world), "2026-03-13")
    names = [path.name for path in copies.found(folder(world))]
    assert (names[:3], len(names)) == (
        ["index-2026-03-13.db", "index-2026-03-12.db", "index-2037-01-01.db"],
        copies.KEPT,
    )
    rebuilt(world)
    assert world.item(one.other, "document", one.letter)["vanished_at"] is not None


def test_reindex_takes_the_newest_copy_and_what_the_archive_has_beyond_it(world: World, one: Small) -> None:
    one.practice.delete_document(one.letter)
    world.run(hours=60)
    marked(world)
    one.practice.replace_bytes(one.document)
    one.practice.add_document(one.other, "png")
    world.sweep()
    world.run(hours=1)
    before, sent = world.index.rows(VERSIONS), len(world.placements())
    wish = world.index.run("INSERT INTO wish (verb, argument, made_at) VALUES ('retry', 'null', 0)")
    assert wish == 1
    assert rebuilt(world) == before
    assert world.item(one.other, "document", one.letter)["vanished_at"] is not None  # only the index knew it
    world.run()
    assert world.placements()[sent:] == []
    assert world.log.events("wish_taken") == []
    world.check()


@pytest.mark.parametrize("harm", ["noise", "row", "page", "other archive", "no index"])
def test_a_copy_that_is_not_sound_is_passed_over(world: World, harm: str) -> None:
    (name,) = marked(world)
    path, before = folder(world) / name, world.index.rows(VERSIONS)
    shutil.copy(path, folder(world) / "index-2020-01-01.db")
    with sqlite3.connect(path) as db:
        if harm == "row":
            db.execute("UPDATE version SET bytes = bytes + 1 WHERE seq = 1")
        elif harm == "other archive":
            db.execute("UPDATE meta SET value = 'other' WHERE key = 'archive_id'")
        elif harm == "no index":
            db.execute("DROP TABLE meta")
    db.close()
    if harm in ("noise", "page"):
        content = bytearray(path.read_bytes())
        content[slice(0, None) if harm == "noise" else slice(8192, 12288)] = b"\xff" * (
            len(content) if harm == "noise" else 4096
        )
        path.write_bytes(content)
    assert not copies.is_sound(path, str(world.index.meta("archive_id")))
    assert rebuilt(world) == before


def test_a_restart_over_a_lost_index_is_refused_without_a_request(world: World) -> None:
    before = world.index.rows(VERSIONS)
    world.stop()
    for path in world.settings.state_path.glob("index.db*"):
        path.unlink()
    sent = len(world.office.arrivals)
    world.restart()
    world.run(hours=1)
    assert troubles(world) == {"archive": "index_lost"}
    assert len(world.office.arrivals) == sent
    assert rebuilt(world) == before
    world.run()
    assert troubles(world) == {}
    assert world.placements(since=sent) == []
    world.check()


def test_the_index_of_another_archive_is_refused(world: World, tmp_path: Path) -> None:
    other = serving(tmp_path / "other", small())
    other.run()
    other.stop()
    world.stop()
    for path in world.settings.state_path.glob("index.db*"):
        path.unlink()
    shutil.copy(other.settings.state_path / "index.db", world.settings.state_path / "index.db")
    before = sorted(path.name for path in world.archive.rglob("*"))
    world.restart()
    world.run(hours=1)
    assert set(troubles(world).values()) & {"archive_missing", "archive_taken"}
    assert sorted(path.name for path in world.archive.rglob("*")) == before


def crashed(world: World, one: Small) -> Path:
    """The state as a process leaves it that did not end well: an index, and a write-ahead log of its last changes."""
    world.index.value("PRAGMA wal_checkpoint(TRUNCATE)")
    one.practice.add_document(one.other, "png")
    world.sweep()
    left = world.folder / "left"
    left.mkdir()
    for path in world.settings.state_path.glob("index.db*"):
        shutil.copy(path, left / path.name)
    assert (left / "index.db-wal").stat().st_size > 0
    return left / "index.db"


def test_an_index_with_its_own_log_is_whole(world: World, one: Small) -> None:
    path = crashed(world, one)
    copies.refuse_torn(path)
    path.with_name("index.db-shm").unlink()  # SQLite makes it anew
    copies.refuse_torn(path)
    with contextlib.closing(Index(path)) as index:
        assert index.rows(VERSIONS) == world.index.rows(VERSIONS)
    copies.refuse_torn(path)  # its log is in it by now


@pytest.mark.parametrize("harm", ["header", "page", "log of another index", "log of another database"])
def test_a_torn_index_is_refused_and_left_as_it_is(world: World, one: Small, tmp_path: Path, harm: str) -> None:
    path = crashed(world, one)
    log = path.with_name("index.db-wal")
    if harm in ("header", "page"):
        log.write_bytes(log.read_bytes()[: 32 + 24 + 4096])  # not one whole transaction: nothing covers the damage
        root = world.index.value("SELECT rootpage FROM sqlite_schema WHERE name = 'item_by_number'")
        start = 0 if harm == "header" else (root - 1) * 4096
        content = path.read_bytes()
        path.write_bytes(content[:start] + b"\xee" * 4096 + content[start + 4096 :])
    elif harm == "log of another index":
        two = small(documents=40)
        other = serving(tmp_path / "other", two)
        other.run()
        shutil.copy(crashed(other, two).with_name("index.db-wal"), log)
        other.stop()
    else:
        with contextlib.closing(sqlite3.connect(tmp_path / "other.db", isolation_level=None)) as db:
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("CREATE TABLE noise (x)")
            shutil.copy(tmp_path / "other.db-wal", log)
    before = (path.read_bytes(), log.read_bytes())
    with pytest.raises(SiteError, match="syncd reindex"):
        copies.refuse_torn(path)
    assert (path.read_bytes(), log.read_bytes()) == before


def test_no_index_and_one_without_a_log_are_not_looked_at(tmp_path: Path) -> None:
    copies.refuse_torn(tmp_path / "index.db")
    (tmp_path / "index.db").write_bytes(b"noise")
    (tmp_path / "index.db-wal").write_bytes(b"")
    copies.refuse_torn(tmp_path / "index.db")


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on this is the next syncd, which has one more migration."""
    nexts = copy.deepcopy(schema.migrations)
    nexts(name="later_tables")(lambda db: db.conn.execute("ALTER TABLE item ADD COLUMN colour TEXT"))
    monkeypatch.setattr(schema, "migrations", nexts)


def test_an_index_is_copied_before_it_is_migrated_and_only_then(world: World, request: pytest.FixtureRequest) -> None:
    wiring.open_index(world.settings).close()
    assert copies.found(folder(world)) == []
    world.stop()
    request.getfixturevalue("later")
    wiring.open_index(world.settings).close()
    wiring.open_index(world.settings).close()
    names = [re.sub(r"^index-[0-9-]{10}", "", path.name) for path in copies.found(folder(world))]
    assert names == [f"-schema-{SCHEMA}.db"]


def test_the_earlier_syncd_rebuilds_from_the_copy_before_the_migration(
    world: World, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = world.index.rows(VERSIONS)[0]["num"]
    world.index.run("UPDATE item SET vanished_at = 7 WHERE num = ?", gone)  # what no sidecar tells
    before = world.index.rows(VERSIONS)
    world.stop()
    request.getfixturevalue("later")
    with contextlib.closing(wiring.open_index(world.settings)) as index:
        copies.make(index, folder(world), "9999-01-01")  # of the later syncd, and newer than all
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=f"this syncd knows schema {SCHEMA}"):
        wiring.open_index(world.settings)
    assert rebuilt(world) == before
    assert world.index.value("SELECT vanished_at FROM item WHERE num = ?", gone) == 7


def schema_of(path: Path) -> int:
    with contextlib.closing(sqlite3.connect(path)) as db:
        return schema.number_of(Database(db))


def test_no_reader_migrates_the_index_under_a_service_that_still_runs(
    world: World, request: pytest.FixtureRequest
) -> None:
    path = world.settings.state_path / "index.db"
    world.stop()
    request.getfixturevalue("later")
    call = Call(clock=SystemClock())
    call.__dict__["settings"] = world.settings
    with Lock(world.settings.state_path), pytest.raises(UsageError, match="restart it first"), index_if_any(call):
        pass
    assert schema_of(path) == SCHEMA
    with index_if_any(call) as index:
        assert index is not None
    assert schema_of(path) == SCHEMA + 1
