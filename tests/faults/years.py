"""A simulated year: the real story, index and archive on a RAM disk, a practice at work, and all that befalls them.

    year = Year(folder, seed=7)
    year.live(days=365)
    print(year.figures())

Time goes in steps of some hours. In each the staff change things, the world gets worse or better, the mirror takes its
turns, and now and then its process is gone at some call; another one then starts on what is on the disk. Whatever
happens, the witness finds everything that was ever archived; and after some crashes the world is left in peace for
some days, and then the mirror has to be what the practice is.

One seed, one trace: everything random is drawn from the seed, so a year that failed can be lived once more.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import random
import shutil
import sqlite3
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from syncd import guards, mirror, wishes
from syncd.backfill import AFTER_A_BUG
from syncd.demo.build import Past, build_practice
from syncd.demo.clock import SimulatedClock
from syncd.demo.practice import Practice
from syncd.errors import SiteError
from syncd.scrub import reindex
from syncd.wiring import open_archive
from tests.faults.lot import Lot
from tests.faults.perils import HOUR, Crash, Machine, Perils
from tests.faults.staff import Staff
from tests.faults.witness import Witness
from tests.world import START, World, make_settings

DAY = 24 * HOUR
INTERVAL = 3400.0  # seconds from request to request: a listing must be younger than an hour when its files are placed
INTERVAL_IN_PEACE = 1700.0  # a list, an image's owner and its placement: all within less than an hour
TICK = 2 * HOUR  # between turns while nothing is to be done
ROSTER_EVERY = 6 * HOUR  # instead of a quarter of an hour, and
PROBES = 4  # instead of 20, lest rosters and the daily comparison of identities take the whole budget
STEP = 10 * HOUR  # on average
CRASHING = 0.75  # of the steps
OFF = (0.0, 0.0, DAY, 3 * DAY)  # how long the machine stays off after a crash: there are holidays
CHANCE = 0.024  # of each sporadic fault, at each request that it concerns
PEACE = 4.5 * DAY  # at least: the longest retry (a day), and names on the drop that only the daily look finds
LOOKED_AT = 0.05  # of the crashes: somebody then reads what is held, too
OLD_COPIES = 3


class NoTimer(threading.Timer):
    """A deadline of the real clock, which means nothing here; and a thread a request takes time."""

    def start(self) -> None:
        """Nothing."""


class Year:
    """One practice, its mirror, and their fate. `trace` is a hash over all that the mirror did."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.seed, self.counts = seed, Counter[str]()
        self._rng, self._trace = random.Random(f"year {seed}"), hashlib.sha256()
        self._folder, self._seconds, self._arrivals = folder, 0.0, 0
        self._machine = Machine()
        self._copies: list[Path] = []
        self._home_at = 0.0  # until then the key leads to another practice
        self._patch = pytest.MonkeyPatch()
        self._draw_everything_from_the_seed()
        self._machine.install(self._patch)
        self._practice = Practice(SimulatedClock(START), "America/Chicago", seed=seed)
        self._staff = Staff(self._practice, seed)
        with self._practice.as_of(START - 40 * DAY):
            self._staff.open_practice()
        self.world = World.start(folder, practice=self._practice, seed=seed, interval=INTERVAL)
        self._witness = self.world.expected = Witness(self._practice)
        self._perils = Perils(self.world, self._machine, seed, CHANCE)

    def _draw_everything_from_the_seed(self) -> None:
        Lot(f"names {self.seed}").install(self._patch.setattr)
        self._patch.setattr(guards, "PROBED_ITEMS", PROBES)
        self._patch.setattr(mirror, "ROSTER_EVERY", ROSTER_EVERY)
        self._patch.setattr(threading, "Timer", NoTimer)

    def live(self, days: float) -> None:
        """So much time passes; then there is peace, and the mirror is complete. Raises AssertionError if not."""
        gc.collect()
        gc.freeze()  # what was imported need not be looked through all year
        started, end = time.process_time(), self.world.clock.now() + days * DAY
        try:
            self._perils.begin()
            while self.world.clock.now() < end:
                self._step()
            self._peace()
        finally:
            self._seconds = time.process_time() - started
            self._patch.undo()
            self.world.stop()

    # --- a step of some hours

    def _step(self) -> None:
        if self._home_at and self.world.clock.now() >= self._home_at:
            self._come_home()
        if not self._home_at:
            self._staff.act(times=self._rng.choice((0, 0, 0, 1, 1, 3)))
            if self._rng.random() < 0.004 and self._knows_the_practice():
                self._go_astray()
        self._perils.step()
        if not self._machine.doomed and self._rng.random() < CRASHING:
            self._machine.die_in(self._rng.randint(1, 60))
        try:
            self._run(self._rng.uniform(0.3, 1.7) * STEP)
        except Crash:
            self.world.clock.advance(self._rng.choice(OFF))
            self._staff.act(times=self._rng.randint(0, 2) if not self._home_at else 0)
            self._recover()
        if self._rng.random() < 0.01:
            self._copy_index()

    def _run(self, seconds: float) -> None:
        """Take turns as the daemon does: one that fails for the disk's sake is taken again later."""
        end = self.world.clock.now() + seconds
        while self.world.clock.now() < end:
            self._machine.running = True
            try:
                self.world.run(seconds=end - self.world.clock.now(), tick=TICK)
            except SiteError as error:
                self.counts[f"turns failed for {error.reason}"] += 1
            finally:
                self._machine.running = False
                self._write_trace()
            self.world.clock.advance(AFTER_A_BUG)

    def _recover(self) -> None:
        """Another process starts where the last one ended; sometimes it ends soon, too."""
        self.counts["crashes"] += 1
        self._machine.start_again()
        if self._rng.random() < 0.15:
            self._machine.die_in(self._rng.randint(1, 12))
            self._machine.running = True
            try:
                self.world.restart()
            except (Crash, SiteError):  # a start that a failing disk refuses is one more
                self._machine.running = False
                self._recover()
                return
            self._machine.running = False
        elif self._rng.random() < 0.03 and not self._perils.unmounted:
            self._lose_index()
        else:
            self.world.restart()
        if not self._perils.unmounted:
            self._look()
        if self._rng.random() < 0.01 and not self._home_at:
            self._peace()
            self._perils.begin()
        elif self._rng.random() < LOOKED_AT and not self._home_at and not self._perils.unmounted:
            self._decide()

    # --- what has to be true

    def _look(self) -> None:
        self.counts["looks"] += 1
        self._hold(self._witness.look(self.world))
        self._trace.update(repr(list(self._witness.rows.values())).encode())
        self._trace.update(repr(self.world.index.rows("SELECT * FROM site ORDER BY lane")).encode())

    def _hold(self, wrong: list[str]) -> None:
        day = (self.world.clock.now() - START) / DAY
        assert not wrong, "\n".join([f"seed {self.seed}, day {day:.1f}:", *wrong])

    def _peace(self) -> None:
        """Nothing happens for some days, but that people decide what is held; then all that is there is archived."""
        self.counts["complete"] += 1
        if self._home_at:
            self._come_home()
        self._perils.cease()
        self._staff.show()
        self._restart_with(INTERVAL_IN_PEACE)
        world, since = self.world, self.world.clock.now()
        while world.clock.now() < since + PEACE or self._busy_since(since):
            self._hold(["no sweep ended in three weeks of peace"] if world.clock.now() > since + 21 * DAY else [])
            self._decide()
            self._run(PEACE / 3)
        self._witness.note_all(self._practice)
        self._look()
        found = world.findings()
        self._hold(found.wrong + [line for line in found.lacking if not _is_of_a_lost_picture(line)])
        world.check_drop()
        self._restart_with(INTERVAL)

    def _decide(self) -> None:
        """What only people can do, of whom somebody knows which database this is."""
        now, index = self.world.clock.now(), self.world.index
        for row in index.rows("SELECT id FROM guard WHERE state = 'held'"):
            wishes.make(index, "approve", f"guard-{row['id']}", now)
        index.run("UPDATE patient SET thumbnails_after_at = 0")  # after three failures they wait for 30 days

    def _busy_since(self, since: float) -> bool:
        """Whether some list was not polled since, or something is owed a request now."""
        polled = "SELECT 1 FROM list JOIN patient USING (pat_num) WHERE left_at IS NULL AND polled_at <= ?"
        owed = "SELECT 1 FROM duty JOIN patient USING (pat_num) WHERE left_at IS NULL AND next_try_at <= ?"
        small = "SELECT 1 FROM item JOIN patient USING (pat_num) WHERE left_at IS NULL AND thumbnail_due = 1"
        value = self.world.index.value
        return any(
            found is not None for found in (value(polled, since), value(owed, self.world.clock.now()), value(small))
        )

    def _restart_with(self, interval: float) -> None:
        self.world.settings = make_settings(self._folder, interval, {})
        self.world.restart()

    # --- rarely

    def _knows_the_practice(self) -> bool:
        """By fewer archived documents nobody can tell one database from another (design.md section 7)."""
        known = "SELECT count(*) FROM item WHERE kind = 'document' AND archived_revision IS NOT NULL"
        return int(self.world.index.value(f"{known} AND vanished_at IS NULL")) > guards.DISAGREEMENTS

    def _go_astray(self) -> None:
        """The key leads to another practice for a while, from a start on."""
        self.counts["astray"] += 1
        past = Past(documents=5, mounts=0.5, sheets=2, deleted=0.0, raw=0.0, urls=0.0)
        other = build_practice(4, self.seed + 1000, self.world.clock, past=past, name="other")
        self.world.swap_practice(other)
        self.world.restart()
        self._home_at = self.world.clock.now() + self._rng.uniform(3, 40) * HOUR

    def _come_home(self) -> None:
        self._home_at = 0.0
        self.world.swap_practice(self._practice)
        self.world.restart()

    def _copy_index(self) -> None:
        path = self._folder / f"copy-{self.counts['copies']}.db"
        self.counts["copies"] += 1
        with contextlib.closing(sqlite3.connect(path)) as copy:
            self.world.index.db.conn.backup(copy)
        self._copies = [*self._copies, path][-OLD_COPIES:]

    def _lose_index(self) -> None:
        """The index is gone: rebuilt from the archive alone, or an old copy is put back."""
        self.counts["index lost"] += 1
        self._staff.forget()  # what left a mount is not in the archive: only another DownloadMount tells
        world, state = self.world, self.world.settings.state_path
        with contextlib.suppress(Exception):
            world.lanes.closing.close()
        for path in state.glob("index.db*"):
            path.unlink()
        if self._copies and self._rng.random() < 0.5:
            shutil.copyfile(self._rng.choice(self._copies), state / "index.db")
        else:
            reindex(world.settings, open_archive(world.settings), world.clock.now())
        world.restart()

    # --- what is told

    def _write_trace(self) -> None:
        world = self.world
        for call in world.office.arrivals[self._arrivals :]:
            told = (call.at, call.method, call.path, sorted(call.params.items()), call.status)
            self._trace.update(repr(told).encode())
        self._arrivals = len(world.office.arrivals)

    @property
    def trace(self) -> str:
        """A hash over every request, every version and every item's state."""
        return self._trace.hexdigest()[:16]

    @property
    def crashes(self) -> int:
        """How often the process was gone."""
        return self.counts["crashes"]

    @property
    def faults(self) -> int:
        """How many faults there were, crashes apart; one that lasted for hours is one."""
        return self._perils.faults

    def figures(self) -> str:
        """One line for people."""
        requests, versions = len(self.world.office.arrivals), len(self._witness.rows)
        told = f"{self.crashes} crashes, {self.faults} faults, {self._staff.done.total()} changes, {requests} requests"
        told += f", {self.world.turns} turns, {versions} versions, {self.counts['complete']} times complete"
        return f"seed {self.seed}: {told}, trace {self.trace}, {self._seconds:.0f} s"


def _is_of_a_lost_picture(line: str) -> bool:
    """A thumbnail may be made of new bytes that the mirror has not seen yet; after a restore it has other ones than
    the picture, whose own are not new: thumbnails are due for new bytes only (design.md section 7).
    """
    return "'thumbnail'" in line and line.endswith("is not the newest")
