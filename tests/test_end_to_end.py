"""Real processes against a practice that is served over HTTP and SFTP: a backfill that is killed again and again."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from syncd import wiring
from syncd.backfill import Look, Stop, Wanted, since
from syncd.config import Settings
from syncd.demo.build import Past
from syncd.demo.simulation import Simulation
from syncd.mirror import Scope
from syncd.service import Lock, read_credentials
from tests.world import Expected, RecordedLog, compare_archive

pytestmark = pytest.mark.slow  # minutes in all: `make quick` leaves it out, `make test` does not

KILLS = int(os.environ.get("SYNCD_TEST_KILLS", "3"))  # more by hand: SYNCD_TEST_KILLS=20
SEED = int(os.environ.get("SYNCD_TEST_SEED", "1"))
SYNCD = Path(sys.executable).with_name("syncd")
PLACEMENTS = ("DownloadSftp", "DownloadMount", "Thumbnails")
DAY = 86_400.0


@dataclass
class LeapingClock:
    """The machine's clock, which leaps ahead when it is told to: what waits for minutes or a day is over at once."""

    ahead: float = 0.0

    def now(self) -> float:
        return time.time() + self.ahead

    def steady(self) -> float:
        return time.clock_gettime(time.CLOCK_BOOTTIME) + self.ahead


@dataclass
class Site:
    """A served practice and the configuration of its mirror."""

    simulation: Simulation
    config: Path
    settings: Settings
    log: RecordedLog = field(default_factory=RecordedLog)

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([SYNCD, "-c", self.config, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def run(self, *words: str, timeout: float = 100.0) -> subprocess.CompletedProcess[str]:
        words = (str(SYNCD), "-c", str(self.config), *words)
        return subprocess.run(words, capture_output=True, text=True, timeout=timeout, check=False)

    def requests(self) -> int:
        return len(self.simulation.office.arrivals)

    def placements(self) -> int:
        return sum(each.path.rpartition("/")[2] in PLACEMENTS for each in list(self.simulation.office.arrivals))

    def finish(self, days: float = 1.2) -> int:
        """One more backfill, in this process, whose clock leaps over every wait; its exit code."""
        clock, settings = LeapingClock(), self.settings
        credentials = read_credentials(settings)
        with Lock(settings.state_path, "backfill"), contextlib.closing(wiring.open_index(settings)) as index:
            scope = Scope(backfill=True, since=since(index, clock.now(), whole=True))
            api, drop = wiring.open_api(settings, credentials), wiring.open_drop(settings, credentials)
            lanes = wiring.build(settings, clock, self.log, scope, api, drop, index.sibling())
            look = Look(settings, index, clock, Wanted(scope.since), lambda: 0)
            code, end = None, clock.now() + days * DAY
            while code is None or clock.now() < end:
                wake = min(lanes.api_lane.turn(clock.now()), lanes.pull_lane.turn(clock.now()))
                if wake > clock.now():
                    clock.ahead += 60.0 if code is None else 1800.0
                code = look.verdict(Stop())
            lanes.close()
        return code

    def wrong(self) -> list[str]:
        """Everything in which the mirror is not what the practice is."""
        with contextlib.closing(wiring.open_index(self.settings)) as index:
            expected, practice = Expected(), self.simulation.practice
            expected.note(practice)
            kinds = self.settings.sync.kinds
            found = compare_archive(index, self.settings.archive.path, practice, expected, kinds)
        return found.wrong + found.lacking

    def versions(self) -> int:
        with contextlib.closing(sqlite3.connect(self.settings.state_path / "index.db")) as index:
            return int(index.execute("SELECT count(*) FROM version WHERE sidecar = 1").fetchone()[0])


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """Twelve patients or more, behind a throttle of 20 ms."""
    past = Past(documents=6.0, sheets=2.0, hostile_names=0.0, urls=0.0, deleted=0.0)
    with Simulation.start(12 + 4 * max(0, KILLS - 3), SEED, 0.02, tmp_path / "site", past=past) as simulation:
        (tmp_path / "archive").mkdir()
        config = simulation.write_config(tmp_path / "main", tmp_path / "archive")
        yield Site(simulation, config, wiring.load(config, {}))


def left_on_drop(site: Site) -> list[str]:
    sftp = site.simulation.sftp
    assert sftp is not None
    return [path.name for path in (sftp.root / "syncd").iterdir()]


def wait_for_requests(site: Site, more: int, process: subprocess.Popen[bytes]) -> None:
    """Wait until the process has sent so many requests."""
    wanted, end = site.requests() + more, time.monotonic() + 60
    while site.requests() < wanted and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)


def test_backfill_mirrors_the_practice_and_ends_with_0(site: Site) -> None:
    done = site.run("backfill", "--no-progress", "--json")
    assert done.returncode == 0, done.stderr
    assert site.wrong() == []
    assert left_on_drop(site) == []
    assert json.loads(done.stdout)["files"] == site.versions()
    again = site.placements()
    assert site.run("backfill", "--no-progress").returncode == 0
    assert site.placements() == again
    assert site.run("verify").returncode == 0


@pytest.mark.long
def test_killed_backfill_resumes_each_time_and_archives_nothing_twice(site: Site) -> None:
    rng, archived = random.Random(SEED), [0]
    for number in range(KILLS):
        process = site.start("backfill", "--no-progress")
        wait_for_requests(site, rng.randint(3, 60), process)  # the first 20 may prove whose database it is
        time.sleep(rng.uniform(0.0, 0.03))
        process.send_signal(signal.SIGKILL)
        _, complaint = process.communicate(timeout=30)
        assert process.returncode == -signal.SIGKILL, f"the backfill was over before kill {number}: {complaint!r}"
        archived.append(site.versions())
        assert archived[-1] >= archived[-2], "something was lost"
    assert archived[-1] > 0
    assert site.finish() == 0
    assert site.wrong() == []
    assert left_on_drop(site) == []
    with contextlib.closing(wiring.open_index(site.settings)) as index:
        assert index.rows("SELECT * FROM version WHERE sidecar = 1 AND version > 1") == []
        least = site.placements() - KILLS  # one unanswered placement a kill, at most
        methods = "kind IN ('document', 'mount', 'sheet')"
        needed = index.value(f"SELECT count(*) FROM version WHERE sidecar = 1 AND {methods}")
        needed += index.value("SELECT count(*) FROM item WHERE kind = 'mount'")
        needed += index.value("SELECT count(DISTINCT pat_num) FROM version WHERE kind = 'thumbnail'")
        assert least <= needed
    assert site.run("verify").returncode == 0


def test_second_process_is_told_who_holds_the_lock(site: Site) -> None:
    first = site.start("backfill", "--no-progress")
    wait_for_requests(site, 5, first)
    second = site.run("backfill", "--no-progress")
    assert second.returncode == 11
    assert f"pid {first.pid}" in second.stderr
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=10)
    assert first.returncode == 143
    assert site.run("backfill", "--no-progress").returncode in (0, 3)


def test_interrupted_backfill_leaves_a_consistent_state(site: Site) -> None:
    process = site.start("backfill", "--no-progress")
    wait_for_requests(site, 20, process)
    asked_at = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130
    assert time.monotonic() - asked_at < 10.0
    assert site.run("verify").returncode == 0
    assert site.finish() == 0
    assert site.wrong() == []
