"""The daemon: APScheduler says what is due and only marks it; two threads take the lanes' turns; one loop watches.

The watchdog is fed by progress: every lane must have ended a turn lately. A turn that fails for a reason nobody foresaw
is logged and taken again later; it never ends the process. The signs of life in the lock file are stricter: there a
part lives only while its turns succeed, and `status`, a process of its own, judges how old they are.
"""

from __future__ import annotations

import contextlib
import queue
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from syncd import faces, notices, notifier, pacing
from syncd.backfill import AFTER_A_BUG, GIL_TURN, Stop, ended, hook_thread
from syncd.config import Settings
from syncd.errors import EXIT_OK, SyncdError
from syncd.index import Index
from syncd.logs import Log, StatusFiles
from syncd.notices import Memory
from syncd.ports import Clock
from syncd.report import Report
from syncd.schema import Row
from syncd.service import Systemd
from syncd.sites import tell_audit_head
from syncd.wiring import Lanes, open_audit, open_pulse

if TYPE_CHECKING:
    from apscheduler.schedulers.background import BackgroundScheduler

TURN_LIMIT = 300.0  # seconds without the end of a turn that leave the watchdog hungry
GLANCE = 1.0
OVER_AFTER = 1800.0  # a turn that failed did so by chance if none has since, and nothing had to be done
STATUS_JSON_EVERY = 60
TOLD_LATE = 3  # periods of status.json: then the scheduler is late, and the main loop writes it by itself
CALM = ("ok", "catching_up")
UPKEEP_EVERY = 3600
SWITCH_EVERY = 900.0
IDENTITY_EVERY = AUDIT_HEAD_EVERY = 86_400

Describe = Callable[[], tuple[Report, str]]


class Bell:
    """Tells people, by [notify]: trouble and its end to the command, each quarter of an hour of health to the switch.

    `index`: keeps what was told, over restarts; None where there is none. Sending has its own thread, for one notice
    after the other: a script that hangs holds up nobody.
    """

    def __init__(self, settings: Settings, clock: Clock, log: Log, index: Index | None) -> None:
        self._settings, self._clock, self._log, self._index = settings, clock, log, index
        self._memory: Memory | None = None
        self._switched_at = float("-inf")
        self._waiting: queue.SimpleQueue[Callable[[], tuple[str, str]]] = queue.SimpleQueue()
        self._unsent: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._sender: threading.Thread | None = None

    def look(self, status: Report) -> None:
        """A status was taken."""
        wanted, now = self._settings.notify, self._clock.now()
        if wanted.ping_url and status["healthy"] and self._clock.steady() - self._switched_at >= SWITCH_EVERY:
            self._switched_at = self._clock.steady()
            self._send(lambda url=wanted.ping_url: ("ping_url", notifier.call_switch(url)))  # type: ignore[misc]
        if not wanted.command:
            return
        if self._memory is None:
            self._memory = Memory()
            with contextlib.suppress(SyncdError):  # an index that fails is what has to be told
                self._memory = Memory.from_json(self._index.meta("notices") if self._index else None)
        while not self._unsent.empty():
            self._memory = notices.unsent(self._memory, self._unsent.get(), now)
        is_open = pacing.office_is_open(self._settings, now)
        before, (self._memory, notice) = self._memory, notices.look(self._memory, status, now, wanted.after, is_open)
        if notice is not None:
            self._log.info("notice_sent", reason=str(notice["reason"]), now=str(notice["kind"]))
            self._send(lambda command=wanted.command: self._run(command, notice))  # type: ignore[misc]
        if self._index is not None and replace(before, looked_at=now) != self._memory:
            with contextlib.suppress(SyncdError):
                self._index.remember("notices", self._memory.to_json())

    def _run(self, command: tuple[str, ...], notice: notices.Notice) -> tuple[str, str]:
        problem = notifier.run_command(command, notice)
        if problem:
            self._unsent.put(str(notice["reason"]))
        return "command", problem

    def _send(self, send: Callable[[], tuple[str, str]]) -> None:
        self._waiting.put(send)
        if self._sender is None or not self._sender.is_alive():
            self._sender = threading.Thread(target=self._send_all, daemon=True)
            self._sender.start()

    def _send_all(self) -> None:
        while True:
            way, problem = self._waiting.get()()
            if problem:
                self._log.warning("notice_failed", mode=way, failure=problem)


