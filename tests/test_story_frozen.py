"""No silent stop: whatever freezes or fails, the state word, a log event and `health` say so in time, and who must act.

What is outside fails in simulated time. Threads freeze in a real daemon, whose clock moves only once everything that
still lives has given its sign of life; the test reads the lock file and the index, as `syncd status` does.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import requests

from syncd import cli, daemon
from syncd.api import OpenDentalApi, PlacementSite
from syncd.backfill import AFTER_A_BUG, Stop
from syncd.daemon import Daemon
from syncd.demo.adapter import OfficeAdapter
from syncd.demo.clock import SimulatedClock
from syncd.demo.practice import Practice
from syncd.errors import REASONS, SiteError, TransientError
from syncd.mirror import Scope
from syncd.report import LIVELY, SILENT, Budget, Report, Signs, Surroundings, silent_parts, status
from syncd.service import Lock, SystemClock, Systemd
from syncd.wiring import Lanes, build
from tests.small import DAY, HOUR
from tests.world import START, RecordedLog, World

pytestmark = pytest.mark.slow  # minutes in all: `make quick` leaves it out, `make test` does not

TOLD_WITHIN = 900.0  # seconds after the limit
PATIENTS = 8


def full_practice() -> Practice:
    """Eight patients with nine documents each, all old."""
    practice = Practice(SimulatedClock(START), "America/Chicago", seed=5)
    with practice.as_of(START - 40 * DAY):
        for _ in range(PATIENTS):
            patient = practice.add_patient()
            for _ in range(9):
                practice.add_document(patient, "png")
    return practice


def synced(folder: Path, interval: float) -> World:
    """The daemon's lanes with everything archived; `interval`: seconds from request to request, at least."""
    started = World.start(folder, practice=full_practice(), interval=interval)
    started.run()
    started.run(hours=0.5)
    assert told(started)["state"] == "ok", told(started)
    return started


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    started = synced(tmp_path, 5.0)
    yield started
    started.stop()


@pytest.fixture
def leisurely(tmp_path: Path) -> Iterator[World]:
    """For what takes a day to be told."""
    started = synced(tmp_path, 60.0)
    yield started
    started.stop()


def told(world: World, signs: Signs | None = None) -> Report:
    """What `status` would say, the lock being held by a process with these signs of life."""
    now = world.clock.now()
    around = Surroundings("main", "0", Budget.of(world.settings, now), holder="run, pid 1")
    facts = world.catalog().status_facts(now)
    assert signs is None or silent_parts(signs, 0.0, now) == ()
    return status(facts, around, now)


def pat_nums(world: World) -> list[int]:
    return [row["pat_num"] for row in world.index.rows("SELECT pat_num FROM patient ORDER BY 1")]


def new_document(world: World) -> None:
    patient = pat_nums(world)[0]
    with world.practice.as_of(world.clock.now() - HOUR):
        world.practice.add_document(patient, "jpg")


def seconds_until(world: World, claim: Callable[[Report], object], most: float, step: float = 60.0) -> float:
    """How long it takes until `status`, asked every `step` seconds, says so."""
    began = world.clock.now()
    while not claim(told(world)):
        assert world.clock.now() - began <= most, told(world)
        world.run(seconds=step, tick=step)
    return world.clock.now() - began


# --- outside: what fails, the reason it is known by, seconds after which that is to be said

Arrange = Callable[[World], object]


def fault(kind: str, **details: Any) -> Arrange:
    return lambda world: world.office.faults.add(cast("Any", kind), times=None, **details)


def drop(error: SiteError | TransientError) -> Arrange:
    def broken(world: World) -> None:
        world.drop.broken = error
        new_document(world)

    return broken


def unmounted(world: World) -> None:
    world.archive.rename(world.archive.with_name("disk"))
    world.archive.mkdir()


def empty_lists(world: World) -> None:
    for path in ("/documents", "/sheets"):
        world.office.faults.add("empty", path=path, times=None)


