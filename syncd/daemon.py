"""The daemon: APScheduler says what is due and only marks it; two threads take the lanes' turns; one loop watches.

The watchdog is fed by progress: every lane must have ended a turn lately. A turn that fails for a reason nobody foresaw
is logged and taken again later; it never ends the process.
"""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable

from apscheduler.executors.pool import ThreadPoolExecutor
from apscheduler.schedulers.background import BackgroundScheduler

from syncd.backfill import GIL_TURN, Stop, ended
from syncd.errors import EXIT_OK, SyncdError
from syncd.logs import StatusFiles
from syncd.service import Systemd
from syncd.wiring import Lanes

TURN_LIMIT = 300.0  # seconds without the end of a turn that leave the watchdog hungry
GLANCE = 1.0
AFTER_A_BUG = 30.0
STATUS_JSON_EVERY = 60
IDENTITY_EVERY = 86_400

Describe = Callable[[], tuple[dict[str, object], str]]


class Daemon:
    """Runs until it is told to stop. `describe` gives the status as a dictionary and as text."""

    def __init__(self, lanes: Lanes, stop: Stop, systemd: Systemd, describe: Describe) -> None:
        self._lanes, self._stop, self._systemd, self._describe = lanes, stop, systemd, describe
        log = lanes.settings.log
        self._files = StatusFiles(lanes.settings.log_path, log.max_size, log.keep)
        self._marks: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._turned_at = dict.fromkeys(("api", "pull"), lanes.clock.steady())
        self._state: object = None

    def run(self) -> int:
        """Serve; 0 once a signal came."""
        lanes = self._lanes
        sys.setswitchinterval(GIL_TURN)
        lanes.log.info("started", verb="run")
        scheduler = self._scheduler()
        threads = [
            threading.Thread(target=self._take_turns, args=(name, turn), daemon=True)
            for name, turn in (("api", lanes.api_lane.turn), ("pull", lanes.pull_lane.turn))
        ]
        for thread in threads:
            thread.start()
        scheduler.start()
        self._systemd.ready()
        self._tell(report=True)
        try:
            while not self._stop.wait(GLANCE):
                try:
                    self._glance()
                except SyncdError as error:  # a disk that fails is a state; the lanes say which
                    self._lanes.log.error("turn_failed", where="watch", exc_info=error)  # noqa: TRY400 - our Log
                    self._stop.wait(AFTER_A_BUG)
        finally:
            self._systemd.stopping()
            scheduler.shutdown(wait=True)
            lanes.abandoned = not ended(threads)
            lanes.log.info("stopped", verb="run")
        return EXIT_OK

    def _scheduler(self) -> BackgroundScheduler:
        """Everything that is due by the clock. Jobs put a mark down and return; they never touch the scheduler."""
        scheduler = BackgroundScheduler(
            timezone=self._lanes.settings.zone,
            executors={"default": ThreadPoolExecutor(1)},
            job_defaults={"misfire_grace_time": None, "coalesce": True, "max_instances": 1},
        )
        tell, report = (lambda: self._tell(report=False)), (lambda: self._tell(report=True))
        for work, seconds in (
            (lambda: self._lanes.api_lane.due("identity"), IDENTITY_EVERY),
            (tell, STATUS_JSON_EVERY),
            (report, self._lanes.settings.status.every),
        ):
            scheduler.add_job(self._marks.put, "interval", args=(work,), seconds=seconds)
        return scheduler

    def _take_turns(self, name: str, turn: Callable[[float], float]) -> None:
        clock, stop = self._lanes.clock, self._stop.event
        while not stop.is_set():
            try:
                wait = turn(clock.now()) - clock.now()
            except Exception as error:  # the shell's catching place: a bug takes a turn, not the mirror
                self._lanes.log.error("turn_failed", where=name, exc_info=error)  # noqa: TRY400 - our Log has no exception()
                wait = AFTER_A_BUG
            self._turned_at[name] = clock.steady()
            if wait > 0:
                stop.wait(min(wait, GLANCE))

    def _glance(self) -> None:
        while not self._marks.empty():
            self._marks.get()()
        oldest = min(self._turned_at.values())
        if self._lanes.clock.steady() - oldest < TURN_LIMIT:
            self._systemd.watchdog()
        state = self._lanes.index.rows("SELECT lane, reason FROM site ORDER BY lane")
        if state != self._state:
            self._state = state
            self._tell(report=False)

    def _tell(self, report: bool) -> None:
        """status.json at every change and every minute; status.log for people when its time has come."""
        status, text = self._describe()
        self._files.write_json(status)
        self._systemd.status(str(text.splitlines()[0] if text else ""))
        if report:
            self._files.append_report(text)