class Daemon:
    """Runs until it is told to stop. `describe` gives the status as a dictionary and as text."""

    def __init__(self, lanes: Lanes, stop: Stop, systemd: Systemd, describe: Describe) -> None:
        self._lanes, self._stop, self._systemd, self._describe = lanes, stop, systemd, describe
        self._files = StatusFiles.of(lanes.settings)
        self._bell = Bell(lanes.settings, lanes.clock, lanes.log, lanes.index)
        self._marks: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._turned_at = dict.fromkeys(("api", "pull"), lanes.clock.steady())
        self._state: list[Row] = []
        self._said = CALM
        self._told_at = self._ticked_at = 0.0
        self._received = 0
        self._pulse = open_pulse(lanes.settings, lanes.clock)
        for part in (*self._turned_at, "scheduler", "clock", "log"):
            self._pulse.works(part)

    def run(self) -> int:
        """Serve; 0 once a signal came."""
        lanes = self._lanes
        sys.setswitchinterval(GIL_TURN)
        lanes.log.info("started", verb="run")
        scheduler = self._scheduler()
        self._mark_upkeep()
        threads = [
            threading.Thread(target=self._take_turns, args=(name, turn), daemon=True)
            for name, turn in (("api", lanes.api_lane.turn), ("pull", lanes.pull_lane.turn))
        ]
        threads += hook_thread(lanes, self._stop.event)
        scheduler.start()
        try:
            for thread in threads:
                thread.start()
            self._systemd.ready()
            self._tell(report=True)
            while not self._stop.wait(GLANCE):
                try:
                    self._glance()
                except SyncdError as error:  # a disk that fails is a state; the lanes say which
                    self._lanes.log.error("turn_failed", where="watch", exc_info=error)  # noqa: TRY400 - our Log
                    self._stop.wait(AFTER_A_BUG)
        finally:
            self._stop.event.set()  # the lanes end, too, where a bug ends this loop
            self._systemd.stopping()
            scheduler.shutdown(wait=True)
            lanes.abandoned = not ended(threads)
            lanes.log.info("stopped", verb="run")
            if not lanes.abandoned:
                self._pulse.close()
        return EXIT_OK

    def _scheduler(self) -> BackgroundScheduler:
        """Everything that is due by the clock. Jobs put a mark down and return; they never touch the scheduler."""
        from apscheduler.executors.pool import ThreadPoolExecutor  # noqa: PLC0415 - other verbs need not load it
        from apscheduler.schedulers.background import BackgroundScheduler  # noqa: PLC0415 - the same

        scheduler = BackgroundScheduler(
            timezone=self._lanes.settings.zone,
            executors={"default": ThreadPoolExecutor(1)},
            job_defaults={"misfire_grace_time": None, "coalesce": True, "max_instances": 1},
        )
        tell, report = self._ticked, (lambda: self._tell(report=True))
        for work, seconds in (
            (self._lanes.api_lane.identity.compare_soon, IDENTITY_EVERY),
            (self._mark_upkeep, UPKEEP_EVERY),
            (self._tell_audit_head, AUDIT_HEAD_EVERY),
            (tell, STATUS_JSON_EVERY),
            (report, self._lanes.settings.status.every),
        ):
            scheduler.add_job(self._marks.put, "interval", args=(work,), seconds=seconds)
        return scheduler

    def _mark_upkeep(self) -> None:
        """The lane knows when each was done last: a mark may come too often, never too seldom."""
        for mark in ("copy", "publish", "drill", "scrub"):
            self._lanes.pull_lane.due(mark)

    def _take_turns(self, name: str, turn: Callable[[float], float]) -> None:
        clock, stop, failed_at = self._lanes.clock, self._stop.event, float("-inf")
        while not stop.is_set():
            longest = GLANCE  # between two looks at whether to stop, and for a wish
            try:
                wait = turn(clock.now()) - clock.now()
                if wait <= 0 or clock.steady() - failed_at > OVER_AFTER:  # between failures, idle turns prove nothing
                    failed_at = float("-inf")
                    self._pulse.works(name)
            except Exception as error:  # the shell's catching place: a bug takes a turn, not the mirror
                self._lanes.log.error("turn_failed", where=name, exc_info=error)  # noqa: TRY400 - our Log has no exception()
                failed_at = clock.steady()
                self._pulse.ails(name, getattr(error, "reason", "lane_stuck"))
                wait = longest = AFTER_A_BUG
            self._turned_at[name] = clock.steady()
            if wait > 0:
                stop.wait(min(wait, longest))

    def _glance(self) -> None:
        clock = self._lanes.clock
        if clock.now() != self._ticked_at:  # a clock that stands still lets nothing fall due
            self._ticked_at = clock.now()
            self._pulse.works("clock")
        self._pulse.beat()
        received = self._lanes.pull_lane.received
        if received != self._received:  # a large file on a slow line takes longer than any turn: it moves, so it lives
            self._received, self._turned_at["pull"] = received, clock.steady()
            self._pulse.works("pull")
        while not self._marks.empty():
            self._marks.get()()
        oldest = min(self._turned_at.values())
        if clock.steady() - oldest < TURN_LIMIT:
            self._systemd.watchdog()
        state = self._lanes.index.rows("SELECT lane, reason FROM site ORDER BY lane")
        if state != self._state or clock.steady() - self._told_at > TOLD_LATE * STATUS_JSON_EVERY:
            self._state = state
            self._tell(report=False)

    def _ticked(self) -> None:
        """The scheduler's mark of every minute: so it lives."""
        self._pulse.works("scheduler")
        self._tell(report=False)

    def _tell(self, report: bool) -> None:
        """status.json at every change and every minute; status.log for people when its time has come."""
        self._told_at = self._lanes.clock.steady()
        status, text = self._describe()
        if self._files.write_json(status):
            self._pulse.works("log")
        self._log_change((str(status["state"]), str(status["reason"])))
        self._systemd.status(faces.line(status, self._lanes.settings.zone))
        self._bell.look(status)
        if report:
            self._files.append_report(text)

    def _tell_audit_head(self) -> None:
        tell_audit_head(open_audit(self._lanes.settings), self._lanes.log)

    def _log_change(self, said: tuple[str, str]) -> None:
        """What no lane has logged: trouble that only shows from outside, or by its age, and its end."""
        before, self._said = self._said, said
        told = {str(row["reason"]) for row in self._state}
        if said == before or said[1] in told or (said[0] in CALM and before[0] in CALM):
            return
        log = self._lanes.log.info if said[0] in CALM else self._lanes.log.warning
        log("state_changed", state=said[0], reason=said[1])
