"""The machine's own disks, of the archive and of the state: full, out of inodes, read-only.

Small file systems in memory, in a mount namespace of their own. Each is a named state, loses nothing, and ends by
itself when the disk is well again.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from syncd.demo.practice import Practice
from syncd.errors import SiteError
from tests.faults.mounts import in_namespace, lack
from tests.small import HOUR, Small, small, troubles, versions
from tests.world import World

LIMIT = 100.0  # seconds for one scenario


@pytest.fixture(autouse=True)
def _root() -> None:
    lack(["root"] if os.geteuid() else [])


def mount(folder: Path, options: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def struggle(world: World, hours: float) -> str:
    """Take turns as the daemon does: one that the disk ends is taken again half a minute later. Its reason."""
    end, said = world.clock.now() + hours * HOUR, ""
    while world.clock.now() < end:
        for turn in (world.lanes.api_lane.turn, world.lanes.pull_lane.turn):
            try:
                turn(world.clock.now())
            except SiteError as error:
                said = error.reason
        world.clock.advance(30.0)
    return said


def add(practice: Practice, one: Small, world: World) -> None:
    with practice.as_of(world.clock.now() - HOUR):
        for _ in range(3):
            practice.add_document(one.patient, "jpg")


def through(folder: Path, where: str, options: str, ail: Callable[[Path], None], heal: Callable[[Path], None]) -> str:
    """A mirror whose disk ails for three hours while documents arrive; the reason it gave, once all is well again."""
    disk = folder / where
    mount(disk, options)
    one = small()
    world = World.start(folder, practice=one.practice, archive={"reserve": "1 B"})
    world.run()
    before = versions(world)
    ail(disk)
    add(one.practice, one, world)
    refused = struggle(world, 3)
    assert versions(world) == before
    world.check_safe()
    said = troubles(world).get("archive", "") or refused
    heal(disk)
    struggle(world, 4)
    world.check()
    assert troubles(world) == {}
    assert len(versions(world)) > len(before)
    world.stop()
    return said


def fill(disk: Path) -> None:
    """Leave no byte free."""
    with contextlib.suppress(OSError), (disk / "lost+found").open("wb", buffering=0) as filler:
        while filler.write(bytes(1 << 16)):
            pass
    with contextlib.suppress(OSError), (disk / "lost+found").open("ab", buffering=0) as filler:
        while filler.write(b"x"):
            pass


def exhaust(disk: Path) -> None:
    """Leave no inode free."""
    (disk / "lost+found").mkdir()
    with contextlib.suppress(OSError):
        for number in range(1 << 20):
            (disk / "lost+found" / str(number)).touch()


def test_full_archive_disk_is_named_and_ends_with_room(tmp_path: Path) -> None:
    def work() -> str:
        return through(tmp_path, "archive", "size=4m", fill, lambda disk: remount(disk, "size=16m"))

    assert in_namespace(work, LIMIT) == "archive_full"


def test_archive_disk_without_inodes_is_named_and_ends_with_more(tmp_path: Path) -> None:
    def work() -> str:
        return through(tmp_path, "archive", "nr_inodes=200", exhaust, lambda disk: remount(disk, "nr_inodes=9000"))

    assert in_namespace(work, LIMIT) == "archive_full"


def test_read_only_archive_disk_is_named_and_ends_with_writing(tmp_path: Path) -> None:
    def work() -> str:
        return through(tmp_path, "archive", "size=16m", lambda d: remount(d, "ro"), lambda d: remount(d, "rw"))

    assert in_namespace(work, LIMIT) == "archive_read_only"


def test_full_state_disk_is_named_and_loses_no_list_and_no_document(tmp_path: Path) -> None:
    def work() -> str:
        return through(tmp_path, "state", "size=4m", fill, lambda disk: remount(disk, "size=32m"))

    assert in_namespace(work, LIMIT) == "state_full"