OUTSIDE: dict[str, tuple[Arrange, str]] = {
    "the API cannot be reached": (fault("cut"), "api_unreachable"),
    "the API hangs": (fault("hang", seconds=200.0), "api_unreachable"),
    "the API has errors": (fault("status", status=500), "api_error"),
    "the API answers with web pages": (fault("html", method="GET"), "bad_answers"),
    "the API refuses the key": (fault("key_revoked"), "key_refused"),
    "the eConnector is down": (fault("econnector_down"), "econnector_down"),
    "the API answers with empty lists": (empty_lists, "disappearances_held"),
    "the drop cannot be reached": (drop(TransientError("drop_unreachable")), "drop_unreachable"),
    "the drop refuses the login": (drop(SiteError("drop_refused")), "drop_refused"),
    "the drop has another host key": (drop(SiteError("host_key_changed")), "host_key_changed"),
    "the archive is not mounted, and nothing is new": (unmounted, "archive_missing"),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_failing_outside_is_told_within_15_minutes_by_state_log_and_health(world: World, name: str) -> None:
    arrange, reason = OUTSIDE[name]
    world.log.lines.clear()
    arrange(world)
    seconds_until(world, lambda said: said["reason"] == reason, TOLD_WITHIN)
    said = told(world)
    assert said["state"] in ("blocked", "degraded")
    assert said["who"] == REASONS[reason][0] != "nobody"
    assert any(line.get("reason") == reason or line["event"] == "guard_held" for line in world.log.lines)
    seconds_until(world, lambda said: not said["healthy"], LIVELY + TOLD_WITHIN)
    assert reason in told(world)["health"]


def test_full_archive_is_told_though_nothing_is_new(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs

    def full(folder: int) -> os.statvfs_result:  # what the kernel says of the disk
        return os.statvfs_result([0 if place == 4 else value for place, value in enumerate(real(folder))])

    monkeypatch.setattr(os, "statvfs", full)
    seconds_until(world, lambda said: said["reason"] == "archive_full", TOLD_WITHIN)
    assert (told(world)["state"], told(world)["who"]) == ("blocked", "practice_it")
    monkeypatch.setattr(os, "statvfs", real)
    seconds_until(world, lambda said: said["state"] == "ok", HOUR)


def test_endless_429_is_a_wait_for_an_hour_and_then_somebodys_trouble(world: World) -> None:
    endless = world.office.faults.add("too_many", times=None)
    seconds_until(world, lambda said: said["reason"] == "throttled", TOLD_WITHIN)
    assert (told(world)["state"], told(world)["who"], told(world)["healthy"]) == ("degraded", "nobody", True)
    seconds_until(world, lambda said: said["reason"] == "throttled_long", HOUR + TOLD_WITHIN)
    assert (told(world)["state"], told(world)["who"], told(world)["healthy"]) == ("blocked", "integrator", False)
    assert [line["reason"] for line in world.log.events("state_changed")] == ["throttled"]
    world.office.faults.clear(endless)
    seconds_until(world, lambda said: said["state"] == "ok", HOUR)


def test_two_429_in_a_row_are_no_incident(world: World) -> None:
    world.office.faults.add("too_many", times=2)
    world.run(hours=1)
    assert world.log.events("throttled")
    assert told(world)["incidents"] == []


def test_roster_that_is_never_readable_is_told_after_a_day(leisurely: World) -> None:
    leisurely.office.faults.add("status", path="/patients/Simple", status=500, times=None)
    leisurely.run(hours=22)
    seconds_until(leisurely, lambda said: said["reason"] == "roster_unread", 3 * HOUR + TOLD_WITHIN, step=600.0)
    assert (told(leisurely)["state"], told(leisurely)["who"]) == ("degraded", "open_dental")
    leisurely.office.faults.clear()
    seconds_until(leisurely, lambda said: said["state"] == "ok", 3 * HOUR, step=600.0)


def test_roster_too_large_to_be_read_is_told_at_once(world: World) -> None:
    world.office.faults.add("huge", path="/patients/Simple", size=65 * 1024 * 1024, times=2)
    seconds_until(world, lambda said: said["reason"] == "bad_answers", HOUR + TOLD_WITHIN)
    seconds_until(world, lambda said: said["state"] == "ok", 2 * HOUR)


def test_one_patient_who_is_never_listed_is_told_after_a_day_and_others_go_on(leisurely: World) -> None:
    patient = pat_nums(leisurely)[-1]
    leisurely.office.faults.add("html", path="/documents", params={"PatNum": patient}, times=None)
    leisurely.run(hours=22)
    assert told(leisurely)["state"] == "ok"
    seconds_until(leisurely, lambda said: said["reason"] == "lists_unreadable", 4 * HOUR + TOLD_WITHIN, step=600.0)
    said = told(leisurely)
    assert (said["state"], said["who"], said["lists_unreadable"]) == ("degraded", "open_dental", 1)
    assert "lists_unreadable" in said["health"]
    leisurely.run(hours=9)
    assert not told(leisurely)["healthy"]
    sql = "SELECT count(*) FROM list WHERE polled_at < ?"
    assert leisurely.index.value(sql, leisurely.clock.now() - 3 * HOUR) == 1


def test_lists_that_nobody_polls_any_more_are_told_although_no_part_fails(leisurely: World) -> None:
    for pat_num in pat_nums(leisurely):
        leisurely.lanes.api_lane.agenda.remove(pat_num)  # a bug that loses lists without an error
    leisurely.run(hours=35)
    said = told(leisurely)
    assert (said["state"], said["reason"], said["healthy"]) == ("degraded", "sweep_overdue", False)


# --- the index takes nothing for a while


def test_answer_that_could_not_be_recorded_loses_no_list_and_no_document(world: World) -> None:
    new_document(world)
    api_index = world.lanes.api_lane.doors.index
    api_index.db.conn.execute("PRAGMA busy_timeout=1")
    for _ in range(6):  # somebody holds the index just while an answer is taken over, again and again
        world.run(until=lambda: world.lanes.api_lane._prepared is not None or None)
        locked = sqlite3.connect(api_index.path, isolation_level=None)
        locked.execute("BEGIN IMMEDIATE")
        asked, failed = len(world.office.arrivals), 0
        while len(world.office.arrivals) == asked or failed < 3:
            try:
                world.clock.advance(5.0)
                world.lanes.api_lane.turn(world.clock.now())
            except SiteError:
                failed += 1
            if failed > 20:
                break
        assert len(world.office.arrivals) <= asked + 1, "asked on although nothing could be recorded"
        locked.rollback()
        locked.close()
        world.run(seconds=30)
    world.sweep()
    world.run(hours=2)
    world.check()
    assert world.index.value("SELECT count(*) FROM duty WHERE busy = 1") == 0


# --- inside: threads, the scheduler, the clock, the log, in a real daemon


@dataclass
class SteppedClock:
    """Moves only when the test lets it. The lock itself is taken by the real clock: the steady one begins there."""

    ahead: float = 0.0
    stands: bool = False  # the wall clock; the steady one goes on
    _stood_at: float = 0.0
    _booted_at: float = 0.0

    def __post_init__(self) -> None:
        self._booted_at = SystemClock().steady() - self.ahead

    def now(self) -> float:
        return START + (self._stood_at if self.stands else self.ahead)

    def steady(self) -> float:
        return self._booted_at + self.ahead

    def stop(self) -> None:
        self._stood_at, self.stands = self.ahead, True


class Gate(OfficeAdapter):
    """The way to the office, which can be shut, or lead into a bug."""

    shut: threading.Event | None = None
    bug = False

    def send(self, request: requests.PreparedRequest, *args: Any, **kwargs: Any) -> requests.Response:
        if self.shut is not None:
            self.shut.wait(60)
        if self.bug:
            raise RuntimeError("a bug")
        return super().send(request, *args, **kwargs)


@dataclass
class Running:
    """A daemon on its threads, in a process that holds the lock."""

    world: World
    clock: SteppedClock
    gate: Gate
    lanes: Lanes
    log: RecordedLog
    stop: Stop
    daemon: Daemon
    release: threading.Event = field(default_factory=threading.Event)

    def told(self) -> Report:
        said, _ = cli._describe(self.world.settings, self.world.index)
        return said

    def signs(self) -> Signs:
        holder = Lock(self.world.settings.state_path).holder()
        assert holder is not None
        assert holder.signs is not None
        return holder.signs

    def live(self, seconds: float, *frozen: str) -> None:
        """Let time pass; everything but `frozen` gives a sign of life at each step."""
        for _ in range(int(seconds / 60)):
            self.clock.ahead += 60
            end = time.monotonic() + 20
            while not self._caught_up(frozen):
                assert time.monotonic() < end, self.signs()
                time.sleep(0.005)

    def wait_until(self, claim: Callable[[], object]) -> None:
        """Let time pass until it holds."""
        end = time.monotonic() + 20
        while not claim():
            assert time.monotonic() < end
            self.clock.ahead += 10
            time.sleep(0.01)

    def wait_until_silent(self, part: str) -> None:
        """Let time pass until the part gives no sign of life any more."""
        for _ in range(100):
            self.clock.ahead += 10
            end = time.monotonic() + 0.5
            while self.signs().parts[part][0] < self.clock.steady():
                if time.monotonic() > end:
                    return
                time.sleep(0.005)
        raise AssertionError(f"{part} lives")

    def _caught_up(self, frozen: tuple[str, ...]) -> bool:
        signs, now = self.signs(), self.clock.steady()
        alive = (at for part, (at, _) in signs.parts.items() if part not in frozen)
        return bool(signs.parts) and signs.beat_at >= now and all(at >= now for at in alive)


@contextlib.contextmanager
def a_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    """Serving a practice of which everything is archived."""
    quiet = {"change_feed": "off", "appointments": "off"}  # a step of the clock is a minute, and holds one request
    world = World.start(tmp_path, practice=full_practice(), interval=5.0, sync=quiet)
    world.run()
    clock, gate, log = SteppedClock(world.clock.now() - START), Gate(world.office), RecordedLog()
    monkeypatch.setattr(cli, "SystemClock", lambda: clock)
    for name, value in (("GLANCE", 0.01), ("AFTER_A_BUG", 0.02), ("STATUS_JSON_EVERY", 0.05)):
        monkeypatch.setattr(daemon, name, value)
    placement = PlacementSite(world.settings.drop.address, world.site.username, world.site.password)
    keys = (world.office.developer_key, world.office.customer_key)
    api = OpenDentalApi(world.settings.api.url, *keys, placement, adapter=gate)
    with Lock(world.settings.state_path, "run"):
        lanes = build(world.settings, clock, log, Scope(), api, world.drop)
        stop = Stop()
        served = Daemon(lanes, stop, Systemd({}), partial(cli._describe, world.settings, lanes.index))
        thread = threading.Thread(target=served.run, daemon=True)
        thread.start()
        one = Running(world, clock, gate, lanes, log, stop, served)
        one.live(60)
        yield one
        one.release.set()
        stop()
        thread.join(20)
        assert not thread.is_alive()
        lanes.close()
    world.stop()


@pytest.fixture
def running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    with a_daemon(tmp_path, monkeypatch) as one:
        yield one


class LastWait(threading.Event):
    """What a lane waits on; its first wait ends everything."""

    waited: float | None = None

    def wait(self, timeout: float | None = None) -> bool:
        self.waited = timeout
        self.set()
        return True


def test_lane_that_met_a_bug_waits_before_it_is_tried_again(tmp_path: Path) -> None:
    world, stop = World.start(tmp_path), Stop()
    stop.event = event = LastWait()

    def turn(_: float) -> float:
        raise ZeroDivisionError

    Daemon(world.lanes, stop, Systemd({}), lambda: ({}, ""))._take_turns("api", turn)
    assert event.waited == AFTER_A_BUG
    assert [line["where"] for line in world.log.events("turn_failed")] == ["api"]
    world.stop()


def test_daemon_whose_parts_live_is_never_called_stuck(running: Running) -> None:
    running.live(2 * SILENT)
    assert (running.told()["state"], running.told()["healthy"]) == ("ok", True), running.told()
    assert running.log.events("state_changed") == []
    assert len(running.world.office.arrivals) > 0


def assert_told(running: Running, part: str, reason: str, state: str = "blocked", knows: str | None = None) -> None:
    """Not before the limit; then at once, with who, a log event, and health half an hour later.

    `knows`: a state that the part itself is in, which may be told before and, while it waits for its next try, after.
    """
    running.wait_until_silent(part)
    running.live(SILENT - 120, part)
    assert knows or running.told()["state"] in ("ok", "catching_up"), running.told()
    running.live(240, part)
    said = running.told()
    assert said["reason"] in (reason, knows or reason)
    assert (said["state"], said["who"]) == (state, REASONS[said["reason"]][0])
    assert said["reason"] == knows or f"({part})" in said["message"] or "index.db" in said["message"]
    running.live(60, part)
    assert {reason, knows or reason} & {line.get("reason") for line in running.log.events("state_changed")}
    running.live(LIVELY - SILENT + 120, part)
    assert running.told()["healthy"] is (state == "degraded")
    assert any(word in running.told()["health"] for word in (reason, knows or reason))


def test_api_lane_that_hangs_in_a_call_is_told(running: Running) -> None:
    running.gate.shut = running.release
    assert_told(running, "api", "lane_stuck")
    running.gate.shut = None
    running.release.set()
    running.live(120)
    assert running.told()["state"] == "ok"


def test_api_lane_whose_turns_raise_for_ever_is_told_and_heals(running: Running) -> None:
    running.gate.bug = True
    assert_told(running, "api", "lane_stuck", knows="api_error")
    assert running.log.events("turn_failed")
    running.gate.bug = False
    running.live(2 * HOUR, "api")
    assert running.told()["state"] == "ok", running.told()


def test_long_pull_is_alive_as_long_as_bytes_come(running: Running) -> None:
    new_document(running.world)
    drop = running.world.drop

    def slowly(_: object) -> None:
        while not running.release.wait(0.002):
            drop.received += 1

    drop.meddle = slowly
    running.wait_until(lambda: drop.received > 0)
    running.live(2 * SILENT)
    assert running.told()["state"] in ("ok", "catching_up"), running.told()
    assert running.daemon._turned_at["pull"] >= running.clock.steady() - 120  # what feeds the watchdog
    running.release.set()


def test_pull_lane_that_hangs_in_a_call_is_told(running: Running) -> None:
    new_document(running.world)

    def hang(_: object) -> None:
        running.release.wait(60)

    running.world.drop.meddle = hang
    assert_told(running, "pull", "lane_stuck")


def test_pull_lane_whose_turns_raise_for_ever_is_told(running: Running) -> None:
    new_document(running.world)

    def bug(_: object) -> None:
        raise RuntimeError("a bug")

    running.world.drop.meddle = bug
    assert_told(running, "pull", "lane_stuck")


def test_scheduler_that_died_is_told_and_status_json_is_written_all_the_same(running: Running) -> None:
    running.daemon._marks = queue.SimpleQueue()  # where nobody puts a mark any more
    file = running.world.settings.log_path / "status.json"
    assert_told(running, "scheduler", "lane_stuck")
    assert json.loads(file.read_text())["reason"] == "lane_stuck"


def test_wall_clock_that_stands_still_is_told(running: Running) -> None:
    running.clock.stop()
    running.live(SILENT + 120, "clock")
    said = running.told()
    assert (said["state"], said["reason"], said["who"]) == ("blocked", "clock_stuck", "practice_it")


def test_log_folder_that_cannot_be_written_is_told_while_syncing_goes_on(running: Running) -> None:
    folder = running.world.settings.log_path
    folder.rename(folder.with_name("away"))
    folder.write_text("not a folder")
    new_document(running.world)
    archived = running.world.index.value("SELECT count(*) FROM version")
    assert_told(running, "log", "log_unwritable", state="degraded")
    running.live(HOUR, "log")
    assert running.world.index.value("SELECT count(*) FROM version") > archived
    folder.unlink()
    running.live(HOUR)
    assert running.told()["state"] == "ok", running.told()


def test_index_that_somebody_keeps_locked_is_told(running: Running) -> None:
    for doors in (running.lanes.api_lane.doors, running.lanes.pull_lane._doors):
        doors.index.db.conn.execute("PRAGMA busy_timeout=1")
    locked = sqlite3.connect(running.world.index.path, isolation_level=None)
    locked.execute("BEGIN IMMEDIATE")
    assert_told(running, "api", "disk_error")
    locked.rollback()
    locked.close()
    running.live(600)
    assert running.told()["state"] == "ok", running.told()


def test_main_loop_that_hangs_is_told_by_the_age_of_its_last_beat(running: Running) -> None:
    describe = running.daemon._describe
    running.daemon._describe = lambda: running.release.wait(60) and describe()  # type: ignore[assignment,return-value] # it hangs
    time.sleep(0.3)
    running.clock.ahead += SILENT + 60
    said = running.told()
    assert (said["state"], said["reason"], said["who"]) == ("blocked", "not_responding", "practice_it")
    running.clock.ahead += LIVELY - SILENT
    assert not running.told()["healthy"]
    assert "not_responding" in running.told()["health"]


def test_status_of_an_index_that_cannot_be_read_is_a_state_and_unhealthy(running: Running) -> None:
    said, _ = cli._status(running.world.settings, None, blind=SiteError("disk_error", "index.db: SQLITE_IOERR"))
    assert (said["state"], said["reason"], said["who"]) == ("blocked", "disk_error", "practice_it")
    assert not said["healthy"]
    assert "SQLITE_IOERR" in said["health"]
