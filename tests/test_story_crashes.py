"""A process may end between any two things it does: the next one ends up where an undisturbed one would have been.

The fuse counts every call to the outside (API, drop) and every call that makes something durable (fsync, link, rename,
unlink, mkdir, a commit of the index). At the chosen one the process is gone: that call and all later ones raise
`Crash`, so that no clean-up code can help, and a new process starts on what is on the disk, in the office and on the
drop. To crash after a call is to crash before the next one.
"""

from __future__ import annotations

import contextlib
import os
import random
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from syncd.demo.adapter import OfficeAdapter
from syncd.model import Item
from syncd.schema import Row
from syncd.scrub import reindex
from syncd.wiring import open_archive
from tests.small import HOUR, LEAST, Small, backfilling, serving, settle, small, versions
from tests.world import DropInMemory, World

pytestmark = pytest.mark.slow  # minutes in all: `make quick` leaves it out, `make test` does not

SHARDS = 16  # so that several workers share the points
PAIRS = 64
FEWEST_POINTS = 200  # of the undisturbed run: "no call was seen" must not pass for "no crash did harm"
DURABLE = ("fsync", "link", "replace", "unlink", "mkdir")
OUTSIDE = ("pull", "remove", "look", "names")


class Crash(BaseException):
    """The process is gone."""


