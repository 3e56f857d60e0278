"""The one-shot: poll every list once, fetch what is owed, say how far it is, stop where it was told to."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from syncd.catalog import Catalog
from syncd.config import Settings
from syncd.errors import (
    EXIT_HELD,
    EXIT_INTERRUPTED,
    EXIT_LIMIT,
    EXIT_OK,
    EXIT_OWED,
    EXIT_TERMINATED,
    EXIT_USAGE,
    REASONS,
)
from syncd.index import FAILING_AFTER, Index
from syncd.logs import StatusFiles
from syncd.mirror import BULK, CLOCK_SLACK, OWED
from syncd.model import lists_of
from syncd.pacing import expected_spacing
from syncd.ports import Clock
from syncd.report import HOUR, Report
from syncd.search import Filters
from syncd.wiring import Lanes, open_pulse

RESUMED_WITHIN = 24 * 3600.0  # an interrupted backfill younger than this is gone on with
HORIZON = 3600.0  # what is due within the hour is waited for
GIVE_UP_AFTER = 3  # tries against a site that stays down, before the verb ends with that site's code
AT_ONCE = (12, 13, EXIT_HELD)  # nobody but a person can end these
GOES_ON = "database_went_back"  # it holds disappearances; the rest is mirrored as ever
PRECEDENCE = (12, 13, 5, EXIT_LIMIT, EXIT_HELD)
IN_VAIN = "failures > 0 AND next_try_at > ?"  # a list that was tried, and has its time
WHYS = ", ".join(f"'{why}'" for why in OWED + BULK)
GLANCE = 0.2
AFTER_A_BUG = 30.0
SHOWN_EVERY = 1.0
SHOWN_PART = 20  # and its figures, which take longer in a large practice, at most so small a part of the time
TOLD_EVERY = 60.0  # seconds: status.json
GIL_TURN = (
    0.0005  # seconds: the API lane starts on time although the pull lane computes (Python's own is ten times that)
)
ENDING = 6.0  # seconds that a lane has to finish its turn after a signal: all is over within 10, on a slow machine, too


_NOT_TOLD = (  # the program of [hook] has not heard of them yet, and does not fail
    "version WHERE sidecar = 1 AND seq > (SELECT json_extract(value, '$.seq') FROM meta WHERE key = 'hook')"
    " AND NOT EXISTS (SELECT 1 FROM site WHERE lane = 'hook')"
)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a backfill is. `expected` items grow while lists are still counted; seconds_left may be None."""

    lists: int
    of_lists: int
    archived: int
    owed: int
    expected: int
    bytes: int
    requests: int
    seconds_left: float | None
    forecast_bytes: int
    waiting: str


@dataclass(frozen=True, slots=True)
class Wanted:
    """What was asked for. `until`: seconds since the epoch; `since`: lists polled after it count as polled."""

    since: float
    patients: frozenset[int] | None = None
    max_requests: int | None = None
    until: float | None = None


class Stop:
    """The wish of a signal to stop. `event` is what the lanes wait on; only `wait`, in the main thread, sets it.

    A signal handler runs in the midst of anything, also of a wait that holds the event's own lock: it must not set it.
    """

    def __init__(self) -> None:
        self.event = threading.Event()
        self.asked = False
        self.terminated = False

    def __call__(self, terminated: bool = False) -> None:
        """Stop soon. Safe in a signal handler."""
        self.asked, self.terminated = True, terminated

    def wait(self, seconds: float) -> bool:
        """Wait in the main thread; True as soon as a stop was asked for."""
        if not self.asked:
            self.event.wait(seconds)
        if self.asked:
            self.event.set()
        return self.asked


def since(index: Index, now: float, whole: bool) -> float:
    """Since when a list counts as polled: from now, or from the start of a backfill that was interrupted lately."""
    started, done = index.meta_time("backfill_started_at"), index.meta_time("backfill_done_at")
    if whole and started > done and 0 <= now - started < RESUMED_WITHIN:
        return started
    if whole:
        index.remember("backfill_started_at", repr(now))
    return now


