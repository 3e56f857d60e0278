"""A process that takes the cycle through power cuts, on a journalling file system or on the forgetful one.

    LD_PRELOAD=libfault.so python -m tests.faults.blackout ext4 --seeds 2 --shard 0 --shards 2

Index and archive are on two file systems, the normal install: on one, SQLite's fsync would make the archive's names
durable, too, and hide a missing fsync. (On the forgetful one they are together: it hides nothing.) Each stage of the
cycle is lived once, by a forked mirror that is stopped before every persistence call. What its disks would hold, were
the power to go there, is copied: what reached them, and nothing that waits in memory. A forked process with mounts of
its own mounts the copy in the same place, whatever has a journal replays it, and a new mirror starts there, sweeps
once, and is checked; then the stopped one goes on. The office and the drop are other machines: they remember all.

In the middle of the first backfill a recovery is gone through in the same way. The last line printed is a `Report`.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import json
import os
import random
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Protocol

from syncd.schema import Row
from tests.faults.crashing import watch
from tests.faults.cycle import REINDEXING, Cycle, Stage, quicken, sync
from tests.faults.forgetful import CUT, RESTORE, SAVE, Tree, load, serving, set_word
from tests.faults.injection import GO_ON, Injection
from tests.faults.judging import judge, outside_of, said_since
from tests.faults.mounts import (
    FILE_SYSTEMS,
    MEMORY,
    Disk,
    FileSystem,
    copy_image,
    in_namespace,
    leave_namespace,
    make_image,
)
from tests.faults.points import Report
from tests.world import World

BLOCK: Final = 32  # neighbouring calls together: they often leave the same
CHANCES: Final = (0.0, 0.5, 0.9)  # that what was not synced survives, on the forgetful file system
HEALED: Final = ("an old index is put back", REINDEXING.name)  # the next start brings into the index what it lacks
RECOVERY_AT: Final = 400  # the call of the first backfill at which the power goes
POINT: Final = 60.0  # seconds of real time at most
FORGETFUL: Final = "forgetful"


class Storage(Protocol):
    """What a mirror's folders are on."""

    def mounted(self) -> AbstractContextManager[None]:
        """The live file systems, new and empty."""

    def keep(self) -> object:
        """Copy what would be left, were the power to go now; equal to another one where surely the same is left."""

    def after_a_cut(self, point: int) -> AbstractContextManager[None]:
        """In a namespace of its own: the copy, mounted in the place of the live ones."""


class Journalled:
    """ext4 or xfs, one for the index and the audit log and one for the archive; a cut's journals are replayed."""

    def __init__(self, folder: Path, root: Path, kind: FileSystem) -> None:
        places = {"state": root, "archive": root / "archive"}  # the second one on a folder of the first
        self._disks = [Disk(folder / f"{name}.disk", place, kind) for name, place in places.items()]

    @contextlib.contextmanager
    def mounted(self) -> Iterator[None]:
        with contextlib.ExitStack() as after:
            for disk in self._disks:
                make_image(disk.image, disk.kind)
                _install(disk.folder)
                disk.mount()
                after.callback(disk.unmount)
            yield

    def keep(self) -> object:
        return [copy_image(disk.image, disk.kept) for disk in self._disks]

    @contextlib.contextmanager
    def after_a_cut(self, point: int) -> Iterator[None]:
        for disk in self._disks:
            disk.image = disk.kept
            disk.mount()
        yield


class Forgetful:
    """One file system that forgets what was not synced, or some of it by lot."""

    def __init__(self, folder: Path, root: Path) -> None:
        self._kept, self._root = folder / "tree", root

    @contextlib.contextmanager
    def mounted(self) -> Iterator[None]:
        with serving(Tree(), self._root):
            for name in ("archive", "state"):
                _install(self._root / name)
            yield

    def keep(self) -> object:
        set_word(self._root, SAVE, str(self._kept))
        return object()  # what it forgets is drawn by lot

    @contextlib.contextmanager
    def after_a_cut(self, point: int) -> Iterator[None]:
        with serving(load(self._kept), self._root):
            set_word(self._root, CUT, f"{random.Random(point).randrange(1 << 30)} {CHANCES[point % len(CHANCES)]}")
            set_word(self._root, RESTORE, "")
            yield


def _install(folder: Path) -> None:
    """A folder that the installation makes, durably."""
    folder.mkdir(exist_ok=True)
    sync(folder.parent)


@dataclass(frozen=True)
class Plan:
    """Which calls are points: every so-many-th, in blocks of neighbours, of which a shard has every so-many-th.

    `only`: this point instead, as `seed:stage:call`.
    """

    every: int
    offset: int
    shard: int
    shards: int
    only: str

    def has(self, seed: int, stage: str, call: int) -> bool:
        """Whether the power goes before this call, counted from 1."""
        if self.only:
            return self.only == f"{seed}:{stage}:{call}"
        number, rest = divmod(call + self.offset, self.every)
        return rest == 0 and number // max(1, BLOCK // self.every) % self.shards == self.shard