class Fuse:
    """Blows at the `at`-th call that matters since it was armed, and stays blown; 0: never."""

    at = calls = 0

    def arm(self, at: int) -> None:
        self.at, self.calls = at, 0

    def __call__(self) -> None:
        self.calls += 1
        if 0 < self.at <= self.calls:
            raise Crash

    def before(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self()
            return real(*args, **kwargs)

        return call


@pytest.fixture
def fuse(monkeypatch: pytest.MonkeyPatch) -> Fuse:
    """A fuse before every call that matters. No disk is synced: what a process wrote survives its death without."""
    own, connect = Fuse(), sqlite3.connect

    class Connection(sqlite3.Connection):
        def execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
            return super().execute(sql.replace("synchronous=FULL", "synchronous=OFF"), *parameters)

        def commit(self) -> None:
            own()
            super().commit()

    monkeypatch.setattr(os, "fsync", lambda _: None)

    monkeypatch.setattr(sqlite3, "connect", lambda *a, **k: connect(*a, factory=Connection, **k))
    for owner, names in ((os, DURABLE), (OfficeAdapter, ("send",)), (DropInMemory, OUTSIDE)):
        for name in names:
            monkeypatch.setattr(owner, name, own.before(getattr(owner, name)))
    return own


def points(folder: Path, fuse: Fuse) -> int:
    """How many calls that matter an undisturbed backfill makes after its start."""
    world = backfilling(folder, small())
    fuse.arm(0)
    world.run()
    world.stop()
    assert fuse.calls >= FEWEST_POINTS
    return fuse.calls


def run_and_restart(world: World, fuse: Fuse, *deaths: int) -> None:
    """Let one process after another die at these calls; the last one lives."""
    for number, at in enumerate(deaths):
        fuse.arm(at)
        with contextlib.suppress(Crash):
            if number:
                world.restart(since=world.scope.since)
            world.run()
    fuse.arm(0)
    world.restart(since=world.scope.since)


def check_after(world: World, crashes: int) -> None:
    world.run()
    world.nap = HOUR  # a day of late looks at the drop, in few turns
    settle(world)
    assert set(versions(world)) == {1}
    assert len(world.placements()) <= LEAST + crashes
    assert world.index.value("SELECT count(*) FROM duty") == 0
    assert world.index.value("PRAGMA integrity_check") == "ok"


@pytest.mark.parametrize("shard", range(SHARDS))
def test_crash_at_any_call_costs_at_most_one_placement(tmp_path: Path, fuse: Fuse, shard: int) -> None:
    for at in range(1 + shard, points(tmp_path / "undisturbed", fuse) + 1, SHARDS):
        world = backfilling(tmp_path / str(at), small())
        run_and_restart(world, fuse, at)
        check_after(world, crashes=1)
        world.stop()


@pytest.mark.parametrize("shard", range(SHARDS))
def test_crash_in_the_recovery_from_a_crash_heals_too(tmp_path: Path, fuse: Fuse, shard: int) -> None:
    rng = random.Random(f"pairs {shard}")
    last = points(tmp_path / "undisturbed", fuse)
    for number in range(PAIRS // SHARDS):
        world = backfilling(tmp_path / str(number), small())
        run_and_restart(world, fuse, rng.randint(1, last), rng.randint(1, 40))
        check_after(world, crashes=2)
        world.stop()


def test_crash_at_any_call_while_things_change_keeps_every_version(tmp_path: Path, fuse: Fuse) -> None:
    rng = random.Random(7)
    one = small()
    world = serving(tmp_path, one)
    world.run()
    for _ in range(40):
        change(one, rng)
        fuse.arm(rng.randint(1, 120))
        with contextlib.suppress(Crash):
            world.run(hours=2)
        fuse.arm(0)
        world.restart()
        world.check_safe()
    world.run(hours=30)
    world.check()


def change(one: Small, rng: random.Random) -> None:
    """Something that staff do, to one of the small practice's things."""
    practice = one.practice
    rng.choice(
        (
            lambda: practice.replace_bytes(one.document),
            lambda: practice.edit_document(one.letter),
            lambda: practice.add_document(one.patient, "jpg"),
            lambda: practice.edit_sheet(one.sheet),
            lambda: practice.change_mount(one.mount),
        )
    )()


def test_crash_while_a_mount_is_marked_to_be_fetched_again_loses_no_part_of_it(tmp_path: Path, fuse: Fuse) -> None:
    one = small()
    world = serving(tmp_path, one)
    world.run()
    world.run(hours=1)
    for at in range(1, 16):
        world.index.set_item(Item(one.patient, "mount", one.mount), "refetch_at = ?", world.clock.now())
        before = len(world.office.arrivals)
        fuse.arm(at)
        with contextlib.suppress(Crash):
            world.run(hours=3)
        fuse.arm(0)
        world.restart()
        world.run(hours=3)
        assert world.sent("/documents/DownloadSftp", since=before, MountNum=one.mount), at
        assert world.sent("/documents/DownloadMount", since=before, MountNum=one.mount), at


def test_ends_of_our_own_do_not_make_a_mount_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = small()
    world = serving(tmp_path, one)
    world.run()
    with one.practice.as_of(world.clock.now() - 1200.0):
        scanned = one.practice.add_document(one.patient, "jpg")
        one.practice.move_into_mount(scanned, one.mount)
    one.practice.change_mount(one.mount)
    send, ends = OfficeAdapter.send, iter(range(3))

    def cut(adapter: OfficeAdapter, request: Any, *rest: Any, **named: Any) -> Any:
        if "DownloadMount" in str(request.url) and next(ends, None) is not None:
            raise Crash
        return send(adapter, request, *rest, **named)

    monkeypatch.setattr(OfficeAdapter, "send", cut)
    for _ in range(3):
        with pytest.raises(Crash):
            world.run(hours=8)
        world.restart()
    world.run(hours=3)
    assert world.media(one.patient, "mount-image", scanned)


# --- the index is disposable


def rows_of_versions(world: World) -> list[Row]:
    return world.index.rows(
        "SELECT seq, pat_num, kind, num, version, sidecar, revision, sha256, bytes FROM version ORDER BY seq"
    )


def grown(folder: Path, copies: int = 0) -> tuple[World, list[Path]]:
    """A mirror that has seen some life, at rest; with copies of its index from moments on the way."""
    one, rng = small(documents=4), random.Random(3)
    world, kept = serving(folder, one), list[Path]()
    for number in range(12):
        if number:  # half an hour ago: what is placed while its stamp is young is fetched once more, by design
            with one.practice.as_of(world.clock.now() - 1800.0):
                change(one, rng)
        world.run(seconds=rng.uniform(60.0, 5400.0))
        if len(kept) < copies and number % 2 == 0:
            kept.append(folder / f"copy-{number}.db")
            with contextlib.closing(sqlite3.connect(kept[-1])) as copy:
                world.index.db.conn.backup(copy)
    world.run(hours=2)
    world.check()
    return world, kept


def remove_index(world: World) -> None:
    world.stop()
    for path in world.settings.state_path.glob("index.db*"):
        path.unlink()


def test_images_of_which_the_archive_lacks_the_mount_vanish_with_it_after_the_index_was_lost(tmp_path: Path) -> None:
    world = World.start(tmp_path, interval=10.0, sync={"kinds": ["document", "mount-image"]})
    pat = world.practice.add_patient()
    mount, other = world.practice.add_mount(pat, 2), world.practice.add_mount(pat, 1)
    world.run(hours=2)
    gone = [row["DocNum"] for row in world.practice.mount_images(mount)]
    stays = [row["DocNum"] for row in world.practice.mount_images(other)]
    world.practice.delete_mount(mount)
    remove_index(world)
    reindex(world.settings, open_archive(world.settings), world.clock.now())
    world.restart()
    world.run(hours=60)
    assert {world.state(pat, "mount-image", num) for num in gone} == {"vanished"}
    assert {world.state(pat, "mount-image", num) for num in stays} == {"archived"}
    world.stop()


def test_index_rebuilt_from_the_archive_alone_knows_the_same_and_asks_for_nothing(tmp_path: Path) -> None:
    world, _ = grown(tmp_path)
    before, sent = rows_of_versions(world), len(world.office.arrivals)
    remove_index(world)
    reindex(world.settings, open_archive(world.settings), world.clock.now())
    world.restart()
    assert rows_of_versions(world) == before
    world.sweep()
    world.run(hours=2)
    assert world.placements(sent) == []
    assert rows_of_versions(world) == before
    world.check()


@pytest.mark.parametrize("age", range(5))
def test_index_from_a_backup_of_any_age_adopts_what_it_does_not_know(tmp_path: Path, age: int) -> None:
    world, copies = grown(tmp_path, copies=5)
    before, sent = rows_of_versions(world), len(world.office.arrivals)
    remove_index(world)
    copies[age].rename(world.settings.state_path / "index.db")
    world.restart()
    world.sweep()
    world.run(hours=26)
    assert rows_of_versions(world) == before
    assert world.placements(sent) == []
    world.check()


def test_reindex_after_a_crash_before_the_record_finds_the_published_file(tmp_path: Path, fuse: Fuse) -> None:
    world = backfilling(tmp_path, small())
    fuse.arm(points(tmp_path / "undisturbed", fuse) // 2)
    with contextlib.suppress(Crash):
        world.run()
    fuse.arm(0)
    remove_index(world)
    reindex(world.settings, open_archive(world.settings), world.clock.now())
    world.restart(since=world.scope.since)
    world.run(hours=50)
    found = world.findings()
    assert not found.wrong + found.lacking
    assert len(world.placements()) <= LEAST + 1
    world.run(hours=24)