def run(lanes: Lanes, wanted: Wanted, stop: Stop, show: Callable[[Progress], None]) -> int:
    """Take turns until every owed item was tried and none is due within the hour; the exit code."""
    sys.setswitchinterval(GIL_TURN)
    over, pulse = threading.Event(), open_pulse(lanes.settings, lanes.clock)
    errors: list[BaseException] = []

    def take_turns(name: str, turn: Callable[[float], float]) -> None:
        pulse.works(name)
        try:
            while not (stop.event.is_set() or over.is_set()):
                wait = turn(lanes.clock.now()) - lanes.clock.now()
                pulse.works(name)
                if wait > 0:
                    stop.event.wait(min(wait, 1.0))
        except BaseException as error:  # noqa: BLE001 - raised again by the thread that ends the verb
            errors.append(error)
            over.set()

    threads = [
        threading.Thread(target=take_turns, args=(name, turn), daemon=True)
        for name, turn in (("api", lanes.api_lane.turn), ("pull", lanes.pull_lane.turn))
    ]
    threads += hook_thread(lanes, stop.event, over)
    for thread in threads:
        thread.start()
    look = Look(lanes.settings, lanes.index, lanes.clock, wanted, lambda: lanes.api_lane.requests)

    marked_at = float("-inf")

    def show_and_beat(progress: Progress) -> None:
        nonlocal marked_at
        pulse.beat()
        if lanes.clock.steady() - marked_at >= HOUR:
            marked_at = lanes.clock.steady()
            lanes.pull_lane.due("copy")
            lanes.pull_lane.due("publish")
        show(progress)

    try:
        code = watch(look, stop, over, show_and_beat)
    finally:
        over.set()
        lanes.abandoned = not ended(threads)
        if not lanes.abandoned:
            pulse.close()
    if errors:
        raise errors[0]
    if not (stop.asked or lanes.abandoned):
        lanes.pull_lane.publish_index(lanes.clock.now())
    if code in (EXIT_OK, EXIT_OWED, EXIT_HELD) and wanted.patients is None:
        lanes.index.remember("backfill_done_at", repr(lanes.clock.now()))
    return code


def hook_thread(lanes: Lanes, *ends: threading.Event) -> list[threading.Thread]:
    """A thread for [hook], where there is one. What goes wrong in it, here or in the program, stops nothing else."""
    hook, clock = lanes.hook, lanes.clock

    def over() -> bool:
        return any(end.is_set() for end in ends)

    def take_turns(turn: Callable[[float, Callable[[], bool]], float]) -> None:
        until = float("-inf")
        while not over():
            if clock.steady() < until:
                ends[0].wait(GLANCE)
                continue
            now = clock.now()
            try:
                until = clock.steady() + turn(now, over) - now
            except Exception as error:
                lanes.log.error("turn_failed", where="hook", exc_info=error)  # noqa: TRY400 - our Log has no exception()
                until = clock.steady() + AFTER_A_BUG

    return [] if hook is None else [threading.Thread(target=take_turns, args=(hook.turn,), daemon=True)]


def ended(threads: Sequence[threading.Thread], seconds: float = ENDING) -> bool:
    """Give the lanes some seconds to finish the step in hand. One that hangs is left: its journal heals it."""
    deadline = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return not any(thread.is_alive() for thread in threads)


def watch(look: Look, stop: Stop, over: threading.Event, show: Callable[[Progress], None]) -> int:
    """Show the progress until an exit code is decided."""
    due_at = float("-inf")
    while True:
        steady = look.clock.steady()
        code = EXIT_INTERRUPTED if over.is_set() else look.verdict(stop)
        if code is not None or steady >= due_at:
            show(look.progress())
            due_at = steady + max(SHOWN_EVERY, SHOWN_PART * (look.clock.steady() - steady))
        if code is not None:
            return code
        stop.wait(GLANCE)


