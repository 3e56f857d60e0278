"""What befalls a mirror in a simulated year: crashes and failing disks, an office and a drop that fail or lie, by seed.

Every peril here is one that a client can survive. Left out is what no client can prove: a 201 for half a file or for
another one's bytes (catalogue B27), and a list that lies in the same way twice, a day apart, with no true answer
between.
"""

from __future__ import annotations

import errno
import os
import random
import sqlite3
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from syncd.demo.adapter import OfficeAdapter
from syncd.demo.faults import Fault
from syncd.demo.site import DropFile
from syncd.errors import SiteError, TransientError
from syncd.model import ListKey, PullJob
from tests.world import DropInMemory, World

DURABLE = ("fsync", "link", "replace", "unlink", "mkdir")
OUTSIDE = ("pull", "remove", "look", "names")
DISK = {errno.ENOSPC: sqlite3.SQLITE_FULL, errno.EIO: sqlite3.SQLITE_IOERR, errno.EROFS: sqlite3.SQLITE_READONLY}
HOUR = 3600.0


class Crash(BaseException):
    """The process is gone."""


class Machine:
    """Where the process runs: it may be gone at any call that matters, and its disks may fail for a while.

    Such calls are those to the API and the drop, and those that make something durable: fsync, link, rename, unlink,
    mkdir, a commit of the index. At the chosen one the process is gone: that call and all later ones raise `Crash`,
    so that no clean-up code can help. Only calls of a `running` process count.
    """

    def __init__(self) -> None:
        self.running = False
        self.calls = self.failed = self.crashes = 0
        self.before_the_drop: list[Callable[[], None]] = []  # done once, before the next call to the drop
        self._dies_at = 0
        self._disk_fails: tuple[int, int, int] = (0, 0, 0)  # from this call, to that one, with this errno

    def die_in(self, calls: int) -> None:
        """The process will be gone after so many more calls that matter."""
        self._dies_at = self.calls + calls

    def fail_in(self, calls: int, times: int, number: int) -> None:
        """After so many more calls that matter, those to the disk fail with this errno, for `times` of all calls."""
        self._disk_fails = (self.calls + calls, self.calls + calls + times, number)

    @property
    def doomed(self) -> bool:
        """Whether the process will be gone soon."""
        return self._dies_at > 0

    def start_again(self) -> None:
        """Another process runs here now; its disks are what they are."""
        self._dies_at = 0

    def healthy(self) -> None:
        """Nothing will happen any more."""
        self._dies_at, self._disk_fails = 0, (0, 0, 0)

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Stand between the product and the functions of the system."""
        machine, connect = self, sqlite3.connect

        class Connection(sqlite3.Connection):
            def commit(self) -> None:
                number = machine._called()
                if number:
                    error = sqlite3.OperationalError("the disk fails")
                    error.sqlite_errorcode, error.sqlite_errorname = DISK[number], errno.errorcode[number]
                    raise error
                super().commit()

        def opened(*args: Any, **kwargs: Any) -> sqlite3.Connection:
            return connect(*args, factory=Connection, **kwargs)

        patch.setattr(sqlite3, "connect", opened)
        for owner, names in ((OfficeAdapter, ("send",)), (DropInMemory, OUTSIDE)):
            for name in names:
                patch.setattr(owner, name, self._before(getattr(owner, name), local=False))
        for name in DURABLE:
            patch.setattr(os, name, self._before(getattr(os, name), local=True))

    def _before(self, real: Callable[..., Any], local: bool) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            number = self._called(local)
            if number:
                raise OSError(number, "the disk fails")
            while real.__name__ in OUTSIDE and self.before_the_drop:
                self.before_the_drop.pop()()
            return real(*args, **kwargs)

        return call

    def _called(self, local: bool = True) -> int:
        """Count one call. The errno that it shall fail with, or 0."""
        if not self.running:
            return 0
        self.calls += 1
        if 0 < self._dies_at <= self.calls:
            raise Crash
        start, end, number = self._disk_fails
        if not (local and start <= self.calls < end):
            return 0
        self.failed += 1
        return number


ANYTHING: dict[str, Any] = {}
PLACEMENT = {"method": "POST"}
NO_THUMBNAILS = {"path": "*/Download*"}  # any answer settles them (design.md section 7), whatever files it brings
DOCUMENTS, SHEETS = {"path": "/documents"}, {"path": "/sheets"}
SPORADIC: tuple[tuple[str, dict[str, Any]], ...] = (
    ("gateway_timeout", {**ANYTHING, "when": "before", "seconds": 60.0}),
    ("gateway_timeout", {**PLACEMENT, "when": "during", "seconds": 60.0}),
    ("gateway_timeout", {**PLACEMENT, "when": "during", "late": 420.0}),
    ("gateway_timeout", {**PLACEMENT, "when": "during", "late": 3000.0}),
    ("gateway_timeout", {**PLACEMENT, "when": "during", "late": 70_000.0}),
    ("gateway_timeout", {**PLACEMENT, "when": "after", "seconds": 60.0}),
    ("cut", {**ANYTHING, "when": "before"}),
    ("cut", {**PLACEMENT, "when": "during", "late": 200.0}),
    ("cut", {**PLACEMENT, "when": "after"}),
    ("cut", {**ANYTHING, "when": "body"}),
    ("hang", {**ANYTHING, "seconds": 100.0}),
    ("slow", {**ANYTHING, "seconds": 25.0}),
    ("drip", {**ANYTHING, "seconds": 0.5, "size": 700}),
    ("too_many", {**ANYTHING, "seconds": 30.0}),
    ("too_many", {**ANYTHING, "seconds": 1e9}),
    ("status", {**ANYTHING, "status": 500}),
    ("status", {**ANYTHING, "status": 503}),
    ("status", {**PLACEMENT, "status": 400, "text": "File not found"}),
    ("html", ANYTHING),
    ("wrong_shape", ANYTHING),
    ("redirect", ANYTHING),
    ("econnector_down", ANYTHING),
    ("foreign_row", DOCUMENTS),
    ("foreign_row", SHEETS),
    ("duplicated", DOCUMENTS),
    ("duplicated", SHEETS),
    ("zero_byte", NO_THUMBNAILS),
    ("no_file", NO_THUMBNAILS),
    ("late_file", {**NO_THUMBNAILS, "late": 3.0}),
    ("late_file", {**NO_THUMBNAILS, "late": 60.0}),
    ("late_file", {**NO_THUMBNAILS, "late": 3000.0}),
    ("location", {**PLACEMENT, "text": "drop.example.org/syncd/another.jpg"}),
    ("site_error", PLACEMENT),
)
LASTING: tuple[tuple[str, dict[str, Any]], ...] = (
    ("econnector_down", ANYTHING),
    ("two_econnectors", ANYTHING),
    ("key_revoked", ANYTHING),
    ("cut", ANYTHING),
    ("status", {**ANYTHING, "status": 503}),
    ("html", ANYTHING),
    ("too_many", ANYTHING),
    ("site_error", {**PLACEMENT, "text": "Sftp connection error: No space left on device"}),
    ("no_file", NO_THUMBNAILS),
    ("gateway_timeout", PLACEMENT),
)
BROKEN = (SiteError("drop_refused"), SiteError("host_key_changed"), TransientError("drop_unreachable"))
JUMPS = (-HOUR, -90.0, -1.0, 90.0, HOUR, 24 * HOUR)  # seconds; the year of a clock is the whole world's


class Perils:
    """Everything but crashes. `step` lets the world get worse or better; `cease` ends all of it."""

    def __init__(self, world: World, machine: Machine, seed: int, chance: float) -> None:
        self.counts: Counter[str] = Counter()
        self.unmounted = False
        self._world, self._machine, self._rng = world, machine, random.Random(f"perils {seed}")
        self._chance = chance
        self._struck: list[Fault] = []
        self._lies: dict[ListKey, tuple[Fault, float]] = {}
        self._ends: tuple[float, Callable[[], None]] | None = None

    def begin(self) -> None:
        """From now on single requests fail, and files change while they are read."""
        for kind, details in SPORADIC:
            self._add(kind, probability=self._chance, times=None, **details)
        self._world.drop.meddle = self._meddle

    def step(self) -> None:
        """Some time has passed."""
        if self._ends is not None and self._world.clock.now() >= self._ends[0]:
            self._end()
        self._lie()
        chance = self._rng.random()
        if chance < 0.04 and self._ends is None:
            self._outage()
        elif chance < 0.14:
            self.counts["disk fails"] += 1
            self._machine.fail_in(self._rng.randint(1, 60), self._rng.choice((1, 1, 2, 5, 30)), self._errno())
        elif chance < 0.16:
            self.counts["clock jumps"] += 1
            self._world.clock.set(self._world.clock.now() + self._rng.choice(JUMPS))
        elif chance < 0.18:
            self._world.drop.poison = "*"
        else:
            self._world.drop.poison = ""

    def cease(self) -> None:
        """Nothing is wrong any more, and nothing will be."""
        if self._ends is not None:
            self._end()
        self._world.office.faults.clear()
        self._lies.clear()
        self._world.drop.meddle, self._world.drop.poison = None, ""
        self._machine.healthy()

    @property
    def _elsewhere(self) -> Path:
        return self._world.archive.with_name("unmounted")

    @property
    def faults(self) -> int:
        """How many faults there were; one that lasted for hours is one."""
        return sum(fault.fired for fault in self._struck) + self.counts.total() + self._machine.failed

    def _add(self, kind: Any, **details: Any) -> Fault:
        fault = self._world.office.faults.add(kind, **details)
        self._struck.append(fault)
        return fault

    def _errno(self) -> int:
        return self._rng.choice(tuple(DISK))

    # --- what lasts

    def _outage(self) -> None:
        world, until = self._world, self._world.clock.now() + self._rng.choice((0.5, 3.0, 12.0, 40.0)) * HOUR
        chosen = self._rng.randrange(len(LASTING) + 6)
        self.counts["outages"] += 1
        if chosen < len(LASTING):
            kind, details = LASTING[chosen]
            fault = world.office.faults.add(kind, times=None, **details)  # type: ignore[arg-type]  # of the table
            self._ends = until, lambda: world.office.faults.clear(fault)
        elif chosen < len(LASTING) + 3:
            world.drop.broken = BROKEN[chosen - len(LASTING)]
            self._ends = until, self._drop_is_back
        elif chosen == len(LASTING) + 3:
            world.site.down = True
            self._ends = until, self._drop_is_back
        elif chosen == len(LASTING) + 4:
            self._machine.fail_in(1, 400, self._errno())
        else:
            world.archive.rename(self._elsewhere)
            world.archive.mkdir()  # the mount point shows
            self.unmounted, self._ends = True, (until, self._mount_again)

    def _end(self) -> None:
        assert self._ends is not None
        self._ends[1]()
        self._ends = None

    def _drop_is_back(self) -> None:
        self._world.drop.broken, self._world.site.down = None, False

    def _mount_again(self) -> None:
        assert list(self._world.archive.iterdir()) == [], "syncd wrote into an empty mount point"
        self._world.archive.rmdir()
        self._elsewhere.rename(self._world.archive)
        self.unmounted = False

    # --- lists that lie, but never twice without a true answer between

    def _lie(self) -> None:
        world = self._world
        for key, (fault, noted_at) in tuple(self._lies.items()):
            if fault.fired and not noted_at:
                self._lies[key] = fault, world.clock.now()
            elif noted_at and world.index.polled_at(*key) > noted_at:
                world.office.faults.clear(fault)
                del self._lies[key]
        if self._rng.random() < 0.05:
            for listed in self._rng.sample(world.index.lists(), k=1) if world.index.lists() else ():
                self._lie_about(listed.key)

    def _lie_about(self, key: ListKey) -> None:
        if key not in self._lies:
            kind, size = self._rng.choice((("empty", 0), ("truncated", 1), ("truncated", 3)))
            self._lies[key] = self._add(kind, path=f"/{key[1]}", params={"PatNum": key[0]}, size=size), 0.0

    # --- another writer on the drop

    def _meddle(self, job: PullJob) -> None:
        """A file changes while it is read, now and then, and is itself again before anybody reads it again."""
        if self._rng.random() >= 0.03:
            return
        self.counts["changed while read"] += 1
        site, name = self._world.site, os.fsdecode(job.remote)
        found = site.files[name]
        changed = self._rng.choice((found.data, found.data[: len(found.data) // 2], b"", found.data + b"more"))
        site.files[name] = DropFile(changed, found.mtime + 1)

        def itself_again() -> None:
            if name in site.files:
                site.files[name] = DropFile(found.data, self._world.clock.now())

        self._machine.before_the_drop.append(itself_again)