class Server:
    """Goes through the stages of a seed and lets the power go at every planned call; its `report`."""

    def __init__(self, folder: Path, kind: str, injection: Injection, plan: Plan) -> None:
        self.report = Report()
        self._folder, self._kind, self._injection, self._plan = folder, kind, injection, plan
        self._seed = 0
        self._known: set[bytes] = set()
        self._good: list[object] = []  # what was left by cuts of this stage, and was found good

    def sweep(self, seed: int) -> None:
        """Every planned point of one seed."""
        self._seed, cycle, root = seed, Cycle(seed), self._folder / str(seed) / "mirror"
        world = cycle.start(root)
        shutil.rmtree(world.archive)
        folder = root.parent
        storage = (
            Forgetful(folder, root) if self._kind == FORGETFUL else Journalled(folder, root, _file_system(self._kind))
        )
        with storage.mounted():
            for stage in (*cycle.stages(), REINDEXING):
                stage.happens(world)
                world.expected.note(world.practice)  # drawn once, not at every point
                self._explore(world, stage, storage)
            world.restart()
            world.check()
            world.stop()

    def _explore(self, world: World, stage: Stage, storage: Storage) -> None:
        """One life of a mirror, and what would be, had the power gone at these calls?"""
        self._known.clear()
        self._good.clear()
        gc.collect()
        gc.freeze()
        lines, made = len(world.log.lines), 0

        def look(what: bytes) -> bytes:
            nonlocal made
            made += 1
            if self._plan.has(self._seed, stage.name, made):
                left = storage.keep(), outside_of(world), said_since(world, lines)
                self._note(stage, made, left, lambda: self._outcome(world, stage, storage, lines, made))
            if (stage.name, made) == ("first backfill", RECOVERY_AT) and self._kind != FORGETFUL:
                storage.keep()
                self._note_recovery(world, storage)
            self.report.count(what.decode())
            return GO_ON

        watch(world, stage, self._injection, look)

    def _outcome(self, world: World, stage: Stage, storage: Storage, lines: int, call: int) -> Row:
        """In a process and a namespace of its own: what is there after a cut, and what a new mirror makes of it."""
        known = self._known.copy()
        with storage.after_a_cut(call), ExitStack() as after:
            after.callback(lambda: world.lanes.closing.close())  # noqa: PLW0108 - of the lanes that there are then
            lost = missing_versions(world, in_index=stage.name not in HEALED)
            assert not lost, "\n".join(lost)
            stage.first(world)
            return {**judge(world, lines, self._known), "states": self._known - known}

    def _note_recovery(self, world: World, storage: Storage) -> None:
        """The power goes here, and at every planned call of the life after that."""

        def recover() -> Report:
            self.report = Report()
            with storage.after_a_cut(0):
                self._explore(world, Stage("recovery", lambda _: None), storage)
            return self.report

        self.report.add(in_namespace(recover, 100 * POINT))

    def _note(self, stage: Stage, call: int, left: object, outcome: Callable[[], Row]) -> None:
        self.report.points += 1
        self.report.struck += 1
        if left in self._good:
            self.report.known += 1
            return
        try:
            seen = in_namespace(outcome, POINT)
        except AssertionError as error:
            self.report.violations.append((f"{self._seed}:{stage.name}:{call}", str(error)))
        else:
            self.report.known += bool(seen["known"])
            self._known |= seen["states"]
            self._good.append(left)


def _file_system(kind: str) -> FileSystem:
    return next(each for each in FILE_SYSTEMS if each == kind)


def missing_versions(world: World, *, in_index: bool) -> list[str]:
    """What was said to be archived, and is not in the archive as it was, or (`in_index`) not in the index."""
    missing, reported = [], [line for line in world.log.lines if line.get("event") == "document_archived"]
    recorded = _recorded(world.settings.state_path) if in_index and reported else set()
    for line in reported:
        pat_num, _, name = str(line["item"]).partition("/")
        files = (world.archive / "patients" / pat_num / name).glob(f"{line['version']}-*")
        media = [path for path in files if path.suffix != ".json"]
        if not any(hashlib.sha256(path.read_bytes()).hexdigest()[:12] in path.name for path in media):
            missing.append(f"{line['item']} version {line['version']} was reported, and is not in the archive")
        if in_index and line["seq"] not in recorded:
            missing.append(f"seq {line['seq']} was reported, and is not in the index")
    return missing


def _recorded(state: Path) -> set[int]:
    """The sequence numbers in a copy of the index: to look must not be to recover."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        for path in state.glob("index.db*"):
            if not path.name.endswith("-shm"):
                shutil.copy(path, folder)
        with closing(sqlite3.connect(Path(folder, "index.db"))) as copy:
            return {row[0] for row in copy.execute("SELECT seq FROM version")}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=[*FILE_SYSTEMS, FORGETFUL])
    parser.add_argument("--seeds", type=int, nargs="+", default=[2])
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--shard", type=int, default=0)
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--offset", type=int, default=0)
    parser.add_argument("--point", default="", help="seed:stage:call")
    asked = parser.parse_args()
    plan = Plan(asked.every, asked.offset, asked.shard, asked.shards, asked.point)
    leave_namespace()
    gc.disable()
    quicken()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="syncd-power-", dir=MEMORY) as folder:
        server = Server(Path(folder), asked.kind, Injection(), plan)
        for seed in asked.seeds:
            server.sweep(seed)
    server.report.core_seconds = round(sum(os.times()[:4]), 1)
    server.report.seconds = round(time.monotonic() - started, 1)
    print(json.dumps(asdict(server.report)))  # noqa: T201 - its answer


if __name__ == "__main__":
    main()