class Look:
    """Reads out of the index how far the work is, whoever does it."""

    def __init__(
        self, settings: Settings, index: Index, clock: Clock, wanted: Wanted, requests: Callable[[], int]
    ) -> None:
        self.clock = clock
        self._settings, self._index, self._wanted, self._requests = settings, index, wanted, requests
        self._since = wanted.since
        self._catalog = Catalog(index, settings.name, settings.sync.kinds)
        only = wanted.patients
        self._mine = "" if only is None else f" AND pat_num IN ({', '.join(map(str, sorted(only)))})"
        names = ", ".join(f"'{name}'" for name in lists_of(settings.sync.kinds))
        self._polled = f"list JOIN patient USING (pat_num) WHERE left_at IS NULL AND name IN ({names})"

    def verdict(self, stop: Stop) -> int | None:
        """The exit code once it is decided, in the order of precedence."""
        if stop.asked:
            return EXIT_TERMINATED if stop.terminated else EXIT_INTERRUPTED
        now, wanted = self.clock.now(), self._wanted
        if now < self._since:  # the clock went back: what is polled from now on counts
            self._since = now - CLOCK_SLACK
        codes = set()
        for row in self._index.rows("SELECT reason, failures, since_at FROM site"):
            if row["reason"] == GOES_ON or (row["reason"] == "throttled" and now - row["since_at"] <= HOUR):
                continue  # the latter is a wait that was asked for
            code = REASONS[row["reason"]][2]
            met = row["failures"] >= (1 if code in AT_ONCE or row["reason"] == "bad_answers" else GIVE_UP_AFTER)
            codes |= {code} if met else set()
        if wanted.max_requests is not None and self._requests() >= wanted.max_requests:
            codes.add(EXIT_LIMIT)
        if (wanted.until is not None and now >= wanted.until) or self._index.paused_until(now):
            codes.add(EXIT_LIMIT)
        decided = next((code for code in PRECEDENCE if code in codes), None)
        if decided is not None:
            return decided
        return None if self._work_left(now) else self._outcome(now)

    def _work_left(self, now: float) -> bool:
        """Whether a list was not polled yet, or anything is under way or due within the hour."""
        if self._index.meta_time("roster_at") < self._since:
            return True
        here = "JOIN patient USING (pat_num) WHERE left_at IS NULL"
        unread = "SELECT 1 FROM list l WHERE l.pat_num = patient.pat_num AND l.name = 'documents' AND l.failures > 0"
        wanted = int("thumbnail" in self._settings.sync.kinds)  # those of an unreadable list wait for it
        thumbnails = f"item {here} AND {wanted} AND thumbnail_due = 1 AND NOT EXISTS ({unread})"
        return any(
            self._index.value(f"SELECT 1 FROM {rows}{self._mine} LIMIT 1", *times)  # noqa: S608 - our own text
            for rows, times in (
                (f"{self._polled} AND polled_at < ? AND NOT ({IN_VAIN})", (self._since, now)),
                ("attempt WHERE state IN ('asked', 'placed', 'unanswered')", ()),
                ("attempt WHERE state = 'cleaning' AND next_look_at <= ?", (now,)),
                (
                    f"duty {here} AND why IN ({WHYS}) AND busy = 0 AND failures < ? AND next_try_at <= ?",
                    (FAILING_AFTER, now + HORIZON),
                ),
                (f"{thumbnails} AND thumbnails_after_at <= ?", (now + HORIZON,)),
                (_NOT_TOLD, ()),
            )
        )

    def _lists(self) -> tuple[int, int]:
        """Lists that were polled, or tried in vain, since the start; and all of them."""
        tried = f"polled_at >= ? OR {IN_VAIN}"
        row = self._index.rows(
            f"SELECT count(*) AS lists, sum({tried}) AS tried FROM {self._polled}{self._mine}",  # noqa: S608
            *(self._since, self.clock.now()),
        )[0]
        return row["tried"] or 0, row["lists"]

    def _outcome(self, now: float) -> int:
        states = self._states(now)
        holds = (
            "SELECT 1 FROM site WHERE reason = ? UNION SELECT 1 FROM guard WHERE (scope, state) = ('roster', 'held')"
        )
        if "held" in states or self._index.value(holds, GOES_ON):
            return EXIT_HELD
        unread = f"SELECT 1 FROM {self._polled} AND failures > 0{self._mine}"  # noqa: S608 - our own text
        damaged = f"SELECT 1 FROM damage WHERE state != 'unhealable'{self._mine}"  # noqa: S608 - our own text
        left = any(self._index.value(f"{rows} LIMIT 1") for rows in (unread, damaged))
        if left or states & {"owed", "failing"}:
            return EXIT_OWED
        there = "SELECT 1 FROM patient WHERE pat_num = ? AND left_at IS NULL"
        known = all(self._index.value(there, each) for each in self._wanted.patients or ())
        return EXIT_OK if known else EXIT_USAGE

    def _states(self, now: float) -> set[str]:
        """The states that decide, as far as items are in them; where patients were named, only theirs."""
        if self._wanted.patients is None:
            facts = self._catalog.status_facts(now)
            return {state for state in ("held", "owed", "failing") if getattr(facts, state)}
        return {row["state"] for each in self._wanted.patients for row in self._catalog.find(Filters(patient=each))}

    def progress(self) -> Progress:
        """The figures of this moment."""
        now = self.clock.now()
        facts = self._catalog.status_facts(now)
        polled, of_lists = self._lists()
        seen = facts.archived_items + facts.owed
        expected = max(seen, round(seen * of_lists / polled)) if polled else seen
        requests_left = (of_lists - polled) + max(facts.owed, expected - facts.archived_items) + facts.thumbnail_calls
        waiting: str | None = self._index.value(
            "SELECT reason FROM site WHERE lane != 'hook' ORDER BY since_at LIMIT 1"
        )
        return Progress(
            lists=polled,
            of_lists=of_lists,
            archived=facts.archived_items,
            owed=facts.owed,
            expected=expected,
            bytes=facts.archived_bytes,
            requests=self._requests(),
            seconds_left=requests_left * expected_spacing(self._settings, now, bulk=True) if polled else None,
            forecast_bytes=round(facts.mean_bytes * expected),
            waiting=waiting or "",
        )


def telling(settings: Settings, clock: Clock, describe: Callable[[], tuple[Report, str]]) -> Callable[[bool], None]:
    """A function that tells as the daemon does: status.json each minute, status.log in its time; `ended`: both now."""
    files, json_at, report_at = StatusFiles.of(settings), clock.steady(), clock.steady() + settings.status.every

    def tell(ended: bool) -> None:
        nonlocal json_at, report_at
        steady = clock.steady()
        reports = ended or steady >= report_at
        if not reports and steady < json_at:
            return
        said, text = describe()
        files.write_json(said)
        json_at = steady + TOLD_EVERY
        if reports:
            files.append_report(text)
            report_at = steady + settings.status.every

    return tell
